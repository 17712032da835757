"""Detects scattered digits, with what configs/demo.py has pre-trained.

Command:   mrmae detect --config=configs/detect_demo.py --workdir=/tmp/mrmae_demo_detected
           (--config.init_from= for the same from random weights)
Hardware:  2 CPU cores
Cost:      7 minutes of CPU time; 17 minutes on 2 CPU cores that other programs used too
Expected:  box AP 0.59 (0.83 at an IoU of 0.5) and mask AP 0.62 on 200 held-out pictures (one seed)
"""

from mrmae_jax import config
from mrmae_jax.configs import demo


def get_config():
  pretrained = demo.get_config()
  c = config.detect()
  c.init_from = "/tmp/mrmae_demo"
  c.image_size = (64, 64)
  c.batch_size = 8
  c.epochs = 1.0
  c.dtype = pretrained.dtype
  c.encoder = pretrained.encoder
  c.encoder.update(learned_positions=True)
  c.rcnn.update(window=0, distances="none", position_grid=(8, 8), conv_eps=1e-5)
  c.rcnn.update(channels=32, rpn_convs=1, box_convs=0, box_hidden=256, mask_convs=1)
  c.rcnn.update(anchor_sizes=(8.0, 16.0, 24.0, 32.0, 48.0), anchor_ratios=(1.0, 1.7))
  c.rcnn.update(anchor_sample=64, train_proposals=(32, 32), test_proposals=(32, 32))
  c.rcnn.update(roi_sample=24, roi_positive=0.5, canonical_size=20.0, detections=10)
  c.data.update(source="coco:digits", holdout_every=5, flip=False, scale=(1.0, 1.0), max_boxes=6)
  c.data.mean = c.data.std = (0.5, 0.5, 0.5)
  c.optim.update(blr=2e-3 * 256 / 8, warmup_steps=20, weight_decay=0.05, layer_decay=0.6)
  c.log_every = 10
  c.eval_every = c.checkpoint_every = 1.0
  return c
