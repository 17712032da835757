"""Linear probing as a task: one head per learning rate on frozen features, trained together.

The protocol of MAE and ConvMAE (main_linprobe.py): features of a frozen encoder pass a BatchNorm
without scale and shift and one linear layer; LARS, random crops and flips. Every head sees the same
images and starts from the same weights. `mrmae knn` is faster: its features are computed once.
"""

import functools
from typing import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mrmae_jax import data, mrmae, optim
from mrmae_jax.tasks import finetune
from mrmae_jax.train import Task, with_pretrained

HEAD_STD = 0.01  # of the initial weights
BN_EPS = 1e-6
BN_MOMENTUM = 0.1  # torch's: the share of the batch in the running statistics
FEATURES = {
  "mean": "mean patch token of the last block, LayerNorm without scale and shift",
  "cls": "CLS token after the last norm",
}


def make(config) -> Task:
  """Returns the probing task of a validated configuration.

  Raises:
    DataError: the training images have no classes.
    WeightsError: the file of `config.init_from` does not load or is another architecture.
  """
  source = functools.cache(functools.partial(data.open_split, config.data))
  class_names = finetune.read_class_names(source)
  grid, shape = tuple(config.optim.grid), (1, *config.image_size, len(config.data.mean))
  # Only the features are used, those of fine-tuning before its first step; one class is a filler.
  # With pool="mean", fc_norm is a LayerNorm that has learnt nothing.
  model = finetune.make_model(config, 1)
  pretrained, notes = finetune.read_pretrained(config, model)
  init_model = jax.jit(lambda: model.init(jax.random.key(config.seed), jnp.zeros(shape))["params"])
  # On the host: the loop decides where they go.
  frozen = with_pretrained(jax.device_get(init_model()), pretrained)

  def features(frozen, batch):
    images = mrmae.normalize(batch["image"], config.data.mean, config.data.std)
    return model.apply({"params": frozen}, images)[1]["features"]

  def init(key):
    params = {"head": init_head(key, len(grid), model.encoder.dim, len(class_names))}
    return params, init_batch_stats(model.encoder.dim)

  def loss(params, extra, frozen, batch, keys):
    del keys
    x, batch_stats = batch_norm(features(frozen, batch), extra)
    losses = cross_entropies(head_logits(params["head"], x), batch["label"])
    # The heads share no parameter: the gradient of the sum is that of each.
    return losses.sum(), ({"lowest": losses.min()}, batch_stats)

  def predict(params, extra, frozen, batch, keys):
    del keys
    x = features(frozen, batch)
    return {"logits": head_logits(params["head"], standardize(x, **extra)), "features": x}

  def optimizer(steps):
    schedule = optim.make_schedule(config.optim, config.batch_size, steps)
    tx = optim.lars(schedule, config.optim.weight_decay, config.optim.b1)
    return optim.over_grid(tx, grid), schedule

  rates = ", ".join(f"{config.optim.blr * factor:g}" for factor in grid)
  note = (
    f"probing: {FEATURES[config.pool]}; BatchNorm of each batch, running statistics when "
    f"evaluating; blr {rates}"
  )
  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.image_views(config),
    source=source,
    optimizer=optimizer,
    frozen=frozen,
    identity=finetune.identity(config, class_names, pretrained),
    notes=(*notes, note),
  )


def init_head(key, num_heads: int, dim: int, num_classes: int):
  """Returns the same weights for each head: {"kernel": [G, D, C], "bias": [G, C]}."""
  kernel = HEAD_STD * jax.random.truncated_normal(key, -2, 2, (dim, num_classes))
  return {
    "kernel": jnp.tile(kernel, (num_heads, 1, 1)),
    "bias": jnp.zeros((num_heads, num_classes)),
  }


def init_batch_stats(dim: int) -> dict[str, jax.Array]:
  """Returns the running statistics of a BatchNorm before its first batch, each [D]."""
  return {"mean": jnp.zeros(dim), "var": jnp.ones(dim)}


