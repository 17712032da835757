"""Several processes on this machine as the hosts of a run.

They give the same numbers as one process, and name mistakes in time.
"""

import shutil
import signal
import time

import numpy as np
import pytest

from mrmae_jax.errors import DistributedError
from mrmae_jax.runs import distributed
from tests.helpers.programs import finish, free_port, wait_for
from tests.helpers.runs import run, start

VIT = "tests/tiny.py:vit"  # compiles in a third of the time


@pytest.mark.parametrize(
  "config, hosts",
  [
    ("tests/faults/small.py", {"eight": (1, 8)}),
    pytest.param(VIT, {"one": (1, 1), "eight": (1, 8), "four": (4, 1)}, marks=pytest.mark.variant),
  ],
)
def test_f12_one_run_on_any_hosts_and_after_a_kill(tmp_path, config, hosts):
  """2 processes of 2 devices are killed after the first checkpoint.

  They resume on other hosts and devices, with the losses of a run without a kill.
  """
  steps = 18
  options = {"config": config, "port": free_port()}
  arguments = ["--config.epochs=0.2", "--config.checkpoint_every=0.045"]
  reference, evaluations = run(tmp_path, "reference", 1, 1, *arguments, config=config)
  killed = [
    start(
      i, 2, 2, tmp_path / f"killed_{i}.log", f"--workdir={tmp_path}/killed", *arguments, **options
    )
    for i in range(2)
  ]
  end = time.monotonic() + 400
  while not (tmp_path / "killed" / "checkpoints" / "5").is_dir() and time.monotonic() < end:
    time.sleep(0.05)
  for process in killed:
    process.send_signal(signal.SIGKILL)
  finish(killed)
  saved = {p.name for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.name.isdigit()}
  assert "5" in saved and str(steps) not in saved, (tmp_path / "killed_0.log").read_text()[-2000:]
  assert "process 1 of 2 on" in (tmp_path / "killed_1.log").read_text()
  for name, (count, devices) in hosts.items():
    shutil.copytree(tmp_path / "killed", tmp_path / name)
    losses, evaluation = run(tmp_path, name, count, devices, *arguments, config=config)
    assert losses.keys() == reference.keys() == set(range(1, steps + 1))
    terms = {"loss", "mimic", "pixel"} & reference[1].keys()
    for step in reference:
      for key in terms:
        np.testing.assert_allclose(
          losses[step][key], reference[step][key], rtol=1e-5, err_msg=f"{name}, step {step}, {key}"
        )
    if evaluations:  # a neighbor that is nearly as near as the next one may change places with it
      accuracies = [rows[steps]["knn/accuracy"] for rows in (evaluation, evaluations)]
      assert abs(accuracies[0] - accuracies[1]) < 2.1 / 359


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


@pytest.mark.variant
def test_segmentation_on_two_hosts_and_after_a_kill(tmp_path):
  """Statistics of BatchNorm are those of the whole batch, and the pixels of all hosts are counted.

  A run that is killed and started again has every number of a run without a kill.
  """
  (tmp_path / "c.py").write_text(
    "from tests import tiny\n"
    "def get_config():\n"
    "  return tiny.segment_config(epochs=0.16, checkpoint_every=0.04)\n"
  )
  steps, options = 20, {"task": "segment", "config": tmp_path / "c.py"}
  losses, evaluations = run(tmp_path, "one", 1, 1, **options)
  assert losses.keys() == set(range(1, steps + 1)) and evaluations[steps]["miou/images"] == 200
  hosts = run(tmp_path, "hosts", 2, 1, **options)
  terms = ("loss", "decode", "aux")
  for step in losses:
    np.testing.assert_allclose(*([x[step][key] for key in terms] for x in (hosts[0], losses)), 1e-5)
  shares = [
    {x: row[x] for x in row if "miou" in x} for row in (hosts[1][steps], evaluations[steps])
  ]
  assert shares[0] == pytest.approx(shares[1], abs=1e-3)

  log = tmp_path / "killed.log"
  process = start(0, 1, 1, log, f"--workdir={tmp_path}/killed", **options)
  saved = tmp_path / "killed" / "checkpoints"
  wait_for((saved / "5").is_dir, process, log, 400)
  process.send_signal(signal.SIGKILL)
  finish([process])
  assert not (saved / f"{steps}").exists(), log.read_text()[-2000:]
  again = run(tmp_path, "killed", 1, 1, **options)
  for step in losses:
    assert [again[0][step][key] for key in terms] == [losses[step][key] for key in terms]
  assert {x: again[1][steps][x] for x in shares[1]} == shares[1]


def run_mistaken(tmp_path, *per_process, count=2, timeout=90, waits=None):
  """Starts a process per tuple of arguments; returns exit codes and "error:" lines of each."""
  port, logs = free_port(), [tmp_path / f"{i}.log" for i in range(len(per_process))]
  processes = [
    start(i, count, 1, logs[i], f"--workdir={tmp_path}/run", *arguments, port=port, waits=waits)
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
  waits = {"mrmae_jax.runs.workdir.SEEN_S": 1}
  codes, errors = run_mistaken(tmp_path, (), (f"--workdir={tmp_path}/other",), waits=waits)
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
  waits = {"mrmae_jax.runs.distributed.LINGER_S": 5}
  arguments = ("--init_timeout=4",)
  codes, errors = run_mistaken(tmp_path, arguments, arguments, count=3, waits=waits)
  assert codes == [1, 1] and time.monotonic() - began < 60
  assert (
    "process 0 of 3 waited 4 s for the others" in errors[0][0]
    and "process 1 of 3 waited 4 s" in errors[1][0]
  )
  assert "answers, so others have not come" in errors[1][0]


def test_a_coordinator_that_is_not_there(tmp_path):
  log = tmp_path / "log"
  process = start(
    1,
    2,
    1,
    log,
    f"--workdir={tmp_path}/run",
    "--init_timeout=3",
    port=free_port(),
    waits={"mrmae_jax.runs.distributed.NOTICE_S": 2},
  )
  assert finish([process], 60) == [1]
  notice, error = [line for line in log.read_text().splitlines() if "waited" in line]
  assert "process 1 of 2 waited 2 s" in notice and "still waiting, up to 3 s" in notice
  assert "error: process 1 of 2 waited 3 s" in error
  assert all("nothing answers at localhost:" in line for line in (notice, error))


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
