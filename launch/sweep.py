"""Runs every point of a configuration's `sweep()`, each in a folder of its own, and compares them in a table and a plot.

  python -m launch.sweep --config=configs/sweeps/mimic_weight.py:demo --workdir=/tmp/sweep --parallel=2
  python -m launch.sweep --config=configs/sweeps/lr.py --workdir=/shared/lr --parallel=4 --do=slurm > lr.sh && sbatch lr.sh
  python -m launch.sweep --config=configs/sweeps/lr.py --workdir=/shared/lr --do=table

A point is a flat dictionary of overrides, see mrmae_jax/sweep.py; its folder in --workdir is named by them. The options
--config.KEY=VALUE hold for all points. The same command again skips points that it has seen finish and continues interrupted
ones; those that fail are named at the end, the others go on. --do is one of
  run     here, --parallel at a time; devices in CUDA_VISIBLE_DEVICES are dealt out among them
  print   prints the commands
  slurm   prints an array script for sbatch; --parallel is the number of jobs at a time
  tpu     prints commands that train one point after another on a TPU slice, see launch/tpu_pod.sh
  table   only compares what is there; a bucket will do
Written to --workdir: sweep.csv and sweep.md with the last value of each of --metrics, sweep.png with --plot over the steps.
"""

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
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from launch.plot import line_plot
from mrmae_jax import sweep as points_lib
from mrmae_jax.cli import command_line
from mrmae_jax.errors import UsageError, WorkdirError

TRAINING = (sys.executable, "-m", "mrmae_jax.cli.train")


class Run(NamedTuple):
  """One point of a sweep: where it trains, and the words of its command line."""

  name: str
  point: dict[str, Any]
  workdir: str
  words: tuple[str, ...]

  @property
  def finished(self) -> bool:
    """Whether this very command has ended well: then its words are in the folder. If not, main.py finds out what is left."""
    marker = Path(self.workdir) / "finished"
    return marker.is_file() and marker.read_text(encoding="utf-8") == shlex.join(self.words)


class Failure(NamedTuple):
  """How a point ended: its exit code (128 + signal if it was killed) and its last error, or the last line it wrote."""

  code: int
  line: str


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_string(
    "config", None, "File with get_config() and sweep(), or FILE:ARGUMENT.", flag_values=own
  )
  flags.DEFINE_string(
    "workdir", None, "Folder of the sweep; each point has a folder in it.", flag_values=own
  )
  flags.DEFINE_enum(
    "do",
    "run",
    ["run", "print", "slurm", "tpu", "table"],
    "What to do with the points.",
    flag_values=own,
  )
  flags.DEFINE_integer("parallel", 1, "Points at a time.", lower_bound=1, flag_values=own)
  flags.DEFINE_list(
    "metrics",
    [],
    "For the table, e.g. loss,knn/accuracy; none: all losses and evaluations.",
    flag_values=own,
  )
  flags.DEFINE_string("plot", "loss", "The metric that is drawn.", flag_values=own)
  return own


def expand(config: str, workdir: str, overrides: list[str]) -> list[Run]:
  """The points of a sweep as commands, in order; every one is tried on the configuration first.

  Args:
    config: FILE or FILE:ARGUMENT. Points with an "argument" of their own replace it.
    workdir: folder of the sweep, or a bucket.
    overrides: words --config.KEY=VALUE for all points.

  Raises:
    UsageError: no such file, no sweep() in it, a point that does not fit its configuration, two points of one name.
  """
  path, _, argument = config.partition(":")
  if not os.path.isfile(path):
    raise UsageError(
      f"--config={config}: no such file; the project's own sweeps are in configs/sweeps/"
    )
  try:
    module = runpy.run_path(path)
    points = [dict(point) for point in module["sweep"]()] if "sweep" in module else []
  except Exception as error:  # whatever a user's file may raise
    raise UsageError(f"--config={config}: {type(error).__name__}: {error}") from error
  if not points:
    raise UsageError(f"--config={config} has no sweep() that yields points; see mrmae_jax/sweep.py")
  runs = []
  for point in points:
    name, own = (
      points_lib.name(point),
      {key: value for key, value in point.items() if key != "argument"},
    )
    chosen = point.get("argument", argument)
    try:
      module["get_config"](*[chosen] if chosen else []).lock().update_from_flattened_dict(own)
    except Exception as error:
      raise UsageError(
        f"the point {name} does not fit {path}: {' '.join(str(error).split())}"
      ) from error
    for key, word in itertools.product(own, overrides):
      if word.startswith(f"--config.{key}="):
        raise UsageError(f"{word}: the sweep itself sets {key}")
    if name in [run.name for run in runs]:
      raise UsageError(f"--config={config}: two points are named {name}")
    folder = f"{workdir.rstrip('/')}/{name}"
    runs.append(
      Run(
        name,
        point,
        folder,
        (
          f"--config={path}:{chosen}" if chosen else f"--config={path}",
          f"--workdir={folder}",
          *overrides,
          *(f"--config.{key}={value}" for key, value in own.items()),
        ),
      )
    )
  return runs


