"""Exported models: the same numbers in a process without this project, for any batch size."""

import subprocess
import sys

import numpy as np
import pytest

import mrmae_jax
from mrmae_jax import target
from mrmae_jax.cli import export
from mrmae_jax.weights import writers
from tests.helpers.cli import run_command
from tests.helpers.devices import gpu
from tests.helpers.models import CONVVIT, VIT, make_student


@pytest.mark.parametrize("kind", [pytest.param("encoder", marks=pytest.mark.variant), "classifier"])
def test_the_same_numbers_without_this_project(tmp_path, kind, capsys):
  classes = 3 if kind == "classifier" else 0
  encoder = VIT.clone(learned_positions=True) if classes else CONVVIT
  student = make_student(encoder, None, classes=classes, has_norm=not classes)
  form = "timm" if classes else "convmae"
  writers.write_model(student, tmp_path / "model.safetensors", form)
  words = [f"--model={tmp_path}/model.safetensors", f"--out={tmp_path}/out", "--image_size=24,16"]
  assert run_command(["export", *words]) == 0
  assert f"{kind} for images uint8 [B, 24, 16, 3]; called in a process" in capsys.readouterr().out
  folder = tmp_path / "out"
  names = sorted(path.name for path in folder.iterdir())
  assert names == ["README.md", "call.py", "model.stablehlo", "params.npz"]
  assert ('`["z", "y", "x"]`' in (folder / "README.md").read_text()) == bool(classes)

  images = np.random.default_rng(1).integers(0, 256, (5, 24, 16, 3), np.uint8)
  np.save(tmp_path / "x.npy", images)
  code = (
    f"import runpy, sys; sys.argv[1:] = ['{tmp_path}/x.npy', '{tmp_path}/y.npz']\n"
    f"runpy.run_path('{folder}/call.py')\n"
    "assert not {'mrmae_jax', 'flax'}.intersection(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
  model = mrmae_jax.load(tmp_path / "model.safetensors")
  expected = {"logits": model.classify(images)} if classes else model.encode(images)
  with np.load(tmp_path / "y.npz") as outputs:
    assert outputs.keys() == expected.keys()
    for name, x in expected.items():
      np.testing.assert_allclose(outputs[name], x, atol=1e-5)
  assert run_command(["export", *words]) == 2
  assert "exists; give another name" in capsys.readouterr().err


def test_other_numbers_are_an_error_and_leave_nothing(tmp_path, monkeypatch, capsys):
  writers.write_model(make_student(VIT, None), tmp_path / "x.safetensors", "timm")
  changed = export.CALL.replace("**outputs", "**{k: x + 1 for k, x in outputs.items()}")
  monkeypatch.setattr(export, "CALL", changed)
  words = [f"--model={tmp_path}/x.safetensors", f"--out={tmp_path}/out"]
  assert run_command(["export", *words]) == 5
  assert "the exported model gives other numbers" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_written_beside_a_gpu_it_runs_elsewhere(tmp_path):
  """Attention in bfloat16 is cuDNN's there, and must not be in the file."""
  writers.write_model(make_student(VIT, None), tmp_path / "x.safetensors", "timm")
  model = mrmae_jax.load(tmp_path / "x.safetensors", num_heads=2, dtype="bfloat16")
  with target.tracing_for(gpu()):
    exported = model.export((24, 16), logits=False)
  assert exported.platforms == ("cpu", "cuda", "tpu")
  assert "cudnn" not in exported.mlir_module()
