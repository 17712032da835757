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
    c.encoder.update(patch_sizes=(2, 2, 2), embed_dims=(8, 12, 24), depths=(1, 1, 1), num_heads=2)
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


def finetune_config(encoder="convvit", **values):
  """Fine-tuning of what `tiny` pre-trains."""
  pretrained, c = get_config(encoder), config.finetune()
  c.encoder = pretrained.encoder
  c.encoder.update(drop_path=0.2, learned_positions=True)
  for key in ("image_size", "batch_size", "epochs", "dtype", "log_every", "checkpoint_every"):
    c[key] = pretrained[key]
  c.data.update(source="digits", holdout_every=5, flip=False)
  c.optim.warmup_epochs = 0.02
  c.evals.accuracy.batch_size = 64
  c.init_from = ""
  return changed(c, **values)


def segment_config(encoder="vit", **values):
  """Segmentation of scenes of digits by what `tiny` pre-trains."""
  pretrained, c = get_config(encoder), config.segment()
  c.encoder = pretrained.encoder
  c.encoder.update(drop_path=0.2, learned_positions=True, relative_positions=True, layer_scale=True)
  for key in ("image_size", "batch_size", "dtype", "log_every"):
    c[key] = pretrained[key]
  c.epochs = 0.032  # 4 steps of 2,000 scenes
  c.checkpoint_every = 0.008
  c.upernet.update(channels=8, aux_channels=8)
  c.data.update(source="scenes:digits", zero_is_unlabelled=False, flip=False)
  c.optim.warmup_epochs = 0.008
  c.evals.miou.images = 2
  c.init_from = ""
  return changed(c, **values)


def detect_config(encoder="vit", **values):
  """Detection of scattered digits by what `tiny` pre-trains."""
  pretrained, c = get_config(encoder), config.detect()
  c.encoder = pretrained.encoder
  c.encoder.update(drop_path=0.2, learned_positions=True)
  for key in ("dtype", "log_every"):
    c[key] = pretrained[key]
  c.image_size = (64, 96)
  c.batch_size = 8
  c.epochs = 0.008
  c.checkpoint_every = 0.004
  c.rcnn.update(window=3, position_grid=(4, 6), channels=8, box_convs=1, box_hidden=16)
  c.rcnn.update(rpn_convs=1, mask_convs=1, anchor_sizes=(8.0, 16.0, 24.0, 32.0, 64.0))
  c.rcnn.update(anchor_sample=32, train_proposals=(32, 32), test_proposals=(32, 16))
  c.rcnn.update(roi_sample=16, canonical_size=32.0, detections=5)
  c.data.update(source="coco:digits", scale=(0.8, 1.25), flip=False, max_boxes=8)
  c.evals.coco_ap.images = 2
  c.init_from = ""
  return changed(c, **values)


def probe_config(encoder="convvit", **values):
  """Probing of what `tiny` pre-trains."""
  pretrained, c = get_config(encoder), config.probe()
  c.encoder = pretrained.encoder
  for key in ("image_size", "batch_size", "epochs", "dtype", "log_every", "checkpoint_every"):
    c[key] = pretrained[key]
  c.data.update(source="digits", holdout_every=5, flip=False)
  c.optim.update(warmup_epochs=0.02, grid=(0.5, 4.0))
  c.evals.accuracy.batch_size = 64
  c.init_from = ""
  return changed(c, **values)


def changed(config, **values):
  """Returns `config` with optim__blr=... in the place of config.optim.blr=..."""
  with config.unlocked():
    config.update_from_flattened_dict(
      {key.replace("__", "."): value for key, value in values.items()}
    )
  return config
