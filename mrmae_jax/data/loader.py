"""Batches of uint8 images from a source, in an order that is a formula.

The global batch of step s depends on (seed, s) alone: not on how many hosts
share it, how many worker processes decode it, or where the run was resumed. No
iterator state is ever saved; the step number is the state.

Both functions return a grain iterator: `next()` gives a dict of numpy arrays,
`close()` ends its threads and worker processes. Worker processes are spawned,
so the script that calls with `workers > 0` needs a `__main__` guard.
"""

from collections.abc import Callable
import dataclasses
import os

from absl import flags
import grain
import numpy as np

from mrmae_jax.config import IMAGENET_MEAN
from mrmae_jax.config import IMAGENET_STD
from mrmae_jax.data import augment
from mrmae_jax.data import randaugment
from mrmae_jax.data.sources import DataError
from mrmae_jax.data.sources import Source

# More decoding threads than this in one process fight for the interpreter.
MAX_THREADS = 8


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
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    first_step: int = 0,
    shard: int = 0,
    num_shards: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
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
    randaug: RandAugment after that, see `randaugment.parse`; "" for none.
    erase_prob: of erasing a part after that, see `augment.random_erase`.
    mean, std: which will normalise the images; `randaug` and erasing use them.
    first_step: step of the first batch.
    shard: which part of each batch, of num_shards; joined in this order the
      parts are the same global batch for any num_shards.
    num_shards: parts that a global batch is cut into, one per host.
    workers: decoding processes; 0 decodes in threads of this process.

  Returns:
    Iterator of {"image": uint8 [b, H, W, 3], "label": int32 [b]} with
    b = batch_size / num_shards; label -1 where the source has none.

  Raises:
    DataError: at once for arguments that do not fit; from next() for an image
      that cannot be read, naming it. The iterator is of no use after that.
  """
  shard_size = _check(source, batch_size, shard, num_shards, workers)
  if seed < 0 or first_step < 0:
    raise DataError(
        f"seed={seed}, first_step={first_step} given; neither may be negative"
    )
  if not 0 <= erase_prob <= 1:
    raise DataError(f"erase_prob={erase_prob} given; expected 0 to 1")
  # Grain reshuffles epoch e with (shuffle seed + e): hashing the seed first
  # keeps the second epoch of seed 0 from being the first epoch of seed 1.
  shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2)
  view = _TrainView(
      image_size, crop_scale, flip, single_try, augment.resizer(resize),
      randaugment.parse(randaug), erase_prob, mean, std,
  )
  batches = (
      grain.MapDataset.source(source)
      .shuffle(seed=int(shuffle_seed))
      .repeat()
      .random_map(view, seed=int(augment_seed))
      .batch(shard_size, drop_remainder=True)
  )
  return _iterate(batches[first_step * num_shards + shard :: num_shards], workers)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    crop_pct: float,
    shard: int = 0,
    num_shards: int = 1,
    workers: int = 0,
    limit: int = 0,
) -> grain.DatasetIterator:
  """One pass over the images in order, each exactly once over all shards.

  Args:
    source: the images.
    batch_size: images per batch over all shards.
    image_size: (H, W) of the output.
    crop_pct: see `augment.center_crop`.
    shard: which part of each batch, of num_shards.
    num_shards: parts that a global batch is cut into, one per host.
    workers: decoding processes; 0 decodes in threads of this process.
    limit: if positive, only this many images, evenly spaced.

  Returns:
    Iterator of {"image": uint8 [b, H, W, 3], "label": int32 [b],
    "valid": bool [b]} with b = batch_size / num_shards. The last global batch
    is filled up with black images, label -1, valid False, so that all shards
    see the same number of batches.

  Raises:
    DataError: as in `train_batches`.
  """
  shard_size = _check(source, batch_size, shard, num_shards, workers)
  if not 0 < crop_pct <= 1:
    raise DataError(f"crop_pct={crop_pct} given; expected 0 < crop_pct <= 1")
  count = min(limit, len(source)) if limit > 0 else len(source)
  padded = -(-count // batch_size) * batch_size
  view = _EvalView(source, count, image_size, crop_pct)
  batches = (
      grain.MapDataset.range(padded)
      .map(view)
      .batch(shard_size, drop_remainder=True)
  )
  return _iterate(batches[shard::num_shards], workers)


def _check(source, batch_size, shard, num_shards, workers) -> int:
  """Images per batch and shard, or DataError for arguments that do not fit."""
  if not len(source):
    raise DataError(
        f"{source.description}: the dataset is empty; expected an image or more"
    )
  if batch_size < 1 or num_shards < 1 or batch_size % num_shards:
    lower = batch_size // max(num_shards, 1) * num_shards
    raise DataError(
        f"batch size {batch_size} cannot be cut into {num_shards} equal shards;"
        f" nearest: {max(lower, num_shards)} or {lower + num_shards}"
    )
  if not 0 <= shard < num_shards:
    raise DataError(
        f"shard {shard} of {num_shards} given; expected 0 to {num_shards - 1}"
    )
  if workers < 0:
    raise DataError(f"workers={workers} given; expected 0 or more")
  return batch_size // num_shards


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
        grain.MultiprocessingOptions(num_workers=workers)
    )
  return iter(batches)


@dataclasses.dataclass(frozen=True)
class _TrainView:
  """Example -> one random view of it. The generator is per stream position."""

  image_size: tuple[int, int]
  crop_scale: tuple[float, float]
  flip: bool
  single_try: bool
  resize: Callable
  policy: randaugment.Policy | None
  erase_prob: float
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, example: dict, rng: np.random.Generator) -> dict:
    image = augment.random_resized_crop(
        augment.pixels(example), rng, self.image_size, self.crop_scale,
        single_try=self.single_try, resize=self.resize,
    )
    if self.flip:
      image = augment.random_flip(image, rng)
    if self.policy:
      image = randaugment.randaugment(
          image, rng, self.policy, randaugment.mean_colour(self.mean)
      )
    if self.erase_prob:
      image = augment.random_erase(
          image, rng, self.erase_prob, self.mean, self.std
      )
    return {"image": image, "label": np.int32(example["label"])}


@dataclasses.dataclass(frozen=True)
class _EvalView:
  """Position in the padded pass -> the evaluation view of that image."""

  source: Source
  count: int
  image_size: tuple[int, int]
  crop_pct: float

  def __call__(self, position: int) -> dict:
    if position >= self.count:
      return {
          "image": np.zeros((*self.image_size, 3), np.uint8),
          "label": np.int32(-1),
          "valid": np.bool_(False),
      }
    # The identity when all images are wanted, else evenly spaced.
    example = self.source[position * len(self.source) // self.count]
    image = augment.center_crop(
        augment.pixels(example), self.image_size, self.crop_pct
    )
    return {
        "image": image,
        "label": np.int32(example["label"]),
        "valid": np.bool_(True),
    }