def train(runs: list[Run], parallel: int, training: tuple[str, ...]) -> dict[str, Failure]:
  """Trains what is not finished, `parallel` at a time; what they write is in log.txt of each folder.

  Args:
    runs: of `expand`.
    parallel: processes at a time; the devices in CUDA_VISIBLE_DEVICES, if set, are dealt out among them.
    training: the command that takes the words of a run.

  Returns:
    {name: how it failed} of those that failed.
  """
  slots, processes = queue.SimpleQueue(), set()
  devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
  if devices and len(devices) < parallel:
    raise UsageError(
      f"--parallel={parallel} is more than the {len(devices)} devices in CUDA_VISIBLE_DEVICES"
    )
  for i in range(parallel):
    slots.put({"CUDA_VISIBLE_DEVICES": ",".join(devices[i::parallel])} if devices else {})

  def one(run: Run) -> Failure | None:
    folder, slot = Path(run.workdir), slots.get()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "ab") as log:
      began = log.tell()
      process = subprocess.Popen(
        [*training, *run.words],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=os.environ | slot,
      )
      processes.add(process)
      code = process.wait()
      processes.remove(process)
    slots.put(slot)
    if code == 0:
      (folder / "finished").write_text(shlex.join(run.words), encoding="utf-8")
      return None
    lines = (folder / "log.txt").read_bytes()[began:].decode("utf-8", "replace").split("\n")
    lines = [line for line in lines if line.strip()] or ["it wrote nothing"]
    return Failure(
      code if code > 0 else 128 - code,
      ([line for line in lines if line.startswith("error:")] or lines)[-1],
    )

  failures = {}
  waiting = [run for run in runs if not run.finished]
  print(
    f"{len(runs)} points, {len(runs) - len(waiting)} of them finished before; "
    f"each writes to {Path(runs[0].workdir).parent}/NAME/log.txt",
    flush=True,
  )
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
  pool = futures.ThreadPoolExecutor(parallel)
  try:
    running = {pool.submit(one, run): run for run in waiting}
    for i, done in enumerate(futures.as_completed(running), 1):
      name = running[done].name
      if failure := done.result():
        failures[name] = failure
      print(
        f"{i}/{len(waiting)} {name}: "
        + (f"exit code {failure.code}: {failure.line}" if failure else "done"),
        flush=True,
      )
  except KeyboardInterrupt:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list(processes):
      process.terminate()
    raise UsageError("interrupted: the same command continues") from None
  finally:
    pool.shutdown()
    signal.signal(signal.SIGTERM, before)
  return failures


def slurm_array(runs: list[Run], parallel: int) -> str:
  """A script for sbatch that trains each run by launch/slurm.sbatch, whose options it has."""
  script = Path(__file__).with_name("slurm.sbatch").read_text(encoding="utf-8")
  options = [
    line for line in script.splitlines() if line.startswith("#SBATCH") and "--output" not in line
  ]
  cases = [
    f"  {i}) workdir={shlex.quote(run.workdir)} words={shlex.quote(shlex.join(run.words))} ;;"
    for i, run in enumerate(runs)
  ]
  return "\n".join(
    [
      "#!/usr/bin/env bash",
      *options,
      f"#SBATCH --array=0-{len(runs) - 1}%{parallel}",
      "#SBATCH --output=%x-%A_%a.log",
      "case $SLURM_ARRAY_TASK_ID in",
      *cases,
      "esac",
      'trap \'[ $? != 0 ] || printf %s "$words" > "$workdir/finished"\' EXIT',
      'eval "set -- $words"',
      'cd "$SLURM_SUBMIT_DIR" && . launch/slurm.sbatch',
    ]
  )


