"""Input pipeline: sources of images, views of them, and batches per step."""

from mrmae_jax.data.augment import resizer
from mrmae_jax.data.loader import eval_batches
from mrmae_jax.data.loader import loader_options
from mrmae_jax.data.loader import train_batches
from mrmae_jax.data.sources import DataError
from mrmae_jax.data.sources import open_source
from mrmae_jax.data.sources import open_split
from mrmae_jax.data.sources import Source
