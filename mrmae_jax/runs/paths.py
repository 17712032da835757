"""Opens folders on disk and in buckets as one kind of path, and writes files atomically.

Files that may come from a stranger are opened by `open_regular` or `read_regular` alone.

A file that is written atomically survives a loss of power, too: when the function returns, the file
and its name are on the disk.
"""

import contextlib
import errno
import fcntl
import logging
import os
import queue
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from mrmae_jax.errors import UsageError, WorkdirError, one_line

MAX_BYTES = 4 * 2**30  # of a file that is read as a whole, such as COCO's annotations
ANSWER_S = 15  # gcsfs alone would retry for most of a minute
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}  # answers to an fsync


def is_bucket(address: str | Path) -> bool:
  """Returns whether an address is in a bucket, not on a disk."""
  return "://" in str(address)


def is_file(path: epath.Path) -> bool:
  """Returns whether a path is that of a file; epath takes pipes and devices for files."""
  return path.is_file() if is_bucket(path) else os.path.isfile(path)


def describe_irregular(path: str | Path, most: float = MAX_BYTES) -> str:
  """Returns why a file must not be read, "is a pipe; ..."; "" for a regular one of `most` bytes.

  A pipe or a device would be read for ever, and a file with holes would fill the memory.

  Raises:
    OSError: there is no such file.
  """
  if is_bucket(path):
    return ""
  info = os.stat(path)
  if not stat.S_ISREG(info.st_mode):
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return f"is {kinds.get(stat.S_IFMT(info.st_mode), 'a device')}; expected a file"
  return f"has {info.st_size:,} bytes; at most {most:,} are read" if info.st_size > most else ""


def open_regular(path: Path, most: float = MAX_BYTES) -> BinaryIO:
  """Opens a file for reading bytes.

  Raises:
    OSError: it cannot be read, or is no regular file of at most `most` bytes.
  """
  if problem := describe_irregular(path, most):
    raise OSError(f"{path} {problem}")
  return path.open("rb")


def read_regular(path: Path) -> bytes:
  """Returns the content of a file; raises what `open_regular` raises."""
  with open_regular(path) as file:
    return file.read()


def find_special(folder: str | Path, links: bool = False) -> list[str]:
  """Returns what is neither a file nor a folder below `folder`: pipes, sockets, devices.

  Args:
    folder: need not exist.
    links: those that lead to a file or a folder, too.
  """
  found = []
  for root, folders, names in os.walk(folder):
    for path in (os.path.join(root, name) for name in (*folders, *names)):
      is_plain = os.path.isfile(path) or os.path.isdir(path)
      if (links and os.path.islink(path)) if is_plain else os.path.lexists(path):  # may be gone now
        found.append(path)
  return sorted(os.path.relpath(path, folder) for path in found)


def open_folder(address: str | Path) -> epath.Path:
  """Returns a folder on disk or in a bucket as a path for reading and writing; it need not exist.

  Args:
    address: a path, which may begin with ~, or gs://BUCKET/FOLDER.

  Raises:
    WorkdirError: a bucket that cannot be reached, the home of an unknown user, or another kind of
      address.
  """
  text = str(address)
  if not is_bucket(text):
    try:
      return epath.Path(Path(text).expanduser().absolute())
    except RuntimeError as error:
      raise WorkdirError(f"{text}: {error}") from None
  if not text.startswith("gs://"):
    raise WorkdirError(f"{text}: folders on disk and gs:// buckets are supported")
  if problem := _bucket_problem(epath.Path(text)):
    raise WorkdirError(
      f"{text} cannot be reached ({problem}); it needs pip install 'mrmae_jax[gcs]', and "
      "credentials: gcloud auth application-default login"
    )
  return epath.Path(text)


def _bucket_problem(path: epath.Path) -> str:
  """Returns why a bucket cannot be reached, or "" if it can."""
  # gcsfs writes a traceback for every attempt, and then raises anyway.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  answers = queue.SimpleQueue()

  def ask():
    try:
      path.exists()
      answers.put("")
    except Exception as error:  # gcsfs, credentials, bucket or network: each has its own types
      answers.put(one_line(error))

  threading.Thread(target=ask, daemon=True).start()  # a daemon does not keep the process alive
  try:
    return answers.get(timeout=ANSWER_S)
  except queue.Empty:
    return f"no answer within {ANSWER_S} s"


