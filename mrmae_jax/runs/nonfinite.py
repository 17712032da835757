"""Counts skipped updates, and keeps the step of a lost run for `mrmae replay`.

The training step itself skips an update whose loss or gradient is not finite, see
`train.make_train_step`. A few skips are bad luck. Many in a row end the run, which then writes
everything that is needed to look at its last step.
"""

import io
import json
import math

import jax
import numpy as np

from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.paths import is_bucket, sync_tree

HINT = "try a lower optim.blr, a longer warm-up, optim.clip_norm, or dtype=float32"


class Skips:
  """Counts skipped updates and decides when the run must stop."""

  def __init__(self, limit: int):
    """`limit`: number of skipped updates in a row that end the run."""
    self.total = 0
    self._in_a_row = 0
    self._limit = limit

  def count(self, step: int, metrics: dict[str, float]) -> str:
    """Counts a step; returns a warning if its update was skipped, else ""."""
    if not metrics["skipped"]:
      self._in_a_row = 0
      return ""
    self.total += 1
    self._in_a_row += 1
    return (
      f"warning: step {step}: update skipped, {skip_reason(metrics)} ({self._in_a_row} in a row, "
      f"{self.total} in all)"
    )

  @property
  def must_stop(self) -> bool:
    """Whether the limit of skipped updates in a row is reached."""
    return self._in_a_row >= self._limit


def skip_reason(metrics: dict[str, float]) -> str:
  """Returns why an update was skipped: "mimic=nan, grad_norm=inf"."""
  bad = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
  if bad:
    return ", ".join(bad)
  return (
    f"the norm of the gradient is {metrics['grad_norm']:.4g}, more than optim.max_spike times the "
    "usual"
  )


def write_bundle(workdir, config, identity, step: int, state, batch, metrics: dict[str, float]):
  """Writes what `mrmae replay` needs to repeat a step, to WORKDIR/nonfinite/step_STEP.

  Args:
    workdir: folder of the run.
    config: configuration of the run.
    identity: of the run, see train.identity.
    step: the step, from 1.
    state: the TrainState after it, or after later ones that were skipped too. All of them are
      equal but for the step number.
    batch: its global batch; each process writes its own rows.
    metrics: what the step reported.

  Returns:
    The folder.
  """
  folder = workdir / "nonfinite" / f"step_{step}"
  folder.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(folder, identity)
  state_before = state._replace(step=jax.device_put(np.int32(step - 1), state.step.sharding))
  problem = checkpoints.save(step - 1, state_before, wait=True)
  checkpoints.close()
  encoded = io.BytesIO()
  np.savez(encoded, **{name: _local_rows(array) for name, array in batch.items()})
  (folder / f"batch_{jax.process_index()}.npz").write_bytes(encoded.getvalue())
  if jax.process_index() == 0:
    bundle = {
      "step": step,
      "seed": config.seed,
      "processes": jax.process_count(),
      "devices": jax.device_count(),
      "state": problem or "saved",
      "reason": skip_reason(metrics),
      "metrics": {name: float(value).hex() for name, value in metrics.items()},
      "identity": identity,
    }
    (folder / "config.json").write_text(config.to_json(indent=2))
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=2))
  if not is_bucket(workdir):
    sync_tree(folder)
  return folder


def _local_rows(array: jax.Array) -> np.ndarray:
  """Returns the rows of a global batch that this process holds, in order."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
