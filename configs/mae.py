"""MAE: masked auto-encoding with the plain ViT, without a teacher (arXiv 2111.06377).

Command:   mrmae pretrain --config=configs/mae.py:base --workdir=DIR --config.data.data_dir=TFDS
           (or --config.data.source=folder:/path/to/imagenet)
Sizes:     small, base, large, huge (huge has 14-pixel tokens)
Hardware:  one TPU v4-32 slice, or 8 GPUs of 40 GB; fewer devices with --config.optim.accum_steps=K
Cost:      base: 57 GFLOP per image and step; 1600 epochs of ImageNet-1k = 1.2e20 FLOP
Expected:  base after 1600 epochs fine-tunes to 83.6 % top-1 (facebookresearch/mae README); not
           reproduced here yet
"""

from mrmae_jax import config


def get_config(size: str = "base"):
  c = config.pretrain()
  c.teacher.path = ""
  c.data.source = "tfds:imagenet2012"
  c.encoder = config.encoder("vit", size)
  c.batch_size = 4096
  c.epochs = 1600.0
  return c
