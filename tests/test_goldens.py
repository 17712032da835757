"""The networks, losses and every gradient equal the reference implementations, on their own weights.

Each case is NAME.json (dimensions) and NAME.safetensors (inputs, torch-named weights, outputs, gradients) in the folder
MRMAE_GOLDENS, by default tests/goldens. `in.noise` replaces the random draw of the mask.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mrmae_jax import mrmae
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.layers import sincos_2d
from mrmae_jax.models.vit import ViT
from mrmae_jax.weights import convmae, mae
from mrmae_jax.weights.table import convert

GOLDENS = Path(os.environ.get("MRMAE_GOLDENS", Path(__file__).parent / "goldens"))
FORWARD, GRADIENT = 1e-5, 1e-4  # relative to the largest entry; float32 sums in another order


def family_of(dims):
  """Which reference a case belongs to; None for what other tests are about (fine-tuning, tables)."""
  if "decoder_dim" not in dims or "num_classes" in dims:
    return None
  return convmae if "patch_sizes" in dims else mae


def find_cases():
  for path in sorted(GOLDENS.glob("*.json")):
    family = family_of(json.loads(path.read_text()))
    for sparse in {None: (), mae: (False,), convmae: (False, True)}[family]:
      yield path.stem, sparse


CASES = list(find_cases())


def load(name, sparse):
  """Model, converted parameters, a tensors -> parameters converter, and the raw tensors of one case."""
  dims = json.loads((GOLDENS / f"{name}.json").read_text())
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  family = family_of(dims)
  channels = tensors["in.imgs"].shape[1]
  ratios = dims["mlp_ratio"] if isinstance(dims["mlp_ratio"], list) else [dims["mlp_ratio"]] * 3
  if family is convmae:
    depth = tuple(dims["depths"])
    encoder = ConvViT(tuple(dims["patch_sizes"]), tuple(dims["embed_dims"]), depth, dims["num_heads"], tuple(ratios), sparse=sparse)
  else:
    depth, width = dims["depth"], dims["embed_dim"]
    encoder = ViT(dims["patch_size"], width, depth, dims["num_heads"], int(width * ratios[0]))
  decoder = Decoder(encoder.patch_size ** 2 * channels, dims["decoder_dim"], dims["decoder_depth"], dims["decoder_heads"],
                    ratios[0])
  model = mrmae.Model(encoder, decoder, (), (0.0,) * channels, (1.0,) * channels)

  images = jnp.asarray(tensors["in.imgs"].transpose(0, 2, 3, 1))
  masks = dims.get("complementary_masks", 1)
  mask = mrmae.sample_mask(jnp.asarray(tensors["in.noise"]), dims["mask_ratio"], masks)
  grid = tuple(side // encoder.patch_size for side in images.shape[1:3])
  expected = jax.eval_shape(lambda: {"encoder": encoder.init(jax.random.key(0), images, mask)["params"]})
  width = expected["encoder"]["norm"]["scale"].shape[0]
  tokens = jnp.zeros((len(images) * masks, mask.ids_keep.shape[1] + (family is mae), width))
  expected |= jax.eval_shape(lambda: {"decoder": decoder.init(jax.random.key(0), tokens, mask, grid)["params"]})

  def to_ours(named):
    entries = {"encoder": family.encoder(depth), "decoder": family.decoder(dims["decoder_depth"])}
    table = [e._replace(ours=f"{part}/{e.ours}") for part, rows in entries.items() for e in rows]
    return convert(named, table, expected, ignore=family.IGNORE, source=name)

  params = to_ours({k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")})
  return model, params, to_ours, tensors, images, mask, dims


def close(actual, expected, tolerance, what):
  error = np.abs(np.asarray(actual) - expected).max() / max(np.abs(expected).max(), 1e-12)
  assert error < tolerance, f"{what}: largest error {error:.1e} of the largest entry, allowed {tolerance:.0e}"


def test_the_folder_holds_cases():
  found = {family_of(json.loads((GOLDENS / f"{name}.json").read_text())) for name, _ in CASES}
  assert found == {convmae, mae} or (found and "MRMAE_GOLDENS" in os.environ), f"no golden cases in {GOLDENS}"


@pytest.mark.parametrize("name, sparse", CASES)
def test_forward(name, sparse):
  model, params, _, tensors, images, mask, dims = load(name, sparse)
  streams, prediction = jax.jit(lambda p: mrmae.encode_decode(p, images, mask, model))(params)
  masks = len(mask.removed) // len(images)

  def ours(x):  # FastConvMAE lists all images with their first mask, then all with their second, ...
    x = np.asarray(x)
    return x.reshape(len(images), masks, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

  np.testing.assert_array_equal(mask.ids_restore[::masks], tensors["out.ids_restore"])
  np.testing.assert_array_equal(ours(mask.removed), tensors["out.mask"])
  close(ours(streams["fused"]), tensors["out.latent"], FORWARD, "latent")
  if "out.pred" in tensors:  # the bundled case of complementary masks leaves it out, 5 MB; its loss and gradients are there
    close(ours(prediction), tensors["out.pred"], FORWARD, "prediction")


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("name, sparse", CASES)
def test_loss_and_every_gradient(name, sparse, norm_pix):
  model, params, to_ours, tensors, images, mask, dims = load(name, sparse)
  key = "norm_pix" if norm_pix else "raw_pix"

  def loss(p):
    return mrmae.pretrain_loss(p, images, jnp.asarray(tensors["in.noise"]), model, {}, mask_ratio=dims["mask_ratio"],
                               complementary_masks=len(mask.removed) // len(images), norm_pix=norm_pix)[0]

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  close(value[None], tensors[f"out.{key}.loss"].reshape(1), FORWARD, "loss")
  prefix = f"grad.{key}."
  expected = to_ours({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
  jax.tree_util.tree_map_with_path(lambda path, g, e: close(g, e, GRADIENT, jax.tree_util.keystr(path)), gradients, expected)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_position_tables(name):
  _, _, _, tensors, images, _, dims = load(name, False)
  patch = dims.get("patch_size") or int(np.prod(dims["patch_sizes"]))
  grid = tuple(side // patch for side in images.shape[1:3])
  for key in ("param.pos_embed", "param.decoder_pos_embed"):
    table = tensors[key][0]
    np.testing.assert_allclose(sincos_2d(table.shape[1], grid, len(table) > grid[0] * grid[1]), table, atol=1e-6)
