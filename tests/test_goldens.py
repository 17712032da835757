"""The networks, losses and every gradient equal the reference implementations, on their own
weights.

Each case is NAME.json (dimensions) and NAME.safetensors (inputs, torch-named weights, outputs,
gradients) in the folder MRMAE_GOLDENS, by default tests/goldens. `in.noise` replaces the random
draw of the mask. Beside them lie checkpoints as they are published (.pth), whose weights are those
of convmae_pretrain.
"""

import json
import os
import pickletools
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mrmae_jax import mrmae
from mrmae_jax.errors import WeightsError
from mrmae_jax.mixup import smooth_one_hot, soft_cross_entropy
from mrmae_jax.models.classifier import Classifier
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.layers import sincos_2d
from mrmae_jax.models.vit import ViT
from mrmae_jax.pretrained import PretrainedModel
from mrmae_jax.weights import convmae, files, loaded_model, mae, readers, writers
from mrmae_jax.weights.table import convert, export
from tests.helpers.goldens import close, read_tensors

GOLDENS = Path(os.environ.get("MRMAE_GOLDENS", Path(__file__).parent / "goldens"))
FORWARD, GRADIENT = 1e-5, 1e-4  # relative to the largest entry; float32 sums in another order


def family_of(dims):
  """The reference of a case; None for cases of other tests (fine-tuning, tables)."""
  if "decoder_dim" not in dims or "num_classes" in dims:
    return None
  return convmae if "patch_sizes" in dims else mae


def find_cases():
  for path in sorted(GOLDENS.glob("*.json")):
    family = family_of(json.loads(path.read_text()))
    for sparse in {None: (), mae: (False,), convmae: (False, True)}[family]:
      yield path.stem, sparse


CASES = list(find_cases())


def mark_variants(name, sparse, *norm_pix):
  """Returns the parameters of a test; most forms of a network and of its loss are variants."""
  dims = json.loads((GOLDENS / f"{name}.json").read_text())
  is_dense = (name, not sparse) in CASES and not sparse  # a ViT has one form
  is_gradient_of_several = norm_pix and dims.get("complementary_masks", 1) > 1
  is_variant = bool(is_dense or norm_pix == (False,) or is_gradient_of_several)
  return pytest.param(name, sparse, *norm_pix, marks=[pytest.mark.variant] * is_variant)


