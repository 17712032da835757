"""Evaluators, found by their module's name, and the pass over images that they share.

An evaluator module defines `Evaluator`. Its constructor takes (task, frozen, config, mesh, workdir)
and the options of `config.evals.NAME` by name. Its `run(params, extra, step)` returns
{name: number}. It may return {path: uint8 [H, W, 3]} under "pictures" and {path: bytes} under
"files"; the run writes them, so that numbers are not lost where there is no space for a picture.
Attributes that it may have are `results`, the names by which config.keep_best may choose a
checkpoint, and `note`, a line for the log, "" for none.
"""

from typing import Iterator

import jax
import numpy as np

from mrmae_jax import data, sharding
from mrmae_jax.runs import supervision


def global_batches(
  source, view, config, mesh, batch_size: int, limit: int = 0
) -> Iterator[dict[str, jax.Array]]:
  """Yields the global batches of one pass over `source`, each image once, on the devices of `mesh`.

  Between two of them it shows a sign of life, which is where a signal ends an evaluation.

  Args:
    source: the images.
    view: makes batch rows of examples, see `data.Views`.
    config: of the run.
    mesh: of the run.
    batch_size: a multiple of the devices, see `padded_batch_size`.
    limit: if positive, only this many images, evenly spaced.
  """
  for batch in host_batches(source, view, config, batch_size, limit):
    yield sharding.global_batch(batch, mesh)


def host_batches(
  source, view, config, batch_size: int, limit: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of the batches that `global_batches` makes."""
  batches = data.eval_batches(
    source,
    view,
    batch_size=batch_size,
    shard=jax.process_index(),
    num_shards=jax.process_count(),
    limit=limit,
    options=data.loader_options(config.data),
  )
  try:
    for batch in batches:
      supervision.beat()
      yield batch
  finally:
    batches.close()


def padded_batch_size(batch_size: int, mesh) -> int:
  """Returns `batch_size` rounded up to a multiple of the devices."""
  return -(-batch_size // mesh.size) * mesh.size
