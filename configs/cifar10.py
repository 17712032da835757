"""The paper's ladder in an hour on two CPU cores: MAE, ConvMAE and MR-MAE on CIFAR-10, one budget.

Command:   mrmae pretrain --config=configs/cifar10.py:mrmae --workdir=DIR \\
               --config.data.source=folder:/path/to/cifar10 --config.teacher.path=TEACHER
           The folder has train/ and test/ with a sub-folder per class. The teacher is trained on
           train/ without labels: docs/cifar10.md has every command and the results.
Arguments: configs/cifar10.py:METHOD,epochs=2
           METHOD is mae, convmae or mrmae; epochs are those of ConvMAE that the budget pays for
Hardware:  2 CPU cores
Cost:      the same FLOPs for each method, the forward pass of the teacher included; about 6
           minutes on one core
Expected:  with a tenth of the labels, k-NN (k = 20), linear and fine-tuned accuracy: MAE 38.2,
           49.4 and 53.0 %, ConvMAE 38.2, 47.2 and 50.7 %, MR-MAE 44.7, 51.4 and 53.7 % (three
           seeds)
"""

from mrmae_jax import config
from mrmae_jax.errors import ConfigError

# FLOPs of the forward and backward pass for one image in units of ConvMAE's 75 million, counted by
# XLA. MR-MAE includes the forward pass of a ViT teacher of width 64 and depth 6.
COST = {"mae": 0.89, "convmae": 1.0, "mrmae": 1.63}


def get_config(arguments: str = "mrmae"):
  a = config.parse_arguments(arguments, method="mrmae", epochs=2.0)
  if a.method not in COST:
    raise ConfigError(f"method {a.method!r} is not one of {', '.join(COST)}")
  c = config.pretrain()
  if a.method == "mae":
    c.encoder = config.encoder("vit", "base")
    c.encoder.update(patch_size=4, dim=96, depth=4, num_heads=4, mlp_dim=384)
  else:
    c.encoder.update(patch_sizes=(2, 2, 1), embed_dims=(48, 72, 96), depths=(1, 1, 3), num_heads=4)
  c.decoder.update(dim=64, depth=1, num_heads=4)
  c.image_size = (32, 32)
  c.batch_size = 32  # in a run this short the number of updates counts
  c.epochs = a.epochs / COST[a.method]
  c.dtype = "float32"
  if a.method != "mrmae":
    c.teacher.path = ""
  c.teacher.update(dtype="float32", target_norm="batch")  # the tokens of a small teacher share much
  c.data.crop_scale = (0.4, 1.0)
  c.data.eval_crop = 1.0
  c.optim.update(blr=8e-3, warmup_epochs=c.epochs / 10)
  c.eval_every = c.checkpoint_every = 10.0  # only at the end
  c.evals.knn.bank = 10_000
  return c
