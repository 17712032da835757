"""What frozen features are worth: k-NN, few-shot and linear accuracy."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mrmae_jax import sharding
from mrmae_jax.cli.arrays import read_arrays
from mrmae_jax.errors import UsageError
from mrmae_jax.evals import knn
from mrmae_jax.runs.paths import atomic_write, require_writable
from mrmae_jax.tasks import probe

COLUMNS = ("features", "labels", "names", "class_names", "about")
# What must be equal in both files.
SAME = ("model", "untrained", "feature", "image_size", "crop", "exif")


def run(options) -> str:
  """Carries out `mrmae knn`; returns a table for people.

  Raises:
    UsageError: options or files that do not fit.
  """
  require_writable(options.out)
  train, held_out = read_features(options.train), read_features(options.eval)
  _check_alike(train, held_out)
  _check_apart(train, held_out)
  if options.blr and len(train["features"]) < options.batch_size:
    raise UsageError(
      f"--batch_size={options.batch_size} is more than the {len(train['features'])} training "
      "images; give fewer, or --blr= to leave the linear probe out"
    )
  result, lines = {}, []
  for name, file in (("train", train), ("eval", held_out)):
    result[name] = file["about"] | {"count": len(file["labels"])}
  lines.append(
    f"{len(train['labels'])} training images, {len(held_out['labels'])} to measure on, "
    f"{len(train['class_names'])} classes, {train['features'].shape[1]} features"
  )
  if copies := count_copies(train["features"], held_out["features"]):
    lines.append(
      f"warning: {copies} images to measure on have exactly the features of a training image: "
      "copies under other names, whose label the bank knows"
    )
  if options.k:
    result["knn"] = _knn(train, held_out, options, lines)
  if options.shots:
    result["few_shot"] = _few_shot(train, held_out, options, lines)
  if options.blr:
    result["linear"] = _linear(train, held_out, options, lines)
  with atomic_write(Path(options.out).expanduser()) as temporary:
    temporary.write_text(json.dumps(result, indent=2) + "\n")
  return "\n".join([*lines, f"wrote {options.out}"])


def read_features(path: str) -> dict:
  """Reads a file of `mrmae features`.

  Returns:
    features [N, D], labels [N], names [N], class_names (tuple), about (dict), by name.

  Raises:
    UsageError: no such file, another file, or images without labels.
  """
  try:
    arrays = read_arrays(Path(path))
    content = {name: arrays[name] for name in COLUMNS}
    _check_types(content)
    content["class_names"] = tuple(content["class_names"].tolist())
    content["about"] = dict(json.loads(str(content["about"])))
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UsageError(
      f"{path} cannot be read as features ({error}); expected an .npz of mrmae features"
    ) from None
  if not content["class_names"] or content["labels"].min() < 0:
    raise UsageError(
      f"{path} has no labels; put the images of each class into a sub-folder of its own and "
      "compute it again"
    )
  if content["features"].ndim != 2:
    raise UsageError(
      f"{path} holds features of shape {content['features'].shape}, one vector an image is "
      "expected; compute it again with --feature=pooled"
    )
  if not np.isfinite(content["features"]).all():
    raise UsageError(f"{path} has features that are not finite")
  return content


def _check_types(content: dict) -> None:
  """Raises ValueError unless the columns have the types, and as many rows as each other."""
  features, labels, names, classes, _ = (content[name] for name in COLUMNS)
  kinds = "".join(x.dtype.kind for x in (features, labels, names, classes))
  shapes = features.shape[:1], labels.shape, names.shape
  if kinds not in ("fiUU", "fuUU") or len(set(shapes)) > 1 or not labels.size or classes.ndim != 1:
    raise ValueError(
      f"its columns have the types {kinds}, and names and labels the shapes {shapes}"
    )
  if len(classes) and labels.max() >= len(classes):
    raise ValueError(f"a label is {labels.max()}, of {len(classes)} classes")


def _check_alike(train: dict, held_out: dict) -> None:
  """Raises UsageError unless both files come from the same model, images seen in the same way."""
  different = [
    f"{key} {train['about'].get(key)!r} and {held_out['about'].get(key)!r}"
    for key in SAME
    if train["about"].get(key) != held_out["about"].get(key)
  ]
  if train["class_names"] != held_out["class_names"]:
    names = [", ".join(file["class_names"]) for file in (train, held_out)]
    different.append(f"classes {names[0]} and {names[1]}")
  if different:
    raise UsageError(f"--train and --eval were not made alike: {'; '.join(different)}")


def _check_apart(train: dict, held_out: dict) -> None:
  """Raises UsageError if images to measure on are among the training images."""
  common = np.intersect1d(train["names"], held_out["names"])
  if len(common):
    raise UsageError(
      f"{len(common)} of the {len(held_out['names'])} images of --eval are in --train too, the "
      f"first is {common[0]}: the neighbors would know their labels. Compute both files with the "
      "same --holdout_every (of 2 or more) or splits, one with --split=train, one with --split=eval"
    )


def count_copies(train: np.ndarray, held_out: np.ndarray) -> int:
  """Returns how many rows of `held_out` [N, D] are rows of `train` [M, D], bit for bit."""
  rows = {hash(row.tobytes()) for row in train}
  return sum(hash(row.tobytes()) in rows for row in held_out)


def _knn(train: dict, held_out: dict, options, lines: list[str]) -> dict:
  count = len(train["labels"])
  ks = tuple(k for k in options.k if k <= count) or (count,)
  if too_many := ", ".join(f"k={k}" for k in options.k if k > count):
    lines.append(f"{too_many} left out: there are {count} training images")
  predicted = knn.knn_classify(
    held_out["features"],
    train["features"],
    train["labels"],
    len(train["class_names"]),
    ks,
    options.temperature,
    sharding.make_mesh(),
  )
  accuracy = {k: float((predicted[k] == held_out["labels"]).mean()) for k in ks}
  lines.append("k-NN      " + "   ".join(f"k={k} {value:.2%}" for k, value in accuracy.items()))
  return {"temperature": options.temperature, "accuracy": accuracy}


def _few_shot(train: dict, held_out: dict, options, lines: list[str]) -> dict:
  arrays = (held_out["features"], held_out["labels"], train["features"], train["labels"])
  draws = {n: knn.few_shot(*arrays, n, options.draws, options.seed) for n in options.shots}
  lines.append(
    "few-shot  "
    + "   ".join(f"{n} a class {x.mean():.2%} (std {x.std():.2%})" for n, x in draws.items())
  )
  return {
    "draws": options.draws,
    "seed": options.seed,
    "classifier": "nearest class mean, cosine",
    "accuracy": {n: {"mean": float(x.mean()), "std": float(x.std())} for n, x in draws.items()},
  }


def _linear(train: dict, held_out: dict, options, lines: list[str]) -> dict:
  accuracies = probe.probe_features(
    train["features"],
    train["labels"],
    held_out["features"],
    held_out["labels"],
    len(train["class_names"]),
    blrs=options.blr,
    epochs=options.epochs,
    batch_size=options.batch_size,
    seed=options.seed,
    progress=lambda epochs: tqdm(epochs, desc="linear", unit="epoch"),
  )
  accuracy = dict(zip(options.blr, accuracies.tolist()))
  best, count = int(accuracies.argmax()), len(options.blr)
  at_edge = count > 1 and best in (0, count - 1)
  lines.append(
    "linear    " + "   ".join(f"blr={blr:g} {value:.2%}" for blr, value in accuracy.items())
  )
  lines.append(
    f"          best {accuracies[best]:.2%} at blr={options.blr[best]:g}"
    + (", at the edge of the grid: extend --blr" if at_edge else "")
  )
  return {
    "accuracy": accuracy,
    "best": {"blr": options.blr[best], "accuracy": float(accuracies[best])},
    "epochs": options.epochs,
    "batch_size": options.batch_size,
    "seed": options.seed,
    "optimizer": "SGD, momentum 0.9, cosine, no weight decay",
    "normalization": "BatchNorm without scale and shift, statistics of all training features",
  }
