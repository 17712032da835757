"""Live comparison with PyTorch and transformers on random models; needs the torch extra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mrmae_jax
from mrmae_jax import interpolation, mrmae, teachers
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import encode
from mrmae_jax.models.depthwise import depthwise_conv
from mrmae_jax.models.layers import gelu, patchify, sincos_2d
from mrmae_jax.models.vit import ViT
from mrmae_jax.pretrained import PretrainedModel
from mrmae_jax.weights import files, loaded_model, mae, positions, readers, writers
from tests.helpers.specs import read_spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def randomise(model, seed):
  """Every bias, gain and table away from its start, where swapped norms and lost biases would not
  show.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
  return model.eval()


SIZES = dict(
  hidden_size=36, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
)
WIDE = SIZES | dict(intermediate_size=52)


def clip(**config):
  from transformers.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection

  return CLIPVisionModelWithProjection(CLIPVisionConfig(**WIDE, projection_dim=20, **config))


def dino(**config):
  from transformers.models.vit import ViTConfig, ViTModel

  return ViTModel(ViTConfig(**WIDE, **config), add_pooling_layer=False)


def dinov2(**config):
  from transformers.models.dinov2 import Dinov2Config, Dinov2Model

  return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, **config))


def dinov2_with_registers(**config):
  from transformers.models.dinov2_with_registers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
  )

  return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, **config))


def dinov3(**config):
  from transformers.models.dinov3_vit import DINOv3ViTConfig, DINOv3ViTModel

  return DINOv3ViTModel(DINOv3ViTConfig(**WIDE, num_register_tokens=2, **config))


def siglip(**config):
  from transformers.models.siglip import SiglipVisionConfig, SiglipVisionModel

  return SiglipVisionModel(SiglipVisionConfig(**WIDE, **config))


def siglip_text_and_vision():
  from transformers.models.siglip import SiglipConfig, SiglipModel

  text = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=40,
    vocab_size=50,
    max_position_embeddings=8,
    projection_size=36,
    bos_token_id=0,
    eos_token_id=1,
  )
  return SiglipModel(SiglipConfig(vision_config=WIDE, text_config=text))


def siglip2(**config):
  from transformers.models.siglip2 import Siglip2VisionConfig, Siglip2VisionModel

  sizes = {key: value for key, value in WIDE.items() if key != "image_size"}
  return Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16, **config))


# Names of their outputs: residual stream before the first block first. Registers, where there are
# any, follow CLS.
FAMILIES = [
  (clip, dict(hidden_act="quick_gelu"), 1),
  (clip, dict(hidden_act="gelu", layer_norm_eps=1e-6), 1),
  (dino, dict(layer_norm_eps=1e-12), 1),
  (dino, dict(layer_norm_eps=1e-6), 1),
  (dinov2, {}, 1),
  (dinov2, dict(use_swiglu_ffn=True), 1),
  (dinov2_with_registers, dict(num_register_tokens=3), 4),
  (dinov2_with_registers, dict(use_swiglu_ffn=True), 5),
  (dinov3, {}, 3),
  (dinov3, dict(use_gated_mlp=True, hidden_act="silu", rope_theta=50.0), 3),
  (siglip, {}, 0),
  (siglip_text_and_vision, {}, 0),
  (siglip2, {}, 0),
]


