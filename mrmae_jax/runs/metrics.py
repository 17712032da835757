"""Reads the metrics that a run has logged. This module imports no jax."""

import json
from pathlib import Path

from etils import epath

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


def read_metrics(workdir: str | Path, name: str = "metrics.jsonl") -> list[dict]:
  """Returns the records of a run's file `name` in order; [] if the file does not exist.

  A killed run may leave half a last line, which is skipped.
  """
  path = epath.Path(workdir) / name
  records = []
  for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      continue
  return records
