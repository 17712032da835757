"""Command line: `python -m mrmae_jax.cli.train --config=configs/demo.py --workdir=/tmp/demo`.

The same command continues an interrupted run. `--check` opens the data, compiles, runs one step and writes nothing.
Any key of the configuration can be overridden: `--config.epochs=10 --config.data.source=folder:/my/images`.
On several hosts start the same command on each, with --multihost; where JAX cannot find the others by itself (it can on TPU VMs,
GKE, Slurm), with --coordinator_address, --num_processes and --process_id too.
"""

import contextlib
import difflib
import os
import re
import runpy
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from mrmae_jax.errors import (
  DataError,
  Interrupted,
  LostError,
  OutOfMemoryError,
  UsageError,
  UserError,
)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, e.g. configs/mrmae.py:base.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder, or gs://BUCKET/FOLDER, for checkpoints, metrics and pictures; holds at most one run.",
)
_OUT = flags.DEFINE_string(
  "out", "", "Of mrmae teacher alone: folder that receives the teacher; default: WORKDIR/teacher."
)
_CHECK = flags.DEFINE_bool("check", False, "Open the data, compile, run one step, write nothing.")
_MULTIHOST = flags.DEFINE_bool(
  "multihost", False, "Wait for the processes of the other hosts and train with them."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0, or MRMAE_COORDINATOR_ADDRESS."
)
_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes over all hosts, or MRMAE_NUM_PROCESSES.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0, or MRMAE_PROCESS_ID.", lower_bound=0
)
_INIT_TIMEOUT = flags.DEFINE_integer(
  "init_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
)
_said = ""  # the error that this process ends with
_DEBUG = flags.DEFINE_bool("debug", False, "Show where in the code an error came from.")
FLAGS = (
  _CONFIG,
  _WORKDIR,
  _OUT,
  _DEBUG,
  _CHECK,
  _MULTIHOST,
  _COORDINATOR,
  _PROCESSES,
  _PROCESS,
  _INIT_TIMEOUT,
)


def main(argv: list[str] | None = None, task: str | None = None) -> int:
  """Runs a command line (default: sys.argv) for a configuration of `task` (None: of any); returns the exit code.

  0: done. 1: other processes did not come or are gone. 2: usage. 3: data. 4: losses that are not finite. 5: storage. 75: stopped by a
  signal, the same command goes on. (6, a hang, ends the process where it is.)
  """
  argv = sys.argv if argv is None else argv
  if {"-h", "--help", "--helpfull"}.intersection(argv[1:]):
    print(_help(argv, task))
    return 0
  try:
    config, workdir = parse(argv)
    if task and config.task != task:
      raise UsageError(
        f"this command needs a configuration of task {task!r}; that of --config has {config.task!r}"
      )
  except UsageError as error:
    return _fail(error, error.exit_code)

  import jax  # a mistyped command line is answered before jax is loaded

  from mrmae_jax import preflight, train
  from mrmae_jax.runs import distributed, supervision
  from mrmae_jax.runs.workdir import held, prepare_workdir

  try:
    if _MULTIHOST.value:
      distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _INIT_TIMEOUT.value)
    with contextlib.ExitStack() as ending:
      try:
        preflight.check(config, jax.device_count())
        ending.enter_context(supervision.supervised(config.hang_s))
        with supervision.phase("start", at_once=True):
          task = preflight.open_task(config)
        if not _CHECK.value:
          prepare_workdir(workdir)
          if note := ending.enter_context(held(workdir)):
            print(note, flush=True)
      except UserError as error:
        distributed.agree("start", {}, error=str(error))
        raise
      if (
        _MULTIHOST.value
      ):  # else there is nobody to agree with, and the images need not be listed again
        distributed.agree("start", train.host_agreement(config, task))
      if _CHECK.value:
        train.check(config, task)
      elif config.task == "self_distill":
        from mrmae_jax.cli import teacher

        print(teacher.run_teacher(config, task, workdir, _OUT.value), flush=True)
      else:
        train.fit(config, task, workdir)
  except Interrupted as error:
    return error.exit_code
  except UserError as error:
    return _fail(error, error.exit_code)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _fail(OutOfMemoryError(out_of_memory(str(error), config)), OutOfMemoryError.exit_code)
  return 0


