"""Checkpoints of a run. The only module that knows orbax.

A checkpoint is the whole train state and a JSON record: what run it belongs to, and name, type, shape and checksum of every array.
Saving is asynchronous; a checkpoint appears under its final name, record and all, only when it is complete, so a run that is killed
while saving finds the previous one. Reading verifies: orbax itself restores a flipped bit in silence.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mrmae_jax.errors import StorageError, WorkdirError
from mrmae_jax.runs import distributed
from mrmae_jax.runs.paths import open_folder

FORMAT = 2  # of the record
SPACE = 1.2  # times the size of the state must be free on the disk before a save
TIMEOUT_S = 300  # for a save; orbax waits 1200 s, on a full disk in vain


class _Damaged(Exception):
  """A checkpoint that cannot be trusted; another may be."""


class Restored(NamedTuple):
  """What `Checkpoints.restore` found.

  Attributes:
    step: updates done.
    state: of the run, placed as asked.
    notes: lines for the log.
  """

  step: int
  state: Any
  notes: list[str]


class Checkpoints:
  """The checkpoints of one run, in `workdir`/checkpoints/STEP."""

  def __init__(
    self,
    workdir: str | Path,
    identity: dict[str, Any],
    keep: int = 2,
    scores: dict[int, float] | None = None,
  ):
    """Opens the folder.

    Args:
      workdir: of the run; created if it is not there.
      identity: what must not change when a run continues; flat, JSON values.
      keep: number of newest checkpoints that stay.
      scores: {step: finite number}, to which the caller adds; the checkpoint with the largest stays, too.
    """
    self.directory = open_folder(workdir) / "checkpoints"
    self.identity = identity
    self._manager = _open(
      self.directory,
      ocp.StandardCheckpointHandler(),
      preservation_policy=_Kept(keep, {} if scores is None else scores),
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT_S),
    )

  def restore(self, state, any_run: bool = False) -> Restored | None:
    """The newest state that is whole, placed as `state` (ShapeDtypeStructs with shardings) says, whatever devices saved it.

    Newer ones that are damaged are moved to WORKDIR/damaged, where nothing is ever deleted, and `notes` says so. None if there is
    no checkpoint.

    Raises:
      WorkdirError: the run that is there is another one, or its arrays have other names, shapes or types.
      StorageError: there are checkpoints, and none is whole.
    """
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        found = self._restore(step, state, any_run)
      except _Damaged as error:
        damaged[step] = str(error)
      else:
        return Restored(step, found, self._set_aside(damaged))
    if damaged:
      reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
      raise StorageError(
        f"no checkpoint in {self.directory} is whole ({reasons}). Nothing was changed there; choose another "
        "--workdir to begin anew"
      )
    return None

  def _restore(self, step: int, state, any_run: bool):
    record, why = None, ""
    try:
      record = _read_record(self._manager, step)
    except _Damaged as error:
      why = str(error)
    _agree_whole(step, why)
    changed = [
      f"{key}: {record['identity'].get(key)!r} there, {self.identity.get(key)!r} here"
      for key in sorted(record["identity"].keys() | self.identity.keys())
      if record["identity"].get(key) != self.identity.get(key)
    ]
    if changed and not any_run:
      raise WorkdirError(
        f"{self.directory.parent} holds a different run ({'; '.join(changed)}). Choose another --workdir, or repeat "
        "the settings of the run that is there"
      )
    stored = {name: tuple(entry[:2]) for name, entry in record["arrays"].items()}
    wanted = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in _named(state).items()}
    odd = [
      f"{name} is {_kind(stored.get(name))}, the run needs {_kind(wanted.get(name))}"
      for name in sorted(stored.keys() | wanted.keys())
      if stored.get(name) != wanted.get(name)
    ]
    if odd:
      raise WorkdirError(
        f"{self.directory}/{step} does not fit this model: {'; '.join(odd[:3])}"
        + (f" (and {len(odd) - 3} more)" if len(odd) > 3 else "")
        + "; config.encoder, config.decoder, config.teacher and config.optim decide on the arrays"
      )
    try:
      found = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))
      )["state"]
    except Exception as error:  # damage comes as any type there is
      why = f"it cannot be read ({_line(error)})"
    _agree_whole(step, why)
    _verify(record, found)
    return found

  def _set_aside(self, damaged: dict[int, str]) -> list[str]:
    """Moves checkpoints out of the way of those to come."""
    if not damaged:
      return []
    notes = []
    for step, why in damaged.items():
      target = self.directory.parent / "damaged" / str(step)
      if jax.process_index() == 0:
        while target.exists():
          target = target.with_name(f"{target.name}_")
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.directory / str(step)).rename(target)
      notes.append(f"warning: checkpoint {step} is damaged: {why}; moved to {target}")
    distributed.exchange("damaged checkpoints are out of the way", "")
    self._manager.reload()
    return notes

  def save(self, step: int, state, wait: bool = False) -> str:
    """Starts saving; returns when the arrays are copied off the devices, or with `wait` when everything is on disk.

    Does nothing while the save before is under way (unless `wait`), or on a disk with too little space; the run goes on. All
    processes call it.

    Returns:
      "" or why there is no such checkpoint.

    Raises:
      StorageError: with several processes, when a save failed on some: those that wait for it must end too.
    """
    error = self._error(wait)
    facts = {
      "error": error,
      "busy": self._manager.is_saving_in_progress(),
      "lacks": _lacking_space(self.directory, state),
    }
    found = [
      json.loads(text)
      for text in distributed.exchange(f"saving step {step}", json.dumps(facts), TIMEOUT_S)
    ]
    if errors := [f"process {i}: {one['error']}" for i, one in enumerate(found) if one["error"]]:
      self._failed("a checkpoint before: " + "; ".join(errors))
    if any(one["busy"] for one in found):
      return "the save before is still under way"
    if step in self._manager.all_steps():
      return ""
    if found[0]["lacks"]:
      return found[0]["lacks"]
    record = {
      "format": FORMAT,
      "identity": self.identity,
      "arrays": checksums(state),
      "versions": {
        name: importlib.metadata.version(name)
        for name in ("jax", "flax", "optax", "orbax-checkpoint")
      },
    }
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          run=ocp.args.JsonSave({"record": record, "sha256": _digest(record)}),
        ),
      )
    except Exception as caught:  # of any storage
      return self._failed(_line(caught))
    error = self._error(wait) if wait else ""
    return self._failed(error) if error else ""

  def _error(self, wait: bool) -> str:
    """Of a save in the background that has ended; with `wait`, of the one under way."""
    try:
      (self._manager.wait_until_finished if wait else self._manager.check_for_errors)()
      return ""
    except Exception as error:
      return _line(error)

  def _failed(self, why: str) -> str:
    """After an error orbax names steps that are not there: look at the folder. Several processes are out of step: they end."""
    if jax.process_count() > 1:
      raise StorageError(f"{self.directory}: {why}")
    logging.warning("%s: %s", self.directory, why)
    self._manager.reload()
    return why

  def close(self) -> None:
    """Waits and gives up the folder."""
    try:
      self._manager.close()
    except Exception as error:  # of a save that nobody waited for
      logging.warning("%s: %s", self.directory, _line(error))


@dataclasses.dataclass
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """The newest, and the best."""

  newest: int
  scores: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]
    best = max((step for step in steps if step in self.scores), key=self.scores.get, default=None)
    return [step == best or i >= len(steps) - self.newest for i, step in enumerate(steps)]


def read_config(workdir: str | Path) -> dict[str, Any]:
  """The configuration of the run in `workdir`, as plain values.

  Raises:
    WorkdirError: there is no run, or none with a complete checkpoint.
  """
  folder = open_folder(workdir)
  if not (folder / "config.json").is_file() or not ocp.utils.checkpoint_steps(
    folder / "checkpoints"
  ):
    raise WorkdirError(
      f"{workdir} holds no run with a checkpoint: expected config.json and checkpoints/STEP there"
    )
  try:
    return json.loads((folder / "config.json").read_text())
  except ValueError as error:
    raise WorkdirError(
      f"{folder}/config.json cannot be read ({error}); the run writes it anew when it goes on"
    ) from None


class Stored(NamedTuple):
  """Parameters of a run.

  Attributes:
    params: {entry: tree of numpy arrays}.
    others: names of the entries that were not read.
    step: updates done.
    identity: of the run, see `Checkpoints`.
  """

  params: dict[str, Any]
  others: tuple[str, ...]
  step: int
  identity: dict[str, Any]


def read_params(workdir: str | Path, *wanted: str) -> Stored:
  """The newest parameters of the run in `workdir` that are whole; of a run that averages them (`optim.ema_decay`), the average.

  Args:
    wanted: entries, e.g. "encoder"; the first must be there, others are left out if they are not.

  Raises:
    WorkdirError: there is no such checkpoint, or it has not the first entry.
    StorageError: there are checkpoints, and none is whole.
  """
  averaged = read_config(workdir)["optim"]["ema_decay"]
  directory, damaged = open_folder(workdir) / "checkpoints", []
  with _open(directory, ocp.PyTreeCheckpointHandler(), create=False) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        return _read_params(manager, step, wanted, averaged)
      except _Damaged as error:
        damaged.append(f"checkpoint {step} is damaged: {error}")
        logging.warning("%s: %s", directory, damaged[-1])
  raise StorageError(f"no checkpoint in {directory} is whole ({'; '.join(damaged)})")


def _read_params(manager, step: int, wanted: tuple[str, ...], averaged: float) -> Stored:
  record = _read_record(manager, step)
  entries = dict.fromkeys(
    name.split("/")[1] for name in record["arrays"] if name.startswith("params/")
  )
  if wanted[0] not in entries:
    raise WorkdirError(
      f"checkpoint {step} has no parameters of {wanted[0]!r}; it has: {', '.join(entries)}"
    )
  names = [name for name in wanted if name in entries]
  try:
    state = manager.item_metadata(step)["state"]
    # The average is the last link of the optimiser's chain; orbax reads a list only as a whole.
    item = (
      {"opt_state": state["opt_state"]}
      if averaged
      else {"params": {name: state["params"][name] for name in names}}
    )
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=arrays, partial_restore=True)
    found = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
  except Exception as error:  # damage comes as any type there is
    raise _Damaged(f"it cannot be read ({_line(error)})") from None
  _verify(record, found)
  params = found["opt_state"][-1]["average"] if averaged else found["params"]
  others = tuple(name for name in entries if name not in names)
  return Stored({name: params[name] for name in names}, others, step, record["identity"])


def _open(directory, state_handler, **options) -> ocp.CheckpointManager:
  handlers = {"state": state_handler, "run": ocp.JsonCheckpointHandler()}
  return ocp.CheckpointManager(
    directory,
    item_names=tuple(handlers),
    item_handlers=handlers,
    options=ocp.CheckpointManagerOptions(**options),
  )


def _read_record(manager, step: int) -> dict[str, Any]:
  """The record of a checkpoint, verified."""
  try:
    found = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
    record, digest = found["record"], found["sha256"]
  except Exception as error:
    raise _Damaged(f"its record cannot be read ({_line(error)})") from None
  if _digest(record) != digest:
    raise _Damaged("its record is not what was written")
  if record["format"] != FORMAT:
    raise WorkdirError(
      f"checkpoint {step} was written in format {record['format']} (with {record['versions']}); this version reads "
      f"format {FORMAT}"
    )
  return record


def _agree_whole(step: int, why: str) -> None:
  """Raises _Damaged on all processes if there is a reason on some: the others would wait for them in the next collective."""
  for index, text in enumerate(distributed.exchange(f"checkpoint {step} is whole", why, TIMEOUT_S)):
    if text:
      raise _Damaged(text if jax.process_count() == 1 else f"process {index}: {text}")


def _digest(record: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def checksums(tree) -> dict[str, list]:
  """{name: [dtype, shape, checksum]} of every array of a tree, the same on all processes; computed where the arrays are."""
  sums = jax.device_get(jax.tree.map(_checksum, tree))
  return {
    name: [str(leaf.dtype), list(leaf.shape), int(total)]
    for (name, leaf), total in zip(_named(tree).items(), jax.tree.leaves(sums))
  }


def _verify(record: dict[str, Any], tree) -> None:
  """Raises _Damaged unless the arrays of `tree` are those of the record, which may have more."""
  bad = [name for name, entry in checksums(tree).items() if record["arrays"].get(name) != entry]
  if bad:
    raise _Damaged(f"{len(bad)} arrays are not what was written, the first {bad[0]}")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  """uint32 of all bits and their places: sum over the elements of mix(bits ^ mix(place)), modulo 2^32.

  Any change of one element changes it, for `mix` is a bijection; other damage escapes once in 4 billion times. A sum does not
  depend on how the array is divided among devices, so that every device adds up its own part, and any number of them can verify
  what any other number has written.
  """
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
  return _mix(bits.astype(jnp.uint32) ^ _mix(place)).sum(dtype=jnp.uint32)


def _mix(h):
  """The finaliser of MurmurHash3 (Appleby): a bijection of uint32 in which every bit depends on every other."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def _lacking_space(directory, state) -> str:
  """Why a save of `state` does not fit on the disk; "" if it does."""
  if "://" in str(directory):
    return ""
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  try:
    free = shutil.disk_usage(directory).free
  except OSError as error:
    return _line(error)
  return (
    ""
    if free > SPACE * size
    else (
      f"{free / 1e9:.2f} GB are free on the disk of {directory}, {SPACE * size / 1e9:.2f} GB are needed; the run goes on and tries "
      "again at the next save"
    )
  )


def _named(tree) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _kind(entry) -> str:
  return "missing" if entry is None else f"{entry[0]} {tuple(entry[1])}"


def _line(error: Exception) -> str:
  return (" ".join(str(error).split()) or type(error).__name__)[:200]
