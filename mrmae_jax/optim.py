"""Optimizers of the MAE family: AdamW for pre-training and fine-tuning, LARS for the linear probe.

Also an average of the weights, and the rule that an update may be skipped. Schedules are evaluated
per step: warm-up, then half a cosine, a straight line or steps.
"""

import collections
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mrmae_jax import target

ARRAYS_AT_ONCE = 16  # of a GPU kernel, which has two arguments for each
WARMUP_RATIO = 1e-6  # of `warmup_poly`
# Of detectron2's schedules: the first update's share of the rate, and the parts of the training
# after which the rate falls to a tenth.
FIRST_SHARE = 1e-3
MILESTONES = (8 / 9, 26 / 27)


class Steps(NamedTuple):
  """Length of a training run.

  Attributes:
    per_epoch: training images / batch size, a fraction.
    total: number of steps.
  """

  per_epoch: float
  total: int


def count_steps(config, num_images: int) -> Steps:
  """Returns the length of the training that a configuration describes, on `num_images` images."""
  per_epoch = num_images / config.batch_size
  return Steps(per_epoch, max(1, round(config.epochs * per_epoch)))


def warmup_cosine(
  peak: float, min_lr: float, warmup_steps: float, total_steps: int
) -> optax.Schedule:
  """Returns the schedule: linear from 0 over `warmup_steps`, then half a cosine from `peak` to
  `min_lr`.

  Source: MAE, util/lr_sched.py.
  """

  def schedule(step):
    warmup = peak * step / max(warmup_steps, 1e-9)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    cosine = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return jnp.where(step < warmup_steps, warmup, cosine)

  return schedule


def warmup_poly(
  peak: float, min_lr: float, warmup_steps: float, total_steps: int
) -> optax.Schedule:
  """Returns the schedule of segmentation: a straight line from `peak` at step 0 to `min_lr` at the
  end, multiplied by a warm-up that rises from 1e-6 to 1 over `warmup_steps`.

  Source: mmcv 1.x, PolyLrUpdaterHook with power 1.
  """

  def schedule(step):
    line = min_lr + (peak - min_lr) * (total_steps - step) / total_steps
    share = jnp.clip(step / max(warmup_steps, 1e-9), 0, 1)
    return line * (share + (1 - share) * WARMUP_RATIO)

  return schedule


def warmup_from_share(schedule: optax.Schedule, warmup_steps: float) -> optax.Schedule:
  """Returns a schedule with detectron2's warm-up: linear from a thousandth of its first rate to the
  rate that it has after `warmup_steps`.

  Source: fvcore, param_scheduler.py, and detectron2, solver/lr_scheduler.py.
  """

  def warmed(step):
    first, last = FIRST_SHARE * schedule(0), schedule(warmup_steps)
    warmup = first + (last - first) * step / max(warmup_steps, 1e-9)
    return jnp.where(step < warmup_steps, warmup, schedule(step))

  return warmed


def steps_down(peak: float, min_lr: float, warmup_steps: float, total_steps: int) -> optax.Schedule:
  """Returns the schedule of ViTDet: `peak`, a tenth of it from 8/9 of the training on, and a
  hundredth from 26/27 on, but at least `min_lr`; see `warmup_from_share`.
  """
  milestones = jnp.asarray([round(share * total_steps) for share in MILESTONES])

  def schedule(step):
    return jnp.maximum(peak * 0.1 ** (step >= milestones).sum(), min_lr)

  return warmup_from_share(schedule, warmup_steps)


def whole_cosine(
  peak: float, min_lr: float, warmup_steps: float, total_steps: int
) -> optax.Schedule:
  """Returns half a cosine over the whole training from `peak` to `min_lr`; see
  `warmup_from_share`.
  """
  return warmup_from_share(warmup_cosine(peak, min_lr, 0, total_steps), warmup_steps)


def peak_rate(options, batch_size: int) -> float:
  """Returns the largest learning rate of a schedule: blr * batch_size / 256."""
  return options.blr * batch_size / 256


def make_schedule(options, batch_size: int, steps: Steps) -> optax.Schedule:
  """Returns step -> learning rate, for the section `optim` of a configuration.

  Args:
    options: the section.
    batch_size: images per update; the peak rate is blr * batch_size / 256.
    steps: length of the training.
  """
  schedules = {
    "cosine": warmup_cosine,
    "poly": warmup_poly,
    "steps": steps_down,
    "whole_cosine": whole_cosine,
  }
  warmup_steps = options.warmup_steps or options.warmup_epochs * steps.per_epoch
  peak = peak_rate(options, batch_size)
  return schedules[options.schedule](peak, options.min_lr, warmup_steps, steps.total)