def out_of_memory(error: str, config) -> str:
  """What XLA says when a device's memory does not suffice, in a line, with what can be done about it."""
  asked = re.search(r"[Aa]llocat\w* (?:of |request for )?\(?(\d[\d.,]* ?\w*)", error) or re.search(
    r"(\d[\d.]*[KMG]i?B?)", error
  )
  largest = re.findall(r"shape = (\w+\[[\d,]*\])", error.lower()) or re.findall(
    r"\b((?:bf16|f32|f16|u8|s32)\[[\d,]+\])", error
  )
  arrays = f"; the largest arrays: {', '.join(dict.fromkeys(largest[:5]))}" if largest else ""
  return (
    f"the device is out of memory{f' (it was asked for {asked[1]})' if asked else ''}{arrays}. Smaller steps need less: "
    f"config.optim.accum_steps={2 * config.optim.accum_steps} (now {config.optim.accum_steps}) keeps the numbers, so does "
    f"config.encoder.remat=full (now {config.encoder.remat}) and, on several devices, config.mesh.fsdp; config.batch_size="
    f"{config.batch_size // 2} does not"
  )


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
    raise UsageError(
      " ".join(str(error.args[0] if error.args else error).split()) + hint
    ) from error
  if rest:
    name = rest[0].split("=")[0]
    forgotten = (
      f"; did you mean --{rest[0]}?" if "=" in rest[0] and not name.startswith("-") else ""
    )
    raise UsageError(f"{rest[0]!r} is not an option{_meant(name, config) or forgotten}")
  for flag in (_CONFIG, *(() if _CHECK.value else (_WORKDIR,))):
    if flag.value is None or flag.value == "":  # an empty workdir would be the current folder
      raise UsageError(
        f"--{flag.name} is missing: {flags.FLAGS[flag.name].help} Example: python -m mrmae_jax.cli.train "
        "--config=configs/demo.py --workdir=/tmp/demo"
      )
  given = [flag.name for flag in (_COORDINATOR, _PROCESSES, _PROCESS) if flag.value is not None]
  if given and not _MULTIHOST.value:
    raise UsageError(
      f"--{given[0]} says where other processes are: add --multihost, or leave it out"
    )
  if _OUT.value and _CONFIG.value.task != "self_distill":
    raise UsageError("--out is for mrmae teacher alone; leave it out")
  return _CONFIG.value, _WORKDIR.value


def _meant(name: str, config) -> str:
  """What to say about a word that is a key of the configuration, or the end of one; "" about others."""
  from mrmae_jax.config import flatten  # not before there is a mistake

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
  values = [
    argv[i + 1] if arg == "--config" else arg.split("=", 1)[1]
    for i, arg in enumerate(argv)
    if arg.startswith("--config=") or (arg == "--config" and i + 1 < len(argv))
  ]
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
        hint = (
          f"did you mean {where}.{near[0]}?"
          if near
          else f"{where} has {', '.join(known) or 'no keys'}"
        )
        raise UsageError(f"{arg}: {where} has no key {key!r}; {hint}")
      node, where = node[key], f"{where}.{key}"
  return config


def _fail(error: Exception, code: int) -> int:
  global _said
  _said = str(error)
  if flags.FLAGS.is_parsed() and _DEBUG.value:
    traceback.print_exc()
  for line in _said.splitlines():
    print(f"error: {line}", file=sys.stderr, flush=True)
  return code


def _help(argv: list[str], task: str | None) -> str:
  """The options, and every key of the configuration with its value, from --config if that is given."""
  from mrmae_jax import config as schema  # answered fast

  defaults = schema.defaults(task or "pretrain")
  title = "Keys of a configuration (--config.KEY=VALUE), their defaults and meaning:"
  try:
    _check_config(argv)
    flags.FLAGS([arg for arg in argv if arg not in ("-h", "--help", "--helpfull")])
    config = _CONFIG.value or defaults
    title = "Keys of --config, with their values there and meaning:" if _CONFIG.value else title
  except (UsageError, flags.Error):
    config = defaults
  options = [f"  --{flag.name}: {flags.FLAGS[flag.name].help}" for flag in FLAGS]
  keys = [
    f"  {name}={value!r}".ljust(46) + f"  {meaning}"
    for name, value, meaning in schema.describe(config)
  ]
  return "\n".join([__doc__, *options, "", title, *keys])


def command(argv: list[str] | None = None, task: str | None = None) -> int:
  """`main` as a whole process: with several of them it does not return when it fails, see distributed.leave."""
  try:
    code = main(argv, task)
  except Exception as error:
    if not _MULTIHOST.value:
      raise
    from mrmae_jax.runs import distributed

    traceback.print_exc()
    gone = (
      distributed.who_left()
    )  # the exception of a collective says that another is gone, and that one may have said why
    _fail(
      RuntimeError(
        f"{gone}; this process ends too"
        if gone
        else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
      ),
      code := LostError.exit_code,
    )
  if code and flags.FLAGS.is_parsed() and _MULTIHOST.value:
    from mrmae_jax.runs import distributed

    distributed.leave(code, _said)
  if code == DataError.exit_code:  # a thread whose image never comes would be waited for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


if __name__ == "__main__":
  sys.exit(command())
