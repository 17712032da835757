"""ConvMAE's segmentation network in PyTorch: the peer of `--pair=upernet`.

Blocks, heads and names of tensors are those of the published files (Alpha-VL/ConvMAE SEG,
mmsegmentation 0.30 uper_head.py), so that `weights.mmseg` reads its weights. Needs torch.
"""

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-5
AUX_WEIGHT = 0.4
IGNORED = 255


class ChannelNorm(nn.LayerNorm):
  """LayerNorm over the channels of a map [B, C, H, W]."""

  def forward(self, x):
    return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
  """Two layers, Linear or 1x1 convolutions, with GELU between them."""

  def __init__(self, layer, dim: int, hidden: int):
    super().__init__()
    self.fc1, self.fc2 = layer(dim, hidden), layer(hidden, dim)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x)))


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, 1)


class ConvBlock(nn.Module):
  """The block of the convolutional stages."""

  def __init__(self, dim: int, ratio: float, eps: float = EPS):
    super().__init__()
    self.norm1, self.norm2 = ChannelNorm(dim, eps), ChannelNorm(dim, eps)
    self.conv1, self.conv2 = pointwise(dim, dim), pointwise(dim, dim)
    self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    self.mlp = Mlp(pointwise, dim, int(dim * ratio))

  def forward(self, x):
    x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
    return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
  """Attention with a table of relative positions and no CLS token."""

  def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]):
    super().__init__()
    height, width = grid
    self.num_heads = num_heads
    self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    rows = (2 * height - 1) * (2 * width - 1)
    self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(rows, num_heads))
    row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    index = (row[:, None] - row + height - 1) * (2 * width - 1) + column[:, None] - column
    self.register_buffer("relative_position_index", index + width - 1)

  def forward(self, x):
    b, n, dim = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
    return self.proj(x.transpose(1, 2).reshape(b, n, dim))


class Block(nn.Module):
  """The block of the transformer stage, with learned gains of its branches."""

  def __init__(self, dim: int, num_heads: int, ratio: float, grid: tuple[int, int]):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
    self.attn = Attention(dim, num_heads, grid)
    self.mlp = Mlp(nn.Linear, dim, int(dim * ratio))
    self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

  def forward(self, x):
    x = x + self.gamma_1 * self.attn(self.norm1(x))
    return x + self.gamma_2 * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  """Convolution with stride = kernel, LayerNorm, GELU."""

  def __init__(self, size: int, inputs: int, dim: int):
    super().__init__()
    self.proj, self.norm = nn.Conv2d(inputs, dim, size, stride=size), ChannelNorm(dim)

  def forward(self, x):
    return F.gelu(self.norm(self.proj(x)))


class Backbone(nn.Module):
  """ConvViT and the convolution that makes the fourth level."""

  def __init__(self, fields, grid: tuple[int, int]):
    """Takes the section `encoder` of a configuration, and (rows, columns) of tokens."""
    super().__init__()
    widths = [3, *fields.embed_dims]
    for i in range(3):
      embed = PatchEmbed(fields.patch_sizes[i], widths[i], widths[i + 1])
      setattr(self, f"patch_embed{i + 1}", embed)
    dim, ratios = widths[3], fields.mlp_ratios
    self.patch_embed4 = nn.Linear(dim, dim)
    self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], dim))
    conv = lambda i: [ConvBlock(widths[i], ratios[i - 1]) for _ in range(fields.depths[i - 1])]
    self.blocks1, self.blocks2 = nn.ModuleList(conv(1)), nn.ModuleList(conv(2))
    self.blocks3 = nn.ModuleList(
      [Block(dim, fields.num_heads, ratios[2], grid) for _ in range(fields.depths[2])]
    )
    self.fpn = nn.Sequential(nn.Conv2d(dim, dim, 3, stride=2), nn.BatchNorm2d(dim), nn.GELU())

  def forward(self, x):
    levels = []
    for embed, blocks in (
      (self.patch_embed1, self.blocks1),
      (self.patch_embed2, self.blocks2),
    ):
      x = embed(x)
      for block in blocks:
        x = block(x)
      levels.append(x)
    x = self.patch_embed3(x)
    shape = x.shape
    x = self.patch_embed4(x.flatten(2).transpose(1, 2)) + self.pos_embed
    for block in self.blocks3:
      x = block(x)
    x = x.transpose(1, 2).reshape(shape)
    return [*levels, x, self.fpn(x)]


class ConvModule(nn.Module):
  """Convolution without bias, BatchNorm, ReLU."""

  def __init__(self, inputs: int, outputs: int, size: int):
    super().__init__()
    self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    self.bn = nn.BatchNorm2d(outputs)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


def resize(x, size):
  return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class DecodeHead(nn.Module):
  """UperNet's head."""

  def __init__(self, widths, heads, num_classes: int):
    super().__init__()
    channels, scales = heads.channels, heads.pool_scales
    module = lambda inputs, size: ConvModule(inputs, channels, size)
    self.psp_modules = nn.ModuleList(
      [nn.Sequential(nn.AdaptiveAvgPool2d(k), module(widths[-1], 1)) for k in scales]
    )
    self.bottleneck = module(widths[-1] + len(scales) * channels, 3)
    self.lateral_convs = nn.ModuleList([module(width, 1) for width in widths[:-1]])
    self.fpn_convs = nn.ModuleList([module(channels, 3) for _ in widths[:-1]])
    self.fpn_bottleneck = module(len(widths) * channels, 3)
    self.conv_seg = nn.Conv2d(channels, num_classes, 1)

  def forward(self, levels):
    deepest = levels[-1]
    pyramid = [deepest, *(resize(m(deepest), deepest.shape[2:]) for m in self.psp_modules)]
    laterals = [conv(x) for conv, x in zip(self.lateral_convs, levels)]
    laterals.append(self.bottleneck(torch.cat(pyramid, 1)))
    for i in reversed(range(len(laterals) - 1)):
      laterals[i] = laterals[i] + resize(laterals[i + 1], laterals[i].shape[2:])
    outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)] + [laterals[-1]]
    outputs = [resize(x, levels[0].shape[2:]) for x in outputs]
    return self.conv_seg(self.fpn_bottleneck(torch.cat(outputs, 1)))


class AuxiliaryHead(nn.Module):
  """FCN on the third level."""

  def __init__(self, width: int, channels: int, num_classes: int):
    super().__init__()
    self.convs = nn.Sequential(ConvModule(width, channels, 3))
    self.conv_seg = nn.Conv2d(channels, num_classes, 1)

  def forward(self, levels):
    return self.conv_seg(self.convs(levels[2]))


class Segmenter(nn.Module):
  """The network and its loss, without dropout and dropped paths."""

  def __init__(self, config, num_classes: int):
    """Takes a configuration of `mrmae segment` whose encoder is a ConvViT."""
    super().__init__()
    grid = [side // 16 for side in config.image_size]
    dims = config.encoder.embed_dims
    self.backbone = Backbone(config.encoder, grid)
    self.decode_head = DecodeHead([*dims, dims[-1]], config.upernet, num_classes)
    self.auxiliary_head = AuxiliaryHead(dims[-1], config.upernet.aux_channels, num_classes)

  def forward(self, images, labels):
    """[B, 3, H, W] and classes [B, H, W] -> the loss: a mean over all pixels."""
    levels = self.backbone(images)

    def mean(logits):
      logits = resize(logits.float(), labels.shape[1:])
      return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()

    return mean(self.decode_head(levels)) + AUX_WEIGHT * mean(self.auxiliary_head(levels))
