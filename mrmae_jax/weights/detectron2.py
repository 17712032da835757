"""Names of detectron2: ViTDet, ConvMAE's detection in ViTDet's style and in that of FPN.

A file holds `backbone.*`, the encoder and the pyramid; `proposal_generator.*`; and `roi_heads.*`.
Sources: facebookresearch/detectron2 projects/ViTDet, OpenGVLab/Official-ConvMAE-Det,
Alpha-VL/ConvMAE DET.
"""

import numpy as np

from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.weights import convmae, mae
from mrmae_jax.weights.table import (
  Entry,
  Layout,
  conv,
  conv2d,
  norm,
  running_norm,
  same,
  upsample,
)

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
