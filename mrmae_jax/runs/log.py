"""What a run says: console lines with a progress bar, metrics.jsonl, TensorBoard. Host 0 alone speaks."""

import collections
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

from mrmae_jax import hardware
from mrmae_jax.runs import supervision
from mrmae_jax.runs.metrics import NOT_RESULTS, read_metrics

# tensorboardX imports torch where it is installed, seconds and hundreds of megabytes for nothing: it does without.
if "torch" in sys.modules:
  import tensorboardX
else:
  sys.modules["torch"] = None  # "import torch" is an ImportError now
  import tensorboardX

  del sys.modules["torch"]


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
    """Opens the logs of `workdir`; records past `first_step`, which a resumed run computes again, are dropped.

    Args:
      workdir: of the run, on disk or in a bucket; see workdir.open_workdir.
      total_steps: of the run.
      first_step: updates already done.
      settings: flat, for TensorBoard's page of hyperparameters and for Weights & Biases.
      wandb: a project there, to which numbers and pictures go as well; "": none.
    """
    self._folder, self._uploaded = workdir, time.time()
    self.tensorboard = self._folder / "tensorboard"
    # Objects in a bucket cannot be appended to: the logs grow on disk, and go there as a whole every minute.
    self._bucket = "://" in str(workdir)
    spool = Path(tempfile.mkdtemp()) if self._bucket else Path(workdir)
    self.path = spool / "metrics.jsonl"
    self._active = jax.process_index() == 0
    self._total = total_steps
    self._bar = None
    self._unwritten = ""  # records that the disk did not take
    self.goodput = Goodput(workdir, first_step)
    if self._active:
      self._note_start(first_step)
      kept = [r for r in read_metrics(workdir) if r["step"] <= first_step and first_step > 0]
      temporary = self.path.with_suffix(".tmp")
      temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
      os.replace(temporary, self.path)
      self._file = open(self.path, "a", encoding="utf-8")
      self._writer = tensorboardX.SummaryWriter(
        str(spool / "tensorboard"), purge_step=first_step + 1 if first_step else 0
      )
      self._settings, self._last = settings or {}, {}
      self._wandb = _wandb(wandb, workdir, self._settings) if wandb else None
      if sys.stderr.isatty():
        self._bar = tqdm(
          total=total_steps, initial=first_step, unit="step", smoothing=0.05, dynamic_ncols=True
        )

  def _note_start(self, first_step: int) -> None:
    """WORKDIR/starts.jsonl: when, with which command, on what the run began and went on."""
    devices = jax.devices()
    starts = [
      *read_metrics(self._folder, "starts.jsonl"),
      {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": shlex.join(["mrmae", *sys.argv[1:]]),
        "devices": f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} processes",
        "versions": f"python {platform.python_version()}, "
        + ", ".join(
          f"{name} {importlib.metadata.version(name)}"
          for name in ("mrmae_jax", "jax", "flax", "optax", "orbax-checkpoint")
        ),
      },
    ]
    (self._folder / "starts.jsonl").write_text(
      "".join(json.dumps(start) + "\n" for start in starts)
    )

  def say(self, text: str) -> None:
    """One line on the console."""
    if self._active:
      (self._bar.write if self._bar else lambda line: print(line, flush=True))(text)

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._bar:
      self._bar.update(step - self._bar.n)

  def scalars(self, step: int, values: dict[str, float], eta: float = 0.0) -> None:
    """Writes numbers everywhere; JSONL has one record per call. `eta`: seconds to the end, for the console."""
    if not self._active:
      return
    # A value that is nan or infinite has no place in JSON, and none in a curve.
    finite = {name: value for name, value in values.items() if np.isfinite(value)}
    self._unwritten += json.dumps({"step": step, **finite}) + "\n"
    try:
      self._file.write(self._unwritten)
      self._file.flush()
      self._unwritten = ""
      self.goodput.write(self._folder, step)
      self._upload()
    except (
      OSError
    ) as error:  # a full disk is no reason to stop a run that may find room by its next checkpoint
      self.say(
        f"warning: {self.path} cannot be written ({error}); what it lacks is kept and tried again"
      )
    self._last |= {name: value for name, value in finite.items() if name not in NOT_RESULTS}
    for name, value in finite.items():
      self._draw("_writer", "add_scalar", name, value, step)
    self._draw("_wandb", "log", finite, step=step)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    self.say(f"step {step}/{self._total}  {shown}" + (f"  eta {hms(eta)}" if eta else ""))

  def text(self, name: str, content: str) -> None:
    """Writes a text file beside the metrics."""
    if self._active:
      (self._folder / name).write_text(content + "\n", encoding="utf-8")

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], to TensorBoard."""
    if self._active:
      self._draw("_writer", "add_image", name, picture, step, dataformats="HWC")
      self._draw("_writer", "flush")
      if self._wandb:
        import wandb  # of the wandb extra

        self._draw("_wandb", "log", {name: wandb.Image(picture)}, step=step)

  def _draw(self, writer: str, method: str, *args, **kwargs) -> None:
    """A picture of the run is not the run: what TensorBoard or W&B raise ends that writer, and nothing else."""
    if getattr(self, writer) is None:
      return
    try:
      getattr(getattr(self, writer), method)(*args, **kwargs)
    except Exception as error:  # whatever it may be
      setattr(self, writer, None)
      self.say(
        f"warning: nothing more is written to {'TensorBoard' if writer == '_writer' else 'Weights & Biases'} "
        f"({type(error).__name__}: {error}); metrics.jsonl has everything"
      )

  def close(self) -> None:
    if self._active:
      self._file.close()
      plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in self._settings.items()
      }
      if plain and self._last:
        self._draw("_writer", "add_hparams", plain, self._last, name="hparams")
      self._draw("_writer", "close")
      self._draw("_wandb", "finish")
      self._upload(every_s=0)
    if self._bar:
      self._bar.close()

  def _upload(self, every_s: float = 60) -> None:
    """Copies to the bucket, if the workdir is in one, what has changed since the last time."""
    if not self._bucket or time.time() - self._uploaded < every_s:
      return
    self._draw("_writer", "flush")
    for path in self.path.parent.rglob("*"):
      if path.is_file() and (path.stat().st_mtime >= self._uploaded - 1 or not every_s):
        target = self._folder / str(path.relative_to(self.path.parent))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    self._uploaded = time.time()


def _wandb(project: str, workdir: epath.Path, settings: dict[str, Any]):
  """A run at Weights & Biases, the same one when the workdir's run goes on."""
  import wandb  # of the wandb extra

  local = "://" not in str(workdir)
  return wandb.init(
    project=project,
    name=workdir.name,
    id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16],
    resume="allow",
    config=settings,
    dir=str(workdir) if local else None,
  )


