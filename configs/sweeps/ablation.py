"""Ablations of MR-MAE: the full recipe with one choice changed at a time.

Command:   mrmae sweep --config=configs/sweeps/ablation.py --workdir=DIR --config.KEY=VALUE ...
           arguments and teachers as in configs/mrmae.py
Hardware:  that of configs/mrmae.py
Cost:      100 epochs of ImageNet-1k at the base size, about 1.3e19 FLOP for each of 11 runs
Expected:  the paper prints such a table; its numbers were not available, and none is reproduced
           here yet
"""

from mrmae_jax.configs import mrmae


def get_config(arguments: str = "base"):
  c = mrmae.get_config(arguments)
  c.epochs = 100.0
  c.optim.warmup_epochs = 10.0
  return c


def sweep():
  """Yields the points, see mrmae_jax/sweep.py."""
  yield {"argument": "base"}  # the full recipe: focused, fused stages and layers, ConvViT, CLIP
  yield {"argument": "base,masking=random"}
  yield {"argument": "base,fusion=stages"}
  yield {"argument": "base,encoder=vit"}
  yield {"argument": "base,teacher=dino_vit_b16"}
  yield {"argument": "base,teacher=clip_vit_b16+dino_vit_b16"}
  yield {"argument": "base,tokens=masked"}
  for weight in (0.25, 0.5, 2.0):
    yield {"argument": "base", "teacher.weight": weight}
  yield {"argument": "base", "method.pixel_weight": 0.0}
