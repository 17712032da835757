"""MR-MAE in JAX and Flax. `mrmae_jax.load` opens a trained student; importing the package imports nothing else."""


def __getattr__(name: str):
  if name == "load":
    from mrmae_jax.pretrained import load  # jax is loaded when it is needed

    return load
  raise AttributeError(f"module 'mrmae_jax' has no attribute {name!r}")
