"""Batches of numpy arrays from a source, in an order that is a formula.

The global batch of step s depends on (seed, s) alone: not on the number of hosts that share it, not
on the number of worker processes, and not on the step from which a run was resumed. No iterator
state is saved; the step number is the state.

The formula covers images that cannot be read, too: with on_error="skip" another image takes the
place of such an image, drawn with the random generator of that place in the stream.

Worker processes are spawned, so a script that asks for `workers > 0` needs a `__main__` guard. They
end with the process that started them, however it ends.
"""

import dataclasses
import functools
import multiprocessing
import os
import queue
import re
import resource
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from mrmae_jax.data.sources import Source
from mrmae_jax.data.views import View
from mrmae_jax.errors import DataError, UserError, printable

MAX_THREADS = 8  # more decoding threads in one process fight for the interpreter
FILES_PER_WORKER = 20  # that the process of the loader has open: pipes and shared memory
MAX_DRAWS = 100  # images tried for one place in the stream
REASON_BYTES = 400  # of the reason why an image was skipped, as it travels with a batch
CLOSE_S = 1.0  # longest wait in seconds for the thread that fetches batches, at the end


class LoaderOptions(NamedTuple):
  """How batches are made; none of these changes a batch whose images can all be read.

  Attributes:
    workers: decoding processes; 0 decodes in threads of this process.
    on_error: "raise" at an image that cannot be read, or "skip" it.
    max_skipped: share of the source's images that may be skipped. Each shard counts the different
      images that it skipped itself.
    timeout_s: longest wait for a batch in seconds; 0 for no limit.
  """

  workers: int = 0
  on_error: str = "raise"
  max_skipped: float = 0.01
  timeout_s: float = 0.0


def loader_options(config) -> LoaderOptions:
  """Returns the options that a run's `config.data` sets."""
  return LoaderOptions(**{name: config[name] for name in LoaderOptions._fields})


def train_batches(
  source: Source,
  view: View,
  *,
  seed: int,
  batch_size: int,
  first_step: int = 0,
  shard: int = 0,
  num_shards: int = 1,
  options: LoaderOptions = LoaderOptions(),
) -> "Batches":
  """Returns endless training batches, from step `first_step` on.

  Every epoch is a new permutation. Batches run across the end of an epoch, so that no image is
  dropped; a source with fewer images than a batch is repeated within the batch.

  Args:
    source: the images.
    view: turns an example into the arrays of one row of a batch.
    seed: 0 <= seed; decides the order and the random numbers of the views.
    batch_size: images per step over all shards.
    first_step: step of the first batch.
    shard: index of this host's part of each batch. The parts joined in the order of this index
      are the same global batch for any num_shards.
    num_shards: number of parts that a global batch is cut into, one per host.
    options: see `LoaderOptions`. With on_error="skip" another image takes the place of one that
      cannot be read.

  Returns:
    An iterator of batches, dictionaries of arrays [b, ...] with the names of the view, where
    b = batch_size / num_shards.

  Raises:
    DataError: at once for arguments that do not fit; from next() as `Batches` says.
  """
  shard_size = _shard_size(source, batch_size, shard, num_shards, options)
  if seed < 0 or first_step < 0:
    raise DataError(f"seed={seed}, first_step={first_step} given; neither may be negative")
  # Grain reshuffles epoch e with (shuffle seed + e): hashing the seed first keeps the second epoch
  # of seed 0 from being the first epoch of seed 1.
  shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2)
  order = grain.MapDataset.range(len(source)).shuffle(seed=int(shuffle_seed)).repeat()
  row = _TrainRow(source, view, options.on_error == "skip")

  def shard_batches(stream):
    batches = stream.batch(shard_size, drop_remainder=True)
    return batches[first_step * num_shards + shard :: num_shards]

  return Batches(
    source,
    shard_batches(order),
    shard_batches(order.random_map(row, seed=int(augment_seed))),
    options,
    consequence="another image takes its place",
    first_step=first_step,
  )


