"""Writes TensorBoard's event files, without TensorFlow and without a thread.

tensorboardX's own writer hands events to a thread. On a full disk that thread ends, its queue
fills up, and the training waits for it for ever. Here an error comes where the event is written.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

FLUSH_EVERY_S = 30


def _import_tensorboardx():
  # tensorboardX imports torch where it is installed, which takes seconds and hundreds of megabytes
  # and serves nothing here. A None in sys.modules makes "import torch" an ImportError.
  has_torch = "torch" in sys.modules
  if not has_torch:
    sys.modules["torch"] = None
  try:
    import tensorboardX.summary
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2
  finally:
    if not has_torch:
      del sys.modules["torch"]
  return event_file_writer, event_pb2, tensorboardX.summary


class EventFile:
  """One event file in a folder. Every method raises OSError when the disk does not take it."""

  def __init__(self, folder: Path, purge_step: int = 0):
    """Opens a new file; TensorBoard drops earlier events from `purge_step` on, 0 for none."""
    writers, self._protos, self._summary = _import_tensorboardx()
    folder.mkdir(parents=True, exist_ok=True)
    # The second in the file's name is not enough where a file is opened anew at once.
    suffix = f".{os.getpid()}.{time.monotonic_ns()}"
    self._folder = folder
    self._file = writers.EventsWriter(str(folder / "events"), suffix)
    try:
      if purge_step:
        start = self._protos.SessionLog(status=self._protos.SessionLog.START)
        self._write(purge_step, session_log=start)
      self.flush()  # so that a disk without space is noticed here
    except OSError:
      for path in folder.glob(f"events*{suffix}"):
        path.unlink(missing_ok=True)
      raise

  def _write(self, step: int | None = None, **content) -> None:
    event = self._protos.Event(wall_time=time.time(), step=step, **content)
    self._file.write_event(event)

  def add_scalars(self, values: dict[str, float], step: int) -> None:
    """Writes numbers by name."""
    for name, value in values.items():
      self._write(step, summary=self._summary.scalar(name, value))
    if time.monotonic() - self._last_flush > FLUSH_EVERY_S:
      self.flush()

  def add_image(self, name: str, picture: np.ndarray, step: int) -> None:
    """Writes a picture, uint8 [H, W, 3]."""
    self._write(step, summary=self._summary.image(name, picture, dataformats="HWC"))
    self.flush()

  def add_hyperparameters(self, settings: dict, results: dict[str, float]) -> None:
    """Writes the settings of a run beside its results, into a file of their own."""
    file = EventFile(self._folder / "hparams")
    for summary in self._summary.hparams(settings, results):
      file._write(summary=summary)
    file.add_scalars(results, 0)
    file.close()

  def flush(self) -> None:
    """Brings everything to the disk."""
    self._file.flush()
    self._last_flush = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()