def find_folder(path: Path) -> Path:
  """Returns the nearest of a path and its parents that exists."""
  while not path.exists():
    path = path.parent
  return path


def describe_unwritable(folder: Path) -> str:
  """Returns why a folder, which need not exist, cannot be written to, e.g. "/x is not a folder";
  "" if it can.
  """
  parent = find_folder(folder)
  if not parent.is_dir():
    return f"{parent} is not a folder"
  return "" if os.access(parent, os.W_OK) else f"{parent} is not writable"


def require_writable(path: str | Path) -> None:
  """Raises UsageError if a file or folder could not be made: before hours of work, not after.

  Args:
    path: on a disk; it and the folders above it need not exist.
  """
  place = Path(os.path.expanduser(path)).absolute()
  # Another file takes the place of a file.
  if problem := describe_unwritable(place.parent if place.is_file() else place):
    raise UsageError(f"{path} cannot be written: {problem}")


@contextlib.contextmanager
def atomic_write(path: str | Path, lasting: bool = True) -> Iterator[Path]:
  """Yields a temporary path, which replaces `path` when the block ends well.

  When the block raises, the temporary file is deleted and `path` stays as it was. What a process
  that was killed has left goes with the next write of the same file.

  Args:
    path: of the file.
    lasting: whether it must survive a loss of power, which takes some milliseconds.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _temporary(path, is_folder=False) as tmp:
    yield tmp
    if lasting:
      sync(tmp)
    tmp.replace(path)
    if lasting:
      sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
  """Yields a folder that becomes `path` when the block ends, and vanishes if the block raises.

  Args:
    path: of the folder.
    replace: takes the place of an earlier folder.

  Raises:
    FileExistsError: `path` exists, and `replace` is False.
  """
  if path.exists() and not replace:
    raise FileExistsError(f"{path} exists; give another name or remove it")
  path.parent.mkdir(parents=True, exist_ok=True)
  with _temporary(path, is_folder=True) as tmp:
    yield tmp
    sync_tree(tmp)
    old = tmp.with_suffix(".old")
    if path.exists():
      path.rename(old)
    tmp.rename(path)
    sync(path.parent)
    _remove(old)


@contextlib.contextmanager
def _temporary(path: Path, is_folder: bool) -> Iterator[Path]:
  """Yields a new file or folder beside `path`, and removes it unless the block renames it.

  The process holds its lock (flock). This tells it from a leftover, whose process was killed.
  """
  _remove_leftovers(path)
  tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  if is_folder:
    tmp.mkdir()
  flags = os.O_RDONLY if is_folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
  descriptor = os.open(tmp, flags, 0o666)
  try:
    with contextlib.suppress(OSError):  # some file systems have no locks; leftovers stay there
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield tmp
  finally:
    _remove(tmp)
    os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
  """Removes what `_temporary` has left beside `path` in processes that were killed; no links."""
  ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+\.(tmp|old)")
  with os.scandir(path.parent) as entries:
    found = [entry for entry in entries if ours.fullmatch(entry.name) and not entry.is_symlink()]
  for entry in found:
    access = os.O_RDONLY if entry.is_dir() else os.O_RDWR
    # An error is the lock of a living process, a file that is gone, or one of somebody else.
    with contextlib.suppress(OSError):
      descriptor = os.open(entry.path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(Path(entry.path))
      finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
  """Removes a file or a folder that may be gone; of a link, the link."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk.

  Some file systems have no such promise; there it does nothing.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in NOT_SUPPORTED:
      raise
  finally:
    os.close(descriptor)


def sync_tree(folder: str | Path) -> None:
  """Waits until a folder is on the disk with everything in it."""
  for root, _, names in os.walk(folder, topdown=False):
    for name in names:
      sync(os.path.join(root, name))
    sync(root)


def write_text(path: epath.Path, text: str, lasting: bool = True) -> None:
  """Writes a text file atomically, on disk or in a bucket; `lasting` as in `atomic_write`."""
  write_bytes(path, text.encode(errors="surrogateescape"), lasting)


def write_bytes(path: epath.Path, content: bytes, lasting: bool = True) -> None:
  """Writes a file as `write_text` does."""
  if is_bucket(path):
    path.write_bytes(content)  # an object appears when it is complete
    return
  with atomic_write(path, lasting) as tmp:
    tmp.write_bytes(content)
