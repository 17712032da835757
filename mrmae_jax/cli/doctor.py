"""Would this run start, how long would it take, and are its settings sound?"""

import fcntl
import importlib.metadata
import platform
import shutil
import statistics
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np

from mrmae_jax import config as config_lib
from mrmae_jax import data, hardware, optim, preflight, program, sharding, teachers, train
from mrmae_jax.boxes import paste_mask
from mrmae_jax.cli import bench, show_teacher
from mrmae_jax.cli.train import load_training_config, out_of_memory, settle_source
from mrmae_jax.constants import IGNORED
from mrmae_jax.data import augment
from mrmae_jax.errors import (
  DataError,
  NonFiniteError,
  OutOfMemoryError,
  StorageError,
  UsageError,
  UserError,
  WorkdirError,
)
from mrmae_jax.runs.paths import describe_unwritable, find_folder, open_folder
from mrmae_jax.runs.run import make_evaluators
from mrmae_jax.runs.workdir import describe_special, read_holder
from mrmae_jax.viz.grid import bands_shown, draw_grid, draw_objects, paint_classes, write_picture

COUNT = 16  # images that doctor decodes


class Report:
  """Prints the results of checks, and keeps the exit code that the run would have."""

  def __init__(self):
    self.code = 0

  def ok(self, text: str) -> None:
    print(f"ok    {text}", flush=True)

  def warn(self, text: str) -> None:
    """Prints that the run would start, but that this is rarely meant."""
    print(f"warn  {text}", flush=True)

  def stop(self, text: str, code: int) -> None:
    """Prints why the run would end, with exit code `code`."""
    for line in text.splitlines():
      print(f"stop  {line}", flush=True)
    self.code = self.code or code


def run(options) -> int:
  """Runs `mrmae doctor`; returns the exit code that the run would have."""
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


def examine(config, workdir: str | None, report: Report, out: str, should_compile: bool) -> None:
  """Runs all checks of a configuration, but for those that depend on something that failed."""
  devices = jax.devices()
  packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
  report.ok(
    f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}); "
    f"python {platform.python_version()}, {versions}"
  )
  try:
    for name, value, default in config_lib.departures(config):
      report.ok(f"config.{name}={value!r} (default {default!r})")
    if workdir:
      check_workdir(workdir, report)
    preflight.check(config, len(devices))
    settle_source(config, workdir)
    source = data.open_split(config.data, "train")
    images = decode_images(config, source, report)
    check_images(config, images, report)
    if config.task == "segment":
      report.ok(data.describe_labels(source, config.data.on_error == "skip"))
    check_schedule(config, len(source), devices[0].platform, report)
    task = preflight.open_task(config)
    batch = make_batch(config, source, task.views.train)
    check_pixels(config, batch["image"], report)
    if out:
      draw_batch(config, source, batch, out, report)
  except UserError as error:
    report.stop(str(error), error.exit_code)
    return
  if config.task == "pretrain":
    view = data.center_view(config.image_size, 1.0, len(config.data.mean), config.data.exif)
    loader = data.loader_options(config.data)._replace(workers=0)
    batches = data.eval_batches(source, view, batch_size=COUNT, limit=COUNT, options=loader)
    first = next(iter(batches))
    check_teachers(config, first["image"][first["valid"]], report)
  mesh = sharding.make_mesh(**config.mesh)
  try:
    for note in make_evaluators(config, task, task.frozen, mesh, None)[1]:
      report.warn(note)
  except UserError as error:
    report.stop(str(error), error.exit_code)
    return
  plan = train.make_plan(config, task, mesh)
  describe_plan(config, plan, report)
  if workdir and "://" not in workdir:
    check_disk(config, plan, Path(workdir).expanduser().absolute(), report)
  if should_compile and not report.code:
    time_step(config, task, plan, report)


def check_workdir(workdir: str, report: Report) -> None:
  """Looks at the workdir without writing to it."""
  try:
    path = open_folder(workdir)
  except WorkdirError as error:
    report.stop(str(error), error.exit_code)
    return
  if "://" in workdir:
    report.ok(
      f"{workdir} can be reached; the run finds out at its start whether it can write there"
    )
    return
  lock = path / "lock"
  if problem := describe_unwritable(Path(path)):
    report.stop(f"cannot write to {workdir}: {problem}", WorkdirError.exit_code)
  elif problem := describe_special(path):
    report.stop(problem, WorkdirError.exit_code)
  elif lock.is_file():
    with open(lock, encoding="utf-8") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = read_holder(file) or "another run"
        report.stop(f"{workdir} is in use by {holder}", WorkdirError.exit_code)
      except OSError:  # a file system without locks
        pass
  steps = sorted(int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit())
  if steps:
    report.warn(
      f"{workdir} holds a run with a checkpoint of step {steps[-1]}: the same settings resume it, "
      "others are refused"
    )


