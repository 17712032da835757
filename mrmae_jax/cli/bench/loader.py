"""Measures the images per second that the loader gives, and the processor time they cost.

  mrmae bench loader --source=folder:/path/to/photos

Batches are those of training: random crops to --image_size, and flips. Ours is measured with
Pillow's resize and, where the fast extra is installed, with OpenCV's; from the source and from two
packed copies of it in a temporary folder, one as it is and one with the shorter side 256. Where
torch is installed, its DataLoader is measured too, with the usual chain of PIL (open, RGB, crop,
bicubic, flip, normalized float tensor) and as many workers.

Loaders are measured one at a time, in alternation (A B C, then C B A, ...), each fresh and after
its first batches. The table has the median of the rounds [lowest .. highest] and the ratios to
torch of the same round; larger is better. Ours must first give the pixels of the PIL chain for the
same crops, or there are no ratios. Processor time is that of all processes, where the system tells
(Linux); other programs disturb it less than images per second.

--memory_batches=N instead streams N batches of the source and prints the memory of all processes.
"""

import argparse
import functools
import importlib
import importlib.util
import io
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae_jax import data
from mrmae_jax.cli import bench
from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.data import augment
from mrmae_jax.data.pack import write_packed
from mrmae_jax.errors import UsageError

PACKED_SIDE = 256
CROP_SCALE = (0.2, 1.0)
MIN_IMAGES = 10_000
CHECKED_IMAGES = 32  # whose pixels are compared
LEAST_BATCHES = 4  # of a worker in a round
PEER = "torch DataLoader, PIL chain"


def run(options: argparse.Namespace) -> str:
  """Measures, and returns the table.

  Raises:
    UsageError, DataError: options or images that do not fit.
  """
  source = data.open_source(options.source, "train", data_dir=options.data_dir, holdout_every=0)
  print(source.description, flush=True)
  measure = _measure_memory if options.memory_batches else _measure_speed
  result = measure(options, source)
  bench.write_json(options.json, result)
  return "\n".join(result["lines"])


