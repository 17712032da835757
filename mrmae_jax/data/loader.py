"""Batches of uint8 images from a source, in an order that is a formula.

The global batch of step s depends on (seed, s) alone: not on how many hosts
share it, how many worker processes decode it, or where the run was resumed. No
iterator state is ever saved; the step number is the state.

That holds for images that cannot be read, too: with on_error="skip" the place
of one is taken by another that is drawn with the generator of this place in the
stream. Worker processes are spawned, so the script that calls with
`workers > 0` needs a `__main__` guard; they end with the process that they work
for, however it ends.
"""

import dataclasses
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable

import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.data import augment, randaugment
from mrmae_jax.data.sources import Source
from mrmae_jax.errors import DataError

# More decoding threads than this in one process fight for the interpreter.
MAX_THREADS = 8
# So many images are drawn in the place of one that cannot be read.
MAX_DRAWS = 100
# Of the reason why an image was skipped, as it travels with a batch.
REASON_BYTES = 400
# Longest wait, in seconds, for the thread that fetches batches, at the end.
CLOSE_S = 1.0


def loader_options(config) -> dict:
  """What both functions below take from a run's `config.data`, by name."""
  names = ("workers", "on_error", "max_skipped", "timeout_s")
  return {name: config[name] for name in names} | {"channels": len(config.mean)}


