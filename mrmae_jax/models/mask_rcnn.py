"""Mask R-CNN: boxes, classes and masks of objects (He et al. 2017, arXiv 1703.06870).

The reference is detectron2 (modeling/proposal_generator/rpn.py, roi_heads/). The networks alone are
here; `boxes` and `detection` hold what happens between them. With several box heads it is Cascade
R-CNN (Cai and Vasconcelos 2018, arXiv 1712.00726).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models import ViT, make_plain_encoder
from mrmae_jax.models.feature_pyramid import CAFFE2_XAVIER, FPN, SimpleFeaturePyramid, halve
from mrmae_jax.models.layers import Dense
from mrmae_jax.models.maps import ConvNorm, Upsample

MSRA = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class RPNHead(nn.Module):
  """The region proposal network, one for all levels: is there an object, and where is its box?

  Attributes:
    channels: of the convolutions.
    num_convs: number of 3x3 convolutions.
    num_anchors: A, of a position.
    dtype: of the computation; outputs are float32.
  """

  channels: int
  num_convs: int
  num_anchors: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, levels: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Levels [B, h, w, C] -> for each, logits [B, h * w * A] and deltas [B, h * w * A, 4]."""
    options = dict(kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)
    convs = [
      nn.Conv(self.channels, (3, 3), padding=1, name=f"conv_{i}", **options)
      for i in range(self.num_convs)
    ]
    to_logits = Dense(self.num_anchors, name="logits", **options)
    to_deltas = Dense(4 * self.num_anchors, name="deltas", **options)
    logits, deltas = [], []
    for x in levels:
      for conv in convs:
        x = nn.relu(conv(x))
      logits.append(to_logits(x).reshape(len(x), -1).astype(jnp.float32))
      deltas.append(to_deltas(x).reshape(len(x), -1, 4).astype(jnp.float32))
    return logits, deltas


