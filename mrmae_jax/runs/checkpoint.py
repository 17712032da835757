"""Saves and restores the checkpoints of a run. The only module that knows orbax.

A checkpoint is the whole train state and a JSON record: the identity of its run, and name, type,
shape and checksum of every array. Saving is asynchronous. A checkpoint appears under its final name
only when it is complete, record included, so a run that is killed while saving finds the previous
one. Restoring verifies every array, because orbax itself restores a flipped bit silently.
"""

import asyncio
import contextlib
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
from ml_collections import ConfigDict

from mrmae_jax import config as config_lib
from mrmae_jax.config import find_keys, find_mistake, flatten
from mrmae_jax.errors import StorageError, WorkdirError, one_line
from mrmae_jax.runs import distributed
from mrmae_jax.runs.paths import (
  find_special,
  is_bucket,
  is_file,
  open_folder,
  read_regular,
  sync,
  sync_tree,
)

FORMAT = 2  # of the record
FREE_SPACE = 1.2  # free space on the disk that a save needs, in sizes of the state
# Devices share the writing of a replicated array, but orbax compiles each share of each shape: for
# smaller arrays that costs seconds in the first save and gains nothing.
SHARED_BYTES = 2**20
# Keys of an identity that older versions noted, and that a run may change
OUTDATED = {"data.source"}
# Key of an identity: digests of a sample of images, of which a few may change
CONTENTS = "train image contents"
# Key of an identity: names of the classes, in order
CLASSES = "classes"
SAVE_TIMEOUT_S = 300  # orbax waits 1200 s by default, on a full disk in vain


