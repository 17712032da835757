"""Several processes on this machine as the hosts of a run.

They give the same numbers as one process, and name mistakes in time.
"""

import signal
import subprocess
import time

import numpy as np
import pytest

from mrmae_jax.errors import DistributedError
from mrmae_jax.runs import distributed
from tests.helpers.programs import finish, free_port
from tests.helpers.runs import run, start

VIT = "tests/tiny.py:vit"  # compiles in a third of the time


def test_f12_one_run_on_any_hosts_and_after_a_kill(tmp_path):
  """2 processes of 2 devices are killed after the first checkpoint.

  They resume as 1 x 1, as 1 x 8 and as 4 x 1, all with the losses of a run without a kill.
  """
  longer = "--config.epochs=0.2"  # 18 steps: the kill comes before the last one
  reference, evaluations = run(tmp_path, "reference", 1, 1, longer, config=VIT)
  options = {"port": free_port(), "config": VIT}
  killed = [
    start(i, 2, 2, tmp_path / f"killed_{i}.log", f"--workdir={tmp_path}/killed", longer, **options)
    for i in range(2)
  ]
  end = time.monotonic() + 400
  while not (tmp_path / "killed" / "checkpoints" / "5").is_dir() and time.monotonic() < end:
    time.sleep(0.05)
  for process in killed:
    process.send_signal(signal.SIGKILL)
  finish(killed)
  saved = {p.name for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.name.isdigit()}
  assert "5" in saved and "18" not in saved, (tmp_path / "killed_0.log").read_text()[-2000:]
  assert "process 1 of 2 on" in (tmp_path / "killed_1.log").read_text()
  for name, count, devices in (("one", 1, 1), ("eight", 1, 8), ("four", 4, 1)):
    subprocess.run(["cp", "-r", tmp_path / "killed", tmp_path / name], check=True)
    losses, evaluation = run(tmp_path, name, count, devices, longer, config=VIT)
    assert losses.keys() == reference.keys() == set(range(1, 19))
    for step in reference:
      for key in ("loss", "mimic", "pixel"):
        np.testing.assert_allclose(
          losses[step][key], reference[step][key], rtol=1e-5, err_msg=f"{name}, step {step}, {key}"
        )
    # A neighbor that is nearly as near as the next one may change places with it.
    assert abs(evaluation[18]["knn/accuracy"] - evaluations[18]["knn/accuracy"]) < 2.1 / 359


@pytest.mark.variant
@pytest.mark.parametrize("task", ["finetune", pytest.param("probe", marks=pytest.mark.variant)])
def test_evaluation_counts_the_same_images(tmp_path, task):
  """Weights that hardly move have the same held-out accuracy on 1 and on 2 processes."""
  (tmp_path / "c.py").write_text(
    "from tests import tiny\n"
    f"def get_config():\n  return tiny.{task}_config('vit', optim__blr=1e-3)\n"
  )
  results = [
    run(
      tmp_path,
      f"run{count}",
      count,
      2 // count,
      "--config.epochs=0.03",
      task=task,
      config=tmp_path / "c.py",
    )[1][3]
    for count in (1, 2)
  ]
  assert results[0]["accuracy/images"] == results[1]["accuracy/images"] == 359
  assert abs(results[0]["accuracy/top1"] - results[1]["accuracy/top1"]) < 1.1 / 359
  assert abs(results[0]["accuracy/top5"] - results[1]["accuracy/top5"]) < 1.1 / 359


def run_mistaken(tmp_path, *per_process, count=2, timeout=90):
  """Starts a process per tuple of arguments; returns exit codes and "error:" lines of each."""
  port, logs = free_port(), [tmp_path / f"{i}.log" for i in range(len(per_process))]
  processes = [
    start(i, count, 1, logs[i], f"--workdir={tmp_path}/run", *arguments, port=port)
    for i, arguments in enumerate(per_process)
  ]
  codes = finish(processes, timeout)
  return codes, [
    [line for line in log.read_text().splitlines() if line.startswith("error:")] for log in logs
  ]


