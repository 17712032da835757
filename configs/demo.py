"""The demo: MR-MAE on scikit-learn's 1,797 handwritten digits, with the bundled teacher.

It needs neither a download nor a GPU.

Command:   mrmae pretrain --config=configs/demo.py --workdir=/tmp/mrmae_demo
Hardware:  2 CPU cores
Cost:      5 to 10 minutes on 2 CPU cores (2 min 33 s if nothing else runs)
Expected:  mimic loss 2.20 to 0.15, pixel loss 1.78 to 0.57, k-NN accuracy of the frozen encoder on
           359 held-out digits 0.74 to 0.89

The teacher in configs/demo_teacher was trained without labels on the training split by
self-distillation: mrmae teacher --config=configs/teacher.py --workdir=DIR
"""

from pathlib import Path

from mrmae_jax import config


def get_config():
  c = config.pretrain()
  c.image_size = (32, 32)
  c.batch_size = 64
  c.epochs = 16.0
  c.dtype = "float32"  # CPUs gain nothing from bfloat16
  # 8 x 8 tokens of 4 pixels
  c.encoder.update(patch_sizes=(1, 2, 2), embed_dims=(32, 64, 96), depths=(1, 1, 3), num_heads=4)
  c.decoder.update(dim=64, depth=2, num_heads=4)
  c.teacher.path = str(Path(__file__).parent / "demo_teacher")
  c.teacher.dtype = "float32"
  c.data.source = "digits"
  c.data.holdout_every = 5
  c.data.crop_scale = (0.5, 1.0)
  c.data.flip = False  # a mirrored 2 is not a digit
  c.data.eval_crop = 1.0
  c.data.mean = c.data.std = (0.5, 0.5, 0.5)
  c.optim.blr = 4e-3
  c.optim.warmup_epochs = 3.0
  c.log_every = 50
  c.eval_every = 10.0
  c.checkpoint_every = 5.0
  return c