class _DamagedError(Exception):
  """A checkpoint that cannot be trusted; another one may be intact."""


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    step: number of updates done.
    state: arrays, sharded as asked.
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
      workdir: folder of the run; it is created if it does not exist.
      identity: what must not change when a run is resumed; flat, JSON values.
      keep: number of newest checkpoints that stay.
      scores: {step: finite number}, to which the caller adds. The checkpoint with the largest
        score stays, too.

    Raises:
      StorageError: see `_open_manager`.
    """
    self.directory = open_folder(workdir) / "checkpoints"
    self.identity = identity
    self._manager = _open_manager(
      self.directory,
      _state_handler(),
      preservation_policy=_NewestAndBest(keep, {} if scores is None else scores),
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_S),
      temporary_path_class=None if is_bucket(workdir) else _SyncedPath,
    )

  def restore(self, shapes) -> Restored | None:
    """Restores the newest intact checkpoint; None if there is none at all.

    Newer, damaged ones are moved to WORKDIR/damaged, where nothing is ever deleted, and `notes`
    names them.

    Args:
      shapes: the state as ShapeDtypeStructs with shardings. The devices need not be those of the
        run that saved.

    Raises:
      WorkdirError: the checkpoint is of another run, or its arrays have other names, shapes or
        types.
      StorageError: all checkpoints are damaged.
    """
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state, note = self._restore_step(step, shapes)
      except _DamagedError as error:
        damaged[step] = str(error)
      else:
        return Restored(step, state, [*self._move_damaged(damaged), *filter(None, [note])])
    if damaged:
      reasons = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
      raise StorageError(
        f"no checkpoint in {self.directory} is intact ({reasons}). Nothing was changed there; "
        "choose another --workdir to start again"
      )
    return None

  def _restore_step(self, step: int, shapes):
    """Restores and verifies one checkpoint; raises what `restore` raises, or _DamagedError.

    Returns:
      (state, a warning or "").
    """
    record, problem = None, ""
    try:
      record = _read_record(self._manager, step)
    except _DamagedError as error:
      problem = str(error)
    _agree_intact(step, problem)
    note = self._check_identity(record["identity"])
    self._check_arrays(step, record["arrays"], shapes)
    try:
      args = ocp.args.Composite(state=_restore_args(shapes))
      state = self._manager.restore(step, args=args)["state"]
    except Exception as error:  # damage raises any type
      problem = f"it cannot be read ({one_line(error)})"
    _agree_intact(step, problem)
    _verify(record, state)
    return state, note

  def _check_identity(self, stored: dict[str, Any]) -> str:
    """Raises WorkdirError if the checkpoint is of another run; returns a warning or ""."""
    workdir, task = self.directory.parent, stored.get("task")
    if task != self.identity.get("task"):
      raise WorkdirError(
        f"{workdir} holds a run of the task {task!r}, this one is {self.identity.get('task')!r}; "
        "choose another --workdir"
      )
    changed = [
      f"{key}: {stored.get(key)!r} in the checkpoint, {self.identity.get(key)!r} now"
      for key in sorted((stored.keys() | self.identity.keys()) - OUTDATED - {CONTENTS})
      if stored.get(key) != self.identity.get(key)
    ]
    is_replaced, note = False, ""
    if stored.get("train images") == self.identity.get("train images"):  # of the same names
      is_replaced, note = _compare_contents(stored.get(CONTENTS), self.identity.get(CONTENTS))
    if is_replaced:
      changed.append(note)
    if changed:
      other_length = stored.get("epochs") != self.identity.get("epochs")
      hint = (
        f". To train its weights further, with a schedule that starts anew: mrmae {task} "
        f"--workdir=NEW --config.init_from={workdir}, with the other options as now"
      )
      raise WorkdirError(
        f"{workdir} holds a different run ({'; '.join(changed)}). Choose another --workdir, or "
        "repeat the settings of the run that is there"
        + (hint if other_length and task in ("pretrain", "finetune") else "")
      )
    return f"warning: {note}; they count from here on" if note else ""

  def _check_arrays(self, step: int, arrays: dict[str, list], shapes) -> None:
    """Raises WorkdirError if a checkpoint has other arrays than `shapes`."""
    stored = {name: tuple(entry[:2]) for name, entry in arrays.items()}
    required = {name: (str(x.dtype), list(x.shape)) for name, x in _flatten(shapes).items()}
    different = [
      f"{name} is {_array_type(stored.get(name))}, the run needs {_array_type(required.get(name))}"
      for name in sorted(stored.keys() | required.keys())
      if stored.get(name) != required.get(name)
    ]
    if different:
      more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
      raise WorkdirError(
        f"{self.directory}/{step} does not fit this model: {'; '.join(different[:3])}{more}; "
        "config.encoder, config.decoder, config.teacher and config.optim decide on the arrays"
      )

  def _move_damaged(self, damaged: dict[int, str]) -> list[str]:
    """Moves damaged checkpoints out of the way of those to come; returns lines for the log."""
    if not damaged:
      return []
    notes = []
    for step, problem in damaged.items():
      target = self.directory.parent / "damaged" / str(step)
      if jax.process_index() == 0:
        while target.exists():
          target = target.with_name(f"{target.name}_")
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.directory / str(step)).rename(target)
      notes.append(f"warning: checkpoint {step} is damaged: {problem}; moved to {target}")
    distributed.exchange("damaged checkpoints are out of the way", "")
    self._manager.reload()
    return notes

  def save(self, step: int, state, wait: bool = False) -> str:
    """Starts saving; returns when the arrays are copied off the devices.

    With `wait` it returns when everything is on disk. Does nothing while the previous save is in
    progress (unless `wait`), or if the disk has too little space; the run can go on. All processes
    must call it.

    Returns:
      An error message, or "" on success.

    Raises:
      StorageError: with several processes, if a save failed on one of them. The run must stop,
        because the processes no longer agree on the steps.
    """
    own_report = {
      "error": self._pending_error(wait),
      "busy": self._manager.is_saving_in_progress(),
      "space": _space_problem(self.directory, state),
    }
    texts = distributed.exchange(f"saving step {step}", json.dumps(own_report), SAVE_TIMEOUT_S)
    reports = [json.loads(text) for text in texts]
    errors = [f"process {i}: {r['error']}" for i, r in enumerate(reports) if r["error"]]
    if errors:
      self._recover("an earlier checkpoint: " + "; ".join(errors))
    if any(report["busy"] for report in reports):
      return "the previous save is still in progress"
    if step in self._manager.all_steps():
      return ""
    if reports[0]["space"]:
      return reports[0]["space"]
    record = self._make_record(state)
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      run=ocp.args.JsonSave({"record": record, "sha256": record_digest(record)}),
    )
    try:
      self._manager.save(step, args=args)
    except Exception as error:  # storage raises any type
      return self._recover(one_line(error))
    error = self._pending_error(wait) if wait else ""
    return self._recover(error) if error else ""

  def _make_record(self, state) -> dict[str, Any]:
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {
      "format": FORMAT,
      "identity": self.identity,
      "arrays": checksums(state),
      "versions": {name: importlib.metadata.version(name) for name in packages},
    }

  def _pending_error(self, wait: bool) -> str:
    """Returns the error of a background save that has ended, or "".

    With `wait` it first waits for the save in progress.
    """
    try:
      if wait:
        self._manager.wait_until_finished()
      else:
        self._manager.check_for_errors()
      return ""
    except Exception as error:
      return one_line(error)

  def _recover(self, problem: str) -> str:
    """Reads the folder again after a failed save; returns `problem`.

    After an error orbax lists steps that do not exist, and leaves the unfinished checkpoint, whose
    space the next one may need. With several processes the run must stop instead: raises
    StorageError.
    """
    if jax.process_count() > 1:
      raise StorageError(f"{self.directory}: {problem}")
    logging.warning("%s: %s", self.directory, problem)
    if not is_bucket(self.directory):
      for unfinished in Path(self.directory).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    self._manager.reload()
    return problem

  def close(self) -> None:
    """Waits for the save in progress and releases the folder."""
    try:
      self._manager.close()
    except Exception as error:  # of a save that the run did not wait for
      logging.warning("%s: %s", self.directory, one_line(error))


class _SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """The folder of an unfinished checkpoint; once finished, it survives a loss of power.

  Orbax itself waits for the arrays alone, not for its JSON files and the names of folders. The
  checkpoint before stays until `finalize` returns.
  """

  async def finalize(self) -> None:
    """Gives the folder its final name."""
    await asyncio.to_thread(sync_tree, self.get())
    await super().finalize()  # it adds small files, without which a checkpoint counts as damaged
    await asyncio.to_thread(sync_tree, self.get_final())
    await asyncio.to_thread(sync, self.get_final().parent)


@dataclasses.dataclass
class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest checkpoints and the one with the best score."""

  newest: int
  scores: dict[int, float]

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]
    best = max((step for step in steps if step in self.scores), key=self.scores.get, default=None)
    return [step == best or i >= len(steps) - self.newest for i, step in enumerate(steps)]


