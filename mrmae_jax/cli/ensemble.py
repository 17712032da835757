"""Accuracy of several fine-tuned models together, beside that of each.

  mrmae ensemble --models=/tmp/from_clip,/tmp/from_dino --images=folder:/my/photos

Models are workdirs of configs/finetune.py or fine-tuned files of weights; each sees the images at its own size. Their classes must
be those of the images, in the same order; files that others wrote name none, of these only the number is compared.
"""

import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

from mrmae_jax.cli import command_line
from mrmae_jax.errors import DataError, UsageError


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_list("models", [], "Workdirs or files, separated by commas.", flag_values=own)
  flags.DEFINE_string(
    "images", None, "Images with labels: folder:/path, digits or tfds:name.", flag_values=own
  )
  flags.DEFINE_string("data_dir", "", "Where tfds looks for prepared data sets.", flag_values=own)
  flags.DEFINE_string(
    "eval_split", "validation", "Sub-folder or tfds split to measure on.", flag_values=own
  )
  flags.DEFINE_integer(
    "holdout_every", 10, "Images without such a split: every k-th; as in the runs.", flag_values=own
  )
  flags.DEFINE_enum(
    "average", "probabilities", ["probabilities", "logits"], "What is averaged.", flag_values=own
  )
  flags.DEFINE_float(
    "crop", 0.875, "Central share of the resized image that is seen.", flag_values=own
  )
  flags.DEFINE_integer("batch_size", 64, "Images at a time.", flag_values=own)
  flags.DEFINE_string("out", "", "A .json file for the result.", flag_values=own)
  return own


def run(options) -> str:
  """The command with an attribute per flag; returns a table for people.

  Raises:
    UsageError, WeightsError, DataError: options, models or images that do not fit.
  """
  if len(set(options.models)) < 2 or not options.images:
    raise UsageError(
      "--models needs two or more different ones, separated by commas, and --images where to measure; see --help"
    )
  from tqdm import tqdm

  from mrmae_jax import data, pretrained  # mistakes are answered before jax is loaded
  from mrmae_jax.cli.features import extract
  from mrmae_jax.evals import ensemble
  from mrmae_jax.runs.paths import atomic_write

  source = data.open_source(
    options.images,
    "eval",
    eval_split=options.eval_split,
    data_dir=options.data_dir,
    holdout_every=options.holdout_every,
  )
  if not source.class_names:
    raise DataError(
      f"{source.description}: no labels to measure by; put each class into a sub-folder of its own"
    )
  models = {path: pretrained.load(path, decoder=False) for path in options.models}
  for path, model in models.items():
    if model.config["classes"] != len(source.class_names):
      raise UsageError(
        f"{path} tells {model.config['classes']} classes apart (0: it is not fine-tuned); the images have "
        f"{len(source.class_names)} ({source.description})"
      )
    if other := [
      (i, *names)
      for i, names in enumerate(zip(model.class_names, source.class_names))
      if names[0] != names[1]
    ]:
      raise UsageError(
        f"{path} was fine-tuned on other classes, or in another order: class {other[0][0]} is {other[0][1]!r} there and "
        f"{other[0][2]!r} in the images ({len(other)} differ); give images with its classes"
      )
  logits, labels = [], None
  for path, model in models.items():
    batches = extract(
      model.classify,
      source,
      image_size=model.config["image_size"],
      crop=options.crop,
      batch_size=options.batch_size,
      channels=len(model.network.mean),
    )
    with tqdm(total=len(source), unit="image", desc=path, smoothing=0.05) as progress:
      parts = []
      for _, label, found in batches:
        parts.append((label, found))
        progress.update(len(label))
    labels, scores = (np.concatenate(column) for column in zip(*parts))
    logits.append(scores)
  result = {path: ensemble.accuracy(scores, labels) for path, scores in zip(models, logits)}
  result["ensemble"] = ensemble.accuracy(ensemble.combine(logits, options.average), labels)
  if options.out:
    with atomic_write(Path(options.out).expanduser()) as unfinished:
      unfinished.write_text(
        json.dumps(
          {"images": len(labels), "average": options.average, "accuracy": result}, indent=2
        )
        + "\n"
      )
  return "\n".join(
    [
      f"{len(labels)} images, mean of the {options.average}",
      *(
        f"top-1 {value['top1']:.2%}  top-5 {value['top5']:.2%}  {name}"
        for name, value in result.items()
      ),
    ]
  )


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data."""
  return command_line(__doc__, define_flags(), run, argv)


if __name__ == "__main__":
  sys.exit(main())
