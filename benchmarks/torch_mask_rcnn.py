"""Mask R-CNN of torchvision on ConvMAE's encoder: the peer of `--pair=mask_rcnn`.

Torchvision's own are the region proposal network, the heads, their losses, matching, suppression
and ROIAlign. Encoder and pyramid, which it lacks, are written here, in the published names. Needs
torch and torchvision.

It follows detectron2, ours and ConvMAE's reference, where torchvision does not, so that the losses
of both can be compared: anchors are not rounded to whole pixels, box losses are L1 from zero on,
ROIAlign is aligned to half a pixel, and the masks to learn are cut at one half. Given numbers
decide which anchors and proposals count. Three differences are left: torchvision has boxes and
masks for the background, which nothing trains; it cuts masks to learn out of whole images, where
ours come as crops of their objects; and its losses are means over all RoIs, not over images.
"""

import contextlib
import functools
import math
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import anchor_utils, faster_rcnn, mask_rcnn, roi_heads, rpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, poolers, roi_align

from benchmarks.torch_upernet import ChannelNorm, ConvBlock, Mlp, PatchEmbed

EPS = 1e-6
LEVELS = ("p2", "p3", "p4", "p5", "p6")
ROI_LEVELS = LEVELS[:4]


class Block(nn.Module):
  """The block of the transformer stage, in which all tokens attend to all."""

  def __init__(self, dim: int, num_heads: int, ratio: float):
    super().__init__()
    self.num_heads = num_heads
    self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
    self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
    self.mlp = Mlp(nn.Linear, dim, int(dim * ratio))

  def forward(self, x):
    b, n, dim = x.shape
    qkv = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.num_heads, -1)
    mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(b, n, dim))
    return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
  """ConvViT without fusion and the last norm."""

  def __init__(self, fields, grid: tuple[int, int], conv_eps: float):
    super().__init__()
    dims, depths, ratios = fields.embed_dims, fields.depths, fields.mlp_ratios
    for i, widths in enumerate(zip([3, *dims], dims)):
      setattr(self, f"patch_embed{i + 1}", PatchEmbed(fields.patch_sizes[i], *widths))
    conv = lambda i: [ConvBlock(dims[i], ratios[i], conv_eps) for _ in range(depths[i])]
    self.blocks1, self.blocks2 = nn.Sequential(*conv(0)), nn.Sequential(*conv(1))
    self.patch_embed4 = nn.Linear(dims[2], dims[2])
    self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dims[2]))
    blocks = [Block(dims[2], fields.num_heads, ratios[2]) for _ in range(depths[2])]
    self.blocks3 = nn.Sequential(*blocks)

  def forward(self, x):
    x = self.blocks2(self.patch_embed2(self.blocks1(self.patch_embed1(x))))
    x = self.patch_embed3(x)
    tokens = self.patch_embed4(x.flatten(2).transpose(1, 2)) + self.pos_embed
    return self.blocks3(tokens).transpose(1, 2).reshape(x.shape)


class ConvNorm(nn.Conv2d):
  """Convolution without bias, and a LayerNorm."""

  def __init__(self, inputs: int, outputs: int, size: int):
    super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
    self.norm = ChannelNorm(outputs, EPS)

  def forward(self, x):
    return self.norm(super().forward(x))