def read_config(workdir: str | Path) -> dict[str, Any]:
  """Returns the configuration of the run in `workdir`, as plain values.

  Keys that came after the run have their defaults.

  Raises:
    WorkdirError: there is no run, or none with a complete checkpoint; or config.json there is not
      that of the checkpoint, whose arrays it describes.
  """
  folder = open_folder(workdir)
  path = folder / "config.json"
  if not is_file(path) or not ocp.utils.checkpoint_steps(folder / "checkpoints"):
    raise WorkdirError(
      f"{workdir} holds no run with a checkpoint: expected config.json and checkpoints/STEP there"
    )
  try:
    config = json.loads(read_regular(path))
    flat = flatten(config) if isinstance(config, dict) else {}
  except (OSError, ValueError, RecursionError) as error:
    raise WorkdirError(
      f"{path} cannot be read ({one_line(error)}); a run writes it anew when it resumes"
    ) from None
  if "task" not in flat:
    raise WorkdirError(f"{path} holds no run: expected the keys of a configuration")
  identity = read_identity(workdir)
  keys = [key for key in identity if "." in key or key in flat or key in ("task", "image_size")]
  for key in sorted(set(keys) - OUTDATED):
    if key not in flat or flat[key] != identity[key]:
      now = repr(flat[key])[:60] if key in flat else "missing"
      raise WorkdirError(
        f"{path} is not that of its checkpoint ({key}: {now} in the file, {identity[key]!r} in the "
        "checkpoint); a run writes it anew when it resumes"
      )
  if problem := _find_mistake(config, flat, identity):
    raise WorkdirError(
      f"{path} is not that of its checkpoint ({problem}); a run writes it anew when it resumes"
    )
  for name, key in find_keys(ConfigDict(config)).items():
    *sections, leaf = name.split(".")
    part = config
    for section in sections:
      part = part.setdefault(section, {})
    part.setdefault(leaf, key.default)
  return config


