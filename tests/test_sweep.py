"""Sweeps: their points and names, what is trained again, failures, tables and plots."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrmae_jax import sweep as points
from mrmae_jax.cli import sweep as tool
from tests.helpers.cli import run_command

ROOT = Path(__file__).parent.parent

# A training command: notes its call, writes metrics.jsonl, fails at the weight in $break.
FAKE = """
import json, os, pathlib, sys, time
assert sys.argv[1] == "pretrain"
words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(words["workdir"])
if "break" in os.environ and f"weight={os.environ['break']}" in folder.name:
  print("error: an early one"), print("error: the reason"), print("a line that follows")
  sys.exit(4)
with open(folder.parent / "calls", "a") as calls:
  print(folder.name, os.environ.get("CUDA_VISIBLE_DEVICES"), file=calls)
time.sleep(float(os.environ.get("seconds", 0)))
weight = float(words["config.teacher.weight"])
with open(folder / "metrics.jsonl", "w") as file:
  for step in (1, 2):
    print(json.dumps({"step": step, "loss": weight / step, "lr": 0.1}), file=file)
  print(json.dumps({"step": 2, "knn/accuracy": 0.5}), file=file)
"""

SWEEP = """
from tests import tiny
def get_config(argument="convvit"): return tiny.get_config(argument)
def sweep():
  for weight in (0.5, 1.0, 2.0): yield {"teacher.weight": weight}
