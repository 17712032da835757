"""MR-MAE: mimic a frozen teacher on the visible tokens, reconstruct the masked pixels (arXiv 2303.05475).

Command:   hf download openai/clip-vit-base-patch16 --local-dir clip-b16
           python -m mrmae_jax.main --config=configs/mrmae.py:base --workdir=DIR --config.teacher.path=clip-b16 \\
               --config.data.data_dir=TFDS      (or --config.data.source=folder:/path/to/imagenet)
Sizes:     small, base, large, huge; the teacher is CLIP-B/16 for all of them
Hardware:  one TPU v4-32 slice, or 8 GPUs of 80 GB; fewer devices with --config.optim.accum_steps=K
Cost:      base: 102 GFLOP per image and step, a third of it the teacher; 400 epochs of ImageNet-1k = 5.2e19 FLOP
Expected:  base after 400 epochs fine-tunes to 85.8 % top-1 (abstract of the paper); not reproduced here yet
"""

from mrmae_jax.config import CONVVIT, pretrain, standard_size


def get_config(size: str = "base"):
  c = pretrain()
  c.data.source = "tfds:imagenet2012"
  c.encoder.update(standard_size(CONVVIT, size))
  return c