class _Repeated:
  """A source repeated up to at least MIN_IMAGES images.

  Grain's shuffle is slow for fewer: 0.3 ms an image for 66 images, 0.01 ms for 2,000.
  """

  def __init__(self, source):
    self._source, self._length = source, len(source) * -(-MIN_IMAGES // len(source))
    self.class_names, self.description = source.class_names, source.description

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return self._source[int(index) % len(self._source)]


def _start_loader(options, source, resize: str = "pillow"):
  """Returns the training batches of our loader."""
  crop = functools.partial(
    augment.random_resized_crop,
    size=(options.image_size,) * 2,
    scale=CROP_SCALE,
    resize=data.resizer(resize),
  )
  return data.train_batches(
    source,
    data.ImageView(3, (crop, augment.random_flip)),
    seed=0,
    batch_size=options.batch_size,
    options=data.LoaderOptions(workers=options.workers),
  )


# Speed.


def _measure_speed(options, source) -> dict:
  """Measures every loader in alternation.

  Returns:
    {"lines", "rounds": {loader: [{"images_per_s", "cpu_s_per_1000"}]}, "equal", "versions"}.
  """
  with tempfile.TemporaryDirectory() as folder:
    sources = {"": source}
    for name, side in ((", packed", 0), (f", packed at {PACKED_SIDE}", PACKED_SIDE)):
      root = Path(folder) / str(side)
      write_packed({"train": source}, root, {"source": options.source}, short_side=side)
      sources[name] = data.open_source(f"packed:{root}", "train")
    loaders = _make_loaders(options, {name: _Repeated(x) for name, x in sources.items()})
    equal = _has_pixels_of_pil(options, source)
    rounds = {name: [] for name in loaders}
    for i in range(options.rounds):
      for name in list(loaders)[:: -1 if i % 2 else 1]:
        rounds[name].append(_measure_loader(loaders[name], options))
  versions = {
    name: importlib.import_module(name).__version__
    for name in ("grain", "PIL", "simplejpeg", "cv2", "torch")
    if importlib.util.find_spec(name)
  }
  lines = [
    f"{options.batch_size} x {options.image_size} px, {options.workers} workers, "
    f"{os.cpu_count()} cores; {options.rounds} rounds of "
    f"{_count_batches(options) * options.batch_size:,} images; "
    + ", ".join(f"{name} {version}" for name, version in versions.items()),
    "pixels of ours, pillow and of the PIL chain: "
    + ("equal" if equal else "DIFFERENT, so there are no ratios"),
    bench.format_table(_speed_rows(rounds, equal)),
  ]
  return dict(lines=lines, rounds=rounds, equal=equal, versions=versions)


def _make_loaders(options, sources: dict) -> dict:
  """Returns {name: () -> batches} of our loaders, and of torch's where it is installed."""
  resizes = ["pillow"] + ["cv2"] * bool(importlib.util.find_spec("cv2"))
  loaders = {
    f"ours, {resize}{name}": functools.partial(_start_loader, options, source, resize)
    for name, source in sources.items()
    for resize in resizes
  }
  if importlib.util.find_spec("torch"):
    loaders[PEER] = functools.partial(_start_torch_loader, options, sources[""])
  return loaders


def _speed_rows(rounds: dict[str, list[dict]], has_ratios: bool) -> list[list[str]]:
  """Returns one row per loader, with ratios to torch if they are meant to be there."""
  rows = [
    ["", "images/s", "CPU-s per 1000 images", "images/s over torch", "images/CPU-s over torch"]
  ]
  for name, values in rounds.items():
    row = [
      name,
      _format_spread([x["images_per_s"] for x in values], 0),
      _format_spread([x["cpu_s_per_1000"] for x in values], 2),
      "",
      "",
    ]
    if has_ratios and PEER in rounds and name != PEER:
      pairs = list(zip(values, rounds[PEER]))
      speedups = [x["images_per_s"] / peer["images_per_s"] for x, peer in pairs]
      savings = [
        x["cpu_s_per_1000"] and peer["cpu_s_per_1000"] / x["cpu_s_per_1000"] for x, peer in pairs
      ]
      row[3:] = _format_spread(speedups, 2), _format_spread(savings, 2)
    rows.append(row)
  return rows


def _format_spread(values, digits: int) -> str:
  return "-" if None in values else bench.format_spread(values, digits)


def _measure_loader(start, options) -> dict:
  """Starts a loader, warms it up, times it and closes it."""
  batches, steps = start(), _count_batches(options)
  try:
    # Batches that were made while the first one was on its way are used up before the clock starts.
    for _ in range(3 * max(options.workers, 1) + 1):
      next(batches)
    cpu_start, start_time = _cpu_seconds(), time.perf_counter()
    for _ in range(steps):
      next(batches)
    seconds, images = time.perf_counter() - start_time, steps * options.batch_size
    cpu_end = _cpu_seconds()
  finally:
    batches.close()
  cpu = None if cpu_start is None else (cpu_end - cpu_start) / images * 1000
  return dict(images_per_s=images / seconds, cpu_s_per_1000=cpu)


def _count_batches(options) -> int:
  """Returns the timed batches of a round, as many of each worker.

  The workers begin together, so that their batches arrive together, and nothing for a while.
  """
  workers = max(options.workers, 1)
  of_each = -(-options.images // (options.batch_size * workers))
  return workers * max(of_each, LEAST_BATCHES)


def _processes() -> list[Path]:
  """Returns the /proc entries of this process and its workers; [] on a system without /proc."""
  pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  return [path for pid in pids if (path := Path("/proc") / str(pid)).exists()]


def _cpu_seconds() -> float | None:
  """Returns the user and system time that the running processes have used, with all threads."""
  ticks = 0
  for path in _processes():
    # The command's name, in parentheses, may hold blanks; utime and stime are fields 11, 12 after.
    fields = (path / "stat").read_text().rpartition(")")[2].split()
    ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf("SC_CLK_TCK") if ticks else None


# Memory.


def _measure_memory(options, source) -> dict:
  """Measures the memory of all processes while batches go by.

  Returns:
    {"lines", "resident_mb": {batch: MB}}.
  """
  if not _processes():
    raise UsageError("--memory_batches needs /proc, which this system does not have")
  batches, resident, count = _start_loader(options, source), {}, options.memory_batches
  checkpoints = {1, max(count // 10, 1), max(count // 2, 1), count}
  try:
    for i in range(1, count + 1):
      next(batches)
      if i in checkpoints:
        pages = sum(int((path / "statm").read_text().split()[1]) for path in _processes())
        resident[i] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
  finally:
    batches.close()
  lines = [
    f"after batch {i:>8,}: {mb:8,.1f} MB resident in {options.workers + 1} processes"
    for i, mb in resident.items()
  ]
  return dict(lines=lines, resident_mb=resident)


# The peer.


def _pil_view(example, rng, size: int):
  """Returns the picture that the reference implementations' chain of PIL makes of an example.

  It draws as ours does: equal generators give equal crops.
  """
  image = example["image"]
  if isinstance(image, np.ndarray):
    picture = Image.fromarray(image)
  else:
    picture = Image.open(io.BytesIO(image)).convert("RGB")
  top, left, height, width = augment.crop_box(picture.height, picture.width, rng, CROP_SCALE)
  box = (left, top, left + width, top + height)
  crop = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
  return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _has_pixels_of_pil(options, source) -> bool:
  """Whether our view gives the pixels of the PIL chain for the same crops."""
  size = options.image_size

  def view(example, rng):
    crop = augment.random_resized_crop(augment.pixels(example), rng, (size, size), CROP_SCALE)
    return augment.random_flip(crop, rng)

  return all(
    np.array_equal(
      view(source[i], np.random.default_rng(i)),
      _pil_view(source[i], np.random.default_rng(i), size),
    )
    for i in range(min(CHECKED_IMAGES, len(source)))
  )


class _TorchImages:
  """A map-style data set for torch: position in the stream -> (tensor [3, S, S], label)."""

  def __init__(self, source, size: int):
    self._source, self._size = source, size

  def __getitem__(self, index):
    import torch  # an extra

    position, image = index
    example = self._source[image]
    pixels = np.array(_pil_view(example, np.random.default_rng(position), self._size))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return tensor.sub_(mean).div_(std), example["label"]


def _start_torch_loader(options, source):
  """Yields the DataLoader's batches, without end; closing the generator ends the workers."""
  import torch.utils.data  # an extra

  def stream():  # one endless epoch: no pause where a small data set begins again
    rng = np.random.default_rng(0)
    while True:
      yield from rng.permutation(len(source)).tolist()

  yield from torch.utils.data.DataLoader(
    _TorchImages(source, options.image_size),
    options.batch_size,
    sampler=enumerate(stream()),
    num_workers=options.workers,
  )
