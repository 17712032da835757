"""Top-1 and top-5 accuracy of the task's logits over every held-out image, each exactly once."""

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import data, sharding
from mrmae_jax.runs import supervision


class Evaluator:
  """Held-out accuracy; counts are summed on the devices, so that they are exact on any number of them."""

  def __init__(self, task, frozen, config, mesh, workdir, *, batch_size: int):
    """Opens the held-out split.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      batch_size: images per forward pass, rounded up to a multiple of the devices.
    """
    del workdir
    self.note = ""
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._source = data.open_split(config.data, "eval")
    self._batch_size = -(-batch_size // mesh.size) * mesh.size
    keys = jax.random.split(
      jax.random.key(0), self._batch_size
    )  # predictions do not depend on them

    def count(params, frozen, batch):
      logits = task.predict(params, frozen, batch, keys)["logits"]
      _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
      label, valid = (
        jnp.expand_dims(batch[name], range(1, logits.ndim - 1)) for name in ("label", "valid")
      )
      hit = best == label[..., None]
      return valid.sum(), (valid & hit[..., 0]).sum(0), (valid & hit.any(-1)).sum(0)

    self._count = jax.jit(count, out_shardings=sharding.replicated(mesh))

  def run(self, params, step: int) -> dict[str, float]:
    """{"top1", "top5": in [0, 1], "images": how many}; of a grid of heads the best, its "blr", and "top1_BLR" of each."""
    del step
    batches = data.eval_batches(
      self._source,
      data.image_views(self._config).eval,
      batch_size=self._batch_size,
      shard=jax.process_index(),
      num_shards=jax.process_count(),
      options=data.loader_options(self._config.data),
    )
    images, top1, top5 = 0, 0, 0
    for batch in batches:
      supervision.beat()
      found = jax.device_get(
        self._count(params, self._frozen, sharding.global_batch(batch, self._mesh))
      )
      images, top1, top5 = (
        total + count.astype(np.int64) for total, count in zip((images, top1, top5), found)
      )
    batches.close()
    images, top1, top5 = int(images), top1 / images, top5 / images
    if not top1.ndim:
      return {"top1": float(top1), "top5": float(top5), "images": images}
    best, rates = (
      int(top1.argmax()),
      [self._config.optim.blr * factor for factor in self._config.optim.grid],
    )
    return {
      "top1": float(top1[best]),
      "top5": float(top5[best]),
      "images": images,
      "blr": rates[best],
    } | {f"top1_{rate:g}": float(value) for rate, value in zip(rates, top1)}
