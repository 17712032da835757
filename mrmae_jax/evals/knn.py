"""k nearest neighbors: how well frozen features tell classes apart, without training anything.

The protocol of DINO (facebookresearch/dino, eval_knn.py): features of unit length, the k most
similar training images vote for their class with weight exp(similarity / temperature). Few-shot is
the same with so few labels that the mean of a class's images stands for the class.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mrmae_jax import evals, sharding
from mrmae_jax.errors import DataError

# Similarities held at a time: 64 MB a device, whatever the size of the bank.
QUERIES = 1024
BLOCK = 16384


class Evaluator:
  """Held-out accuracy of the task's "features", with a bank of training images."""

  def __init__(
    self,
    task,
    frozen,
    config,
    mesh,
    workdir,
    *,
    k: int,
    temperature: float,
    batch_size: int,
    bank: int,
  ):
    """Opens both splits.

    Without labels or held-out images there is nothing to measure: `note` then says so, and `run`
    gives no result.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      k: neighbors that vote.
      temperature: of the weights.
      batch_size: images per forward pass, rounded up to a multiple of the devices.
      bank: most training images used, evenly spaced; 0: all.
    """
    del workdir
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._k, self._temperature, self._bank_size = k, temperature, bank
    self._view, self._batch_size = task.views.eval, evals.padded_batch_size(batch_size, mesh)
    self.note, self.results = "", ()
    try:
      self._bank_source, self._queries = task.source("train"), task.source("eval")
    except DataError as error:
      self.note = f"no k-NN evaluation: {error}"
      return
    for source in (self._bank_source, self._queries):
      if not source.class_names:
        self.note = f"no k-NN evaluation, the images have no labels: {source.description}"
        return
    self.results = ("accuracy",)
    # Features do not depend on the keys.
    keys = jax.random.split(jax.random.key(0), self._batch_size)

    def encode(params, extra, frozen, batch):
      features = task.predict(params, extra, frozen, batch, keys)["features"]
      return features, batch["label"], batch["valid"]

    self._encode_batch = jax.jit(encode, out_shardings=sharding.replicated(mesh))

  def run(self, params, extra, step: int) -> dict[str, float]:
    """Returns {"accuracy": in [0, 1]}, or {} if `note` says why not."""
    del step
    if self.note:
      return {}
    bank, classes = self._encode(params, extra, self._bank_source, self._bank_size)
    queries, labels = self._encode(params, extra, self._queries, 0)
    predicted = knn_classify(
      queries,
      bank,
      classes,
      len(self._bank_source.class_names),
      (self._k,),
      self._temperature,
      self._mesh,
    )
    return {"accuracy": float((predicted[self._k] == labels).mean())}

  def _encode(self, params, extra, source, limit: int):
    """Returns features [M, D] and labels [M] of a split."""
    features, labels = [], []
    batches = evals.global_batches(
      source, self._view, self._config, self._mesh, self._batch_size, limit
    )
    for batch in batches:
      x, label, valid = jax.device_get(self._encode_batch(params, extra, self._frozen, batch))
      features.append(x[valid])
      labels.append(label[valid])
    return np.concatenate(features), np.concatenate(labels)


def knn_classify(
  queries, bank, labels, num_classes: int, ks: tuple[int, ...], temperature: float, mesh=None
) -> dict[int, np.ndarray]:
  """Classifies by a weighted vote of the nearest neighbors.

  Args:
    queries: [Q, D] features.
    bank: [M, D] features of known class.
    labels: int [M].
    num_classes: number of classes.
    ks: numbers of neighbors that vote; all M vote for larger ones.
    temperature: > 0.
    mesh: devices among which the bank is divided; None: the first alone.

  Returns:
    {k: int [Q]} for each of `ks`.
  """
  similarity, index = nearest(queries, bank, min(max(ks), len(bank)), mesh)
  labels, predicted = np.asarray(labels), {k: [] for k in ks}
  for i in range(0, len(similarity), QUERIES):
    rows = slice(i, i + QUERIES)
    for k in ks:
      classes = _vote(similarity[rows, :k], labels[index[rows, :k]], num_classes, temperature)
      predicted[k].append(classes)
  return {k: np.concatenate(parts) for k, parts in predicted.items()}


@functools.partial(jax.jit, static_argnums=2)
def _vote(similarity, labels, num_classes, temperature):
  weights = jnp.exp(similarity / temperature)
  count = lambda label, weight: jnp.zeros(num_classes).at[label].add(weight)
  return jax.vmap(count)(labels, weights).argmax(-1)


