"""One fine-tuned model, or several as one, on images: what `mrmae evaluate` and `predict` share.

Classes are told by their names. Students of different teachers are better joined after fine-tuning
than taught together (MR-MAE).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax import config as config_lib
from mrmae_jax import data, pretrained
from mrmae_jax.cli.features import extract
from mrmae_jax.cli.images import find_images, find_view, open_images, skip_options
from mrmae_jax.data.sources.base import NothingHeldOut
from mrmae_jax.data.sources.listing import first_names
from mrmae_jax.errors import UsageError
from mrmae_jax.runs.paths import read_regular


class Classifiers(NamedTuple):
  """Models with the same classes.

  Attributes:
    models: {path: `pretrained.PretrainedModel`}.
    class_names: of the first model, in the order of its logits.
    columns: {path: int [C]}, the logit of the model for each of `class_names`.
  """

  models: dict[str, Any]
  class_names: tuple[str, ...]
  columns: dict[str, np.ndarray]


def load_classifiers(options) -> Classifiers:
  """Loads the models of --models.

  Raises:
    UsageError: a model without classes or names of them, or models with different classes.
    WeightsError: a model that cannot be loaded.
  """
  if len(set(options.models)) < len(options.models):
    raise UsageError(f"--models={','.join(options.models)} names a model twice; name each once")
  models, names = {}, {}
  for path in options.models:
    models[path] = pretrained.load(path, num_heads=options.num_heads, decoder=False)
    network = models[path].network
    for module, parts in ((network.segmenter, "pixels"), (network.detector, "objects")):
      if module is not None:
        raise UsageError(
          f"{path} tells the classes of {parts} apart, not of images; mrmae predict --out=DIR, a"
          " folder, writes pictures of them"
        )
    names[path] = class_names(path, models[path], options.classes)
  first, *others = names
  for path in others:
    if set(names[path]) != set(names[first]):
      raise UsageError(
        f"{path} and {first} tell different classes apart: only the first knows"
        f" {first_names(set(names[path]) - set(names[first]))}, only the second"
        f" {first_names(set(names[first]) - set(names[path]))}; join models of the same classes"
      )
  columns = {path: find_positions(names[first], names[path]) for path in models}
  return Classifiers(models, names[first], columns)


def class_names(path: str, model, file: str) -> tuple[str, ...]:
  """Returns the names of a model's classes: its own, or else the lines of `file`."""
  count = model.config["classes"]
  if not count:
    raise UsageError(f"{path} is not fine-tuned, it tells no classes apart; give a run of finetune")
  if len(set(model.class_names)) == count:
    return model.class_names
  if not file:
    problem = "gives several classes one name" if model.class_names else "has no names of classes"
    raise UsageError(
      f"{path} {problem}; give --classes=FILE with {count} names, one per line in the order of its"
      " outputs (ImageNet's is that of the sorted folders: ls train > FILE)"
    )
  try:
    lines = read_regular(Path(file).expanduser()).decode().splitlines()
  except (OSError, ValueError) as error:
    raise UsageError(f"--classes={file} cannot be read: {error}") from None
  names = tuple(line.strip() for line in lines if line.strip())
  if len(names) != count or len(set(names)) != count:
    raise UsageError(
      f"--classes={file} holds {len(names)} names, {len(set(names))} of them different; expected"
      f" one for each of the {count} classes of {path}"
    )
  return names


def find_positions(wanted, names) -> np.ndarray:
  """Returns the position of each of `wanted` among `names`, int [len(wanted)]."""
  position = {name: i for i, name in enumerate(names)}
  return np.array([position[name] for name in wanted], np.int64)


def open_source(options, has_objects: bool = False) -> data.Source:
  """Opens the images of --images, or else those of the models' runs.

  Args:
    options: of the command.
    has_objects: read the annotations of coco:PATH too.

  Raises:
    UsageError, DataError: there are none, or they cannot be opened.
  """
  images = find_images(options, options.models)
  if has_objects and images.source.startswith("coco:"):
    images.max_boxes = config_lib.detect().data.max_boxes  # see `data.open_split`
  try:
    return open_images(options, images, options.split)
  except NothingHeldOut:
    if options.holdout_every != 0 and not options.images:
      raise  # the run was trained on all of them
    return open_images(options, images, "train")


def classify(
  classifiers: Classifiers, source, options
) -> Iterator[tuple[list[str], np.ndarray, list[np.ndarray]]]:
  """Yields (names, labels int32 [B], logits [B, C] of each model) of all images, in order.

  Each model sees the images at its own size. The logits follow `classifiers.class_names`.

  Raises:
    DataError: an image cannot be read.
  """
  streams = [
    extract(
      model.classify,
      source,
      image_size=model.config["image_size"],
      batch_size=options.batch_size,
      channels=len(model.network.mean),
      loader=skip_options(options),
      **find_view(options, path),
    )
    for path, model in classifiers.models.items()
  ]
  for batches in zip(*streams):
    names, labels, _ = batches[0]
    columns = classifiers.columns.values()
    yield names, labels, [logits[:, order] for (_, _, logits), order in zip(batches, columns)]


def combine(logits: list[np.ndarray], average: str) -> np.ndarray:
  """Joins the logits of several models to one probability per image and class.

  Args:
    logits: [N, C] of each model.
    average: "probabilities", each model's softmax; or "logits", which lets a model that is sure
      count for more.

  Returns:
    float64 [N, C]; rows sum to 1.
  """
  logits = np.stack(logits).astype(np.float64)
  return softmax(logits).mean(0) if average == "probabilities" else softmax(logits.mean(0))


def softmax(logits: np.ndarray) -> np.ndarray:
  """Returns the probabilities of logits [..., C]."""
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)
