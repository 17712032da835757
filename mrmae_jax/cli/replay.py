"""Does a step again whose loss or gradient was not finite, and says where it goes wrong.

A run that had to give up writes WORKDIR/nonfinite/step_N: configuration, state before the step, its images. This command needs
nothing else (but the teacher's files, where the configuration says they are):

    mrmae replay --bundle=WORKDIR/nonfinite/step_N

It computes the step as the run did, compares every number with what the run reported (bit for bit, if the devices are of the same
kind and number), and names the parts of the parameters whose gradients are not finite. `--float32` computes in float32 instead: if
the numbers are good then, the range or precision of bfloat16 was the cause.
"""

import json
import math
import sys

from absl import flags

from mrmae_jax.cli import command_line
from mrmae_jax.errors import UsageError


def define_flags() -> flags.FlagValues:
  """The options."""
  values = flags.FlagValues()
  flags.DEFINE_string(
    "bundle", None, "Folder that the run has written: WORKDIR/nonfinite/step_N.", flag_values=values
  )
  flags.DEFINE_bool(
    "float32", False, "Compute in float32, whatever the run did.", flag_values=values
  )
  return values


def run(options) -> str:
  """The command with an attribute per flag; returns a line for people.

  Raises:
    UsageError: no bundle, or one that is not whole.
  """
  if not options.bundle:
    raise UsageError("--bundle is missing; see --help")
  import jax  # a mistyped command line is answered before jax is loaded
  import ml_collections
  import numpy as np

  from mrmae_jax import preflight, sharding, train
  from mrmae_jax.runs import checkpoint
  from mrmae_jax.runs.paths import open_folder

  folder = open_folder(options.bundle)
  try:
    told = json.loads((folder / "bundle.json").read_text())
    config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
    parts = [
      np.load(folder / f"batch_{i}.npz", allow_pickle=False) for i in range(told["processes"])
    ]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  except (OSError, ValueError, KeyError) as error:
    raise UsageError(f"{options.bundle} is no bundle of a run that gave up ({error})") from None
  if told["state"] != "saved":
    raise UsageError(
      f"{options.bundle}: the state is missing, it could not be saved: {told['state']}"
    )
  if options.float32:
    config.dtype = "float32"
    for teacher in (config.get("teacher", {}), *config.get("extra_teachers", {}).values()):
      teacher.dtype = "float32"
  task = preflight.open_task(config)
  mesh = sharding.make_mesh(**config.mesh)
  planned = train.make_plan(config, task, mesh)
  saved = checkpoint.Checkpoints(folder, {}, keep=1)
  found = saved.restore(planned.state, any_run=True)
  saved.close()
  if found is None:
    raise UsageError(f"{options.bundle}: there is no state in checkpoints/")
  frozen = jax.device_put(task.frozen, jax.tree.map(lambda x: x.sharding, planned.frozen))
  batch = sharding.global_batch(batch, mesh)

  keys = train.sample_keys(config.seed, found.state.step, config.batch_size)
  grads = jax.jit(
    jax.grad(lambda params: task.loss(params, found.state.extra, frozen, batch, keys)[0])
  )(found.state.params)
  finite = jax.device_get(jax.tree.map(lambda g: jax.numpy.isfinite(g).all(), grads))
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, good in jax.tree_util.tree_leaves_with_path(finite)
    if not good
  ]
  _, metrics = planned.step(found.state, frozen, batch)
  print(f"step {told['step']} of the run, again: {told['reason']}")
  same = True
  for name, value in jax.device_get(metrics).items():
    then, now = float.fromhex(told["metrics"][name]), float(value)
    equal = then.hex() == now.hex()
    same &= equal
    print(f"  {name}: {then:.9g} then, {now:.9g} now{'' if equal else ', not the same'}")
  parts = dict.fromkeys("/".join(name.split("/")[:2]) for name in names)
  print(
    f"gradients that are not finite: {len(names)} of {len(jax.tree.leaves(finite))} arrays"
    + (f", in {', '.join(parts)}" if parts else "")
  )
  bad = not all(math.isfinite(float(value)) for value in metrics.values())
  return ("the same numbers, bit for bit" if same else "not the same numbers") + (
    "" if bad else ", and they are finite"
  )


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data."""
  return command_line(__doc__, define_flags(), run, argv)


if __name__ == "__main__":
  sys.exit(main())
