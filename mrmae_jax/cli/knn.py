"""What frozen features are worth: k-NN, few-shot and linear accuracy, from two files of `mrmae features`.

  mrmae features --model=/tmp/run --images=folder:/my/photos --split=train --out=train.npz
  mrmae features --model=/tmp/run --images=folder:/my/photos --split=eval --out=eval.npz
  mrmae knn --train=train.npz --eval=eval.npz --out=probe.json

k-NN: DINO's protocol. Few-shot: nearest class mean, several draws of the labelled images. Linear: a layer behind
BatchNorm without scale and shift, trained with SGD at a whole grid of learning rates; as is usual in the field, the best of them
is chosen on the images it is measured on, and the file shows all. The published protocol, with random crops and LARS, is
configs/probe.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

from mrmae_jax.cli import command_line
from mrmae_jax.errors import UsageError

COLUMNS = ("features", "labels", "class_names", "about")
SAME = ("model", "untrained", "feature", "image_size", "crop")


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_string("train", None, ".npz of the training images, with labels.", flag_values=own)
  flags.DEFINE_string("eval", None, ".npz of the images to measure on, likewise.", flag_values=own)
  flags.DEFINE_string("out", None, "The result file, .json.", flag_values=own)
  flags.DEFINE_list(
    "k", ["10", "20", "100", "200"], "Numbers of neighbours; empty: no k-NN.", flag_values=own
  )
  flags.DEFINE_float("temperature", 0.07, "Of the neighbours' votes.", flag_values=own)
  flags.DEFINE_list(
    "shots", ["1", "5", "10"], "Labelled images per class; empty: no few-shot.", flag_values=own
  )
  flags.DEFINE_integer("draws", 10, "Independent choices of these.", flag_values=own)
  flags.DEFINE_list(
    "blr",
    ["0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1"],
    "Base learning rates of the linear probe; empty: none. The peak is blr * batch_size / 256.",
    flag_values=own,
  )
  flags.DEFINE_integer("epochs", 90, "Of the linear probe.", flag_values=own)
  flags.DEFINE_integer("batch_size", 256, "Of the linear probe.", flag_values=own)
  flags.DEFINE_integer(
    "seed", 0, "Of the draws, and of the linear probe's weights and order.", flag_values=own
  )
  return own


def _numbers(values, kind, name):
  """Positive numbers of a list flag."""
  try:
    numbers = tuple(kind(value) for value in values)
  except ValueError:
    numbers = (0,)
  if not all(np.isfinite(number) and number > 0 for number in numbers):
    raise UsageError(f"--{name}={','.join(values)} must hold numbers > 0, separated by commas")
  return numbers


def read(path: str) -> dict:
  """A file of `mrmae features`: features [N, D], labels [N], class_names (tuple), about (dict).

  Raises:
    UsageError: no such file, another file, or images without labels.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      found = {name: file[name] for name in COLUMNS}
    found |= {
      "class_names": tuple(found["class_names"].tolist()),
      "about": json.loads(str(found["about"])),
    }
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UsageError(
      f"{path} cannot be read as features ({error}); expected an .npz of mrmae_jax.cli.features"
    ) from None
  if not found["class_names"] or found["labels"].min() < 0:
    raise UsageError(
      f"{path} has no labels; put the images of each class into a sub-folder of its own and compute it again"
    )
  if not np.isfinite(found["features"]).all():
    raise UsageError(f"{path} has features that are not finite")
  return found