def load(name, sparse):
  """Model, converted parameters, a tensors -> parameters converter, and the raw tensors of one
  case.
  """
  dims = json.loads((GOLDENS / f"{name}.json").read_text())
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  family = family_of(dims)
  channels = tensors["in.imgs"].shape[1]
  ratios = dims["mlp_ratio"] if isinstance(dims["mlp_ratio"], list) else [dims["mlp_ratio"]] * 3
  if family is convmae:
    depth = tuple(dims["depths"])
    encoder = ConvViT(
      tuple(dims["patch_sizes"]),
      tuple(dims["embed_dims"]),
      depth,
      dims["num_heads"],
      tuple(ratios),
      sparse=sparse,
    )
  else:
    depth, width = dims["depth"], dims["embed_dim"]
    encoder = ViT(dims["patch_size"], width, depth, dims["num_heads"], int(width * ratios[0]))
  decoder = Decoder(
    encoder.patch_size**2 * channels,
    dims["decoder_dim"],
    dims["decoder_depth"],
    dims["decoder_heads"],
    ratios[0],
  )
  model = mrmae.Model(encoder, decoder, (), (0.0,) * channels, (1.0,) * channels)

  images = jnp.asarray(tensors["in.imgs"].transpose(0, 2, 3, 1))
  masks = dims.get("complementary_masks", 1)
  mask = mrmae.sample_mask(jnp.asarray(tensors["in.noise"]), dims["mask_ratio"], masks)
  grid = tuple(side // encoder.patch_size for side in images.shape[1:3])
  expected = jax.eval_shape(
    lambda: {"encoder": encoder.init(jax.random.key(0), images, mask)["params"]}
  )
  width = expected["encoder"]["norm"]["scale"].shape[0]
  tokens = jnp.zeros((len(images) * masks, mask.ids_keep.shape[1] + (family is mae), width))
  expected |= jax.eval_shape(
    lambda: {"decoder": decoder.init(jax.random.key(0), tokens, mask, grid)["params"]}
  )

  def to_ours(named):
    return convert(
      named,
      loaded_model.name_table(encoder, decoder, (), True),
      expected,
      ignore=("pos_embed", "decoder_pos_embed"),
      source=name,
    )  # constants of ours

  params = to_ours(
    {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
  )
  return model, params, to_ours, tensors, images, mask, dims


@pytest.mark.parametrize("name, sparse", [mark_variants(*case) for case in CASES])
def test_forward(name, sparse):
  model, params, _, tensors, images, mask, dims = load(name, sparse)
  streams, prediction = jax.jit(lambda p: mrmae.encode_decode(p, images, mask, model))(params)
  masks = len(mask.removed) // len(images)

  def ours(
    x,
  ):  # FastConvMAE lists all images with their first mask, then all with their second, ...
    x = np.asarray(x)
    return x.reshape(len(images), masks, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

  np.testing.assert_array_equal(mask.ids_restore[::masks], tensors["out.ids_restore"])
  np.testing.assert_array_equal(ours(mask.removed), tensors["out.mask"])
  close(ours(streams["fused"]), tensors["out.latent"], FORWARD, "latent")
  # The bundled case of complementary masks leaves it out (5 MB); its loss and gradients are tested.
  if "out.pred" in tensors:
    close(ours(prediction), tensors["out.pred"], FORWARD, "prediction")


@pytest.mark.parametrize(
  "name, sparse, norm_pix",
  [mark_variants(*case, norm_pix) for case in CASES for norm_pix in (True, False)],
)
def test_loss_and_every_gradient(name, sparse, norm_pix):
  model, params, to_ours, tensors, images, mask, dims = load(name, sparse)
  key = "norm_pix" if norm_pix else "raw_pix"

  def loss(p):
    return mrmae.pretrain_loss(
      p,
      images,
      jnp.asarray(tensors["in.noise"]),
      model,
      {},
      mask_ratio=dims["mask_ratio"],
      complementary_masks=len(mask.removed) // len(images),
      norm_pix=norm_pix,
    )[0]

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  close(value[None], tensors[f"out.{key}.loss"].reshape(1), FORWARD, "loss")
  prefix = f"grad.{key}."
  expected = to_ours(
    {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
  )
  jax.tree_util.tree_map_with_path(
    lambda path, g, e: close(g, e, GRADIENT, jax.tree_util.keystr(path)), gradients, expected
  )


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_position_tables(name):
  _, _, _, tensors, images, _, dims = load(name, False)
  patch = dims.get("patch_size") or int(np.prod(dims["patch_sizes"]))
  grid = tuple(side // patch for side in images.shape[1:3])
  for key in ("param.pos_embed", "param.decoder_pos_embed"):
    table = tensors[key][0]
    np.testing.assert_allclose(
      sincos_2d(table.shape[1], grid, len(table) > grid[0] * grid[1]), table, atol=1e-6
    )


def named(prefix, name):
  """The tensors of a case under a prefix, without it; skips where there is no such case."""
  if not (GOLDENS / f"{name}.safetensors").is_file():
    pytest.skip(f"no {name} in {GOLDENS}")
  return read_tensors(GOLDENS, name, prefix)


def opened(path, **options):
  """A model that takes the images of the goldens, which are normalised already."""
  student = readers.read_model(path, num_heads=3, decoder_heads=4, **options)
  return PretrainedModel(student._replace(mean=(0.0,) * 3, std=(1.0,) * 3))


RELEASES = {  # which tensors of convmae_pretrain they hold, and what they must be
  "convmae_pretrain_full": (lambda name: True, dict(fuse_stages=True, cls_token=False)),
  "convmae_v1_released_encoder_only": (
    lambda name: not name.startswith(("decoder", "mask_token", "stage")),
    dict(fuse_stages=False, cls_token=False),
  ),
  "convmae_v2_released_with_cls": (
    lambda name: not name.startswith("decoder"),
    dict(fuse_stages=True, cls_token=True),
  ),
}


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pth", marks=pytest.mark.torch)])
@pytest.mark.parametrize("release", RELEASES)
def test_published_checkpoints(tmp_path, release, suffix):
  """Every tensor in its place: encoder and decoder give the reference's outputs, or say what they
  lack.
  """
  holds, expected = RELEASES[release]
  tensors = named("param.", "convmae_pretrain")
  path = GOLDENS / f"{release}.pth"
  if suffix == "pth":
    pytest.importorskip("torch")
    if not path.is_file():
      pytest.skip(f"no {path}")
  else:
    path = tmp_path / f"{release}.safetensors"
    cls = {"cls_token": np.ones((1, 1, 48), np.float32)} if expected["cls_token"] else {}
    files.write_safetensors(path, {name: x for name, x in tensors.items() if holds(name)} | cls)

  model = opened(path)
  encoder = model.network.encoder
  assert {
    key: getattr(encoder, key) for key in expected
  } == expected and not encoder.learned_positions
  assert (encoder.patch_sizes, encoder.embed_dims, encoder.depths, encoder.mlp_ratios) == (
    (4, 2, 2),
    (16, 24, 48),
    (2, 1, 3),
    (4, 4, 4),
  )
  table = loaded_model.name_table(encoder, model.network.decoder, (), True)
  for name, x in export(model.network.params, table).items():
    if name != "cls_token":
      np.testing.assert_array_equal(x, tensors[name], err_msg=name)
  features = model.encode(np.full((1, 64, 96, 3), 0.5, np.float32))
  assert features["tokens"].shape == (1, 24, 48) and features["stage1"].shape == (1, 16, 24, 16)
  if model.network.decoder is None:
    assert "encoder-only" in str(model.report)
    with pytest.raises(WeightsError, match="cannot reconstruct"):
      model.reconstruct(np.zeros((1, 64, 64, 3), np.uint8))
    return
  images, mask = (named("in.", "convmae_pretrain")[name] for name in ("imgs", "noise"))
  images, mask = (
    jnp.asarray(images.transpose(0, 2, 3, 1)),
    mrmae.sample_mask(jnp.asarray(mask), 0.75),
  )
  network = mrmae.Model(encoder, model.network.decoder, (), (0.0,) * 3, (1.0,) * 3)
  streams, prediction = jax.jit(lambda p: mrmae.encode_decode(p, images, mask, network))(
    model.network.params
  )
  expected = named("out.", "convmae_pretrain")
  close(streams["fused"], expected["latent"], FORWARD, "latent")
  close(prediction, expected["pred"], FORWARD, "prediction")


@pytest.mark.torch
def test_a_malicious_pickle_is_refused_and_nothing_in_it_is_run():
  pytest.importorskip("torch")
  path = GOLDENS / "reject_malicious_pickle.pth"
  if not path.is_file():
    pytest.skip(f"no {path}")
  with zipfile.ZipFile(
    path
  ) as archive:  # disassembled, not loaded: what it would run, and the file that this would leave
    content = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
  words = [argument for _, argument, _ in pickletools.genops(content) if isinstance(argument, str)]
  command = next(word for word in words if word.startswith("touch "))
  trace = Path(command.removeprefix("touch "))
  assert "posix system" in words and not trace.exists()
  with pytest.raises(
    WeightsError, match="needs pickled class posix.system; refusing, as it could run any code"
  ):
    readers.read_model(path)
  assert not trace.exists()


def test_fine_tuned_checkpoint(tmp_path):
  """The encoder with its trained positions, and the classifier: features and logits of the
  reference.
  """
  path = tmp_path / "finetuned.safetensors"
  tensors = named("param.", "convvit_finetune")
  files.write_safetensors(path, tensors)
  model = opened(path)
  assert model.network.encoder.learned_positions and model.config["classes"] == 7
  assert "norm (fine-tuning replaces" in str(model.report)
  images, expected = named("in.", "convvit_finetune")["imgs"], named("out.", "convvit_finetune")
  images = jnp.asarray(images.transpose(0, 2, 3, 1))  # normalized: not in [0, 1], as jit allows
  close(jax.jit(model.classify)(images), expected["logits"], FORWARD, "logits")
  norm = nn.LayerNorm(1e-6).apply(
    {"params": model.network.params["classifier"]["fc_norm"]},
    jax.jit(model.encode)(images)["pooled"],
  )
  close(norm, expected["features"], FORWARD, "features")
  writers.write_model(model.network, tmp_path / "ours.safetensors", "convmae")
  written = load_file(tmp_path / "ours.safetensors")
  assert written.keys() == tensors.keys() and all(
    np.array_equal(written[name], tensors[name]) for name in tensors
  )
  smaller = jax.jit(model.encode)(images[:, :160, :96])  # the trained table, interpolated
  assert smaller["tokens"].shape == (2, 60, 48)


def test_fine_tuning_loss_and_every_gradient(tmp_path):
  tensors = named("param.", "convvit_finetune")
  files.write_safetensors(tmp_path / "finetuned.safetensors", tensors)
  student = readers.read_model(tmp_path / "finetuned.safetensors", num_heads=3)
  model = Classifier(student.encoder, 7)
  images, labels = (named("in.", "convvit_finetune")[name] for name in ("imgs", "labels"))

  def loss(params):
    logits, out = model.apply({"params": params}, jnp.asarray(images.transpose(0, 2, 3, 1)))
    return soft_cross_entropy(logits, smooth_one_hot(jnp.asarray(labels), 7)), (
      logits,
      out["features"],
    )

  params = {"encoder": student.params["encoder"], **student.params["classifier"]}
  (value, (logits, features)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  expected = named("out.", "convvit_finetune")
  close(logits, expected["logits"], FORWARD, "logits")
  close(features, expected["features"], FORWARD, "features")
  close(value[None], expected["loss"], FORWARD, "loss")
  assert not np.asarray(
    gradients["encoder"].pop("norm")["scale"]
  ).any()  # the last norm is not used
  table = loaded_model.name_table(student.encoder, None, ("fc_norm", "head"), False)
  ours = export({"encoder": gradients.pop("encoder"), "classifier": gradients}, table)
  theirs = named("grad.", "convvit_finetune")
  assert ours.keys() == theirs.keys() == tensors.keys()
  for name, gradient in ours.items():
    close(gradient, theirs[name], GRADIENT, name)
