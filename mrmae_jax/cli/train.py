"""The training commands: pretrain, finetune, segment, detect, probe, teacher."""

import contextlib
import os
import re
import sys
import traceback

import jax

from mrmae_jax import config as config_lib
from mrmae_jax import data, preflight, train
from mrmae_jax.cli import parser
from mrmae_jax.cli.teacher import run_teacher
from mrmae_jax.errors import (
  Interrupted,
  LostError,
  OutOfMemoryError,
  StorageError,
  UsageError,
  UserError,
  one_line,
)
from mrmae_jax.runs import distributed, supervision
from mrmae_jax.runs.paths import is_bucket
from mrmae_jax.runs.workdir import check_shared, lock_workdir, prepare_workdir


def run(options) -> int:
  """Trains, and returns the exit code.

  With several hosts a process that fails does not return: it tells the others why, and ends.

  Raises:
    UserError: of one process.
  """
  config = load_training_config(options, parser.TASKS[options.command])
  try:
    code, reason = _train(options, config), ""
  except UserError as error:
    if not options.multihost:
      raise
    code, reason = error.exit_code, str(error)
  except OSError as error:
    if not options.multihost:
      raise
    code, reason = StorageError.exit_code, one_line(error)
  except Exception as error:
    if not options.multihost:
      raise
    traceback.print_exc()
    code = LostError.exit_code
    reason = f"{type(error).__name__}: {one_line(error, 300)}"
    # If another process failed first, its error is the cause of this one.
    if cause := distributed.who_left():
      reason = f"{cause}; this process ends too"
  if code and options.multihost:
    for line in reason.splitlines():
      print(f"error: {line}", file=sys.stderr, flush=True)
    distributed.leave(code, reason)
  return code


def load_training_config(options, task: str | None):
  """Returns the configuration of a training command line.

  Args:
    options: of `parser.parse`.
    task: the task that it must have; None: any.

  Raises:
    UsageError: it cannot be loaded, is of another task, or an option is missing.
  """
  config = options.config
  # An unknown task is a mistake of the configuration, which preflight names.
  if task and config.task != task and config.task in config_lib.TASKS:
    raise UsageError(
      f"this command needs a configuration of task {task!r}; that of --config has {config.task!r}"
    )
  if not options.check and not options.workdir:  # an empty one would be the current folder
    raise UsageError(
      f"--workdir is missing; see mrmae {options.command} --help. Example: "
      f"mrmae {options.command} --config=demo --workdir=/tmp/run"
    )
  start = config.get("init_from")
  if start and options.workdir and _real(start) == _real(options.workdir):
    raise UsageError(
      f"config.init_from={start} is the folder of --workdir: give another --workdir; to resume the "
      "run that is there, repeat its settings"
    )
  places = ("coordinator_address", "num_processes", "process_id")
  given = [name for name in places if getattr(options, name) is not None]
  if given and not options.multihost:
    raise UsageError(
      f"--{given[0]} says where other processes are: add --multihost, or leave it out"
    )
  return config


def settle_source(config, workdir: str | None) -> None:
  """Gives the images of a configuration that passed preflight a path that holds in any folder.

  Raises:
    UsageError: the workdir lies among them.
  """
  config.data.source = data.with_absolute_path(config.data.source)
  kind, _, images = config.data.source.partition(":")
  if kind == "folder" and workdir and not is_bucket(workdir):
    if f"{_real(workdir)}/".startswith(f"{_real(images)}/"):
      raise UsageError(
        f"--workdir={workdir} lies in the folder of the images, {images}: the run's own pictures "
        "would become training images; give a folder elsewhere"
      )


def _real(path: str) -> str:
  return os.path.realpath(os.path.expanduser(path))


def _train(options, config) -> int:
  if options.multihost:
    distributed.start(
      options.coordinator_address, options.num_processes, options.process_id, options.init_timeout
    )
  try:
    with contextlib.ExitStack() as closing:
      try:
        preflight.check(config, jax.device_count())
        settle_source(config, options.workdir)
        closing.enter_context(supervision.supervised(config.hang_s))
        with supervision.phase("start", interruptible=True):
          task = preflight.open_task(config)
        if not options.check:
          prepare_workdir(options.workdir)
          if note := closing.enter_context(lock_workdir(options.workdir)):
            print(note, flush=True)
      except UserError as error:
        distributed.agree("start", {}, error=str(error))
        raise
      if options.multihost:  # one process has nobody to agree with
        distributed.agree("start", train.host_agreement(config, task))
        if not options.check:
          check_shared(options.workdir)
      if options.check:
        train.check(config, task)
      elif options.command == "teacher":
        print(run_teacher(config, task, options.workdir, options.out), flush=True)
      else:
        train.fit(config, task, options.workdir)
  except Interrupted as error:  # the log has said what is saved
    return error.exit_code
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise OutOfMemoryError(out_of_memory(str(error), config)) from error
  return 0


def out_of_memory(error: str, config) -> str:
  """Returns in one line what XLA says of a device whose memory does not suffice, and what to do."""
  asked = re.search(r"[Aa]llocat\w* (?:of |request for )?\(?(\d[\d.,]* ?\w*)", error)
  asked = asked or re.search(r"(\d[\d.]*[KMG]i?B?)", error)
  largest = re.findall(r"shape = (\w+\[[\d,]*\])", error.lower())
  largest = largest or re.findall(r"\b((?:bf16|f32|f16|u8|s32)\[[\d,]+\])", error)
  arrays = f"; the largest arrays: {', '.join(dict.fromkeys(largest[:5]))}" if largest else ""
  size = f" (it was asked for {asked[1]})" if asked else ""
  accum = config.optim.accum_steps
  return (
    f"the device is out of memory{size}{arrays}. config.encoder.remat=full (now "
    f"{config.encoder.remat}) and, on several devices, config.mesh.fsdp need less for the same "
    f"numbers; config.optim.accum_steps={2 * accum} (now {accum}) does too, but statistics of a "
    f"batch become those of a micro-batch; config.batch_size={config.batch_size // 2} changes the "
    "training"
  )
