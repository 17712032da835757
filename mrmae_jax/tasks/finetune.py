"""Fine-tuning as a task: an encoder with a classification head, mixed images, soft targets."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax import data, mrmae, optim
from mrmae_jax.errors import DataError
from mrmae_jax.mixup import mix, soft_cross_entropy
from mrmae_jax.models import make_plain_encoder
from mrmae_jax.models.classifier import Classifier
from mrmae_jax.train import Task
from mrmae_jax.weights import init_from

CLASSIFIERS = {"mean": {"fc_norm", "head"}, "cls": {"head"}}  # parameters for each config.pool


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
  pretrained, notes = read_pretrained(config, model, class_names)

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
    optimizer=lambda steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    identity=identity(config, class_names, pretrained),
    notes=notes,
    pretrained=pretrained,
  )


def make_model(config, num_classes: int) -> Classifier:
  """Returns the classifier of a configuration."""
  dtype = jnp.dtype(config.dtype)
  encoder = make_plain_encoder(config.encoder, dtype)
  return Classifier(encoder, num_classes, config.pool, dtype=dtype)


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
  return {
    "classes": list(class_names),
    "micro-batches": config.optim.accum_steps,
    "start": init_from.digest(pretrained),
  }


def read_pretrained(
  config, model: Classifier, class_names: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Reads the model of `config.init_from`, if any, as parameters of `model`, and notes about it.

  Position tables are interpolated to the grid of `config.image_size`. The classifier of a
  fine-tuned model is taken if its classes, by name, are `class_names`.

  Returns:
    {path joined by "/": array} and lines for the log.

  Raises:
    WeightsError: it does not load, or is another architecture; every difference is named.
  """
  if not config.init_from:
    return {}, ("starting from random weights",)
  source = init_from.read_source(config, model.encoder, decoder=False)
  params, notes = init_from.encoder_params(config, source, model.encoder)
  fusion = {name for name in params if name.startswith(init_from.FUSION)}
  if fusion:
    names = sorted({name.split("/")[0] for name in fusion})
    notes.append(f"left out of fine-tuning: {', '.join(names)}")
  pretrained = {f"encoder/{name}": x for name, x in params.items() if name not in fusion}
  classifier = source.params.get("classifier", {})
  if classifier.keys() == CLASSIFIERS[config.pool] and set(source.classes) == set(class_names):
    order = [source.classes.index(name) for name in class_names]
    head = {name: x[..., order] for name, x in classifier["head"].items()}
    pretrained |= flatten_dict(classifier | {"head": head}, sep="/")
  elif classifier:
    notes.append("left out: its classifier, of other classes or another pooling")
  return pretrained, ("\n  ".join(notes),)
