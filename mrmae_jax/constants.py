"""Holds constants that several modules share; imports nothing."""

VERSION = "0.1.0"

IGNORED = 255  # in labels of segmentation: a pixel that nobody has labelled

# Mean and standard deviation per channel of ImageNet's pixels in [0, 1], as torchvision has them
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Fields of models.convvit.ConvViT by size. Sources: base Alpha-VL/ConvMAE; large mx-mark/DMJD;
# small and huge public forks only
CONVVIT = {
  "small": dict(
    embed_dims=(128, 256, 384), depths=(2, 2, 11), num_heads=6, mlp_ratios=(4.0, 4.0, 4.0)
  ),
  "base": dict(
    embed_dims=(256, 384, 768), depths=(2, 2, 11), num_heads=12, mlp_ratios=(4.0, 4.0, 4.0)
  ),
  "large": dict(
    embed_dims=(384, 768, 1024), depths=(2, 2, 23), num_heads=16, mlp_ratios=(8.0, 8.0, 4.0)
  ),
  "huge": dict(
    embed_dims=(768, 1024, 1280), depths=(2, 2, 31), num_heads=16, mlp_ratios=(8.0, 8.0, 4.0)
  ),
}
# Fields of models.vit.ViT in which BEiT and BEiT V2 differ from MAE (microsoft/unilm)
BEIT = dict(
  positions="none",
  relative_positions=True,
  key_bias=False,
  layer_scale=True,
  learned_positions=False,
)
# Fields of models.vit.ViT by size (Dosovitskiy et al. 2021; small as in DeiT; huge, /14, as in MAE)
VIT = {
  "small": dict(patch_size=16, dim=384, depth=12, num_heads=6, mlp_dim=1536),
  "base": dict(patch_size=16, dim=768, depth=12, num_heads=12, mlp_dim=3072),
  "large": dict(patch_size=16, dim=1024, depth=24, num_heads=16, mlp_dim=4096),
  "huge": dict(patch_size=14, dim=1280, depth=32, num_heads=16, mlp_dim=5120),
}