"""


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
  """Runs a command line on SWEEP with the fake training; returns (exit code, output, errors)."""
  monkeypatch.chdir(ROOT)
  (tmp_path / "fake.py").write_text(FAKE)
  (tmp_path / "sweep.py").write_text(SWEEP)

  def call(*words):
    monkeypatch.setattr(tool, "MRMAE", (sys.executable, str(tmp_path / "fake.py")))
    options = [f"--config={tmp_path}/sweep.py", f"--workdir={tmp_path}/out"]
    code = run_command(["sweep", *options, *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  def calls():
    file = tmp_path / "out" / "calls"
    return sorted(file.read_text().splitlines()) if file.exists() else []

  call.calls = calls
  return call


def test_points():
  product = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
  assert list(points.grid({"a": (1, 2), "b": "xy"})) == product
  axes = {
    "lr": points.log_uniform(1e-5, 1e-3),
    "decay": points.uniform(0, 0.1),
    "loss": ("mse", "l1"),
  }
  drawn = list(points.sampled(200, 0, axes))
  assert drawn == list(points.sampled(200, 0, axes)) != list(points.sampled(200, 1, axes))
  assert drawn[:10] == list(points.sampled(10, 0, axes))
  rates, decays = (np.array([point[key] for point in drawn]) for key in ("lr", "decay"))
  assert (
    1e-5 <= rates.min() and rates.max() <= 1e-3 and 0.4 < np.mean(rates < 1e-4) < 0.6
  )  # half of them below the middle
  assert 0 <= decays.min() and decays.max() <= 0.1 and 0.045 < decays.mean() < 0.055
  assert {point["loss"] for point in drawn} == {"mse", "l1"}


@pytest.mark.parametrize(
  "point, name",
  [
    ({"teacher.weight": 0.5, "seed": 1}, "teacher.weight=0.5-seed=1"),
    ({"argument": "base,masking=random"}, "base-masking=random"),
    ({"argument": "base,teacher=a+b", "optim.blr": 1e-05}, "base-teacher=a+b-optim.blr=1e-05"),
    ({"encoder.fuse_layers": (2, 5)}, "encoder.fuse_layers=-2-5"),
    ({"teacher.path": "../../e tc/$(x)"}, "teacher.path=..-..-e-tc-x"),
    ({}, "default"),
  ],
)
def test_names_are_readable_and_safe(point, name):
  assert points.point_name(point) == name == shlex.quote(name)


def test_long_names_are_cut_and_stay_different():
  one, other = (points.point_name({"teacher.path": "x" * 200 + end}) for end in "ab")
  assert one != other and len(one) <= 120 and one.startswith("teacher.path=xxx")
  assert points.point_name({"teacher.path": "x" * 200 + "a"}) == one


def test_every_sweep_that_ships_expands_and_documents_itself(monkeypatch):
  monkeypatch.chdir(ROOT)
  for path, count in (
    ("ablation", 11),
    ("mimic_weight", 6),
    ("mimic_weight.py:demo", 6),
    ("lr", 12),
  ):
    config = f"configs/sweeps/{path}" + ("" if ":" in path else ".py")
    runs = tool.make_jobs(config, "/out/", ["--config.seed=1"])
    assert len(runs) == count == len({run.workdir for run in runs})
    assert all(run.workdir == f"/out/{run.name}" and "--config.seed=1" in run.words for run in runs)
    text = (ROOT / config.split(":")[0]).read_text()
    assert all(word in text for word in ("Command:", "Hardware:", "Cost:", "Expected:"))
  point = tool.make_jobs("configs/sweeps/ablation.py", "gs://b", [])[1]
  assert point.words == (
    "pretrain",
    "--config=configs/sweeps/ablation.py:base,masking=random",
    "--workdir=gs://b/base-masking=random",
  )


def test_reading_and_printing_a_sweep_imports_no_jax():
  code = (
    "import sys; from mrmae_jax.__main__ import main\n"
    "argv = ['mrmae', 'sweep', '--config=sweeps/lr', '--workdir=/out', '--do=print']\n"
    "assert main(argv) == 0 and 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_runs_all_then_skips_them_and_compares(run, tmp_path):
  code, out, _ = run()
  assert (
    code == 0
    and "3 points, 0 of them finished before" in out
    and "3/3 teacher.weight=2.0: done" in out
  )
  names = [f"teacher.weight={weight}" for weight in (0.5, 1.0, 2.0)]
  assert run.calls() == [f"{name} None" for name in names]
  with open(tmp_path / "out" / "sweep.csv", newline="") as file:
    rows = list(csv.reader(file))
  assert rows[0] == [
    "name",
    "teacher.weight",
    "state",
    "step",
    "loss",
    "knn/accuracy",
  ]  # lr is a setting, no result
  assert rows[3] == ["teacher.weight=2.0", "2.0", "finished", "2", "1.0", "0.5"]
  table = (tmp_path / "out" / "sweep.md").read_text()
  assert "| teacher.weight=0.5 | 0.5 | finished | 2 | 0.25 | 0.5 |" in table and table in out + "\n"
  assert Image.open(tmp_path / "out" / "sweep.png").size[0] == 960
  code, out, _ = run("--metrics=lr", "--plot=knn/accuracy")
  assert (
    code == 0
    and "3 of them finished before" in out
    and "| finished | 2 | 0.1 |" in out
    and len(run.calls()) == 3
  )
  code, _, _ = run("--config.seed=7")  # another command is not the one that has finished
  assert code == 0 and len(run.calls()) == 6
  code, _, err = run("--do=table", "--metrics=los")
  assert code == 2 and "no point has logged los; there are step, loss, lr, knn/accuracy" in err


def test_a_failing_point_is_named_at_the_end_and_tried_again(run, monkeypatch):
  monkeypatch.setenv("break", "1.0")
  code, out, err = run()
  assert (
    code == 2
    and "| teacher.weight=1.0 | 1 | exit code 4 |" in out
    and "teacher.weight=2.0: done" in out
  )
  assert err == "error: 1 of 3 points failed: teacher.weight=1.0: exit code 4: error: the reason\n"
  monkeypatch.delenv("break")
  code, out, _ = run()
  assert code == 0 and "2 of them finished before" in out and len(run.calls()) == 3


def test_points_at_a_time_share_out_the_devices(run, monkeypatch):
  monkeypatch.setenv("seconds", "1")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
  began = time.monotonic()
  code, _, _ = run("--parallel=3")
  assert code == 0 and time.monotonic() - began < 3
  assert sorted(call.split()[1] for call in run.calls()) == ["4,7", "5", "6"]
  code, _, err = run("--parallel=5")
  assert code == 2 and "--parallel=5 is more than the 4 devices in CUDA_VISIBLE_DEVICES" in err


def test_an_interrupted_sweep_stops_its_points_and_continues(run, tmp_path):
  code = (
    "import sys; from mrmae_jax.__main__ import main; from mrmae_jax.cli import sweep\n"
    f"sweep.MRMAE = (sys.executable, '{tmp_path}/fake.py'); sys.exit(main())"
  )
  options = [f"--config={tmp_path}/sweep.py", f"--workdir={tmp_path}/out"]
  command = [sys.executable, "-c", code, "sweep", *options]
  process = subprocess.Popen(
    command, cwd=ROOT, env=os.environ | {"seconds": "60"}, stderr=subprocess.PIPE, text=True
  )
  while not run.calls():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=20)
  assert (
    process.returncode == 2
    and "interrupted: run the same command again to continue" in err
    and len(run.calls()) == 1
  )
  assert run()[0] == 0 and len(run.calls()) == 4


@pytest.mark.parametrize(
  "content, words, message",
  [
    (
      SWEEP.replace("teacher.weight", "teacher.wait"),
      (),
      "the point teacher.wait=0.5 does not fit",
    ),
    (SWEEP.replace("0.5, 1.0, 2.0", "'x',"), (), "the point teacher.weight=x does not fit"),
    (SWEEP.replace("0.5, 1.0, 2.0", "1.0, 1.0"), (), "two points are named teacher.weight=1.0"),
    (SWEEP.split("def sweep")[0], (), "has no sweep() that yields points"),
    ("1 / 0", (), "ZeroDivisionError: division by zero"),
    (
      SWEEP,
      ("--config.teacher.weight=3",),
      "--config.teacher.weight=3: the sweep itself sets teacher.weight",
    ),
    (SWEEP, ("--parralel=3",), "'--parralel=3' is not an option; did you mean --parallel?"),
    (SWEEP, ("--config=none.py",), "--config=none.py: no such file"),
    (SWEEP, ("--workdir=gs://bucket/sweep",), "with --do=run it must be a folder"),
    (
      SWEEP,
      ("--workdir=s3://bucket/sweep", "--do=table"),
      "s3://bucket/sweep: folders on disk and gs:// buckets",
    ),
  ],
)
def test_mistakes_get_one_clear_line(run, tmp_path, content, words, message):
  (tmp_path / "sweep.py").write_text(content)
  code, _, err = run(*words)
  assert (
    code == 2
    and message in err
    and err.startswith("error: ")
    and err.count("\n") == 1
    and not run.calls()
  )


def test_printed_commands_can_be_typed(run, tmp_path):
  code, out, _ = run("--do=print", "--config.data.source=folder:/my images/it's")
  lines = out.splitlines()
  assert code == 0 and len(lines) == 3 and not run.calls()
  assert shlex.split(lines[0]) == [
    "mrmae",
    "pretrain",
    f"--config={tmp_path}/sweep.py",
    f"--workdir={tmp_path}/out/teacher.weight=0.5",
    "--config.data.source=folder:/my images/it's",
    "--config.teacher.weight=0.5",
  ]
  code, out, _ = run("--do=tpu", "--workdir=gs://bucket/sweep")
  assert (
    code == 0
    and out.startswith("bash launch/tpu_pod.sh run pretrain --config=")
    and "--workdir=gs://bucket/sweep/teacher." in out
  )


def test_a_plot_leaves_out_what_is_not_finite(tmp_path):
  step = lambda i, loss: {"step": i, "loss": loss}
  records = {"a": [step(1, float("nan")), step(2, 1.0)], "b": [step(1, float("inf"))]}
  assert tool._draw(records, "loss").startswith(b"\x89PNG")
  assert tool._draw({"b": records["b"]}, "loss") == tool._draw(records, "accuracy") == b""


@pytest.mark.variant
def test_a_real_sweep(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  argv = [
    "sweep",
    "--config=tests/tiny_sweep.py:vit",
    f"--workdir={tmp_path}",
    "--parallel=2",
    "--metrics=loss,knn/accuracy",
  ]
  assert run_command(argv) == 0, capsys.readouterr()
  with open(tmp_path / "sweep.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["optim.blr"] for row in rows] == ["0.001", "0.04"]
  assert all((row["state"], row["step"]) == ("finished", "4") for row in rows)
  assert (
    rows[0]["loss"] != rows[1]["loss"]
    and (tmp_path / "optim.blr=0.04" / "checkpoints" / "4").is_dir()
  )
  (tmp_path / "optim.blr=0.04" / "finished").unlink()  # trained by another command: the run knows
  assert run_command(argv) == 0
  assert "already holds all 4 steps" in (tmp_path / "optim.blr=0.04" / "log.txt").read_text()
