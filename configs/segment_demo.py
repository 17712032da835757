"""Finds digits in colored scenes, pixel by pixel, with what configs/demo.py has pre-trained.

Command:   mrmae segment --config=configs/segment_demo.py --workdir=/tmp/mrmae_demo_segmented
           (--config.init_from= for the same from random weights)
Hardware:  2 CPU cores
Cost:      4 minutes on 2 CPU cores (3 min 30 s at the second start, with 7 s of compiling)
Expected:  mIoU 0.03 to 0.67 on 200 held-out scenes, the ground 0.98 and the digits 0.16 (the 9) to
           0.89 (one seed)
"""

from mrmae_jax import config
from mrmae_jax.configs import demo


def get_config():
  pretrained = demo.get_config()
  c = config.segment()
  c.init_from = "/tmp/mrmae_demo"
  c.image_size = pretrained.image_size
  c.batch_size = 16  # in a run this short the number of updates counts
  c.epochs = 4.0
  c.dtype = pretrained.dtype
  c.encoder = pretrained.encoder
  c.encoder.learned_positions = True
  c.upernet.update(channels=32, aux_channels=0, dropout=0.0)
  c.data.update(source="scenes:digits", zero_is_unlabelled=False, holdout_every=5)
  c.data.update(flip=False, photometric=False)  # a mirrored 2 is not a digit
  c.data.update(scale=(1.0, 1.0), max_share=1.0)
  c.data.mean = c.data.std = (0.5, 0.5, 0.5)
  c.optim.update(blr=0.16, warmup_epochs=0.4, b2=0.95, layer_decay=0.5)
  c.log_every = 25
  c.eval_every = 2.0
  c.checkpoint_every = 4.0
  return c
