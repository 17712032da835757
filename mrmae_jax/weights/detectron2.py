"""Names of detectron2: ViTDet, ConvMAE's detection in ViTDet's style and in that of FPN.

A file holds `backbone.*`, the encoder and the pyramid; `proposal_generator.*`; and `roi_heads.*`.
Sources: facebookresearch/detectron2 projects/ViTDet, OpenGVLab/Official-ConvMAE-Det,
Alpha-VL/ConvMAE DET.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.detection import Rules
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.models.mask_rcnn import MaskRCNN
from mrmae_jax.weights import convmae, mae
from mrmae_jax.weights.table import (
  Entry,
  Layout,
  conv,
  conv2d,
  dense,
  norm,
  running_norm,
  same,
  shape_of,
  upsample,
)

NAMING = "detectron2's names"
MARKER = "proposal_generator.rpn_head.objectness_logits.weight"
# Statistics of the input, counters, and tables that follow from sizes.
CONSTANTS = (
  r"pixel_(mean|std)|proposal_generator\.anchor_generator\..*"
  r"|(.*\.)?(num_batches_tracked|relative_position_index)"
)
BACKBONE = "backbone."
NETS = {"simple": "net.", "fpn": "bottom_up."}
# ConvMAE's detection in FPN's style; its names and shapes do not tell these.
SHARED_GLOBAL_BLOCKS = (0, 3, 6, 10)
SHARED = "{}_rel_pos_bias.relative_position_bias_table"
RPN = "proposal_generator.rpn_head."
HEADS = "roi_heads."
# A table with a row for CLS, which detectron2 keeps and does not use.
_patch_rows = Layout(
  lambda x: x[:, 1:], lambda x, parts: [np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)]
)


def encoder_table(encoder: ConvViT | ViT) -> list[Entry]:
  """Returns the entries of every parameter but the last norm, which detection does not use."""
  is_vit = isinstance(encoder, ViT)
  table = (mae if is_vit else convmae).encoder_table(encoder)
  table = [entry for entry in table if not entry.ours.startswith("norm/")]
  if is_vit:
    table = [e._replace(layout=_patch_rows) if e.ours == "pos_embed" else e for e in table]
  if encoder.distances == "shared":
    kinds = {"window": "windowed"} if encoder.window else {}
    for ours, theirs in (kinds | {"global": "global"}).items():
      table.append(Entry(f"{ours}_distances", (SHARED.format(theirs),), same))
  return table


def _conv_norm(ours: str, theirs: str, size: int, kind: str) -> list[Entry]:
  """Returns the entries of a `maps.ConvNorm` of the detector."""
  kernel = Entry(
    f"detector/{ours}/conv/kernel", (f"{theirs}.weight",), conv(1) if size == 1 else conv2d
  )
  return [kernel, *_norm(f"{ours}/norm", f"{theirs}.norm", kind)]


def _norm(ours: str, theirs: str, kind: str) -> list[Entry]:
  return (
    running_norm("detector", ours, theirs) if kind == "bn" else norm(f"detector/{ours}", theirs)
  )


def simple_pyramid_table(kind: str) -> list[Entry]:
  """Returns the entries of a `SimpleFeaturePyramid` whose norms are of a `kind`."""
  table = _norm("pyramid/p2_norm", "simfp_2.1", kind)
  for ours, theirs in (("p2_up_0", "simfp_2.0"), ("p2_up_1", "simfp_2.3"), ("p3_up", "simfp_3.0")):
    table.append(Entry(f"detector/pyramid/{ours}/up/kernel", (f"{theirs}.weight",), upsample))
    table.append(Entry(f"detector/pyramid/{ours}/bias", (f"{theirs}.bias",), same))
  for level, first in ((2, 4), (3, 1), (4, 0), (5, 1)):
    for i, (name, size) in enumerate((("lateral", 1), ("output", 3)), first):
      table += _conv_norm(f"pyramid/p{level}_{name}", f"simfp_{level}.{i}", size, kind)
  return table


def fpn_table(kind: str) -> list[Entry]:
  """Returns the entries of an `FPN` whose norms are of a `kind`."""
  return [
    entry
    for level in (2, 3, 4, 5)
    for name, size in (("lateral", 1), ("output", 3))
    for entry in _conv_norm(f"pyramid/p{level}_{name}", f"fpn_{name}{level}", size, kind)
  ]


def _flat(size: int) -> Layout:
  """Returns the layout of a layer behind flattened maps: (out, C * s * s) -> (s * s * C, out)."""
  layout = conv(size)
  return Layout(
    lambda w: layout.read(w.reshape(len(w), -1, size, size)),
    lambda x, parts: [w.reshape(len(w), -1) for w in layout.write(x, parts)],
  )


def head_table(module: MaskRCNN) -> list[Entry]:
  """Returns the entries of the heads."""
  table = []
  for i in range(module.rpn_convs):
    name = f"{RPN}conv.conv{i}" if module.rpn_convs > 1 else f"{RPN}conv"
    table += dense(f"detector/rpn_head/conv_{i}", name, conv2d)
  for ours, theirs in (("logits", "objectness_logits"), ("deltas", "anchor_deltas")):
    table += dense(f"detector/rpn_head/{ours}", RPN + theirs, conv(1))
  for stage in range(module.stages):
    ours, number = f"box_heads_{stage}", f".{stage}" if module.stages > 1 else ""
    for i in range(module.box_convs):
      table += _conv_norm(
        f"{ours}/conv_{i}", f"{HEADS}box_head{number}.conv{i + 1}", 3, module.norm
      )
    fc = f"{HEADS}box_head{number}.fc1"
    table += dense(f"detector/{ours}/fc", fc, _flat(module.box_size))
    for layer, theirs in (("logits", "cls_score"), ("deltas", "bbox_pred")):
      table += dense(f"detector/{ours}/{layer}", f"{HEADS}box_predictor{number}.{theirs}")
  for i in range(module.mask_convs):
    table += _conv_norm(f"mask_head/conv_{i}", f"{HEADS}mask_head.mask_fcn{i + 1}", 3, module.norm)
  if module.mask_convs:
    ours, theirs = "detector/mask_head", f"{HEADS}mask_head"
    table.append(Entry(f"{ours}/up/up/kernel", (f"{theirs}.deconv.weight",), upsample))
    table.append(Entry(f"{ours}/up/bias", (f"{theirs}.deconv.bias",), same))
    table += dense(f"{ours}/logits", f"{theirs}.predictor", conv(1))
  return table


def detector_table(module: MaskRCNN) -> list[Entry]:
  """Returns the entries of every parameter and running statistic, but for the unused last norm."""
  tables = {"simple": simple_pyramid_table, "fpn": fpn_table}
  net, pyramid = NETS[module.pyramid_kind], tables[module.pyramid_kind](module.norm)
  backbone = [
    Entry(f"encoder/{entry.ours}", tuple(net + name for name in entry.theirs), entry.layout)
    for entry in encoder_table(module.encoder)
  ]
  backbone = [
    entry._replace(theirs=tuple(BACKBONE + name for name in entry.theirs))
    for entry in backbone + pyramid
  ]
  return backbone + head_table(module)


def encoder_fields(
  shapes: dict[str, tuple[int, ...]], source: str
) -> tuple[dict[str, Any], tuple[int, int]]:
  """Derives fields of the encoder from its shapes, and (rows, columns) of images in training.

  Args:
    shapes: of its tensors, without BACKBONE and net.
    source: file, for messages.

  Raises:
    WeightsError: it is neither a ConvViT nor a ViT, or parts of it are missing.
  """
  is_vit = "patch_embed1.proj.weight" not in shapes
  fields = (mae if is_vit else convmae).encoder_fields(shapes, source)
  fields["learned_positions"] = "pos_embed" in shapes
  if is_vit:
    fields["cls_token"] = False
  blocks, depth = ("blocks", fields.get("depth")) if is_vit else ("blocks3", fields["depths"][2])
  if SHARED.format("global") in shapes:
    rows, heads = shape_of(shapes, SHARED.format("global"), 2, source)
    window_rows = shapes.get(SHARED.format("windowed"), (0,))[0]
    fields |= dict(
      distances="shared",
      num_heads=heads,
      window=(math.isqrt(window_rows) + 1) // 2 if window_rows else 0,
      global_blocks=tuple(i for i in SHARED_GLOBAL_BLOCKS if i < depth),
    )
    return fields, ((math.isqrt(rows) + 1) // 2,) * 2
  tables = [
    [shape_of(shapes, f"{blocks}.{i}.attn.rel_pos_{axis}", 2, source) for axis in "hw"]
    for i in range(depth)
  ]
  grids = [tuple((length + 1) // 2 for length, _ in table) for table in tables]
  window, grid = min(grids), max(grids)
  positions = shapes.get("pos_embed", (0, 0))[1] - is_vit
  fields |= dict(
    distances="decomposed",
    num_heads=(fields["dim"] if is_vit else fields["embed_dims"][2]) // max(tables[0][0][1], 1),
    window=0 if window == grid else window[0],
    global_blocks=tuple(i for i, side in enumerate(grids) if side == grid),
    position_grid=(math.isqrt(max(positions, 0)),) * 2 if fields["learned_positions"] else (),
  )
  return fields | ({} if is_vit else {"conv_eps": 1e-6}), grid


def detector_fields(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Any]:
  """Derives fields of MaskRCNN from shapes: all but the encoder and `mask_size`.

  Raises:
    WeightsError: a tensor that the sizes depend on is missing or has another rank.
  """

  def count(pattern):
    matches = (re.fullmatch(pattern, name) for name in shapes)
    return len({match[1] for match in matches if match})

  stages = count(re.escape(HEADS) + r"box_predictor\.(\d+)\..*")
  number = ".0" if stages else ""
  box_head = f"{HEADS}box_head{number}"
  hidden, flat = shape_of(shapes, f"{box_head}.fc1.weight", 2, source)
  first = f"{RPN}conv.conv0.weight"
  channels = shape_of(shapes, first if first in shapes else f"{RPN}conv.weight", 4, source)[0]
  is_fpn = any(name.startswith(BACKBONE + NETS["fpn"]) for name in shapes)
  has_statistics = any(name.endswith(".norm.running_mean") for name in shapes)
  logits = shape_of(shapes, f"{HEADS}box_predictor{number}.cls_score.weight", 2, source)
  return dict(
    num_classes=logits[0] - 1,
    pyramid_kind="fpn" if is_fpn else "simple",
    channels=channels,
    norm="bn" if has_statistics else "ln",
    num_anchors=shape_of(shapes, MARKER, 4, source)[0],
    rpn_convs=max(count(re.escape(RPN) + r"conv\.conv(\d+)\.weight"), 1),
    box_convs=count(re.escape(box_head) + r"\.conv(\d+)\.weight"),
    box_hidden=hidden,
    box_size=max(math.isqrt(flat // channels), 1),
    stages=max(stages, 1),
    mask_convs=count(re.escape(HEADS) + r"mask_head\.mask_fcn(\d+)\.weight"),
  )


def notes(module: MaskRCNN, rules: Rules) -> dict[str, Any]:
  """Returns what names and shapes do not tell of a detector, as JSON values."""
  return {"mask_size": module.mask_size, "rules": rules._asdict()}


def read_notes(noted: dict[str, Any]) -> tuple[dict[str, int], Rules]:
  """Returns fields of MaskRCNN, and rules, from `notes`; {}: detectron2's.

  Raises:
    ValueError, TypeError, KeyError: they are damaged.
  """
  if not noted:
    return {}, Rules()
  rules = Rules(**{name: _tuples(value) for name, value in noted["rules"].items()})
  if type(noted["mask_size"]) is not int or not 0 < noted["mask_size"] <= 1000:
    raise ValueError(noted["mask_size"])
  for value, default in zip(rules, Rules()):
    if _depth(value) != _depth(default):
      raise ValueError(value)
  return {"mask_size": noted["mask_size"]}, rules


def _tuples(value):
  """Returns a JSON value with tuples of finite numbers >= 0."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_tuples, value))
  if type(value) not in (int, float) or not 0 <= value < 1e6:
    raise ValueError(value)
  return value


