"""Folders on disk or in a bucket, as one kind of path; buckets that do not answer are found out early."""

import contextlib
import logging
import os
import queue
import threading
from pathlib import Path

from etils import epath

ANSWER_S = 15  # gcsfs alone would go on trying for most of a minute


def folder(address: str | Path) -> epath.Path:
  """A folder on disk or in a bucket (gs://BUCKET/FOLDER), there or not, as a path that can be read and written either way.

  Raises:
    ValueError: a bucket that cannot be reached, the home of a user who is unknown, or another kind of address.
  """
  text = str(address)
  if "://" not in text:
    try:
      return epath.Path(Path(text).expanduser().absolute())
    except RuntimeError as error:
      raise ValueError(f"{text}: {error}") from None
  if not text.startswith("gs://"):
    raise ValueError(f"{text}: folders on disk and gs:// buckets are supported")
  path, answers = epath.Path(text), queue.SimpleQueue()
  logging.getLogger("gcsfs").setLevel(
    logging.CRITICAL
  )  # it writes a traceback for every try, and then raises anyway

  def ask():
    try:
      path.exists()
      answers.put("")
    except (
      Exception
    ) as error:  # no gcsfs, no credentials, no such bucket, no network: each library has its own
      answers.put(" ".join(str(error).split())[:200] or type(error).__name__)

  threading.Thread(
    target=ask, daemon=True
  ).start()  # one that is left behind does not keep the process
  try:
    problem = answers.get(timeout=ANSWER_S)
  except queue.Empty:
    problem = f"no answer within {ANSWER_S} s"
  if problem:
    raise ValueError(
      f"{text} cannot be reached ({problem}); it needs pip install 'mrmae_jax[gcs]', and credentials: gcloud auth "
      "application-default login"
    )
  return path


@contextlib.contextmanager
def atomic_write(path: Path):
  """Yields a temporary name, which becomes `path` when the block succeeds and is deleted when it fails."""
  path.parent.mkdir(parents=True, exist_ok=True)
  tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield tmp
    tmp.replace(path)
  finally:
    tmp.unlink(missing_ok=True)
