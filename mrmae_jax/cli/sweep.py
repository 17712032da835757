"""Trains every point of a sweep in a folder of its own, and compares them in a table and a plot.

A configuration with a function `sweep()` is a sweep. It yields points, flat dictionaries of
overrides; see mrmae_jax/sweep.py. The same command again skips the points that it has seen finish
and continues interrupted ones. Points that fail are named at the end; the others go on.
"""

import argparse
import csv
import io
import itertools
import os
import queue
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from mrmae_jax.cli import parser
from mrmae_jax.cli.configs import find_config, load_config
from mrmae_jax.errors import UsageError, UserError
from mrmae_jax.runs.metrics import NOT_RESULTS, is_detail, read_metrics
from mrmae_jax.runs.paths import open_folder, write_text
from mrmae_jax.sweep import point_name
from mrmae_jax.viz.plot import line_plot

MRMAE = (sys.executable, "-m", "mrmae_jax")
SLURM_SCRIPT = Path("launch") / "slurm.sbatch"  # in the checkout where the job is submitted
COMMANDS = {task: command for command, task in parser.TASKS.items()}


class Job(NamedTuple):
  """One point of a sweep as a training command.

  Attributes:
    name: of the point and of its folder.
    point: what the point changes, {key of the configuration: value}.
    workdir: the folder in which it trains.
    words: the command line after `mrmae`.
  """

  name: str
  point: dict[str, Any]
  workdir: str
  words: tuple[str, ...]

  @property
  def is_finished(self) -> bool:
    """Whether this very command has ended well; `_train_job` writes its words to the folder."""
    marker = Path(self.workdir) / "finished"
    return marker.is_file() and marker.read_bytes() == os.fsencode(shlex.join(self.words))


class Failure(NamedTuple):
  """How a point failed.

  Attributes:
    code: the exit code, 128 + signal for a killed process.
    reason: the last error that the process wrote, or its last line.
  """

  code: int
  reason: str


def run(options: argparse.Namespace) -> str:
  """Does what `--do` says, and returns the text to print.

  Raises:
    UsageError: a mistake in the command line.
    UserError: points failed, or a signal stopped the sweep.
  """
  workdir = options.workdir
  if options.do in ("run", "table"):  # on another host ~ may be another folder
    workdir = os.path.expanduser(workdir)
  jobs = make_jobs(options.config, workdir, options.overrides)
  if options.do in ("run", "slurm") and "://" in workdir:
    raise UsageError(
      f"--workdir={workdir}: with --do={options.do} it must be a folder on disk; print, tpu and "
      "table take a bucket"
    )
  if options.do in ("run", "table"):
    return _train_and_compare(jobs, options, workdir)
  jobs, total = [job for job in jobs if not job.is_finished], len(jobs)
  if options.do == "slurm":
    if not jobs:
      raise UsageError(f"all {total} points are finished: there is nothing to submit")
    return slurm_array(jobs, options.parallel)
  command = ("mrmae",) if options.do == "print" else ("bash", "launch/tpu_pod.sh", "run")
  return "\n".join(shlex.join([*command, *job.words]) for job in jobs)


def make_jobs(config: str, workdir: str, overrides: list[str]) -> list[Job]:
  """Returns the points of a sweep as commands, in order, after trying each on the configuration.

  Args:
    config: name or file of the sweep, with or without ":ARGUMENT". The "argument" of a point
      replaces it.
    workdir: folder of the sweep, or a bucket.
    overrides: words --config.KEY=VALUE for all points.

  Raises:
    UsageError: a file that cannot be used, a file without points, a point that does not fit its
      configuration, or two points of one name.
  """
  path, argument = find_config(config)
  name_of_config = config.partition(":")[0]  # as typed: on another host the package lies elsewhere
  jobs = {}
  for point in _read_points(config, path):
    name = point_name(point)
    argument_of_point = point.get("argument", argument)
    suffix = f":{argument_of_point}" if argument_of_point else ""
    keys = [key for key in point if key != "argument"]
    for key, word in itertools.product(keys, overrides):
      if word.startswith(f"--config.{key}="):
        raise UsageError(f"{word}: the sweep itself sets {key}")
    words = [*overrides, *(f"--config.{key}={point[key]}" for key in keys)]
    try:
      task = load_config(f"{path}{suffix}", words).task
    except UsageError as error:
      raise UsageError(f"the point {name} does not fit {path}: {error}") from error
    if name in jobs:
      raise UsageError(f"--config={config}: two points are named {name}")
    folder = f"{workdir.rstrip('/')}/{name}"
    words = (f"--config={name_of_config}{suffix}", f"--workdir={folder}", *words)
    jobs[name] = Job(name, point, folder, (COMMANDS[task], *words))
  return list(jobs.values())


