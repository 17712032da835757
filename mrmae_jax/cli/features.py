"""Features of images, for search, clustering or a classifier of your own."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
from tqdm import tqdm

from mrmae_jax import constants, data, mrmae, pretrained
from mrmae_jax.cli.images import (
  find_images,
  find_size,
  find_view,
  open_images,
  read_run_data,
  skip_options,
)
from mrmae_jax.errors import UsageError
from mrmae_jax.models import ConvViT
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_write, require_writable
from mrmae_jax.weights import loaded_model


class Encoder(NamedTuple):
  """A function from images to features.

  Attributes:
    encode: uint8 [B, H, W, C] -> [B, D], tokens [B, N, D] or maps [B, h, w, D].
    image_size: (height, width) that it takes.
    channels: C.
    report: what was loaded.
  """

  encode: Callable
  image_size: tuple[int, int]
  channels: int
  report: str


def run(options) -> str:
  """Carries out `mrmae features`.

  Raises:
    UsageError, WeightsError, DataError: options, a model or images that do not fit.
  """
  write = find_writer(options.out, WRITERS)
  require_writable(options.out)
  source = open_images(options, find_images(options, [options.model]), options.split)
  view = find_view(options, options.model)
  encoder = load_encoder(options)
  print(f"{encoder.report}\n{source.description}", flush=True)
  batches = extract(
    encoder.encode,
    source,
    image_size=encoder.image_size,
    batch_size=options.batch_size,
    channels=encoder.channels,
    loader=skip_options(options),
    **view,
  )
  about = {
    "model": options.model,
    "untrained": options.untrained,
    "feature": options.feature,
    "image_size": encoder.image_size,
    "dtype": options.dtype,
    "report": encoder.report,
    "images": source.description,
    **view,
  }
  out = Path(options.out).expanduser()
  batches, sizes = show_progress(batches, len(source)), []
  with supervision.supervised(hang_s=0), atomic_write(out) as temporary:
    write(temporary, count_rows(batches, sizes), source.class_names, about)
  height, width = encoder.image_size
  return (
    f"wrote {options.out}: {options.feature} features of {sum(sizes)} images at {height}x{width}"
  )


def count_rows(batches, sizes: list[int]):
  """Yields the batches, and appends their numbers of images to `sizes`."""
  for batch in batches:
    sizes.append(len(batch[0]))
    yield batch


def find_writer(out: str, writers: dict[str, Callable]) -> Callable:
  """Returns the one of `writers` that writes a file of this suffix.

  Raises:
    UsageError: no such format, or its library is missing.
  """
  suffix = Path(out).suffix
  if suffix not in writers:
    raise UsageError(f"--out={out} must end in {' or '.join(writers)}")
  if suffix == ".parquet":
    try:
      import pyarrow  # noqa: F401  (said before hours of work)
    except ImportError:
      raise UsageError(
        "a .parquet file needs pyarrow; install the parquet extra "
        f"(pip install mrmae_jax[parquet]) or write {next(iter(writers))}"
      ) from None
  return writers[suffix]


def load_encoder(options) -> Encoder:
  """Loads the encoder of --model.

  Raises:
    UsageError, WeightsError: options or a model that do not fit.
  """
  if bool(options.mean) != bool(options.std) or len(options.mean) != len(options.std):
    raise UsageError("--mean and --std must have a number for each channel, both of them")
  if options.model == "pixels":
    return _pixels(options)
  if options.mean and read_run_data(options.model):
    raise UsageError(
      f"--mean and --std are for files that do not tell; {options.model} is a run, which does: "
      "leave them out"
    )
  statistics = {"mean": options.mean, "std": options.std} if options.mean else {}
  model = pretrained.load(
    options.model,
    num_heads=options.num_heads,
    weights=options.weights,
    decoder=False,
    dtype=options.dtype,
    **statistics,
  )
  report = str(model.report)
  if options.untrained:
    model = pretrained.PretrainedModel(loaded_model.untrained(model.network))
    report = f"{report.splitlines()[0]}, with fresh weights"
  encoder = model.network.encoder
  image_size = find_size(options, model)
  if options.feature == "cls" and not encoder.cls_token:
    raise UsageError("--feature=cls: the model has no CLS token; use pooled")
  if options.feature.startswith("stage") and not isinstance(encoder, ConvViT):
    raise UsageError(f"--feature={options.feature}: the model has no such stage; use tokens")
  encode = lambda images: model.encode(images)[options.feature]
  return Encoder(encode, image_size, len(model.network.mean), report)


def _pixels(options) -> Encoder:
  """Returns the normalized pixels themselves as features, a baseline."""
  if options.feature != "pooled":
    raise UsageError(f"--feature={options.feature}: pixels have no tokens; leave it out")
  mean, std = options.mean or constants.IMAGENET_MEAN, options.std or constants.IMAGENET_STD
  size = options.image_size or (32,)
  encode = lambda images: mrmae.normalize(images, mean, std).reshape(len(images), -1)
  return Encoder(encode, (size[0], size[-1]), len(mean), "pixels, normalized")


class _NamedSource:
  """A source that keeps the names of the images that were read; batches do not carry them."""

  def __init__(self, source):
    self._source, self.names = source, [""] * len(source)
    self.class_names, self.description = source.class_names, source.description

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    example = self._source[index]
    self.names[index] = example["name"]
    return example


def extract(
  encode,
  source,
  *,
  image_size: tuple[int, int],
  crop: float,
  exif: str = "ignore",
  batch_size: int,
  channels: int = 3,
  loader: data.LoaderOptions = data.LoaderOptions(),
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
  """Yields (names, labels int32 [B], features float32 [B, ...]) of all images, in order, each once.

  Args:
    encode: uint8 [B, H, W, C] -> [B, ...].
    source: of `mrmae_jax.data`.
    image_size: (height, width).
    crop: see `data.augment.center_crop`.
    exif: see `data.augment.decode_image`.
    batch_size: images at a time; the last batch holds what is left.
    channels: C.
    loader: with on_error="skip" images that cannot be read are left out.

  Raises:
    DataError: an image cannot be read.
  """
  named_source, begin = _NamedSource(source), 0
  # In threads of this process: the source keeps the names here.
  view = data.center_view(image_size, crop, channels, exif)
  batches = data.eval_batches(named_source, view, batch_size=batch_size, options=loader)
  try:
    for batch in batches:
      valid = batch["valid"]
      features = np.asarray(encode(batch["image"]))[valid]
      names = itertools.compress(named_source.names[begin : begin + len(valid)], valid)
      yield list(names), batch["label"][valid], features
      begin += len(valid)
  finally:
    batches.close()


def show_progress(batches, total: int):
  """Yields the batches, and shows rate and time left; a signal ends it between two of them."""
  with tqdm(total=total, unit="image", smoothing=0.05) as progress:
    for batch in batches:
      supervision.beat()
      yield batch
      progress.update(len(batch[0]))


def _write_npz(path: Path, batches, class_names, about: dict[str, Any]) -> None:
  names, labels, features = zip(*batches)
  with open(path, "wb") as file:  # given a path, numpy would append .npz
    np.savez(
      file,
      features=np.concatenate(features),
      labels=np.concatenate(labels),
      names=np.array(sum(names, [])),
      class_names=np.array(class_names, dtype=str),
      about=np.array(json.dumps(about)),
    )


def _write_parquet(path: Path, batches, class_names, about: dict[str, Any]) -> None:
  """Writes batch by batch, so that memory does not grow with the number of images."""
  del about
  import pyarrow as pa
  import pyarrow.parquet as pq

  class_name = lambda i: _as_unicode(class_names[i]) if 0 <= i < len(class_names) else None
  writer = None
  try:
    for names, labels, features in batches:
      flat, shape = pa.array(features.reshape(-1)), features.shape[1:]
      columns = {
        "name": pa.array(map(_as_unicode, names), pa.string()),
        "label": pa.array(labels, pa.int32()),
        "class_name": pa.array(map(class_name, labels), pa.string()),
        "feature": pa.FixedSizeListArray.from_arrays(flat, math.prod(shape)),
      }
      table = pa.table(columns, metadata={"shape": json.dumps(shape)})
      writer = writer or pq.ParquetWriter(path, table.schema)
      writer.write_table(table)
  finally:
    if writer:
      writer.close()


def _as_unicode(name: str) -> str:
  """Returns the name of a file; bytes of it that are not UTF-8 become text such as \\xe9."""
  return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}
