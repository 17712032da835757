"""Would this run start, how long would it take, and are its settings sound?

  mrmae doctor --config=configs/mrmae.py:base --workdir=/runs/a --config.data.source=folder:/my/photos

Takes the command line of a training and answers from the cheap to the dear: settings that differ from the defaults, the learning rate
in absolute terms, the images, the teacher, the workdir and its disk, then (unless --nocompile) the compiled step: FLOPs, memory and
time. The picture --out shows the first images as training would see them. Nothing else is written. Lines begin with "ok", "look"
(the run would start, but this is rarely meant) or "stop". Exit code: 0 if the run would start, else the one it would end with.
"""

import datetime
import fcntl
import importlib.metadata
import os
import platform
import shutil
import statistics
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from mrmae_jax import config as schema
from mrmae_jax import data, preflight, program, sharding, train
from mrmae_jax.cli import bench, show_teacher
from mrmae_jax.cli import compile as pods
from mrmae_jax.cli.train import load_training_config, out_of_memory
from mrmae_jax.config import teacher_options
from mrmae_jax.data import augment
from mrmae_jax.errors import ConfigError, DataError, UsageError, WeightsError, WorkdirError
from mrmae_jax.evals.reconstruct import bands_shown
from mrmae_jax.runs.paths import open_folder
from mrmae_jax.viz.grid import draw_grid

COUNT = 16  # images that are looked at


class Report:
  """Prints what was found, and remembers how bad it is."""

  def __init__(self):
    self.code = 0

  def ok(self, text: str) -> None:
    print(f"ok    {text}", flush=True)

  def look(self, text: str) -> None:
    print(f"look  {text}", flush=True)

  def stop(self, text: str, code: int) -> None:
    """`code`: with which the run would end."""
    for line in text.splitlines():
      print(f"stop  {line}", flush=True)
    self.code = self.code or code


def run(options) -> int:
  """Carries out `mrmae doctor`; returns the exit code that the run would have."""
  report = Report()
  try:
    if options.out and not options.out.endswith(".png"):
      raise UsageError(f"--out={options.out} must end in .png")
    options.check = options.check or not options.workdir
    config = load_training_config(options, None)
  except UsageError as error:
    report.stop(" ".join(str(error).split()), error.exit_code)
    return report.code
  examine(config, options.workdir, report, options.out, options.compile)
  end = f"end with exit code {report.code}" if report.code else "start"
  print(f"\nthe run would {end}", flush=True)
  return report.code


def examine(config, workdir: str | None, report: Report, out: str, compiled: bool) -> None:
  """All checks of a configuration; what depends on something that failed is left out."""

  devices = jax.devices()
  versions = ", ".join(
    f"{name} {importlib.metadata.version(name)}"
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")
  )
  report.ok(
    f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}); python {platform.python_version()}, {versions}"
  )
  differences(config, report)
  if workdir:
    folder(workdir, report)
  try:
    preflight.check(config, len(devices))
  except ConfigError as error:
    report.stop(str(error), 2)
    return
  source = images(config, report, out)
  if source is None:
    return
  schedule(config, len(source), devices[0].platform, report)
  try:
    task = preflight.open_task(config)
  except (WeightsError, ConfigError) as error:
    report.stop(str(error), 2)
    return
  if config.task == "pretrain":
    first = next(
      iter(
        data.eval_batches(
          source,
          data.center_view(config.image_size, 1.0, len(config.data.mean)),
          batch_size=COUNT,
          limit=COUNT,
        )
      )
    )
    teachers(config, first["image"][first["valid"]], report)
  step(config, task, len(source), workdir, compiled, report)


def differences(config, report: Report) -> None:
  """Settings that are not the defaults of the task."""

  base = schema.TASKS.get(config.task, schema.pretrain)()
  if config.encoder.name == "vit":
    base.encoder = schema.encoder("vit", "base")
  standard = {name: value for name, value, _ in schema.describe(base)}
  found = {name: value for name, value, _ in schema.describe(config)}
  for name in sorted(standard.keys() | found.keys()):
    if standard.get(name) != found.get(name):
      report.ok(
        f"config.{name}={found.get(name, 'left out')!r} (default {standard.get(name, 'none')!r})"
      )