class BoxHead(nn.Module):
  """Tells the class of what a region shows, and moves its box.

  Attributes:
    num_classes: K.
    channels, num_convs: of the 3x3 convolutions.
    hidden: width of the fully connected layer.
    is_agnostic: one box for all classes, as in a cascade.
    norm: see `maps.norm_layer`.
    dtype: of the computation; outputs are float32.
  """

  num_classes: int
  channels: int
  num_convs: int
  hidden: int
  is_agnostic: bool
  norm: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool, is_valid: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Features [N, s, s, C] -> logits [N, K + 1], background last, and deltas [N, K or 1, 4].

    `train`, `is_valid`: see `maps.BatchNorm`.
    """
    for i in range(self.num_convs):
      conv = ConvNorm(self.channels, 3, self.norm, MSRA, self.dtype, name=f"conv_{i}")
      x = nn.relu(conv(x, train, is_valid))
    dense = lambda features, init, name: Dense(
      features, kernel_init=init, dtype=self.dtype, name=name
    )
    x = nn.relu(dense(self.hidden, CAFFE2_XAVIER, "fc")(x.reshape(len(x), -1)))
    logits = dense(self.num_classes + 1, nn.initializers.normal(0.01), "logits")(x)
    boxes = 1 if self.is_agnostic else self.num_classes
    deltas = dense(4 * boxes, nn.initializers.normal(0.001), "deltas")(x).reshape(len(x), -1, 4)
    return logits.astype(jnp.float32), deltas.astype(jnp.float32)


class MaskHead(nn.Module):
  """Draws the mask of each class inside of a box.

  Attributes:
    num_classes: K.
    channels, num_convs: of the 3x3 convolutions.
    norm: see `maps.norm_layer`.
    dtype: of the computation; logits are float32.
  """

  num_classes: int
  channels: int
  num_convs: int
  norm: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, is_valid: jax.Array | None = None) -> jax.Array:
    """Features [N, s, s, C] -> logits [N, 2 s, 2 s, K]; `train`, `is_valid`: see `BoxHead`."""
    for i in range(self.num_convs):
      conv = ConvNorm(self.channels, 3, self.norm, MSRA, self.dtype, name=f"conv_{i}")
      x = nn.relu(conv(x, train, is_valid))
    x = nn.relu(Upsample(self.channels, self.dtype, MSRA, name="up")(x))
    init = nn.initializers.normal(0.001)
    x = Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="logits")(x)
    return x.astype(jnp.float32)


class MaskRCNN(nn.Module):
  """Encoder, pyramid and heads.

  Attributes:
    encoder: ConvViT without fusion, or ViT without CLS. Its last norm is not used and keeps its
      start.
    num_classes: K.
    pyramid_kind: "simple", from the last map alone; "fpn", from a ConvViT's stages.
    channels: of the pyramid and all heads; 256 in the published models.
    norm: of the pyramid and the heads, see `maps.norm_layer`.
    num_anchors: A, of a position.
    rpn_convs: convolutions of the region proposal network.
    box_convs, box_hidden: see `BoxHead`.
    box_size: side of the features that a box head reads.
    stages: number of box heads; 1, or 3 for a cascade.
    mask_convs: see `MaskHead`; 0 leaves the head out.
    mask_size: side of the features that the mask head reads; a mask has twice as much.
    dtype: of the computation; parameters, statistics and outputs are float32.
  """

  encoder: Any
  num_classes: int
  pyramid_kind: str = "simple"
  channels: int = 256
  norm: str = "ln"
  num_anchors: int = 3
  rpn_convs: int = 2
  box_convs: int = 4
  box_hidden: int = 1024
  box_size: int = 7
  stages: int = 1
  mask_convs: int = 4
  mask_size: int = 14
  dtype: Any = jnp.float32

  def setup(self):
    pyramid = {"simple": SimpleFeaturePyramid, "fpn": FPN}[self.pyramid_kind]
    self.pyramid = pyramid(self.channels, self.norm, self.dtype)
    self.rpn_head = RPNHead(self.channels, self.rpn_convs, self.num_anchors, self.dtype)
    self.box_heads = [
      BoxHead(
        self.num_classes,
        self.channels,
        self.box_convs,
        self.box_hidden,
        is_agnostic=self.stages > 1,
        norm=self.norm,
        dtype=self.dtype,
      )
      for _ in range(self.stages)
    ]
    if self.mask_convs:
      self.mask_head = MaskHead(
        self.num_classes, self.channels, self.mask_convs, self.norm, self.dtype
      )

  @property
  def strides(self) -> tuple[int, ...]:
    """Pixels of a position's side, for each level."""
    return tuple(self.encoder.patch_size * 2**i // 4 for i in range(5))

  def __call__(self, images: jax.Array) -> None:
    """Creates every parameter, given normalized images [B, H, W, C]."""
    self.rpn_head(self.features(images))
    region = lambda size: jnp.zeros((1, size, size, self.channels), self.dtype)
    for head in self.box_heads:
      head(region(self.box_size), False)
    if self.mask_convs:
      self.mask_head(region(self.mask_size), False)

  def features(
    self, images: jax.Array, train: bool = False, keys: jax.Array | None = None
  ) -> list[jax.Array]:
    """Returns five levels [B, h, w, channels].

    Args:
      images: normalized images [B, H, W, C], both sides multiples of two tokens.
      train: a BatchNorm normalizes by this batch, and updates its running statistics.
      keys: [B], one key per image, which decide the dropped paths; None drops nothing.
    """
    _, out = self.encoder(images, keys=keys)
    grid = tuple(side // self.encoder.patch_size for side in images.shape[1:3])
    x = out["layers"][-1].reshape(len(images), *grid, -1)
    if self.pyramid_kind == "fpn":
      x = [out["stage1"], out["stage2"], x, halve(x)]
    return self.pyramid(x, train)


def usual_global_blocks(depth: int) -> tuple[int, ...]:
  """Returns the last block of each quarter, as published: 2, 5, 8, 11 of 12; 1, 4, 7, 10 of 11."""
  return tuple(sorted({max(i * depth // 4, 1) - 1 for i in range(1, 5)}))


def make_mask_rcnn(fields, heads, num_classes: int, dtype) -> MaskRCNN:
  """Returns the network that the sections `encoder` and `rcnn` of a configuration describe.

  Args:
    fields: see `models.make_plain_encoder`.
    heads: mapping with fields of `MaskRCNN` and of the encoder; others are left out.
    num_classes: K.
    dtype: of the computation.
  """
  encoder = make_plain_encoder(fields, dtype)
  backbone = {name: heads[name] for name in ("window", "distances")}
  backbone["position_grid"] = tuple(heads["position_grid"])
  if heads["window"]:
    usual = usual_global_blocks(encoder.depth)
    backbone["global_blocks"] = tuple(heads["global_blocks"]) or usual
  is_vit = isinstance(encoder, ViT)
  backbone |= {"cls_token": False} if is_vit else {"conv_eps": heads["conv_eps"]}
  names = ("channels", "norm", "rpn_convs", "box_convs", "box_hidden", "stages")
  return MaskRCNN(
    encoder.clone(**backbone),
    num_classes,
    heads["pyramid"],
    num_anchors=len(heads["anchor_ratios"]),
    mask_convs=heads["mask_convs"] if heads["masks"] else 0,
    dtype=dtype,
    **{name: heads[name] for name in names},
  )
