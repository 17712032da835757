"""Disks that are full, by limits on the size of files and /dev/full; lines that are no records."""

import configparser
import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import __main__ as entry
from mrmae_jax import train
from mrmae_jax.cli.console import SteadyStream
from mrmae_jax.errors import UsageError, WorkdirError
from mrmae_jax.runs import log, metrics, paths, workdir
from mrmae_jax.runs.checkpoint import Checkpoints
from tests.faults import small
from tests.helpers.cli import run_command
from tests.helpers.programs import ROOT, Program, finish, wait_for


@contextlib.contextmanager
def file_limit(size):
  """No file grows beyond `size` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise(side):
  return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def test_a_full_disk_under_tensorboard_stops_nothing(tmp_path, monkeypatch, capsys):
  """Two pictures do not fit; numbers before, between and behind them do."""
  monkeypatch.setattr(log, "RETRY_S", 0)
  run_log = log.Log(tmp_path, 9, settings={"lr": 0.1})
  with file_limit(16_384):
    for step in range(1, 5):
      run_log.scalars(step, {"loss": 1.0 / step})
      if step < 3:
        run_log.image(step, "picture", noise(120))
  run_log.image(5, "picture", noise(120))
  run_log.close()
  printed = capsys.readouterr().out
  assert printed.count("nothing is written to TensorBoard until it can be written again") == 2
  assert printed.count("TensorBoard is written again") == 2
  assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]
  files = [p for p in (tmp_path / "tensorboard").glob("events*") if p.stat().st_size > 20_000]
  assert len(files) == 1  # the last picture
  assert any((tmp_path / "tensorboard" / "hparams").iterdir())


def test_outputs_that_cannot_be_written_are_found_before_the_work(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  for name in ("new", "some/new/folder/x.npz", "file", ".", "~/x.npz"):
    paths.require_writable(tmp_path / name if name[0] != "~" else name)
  for path in (tmp_path / "file" / "x", f"{tmp_path}/file/more/x.npz"):
    with pytest.raises(UsageError, match="file is not a folder"):
      paths.require_writable(path)
  monkeypatch.setattr(paths.os, "access", lambda place, mode: place != tmp_path)
  for name in ("new", "file", "a/b"):
    with pytest.raises(UsageError, match=f"{name} cannot be written: {tmp_path} is not writable"):
      paths.require_writable(tmp_path / name)


WRITE = """
import time
from pathlib import Path
from mrmae_jax.runs import paths
folder = Path({folder!r})
with paths.atomic_write(folder / "f.json") as file, paths.atomic_folder(folder / "pack") as pack:
  file.write_text("half of it")
  (pack / "shard").write_text("half of it")
  print("writing", flush=True)
  time.sleep(60)
