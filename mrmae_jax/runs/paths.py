"""Opens folders on disk and in buckets as one kind of path, and writes files atomically.

A file that is written atomically survives a loss of power, too: when the function returns, the file
and its name are on the disk.
"""

import contextlib
import errno
import logging
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from mrmae_jax.errors import WorkdirError, one_line

ANSWER_S = 15  # gcsfs alone would retry for most of a minute
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}  # answers to an fsync


def is_bucket(address: str | Path) -> bool:
  """Returns whether an address is in a bucket, not on a disk."""
  return "://" in str(address)


def is_file(path: epath.Path) -> bool:
  """Returns whether a path is that of a file; epath takes pipes and devices for files."""
  return path.is_file() if is_bucket(path) else os.path.isfile(path)


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


@contextlib.contextmanager
def atomic_write(path: str | Path, lasting: bool = True):
  """Yields a temporary path, which replaces `path` when the block ends well.

  When the block raises, the temporary file is deleted and `path` stays as it was.

  Args:
    path: of the file.
    lasting: whether it must survive a loss of power, which takes some milliseconds.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield tmp
    if lasting:
      sync(tmp)
    tmp.replace(path)
    if lasting:
      sync(path.parent)
  finally:
    tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
  """Yields a folder that becomes `path` when the block ends, and vanishes if the block raises.

  Raises:
    FileExistsError: `path` exists.
  """
  if path.exists():
    raise FileExistsError(f"{path} exists; give another name or remove it")
  tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  tmp.mkdir(parents=True)
  try:
    yield tmp
    sync_tree(tmp)
    tmp.rename(path)
    sync(path.parent)
  finally:
    shutil.rmtree(tmp, ignore_errors=True)


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
  if is_bucket(path):
    path.write_text(text, encoding="utf-8")  # an object appears when it is complete
    return
  with atomic_write(path, lasting) as tmp:
    tmp.write_text(text, encoding="utf-8")