def batch_norm(x: jax.Array, running: dict[str, jax.Array]):
  """Normalizes [B, D] by its own statistics, as torch's BatchNorm1d does in training.

  Returns:
    The normalized x, and the new running statistics; their variance is the unbiased one.
  """
  mean, var = x.mean(0), x.var(0)
  batch_stats = {"mean": mean, "var": var * len(x) / (len(x) - 1)}
  follow = lambda old, new: (1 - BN_MOMENTUM) * old + BN_MOMENTUM * new
  return standardize(x, mean, var), jax.tree.map(follow, running, batch_stats)


def standardize(x, mean, var):
  """Applies a BatchNorm without scale and shift to [B, D]."""
  return (x - mean) * jax.lax.rsqrt(var + BN_EPS)


def head_logits(head, x):
  """Features [B, D] -> [B, G, C]."""
  return jnp.einsum("bd,gdc->bgc", x, head["kernel"]) + head["bias"]


def cross_entropies(logits, labels):
  """Cross-entropies [G] of logits [B, G, C], means over the batch."""
  log_probabilities = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probabilities, labels[:, None, None], 2).mean((0, 2))


def probe_features(
  features,
  labels,
  queries,
  expected,
  num_classes: int,
  *,
  blrs: tuple[float, ...],
  epochs: int,
  batch_size: int,
  seed: int = 0,
  progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> np.ndarray:
  """Trains heads on features that were computed once, one per learning rate, in seconds.

  The random crops of the task are missing: each image has one feature vector, and BatchNorm uses
  the statistics of all of them. The optimizer is DINO's, SGD with momentum (eval_linear.py): LARS,
  made for batches of thousands, hardly moves in the few steps that a small data set has.

  Args:
    features, labels: [M, D] and int [M] to train on, M >= batch_size.
    queries, expected: [Q, D] and int [Q] to count on.
    num_classes: number of classes.
    blrs: base learning rates; the peak is blr * batch_size / 256, then half a cosine to 0.
    epochs, batch_size: of the training. Each epoch leaves the last M % batch_size images of its
      order out.
    seed: of the weights and the order.
    progress: wraps the epochs, e.g. tqdm.

  Returns:
    Accuracies float [len(blrs)] in [0, 1].
  """
  steps = len(features) // batch_size
  # `over_grid` multiplies by the base learning rates.
  schedule = optim.warmup_cosine(batch_size / 256, 0.0, 0, epochs * steps)
  tx = optim.over_grid(optax.sgd(schedule, momentum=0.9), blrs)
  x, y = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
  mean, var = x.mean(0), x.var(0)
  x = standardize(x, mean, var)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_epoch(state, x, y, key):
    def train_step(state, rows):
      head, opt_state = state
      loss = lambda head: cross_entropies(head_logits(head, x[rows]), y[rows]).sum()
      updates, opt_state = tx.update(jax.grad(loss)(head), opt_state, head)
      return (optax.apply_updates(head, updates), opt_state), None

    order = jax.random.permutation(key, len(x))[: steps * batch_size]
    return jax.lax.scan(train_step, state, order.reshape(steps, batch_size))[0]

  key = jax.random.key(seed)
  head = init_head(key, len(blrs), x.shape[1], num_classes)
  state = head, tx.init(head)
  for epoch in progress(range(epochs)):
    state = train_epoch(state, x, y, jax.random.fold_in(key, epoch))
  head, _ = state

  return _head_accuracy(head, queries, expected, mean, var)


def _head_accuracy(head, queries, expected, mean, var) -> np.ndarray:
  """Returns the accuracy of each head, float [G]."""

  @jax.jit
  def count_hits(queries, expected):
    predicted = head_logits(head, standardize(queries, mean, var)).argmax(-1)
    return (predicted == expected[:, None]).sum(0)

  hits, chunk = 0, 4096  # [chunk, grid, classes] fits anywhere
  for i in range(0, len(queries), chunk):
    rows = jnp.asarray(queries[i : i + chunk], jnp.float32)
    hits += np.asarray(count_hits(rows, jnp.asarray(expected[i : i + chunk])), np.int64)
  return hits / len(queries)