@pytest.mark.parametrize(
  "image_size", [(32, 32), (24, 40), (56, 48), (16, 64)], ids="{0[0]}x{0[1]}".format
)
@pytest.mark.parametrize(
  "make, options, prefix", FAMILIES, ids=lambda x: getattr(x, "__name__", None)
)
def test_towers(tmp_path, make, options, prefix, image_size):
  """Every layer, the last norm, projection or pooled token, and what CLS or the probe attends to;
  also what training sees.
  """
  model = randomise(make(**options), 0)
  model.set_attn_implementation("eager")
  model.save_pretrained(tmp_path)
  spec = read_spec(path=tmp_path, image_size=image_size, token_size=8, dtype="float32")
  teacher = teachers.load(spec)
  images = np.random.default_rng(0).integers(0, 256, (2, *image_size, 3), np.uint8)
  pixels = np.asarray(mrmae.normalize(jnp.asarray(images), spec.mean, spec.std))
  inputs = dict(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
  model = getattr(model, "vision_model", model) if make is siglip_text_and_vision else model
  if make is siglip2:  # takes patches in (row, column, channel) order, and the grid of each image
    grid = (image_size[0] // 8, image_size[1] // 8)
    patches = np.asarray(patchify(jnp.asarray(pixels), 8)).reshape(2, -1, 192)
    inputs = dict(
      pixel_values=torch.tensor(patches),
      pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
      spatial_shapes=torch.tensor([grid] * 2),
    )
  elif make in (clip, dino, siglip, siglip_text_and_vision):
    inputs["interpolate_pos_encoding"] = True

  probe = {}
  if prefix == 0:  # torch's module does not give its weights away unless it is asked
    attend = model.head.attention.forward

    def watched(q, k, v, **kwargs):
      y, probe["attention"] = attend(
        q, k, v, **kwargs, need_weights=True, average_attn_weights=True
      )
      return y, probe["attention"]

    model.head.attention.forward = watched
  with torch.no_grad():
    theirs = model(**inputs, output_hidden_states=True, output_attentions=True)

  x, out = jax.jit(spec.module.apply)({"params": teacher.params}, pixels)
  near = lambda a, b, atol=1e-5: np.testing.assert_allclose(a, b.numpy(), atol=atol, rtol=0)
  shown = [i for i in range(theirs.hidden_states[-1].shape[1]) if i == 0 or i >= prefix]
  for ours, hidden in zip(out["layers"][:-1], theirs.hidden_states[1:-1], strict=True):
    near(ours, hidden[:, shown])
  last = theirs.last_hidden_state[:, shown]
  if make is clip:  # whose last norm and projection only CLS goes through
    near(out["layers"][-1], last)
    near(out["proj"][:, 0], theirs.image_embeds)
  else:
    near(x, last)
  if prefix:
    attention = theirs.attentions[-1][:, :, 0, prefix:].mean(1)
  else:
    attention = probe["attention"][:, 0]
    near(out["pooled"], theirs.pooler_output)
  near(out["attention"], attention, atol=1e-6)
  output = jax.jit(teacher.forward)(teacher.params, images)
  np.testing.assert_allclose(output.features, out["layers"][-1][:, bool(prefix) :], atol=1e-5)
  np.testing.assert_allclose(output.attention, out["attention"], atol=1e-6)
  assert (
    (output.cls is None) == (prefix == 0) and spec.has_cls == (prefix > 0) and spec.has_attention
  )


def vit_mae(**config):
  from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining

  return ViTMAEForPreTraining(
    ViTMAEConfig(
      **WIDE,
      decoder_hidden_size=24,
      decoder_num_hidden_layers=2,
      decoder_num_attention_heads=2,
      decoder_intermediate_size=96,
      mask_ratio=0.6,
      norm_pix_loss=True,
      **config,
    )
  )


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("tables", ["sincos", "zero", "own"])
def test_mae_there_and_back(tmp_path, tables, eps):
  """ViTMAEForPreTraining, an independent port of MAE: its folder loads here, ours loads there, and
  the losses are the same.
  """
  model = vit_mae(layer_norm_eps=eps)
  positions = {"vit.embeddings.position_embeddings": 36, "decoder.decoder_pos_embed": 24}
  zero = {
    name: torch.zeros(1, 17, width) for name, width in positions.items()
  }  # a fresh model's in transformers 5.23
  sincos = {
    name: torch.from_numpy(sincos_2d(width, (4, 4), cls_token=True))[None]
    for name, width in positions.items()
  }
  randomise(model, 2)
  if tables != "own":
    model.load_state_dict(zero if tables == "zero" else sincos, strict=False)
  model.save_pretrained(tmp_path / "theirs")
  student = readers.read_model(tmp_path / "theirs")
  assert (
    student.encoder.learned_positions == student.decoder.learned_positions == (tables != "sincos")
  )
  assert (
    student.method == {"mask_ratio": 0.6, "norm_pix": True}
    and student.encoder.eps == student.decoder.eps == eps
  )

  images = np.random.default_rng(3).standard_normal((2, 32, 32, 3)).astype(np.float32)
  noise = np.random.default_rng(4).random((2, 16), np.float32)
  inputs = dict(
    pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2)), noise=torch.from_numpy(noise)
  )
  with torch.no_grad():
    expected = float(model(**inputs).loss)
  network = mrmae.Model(student.encoder, student.decoder, (), (0.0,) * 3, (1.0,) * 3)
  loss, _ = mrmae.pretrain_loss(
    student.params, jnp.asarray(images), jnp.asarray(noise), network, {}, mask_ratio=0.6
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)

  writers.write_model(student, tmp_path / "ours", "hf")
  back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values())
  assert all(torch.equal(x, back.state_dict()[name]) for name, x in model.state_dict().items())
  with torch.no_grad():
    assert float(back.eval()(**inputs).loss) == expected
  told = lambda config: {
    key: x for key, x in config.to_dict().items() if key not in ("_name_or_path", "dtype")
  }
  assert told(back.config) == told(model.config)


