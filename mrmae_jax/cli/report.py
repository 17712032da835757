"""Writes one page about a run, or several side by side: `mrmae report`."""

import json
import re
from typing import Any, Callable, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from mrmae_jax.config import flatten
from mrmae_jax.errors import UsageError, WorkdirError, one_line, printable
from mrmae_jax.runs.metrics import (
  NOT_RESULTS,
  check_goodput,
  is_detail,
  read_json_lines,
  read_records,
)
from mrmae_jax.runs.paths import is_file, open_folder, open_regular, read_regular
from mrmae_jax.viz.page import Figure, Page
from mrmae_jax.viz.plot import line_plot

PICTURES = 6  # shown of each run, from its first to its last
KINDS = {  # folders of pictures, and what these show
  "reconstructions": (
    "Original, what the encoder sees, the decoder's output, and that output in the hidden places."
  ),
  "segmentations": "Image, true classes, predicted classes.",
  "detections": "True objects, and those that were detected.",
}
MAX_PIXELS = 10**8  # of a picture
# Order of the curves: FIRST, other losses, evaluations, LAST.
FIRST = ("loss", "pixel", "mimic")
LAST = (
  "lr",
  "grad_norm",
  "update_norm",
  "param_norm",
  "skipped",
  "images_per_s",
  "images_per_s_per_device",
  "data_wait",
  "mfu",
  "device_gib",
  "evaluation_s",
)


class Run(NamedTuple):
  """The files of a workdir, read.

  Attributes:
    name: of the folder.
    folder: the workdir.
    series: {metric: ([steps], [values])}.
    config: flat.
    goodput: see `log.Goodput`; {} if there is none.
    starts: a row for each start.
    pictures: {key of KINDS: {step: uint8 [H, W, 3]}}.
    problems: a line for each file of which something could not be read.
  """

  name: str
  folder: epath.Path
  series: dict[str, tuple[list[int], list[float]]]
  config: dict[str, Any]
  goodput: dict[str, Any]
  starts: list[dict[str, Any]]
  pictures: dict[str, dict[int, np.ndarray]]
  problems: list[str]


def read_run(folder: epath.Path) -> Run:
  """Reads a workdir. Files that a running run has not written yet count as empty."""
  series, problems = {}, []
  records, spoiled = _read_lines(folder / "metrics.jsonl", read_records, problems)
  for record in records:
    for name, value in record.items():
      if name != "step":
        steps, values = series.setdefault(printable(name), ([], []))
        steps.append(record["step"])
        values.append(value)
  rows, spoiled_starts = _read_lines(folder / "starts.jsonl", read_json_lines, problems)
  starts = [row for row in rows if isinstance(row, dict)]
  spoiled_starts += len(rows) - len(starts)
  for name, count in (("metrics.jsonl", spoiled), ("starts.jsonl", spoiled_starts)):
    if count:
      problems.append(f"{name}: {count} lines are no records")
  return Run(
    name=printable(folder.name),
    folder=folder,
    series=series,
    config=_read_json(folder / "config.json", flatten, problems),
    goodput=_read_json(folder / "goodput.json", check_goodput, problems),
    starts=starts,
    pictures={kind: _read_pictures(folder / kind, problems) for kind in KINDS},
    problems=problems,
  )


def _read_lines(path: epath.Path, read: Callable, problems: list[str]) -> tuple[list, int]:
  """Returns `read(path)`: lines, and how many are spoiled; none and a problem if that fails."""
  try:
    return read(path)
  except OSError as error:
    problems.append(f"{path.name}: {one_line(error)}")
    return [], 0


def _read_json(path: epath.Path, interpret: Callable, problems: list[str]) -> dict[str, Any]:
  """Returns `interpret` of the object in a file; {} and a problem if that fails."""
  try:
    return interpret(json.loads(read_regular(path)))
  except FileNotFoundError:
    pass
  except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
    problems.append(f"{path.name}: {one_line(error)}")
  return {}


def _read_pictures(folder: epath.Path, problems: list[str]) -> dict[int, np.ndarray]:
  """Reads up to PICTURES pictures of a run, from its first to its last."""
  paths = {}
  for path in folder.glob("step_*.png") if folder.is_dir() else ():
    if step := re.fullmatch(r"step_(\d{1,15})", path.stem):
      paths[int(step[1])] = path
    else:
      problems.append(f"{path.name}: its name is not step_NUMBER.png")
  pictures, steps = {}, sorted(paths)
  for i in sorted({round(j) for j in np.linspace(0, len(steps) - 1, PICTURES)}) if steps else ():
    try:
      pictures[steps[i]] = _read_picture(paths[steps[i]])
    except Exception as error:  # damaged pictures raise errors of any type
      problems.append(f"{paths[steps[i]].name}: {one_line(error)}")
  return pictures


def _read_picture(path: epath.Path) -> np.ndarray:
  """Reads a PNG as uint8 [H, W, 3]."""
  with open_regular(path) as file, Image.open(file, formats=("PNG",)) as image:
    if image.width * image.height > MAX_PIXELS:
      raise ValueError(f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS:,}")
    return np.asarray(image.convert("RGB"))


def find_runs(paths: list[str]) -> list[Run]:
  """Reads the runs in `paths`, workdirs or folders of them; names that clash become full paths.

  Raises:
    UsageError: a folder without a run.
  """
  is_run = lambda folder: is_file(folder / "metrics.jsonl")
  runs = []
  for path in paths:
    folder = open_folder(path)
    if is_run(folder):
      workdirs = [folder]
    else:
      workdirs = sorted(filter(is_run, folder.iterdir())) if folder.is_dir() else []
    if not workdirs:
      raise UsageError(
        f"--runs: {path} holds no run; expected metrics.jsonl there or in its folders"
      )
    runs += map(read_run, workdirs)
  if len({run.name for run in runs}) < len(runs):
    runs = [run._replace(name=str(run.folder)) for run in runs]
  return runs