def _read_points(config: str, path: Path) -> list[dict[str, Any]]:
  """Returns the points that the `sweep()` of a file yields.

  Raises:
    UsageError: the file fails, or has no points.
  """
  try:
    sweep = runpy.run_path(str(path)).get("sweep", tuple)
    points = [dict(point) for point in sweep()]
  except Exception as error:  # whatever a user's file may raise
    raise UsageError(f"--config={config}: {type(error).__name__}: {error}") from error
  if not points:
    raise UsageError(
      f"--config={config} has no sweep() that yields points; mrmae_jax/sweep.py helps to write one"
    )
  return points


def _train_and_compare(jobs: list[Job], options, workdir: str) -> str:
  """Trains the points if `--do=run`; writes and returns the table.

  Raises:
    UserError: points failed. The table is printed before.
  """
  failures = train_jobs(jobs, options.parallel) if options.do == "run" else {}
  table = write_comparison(jobs, options.metrics, options.plot, failures, workdir)
  text = f"{table}\n{workdir}/sweep.csv, sweep.md, sweep.png"
  if not failures:
    return text
  print(text)
  reasons = (f"{name}: exit code {code}: {reason}" for name, (code, reason) in failures.items())
  raise UserError(f"{len(failures)} of {len(jobs)} points failed: {'; '.join(reasons)}")


# Training.


def train_jobs(jobs: list[Job], parallel: int) -> dict[str, Failure]:
  """Trains the points that are not finished, `parallel` at a time; returns those that failed.

  Each writes to log.txt in its folder. The devices in CUDA_VISIBLE_DEVICES are dealt out among
  the processes.

  Raises:
    UsageError: fewer devices than processes.
    UserError: a signal came; the processes have ended.
  """
  slots, processes, failures = queue.SimpleQueue(), set(), {}
  for environment in _share_out_devices(parallel):
    slots.put(environment)
  waiting = [job for job in jobs if not job.is_finished]
  print(
    f"{len(jobs)} points, {len(jobs) - len(waiting)} of them finished before; "
    f"each writes to {Path(jobs[0].workdir).parent}/NAME/log.txt",
    flush=True,
  )

  def train(job: Job) -> Failure | None:
    environment = slots.get()
    try:
      return _train_job(job, environment, processes)
    finally:
      slots.put(environment)

  old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
  pool = futures.ThreadPoolExecutor(parallel)
  try:
    names = {pool.submit(train, job): job.name for job in waiting}
    for count, future in enumerate(futures.as_completed(names), 1):
      name, result = names[future], "done"
      if failure := future.result():
        failures[name] = failure
        result = f"exit code {failure.code}: {failure.reason}"
      print(f"{count}/{len(waiting)} {name}: {result}", flush=True)
  except KeyboardInterrupt:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list(processes):
      process.terminate()
    raise UserError("interrupted: run the same command again to continue") from None
  finally:
    pool.shutdown()
    signal.signal(signal.SIGTERM, old_handler)
  return failures


def _share_out_devices(parallel: int) -> list[dict[str, str]]:
  """Returns environment variables for each of `parallel` processes: its share of the devices."""
  devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
  if not devices:
    return [{}] * parallel
  if len(devices) < parallel:
    raise UsageError(
      f"--parallel={parallel} is more than the {len(devices)} devices in CUDA_VISIBLE_DEVICES"
    )
  return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[i::parallel])} for i in range(parallel)]


def _train_job(job: Job, environment: dict[str, str], processes: set) -> Failure | None:
  """Trains a point and marks it as finished, or returns why it failed.

  Args:
    job: the point.
    environment: variables for its process.
    processes: holds the process while it runs.
  """
  folder = Path(job.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "log.txt", "ab") as log:
    start = log.tell()
    process = subprocess.Popen(
      [*MRMAE, *job.words],
      stdout=log,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      env=os.environ | environment,
    )
    processes.add(process)
    code = process.wait()
    processes.remove(process)
  if code == 0:
    write_text(folder / "finished", shlex.join(job.words))
    return None
  lines = (folder / "log.txt").read_bytes()[start:].decode("utf-8", "replace").split("\n")
  lines = [line for line in lines if line.strip()] or ["it wrote nothing"]
  errors = [line for line in lines if line.startswith("error:")]
  return Failure(code if code > 0 else 128 - code, (errors or lines)[-1])