"""


def test_what_a_killed_write_leaves_goes_with_the_next_write(tmp_path):
  """Files of other processes and files with other names stay."""
  (tmp_path / "run").mkdir()
  processes, logs = [], [tmp_path / "0", tmp_path / "1"]
  for file in logs:
    processes.append(Program(["-c", WRITE.format(folder=f"{tmp_path}/run")], file))
    wait_for(lambda file=file: "writing" in file.read_text(), processes[-1], file)
  killed, living = processes
  killed.kill()
  finish([killed], 10)
  left = [f".{name}.{killed.pid}.tmp" for name in ("f.json", "pack")]
  in_use = [f".{name}.{living.pid}.tmp" for name in ("f.json", "pack")]
  others = [".f.json.tmp", ".f.json.x1.tmp", ".g.json.1.tmp", "f.json.1.tmp"]
  for name in others:
    (tmp_path / "run" / name).write_text("")
  (tmp_path / "away" / "deep").mkdir(parents=True)
  for name in (".f.json.1.tmp", ".pack.1.tmp"):
    (tmp_path / "run" / name).symlink_to(tmp_path / "away")
    others.append(name)
  listing = lambda: sorted(os.listdir(tmp_path / "run"))
  assert listing() == sorted(left + in_use + others)
  paths.write_text(tmp_path / "run" / "f.json", "{}")
  with paths.atomic_folder(tmp_path / "run" / "pack") as pack:
    (pack / "shard").write_text("all of it")
  assert listing() == sorted(in_use + others + ["f.json", "pack"])
  living.kill()
  finish([living], 10)
  with paths.atomic_folder(tmp_path / "run" / "pack", replace=True):
    pass
  paths.write_text(tmp_path / "run" / "f.json", "[]")
  assert listing() == sorted(others + ["f.json", "pack"])
  assert not os.listdir(tmp_path / "run" / "pack") and (tmp_path / "away" / "deep").is_dir()


def test_a_temporary_file_is_a_new_one(tmp_path):
  """Nothing is written through a link in its place."""
  (tmp_path / "victim").write_text("precious")
  (tmp_path / f".f.json.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
  with pytest.raises(FileExistsError):
    paths.write_text(tmp_path / "f.json", "{}")
  assert (tmp_path / "victim").read_text() == "precious"


def test_a_disk_without_any_space(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(log, "RETRY_S", 0)
  run_log, values = log.Log(tmp_path, 9), {f"loss{i}": 1.0 for i in range(400)}
  with file_limit(0):
    for step in range(1, 4):
      run_log.scalars(step, values)
  run_log.scalars(4, values)
  run_log.close()
  printed = capsys.readouterr().out
  assert printed.count("nothing is written to TensorBoard") == 1
  assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]
  assert all(p.stat().st_size for p in (tmp_path / "tensorboard").glob("events*"))


def test_a_short_full_disk_leaves_each_record_once(tmp_path, capsys):
  """The disk takes a part of a record, then nothing for three records, then everything."""
  run_log = log.Log(tmp_path, 9)
  run_log.scalars(1, {"loss": 1.0})
  for _ in range(2):
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with file_limit(size + 10):
      for step in range(2, 5):
        run_log.scalars(step, {"loss": 1.0 / step})
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
    run_log.sync()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:4]] == [1, 2, 3, 4]
  run_log.scalars(5, {"loss": 0.2})
  run_log.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 2, 3, 4, 5]
  assert "metrics.jsonl cannot be written" in capsys.readouterr().out


def test_records_that_find_no_space_until_the_end_are_counted(tmp_path, capsys):
  run_log = log.Log(tmp_path, 9)
  with file_limit(10):
    for step in range(1, 4):
      run_log.scalars(step, {"loss": 1.0})
    run_log.close()
  assert "warning: metrics.jsonl lacks its last 3 records" in capsys.readouterr().out


def test_an_unfinished_checkpoint_goes_when_its_save_fails(tmp_path):
  """Its space is what the next save needs."""
  checkpoints = Checkpoints(tmp_path, {})
  state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(10_000))}
  with file_limit(1_500):
    assert checkpoints.save(4, state, wait=True)
  assert list((tmp_path / "checkpoints").iterdir()) == []
  assert checkpoints.save(8, state, wait=True) == ""
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["8"]
  checkpoints.close()


# The limit comes behind the first line that is printed, which needs space itself.
RESUME = """
import resource, sys
from mrmae_jax.runs import workdir
prepare = workdir.prepare_workdir
def limited(folder):
  prepare(folder)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
