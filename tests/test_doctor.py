"""mrmae doctor finds mistakes before they cost hours; mrmae finds its commands."""

import fcntl
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from mrmae_jax import __main__ as entry
from mrmae_jax import config as schema
from mrmae_jax import train
from mrmae_jax.cli import doctor, parser
from mrmae_jax.tasks import pretrain
from tests import tiny
from tests.helpers.cli import run_command

ROOT = Path(__file__).parent.parent


def folder_of_images(path, count=20, size=(40, 56), value=None, classes=2):
  rng = np.random.default_rng(0)
  for i in range(count):
    place = path / (f"class{i % classes}" if classes else "")
    place.mkdir(parents=True, exist_ok=True)
    pixels = (
      rng.integers(0, 256, (*size, 3), np.uint8)
      if value is None
      else np.full((*size, 3), value, np.uint8)
    )
    Image.fromarray(pixels).save(place / f"{i:03}.png")
  return path


def test_a_sound_run(examine, tmp_path):
  code, out = examine(f"--out={tmp_path}/views.png")
  assert code == 0 and out.endswith("the run would start\n") and "stop " not in out, out
  assert "config.image_size=(32, 48) (default (224, 224))" in out and "8 x cpu" in out
  assert "train: digits: 1438 images" in out and "eval: digits: 359 images" in out
  assert "learning rate 0.04 x 16 / 256 = 0.0025 at its peak" in out and "= 8 steps" in out
  assert "CLIP ViT/8" in out and "features of 24 tokens, norm " in out
  assert (
    "M parameters (decoder " in out
    and "GFLOP an image and step (" in out
    and "a checkpoint has 0.00 GB" in out
  )
  assert sorted(p.name for p in tmp_path.iterdir()) == ["views.png"]  # nothing else was written
  with Image.open(tmp_path / "views.png") as picture:
    assert picture.size[0] > 4 * 100 and len(np.unique(np.asarray(picture))) > 50


@pytest.mark.parametrize(
  "words",
  [
    ("detect_demo", "init_from=", "batch_size=16"),
    pytest.param(("segment_demo", "init_from="), marks=pytest.mark.variant),
    pytest.param(("teacher",), marks=pytest.mark.variant),
  ],
)
def test_the_picture_is_of_the_batch_of_the_task(words, examine, tmp_path):
  code, out = examine(f"--out={tmp_path}/views.png", *words[1:], config=words[0])
  assert code == 0 and "shows 16 of the first images as training sees them" in out, out


def test_the_step_is_compiled_and_timed(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["doctor", "--config=tests/faults/small.py"])
  assert run_command(sys.argv) == 0
  out = capsys.readouterr().out
  assert "ms a step, " in out and "for 20 steps" in out and "GiB a device" in out
  assert "warn  no teacher: this is MAE or ConvMAE" in out


# Planted mistakes: (options, exit code, words of the line)


@pytest.mark.parametrize(
  "arguments, code, message",
  [
    (["optim.bler=1e-4"], 2, "did you mean config.optim.blr?"),  # 1 a misspelt key
    (["batch_size=many"], 2, "batch_size"),  # 2 a wrong type
    (
      ["image_size=(30, 48)"],
      2,
      "not a multiple of the token size 8; nearest: (32, 48)",
    ),  # 3 size and tokens
    (["batch_size=12"], 2, "not divisible by 8 devices"),  # 4 batch and devices
    (["optim.warmup_epochs=50.0"], 2, "warmup_epochs=50.0 is longer than"),  # 5 endless warm-up
    (["data.source=folder:/no/such/images"], 2, "does not exist"),  # 6 no images
    (["teacher.path=/no/such/teacher"], 2, "/no/such/teacher"),  # 7 no teacher
    (["method.mask_ratio=0.99"], 2, "leaves 0 of 24 tokens visible"),  # 8 nothing to see
    (
      ["data.mean=(123.7, 116.3, 103.5)", "data.std=(58.4, 57.1, 57.4)"],
      2,
      "config.data.mean",
    ),  # 10 pixels of 0 to 255
  ],
)
def test_planted_settings(examine, arguments, code, message):
  exit_code, out = examine(*arguments)
  assert exit_code == code and message in out and not out.endswith("the run would start\n"), out
  assert any(message in line and line.startswith(("stop", "error: ")) for line in out.splitlines())


