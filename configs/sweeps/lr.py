"""Learning rate and weight decay, drawn at random around the published ones.

Command:   mrmae sweep --config=configs/sweeps/lr.py --workdir=DIR --config.KEY=VALUE ...
           arguments as in configs/mrmae.py
Hardware:  that of configs/mrmae.py
Cost:      100 epochs of ImageNet-1k at the base size, about 1.3e19 FLOP for each of 12 runs
Expected:  the published rate (blr 1.5e-4) within a factor of two of the best; not measured here yet
"""

from mrmae_jax.configs.sweeps import ablation
from mrmae_jax.sweep import log_uniform, sampled

get_config = ablation.get_config  # the full recipe, 100 epochs


def sweep():
  return sampled(
    12, 0, {"optim.blr": log_uniform(4e-5, 6e-4), "optim.weight_decay": (0.02, 0.05, 0.1)}
  )
