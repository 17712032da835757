"""Logs a run: console lines with a progress bar, metrics.jsonl, TensorBoard, Weights & Biases.

Process 0 alone writes.
"""

import collections
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from mrmae_jax import constants, hardware
from mrmae_jax.errors import StorageError, one_line, printable
from mrmae_jax.runs import paths, supervision, tensorboard
from mrmae_jax.runs.metrics import (
  NOT_RESULTS,
  check_goodput,
  is_detail,
  read_json_lines,
  read_metrics,
  read_records,
)

UPLOAD_EVERY_S = 60
RETRY_S = 30  # until a writer that has failed is opened again


class Log:
  """Writes metrics and shows progress."""

  def __init__(
    self,
    workdir: epath.Path,
    total_steps: int,
    first_step: int = 0,
    settings: dict[str, Any] | None = None,
    wandb: str = "",
  ):
    """Opens the logs of `workdir` and drops records past `first_step`.

    A resumed run computes the dropped steps again.

    Args:
      workdir: folder of the run, see paths.open_folder.
      total_steps: length of the run.
      first_step: number of updates already done.
      settings: flat, for TensorBoard's page of hyperparameters and for Weights & Biases.
      wandb: project at Weights & Biases that gets numbers and pictures; "" for none.
    """
    self._workdir = workdir
    self.tensorboard = workdir / "tensorboard"
    # Objects in a bucket cannot be appended to. The logs grow on disk, and are copied as a whole.
    self._local = Path(tempfile.mkdtemp()) if paths.is_bucket(workdir) else Path(workdir)
    self._last_upload = time.time()
    self.path = self._local / "metrics.jsonl"
    self.goodput = Goodput(workdir, first_step)
    self._total_steps = total_steps
    self._settings = settings or {}
    self._last_results = {}
    self._start = ""  # the line of this run in starts.jsonl
    self._folder_id = None  # of the workdir
    self._unwritten = b""  # of the records, what the disk has not taken yet
    self._bar = None
    self._writers = {}  # {name: writer} of those that are open
    self._openers = {}  # {name: () -> writer} of those that are opened again after a failure
    self._failed = set()  # names of writers whose failure has been said
    self._next_try = 0.0  # of a writer that has failed
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    self._note_start(first_step)
    self._open_metrics(first_step)
    self._purge_step = first_step + 1 if first_step else 0
    self._openers["TensorBoard"] = self._open_tensorboard
    self._call("TensorBoard", "flush")
    if wandb:
      try:
        self._writers["Weights & Biases"] = _open_wandb(wandb, workdir, self._settings)
      except Exception as error:  # no key, no network, no right to the project
        self.say(
          f"warning: nothing is written to Weights & Biases ({one_line(error)}); run `wandb "
          "login`, or set WANDB_MODE=offline, and resume; metrics.jsonl has everything"
        )
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=total_steps, initial=first_step, unit="step", smoothing=0.05, dynamic_ncols=True
      )

  def _open_metrics(self, first_step: int) -> None:
    """Opens metrics.jsonl behind the records up to `first_step`."""
    records, spoiled = read_records(self._workdir / "metrics.jsonl") if first_step else ([], 0)
    if spoiled:
      self.say(f"warning: metrics.jsonl: {spoiled} lines are no records and are left out")
    paths.write_text(self.path, _to_lines(r for r in records if r["step"] <= first_step))
    self._file = open(self.path, "ab", buffering=0)  # it says how much of a record a disk took

  def _note_start(self, first_step: int) -> None:
    """Adds to WORKDIR/starts.jsonl when, with which command and on what the run starts."""
    devices = jax.devices()
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    versions = [f"mrmae_jax {constants.VERSION}"]  # that of a checkout need not be installed
    versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    start = {
      "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
      "first_step": first_step,
      "command": shlex.join(["mrmae", *sys.argv[1:]]),
      "devices": f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} processes",
      "versions": ", ".join([f"python {platform.python_version()}", *versions]),
    }
    starts = [*read_json_lines(self._workdir / "starts.jsonl")[0], start]
    self._start = _to_lines([start])
    paths.write_text(self._workdir / "starts.jsonl", _to_lines(starts))
    self._folder_id = self._read_folder_id()

  def _read_folder_id(self) -> tuple[int, int] | None:
    """Returns what tells the workdir from other folders; None if there is no such folder."""
    try:
      info = os.stat(self._workdir / ".")
      return info.st_dev, info.st_ino
    except (FileNotFoundError, NotADirectoryError):
      return None

  def check_folder(self) -> None:
    """Checks that the workdir is still the folder in which the run began.

    Else a second, incomplete run would be written where a disk was unmounted or a folder renamed.

    Raises:
      StorageError: it is not.
    """
    if not self._is_writer or paths.is_bucket(self._workdir):
      return
    if self._read_folder_id() != self._folder_id and not self._has_start():
      self._is_writer = False
      raise StorageError(
        f"{self._workdir} is no longer the folder in which this run began: it was moved, removed "
        "or unmounted. Bring it back, and run the same command again; it resumes after the newest "
        "checkpoint there"
      )

  def _has_start(self) -> bool:
    """Returns whether starts.jsonl names this run: some file systems renumber their folders."""
    try:
      return self._start in (self._workdir / "starts.jsonl").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, ValueError):
      return False

  def say(self, text: str) -> None:
    """Prints lines on the console."""
    text = printable(text, keep="\n")
    if self._bar:
      self._bar.write(text)
    elif self._is_writer:
      print(text, flush=True)

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._bar:
      self._bar.update(step - self._bar.n)

  def scalars(self, step: int, values: dict[str, float], eta: float = 0.0) -> None:
    """Writes numbers to all logs, as one record of metrics.jsonl.

    Args:
      step: number of updates done.
      values: numbers by name.
      eta: seconds to the end of the run, for the console; 0 if unknown.

    Raises:
      StorageError: see `check_folder`.
    """
    if not self._is_writer:
      return
    self.check_folder()
    # JSON has no nan and no infinity, and a curve has no place for them.
    finite = {name: value for name, value in values.items() if np.isfinite(value)}
    self._unwritten += _to_lines([{"step": step, **finite}]).encode()
    try:
      self._write_records()
      self.goodput.write(self._workdir, step)
      self._upload(UPLOAD_EVERY_S)
    except OSError as error:  # a full disk may have space again by the next checkpoint
      self._warn(error)
    self._last_results |= {
      name: x for name, x in finite.items() if name not in NOT_RESULTS and not is_detail(name)
    }
    self._call("TensorBoard", "add_scalars", finite, step)
    self._call("Weights & Biases", "log", finite, step=step)
    shown = {name: value for name, value in values.items() if not is_detail(name)}
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    remaining = f"  eta {datetime.timedelta(seconds=round(eta))}" if eta else ""
    self.say(f"step {step}/{self._total_steps}  {numbers}{remaining}")

  def _write_records(self) -> None:
    """Writes what metrics.jsonl lacks; raises OSError where it cannot.

    A full disk may take a part of a record. The next call continues behind that part.
    """
    while self._unwritten:
      self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

  def _warn(self, error: OSError) -> None:
    self.say(
      f"warning: {self.path} cannot be written ({one_line(error)}); the missing records are kept "
      "and tried again"
    )

  def sync(self) -> None:
    """Waits until all records are on the disk: steps up to a checkpoint are not computed again."""
    if not self._is_writer:
      return
    try:
      self._write_records()
      paths.sync(self.path)
    except OSError as error:
      self._warn(error)

  def text(self, name: str, content: str) -> None:
    """Writes a text file into the workdir."""
    if self._is_writer:
      paths.write_text(self._workdir / name, content + "\n")

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], to TensorBoard and Weights & Biases."""
    self._call("TensorBoard", "add_image", name, picture, step)
    if "Weights & Biases" in self._writers:
      import wandb  # of the wandb extra

      self._call("Weights & Biases", "log", {name: wandb.Image(picture)}, step=step)

  def _call(self, name: str, method: str, /, *args, **kwargs) -> None:
    """Calls a method of a writer.

    An error does not end the run. A writer with an opener is opened again by a later call, because
    a full disk may have space again.
    """
    is_open = name in self._writers
    if not self._is_writer or not is_open and time.monotonic() < self._next_try:
      return
    try:
      if name in self._openers and not is_open:
        self._writers[name] = self._openers[name]()
      if name in self._writers:
        getattr(self._writers[name], method)(*args, **kwargs)
    except Exception as error:  # of any type
      self._drop(name)
      self._next_try = time.monotonic() + RETRY_S
      if name not in self._failed:
        self._failed.add(name)
        until = "until it can be written again" if name in self._openers else "any more"
        self.say(
          f"warning: nothing is written to {name} {until} ({type(error).__name__}: "
          f"{one_line(error)}); metrics.jsonl has everything"
        )
    else:
      if name in self._failed and name in self._writers:
        self._failed.discard(name)
        self.say(f"{name} is written again")

  def _drop(self, name: str) -> None:
    """Closes a writer that has failed, if another will take its place; what it holds is lost."""
    writer = self._writers.pop(name, None)
    if name in self._openers and writer:
      with contextlib.suppress(OSError, ValueError):
        writer.close()

  def _open_tensorboard(self) -> tensorboard.EventFile:
    file = tensorboard.EventFile(self._local / "tensorboard", self._purge_step)
    self._purge_step = 0
    return file

  def close(self) -> None:
    """Closes all logs and copies them to the bucket, if the workdir is in one."""
    if self._is_writer:
      self.sync()
      self._file.close()
      if lost := self._unwritten.count(b"\n"):
        self.say(f"warning: metrics.jsonl lacks its last {lost} records")
      is_plain = lambda value: isinstance(value, (bool, int, float, str))
      settings = {k: v if is_plain(v) else str(v) for k, v in self._settings.items()}
      if settings and self._last_results:
        self._call("TensorBoard", "add_hyperparameters", settings, self._last_results)
      self._call("TensorBoard", "close")
      self._call("Weights & Biases", "finish")
      self._upload(0)
    if self._bar:
      self._bar.close()

  def _upload(self, every_s: float) -> None:
    """Copies files that have changed to the bucket, if the last copy is `every_s` seconds old.

    With 0 it copies all files.
    """
    is_due = not every_s or time.time() - self._last_upload >= every_s
    if not paths.is_bucket(self._workdir) or not is_due:
      return
    self._call("TensorBoard", "flush")
    for path in self._local.rglob("*"):
      if path.is_file() and (path.stat().st_mtime >= self._last_upload - 1 or not every_s):
        target = self._workdir / str(path.relative_to(self._local))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    self._last_upload = time.time()


def _open_wandb(project: str, workdir: epath.Path, settings: dict[str, Any]):
  """Opens a run at Weights & Biases, the same one when the run is resumed."""
  import wandb  # of the wandb extra

  # `init` would ask for a key, and wait for the answer on a terminal that nobody watches.
  if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
    raise PermissionError("there is no API key")
  return wandb.init(
    project=project,
    name=workdir.name,
    id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16],
    resume="allow",
    config=settings,
    dir=None if paths.is_bucket(workdir) else str(workdir),
  )


class Goodput:
  """Accounts for the time of a run over all its starts, in WORKDIR/goodput.json.

  "seconds" by phase: start (data, weights, teacher), restore, compile, step, data (waiting for it),
  evaluation, saving (what the steps wait for), end. "goodput" is the share of steps that count. The
  steps since the last checkpoint of a killed start do not count: they are computed again.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    """Reads the account of earlier starts; `first_step` updates are already done."""
    self._first_step = first_step
    self._before = {
      "starts": 0,
      "seconds": {},
      "steps": 0,
      "replayed_steps": 0,
      "reached": first_step,
    }
    path = workdir / "goodput.json"
    # Missing or damaged: the account starts here
    with contextlib.suppress(
      OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError
    ):
      if first_step and paths.is_file(path):
        self._before |= check_goodput(json.loads(paths.read_regular(path)))
    self._replayed_steps = max(0, self._before["reached"] - first_step)

  def account(self, step: int) -> dict[str, Any]:
    """Returns the account after `step`."""
    seconds = collections.Counter(self._before["seconds"])
    seconds.update(supervision.seconds())
    steps = self._before["steps"] + step - self._first_step
    replayed = self._before["replayed_steps"] + self._replayed_steps
    useful = seconds["step"] * (1 - replayed / steps) if steps else 0.0
    return {
      "starts": self._before["starts"] + 1,
      "seconds": {name: round(value, 3) for name, value in seconds.items()},
      "steps": steps,
      "replayed_steps": replayed,
      "reached": step,
      "goodput": round(useful / max(sum(seconds.values()), 1e-9), 4),
    }

  def write(self, workdir: epath.Path, step: int) -> None:
    """Writes the account atomically. It is written too often to wait for the disk."""
    text = json.dumps(self.account(step), indent=2)
    paths.write_text(workdir / "goodput.json", text, lasting=False)

  def line(self, step: int) -> str:
    """Returns "goodput 91.3 %: step 300.1 s, compile 20.2 s; 0 steps computed again, 1 starts"."""
    account = self.account(step)
    phases = sorted(account["seconds"].items(), key=lambda item: -item[1])
    return (
      f"goodput {100 * account['goodput']:.1f} %: "
      + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases)
      + f"; {account['replayed_steps']} steps computed again, {account['starts']} starts"
    )