def decode_images(config, source, report: Report) -> list[np.ndarray]:
  """Decodes images from all over the source, as arrays [H, W, C]."""
  report.ok(f"train: {source.description}")
  places = np.linspace(0, len(source) - 1, min(COUNT, len(source))).astype(int)
  images = []
  for i in places:
    try:
      images.append(augment.pixels(source[int(i)], len(config.data.mean), config.data.exif))
    except DataError as error:
      if config.data.on_error != "skip":
        raise
      report.warn(f"skipped: {error}")
  if not images:
    raise DataError(f"{source.description}: none of {len(places)} images can be read; replace them")
  return images


def make_batch(config, source, view) -> dict[str, np.ndarray]:
  """Returns the first examples as training sees them: "image" uint8 [B, ..., H, W, C], "label"."""
  batches = data.train_batches(
    source,
    view,
    seed=config.seed,
    batch_size=min(config.batch_size, COUNT),
    options=data.loader_options(config.data)._replace(workers=0),
  )
  return next(iter(batches))


def check_images(config, images, report: Report) -> None:
  """Checks sizes and contents of some images, and whether some are held out."""
  sizes = [min(image.shape[:2]) for image in images]
  kinds = {
    "constant" if x.min() == x.max() else "grey" if (x == x[..., :1]).all() else "color"
    for x in images
  }
  report.ok(
    f"{len(images)} images decoded: short side {min(sizes)} to {max(sizes)} pixels, "
    f"{' and '.join(sorted(kinds))}"
  )
  if "constant" in kinds and config.task == "pretrain":
    report.warn(
      "some of them are of one color: with config.method.norm_pix there is nothing to "
      "reconstruct in these"
    )
  size, median = tuple(config.image_size), float(np.median(sizes))
  if median * config.data.get("crop_scale", (1, 1))[1] ** 0.5 < 0.75 * min(size):
    report.warn(
      f"they are smaller (median {median:g}) than config.image_size={size}: most crops are enlarged"
    )
  try:
    report.ok(f"eval: {data.open_split(config.data, 'eval').description}")
  except DataError as error:
    report.warn(f"nothing is held out, so evaluations are left out or use training images: {error}")


def check_pixels(config, pixels: np.ndarray, report: Report) -> None:
  """Compares mean and standard deviation of a batch [..., C] with those that are configured."""
  x = (pixels / 255 - np.array(config.data.mean)) / np.array(config.data.std)
  if abs(x.mean()) > 1.5 or not 0.25 < x.std() < 3:
    report.warn(
      f"normalized pixels have mean {x.mean():.2f} and deviation {x.std():.2f}, not near 0 and 1: "
      "`mrmae verify` prints the mean and std of the images"
    )


def draw_row(image: np.ndarray, index: int, batch: dict[str, np.ndarray], names) -> np.ndarray:
  """Draws the objects of row `index` of a batch over its image, uint8 [H, W, 3]."""
  is_object = batch["classes"][index] >= 0
  objects = {name: batch[name][index][is_object] for name in ("boxes", "classes")}
  masks = batch["masks"][index][is_object] if "masks" in batch else []
  pasted = [
    paste_mask(mask / np.float32(255), box, image.shape[:2]) >= 0.5
    for mask, box in zip(masks, objects["boxes"])
  ]
  texts = [names[class_] for class_ in objects["classes"]]
  return draw_objects(image, objects["boxes"], pasted, objects["classes"], texts)


def draw_batch(config, source, batch: dict[str, np.ndarray], path: str, report: Report) -> None:
  """Writes a picture of a batch in up to four columns.

  Beside a scene stand its classes; objects are drawn over their image; the two crops of an image
  stand side by side.
  """
  bands, caption = bands_shown(config)
  pixels = batch["image"][..., bands]
  if config.task == "segment":
    painted = [paint_classes(*scene, IGNORED) for scene in zip(pixels, batch["label"])]
    pixels = np.stack([pixels, np.stack(painted)], 1)
  if config.task == "detect":
    pixels = np.stack([draw_row(x, i, batch, source.class_names) for i, x in enumerate(pixels)])
  pixels = pixels.reshape(-1, *pixels.shape[-3:])
  pixels = pixels.astype(np.float32) / 255
  columns = [pixels[i::4] for i in range(min(4, len(pixels)))]
  columns = [column[: len(columns[-1])] for column in columns]
  titles = ["as training", "sees them"] + [""] * (len(columns) - 2)
  write_picture(path, draw_grid(columns, titles, caption))
  count = sum(map(len, columns)) * len(batch["image"]) // len(pixels)
  report.ok(f"{path} shows {count} of the first images as training sees them")


