"""The convolutional-stage ViT of ConvMAE (Alpha-VL/ConvMAE models_convmae.py).

Two stages of convolutional blocks work at 1/4 and 1/8 of the image side, then a ViT at 1/16. With a
mask, the convolutional stages run in one of two forms. Both give the same numbers from the same
parameters:

  dense   maps of the whole image [B, H, W, C]; masked positions are zero where the reference has
          zeros.
  sparse  only the visible 16-pixel blocks, [B, V, s, s, C]: a quarter of the work at a mask ratio
          of 75 %.

The sparse form is exact because the mask acts on the input of the 5x5 depthwise convolution, the
only operator that looks beyond one block: everything else is pointwise or has stride = kernel. So a
visible output reads visible blocks alone. Every function below works on the last three axes [...,
h, w, C]; the forms differ in the leading axes and in `spatial_mix`. Without a mask it is the dense
form, or on GPUs whose kernels convolve blocks the sparse one with all blocks visible.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.attention import Scope, attention_scopes
from mrmae_jax.models.block import Block, rematerialize
from mrmae_jax.models.blockwise_kernels import has_blockwise_kernels
from mrmae_jax.models.depthwise import blockwise_conv, depthwise_conv
from mrmae_jax.models.layers import (
  Dense,
  DropPath,
  LayerFusion,
  LayerNorm,
  Mask,
  activate,
  add_bias,
  add_branch,
  drop_paths,
  from_blocks,
  patchify,
  position_table,
  prepend,
  take_visible,
  to_blocks,
)

# The reference hard-codes torch's default in the convolutional blocks and patch embeddings.
CONV_EPS = 1e-5
KERNEL_SIZE = 5  # of the depthwise convolutions


def torch_uniform(fan_in: int):
  """Returns torch's default initializer of convolutions: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

  Weights and biases share it.
  """
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv_dense(x: jax.Array, features: int, dtype: Any, name: str, apart: bool = False):
  """Applies a 1x1 convolution, or after `patchify` one with stride = kernel.

  It is a Dense layer with a convolution's initialization; for `apart` see there.
  """
  init = torch_uniform(x.shape[-1])
  dense = Dense(features, kernel_init=init, bias_init=init, dtype=dtype, name=name)
  return dense(x, apart=apart)


class PatchEmbed(nn.Module):
  """Convolution with stride = kernel = patch_size, LayerNorm over channels, GELU."""

  patch_size: int
  dim: int
  xavier: bool = False  # the reference re-initializes the third embedding only
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, ..., h, w, C] -> [B, ..., h/p, w/p, dim]."""
    x = patchify(x, self.patch_size)
    if self.xavier:
      bias_init = torch_uniform(x.shape[-1])
      x = Dense(self.dim, bias_init=bias_init, dtype=self.dtype, name="proj")(x)
    else:
      x = conv_dense(x, self.dim, self.dtype, "proj")
    return activate("gelu", LayerNorm(CONV_EPS, self.dtype, name="norm")(x))


def spatial_mix(
  x: jax.Array,
  before: jax.Array,
  kernel: jax.Array,
  after: jax.Array,
  mask: Mask | None,
  grid: tuple[int, int],
) -> jax.Array:
  """Applies a depthwise convolution that sees visible positions only, with a bias on either side.

  Args:
    x: [B, H, W, C], or blocks [B, V, s, s, C].
    before: float32 [C], is added to the visible positions of x.
    kernel: [k, k, C].
    after: float32 [C], the convolution's bias.
    mask: zeroes the masked positions of x before the convolution; None: the whole image is visible.
    grid: (rows, columns) of tokens.

  Returns:
    The shape of x. In the dense form with one mask for each image, masked positions hold what
    spills over from visible neighbors; nothing visible reads them. With several disjoint masks each
    position comes from the convolution of its own set, as in Alpha-VL/FastConvMAE
    vision_transformer.py; positions of no set hold the bias.
  """
  if x.ndim == 5:
    return blockwise_conv(x, kernel, mask, grid, before, after)
  return _mix_map(add_bias(x, before), kernel, mask, grid) + after.astype(x.dtype)


def _mix_map(x, kernel, mask, grid):
  if mask is None:
    return depthwise_conv(x, kernel)
  b, h, w, c = x.shape
  s, zero = h // grid[0], jnp.zeros((), x.dtype)
  visible = (~mask.removed).reshape(b, -1, *grid, 1).repeat(s, 2).repeat(s, 3)
  y = depthwise_conv(jnp.where(visible, x[:, None], zero).reshape(-1, h, w, c), kernel).reshape(
    b, -1, h, w, c
  )
  return y[:, 0] if y.shape[1] == 1 else jnp.where(visible, y, zero).sum(1)


