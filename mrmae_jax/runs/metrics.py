"""Reads the metrics that a run has logged. This module imports no jax."""

import json
import re
from pathlib import Path
from typing import Any

from etils import epath

from mrmae_jax.runs.paths import is_file, read_regular

# Metrics that are neither losses nor evaluations.
NOT_RESULTS = {
  "step",
  "lr",
  "grad_norm",
  "param_norm",
  "update_norm",
  "images_per_s",
  "images_per_s_per_device",
  "data_wait",
  "mfu",
  "device_gib",
  "evaluation_s",
  "skipped",
}
# In names of results of each class, of which there may be hundreds, of sizes of objects, of recall.
DETAIL = re.compile(r"/IoU_|/(box|mask)_(ar|ap_)")
LARGEST = 1e300  # of the numbers in a record


def is_detail(name: str) -> bool:
  """Returns whether a metric is logged but not printed or drawn, being one of too many."""
  return bool(DETAIL.search(name))


def read_metrics(workdir: str | Path) -> list[dict]:
  """Returns the records of a run's metrics.jsonl in order; [] if the file does not exist."""
  return read_records(epath.Path(workdir) / "metrics.jsonl")[0]


def read_records(path: epath.Path) -> tuple[list[dict], int]:
  """Returns the records of metrics.jsonl, and the number of lines that are none.

  A record has a step, a whole number, and finite numbers by name. Half a last line, which a killed
  run may leave, is not counted.
  """
  rows, spoiled = read_json_lines(path)
  records = [row for row in rows if _is_record(row)]
  return records, spoiled + len(rows) - len(records)


def read_json_lines(path: epath.Path) -> tuple[list, int]:
  """Returns the values of a file of JSON lines, and the number of whole lines that are no JSON."""
  rows, spoiled = [], 0
  lines = read_regular(path).split(b"\n") if is_file(path) else [b""]
  for i, line in enumerate(lines):
    try:
      rows.append(json.loads(line))
    except (ValueError, RecursionError):  # a byte that is not UTF-8 is a ValueError too
      spoiled += bool(line.strip()) and i < len(lines) - 1
  return rows, spoiled


def _is_record(row) -> bool:
  if not isinstance(row, dict) or not isinstance(row.get("step"), int):
    return False
  return all(map(_is_number, row.values())) and 0 <= row["step"] < 2**53


def check_goodput(account: dict[str, Any]) -> dict[str, Any]:
  """Returns the account of a run's time, see `log.Goodput`.

  Raises:
    ValueError, TypeError, LookupError, AttributeError: it lacks something, or holds what is no
      number.
  """
  numbers = [account[name] for name in ("starts", "steps", "replayed_steps", "reached", "goodput")]
  if not all(map(_is_number, (*numbers, *account["seconds"].values()))):
    raise ValueError("it holds what is no number")
  return account


def _is_number(x) -> bool:
  return isinstance(x, (int, float)) and abs(x) < LARGEST  # False for nan
