"""Stops a process when it is asked to, ends it when it hangs, and accounts for its time.

Long work happens in named phases, and every loop in them calls `beat`. A beat is where the process
finds out that it was asked to stop (SIGTERM, SIGHUP, Ctrl-C), at a point that all hosts have agreed
on. A watching thread expects the beats. The seconds of the phases add up, see `log.Goodput`.

A process has one set of signal handlers, so the state here belongs to the process.
"""

import collections
import contextlib
import faulthandler
import os
import select
import signal
import threading
import time

import jax

from mrmae_jax.errors import Interrupted, LostError
from mrmae_jax.runs import distributed

EXIT_HANG = 6
POLL_S = 2.0  # between two checks of the other processes
GRACE_S = 3.0  # for a process to notice by itself that another one has failed


class _Process:
  """The state of this process."""

  def __init__(self):
    self.phases = ["start"]
    self.is_interruptible = False
    self.seconds = collections.Counter()
    self.phase_start = self.last_beat = time.monotonic()
    self.num_beats = 0
    self.signal_name = ""  # of the signal that asked the process to stop
    self.is_supervised = False

  def account(self) -> None:
    """Adds the time since the last call to the current phase; counts as a sign of life."""
    now = time.monotonic()
    self.seconds[self.phases[-1]] += now - self.phase_start
    self.phase_start = self.last_beat = now


_process = _Process()


@contextlib.contextmanager
def supervised(hang_s: float):
  """Handles signals, and expects beats, until the end of the block.

  A process without a beat for `hang_s` seconds writes the stacks of all its threads and ends with
  exit code 6. When another process of the run has failed, this one says so and ends too, instead of
  waiting for it.

  Args:
    hang_s: longest time between two beats; 0 for no limit.
  """
  global _process
  _process = _Process()
  read_fd, write_fd = os.pipe()
  os.set_blocking(write_fd, False)
  numbers = [signal.SIGINT]
  if jax.process_count() == 1:  # of several processes JAX handles SIGTERM: it tells the others
    numbers.append(signal.SIGTERM)
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
    numbers.append(signal.SIGHUP)
  previous_handlers = {number: signal.signal(number, _on_signal) for number in numbers}
  previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
  end = threading.Event()
  watcher = threading.Thread(target=_watch, args=(read_fd, hang_s, end), daemon=True)
  watcher.start()
  _process.is_supervised = True
  try:
    yield
  finally:
    _process.is_supervised = False
    end.set()
    signal.set_wakeup_fd(previous_fd)
    for number, handler in previous_handlers.items():
      signal.signal(number, handler)
    os.write(write_fd, b"\0")  # wakes the watcher
    watcher.join()
    os.close(read_fd)
    os.close(write_fd)


@contextlib.contextmanager
def phase(name: str, interruptible: bool = False):
  """Names the work of a block. Phases may be nested; the time counts for the innermost.

  Args:
    name: of the phase, for messages and the account of time.
    interruptible: a signal ends the process at once, without waiting for a beat, because nothing
      would be lost. Of several processes it still waits: they stop at the same beat.
  """
  outer = _process.is_interruptible
  _process.account()
  _process.phases.append(name)
  _process.is_interruptible = interruptible
  try:
    yield
  finally:
    _process.account()
    _process.phases.pop()
    _process.is_interruptible = outer


def beat() -> None:
  """Shows that this process is making progress.

  Several processes must all call it equally often: they stop at the same call.

  Raises:
    Interrupted: a signal asked the process to stop.
  """
  _process.last_beat = time.monotonic()
  _process.num_beats += 1
  if not _process.is_supervised:
    return
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils  # slow to import, and one process needs none

    if multihost_utils.reached_preemption_sync_point(_process.num_beats):
      raise Interrupted("a process was asked to stop")
  elif _process.signal_name:
    raise Interrupted(_process.signal_name)


def seconds() -> dict[str, float]:
  """Returns how long each phase has taken."""
  _process.account()
  return dict(_process.seconds)


def _on_signal(number, frame) -> None:
  del frame
  if _process.signal_name == "SIGINT" and number == signal.SIGINT:
    _say("again: ending at once, nothing more is saved")
    os._exit(128 + number)
  _process.signal_name = signal.Signals(number).name
  if jax.process_count() > 1:
    os.kill(os.getpid(), signal.SIGTERM)  # JAX passes it on
  hint = " (press Ctrl-C again to end at once)" if number == signal.SIGINT else ""
  _say(f"{_process.signal_name}: stopping at the next step{hint}")


def _say(text: str) -> None:
  with contextlib.suppress(OSError):  # a full disk, or a terminal that is closed
    os.write(2, f"{text}\n".encode())  # the signal may interrupt a print


def _watch(read_fd: int, hang_s: float, end: threading.Event) -> None:
  """Runs in the watching thread until `end`."""
  poll_s = min(POLL_S, hang_s / 4) if hang_s else POLL_S
  last_check = time.monotonic()
  while True:
    has_signal = bool(select.select([read_fd], [], [], poll_s)[0])
    if has_signal:
      os.read(read_fd, 64)
    if end.is_set():
      return
    if has_signal and _process.is_interruptible and jax.process_count() == 1:
      _say(f"stopped during {_process.phases[-1]}: nothing is lost; run the same command to resume")
      os._exit(Interrupted.exit_code)
    now = time.monotonic()
    if hang_s and now - _process.last_beat > hang_s:
      _end_hanging(now - _process.last_beat)
    if now - last_check >= POLL_S:
      last_check = now
      # A process that is about to fail for the same reason gets time to give its own error.
      if distributed.who_left() and not end.wait(GRACE_S):
        if failures := distributed.who_left():
          _say(f"error: {_prefix()}{failures}; this process ends too")
          distributed.leave(LostError.exit_code, "it followed another")


def _end_hanging(idle_s: float) -> None:
  """Writes the stacks of all threads and ends the process."""
  _say(
    f"error: {_prefix()}nothing has happened for {idle_s:.0f} s in phase {_process.phases[-1]!r} "
    f"(after {_process.num_beats} beats); the stacks of all threads:"
  )
  faulthandler.dump_traceback(file=2, all_threads=True)
  os._exit(EXIT_HANG)


def _prefix() -> str:
  return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
