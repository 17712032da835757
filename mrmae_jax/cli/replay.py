"""Does a step again whose loss or gradient was not finite, and says where it goes wrong."""

import json
import math

import jax
import ml_collections
import numpy as np

from mrmae_jax import preflight, sharding, train
from mrmae_jax.errors import UsageError
from mrmae_jax.runs import checkpoint
from mrmae_jax.runs.paths import open_folder


def run(options) -> str:
  """Carries out `mrmae replay`.

  Raises:
    UsageError: no bundle, or one that is not whole.
  """
  about, config, batch = _read_bundle(options.bundle)
  if options.float32:
    config.dtype = "float32"
    for teacher in (config.get("teacher", {}), *config.get("extra_teachers", {}).values()):
      teacher.dtype = "float32"
  task = preflight.open_task(config)
  plan = train.make_plan(config, task, sharding.make_mesh(**config.mesh))
  state = _read_state(options.bundle, plan)
  frozen = jax.device_put(task.frozen, jax.tree.map(lambda x: x.sharding, plan.frozen))
  batch = sharding.global_batch(batch, plan.mesh)
  bad_gradients, num_arrays = _bad_gradients(config, task, state, frozen, batch)
  _, metrics = plan.step(state, frozen, batch)

  print(f"step {about['step']} of the run, again: {about['reason']}")
  all_equal = True
  for name, value in jax.device_get(metrics).items():
    then, now = float.fromhex(about["metrics"][name]), float(value)
    equal = then.hex() == now.hex()
    all_equal &= equal
    print(f"  {name}: {then:.9g} then, {now:.9g} now{'' if equal else ', not the same'}")
  parts = ", ".join(dict.fromkeys("/".join(name.split("/")[:2]) for name in bad_gradients))
  print(
    f"gradients that are not finite: {len(bad_gradients)} of {num_arrays} arrays"
    + (f", in {parts}" if parts else "")
  )
  is_finite = all(math.isfinite(float(value)) for value in metrics.values())
  verdict = "the same numbers, bit for bit" if all_equal else "not the same numbers"
  return verdict + (", and they are finite" if is_finite else "")


def _read_bundle(path: str):
  """Returns what the run wrote: facts, configuration, global batch of numpy arrays."""
  folder = open_folder(path)
  try:
    about = json.loads((folder / "bundle.json").read_text())
    config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
    shards = [
      np.load(folder / f"batch_{i}.npz", allow_pickle=False) for i in range(about["processes"])
    ]
    batch = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
  except (OSError, ValueError, KeyError) as error:
    raise UsageError(f"{path} is not a bundle of a run that gave up ({error})") from None
  if about["state"] != "saved":
    raise UsageError(f"{path}: the state is missing, it could not be saved: {about['state']}")
  return about, config, batch


def _read_state(path: str, plan: train.Plan) -> train.TrainState:
  checkpoints = checkpoint.Checkpoints(open_folder(path), {}, keep=1)
  restored = checkpoints.restore(plan.state, any_run=True)
  checkpoints.close()
  if restored is None:
    raise UsageError(f"{path}: there is no state in checkpoints/")
  return restored.state


def _bad_gradients(config, task, state, frozen, batch) -> tuple[list[str], int]:
  """Returns the names of the parameters whose gradients are not finite, and the number of all."""
  keys = train.sample_keys(config.seed, state.step, config.batch_size)
  loss = lambda params: task.loss(params, state.extra, frozen, batch, keys)[0]
  grads = jax.jit(jax.grad(loss))(state.params)
  finite = jax.device_get(jax.tree.map(lambda g: jax.numpy.isfinite(g).all(), grads))
  leaves = jax.tree_util.tree_leaves_with_path(finite)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return [name(path) for path, is_finite in leaves if not is_finite], len(leaves)
