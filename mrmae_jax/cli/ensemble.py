"""Accuracy of several fine-tuned models together, beside that of each.

Students of different teachers are better joined after fine-tuning than taught together (MR-MAE).
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mrmae_jax import pretrained
from mrmae_jax.cli.features import extract
from mrmae_jax.cli.images import find_images, find_view, open_images, skip_options
from mrmae_jax.errors import DataError, UsageError
from mrmae_jax.runs.paths import atomic_write


def run(options) -> str:
  """Carries out `mrmae ensemble`; returns a table for people.

  Raises:
    UsageError, WeightsError, DataError: options, models or images that do not fit.
  """
  if len(set(options.models)) < 2:
    raise UsageError("--models needs two or more different ones, separated by commas")
  images = find_images(options, options.models, holdout_every=10)
  source = open_images(options, images, "eval")
  if not source.class_names:
    raise DataError(
      f"{source.description}: no labels to measure by; put each class into a sub-folder of its own"
    )
  models = {path: pretrained.load(path, decoder=False) for path in options.models}
  for path, model in models.items():
    _check_classes(path, model, source)
  logits = []
  for path, model in models.items():
    labels, scores = _classify(path, model, source, options)
    logits.append(scores)
  result = {path: accuracy(scores, labels) for path, scores in zip(models, logits)}
  result["ensemble"] = accuracy(combine(logits, options.average), labels)
  if options.out:
    summary = {"images": len(labels), "average": options.average, "accuracy": result}
    with atomic_write(Path(options.out).expanduser()) as temporary:
      temporary.write_text(json.dumps(summary, indent=2) + "\n")
  rows = (
    f"top-1 {value['top1']:.2%}  top-5 {value['top5']:.2%}  {name}"
    for name, value in result.items()
  )
  return "\n".join([f"{len(labels)} images, mean of the {options.average}", *rows])


def _check_classes(path: str, model, source) -> None:
  """Raises UsageError unless the classes of a model are those of the images, in the same order."""
  if model.config["classes"] != len(source.class_names):
    raise UsageError(
      f"{path} tells {model.config['classes']} classes apart (0: it is not fine-tuned); the images "
      f"have {len(source.class_names)} ({source.description})"
    )
  pairs = enumerate(zip(model.class_names, source.class_names))
  different = [(i, theirs, ours) for i, (theirs, ours) in pairs if theirs != ours]
  if different:
    i, theirs, ours = different[0]
    raise UsageError(
      f"{path} was fine-tuned on other classes, or in another order: class {i} is {theirs!r} there "
      f"and {ours!r} in the images ({len(different)} differ); give images with its classes"
    )


def _classify(path: str, model, source, options) -> tuple[np.ndarray, np.ndarray]:
  """Returns labels [N] and logits [N, C] of all images, in order."""
  batches = extract(
    model.classify,
    source,
    image_size=model.config["image_size"],
    batch_size=options.batch_size,
    channels=len(model.network.mean),
    loader=skip_options(options),
    **find_view(options, path),
  )
  labels, logits = [], []
  with tqdm(total=len(source), unit="image", desc=path, smoothing=0.05) as progress:
    for _, label, scores in batches:
      labels.append(label)
      logits.append(scores)
      progress.update(len(label))
  return np.concatenate(labels), np.concatenate(logits)


def combine(logits: list[np.ndarray], average: str) -> np.ndarray:
  """Joins the logits of several models to one score per image and class.

  Args:
    logits: [N, C] of each model.
    average: "probabilities", each model's softmax; or "logits", which lets a model that is sure
      count for more.

  Returns:
    float64 [N, C]: the mean.
  """
  logits = np.stack(logits).astype(np.float64)
  if average == "probabilities":
    logits = np.exp(logits - logits.max(-1, keepdims=True))
    logits /= logits.sum(-1, keepdims=True)
  return logits.mean(0)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Returns {"top1", "top5" in [0, 1]} of scores [N, C] for classes int [N]."""
  best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
  hit = best == np.asarray(labels)[:, None]
  return {"top1": float(hit[:, 0].mean()), "top5": float(hit.any(1).mean())}