def folder(workdir: str, report: Report) -> None:
  """The workdir, without writing to it."""

  try:
    place = open_folder(workdir)
  except WorkdirError as error:
    report.stop(str(error), 2)
    return
  if "://" in workdir:
    report.ok(
      f"{workdir} can be reached; whether it can be written to is found out at the start of the run"
    )
    return
  there = Path(place)
  while not there.exists():
    there = there.parent
  if not there.is_dir() or not os.access(there, os.W_OK):
    report.stop(
      f"cannot write to {workdir}: {there} is {'not writable' if there.is_dir() else 'no folder'}",
      2,
    )
  elif (place / "lock").is_file() and (place / "lock").read_text():
    with open(place / "lock", encoding="utf-8") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError:
        report.stop(f"{workdir} is in use by another run: {file.read()}", 2)
  steps = sorted(int(p.name) for p in (place / "checkpoints").glob("*") if p.name.isdigit())
  if steps:
    report.look(
      f"{workdir} holds a run with a checkpoint of step {steps[-1]}: the same settings continue it, others are refused"
    )


def images(config, report: Report, out: str):
  """The training split; looks at its first images, as they are and as training sees them. None if there is none to train on."""

  try:
    source = data.open_split(config.data, "train")
    report.ok(f"train: {source.description}")
    sizes, kinds = [], set()
    for i in np.linspace(0, len(source) - 1, min(COUNT, len(source))).astype(int):
      pixels = augment.pixels(source[int(i)], len(config.data.mean))
      sizes.append(min(pixels.shape[:2]))
      kinds.add(
        "constant"
        if pixels.min() == pixels.max()
        else "grey"
        if (pixels == pixels[..., :1]).all()
        else "colour"
      )
    batch = next(
      iter(
        data.train_batches(
          source,
          data.image_views(config).train,
          seed=config.seed,
          batch_size=min(config.batch_size, COUNT),
          options=data.loader_options(config.data)._replace(workers=0),
        )
      )
    )
  except DataError as error:
    report.stop(str(error), 3)
    return None
  short = float(np.median(sizes))
  report.ok(
    f"{len(sizes)} images decoded: short side {min(sizes)} to {max(sizes)} pixels, {' and '.join(sorted(kinds))}"
  )
  if "constant" in kinds:
    report.look(
      "some of them are of one colour: with config.method.norm_pix there is nothing to reconstruct in these"
    )
  if short * max(config.data.crop_scale[1], 1e-9) ** 0.5 < 0.75 * min(config.image_size):
    report.look(
      f"they are smaller (median {short:g}) than config.image_size={tuple(config.image_size)}: most crops are enlarged"
    )
  normal = (batch["image"] / 255 - np.array(config.data.mean)) / np.array(config.data.std)
  if abs(normal.mean()) > 1.5 or not 0.25 < normal.std() < 3:
    report.look(
      f"normalised pixels have mean {normal.mean():.2f} and deviation {normal.std():.2f}, not near 0 and 1: "
      "`mrmae verify` prints the mean and std of the images"
    )
  try:
    report.ok(f"eval: {data.open_split(config.data, 'eval').description}")
  except DataError as error:
    report.look(f"nothing is held out, so evaluations are left out or use training images: {error}")
  if "knn" in config.evals and not source.class_names:
    report.look("no k-NN evaluation: the images have no labels (folders as classes)")
  if out:
    bands, caption = bands_shown(config)
    views = batch["image"][..., bands].astype(np.float32) / 255
    columns = [views[i::4] for i in range(min(4, len(views)))]
    columns = [column[: len(columns[-1])] for column in columns]
    Image.fromarray(
      draw_grid(columns, ["as training", "sees them"] + [""] * (len(columns) - 2), caption)
    ).save(out)
    report.ok(f"{out} shows {sum(map(len, columns))} of the first images as training sees them")
  return source


def schedule(config, count: int, platform_name: str, report: Report) -> None:
  """Steps and learning rate, and what is odd about them."""
  per_epoch = count / config.batch_size
  steps, peak = max(1, round(config.epochs * per_epoch)), config.optim.blr * config.batch_size / 256
  warm = round(config.optim.warmup_epochs * per_epoch)
  report.ok(
    f"batch {config.batch_size} = {config.batch_size // config.optim.accum_steps} x {config.optim.accum_steps} micro-batches; "
    f"{config.epochs:g} epochs of {per_epoch:.4g} steps = {steps} steps, {warm} of warm-up; learning rate "
    f"{config.optim.blr:g} x {config.batch_size} / 256 = {peak:.3g} at its peak"
  )
  if config.task != "probe" and peak > 0.02:
    report.look(
      f"a learning rate of {peak:.3g} is far above the recipes' (1e-4 to 5e-3); config.optim.blr is that of 256 images"
    )
  if config.batch_size > count:
    report.look(f"a batch of {config.batch_size} holds each of the {count} images more than once")
  if warm > steps / 2:
    report.look(f"{warm} of {steps} steps are warm-up; shorten config.optim.warmup_epochs")
  if steps < 100:
    report.look(f"{steps} steps teach little; the recipes have 10,000 and more")
  if config.checkpoint_every > config.epochs:
    report.look(
      f"config.checkpoint_every={config.checkpoint_every:g} epochs is longer than the run: only its first and last steps are "
      "saved"
    )
  if config.eval_every > config.epochs and config.evals:
    report.look(
      f"config.eval_every={config.eval_every:g} epochs is longer than the run: evaluated before it and at its end"
    )
  if platform_name == "cpu" and config.dtype == "bfloat16":
    report.look(
      "bfloat16 is slower than float32 on a CPU: config.dtype=float32 config.teacher.dtype=float32"
    )
  if platform_name != "cpu" and config.dtype == "float32":
    report.look(
      "float32 is several times as slow as bfloat16 on this device: config.dtype=bfloat16"
    )


