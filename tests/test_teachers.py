"""Teacher towers equal the reference implementations on their weights, and wrong weights never
load.
"""

import functools
import importlib.util
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from mrmae_jax import interpolation, target, teachers
from mrmae_jax.errors import WeightsError
from mrmae_jax.models.attention import Attention
from mrmae_jax.models.layers import prepend, take_visible
from mrmae_jax.models.vit import ViT
from mrmae_jax.mrmae import normalize, sample_mask
from mrmae_jax.tasks import pretrain
from mrmae_jax.weights import files, hub, networks, positions, towers
from tests import tiny
from tests.helpers.devices import gpu
from tests.helpers.specs import read_spec

GOLDENS = Path(
  os.environ.get("MRMAE_TEACHER_GOLDENS", Path(__file__).parent / "goldens" / "teachers")
)
INDEX = json.loads((GOLDENS / "index.json").read_text())["cases"]
INPUTS = {
  size: images.transpose(0, 2, 3, 1) for size, images in np.load(GOLDENS / "inputs.npz").items()
}
# 12-channel heads, which only a config.json tells; and no file in timm's names tells its
# activation.
OPTIONS = {
  "dino_backbone": dict(num_heads=4),
  "timm_clip": dict(num_heads=4, activation="quick_gelu"),
}
TOLERANCE = {
  "hf_clip_vision_fp16": 2e-2,
  "hf_clip_vision_bf16": 1e-1,
  "openai_clip_fp16": 5e-3,
}  # weights rounded in the file


def stored_cases():
  for name, case in INDEX.items():
    files_of_case = [text.split()[0] for text in case.get("files", ())]
    for file in files_of_case or [name if name.startswith("hf_") else f"{name}.safetensors"]:
      expected = case.get("same_as", name)
      with np.load(GOLDENS / f"{expected}.expected.npz") as arrays:
        sizes = sorted({key.split("/")[0] for key in arrays})
      marks = [pytest.mark.torch] if file.endswith((".pt", ".pth")) else []
      yield from (
        pytest.param(file, expected, size, marks=marks, id=f"{file}-{size}") for size in sizes
      )


def open_teacher(path, size=(32, 32), **options):
  spec = read_spec(**dict(path=path, image_size=size, token_size=8, dtype="float32") | options)
  return spec, teachers.load(spec)


def needs_torch(path):
  if path.suffix in (".pt", ".pth"):
    pytest.importorskip("torch")


@pytest.mark.parametrize("file, expected, size", stored_cases())
def test_tower_equals_reference(file, expected, size):
  path = GOLDENS / file
  if not path.exists():
    pytest.skip(f"{file} is not among the goldens that come with the code")
  needs_torch(path)
  images, expected_arrays = INPUTS[size], np.load(GOLDENS / f"{expected}.expected.npz")
  spec, teacher = open_teacher(path, images.shape[1:3], **OPTIONS.get(expected, {}))
  x, out = jax.jit(spec.module.apply)({"params": teacher.params}, images)
  proj = out.get("proj")
  ours = {
    "raw": out["layers"][-1],
    "post": x,
    "normed": x,
    "pooled": x[:, 0],
    "cls_attn": out["attention"],
    "proj_tokens": proj,
    "image_embeds": None if proj is None else proj[:, 0],
  }
  compared = [
    key for key, value in ours.items() if value is not None and f"{size}/{key}" in expected_arrays
  ]
  assert compared and len(out["layers"]) == spec.module.depth
  tolerance = TOLERANCE.get(path.stem, 1e-5)
  for key in compared:
    np.testing.assert_allclose(
      ours[key], expected_arrays[f"{size}/{key}"], atol=tolerance, rtol=0, err_msg=key
    )
  if f"{size}/attn_last" in expected_arrays:  # our row of CLS is row 0 of the full map
    full = expected_arrays[f"{size}/attn_last"]
    np.testing.assert_allclose(out["attention"], full[:, :, 0, 1:].mean(1), atol=tolerance / 10)
  assert teacher.dim == spec.module.dim and spec.grid == tuple(
    side // 8 for side in images.shape[1:3]
  )


