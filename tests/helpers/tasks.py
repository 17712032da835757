"""Tasks and states for tests, without a run around them."""

import functools

import jax
import jax.numpy as jnp

from mrmae_jax import data, optim, train


def predicting_task(predict, config) -> train.Task:
  """A task of image batches that can be evaluated but not trained."""
  return train.Task(
    init=None,
    loss=None,
    predict=predict,
    views=data.image_views(config),
    source=functools.partial(data.open_split, config.data),
    optimizer=None,
  )


def make_tx(task: train.Task, steps_per_epoch: float, total_steps: int):
  """The skippable optimizer of a task, and its schedule."""
  tx, schedule = task.optimizer(optim.Steps(steps_per_epoch, total_steps))
  return optim.skippable(tx), schedule


def init_state(task: train.Task, tx, key=None) -> train.TrainState:
  """The state of a task before its first step."""
  params, extra = task.init(jax.random.key(0) if key is None else key)
  return train.TrainState(jnp.int32(0), params, extra, tx.init(params), jnp.float32(0))
