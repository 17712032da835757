"""Fine-tuning as a task: an encoder with a classification head, mixed images, soft targets."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax import data, mrmae, optim
from mrmae_jax.errors import DataError, WeightsError
from mrmae_jax.mixup import mix, soft_cross_entropy
from mrmae_jax.models import make_encoder
from mrmae_jax.models.classifier import Classifier
from mrmae_jax.train import Task
from mrmae_jax.weights import model_files

# Fields of an encoder that change no parameter which fine-tuning takes.
FREE_FIELDS = {"sparse", "drop_path", "remat", "fuse_stages", "fuse_layers", "eps"}
# Parameters of an encoder that serve pre-training alone.
FUSION = ("stage1_output_decode", "stage2_output_decode", "fusion")


def make(config) -> Task:
  """Returns the fine-tuning task of a validated configuration.

  Raises:
    DataError: the training images have no classes.
    WeightsError: the file of `config.init_from` does not load or is another architecture.
  """
  source = functools.cache(functools.partial(data.open_split, config.data))
  class_names = read_class_names(source)
  num_classes = len(class_names)
  model = make_model(config, num_classes)
  shape = (1, *config.image_size, len(config.data.mean))
  normalize = lambda images: mrmae.normalize(images, config.data.mean, config.data.std)
  pretrained, notes = read_pretrained(config, model)

  def init(key):
    return model.init(key, jnp.zeros(shape))["params"], ()

  def loss(params, extra, frozen, batch, keys):
    del frozen
    # One draw per micro-batch, as in the reference; the mixing therefore depends on accum_steps.
    mix_key, drop_keys = jax.random.fold_in(keys[0], 0), jax.vmap(jax.random.fold_in, (0, None))
    images, targets = mix(
      mix_key, normalize(batch["image"]), batch["label"], num_classes, **config.mix
    )
    logits, _ = model.apply({"params": params}, images, drop_keys(keys, 1))
    return soft_cross_entropy(logits, targets), ({}, extra)

  def predict(params, extra, frozen, batch, keys):
    del extra, frozen, keys
    logits, out = model.apply({"params": params}, normalize(batch["image"]))
    return {"logits": logits} | out

  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.image_views(config),
    source=source,
    optimizer=lambda _, steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    identity=identity(config, class_names, pretrained),
    notes=notes,
    pretrained=pretrained,
  )


def make_model(config, num_classes: int) -> Classifier:
  """Returns the classifier of a configuration, without the encoder's fusion layers.

  Fusion serves pre-training alone; models_convvit.py of ConvMAE leaves it out too.
  """
  fields = dict(config.encoder) | {"fuse_layers": ()}
  if config.encoder.name == "convvit":
    fields["fuse_stages"] = False
  dtype = jnp.dtype(config.dtype)
  return Classifier(make_encoder(fields, dtype), num_classes, config.pool, dtype=dtype)


def read_class_names(source) -> tuple[str, ...]:
  """Returns the classes of the training images of `source`, a field of a Task.

  Raises:
    DataError: they have none, or the images to measure on have others.
  """
  images = source("train")
  if not images.class_names:
    raise DataError(
      f"{images.description}: no labels to train on; put each class into a sub-folder of its own"
    )
  data.check_same_classes(images, source("eval"))
  return images.class_names


def identity(config, class_names, pretrained) -> dict[str, Any]:
  """Returns what tells a run with labels from others, beside its configuration."""
  arrays = (np.ascontiguousarray(pretrained[name]).tobytes() for name in sorted(pretrained))
  return {
    "classes": list(class_names),
    "micro-batches": config.optim.accum_steps,
    "start": hashlib.sha256(b"".join(arrays)).hexdigest(),
  }


def read_pretrained(config, model: Classifier) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Reads the encoder of `config.init_from`, if any, as parameters of `model`, and notes about it.

  Position tables are interpolated to the grid of `config.image_size`. The classifier of a
  fine-tuned model is not taken.

  Returns:
    {path joined by "/": array} and lines for the log.

  Raises:
    WeightsError: it does not load, or is another architecture; every difference is named.
  """
  if not config.init_from:
    return {}, ("starting from random weights",)
  source = model_files.read_model(
    config.init_from,
    num_heads=config.encoder.num_heads,
    decoder=False,
    learned_positions=model.encoder.learned_positions,
  )
  _check_architecture(config, model.encoder, source)
  grid = tuple(side // model.encoder.patch_size for side in config.image_size)
  params = flatten_dict(model_files.params_at(source, grid)["encoder"], sep="/")
  fusion = {name for name in params if name.startswith(FUSION)}
  notes = [f"starting from {source.report}"]
  if fusion:
    names = sorted({name.split("/")[0] for name in fusion})
    notes.append(f"left out of fine-tuning: {', '.join(names)}")
  if source.grid != grid and "pos_embed" in params:
    size = lambda grid: f"{grid[0]}x{grid[1]}"
    notes.append(f"position table {size(source.grid)} interpolated to {size(grid)}")
  pretrained = {f"encoder/{name}": x for name, x in params.items() if name not in fusion}
  return pretrained, ("\n  ".join(notes),)


def _check_architecture(config, encoder, source) -> None:
  """Raises WeightsError unless the encoder of `source` has the parameters of `encoder`."""
  if len(source.mean) != len(config.data.mean):
    raise WeightsError(
      f"config.init_from={config.init_from} takes images of {len(source.mean)} channels, "
      f"config.data.mean has {len(config.data.mean)}; weights cannot be converted "
      "between numbers of channels: give images, mean and std of as many channels, or "
      "config.init_from= (empty) to start from random weights"
    )
  ours, theirs = (model_files.module_fields(module) for module in (encoder, source.encoder))
  different = [
    f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
    for key in sorted((ours.keys() | theirs.keys()) - FREE_FIELDS)
    if theirs.get(key) != ours.get(key)
  ]
  if different:
    raise WeightsError(
      f"config.init_from={config.init_from} is another architecture: {'; '.join(different)}. "
      "Set config.encoder to that of the checkpoint"
    )