def check_schedule(config, num_images: int, backend: str, report: Report) -> None:
  """Checks steps, learning rate and the type of the computation."""
  batch, options = config.batch_size, config.optim
  per_epoch, steps = optim.count_steps(config, num_images)
  peak = optim.peak_rate(options, batch)
  warmup = options.get("warmup_steps") or round(options.warmup_epochs * per_epoch)
  report.ok(
    f"batch {batch} = {batch // options.accum_steps} x {options.accum_steps} micro-batches; "
    f"{config.epochs:g} epochs of {per_epoch:.4g} steps = {steps} steps, {warmup} of warm-up; "
    f"learning rate {options.blr:g} x {batch} / 256 = {peak:.3g} at its peak"
  )
  for is_odd, message in (
    (
      config.task != "probe" and peak > 0.02,
      f"a learning rate of {peak:.3g} is far above the recipes' (1e-4 to 5e-3); "
      "config.optim.blr is that of 256 images",
    ),
    (
      batch > num_images,
      f"a batch of {batch} holds each of the {num_images} images more than once",
    ),
    (
      warmup > steps / 2,
      f"{warmup} of {steps} steps are warm-up; shorten config.optim.warmup_epochs",
    ),
    (steps < 100, f"{steps} steps teach little; the recipes have 10,000 and more"),
    (
      config.checkpoint_every > config.epochs,
      f"config.checkpoint_every={config.checkpoint_every:g} epochs is longer than the run: only "
      "its first and last steps are saved",
    ),
    (
      config.evals and config.eval_every > config.epochs,
      f"config.eval_every={config.eval_every:g} epochs is longer than the run: it is evaluated "
      "before its first and after its last step",
    ),
    (
      backend == "cpu" and config.dtype == "bfloat16",
      "bfloat16 is slower than float32 on a CPU: config.dtype=float32 config.teacher.dtype=float32",
    ),
    (
      backend != "cpu" and config.dtype == "float32",
      "float32 is several times as slow as bfloat16 on this device: config.dtype=bfloat16",
    ),
  ):
    if is_odd:
      report.warn(message)


def check_teachers(config, images: np.ndarray, report: Report) -> None:
  """Runs each teacher on a few images; checks its features, and how much they have in common."""
  sections = config_lib.teacher_options(config)
  if not sections:
    report.warn("no teacher: this is MAE or ConvMAE, not MR-MAE")
  for name, options in sections.items():
    description, teacher_out = show_teacher.run_teacher(config, images, options)
    norm = np.linalg.norm(teacher_out.features, axis=-1)
    if not np.isfinite(norm).all():
      report.stop(
        f"{name}: {description}: features are not finite; its weights or config.teacher.dtype are "
        "at fault",
        NonFiniteError.exit_code,
      )
      continue
    share = show_teacher.constant_share(teacher_out.features, options.target_norm)
    report.ok(
      f"{name}: {description}; features of {teacher_out.features.shape[1]} tokens, norm "
      f"{norm.mean():.3g} ± {norm.std():.2g}, {share:.0%} of the normalized targets the same "
      "everywhere"
    )
    if teachers.spread(teacher_out.features) < teachers.MIN_SPREAD:
      report.warn(f"{name}: {teachers.NO_SPREAD}")
    elif share > 0.5:
      report.warn(
        f"{name}: most of the targets is one constant vector; try config.teacher.layer or "
        "target_norm=batch (mrmae show-teacher)"
      )
    if options.weight == 0:
      report.warn(f"{name}: its weight is 0: it costs time and teaches nothing")


def describe_plan(config, plan: train.Plan, report: Report) -> None:
  """Prints the parameters and the FLOPs of the training step."""
  sizes = {
    name: sum(x.size for x in jax.tree.leaves(part)) / 1e6
    for name, part in plan.state.params.items()
  }
  flops = {
    name: count / config.batch_size / 1e9
    for name, count in program.flops(plan.step, plan.state, plan.frozen, plan.batch).items()
  }
  parts = ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items())
  report.ok(f"{sum(sizes.values()):.2f} M parameters ({parts})")
  parts = ", ".join(f"{name} {count:.2f}" for name, count in flops.items())
  report.ok(f"{sum(flops.values()):.2f} GFLOP an image and step ({parts})")


def check_disk(config, plan: train.Plan, workdir: Path, report: Report) -> None:
  """Checks that the disk has room for the checkpoints."""
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.state))
  parent = find_folder(workdir)
  free = shutil.disk_usage(parent).free
  needed = (config.keep_checkpoints + 1 + bool(config.keep_best)) * size
  text = (
    f"a checkpoint has {size / 1e9:.2f} GB, {config.keep_checkpoints} are kept; "
    f"{free / 1e9:.1f} GB are free in {parent}"
  )
  if free < needed:
    report.stop(f"{text}, {needed / 1e9:.2f} GB are needed", StorageError.exit_code)
  else:
    report.ok(text)


def time_step(config, task, plan: train.Plan, report: Report) -> None:
  """Compiles the training step, and reports its memory and its time on random images."""
  try:
    compiled = bench.make_step(config, task)
    seconds = statistics.median(bench.alternate({"step": compiled.run}, 3, warm_up=1)["step"])
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    report.stop(out_of_memory(str(error), config), OutOfMemoryError.exit_code)
    return
  memory = compiled.program.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  chip = hardware.find_chip(jax.devices()[0])
  limit = f" of {chip.memory / 2**30:.0f} GiB" if chip else ""
  report.ok(
    f"compiled in {compiled.compile_s:.0f} s; {peak / 2**30:.2f} GiB{limit} a device; "
    f"{seconds * 1e3:,.0f} ms a step, {config.batch_size / seconds:,.0f} images/s without loading: "
    f"{timedelta(seconds=round(seconds * plan.steps.total))} for {plan.steps.total} steps, "
    "without evaluations"
  )
