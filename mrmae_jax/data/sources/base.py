"""What all sources share: the protocol, and the rules by which images are split."""

import functools
import hashlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from mrmae_jax.errors import DataError, MissingSplitError

SAMPLE = 128  # images whose contents a run remembers
SAMPLE_BYTES = 256 * 2**20  # and as many bytes of them at most


class Source(Protocol):
  """A random-access sequence of examples that are still encoded.

  A source holds no open handle that cannot cross a process boundary, so that grain's worker
  processes can have their own copy.

  Attributes:
    class_names: one name per label; empty when the images have no labels.
    description: one line for the log. A source may have an attribute `left_out`, a part of it:
      the files that are not read, "" if there are none.
    fingerprint: identifies the images by number and name. It is the same on every host that has
      the same images, wherever they lie. A source may have an attribute `is_known_by_names`: the
      fingerprint is the same for images with other contents.
  """

  class_names: tuple[str, ...]
  description: str
  fingerprint: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the example of image `index`: {"image", "label", "name"}.

    The image is its encoded bytes or its pixels (uint8 [H, W, C]). The label is an int, -1 when
    there is none. The name lets a person find the image. Of scenes the label is a class for every
    pixel, uint8 [H, W] with 255 for ignored ones, and "label_name" lets a person find it. Images
    with objects have their "id" and "objects", see `segmentations.Objects`.

    Raises:
      DataError: the image cannot be read.
    """
    ...

  def name(self, index: int) -> str:
    """Returns the name of image `index` without reading its file.

    It does not say where the source lies, as the "name" of an example may.
    """
    ...


class NothingHeldOut(MissingSplitError):
  """There is no evaluation split, and no image is held out."""


class SplitRules(NamedTuple):
  """How a dataset is divided into "train" and "eval"; see `open_source`."""

  train_split: str
  eval_split: str
  data_dir: str
  holdout_every: int
  labels: str = ""
  zero_is_unlabelled: bool | None = None
  max_dropped: float | None = None


@functools.lru_cache(maxsize=1)  # hosts compare it before the run records it: read it once
def sample_contents(source: Source) -> list[str]:
  """Returns digests of images that are spread over a source, in a fixed order.

  The fingerprint of a folder says nothing of contents, and to read them all would take hours. This
  reads SAMPLE images, or fewer if these are large; an image that cannot be read has the digest "".

  Returns:
    [] for a source whose fingerprint depends on the contents.
  """
  digests, num_bytes = [], 0
  if not getattr(source, "is_known_by_names", False):
    return digests
  spread = np.random.default_rng(0).permutation(len(source))[:SAMPLE]
  for index in spread:
    try:
      example = source[int(index)]
      content = bytes(memoryview(example["image"]).cast("B"))
      if isinstance(example["label"], np.ndarray):  # a class for every pixel
        content += example["label"].tobytes()
    except DataError:
      content = b""
    digests.append(hashlib.sha256(content).hexdigest()[:8] if content else "")
    num_bytes += len(content)
    if num_bytes > SAMPLE_BYTES:
      break
  return digests


def describe_classes(class_names: tuple[str, ...]) -> str:
  return f"{len(class_names)} classes" if class_names else "no labels"


def check_same_classes(train: Source, evaluation: Source) -> None:
  """Raises DataError unless images to measure on have the classes of the training images."""
  if evaluation.class_names != train.class_names:
    raise DataError(
      f"{evaluation.description}: no classes to measure; put each image into a sub-folder named as"
      " its class of the training images, or name another folder with eval_split"
    )


def hold_out(count: int, split: str, every: int, description: str) -> np.ndarray:
  """Returns the indices (int64, sorted) of `split` among `count` images without splits."""
  if not every:
    if split == "eval":
      advice = f"set holdout_every={min(count, 10)}, say, or " if count > 1 else ""
      raise NothingHeldOut(
        f"{description} has no evaluation split and holdout_every=0 keeps every image for training;"
        f" {advice}add an evaluation split"
      )
    return np.arange(count)
  held_out = np.arange(count) % every == every - 1
  indices = np.flatnonzero(held_out if split == "eval" else ~held_out)
  if not indices.size:
    advice = f"set holdout_every to at most {count}, or" if count > 1 else "one is for training:"
    raise MissingSplitError(
      f"{description} has {count} image{'s' * (count > 1)}; holding out one in {every} leaves none"
      f" for {split!r}; {advice} add images"
    )
  return indices


def holdout_note(split: str, every: int) -> str:
  if not every:
    return "nothing held out"
  return f"the held-out one in {every}" if split == "eval" else f"one in {every} held out"


def first_line(error: Exception) -> str:
  """Returns the first line of an error's text, or its type."""
  return (str(error).strip("\"' ").splitlines() or [type(error).__name__])[0]
