"""Live comparison with PyTorch and transformers on random models; needs the torch extra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import mrmae, teachers
from mrmae_jax.models.decoder import Decoder
from mrmae_jax.models.layers import depthwise_conv, gelu, sincos_2d
from mrmae_jax.models.vit import ViT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def randomise(model, seed):
  """Every bias, gain and table away from its start, where swapped norms and lost biases would not show."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
  return model.eval()


SIZES = dict(hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=52, image_size=32, patch_size=8)


@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("act, eps", [("quick_gelu", 1e-5), ("gelu", 1e-6)])
def test_clip(tmp_path, act, eps, image_size):
  from transformers.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection
  config = CLIPVisionConfig(**SIZES, hidden_act=act, layer_norm_eps=eps, projection_dim=20)
  model = randomise(CLIPVisionModelWithProjection(config), 0)
  model.save_pretrained(tmp_path)
  compare(model, tmp_path, image_size, teachers.CLIP_MEAN, teachers.CLIP_STD)


@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_dino(tmp_path, eps, image_size):
  from transformers.models.vit import ViTConfig, ViTModel
  model = randomise(ViTModel(ViTConfig(**SIZES, layer_norm_eps=eps), add_pooling_layer=False), 1)
  model.save_pretrained(tmp_path)
  compare(model, tmp_path, image_size, teachers.IMAGENET_MEAN, teachers.IMAGENET_STD)


def compare(model, folder, image_size, mean, std):
  """Patch tokens of the last residual stream, from uint8 images, as training uses them."""
  images = np.random.default_rng(0).integers(0, 256, (2, *image_size, 3), np.uint8)
  pixels = torch.from_numpy(((images / np.float32(255) - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2))
  with torch.no_grad():
    states = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
  teacher = teachers.load(teachers.read_spec(folder, image_size, "float32"))
  ours = jax.jit(teacher.features)(teacher.params, images)
  np.testing.assert_allclose(ours, states[-1][:, 1:].numpy(), atol=1e-5, rtol=1e-5)


def test_mae_loss_equals_transformers(tmp_path):
  """ViTMAEForPreTraining, an independent port of MAE, on its own weights and our noise."""
  from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining
  config = ViTMAEConfig(**SIZES, decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
                        decoder_intermediate_size=96, mask_ratio=0.6, norm_pix_loss=True, layer_norm_eps=1e-6)
  model = ViTMAEForPreTraining(config)
  randomise(model, 2)
  # A fresh model of transformers 5.23 has position tables of zeros; trained ones carry MAE's sine-cosine tables.
  tables = {"vit.embeddings.position_embeddings": 36, "decoder.decoder_pos_embed": 24}
  tables = {name: torch.from_numpy(sincos_2d(width, (4, 4), cls_token=True))[None] for name, width in tables.items()}
  assert not model.load_state_dict(tables, strict=False).unexpected_keys
  images = np.random.default_rng(3).standard_normal((2, 32, 32, 3)).astype(np.float32)
  noise = np.random.default_rng(4).random((2, 16), np.float32)
  model.save_pretrained(tmp_path)  # in the names of the files, which are more stable than those in memory
  with torch.no_grad():
    expected = float(model(torch.from_numpy(images.transpose(0, 3, 1, 2)), noise=torch.from_numpy(noise)).loss)

  from safetensors.numpy import load_file
  t = load_file(tmp_path / "model.safetensors")
  linear = lambda name: {"kernel": jnp.asarray(t[f"{name}.weight"].T), "bias": jnp.asarray(t[f"{name}.bias"])}
  norm = lambda name: {"scale": jnp.asarray(t[f"{name}.weight"]), "bias": jnp.asarray(t[f"{name}.bias"])}

  def block(name):
    parts = [linear(f"{name}.attention.attention.{x}") for x in ("query", "key", "value")]
    qkv = {"kernel": jnp.concatenate([p["kernel"] for p in parts], 1), "bias": jnp.concatenate([p["bias"] for p in parts])}
    return {"norm1": norm(f"{name}.layernorm_before"), "norm2": norm(f"{name}.layernorm_after"),
            "attn": {"qkv": qkv, "proj": linear(f"{name}.attention.output.dense")},
            "fc1": linear(f"{name}.intermediate.dense"), "fc2": linear(f"{name}.output.dense")}

  layers = next(k for k in t if k.startswith("decoder.") and ".0." in k).split(".0.")[0]  # differs between versions
  embed = t["vit.embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0).reshape(-1, 36)
  params = {
      "encoder": {"cls_token": t["vit.embeddings.cls_token"], "norm": norm("vit.layernorm"),
                  "patch_embed": {"kernel": embed, "bias": t["vit.embeddings.patch_embeddings.projection.bias"]},
                  **{f"blocks_{i}": block(f"vit.encoder.layer.{i}") for i in range(3)}},
      "decoder": {"mask_token": t["decoder.mask_token"], "embed": linear("decoder.decoder_embed"),
                  "norm": norm("decoder.decoder_norm"), "pred": linear("decoder.decoder_pred"),
                  **{f"blocks_{i}": block(f"{layers}.{i}") for i in range(2)}}}
  model = mrmae.Model(ViT(8, 36, 3, 3, 52), Decoder(192, 24, 2, 2), None, (0., 0., 0.), (1., 1., 1.))
  loss, _ = mrmae.pretrain_loss(params, jnp.asarray(images), jnp.asarray(noise), model, None, mask_ratio=0.6, norm_pix=True,
                                pixel_weight=1.0, mimic_weight=1.0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


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
  np.testing.assert_allclose(gelu(jnp.asarray(x)), torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), atol=1e-6)


@pytest.mark.parametrize("old, new", [((14, 14), (12, 12)), ((4, 4), (6, 9)), ((7, 5), (3, 8))])
def test_position_tables_are_resized_as_torch_does(old, new):
  table = np.random.default_rng(0).standard_normal((1, 1 + old[0] * old[1], 8)).astype(np.float32)
  maps = torch.from_numpy(table[:, 1:]).reshape(1, *old, 8).permute(0, 3, 1, 2)
  expected = torch.nn.functional.interpolate(maps, size=new, mode="bicubic", align_corners=False)
  ours = teachers.resize_positions(table, old, new)
  np.testing.assert_array_equal(ours[:, 0], table[:, 0])
  # Unit-normal entries; torch computes the source positions in float32, we in float64.
  np.testing.assert_allclose(ours[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 8).numpy(), atol=1e-5)
