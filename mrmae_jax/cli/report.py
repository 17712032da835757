"""Writes one page about a run, or several side by side: `mrmae report`."""

import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mrmae_jax.config import flatten
from mrmae_jax.errors import UsageError, WorkdirError
from mrmae_jax.runs.metrics import NOT_RESULTS, read_json_lines, read_metrics
from mrmae_jax.runs.paths import open_folder
from mrmae_jax.viz.page import Figure, Page
from mrmae_jax.viz.plot import line_plot

PICTURES = 6  # reconstructions shown of each run, from its first to its last
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
  """What a workdir holds. `series`: {metric: ([steps], [values])}."""

  name: str
  folder: epath.Path
  series: dict[str, tuple[list[int], list[float]]]
  config: dict[str, Any]
  goodput: dict[str, Any]
  starts: list[dict[str, Any]]


def read_run(folder: epath.Path) -> Run:
  """Reads a workdir. Files that a running run has not written yet count as empty."""
  series = {}
  for record in read_metrics(folder):
    for name, value in record.items():
      if name != "step" and isinstance(value, (int, float)):
        steps, values = series.setdefault(name, ([], []))
        steps.append(record["step"])
        values.append(value)
  return Run(
    name=folder.name,
    folder=folder,
    series=series,
    config=flatten(ConfigDict(_read_json(folder / "config.json"))),
    goodput=_read_json(folder / "goodput.json"),
    starts=[row for row in read_json_lines(folder / "starts.jsonl")[0] if isinstance(row, dict)],
  )


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return {}
  return content if isinstance(content, dict) else {}


def find_runs(paths: list[str]) -> list[Run]:
  """Reads the runs in `paths`, workdirs or folders of them; names that clash become full paths.

  Raises:
    UsageError: a folder without a run.
  """
  is_run = lambda folder: (folder / "metrics.jsonl").is_file()
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
  _add_curves(page, runs, names)
  for run in runs:
    _add_reconstructions(page, run)
  _add_goodput(page, [run for run in runs if run.goodput])
  _add_settings(page, runs)
  _add_starts(page, runs)
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


def _add_reconstructions(page: Page, run: Run) -> None:
  """Adds up to PICTURES reconstructions of a run, from its first to its last."""
  folder = run.folder / "reconstructions"
  paths = sorted(folder.glob("step_*.png")) if folder.is_dir() else []
  if not paths:
    return
  page.section(
    f"Reconstructions: {run.name}",
    "Original, what the encoder sees, the decoder's output, and that output in the hidden places.",
  )
  for i in sorted({round(j) for j in np.linspace(0, len(paths) - 1, PICTURES)}):
    step = int(paths[i].stem.removeprefix("step_"))
    with paths[i].open("rb") as file:
      picture = np.asarray(Image.open(file).convert("RGB"))
    alt = f"Reconstructions of held-out images by {run.name} after step {step}, one image a row."
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
  page.table(["config.", ""], [[key, runs[0].config[key]] for key in keys if key not in differing])


def _add_starts(page: Page, runs: list[Run]) -> None:
  """Adds a table with a row for each start of a run."""
  page.section("Commands and environment", "One row for each start.")
  fields = ("time", "command", "devices", "versions")
  rows = [
    [run.name, *(start.get(key, "") for key in fields)] for run in runs for start in run.starts
  ]
  page.table(["run", "when", "command", "devices", "versions"], rows)


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
  return f"wrote {options.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}"
