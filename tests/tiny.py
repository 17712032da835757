"""A configuration that compiles in seconds and has every part: conv stages, decoder, teacher."""

from pathlib import Path

from mrmae_jax import config

TEACHERS = Path(__file__).parent / "goldens" / "teachers"


def get_config(encoder: str = "convvit"):
  c = config.pretrain()
  c.image_size = (32, 48)  # not square: a swapped axis cannot hide
  c.batch_size = 16
  c.epochs = 0.09  # 8 steps of 1,438 digits
  c.dtype = "float32"
  if encoder == "vit":
    c.encoder = config.encoder("vit", "base")
    c.encoder.update(patch_size=8, dim=24, depth=2, num_heads=2, mlp_dim=48)
  else:
    c.encoder.update(patch_sizes=(2, 2, 2), embed_dims=(8, 12, 24), depths=(1, 1, 2), num_heads=2)
  c.decoder.update(dim=16, depth=1, num_heads=2)
  c.teacher.path = str(TEACHERS / "hf_clip_full")  # 8-pixel patches, random weights
  c.teacher.dtype = "float32"
  c.data.source = "digits"
  c.data.holdout_every = 5
  c.optim.blr = 4e-2
  c.optim.warmup_epochs = 0.02
  c.log_every = 1
  c.eval_every = 1.0
  c.checkpoint_every = 0.045  # every 4 steps
  c.evals.reconstruct.images = 2
  c.evals.knn.update(bank=64)
  return c
