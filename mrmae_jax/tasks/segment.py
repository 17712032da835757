"""Segmentation as a task: UperNet on an encoder, and a class for every pixel.

The recipe of mmsegmentation, as ConvMAE, MAE and BEiT use it. The running statistics of BatchNorm
are the task's `extra`: micro-batches move them one after the other, a skipped step leaves them, and
averaged weights are evaluated with the newest ones.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax import data, mrmae, optim
from mrmae_jax.constants import IGNORED
from mrmae_jax.errors import DataError, WeightsError, printable
from mrmae_jax.models.upernet import Segmenter, make_segmenter
from mrmae_jax.segmentation import cross_entropy
from mrmae_jax.tasks import finetune
from mrmae_jax.train import Task, with_pretrained
from mrmae_jax.weights import init_from

HEADS = ("decode_head", "auxiliary_head")


def make(config) -> Task:
  """Returns the segmentation task of a validated configuration.

  Raises:
    DataError: the training images have no classes, or too many.
    WeightsError: the file of `config.init_from` does not load or does not fit.
  """
  source = functools.cache(functools.partial(data.open_split, config.data))
  class_names = read_class_names(source)
  dtype = jnp.dtype(config.dtype)
  model = make_segmenter(config.encoder, config.upernet, len(class_names), dtype)
  shape = (1, *config.image_size, len(config.data.mean))
  normalize = lambda images: mrmae.normalize(images, config.data.mean, config.data.std)
  pretrained, stats, notes = read_pretrained(config, model, class_names)

  def init(key):
    variables = model.init(key, jnp.zeros(shape))
    return variables["params"], with_pretrained(variables["batch_stats"], stats)

  def loss(params, extra, frozen, batch, keys):
    del frozen
    (logits, out), updated = model.apply(
      {"params": params, "batch_stats": extra},
      normalize(batch["image"]),
      train=True,
      keys=keys,
      mutable=["batch_stats"],
    )
    mean = functools.partial(
      cross_entropy, labels=batch["label"], of_all=config.upernet.mean_over == "all"
    )
    terms = {"decode": mean(logits)}
    total = terms["decode"]
    if "aux" in out:
      terms["aux"] = mean(out["aux"])
      total += config.upernet.aux_weight * terms["aux"]
    return total, (terms, updated["batch_stats"])

  def predict(params, extra, frozen, batch, keys):
    del frozen, keys
    variables = {"params": params, "batch_stats": extra}
    return {"logits": model.apply(variables, normalize(batch["image"]))[0]}

  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.scene_views(config),
    source=source,
    optimizer=lambda steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    identity=finetune.identity(config, class_names, pretrained | stats),
    notes=notes,
    pretrained=pretrained,
  )


def read_class_names(source) -> tuple[str, ...]:
  """Returns the classes of the training images of `source`, a field of a Task.

  Raises:
    DataError: they have none or too many, or the images to measure on have others.
  """
  names = finetune.read_class_names(source)
  if len(names) > IGNORED:
    raise DataError(
      f"{source('train').description}: at most {IGNORED} classes fit into a label, whose value "
      f"{IGNORED} means ignored"
    )
  return names


def read_pretrained(
  config, model: Segmenter, class_names: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], tuple[str, ...]]:
  """Reads the model of `config.init_from`, if any, as parameters and statistics of `model`.

  Position tables are interpolated to the grid of `config.image_size`. Tables of relative positions
  and gains that a pre-trained encoder lacks are new. Of a segmentation model the neck and the heads
  are taken too, the latter unless `config.head` is "new".

  Returns:
    {path joined by "/": array} of parameters and of "batch_stats", and lines for the log.

  Raises:
    WeightsError: it does not load, is another architecture, or tells other classes apart.
  """
  if not config.init_from:
    return {}, {}, ("starting from random weights",)
  source = init_from.read_source(
    config, model.encoder, new=("relative_positions", "layer_scale"), decoder=False
  )
  params, notes = init_from.encoder_params(config, source, model.encoder)
  params = {x: params[x] for x in params if not x.startswith(init_from.FUSION)}
  pretrained = {f"encoder/{name}": x for name, x in params.items()}
  notes += [
    f"new: {words}"
    for words, field in (
      ("tables of relative positions, zeros", "relative_positions"),
      ("gains of the branches, ones", "layer_scale"),
    )
    if getattr(model.encoder, field) and not getattr(source.encoder, field)
  ]
  if source.segmenter is None:
    if left_out := sorted(source.params.keys() - {"encoder"}):
      notes.append(f"left out of segmentation: {', '.join(left_out)}")
    return pretrained, {}, ("\n  ".join([*notes, "new: neck and heads, with random weights"]),)
  parts = set(source.params["segmenter"])
  if config.head == "new":
    parts -= set(HEADS)
    notes.append("new: heads, with random weights (config.head=new)")
  else:
    check_heads(config, source, model, class_names)
    if source.classes and set(source.classes) != set(class_names):
      names = ", ".join([x for x in source.classes if x not in class_names][:5])
      notes.append(f"classes that have other names here: {printable(names)}")
  take = lambda tree: flatten_dict({x: tree[x] for x in parts & tree.keys()}, sep="/")
  pretrained |= take(source.params["segmenter"])
  if set(source.classes) == set(class_names):
    order = [source.classes.index(name) for name in class_names]
    for name in [name for name in pretrained if "/conv_seg/" in name]:
      pretrained[name] = pretrained[name][..., order]
  return pretrained, take(source.params["batch_stats"]), ("\n  ".join(notes),)


def check_heads(config, source, model: Segmenter, class_names: tuple[str, ...]) -> None:
  """Raises WeightsError unless the heads of a segmentation model fit."""
  theirs = source.segmenter
  if theirs.num_classes != len(class_names):
    difference = init_from.different_classes(config, source, theirs.num_classes, class_names)
    raise WeightsError(f"{difference}. config.head=new starts fresh heads")
  fields = ("channels", "aux_channels", "pool_scales", "levels")
  if different := init_from.different_fields(theirs, model, fields):
    raise WeightsError(
      f"config.init_from={config.init_from} has other heads: {'; '.join(different.values())}. Set "
      "config.upernet to these, or start fresh ones with config.head=new"
    )