def test_openai_in_mixed_precision(tmp_path):
  """As OpenAI's convert_weights stores it: matrices in float16, norms and tables in float32."""
  tensors = load_file(GOLDENS / "openai_clip.safetensors")
  save_file(
    {
      name: x.astype(np.float16) if x.ndim > 1 and "embedding" not in name else x
      for name, x in tensors.items()
    },
    tmp_path / "x.safetensors",
  )
  spec, teacher = open_teacher(tmp_path / "x.safetensors", layer="proj")
  _, out = jax.jit(spec.module.apply)({"params": teacher.params}, INPUTS["32x32"])
  expected = np.load(GOLDENS / "openai_clip.expected.npz")["32x32/image_embeds"]
  np.testing.assert_allclose(out["proj"][:, 0], expected, atol=5e-3)
  assert not np.allclose(out["proj"][:, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
  "layer, key", [("raw", "raw"), ("normed", "post"), ("proj", "proj_tokens")]
)
def test_what_training_sees(layer, key):
  """uint8 images that only the teacher normalises -> patches, CLS, attention."""
  spec, teacher = open_teacher(GOLDENS / "hf_clip_full", (40, 24), layer=layer)
  images = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), np.uint8)
  x, out = jax.jit(spec.module.apply)(
    {"params": teacher.params}, normalize(images, towers.CLIP_MEAN, towers.CLIP_STD)
  )
  tokens = {"raw": out["layers"][-1], "normed": x, "proj": out["proj"]}[layer]
  forward = jax.jit(teacher.forward)
  for batch in (images, images / np.float32(255)):
    output = forward(teacher.params, batch)
    np.testing.assert_allclose(output.features, tokens[:, 1:], atol=1e-5)
    np.testing.assert_allclose(output.cls, tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(output.attention, out["attention"], atol=1e-6)
  assert (
    output.features.shape[-1] == teacher.dim == spec.dim and spec.has_cls and spec.has_attention
  )
  with np.load(GOLDENS / "hf_clip_full.expected.npz") as expected:
    assert expected[f"40x24/{key}"].shape == (2, 16, teacher.dim)


def test_several_layers_are_a_mean_of_normalised_ones():
  spec, teacher = open_teacher(GOLDENS / "hf_clip_full", last_k=2)
  images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
  _, out = jax.jit(spec.module.apply)(
    {"params": teacher.params}, normalize(images, spec.mean, spec.std)
  )
  means = [
    (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    for x in map(np.asarray, out["layers"][-2:])
  ]
  output = jax.jit(teacher.forward)(teacher.params, images)
  np.testing.assert_allclose(output.features, (means[0] + means[1])[:, 1:] / 2, atol=1e-5)
  np.testing.assert_allclose(output.cls, (means[0] + means[1])[:, 0] / 2, atol=1e-5)


def teacher_output(path, images, **options):
  _, teacher = open_teacher(path, images.shape[1:3], **options)
  return jax.jit(teacher.forward)(teacher.params, images)


def test_finer_grids_are_pooled():
  images = np.random.default_rng(0).random((2, 32, 48, 3), np.float32)
  fine = teacher_output(GOLDENS / "hf_dino", images)
  coarse = teacher_output(
    GOLDENS / "hf_dino", images, token_size=16
  )  # 8-pixel patches under 16-pixel tokens: 2 x 2 of 4 x 6
  mean = lambda x: np.asarray(x).reshape(2, 2, 2, 3, 2, -1).mean((2, 4)).reshape(2, 6, -1)
  np.testing.assert_allclose(coarse.features, mean(fine.features), atol=1e-6)
  np.testing.assert_allclose(coarse.attention, mean(fine.attention)[..., 0], atol=1e-7)
  np.testing.assert_array_equal(coarse.cls, fine.cls)


def test_other_patches_see_resized_images():
  images = np.random.default_rng(0).random((2, 20, 30, 3), np.float32)
  spec, teacher = open_teacher(
    GOLDENS / "hf_dino", (20, 30), token_size=10
  )  # as /14 patches under 16-pixel tokens
  assert spec.grid == spec.tokens == (2, 3) and spec.input_size == (16, 24)
  smaller = np.clip(jax.image.resize(images, (2, 16, 24, 3), "cubic"), 0, 1)
  assert np.abs(smaller).max() <= 1
  output, expected = (
    jax.jit(teacher.forward)(teacher.params, images),
    teacher_output(GOLDENS / "hf_dino", smaller),
  )
  np.testing.assert_allclose(output.features, expected.features, atol=1e-5)
  np.testing.assert_allclose(output.attention, expected.attention, atol=1e-6)


def test_resolution():
  images = np.random.default_rng(0).random((2, 32, 48, 3), np.float32)
  spec, teacher = open_teacher(
    GOLDENS / "hf_dino", (32, 48), resolution=48
  )  # 6 x 9 patches for 4 x 6 tokens
  assert spec.input_size == (48, 72) and spec.tokens == (6, 9) and spec.grid == (4, 6)
  larger = jax.image.resize(images, (2, 48, 72, 3), "cubic").clip(0, 1)
  direct = teacher_output(GOLDENS / "hf_dino", np.asarray(larger))
  expected = jax.image.resize(
    direct.features.reshape(2, 6, 9, -1), (2, 4, 6, 48), "linear"
  ).reshape(2, 24, 48)
  np.testing.assert_allclose(
    jax.jit(teacher.forward)(teacher.params, images).features, expected, atol=1e-5
  )
  assert teacher_output(GOLDENS / "hf_dino", images, resolution=64).features.shape == (
    2,
    24,
    48,
  )  # pooled
  for wrong in (50, 20, 52):
    with pytest.raises(
      WeightsError,
      match=f"resolution={wrong} .* not a multiple of patch 8; one patch per token would be 32",
    ):
      read_spec(path=GOLDENS / "hf_dino", image_size=(32, 48), token_size=8, resolution=wrong)


def test_families_have_their_own_normalisation(tmp_path):
  read = lambda path, **options: read_spec(path=path, image_size=(32, 32), token_size=8, **options)
  clip, dino, siglip = (
    read(GOLDENS / name) for name in ("hf_clip_full", "hf_dino", "reject_siglip")
  )
  assert (
    clip.mean == towers.CLIP_MEAN
    and dino.mean == towers.IMAGENET_MEAN
    and siglip.std == (0.5, 0.5, 0.5)
  )
  assert clip.module.eps == 1e-5 and clip.module.activation == "quick_gelu" and clip.module.norm_pre
  assert (
    dino.module.eps
    == json.loads((GOLDENS / "hf_dino" / "config.json").read_text())["layer_norm_eps"]
  )
  bare = lambda name: (
    read(GOLDENS / f"{name}.safetensors", **OPTIONS.get(name, {})).module.eps
  )  # 1e-12 would not show in numbers
  assert [bare(name) for name in ("dino_backbone", "timm_clip", "openai_clip")] == [
    1e-6,
    1e-5,
    1e-5,
  ]
  assert siglip.module.activation == "gelu_tanh" and siglip.has_attention and not siglip.has_cls
  copy = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  (copy / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
  )
  overruled = read(copy, mean=(0, 0, 0))
  assert (
    read(copy).mean == (0.1, 0.2, 0.3)
    and overruled.mean == (0, 0, 0)
    and overruled.std == (0.4, 0.5, 0.6)
  )
  (copy / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": [0.5], "image_std": [0.5]})
  )
  with pytest.raises(WeightsError, match="must hold 3 numbers each"):
    read(copy)


def test_description():
  spec = read_spec(
    path=GOLDENS / "dino_backbone.safetensors", image_size=(80, 48), token_size=16, num_heads=4
  )
  assert spec.description == (
    "DINO ViT/8 (width 48, depth 3), layer raw, input 80x48, grid 10x6 brought to 5x3, position "
    "table 4x4 resized (bicubic with DINO's offset)"
  )


def test_bf16_compute_stays_close():
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  exact, rounded = (
    open_teacher(GOLDENS / "hf_clip_full", dtype=d)[1] for d in ("float32", "bfloat16")
  )
  assert rounded.params["blocks_0"]["fc1"]["kernel"].dtype == jnp.bfloat16
  assert rounded.params["norm"]["scale"].dtype == rounded.params["pos_embed"].dtype == jnp.float32
  assert rounded.digest == exact.digest
  a, b = (jax.tree.map(np.asarray, jax.jit(t.forward)(t.params, images)) for t in (exact, rounded))
  assert b.features.dtype == b.cls.dtype == b.attention.dtype == np.float32
  assert np.linalg.norm(a.features - b.features) / np.linalg.norm(a.features) < 2e-2
  np.testing.assert_allclose(a.attention, b.attention, rtol=5e-2)


def test_the_first_row_of_attention_is_that_of_the_full_map():
  x = np.random.default_rng(0).standard_normal((2, 7, 12)).astype(np.float32)
  module = Attention(3)
  params = module.init(jax.random.key(0), x)
  *_, first = jax.jit(module.apply)(params, x)
  q, k, _ = np.split(x @ np.asarray(params["params"]["qkv"]["kernel"]), 3, axis=-1)
  q, k = (z.reshape(2, 7, 3, 4).transpose(0, 2, 1, 3) for z in (q, k))
  full = np.asarray(jax.nn.softmax(q @ k.swapaxes(2, 3) / 2, axis=-1))
  np.testing.assert_allclose(first, full[:, :, 0].mean(1), atol=1e-6)
  np.testing.assert_allclose(first.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
  "name, count",
  [  # of the towers; the projections and the bias DINOv3's keys lack are apart
    ("clip_vit_b32", 87_456_000),
    ("clip_vit_b16", 85_799_424),
    ("clip_vit_l14", 303_179_776),
    ("dino_vit_s16", 21_665_664),
    ("dino_vit_s8", 21_670_272),
    ("dino_vit_b16", 85_798_656),
    ("dino_vit_b8", 85_807_872),
    ("dinov2_vit_s14", 22_056_576 - 384),
    ("dinov2_vit_b14", 86_580_480 - 768),
  ],
)  # minus transformers' mask token
def test_parameter_counts(name, count, monkeypatch, tmp_path):
  preset = hub.PRESETS[name]
  kind = {"CLIP": "clip", "DINO": "vit", "DINOv2": "dinov2"}[preset.family]
  config = dict(
    hidden_size=preset.dim,
    num_hidden_layers=preset.depth,
    num_attention_heads=preset.dim // 64,
    patch_size=preset.patch,
    image_size=preset.side,
  )
  if kind != "dinov2":
    config["intermediate_size"] = 4 * preset.dim
  proj = {768: 512, 1024: 768}.get(preset.dim, 0)
  config = dict(projection_dim=proj, vision_config=config) if kind == "clip" else config
  config["model_type"] = kind
  (tmp_path / "config.json").write_text(json.dumps(config))
  monkeypatch.setattr(hub, "fetch", lambda *args: tmp_path)  # only config.json is there yet
  spec = read_spec(name=name, image_size=(preset.side,) * 2, token_size=preset.patch)
  shapes = jax.eval_shape(
    spec.module.init, jax.random.key(0), jnp.zeros((1, preset.side, preset.side, 3))
  )["params"]
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert total == count + (preset.dim * proj if kind == "clip" else 0)
  stand_in = read_spec(
    name=name, path="random", image_size=(preset.side,) * 2, token_size=preset.patch
  )
  assert (
    stand_in.module == spec.module.clone(proj_dim=0, parent=None) and stand_in.mean == spec.mean
  )


def test_a_stand_in_with_random_weights(monkeypatch):
  for name, preset in hub.PRESETS.items():  # all have one
    assert (
      read_spec(name=name, path="random", image_size=(224, 224), token_size=16).module.dim
      == preset.dim
    )
  monkeypatch.setitem(
    hub.PRESETS,
    "dino_vit_b16",
    hub.PRESETS["dino_vit_b16"]._replace(dim=64, depth=2, patch=8, side=32),
  )
  teacher = teachers.load(
    read_spec(
      name="dino_vit_b16", path="random", image_size=(32, 48), token_size=8, dtype="float32"
    )
  )
  output = jax.jit(teacher.forward)(
    teacher.params, jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8))
  )
  assert (
    output.features.shape == (2, 24, 64)
    and np.isfinite(output.features).all()
    and np.std(output.features[0] - output.features[1]) > 0
  )
  assert teacher.digest == "random dino_vit_b16"
  with pytest.raises(
    WeightsError, match="teacher.path=random needs teacher.name, one of clip_vit_b32"
  ):
    read_spec(path="random", image_size=(32, 32), token_size=8)


