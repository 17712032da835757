"""Repeats a step whose loss or gradient was not finite, and says where it goes wrong.

A run that had to give up writes WORKDIR/nonfinite/step_N: configuration, state before the step and
its batch. `mrmae replay --bundle=WORKDIR/nonfinite/step_N` needs nothing else, except the
teacher's files in the place that the configuration names.

It computes the step as the run did and compares every number with the one that the run reported.
They are equal bit for bit if the devices are of the same kind and number. It then names the modules
whose gradients are not finite. `--float32` computes in float32 instead. If the numbers are good
then, the range or precision of bfloat16 was the cause.
"""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mrmae_jax import preflight, sharding, train
from mrmae_jax.errors import UsageError
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.paths import open_folder, open_regular, read_regular


class Bundle(NamedTuple):
  """What a lost run has written about its last step.

  Attributes:
    folder: WORKDIR/nonfinite/step_STEP.
    step: number of the step.
    reason: why its update was skipped.
    metrics: {name: value} that the run reported.
    identity: of the run, see `train.identity`.
    config: configuration of the run.
    batch: {name: rows} of the global batch.
  """

  folder: epath.Path
  step: int
  reason: str
  metrics: dict[str, float]
  identity: dict[str, Any]
  config: ConfigDict
  batch: dict[str, np.ndarray]


def read_bundle(path: str) -> Bundle:
  """Reads a bundle; raises UsageError if it is incomplete."""
  folder = open_folder(path)
  try:
    record = json.loads(read_regular(folder / "bundle.json"))
    config = ConfigDict(json.loads(read_regular(folder / "config.json")))
    files = [folder / f"batch_{i}.npz" for i in range(record["processes"])]
    shards = [np.load(open_regular(file), allow_pickle=False) for file in files]
    bundle = Bundle(
      folder=folder,
      step=record["step"],
      reason=record["reason"],
      metrics={name: float.fromhex(value) for name, value in record["metrics"].items()},
      identity=record["identity"],
      config=config,
      batch={name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]},
    )
  except (OSError, ValueError, KeyError) as error:
    raise UsageError(f"{path} is not a bundle of a run that gave up ({error})") from None
  if record["state"] != "saved":
    raise UsageError(f"{path}: the state is missing, it could not be saved: {record['state']}")
  return bundle


def compute_in_float32(config: ConfigDict) -> None:
  """Sets the type of the model and of its teachers to float32."""
  config.dtype = "float32"
  for teacher in (config.get("teacher", {}), *config.get("extra_teachers", {}).values()):
    teacher.dtype = "float32"


def replay(bundle: Bundle) -> tuple[dict[str, float], dict[str, bool]]:
  """Repeats the step of a bundle.

  Returns:
    {name: value} of its metrics, and {parameter: whether its gradient is finite}.
  """
  config = bundle.config
  task = preflight.open_task(config)
  mesh = sharding.make_mesh(**config.mesh)
  plan = train.make_plan(config, task, mesh)
  checkpoints = Checkpoints(bundle.folder, bundle.identity, keep=1)
  restored = checkpoints.restore(plan.state)
  checkpoints.close()
  if restored is None:
    raise UsageError(f"{bundle.folder}: there is no state in checkpoints/")
  state = restored.state
  frozen = jax.device_put(task.frozen, jax.tree.map(lambda x: x.sharding, plan.frozen))
  batch = sharding.global_batch(bundle.batch, mesh)
  keys = train.sample_keys(config.seed, state.step, config.batch_size)

  @jax.jit
  def has_finite_gradients(params):
    grads = jax.grad(lambda params: task.loss(params, state.extra, frozen, batch, keys)[0])(params)
    return jax.tree.map(lambda grad: jnp.isfinite(grad).all(), grads)

  finite = {
    jax.tree_util.keystr(path, simple=True, separator="/"): bool(is_finite)
    for path, is_finite in jax.tree.leaves_with_path(has_finite_gradients(state.params))
  }
  _, metrics = plan.step(state, frozen, batch)
  return {name: float(value) for name, value in metrics.items()}, finite


def run(options) -> str:
  """Runs `mrmae replay`; returns a line for people.

  Raises:
    UsageError: the bundle is incomplete.
  """
  bundle = read_bundle(options.bundle)
  if options.float32:
    compute_in_float32(bundle.config)
  metrics, finite = replay(bundle)
  print(f"step {bundle.step} of the run, again: {bundle.reason}")
  is_same = True
  for name, earlier in bundle.metrics.items():
    is_equal = earlier.hex() == metrics[name].hex()  # nan equals nan
    is_same &= is_equal
    difference = "" if is_equal else ", not the same"
    print(f"  {name}: {earlier:.9g} then, {metrics[name]:.9g} now{difference}")
  bad = [name for name, is_finite in finite.items() if not is_finite]
  modules = dict.fromkeys("/".join(name.split("/")[:2]) for name in bad)
  print(
    f"gradients that are not finite: {len(bad)} of {len(finite)} arrays"
    + (f", in {', '.join(modules)}" if modules else "")
  )
  conclusion = "the same numbers, bit for bit" if is_same else "not the same numbers"
  all_finite = all(math.isfinite(value) for value in metrics.values())
  return conclusion + (", and they are finite" if all_finite else "")
