"""Programs that tests start: real processes, forked from one parent that has imported everything.

A program spends seconds on imports before its first step. The parent, one for each pytest worker,
imports once and never touches a device, so that a child begins where `python -m mrmae_jax` has just
imported: with its own arguments, environment, folder, output and session.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

# Tracing makes objects by the million, hardly ever in cycles: looking for those was a tenth of the
# time. Workers and programs both come by here.
gc.set_threshold(100_000, 50, 50)

ROOT = Path(__file__).parent.parent.parent
IMPORTED = (
  "mrmae_jax.cli.train",
  "mrmae_jax.data.sources.digits",  # scikit-learn: 2 s
  "mrmae_jax.tasks.finetune",
  "mrmae_jax.tasks.pretrain",
  "mrmae_jax.tasks.probe",
  "mrmae_jax.tasks.self_distill",
  "tensorboardX.summary",
)


def fork_workers() -> None:
  """Forks the worker processes of loaders from the parent too, instead of spawning them.

  Each would import jax and grain for two seconds. Programs spawn theirs as users do.
  """
  get_context = multiprocessing.get_context
  context = get_context("forkserver")
  context.set_forkserver_preload([*IMPORTED, __name__])
  context.set_forkserver_preload = lambda modules: None  # there is one parent, for all
  multiprocessing.get_context = lambda method=None: get_context(
    "forkserver" if method == "spawn" else method
  )


def xla_flags(devices: int) -> str:
  """Returns XLA_FLAGS for small models, whose time goes into compiling them.

  LLVM optimizes nothing, and the old emitters of XLA generate several times less code.
  """
  return (
    f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  )


class Program:
  """A running program, with the methods of `subprocess.Popen` that tests use.

  Args:
    words: the command line after "python": ["-c", code, ...] or ["-m", module, ...].
    log: file that receives what the program prints.
    errors: file that receives its standard error; default `log`.
    devices: CPU devices it has.
    env: changes to the environment of the test.
    cwd: folder it runs in.
    waits: {"mrmae_jax.module.CONSTANT": seconds} in the place of those of the product.
  """

  def __init__(self, words, log, *, errors=None, devices=1, env=None, cwd=ROOT, waits=None):
    env = os.environ | {"XLA_FLAGS": xla_flags(devices)} | (env or {})
    files = [str(log), str(errors or log)]
    for file in files:
      Path(file).write_text("")  # there from the start, for whoever watches it
    arguments = ([str(word) for word in words], files, env, str(cwd), waits or {})
    self._process = multiprocessing.get_context("forkserver").Process(
      target=_become, args=arguments
    )
    self._process.start()
    self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  def poll(self) -> int | None:
    return self._process.exitcode

  def wait(self, timeout: float | None = None) -> int:
    """Returns the exit code, -N after signal N. Raises TimeoutError."""
    if not wait([self._process.sentinel], timeout):
      raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
    self._process.join()
    return self._process.exitcode

  def send_signal(self, number: int) -> None:
    if self._process.exitcode is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


class Finished(NamedTuple):
  returncode: int
  stdout: str
  stderr: str


def run_program(words, timeout: float = 300, **options) -> Finished:
  """Runs a program to its end; options as those of `Program`."""
  with tempfile.TemporaryDirectory() as folder:
    log, errors = Path(folder, "log"), Path(folder, "errors")
    process = Program(words, log, errors=errors, **options)
    finish([process], timeout)
    return Finished(process.wait(), log.read_text(), errors.read_text())


def finish(processes, timeout: float = 400) -> list[int]:
  """Returns the exit codes; kills the processes that are left after the timeout."""
  end = time.monotonic() + timeout
  try:
    return [p.wait(max(0.1, end - time.monotonic())) for p in processes]
  finally:
    for p in processes:
      p.kill()


def wait_for(condition, process: Program, log: Path, timeout: float = 120) -> None:
  """Waits until `condition()`; fails with the end of the log if the process has ended by then."""
  end = time.monotonic() + timeout
  while not condition():
    assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
    time.sleep(0.01)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def host_flags(index: int, count: int, port: int | None) -> list[str]:
  """Returns the options of process `index` of `count` on this machine; none if it is alone."""
  if count == 1:
    return []
  return [
    "--multihost",
    f"--coordinator_address=localhost:{port}",
    f"--num_processes={count}",
    f"--process_id={index}",
  ]


def _become(
  words: list[str], files: list[str], env: dict[str, str], cwd: str, waits: dict[str, float]
) -> None:
  """Turns a fork of the parent into the program, and ends as it ends."""
  os.setsid()
  for number, name in enumerate(files, 1):
    if number == 2 and name == files[0]:
      os.dup2(1, 2)
    else:
      os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
  sys.stdout.reconfigure(line_buffering=True)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent ignores it
  _set_environment(env)
  os.chdir(cwd)
  for name, seconds in waits.items():
    module, _, constant = name.rpartition(".")
    setattr(sys.modules[module], constant, seconds)
  option, name, *rest = words
  sys.argv = [option, *rest]
  code = 1
  try:
    if option == "-c":
      exec(name, {"__name__": "__main__"})
    else:
      runpy.run_module(name, run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException:
    traceback.print_exc()
  atexit._run_exitfuncs()  # multiprocessing leaves them out
  sys.stdout.flush()
  sys.stderr.flush()
  sys.exit(code)


def _set_environment(env: dict[str, str]) -> None:
  import jax  # imported by the parent; the variables that it reads when it is imported come late

  for name, value in env.items():
    if name.startswith("JAX_") and value != os.environ.get(name):
      jax.config.update(name.lower(), {"true": True, "false": False}.get(value, value))
  os.environ.clear()
  os.environ.update(env)
