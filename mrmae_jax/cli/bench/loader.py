"""Images per second that the loader gives, and the processor time they cost.

  mrmae bench loader --source=folder:/path/to/photos

Measured are training batches (random crops to --image_size, flips): ours with Pillow's resize and with OpenCV's (where the fast
extra is installed), from the source and from packed copies of it in a temporary folder, whole and with the shorter side 256; and,
where torch is installed, a torch DataLoader with the usual chain of PIL (open, RGB, crop, bicubic, flip, normalised float tensor)
and as many workers. Loaders are measured one at a time, in alternation (A B C, then C B A, ...), each anew and after its first
batches; printed are the median of the rounds [lowest .. highest] and the ratios to torch of the same round, larger is better.
Before that, ours has to give the pixels of the PIL chain for the same crops, or there are no ratios. Processor time is that of all
processes, where the system tells (Linux); other programs disturb it less than images per second.

--memory_batches=N instead streams N batches of the source and prints the memory of all processes on the way.
"""

import functools
import importlib.util
import io
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError

PACKED_SIDE = 256
CROP_SCALE = (0.2, 1.0)
MIN_IMAGES = 10_000
CHECKED = 32  # images whose pixels are compared
PEER = "torch DataLoader, PIL chain"


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_string(
    "source",
    None,
    "Images: folder:/path, digits, tfds:name or packed:/path; all are used.",
    flag_values=own,
  )
  flags.DEFINE_string("data_dir", "", "Where tfds looks for prepared data sets.", flag_values=own)
  flags.DEFINE_integer(
    "image_size", 224, "Side of the crops in pixels.", lower_bound=1, flag_values=own
  )
  flags.DEFINE_integer("batch_size", 64, "Images per batch.", lower_bound=1, flag_values=own)
  flags.DEFINE_integer(
    "workers",
    2,
    "Processes of each loader; 0: ours in threads, torch in the main process.",
    lower_bound=0,
    flag_values=own,
  )
  flags.DEFINE_integer(
    "images", 960, "Timed images per loader and round.", lower_bound=1, flag_values=own
  )
  flags.DEFINE_integer(
    "rounds", 5, "How often each loader is timed.", lower_bound=1, flag_values=own
  )
  flags.DEFINE_integer(
    "memory_batches",
    0,
    "Instead: stream so many batches and print the memory.",
    lower_bound=0,
    flag_values=own,
  )
  flags.DEFINE_string("json", "", "A file for the results.", flag_values=own)
  return own


def run(options) -> str:
  """The command with an attribute per flag; returns the table.

  Raises:
    UsageError, DataError: options or images that do not fit.
  """
  if not options.source:
    raise UsageError("--source is missing; see --help")
  from mrmae_jax import data  # a mistyped command line is answered first

  source = data.open_source(options.source, "train", data_dir=options.data_dir, holdout_every=0)
  print(source.description, flush=True)
  result = _memory(options, source) if options.memory_batches else _speed(options, source)
  bench.write_json(options.json, result)
  return "\n".join(result["lines"])


