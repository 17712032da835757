"""Linear probing as a task: heads on frozen features, one for each learning rate of a grid, all trained at once.

The protocol of MAE and ConvMAE (main_linprobe.py): features of a frozen encoder through a BatchNorm without scale and shift and
one linear layer, LARS, random crops and flips. Every head sees the same images and starts from the same weights. The faster
way, on features computed once, is `mrmae knn`.
"""

import jax
import jax.numpy as jnp

from mrmae_jax import mrmae
from mrmae_jax.tasks import finetune
from mrmae_jax.train import Task, replaced

HEAD_STD = 0.01  # of the initial weights
BN_EPS = 1e-6


def make(config) -> Task:
  """The probing task of a validated configuration.

  Raises:
    DataError: the training images have no classes.
    WeightsError: what `config.init_from` names does not load or is another architecture.
  """
  classes, grid, size = (
    finetune.class_names(config),
    len(config.optim.grid),
    tuple(config.image_size),
  )
  # The features of fine-tuning before its first step: with "mean", fc_norm is a LayerNorm that has learnt nothing.
  model = finetune.make_model(config, 1)
  pretrained, notes = finetune.read_pretrained(config, model)
  fresh = jax.jit(
    lambda: model.init(jax.random.key(config.seed), jnp.zeros((1, *size, len(config.data.mean))))[
      "params"
    ]
  )()
  frozen = replaced(
    jax.device_get(fresh), pretrained
  )  # on the host: where they go is the loop's business

  def features(frozen, batch):
    return model.apply(
      {"params": frozen}, mrmae.normalise(batch["image"], config.data.mean, config.data.std)
    )[1]["features"]

  def init(key):
    return {
      "head": init_head(key, grid, model.encoder.dim, len(classes)),
      "running": {"mean": jnp.zeros(model.encoder.dim), "var": jnp.ones(model.encoder.dim)},
    }

  def loss(params, frozen, batch, keys):
    del keys
    x = features(frozen, batch)
    mean, var = x.mean(0), x.var(0)
    per_head = losses(logits(params["head"], standard(x, mean, var)), batch["label"])
    # Running statistics as parameters: their gradient is the way to those of the batch (torch's variance is unbiased), which
    # the optimiser follows at a constant rate. The value of this term is no loss and is taken off again.
    running, seen = params["running"], {"mean": mean, "var": var * len(x) / (len(x) - 1)}
    way = sum(0.5 * jnp.sum((running[name] - seen[name]) ** 2) for name in seen)
    return per_head.sum() + way - jax.lax.stop_gradient(way), {"lowest": per_head.min()}

  def predict(params, frozen, batch, keys):
    del keys
    x = features(frozen, batch)
    return {"logits": logits(params["head"], standard(x, **params["running"])), "features": x}

  what = {
    "mean": "mean patch token of the last block, LayerNorm without scale and shift",
    "cls": "CLS token after the last norm",
  }
  rates = ", ".join(f"{config.optim.blr * factor:g}" for factor in config.optim.grid)
  notes += (
    f"probing: {what[config.pool]}; BatchNorm of each batch, running statistics when evaluating; blr {rates}",
  )
  return Task(init, loss, predict, frozen, finetune.identity(classes, config, pretrained), notes)


def init_head(key, grid: int, dim: int, classes: int):
  """The same weights for each of `grid` heads: {"kernel": [G, D, C], "bias": [G, C]}."""
  kernel = HEAD_STD * jax.random.truncated_normal(key, -2, 2, (dim, classes))
  return {"kernel": jnp.tile(kernel, (grid, 1, 1)), "bias": jnp.zeros((grid, classes))}


def standard(x, mean, var):
  """BatchNorm of [B, D] without scale and shift."""
  return (x - mean) * jax.lax.rsqrt(var + BN_EPS)


def logits(head, x):
  """Features [B, D] -> [B, G, C]."""
  return jnp.einsum("bd,gdc->bgc", x, head["kernel"]) + head["bias"]


def losses(logits, labels):
  """Cross-entropies [G] of logits [B, G, C], means over the batch."""
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None, None], 2).mean((0, 2))
