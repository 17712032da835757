"""Linear probing of a frozen encoder: the MAE/ConvMAE protocol, many learning rates in one run.

Command:   mrmae probe --config=configs/probe.py:base --workdir=DIR \\
               --config.init_from=PRETRAINED --config.data.source=folder:/path/to/imagenet
           (or tfds with --config.data.data_dir=TFDS). PRETRAINED is a workdir of pre-training, an
           exported file or a published checkpoint; "" probes random weights.
           Minutes instead of hours, without augmentation: mrmae knn --help
Arguments: configs/probe.py:SIZE,encoder=convvit (or vit, beitv2)
           SIZE is small, base, large or huge; or the workdir of a run, whose encoder, image size
           and data are taken
Hardware:  one TPU v4-32 slice, or 8 GPUs of 80 GB; fewer devices with --config.optim.accum_steps=K
Cost:      base: 46 GFLOP per image and step (one forward pass); 90 epochs of ImageNet-1k =
           5.3e18 FLOP
Expected:  ConvMAE-B after 1600 epochs: 70.9 % top-1 (Alpha-VL/ConvMAE README, batch 4096); MAE-B
           68.0, MAE-L 75.8, MAE-H 76.6 (facebookresearch/mae); BEiT V2-B 80.1 (its paper); not
           reproduced here yet. MAE probes CLS, --config.pool=cls; ConvMAE the mean token
"""

from mrmae_jax import config
from mrmae_jax.constants import CONVVIT


def get_config(arguments: str = "base"):
  a = config.parse_arguments(arguments, size="base", encoder="convvit")
  c = config.probe()
  if a.size in CONVVIT:
    c.data.source = "tfds:imagenet2012"
    c.encoder = config.encoder(a.encoder, a.size)
  else:
    config.start_from(c, a.size)
  if c.encoder.name == "convvit":
    c.batch_size = 4096  # ConvMAE's
  return c