class ConvBlock(nn.Module):
  """x += conv2(depthwise5x5(mask * conv1(norm1(x)))); x += fc2(gelu(fc1(norm2(x)))).

  There is no activation between the convolutions.
  """

  mlp_dim: int
  dtype: Any = jnp.float32
  eps: float = CONV_EPS

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: Mask | None, grid: tuple[int, int], drop: DropPath = DropPath()
  ) -> jax.Array:
    """Same shape out; see `spatial_mix` for the arguments."""
    dim = x.shape[-1]
    init = torch_uniform(KERNEL_SIZE**2)
    kernel = self.param("depthwise_kernel", init, (KERNEL_SIZE, KERNEL_SIZE, dim))
    bias = self.param("depthwise_bias", init, (dim,))

    norm = lambda name: LayerNorm(self.eps, self.dtype, name=name)
    dense = lambda x, features, name: conv_dense(x, features, self.dtype, name, apart=True)

    x, h = norm("norm1").of_sum(x)
    h = spatial_mix(*dense(h, dim, "conv1"), kernel, bias, mask, grid)
    x, h = norm("norm2").of_sum(x, *drop(0, *dense(h, dim, "conv2")))
    h = activate("gelu", *dense(h, self.mlp_dim, "fc1"))
    return add_branch(x, *drop(1, *dense(h, dim, "fc2")))