from mrmae_jax.cli import train
train.prepare_workdir = limited
sys.argv = ["mrmae", "pretrain", "--config=tests/faults/small.py", "--workdir={workdir}"]
from mrmae_jax import __main__ as entry
entry.run_process()
"""


def test_a_console_on_a_full_disk_and_a_resumption_without_space(tmp_path):
  process = Program(
    ["-m", "mrmae_jax", "pretrain", "--config=tests/faults/small.py", f"--workdir={tmp_path}/run"],
    "/dev/full",
  )
  assert finish([process], 120) == [0]
  assert len([r for r in metrics.read_metrics(tmp_path / "run") if "loss" in r]) == 20
  process = Program(["-c", RESUME.format(workdir=tmp_path / "run")], "/dev/full")
  assert finish([process], 120) == [5]


def test_a_steady_stream_loses_lines_and_nothing_else():
  with open("/dev/full", "w", encoding="utf-8") as full:
    stream = SteadyStream(full)
    assert stream.write("x" * 100_000) == 100_000
    stream.flush()
    stream.writelines(["a", "b"])
    assert stream.fileno() == full.fileno() and "No space left" in stream.problem
    with contextlib.suppress(OSError):
      full.close()


@pytest.mark.parametrize(
  "words, code, message",
  [
    ("--version > /dev/full", 5, "error: a part of the output is lost: [Errno 28] No space"),
    ("--version >&-", 0, ""),
    ("--version 2>&-", 0, ""),
    ("--help | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
    ("verify --sauce=digits 2> /dev/full", 2, ""),
  ],
)
def test_commands_say_what_a_console_has_lost(words, code, message):
  command = f"{sys.executable} -m mrmae_jax {words}"
  done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == code and done.stderr.startswith(message)
  assert "Traceback" not in done.stderr and bool(done.stderr) == bool(message)


def test_a_full_disk_is_not_a_mistake_in_the_command(monkeypatch, capsys):
  def run(options):
    raise OSError(errno.ENOSPC, "No space left on device", "page.html")

  monkeypatch.setattr("mrmae_jax.cli.report.run", run)
  assert run_command(["report", "--runs=x", "--out=page.html"]) == 5
  assert "error: [Errno 28] No space left on device: 'page.html'" in capsys.readouterr().err


def test_the_installed_command_is_that_of_the_package():
  """It keeps compiled programs, shows every name and ends although a thread waits for its image."""
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  scripts = settings["options.entry_points"]["console_scripts"]
  assert scripts.split() == ["mrmae", "=", f"{entry.__name__}:{entry.run_process.__name__}"]


def test_lines_that_are_no_records_are_left_out(tmp_path, capsys):
  good = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
  bad = [b'{"step": 3, "loss": "\xff"}', b"[1, 2]", b'"text"', b'{"loss": 1}', b'{"step": "4"}']
  bad += [b'{"step": 5, "loss": NaN}', b'{"step": 6, "loss": ' + b"9" * 4000 + b"}"]
  bad += [b'{"step": -1}', b'{"step": 1.5}', b"[" * 100_000, b'{"step": 7, "loss": [1]}']
  lines = [json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode(), b'{"step": 8, "lo']
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
  assert metrics.read_metrics(tmp_path) == good
  run_log = log.Log(tmp_path, 9, first_step=2)
  run_log.close()
  assert (
    f"metrics.jsonl: {len(bad)} lines are no records and are left out" in capsys.readouterr().out
  )
  assert metrics.read_records(tmp_path / "metrics.jsonl") == (good, 0)


class Failing:
  """An evaluator that raises an error at step 10."""

  def __init__(self, error):
    self._error = error

  def run(self, params, extra, step):
    if step == 10:
      raise self._error
    return {"value": 1.0}


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("planted")])
def test_an_evaluation_that_fails_loses_no_step(tmp_path, monkeypatch, capsys, error):
  config = small.get_config()
  config.eval_every = 10 * 16 / 1438
  evaluators = {"failing": Failing(error)}
  monkeypatch.setattr("mrmae_jax.runs.run.make_evaluators", lambda *_: (evaluators, []))
  config.evals = {"failing": {}}
  if isinstance(error, OSError):
    train.fit(config, small.toy_task(), tmp_path)
    steps = [r["step"] for r in metrics.read_metrics(tmp_path) if "failing/value" in r]
    assert steps == [0, 20]
    assert "warning: failing of step 10 is left out: no space" in capsys.readouterr().out
    return
  with pytest.raises(ValueError, match="planted"):
    train.fit(config, small.toy_task(), tmp_path)
  assert "stopped after step 10 of 20, which is saved" in capsys.readouterr().out
  assert (tmp_path / "checkpoints" / "10").is_dir()


class Drawing:
  """An evaluator with a number, a picture and a file."""

  def __init__(self, workdir):
    self._workdir = workdir

  def run(self, params, extra, step):
    name = f"step_{step:07d}"
    pictures = {self._workdir / "pictures" / f"{name}.png": noise(40)}
    files = {self._workdir / "boxes" / f"{name}.json": b"[]"}
    return {"value": 1.0, "pictures": pictures, "files": files}


def test_numbers_stay_where_there_is_no_space_for_a_picture(tmp_path, monkeypatch, capsys):
  """Nor is the file that a link in the place of a picture leads to written."""
  config = small.get_config()
  config.evals, config.eval_every = {"drawing": {}}, 10 * 16 / 1438
  evaluators = {"drawing": Drawing(tmp_path)}

  def open_evaluators(*_):
    (tmp_path / "pictures").write_text("no folder")
    (tmp_path / "boxes").mkdir()
    (tmp_path / "precious").write_text("of somebody else")
    (tmp_path / "boxes" / "step_0000010.json").symlink_to(tmp_path / "precious")
    return evaluators, []

  monkeypatch.setattr("mrmae_jax.runs.run.make_evaluators", open_evaluators)
  train.fit(config, small.toy_task(), tmp_path)
  steps = [r["step"] for r in metrics.read_metrics(tmp_path) if "drawing/value" in r]
  assert steps == [0, 10, 20]
  assert capsys.readouterr().out.count("warning: drawing of step 10: no step_0000010.png: ") == 1
  assert (tmp_path / "precious").read_text() == "of somebody else"
  assert (tmp_path / "boxes" / "step_0000010.json").read_text() == "[]"


def test_a_locale_that_cannot_spell_the_workdir_is_refused(tmp_path, monkeypatch):
  workdir.prepare_workdir(tmp_path / "l\u00e4uft")
  with pytest.raises(WorkdirError, match=r"l\\udce4uft.*set LC_ALL=C.UTF-8"):
    workdir.prepare_workdir(f"{tmp_path}/l\udce4uft")  # a byte of Latin-1 in a UTF-8 locale
  monkeypatch.setattr("os.fsencode", lambda path: path.encode("latin-1"))
  with pytest.raises(WorkdirError, match=r"l\\xe4uft.*set LC_ALL=C.UTF-8"):
    workdir.prepare_workdir(tmp_path / "l\u00e4uft")


def test_links_in_a_workdir_are_refused(tmp_path):
  """A run empties the folder of unfinished checkpoints: it must be its own."""
  (tmp_path / "foreign" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "foreign")
  with pytest.raises(WorkdirError, match=r"run holds links, pipes or devices \(checkpoints\)"):
    workdir.prepare_workdir(tmp_path / "run")
  assert (tmp_path / "foreign" / "4.orbax-checkpoint-tmp").is_dir()
  (tmp_path / "link").symlink_to(tmp_path / "foreign")  # the whole folder may be one
  workdir.prepare_workdir(tmp_path / "link")


def test_links_and_pipes_deep_in_a_workdir_are_refused(tmp_path):
  """A pipe would be waited for."""
  run = tmp_path / "run"
  for name in ("checkpoints/4", "tensorboard", "wandb"):
    (run / name).mkdir(parents=True)
  (run / "wandb" / "latest-run").symlink_to("run-1")  # Weights & Biases make it
  workdir.prepare_workdir(run)
  for number, name in enumerate(("checkpoints/4/state", "metrics.jsonl", "tensorboard/hparams")):
    (os.mkfifo if number % 2 else lambda path: os.symlink("/etc", path))(run / name)
    with pytest.raises(WorkdirError, match=f"{name}.*; remove them"):
      workdir.prepare_workdir(run)
    (run / name).unlink()