def test_the_encoder_of_mae_in_transformers(tmp_path):
  from transformers.models.vit_mae import ViTMAEModel

  vit_mae(layer_norm_eps=1e-6).save_pretrained(tmp_path / "theirs")
  student = loaded_model.encoder_only(readers.read_model(tmp_path / "theirs"))
  writers.write_model(student, tmp_path / "ours", "hf")
  model, info = ViTMAEModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values())
  images = np.random.default_rng(3).standard_normal((2, 32, 32, 3)).astype(np.float32)
  model.config.mask_ratio = 0.0
  with torch.no_grad():
    inputs = dict(
      pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2)),
      noise=torch.arange(16.0).repeat(2, 1),
    )
    hidden = model.eval()(**inputs).last_hidden_state
  features = jax.jit(lambda x: encode(student.encoder, student.params["encoder"], x))(images)
  np.testing.assert_allclose(features["tokens"], hidden[:, 1:].numpy(), atol=1e-5)
  np.testing.assert_allclose(features["cls"], hidden[:, 0].numpy(), atol=1e-5)


def test_fine_tuned_mae_on_cls(tmp_path):
  """A ViT with a linear head on its normed CLS token, in MAE's names, against transformers'
  ViTForImageClassification.
  """
  from transformers.models.vit import ViTConfig, ViTForImageClassification

  theirs = randomise(
    ViTForImageClassification(ViTConfig(**WIDE, num_labels=5, layer_norm_eps=1e-6)), 0
  )
  theirs.save_pretrained(tmp_path / "theirs")
  t = load_file(tmp_path / "theirs" / "model.safetensors")
  module = ViT(8, 36, 3, 3, 52, learned_positions=True)
  named = {}
  for entry in mae.encoder_table(module):
    parts = [t[name] for name in mae.to_hf(entry).theirs]
    named[entry.theirs[0]] = np.concatenate(parts)  # query, key, value in one
  named |= {"head.weight": t["classifier.weight"], "head.bias": t["classifier.bias"]}
  files.write_safetensors(tmp_path / "finetuned.safetensors", named)
  student = readers.read_model(tmp_path / "finetuned.safetensors", num_heads=3)
  assert student.encoder == module
  images = np.random.default_rng(3).random((2, 32, 32, 3), np.float32)
  with torch.no_grad():
    pixels = (images - np.float32(student.mean)) / np.float32(student.std)
    expected = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).logits.numpy()
  np.testing.assert_allclose(PretrainedModel(student).classify(images), expected, atol=1e-5)


def test_depthwise_convolution_and_gradients():
  rng = np.random.default_rng(0)
  x, dy = (rng.standard_normal((2, 9, 7, 6)).astype(np.float32) for _ in range(2))
  kernel = rng.standard_normal((5, 5, 6)).astype(np.float32)
  tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  tk = torch.tensor(kernel.transpose(2, 0, 1)[:, None], requires_grad=True)
  ty = torch.nn.functional.conv2d(tx, tk, padding=2, groups=6)
  ty.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
  y, vjp = jax.vjp(depthwise_conv, x, kernel)
  dx, dk = vjp(jnp.asarray(dy))
  np.testing.assert_allclose(y, ty.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
  np.testing.assert_allclose(dx, tx.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)
  np.testing.assert_allclose(dk, tk.grad.numpy()[:, 0].transpose(1, 2, 0), atol=2e-5)


def test_gelu():
  x = np.linspace(-8, 8, 2001, dtype=np.float32)
  np.testing.assert_allclose(
    gelu(jnp.asarray(x)), torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), atol=1e-6
  )


@pytest.mark.parametrize(
  "old, new",
  [
    ((14, 14), (12, 12)),
    ((4, 4), (6, 9)),
    ((7, 5), (3, 8)),
    ((37, 37), (14, 14)),
    ((4, 4), (2, 8)),
    ((4, 4), (4, 6)),
  ],
)
@pytest.mark.parametrize(
  "rule, options",
  [
    (interpolation.BICUBIC, dict(mode="bicubic")),
    (interpolation.DINO, dict(mode="bicubic", offset=0.1)),
    (interpolation.BICUBIC_ANTIALIAS, dict(mode="bicubic", antialias=True)),
    (interpolation.BILINEAR_ANTIALIAS, dict(mode="bilinear", antialias=True)),
  ],
)
def test_position_tables_are_resized_as_torch_does(old, new, rule, options):
  table = np.random.default_rng(0).standard_normal((1, 1 + old[0] * old[1], 8)).astype(np.float32)
  maps = torch.from_numpy(table[:, 1:]).reshape(1, *old, 8).permute(0, 3, 1, 2)
  offset = options.get("offset", 0)
  options = {key: value for key, value in options.items() if key != "offset"}
  where = (
    dict(scale_factor=tuple((n + offset) / o for n, o in zip(new, old)))
    if offset
    else dict(size=new)
  )
  expected = torch.nn.functional.interpolate(maps, align_corners=False, **where, **options)
  assert expected.shape[2:] == new
  ours = positions.resize(table, old, new, rule)
  np.testing.assert_array_equal(ours[:, 0], table[:, 0])
  # Unit-normal entries; torch computes the source positions in float32, we in float64.
  np.testing.assert_allclose(
    ours[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 8).numpy(), atol=1e-5
  )


