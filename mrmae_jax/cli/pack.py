"""Writes the images of any source to a few large files, from which training reads them."""

import sys
from pathlib import Path

from tqdm import tqdm

from mrmae_jax import data
from mrmae_jax.cli.images import skip_options
from mrmae_jax.data.pack import write_packed
from mrmae_jax.data.sources.packed import count_packed, verify_packed
from mrmae_jax.errors import MissingSplitError, UsageError

SPLITS = ("train", "eval")
SOURCE_OPTIONS = ("train_split", "eval_split", "data_dir", "holdout_every", "labels")


def run(options) -> str:
  """Carries out `mrmae pack`.

  Raises:
    UsageError, DataError: options or images that do not fit.
  """
  if bool(options.verify) == bool(options.source and options.out):
    raise UsageError(
      "give --source and --out to pack images, or --verify alone to check a packed folder"
    )
  if options.verify:
    with tqdm(total=count_packed(options.verify), unit="image") as bar:
      return verify_packed(options.verify, bar.update)
  out = Path(options.out).expanduser()
  if out.exists():
    raise UsageError(f"--out={options.out} exists; give another name or remove it")
  sources = open_splits(options, quarantine=options.quarantine)
  print(*(source.description for source in sources.values()), sep="\n", flush=True)
  names = ("source", *SOURCE_OPTIONS, "short_side", "quality")
  index_options = {name: getattr(options, name) for name in names}
  total = sum(map(len, sources.values()))
  with tqdm(total=total, unit="image", smoothing=0.05) as bar:
    write_packed(
      sources,
      out,
      index_options,
      short_side=options.short_side,
      quality=options.quality,
      shards=options.shards,
      loader=skip_options(options),
      progress=bar.update,
    )
  images = count_packed(out)
  left_out = f", {total - images} left out" if images < total else ""
  size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
  return (
    f"wrote {options.out}: {images} images{left_out}, {size:,.0f} MB; "
    f"read it with --config.data.source=packed:{out.absolute()}"
  )


def open_splits(options, **others) -> dict[str, data.Source]:
  """Opens the splits that --splits names, with other arguments of `data.open_source`.

  Without --splits a split that the images do not have is left out with a note.

  Raises:
    UsageError: --splits names something else.
    DataError: a split cannot be opened.
  """
  if not set(options.splits) <= set(SPLITS):
    raise UsageError(f"--splits={','.join(options.splits)} must be train, eval or both")
  rules = {name: getattr(options, name) for name in SOURCE_OPTIONS}
  sources, problem = {}, None
  for split in options.splits or SPLITS:
    try:
      sources[split] = data.open_source(options.source, split, **rules, **others)
    except MissingSplitError as error:
      if options.splits:
        raise
      problem = error
      print(f"{split}: none ({error})", file=sys.stderr, flush=True)
  if not sources:
    raise problem
  return sources