def _find_mistake(config: dict, flat: dict[str, Any], identity: dict[str, Any]) -> str:
  """Returns what is wrong with the keys that an identity does not name, or "".

  It leaves out those that have their defaults, and those that a resumed run may change. One
  without names of sections holds none of them.
  """
  is_whole = any("." in key for key in identity)
  try:
    config = ConfigDict(config)
    keys, departures = find_keys(config), config_lib.identity(config).keys() - identity.keys()
  # The file may hold anything anywhere.
  except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
    return one_line(error)
  if values := sorted(flat.keys() & {name.rpartition(".")[0] for name in keys}):
    return f"{values[0]} is not a section"
  if unknown := sorted(x for x in departures - keys.keys() if x.startswith("encoder.")):
    return f"{unknown[0]} is not a key"
  for key in sorted(flat.keys() & keys.keys() - identity.keys()):
    if mistake := find_mistake(flat[key], keys[key]):
      return f"{key}={flat[key]!r:.60} {mistake}"
    if is_whole and key in departures:
      return f"{key}: {flat[key]!r:.60} in the file, {keys[key].default!r} in the checkpoint"
  return ""


def read_identity(workdir: str | Path) -> dict[str, Any]:
  """Returns the identity of the run in `workdir`, see `Checkpoints`; {} if no record is intact."""
  directory = open_folder(workdir) / "checkpoints"
  with _open_manager(directory, ocp.PyTreeCheckpointHandler(), create=False) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      with contextlib.suppress(_DamagedError):
        return _read_record(manager, step)["identity"]
  return {}


class Stored(NamedTuple):
  """Parameters of a run.

  Attributes:
    params: {entry: tree of numpy arrays}.
    others: names of the entries that were not read.
    step: number of updates done.
    identity: of the run, see `Checkpoints`.
    extra: of the state, a tree of numpy arrays; None if it was not asked for.
  """

  params: dict[str, Any]
  others: tuple[str, ...]
  step: int
  identity: dict[str, Any]
  extra: Any = None


def read_params(workdir: str | Path, *entries: str, with_extra: bool = False) -> Stored:
  """Reads the newest intact parameters of the run in `workdir`.

  For a run that averages its parameters (`optim.ema_decay`) these are the averages.

  Args:
    workdir: folder of the run.
    entries: e.g. "encoder". The first one must exist; others are skipped if they do not.
    with_extra: read `TrainState.extra` too.

  Raises:
    WorkdirError: there is no checkpoint, or it does not have the first entry.
    StorageError: all checkpoints are damaged.
  """
  is_averaged = bool(read_config(workdir)["optim"]["ema_decay"])
  directory = open_folder(workdir) / "checkpoints"
  damaged = []
  with _open_manager(directory, ocp.PyTreeCheckpointHandler(), create=False) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        return _read_params(manager, step, entries, is_averaged, with_extra)
      except _DamagedError as error:
        damaged.append(f"checkpoint {step} is damaged: {error}")
        logging.warning("%s: %s", directory, damaged[-1])
  raise StorageError(f"no checkpoint in {directory} is intact ({'; '.join(damaged)})")


