"""Fine-tuning as a task: an encoder with a classification head, mixed images, soft targets."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax import data, mrmae
from mrmae_jax.errors import DataError, WeightsError
from mrmae_jax.mixup import mix, soft_cross_entropy
from mrmae_jax.models import make_encoder
from mrmae_jax.models.classifier import Classifier
from mrmae_jax.train import Task
from mrmae_jax.weights import model_files


def make_model(config, num_classes: int) -> Classifier:
  """The classifier of a configuration. Fusion layers serve pre-training alone (models_convvit.py leaves them out too)."""
  dtype = jnp.dtype(config.dtype)
  fusion = dict(fuse_layers=()) | (
    dict(fuse_stages=False) if config.encoder.name == "convvit" else {}
  )
  return Classifier(
    make_encoder(dict(config.encoder) | fusion, dtype), num_classes, config.pool, dtype=dtype
  )


def make(config) -> Task:
  """The fine-tuning task of a validated configuration.

  Raises:
    DataError: the training images have no classes.
    WeightsError: what `config.init_from` names does not load or is another architecture.
  """
  classes = class_names(config)
  num_classes = len(classes)
  model, size, options = make_model(config, num_classes), tuple(config.image_size), dict(config.mix)
  look = lambda images: mrmae.normalise(images, config.data.mean, config.data.std)
  pretrained, notes = read_pretrained(config, model)

  def init(key):
    return model.init(key, jnp.zeros((1, *size, len(config.data.mean))))["params"]

  def loss(params, frozen, batch, keys):
    del frozen
    # One draw for the whole (micro-)batch, so the mixing depends on the number of micro-batches, as in the reference.
    images, targets = mix(
      jax.random.fold_in(keys[0], 0), look(batch["image"]), batch["label"], num_classes, **options
    )
    logits, _ = model.apply(
      {"params": params}, images, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    )
    return soft_cross_entropy(logits, targets), {}

  def predict(params, frozen, batch, keys):
    del frozen, keys
    logits, out = model.apply({"params": params}, look(batch["image"]))
    return {"logits": logits} | out

  return Task(init, loss, predict, {}, identity(classes, config, pretrained), notes, pretrained)


def class_names(config) -> tuple[str, ...]:
  """The classes of the training images; DataError if they have none."""
  source = data.open_split(config.data, "train")
  if not source.class_names:
    raise DataError(
      f"{source.description}: no labels to train on; put each class into a sub-folder of its own"
    )
  return source.class_names


def identity(classes, config, pretrained) -> dict[str, Any]:
  """What tells a run with labels from others, beside its configuration."""
  start = hashlib.sha256(
    b"".join(np.ascontiguousarray(pretrained[name]).tobytes() for name in sorted(pretrained))
  )
  return {
    "classes": list(classes),
    "micro-batches": config.optim.accum_steps,
    "start": start.hexdigest(),
  }


def read_pretrained(config, model: Classifier) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """The encoder that `config.init_from` names (if any), as parameters of `model`, and what to say about it.

  Position tables are interpolated to the grid of `config.image_size`. The classifier of a fine-tuned model is not taken.

  Raises:
    WeightsError: it does not load, or is another architecture; every difference is named.
  """
  if not config.init_from:
    return {}, ("starting from random weights",)
  student = model_files.read_model(
    config.init_from,
    num_heads=config.encoder.num_heads,
    decoder=False,
    learned_positions=model.encoder.learned_positions,
  )
  if len(student.mean) != len(config.data.mean):
    raise WeightsError(
      f"config.init_from={config.init_from} takes images of {len(student.mean)} channels, config.data.mean has "
      f"{len(config.data.mean)}; weights of the one are not turned into weights of the other: give images, mean "
      "and std of as many channels, or config.init_from= (empty) to start from random weights"
    )
  ours, theirs = (
    model_files.module_fields(encoder) for encoder in (model.encoder, student.encoder)
  )
  free = {
    "sparse",
    "drop_path",
    "remat",
    "fuse_stages",
    "fuse_layers",
    "eps",
  }  # change no parameter that is taken
  different = [
    f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
    for key in sorted((ours.keys() | theirs.keys()) - free)
    if theirs.get(key) != ours.get(key)
  ]
  if different:
    raise WeightsError(
      f"config.init_from={config.init_from} is another architecture: {'; '.join(different)}. Set config.encoder "
      "to that of the checkpoint"
    )
  grid = tuple(side // model.encoder.patch_size for side in config.image_size)
  taken = flatten_dict(model_files.params_at(student, grid)["encoder"], sep="/")
  fused = ("stage1_output_decode", "stage2_output_decode", "fusion")
  params = {f"encoder/{name}": value for name, value in taken.items() if not name.startswith(fused)}
  left = sorted({name.split("/")[0] for name in taken if name.startswith(fused)})
  dropped = f"\n  left out of fine-tuning: {', '.join(left)}" if left else ""
  moved = (
    f"\n  position table {student.grid[0]}x{student.grid[1]} interpolated to {grid[0]}x{grid[1]}"
    if (student.grid != grid and "pos_embed" in taken)
    else ""
  )
  return params, (f"starting from {student.report}{dropped}{moved}",)
