"""Eight CPU devices in one process, so that sharding is tested everywhere; tests that need one device take the first.

Compiling is most of the time that small models take, so LLVM's optimisations are off.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
