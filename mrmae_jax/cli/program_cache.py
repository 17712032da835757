"""Compiled programs are kept in a folder of the user, so that a second start does not compile.

JAX's own persistent compilation cache does the work; it reads its settings when it is imported.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

import filelock

LARGEST = 2 * 2**30  # bytes; the programs that were not used for longest go first
SHORTEST_S = 0.2  # a program that compiles faster is compiled again
FOLDER = "mrmae_jax/programs"


def keep_programs(environ: MutableMapping[str, str] = os.environ) -> None:
  """Sets the compilation cache of JAX, which is not imported yet, unless the user has set one.

  The folder is `mrmae_jax/programs` in $XDG_CACHE_HOME or ~/.cache. It must belong to the user and
  be closed to others, since whoever writes there decides what runs. Where it does not, or cannot
  be made, nothing is kept.
  """
  if "JAX_COMPILATION_CACHE_DIR" in environ:
    return
  folder = Path(environ.get("XDG_CACHE_HOME") or "~/.cache", FOLDER)
  try:
    folder = folder.expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
      return
    _remove_unfinished(folder)
  except (OSError, RuntimeError):  # no room, no permission, no home
    return
  environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LARGEST))
  environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SHORTEST_S))


def _remove_unfinished(folder: Path) -> None:
  """Removes programs whose writing was cut short: JAX writes the time of use after the program.

  It would neither read nor replace them, and stop making room. A loss of power leaves empty ones.
  """
  lock = filelock.FileLock(folder / ".lockfile")  # JAX's own
  try:
    with lock.acquire(timeout=0):
      for program in folder.glob("*-cache"):
        time_of_use = program.with_name(program.name.removesuffix("cache") + "atime")
        is_whole = program.is_file() and program.stat().st_size
        if not is_whole or not time_of_use.is_file() or time_of_use.stat().st_size != 8:
          program.unlink()
          time_of_use.unlink(missing_ok=True)
  except filelock.Timeout:  # another process reads or writes
    pass
