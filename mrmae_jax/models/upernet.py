"""UperNet: a class for every pixel, from four levels of an encoder (Xiao et al. 2018, arXiv
1807.10221).

The reference is mmsegmentation 0.30 (decode_heads/uper_head.py, fcn_head.py). The necks are those
of ConvMAE (SEG/backbone/convmae.py) and of MAE and BEiT (beit2/semantic_segmentation). BatchNorm
keeps its statistics outside of the parameters, see `maps`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.models import make_plain_encoder
from mrmae_jax.models.convvit import ConvViT, torch_uniform
from mrmae_jax.models.layers import Dense, combine, gelu
from mrmae_jax.models.maps import BatchNorm, Upsample, resize

AUX_LEVEL = 2  # that the auxiliary head reads
_DROPOUT_KEYS = {"decode_head": 2**20, "auxiliary_head": 2**20 + 1}  # no block has such a number


def pooling_matrix(old: int, new: int) -> np.ndarray:
  """Returns float32 [new, old]: row i is the mean of old rows floor(i old / new) to ceil((i + 1)
  old / new) - 1, which overlap where `new` does not divide `old`: torch's adaptive_avg_pool.
  """
  matrix = np.zeros((new, old), np.float32)
  for i in range(new):
    first, end = i * old // new, -(-(i + 1) * old // new)
    matrix[i, first:end] = 1 / (end - first)
  return matrix


class ConvModule(nn.Module):
  """Convolution without bias, BatchNorm, ReLU.

  Attributes:
    features: channels of the output.
    size: side of the kernel, 1 or 3; a map keeps its size.
    dtype: of the computation.
  """

  features: int
  size: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, features]."""
    options = dict(
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      dtype=self.dtype,
      name="conv",
    )
    if self.size == 1:
      x = Dense(self.features, **options)(x)
    else:
      x = nn.Conv(self.features, (self.size,) * 2, padding=self.size // 2, **options)(x)
    return nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x, train))


def _classify(x: jax.Array, num_classes: int, keep: jax.Array | None, dtype: Any) -> jax.Array:
  """Scales channels and applies the layer "conv_seg": [B, h, w, C] -> float32 [B, h, w, K]."""
  if keep is not None:
    x = x * keep[:, None, None].astype(x.dtype)
  init = nn.initializers.normal(0.01)
  return Dense(num_classes, kernel_init=init, dtype=dtype, name="conv_seg")(x).astype(jnp.float32)


class UperHead(nn.Module):
  """The decode head: a pooled pyramid of the deepest level, and a top-down path over all levels.

  Attributes:
    num_classes: K.
    channels: width of everything inside.
    pool_scales: sides of the pooled maps.
    dtype: of the computation; parameters, statistics and logits are float32.
  """

  num_classes: int
  channels: int = 768
  pool_scales: tuple[int, ...] = (1, 2, 3, 6)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, levels: list[jax.Array], train: bool = False, keep: jax.Array | None = None
  ) -> jax.Array:
    """Returns logits, float32 [B, h0, w0, K].

    Args:
      levels: maps [B, h, w, C], the largest first.
      train: normalize by this batch, see `BatchNorm`.
      keep: [B, channels], the factor of each channel before the classifier; None: 1.
    """
    module = lambda name, size: ConvModule(self.channels, size, self.dtype, name=name)
    *upper, deepest = levels
    size, pyramid = deepest.shape[1:3], [deepest]
    for i, scale in enumerate(self.pool_scales):
      pooled = combine(deepest, *(pooling_matrix(side, scale) for side in size))
      pyramid.append(resize(module(f"psp_modules_{i}", 1)(pooled, train), size))
    laterals = [module(f"lateral_convs_{i}", 1)(x, train) for i, x in enumerate(upper)]
    laterals.append(module("bottleneck", 3)(jnp.concatenate(pyramid, axis=-1), train))
    for i in reversed(range(len(upper))):
      laterals[i] += resize(laterals[i + 1], laterals[i].shape[1:3])
    outputs = [module(f"fpn_convs_{i}", 3)(x, train) for i, x in enumerate(laterals[:-1])]
    outputs = [resize(x, levels[0].shape[1:3]) for x in (*outputs, laterals[-1])]
    x = module("fpn_bottleneck", 3)(jnp.concatenate(outputs, axis=-1), train)
    return _classify(x, self.num_classes, keep, self.dtype)


class FCNHead(nn.Module):
  """The auxiliary head: one 3x3 convolution and the classifier, on one level.

  Attributes:
    num_classes, dtype: as in `UperHead`.
    channels: width of the convolution.
  """

  num_classes: int
  channels: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, level: jax.Array, train: bool = False, keep: jax.Array | None = None
  ) -> jax.Array:
    """[B, h, w, C] -> logits, float32 [B, h, w, K]; `train` and `keep` as in `UperHead`."""
    x = ConvModule(self.channels, 3, self.dtype, name="convs_0")(level, train)
    return _classify(x, self.num_classes, keep, self.dtype)


