"""Optimisers of the MAE family: AdamW for pre-training and fine-tuning, LARS for the linear probe, an average of the weights.

Schedules are evaluated per step: warm-up, then half a cosine.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(
  peak: float, min_lr: float, warmup_steps: float, total_steps: int
) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then half a cosine from `peak` to `min_lr` (MAE, util/lr_sched.py)."""

  def schedule(step):
    warmup = peak * step / max(warmup_steps, 1e-9)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    cosine = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return jnp.where(step < warmup_steps, warmup, cosine)

  return schedule


def make(config, batch_size: int, steps_per_epoch: float, total_steps: int):
  """The optimiser of `config.optim`, see config.py, and its schedule: step -> learning rate for a factor of 1.

  `update` of the optimiser takes one argument more, `bad`, a boolean that may be traced: then its state stays as it was, bit for bit,
  and the updates are to be thrown away.
  """
  peak = config.blr * batch_size / 256
  schedule = warmup_cosine(peak, config.min_lr, config.warmup_epochs * steps_per_epoch, total_steps)
  return _kept(_probe(config, schedule)) if "grid" in config else _adamw(config, schedule), schedule


def _adamw(config, schedule):
  """AdamW; `layer_decay` scales the whole scheduled rate, min_lr and the decay of the weights included."""
  links = [
    optax.chain(
      _adam(config.b1, config.b2, config.eps),
      optax.add_decayed_weights(
        config.weight_decay, lambda params: decayed(params, config.no_decay)
      ),
      _kept(optax.scale_by_learning_rate(schedule)),
    )
  ]
  if config.clip_norm:
    links.insert(0, optax.clip_by_global_norm(config.clip_norm))
  if config.layer_decay != 1:
    links.append(
      optax.stateless(
        lambda updates, params: jax.tree.map(
          jnp.multiply, updates, layer_scales(params, config.layer_decay)
        )
      )
    )
  if config.ema_decay:
    links.append(_kept(average_params(config.ema_decay)))
  return optax.chain(*links)


def keep_if(bad, old, new):
  """The arrays of the tree `old` if `bad`, a boolean that may be traced, else those of `new`."""
  return jax.tree.map(lambda old, new: jnp.where(bad, old, new), old, new)


def _kept(link: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`link`, whose state stays as it was if `bad`."""

  def update(updates, state, params=None, *, bad=False, **others):
    del others
    updates, new = link.update(updates, state, params)
    return updates, keep_if(bad, state, new)

  return optax.GradientTransformationExtraArgs(link.init, update)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """optax.scale_by_adam, which keeps its moments if `bad` before it makes the update of them.

  `_kept(optax.scale_by_adam)` would have both, the moments that stay and those of the update: the parameters are then computed from
  the old moments once more, which is 5 % of a step of ConvMAE-B on CPU (`bench guards`), where this moves no byte more.
  """

  def update(grads, state, params=None, *, bad=False, **others):
    del params, others
    mu = keep_if(bad, state.mu, optax.tree.update_moment(grads, state.mu, b1, 1))
    nu = keep_if(bad, state.nu, optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2))
    count = jnp.where(bad, state.count, state.count + 1)
    corrected = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *corrected), optax.ScaleByAdamState(
      count, mu, nu
    )

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def decayed(params, spared: tuple[str, ...] = ()):
  """Tree of bools: weight decay acts on everything but vectors (biases, norms) and parameters of the spared names.

  CLS and mask tokens, three-dimensional in the reference as here, are decayed in pre-training (timm 0.3.2
  `add_weight_decay` as MAE uses it); fine-tuning spares the position table and CLS (`no_weight_decay` of timm's ViT and
  of ConvMAE).
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, p: p.ndim > 1 and not (spared and path[-1].key in spared), params
  )


def _keys(path) -> list[str]:
  return [str(key.key) for key in path]


def layer_scales(params, layer_decay: float):
  """Tree of floats, the factor of each parameter's learning rate: layer_decay ** (distance from the head).

  With n transformer blocks the head, norms outside of blocks and whatever has no place below them have the factor 1, block i
  has layer_decay ** (n - i), and embeddings, positions, CLS and both convolutional stages share layer_decay ** (n + 1)
  (ConvMAE and MAE, util/lr_decay.py). `params` may nest the encoder at any depth; its names are those of models/.
  """

  def block(path):
    return next(
      (int(m[1]) for key in _keys(path) if (m := re.fullmatch(r"blocks3?_(\d+)", key))), None
    )

  blocks = {block(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)} - {None}

  def scale(path, _):
    if (i := block(path)) is not None:
      return layer_decay ** (len(blocks) - i)
    first = any(
      re.fullmatch(r"pos_embed|cls_token|patch_embed\d?|blocks[12]_\d+", key) for key in _keys(path)
    )
    return layer_decay ** (len(blocks) + 1) if first else 1.0

  return jax.tree_util.tree_map_with_path(scale, params)


# The linear probe.


def lars(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
  """LARS as MAE and MoCo v3 probe with it (MAE, util/lars.py): vectors are neither decayed nor rescaled.

  `optax.lars` puts the rate inside the momentum, which differs as soon as the rate changes: there a step of warm-up stays
  small for ever. Here, as in the reference, the rate multiplies the momentum.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decayed),
    optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), decayed),
    optax.trace(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )


def over_grid(
  tx: optax.GradientTransformation, factors: tuple[float, ...]
) -> optax.GradientTransformation:
  """`tx` for parameters with a leading axis of len(factors): each entry is trained alone, at its factor of the rate."""

  def update(updates, state, params):
    updates, state = jax.vmap(tx.update)(updates, state, params)
    return jax.tree.map(lambda u: jax.vmap(jnp.multiply)(u, jnp.asarray(factors)), updates), state

  return optax.GradientTransformation(jax.vmap(tx.init), update)


def _probe(config, schedule):
  """LARS for the heads of `tasks.probe`, and their batch norm's running statistics, which follow at torch's momentum of 0.1."""
  heads = over_grid(lars(schedule, config.weight_decay, config.b1), tuple(config.grid))

  def update(updates, state, params):
    head, state = heads.update(updates["head"], state, params["head"])
    return {"head": head, "running": jax.tree.map(lambda g: -0.1 * g, updates["running"])}, state

  return optax.GradientTransformation(lambda params: heads.init(params["head"]), update)


# Averaged weights.


class AverageState(NamedTuple):
  """State of `average_params`."""

  count: jax.Array  # updates so far, int32
  average: Any  # shaped as the parameters


def average_params(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters; the last link of a chain, updates pass unchanged.

  As a part of the optimiser's state it is sharded, saved and restored like the moments, and the training step does not know
  of it; `averaged_params` finds it. After update t (from 0) average = d * average + (1 - d) * params with
  d = min(decay, (1 + t) / (10 + t)), the warm-up of TensorFlow's ExponentialMovingAverage: with a constant 0.9999 a run of ten
  thousand steps would still hold a third of its initialisation.
  """

  def init(params):
    return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

  def update(updates, state, params):
    d = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
    average = jax.tree.map(
      lambda a, p: a + (1 - d) * (p - a), state.average, optax.apply_updates(params, updates)
    )
    return updates, AverageState(state.count + 1, average)

  return optax.GradientTransformation(init, update)


def averaged_params(opt_state):
  """The average that `average_params` keeps in an optimiser's state, or None where there is none."""
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AverageState))
  return next((node.average for node in leaves if isinstance(node, AverageState)), None)
