"""Fine-tuning on labeled images: the MAE/ConvMAE recipe.

Command:   mrmae finetune --config=configs/finetune.py:base --workdir=DIR \\
               --config.init_from=PRETRAINED --config.data.source=folder:/path/to/imagenet
           (or tfds with --config.data.data_dir=TFDS). PRETRAINED is a workdir of pre-training, an
           exported file or a published checkpoint; "" starts from random weights
Arguments: configs/finetune.py:SIZE,encoder=convvit (or vit, beitv2)
           SIZE is base, large or huge; or PRETRAINED, the workdir of a run, whose encoder, image
           size and data are taken, with the recipe of the base size. BEiT V2 is base or large, from
           its files of 1600 epochs; docs/finetune.md has the recipes of its other files
Hardware:  one TPU v4-32 slice, or 8 GPUs of 80 GB; fewer devices with --config.optim.accum_steps=K
Cost:      base: 138 GFLOP per image and step; 100 epochs of ImageNet-1k = 1.8e19 FLOP
Expected:  ConvMAE-B after 1600 epochs of pre-training: 85.0 % top-1 (Alpha-VL/ConvMAE README);
           MAE-B 83.6, MAE-L 85.9, MAE-H 86.9 (facebookresearch/mae README); BEiT V2-B 85.5,
           BEiT V2-L 87.3 (microsoft/unilm beit2); not reproduced here yet
"""

from mrmae_jax import config

RECIPES = {  # of facebookresearch/mae FINETUNE.md; the base size's is ConvMAE's too
  "base": dict(epochs=100.0, blr=5e-4, layer_decay=0.65, drop_path=0.1),
  "large": dict(epochs=50.0, blr=1e-3, layer_decay=0.75, drop_path=0.2),
  "huge": dict(epochs=50.0, blr=1e-3, layer_decay=0.75, drop_path=0.3),
}
BEIT_RECIPES = {  # of microsoft/unilm beit2, whose learning rate at batch 1024 is 4 * blr
  "base": dict(epochs=100.0, warmup_epochs=20.0, blr=1.25e-4, layer_decay=0.6, drop_path=0.2),
  "large": dict(epochs=50.0, warmup_epochs=5.0, blr=5e-5, layer_decay=0.8, drop_path=0.2),
}


def get_config(arguments: str = "base"):
  a = config.parse_arguments(arguments, size="base", encoder="convvit")
  recipes = BEIT_RECIPES if a.encoder == "beitv2" else RECIPES
  recipe = recipes.get(a.size, RECIPES["base"])
  c = config.finetune()
  if a.size in RECIPES:
    c.data.source = "tfds:imagenet2012"
    c.encoder = config.encoder(a.encoder, a.size)
    c.encoder.learned_positions = a.encoder != "beitv2"  # which has no such table
  else:
    config.start_from(c, a.size)
  c.encoder.drop_path = recipe["drop_path"]
  c.mix.groups = 32  # the reference draws for each GPU's 32 images
  c.epochs = recipe["epochs"]
  c.optim.update({key: x for key, x in recipe.items() if key not in ("drop_path", "epochs")})
  return c