def train_batches(
  source: Source,
  *,
  seed: int,
  batch_size: int,
  image_size: tuple[int, int],
  crop_scale: tuple[float, float],
  flip: bool,
  single_try: bool = False,
  resize: str = "pillow",
  randaug: str = "",
  erase_prob: float = 0.0,
  mean: tuple[float, ...] = IMAGENET_MEAN,
  std: tuple[float, ...] = IMAGENET_STD,
  channels: int = 3,
  first_step: int = 0,
  shard: int = 0,
  num_shards: int = 1,
  workers: int = 0,
  on_error: str = "raise",
  max_skipped: float = 0.01,
  timeout_s: float = 0.0,
) -> "Batches":
  """Endless training batches, from step `first_step` on.

  Every epoch is a new permutation. Batches run across the end of an epoch, so
  no image is dropped, and a dataset smaller than a batch is repeated in it.

  Args:
    source: the images.
    seed: 0 <= seed; decides order and views.
    batch_size: images per step over all shards.
    image_size: (H, W) of the output.
    crop_scale: range of the crop area relative to the image.
    flip: whether half of the images are mirrored.
    single_try: crops by the rule of MAE's linear probe, see `augment.crop_box`.
    resize: "pillow", the exact one, or "cv2", see `augment.resizer`.
    randaug: RandAugment after that, see `randaugment.parse`; "" for none. RGB
      alone.
    erase_prob: of erasing a part after that, see `augment.random_erase`.
    mean, std: which will normalise the images; `randaug` and erasing use them.
    channels: C of the output, see `augment.with_channels`.
    first_step: step of the first batch.
    shard: which part of each batch, of num_shards; joined in this order the
      parts are the same global batch for any num_shards.
    num_shards: parts that a global batch is cut into, one per host.
    workers: decoding processes; 0 decodes in threads of this process.
    on_error: "raise" at an image that cannot be read, or "skip": another image
      takes its place, see `_TrainView`.
    max_skipped: share of the source's images that may be skipped; each shard
      counts the different ones that it has met.
    timeout_s: longest wait for a batch in seconds; 0 for no limit.

  Returns:
    Iterator of {"image": uint8 [b, H, W, C], "label": int32 [b]} with
    b = batch_size / num_shards; label -1 where the source has none.

  Raises:
    DataError: at once for arguments that do not fit; from next() as `Batches`
      says.
  """
  shard_size = _check(source, batch_size, shard, num_shards, workers, on_error)
  if seed < 0 or first_step < 0:
    raise DataError(f"seed={seed}, first_step={first_step} given; neither may be negative")
  if not 0 <= erase_prob <= 1:
    raise DataError(f"erase_prob={erase_prob} given; expected 0 to 1")
  if randaug and channels != 3:
    raise DataError(f"randaug={randaug!r} given; of {channels} channels expected ''")
  # Grain reshuffles epoch e with (shuffle seed + e): hashing the seed first
  # keeps the second epoch of seed 0 from being the first epoch of seed 1.
  shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2)
  view = _TrainView(
    source,
    channels,
    on_error == "skip",
    image_size,
    crop_scale,
    flip,
    single_try,
    augment.resizer(resize),
    randaugment.parse(randaug),
    erase_prob,
    mean,
    std,
  )
  order = grain.MapDataset.range(len(source)).shuffle(seed=int(shuffle_seed)).repeat()

  def mine(stream):
    batches = stream.batch(shard_size, drop_remainder=True)
    return batches[first_step * num_shards + shard :: num_shards]

  return Batches(
    source,
    mine(order),
    mine(order.random_map(view, seed=int(augment_seed))),
    workers=workers,
    max_skipped=max_skipped,
    timeout_s=timeout_s,
    first_step=first_step,
    consequence="another image takes its place",
  )


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  image_size: tuple[int, int],
  crop_pct: float,
  channels: int = 3,
  shard: int = 0,
  num_shards: int = 1,
  workers: int = 0,
  limit: int = 0,
  on_error: str = "raise",
  max_skipped: float = 0.01,
  timeout_s: float = 0.0,
) -> "Batches":
  """One pass over the images in order, each exactly once over all shards.

  Args:
    source: the images.
    batch_size: images per batch over all shards.
    image_size: (H, W) of the output.
    crop_pct: see `augment.center_crop`.
    channels: C of the output, see `augment.with_channels`.
    shard: which part of each batch, of num_shards.
    num_shards: parts that a global batch is cut into, one per host.
    workers: decoding processes; 0 decodes in threads of this process.
    limit: if positive, only this many images, evenly spaced.
    on_error: "raise" at an image that cannot be read, or "skip": it is not
      valid. Nothing takes its place: no image may count twice.
    max_skipped, timeout_s: as in `train_batches`.

  Returns:
    Iterator of {"image": uint8 [b, H, W, C], "label": int32 [b],
    "valid": bool [b]} with b = batch_size / num_shards. The last global batch
    is filled up with black images, label -1, valid False, so that all shards
    see the same number of batches.

  Raises:
    DataError: as in `train_batches`.
  """
  shard_size = _check(source, batch_size, shard, num_shards, workers, on_error)
  if not 0 < crop_pct <= 1:
    raise DataError(f"crop_pct={crop_pct} given; expected 0 < crop_pct <= 1")
  count = min(limit, len(source)) if limit > 0 else len(source)
  padded = -(-count // batch_size) * batch_size
  view = _EvalView(source, channels, on_error == "skip", image_size, crop_pct)
  order = grain.MapDataset.range(padded).map(_Spaced(len(source), count))

  def mine(stream):
    return stream.batch(shard_size, drop_remainder=True)[shard::num_shards]

  return Batches(
    source,
    mine(order),
    mine(order.map(view)),
    workers=workers,
    max_skipped=max_skipped,
    timeout_s=timeout_s,
    consequence="it is not counted",
  )


def _check(source, batch_size, shard, num_shards, workers, on_error) -> int:
  """Images per batch and shard, or DataError for arguments that do not fit."""
  if not len(source):
    raise DataError(f"{source.description}: the dataset is empty; expected an image or more")
  if batch_size < 1 or num_shards < 1 or batch_size % num_shards:
    lower = batch_size // max(num_shards, 1) * num_shards
    raise DataError(
      f"batch size {batch_size} cannot be cut into {num_shards} equal shards;"
      f" nearest: {max(lower, num_shards)} or {lower + num_shards}"
    )
  if not 0 <= shard < num_shards:
    raise DataError(f"shard {shard} of {num_shards} given; expected 0 to {num_shards - 1}")
  if workers < 0:
    raise DataError(f"workers={workers} given; expected 0 or more")
  if on_error not in ("raise", "skip"):
    raise DataError(f"on_error={on_error!r} given; expected 'raise' or 'skip'")
  return batch_size // num_shards


class Batches:
  """Iterator over the batches of one shard, see the two functions above.

  `next()` gives a dict of numpy arrays. Each image that was skipped is named by
  a warning on stderr, once. `close()` ends threads and worker processes.

  Attributes:
    skipped: {index in the source: why}, of the images that could not be read.

  Raises:
    DataError: from next(), after which the iterator is closed: an image cannot
      be read, or more than may be; a worker process died; memory ran out; a
      batch did not come in time.
  """

  def __init__(
    self,
    source: Source,
    order: grain.MapDataset,
    batches: grain.MapDataset,
    *,
    workers: int,
    max_skipped: float,
    timeout_s: float,
    consequence: str,
    first_step: int = 0,
  ):
    """Starts nothing yet.

    Args:
      source: the images.
      order: their indices, batch by batch; -1 for what is no image.
      batches: the same as dicts of arrays. "skipped", the reason why an image
        was, is taken out.
      workers, max_skipped, timeout_s, first_step: see `train_batches`.
      consequence: what the warning says becomes of an image.
    """
    self.skipped = {}
    self._source, self._order = source, order
    self._max_skipped, self._timeout_s = max_skipped, timeout_s
    self._consequence, self._first_step = consequence, first_step
    self._taken = 0
    self._other_processes = set(multiprocessing.active_children())
    self._batches = _iterate(batches, workers)
    self._requests = self._results = self._fetcher = None  # see _ask

  def __iter__(self):
    return self

  def __next__(self) -> dict:
    try:
      batch = self._wait() if self._timeout_s else next(self._batches)
      self._count(batch.pop("skipped"))
    except DataError:
      self.close()
      raise
    except MemoryError as error:
      self.close()
      raise DataError(
        f"memory ran out while images were decoded{_memory()}; {_SAVE_MEMORY}"
      ) from error
    except RuntimeError as error:
      # Grain's words; it has no type of its own for that.
      code = re.search("terminated unexpectedly with exit code (-?[0-9]+)", str(error))
      if not code:
        raise
      self.close()
      raise DataError(_death(int(code[1]))) from error
    self._taken += 1
    return batch

  def close(self) -> None:
    if self._fetcher:
      self._requests.put(False)
      self._fetcher.join(CLOSE_S)  # it may be stuck
      self._fetcher = None
    self._batches.close()

  def _wait(self) -> dict:
    """The next batch; DataError if it does not come in time."""
    if not self._fetcher:
      self._ask()
    try:
      batch, error = self._results.get(timeout=self._timeout_s)
    except queue.Empty:
      # Grain would wait for its workers to end by themselves.
      for process in multiprocessing.active_children():
        if process not in self._other_processes:
          process.kill()
      names = [self._source.name(i) for i in self._indices() if i >= 0]
      raise DataError(
        f"waited {self._timeout_s:g} s for batch"
        f" {self._first_step + self._taken} (the first is 0) of"
        f" {self._source.description}: an image cannot be read or decoded to its"
        f" end, or a worker has no memory{_memory()}; look at the storage, or"
        " give a larger timeout_s; the images of this batch:"
        f" {', '.join(names)}"
      ) from None
    if error:
      self._fetcher = None  # it has ended, too
      raise error
    self._ask()
    return batch

  def _ask(self) -> None:
    """Lets a thread fetch a batch, whose coming can be waited for with a limit.

    It is the same thread each time, and asked one batch ahead: while the step
    keeps all cores busy, a new one takes a fifth of a second to begin.
    """
    if not self._fetcher:
      self._requests, self._results = queue.SimpleQueue(), queue.SimpleQueue()
      self._fetcher = threading.Thread(
        target=_fetch, args=(self._batches, self._requests, self._results), daemon=True
      )
      self._fetcher.start()
      weakref.finalize(self, self._requests.put, False)  # it ends with this object
    self._requests.put(True)

  def _indices(self) -> np.ndarray:
    """Of the images in the next batch, int [b]."""
    return self._order[self._taken]

  def _count(self, reasons: np.ndarray) -> None:
    """Warns of images that were skipped, or DataError if there are too many."""
    if not reasons.any():
      return
    for index, reason in zip(self._indices().tolist(), reasons.tolist()):
      if not reason or index in self.skipped:
        continue
      self.skipped[index] = reason.decode(errors="replace")
      number, most = len(self.skipped), int(self._max_skipped * len(self._source))
      if number > most:
        raise DataError(
          f"{self.skipped[index]}; {number} of {len(self._source)} images could"
          f" not be read, max_skipped={self._max_skipped:g} allows {most}; list"
          " them with mrmae verify"
        )
      tqdm.write(
        f"warning: {self.skipped[index]}; {self._consequence} ({number} of"
        f" {len(self._source)} images skipped so far, at most {most})",
        file=sys.stderr,
      )
      sys.stderr.flush()


_SAVE_MEMORY = (
  "use fewer data.workers, a smaller batch, or images packed at a smaller size"
  " (mrmae pack --short_side)"
)


def _death(code: int) -> str:
  """What to say of a worker process that ended with this exit code."""
  if code == -signal.SIGKILL:
    return (
      "a worker process of the loader was killed by signal 9: probably out of"
      f" memory{_memory()}; {_SAVE_MEMORY}"
    )
  how = f"signal {-code}" if code < 0 else f"exit code {code}"
  return (
    f"a worker process of the loader ended with {how}; what it wrote stands"
    " above. If it was a decoder that crashed, python -m mrmae_jax.cli.verify"
    " verify finds the image"
  )


def _memory() -> str:
  """The memory of this machine as Linux counts it; "" elsewhere."""
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      kib = {line.split()[0]: int(line.split()[1]) for line in file}
    available, total = (kib[name] / 2**20 for name in ("MemAvailable:", "MemTotal:"))
  except (OSError, KeyError):
    return ""
  return f" (of {total:.1f} GiB on this machine {available:.1f} are available now)"


def _end_with_parent(worker: int, workers: int) -> None:
  """Runs in each worker process: it ends when the one that started it has.

  A process that is killed cannot end its workers. prctl's signal would come
  with the end of the thread that started them, which is grain's.
  """
  del worker, workers
  parent = multiprocessing.parent_process().pid

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(1)  # nobody is left to clean up for

  threading.Thread(target=watch, daemon=True).start()


def _fetch(batches, requests: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
  """Puts a batch, or why there is none, into `results` for each request, until the first error or a request that is False."""
  error = None
  while not error and requests.get():
    try:
      results.put((next(batches), None))
    except BaseException as caught:  # it is raised where the batch is waited for
      results.put((None, error := caught))


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
  """Iterator over a map dataset of batches, decoded ahead of their use.

  The batches are formed before this point, so that the division of labour
  between threads and processes cannot change what is in them.
  """
  threads = 1 if workers else min(os.cpu_count() or 1, MAX_THREADS)
  # Grain's default buffer is 500 elements, and an element is a whole batch.
  batches = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain hands its flags on to the workers.
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers), _end_with_parent
    )
  return iter(batches)