REJECTED = [
  ("reject_missing_key", {}, r"missing: encoder\.layer\.1\.attention\.attention\.key\.weight"),
  ("reject_nan", {}, "non-finite values in "),
  (
    "reject_shape_mismatch",
    {},
    r"position table is 5x5\+1 for patch 8; its config.json's image_size gives 4x4",
  ),
  (
    "reject_dinov2",
    dict(name="dino_vit_b16"),
    r"looks like DINOv2 \(found embeddings\.cls_token, .*\); dino_vit_b16 asked",
  ),
  (
    "reject_siglip",
    dict(name="clip_vit_b16"),
    r"looks like SigLIP \(found .*\); clip_vit_b16 asked",
  ),
  (
    "reject_lfs_pointer.safetensors",
    {},
    r"is a Git LFS pointer \(134 bytes\), fetch the real file",
  ),
  ("reject_truncated.safetensors", {}, r"\(123052 bytes\) is damaged: .*file not fully covered"),
  (
    "reject_openai_resnet.safetensors",
    {},
    r"looks like a CLIP ResNet \(found visual\.layer1.*supported: CLIP, DINO",
  ),
  (
    "hf_clip_full",
    dict(name="dino_vit_b16"),
    r"looks like CLIP \(found embeddings\.class_embedding, pre_layrnorm.*dino_vit_b16 asked",
  ),
  ("hf_dino", dict(name="clip_vit_b16"), r"looks like DINO \(found .*clip_vit_b16 asked"),
  (
    "hf_dino",
    dict(name="dino_vit_b16"),
    r"is ViT/8 \(width 48, depth 3\); preset dino_vit_b16 needs 768/12/16",
  ),
  (
    "dino_backbone.safetensors",
    {},
    "does not tell the number of heads, and width 48 .*; give num_heads",
  ),
  ("dino_backbone.safetensors", dict(num_heads=5), "width 48 does not divide into 5 heads"),
  (
    "timm_clip.safetensors",
    dict(num_heads=4),
    "timm's names does not tell its activation; give activation='quick_gelu'",
  ),
  (
    "timm_clip.safetensors",
    dict(num_heads=4, activation="relu"),
    "activation 'relu' is not one of gelu, ",
  ),
  (
    "hf_clip_vision_noprefix",
    dict(layer="proj"),
    "no projection in .*hf_clip_vision_noprefix; choose layer raw or normed",
  ),
  ("hf_dino", dict(layer="last"), "layer 'last' is not one of raw, normed, proj"),
  ("hf_dino", dict(last_k=4), "last_k=4 needs layer 'raw' .* 1 to 3 blocks"),
  ("hf_dino", dict(last_k=2, layer="normed"), "last_k=2 needs layer 'raw'"),
  (
    "hf_dino",
    dict(name="dino_vit_b7"),
    "teacher.name='dino_vit_b7' is unknown; choose one of clip_vit_b32",
  ),
  ("hf_dino", dict(image_size=(36, 32)), "image size 36x32 is not a multiple of the token size 8"),
  ("absent", {}, "absent: no such file or folder; fetch weights with e.g. `hf download"),
  ("index.json", {}, "index.json .* is not a weight file; expected safetensors"),
]


