"""Depthwise convolution, on maps and on visible blocks, against XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import mrmae, target
from mrmae_jax.models.depthwise import blockwise_conv, depthwise_conv
from mrmae_jax.models.layers import put_visible, to_blocks
from tests.helpers.devices import gpu


def grouped_conv(x, kernel):
  """The depthwise convolution of XLA."""
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    (1, 1),
    "SAME",
    feature_group_count=x.shape[-1],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision="highest",
  )


def random(*shapes):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize(
  "shape", [(2, 7, 9, 6), (1, 6, 40, 300)]
)  # all rows of an image in one band; one row alone
def test_depthwise_conv_equals_lax_conv(monkeypatch, shape):
  x, dy, kernel = (jnp.float32(y) for y in random(shape, shape, (5, 5, shape[-1])))
  y, pull = jax.vjp(grouped_conv, x, kernel)
  for devices in (
    jax.device_count(),
    1,
  ):  # alone, a CPU computes the kernel's gradient band by band
    with monkeypatch.context() as alone:
      alone.setattr(jax, "device_count", lambda devices=devices: devices)
      ours, pull_ours = jax.vjp(depthwise_conv, x, kernel)
      for a, b in zip((ours, *pull_ours(dy)), (y, *pull(dy))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)  # sums of up to 240 products


@pytest.mark.parametrize("capability", ["9.0", ""])
@pytest.mark.parametrize(
  "side, size, masks", [(4, 5, 1), (2, 5, 1), (1, 3, 1), (2, 5, 3), (3, 7, 1)]
)
def test_visible_blocks_are_convolved_as_in_the_map(capability, side, size, masks):
  """In the forms of NVIDIA GPUs and of others: outputs and both gradients, in float64."""
  device = gpu(capability)
  grid, rows = (4, 6), 2 * masks
  noise, kernel, x, dy = random((2, 24), (size, size, 7), *[(rows, 6, side, side, 7)] * 2)

  def on_map(x, kernel, mask):
    gh, gw = grid
    image = put_visible(x, mask).reshape(rows, gh, gw, side, side, 7).swapaxes(2, 3)
    y = grouped_conv(image.reshape(rows, gh * side, gw * side, 7), kernel)
    return jnp.take_along_axis(to_blocks(y, side), mask.ids_keep[:, :, None, None, None], axis=1)

  with jax.enable_x64(True):
    mask = mrmae.sample_mask(jnp.float32(noise), 0.75, masks)

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(convolve, x, kernel, dy):
      y, pull = jax.vjp(convolve, x, kernel)
      return y, *pull(dy)

    with target.tracing_for(device):
      ours = both_ways(lambda x, kernel: blockwise_conv(x, kernel, mask, grid), x, kernel, dy)
    expected = both_ways(lambda x, kernel: on_map(x, kernel, mask), x, kernel, dy)
    for a, b in zip(ours, expected):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())
