"""Prepares the folder of a run: writable, and locked by one run at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

import jax
from etils import epath

from mrmae_jax.errors import WorkdirError, one_line, printable
from mrmae_jax.runs import distributed
from mrmae_jax.runs.paths import find_special, is_bucket, open_folder

# How long to wait for a holder on another host: a run that was requeued may need this long to end.
PATIENCE_S = 40
SEEN_S = 10  # until every host sees a file that process 0 has written to a network disk
POLL_S = 1  # between two attempts
MAX_NAMES = 3  # that a message lists


def prepare_workdir(workdir: str | Path) -> None:
  """Creates the folder of a run and tries to write to it: the first checkpoint may be hours away.

  Raises:
    WorkdirError: the folder cannot be reached or written to.
  """
  folder = open_folder(workdir)
  if not _has_utf8_name(str(folder)):
    raise WorkdirError(
      f"{ascii(str(folder))}: this locale does not write the name in UTF-8, without which no "
      "checkpoint can be saved; set LC_ALL=C.UTF-8, or choose a name of plain letters"
    )
  probe, hint = folder / f".write_test_{jax.process_index()}", ""
  if is_bucket(workdir):
    hint = ": does the bucket exist, and may this account create objects in it?"
  elif problem := describe_special(folder):
    raise WorkdirError(problem)
  try:
    # A bucket has no folders, and gcsfs would create a bucket that does not exist.
    if not is_bucket(workdir):
      folder.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()
  except Exception as error:  # OSError; libraries of buckets have types of their own
    raise WorkdirError(f"cannot write to {workdir} ({one_line(error)}){hint}") from None


def describe_special(folder: epath.Path) -> str:
  """Returns what in a workdir no run has written, and must not write to; "" for nothing.

  The links of Weights & Biases are its own.
  """
  found = [x for x in find_special(folder, links=True) if not x.startswith(f"wandb{os.sep}")]
  if not found:
    return ""
  more = f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else ""
  return (
    f"{folder} holds links, pipes or devices ({', '.join(found[:MAX_NAMES])}{more}), and a run "
    "would write and delete files where links lead, and wait for pipes; remove them, or make the "
    "whole folder a link"
  )


def _has_utf8_name(path: str) -> bool:
  """Returns whether Python and the libraries that save checkpoints spell a path alike."""
  try:
    return os.fsencode(path) == path.encode()
  except UnicodeEncodeError:
    return False


@contextlib.contextmanager
def lock_workdir(workdir: str | Path):
  """Keeps other runs out of a folder until the end of the block. Process 0 locks for all.

  The lock is the operating system's (flock on WORKDIR/lock), so it ends with the process, however
  the process ends. The file names the holder. Buckets and some network file systems have no locks:
  there the block runs without one.

  Yields:
    A warning if the previous run ended without releasing the folder, else "".

  Raises:
    WorkdirError: another run holds the folder.
  """
  if is_bucket(workdir) or jax.process_index():
    yield ""
    return
  with open(Path(workdir).expanduser() / "lock", "a+", encoding="utf-8") as file:
    if not _acquire(file, workdir):
      yield ""
      return
    previous = read_holder(file)
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    _write_holder(file, json.dumps(holder))
    warning = f"the previous run ({previous}) did not shut down cleanly; taking over its lock"
    try:
      yield warning if previous else ""
    finally:
      _write_holder(file, "")


def check_shared(workdir: str | Path) -> None:
  """Checks that all processes see the folder that process 0 has locked.

  Two disks may have a folder of the same name. A checkpoint of both together is none.

  Raises:
    DistributedError: on every process, if one of them has another folder.
  """
  if is_bucket(workdir) or jax.process_count() == 1:
    return
  path = Path(workdir).expanduser().absolute()

  def read():
    try:
      return (path / "lock").read_text()
    except (OSError, ValueError):
      return ""

  first = json.loads(distributed.exchange("lock", json.dumps([str(path), read()]))[0])
  end = time.monotonic() + SEEN_S
  while read() != first[1] and time.monotonic() < end:
    time.sleep(POLL_S)
  problem = "" if read() == first[1] else f"{path} is not {first[0]} of process 0; share one folder"
  distributed.agree("workdir", {}, error=problem)


def _acquire(file: TextIO, workdir: str | Path) -> bool:
  """Locks the open file; returns False where the file system has no locks.

  The library filelock names no holder beside flock. Where there is no flock it leaves a marker,
  which would outlive a run that was killed.
  """
  end = time.monotonic() + PATIENCE_S
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      holder = read_holder(file)
      if f" on {socket.gethostname()} " in holder or time.monotonic() > end:
        raise WorkdirError(
          f"{workdir} is in use by {holder}; stop that run, or choose another --workdir"
        ) from None
      time.sleep(POLL_S)
    except OSError:
      return False


def read_holder(file: TextIO) -> str:
  """Returns the process that the lock file names; "" if it names none."""
  file.seek(0)
  try:
    holder = json.loads(file.read())
    return printable(f"process {holder['pid']} on {holder['host']} since {holder['since']}")
  except (ValueError, KeyError, TypeError, RecursionError):
    return ""


def _write_holder(file: TextIO, text: str) -> None:
  file.seek(0)
  file.truncate()
  file.write(text)
  file.flush()