class _Repeated:
  """A source as often as it takes to MIN_IMAGES: grain's shuffle is slow for less, 0.3 ms for an image of 66, 0.01 of 2,000."""

  def __init__(self, source):
    self._source, self._length = source, len(source) * -(-MIN_IMAGES // len(source))
    self.class_names, self.description = source.class_names, source.description

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return self._source[int(index) % len(self._source)]


def _batches(options, source, resize="pillow"):
  from mrmae_jax import data
  from mrmae_jax.data import augment

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


def _speed(options, source) -> dict:
  """Every loader in alternation; {"lines", "rounds": {loader: [{"images_per_s", "cpu_s_per_1000"}]}, ...}."""
  from mrmae_jax import data
  from mrmae_jax.data.pack import write_packed

  with tempfile.TemporaryDirectory() as folder:
    sources = {"": source}
    for name, side in ((", packed", 0), (f", packed at {PACKED_SIDE}", PACKED_SIDE)):
      root = Path(folder) / str(side)
      write_packed({"train": source}, root, {"source": options.source}, short_side=side)
      sources[name] = data.open_source(f"packed:{root}", "train")
    sources = {name: _Repeated(one) for name, one in sources.items()}
    resizes = ["pillow"] + ["cv2"] * bool(importlib.util.find_spec("cv2"))
    loaders = {
      f"ours, {resize}{name}": lambda source=source, resize=resize: _batches(
        options, source, resize
      )
      for name, source in sources.items()
      for resize in resizes
    }
    equal = _same_pixels(options, source)
    if importlib.util.find_spec("torch"):
      loaders[PEER] = lambda: _torch_batches(options, sources[""])
    rounds = {name: [] for name in loaders}
    for i in range(options.rounds):
      for name in list(loaders)[:: -1 if i % 2 else 1]:
        rounds[name].append(_measure(loaders[name], options))
  versions = {
    name: importlib.import_module(name).__version__
    for name in ("grain", "PIL", "simplejpeg", "cv2", "torch")
    if importlib.util.find_spec(name)
  }
  lines = [
    f"{options.batch_size} x {options.image_size} px, {options.workers} workers, {os.cpu_count()} cores; {options.rounds} rounds "
    f"of {options.images} images; "
    + ", ".join(f"{name} {version}" for name, version in versions.items()),
    f"pixels of ours, pillow and of the PIL chain: {'equal' if equal else 'DIFFERENT, so no ratios'}",
  ]
  rows = [
    ["", "images/s", "CPU-s per 1000 images", "images/s over torch", "images/CPU-s over torch"]
  ]
  for name, measured in rounds.items():
    columns = [
      _spread([one["images_per_s"] for one in measured], 0),
      _spread([one["cpu_s_per_1000"] for one in measured], 2),
      "",
      "",
    ]
    if equal and PEER in rounds and name != PEER:
      pairs = list(zip(measured, rounds[PEER]))
      columns[2] = _spread([one["images_per_s"] / peer["images_per_s"] for one, peer in pairs], 2)
      columns[3] = _spread(
        [
          one["cpu_s_per_1000"] and peer["cpu_s_per_1000"] / one["cpu_s_per_1000"]
          for one, peer in pairs
        ],
        2,
      )
    rows.append([name, *columns])
  lines.append(bench.table(rows))
  return dict(lines=lines, rounds=rounds, equal=equal, versions=versions)


def _spread(values, digits: int) -> str:
  return "-" if None in values else bench.spread(values, digits)


def _measure(start, options) -> dict:
  """One loader, started, run until it is in its stride, timed, and ended."""
  batches = start()
  steps = -(-options.images // options.batch_size)
  try:
    # What was made while the first batch was on its way is used up before the clock starts.
    for _ in range(3 * max(options.workers, 1) + 1):
      next(batches)
    cpu, began = _cpu_seconds(), time.perf_counter()
    for _ in range(steps):
      next(batches)
    wall, images = time.perf_counter() - began, steps * options.batch_size
    after = _cpu_seconds()
  finally:
    batches.close()
  return dict(
    images_per_s=images / wall,
    cpu_s_per_1000=None if cpu is None else (after - cpu) / images * 1000,
  )


def _processes() -> list[Path]:
  """/proc entries of this process and its workers; none where the system has no /proc."""
  pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  return [path for pid in pids if (path := Path("/proc") / str(pid)).exists()]


def _cpu_seconds() -> float | None:
  """User and system time that the running processes have used, all their threads together."""
  # The name of the command, in parentheses, may hold blanks; behind it utime and stime are fields 11 and 12.
  ticks = [
    sum(map(int, (path / "stat").read_text().rpartition(")")[2].split()[11:13]))
    for path in _processes()
  ]
  return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _memory(options, source) -> dict:
  """Resident memory of all processes while batches go by; {"lines", "resident_mb": {batch: MB}}."""
  if not _processes():
    raise UsageError("--memory_batches needs /proc, which this system does not have")
  batches, resident, count = _batches(options, source), {}, options.memory_batches
  wanted = sorted({1, max(count // 10, 1), max(count // 2, 1), count})
  try:
    for i in range(1, count + 1):
      next(batches)
      if i in wanted:
        pages = sum(int((path / "statm").read_text().split()[1]) for path in _processes())
        resident[i] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
  finally:
    batches.close()
  lines = [
    f"after batch {i:>8,}: {mb:8,.1f} MB resident in {options.workers + 1} processes"
    for i, mb in resident.items()
  ]
  return dict(lines=lines, resident_mb=resident)


def _pil_view(example, rng, size: int):
  """The chain of the reference implementations, a PIL picture; draws as ours does, so that equal generators give equal crops."""
  from PIL import Image

  from mrmae_jax.data import augment

  image = example["image"]
  picture = (
    Image.fromarray(image)
    if isinstance(image, np.ndarray)
    else Image.open(io.BytesIO(image)).convert("RGB")
  )
  top, left, height, width = augment.crop_box(picture.height, picture.width, rng, CROP_SCALE)
  view = picture.crop((left, top, left + width, top + height)).resize(
    (size, size), Image.Resampling.BICUBIC
  )
  return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view


def _same_pixels(options, source) -> bool:
  from mrmae_jax.data import augment

  def ours(example, rng):
    view = augment.random_resized_crop(
      augment.pixels(example), rng, (options.image_size,) * 2, CROP_SCALE
    )
    return augment.random_flip(view, rng)

  return all(
    np.array_equal(
      ours(source[i], np.random.default_rng(i)),
      _pil_view(source[i], np.random.default_rng(i), options.image_size),
    )
    for i in range(min(CHECKED, len(source)))
  )


class _TorchImages:
  """A map-style data set for torch: position in the stream -> normalised float tensor [3, S, S] and label."""

  def __init__(self, source, size: int):
    from mrmae_jax import constants

    self._source, self._size = source, size
    self._mean, self._std = constants.IMAGENET_MEAN, constants.IMAGENET_STD

  def __getitem__(self, index):
    import torch  # of all loaders only this one needs it

    position, image = index
    example = self._source[image]
    pixels = np.array(_pil_view(example, np.random.default_rng(position), self._size))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(x)[:, None, None] for x in (self._mean, self._std))
    return tensor.sub_(mean).div_(std), example["label"]


def _torch_batches(options, source):
  """Generator of the DataLoader's batches, without end; closing it ends the workers."""
  import torch.utils.data  # of all loaders only this one needs it

  def stream():  # one endless epoch: no pause where a small data set begins anew
    rng = np.random.default_rng(0)
    while True:
      yield from rng.permutation(len(source)).tolist()

  yield from torch.utils.data.DataLoader(
    _TorchImages(source, options.image_size),
    options.batch_size,
    sampler=enumerate(stream()),
    num_workers=options.workers,
  )
