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


class WorkdirError(ValueError):
  """The working directory belongs to a different run, or cannot be used."""


def open_workdir(workdir: str | Path) -> epath.Path:
  """A run's folder, on disk or in a bucket (gs://BUCKET/FOLDER), as a path that can be read and written either way.

  Raises:
    WorkdirError: a bucket that cannot be reached, or another kind of address.
  """
  text = str(workdir)
  if "://" not in text:
    return epath.Path(Path(text).expanduser().absolute())
  if not text.startswith("gs://"):
    raise WorkdirError(f"{text}: folders on disk and gs:// buckets are supported")
  path = epath.Path(text)
  try:
    path.exists()
  except Exception as error:  # no gcsfs, no credentials, no such bucket, no network: each library has its own
    raise WorkdirError(f"{text} cannot be reached ({' '.join(str(error).split())[:200] or type(error).__name__}); it needs pip install "
                       "'mrmae_jax[gcs]', and credentials: gcloud auth application-default login") from None
  return path


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
    try:
      handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=tuple(handlers), item_handlers=handlers)
    except OSError as error:
      raise WorkdirError(f"cannot write to {workdir}: {error}") from None
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
  steps = [p.name for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
  if not (folder / "config.json").is_file() or not steps:
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
