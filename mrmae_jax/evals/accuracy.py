"""Top-1 and top-5 accuracy of the task's logits over every held-out image, each exactly once."""

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import evals, sharding


class Evaluator:
  """Held-out accuracy. Counts are summed on the devices: they are exact on any number of them."""

  def __init__(self, task, frozen, config, mesh, workdir, *, batch_size: int):
    """Opens the held-out split.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      batch_size: images per forward pass, rounded up to a multiple of the devices.
    """
    del workdir
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._source, self._view = task.source("eval"), task.views.eval
    self._batch_size = evals.padded_batch_size(batch_size, mesh)
    self.results = ("top1", "top5")
    # Predictions do not depend on the keys.
    keys = jax.random.split(jax.random.key(0), self._batch_size)

    def count(params, extra, frozen, batch):
      logits = task.predict(params, extra, frozen, batch, keys)["logits"]
      _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
      expand = lambda x: jnp.expand_dims(x, range(1, logits.ndim - 1))
      label, valid = expand(batch["label"]), expand(batch["valid"])
      hit = best == label[..., None]
      return valid.sum(), (valid & hit[..., 0]).sum(0), (valid & hit.any(-1)).sum(0)

    self._count = jax.jit(count, out_shardings=sharding.replicated(mesh))

  def run(self, params, extra, step: int) -> dict[str, float]:
    """Returns {"top1", "top5": in [0, 1], "images": how many were counted}.

    For a grid of heads these are the best head's, with its "blr", and "top1_BLR" of each.
    """
    del step
    images, top1, top5 = 0, 0, 0
    batches = evals.global_batches(
      self._source, self._view, self._config, self._mesh, self._batch_size
    )
    for batch in batches:
      counts = jax.device_get(self._count(params, extra, self._frozen, batch))
      batch_images, batch_top1, batch_top5 = (count.astype(np.int64) for count in counts)
      images, top1, top5 = images + batch_images, top1 + batch_top1, top5 + batch_top5
    top1, top5, images = top1 / images, top5 / images, int(images)
    if not top1.ndim:
      return {"top1": float(top1), "top5": float(top5), "images": images}
    best = int(top1.argmax())
    rates = [self._config.optim.blr * factor for factor in self._config.optim.grid]
    result = {"top1": float(top1[best]), "top5": float(top5[best]), "images": images}
    per_rate = {f"top1_{rate:g}": float(value) for rate, value in zip(rates, top1)}
    return result | {"blr": rates[best]} | per_rate
