"""Keeps a command alive whose console cannot be written: a full disk, a reader that went away."""

import contextlib
import logging
import os
import sys

from mrmae_jax.errors import one_line


def open_missing_streams() -> None:
  """Leads what a shell has closed (`>&-`) nowhere; else files would take the streams' numbers."""
  descriptor = 0
  while descriptor <= 2:
    descriptor = os.open(os.devnull, os.O_RDWR)
  os.close(descriptor)
  sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
  sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")


def show_warnings() -> None:
  """Prints what is logged as a warning, here or in a library, as a line that begins so."""
  logging.addLevelName(logging.WARNING, "warning")
  logging.basicConfig(format="%(levelname)s: %(message)s")


class SteadyStream:
  """A text stream that loses a line where the stream below it raises OSError.

  Attributes:
    problem: why text was lost, "" if none was or if the reader did not want it.
  """

  def __init__(self, stream):
    """`stream`: sys.stdout or sys.stderr, whose other methods and attributes stay as they are."""
    self._stream, self.problem = stream, ""

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes text, or loses it."""
    with self._losing():
      self._stream.write(text)
    return len(text)

  def writelines(self, lines) -> None:
    """Writes lines, or loses them."""
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    """Flushes what can be flushed."""
    with self._losing():
      self._stream.flush()

  @contextlib.contextmanager
  def _losing(self):
    try:
      yield
    except BrokenPipeError:
      pass
    except OSError as error:
      self.problem = one_line(error)


@contextlib.contextmanager
def steady_console():
  """Makes steady streams of sys.stdout and sys.stderr until the end of the block.

  Yields:
    That of sys.stdout.
  """
  streams = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = map(SteadyStream, streams)
  try:
    yield sys.stdout
  finally:
    sys.stdout, sys.stderr = streams
    for stream in streams:
      try:
        stream.flush()
      except OSError:  # else Python tries again at its end, and changes the exit code
        with contextlib.suppress(OSError):
          os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
