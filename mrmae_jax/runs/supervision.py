"""A process that stops when it is asked to, does not hang in silence, and knows where its time went.

Long work happens in named phases, and every loop in them calls `beat`. That is where the process finds out that it was asked to
stop (SIGTERM, Ctrl-C), at a point that all hosts have agreed on, and how a watching thread knows that it is alive. The seconds
that phases took add up; see `metrics.Log.goodput`.

A process has one set of signals, so what is kept here is kept for the process.
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
POLL_S = 2.0  # between two looks at the other processes


class _Process:
  """What is known of this process."""

  def __init__(self):
    self.phases, self.at_once = ["start"], False
    self.seconds, self.since = collections.Counter(), time.monotonic()
    self.last_beat = self.since
    self.beats, self.asked = 0, ""  # `asked`: the signal's name
    self.watched = False

  def account(self) -> None:
    now = time.monotonic()
    self.seconds[self.phases[-1]] += now - self.since
    self.since = self.last_beat = now


_process = _Process()


@contextlib.contextmanager
def supervised(hang_s: float):
  """Listens to signals, and watches that beats keep coming, until the end of the block.

  A process that shows no beat for `hang_s` seconds writes the stacks of all its threads and ends with exit code 6. When another
  process of the run has left with an error, this one says so and ends too, instead of waiting for it.

  Args:
    hang_s: see above; 0: for ever.
  """
  global _process
  _process = _Process()
  hear, tell = os.pipe()
  os.set_blocking(tell, False)
  previous = {
    number: signal.signal(number, _on_signal)
    for number in (signal.SIGINT, signal.SIGTERM)
    if jax.process_count() == 1 or number == signal.SIGINT
  }  # SIGTERM of several is JAX's: it tells the others
  wakeup = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
  end = threading.Event()
  watcher = threading.Thread(target=_watch, args=(hear, hang_s, end), daemon=True)
  watcher.start()
  _process.watched = True
  try:
    yield
  finally:
    _process.watched = False
    end.set()
    signal.set_wakeup_fd(wakeup)
    for number, handler in previous.items():
      signal.signal(number, handler)
    os.write(tell, b"\0")
    watcher.join()
    os.close(hear)
    os.close(tell)


@contextlib.contextmanager
def phase(name: str, at_once: bool = False):
  """Work of one kind. Phases may lie in each other; the time counts for the innermost.

  Args:
    name: of the phase, for messages and the account of time.
    at_once: nothing would be lost, so a signal ends the process without waiting for a beat (of one process; several agree).
  """
  before = _process.at_once
  _process.account()
  _process.phases.append(name)
  _process.at_once = at_once
  try:
    yield
  finally:
    _process.account()
    _process.phases.pop()
    _process.at_once = before


def beat() -> None:
  """This process is getting on.

  With several processes, all call it equally often: they stop at the same call.

  Raises:
    Interrupted: it was asked to stop.
  """
  _process.last_beat = time.monotonic()
  _process.beats += 1
  if not _process.watched:
    return
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils  # slow, and one process needs it not

    if multihost_utils.reached_preemption_sync_point(_process.beats):
      raise Interrupted("a process was asked to stop")
  elif _process.asked:
    raise Interrupted(_process.asked)


def seconds() -> dict[str, float]:
  """How long each phase took so far."""
  _process.account()
  return dict(_process.seconds)


def _on_signal(number, frame) -> None:
  del frame
  if _process.asked == "SIGINT" and number == signal.SIGINT:
    _say("again: ending at once, nothing more is saved")
    os._exit(128 + number)
  _process.asked = signal.Signals(number).name
  if jax.process_count() > 1:
    os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on
  _say(
    f"{_process.asked}: stopping at the next step"
    + (" (once more: at once)" if number == signal.SIGINT else "")
  )


def _say(text: str) -> None:
  os.write(2, f"{text}\n".encode())  # the signal may have come in the middle of a print


def _watch(hear: int, hang_s: float, end: threading.Event) -> None:
  """The watching thread."""
  looked = time.monotonic()
  while True:
    heard, _, _ = select.select([hear], [], [], min(POLL_S, hang_s / 4) if hang_s else POLL_S)
    if heard:
      os.read(hear, 64)
    if end.is_set():
      return
    now = time.monotonic()
    if heard and _process.at_once and jax.process_count() == 1:
      _say(f"stopped during {_process.phases[-1]}: nothing is lost, the same command goes on")
      os._exit(Interrupted.exit_code)
    if hang_s and now - _process.last_beat > hang_s:
      _say(
        f"error: {_name()}nothing has happened for {now - _process.last_beat:.0f} s in phase {_process.phases[-1]!r} (after "
        f"{_process.beats} beats); the stacks of all threads:"
      )
      faulthandler.dump_traceback(file=2, all_threads=True)
      os._exit(EXIT_HANG)
    if now - looked >= POLL_S:
      looked, gone = now, distributed.who_left()
      if (
        gone and not end.wait(3) and distributed.who_left()
      ):  # this process may have been about to find out itself
        _say(f"error: {_name()}{gone}; this process ends too")
        distributed.leave(LostError.exit_code, "it followed another")


def _name() -> str:
  return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