def make_optimizer(options, batch_size: int, steps: Steps):
  """Returns (AdamW, schedule) for the section `optim` of a configuration; see `make_schedule`.

  `layer_decay` scales the whole scheduled rate, min_lr and the decay of the weights included.
  """
  schedule = make_schedule(options, batch_size, steps)
  is_decayed = lambda params: decay_mask(params, options.no_decay, options.decay_of)
  scales = lambda params: layer_scales(params, options.layer_decay, options.full_rate)
  links = [
    optax.chain(
      _scale_by_adam(options.b1, options.b2, options.eps),
      optax.add_decayed_weights(options.weight_decay, is_decayed),
      skippable(optax.scale_by_learning_rate(schedule)),
    )
  ]
  if options.clip_norm:
    links.insert(0, _clip_by_global_norm(options.clip_norm))
  if options.layer_decay != 1:
    scale = lambda updates, params: jax.tree.map(jnp.multiply, updates, scales(params))
    links.append(optax.stateless(scale))
  if options.ema_decay:
    links.append(skippable(average_params(options.ema_decay)))
  return Skippable(*optax.chain(*links)), schedule


def global_norm(tree, small: int = 2**14) -> jax.Array:
  """Returns the norm of all numbers of a tree, as `optax.global_norm` does.

  On a GPU that would be one or two kernels for each of hundreds of arrays, most of which end as
  soon as they have begun. There, arrays of less than `small` elements are put together; the mesh
  divides none of them (`sharding.fsdp_shardings`). Of the others a kernel adds up the rows, of up
  to ARRAYS_AT_ONCE of the same shape, and one kernel adds up those sums of all arrays. (XLA gathers
  the sums of several arrays where their rows are divided: with fsdp=8 the step of MR-MAE-B has 12
  small all-gathers more so, and 228 kernels fewer.)
  """
  if not target.compute_capability():
    return optax.global_norm(tree)
  together, by_shape = [], collections.defaultdict(list)
  for x in jax.tree.leaves(tree):
    if x.size < small:
      together.append(x.reshape(-1))
    else:
      by_shape[x.shape, x.dtype].append(x)
  rows = []
  for arrays in by_shape.values():
    for i in range(0, len(arrays), ARRAYS_AT_ONCE):
      rows += _sum_squares(arrays[i : i + ARRAYS_AT_ONCE])
  rows = [jax.lax.optimization_barrier(jnp.concatenate(rows))] if rows else []  # or XLA undoes it
  squares = [jnp.square(jnp.concatenate(together))] if together else []
  return jnp.sqrt(sum(x.sum() for x in rows + squares))


def _sum_squares(arrays: list[jax.Array]) -> list[jax.Array]:
  """Returns the sum of squares of each row of arrays of one shape, [..., C]: a list of [N]."""
  squares = tuple(jnp.square(x) for x in arrays)
  zeros = (np.zeros((), squares[0].dtype),) * len(squares)
  add = lambda totals, terms: tuple(a + b for a, b in zip(totals, terms))
  sums = jax.lax.reduce(squares, zeros, add, (squares[0].ndim - 1,))
  return [x.reshape(-1) for x in sums]


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
  """optax.clip_by_global_norm with our `global_norm`, which the step has computed already."""

  def clip(grads, params):
    del params
    norm = global_norm(grads)
    return jax.tree.map(lambda g: jnp.where(norm < largest, g, g / norm * largest), grads)

  return optax.stateless(clip)


# Updates that are skipped.


class Skippable(optax.GradientTransformationExtraArgs):
  """A transformation whose `update` takes one argument more, `bad`: a boolean that may be traced.

  If it is true, the state stays as it was, bit for bit, and the updates are to be thrown away.
  """


def skippable(tx: optax.GradientTransformation) -> Skippable:
  """Returns `tx` with the argument `bad`; as it is if it has the argument already."""
  if isinstance(tx, Skippable):
    return tx

  def update(updates, state, params=None, *, bad=False, **extra_args):
    del extra_args
    updates, new_state = tx.update(updates, state, params)
    return updates, keep_if(bad, state, new_state)

  return Skippable(tx.init, update)


def keep_if(bad, old, new):
  """Returns the arrays of the tree `old` if `bad`, a boolean that may be traced, else of `new`."""
  return jax.tree.map(lambda old, new: jnp.where(bad, old, new), old, new)


def _scale_by_adam(b1: float, b2: float, eps: float) -> Skippable:
  """optax.scale_by_adam, which decides on `bad` before it computes the update from its moments.

  `skippable(optax.scale_by_adam)` would hold both, the moments that stay and those of the update.
  The parameters would then be computed from the old moments once more, which is 5 % of a step of
  ConvMAE-B on CPU. This form moves no byte more.
  """

  def update(grads, state, params=None, *, bad=False, **extra_args):
    del params, extra_args
    mu = keep_if(bad, state.mu, optax.tree.update_moment(grads, state.mu, b1, 1))
    nu = keep_if(bad, state.nu, optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2))
    count = jnp.where(bad, state.count, state.count + 1)
    mu_hat = optax.tree.bias_correction(mu, b1, count)
    nu_hat = optax.tree.bias_correction(nu, b2, count)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return Skippable(optax.scale_by_adam().init, update)


# Which parameter is updated how.