class ConvViT(nn.Module):
  """ConvMAE's encoder with its multi-scale fusion.

  Attributes:
    patch_sizes: strides of the three embeddings; their product is the side of a token in pixels.
    embed_dims, depths, mlp_ratios: one value per stage.
    num_heads: heads of the transformer stage.
    cls_token: prepend a CLS token to the transformer stage, without a position, as in MAE. ConvMAE
      v2 has one.
    fuse_stages: add the outputs of the convolutional stages to the last block's, as ConvMAE does.
    fuse_layers: blocks of the transformer stage, counted from 0, whose outputs are fused with the
      last one's; () for none.
    learned_positions: the position table is a parameter [1, N, D], as in ConvMAE's fine-tuning,
      instead of a constant.
    relative_positions: every block of the transformer stage has a table of distances, see
      `attention.RelativePositions`; ConvMAE's segmentation adds them to the positions.
    layer_scale: those blocks have learned gains on both branches, see `block.Block`.
    eps: epsilon of the transformer stage and of the last norm; ConvMAE's segmentation has 1e-5.
    conv_eps: epsilon of the convolutional blocks; ConvMAE's detection in ViTDet's style has 1e-6.
    window, global_blocks, distances, position_grid: of the transformer stage, see `vit.ViT`.
    sparse: run the convolutional stages on the visible blocks only when there is a mask.
    drop_path: drop rate of the last block; it rises linearly from 0 over the blocks of all stages.
    remat: what the backward pass recomputes, see `rematerialize`.
    dtype: of the computation; parameters are float32.
  """

  patch_sizes: tuple[int, int, int] = (4, 2, 2)
  embed_dims: tuple[int, int, int] = (256, 384, 768)
  depths: tuple[int, int, int] = (2, 2, 11)
  num_heads: int = 12
  mlp_ratios: tuple[float, float, float] = (4, 4, 4)
  cls_token: bool = False
  fuse_stages: bool = True
  fuse_layers: tuple[int, ...] = ()
  learned_positions: bool = False
  relative_positions: bool = False
  layer_scale: bool = False
  eps: float = 1e-6
  conv_eps: float = CONV_EPS
  window: int = 0
  global_blocks: tuple[int, ...] = ()
  distances: str = "none"
  position_grid: tuple[int, ...] = ()
  sparse: bool = True
  drop_path: float = 0.0
  remat: str = "none"
  dtype: Any = jnp.float32

  @property
  def patch_size(self) -> int:
    return math.prod(self.patch_sizes)

  @property
  def dim(self) -> int:
    return self.embed_dims[2]

  @property
  def depth(self) -> int:
    return self.depths[2]

  @property
  def _sides(self) -> tuple[int, int]:
    """The side of a token's block after each convolutional stage, in positions."""
    return math.prod(self.patch_sizes[1:]), self.patch_sizes[2]

  def _has_block_kernels(self) -> bool:
    """Returns whether the device that is traced for has kernels for the blocks of both stages."""
    return all(
      has_blockwise_kernels(self.dtype, side, width, KERNEL_SIZE)
      for side, width in zip(self._sides, self.embed_dims)
    )

  @nn.compact
  def __call__(
    self, images: jax.Array, mask: Mask | None = None, keys: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Encodes normalized images.

    Args:
      images: [B, H, W, C], both sides multiples of `patch_size`.
      mask: the visible tokens, one or several disjoint sets for each image; None encodes the whole
        image.
      keys: [B], one key per image, which decide the dropped paths; None drops nothing.

    Returns:
      x: [B, V, D], the fused streams after the last norm, in the order of `mask.ids_keep`; or
        [B, 1 + V, D] with CLS first. Without a mask V = N, row by row. With k sets for each image,
        B * k rows, those of one image side by side.
      out: "stage1", "stage2": the convolutional feature maps [B, H/4, W/4, D1], [B, H/8, W/8, D2]
        for the default patch sizes, or packed [B * k, V, 4, 4, D1], [B * k, V, 2, 2, D2] in the
        sparse form; "layers": the output of each block, shaped as x; "attention": float32 [B, V],
        the attention of CLS in the last block, if there is a CLS token.
    """
    b, h, w, _ = images.shape
    grid = (h // self.patch_size, w // self.patch_size)
    dim = self.dim
    sparse = self.sparse and mask is not None
    is_cut = mask is None and self._has_block_kernels()
    visible = Mask.of_all(b, math.prod(grid)) if is_cut else mask
    drops = iter(drop_paths(self.drop_path, sum(self.depths), keys))

    x = images.astype(self.dtype)
    if sparse or is_cut:
      x = to_blocks(x, self.patch_size)
    if sparse:
      x = take_visible(x, mask)
    stages = self._convolve(x, visible, grid, drops)
    out = {f"stage{i}": from_blocks(y, grid) if is_cut else y for i, y in enumerate(stages, 1)}
    skips = []
    if self.fuse_stages:
      skips = [
        conv_dense(patchify(y, side), dim, self.dtype, f"stage{i}_output_decode")
        for i, (y, side) in enumerate(zip(stages, self._sides), 1)
      ]

    embed = PatchEmbed(self.patch_sizes[2], dim, xavier=True, dtype=self.dtype, name="patch_embed3")
    x = embed(stages[-1])
    x, *skips = (y.reshape(y.shape[0], -1, dim) for y in (x, *skips))
    x = Dense(dim, dtype=self.dtype, name="patch_embed4")(x)
    pos = position_table(self, grid, stored=self.position_grid).astype(self.dtype)
    if sparse:
      x = x + pos[mask.ids_keep]
    else:
      x = x + pos
      if mask is not None:
        x, *skips = (take_visible(y, mask) for y in (x, *skips))
    if self.cls_token:
      cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, dim)).astype(self.dtype)
      x = prepend(cls, x)
      # The convolutional stages have nothing to add to CLS.
      skips = [jnp.pad(y, ((0, 0), (1, 0), (0, 0))) for y in skips]

    out["layers"] = []
    scopes = attention_scopes(self, grid, mask)
    for i in range(self.depth):
      known = mask if self.relative_positions else None
      block = self._block(i, scopes[i])
      x, attention = block(x, next(drops), mask=known, bias=scopes[i].bias)
      out["layers"].append(x)
    if self.cls_token:
      out["attention"] = attention[:, 1:]
    if self.fuse_layers:
      x = LayerFusion(self.dtype, name="fusion")([out["layers"][i] for i in self.fuse_layers] + [x])
    return LayerNorm(self.eps, self.dtype, name="norm")(sum(skips, start=x)), out

  def _block(self, i: int, scope: Scope) -> nn.Module:
    """Returns block i of the transformer, whose attention works among the tokens of a scope."""
    return rematerialize(Block, self.remat)(
      self.num_heads,
      int(self.dim * self.mlp_ratios[2]),
      self.eps,
      layer_scale=self.layer_scale,
      relative=scope.relative,
      windows=scope.windows,
      dtype=self.dtype,
      name=f"blocks3_{i}",
    )

  def _convolve(self, x, mask, grid, drops):
    """Runs the convolutional stages, on maps or blocks of the image; returns what each gives."""
    outputs = []
    make_block = rematerialize(ConvBlock, self.remat, static_argnums=(3,))
    sizes = zip(self.patch_sizes, self.embed_dims, self.mlp_ratios, self.depths[:2])
    for stage, (patch_size, dim, ratio, depth) in enumerate(sizes, 1):
      x = PatchEmbed(patch_size, dim, dtype=self.dtype, name=f"patch_embed{stage}")(x)
      for i in range(depth):
        block = make_block(int(dim * ratio), self.dtype, self.conv_eps, name=f"blocks{stage}_{i}")
        x = block(x, mask, grid, next(drops))
      outputs.append(x)
    return outputs
