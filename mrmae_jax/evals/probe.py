"""Linear probes on features that were computed once: every learning rate of a grid at once, in seconds instead of hours.

The heads are those of `tasks.probe`; what is missing are its random crops. Each image has one feature vector, so that the
statistics of the batch norm are those of all training features. The optimiser is DINO's, SGD with momentum (eval_linear.py):
LARS, made for batches of thousands, hardly moves in the few steps that a small data set has.
"""

import functools
from typing import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mrmae_jax import optim
from mrmae_jax.tasks.probe import init_head, logits, losses, standard


def linear(
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
  """Trains a linear classifier at each learning rate.

  Args:
    features, labels: [M, D] and int [M] to train on, M >= batch_size.
    queries, expected: [Q, D] and int [Q] to count on.
    num_classes: number of classes.
    blrs: base learning rates; the peak is blr * batch_size / 256, then half a cosine to 0.
    epochs, batch_size: of the training; in each epoch the last M % batch_size images of its order are left out.
    seed: of the weights and the order.
    progress: wraps the epochs, e.g. tqdm.

  Returns:
    Accuracies float [len(blrs)] in [0, 1].
  """
  steps = len(features) // batch_size
  tx = optim.over_grid(
    optax.sgd(optim.warmup_cosine(batch_size / 256, 0.0, 0, epochs * steps), momentum=0.9), blrs
  )
  x, y = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
  seen = x.mean(0), x.var(0)
  x = standard(x, *seen)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_epoch(state, x, y, key):
    def step(state, rows):
      head, moments = state
      gradient = jax.grad(lambda head: losses(logits(head, x[rows]), y[rows]).sum())(head)
      updates, moments = tx.update(gradient, moments, head)
      return (jax.tree.map(jnp.add, head, updates), moments), None

    order = jax.random.permutation(key, len(x))[: steps * batch_size]
    return jax.lax.scan(step, state, order.reshape(steps, batch_size))[0]

  head = init_head(jax.random.key(seed), len(blrs), x.shape[1], num_classes)
  state = head, tx.init(head)
  for epoch in progress(range(epochs)):
    state = train_epoch(state, x, y, jax.random.fold_in(jax.random.key(seed), epoch))
  head, _ = state

  @jax.jit
  def hits(queries, expected):
    return (logits(head, standard(queries, *seen)).argmax(-1) == expected[:, None]).sum(0)

  part = 4096  # [part, grid, classes] fits anywhere
  count = sum(
    np.asarray(
      hits(jnp.asarray(queries[i : i + part], jnp.float32), jnp.asarray(expected[i : i + part])),
      np.int64,
    )
    for i in range(0, len(queries), part)
  )
  return count / len(queries)