def test_settings_that_are_planted_together_are_all_warned_of(examine):
  planted = {
    "optim.blr=2.5": "far above the recipes'",  # 9 a rate that was absolute
    "batch_size=2000": "images more than once",  # 11 more than there is
    "data.holdout_every=0": "nothing is held out",  # 12 nothing to measure on
    "image_size=(256, 384)": "most crops are enlarged",  # 13 small images
    "teacher.weight=0.0": "costs time and teaches nothing",  # 14 a silent teacher
    # 15 nothing kept
    "checkpoint_every=100.0": "is longer than the run: only its first and last steps are saved",
    "dtype=bfloat16": "bfloat16 is slower than float32 on a CPU",  # 16 the wrong type here
    "data.std=(0.05, 0.05, 0.05)": "not near 0 and 1",  # 17 other statistics
  }
  code, out = examine(*planted, "teacher.resolution=32", "data.mean=(0.0, 0.0, 0.0)")
  warnings = [line for line in out.splitlines() if line.startswith("warn")]
  assert code == 0 and out.endswith("the run would start\n"), out
  for message in planted.values():
    assert any(message in line for line in warnings), (message, out)


def test_planted_images(examine, tmp_path):
  broken = folder_of_images(tmp_path / "broken")  # 18 a bad image
  (broken / "class0" / "000.png").write_bytes(b"<html>not found</html>")
  code, out = examine(f"data.source=folder:{broken}")
  assert code == 3 and "000.png" in out and "not an image" in out
  plain = folder_of_images(tmp_path / "plain", value=90, classes=0)  # 19 nothing in them, no labels
  code, out = examine(f"data.source=folder:{plain}")
  assert code == 0 and "are of one color" in out and "the images have no labels" in out


def test_a_workdir_among_the_images_is_refused(examine, tmp_path, capsys):
  words = [f"--config.data.source=folder:{folder_of_images(tmp_path / 'photos')}"]
  words += ["--config=tests/tiny.py", f"--workdir={tmp_path}/photos/run"]
  message = f"--workdir={tmp_path}/photos/run lies in the folder of the images"
  assert run_command(["pretrain", *words]) == 2 and message in capsys.readouterr().err
  assert run_command(["doctor", *words]) == 2 and message in capsys.readouterr().out
  assert not (tmp_path / "photos" / "run").exists()


def test_planted_workdirs(examine, tmp_path, monkeypatch):
  look = functools.partial(examine, config="tests/faults/small.py")
  (tmp_path / "file").write_text("")
  code, out = look(workdir=tmp_path / "file" / "run")  # 20 no place to write
  assert code == 2 and "cannot write to" in out
  (tmp_path / "run" / "checkpoints" / "40").mkdir(parents=True)  # 21 a run is there
  code, out = look()
  assert code == 0 and "holds a run with a checkpoint of step 40" in out
  with open(tmp_path / "run" / "lock", "w", encoding="utf-8") as file:  # 22 and is running
    file.write(json.dumps({"pid": os.getpid(), "host": "here", "since": "now"}))
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    code, out = look()
  assert code == 2 and f"is in use by process {os.getpid()} on here since now" in out
  (tmp_path / "run" / "lock").write_bytes(b"\xff")  # left by whatever
  assert look()[0] == 0
  (tmp_path / "run" / "checkpoints" / "44").symlink_to(tmp_path)
  code, out = look()
  assert code == 2 and "holds links, pipes or devices (checkpoints/44), and a run" in out
  monkeypatch.setattr(
    doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})()
  )  # 23 a full disk
  code, out = look(workdir=tmp_path / "new")
  assert code == 5 and "0.0 GB are free in" in out


def plant_teacher(folder, change):
  """Copies a teacher with other weights: `change` is (name, array) -> array."""
  folder.mkdir()
  for path in (tiny.TEACHERS / "hf_dino").iterdir():
    if path.suffix == ".safetensors":
      weights = load_file(path)
      save_file({name: change(name, x) for name, x in weights.items()}, folder / path.name)
    else:
      (folder / path.name).write_bytes(path.read_bytes())


