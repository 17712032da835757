"""Names of detectron2: ViTDet, ConvMAE's detection in ViTDet's style and in that of FPN.

A file holds `backbone.*`, the encoder and the pyramid; `proposal_generator.*`; and `roi_heads.*`.
Sources: facebookresearch/detectron2 projects/ViTDet, OpenGVLab/Official-ConvMAE-Det,
Alpha-VL/ConvMAE DET.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
  upsample,
)

BACKBONE = "backbone."
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
    for ours, theirs in (("window", "windowed"), ("global", "global")):
      name = f"{theirs}_rel_pos_bias.relative_position_bias_table"
      table.append(Entry(f"{ours}_distances", (name,), same))
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
  is_fpn = module.pyramid_kind == "fpn"
  net = "bottom_up." if is_fpn else "net."
  pyramid = (fpn_table if is_fpn else simple_pyramid_table)(module.norm)
  backbone = [
    Entry(f"encoder/{entry.ours}", tuple(net + name for name in entry.theirs), entry.layout)
    for entry in encoder_table(module.encoder)
  ]
  backbone = [
    entry._replace(theirs=tuple(BACKBONE + name for name in entry.theirs))
    for entry in backbone + pyramid
  ]
  return backbone + head_table(module)


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