def slurm_array(jobs: list[Job], parallel: int) -> str:
  """Returns a script for sbatch that trains each job by launch/slurm.sbatch, with its options.

  Raises:
    UsageError: the current folder is not a checkout.
  """
  if not SLURM_SCRIPT.is_file():
    raise UsageError(
      f"--do=slurm needs {SLURM_SCRIPT}: type the command in a checkout of the repository"
    )
  script = SLURM_SCRIPT.read_text(encoding="utf-8").splitlines()
  options = [line for line in script if line.startswith("#SBATCH") and "--output" not in line]
  cases = [
    f"  {i}) workdir={shlex.quote(job.workdir)} words={shlex.quote(shlex.join(job.words))} ;;"
    for i, job in enumerate(jobs)
  ]
  return "\n".join(
    [
      "#!/usr/bin/env bash",
      *options,
      f"#SBATCH --array=0-{len(jobs) - 1}%{parallel}",
      "#SBATCH --output=%x-%A_%a.log",
      "case $SLURM_ARRAY_TASK_ID in",
      *cases,
      "esac",
      'trap \'[ $? != 0 ] || printf %s "$words" > "$workdir/finished"\' EXIT',
      'eval "set -- $words"',
      'cd "$SLURM_SUBMIT_DIR" && . launch/slurm.sbatch',
    ]
  )


# Comparing.


def write_comparison(
  jobs: list[Job], metrics: tuple[str, ...], plot: str, failures: dict[str, Failure], workdir: str
) -> str:
  """Writes sweep.csv, sweep.md and sweep.png to `workdir`; returns the table in Markdown.

  Args:
    jobs: the points.
    metrics: columns of the table; (): all losses and evaluations.
    plot: the metric that is drawn over the steps.
    failures: of `train_jobs`.
    workdir: folder or bucket of the sweep.

  Raises:
    UsageError: a metric that no point has logged.
    WorkdirError: a bucket that cannot be reached.
  """
  folder = open_folder(workdir)
  records = {job.name: read_metrics(job.workdir) for job in jobs}
  table = _make_table(jobs, metrics, failures, records)
  folder.mkdir(parents=True, exist_ok=True)
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(table)
  (folder / "sweep.csv").write_text(text.getvalue())
  markdown = _to_markdown(table)
  (folder / "sweep.md").write_text(markdown + "\n")
  if content := _draw(records, plot):
    (folder / "sweep.png").write_bytes(content)
  else:
    print(f"no point has logged a finite {plot!r}: no plot", flush=True)
  return markdown


def _make_table(jobs, metrics, failures, records) -> list[list[Any]]:
  """Returns the rows of the table, the names of its columns first."""
  values = {}  # {name: the last value of each metric}
  for name, lines in records.items():
    values[name] = {key: value for line in lines for key, value in line.items()}
  logged = list(dict.fromkeys(key for row in values.values() for key in row))
  unknown = [name for name in metrics if name not in logged]
  if unknown and not failures:  # a failure may be why a metric is missing
    raise UsageError(
      f"no point has logged {', '.join(unknown)}; there are {', '.join(logged) or 'no metrics'}"
    )
  metrics = metrics or [name for name in logged if name not in NOT_RESULTS and not is_detail(name)]
  keys = list(dict.fromkeys(key for job in jobs for key in job.point))
  table = [["name", *keys, "state", "step", *metrics]]
  for job in jobs:
    row = values[job.name]
    state = "finished" if job.is_finished else "started" if row else ""
    if job.name in failures:
      state = f"exit code {failures[job.name].code}"
    point = (job.point.get(key, "") for key in keys)
    table.append([job.name, *point, state, *(row.get(key, "") for key in ("step", *metrics))])
  return table


def _to_markdown(table: list[list[Any]]) -> str:
  show = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x).replace("|", "\\|")
  rows = [f"| {' | '.join(map(show, row))} |" for row in table]
  return "\n".join([rows[0], "|" + " --- |" * len(table[0]), *rows[1:]])


def _draw(records: dict[str, list[dict]], metric: str) -> bytes:
  """Returns a PNG of a metric over the steps, one line per point; b"" if nothing can be drawn."""
  series = {}
  for name, lines in records.items():
    lines = [line for line in lines if metric in line]
    series[name] = ([line["step"] for line in lines], [line[metric] for line in lines])
  with tempfile.TemporaryDirectory() as folder:  # the sweep may lie in a bucket
    path = Path(folder) / "sweep.png"
    try:
      return line_plot(series, path, title=metric, xlabel="step", ylabel=metric)
    except ValueError:  # not a single finite value
      return b""
