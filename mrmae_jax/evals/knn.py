"""k nearest neighbours: how well frozen features tell classes apart, without training anything.

The protocol of DINO (facebookresearch/dino eval_knn.py): features of unit length, the k most similar training images vote
for their class with weight exp(similarity / temperature). And few-shot: the same with so few labels that a class is the
mean of its images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mrmae_jax import data, sharding
from mrmae_jax.errors import DataError
from mrmae_jax.runs import supervision

QUERIES, BLOCK = (
  1024,
  16384,
)  # similarities held at a time: 64 MB a device, whatever the size of the bank


class Evaluator:
  """Held-out accuracy of the task's "features", with a bank of training images under the same central crop."""

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

    Args:
      task, frozen, config, mesh, workdir: of the run.
      k: neighbours that vote.
      temperature: of the weights.
      batch_size: images per forward pass, rounded up to a multiple of the devices.
      bank: most training images used, evenly spaced; 0: all.

    Without labels or held-out images there is nothing to measure: `note` then says so, and `run` gives no result.
    """
    del workdir
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._k, self._temperature, self._bank = k, temperature, bank
    self._batch_size = -(-batch_size // mesh.size) * mesh.size
    self.note = ""
    try:
      self._sources = [data.open_split(config.data, split) for split in ("train", "eval")]
    except DataError as error:
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
    (bank, classes), (queries, labels) = (
      self._encode(params, source, limit) for source, limit in zip(self._sources, (self._bank, 0))
    )
    predicted = knn_classify(
      queries,
      bank,
      classes,
      len(self._sources[0].class_names),
      (self._k,),
      self._temperature,
      self._mesh,
    )
    return {"accuracy": float((predicted[self._k] == labels).mean())}

  def _encode(self, params, source, limit):
    """Features [M, D] and labels [M] of a split."""
    features, labels = [], []
    batches = data.eval_batches(
      source,
      data.image_views(self._config).eval,
      batch_size=self._batch_size,
      shard=jax.process_index(),
      num_shards=jax.process_count(),
      limit=limit,
      options=data.loader_options(self._config.data),
    )
    for batch in batches:
      supervision.beat()
      found, label, valid = jax.device_get(
        self._encode_batch(params, self._frozen, sharding.global_batch(batch, self._mesh))
      )
      features.append(found[valid])
      labels.append(label[valid])
    batches.close()
    return np.concatenate(features), np.concatenate(labels)


def knn_classify(
  queries, bank, labels, num_classes: int, ks: tuple[int, ...], temperature: float, mesh=None
) -> dict[int, np.ndarray]:
  """Classes by weighted vote of the nearest neighbours.

  Args:
    queries: [Q, D] features.
    bank: [M, D] features of known class.
    labels: int [M].
    num_classes: number of classes.
    ks: numbers of neighbours that vote; more than M are M.
    temperature: > 0.
    mesh: devices among which the bank is divided; None: the first alone.

  Returns:
    {k: int [Q]} for each of `ks`.
  """
  similarity, index = nearest(queries, bank, min(max(ks), len(bank)), mesh)
  labels, predicted = np.asarray(labels), {k: [] for k in ks}
  for i in range(0, len(similarity), QUERIES):
    part = slice(i, i + QUERIES)
    for k in ks:
      predicted[k].append(
        _vote(similarity[part, :k], labels[index[part, :k]], num_classes, temperature)
      )
  return {k: np.concatenate(parts) for k, parts in predicted.items()}


@functools.partial(jax.jit, static_argnums=2)
def _vote(similarity, labels, num_classes, temperature):
  weights = jnp.exp(similarity / temperature)
  return jax.vmap(lambda label, weight: jnp.zeros(num_classes).at[label].add(weight))(
    labels, weights
  ).argmax(-1)


def nearest(queries, bank, k: int, mesh=None) -> tuple[np.ndarray, np.ndarray]:
  """The k entries of the bank with the largest cosine similarity, exactly, on any number of devices.

  Each device keeps its share of the bank and goes through it block by block, holding on to the best k so far; the best k of
  all devices are among theirs. Of equal ones the first counts.

  Args:
    queries: [Q, D].
    bank: [M, D]; on several hosts, the whole of it on each.
    k: from 1 to M.
    mesh: see `knn_classify`.

  Returns:
    Similarities float32 [Q, k], descending, and places in the bank int32 [Q, k].
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
  bank, (count, dim) = np.asarray(bank, np.float32), np.shape(bank)
  share = -(-count // mesh.size)
  block = min(BLOCK, share)
  shape = (mesh.size, -(-share // block), block, dim)

  def rows(
    place,
  ):  # of one device: made where it is needed, so that no host pads a copy of the whole
    filled = np.zeros(shape[1:], np.float32)
    begin = (place[0].start or 0) * shape[1] * block
    mine = bank[begin : begin + shape[1] * block]
    filled.reshape(-1, dim)[: len(mine)] = mine
    return filled[None]

  placed = jax.make_array_from_callback(shape, NamedSharding(mesh, P(sharding.AXES)), rows)
  search = jax.jit(_search, static_argnums=(2, 3), out_shardings=sharding.replicated(mesh))
  parts = [
    jax.device_get(search(np.asarray(queries[i : i + QUERIES], np.float32), placed, k, count))
    for i in range(0, len(queries), QUERIES)
  ]
  return tuple(np.concatenate(columns) for columns in zip(*parts))


def _search(queries, bank, k, count):
  """`nearest` for queries [Q, D] in a bank [S, N, b, D]: S devices' shares of N blocks, in order; zeros from `count` on."""
  shares, blocks, block, _ = bank.shape
  queries = _unit(queries)

  def look(best, n):
    similarity = jnp.einsum("qd,sbd->sqb", queries, _unit(bank[:, n]), precision="highest")
    first = ((jnp.arange(shares) * blocks + n) * block)[
      :, None, None
    ]  # place in the bank of each block's first entry
    similarity = jnp.where(first + jnp.arange(block) < count, similarity, -jnp.inf)
    similarity, found = jax.lax.top_k(jnp.concatenate([best[0], similarity], 2), k)
    old = jnp.take_along_axis(best[1], jnp.minimum(found, k - 1), 2)
    return (similarity, jnp.where(found < k, old, first + found - k)), None

  none = (
    jnp.full((shares, len(queries), k), -jnp.inf),
    jnp.zeros((shares, len(queries), k), jnp.int32),
  )
  best, _ = jax.lax.scan(look, none, jnp.arange(blocks))
  similarity, place = (x.swapaxes(0, 1).reshape(len(queries), -1) for x in best)
  similarity, found = jax.lax.top_k(similarity, k)
  return similarity, jnp.take_along_axis(place, found, 1)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def few_shot(
  queries, expected, bank, labels, shots: int, draws: int = 10, seed: int = 0
) -> np.ndarray:
  """Accuracy with a few labelled images of each class: the class whose mean feature is most similar (Snell et al. 2017).

  Features are brought to unit length before and after averaging.

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
