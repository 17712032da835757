"""Steps whose numbers cannot be good: counted, told, and in the end kept for `mrmae replay`.

The training step itself leaves such an update out (train.make_train_step). A few of them are bad luck; many in a row are a run that
is lost, which ends with everything that is needed to look at the last one.
"""

import io
import json
import math

import jax
import numpy as np

from mrmae_jax.runs.checkpoint import Checkpoints

HINT = "try a lower optim.blr, a longer warm-up, optim.clip_norm, or dtype=float32"


class Skips:
  """What a run's steps say of themselves: which updates were left out, and when it has been enough."""

  def __init__(self, limit: int):
    """`limit`: updates left out in a row that end the run."""
    self.total, self._row, self._limit = 0, 0, limit

  def count(self, step: int, metrics: dict[str, float]) -> str:
    """Takes note of a step; returns a line for the log, "" if its update was made."""
    if not metrics["skipped"]:
      self._row = 0
      return ""
    self.total += 1
    self._row += 1
    return f"warning: step {step}: update left out, {reason(metrics)} ({self._row} in a row, {self.total} so far)"

  @property
  def enough(self) -> bool:
    """Whether so many in a row were left out that the run must end."""
    return self._row >= self._limit


def reason(metrics: dict[str, float]) -> str:
  """Why an update was left out: "mimic=nan, grad_norm=inf"."""
  bad = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
  return (
    ", ".join(bad)
    or f"the norm of the gradient is {metrics['grad_norm']:.4g}, more than optim.max_spike times the usual"
  )


def keep(workdir, config, identity, step: int, state, batch, metrics: dict[str, float]):
  """Writes what `mrmae replay` needs to do a step again, to WORKDIR/nonfinite/step_STEP.

  Args:
    workdir: of the run.
    config: of the run.
    identity: of the run, see train.identity.
    step: the step, from 1.
    state: the TrainState after it, or after later ones that were left out too; all of them are equal but for the step number.
    batch: its global batch; each process keeps its own rows.
    metrics: what it reported.

  Returns:
    The folder.
  """
  folder = workdir / "nonfinite" / f"step_{step}"
  folder.mkdir(parents=True, exist_ok=True)
  saving = Checkpoints(folder, identity)
  before = state._replace(step=jax.device_put(np.int32(step - 1), state.step.sharding))
  problem = saving.save(step - 1, before, wait=True)
  saving.close()
  rows, encoded = {name: _own_rows(array) for name, array in batch.items()}, io.BytesIO()
  np.savez(encoded, **rows)
  (folder / f"batch_{jax.process_index()}.npz").write_bytes(encoded.getvalue())
  if jax.process_index() == 0:
    (folder / "config.json").write_text(config.to_json(indent=2))
    (folder / "bundle.json").write_text(
      json.dumps(
        {
          "step": step,
          "seed": config.seed,
          "processes": jax.process_count(),
          "devices": jax.device_count(),
          "state": problem or "saved",
          "reason": reason(metrics),
          "metrics": {name: float(value).hex() for name, value in metrics.items()},
        },
        indent=2,
      )
    )
  return folder


def _own_rows(array: jax.Array) -> np.ndarray:
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