def _order(name: str) -> tuple[int, str]:
  """Sorts losses first, then evaluations, norms and throughput."""
  if name in FIRST:
    return FIRST.index(name), ""
  return (10 + LAST.index(name), "") if name in LAST else (5 if "/" in name else 4, name)


def write_page(runs: list[Run], out: str) -> None:
  """Writes the page about `runs` to the file `out`."""
  last_steps = [
    f"{run.name}: step {max((steps[-1] for steps, _ in run.series.values()), default=0):,}"
    for run in runs[:8]
  ]
  page = Page(
    f"MR-MAE: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}", "; ".join(last_steps)
  )
  names = sorted({name for run in runs for name in run.series}, key=_order)
  _add_results(page, runs, [name for name in names if name not in NOT_RESULTS])
  _add_curves(page, runs, [name for name in names if not is_detail(name)])
  for run in runs:
    _add_pictures(page, run)
  _add_goodput(page, [run for run in runs if run.goodput])
  _add_settings(page, runs)
  _add_starts(page, runs)
  _add_problems(page, runs)
  page.write(out)


def _add_results(page: Page, runs: list[Run], names: list[str]) -> None:
  """Adds a table of the first and last values of the metrics `names`."""
  page.section("Results", "First and last value of each loss and evaluation.")
  rows = []
  for name in names:
    values = [run.series[name][1] if name in run.series else () for run in runs]
    rows.append([name, *(f"{v[0]:.4g} → {v[-1]:.4g}" if v else "" for v in values)])
  page.table(["", *(run.name for run in runs)], rows)


def _add_curves(page: Page, runs: list[Run], names: list[str]) -> None:
  """Adds a plot of each metric that some run has logged more than once."""
  page.section(
    "Curves",
    "Losses, evaluations, then learning rate, norms and throughput. A gap was not logged.",
  )
  figures = []
  for name in names:
    series = {run.name: run.series.get(name, ((), ())) for run in runs}
    if any(len(steps) > 1 for steps, _ in series.values()):
      svg = line_plot(series, title=name, xlabel="step", ylabel="")
      last_values = "; ".join(f"{run}: {y[-1]:.4g}" for run, (_, y) in series.items() if y)
      figures.append(Figure(svg, f"{name} over the steps. Last values: {last_values}."))
  page.row(figures)


def _add_pictures(page: Page, run: Run) -> None:
  """Adds the pictures that the evaluators of a run have drawn."""
  for kind, pictures in run.pictures.items():
    if pictures:
      page.section(f"{kind.capitalize()}: {run.name}", KINDS[kind])
    for step, picture in pictures.items():
      alt = f"{kind.capitalize()} of held-out images by {run.name} after step {step}, one a row."
      page.figure(Figure(picture, alt, f"Step {step:,}"))


def _add_goodput(page: Page, runs: list[Run]) -> None:
  """Adds a table of the seconds that each phase of the runs took."""
  if not runs:
    return
  page.section(
    "Where the time went",
    "Seconds by phase, over all starts of a run. Goodput is the share of steps that count: those "
    "that a killed start had done since its last checkpoint are computed again.",
  )
  phases = sorted({phase for run in runs for phase in run.goodput["seconds"]})
  rows = [
    [
      run.name,
      *(f"{run.goodput['seconds'].get(phase, 0):,.1f}" for phase in phases),
      run.goodput["starts"],
      run.goodput["replayed_steps"],
      f"{run.goodput['goodput']:.1%}",
    ]
    for run in runs
  ]
  page.table(["", *phases, "starts", "steps again", "goodput"], rows)


def _add_settings(page: Page, runs: list[Run]) -> None:
  """Adds the settings in which the runs differ, and those that they share."""
  keys = sorted({key for run in runs for key in run.config})
  differing = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
  if len(runs) > 1:
    page.section("Settings that differ")
    page.table(
      ["", *(run.name for run in runs)],
      [[key, *(run.config.get(key, "") for run in runs)] for key in differing],
    )
  page.section("Settings" if len(runs) == 1 else "Settings that all share")
  page.table(
    ["config.", ""], [[key, runs[0].config.get(key)] for key in keys if key not in differing]
  )


def _add_starts(page: Page, runs: list[Run]) -> None:
  """Adds a table with a row for each start of a run."""
  page.section("Commands and environment", "One row for each start.")
  fields = ("time", "command", "devices", "versions")
  rows = [
    [run.name, *(start.get(key, "") for key in fields)] for run in runs for start in run.starts
  ]
  page.table(["run", "when", "command", "devices", "versions"], rows)


def _add_problems(page: Page, runs: list[Run]) -> None:
  """Adds a table of what could not be read, if there is something."""
  rows = [[run.name, problem] for run in runs for problem in run.problems]
  if rows:
    page.section("What could not be read", "It is left out above.")
    page.table(["run", "file"], rows)


def run(options) -> str:
  """Runs `mrmae report`; returns a line for people.

  Raises:
    UsageError: a folder without a run, or a page that does not end in .html.
  """
  if not options.out.endswith(".html"):
    raise UsageError(f"--out={options.out} must end in .html")
  try:
    runs = find_runs(options.runs)
  except WorkdirError as error:
    raise UsageError(str(error)) from None
  write_page(runs, options.out)
  lines = [f"warning: {run.name}: {problem}" for run in runs for problem in run.problems]
  lines.append(f"wrote {options.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
  return "\n".join(lines)
