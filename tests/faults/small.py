"""Runs so small that a fault costs a second.

`toy_task` has no model and serves tests in one process; `get_config` is a tiny MAE for programs.
"""

import functools

import jax
import jax.numpy as jnp

from mrmae_jax import data, optim
from mrmae_jax.train import Task
from tests import tiny


def get_config(kind: str = ""):
  """Returns a ViT of one block without a teacher: 20 steps, a checkpoint after every fourth."""
  c = tiny.get_config("vit")
  c.encoder.update(depth=1, dim=8, num_heads=1, mlp_dim=8)
  c.decoder.update(dim=8, num_heads=1)
  c.teacher.path = ""
  c.epochs = 20 * 16 / 1438
  c.checkpoint_every = 4 * 16 / 1438
  c.optim.warmup_epochs = 0.0
  c.evals = {}
  if kind == "killed":  # everything that takes part in a save
    c.optim.ema_decay = 0.99
    c.evals = {
      "knn": dict(k=5, temperature=0.07, batch_size=64, bank=64),
      "reconstruct": dict(images=2),
    }
  return c


def toy_task(spoil=lambda brightness: 0.0):
  """Returns a task that predicts the brightness of a digit's channels, with noise.

  `spoil` is added to the loss.
  """

  def loss(params, extra, frozen, batch, keys):
    del frozen
    x = batch["image"].astype(jnp.float32).mean((1, 2)) / 255
    noise = jax.vmap(lambda key: jax.random.normal(key))(keys)
    error = x @ params["w"] + params["b"] - x[:, 0] - 0.1 * noise
    value = jnp.square(error).mean() + spoil(x.mean())
    return value, ({"pixel": value}, extra)

  def init(key):
    return {"w": jax.random.normal(key, (3,)), "b": jnp.float32(0)}, ()

  config = get_config()
  return Task(
    init=init,
    loss=loss,
    predict=lambda *arguments: {},
    views=data.image_views(config),
    source=functools.partial(data.open_split, config.data),
    optimizer=lambda steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    identity={"toy": True},
  )