def _is_norm(path) -> bool:
  """Returns whether a parameter belongs to a LayerNorm or BatchNorm, by the module's name."""
  return len(path) > 1 and bool(re.fullmatch(r"(.*_)?norm(\d|_pre)?|bn", path[-2].key))


def decay_mask(params, no_decay: tuple[str, ...] = (), decay_of: str = "matrices"):
  """Returns a tree of bools: whether weight decay acts on a parameter.

  It acts on everything but parameters named in `no_decay` and those that `decay_of` leaves out:
  "matrices" all vectors (biases, norms), "not_norms" the norms, "not_encoder_norms" those of the
  encoder alone, "all" none. Detectron2 decays biases: its rule of norms does not know the
  LayerNorms over channels of ViTDet's pyramid and heads; the huge model decays all. CLS and mask
  tokens, three-dimensional in the reference as here, are decayed in pre-training (timm 0.3.2,
  `add_weight_decay` as MAE uses it). Fine-tuning spares the position table and CLS
  (`no_weight_decay` of timm's ViT and of ConvMAE).
  """
  rules = {
    "matrices": lambda path, p: p.ndim > 1,
    "not_norms": lambda path, p: not _is_norm(path),
    "not_encoder_norms": lambda path, p: not (_is_norm(path) and path[0].key == "encoder"),
    "all": lambda path, p: True,
  }
  is_decayed = lambda path, p: (
    rules[decay_of](path, p) and not (no_decay and path[-1].key in no_decay)
  )
  return jax.tree_util.tree_map_with_path(is_decayed, params)


def layer_scales(params, layer_decay: float, full_rate: tuple[str, ...] = ()):
  """Returns a tree of floats, the factors of the learning rate: layer_decay ** (distance from the
  head).

  With n transformer blocks the head, norms outside of blocks and whatever has no place below them
  have the factor 1, and block i has layer_decay ** (n - i). All before the blocks and both
  convolutional stages share layer_decay ** (n + 1). Source: ConvMAE and MAE, util/lr_decay.py.
  `params` may nest the encoder at any depth; its names are those of models/. Parameters named in
  `full_rate` have the factor 1.
  """

  def keys_of(path):
    return [str(key.key) for key in path]

  def block_of(path):
    matches = (re.fullmatch(r"blocks3?_(\d+)", key) for key in keys_of(path))
    return next((int(match[1]) for match in matches if match), None)

  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  num_blocks = len({block_of(path) for path in paths} - {None})

  def scale(path, _):
    if path[-1].key in full_rate:
      return 1.0
    if (block := block_of(path)) is not None:
      return layer_decay ** (num_blocks - block)
    first = r"pos_embed|cls_token|registers|norm_pre|patch_embed\d?|blocks[12]_\d+"
    is_first = any(re.fullmatch(first, key) for key in keys_of(path))
    return layer_decay ** (num_blocks + 1) if is_first else 1.0

  return jax.tree_util.tree_map_with_path(scale, params)


# The linear probe.


def lars(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
  """Returns LARS as in the linear probe of MAE and MoCo v3: vectors are neither decayed nor
  rescaled.

  Source: MAE, util/lars.py. `optax.lars` puts the rate inside the momentum, which differs as soon
  as the rate changes: there a step of warm-up stays small for ever. Here, as in the reference, the
  rate multiplies the momentum.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), decay_mask),
    optax.trace(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )


def over_grid(
  tx: optax.GradientTransformation, factors: tuple[float, ...]
) -> optax.GradientTransformation:
  """Applies `tx` to parameters with a leading axis of len(factors), each entry by itself.

  The updates of entry i are multiplied by factors[i].
  """

  def update(updates, state, params):
    updates, state = jax.vmap(tx.update)(updates, state, params)
    scale = lambda u: jax.vmap(jnp.multiply)(u, jnp.asarray(factors))
    return jax.tree.map(scale, updates), state

  return optax.GradientTransformation(jax.vmap(tx.init), update)


# Averaged weights.


class AverageState(NamedTuple):
  """State of `average_params`."""

  count: jax.Array  # updates so far, int32
  average: Any  # shaped as the parameters


def average_params(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters; updates pass unchanged.

  It is the last link of a chain. As a part of the optimizer's state the average is sharded, saved
  and restored like the moments; `averaged_params` finds it. After update t (from 0)
  average = d * average + (1 - d) * params with d = min(decay, (1 + t) / (10 + t)), the warm-up of
  TensorFlow's ExponentialMovingAverage: with a constant 0.9999 a run of ten thousand steps would
  still hold a third of its initialization.
  """

  def init(params):
    return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

  def update(updates, state, params):
    d = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
    new_params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: a + (1 - d) * (p - a), state.average, new_params)
    return updates, AverageState(state.count + 1, average)

  return optax.GradientTransformation(init, update)


def averaged_params(opt_state):
  """Returns the average that `average_params` keeps in an optimizer's state, or None."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AverageState))
  return next((node.average for node in nodes if isinstance(node, AverageState)), None)
