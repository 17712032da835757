"""Images of any source in a few large files, from which training reads them.

  mrmae pack --source=folder:/path/to/imagenet --out=/data/imagenet
  mrmae pack --source=folder:/path/to/imagenet --out=/data/imagenet256 --short_side=256
  mrmae pack --verify=/data/imagenet

What comes out is a source as well: --config.data.source=packed:/data/imagenet, with the order, names, labels and classes of the
original. Without --short_side the bytes stay what they are, so every batch is the same too. With it images whose shorter side is
larger are resized as evaluation does it (Pillow's bicubic, the longer side rounded down) and encoded as JPEG (4:2:0 chroma):
loading is faster, but crops have less detail to choose from, which is another data set. Every image is decoded once: one that
cannot be is named, and nothing is written. --train_split, --eval_split and --holdout_every are those of a run and fixed here; a
run's own are not asked then. Shards are ArrayRecord files, next to index.json with their sha256; the folder appears whole or not
at all.
"""

import sys
from pathlib import Path

from absl import flags

from mrmae_jax.cli import command_line
from mrmae_jax.errors import UsageError


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_string("source", None, "Images: folder:/path, digits or tfds:name.", flag_values=own)
  flags.DEFINE_string("out", None, "The folder to write; it may not exist.", flag_values=own)
  flags.DEFINE_string(
    "verify", None, "Instead: a packed folder whose checksums are compared.", flag_values=own
  )
  flags.DEFINE_list("splits", ["train", "eval"], "Which to write.", flag_values=own)
  flags.DEFINE_string(
    "train_split", "train", "Sub-folder or tfds split for training.", flag_values=own
  )
  flags.DEFINE_string("eval_split", "validation", "The same for evaluation.", flag_values=own)
  flags.DEFINE_string("data_dir", "", "Where tfds looks for prepared data sets.", flag_values=own)
  flags.DEFINE_integer(
    "holdout_every",
    10,
    "Images without splits: every k-th is for evaluation; 0: all are for training.",
    flag_values=own,
  )
  flags.DEFINE_integer(
    "short_side",
    0,
    "Shrink images to this shorter side in pixels; 0: keep their bytes.",
    lower_bound=0,
    flag_values=own,
  )
  flags.DEFINE_integer(
    "quality",
    95,
    "Of JPEGs written for --short_side.",
    lower_bound=1,
    upper_bound=100,
    flag_values=own,
  )
  flags.DEFINE_integer(
    "shards", 0, "Files per split; 0: one per 10,000 images.", lower_bound=0, flag_values=own
  )
  return own


def run(options) -> str:
  """The command with an attribute per flag; returns a line for people.

  Raises:
    UsageError, DataError: options or images that do not fit.
  """
  if bool(options.verify) == bool(options.source and options.out):
    raise UsageError(
      "give --source and --out to pack images, or --verify alone to check a packed folder; see --help"
    )
  from tqdm import tqdm

  from mrmae_jax import data  # a mistyped command line is answered first
  from mrmae_jax.data.pack import write_packed
  from mrmae_jax.data.sources.packed import count_packed, verify_packed

  if options.verify:
    with tqdm(total=count_packed(options.verify), unit="image") as bar:
      return verify_packed(options.verify, bar.update)
  out = Path(options.out).expanduser()
  if out.exists():
    raise UsageError(f"--out={options.out} exists; give another name or remove it")
  if not options.splits or not set(options.splits) <= {"train", "eval"}:
    raise UsageError(f"--splits={','.join(options.splits)} must be train, eval or both")
  opened = ("train_split", "eval_split", "data_dir", "holdout_every")
  sources = {
    split: data.open_source(options.source, split, **{name: options[name].value for name in opened})
    for split in options.splits
  }
  print(*(source.description for source in sources.values()), sep="\n", flush=True)
  kept = {name: options[name].value for name in ("source", *opened, "short_side", "quality")}
  images = sum(map(len, sources.values()))
  with tqdm(total=images, unit="image", smoothing=0.05) as bar:  # shows rate and time left
    write_packed(
      sources,
      out,
      kept,
      short_side=options.short_side,
      quality=options.quality,
      shards=options.shards,
      progress=bar.update,
    )
  return (
    f"wrote {options.out}: {images} images, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:,.0f} MB; "
    f"read it with --config.data.source=packed:{out.absolute()}"
  )


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data."""
  return command_line(__doc__, define_flags(), run, argv)


if __name__ == "__main__":
  sys.exit(main())
