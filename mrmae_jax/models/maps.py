"""Operators on feature maps that the heads of segmentation and detection share.

BatchNorm keeps running statistics in the collection "batch_stats": a training step applies the
network with `mutable=["batch_stats"]` and gets the new ones back.
"""

from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.bilinear import bilinear_matrix
from mrmae_jax.models.convvit import torch_uniform
from mrmae_jax.models.layers import Dense, LayerNorm, combine


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes maps bilinearly: [B, h, w, C] -> [B, *size, C]; see `bilinear_matrix`."""
  if x.shape[1:3] == tuple(size):
    return x
  return combine(x, *(bilinear_matrix(old, new) for old, new in zip(x.shape[1:3], size)))


class BatchNorm(nn.Module):
  """Normalizes channels over the whole batch, in float32 and with torch's running statistics.

  Under jit a mean over the batch is one over all devices. The running variance is unbiased, n / (n
  - 1), which flax's own is not.

  Attributes:
    eps: added to the variance.
    momentum: share of this batch in the running statistics.
    dtype: of the result.
  """

  eps: float = 1e-5
  momentum: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, is_valid: jax.Array | None = None) -> jax.Array:
    """[B, H, W, C] -> the same; `train` normalizes by this batch and updates "batch_stats".

    Of the batch the maps that are valid, bool [B], count; None: all. Without any the statistics
    stay.
    """
    dim, x = x.shape[-1], x.astype(jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (dim,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (dim,))
    mean, var = running_mean.value, running_var.value
    if train:
      average, unbias, momentum = self._over_batch(x, is_valid)
      mean = average(x)
      var = average(jnp.square(x - mean))
    if train and not self.is_initializing():
      move = lambda old, new: (1 - momentum) * old + momentum * new
      running_mean.value = move(running_mean.value, mean)
      running_var.value = move(running_var.value, var * unbias)
    scale = self.param("scale", nn.initializers.ones, (dim,))
    bias = self.param("bias", nn.initializers.zeros, (dim,))
    return ((x - mean) * (jax.lax.rsqrt(var + self.eps) * scale) + bias).astype(self.dtype)

  def _over_batch(self, x: jax.Array, is_valid: jax.Array | None):
    """Returns the mean over valid positions, n / (n - 1) of their number n, and the momentum."""
    if is_valid is None:
      count = x.size // x.shape[-1]
      return lambda x: x.mean((0, 1, 2)), count / max(count - 1, 1), self.momentum
    keep = is_valid[:, None, None, None]
    count = is_valid.sum() * x.shape[1] * x.shape[2]
    average = lambda x: jnp.where(keep, x, 0).sum((0, 1, 2)) / jnp.maximum(count, 1)
    return average, count / jnp.maximum(count - 1, 1), jnp.where(count > 0, self.momentum, 0)


def norm_layer(norm: str, dtype: Any, name: str):
  """Returns (maps [B, H, W, C], train, is_valid) -> the same: a LayerNorm over channels ("ln"), or
  a `BatchNorm` ("bn").
  """
  if norm == "bn":
    return BatchNorm(dtype=dtype, name=name)
  layer = LayerNorm(1e-6, dtype, name=name)
  return lambda x, train, is_valid=None: layer(x)


class ConvNorm(nn.Module):
  """Convolution without bias and a norm, as in detectron2.

  Attributes:
    features: channels of the output.
    size: side of the kernel, 1 or 3; a map keeps its size.
    norm: see `norm_layer`.
    kernel_init: initializer of the kernel.
    dtype: of the computation.
  """

  features: int
  size: int
  norm: str
  kernel_init: Callable
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, is_valid: jax.Array | None = None) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, features]; see `BatchNorm` for the arguments."""
    options = dict(use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="conv")
    if self.size == 1:
      x = Dense(self.features, **options)(x)
    else:
      x = nn.Conv(self.features, (self.size,) * 2, padding=self.size // 2, **options)(x)
    return norm_layer(self.norm, self.dtype, "norm")(x, train, is_valid)


class Upsample(nn.Module):
  """Transposed convolution with stride = kernel = 2: a Dense layer and a move of its outputs.

  Attributes:
    features: channels of the output; None: as many as the input has.
    dtype: of the computation.
    kernel_init: initializer of the kernel, beside zeros for the bias; None: torch's default.
  """

  features: int | None = None
  dtype: Any = jnp.float32
  kernel_init: Callable | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, 2 h, 2 w, features]."""
    b, h, w, c = x.shape
    c = self.features or c
    init = self.kernel_init or torch_uniform(4 * c)
    bias_init = nn.initializers.zeros if self.kernel_init else init
    x = Dense(4 * c, use_bias=False, kernel_init=init, dtype=self.dtype, name="up")(x)
    x = x.reshape(b, h, w, 2, 2, c).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c)
    return x + self.param("bias", bias_init, (c,)).astype(self.dtype)