def run(options) -> str:
  """The command with an attribute per flag; returns a table for people.

  Raises:
    UsageError: options or files that do not fit.
  """
  for name in ("train", "eval", "out"):
    if not getattr(options, name):
      raise UsageError(f"--{name} is missing; see --help")
  ks, shots = (_numbers(getattr(options, name), int, name) for name in ("k", "shots"))
  blrs = _numbers(options.blr, float, "blr")
  for name in ("temperature", "draws", "epochs", "batch_size"):
    if not getattr(options, name) > 0:
      raise UsageError(f"--{name}={getattr(options, name)} must be positive")
  train, held_out = read(options.train), read(options.eval)
  different = [
    f"{key} {train['about'].get(key)!r} and {held_out['about'].get(key)!r}"
    for key in SAME
    if train["about"].get(key) != held_out["about"].get(key)
  ]
  if train["class_names"] != held_out["class_names"]:
    different.append(
      f"classes {', '.join(train['class_names'])} and {', '.join(held_out['class_names'])}"
    )
  if different:
    raise UsageError(f"--train and --eval were not made alike: {'; '.join(different)}")
  if blrs and len(train["features"]) < options.batch_size:
    raise UsageError(
      f"--batch_size={options.batch_size} is more than the {len(train['features'])} training images; give "
      "fewer, or --blr= to leave the linear probe out"
    )

  from tqdm import tqdm

  from mrmae_jax import sharding
  from mrmae_jax.evals import knn
  from mrmae_jax.tasks import probe  # mistakes are answered before jax is loaded

  classes = len(train["class_names"])
  known, asked = ((file["features"], file["labels"]) for file in (train, held_out))
  result = {
    "train": train["about"] | {"count": len(known[0])},
    "eval": held_out["about"] | {"count": len(asked[0])},
  }
  lines = [
    f"{len(known[0])} training images, {len(asked[0])} to measure on, {classes} classes, {known[0].shape[1]} features"
  ]
  if ks:
    predicted = knn.knn_classify(
      asked[0], known[0], known[1], classes, ks, options.temperature, sharding.make_mesh()
    )
    accuracy = {k: float((predicted[k] == asked[1]).mean()) for k in ks}
    result["knn"] = {"temperature": options.temperature, "accuracy": accuracy}
    lines.append("k-NN      " + "   ".join(f"k={k} {value:.2%}" for k, value in accuracy.items()))
  if shots:
    draws = {n: knn.few_shot(*asked, *known, n, options.draws, options.seed) for n in shots}
    result["few_shot"] = {
      "draws": options.draws,
      "seed": options.seed,
      "classifier": "nearest class mean, cosine",
      "accuracy": {
        n: {"mean": float(found.mean()), "std": float(found.std())} for n, found in draws.items()
      },
    }
    lines.append(
      "few-shot  "
      + "   ".join(
        f"{n} a class {found.mean():.2%} (std {found.std():.2%})" for n, found in draws.items()
      )
    )
  if blrs:
    found = probe.probe_features(
      *known,
      *asked,
      classes,
      blrs=blrs,
      epochs=options.epochs,
      batch_size=options.batch_size,
      seed=options.seed,
      progress=lambda epochs: tqdm(epochs, desc="linear", unit="epoch"),
    )
    accuracy, best = dict(zip(blrs, found.tolist())), int(found.argmax())
    result["linear"] = {
      "accuracy": accuracy,
      "best": {"blr": blrs[best], "accuracy": accuracy[blrs[best]]},
      "epochs": options.epochs,
      "batch_size": options.batch_size,
      "seed": options.seed,
      "optimiser": "SGD, momentum 0.9, cosine, no weight decay",
      "normalisation": "BatchNorm without scale and shift, statistics of all training features",
    }
    lines.append(
      "linear    " + "   ".join(f"blr={blr:g} {value:.2%}" for blr, value in accuracy.items())
    )
    lines.append(
      f"          best {accuracy[blrs[best]]:.2%} at blr={blrs[best]:g}"
      + (
        ", at the edge of the grid: extend --blr"
        if best in (0, len(blrs) - 1) and len(blrs) > 1
        else ""
      )
    )
  from mrmae_jax.weights import files

  with files.whole(Path(options.out).expanduser()) as unfinished:
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
  return "\n".join([*lines, f"wrote {options.out}"])


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage."""
  return command_line(__doc__, define_flags(), run, argv)


if __name__ == "__main__":
  sys.exit(main())
