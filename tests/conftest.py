"""Eight CPU devices in one process, so that sharding is tested everywhere; tests that need one
device take the first.

Compiling is most of the time that small models take: what one test or its program has compiled
the next one finds in a cache of this session.
"""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers.programs import fork_workers, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# No lines of Python in programs: 4 % of a trace.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of their parent
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mrmae_jax_cache")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

fork_workers()

# The files that take longest begin first, so that no process works alone at the end.
LONGEST = ("multihost", "process_faults", "train", "self_distill", "buckets", "compile", "channels")
LONGEST += ("tricks", "teachers", "weights", "visualize")  # else among the last ones


def pytest_collection_modifyitems(items):
  """Puts the tests of the files of LONGEST first, and leaves all others in their order."""
  rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def resident_bytes() -> int:
  """Returns how much memory this process holds (Linux)."""
  with open("/proc/self/statm") as statm:
    return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


limit = 1.0e9  # bytes; see below


@pytest.fixture(autouse=True)
def forget_compiled_programs():
  """Keeps a worker at about 1 GB: compiled programs are most of what it holds.

  Forgetting takes half a second: where it leaves more than that, it waits until more has come.
  """
  yield
  global limit
  if "jax" not in sys.modules or sys.platform != "linux" or resident_bytes() < limit:
    return
  sys.modules["jax"].clear_caches()
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
  limit = max(1.0e9, resident_bytes() + 0.15e9)


@pytest.fixture
def examine(tmp_path, capsys, monkeypatch):
  """Runs doctor on the tiny configuration with overrides: exit code, and its lines."""
  from tests.helpers.cli import run_command  # imports jax, which reads the environment above

  monkeypatch.chdir(Path(__file__).parent.parent)

  def run(*arguments, workdir=tmp_path / "run", config="tests/tiny.py:vit"):
    words = [f"--config={config}", *([f"--workdir={workdir}"] if workdir else [])]
    words += [f"--config.{w}" if "=" in w and not w.startswith("--") else w for w in arguments]
    code = run_command(["doctor", "--no-compile", *words])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err

  return run
