"""Opens what a run needs before anything compiles: devices, data and teachers.

Training, `--check`, `mrmae doctor` and the benchmarks share these functions, so that a mistake has
one message.
"""

import importlib
import importlib.util
import math

import ml_collections

from mrmae_jax import checks, data, teachers
from mrmae_jax.checks import Mistakes
from mrmae_jax.config import TASKS, teacher_sections
from mrmae_jax.data import randaugment
from mrmae_jax.errors import DataError, WeightsError
from mrmae_jax.train import Task

# Keys that `data.open_split` reads
SOURCE = tuple(
  f"data.{key}"
  for key in (
    *("source", "train_split", "eval_split", "data_dir", "holdout_every", "labels", "quarantine"),
  )
)


def check(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Checks a configuration, its devices, its data and the files of its teachers.

  The images and the weights themselves are read later.

  Args:
    config: a configuration of any task.
    num_devices: number of devices of the run, over all hosts.

  Raises:
    ConfigError: all problems, one per line: the value given, the value expected, what to do.
  """
  mistakes = checks.find_mistakes(config)
  if mistakes.usable("wandb"):
    mistakes.need(
      not config.wandb or importlib.util.find_spec("wandb"),
      f"config.wandb={config.wandb!r} needs the wandb extra: pip install 'mrmae_jax[wandb]', "
      "or leave it empty",
    )
  if mistakes.usable("mesh", "batch_size", "optim.accum_steps"):
    _check_devices(config, num_devices, mistakes)
  if mistakes.usable(*SOURCE):
    _check_source(config, mistakes)
  _check_image_options(config, mistakes)
  student = ("encoder", "image_size", "method", "data.mean", "data.std")
  if "teacher" in TASKS[config.task].sections and mistakes.usable(*student):
    _check_teachers(config, mistakes)
  mistakes.report()


def open_task(config: ml_collections.ConfigDict) -> Task:
  """Returns the task of a configuration that passed `check`; reads its weights and its teachers.

  Raises:
    DataError, WeightsError: images or weights that do not fit the configuration.
  """
  return importlib.import_module(f"mrmae_jax.tasks.{config.task}").make(config)


def _check_devices(config, num_devices: int, mistakes: Mistakes) -> None:
  """Checks that the mesh fits the devices, and that the batch is divisible among them."""
  mesh, batch, accum = config.mesh, config.batch_size, config.optim.accum_steps
  sizes = [mesh.data, mesh.fsdp]
  if -1 in sizes:
    rest = -math.prod(sizes)
    fits = sizes.count(-1) == 1 and rest > 0 and num_devices % rest == 0
  else:
    fits = min(sizes) > 0 and math.prod(sizes) == num_devices
  mistakes.need(
    fits,
    f"config.mesh data={mesh.data} x fsdp={mesh.fsdp} does not fit {num_devices} devices; "
    "-1 on one axis takes the rest",
  )
  unit = num_devices * accum
  below = batch // unit * unit
  mistakes.need(
    batch % unit == 0,
    f"config.batch_size={batch} is not divisible by {num_devices} devices x {accum} accumulation "
    f"steps; nearest: {f'{below} or ' if below else ''}{below + unit}",
  )


def _check_source(config, mistakes: Mistakes) -> None:
  """Opens the splits that the task needs, and compares their classes."""
  if not mistakes.need(
    config.data.source,
    f"config.data.source is not set; use {data.describe_kinds(config.data)}",
  ):
    return
  sources = []
  for split in TASKS[config.task].splits:
    try:
      sources.append(data.open_split(config.data, split))
      data.check_same_classes(sources[0], sources[-1])
    except DataError as error:
      mistakes.need(False, f"config.data: {error}")


def _check_image_options(config, mistakes: Mistakes) -> None:
  """Looks for the program that resizes images, and reads the description of RandAugment."""
  for make, key in ((randaugment.parse, "randaug"), (data.resizer, "resize")):
    if key not in config.data or not mistakes.usable(f"data.{key}"):
      continue
    try:
      make(config.data[key])
    except DataError as error:
      mistakes.need(False, f"config.data.{error}")


def _check_teachers(config, mistakes: Mistakes) -> None:
  """Compares what the files of each teacher offer with how the configuration uses it."""
  for key, options in teacher_sections(config).items():
    if not mistakes.usable(key):
      continue
    try:
      spec = teachers.configured_spec(options, config)
    except WeightsError as error:
      mistakes.need(False, f"config.{key}: {error}")
      continue
    mistakes.need(
      spec.has_cls or options.tokens != "visible+cls",
      f"config.{key}.tokens='visible+cls': {spec.description} has no CLS token",
    )
    mistakes.need(
      spec.has_attention or config.method.masking != "focused" or key != "teacher",
      "config.method.masking='focused' needs the attention of a CLS token, which "
      f"{spec.description} lacks; use 'random'",
    )
    mistakes.need(
      spec.has_attention or options.salient_share == 1,
      f"config.{key}.salient_share={options.salient_share} needs the attention of a CLS token, "
      f"which {spec.description} lacks; use 1",
    )
