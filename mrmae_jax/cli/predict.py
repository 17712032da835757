"""The class of each image, by a fine-tuned model or several as one; or what is inside of images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mrmae_jax.cli import classifiers as lib
from mrmae_jax.cli import pictures
from mrmae_jax.cli.evaluate import write_csv
from mrmae_jax.cli.features import count_rows, find_writer, show_progress
from mrmae_jax.errors import UsageError
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_write, require_writable

Batch = tuple[list[str], list[str], np.ndarray]  # names, classes, probabilities


def run(options) -> str:
  """Carries out `mrmae predict`.

  Raises:
    UsageError, WeightsError, DataError: options, models or images that do not fit.
  """
  require_writable(options.out)
  if not Path(options.out).suffix:
    return pictures.run(options)
  write = find_writer(options.out, WRITERS)
  if options.mode != "slide" or options.scales != (1.0,) or options.flip:
    raise UsageError(
      f"--mode, --scales and --flip are for segmentation, whose --out is a folder; {options.out} "
      "is a table of images"
    )
  if options.min_score is not None:
    raise UsageError(
      f"--min_score is for detection, whose --out is a folder; {options.out} is a table of images"
    )
  classifiers = lib.load_classifiers(options)
  source = lib.open_source(options)
  print(source.description, flush=True)
  batches, sizes = show_progress(_predict(classifiers, source, options), len(source)), []
  with supervision.supervised(hang_s=0):
    with atomic_write(Path(options.out).expanduser()) as temporary:
      write(temporary, count_rows(batches, sizes))
  return f"wrote {options.out}: the classes of {sum(sizes)} images"


def _predict(classifiers: lib.Classifiers, source, options) -> Iterator[Batch]:
  for names, _, logits in lib.classify(classifiers, source, options):
    scores = lib.combine(logits, options.average)
    yield names, [classifiers.class_names[i] for i in scores.argmax(1)], scores.max(1)


def _write_csv(path: Path, batches: Iterator[Batch]) -> None:
  rows = (row for batch in batches for row in zip(*batch))
  shown = ((name, label, f"{probability:.6g}") for name, label, probability in rows)
  write_csv(path, ("name", "class", "probability"), shown)


def _write_parquet(path: Path, batches: Iterator[Batch]) -> None:
  import pyarrow as pa
  import pyarrow.parquet as pq

  schema = pa.schema({"name": pa.string(), "class": pa.string(), "probability": pa.float32()})
  with pq.ParquetWriter(path, schema) as writer:
    for names, labels, probabilities in batches:
      # A file name may hold bytes that are not text.
      texts = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
      columns = [texts, labels, probabilities.astype(np.float32)]
      writer.write_table(pa.table(columns, schema=schema))


WRITERS = {".csv": _write_csv, ".parquet": _write_parquet}
