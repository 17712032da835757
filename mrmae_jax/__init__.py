"""MR-MAE in JAX and Flax. `mrmae_jax.load` loads a trained model; importing the package imports
nothing else.
"""

from mrmae_jax.constants import VERSION as __version__  # noqa: F401


def __getattr__(name: str):
  if name in ("load", "PretrainedModel"):
    from mrmae_jax import pretrained  # jax is imported when it is needed

    return getattr(pretrained, name)
  raise AttributeError(f"module 'mrmae_jax' has no attribute {name!r}")