@pytest.mark.parametrize("file, options, message", REJECTED)
def test_wrong_weights_are_refused(file, options, message):
  path = GOLDENS / file
  if not path.exists() and "resnet" in file:
    pytest.skip(f"{file} is not among the goldens that come with the code")
  with pytest.raises(WeightsError, match=message) as error:
    open_teacher(path, **options)
  assert "\n" not in str(error.value)


def test_every_rejected_golden_is_tried():
  assert {path.name for path in GOLDENS.glob("reject_*")} <= {file for file, _, _ in REJECTED}


def test_no_teacher_at_all():
  with pytest.raises(WeightsError, match="give a name .clip_vit_b32, .* or the path"):
    read_spec(image_size=(32, 32), token_size=8)


def edited(tmp_path, edit, name="hf_dino"):
  folder = shutil.copytree(GOLDENS / name, tmp_path / "teacher")
  tensors = load_file(folder / "model.safetensors")
  tensors = edit(tensors) or tensors
  save_file(tensors, folder / "model.safetensors")
  return folder


def test_every_problem_is_listed_at_once(tmp_path):
  def edit(tensors):
    del tensors["layernorm.weight"]
    tensors["surplus"] = np.zeros(3, np.float32)
    tensors["layernorm.bias"] = np.zeros(47, np.float32)

  with pytest.raises(
    WeightsError,
    match=r"missing: layernorm\.weight.*unknown: surplus.*misshapen: layernorm\.bias \(47,\)",
  ):
    open_teacher(edited(tmp_path, edit))


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("num_hidden_layers", 4, "has depth 3, its config.json says 4"),
    ("hidden_size", 36, "has width 48, its config.json says 36"),
    ("patch_size", 16, "has patch size 8, its config.json says 16"),
    ("model_type", "dinov2", "config.json says dinov2, which is DINOv2"),
    ("model_type", "vit_mae", "model_type 'vit_mae' is not supported; supported: beit, clip, "),
    ("hidden_act", "relu", "hidden_act 'relu' is not supported; supported: gelu, "),
    ("patch_size", "8", "holds a size that is none"),
  ],
)
def test_config_and_weights_must_agree(tmp_path, key, value, message):
  folder = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {key: value}))
  with pytest.raises(WeightsError, match=message):
    read_spec(path=folder, image_size=(32, 32), token_size=8)


def test_a_folder_needs_its_config(tmp_path):
  folder = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  (folder / "config.json").write_text("<html>")
  with pytest.raises(WeightsError, match="config.json is not JSON"):
    open_teacher(folder)
  (folder / "config.json").unlink()
  with pytest.raises(
    WeightsError, match="has Hugging Face's names of DINO, but .* has no config.json"
  ):
    open_teacher(folder)


def test_old_clip_configs_have_two_vision_dictionaries(tmp_path):
  """The first hub files: vision_config_dict, filled up with defaults, is the one that counts."""
  folder = shutil.copytree(GOLDENS / "hf_clip_full", tmp_path / "teacher")
  config = json.loads((folder / "config.json").read_text())
  sizes = {
    key: config["vision_config"][key]
    for key in (
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
      "patch_size",
      "num_attention_heads",
      "image_size",
    )
  }
  (folder / "config.json").write_text(
    json.dumps(config | dict(vision_config={"hidden_size": 99}, vision_config_dict=sizes))
  )
  spec = read_spec(path=folder, image_size=(32, 32), token_size=8)
  assert (
    spec.module.eps == 1e-5
    and spec.module.activation == "quick_gelu"
    and spec.module.num_heads == 4
  )


