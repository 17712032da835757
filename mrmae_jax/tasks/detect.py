"""Detection as a task: Mask R-CNN on an encoder, and boxes, classes and masks of objects.

The recipe of detectron2, as ViTDet and ConvMAE use it. Statistics of BatchNorm, if there are any,
are the task's `extra`, as in segmentation.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrmae_jax import data, detection, mrmae, optim
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ViT
from mrmae_jax.models.mask_rcnn import MaskRCNN, make_mask_rcnn
from mrmae_jax.tasks import finetune
from mrmae_jax.train import Task, with_pretrained
from mrmae_jax.weights import init_from

# Fields of an encoder that detection adds.
BACKBONE = ("window", "global_blocks", "distances", "position_grid")
HEADS = ("pyramid_kind", "channels", "norm", "num_anchors", "rpn_convs", "box_convs", "box_hidden")
HEADS += ("stages", "mask_convs", "box_size", "mask_size")
CLASS_LAYERS = ("logits", "deltas")
# Rules to which the heads of a detector have grown.
GROWN = ("anchor_sizes", "anchor_ratios", "canonical_size")


def make(config) -> Task:
  """Returns the detection task of a validated configuration.

  Raises:
    DataError: objects lack masks, or pycocotools is not installed.
    WeightsError: the file of `config.init_from` does not load or does not fit.
  """
  source = functools.cache(functools.partial(data.open_split, config.data))
  class_names = source("train").class_names
  has_masks = config.rcnn.masks
  crowded = data.check_objects(source("train"), config.data.max_boxes, has_masks)
  network = make_mask_rcnn(config.encoder, config.rcnn, len(class_names), jnp.dtype(config.dtype))
  rules = detection.make_rules(config.rcnn)
  shape = (1, *config.image_size, len(config.data.mean))
  pretrained, stats, notes = read_pretrained(config, network, class_names)

  def normalize(batch):
    pixels = mrmae.normalize(batch["image"], config.data.mean, config.data.std)
    return detection.hide_padding(pixels, batch["size"])

  def init(key):
    variables = network.init(key, jnp.zeros(shape))
    return variables["params"], with_pretrained(variables.get("batch_stats", {}), stats)

  def loss(params, extra, anchors, batch, keys):
    boxes, classes = batch["boxes"], batch["classes"]
    masks = batch["masks"] if has_masks else None
    truth = detection.Truth(batch["size"], boxes, classes, masks, boxes)
    noise = detection.draw_noise(keys, anchors, boxes.shape[1], rules)
    (total, terms), updated = network.apply(
      {"params": params, "batch_stats": extra},
      normalize(batch),
      truth,
      noise,
      anchors,
      rules,
      keys,
      method=detection.training_loss,
      mutable=["batch_stats"],
    )
    return total, (terms, updated.get("batch_stats", extra))

  def predict(params, extra, anchors, batch, keys):
    del keys
    variables = {"params": params, "batch_stats": extra}
    args = (normalize(batch), batch["size"], anchors, rules)
    detections, masks = network.apply(variables, *args, method=detection.detect_objects)
    return detections._asdict() | ({} if masks is None else {"masks": masks})

  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.detection_views(config, has_masks),
    source=source,
    optimizer=lambda steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    frozen=detection.make_anchors(network, tuple(config.image_size), rules),
    identity=finetune.identity(config, class_names, pretrained | stats),
    notes=(*notes, *([crowded] if crowded else [])),
    pretrained=pretrained,
  )


def read_pretrained(
  config, network: MaskRCNN, class_names: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], tuple[str, ...]]:
  """Reads the model of `config.init_from`, if any, as parameters and statistics of `network`.

  Of a pre-trained encoder the embeddings, positions and blocks are taken. Of a detector pyramid and
  heads are taken too; layers that tell classes apart start anew if `config.head` is "new".

  Returns:
    {path joined by "/": array} of parameters and of "batch_stats", and lines for the log.

  Raises:
    WeightsError: it does not load, is another architecture, or tells other classes apart.
  """
  if not config.init_from:
    return {}, {}, ("starting from random weights",)
  encoder = network.encoder
  free = (*BACKBONE, "conv_eps", "cls_token")  # CLS stays behind
  source = init_from.read_source(config, encoder, free=free, decoder=False)
  if source.detector is not None:
    return _read_detector(config, source, network, class_names)
  params, notes = init_from.encoder_params(config, source, encoder)
  left_out = {x for x in params if x.startswith((*init_from.FUSION, "cls_token", "norm/"))}
  params = {name: x for name, x in params.items() if name not in left_out}
  if source.encoder.cls_token and "pos_embed" in params and isinstance(encoder, ViT):
    params["pos_embed"] = params["pos_embed"][:, 1:]  # the row of CLS
  parts = {x.split("/")[0] for x in left_out} | (source.params.keys() - {"encoder"})
  notes.append(f"left out of detection: {', '.join(sorted(parts))}")
  if encoder.distances != "none":
    notes.append(f"new: tables of distances ({encoder.distances}), zeros")
  notes.append("new: pyramid and heads, with random weights")
  return {f"encoder/{name}": x for name, x in params.items()}, {}, ("\n  ".join(notes),)


def _read_detector(config, source, network: MaskRCNN, class_names: tuple[str, ...]):
  """Returns what `read_pretrained` does, of a detector.

  The mask head is left out or new if one of both detectors has none.
  """
  check_network(config, source, network, class_names)
  params, notes = init_from.encoder_params(config, source, network.encoder)
  pretrained = {f"encoder/{x}": params[x] for x in params if not x.startswith("norm/")}
  is_kept = lambda name: network.mask_convs or not name.startswith("mask_head/")
  take = lambda tree: {name: x for name, x in flatten_dict(tree, sep="/").items() if is_kept(name)}
  heads, stats = (take(source.params.get(part, {})) for part in ("detector", "batch_stats"))
  if not _agree_on_masks(source.detector, network):
    kind = "new, with random weights" if network.mask_convs else "left out"
    notes.append(f"{kind}: mask_head")
  rules = detection.make_rules(config.rcnn)
  if different := init_from.different_fields(source.rules, rules, GROWN):
    notes.append(f"trained by other rules: {'; '.join(different.values())}")
  if config.head == "new":
    is_new = lambda name: name.split("/")[-2] in CLASS_LAYERS and not name.startswith("rpn_head")
    heads = {name: x for name, x in heads.items() if not is_new(name)}
    notes.append("new: layers that tell classes apart, with random weights (config.head=new)")
  return pretrained | heads, stats, ("\n  ".join(notes),)


def check_network(config, source, network: MaskRCNN, class_names: tuple[str, ...]) -> None:
  """Raises WeightsError unless backbone, pyramid and heads of a detector fit."""
  theirs = source.detector
  grid = tuple(theirs.encoder.position_grid) or source.grid  # (): that of the images
  theirs = theirs.clone(encoder=theirs.encoder.clone(position_grid=grid))
  heads = [name for name in HEADS if name != "mask_convs" or _agree_on_masks(theirs, network)]
  different = init_from.different_fields(theirs.encoder, network.encoder, BACKBONE)
  different |= init_from.different_fields(theirs, network, heads)
  if different:
    find = functools.partial(_option, theirs, source.rules, config.rcnn)
    options = list(filter(None, map(find, different)))
    advice = f"Set {' '.join(options)}" if options else "No key of config.rcnn changes this"
    raise WeightsError(
      f"config.init_from={config.init_from} is another detector: {'; '.join(different.values())}. "
      f"{advice}"
    )
  same = theirs.num_classes == len(class_names) and (
    not source.classes or tuple(source.classes) == tuple(class_names)
  )
  if config.head != "new" and not same:
    difference = init_from.different_classes(config, source, theirs.num_classes, class_names)
    raise WeightsError(f"{difference}. config.head=new starts fresh layers for them")


def _agree_on_masks(theirs: MaskRCNN, ours: MaskRCNN) -> bool:
  """Returns whether two detectors agree on whether masks are drawn."""
  return bool(theirs.mask_convs) == bool(ours.mask_convs)


def _option(theirs: MaskRCNN, rules: detection.Rules, section, name: str) -> str:
  """Returns the option that makes a field that of a detector, "" if `section` lacks such a key."""
  key = {"pyramid_kind": "pyramid", "num_anchors": "anchor_ratios"}.get(name, name)
  value = getattr(theirs.encoder if name in BACKBONE else theirs, name)
  value = rules.anchor_ratios if key == "anchor_ratios" else value
  return f"--config.rcnn.{key}={value}".replace(" ", "") if key in section else ""