def nearest(queries, bank, k: int, mesh=None) -> tuple[np.ndarray, np.ndarray]:
  """Finds the k entries of the bank with the largest cosine similarity, exactly.

  Each device keeps its share of the bank and goes through it block by block, holding on to the best
  k so far; the best k of all devices are among those. Of equal ones the first counts.

  Args:
    queries: [Q, D].
    bank: [M, D]; on several hosts, the whole of it on each.
    k: from 1 to M.
    mesh: see `knn_classify`.

  Returns:
    Similarities float32 [Q, k], descending, and places in the bank int32 [Q, k].
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
  bank = np.asarray(bank, np.float32)
  count, dim = bank.shape
  per_device = -(-count // mesh.size)
  block = min(BLOCK, per_device)
  shape = (mesh.size, -(-per_device // block), block, dim)

  def device_rows(index):
    # Made for one device where it is needed, so that no host pads a copy of the whole bank.
    padded = np.zeros(shape[1:], np.float32)
    begin = (index[0].start or 0) * shape[1] * block
    rows = bank[begin : begin + shape[1] * block]
    padded.reshape(-1, dim)[: len(rows)] = rows
    return padded[None]

  by_device = NamedSharding(mesh, P(sharding.AXES))
  sharded_bank = jax.make_array_from_callback(shape, by_device, device_rows)
  search = jax.jit(_search, static_argnums=(2, 3), out_shardings=sharding.replicated(mesh))
  parts = []
  for i in range(0, len(queries), QUERIES):
    rows = np.asarray(queries[i : i + QUERIES], np.float32)
    parts.append(jax.device_get(search(rows, sharded_bank, k, count)))
  similarity, index = zip(*parts)
  return np.concatenate(similarity), np.concatenate(index)


def _search(queries, bank, k, count):
  """Does the work of `nearest` for queries [Q, D] in a bank [S, N, b, D].

  The bank is S devices' shares of N blocks, in order; entries from `count` on are padding.
  """
  devices, blocks, block, _ = bank.shape
  queries = _unit(queries)

  def search_block(best, n):
    similarity = jnp.einsum("qd,sbd->sqb", queries, _unit(bank[:, n]), precision="highest")
    # Place in the bank of each block's first entry.
    first = ((jnp.arange(devices) * blocks + n) * block)[:, None, None]
    similarity = jnp.where(first + jnp.arange(block) < count, similarity, -jnp.inf)
    similarity, index = jax.lax.top_k(jnp.concatenate([best[0], similarity], 2), k)
    # Places below k are those of the best so far, the others are of this block.
    old = jnp.take_along_axis(best[1], jnp.minimum(index, k - 1), 2)
    return (similarity, jnp.where(index < k, old, first + index - k)), None

  shape = (devices, len(queries), k)
  nothing = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))
  best, _ = jax.lax.scan(search_block, nothing, jnp.arange(blocks))
  similarity, place = (x.swapaxes(0, 1).reshape(len(queries), -1) for x in best)
  similarity, index = jax.lax.top_k(similarity, k)
  return similarity, jnp.take_along_axis(place, index, 1)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def few_shot(
  queries, expected, bank, labels, shots: int, draws: int = 10, seed: int = 0
) -> np.ndarray:
  """Measures accuracy with a few labelled images per class (Snell et al. 2017).

  An image belongs to the class whose mean feature is most similar. Features are brought to unit
  length before and after averaging.

  Args:
    queries, expected: [Q, D] features and their classes int [Q].
    bank, labels: [M, D] features and classes int [M] to draw from.
    shots: images drawn of each class without replacement; all of a class that has fewer.
    draws: independent draws.
    seed: of the draws.

  Returns:
    float [draws] in [0, 1].
  """
  bank, labels, results = np.asarray(_unit(jnp.asarray(bank))), np.asarray(labels), []
  classes, counts = np.unique(labels, return_counts=True)
  for draw in range(draws):
    order = np.random.default_rng((seed, draw)).permutation(len(bank))
    by_class = np.split(order[np.argsort(labels[order], kind="stable")], np.cumsum(counts)[:-1])
    means = np.stack([bank[rows[:shots]].mean(0) for rows in by_class])
    _, index = nearest(queries, means, 1)
    results.append((classes[index[:, 0]] == expected).mean())
  return np.array(results)
