"""A task that lives outside of the package: linear regression from pixels to the one-hot digit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mrmae_jax import config, data
from mrmae_jax.train import Task


def get_config():
  c = config.finetune()
  c.data.update(source="digits", holdout_every=5)
  c.update(image_size=(16, 16), batch_size=64, epochs=2.0, log_every=1, checkpoint_every=0.2)
  c.evals = {"accuracy": {"batch_size": 64}}
  return c


def make(c) -> Task:
  views = data.image_views(c)
  with_target = lambda batch: batch | {"target": np.eye(10, dtype=np.float32)[batch["label"]]}
  view = lambda example, rng: with_target(views.eval(example, rng))
  whiten = lambda x, stats: (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
  flat = lambda batch: batch["image"].reshape(len(batch["image"]), -1) / 255.0
  size = 16 * 16 * 3

  def init(key):
    params = {"w": 0.01 * jax.random.normal(key, (size, 10)), "b": jnp.zeros(10)}
    return params, {"mean": jnp.zeros(size), "var": jnp.ones(size)}

  def loss(params, extra, frozen, batch, keys):
    x = flat(batch)
    stats = {"mean": x.mean(0), "var": x.var(0)}
    error = whiten(x, stats) @ params["w"] + params["b"] - batch["target"]
    extra = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, extra, stats)
    return jnp.square(error).mean(), ({}, extra)

  def predict(params, extra, frozen, batch, keys):
    return {"logits": whiten(flat(batch), extra) @ params["w"] + params["b"]}

  source = functools.partial(data.open_split, c.data)
  optimizer = lambda steps: (optax.adam(1e-3), lambda step: 1e-3)
  return Task(init, loss, predict, data.Views(view, view), source, optimizer)
