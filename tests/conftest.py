"""Eight CPU devices in one process, so that sharding is tested everywhere; tests that need one
device take the first.

Compiling is most of the time that small models take: LLVM's optimisations are off, and what one
  test or its subprocess has compiled the next one finds in a cache of this session.
"""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
if (
  "PYTEST_XDIST_WORKER" not in os.environ
):  # the workers share the cache of the process that starts them
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mrmae_jax_cache")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
