"""Input pipeline: sources of images, views of them, and batches per step."""

from mrmae_jax.data.augment import resizer
from mrmae_jax.data.loader import eval_batches, loader_options, train_batches
from mrmae_jax.data.sources import Source, open_source, open_split

__all__ = [
    "Source", "eval_batches", "loader_options", "open_source", "open_split", "resizer",
    "train_batches",
]  # fmt: skip