def test_old_dino_checkpoints_name_their_class(tmp_path):
  """Options beside the weights: argparse.Namespace is accepted, other classes are refused."""
  import argparse
  import datetime

  for extra, refused in (
    (argparse.Namespace(arch="vit_small"), False),
    (datetime.date(2021, 4, 29), True),
  ):
    torch.save({"teacher": {"backbone.a": torch.ones(2)}, "args": extra}, tmp_path / "x.pth")
    if refused:
      with pytest.raises(WeightsError, match="needs pickled class datetime.date; refusing"):
        files.open_weights(tmp_path / "x.pth")
    else:
      assert list(files.open_weights(tmp_path / "x.pth")) == ["teacher.backbone.a"]


@pytest.mark.parametrize("make, prefix", [(dino, 1), (dinov2, 1), (dinov2_with_registers, 5)])
def test_towers_as_encoders(tmp_path, make, prefix):
  """Tokens after the last norm, at another image size than the position table's."""
  model = randomise(make(), 0)
  model.save_pretrained(tmp_path)
  encoder = mrmae_jax.load(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), np.uint8)
  pixels = np.asarray(
    mrmae.normalize(jnp.asarray(images), encoder.network.mean, encoder.network.std)
  )
  inputs = dict(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
  if make is dino:
    inputs["interpolate_pos_encoding"] = True
  with torch.no_grad():
    hidden = model(**inputs).last_hidden_state.numpy()
  features = encoder.encode(images)
  np.testing.assert_allclose(features["tokens"], hidden[:, prefix:], atol=1e-5)
  np.testing.assert_allclose(features["cls"], hidden[:, 0], atol=1e-5)


def test_a_classifier_of_transformers(tmp_path):
  from transformers.models.vit import ViTConfig, ViTForImageClassification

  names = {0: "cat", 1: "dog", 2: "emu"}
  model = randomise(ViTForImageClassification(ViTConfig(**WIDE, id2label=names)), 0)
  model.save_pretrained(tmp_path)
  ours = mrmae_jax.load(tmp_path)
  assert ours.class_names == ("cat", "dog", "emu")
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  pixels = np.asarray(mrmae.normalize(jnp.asarray(images), ours.network.mean, ours.network.std))
  with torch.no_grad():
    logits = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).logits.numpy()
  np.testing.assert_allclose(ours.classify(images), logits, atol=1e-5)


def beit(**config):
  from transformers.models.beit import BeitConfig, BeitForImageClassification

  names = {0: "cat", 1: "dog", 2: "emu"}
  options = dict(use_relative_position_bias=True, layer_norm_eps=1e-6) | config
  return BeitForImageClassification(BeitConfig(**WIDE, **options, id2label=names))


@pytest.mark.parametrize(
  "options",
  [
    {},
    dict(use_mean_pooling=False),
    dict(
      use_relative_position_bias=False,
      use_shared_relative_position_bias=True,
      use_absolute_position_embeddings=True,
      layer_norm_eps=1e-12,
    ),
  ],
  ids=["mean", "cls", "shared"],
)
def test_beit(tmp_path, options):
  """Every layer and the logits, of transformers' files and of ours, on square images."""
  model = randomise(beit(**options), 0)
  model.save_pretrained(tmp_path / "theirs")
  torch.save(model.state_dict(), tmp_path / "theirs" / "memory.bin")
  ours = mrmae_jax.load(tmp_path / "theirs")
  assert ours.class_names == ("cat", "dog", "emu")
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  pixels = mrmae.normalize(jnp.asarray(images), ours.network.mean, ours.network.std)
  inputs = torch.from_numpy(np.asarray(pixels).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    expected = model(inputs, output_hidden_states=True)
  variables = {"params": ours.network.params["encoder"]}
  _, out = jax.jit(ours.network.encoder.apply)(variables, pixels)
  for layer, hidden in zip(out["layers"], expected.hidden_states[1:], strict=True):
    np.testing.assert_allclose(layer, hidden.numpy(), atol=1e-5)
  np.testing.assert_allclose(ours.classify(images), expected.logits.numpy(), atol=1e-5)
  # In the names of its memory, beside config.json.
  memory = readers.read_model(tmp_path / "theirs" / "memory.bin")
  jax.tree.map(np.testing.assert_array_equal, memory.params, ours.network.params)
  writers.write_model(ours.network, tmp_path / "ours", "hf")
  written, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  with torch.no_grad():
    logits = written.eval()(inputs).logits
  np.testing.assert_array_equal(logits.numpy(), expected.logits.numpy())