def _reason(error: DataError | str) -> np.ndarray:
  """A text as an array that batches can hold."""
  text = str(error).encode(errors="backslashreplace")
  return np.array(text, f"S{REASON_BYTES}")


@dataclasses.dataclass(frozen=True)
class _TrainView:
  """Index of an image -> one random view of it.

  The generator is per stream position. With `skip` it also draws another image,
  uniformly, in the place of one that cannot be read, until one can.
  """

  source: Source
  channels: int
  skip: bool
  image_size: tuple[int, int]
  crop_scale: tuple[float, float]
  flip: bool
  single_try: bool
  resize: Callable
  policy: randaugment.Policy | None
  erase_prob: float
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __call__(self, index: int, rng: np.random.Generator) -> dict:
    image, label, skipped = self._read(index, rng)
    image = augment.random_resized_crop(
      image,
      rng,
      self.image_size,
      self.crop_scale,
      single_try=self.single_try,
      resize=self.resize,
    )
    if self.flip:
      image = augment.random_flip(image, rng)
    if self.policy:
      image = randaugment.randaugment(image, rng, self.policy, randaugment.mean_colour(self.mean))
    if self.erase_prob:
      image = augment.random_erase(image, rng, self.erase_prob, self.mean, self.std)
    return {"image": image, "label": label, "skipped": skipped}

  def _read(self, index, rng):
    """Pixels, label, and why it is not those of `index`, if it is not."""
    reason = ""
    for _ in range(MAX_DRAWS):
      try:
        example = self.source[index]
        image = augment.pixels(example, self.channels)
        return image, np.int32(example["label"]), _reason(reason)
      except DataError as error:
        if not self.skip:
          raise
        reason = reason or str(error)
        index = int(rng.integers(len(self.source)))
    raise DataError(f"{reason}; of {MAX_DRAWS - 1} others drawn in its place none can be read")


@dataclasses.dataclass(frozen=True)
class _Spaced:
  """Position in a padded pass -> index of its image, or -1."""

  images: int
  count: int  # Of positions that have one.

  def __call__(self, position: int) -> int:
    # The identity when all images are wanted, else evenly spaced.
    return position * self.images // self.count if position < self.count else -1


@dataclasses.dataclass(frozen=True)
class _EvalView:
  """Index of an image -> the evaluation view of it, black for -1."""

  source: Source
  channels: int
  skip: bool
  image_size: tuple[int, int]
  crop_pct: float

  def __call__(self, index: int) -> dict:
    reason = ""
    if index >= 0:
      try:
        example = self.source[index]
        image = augment.pixels(example, self.channels)
        image = augment.center_crop(image, self.image_size, self.crop_pct)
        return {
          "image": image,
          "label": np.int32(example["label"]),
          "valid": np.bool_(True),
          "skipped": _reason(""),
        }
      except DataError as error:
        if not self.skip:
          raise
        reason = error
    return {
      "image": np.zeros((*self.image_size, self.channels), np.uint8),
      "label": np.int32(-1),
      "valid": np.bool_(False),
      "skipped": _reason(reason),
    }