def _depth(value) -> int:
  return 1 + _depth(value[0]) if isinstance(value, tuple) and value else 0


def describe(module: MaskRCNN) -> str:
  """Returns a few words about pyramid and heads for people."""
  cascade = f"cascade of {module.stages} stages, " if module.stages > 1 else ""
  masks = "" if module.mask_convs else ", no masks"
  return (
    f"Mask R-CNN of {module.channels} channels, {cascade}{module.pyramid_kind} pyramid, "
    f"{module.num_classes} classes{masks}"
  )


def detector_shapes(module: MaskRCNN, image_size: tuple[int, int], channels: int = 3):
  """Returns the shapes of "encoder" without its last norm, "detector", and "batch_stats" if any."""
  pixels = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), pixels)
  return split_variables(variables)


def split_variables(variables):
  """Returns variables of the network as `detector_table` names them; `join_variables` undoes it."""
  variables = dict(variables)
  detector = dict(variables.pop("params"))
  encoder = dict(detector.pop("encoder"))
  encoder.pop("norm", None)
  return {"encoder": encoder, "detector": detector, **variables}


def join_variables(tree):
  """Undoes `split_variables`, but for the last norm, which is a fresh one."""
  tree = dict(tree)
  encoder = tree.pop("encoder")
  return {"params": {"encoder": encoder, **tree.pop("detector")}, **tree}
