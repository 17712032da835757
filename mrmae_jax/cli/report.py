"""One page about a run, or several side by side: curves, throughput, pictures over time, settings, and the commands behind them.

  mrmae report --runs=/runs/a,/runs/b --out=report.html

A folder of runs, such as that of a sweep, counts as all of them. The page is one file that opens anywhere, offline too.
"""

import html
import json
import math
import sys
from typing import Any, NamedTuple

from absl import flags

from mrmae_jax.cli import command_line
from mrmae_jax.errors import UsageError, WorkdirError

COLOURS = (
  "#2f6fb3",
  "#c8553d",
  "#3c8d4f",
  "#8a5fb0",
  "#b8860b",
  "#1f9aa0",
  "#c2497f",
  "#7a7a7a",
)  # told apart in light and dark
PICTURES = 6  # of each run, spread over its time
FIRST = ("loss", "pixel", "mimic")  # curves that come first; then evaluations, then the rest
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


def define_flags() -> flags.FlagValues:
  """The options."""
  own = flags.FlagValues()
  flags.DEFINE_list(
    "runs", [], "Workdirs, or folders of workdirs, separated by commas.", flag_values=own
  )
  flags.DEFINE_string("out", "report.html", "The page.", flag_values=own)
  return own


class Run(NamedTuple):
  """What a workdir tells. `series`: {metric: [(step, value), ...]}."""

  name: str
  folder: Any
  series: dict[str, list[tuple[int, float]]]
  config: dict[str, Any]
  goodput: dict[str, Any]
  starts: list[dict[str, Any]]


def read(folder) -> Run:
  """Reads a workdir; what a run that is going on has not written yet is left out."""
  from ml_collections import ConfigDict  # a mistyped command line is answered before jax is loaded

  from mrmae_jax.config import flatten
  from mrmae_jax.runs import log

  series = {}
  for record in log.read(folder):
    for name, value in record.items():
      if name != "step" and isinstance(value, (int, float)):
        series.setdefault(name, []).append((record["step"], value))

  def content(name):
    try:
      return json.loads((folder / name).read_text())
    except (OSError, ValueError):
      return {}

  return Run(
    folder.name,
    folder,
    series,
    flatten(ConfigDict(content("config.json"))),
    content("goodput.json"),
    log.read(folder, "starts.jsonl"),
  )


def find(paths: list[str]) -> list[Run]:
  """The runs behind the words of --runs, with names that tell them apart.

  Raises:
    UsageError: a folder without a run.
  """
  from mrmae_jax.runs.workdir import open_workdir

  folders = []
  for path in paths:
    folder = open_workdir(path)
    inside = (
      [folder]
      if (folder / "metrics.jsonl").is_file()
      else sorted(
        p for p in (folder.iterdir() if folder.is_dir() else ()) if (p / "metrics.jsonl").is_file()
      )
    )
    if not inside:
      raise UsageError(
        f"--runs: {path} holds no run: expected metrics.jsonl there, or in its folders"
      )
    folders += inside
  runs = [read(folder) for folder in folders]
  if len({run.name for run in runs}) < len(runs):
    runs = [run._replace(name=str(run.folder)) for run in runs]
  return runs


