"""Command line: `python -m mrmae_jax.main --config=configs/demo.py --workdir=/tmp/demo`.

The same command continues an interrupted run. `--check` opens the data, compiles, runs one step and writes nothing.
Any key of the configuration can be overridden: `--config.epochs=10 --config.data.source=folder:/my/images`.
On several hosts start the same command on each, with --multihost; where JAX cannot find the others by itself (it can on TPU VMs,
GKE, Slurm), with --coordinator_address, --num_processes and --process_id too.
"""

import difflib
import importlib
import os
import runpy
import sys
import traceback

from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/mrmae.py:base.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder, or gs://BUCKET/FOLDER, for checkpoints, metrics and pictures; holds at most one run.")
_CHECK = flags.DEFINE_bool("check", False, "Open the data, compile, run one step, write nothing.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Wait for the processes of the other hosts and train with them.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, or MRMAE_COORDINATOR_ADDRESS.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes over all hosts, or MRMAE_NUM_PROCESSES.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, or MRMAE_PROCESS_ID.", lower_bound=0)
_INIT_TIMEOUT = flags.DEFINE_integer("init_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
FLAGS = (_CONFIG, _WORKDIR, _CHECK, _MULTIHOST, _COORDINATOR, _PROCESSES, _PROCESS, _INIT_TIMEOUT)

USAGE_ERROR, DATA_ERROR, NON_FINITE = 2, 3, 4  # exit codes


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data, 4 non-finite loss."""
  argv = sys.argv if argv is None else argv
  if {"-h", "--help", "--helpfull"}.intersection(argv[1:]):
    print(__doc__, *(f"  --{flag.name}: {flags.FLAGS[flag.name].help}" for flag in FLAGS), sep="\n")
    print("\nThe keys of a configuration, with defaults and meaning: mrmae_jax/config.py")
    return 0
  try:
    config, workdir = parse(argv)
  except UsageError as error:
    return _fail(error, USAGE_ERROR)

  import jax  # pylint: disable=g-import-not-at-top; a mistyped command line is answered before jax is loaded
  from mrmae_jax import distributed, train
  from mrmae_jax.checkpoint import WorkdirError, prepare_workdir
  from mrmae_jax.config import ConfigError, validate
  from mrmae_jax.data import DataError
  from mrmae_jax.metrics import NonFiniteError
  from mrmae_jax.weights.table import WeightsError

  try:
    if _MULTIHOST.value:
      distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _INIT_TIMEOUT.value)
    try:
      validate(config, jax.device_count())
      task = importlib.import_module(f"mrmae_jax.tasks.{config.task}").make(config)
      if not _CHECK.value:
        prepare_workdir(workdir)
    except (ConfigError, WorkdirError, WeightsError, DataError) as error:
      distributed.agree("start", {}, error=str(error))
      raise
    if _MULTIHOST.value:  # else there is nobody to agree with, and the images need not be listed again
      distributed.agree("start", train.agreed(config, task))
    train.fit(config, task, workdir, check=_CHECK.value)
  except (ConfigError, WorkdirError, WeightsError, distributed.DistributedError) as error:
    return _fail(error, distributed.EXIT_LOST if isinstance(error, distributed.LostError) else USAGE_ERROR)
  except DataError as error:
    return _fail(error, DATA_ERROR)
  except NonFiniteError as error:
    return _fail(error, NON_FINITE)
  return 0


class UsageError(ValueError):
  """A command line that cannot be understood."""


def parse(argv: list[str]):
  """Command line -> (configuration, workdir).

  Raises:
    UsageError: unknown or misspelt flags and keys, values of the wrong type, leftover words, a missing flag, a
      configuration file that cannot be loaded.
  """
  config = _check_config(argv)
  try:
    rest = flags.FLAGS(argv)[1:]
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    hint = _meant(error.flagname, config) if isinstance(error, flags.UnrecognizedFlagError) else ""
    raise UsageError(" ".join(str(error.args[0] if error.args else error).split()) + hint) from error
  if rest:
    name = rest[0].split("=")[0]
    forgotten = f"; did you mean --{rest[0]}?" if "=" in rest[0] and not name.startswith("-") else ""
    raise UsageError(f"{rest[0]!r} is not an option{_meant(name, config) or forgotten}")
  for flag in (_CONFIG, *(() if _CHECK.value else (_WORKDIR,))):
    if flag.value is None or flag.value == "":  # an empty workdir would be the current folder
      raise UsageError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help} Example: python -m mrmae_jax.main "
                       "--config=configs/demo.py --workdir=/tmp/demo")
  given = [flag.name for flag in (_COORDINATOR, _PROCESSES, _PROCESS) if flag.value is not None]
  if given and not _MULTIHOST.value:
    raise UsageError(f"--{given[0]} says where other processes are: add --multihost, or leave it out")
  return _CONFIG.value, _WORKDIR.value


def _meant(name: str, config) -> str:
  """What to say about a word that is a key of the configuration, or the end of one; "" about others."""
  from mrmae_jax.config import flatten  # pylint: disable=g-import-not-at-top; not before there is a mistake
  keys = flatten(config) if hasattr(config, "items") else {}
  meant = [key for key in keys if key == name or key.endswith(f".{name}")]
  return f"; did you mean --config.{meant[0]}=VALUE?" if meant else ""


def _check_config(argv: list[str]):
  """Loads the configuration and looks up every override in it: absl would answer these mistakes with a traceback.

  Returns:
    What the file says; None without one.

  Raises:
    UsageError: no such file, one that fails, or a key it does not have, with the nearest one that it has.
  """
  values = [argv[i + 1] if arg == "--config" else arg.split("=", 1)[1] for i, arg in enumerate(argv)
            if arg.startswith("--config=") or (arg == "--config" and i + 1 < len(argv))]
  if not values:
    return None
  path, *argument = values[-1].split(":", 1)
  if not os.path.isfile(path):
    raise UsageError(f"--config={values[-1]}: no such file; the project's own are in configs/")
  try:
    config = runpy.run_path(path)["get_config"](*argument)
  except Exception as error:  # whatever a user's file may raise
    raise UsageError(f"--config={values[-1]}: {type(error).__name__}: {error}") from error
  for arg in argv:
    if not arg.startswith("--config."):
      continue
    node, where = config, "config"
    for key in arg[2:].split("=")[0].split(".")[1:]:
      known = list(node.keys()) if hasattr(node, "keys") else []
      if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {where}.{near[0]}?" if near else f"{where} has {', '.join(known) or 'no keys'}"
        raise UsageError(f"{arg}: {where} has no key {key!r}; {hint}")
      node, where = node[key], f"{where}.{key}"
  return config


def _fail(error: Exception, code: int) -> int:
  for line in str(error).splitlines():
    print(f"error: {line}", file=sys.stderr, flush=True)
  return code


def _command() -> None:
  """`main`, and the end of the process."""
  try:
    code = main()
  except Exception:
    if not _MULTIHOST.value:
      raise
    traceback.print_exc()
    code = 1
  if code and flags.FLAGS.is_parsed() and _MULTIHOST.value:
    from mrmae_jax import distributed  # pylint: disable=g-import-not-at-top; as above
    distributed.leave(code)
  sys.exit(code)


if __name__ == "__main__":
  _command()