class Clock:
  """Measures the throughput of the steps without evaluations, checkpoints and compilation."""

  def __init__(self, program, batch_size: int, accum_steps: int, mesh):
    """`program`: the compiled training step."""
    self._batch_size = batch_size
    self._devices = mesh.devices.flatten()
    # XLA counts one device and one round of the loop over micro-batches. This counts the optimizer
    # too often, which is small beside the rest.
    self._flops = (program.cost_analysis() or {}).get("flops", 0.0) * accum_steps

  def start(self, step: int) -> None:
    """Starts to measure after `step`."""
    self._step = step
    self._busy, self._waited = self._phases()

  def _phases(self) -> tuple[float, float]:
    """Returns (seconds in steps and in waiting for data, seconds in waiting for data)."""
    seconds = supervision.seconds()
    waited = seconds.get("data", 0.0)
    return seconds.get("step", 0.0) + waited, waited

  def measure(self, step: int) -> dict[str, float]:
    """Returns images per second and the share of time spent waiting for data, and starts again.

    Includes the MFU where the peak of the device is known.
    """
    busy, waited = self._phases()
    seconds = max(busy - self._busy, 1e-9)
    steps = step - self._step
    rate = steps * self._batch_size / seconds
    values = {"images_per_s": rate, "data_wait": min(1.0, (waited - self._waited) / seconds)}
    if len(self._devices) > 1:
      values["images_per_s_per_device"] = rate / len(self._devices)
    device = self._devices[0]
    chip = hardware.find_chip(device)
    if chip and self._flops:
      values["mfu"] = self._flops * steps / seconds / chip.peak_flops
    memory = device.memory_stats() if device.process_index == jax.process_index() else None
    if memory and "peak_bytes_in_use" in memory:
      values["device_gib"] = memory["peak_bytes_in_use"] / 2**30
    self.start(step)
    return values


def summary(workdir: str | Path) -> list[str]:
  """Returns a line for each loss and evaluation: "mimic: 1.9 at step 1, 0.4 at step 600"."""
  series = {}
  for record in read_metrics(workdir):
    for name, value in record.items():
      series.setdefault(name, []).append((record["step"], value))
  lines = []
  for name, points in series.items():
    if name not in NOT_RESULTS and not is_detail(name):
      (first_step, first), (last_step, last) = points[0], points[-1]
      lines.append(
        f"{printable(name)}: {first:.4g} at step {first_step}, {last:.4g} at step {last_step}"
      )
  return lines


def _to_lines(records) -> str:
  return "".join(json.dumps(record) + "\n" for record in records)
