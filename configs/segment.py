"""Segmentation with UperNet: the recipes of ConvMAE, MAE and BEiT on ADE20K.

Command:   mrmae segment --config=configs/segment.py:convmae_base --workdir=DIR \\
               --config.init_from=PRETRAINED \\
               --config.data.source=scenes:/path/to/ADEChallengeData2016
           PRETRAINED is a workdir of pre-training, an exported file or a published checkpoint;
           "" starts from random weights. Another set of scenes: docs/segment.md
Arguments: configs/segment.py:RECIPE, one of convmae_base, mae_base, beit_base, beitv2_base,
           beitv2_large; or PRETRAINED, the workdir of a run, whose encoder is taken, with the
           recipe of convmae_base or mae_base. BEiT V2 after fine-tuning on ImageNet-21k takes
           blr=8e-4,layer_decay=0.85 (base) and blr=4.8e-4 (large)
Hardware:  8 GPUs of 32 GB or more; fewer with --config.optim.accum_steps=K, K at most 8
Cost:      base: 3.7 TFLOP an image and step; 160,000 steps of 16 images = 9.4e18 FLOP
Expected:  mIoU of 2,000 validation images at one scale: ConvMAE-B 51.7 (Alpha-VL/ConvMAE
           SEGMENTATION.md), MAE-B 48.1 (its paper; implus/mae_segmentation 48.15), BEiT-B 53.6
           (microsoft/unilm beit), BEiT V2-B 53.1, BEiT V2-L 56.7 (its paper); not reproduced here
"""

from mrmae_jax import config

RECIPES = {  # learning rates of 16 images, which are 1/16 of blr
  "convmae_base": dict(  # Alpha-VL/ConvMAE SEG/configs
    encoder=("convvit", "base"), lr=1e-4, layer_decay=0.75, drop_path=0.2, eps=1e-5
  ),
  "mae_base": dict(  # implus/mae_segmentation
    encoder=("vit", "base"), lr=1e-4, layer_decay=0.65, drop_path=0.1
  ),
  "beit_base": dict(  # microsoft/unilm beit/semantic_segmentation, of the files ft22k
    encoder=("beitv2", "base"), lr=3e-5, layer_decay=0.9, drop_path=0.1, side=640
  ),
  "beitv2_base": dict(  # microsoft/unilm beit2/semantic_segmentation, as beitv2_large
    encoder=("beitv2", "base"), lr=5e-5, layer_decay=0.75, drop_path=0.15
  ),
  "beitv2_large": dict(
    encoder=("beitv2", "large"), lr=4e-5, layer_decay=0.9, drop_path=0.2, channels=1024
  ),
}


def get_config(arguments: str = "convmae_base"):
  a = config.parse_arguments(arguments, recipe="convmae_base")
  c = config.segment()
  c.data.zero_is_unlabelled = True  # as in ADE20K
  if a.recipe not in RECIPES:
    config.start_from(c, a.recipe)
  usual = "convmae_base" if c.encoder.name == "convvit" else "mae_base"
  recipe = RECIPES.get(a.recipe, RECIPES[usual])
  if a.recipe in RECIPES:
    is_beit = recipe["encoder"][0] == "beitv2"
    c.encoder = config.encoder(*recipe["encoder"])
    c.encoder.update(
      learned_positions=not is_beit,  # BEiT has no such table
      relative_positions=True,
      layer_scale=True,
      eps=recipe.get("eps", 1e-6),
    )
  c.encoder.drop_path = recipe["drop_path"]
  c.image_size = (recipe.get("side", 512),) * 2
  c.upernet.channels = recipe.get("channels", 768)
  c.optim.update(blr=recipe["lr"] * 256 / c.batch_size, layer_decay=recipe["layer_decay"])
  return c