class Goodput:
  """Where the time of a run went, over all its starts: WORKDIR/goodput.json.

  "seconds" by phase: start (data, weights, teacher), restore, compile, step, data (waiting for it), evaluation, saving (what the
  steps wait for), end. "goodput" is the share of steps that count: those since the last checkpoint of a start that was killed are
  computed again.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    """`first_step`: updates already done."""
    self._before, self._first = (
      {"starts": 0, "seconds": {}, "steps": 0, "replayed_steps": 0, "reached": first_step},
      first_step,
    )
    path = workdir / "goodput.json"
    try:
      self._before |= json.loads(path.read_text()) if first_step else {}
    except (OSError, ValueError):
      pass  # none, or not whole: the account begins here
    self._replayed = max(0, self._before["reached"] - first_step)

  def read(self, step: int) -> dict[str, Any]:
    """The account after `step`."""
    spent = collections.Counter(self._before["seconds"])
    spent.update(supervision.seconds())
    steps, replayed = (
      self._before["steps"] + step - self._first,
      self._before["replayed_steps"] + self._replayed,
    )
    useful = spent["step"] * (1 - replayed / steps) if steps else 0.0
    return {
      "starts": self._before["starts"] + 1,
      "seconds": {name: round(value, 3) for name, value in spent.items()},
      "steps": steps,
      "replayed_steps": replayed,
      "reached": step,
      "goodput": round(useful / max(sum(spent.values()), 1e-9), 4),
    }

  def write(self, workdir: epath.Path, step: int) -> None:
    """Writes the account, as a whole or not at all."""
    text, path = json.dumps(self.read(step), indent=2), workdir / "goodput.json"
    if "://" in str(workdir):
      path.write_text(text)  # an object is there when it is whole
    else:
      temporary = path.with_suffix(".tmp")
      temporary.write_text(text)
      os.replace(temporary, path)

  def line(self, step: int) -> str:
    """For people: "goodput 91.3 %: step 300.1 s, compile 20.2 s, ...; 0 steps computed again"."""
    told = self.read(step)
    parts = ", ".join(
      f"{name} {value:.1f} s"
      for name, value in sorted(told["seconds"].items(), key=lambda item: -item[1])
    )
    return f"goodput {100 * told['goodput']:.1f} %: {parts}; {told['replayed_steps']} steps computed again, {told['starts']} starts"


class Clock:
  """Throughput of the steps alone: evaluations, checkpoints and compilation are left out."""

  def __init__(self, compiled, batch_size: int, accum_steps: int, mesh):
    self._batch_size, self._devices = batch_size, mesh.devices.flatten()
    # XLA's count is that of one device, and of one round of a loop: the optimiser, small beside it, is counted too often.
    self._flops = (compiled.cost_analysis() or {}).get("flops", 0.0) * accum_steps

  def start(self, step: int) -> None:
    self._step, (self._steps, self._waited) = step, self._seconds()

  def _seconds(self) -> tuple[float, float]:
    spent = supervision.seconds()
    return spent.get("step", 0.0) + spent.get("data", 0.0), spent.get("data", 0.0)

  def read(self, step: int) -> dict[str, float]:
    """Images per second since the last reading, share of the time spent waiting for data; MFU where the peak is known."""
    spent, waited = self._seconds()
    seconds = max(spent - self._steps, 1e-9)
    steps = step - self._step
    rate = steps * self._batch_size / seconds
    values = {"images_per_s": rate, "data_wait": min(1.0, (waited - self._waited) / seconds)}
    if len(self._devices) > 1:
      values["images_per_s_per_device"] = rate / len(self._devices)
    chip = hardware.find_chip(self._devices[0])
    if chip and self._flops:
      values["mfu"] = self._flops * steps / seconds / chip.peak_flops
    memory = (
      self._devices[0].memory_stats()
      if self._devices[0].process_index == jax.process_index()
      else None
    )
    if memory and "peak_bytes_in_use" in memory:
      values["device_gib"] = memory["peak_bytes_in_use"] / 2**30
    self.start(step)
    return values


def summary(workdir: str | Path) -> list[str]:
  """First and last value of each loss and evaluation of a run: "mimic: 1.9 at step 1, 0.4 at step 600"."""
  series = {}
  for record in read_metrics(workdir):
    for name, value in record.items():
      series.setdefault(name, []).append((record["step"], value))
  return [
    f"{name}: {points[0][1]:.4g} at step {points[0][0]}, {points[-1][1]:.4g} at step {points[-1][0]}"
    for name, points in series.items()
    if name not in NOT_RESULTS
  ]


def hms(seconds: float) -> str:
  """Hours, minutes and seconds: "1:02:03"."""
  seconds = round(seconds)
  return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
