"""A trained model as a value: modules, parameters, and what is known of its training."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import interpolation
from mrmae_jax.detection import Rules
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ConvViT, Decoder, ViT
from mrmae_jax.models.layers import Mask, sincos_2d
from mrmae_jax.models.mask_rcnn import MaskRCNN
from mrmae_jax.models.upernet import Segmenter
from mrmae_jax.weights import convmae, mae, positions
from mrmae_jax.weights.table import Entry, decoder_table, dense, norm


class Report(NamedTuple):
  """The fate of a source's tensors; str() gives it as text, one line per kind.

  Attributes:
    source: file, folder or run.
    model: one line about the encoder.
    loaded: what was loaded.
    new: parts of the model that the source does not hold, by design.
    dropped: parts of the source that the model does not have, by design.
  """

  source: str
  model: str
  loaded: tuple[str, ...]
  new: tuple[str, ...]
  dropped: tuple[str, ...]

  def __str__(self) -> str:
    kinds = {
      "loaded": self.loaded,
      "new by design": self.new,
      "dropped by design": self.dropped,
    }
    lines = [f"  {kind}: {'; '.join(parts)}" for kind, parts in kinds.items() if parts]
    return "\n".join([f"{self.source}: {self.model}", *lines])


class LoadedModel(NamedTuple):
  """A trained model: modules, parameters and what is known of its training.

  Attributes:
    encoder: ConvViT or ViT.
    decoder: Decoder; None if the source has none, or it was not asked for.
    params: {"encoder", "decoder" if there is one, "classifier" if it was fine-tuned, "mimic_heads"
      if asked for}, float32 numpy arrays. A classifier is {"head"} on the normed first token, or
      {"fc_norm", "head"} on the mean token of the last block. A segmentation model has "segmenter",
      the parameters of neck and heads, and "batch_stats", their running statistics; a detector has
      "detector", the parameters of pyramid and heads, and "batch_stats" if it has any.
    grid: (rows, columns) of its position tables.
    mean, std: of its input, one number per channel.
    method: {"mask_ratio", "norm_pix"} of its pre-training; MAE's where the source does not tell.
    has_norm: False where fine-tuning has replaced the last norm by fc_norm; the norm in `params` is
      then a fresh one.
    report: what was loaded, and what was not.
    classes: names of the classifier's classes in the order of the logits; () where the source does
      not tell.
    rule: how its encoder's learned positions are interpolated.
    segmenter: UperNet around the encoder; None if it is another model.
    detector: Mask R-CNN around the encoder; None if it is another model.
    rules: by which the detector detects.
  """

  encoder: ConvViT | ViT
  decoder: Decoder | None
  params: dict[str, Any]
  grid: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: dict[str, Any]
  has_norm: bool
  report: Report | None
  classes: tuple[str, ...] = ()
  rule: interpolation.Rule = interpolation.BICUBIC
  segmenter: Segmenter | None = None
  detector: MaskRCNN | None = None
  rules: Rules = Rules()


def param_shapes(
  encoder,
  decoder,
  grid: tuple[int, int],
  classifier: tuple[str, ...] = (),
  classes: int = 0,
  channels: int = 3,
) -> dict[str, Any]:
  """Returns the shapes of all parameters of a model.

  Args:
    encoder: its module.
    decoder: its module, or None.
    grid: (rows, columns) of its position tables.
    classifier: names of its parts, () for none.
    classes: their number.
    channels: of the images.
  """
  tokens, key = math.prod(grid), jax.random.key(0)
  height, width = (side * encoder.patch_size for side in grid)
  pixels = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
  shapes = {"encoder": jax.eval_shape(encoder.init, key, pixels)["params"]}
  if decoder is not None:
    visible = jax.ShapeDtypeStruct((1, 1 + encoder.cls_token, encoder.dim), jnp.float32)
    mask = Mask(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, tokens), jnp.int32))
    init = lambda x: decoder.init(key, x, mask, grid)
    shapes["decoder"] = jax.eval_shape(init, visible)["params"]
  if classifier:
    parts = classifier_shapes(encoder.dim, classes)
    shapes["classifier"] = {name: parts[name] for name in classifier}
  return shapes


def classifier_shapes(dim: int, classes: int) -> dict[str, Any]:
  """Returns the shapes of the parts that a classifier may have."""
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {
    "fc_norm": {"scale": leaf(dim), "bias": leaf(dim)},
    "head": {"kernel": leaf(dim, classes), "bias": leaf(classes)},
  }


def name_table(encoder, decoder, classifier: tuple[str, ...], has_norm: bool) -> list[Entry]:
  """Returns the entries of every parameter of a model, in ConvMAE's or MAE's names."""
  family = convmae if isinstance(encoder, ConvViT) else mae
  layers = {"fc_norm": norm, "head": dense}
  parts = {
    "encoder": [
      entry
      for entry in family.encoder_table(encoder)
      if has_norm or not entry.ours.startswith("norm/")
    ],
    "decoder": decoder_table(decoder) if decoder is not None else [],
    "classifier": [entry for name in classifier for entry in layers[name](name, name)],
  }
  return [e._replace(ours=f"{part}/{e.ours}") for part, entries in parts.items() for e in entries]


def constant_positions(module, grid: tuple[int, int], cls_token: bool) -> np.ndarray:
  """Returns the sine-cosine table float32 [1, T, D] of an encoder or decoder."""
  return sincos_2d(module.dim, grid, cls_token)[None]


def params_at(model: LoadedModel, grid: tuple[int, int]) -> dict[str, Any]:
  """Returns `model.params` for images of another grid.

  Learned position tables are interpolated by `model.rule`: bicubically, as in MAE and DeiT, or as
  the family of a tower does it; tables of relative positions as BEiT does it.
  """
  if is_backbone(model.encoder):
    return _detector_params_at(model, grid)
  return positions.resize_tables(model.params, model.grid, grid, model.rule)


def is_backbone(encoder) -> bool:
  """Returns whether an encoder has what detection adds to one."""
  return bool(encoder.window or encoder.distances != "none" or encoder.position_grid)


def _detector_params_at(model: LoadedModel, grid: tuple[int, int]) -> dict[str, Any]:
  """Returns the parameters of a detector's encoder, whose positions have a grid of their own."""
  encoder = model.params["encoder"]
  if not model.encoder.position_grid:
    encoder = positions.resize_tables(encoder, model.grid, grid, model.rule)
  shapes = param_shapes(model.encoder, None, grid, channels=len(model.mean))["encoder"]
  if "global_distances" in shapes and model.grid != grid:
    raise WeightsError(
      f"a model with distances='shared' takes images of {model.grid[0]} x {model.grid[1]} tokens "
      f"alone, not {grid[0]} x {grid[1]}"
    )
  return model.params | {"encoder": positions.fit_distances(encoder, shapes)}