def _read_params(
  manager, step: int, entries: tuple[str, ...], is_averaged: bool, with_extra: bool
) -> Stored:
  record = _read_record(manager, step)
  stored = dict.fromkeys(
    name.split("/")[1] for name in record["arrays"] if name.startswith("params/")
  )
  if entries[0] not in stored:
    raise WorkdirError(
      f"checkpoint {step} has no parameters of {entries[0]!r}; it has: {', '.join(stored)}"
    )
  names = [name for name in entries if name in stored]
  try:
    state = manager.item_metadata(step)["state"]
    # The average is the last link of the optimizer's chain; orbax reads a list only as a whole.
    if is_averaged:
      item = {"opt_state": state["opt_state"]}
    else:
      item = {"params": {name: state["params"][name] for name in names}}
    item |= {"extra": state["extra"]} if with_extra else {}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    arrays = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
  except Exception as error:  # damage raises any type
    raise _DamagedError(f"it cannot be read ({one_line(error)})") from None
  _verify(record, arrays)
  params = arrays["opt_state"][-1]["average"] if is_averaged else arrays["params"]
  others = tuple(name for name in stored if name not in names)
  chosen = {name: params[name] for name in names}
  return Stored(chosen, others, step, record["identity"], arrays.get("extra"))


def _compare_contents(before: list[str] | None, now: list[str] | None) -> tuple[bool, str]:
  """Compares the sampled contents of a run's images with those of the same names now.

  Images that cannot be read, then or now, are left out. Checkpoints of older versions have no
  sample.

  Returns:
    (whether they were replaced, not only repaired here and there; what has changed, or "").
  """
  pairs = [(a, b) for a, b in zip(before or [], now or []) if a and b]
  count = sum(a != b for a, b in pairs)
  limit = min(max(2, len(pairs) // 10), len(pairs) // 2)
  note = f"{count} of {len(pairs)} training images that were compared have other contents now"
  return count > limit, note if count else ""


def _state_handler() -> ocp.PyTreeCheckpointHandler:
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_BYTES)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _restore_args(shapes) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(shapes, ocp.checkpoint_utils.construct_restore_args(shapes))


def _open_manager(directory, state_handler, **options) -> ocp.CheckpointManager:
  """Opens a folder of checkpoints.

  Raises:
    StorageError: a file of orbax's own in there is not what orbax writes, or is no file.
  """
  if not is_bucket(directory) and (special := find_special(directory)):
    raise StorageError(
      f"{directory / special[0]} is no file, and would be waited for; remove it (it and "
      f"{len(special) - 1} more are pipes, sockets, devices or links that lead nowhere)"
    )
  handlers = {"state": state_handler, "run": ocp.JsonCheckpointHandler()}
  try:
    return ocp.CheckpointManager(
      directory,
      item_names=tuple(handlers),
      item_handlers=handlers,
      options=ocp.CheckpointManagerOptions(**options),
    )
  except OSError:
    raise
  except Exception as error:  # damage raises any type
    raise StorageError(
      f"{directory} holds a checkpoint that is damaged, so that none can be read "
      f"({one_line(error)}); move the newest one elsewhere, and try again"
    ) from None


def _read_record(manager, step: int) -> dict[str, Any]:
  """Returns the verified record of a checkpoint."""
  try:
    item = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
    record, digest = item["record"], item["sha256"]
  except Exception as error:
    raise _DamagedError(f"its record cannot be read ({one_line(error)})") from None
  if record_digest(record) != digest:
    raise _DamagedError("its record is not what was written")
  if not isinstance(record, dict):
    raise _DamagedError("its record is not an object")
  if record.get("format") != FORMAT:
    raise WorkdirError(
      f"checkpoint {step} was written in format {record.get('format')} (with "
      f"{record.get('versions')}); this version reads format {FORMAT}"
    )
  if problem := _record_problem(record):
    raise _DamagedError(f"its record holds {problem}")
  return record


def _record_problem(record: dict[str, Any]) -> str:
  """Returns what a record of this format holds in the place of something else, or "".

  Its checksum is right. A stranger may have computed it.
  """
  identity, arrays = record.get("identity"), record.get("arrays")
  is_entry = lambda entry: (
    isinstance(entry, list)
    and [type(x) for x in entry] == [str, list, int]
    and all(type(side) is int for side in entry[1])
  )
  if not isinstance(identity, dict) or not isinstance(arrays, dict):
    return "no identity or no arrays"
  lists = [name for name in (CONTENTS, CLASSES) if not isinstance(identity.get(name, []), list)]
  entries = [name for name, entry in arrays.items() if not is_entry(entry)]
  return f"{(lists + entries)[0]} of another type" if lists + entries else ""


def _agree_intact(step: int, problem: str) -> None:
  """Raises _DamagedError on all processes if some process has a problem.

  Otherwise the others would wait for that process in the next collective.
  """
  problems = distributed.exchange(f"checkpoint {step} is intact", problem, SAVE_TIMEOUT_S)
  for index, text in enumerate(problems):
    if text:
      raise _DamagedError(text if jax.process_count() == 1 else f"process {index}: {text}")


def record_digest(record: dict[str, Any]) -> str:
  """Returns the sha256 that stands beside the record of a checkpoint."""
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _flatten(tree) -> dict[str, Any]:
  """Returns {path of a leaf joined by "/": leaf}, in the order of `jax.tree.leaves`."""
  return ocp.tree.to_flat_dict(tree, sep="/")


def checksums(tree) -> dict[str, list]:
  """Computes {name: [dtype, shape, checksum]} of all arrays of a tree, on their devices.

  The checksums are the same on all processes.
  """
  sums = jax.device_get(jax.tree.map(_checksum, tree))
  return {
    name: [str(leaf.dtype), list(leaf.shape), int(total)]
    for (name, leaf), total in zip(_flatten(tree).items(), jax.tree.leaves(sums))
  }


def _verify(record: dict[str, Any], tree) -> None:
  """Raises _DamagedError unless the arrays of `tree` are those of the record.

  The record may have more.
  """
  bad = [name for name, entry in checksums(tree).items() if record["arrays"].get(name) != entry]
  if bad:
    raise _DamagedError(f"{len(bad)} arrays are not what was written, the first is {bad[0]}")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  """Computes a uint32 of all bits and their places.

  It is the sum over the elements of mix(bits ^ mix(place)), modulo 2^32. Any change of one element
  changes it, because `mix` is a bijection; other damage escapes once in 4 billion times. A sum does
  not depend on how the array is divided among devices: every device adds up its own shard, and any
  number of devices can verify what any other number has written.
  """
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
  return _mix(bits.astype(jnp.uint32) ^ _mix(place)).sum(dtype=jnp.uint32)


def _mix(h):
  """Computes the finalizer of MurmurHash3 (Appleby), a bijection of uint32.

  Every bit of the result depends on every bit of `h`.
  """
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def _space_problem(directory, state) -> str:
  """Returns why a save of `state` does not fit on the disk, or "" if it does."""
  if is_bucket(directory):
    return ""
  required = FREE_SPACE * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  try:
    free = shutil.disk_usage(directory).free
  except OSError as error:
    return one_line(error)
  if free > required:
    return ""
  return (
    f"{free / 1e6:,.2f} MB are free on the disk of {directory}, {required / 1e6:,.2f} MB are needed"
  )


def _array_type(entry) -> str:
  """Returns a (dtype, shape) for a message."""
  return "missing" if entry is None else f"{entry[0]} {tuple(entry[1])}"
