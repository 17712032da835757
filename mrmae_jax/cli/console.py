"""Keeps a training alive whose console cannot be written: a full disk, a reader that went away."""

import contextlib
import os
import sys


class SteadyStream:
  """A text stream that loses a line where the stream below it raises OSError."""

  def __init__(self, stream):
    """`stream`: sys.stdout or sys.stderr, whose other methods and attributes stay as they are."""
    self._stream = stream

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes text, or loses it."""
    with contextlib.suppress(OSError):
      self._stream.write(text)
    return len(text)

  def writelines(self, lines) -> None:
    """Writes lines, or loses them."""
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    """Flushes what can be flushed."""
    with contextlib.suppress(OSError):
      self._stream.flush()


@contextlib.contextmanager
def steady_console():
  """Makes steady streams of sys.stdout and sys.stderr until the end of the block."""
  streams = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = map(SteadyStream, streams)
  try:
    yield
  finally:
    sys.stdout, sys.stderr = streams
    for stream in streams:
      try:
        stream.flush()
      except OSError:  # else Python tries again at its end, and changes the exit code
        with contextlib.suppress(OSError):
          os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