class ConvViTNeck(nn.Module):
  """Makes the level of stride 32 that a ConvViT lacks: 3x3 convolution of stride 2 without padding.

  It gives 15 x 15 positions out of 32 x 32.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, levels: list[jax.Array], train: bool) -> list[jax.Array]:
    """Three levels -> four levels; the third has at least 3 x 3 positions."""
    x, init = levels[-1], torch_uniform(9 * levels[-1].shape[-1])
    options = dict(kernel_init=init, bias_init=init, dtype=self.dtype, name="conv")
    x = nn.Conv(x.shape[-1], (3, 3), strides=2, padding="VALID", **options)(x)
    return [*levels, gelu(BatchNorm(dtype=self.dtype, name="bn")(x, train))]


class ViTNeck(nn.Module):
  """Makes levels of stride 4, 8, 16 and 32 out of four maps of stride 16."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, levels: list[jax.Array], train: bool) -> list[jax.Array]:
    """Four maps [B, h, w, C] -> [B, 4 h, 4 w, C], 2 h x 2 w, h x w, h / 2 x w / 2 rounded down."""
    first, second, third, last = levels
    first = Upsample(dtype=self.dtype, name="up4_0")(first)
    first = gelu(BatchNorm(dtype=self.dtype, name="bn")(first, train))
    first = Upsample(dtype=self.dtype, name="up4_1")(first)
    second = Upsample(dtype=self.dtype, name="up2")(second)
    return [first, second, third, nn.max_pool(last, (2, 2), strides=(2, 2))]


class Segmenter(nn.Module):
  """Encoder, neck, UperNet's head and the auxiliary head of training.

  Attributes:
    encoder: ConvViT without fusion, or ViT. Its last norm is not used and keeps its start.
    num_classes: K.
    channels: width of the decode head: 768 in the published base models, 1024 in large ones.
    aux_channels: width of the auxiliary head; 0 for none.
    pool_scales: see `UperHead`.
    levels: blocks of a ViT, counted from 0, that give the four levels; see `usual_levels`. A
      ConvViT has its stages.
    dropout: share of channels that are dropped before the classifiers, image by image.
    dtype: of the computation of neck and heads; parameters, statistics and logits are float32.
  """

  encoder: Any
  num_classes: int
  channels: int = 768
  aux_channels: int = 256
  pool_scales: tuple[int, ...] = (1, 2, 3, 6)
  levels: tuple[int, ...] = ()
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False, keys: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Classifies positions.

    Args:
      images: normalized images [B, H, W, C], both sides multiples of the encoder's `patch_size`.
      train: normalize by this batch instead of the running statistics, and update these.
      keys: [B], one key per image, which decide dropped paths and channels; None drops nothing.

    Returns:
      logits: float32 [B, H/4, W/4, K] for tokens of 16 pixels.
      out: "aux": the auxiliary head's logits, float32 [B, H/16, W/16, K], if there is one;
        "levels": the four maps that the heads read.
    """
    x, out = self.encoder(images, keys=keys)
    grid = tuple(side // self.encoder.patch_size for side in images.shape[1:3])
    cls = int(self.encoder.cls_token)
    as_map = lambda x: x[:, cls:].reshape(len(x), *grid, -1)
    if isinstance(self.encoder, ConvViT):
      maps = [out["stage1"], out["stage2"], as_map(out["layers"][-1])]
      levels = ConvViTNeck(self.dtype, name="neck")(maps, train)
    else:
      maps = [as_map(out["layers"][i]) for i in self.levels]
      levels = ViTNeck(self.dtype, name="neck")(maps, train)
    head = UperHead(
      self.num_classes, self.channels, self.pool_scales, self.dtype, name="decode_head"
    )
    logits = head(levels, train, self._keep("decode_head", self.channels, keys))
    out = {"levels": levels}
    if self.aux_channels:
      aux = FCNHead(self.num_classes, self.aux_channels, self.dtype, name="auxiliary_head")
      keep = self._keep("auxiliary_head", self.aux_channels, keys)
      out["aux"] = aux(levels[AUX_LEVEL], train, keep)
    return logits, out

  def _keep(self, head: str, channels: int, keys: jax.Array | None) -> jax.Array | None:
    """Returns the factors [B, channels] of a head's channels: 0, or 1 / (1 - dropout)."""
    if keys is None or not self.dropout:
      return None
    draw = lambda key: jax.random.bernoulli(
      jax.random.fold_in(key, _DROPOUT_KEYS[head]), 1 - self.dropout, (channels,)
    )
    return jax.vmap(draw)(keys) / (1 - self.dropout)


def usual_levels(depth: int) -> tuple[int, ...]:
  """Returns the blocks of a ViT that give the levels, after a third, a half, two thirds and all:
  3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, as published.
  """
  return tuple(max(1, round(depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1))


def make_segmenter(fields, heads, num_classes: int, dtype) -> Segmenter:
  """Returns the network that the sections `encoder` and `upernet` of a configuration describe.

  Args:
    fields: see `models.make_plain_encoder`.
    heads: mapping with fields of `Segmenter`; others are left out.
    num_classes: K.
    dtype: of the computation.
  """
  encoder, levels = make_plain_encoder(fields, dtype), tuple(heads["levels"])
  return Segmenter(
    encoder,
    num_classes,
    heads["channels"],
    heads["aux_channels"],
    tuple(heads["pool_scales"]),
    levels if isinstance(encoder, ConvViT) else levels or usual_levels(encoder.depth),
    heads["dropout"],
    dtype,
  )
