"""ConvMAE: masked auto-encoding, conv stages before the ViT, no teacher (arXiv 2205.03892).

Command:   mrmae pretrain --config=configs/convmae.py:base --workdir=DIR --config.data.data_dir=TFDS
           (or --config.data.source=folder:/path/to/imagenet)
Sizes:     small, base, large, huge
Hardware:  one TPU v4-32 slice, or 8 GPUs of 80 GB; fewer devices with --config.optim.accum_steps=K
Cost:      base: 66 GFLOP per image and step with sparse stages; 1600 epochs of ImageNet-1k =
           1.4e20 FLOP
Expected:  base after 1600 epochs fine-tunes to 85.0 % top-1 (Alpha-VL/ConvMAE README); not
           reproduced here yet
"""

from mrmae_jax import config


def get_config(size: str = "base"):
  c = config.pretrain()
  c.teacher.path = ""
  c.data.source = "tfds:imagenet2012"
  c.encoder = config.encoder("convvit", size)
  c.batch_size = 2048  # the author's number (Alpha-VL/ConvMAE#6); PRETRAIN.md prints 3072
  c.epochs = 1600.0
  return c