def test_planted_teachers(examine, tmp_path):
  is_patch = lambda name: "patch_embeddings.projection.weight" in name
  first_infinite = lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.float32("inf"), x)
  plant_teacher(tmp_path / "infinite", lambda name, x: first_infinite(x) if is_patch(name) else x)
  nearly_blind = lambda name, x: x * (0 if "position" in name else 0.05 if is_patch(name) else 1)
  plant_teacher(tmp_path / "nearly_blind", nearly_blind)
  plant_teacher(tmp_path / "blind", lambda name, x: x * (not is_patch(name)))
  plant_teacher(tmp_path / "zero", lambda name, x: x * 0)
  code, out = examine(f"teacher.path={tmp_path}/infinite")  # 24
  assert code in (2, 4) and "stop " in out and "finite" in out
  code, out = examine(f"teacher.path={tmp_path}/nearly_blind", "teacher.layer=normed")  # 25
  assert code == 0 and "most of the targets is one constant vector" in out, out
  for name in ("blind", "zero"):
    code, out = examine(f"teacher.path={tmp_path}/{name}")
    assert code == 0 and "warn  mimic: the teacher gives all images the same features" in out, out
  assert "100% of the normalized targets the same everywhere" in out


def test_a_run_warns_of_a_teacher_that_gives_all_images_the_same_features(tmp_path, capsys):
  plant_teacher(tmp_path / "zero", lambda name, x: x * 0)
  config = tiny.get_config("vit")
  config.evals = {}
  config.teacher.path = f"{tmp_path}/zero"
  train.check(config, pretrain.make(config))
  out = capsys.readouterr().out
  assert out.count("warning: mimic: the teacher gives all images the same features: there is") == 1
  assert "other images (mimic spread 0, expected at least 1e-06)\n" in out
  assert out.count("spread") == 1 and "one step gave grad_norm" in out


# --- the entry point ---


def test_every_command_answers_help(capsys):
  assert entry.main(["mrmae"]) == 0
  listing = capsys.readouterr().out
  assert all(f"\n    {name}" in listing for name in parser.COMMANDS)
  for name in parser.COMMANDS:
    assert entry.main(["mrmae", name, "--help"]) == 0, name
    assert len(capsys.readouterr().out) > 200, name


def test_the_script_finds_configurations_that_import_each_other(tmp_path, monkeypatch, capsys):
  """An installed script has its folder on the path, `python -m` has the current folder."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [str(ROOT), *(p for p in sys.path if p)])
  (tmp_path / "my_neighbor.py").write_text("from tests.tiny import get_config")
  (tmp_path / "mine.py").write_text("from my_neighbor import get_config")
  assert entry.main(["mrmae", "finetune", f"--config={tmp_path}/mine.py", "--workdir=/tmp/x"]) == 2
  assert "needs a configuration of task 'finetune'" in capsys.readouterr().err  # so it was read


def test_mistakes_are_answered(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  for arguments, message in (
    (["pretrian"], "did you mean pretrain?"),
    (
      ["finetune", "--config=tests/tiny.py", "--workdir=/tmp/x"],
      "needs a configuration of task 'finetune'",
    ),
    (["features", "--modl=x"], "modl"),
    (["features", "--model=/none/x", "--out=x.npz"], "/none/x: no such file or folder"),
    (["visualize", "--model=x", "--out=x", "--query=a"], "whole number of 0 or more; commas"),
    (["show-teacher", "--config=demo", "--out=x.foo"], "must end in .png"),
  ):
    assert entry.main(["mrmae", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1
  assert entry.main(["mrmae", "features", "--modl=x", "--debug"]) == 2
  assert "Traceback" in capsys.readouterr().err


def test_a_command_that_is_interrupted_says_so(capsys, monkeypatch):
  def interrupt(name):
    raise KeyboardInterrupt

  monkeypatch.setattr(entry, "_module", interrupt)
  assert entry.main(["mrmae", "knn", "--train=a", "--eval=b", "--out=c"]) == 75
  assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_every_key_has_a_meaning():
  for config in (*map(schema.defaults, schema.TASKS), tiny.get_config("vit")):
    rows = schema.describe(config)
    assert all(meaning for _, _, meaning in rows), [
      name for name, _, meaning in rows if not meaning
    ]
  values = {name: (value, meaning) for name, value, meaning in schema.describe(schema.pretrain())}
  assert values["optim.blr"] == (1.5e-4, "base learning rate; the peak is blr * batch_size / 256")
  assert values["encoder.remat"][1].endswith("(none, dots, full)")
  assert values["mesh.fsdp"][1].startswith("devices that split batch and parameters")
