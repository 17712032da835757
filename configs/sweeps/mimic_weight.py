"""Weight of the mimic loss beside the pixel loss; the paper does not print it.

Command:   mrmae sweep --config=configs/sweeps/mimic_weight.py --workdir=DIR --config.KEY=VALUE ...
           arguments as in configs/mrmae.py; or configs/sweeps/mimic_weight.py:demo for the digits
           of configs/demo.py
Hardware:  that of configs/mrmae.py; the demo: 2 CPU cores
Cost:      100 epochs of ImageNet-1k at the base size, about 1.3e19 FLOP for each of 6 runs; the
           demo: a quarter of an hour
Expected:  both losses start near 1, so the best weight is probably near 1; not measured here yet
"""

from mrmae_jax.configs import demo
from mrmae_jax.configs.sweeps import ablation
from mrmae_jax.sweep import grid


def get_config(argument: str = "base"):
  if argument == "demo":
    return demo.get_config()
  return ablation.get_config(argument)


def sweep():
  return grid({"teacher.weight": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)})
