"""Detection with Mask R-CNN: the recipes of ViTDet and of ConvMAE on COCO.

Command:   mrmae detect --config=configs/detect.py:convmae_base --workdir=DIR \\
               --config.init_from=PRETRAINED --config.data.source=coco:/path/to/coco
           PRETRAINED is a workdir of pre-training, an exported file or a published checkpoint;
           "" starts from random weights
Arguments: configs/detect.py:RECIPE, one of vitdet_base, vitdet_large, vitdet_huge, convmae_base and
           convmae_fpn_base; or PRETRAINED, the workdir of a run, whose encoder is taken, with the
           recipe of convmae_base or vitdet_base. --config.rcnn.stages=3 trains a cascade
Hardware:  accelerators of 16 GB or more, one image at a time with --config.encoder.remat=full
Cost:      base: 0.9e12 multiplications an image forward (its authors' count), three times as many
           in a step; convmae_base: 184,375 steps of 16 images
Expected:  box AP / mask AP of COCO's validation images: ViTDet-B 51.6 / 45.9, L 55.5 / 49.2, H 56.7
           / 50.2 (detectron2 projects/ViTDet); ConvMAE-B 53.9 / 47.6
           (OpenGVLab/Official-ConvMAE-Det), in FPN's style 53.2 / 47.1 (Alpha-VL/ConvMAE DET); not
           reproduced here
"""

from mrmae_jax import config

IMAGES = 117_266  # of COCO that have objects
RECIPES = {
  "vitdet_base": dict(encoder="base", layer_decay=0.7, drop_path=0.1),
  "vitdet_large": dict(encoder="large", layer_decay=0.8, drop_path=0.4),
  "vitdet_huge": dict(
    encoder="huge", layer_decay=0.9, drop_path=0.5, updates=138_281, decay_of="all"
  ),
  "convmae_base": dict(),  # the defaults
  "convmae_fpn_base": dict(),
}


def get_config(arguments: str = "convmae_base"):
  a = config.parse_arguments(arguments, recipe="convmae_base")
  c = config.detect()
  if a.recipe not in RECIPES:
    config.start_from(c, a.recipe)
  usual = "convmae_base" if c.encoder.name == "convvit" else "vitdet_base"
  name = a.recipe if a.recipe in RECIPES else usual
  if name.startswith("vitdet"):
    use_vitdet(c, RECIPES[name], a.recipe in RECIPES)
  elif name == "convmae_fpn_base":
    use_fpn(c)
  return c


def use_vitdet(c, recipe, is_published: bool):
  """Takes a recipe of ViTDet; the encoder too, if it is a published one."""
  if is_published:
    c.encoder = config.encoder("vit", recipe["encoder"])
    c.encoder.update(learned_positions=True, patch_size=16)  # MAE's H has patches of 14
  c.encoder.drop_path = recipe["drop_path"]
  c.batch_size = 64
  c.epochs = recipe.get("updates", 184_375) * c.batch_size / IMAGES
  c.optim.update(
    blr=1e-4 * 256 / c.batch_size,
    layer_decay=recipe["layer_decay"],
    decay_of=recipe.get("decay_of", "not_encoder_norms"),
    full_rate=(),
  )


def use_fpn(c):
  """Takes ConvMAE's recipe in FPN's style, whose positions are not trained."""
  c.batch_size = 32
  c.epochs = 92_187 * c.batch_size / IMAGES
  c.encoder.learned_positions = False
  c.rcnn.update(
    window=16,
    global_blocks=(0, 3, 6, 10),
    distances="shared",
    conv_eps=1e-5,
    pyramid="fpn",
    norm="bn",
  )
  c.optim.update(
    blr=8e-5 * 256 / c.batch_size,
    schedule="whole_cosine",
    warmup_steps=461,
    layer_decay=1.0,
    decay_of="not_norms",
    no_decay=("window_distances", "global_distances"),
    full_rate=(),
  )
