"""Optimiser of the MAE family: AdamW, decay on matrices only, warm-up and half a cosine, all per step."""

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(peak: float, min_lr: float, warmup_steps: float, total_steps: int) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then half a cosine from `peak` to `min_lr` (MAE, util/lr_sched.py)."""
  def schedule(step):
    warmup = peak * step / max(warmup_steps, 1e-9)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    cosine = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return jnp.where(step < warmup_steps, warmup, cosine)
  return schedule


def decayed(params):
  """Tree of bools: weight decay acts on everything but vectors (biases, norms).

  CLS and mask tokens, three-dimensional in the reference as here, are decayed: timm 0.3.2 `add_weight_decay` as MAE uses it.
  """
  return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(config, batch_size: int, steps_per_epoch: float, total_steps: int):
  """The optimiser of `config.optim` and its schedule (step -> learning rate)."""
  peak = config.blr * batch_size / 256
  schedule = warmup_cosine(peak, config.min_lr, config.warmup_epochs * steps_per_epoch, total_steps)
  return optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed), schedule