def ticks(low: float, high: float) -> list[float]:
  """About five round numbers that span [low, high]."""
  if high <= low:
    low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
  step = 10 ** math.floor(math.log10((high - low) / 4))
  step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5)
  first = math.floor(low / step + 1e-9)
  return [round(step * i, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def plot(series: dict[str, list[tuple[float, float]]], title: str, colours: dict[str, str]) -> str:
  """An SVG of one line for each of `series` over the steps, light or dark as the reader has it; names stand at the lines' keys."""
  width, height, left, right, top = 720, 320, 64, 16, 34
  xs, ys = (
    ticks(min(values), max(values))
    for values in zip(*(point for points in series.values() for point in points))
  )
  bottom = height - 40
  x = lambda value: left + (value - xs[0]) / (xs[-1] - xs[0]) * (width - left - right)
  y = lambda value: bottom - (value - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)
  rows = math.ceil(len(series) / 2) if len(series) > 1 else 0
  full = height + 20 * rows + 6
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{full}" viewBox="0 0 {width} {full}" role="img">'
    "<style>text{font:13px system-ui,sans-serif;fill:#333}.g{stroke:#ddd}.a{stroke:#888}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.g{stroke:#3a3f45}.a{stroke:#888}}</style>",
    f'<text x="{left}" y="20" font-weight="600">{html.escape(title)}</text>',
  ]
  for tick in xs:
    parts += [
      f'<line class="g" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>',
      f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>',
    ]
  for tick in ys:
    parts += [
      f'<line class="g" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>',
      f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>',
    ]
  parts.append(
    f'<line class="a" x1="{left}" x2="{width - right}" y1="{bottom}" y2="{bottom}"/>'
    f'<text x="{(left + width) / 2}" y="{bottom + 34}" text-anchor="middle">step</text>'
  )
  for i, (name, points) in enumerate(series.items()):
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    parts.append(
      f'<polyline fill="none" stroke="{colours[name]}" stroke-width="2" stroke-linejoin="round" points="{line}"/>'
    )
    if len(points) < 25:
      parts += [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colours[name]}"/>' for a, b in points
      ]
    if rows:
      key_x, key_y = left + (i % 2) * (width - left) / 2, height + 10 + 20 * (i // 2)
      parts += [
        f'<line x1="{key_x}" x2="{key_x + 24}" y1="{key_y}" y2="{key_y}" stroke="{colours[name]}" stroke-width="3"/>',
        f'<text x="{key_x + 32}" y="{key_y + 4}">{html.escape(name)}</text>',
      ]
  return "".join(parts) + "</svg>"


def _order(name: str) -> tuple[int, str]:
  """Losses, evaluations, norms, throughput."""
  if name in FIRST:
    return FIRST.index(name), ""
  return (10 + LAST.index(name), "") if name in LAST else (5 if "/" in name else 4, name)


def write(runs: list[Run], out: str) -> None:
  """Writes the page."""
  from mrmae_jax.runs import log
  from mrmae_jax.viz.page import Page

  colours = {run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
  steps = {
    run.name: max((points[-1][0] for points in run.series.values()), default=0) for run in runs
  }
  page = Page(
    f"MR-MAE: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
    "; ".join(f"{run.name}: step {steps[run.name]:,}" for run in runs[:8]),
  )

  names = sorted({name for run in runs for name in run.series}, key=_order)
  results = [name for name in names if name not in log.NOT_RESULTS]
  page.section("Results", "First and last value of each loss and evaluation.")
  page.table(
    ["", *[run.name for run in runs]],
    [
      [
        name,
        *[
          (
            f"{run.series[name][0][1]:.4g} → {run.series[name][-1][1]:.4g}"
            if name in run.series
            else ""
          )
          for run in runs
        ],
      ]
      for name in results
    ],
  )

  page.section(
    "Curves",
    "Losses, evaluations, then learning rate, norms and throughput. A gap in the steps is what was not logged.",
  )
  for name in names:
    series = {run.name: run.series[name] for run in runs if name in run.series}
    if any(len(points) > 1 for points in series.values()):
      lasts = "; ".join(f"{run}: {points[-1][1]:.4g}" for run, points in series.items())
      page.figure(plot(series, name, colours), f"{name} over the steps. Last values: {lasts}.")

  for run in runs:
    _pictures(page, run)

  accounts = [run for run in runs if run.goodput]
  if accounts:
    page.section(
      "Where the time went",
      "Seconds by phase, over all starts of a run. Goodput is the share of steps that count: those that a "
      "killed start had done since its last checkpoint are computed again.",
    )
    phases = sorted({phase for run in accounts for phase in run.goodput["seconds"]})
    page.table(
      ["", *phases, "starts", "steps again", "goodput"],
      [
        [
          run.name,
          *[f"{run.goodput['seconds'].get(phase, 0):,.1f}" for phase in phases],
          run.goodput["starts"],
          run.goodput["replayed_steps"],
          f"{run.goodput['goodput']:.1%}",
        ]
        for run in accounts
      ],
    )

  keys = sorted({key for run in runs for key in run.config})
  differing = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
  if len(runs) > 1:
    page.section("Settings that differ")
    page.table(
      ["", *[run.name for run in runs]],
      [[key, *[run.config.get(key, "") for run in runs]] for key in differing],
    )
  page.section("Settings" if len(runs) == 1 else "Settings that all share")
  page.table(["config.", ""], [[key, runs[0].config[key]] for key in keys if key not in differing])

  page.section("Commands and environment", "One row for each start.")
  page.table(
    ["run", "when", "command", "devices", "versions"],
    [
      [
        run.name,
        start.get("time", ""),
        start.get("command", ""),
        start.get("devices", ""),
        start.get("versions", ""),
      ]
      for run in runs
      for start in run.starts
    ],
  )
  page.write(out)


def _pictures(page, run: Run) -> None:
  """Reconstructions of a run, from its first to its last, as many as a reader looks at."""
  import numpy as np
  from PIL import Image

  paths = (
    sorted((run.folder / "reconstructions").glob("step_*.png"))
    if (run.folder / "reconstructions").is_dir()
    else []
  )
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
    page.figure(
      picture,
      f"Reconstructions of held-out images by {run.name} after step {step}, one image a row.",
      f"Step {step:,}",
    )


def run(options) -> str:
  """The command with an attribute per flag; returns a line for people.

  Raises:
    UsageError: no runs.
  """
  if not options.runs:
    raise UsageError("--runs is missing; see --help")
  if not options.out.endswith(".html"):
    raise UsageError(f"--out={options.out} must end in .html")
  try:
    runs = find(options.runs)
  except WorkdirError as error:
    raise UsageError(str(error)) from None
  write(runs, options.out)
  return f"wrote {options.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage."""
  return command_line(__doc__, define_flags(), run, argv)


if __name__ == "__main__":
  sys.exit(main())