def test_f10_a_host_with_another_configuration(tmp_path):
  codes, errors = run_mistaken(tmp_path, (), ("--config.optim.blr=0.5",))
  assert codes == [2, 2]
  for lines in errors:
    assert lines == ["error: optim.blr is 0.04 on process 0 and 0.5 on process 1"]


def test_hosts_that_count_differently(tmp_path):
  codes, errors = run_mistaken(tmp_path, (), ("--num_processes=3",))
  assert codes == [2, 2]
  for lines in errors:
    assert lines == ["error: --num_processes is 2 on process 0 and 3 on process 1"]


def test_a_host_that_cannot_write(tmp_path):
  codes, errors = run_mistaken(tmp_path, (), ("--workdir=/proc/run",))
  assert codes == [2, 2]
  for lines in errors:
    assert len(lines) == 1 and lines[0].startswith("error: process 1: cannot write to /proc/run (")


def test_hosts_whose_folder_is_not_the_same(tmp_path):
  codes, errors = run_mistaken(tmp_path, (), (f"--workdir={tmp_path}/other",))
  assert codes == [2, 2]
  for lines in errors:
    assert lines == [
      f"error: process 1: {tmp_path}/other is not {tmp_path}/run of process 0; share one folder"
    ]


def test_a_host_without_its_images(tmp_path):
  codes, errors = run_mistaken(tmp_path, (), ("--config.data.source=folder:/none",))
  assert codes == [2, 2]
  for lines in errors:
    assert len(lines) == 1 and lines[0].startswith(
      "error: process 1: config.data: folder:/none: does not exist"
    )


def test_a_host_that_does_not_come(tmp_path):
  began = time.monotonic()
  codes, errors = run_mistaken(tmp_path, ("--init_timeout=8",), ("--init_timeout=8",), count=3)
  assert codes == [1, 1] and time.monotonic() - began < 60
  assert (
    "process 0 of 3 waited 8 s for the others" in errors[0][0]
    and "process 1 of 3 waited 8 s" in errors[1][0]
  )
  assert "answers, so others have not come" in errors[1][0]


def test_a_coordinator_that_is_not_there(tmp_path):
  log = tmp_path / "log"
  began = time.monotonic()
  process = start(1, 2, 1, log, f"--workdir={tmp_path}/run", "--init_timeout=23", port=free_port())
  assert finish([process], 60) == [1] and time.monotonic() - began < 50
  lines = [
    line for line in log.read_text().splitlines() if "waited" in line
  ]  # the first line comes at NOTICE_S
  assert "process 1 of 2 waited 20 s" in lines[0] and "still waiting, up to 23 s" in lines[0]
  assert "error: process 1 of 2 waited 23 s" in lines[1] and all(
    "nothing answers at localhost:" in line for line in lines
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("a:1", 2, None), "--process_id must be given too"),
    ((None, None, 3), "--coordinator_address, --num_processes must be given too"),
    (("a:1", 2, 2), "--process_id=2 must be one of 0 to 1 with --num_processes=2"),
    (("localhost", 2, 0), "--coordinator_address=localhost must be HOST:PORT"),
  ],
)
def test_flags_that_do_not_go_together(arguments, message):
  with pytest.raises(DistributedError, match=message):
    distributed.start(*arguments, timeout_s=1)


def test_the_environment_stands_in_for_flags(monkeypatch):
  monkeypatch.setenv("MRMAE_COORDINATOR_ADDRESS", "localhost:1")
  monkeypatch.setenv("MRMAE_NUM_PROCESSES", "2")
  monkeypatch.setenv("MRMAE_PROCESS_ID", "7")
  with pytest.raises(DistributedError, match="--process_id=7 must be one of 0 to 1"):
    distributed.start(None, None, None, timeout_s=1)
  monkeypatch.setenv("MRMAE_PROCESS_ID", "x")
  with pytest.raises(DistributedError, match="must be whole numbers"):
    distributed.start(None, None, None, timeout_s=1)
