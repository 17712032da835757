"""Finds digits in colored scenes, pixel by pixel, with what configs/demo.py has pre-trained.

Command:   mrmae segment --config=configs/segment_demo.py --workdir=/tmp/mrmae_demo_segmented
           (--config.init_from= for the same from random weights)
Hardware:  2 CPU cores
Cost:      4 minutes
Expected:  mIoU of 200 held-out scenes
"""

from mrmae_jax import config
from mrmae_jax.configs import demo


def get_config():
  pretrained = demo.get_config()
  c = config.segment()
  c.init_from = "/tmp/mrmae_demo"
  c.image_size = (48, 48)
  c.batch_size = 8
  c.epochs = 1.5
  c.dtype = pretrained.dtype
  c.encoder = pretrained.encoder
  c.encoder.update(drop_path=0.1, learned_positions=True, relative_positions=True, layer_scale=True)
  c.upernet.update(channels=32, aux_channels=16)
  c.data.update(source="scenes:digits", zero_is_unlabelled=False, holdout_every=5)
  c.data.update(scale=(0.75, 1.5), flip=False)  # a mirrored 2 is not a digit
  c.data.mean = c.data.std = (0.5, 0.5, 0.5)
  c.optim.update(blr=6e-2, warmup_epochs=0.1, layer_decay=0.9)
  c.log_every = 50
  c.eval_every = 0.75
  c.checkpoint_every = 1.0
  return c
