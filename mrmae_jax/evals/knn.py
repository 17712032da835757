"""k nearest neighbours: how well frozen features tell classes apart, without training anything.

The protocol of DINO (facebookresearch/dino eval_knn.py): features of unit length, the k most similar training images vote
for their class with weight exp(similarity / temperature).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import data, sharding


class Evaluator:
  """Held-out accuracy of the task's "features", with a bank of training images under the same central crop."""

  def __init__(self, task, frozen, config, mesh, workdir, *, k: int, temperature: float, batch_size: int, bank: int):
    """Opens both splits.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      k: neighbours that vote.
      temperature: of the weights.
      batch_size: images per forward pass, rounded up to a multiple of the devices.
      bank: most training images used, evenly spaced.

    Without labels or held-out images there is nothing to measure: `note` then says so, and `run` gives no result.
    """
    del workdir
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._k, self._temperature, self._bank = k, temperature, bank
    self._batch_size = -(-batch_size // mesh.size) * mesh.size
    self.note = ""
    try:
      self._sources = [data.open_split(config.data, split) for split in ("train", "eval")]
    except data.DataError as error:
      self.note = f"no k-NN evaluation: {error}"
      return
    if not self._sources[0].class_names:
      self.note = f"no k-NN evaluation, the images have no labels ({self._sources[0].description})"
      return
    keys = jax.random.split(jax.random.key(0), self._batch_size)  # features do not depend on them

    def encode(params, frozen, batch):
      return task.predict(params, frozen, batch, keys)["features"], batch["label"], batch["valid"]

    self._encode_batch = jax.jit(encode, out_shardings=sharding.replicated(mesh))

  def run(self, params, step: int) -> dict[str, float]:
    """{"accuracy": in [0, 1]}, or {} if `note` says why not."""
    del step
    if self.note:
      return {}
    (bank, classes), (queries, labels) = (self._encode(params, source, limit)
                                          for source, limit in zip(self._sources, (self._bank, 0)))
    predicted = knn_classify(queries, bank, classes, len(self._sources[0].class_names), self._k, self._temperature)
    return {"accuracy": float((predicted == labels).mean())}

  def _encode(self, params, source, limit):
    """Features [M, D] and labels [M] of a split."""
    features, labels = [], []
    batches = data.eval_batches(source, batch_size=self._batch_size, image_size=tuple(self._config.image_size),
                                crop_pct=self._config.data.eval_crop, shard=jax.process_index(),
                                num_shards=jax.process_count(), workers=self._config.data.workers, limit=limit)
    for batch in batches:
      found, label, valid = jax.device_get(self._encode_batch(params, self._frozen, sharding.global_batch(batch, self._mesh)))
      features.append(found[valid])
      labels.append(label[valid])
    batches.close()
    return np.concatenate(features), np.concatenate(labels)


def knn_classify(queries, bank, labels, num_classes: int, k: int, temperature: float, block: int = 1024) -> np.ndarray:
  """Classes by weighted vote of the nearest neighbours.

  Args:
    queries: [Q, D] features.
    bank: [M, D] features of known class.
    labels: int [M].
    num_classes: number of classes.
    k: neighbours that vote; at most M.
    temperature: > 0.
    block: queries compared at a time.

  Returns:
    int [Q].
  """
  k = min(k, len(bank))
  bank, labels = _unit(jnp.asarray(bank)), jnp.asarray(labels)
  return np.concatenate([_classify(queries[i:i + block], bank, labels, num_classes, k, temperature)
                         for i in range(0, len(queries), block)])


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _classify(queries, bank, labels, num_classes, k, temperature):
  similarity, nearest = jax.lax.top_k(jnp.matmul(_unit(queries), bank.T, precision="highest"), k)
  votes = jax.nn.one_hot(labels[nearest], num_classes) * jnp.exp(similarity / temperature)[..., None]
  return votes.sum(1).argmax(-1)
