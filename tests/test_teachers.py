"""Teacher towers equal the reference implementations on their own weights, and wrong weights never load."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mrmae_jax import teachers
from mrmae_jax.mrmae import normalise
from mrmae_jax.weights.table import WeightsError

GOLDENS = Path(os.environ.get("MRMAE_TEACHER_GOLDENS", Path(__file__).parent / "goldens" / "teachers"))
INDEX = json.loads((GOLDENS / "index.json").read_text())["cases"]
CASES = [name for name in INDEX if name.startswith("hf_")]
TOLERANCE = {"hf_clip_vision_fp16": 2e-2, "hf_clip_vision_bf16": 1e-1}  # weights rounded in the file
SIZES = list(np.load(GOLDENS / "inputs.npz"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_tower_equals_reference(name, size):
  inputs = np.load(GOLDENS / "inputs.npz")[size].transpose(0, 2, 3, 1)
  expected = np.load(GOLDENS / f"{INDEX[name].get('same_as', name)}.expected.npz")
  spec = teachers.read_spec(GOLDENS / name, inputs.shape[1:3], "float32")
  teacher = teachers.load(spec)
  proj = expected[f"{size}/proj_tokens"].shape[-1] if "proj" in teacher.params else 0
  x, out = jax.jit(spec.module.clone(proj_dim=proj).apply)({"params": teacher.params}, inputs)
  pairs = {"raw": out["raw"], "post": x, "normed": x, "proj_tokens": out.get("proj")}
  compared = [key for key, value in pairs.items() if value is not None and f"{size}/{key}" in expected]
  assert compared
  for key in compared:
    np.testing.assert_allclose(pairs[key], expected[f"{size}/{key}"], atol=TOLERANCE.get(name, 1e-5), rtol=0, err_msg=key)

  # What training uses: patch tokens of the residual stream, from images that only the teacher normalises.
  images = np.random.default_rng(0).integers(0, 256, inputs.shape, np.uint8)
  _, out = spec.module.clone(proj_dim=proj).apply({"params": teacher.params}, normalise(images, spec.mean, spec.std))
  np.testing.assert_allclose(jax.jit(teacher.features)(teacher.params, images), out["raw"][:, 1:], atol=1e-5)
  assert teacher.dim == 48 and teacher.grid == tuple(s // 8 for s in inputs.shape[1:3])


def test_families_have_their_own_normalisation(tmp_path):
  clip, dino = (teachers.read_spec(GOLDENS / name, (32, 32)) for name in ("hf_clip_full", "hf_dino"))
  assert clip.mean == teachers.CLIP_MEAN and dino.mean == teachers.IMAGENET_MEAN
  assert clip.module.eps == 1e-5 and clip.module.activation == "quick_gelu" and clip.module.norm_pre
  assert dino.module.eps == json.loads((GOLDENS / "hf_dino" / "config.json").read_text())["layer_norm_eps"]
  copy = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [.1, .2, .3], "image_std": [.4, .5, .6]}))
  assert teachers.read_spec(copy, (32, 32)).mean == (.1, .2, .3)


def test_bf16_compute_stays_close():
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  exact, rounded = (teachers.load(teachers.read_spec(GOLDENS / "hf_clip_full", (32, 32), d)) for d in ("float32", "bfloat16"))
  assert rounded.params["blocks_0"]["fc1"]["kernel"].dtype == jnp.bfloat16
  a, b = (np.asarray(t.features(t.params, images)) for t in (exact, rounded))
  assert b.dtype == np.float32
  assert np.linalg.norm(a - b) / np.linalg.norm(a) < 2e-2


@pytest.mark.parametrize("name, message", [
    ("reject_missing_key", "missing: "), ("reject_nan", "non-finite values in "), ("reject_shape_mismatch", "misshapen: "),
    ("reject_dinov2", "model_type 'dinov2' is not supported"), ("reject_siglip", "is not supported; supported: clip")])
def test_wrong_weights_are_refused(name, message):
  with pytest.raises(WeightsError, match=message) as error:
    teachers.load(teachers.read_spec(GOLDENS / name, (32, 32)))
  assert str(GOLDENS / name) in str(error.value)


def edited(tmp_path, edit):
  folder = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")
  return folder


def test_unknown_tensors_are_refused(tmp_path):
  folder = edited(tmp_path, lambda t: t.update({"encoder.layer.3.intermediate.dense.bias": np.zeros(72, np.float32)}))
  with pytest.raises(WeightsError, match=r"unknown: encoder\.layer\.3\.intermediate\.dense\.bias"):
    teachers.load(teachers.read_spec(folder, (32, 32)))


def test_every_problem_is_listed_at_once(tmp_path):
  def edit(tensors):
    del tensors["layernorm.weight"]
    tensors["surplus"] = np.zeros(3, np.float32)
    tensors["layernorm.bias"] = np.zeros(47, np.float32)
  with pytest.raises(WeightsError, match=r"missing: layernorm\.weight.*unknown: surplus.*misshapen: layernorm\.bias \(47,\)"):
    teachers.load(teachers.read_spec(edited(tmp_path, edit), (32, 32)))


def test_clip_weights_under_a_vit_config_are_refused(tmp_path):
  folder = shutil.copytree(GOLDENS / "hf_clip_vision_noprefix", tmp_path / "teacher")
  shutil.copy(GOLDENS / "hf_dino" / "config.json", folder)
  with pytest.raises(WeightsError, match="missing: .*unknown: "):
    teachers.load(teachers.read_spec(folder, (32, 32)))


def test_missing_and_damaged_files(tmp_path):
  with pytest.raises(WeightsError, match="no such folder.*hf download"):
    teachers.read_spec(tmp_path / "absent", (32, 32))
  with pytest.raises(WeightsError, match="it holds: nothing"):
    teachers.read_spec(tmp_path, (32, 32))
  folder = shutil.copytree(GOLDENS / "hf_dino", tmp_path / "teacher")
  data = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(data[:-100])
  with pytest.raises(WeightsError, match="model.safetensors is damaged"):
    teachers.load(teachers.read_spec(folder, (32, 32)))
  (folder / "model.safetensors").unlink()
  with pytest.raises(WeightsError, match="no model.safetensors"):
    teachers.load(teachers.read_spec(folder, (32, 32)))
  sharded = shutil.copytree(GOLDENS / "hf_clip_vision_sharded", tmp_path / "sharded")
  (sharded / "model-00002-of-00005.safetensors").unlink()
  with pytest.raises(WeightsError, match="model-00002-of-00005.safetensors, which is absent .4 of 5"):
    teachers.load(teachers.read_spec(sharded, (32, 32)))


def test_image_size_must_fit_the_patches():
  with pytest.raises(WeightsError, match="8-pixel patches; the image size 36x32"):
    teachers.read_spec(GOLDENS / "hf_dino", (36, 32))
