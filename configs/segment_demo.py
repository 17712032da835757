"""Finds digits in colored scenes, pixel by pixel, with what configs/demo.py has pre-trained.

Command:   mrmae segment --config=configs/segment_demo.py --workdir=/tmp/mrmae_demo_segmented
           (--config.init_from= for the same from random weights)
Hardware:  2 CPU cores
Cost:      13 minutes on 2 CPU cores that other programs used too
Expected:  mIoU 0.03 to 0.17 on 200 held-out scenes, the ground 0.97: the shapes of the digits are
           found in a hundred steps, their classes begin to differ in the last of the 1,000; more
           steps with --config.epochs=N (one seed)
"""

from mrmae_jax import config
from mrmae_jax.configs import demo


def get_config():
  pretrained = demo.get_config()
  c = config.segment()
  c.init_from = "/tmp/mrmae_demo"
  c.image_size = pretrained.image_size
  c.batch_size = 16
  c.epochs = 8.0
  c.dtype = pretrained.dtype
  c.encoder = pretrained.encoder
  c.encoder.update(learned_positions=True, relative_positions=True, layer_scale=True)
  c.upernet.update(channels=32, aux_channels=16, dropout=0.0)
  c.data.update(source="scenes:digits", zero_is_unlabelled=False, holdout_every=5)
  c.data.update(flip=False, photometric=False)  # a mirrored 2 is not a digit
  c.data.scale = (1.5, 2.5)  # digits as large as in pre-training
  c.data.mean = c.data.std = (0.5, 0.5, 0.5)
  c.optim.update(blr=3.2e-2, warmup_epochs=0.2, b2=0.95, layer_decay=0.65)
  c.log_every = 50
  c.eval_every = 4.0
  c.checkpoint_every = 2.0
  c.evals.miou.update(scales=(2.0,), stride=c.image_size)
  return c
