"""Checkpoints of a run. The only module that knows orbax.

A checkpoint is the whole train state and a JSON record of what run it belongs to. Saving is asynchronous; a checkpoint
appears under its final name only when it is complete, so a run that is killed while saving finds the previous one.
"""

import json
from pathlib import Path
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from mrmae_jax import buckets

class WorkdirError(ValueError):
  """The working directory belongs to a different run, or cannot be used."""


def open_workdir(workdir: str | Path) -> epath.Path:
  """A run's folder, on disk or in a bucket (gs://BUCKET/FOLDER), as a path that can be read and written either way.

  Raises:
    WorkdirError: a bucket that cannot be reached, or another kind of address.
  """
  try:
    return buckets.folder(workdir)
  except ValueError as error:
    raise WorkdirError(str(error)) from None


def prepare_workdir(workdir: str | Path) -> None:
  """Makes the folder of a run, and sure that this process can write to it: the first checkpoint may be hours away.

  Raises:
    WorkdirError: it cannot be reached or written to.
  """
  folder = open_workdir(workdir)
  probe = folder / f".write_test_{jax.process_index()}"
  try:
    if "://" not in str(workdir):  # a bucket has no folders, and gcsfs would create a bucket that is not there
      folder.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()
  except Exception as error:  # OSError; libraries of buckets have their own
    hint = ": does the bucket exist, and may this account create objects in it?" if "://" in str(workdir) else ""
    raise WorkdirError(f"cannot write to {workdir} ({' '.join(str(error).split())[:200]}){hint}") from None


class Checkpoints:
  """The checkpoints of one run, in `workdir`/checkpoints/STEP."""

  def __init__(self, workdir: str | Path, identity: dict[str, Any], keep: int = 2):
    """Opens the folder and makes sure that what it holds can be continued.

    Args:
      workdir: of the run; created if it is not there.
      identity: what must not change when a run continues; flat, JSON values.
      keep: number of newest checkpoints that stay.

    Raises:
      WorkdirError: the newest checkpoint was written by a run with another identity.
    """
    self.directory = open_workdir(workdir) / "checkpoints"
    self.identity = identity
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True,
                                           async_options=ocp.AsyncOptions(timeout_secs=300))
    handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=tuple(handlers), item_handlers=handlers)
    if self.latest_step is not None:
      saved = self._manager.restore(self.latest_step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
      changed = [f"{key}: {saved.get(key)!r} there, {identity.get(key)!r} here"
                 for key in sorted(saved.keys() | identity.keys()) if saved.get(key) != identity.get(key)]
      if changed:
        raise WorkdirError(f"{workdir} holds a different run ({'; '.join(changed)}). Choose another --workdir, or repeat the "
                           "settings of the run that is there")

  @property
  def latest_step(self) -> int | None:
    """Updates done at the newest complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  def restore(self, state):
    """The newest state, placed as `state` (ShapeDtypeStructs with shardings) says, whatever devices saved it.

    Raises:
      WorkdirError: the stored arrays have other names, shapes or types.
    """
    stored, wanted = _dtypes(self._manager.item_metadata(self.latest_step)["state"]), _dtypes(state)
    for name in sorted(stored.keys() & wanted.keys()):
      if stored[name] != wanted[name]:  # orbax itself would cast in silence
        raise WorkdirError(f"{self.directory}/{self.latest_step}: {name} is stored as {stored[name]}, the run needs {wanted[name]}")
    try:
      return self._manager.restore(self.latest_step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))["state"]
    except (ValueError, KeyError) as error:
      raise WorkdirError(f"{self.directory}/{self.latest_step} does not fit this model: {error}") from None

  def save(self, step: int, state) -> None:
    """Starts saving; returns when the arrays are copied off the devices."""
    self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(self.identity)))

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and gives up the folder."""
    self._manager.close()


def read_config(workdir: str | Path) -> dict[str, Any]:
  """The configuration of the run in `workdir`, as plain values.

  Raises:
    WorkdirError: there is no run, or none with a complete checkpoint.
  """
  folder = open_workdir(workdir)
  if not (folder / "config.json").is_file() or not ocp.utils.checkpoint_steps(folder / "checkpoints"):
    raise WorkdirError(f"{workdir} holds no run with a checkpoint: expected config.json and checkpoints/STEP there")
  return json.loads((folder / "config.json").read_text())


def read_params(workdir: str | Path, *wanted: str) -> tuple[dict[str, Any], tuple[str, ...], int]:
  """The newest parameters of the run in `workdir`; of a run that averages them (`optim.ema_decay`), the average it evaluates.

  Args:
    wanted: entries, e.g. "encoder"; the first must be there, others are left out if they are not.

  Returns:
    {entry: tree of numpy arrays}, the names of the entries that were not read, and the number of updates done.

  Raises:
    WorkdirError: there is no such checkpoint, or it has not the first entry.
  """
  averaged = read_config(workdir)["optim"]["ema_decay"]
  handlers = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
  directory = open_workdir(workdir) / "checkpoints"
  with ocp.CheckpointManager(directory, item_names=tuple(handlers), item_handlers=handlers,
                             options=ocp.CheckpointManagerOptions(create=False)) as manager:
    step = manager.latest_step()
    state = manager.item_metadata(step)["state"]
    stored = state["params"]
    if wanted[0] not in stored:
      raise WorkdirError(f"{directory}/{step} has no parameters of {wanted[0]!r}; it has: {', '.join(stored)}")
    names = [name for name in wanted if name in stored]
    # The average is the last link of the optimiser's chain; orbax reads a list only as a whole.
    item = {"opt_state": state["opt_state"]} if averaged else {"params": {name: stored[name] for name in names}}
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=arrays, partial_restore=True)
    found = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
  params = found["opt_state"][-1]["average"] if averaged else found["params"]
  return {name: params[name] for name in names}, tuple(name for name in stored if name not in names), step


def _dtypes(tree) -> dict[str, Any]:
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
