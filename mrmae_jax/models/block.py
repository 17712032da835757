"""The transformer block, and what of a block the backward pass recomputes."""

from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.attention import Attention, DecomposedPositions, RelativePositions, Windows
from mrmae_jax.models.layers import (
  Dense,
  DropPath,
  LayerNorm,
  Mask,
  activate,
  add_bias,
  add_branch,
  select_visible,
)


class Block(nn.Module):
  """Pre-norm transformer block: x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x)).

  Attributes:
    num_heads: divides the width.
    mlp_dim: hidden width of the MLP; of each half if it is gated.
    eps: epsilon of both LayerNorms.
    activation: a key of ACTIVATIONS.
    gated: the MLP is fc2(activation(a) * b) with [a, b] = fc1(x) (SwiGLU, Shazeer 2020,
      arXiv 2002.05202), instead of fc2(activation(fc1(x))).
    layer_scale: `scale1` and `scale2` are learned gains per channel (Touvron et al. 2021,
      arXiv 2103.17239); otherwise both are 1.
    rotate, key_bias, relative: see `Attention`.
    windows: attention works inside of them; None: on all tokens.
    dtype: of the computation; parameters are float32.
  """

  num_heads: int
  mlp_dim: int
  eps: float = 1e-6
  activation: str = "gelu"
  gated: bool = False
  layer_scale: bool = False
  rotate: Callable[[jax.Array], jax.Array] | None = None
  key_bias: bool = True
  relative: RelativePositions | DecomposedPositions | None = None
  windows: Windows | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    drop: DropPath = DropPath(),
    only: Mask | None = None,
    mask: Mask | None = None,
    bias: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """[B, T, D] -> [B, T, D], and the first token's attention [B, T] (see `Attention`).

    If `only` is given, the output holds its V visible tokens alone: [B, V, D]. They attend to all T
    tokens; the other tokens end before the MLP. `mask`, `bias`: see `Attention`.
    """
    dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)
    attend_to = Attention(
      self.num_heads, self.rotate, self.key_bias, self.relative, self.dtype, name="attn"
    )
    norm = lambda name: LayerNorm(self.eps, self.dtype, name=name)
    x, h = norm("norm1").of_sum(x)
    h = h if self.windows is None else self.windows.cut(h)
    h, h_bias, attention = attend_to(h, only, mask, bias)
    h = h if self.windows is None else self.windows.join(h)
    branch = drop(0, *self._scale("scale1", h, h_bias))
    x, h = norm("norm2").of_sum(select_visible(x, only), *branch)
    h, h_bias = dense(self.mlp_dim * (1 + self.gated), "fc1")(h, apart=True)
    if self.gated:
      h, gate = jnp.split(add_bias(h, h_bias), 2, axis=-1)
      h = activate(self.activation, h) * gate
    else:
      h = activate(self.activation, h, h_bias)
    branch = self._scale("scale2", *dense(x.shape[-1], "fc2")(h, apart=True))
    return add_branch(x, *drop(1, *branch)), attention

  def _scale(self, name, x, bias):
    if not self.layer_scale:
      return x, bias
    gain = self.param(name, nn.initializers.ones, x.shape[-1:])
    return add_bias(x, bias) * gain.astype(self.dtype), None


REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def rematerialize(
  block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
  """Returns a class of blocks whose backward pass recomputes activations: less memory, same
  numbers.

  Args:
    block: class of modules.
    remat: "none" recomputes nothing; "dots" keeps the results of matrix products and recomputes
      norms and activations; "full" keeps the inputs alone and costs a third more work.
    static_argnums: positions of the arguments of __call__ that are not arrays; `self` has position
      0.
  """
  if remat == "none":
    return block
  return nn.remat(block, policy=REMAT_POLICIES[remat], static_argnums=static_argnums)
