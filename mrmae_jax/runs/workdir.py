"""The folder of a run: found, proved writable, and held by one run at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from pathlib import Path

import jax

from mrmae_jax.errors import WorkdirError
from mrmae_jax.runs.paths import open_folder

PATIENCE_S = 40  # with a holder on another host: one whose run was put back into the queue may need so long to end


def prepare_workdir(workdir: str | Path) -> None:
  """Makes the folder of a run, and sure that this process can write to it: the first checkpoint may be hours away.

  Raises:
    WorkdirError: it cannot be reached or written to.
  """
  folder = open_folder(workdir)
  probe = folder / f".write_test_{jax.process_index()}"
  try:
    if "://" not in str(
      workdir
    ):  # a bucket has no folders, and gcsfs would create a bucket that is not there
      folder.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()
  except Exception as error:  # OSError; libraries of buckets have their own
    hint = (
      ": does the bucket exist, and may this account create objects in it?"
      if "://" in str(workdir)
      else ""
    )
    raise WorkdirError(
      f"cannot write to {workdir} ({' '.join(str(error).split())[:200]}){hint}"
    ) from None


@contextlib.contextmanager
def held(workdir: str | Path):
  """Keeps other runs out of a folder until the end of the block; process 0 does it for all.

  The lock is the operating system's (flock on WORKDIR/lock), so it ends with the process, however that ends. The file says who
  holds it. A bucket knows no locks, nor do some network file systems: there nothing is held.

  Yields:
    A line for the log if the run before ended without giving the folder up; "" if all is as it should be.

  Raises:
    WorkdirError: another run holds it.
  """
  if "://" in str(workdir) or jax.process_index():
    yield ""
    return
  with open(Path(workdir).expanduser() / "lock", "a+", encoding="utf-8") as file:
    end = time.monotonic() + PATIENCE_S
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        before = _holder(file)
        if f" on {socket.gethostname()} " in before or time.monotonic() > end:
          raise WorkdirError(
            f"{workdir} is in use by {before}; stop that run, or choose another --workdir"
          ) from None
        time.sleep(1)
      except OSError:  # no locks on this file system
        yield ""
        return
    before = _holder(file)
    _write(
      file,
      json.dumps(
        {
          "host": socket.gethostname(),
          "pid": os.getpid(),
          "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
      ),
    )
    try:
      yield f"the run before, {before}, ended without a word; its place is taken" if before else ""
    finally:
      _write(file, "")


def _holder(file) -> str:
  file.seek(0)
  try:
    said = json.loads(file.read())
    return f"process {said['pid']} on {said['host']} since {said['since']}"
  except (ValueError, KeyError, TypeError):
    return ""


def _write(file, text: str) -> None:
  file.seek(0)
  file.truncate()
  file.write(text)
  file.flush()
