"""Maps of several strides for a detector, out of one encoder's.

The levels are called p2 to p6, of strides 4, 8, 16, 32 and 64 for tokens of 16 pixels; p6 is every
second row and column of p5. Sources: detectron2, modeling/backbone/vit.py (SimpleFeaturePyramid)
and fpn.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import gelu
from mrmae_jax.models.maps import ConvNorm, Upsample, norm_layer

# Uniform in 1 / sqrt(fan in), torch's default; and in sqrt(3 / fan in), Caffe2's.
TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
CAFFE2_XAVIER = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def halve(x: jax.Array) -> jax.Array:
  """Max pooling: [B, h, w, C] -> [B, h / 2, w / 2, C], rounded down."""
  return nn.max_pool(x, (2, 2), strides=(2, 2))


class SimpleFeaturePyramid(nn.Module):
  """ViTDet's pyramid: each level from the last map alone (Li et al. 2022, arXiv 2203.16527).

  Attributes:
    channels: of every level.
    norm: see `maps.norm_layer`.
    dtype: of the computation.
  """

  channels: int = 256
  norm: str = "ln"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> list[jax.Array]:
    """A map of stride 16 [B, h, w, C] -> p2 to p6 [B, ..., channels]."""
    up = lambda share, name: Upsample(x.shape[-1] // share, self.dtype, name=name)
    p2 = up(2, "p2_up_0")(x)
    p2 = gelu(norm_layer(self.norm, self.dtype, "p2_norm")(p2, train))
    levels = [up(4, "p2_up_1")(p2), up(2, "p3_up")(x), x, halve(x)]
    for name, size in (("lateral", 1), ("output", 3)):
      levels = [
        ConvNorm(
          self.channels, size, self.norm, TORCH_UNIFORM, self.dtype, name=f"p{level}_{name}"
        )(y, train)
        for level, y in enumerate(levels, 2)
      ]
    return [*levels, levels[-1][:, ::2, ::2]]


class FPN(nn.Module):
  """Top-down pyramid over maps of several strides (Lin et al. 2017, arXiv 1612.03144).

  Attributes:
    channels, norm, dtype: as in `SimpleFeaturePyramid`.
  """

  channels: int = 256
  norm: str = "bn"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: list[jax.Array], train: bool = False) -> list[jax.Array]:
    """Maps of strides 4, 8, 16, 32, each twice as large as the next -> p2 to p6."""
    module = lambda size, name: ConvNorm(
      self.channels, size, self.norm, CAFFE2_XAVIER, self.dtype, name=name
    )
    sums = [module(1, f"p{level}_lateral")(x, train) for level, x in enumerate(maps, 2)]
    for i in reversed(range(len(sums) - 1)):
      sums[i] += sums[i + 1].repeat(2, axis=1).repeat(2, axis=2)
    levels = [module(3, f"p{level}_output")(x, train) for level, x in enumerate(sums, 2)]
    return [*levels, levels[-1][:, ::2, ::2]]
