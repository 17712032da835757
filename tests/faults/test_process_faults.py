"""Runs whose processes are stopped, killed, stuck, or disagree.

Each test starts complete programs, on a model of a few weights.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mrmae_jax.errors import Interrupted
from mrmae_jax.runs import supervision
from mrmae_jax.runs.metrics import read_metrics
from tests.helpers.cli import run_command
from tests.helpers.programs import Program, finish, free_port, host_flags, wait_for

ROOT = Path(__file__).parent.parent.parent
# Plants a fault at the end of a step, in a process that is otherwise that of a user.
INJECT = """
import os, signal, sys, time
from mrmae_jax.runs import supervision
fault, index, step = {fault!r}, {index}, {step}
beat, count = supervision.beat, [0]
def injected():
  count[0] += 1
  time.sleep({pause})
  if count[0] == step:
    if fault == "raise":
      raise RuntimeError("planted in process %d" % index)
    if fault == "hang":
      time.sleep(1000)
    if fault == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
  beat()
supervision.beat = injected
sys.argv = ["mrmae", "pretrain"] + {arguments!r}
from mrmae_jax import __main__ as entry
entry.run_process()
"""


def start(
  workdir,
  log,
  *arguments,
  index=0,
  count=1,
  port=None,
  fault="",
  step=0,
  pause=0.0,
  argument="",
  devices=2,
  waits=None,
):
  """Starts a process of a run, alone with count 1.

  `fault` happens at the end of `step`. Each step takes `pause` seconds longer.
  """
  flags = [f"--config=tests/faults/small.py{argument}", f"--workdir={workdir}", *arguments]
  flags += host_flags(index, count, port)
  code = INJECT.format(fault=fault, index=index, step=step, pause=pause, arguments=flags)
  return Program(["-c", code], log, devices=devices, waits=waits)


def pair(folder, *arguments, faults=("", ""), **options):
  """Starts two processes of a run; returns them and their logs."""
  port, logs = free_port(), [folder / f"{i}.log" for i in range(2)]
  return [
    start(
      folder / "run",
      logs[i],
      *arguments,
      index=i,
      count=2,
      port=port,
      fault=faults[i],
      devices=1,
      **options,
    )
    for i in range(2)
  ], logs


def losses(workdir):
  """Returns {step: loss as a hexadecimal float}; a step must not be logged twice."""
  records = [r for r in read_metrics(workdir) if "loss" in r]
  assert len({r["step"] for r in records}) == len(records)
  return {r["step"]: r["loss"].hex() for r in records}


def last_step(workdir):
  return max((r["step"] for r in read_metrics(workdir)), default=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """The losses of a run of one process without a fault."""
  folder = tmp_path_factory.mktemp("reference")
  process = start(folder / "run", folder / "log")
  assert finish([process], 120) == [0], (folder / "log").read_text()[-3000:]
  return losses(folder / "run")


@pytest.mark.parametrize(
  "number",
  [
    signal.SIGTERM,
    pytest.param(signal.SIGINT, marks=pytest.mark.variant),
    pytest.param(signal.SIGHUP, marks=pytest.mark.variant),
  ],
)
def test_f6_stopped_by_a_signal_and_continued(tmp_path, reference, number):
  log = tmp_path / "log"
  process = start(tmp_path / "run", log, pause=0.1)
  wait_for(lambda: last_step(tmp_path / "run") >= 6, process, log)
  process.send_signal(number)
  began = time.monotonic()
  assert finish([process], 60) == [75], log.read_text()[-3000:]
  assert time.monotonic() - began < 30
  match = re.search(
    r"stopped after step (\d+) of 20, which is saved; run the same command to resume",
    log.read_text(),
  )
  assert (
    match
    and (tmp_path / "run" / "checkpoints" / match[1]).is_dir()
    and "Traceback" not in log.read_text()
  )
  assert (tmp_path / "run" / "lock").read_text() == ""
  assert finish([start(tmp_path / "run", log)], 60) == [0]
  assert (
    losses(tmp_path / "run") == reference and f"resuming after step {match[1]}" in log.read_text()
  )
  assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


def test_f4_stopped_while_compiling_and_while_evaluating(tmp_path):
  log = tmp_path / "log"
  code = INJECT.format(
    fault="",
    index=0,
    step=0,
    pause=0.05,
    arguments=["--config=tests/tiny.py:vit", f"--workdir={tmp_path}/run"],
  )
  options = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "true"}
  process = Program(["-c", code], log, env=options)
  wait_for(lambda: "Compiling jit(train_step)" in log.read_text(), process, log)
  process.send_signal(signal.SIGTERM)
  assert finish([process], 60) == [75], log.read_text()[-3000:]
  assert "stopped during compile: nothing is lost" in log.read_text()
  process = Program(["-c", code], log)
  wait_for(lambda: "training step" in log.read_text(), process, log)
  time.sleep(0.5)  # the first evaluation
  process.send_signal(signal.SIGTERM)
  assert finish([process], 60) == [75], log.read_text()[-3000:]
  # On a busy machine the evaluation has not begun yet.
  assert re.search("stopped (after step|before the first step)", log.read_text())


def test_f4_stopped_while_features_are_computed(tmp_path, monkeypatch, capsys):

  beats = iter(range(2))
  monkeypatch.setattr(
    supervision,
    "beat",
    lambda: next(beats, None) is None and (_ for _ in ()).throw(Interrupted("SIGTERM")),
  )
  arguments = [
    "features",
    "--model=pixels",
    "--images=digits",
    "--image_size=16",
    "--batch_size=16",
    f"--out={tmp_path}/f.npz",
  ]
  assert (
    run_command(arguments) == 75
    and "stopped by a signal; nothing was written" in capsys.readouterr().err
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1, 0), marks=pytest.mark.variant)])
def test_f3_both_stop_at_the_same_step(tmp_path, reference, victims):
  processes, logs = pair(tmp_path, pause=0.1)
  wait_for(lambda: last_step(tmp_path / "run") >= 6, processes[0], logs[0])
  for index in victims:
    processes[index].send_signal(signal.SIGTERM)
  assert finish(processes, 60) == [75, 75], (
    logs[0].read_text()[-3000:] + logs[1].read_text()[-3000:]
  )
  match = re.search(r"stopped after step (\d+) of 20, which is saved", logs[0].read_text())
  assert match and (tmp_path / "run" / "checkpoints" / match[1]).is_dir()
  assert finish([start(tmp_path / "run", logs[0])], 60) == [
    0
  ]  # one process of two devices has the numbers of two of one
  assert losses(tmp_path / "run").keys() == reference.keys()
  assert all(
    abs(float.fromhex(losses(tmp_path / "run")[i]) - float.fromhex(reference[i])) < 1e-5
    for i in reference
  )


def test_f8_a_process_that_raises_ends_all(tmp_path):
  processes, logs = pair(tmp_path, faults=("", "raise"), step=6, pause=0.1)
  assert finish([processes[1]], 120) == [1]
  began = time.monotonic()
  assert finish([processes[0]], 60) == [1] and time.monotonic() - began < 15
  assert logs[1].read_text().splitlines()[-1] == "error: RuntimeError: planted in process 1"
  assert (
    "process 1 has ended: RuntimeError: planted in process 1; this process ends too"
    in logs[0].read_text()
  )


def test_f9_a_process_that_hangs_says_where(tmp_path):
  log = tmp_path / "log"
  process = start(tmp_path / "run", log, "--config.hang_s=12", fault="hang", step=6)
  assert finish([process], 120) == [6]
  output = log.read_text()
  assert re.search(
    r"error: nothing has happened for [1-9][0-9] s in phase 'step' \(after 5 beats\); "
    "the stacks of all threads:",
    output,
  )
  assert "in injected" in output and output.count("Thread 0x") > 1


@pytest.mark.slow
def test_f7_a_process_that_is_killed_ends_all(tmp_path, reference):
  for victim in (1, 0):
    folder = tmp_path / str(victim)
    folder.mkdir()
    processes, logs = pair(
      folder, faults=("kill", "") if victim == 0 else ("", "kill"), step=10, pause=0.1
    )
    assert finish([processes[victim]], 120) == [-signal.SIGKILL]
    began = time.monotonic()
    codes = finish([processes[1 - victim]], 60)
    assert codes[0] not in (0, None) and time.monotonic() - began < 35, codes
    assert finish([start(folder / "run", logs[0])], 60) == [0]
    assert losses(folder / "run").keys() == reference.keys()


def test_f5_stopped_before_the_others_have_come(tmp_path):
  waits = {"mrmae_jax.runs.distributed.LINGER_S": 1}
  processes, logs = pair(tmp_path, "--init_timeout=4", waits=waits)
  processes[1].send_signal(signal.SIGTERM)
  codes = finish(processes, 60)
  assert codes[1] == -signal.SIGTERM and codes[0] == 1
  assert "error: process 0 of 2 waited 4 s for the others" in logs[0].read_text()


def test_f21_a_second_run_in_the_same_workdir_is_refused(tmp_path, reference):
  logs = [tmp_path / "0", tmp_path / "1"]
  first = start(tmp_path / "run", logs[0], pause=0.2)
  wait_for(lambda: last_step(tmp_path / "run") >= 2, first, logs[0])
  assert finish([start(tmp_path / "run", logs[1])], 60) == [2]
  assert f"is in use by process {first.pid} on " in logs[1].read_text()
  assert finish([first], 60) == [0] and losses(tmp_path / "run") == reference


@pytest.mark.variant
def test_f40_a_compilation_cache_full_of_rubbish(tmp_path, reference, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  log = tmp_path / "log"
  assert finish([start(tmp_path / "one", log)], 60) == [0]
  entries = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
  assert entries
  for path in entries:
    path.write_bytes(os.urandom(100))
  assert finish([start(tmp_path / "two", log)], 60) == [0], log.read_text()[-3000:]
  assert losses(tmp_path / "two") == reference


# A save every third step, evaluations, an average of the parameters.
KILLED = ("--config.checkpoint_every=0.034", "--config.eval_every=0.1")


def killed_at_random(folder, count, kills, seed=0, steps=60):
  """Kills a run of `count` processes again and again, lets it end, and compares every loss.

  A third of the kills come within 6 s of the start: restoring, compiling, in a step. The others
  come after another checkpoint is complete, most of them in the middle of a save. Near its end the
  run begins again.

  Returns:
    The number of kills in the middle of a save, and the newest checkpoints when they came.
  """

  def begin(name, pause):
    port, logs = free_port(), [folder / f"{i}.log" for i in range(count)]
    return [
      start(
        folder / name,
        logs[i],
        *KILLED,
        f"--config.epochs={steps * 16 / 1438}",
        index=i,
        count=count,
        port=port,
        pause=pause,
        argument=":killed",
        devices=2 // count,
      )
      for i in range(count)
    ], logs[0]

  processes, log = begin("reference", 0.0)
  assert finish(processes, 120 + steps) == [0] * count, log.read_text()[-3000:]
  expected, rng = losses(folder / "reference"), random.Random(seed)
  torn, places = 0, []
  unfinished = lambda: [
    p for p in (folder / "run" / "checkpoints").glob("*") if not p.name.isdigit()
  ]
  newest = lambda: max(
    (int(p.name) for p in (folder / "run" / "checkpoints").glob("*") if p.name.isdigit()),
    default=-1,
  )
  for _ in range(kills):
    if last_step(folder / "run") > steps - 10:  # nearly at its end: once more from the beginning
      shutil.rmtree(folder / "run")
    before, is_early = newest(), rng.random() < 1 / 3
    processes, log = begin("run", 0.03)
    if not is_early:
      wait_for(lambda: newest() > before or processes[0].poll() == 0, processes[0], log)
    end = time.monotonic() + rng.uniform(0, 6 if is_early else 0.5)
    in_save = not is_early and rng.random() < 0.8
    while time.monotonic() < end or in_save and not unfinished() and processes[0].poll() is None:
      time.sleep(0.001)
    for process in processes:
      process.send_signal(signal.SIGKILL)
    assert set(finish(processes, 60)) <= {0, -signal.SIGKILL}, log.read_text()[-3000:]
    torn += bool(unfinished())
    places.append(newest())
  processes, log = begin("run", 0.0)
  assert finish(processes, 120 + steps) == [0] * count, log.read_text()[-3000:]
  assert losses(folder / "run") == expected and len(expected) == steps
  left = sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())
  assert len(left) == 2 and str(steps) in left and not (folder / "run" / "damaged").exists(), left
  return torn, places


def test_f1_killed_in_the_middle_of_saves(tmp_path):
  assert killed_at_random(tmp_path, 1, 2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("count, kills, steps", [(1, 25, 60), (2, 25, 60), (1, 200, 800)])
def test_f1_killed_again_and_again(tmp_path, count, kills, steps):
  torn, places = killed_at_random(tmp_path, count, kills, seed=count, steps=steps)
  print(
    f"{torn} of {kills} kills left an unfinished checkpoint; the newest complete one was of "
    f"{len(set(places))} different steps, up to {max(places)}"
  )
  assert torn > kills / 4 and len(set(places)) > kills / 4 and max(places) > steps / 4


@pytest.mark.slow
def test_f41_many_starts_and_stops(tmp_path):
  """Starts a run 20 times and stops it by a signal: no file and no process is left behind."""
  log, files = tmp_path / "log", []
  for _ in range(20):
    process = start(tmp_path / "run", log, pause=0.05)
    before = last_step(tmp_path / "run")
    wait_for(
      lambda: last_step(tmp_path / "run") > before or process.poll() is not None, process, log
    )
    process.send_signal(signal.SIGTERM)
    assert finish([process], 60)[0] in (0, 75), log.read_text()[-2000:]
    files.append(
      sum(not p.is_dir() for p in (tmp_path / "run").rglob("*") if "tensorboard" not in str(p))
    )
    assert not subprocess.run(
      ["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout
  assert max(files) <= files[2] + 40, files  # the second checkpoint is there by then