def eval_batches(
  source: Source,
  view: View,
  *,
  batch_size: int,
  shard: int = 0,
  num_shards: int = 1,
  limit: int = 0,
  options: LoaderOptions = LoaderOptions(),
) -> "Batches":
  """Returns one pass over the images in order, each exactly once over all shards.

  Args:
    source: the images.
    view: turns an example into the arrays of one row. Its random numbers depend on the index of
      the image alone.
    batch_size: images per batch over all shards.
    shard, num_shards: as in `train_batches`.
    limit: if positive, only this many images, evenly spaced.
    options: see `LoaderOptions`. With on_error="skip" an image that cannot be read is a row that
      is not valid. Nothing takes its place, because an image must not count twice.

  Returns:
    An iterator of batches, dictionaries of arrays [b, ...] with the names of the view and "valid"
    (bool [b]), where b = batch_size / num_shards. Rows of zeros that are not valid fill the last
    global batch, so that all shards get the same number of batches.

  Raises:
    DataError: as in `train_batches`.
  """
  shard_size = _shard_size(source, batch_size, shard, num_shards, options)
  count = min(limit, len(source)) if limit > 0 else len(source)
  padded = -(-count // batch_size) * batch_size
  order = grain.MapDataset.range(padded).map(_Spaced(len(source), count))

  def shard_batches(stream):
    return stream.batch(shard_size, drop_remainder=True)[shard::num_shards]

  return Batches(
    source,
    shard_batches(order),
    shard_batches(order.map(_EvalRow(source, view, options))),
    options,
    consequence="it is not counted",
  )


def element_shapes(
  source: Source, view: View, options: LoaderOptions = LoaderOptions()
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Returns {name: (shape, dtype)} of one row of a batch, from the first image that can be read.

  Raises:
    DataError: the first image cannot be read; with on_error="skip" more images at the beginning
      of the source than options.max_skipped allows. Or reading takes longer than
      options.timeout_s.
  """
  _check_source(source)
  read = functools.partial(_first_row, source, view, options)
  if not options.timeout_s:
    row = read()
  else:
    fetcher = _Fetcher(read)
    fetcher.request()
    try:
      row = fetcher.get(options.timeout_s)
    except queue.Empty:
      raise DataError(
        f"waited {options.timeout_s:g} s for the first image of {source.description}"
        f" ({source.name(0)}): it cannot be read or decoded to its end; look at the storage, or"
        " give a larger timeout_s"
      ) from None
  return {name: (np.shape(value), np.asarray(value).dtype) for name, value in row.items()}


def _first_row(source: Source, view: View, options: LoaderOptions) -> dict[str, Any]:
  """Returns the view of the first example that can be read."""
  most = int(options.max_skipped * len(source)) if options.on_error == "skip" else 0
  last = min(most, len(source) - 1)
  for index in range(last + 1):
    try:
      return view(source[index], np.random.default_rng(index))
    except DataError:
      if index == last:
        raise


def _check_source(source: Source) -> None:
  if not len(source):
    raise DataError(f"{source.description}: the dataset is empty; expected an image or more")


def _shard_size(source, batch_size, shard, num_shards, options) -> int:
  """Returns the images per batch and shard, or raises DataError for arguments that do not fit."""
  _check_source(source)
  if batch_size < 1 or num_shards < 1 or batch_size % num_shards:
    lower = batch_size // max(num_shards, 1) * num_shards
    raise DataError(
      f"batch size {batch_size} cannot be cut into {num_shards} equal shards;"
      f" nearest: {max(lower, num_shards)} or {lower + num_shards}"
    )
  if not 0 <= shard < num_shards:
    raise DataError(f"shard {shard} of {num_shards} given; expected 0 to {num_shards - 1}")
  if options.workers < 0:
    raise DataError(f"workers={options.workers} given; expected 0 or more")
  if options.on_error not in ("raise", "skip"):
    raise DataError(f"on_error={options.on_error!r} given; expected 'raise' or 'skip'")
  return batch_size // num_shards


class Batches:
  """Iterates over the batches of one shard; `train_batches` and `eval_batches` make it.

  `next()` gives a dict of numpy arrays. A warning on stderr names each image that is skipped, once.
  `close()` ends threads and worker processes.

  Attributes:
    skipped: {index in the source: reason} of the images that could not be read.

  Raises:
    DataError: from next(), after which the iterator is closed. An image cannot be read, or more
      images than options.max_skipped allows; a worker process died; memory ran out; a batch did
      not come in time.
  """

  def __init__(
    self,
    source: Source,
    order: grain.MapDataset,
    batches: grain.MapDataset,
    options: LoaderOptions,
    *,
    consequence: str,
    first_step: int = 0,
  ):
    """Starts worker processes at the first `next()`, not before.

    Args:
      source: the images.
      order: their indices, batch by batch; -1 for a row that pads a batch.
      batches: the same as dicts of arrays. `next()` removes their field "skipped", the reasons
        why images were skipped.
      options: see `LoaderOptions`.
      consequence: how the warning ends that names a skipped image.
      first_step: number of the first batch, for messages.
    """
    self.skipped = {}
    self._source, self._order = source, order
    self._options, self._first_step = options, first_step
    self._consequence = consequence
    self._taken = 0
    self._other_processes = set(multiprocessing.active_children())
    self._batches = _iterate(batches, options.workers)
    self._fetcher = None

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    try:
      batch = self._wait() if self._options.timeout_s else next(self._batches)
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
      # Grain has no error type of its own for a worker that died, only this text.
      code = re.search("terminated unexpectedly with exit code (-?[0-9]+)", str(error))
      if not code:
        raise
      self.close()
      raise DataError(_death(int(code[1]))) from error
    self._taken += 1
    return batch

  def close(self) -> None:
    if self._fetcher:
      self._fetcher.close()
      self._fetcher = None
    self._batches.close()

  def _wait(self) -> dict[str, np.ndarray]:
    """Returns the next batch; raises DataError if it does not come in time."""
    if not self._fetcher:
      self._fetcher = _Fetcher(functools.partial(next, self._batches))
      self._fetcher.request()
    try:
      batch = self._fetcher.get(self._options.timeout_s)
    except queue.Empty:
      # Grain would wait for its workers to end by themselves.
      for process in multiprocessing.active_children():
        if process not in self._other_processes:
          process.kill()
      names = [self._source.name(i) for i in self._indices() if i >= 0]
      raise DataError(
        f"waited {self._options.timeout_s:g} s for batch {self._first_step + self._taken} (the"
        f" first is 0) of {self._source.description}: an image cannot be read or decoded to its"
        f" end, or a worker has no memory{_memory()}; look at the storage, or give a larger"
        f" timeout_s; the images of this batch: {', '.join(names)}"
      ) from None
    self._fetcher.request()  # one batch ahead
    return batch

  def _indices(self) -> np.ndarray:
    """Returns the indices of the images in the next batch, int [b]."""
    return self._order[self._taken]

  def _count(self, reasons: np.ndarray) -> None:
    """Warns of skipped images; raises DataError if there are too many."""
    if not reasons.any():
      return
    for index, reason in zip(self._indices().tolist(), reasons.tolist()):
      if not reason or index in self.skipped:
        continue
      self.skipped[index] = reason.decode(errors="replace")
      warn_of_skipped(self.skipped, len(self._source), self._options, self._consequence)


def warn_of_skipped(
  skipped: dict[int, str], total: int, options: LoaderOptions, consequence: str
) -> None:
  """Warns of the image that was skipped last.

  Args:
    skipped: {index: reason} of all that were skipped, of which this is the last.
    total: number of images of the source.
    options: `max_skipped` says how many may be skipped.
    consequence: how the warning ends.

  Raises:
    DataError: there are too many.
  """
  reason, number = printable(list(skipped.values())[-1]), len(skipped)
  most = int(options.max_skipped * total)
  if number > most:
    raise DataError(
      f"{reason}; {number} of {total} images could not be read,"
      f" max_skipped={options.max_skipped:g} allows {most}; list them with mrmae verify"
    )
  tqdm.write(
    f"warning: {reason}; {consequence} ({number} of {total} images skipped so far, at most {most})",
    file=sys.stderr,
  )
  sys.stderr.flush()


_SAVE_MEMORY = (
  "use fewer data.workers, a smaller batch, or images packed at a smaller size"
  " (mrmae pack --short_side)"
)


def _death(code: int) -> str:
  """Returns the message about a worker process that ended with an exit code."""
  if code == -signal.SIGKILL:
    return (
      "a worker process of the loader was killed by signal 9: probably out of"
      f" memory{_memory()}; {_SAVE_MEMORY}"
    )
  how = f"signal {-code}" if code < 0 else f"exit code {code}"
  return (
    f"a worker process of the loader ended with {how}; its own messages stand above. If a decoder"
    " crashed, mrmae verify finds the image"
  )


def _memory() -> str:
  """Returns the memory of this machine as Linux counts it; "" elsewhere."""
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      kib = {line.split()[0]: int(line.split()[1]) for line in file}
    available, total = (kib[name] / 2**20 for name in ("MemAvailable:", "MemTotal:"))
  except (OSError, KeyError):
    return ""
  return f" (of {total:.1f} GiB on this machine {available:.1f} are available now)"


class _Fetcher:
  """Calls a function in a daemon thread, so that a caller can wait for the result with a limit.

  The thread stays the same for all calls: a new one takes a fifth of a second to begin while the
  training step keeps all cores busy. It ends with this object.
  """

  def __init__(self, function: Callable[[], Any]):
    self._requests, self._results = queue.SimpleQueue(), queue.SimpleQueue()
    self._thread = threading.Thread(
      target=_serve, args=(function, self._requests, self._results), daemon=True
    )
    self._thread.start()
    weakref.finalize(self, self._requests.put, False)

  def request(self) -> None:
    """Starts a call."""
    self._requests.put(True)

  def get(self, timeout_s: float) -> Any:
    """Returns the result of a requested call, or raises its error; queue.Empty if it is late."""
    result, error = self._results.get(timeout=timeout_s)
    if error:
      self._results.put((None, error))  # the thread has ended: later calls raise the same
      raise error
    return result

  def close(self) -> None:
    self._requests.put(False)
    self._thread.join(CLOSE_S)  # it may be stuck


def _serve(function, requests: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
  """Puts (result, error) into `results` for each request, until an error or a request of False."""
  error = None
  while not error and requests.get():
    try:
      results.put((function(), None))
    except BaseException as caught:  # `get` raises it in the thread that waits
      error = caught
      results.put((None, error))


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
  """Returns an iterator over a map dataset of batches that decodes them ahead of their use.

  The batches are formed before this point, so that the division of labor between threads and
  processes cannot change them.
  """
  threads = 1 if workers else min(os.cpu_count() or 1, MAX_THREADS)
  # Grain's default buffer is 500 elements, and an element is a batch.
  batches = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  if workers:
    _allow_open_files(workers)
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain hands its flags on to the workers.
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers), _end_with_parent
    )
  return iter(batches)


def _allow_open_files(workers: int) -> None:
  """Lets this process open the pipes and the shared memory of its workers.

  Raises:
    UserError: the operating system does not let it.
  """
  required = FILES_PER_WORKER * (workers + 2)
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if resource.RLIM_INFINITY in (soft, hard) or soft >= required:
    return
  if hard < required:
    raise UserError(
      f"this process may open {hard} files (ulimit -n), and {workers} workers need {required}: "
      f"raise the limit, or set data.workers={max(0, hard // FILES_PER_WORKER - 2)}"
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_with_parent(worker: int, workers: int) -> None:
  """Makes a worker process end when the process that started it has ended.

  A process that is killed cannot end its workers. prctl's signal would come with the end of the
  thread that started them, which is grain's.
  """
  del worker, workers

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)  # nobody is left to clean up for

  threading.Thread(target=watch, daemon=True).start()


def _reason(error: DataError | str) -> np.ndarray:
  """Returns a text as an array that batches can hold."""
  text = str(error).encode(errors="backslashreplace")
  return np.array(text, f"S{REASON_BYTES}")


@dataclasses.dataclass(frozen=True)
class _TrainRow:
  """Maps the index of an image to a row of a training batch.

  The random generator belongs to the place in the stream. With `skip` it also draws another image,
  uniformly, for one that cannot be read, until one can.
  """

  source: Source
  view: View
  skip: bool

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    reason = ""
    for _ in range(MAX_DRAWS):
      try:
        return self.view(self.source[index], rng) | {"skipped": _reason(reason)}
      except DataError as error:
        if not self.skip:
          raise
        reason = reason or str(error)
        index = int(rng.integers(len(self.source)))
    raise DataError(f"{reason}; of {MAX_DRAWS - 1} others drawn in its place none can be read")


@dataclasses.dataclass(frozen=True)
class _Spaced:
  """Maps a position in a padded pass to the index of its image, or to -1.

  Attributes:
    images: number of images in the source.
    count: number of positions that have an image, evenly spaced.
  """

  images: int
  count: int

  def __call__(self, position: int) -> int:
    return position * self.images // self.count if position < self.count else -1


@dataclasses.dataclass(frozen=True)
class _EvalRow:
  """Maps the index of an image to a row of an evaluation batch; -1 to a row of zeros."""

  source: Source
  view: View
  options: LoaderOptions

  def __call__(self, index: int) -> dict[str, Any]:
    reason = ""
    if index >= 0:
      try:
        row = self.view(self.source[index], np.random.default_rng(index))
        return row | {"valid": np.bool_(True), "skipped": _reason("")}
      except DataError as error:
        if self.options.on_error != "skip":
          raise
        reason = error
    return self._zeros | {"valid": np.bool_(False), "skipped": _reason(reason)}

  @functools.cached_property
  def _zeros(self) -> dict[str, np.ndarray]:
    row = _first_row(self.source, self.view, self.options)
    return {name: np.zeros_like(value) for name, value in row.items()}