def teachers(config, pictures, report: Report) -> None:
  """Each teacher on a few images: its grid, the size of its features, and how much of them is the same everywhere."""

  named = teacher_options(config)
  if not named:
    report.look("no teacher: this is MAE or ConvMAE, not MR-MAE")
  for name, options in named.items():
    description, seen = show_teacher.look(config, pictures, options)
    norm = np.linalg.norm(seen.features, axis=-1)
    if not np.isfinite(norm).all():
      report.stop(
        f"{name}: {description}: features are not finite; its weights or config.teacher.dtype are at fault",
        4,
      )
      continue
    share = show_teacher.constant_share(seen.features, options.target_norm)
    report.ok(
      f"{name}: {description}; features of {seen.features.shape[1]} tokens, norm {norm.mean():.3g} ± {norm.std():.2g}, "
      f"{share:.0%} of the normalised targets the same everywhere"
    )
    if share > 0.5:
      report.look(
        f"{name}: most of the targets is one constant vector; try config.teacher.layer or target_norm=batch (show-teacher)"
      )
    if options.weight == 0:
      report.look(f"{name}: its weight is 0: it costs time and teaches nothing")


def step(config, task, count: int, workdir: str | None, compiled: bool, report: Report) -> None:
  """Parameters, work, memory and time of the training step, and the disk for its checkpoints."""

  plan = train.make_plan(config, task, sharding.make_mesh(**config.mesh), count)
  sizes = {
    name: sum(x.size for x in jax.tree.leaves(part)) / 1e6
    for name, part in plan.state.params.items()
  }
  work = {
    part: flops / config.batch_size / 1e9
    for part, flops in program.flops(plan.step, plan.state, plan.frozen, plan.batch).items()
  }
  report.ok(
    f"{sum(sizes.values()):.2f} M parameters ({', '.join(f'{name} {size:.2f} M' for name, size in sizes.items())})"
  )
  report.ok(
    f"{sum(work.values()):.2f} GFLOP an image and step ({', '.join(f'{part} {n:.2f}' for part, n in work.items())})"
  )
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.state))
  if workdir and "://" not in workdir:
    there = Path(workdir).expanduser().absolute()
    while not there.is_dir():
      there = there.parent
    free, needed = (
      shutil.disk_usage(there).free,
      (config.keep_checkpoints + 1 + bool(config.keep_best)) * size,
    )
    text = f"a checkpoint has {size / 1e9:.2f} GB, {config.keep_checkpoints} are kept; {free / 1e9:.1f} GB are free in {there}"
    if free < needed:
      report.stop(f"{text}, {needed / 1e9:.2f} GB are needed", 5)
    else:
      report.ok(text)
  if not compiled or report.code:
    return
  try:
    ready = bench.make_step(config, task)
    seconds = statistics.median(bench.alternate({"step": ready.run}, 3, warm_up=1)["step"])
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise

    report.stop(out_of_memory(str(error), config), 2)
    return
  memory, chip, steps = (
    ready.program.memory_analysis(),
    pods.find_chip(jax.devices()),
    plan.total_steps,
  )
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  share = f" of {chip.memory / 2**30:.0f} GiB" if chip else ""
  report.ok(
    f"compiled in {ready.compile_s:.0f} s; {peak / 2**30:.2f} GiB{share} a device; {seconds * 1e3:,.0f} ms a step, "
    f"{config.batch_size / seconds:,.0f} images/s without loading: {datetime.timedelta(seconds=round(seconds * steps))} for {steps} steps, without evaluations"
  )