def compare(
  runs: list[Run], metrics: list[str], plot: str, failures: dict[str, Failure], workdir: str
) -> str:
  """Writes sweep.csv, sweep.md and sweep.png; returns the table in Markdown.

  Raises:
    UsageError: a metric that no point has logged, or a bucket that cannot be reached.
  """
  from mrmae_jax.runs.log import NOT_RESULTS, read_metrics  # printing commands needs no jax
  from mrmae_jax.runs.paths import open_folder

  try:
    folder = open_folder(workdir)
  except WorkdirError as error:
    raise UsageError(str(error)) from None
  records = {run.name: read_metrics(run.workdir) for run in runs}
  last = {
    name: {key: value for record in found for key, value in record.items()}
    for name, found in records.items()
  }
  known = list(dict.fromkeys(key for values in last.values() for key in values))
  unknown = [name for name in metrics if name not in known]
  if unknown and not failures:  # else those are what has to be told
    raise UsageError(
      f"no point has logged {', '.join(unknown)}; there are {', '.join(known) or 'no metrics'}"
    )
  metrics = metrics or [name for name in known if name not in NOT_RESULTS]
  keys = list(dict.fromkeys(key for run in runs for key in run.point))
  table = [["name", *keys, "state", "step", *metrics]]
  for run in runs:
    failure, values = failures.get(run.name), last[run.name]
    state = (
      f"exit code {failure.code}"
      if failure
      else "finished"
      if run.finished
      else "started"
      if values
      else ""
    )
    table.append(
      [
        run.name,
        *(run.point.get(key, "") for key in keys),
        state,
        *(values.get(key, "") for key in ("step", *metrics)),
      ]
    )
  folder.mkdir(parents=True, exist_ok=True)
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(table)
  (folder / "sweep.csv").write_text(text.getvalue())
  show = lambda value: (
    f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
  )
  rows = [f"| {' | '.join(map(show, row))} |" for row in table]
  markdown = "\n".join([rows[0], "|" + " --- |" * len(table[0]), *rows[1:]])
  (folder / "sweep.md").write_text(markdown + "\n")
  series = {
    name: [(record["step"], record[plot]) for record in found if plot in record]
    for name, found in records.items()
  }
  if any(series.values()):
    picture = io.BytesIO()
    line_plot({name: points for name, points in series.items() if points}, plot).save(
      picture, "PNG"
    )
    (folder / "sweep.png").write_bytes(picture.getvalue())
  else:
    print(f"no point has logged {plot!r}: no plot", flush=True)
  return markdown


def sweep(own: flags.FlagValues, overrides: list[str], training: tuple[str, ...]) -> str:
  """Does what the command line says; returns the last text to print.

  Raises:
    UsageError: a mistake in the command line, or some points have failed.
  """
  for flag in ("config", "workdir"):
    if not own[flag].value:
      raise UsageError(f"--{flag} is missing: {own[flag].help}")
  if own.do in ("run", "table"):  # elsewhere ~ may be another folder
    own.workdir = os.path.expanduser(own.workdir)
  runs = expand(own.config, own.workdir, overrides)
  if own.do in ("run", "slurm") and "://" in own.workdir:
    raise UsageError(
      f"--workdir={own.workdir}: with --do={own.do} it must be a folder; buckets go with print, tpu and table"
    )
  missing = [run for run in runs if not run.finished]
  if own.do in ("print", "tpu"):
    command = (
      ("python", "-m", "mrmae_jax.cli.train")
      if own.do == "print"
      else ("bash", "launch/tpu_pod.sh", "run")
    )
    return "\n".join(shlex.join([*command, *run.words]) for run in missing)
  if own.do == "slurm":
    if not missing:
      raise UsageError(f"all {len(runs)} points are finished: nothing to submit")
    return slurm_array(missing, own.parallel)
  failures = train(runs, own.parallel, training) if own.do == "run" else {}
  text = f"{compare(runs, own.metrics, own.plot, failures, own.workdir)}\n{own.workdir}/sweep.csv, sweep.md, sweep.png"
  if failures:
    print(text)
    raise UsageError(
      f"{len(failures)} of {len(runs)} points failed: "
      + "; ".join(
        f"{name}: exit code {failure.code}: {failure.line}" for name, failure in failures.items()
      )
    )
  return text


def main(argv: list[str] | None = None, training: tuple[str, ...] = TRAINING) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 a mistake or points that failed."""
  argv = sys.argv if argv is None else argv
  overrides = [word for word in argv if word.startswith("--config.")]
  rest = [word for word in argv if not word.startswith("--config.")]
  return command_line(__doc__, define_flags(), lambda own: sweep(own, overrides, training), rest)


if __name__ == "__main__":
  sys.exit(main())