def test_missing_and_damaged_files(tmp_path):
  with pytest.raises(
    WeightsError,
    match="no model.safetensors, index, pytorch_model.bin or flax_model.msgpack in .*: nothing",
  ):
    open_teacher(tmp_path)
  folder = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  data = (folder / "model.safetensors").read_bytes()
  for content, message in (
    (data[:-100], rf"\({len(data) - 100} bytes\) is damaged: .*file not fully covered"),
    (data + b"x", rf"\({len(data) + 1} bytes\) is damaged: .*file not fully covered"),
    (data[:50], r"\(50 bytes\) is damaged: .*header"),
    (data[:9] + b"?" + data[10:], "is damaged: .*invalid JSON in header"),
    (b"<!DOCTYPE html><html>", "is an HTML page, not weights"),
    (b"", r"\(0 bytes\) is not a weight file"),
    (b"\x85\xa1a", "damaged or not a weight file"),
  ):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
      open_teacher(folder)
  (folder / "model.safetensors").unlink()
  with pytest.raises(WeightsError, match="no model.safetensors, .*found: config.json"):
    open_teacher(folder)
  sharded = shutil.copytree(GOLDENS / "hf_clip_vision_sharded", tmp_path / "sharded")
  (sharded / "model-00002-of-00005.safetensors").unlink()
  with pytest.raises(
    WeightsError, match="lists model-00002-of-00005.safetensors, which is absent .4 of 5"
  ):
    open_teacher(sharded)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"visual.layer1.0.conv1.weight": (4, 4, 1, 1)}, "looks like a CLIP ResNet"),
    ({"decoder_embed.weight": (4, 4), "cls_token": (1, 1, 4)}, "looks like MAE"),
    (
      {"decoder.decoder_embed.weight": (4, 4), "vit.embeddings.cls_token": (1, 1, 4)},
      "looks like MAE",
    ),
    ({"patch_embed1.proj.weight": (4, 3, 4, 4)}, "looks like ConvMAE"),
    (
      {"blocks.0.ls1.gamma": (4,), "cls_token": (1, 1, 4)},
      "does not fit the model: missing: blocks.0.mlp.fc2.weight",
    ),
    ({"text_model.embeddings.token_embedding.weight": (9, 4)}, "contains only a text tower"),
    ({"fc.weight": (4, 4)}, "is of an unknown family .found fc.weight.; supported: CLIP"),
  ],
)
def test_other_models_are_refused_by_name(tmp_path, change, message):
  save_file(
    {name: np.zeros(shape, np.float32) for name, shape in change.items()},
    tmp_path / "x.safetensors",
  )
  with pytest.raises(WeightsError, match=message):
    read_spec(path=tmp_path / "x.safetensors", image_size=(32, 32), token_size=8)


def test_quantised_weights_are_refused_and_counters_are_not(tmp_path):
  def counters(tensors):
    tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]

  open_teacher(edited(tmp_path / "a", counters, "hf_clip_full"))

  def quantised(tensors):
    tensors["layernorm.bias"] = np.zeros(48, np.int8)

  with pytest.raises(
    WeightsError, match=r"quantized weights are not supported \(layernorm.bias is I8\)"
  ):
    open_teacher(edited(tmp_path / "b", quantised))