def describe(encoder) -> str:
  """Returns one line about an encoder for people."""
  if isinstance(encoder, ViT):
    return (
      f"ViT/{encoder.patch_size}, width {encoder.dim}, depth {encoder.depth}, "
      f"{encoder.num_heads} heads"
    )
  by = lambda values: "/".join(f"{value:g}" for value in values)
  return (
    f"ConvViT/{encoder.patch_size}, widths {by(encoder.embed_dims)}, depths {by(encoder.depths)}, "
    f"{encoder.num_heads} heads, MLP ratios {by(encoder.mlp_ratios)}"
    f"{', CLS token' if encoder.cls_token else ''}"
  )


def module_fields(module) -> dict[str, Any]:
  """Returns the fields of an encoder or decoder as JSON values, without the dtype.

  `make_encoder` and Decoder take them.
  """
  fields = {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ("parent", "name", "dtype")
  }
  if isinstance(module, Decoder):
    return fields
  return {"name": "vit" if isinstance(module, ViT) else "convvit"} | fields


def untrained(model: LoadedModel, seed: int = 0) -> LoadedModel:
  """Returns the encoder of a model with fresh weights, for comparison."""
  height, width = (side * model.encoder.patch_size for side in model.grid)
  pixels = jnp.zeros((1, height, width, len(model.mean)))
  params = jax.jit(model.encoder.init)(jax.random.key(seed), pixels)["params"]
  return model._replace(
    decoder=None, segmenter=None, detector=None, params={"encoder": params}, classes=()
  )


def encoder_only(model: LoadedModel) -> LoadedModel:
  """Returns a model without its decoder, classifier, segmentation and detection."""
  params = {"encoder": model.params["encoder"]}
  return model._replace(decoder=None, segmenter=None, detector=None, params=params, classes=())
