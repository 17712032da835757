"""Features of images, for search, clustering or a classifier of your own.

  mrmae features --model=/tmp/run --images=folder:/my/photos --out=features.npz

--model is a run's workdir, a file of weights (ConvMAE, MAE; .safetensors, .pth), a ViTMAE folder, or "pixels" for the
normalised pixels themselves; --untrained gives the same encoder fresh weights: two baselines to compare with. Every image of the
split is encoded exactly once, in order, nothing masked. In the .npz: features float32 [N, D], names [N], labels int32 [N] (-1
where there are none), class_names, and about, a JSON text of how they were made. In the .parquet (needs pyarrow) these are the
columns name, label, class_name, feature; it is written batch by batch, whatever the number of images. The file appears whole or
not at all. `mrmae knn` measures what .npz files are worth.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mrmae_jax import constants, data, mrmae, pretrained
from mrmae_jax.errors import UsageError
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_write
from mrmae_jax.weights import model_files


class _Named:
  """A source that remembers the names of the images that were asked for; batches do not carry them."""

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
  encode, source, *, image_size: tuple[int, int], crop: float, batch_size: int, channels: int = 3
):
  """Yields (names, labels int32 [B], features float32 [B, D]) of a source's images, batch by batch, in order, each once.

  Args:
    encode: uint8 [B, H, W, C] -> [B, D].
    source: of `mrmae_jax.data`.
    image_size: (height, width).
    crop: see `data.augment.center_crop`.
    batch_size: images at a time; the last batch holds what is left.
    channels: C.

  Raises:
    DataError: an image cannot be read.
  """

  named, done = _Named(source), 0
  # In threads of this process: the names are remembered here.
  batches = data.eval_batches(
    named, data.center_view(image_size, crop, channels), batch_size=batch_size
  )
  try:
    for batch in batches:
      valid = batch["valid"]
      found = np.asarray(encode(batch["image"]))[valid]
      yield named.names[done : done + len(found)], batch["label"][valid], found
      done += len(found)
  finally:
    batches.close()


def _save_npz(path: Path, batches, class_names, about) -> None:
  names, labels, features = zip(*batches)
  with open(path, "wb") as file:  # by name, numpy would append .npz
    np.savez(
      file,
      features=np.concatenate(features),
      labels=np.concatenate(labels),
      names=np.array(sum(names, [])),
      class_names=np.array(class_names, dtype=str),
      about=np.array(json.dumps(about)),
    )


def _save_parquet(path: Path, batches, class_names, about) -> None:
  del about
  import pyarrow as pa  # of all outputs only this one needs it
  import pyarrow.parquet as pq

  writer = None
  try:
    for names, labels, features in batches:
      columns = {
        "name": pa.array(names, pa.string()),
        "label": pa.array(labels, pa.int32()),
        "class_name": pa.array(
          [class_names[i] if 0 <= i < len(class_names) else None for i in labels], pa.string()
        ),
        "feature": pa.FixedSizeListArray.from_arrays(
          pa.array(features.reshape(-1)), features.shape[1]
        ),
      }
      table = pa.table(columns)
      writer = writer or pq.ParquetWriter(path, table.schema)
      writer.write_table(table)
  finally:
    if writer:
      writer.close()


_WRITERS = {".npz": _save_npz, ".parquet": _save_parquet}


def run(options) -> str:
  """Carries out `mrmae features`.

  Raises:
    UsageError, WeightsError, DataError: options, a model or images that do not fit.
  """
  suffix = Path(options.out).suffix
  if suffix not in _WRITERS:
    raise UsageError(f"--out={options.out} must end in {' or '.join(_WRITERS)}")
  if suffix == ".parquet":
    try:
      import pyarrow  # noqa: F401  (before hours of work)
    except ImportError:
      raise UsageError(
        "a .parquet file needs pyarrow; install the parquet extra (pip install mrmae_jax[parquet]) or write "
        ".npz"
      ) from None

  source = data.open_source(
    options.images,
    options.split,
    train_split=options.train_split,
    eval_split=options.eval_split,
    data_dir=options.data_dir,
    holdout_every=options.holdout_every,
  )
  encode, size, channels, report = _encoder(options)
  print(f"{report}\n{source.description}", flush=True)
  batches = extract(
    encode,
    source,
    image_size=size,
    crop=options.crop,
    batch_size=options.batch_size,
    channels=channels,
  )
  about = {
    "model": options.model,
    "untrained": options.untrained,
    "feature": options.feature,
    "image_size": size,
    "crop": options.crop,
    "dtype": options.dtype,
    "report": report,
    "images": source.description,
  }

  with tqdm(
    total=len(source), unit="image", smoothing=0.05
  ) as progress:  # shows rate and time left

    def watched():
      for batch in batches:
        supervision.beat()
        yield batch
        progress.update(len(batch[0]))

    with (
      supervision.supervised(hang_s=0),
      atomic_write(Path(options.out).expanduser()) as unfinished,
    ):
      _WRITERS[suffix](unfinished, watched(), source.class_names, about)
  return f"wrote {options.out}: {options.feature} features of {len(source)} images at {size[0]}x{size[1]}"


def _encoder(options):
  """What `extract` takes of --model: the function, size and channels of its images, and what to say of it."""

  square = (options.image_size,) * 2
  if options.model == "pixels":
    pixels = lambda images: mrmae.normalize(
      images, constants.IMAGENET_MEAN, constants.IMAGENET_STD
    ).reshape(len(images), -1)
    return pixels, square if options.image_size else (32, 32), 3, "pixels, normalised"
  model = pretrained.load(
    options.model, num_heads=options.num_heads, decoder=False, dtype=options.dtype
  )
  report = str(model.report)
  if options.untrained:
    model = pretrained.PretrainedModel(model_files.untrained(model.network))
    report = f"{report.splitlines()[0]}, with fresh weights"
  encoder, size = (
    model.network.encoder,
    square if options.image_size else model.config["image_size"],
  )
  if any(side % encoder.patch_size or side <= 0 for side in size):
    raise UsageError(
      f"--image_size={options.image_size} is not a multiple of the model's token size {encoder.patch_size}"
    )
  if options.feature == "cls" and not encoder.cls_token:
    raise UsageError("--feature=cls: the model has no CLS token; use pooled")
  return lambda images: model.encode(images)[options.feature], size, len(model.network.mean), report