def test_names_of_transformers_in_memory(tmp_path):
  renamed = {
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
  }

  def edit(tensors):
    names = {}
    for name in tensors:
      new = name
      for old, to in renamed.items():
        new = new.replace(old, to)
      names[f"vit.{new}"] = tensors[name]
    return names

  _, teacher = open_teacher(edited(tmp_path, edit))
  for a, b in zip(
    jax.tree.leaves(teacher.params),
    jax.tree.leaves(open_teacher(GOLDENS / "hf_dino")[1].params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["hf_clip_full", "hf_dino"])
def test_old_flax_weights(tmp_path, name):
  """What transformers 4 wrote as flax_model.msgpack.

  Kernels are transposed, gains are called scale, tables embedding.
  """
  folder = shutil.copytree(GOLDENS / name, tmp_path / "teacher")
  tree = {}
  for key, value in load_file(folder / "model.safetensors").items():
    *path, leaf = key.split(".")
    if leaf == "weight":
      leaf = (
        "embedding"
        if path[-1].endswith("_embedding") and value.ndim == 2
        else "scale"
        if value.ndim == 1
        else "kernel"
      )
      if leaf == "kernel":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[leaf] = np.ascontiguousarray(value)
  (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
  (folder / "model.safetensors").unlink()
  _, teacher = open_teacher(folder)
  for a, b in zip(
    jax.tree.leaves(teacher.params),
    jax.tree.leaves(open_teacher(GOLDENS / name)[1].params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_a_classifier_is_no_projection(tmp_path):
  tensors = load_file(GOLDENS / "timm_clip.safetensors")
  tensors["head.bias"] += 1
  save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(WeightsError, match="head.bias is not zero"):
    open_teacher(tmp_path / "x.safetensors", **OPTIONS["timm_clip"])


def test_names_stand_in_for_what_files_do_not_tell(tmp_path, monkeypatch):
  """timm's hub folders have a config.json of another kind.

  The preset's name says that the weights are OpenAI's, with their activation.
  """
  shutil.copy(GOLDENS / "timm_clip.safetensors", tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(
    json.dumps({"architecture": "vit_base_patch16_clip_224.openai"})
  )
  depth = read_spec(
    path=tmp_path, image_size=(32, 32), token_size=8, **OPTIONS["timm_clip"]
  ).module.depth
  tiny = hub.PRESETS["clip_vit_b16"]._replace(dim=48, depth=depth, patch=8, side=32)
  monkeypatch.setitem(hub.PRESETS, "clip_vit_b16", tiny)
  read = lambda **options: read_spec(
    path=tmp_path, image_size=(32, 32), token_size=8, num_heads=4, **options
  )
  assert read(name="clip_vit_b16").module.activation == "quick_gelu"
  assert read(name="clip_vit_b16", activation="gelu").module.activation == "gelu"
  monkeypatch.setitem(hub.PRESETS, "clip_vit_b16", tiny._replace(side=48))
  with pytest.raises(
    WeightsError, match="has a position table of 4x4; preset clip_vit_b16 needs 6x6"
  ):
    read(name="clip_vit_b16")


def test_values_stay_on_disk_until_they_are_read(tmp_path):
  save_file({"a": np.arange(6, dtype=np.float16).reshape(2, 3)}, tmp_path / "x.safetensors")
  tensor = files.open_weights(tmp_path / "x.safetensors")["a"]
  assert tensor.shape == (2, 3) and tensor.dtype == "F16"
  save_file({"a": np.ones((2, 3), np.float16)}, tmp_path / "x.safetensors")
  np.testing.assert_array_equal(np.asarray(tensor, np.float32), np.ones((2, 3)))


def test_digest_is_of_the_content(tmp_path):
  copy = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "elsewhere")
  assert (
    files.digest(copy)
    == files.digest(GOLDENS / "hf_dino")
    != files.digest(GOLDENS / "hf_clip_full")
  )


class Harm:
  """Unpickling it would create a file."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.mark.torch
def test_pickles_execute_nothing(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save({"model": Harm(tmp_path / "executed")}, tmp_path / "zip.pth")
  torch.save(
    {"model": Harm(tmp_path / "executed")},
    tmp_path / "old.pth",
    _use_new_zipfile_serialization=False,
  )
  (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harm(tmp_path / "executed"), protocol=2))
  for name in ("zip.pth", "old.pth", "plain.pth"):
    with pytest.raises(WeightsError, match="needs pickled class .*refusing|not a PyTorch archive"):
      read_spec(path=tmp_path / name, image_size=(32, 32), token_size=8)
  assert not (tmp_path / "executed").exists()


@pytest.mark.torch
def test_torch_containers(tmp_path):
  torch = pytest.importorskip("torch")
  tensors = {
    name: torch.from_numpy(x)
    for name, x in load_file(GOLDENS / "dino_backbone.safetensors").items()
  }
  expected = jax.tree.leaves(
    open_teacher(GOLDENS / "dino_backbone.safetensors", num_heads=4)[1].params
  )
  torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
  torch.save(
    {"state_dict": {"model": tensors}, "epoch": 3}, tmp_path / "wrapped.safetensors"
  )  # the name does not matter
  torch.save(
    {
      "teacher": {f"module.backbone.{k}": v for k, v in tensors.items()}
      | {"head.mlp.weight": torch.zeros(3)}
    },
    tmp_path / "teacher.pth",
  )
  for name in ("old.pth", "wrapped.safetensors", "teacher.pth"):
    for a, b in zip(
      jax.tree.leaves(open_teacher(tmp_path / name, num_heads=4)[1].params), expected, strict=True
    ):
      np.testing.assert_array_equal(a, b)
  folder = tmp_path / "bin"
  folder.mkdir()
  shutil.copy(GOLDENS / "hf_dino" / "config.json", folder)
  stored = {
    k: torch.from_numpy(v).bfloat16()
    for k, v in load_file(GOLDENS / "hf_dino" / "model.safetensors").items()
  }
  torch.save(stored, folder / "pytorch_model.bin")
  np.testing.assert_allclose(
    open_teacher(folder)[1].params["norm"]["scale"],
    open_teacher(GOLDENS / "hf_dino")[1].params["norm"]["scale"],
    rtol=1e-2,
  )
  for content, message in (
    ([tensors], "holds a list; expected a state_dict"),
    ({"epoch": 3}, "holds no tensors by name"),
    ({"a": torch.zeros(3, dtype=torch.int8)}, "quantized"),
  ):
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match=message):
      open_teacher(tmp_path / "wrong.pth")
  (tmp_path / "wrong.pth").write_bytes((tmp_path / "teacher.pth").read_bytes()[:5000])
  with pytest.raises(WeightsError, match="damaged or not a PyTorch archive"):
    open_teacher(tmp_path / "wrong.pth")


@pytest.mark.torch
def test_the_teacher_of_a_checkpoint_is_taken_not_the_student():
  torch = pytest.importorskip("torch")
  del torch
  tensors = networks.open_network(GOLDENS / "dino_full_checkpoint.pth").tensors
  backbone = load_file(GOLDENS / "dino_backbone.safetensors")
  assert tensors.keys() == backbone.keys()
  np.testing.assert_array_equal(tensors["cls_token"].read(), backbone["cls_token"])


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is there")
def test_torch_files_without_torch():
  with pytest.raises(
    WeightsError,
    match=r"is a PyTorch archive; install the torch extra \(pip install mrmae_jax\[torch\]\)",
  ):
    open_teacher(GOLDENS / "dino_backbone.pth", num_heads=4)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
  """A cache folder of huggingface_hub, offline; a function that puts a preset there."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

  def put(name, folder, **preset):
    preset = hub.PRESETS[name]._replace(**preset)
    monkeypatch.setitem(hub.PRESETS, name, preset)
    commit = preset.revision if len(preset.revision) == 40 else "0123456789" * 4
    root = tmp_path / f"models--{preset.repo.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit)
    ref = root / "refs" / preset.revision
    ref.parent.mkdir(parents=True)
    ref.write_text(commit)
    return root / "snapshots" / commit

  return put


@pytest.mark.parametrize(
  "name, folder", [("clip_vit_b16", "hf_clip_full"), ("dino_vit_b16", "hf_dino")]
)
def test_a_preset_comes_from_the_cache(hub_cache, name, folder):
  snapshot = hub_cache(name, GOLDENS / folder, dim=48, depth=3, patch=8, side=32)
  spec = read_spec(name=name, image_size=(32, 32), token_size=8, dtype="float32")
  assert spec.tower.path is None and spec.has_cls and spec.dim == 48
  teacher = teachers.load(spec)
  assert teacher.digest == open_teacher(GOLDENS / folder)[1].digest
  assert (
    read_spec(
      name=name, path=snapshot, image_size=(32, 32), token_size=8, dtype="float32"
    ).module.dim
    == 48
  )


def test_a_preset_is_what_its_name_says(hub_cache):
  snapshot = hub_cache("clip_vit_b16", GOLDENS / "hf_clip_full")
  with pytest.raises(
    WeightsError, match=r"is ViT/8 \(width 48, depth 3\); preset clip_vit_b16 needs 768/12/16"
  ):
    read_spec(name="clip_vit_b16", image_size=(32, 32), token_size=8)
  (snapshot / "config.json").unlink()
  with pytest.raises(WeightsError, match="none of config.json"):
    read_spec(name="clip_vit_b16", image_size=(32, 32), token_size=8)


def test_a_preset_without_weights(hub_cache):
  snapshot = hub_cache("dino_vit_s8", GOLDENS / "hf_dino", dim=48, depth=3, patch=8, side=32)
  (snapshot / "model.safetensors").unlink()
  spec = read_spec(name="dino_vit_s8", image_size=(32, 32), token_size=8)
  with pytest.raises(
    WeightsError,
    match="none of model.safetensors, .* there; `hf download facebook/dino-vits8 --rev",
  ):
    teachers.load(spec)


def test_a_preset_that_is_not_cached(hub_cache):
  del hub_cache
  with pytest.raises(
    WeightsError,
    match=r"teacher.name=clip_vit_l14 \(openai/clip-vit-large-patch14 at .* not in the cache, "
    "and the hub cannot be reached; `hf download openai/clip-vit-large-patch14",
  ):
    read_spec(name="clip_vit_l14", image_size=(224, 224), token_size=16)


def test_answers_of_the_hub(monkeypatch):
  import huggingface_hub
  from huggingface_hub import errors

  for kind, message in (
    (
      errors.GatedRepoError,
      "gated: accept its license on https://huggingface.co/facebook/dinov3-vitb16",
    ),
    (errors.RepositoryNotFoundError, "is not on the hub"),
    (errors.OfflineModeIsEnabled, "cannot be reached"),
    (errors.HfHubHTTPError, r"could not be fetched .*two lines\); `hf download"),
  ):
    error = type(
      "Answer", (kind,), {"__init__": lambda self: Exception.__init__(self, "two\nlines")}
    )()

    def download(*args, error=error, **kwargs):
      raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError, match=message):
      read_spec(name="dinov3_vit_b16", image_size=(224, 224), token_size=16)


def test_presets_are_complete():
  for name, preset in hub.PRESETS.items():
    assert preset.side % preset.patch == 0 and preset.dim % 64 == 0, name
    assert (
      len(preset.revision) == 40
      or preset.revision == "main"
      or preset.revision.startswith("refs/pr/")
    )
  assert len({(p.repo, p.revision) for p in hub.PRESETS.values()}) == len(hub.PRESETS)


@pytest.mark.parametrize(
  "rule",
  [
    interpolation.BICUBIC,
    interpolation.DINO,
    interpolation.BICUBIC_ANTIALIAS,
    interpolation.BILINEAR_ANTIALIAS,
  ],
)
def test_position_tables_keep_constants_and_cls(rule):
  table = np.random.default_rng(0).standard_normal((1, 17, 3)).astype(np.float32)
  table[:, 1:] = table[:, 1:2]
  resized = positions.resize(table, (4, 4), (7, 2), rule)
  assert resized.dtype == np.float32 and resized.shape == (1, 15, 3)
  np.testing.assert_array_equal(resized[:, 0], table[:, 0])
  np.testing.assert_allclose(resized[:, 1:], np.repeat(table[:, 1:2], 14, axis=1), atol=1e-6)
  assert positions.resize(table, (4, 4), (4, 4), rule) is table


def test_a_mask_needs_a_table():
  with pytest.raises(ValueError, match="positions='rope' takes no mask"):
    ViT(8, 12, 1, 1, 12, positions="rope").init(
      jax.random.key(0), jnp.zeros((1, 16, 16, 3)), mask=object()
    )


NOISE = np.random.default_rng(2).random((3, 24), np.float32)


@pytest.mark.parametrize(
  "file, layer",
  [("hf_clip_full", "proj"), ("hf_dino", "raw")]
  + [pytest.param("hf_clip_full", name, marks=pytest.mark.variant) for name in ("raw", "normed")],
)
def test_features_of_visible_tokens_alone(file, layer):
  """They are those of all tokens, at the places that the attention has decided."""
  _, teacher = open_teacher(tiny.TEACHERS / file, size=(32, 48), layer=layer)
  images = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 3), np.uint8)
  draw = lambda attention: sample_mask(NOISE, 0.75, 1, attention)
  whole = jax.jit(teacher.forward)(teacher.params, images)
  some = jax.jit(lambda *x: teacher.forward(*x, draw))(teacher.params, images)
  mask = draw(whole.attention)
  np.testing.assert_array_equal(some.mask.ids_keep, mask.ids_keep)
  np.testing.assert_array_equal(some.mask.ids_restore, mask.ids_restore)
  for a, b in (
    (some.features, take_visible(whole.features, mask)),
    (some.cls, whole.cls),
    (some.attention, whole.attention),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert whole.mask is None and min(whole.spread, some.spread) > 0.01


def test_towers_that_compute_all_tokens():
  """With other options a teacher leaves the choice of tokens to its caller."""
  images = np.zeros((3, 32, 48, 3), np.uint8)
  draw = lambda attention: sample_mask(NOISE, 0.75, 1, attention)
  for options in (dict(last_k=2), dict(resolution=64)):
    _, teacher = open_teacher(tiny.TEACHERS / "hf_clip_full", size=(32, 48), **options)
    out = jax.eval_shape(
      lambda *x, teacher=teacher: teacher.forward(*x, draw), teacher.params, images
    )
    assert out.mask is None and out.features.shape == (3, 24, 48)


def test_images_without_a_difference_have_no_spread():
  """Neither where all tokens are computed, nor where those of other places are left."""
  opened = functools.partial(open_teacher, tiny.TEACHERS / "hf_clip_full", size=(32, 48))
  (_, raw), (_, normed) = opened(), opened(layer="normed")
  rng = np.random.default_rng(1)
  same = rng.integers(0, 256, (1, 32, 48, 3), np.uint8).repeat(3, axis=0)
  others = rng.integers(0, 256, same.shape, np.uint8)
  empty = normed.params | {"norm": jax.tree.map(np.zeros_like, normed.params["norm"])}
  for draw in (None, lambda attention: sample_mask(NOISE, 0.75)):
    of_raw, of_normed = (
      jax.jit(lambda *x, teacher=teacher, draw=draw: teacher.forward(*x, draw).spread)
      for teacher in (raw, normed)
    )
    assert of_raw(raw.params, same) < 1e-9
    # The last norm leaves nothing of any image.
    assert of_normed(empty, others) < 1e-9 < of_normed(normed.params, others)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_before_the_patches_on_a_gpu(dtype):
  tokens = jax.random.normal(jax.random.key(0), (1, 3, 4))
  x = jax.random.normal(jax.random.key(1), (2, 5, 4), dtype)
  run = lambda: jax.vjp(prepend, tokens, x)
  expected, pull = run()
  with target.tracing_for(gpu()):
    found, pull_gpu = run()
  assert found.shape == (2, 8, 4) and found.dtype == expected.dtype == jnp.float32
  dy = jax.random.normal(jax.random.key(2), found.shape)
  jax.tree.map(np.testing.assert_array_equal, (found, pull_gpu(dy)), (expected, pull(dy)))
  sums = re.findall(r":f32(\S+) = reduce_sum", str(jax.make_jaxpr(pull_gpu)(dy)))
  assert sums == ["[3,4]"]  # not of the patches too


@pytest.mark.parametrize("registers", [0, 2])
def test_the_last_block_of_selected_patches(registers):
  vit = ViT(8, 16, 3, 2, 32, learned_positions=True, num_registers=registers, proj_dim=12)
  images = jax.random.normal(jax.random.key(0), (3, 32, 48, 3))
  params = jax.jit(vit.init)(jax.random.key(1), images)
  mask = sample_mask(NOISE, 0.75)
  apply = jax.jit(vit.apply, static_argnames="select")
  x, out = apply(params, images)
  y, some = apply(params, images, select=lambda attention: mask)
  cut = lambda x: jnp.concatenate([x[:, :1], take_visible(x[:, 1:], mask)], axis=1)
  for a, b in (
    (y, cut(x)),
    (some["layers"][-1], cut(out["layers"][-1])),
    (some["layers"][-2], out["layers"][-2]),
    (some["proj"], cut(out["proj"])),
    (some["attention"], out["attention"]),
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for fields in (dict(positions="rope"), dict(cls_token=False), dict(relative_positions=True)):
    with pytest.raises(ValueError, match="select needs CLS"):
      ViT(8, 16, 1, 2, 32, **fields).init(jax.random.key(0), images, select=lambda _: mask)


@pytest.mark.parametrize(
  "values, is_cut",
  [({"method__masking": "focused"}, True), ({"teacher__target_norm": "batch"}, False)]
  + [
    pytest.param(values, is_cut, marks=pytest.mark.variant)
    for values, is_cut in (
      ({"teacher__tokens": "visible+cls"}, True),
      ({"teacher__salient_share": 0.5}, True),
      ({"teacher__tokens": "masked"}, False),
      ({"method__complementary_masks": 2}, False),
    )
  ],
)
def test_a_step_without_the_tokens_that_nobody_mimics(values, is_cut, monkeypatch):
  """It costs less, and its losses are the same."""
  config = tiny.changed(tiny.get_config("vit"), **values)
  images = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 3), np.uint8)
  keys = jax.random.split(jax.random.key(2), 3)
  results = []
  for is_whole in (False, True):
    if is_whole:
      monkeypatch.setattr(teachers, "_can_select", lambda spec: False)
    task = pretrain.make(config)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    loss = lambda params, frozen, task=task, extra=extra: task.loss(
      params, extra, frozen, {"image": images}, keys
    )
    compiled = jax.jit(loss).lower(params, task.frozen).compile()
    value, (terms, _) = compiled(params, task.frozen)
    results.append((compiled.cost_analysis()["flops"], value, terms))
  (flops, value, terms), (whole_flops, expected, whole_terms) = results
  assert (flops < 0.95 * whole_flops) == is_cut
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert terms.keys() == whole_terms.keys()
  for name in terms.keys() - {"mimic spread"}:
    np.testing.assert_allclose(terms[name], whole_terms[name], rtol=1e-5)


def test_attention_costs_one_row_of_the_last_block():
  """Of all blocks' attention only the last one's CLS row is an extra product.

  Without masks or losses that use it, not even that.
  """
  spec = read_spec(
    path=GOLDENS / "hf_clip_full", image_size=(32, 48), token_size=8, dtype="float32"
  )
  teacher, images = teachers.load(spec), np.zeros((2, 32, 48, 3), np.uint8)

  def cost(function):
    compiled = jax.jit(function).lower(teacher.params, images).compile()
    return compiled.as_text().count(" dot("), compiled.cost_analysis()["flops"]

  (dots, flops), (plain_dots, plain_flops) = (
    cost(teacher.forward),
    cost(lambda p, x: teacher.forward(p, x).features),
  )
  assert dots == plain_dots + 1 and flops < 1.01 * plain_flops