class Backbone(nn.Module):
  """The encoder and ViTDet's pyramid, every level of which comes from the last map."""

  def __init__(self, config, grid: tuple[int, int]):
    super().__init__()
    dim, channels = config.encoder.embed_dims[2], config.rcnn.channels
    self.net = Encoder(config.encoder, grid, config.rcnn.conv_eps)
    up = lambda share: nn.ConvTranspose2d(2 * dim // share, dim // share, 2, stride=2)
    ends = lambda width: (ConvNorm(width, channels, 1), ConvNorm(channels, channels, 3))
    middle = (ChannelNorm(dim // 2, EPS), nn.GELU())
    self.simfp_2 = nn.Sequential(up(2), *middle, up(4), *ends(dim // 4))
    self.simfp_3 = nn.Sequential(up(2), *ends(dim // 2))
    self.simfp_4 = nn.Sequential(*ends(dim))
    self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), *ends(dim))

  def forward(self, x):
    x = self.net(x)
    levels = [self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), self.simfp_5(x)]
    return dict(zip(LEVELS, [*levels, levels[-1][:, :, ::2, ::2]]))


class Sampler:
  """Draws candidates as `boxes.sample` does, in the place of torchvision's random ones."""

  def __init__(self, noise, num_last: int, count: int, share: float):
    """Takes float32 [B, N], least first. Of fewer candidates the last `num_last` are its last."""
    self.noise, self.num_last = noise, num_last
    self.count, self.max_positive = count, int(count * share)

  def __call__(self, labels):
    """Labels of each image -> masks of the positive candidates, and of those of label 0."""
    drawn = [self._draw(*image) for image in zip(labels, self.noise)]
    return [list(masks) for masks in zip(*drawn)]

  def _draw(self, labels, noise):
    split = len(noise) - self.num_last
    noise = torch.cat([noise[: len(labels) - self.num_last], noise[split:]])

    def least(is_candidate, count):
      indices = is_candidate.nonzero()[:, 0]
      mask = torch.zeros_like(is_candidate)
      mask[indices[noise[indices].argsort()[:count]]] = True
      return mask

    positive = least(labels >= 1, self.max_positive)
    return positive, least(labels == 0, self.count - int(positive.sum()))


class Detector(nn.Module):
  """The network and its loss, without dropped paths."""

  def __init__(self, config, num_classes: int, noise):
    """Takes a configuration that `--pair=mask_rcnn` accepts, and `detection.Noise` of the batch."""
    super().__init__()
    heads, patch = config.rcnn, math.prod(config.encoder.patch_sizes)
    channels, outputs = heads.channels, num_classes + 1
    norm = functools.partial(ChannelNorm, eps=EPS)
    self.backbone = Backbone(config, tuple(side // patch for side in config.image_size))
    anchors = anchor_utils.AnchorGenerator(
      tuple((size,) for size in heads.anchor_sizes),
      (tuple(heads.anchor_ratios),) * len(heads.anchor_sizes),
    )
    anchors.cell_anchors = [_cell_anchors(size, heads.anchor_ratios) for size in heads.anchor_sizes]
    per_level, proposals = heads.train_proposals
    self.rpn = rpn.RegionProposalNetwork(
      anchors,
      rpn.RPNHead(channels, len(heads.anchor_ratios), heads.rpn_convs),
      fg_iou_thresh=heads.anchor_iou[1],
      bg_iou_thresh=heads.anchor_iou[0],
      batch_size_per_image=heads.anchor_sample,
      positive_fraction=heads.anchor_positive,
      pre_nms_top_n={"training": per_level},
      post_nms_top_n={"training": proposals},
      nms_thresh=heads.proposal_nms,
    )
    pool = lambda size: MultiScaleRoIAlign(
      ROI_LEVELS,
      size,
      heads.pool_samples,
      canonical_scale=heads.canonical_size,
      canonical_level=round(math.log2(patch)),
    )
    self.roi_heads = roi_heads.RoIHeads(
      pool(7),
      faster_rcnn.FastRCNNConvFCHead(
        (channels, 7, 7), [channels] * heads.box_convs, [heads.box_hidden], norm
      ),
      faster_rcnn.FastRCNNPredictor(heads.box_hidden, outputs),
      fg_iou_thresh=heads.roi_iou[0],
      bg_iou_thresh=heads.roi_iou[0],
      batch_size_per_image=heads.roi_sample,
      positive_fraction=heads.roi_positive,
      bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
      score_thresh=heads.min_score,
      nms_thresh=heads.detection_nms,
      detections_per_img=heads.detections,
      mask_roi_pool=pool(14),
      mask_head=mask_rcnn.MaskRCNNHeads(channels, [channels] * heads.mask_convs, 1, norm),
      mask_predictor=mask_rcnn.MaskRCNNPredictor(channels, channels, outputs),
    )
    anchor_noise, proposal_noise = map(_to_tensor, noise)
    num_objects = proposal_noise.shape[1] - proposals
    self.rpn.fg_bg_sampler = Sampler(anchor_noise, 0, heads.anchor_sample, heads.anchor_positive)
    self.roi_heads.fg_bg_sampler = Sampler(
      proposal_noise, num_objects, heads.roi_sample, heads.roi_positive
    )

  def forward(self, images, targets):
    """[B, 3, H, W] normalized, and {"boxes", "labels", "masks"} of each image -> the loss."""
    sizes = [tuple(images.shape[2:])] * len(images)
    levels = self.backbone(images)
    with _rules_of_detectron2():
      proposals, losses = self.rpn(ImageList(images, sizes), levels, targets)
      _, more = self.roi_heads(levels, proposals, sizes, targets)
    return sum((losses | more).values())


def _cell_anchors(size: float, ratios):
  """Returns the anchors of a position, [A, 4]; torchvision's are rounded."""
  widths = torch.tensor([math.sqrt(size**2 / ratio) for ratio in ratios])
  heights = widths * torch.tensor(list(ratios))
  return torch.stack([-widths, -heights, widths, heights], 1) / 2


@contextlib.contextmanager
def _rules_of_detectron2():
  """Replaces what torchvision fixes in its code and detectron2 does otherwise."""
  l1 = lambda x, y, beta, reduction: F.l1_loss(x, y, reduction=reduction)
  project = roi_heads.project_masks_on_boxes
  cut = lambda *args: (project(*args) >= 0.5).float()
  aligned = functools.partial(roi_align, aligned=True)
  with (
    mock.patch.object(F, "smooth_l1_loss", l1),
    mock.patch.object(poolers, "roi_align", aligned),
    mock.patch.object(roi_heads, "roi_align", aligned),
    mock.patch.object(roi_heads, "project_masks_on_boxes", cut),
  ):
    yield


def _to_tensor(x):
  return torch.from_numpy(np.array(x))


def make_inputs(pixels, boxes, classes, masks):
  """Returns what `Detector` takes, of numpy arrays.

  Args:
    pixels: normalized images [B, H, W, 3].
    boxes, classes: [B, M, 4] and [B, M], of `detection.Truth`.
    masks: uint8 [B, M, H, W].
  """
  labels = classes.astype(np.int64) + 1  # torchvision's background comes first
  rows = zip(map(_to_tensor, boxes), map(_to_tensor, labels), map(_to_tensor, masks))
  targets = [dict(zip(("boxes", "labels", "masks"), row)) for row in rows]
  return _to_tensor(pixels.transpose(0, 3, 1, 2)), targets


def load_weights(model: Detector, tensors: dict) -> None:
  """Loads every parameter from numpy arrays in detectron2's names (`weights.detectron2`)."""
  heads = model.roi_heads
  rpn_convs, box_convs = len(model.rpn.head.conv), len(heads.box_head) - 3
  rpn_conv = lambda i: f"conv.conv{i}" if rpn_convs > 1 else "conv"
  ours = "proposal_generator.rpn_head."
  renamed = {ours + rpn_conv(i): f"rpn.head.conv.{i}.0" for i in range(rpn_convs)}
  renamed |= {
    f"{ours}objectness_logits": "rpn.head.cls_logits",
    f"{ours}anchor_deltas": "rpn.head.bbox_pred",
    "roi_heads.box_head.fc1": f"roi_heads.box_head.{box_convs + 1}",
    "roi_heads.mask_head.deconv": "roi_heads.mask_predictor.conv5_mask",
    "roi_heads.mask_head.predictor": "roi_heads.mask_predictor.mask_fcn_logits",
  }
  for name, conv, count in (
    ("box_head", "conv", box_convs),
    ("mask_head", "mask_fcn", len(heads.mask_head)),
  ):
    for i in range(count):
      conv_name = f"roi_heads.{name}.{conv}{i + 1}"
      renamed[conv_name] = f"roi_heads.{name}.{i}.0"
      renamed[f"{conv_name}.norm"] = f"roi_heads.{name}.{i}.1"
  state = {}
  for name, x in tensors.items():
    layer, _, leaf = name.rpartition(".")
    x = _to_tensor(x)
    if layer == "roi_heads.box_predictor.cls_score":
      x = x.roll(1, 0)  # torchvision's background comes first
    elif layer in ("roi_heads.box_predictor.bbox_pred", "roi_heads.mask_head.predictor"):
      rows = 4 if layer.endswith("bbox_pred") else 1
      x = torch.cat([torch.zeros_like(x[:rows]), x])
    state[f"{renamed.get(layer, layer)}.{leaf}"] = x
  model.load_state_dict(state)
