"""One loop for every task. It knows no model, no loss and no field of a batch: a `Task` brings
them.

Read `fit` first. What it delegates (log, checkpoints, evaluators, loader) is in `runs/run.py`.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mrmae_jax import config as config_lib
from mrmae_jax import data, optim, sharding, target
from mrmae_jax.errors import NonFiniteError
from mrmae_jax.runs import nonfinite
from mrmae_jax.runs.checkpoint import CONTENTS
from mrmae_jax.runs.run import Run, take_alarms


class Task(NamedTuple):
  """What to train, as pure functions.

  A batch is what `views` make of examples, with a leading axis of B: {name: array [B, ...]}. `keys`
  holds one random key per example, [B]. `extra` is what is neither trained nor frozen, such as
  BatchNorm statistics or a moving teacher: saved, restored and sharded like parameters.

  Attributes:
    init: key -> (params, extra); extra may be ().
    loss: (params, extra, frozen, batch, keys) -> (scalar, (terms, extra)). The scalar and the
      terms, {name: scalar}, are means over the batch; extra is the new one.
    predict: (params, extra, frozen, batch, keys) -> {name: array [B, ...]}. Evaluators take what
      they need, and jit drops the rest.
    views: .train and .eval: (example, rng) -> {name: numpy array}, on the host. Their shapes are
      the batch's shapes.
    source: "train" or "eval" -> Source of examples.
    optimizer: optim.Steps -> (optax transformation, step -> learning rate).
    frozen: arrays that are not trained, e.g. a teacher.
    identity: JSON values that tell this task from others when a run is resumed.
    notes: lines for the start of the run's log.
    pretrained: {path joined by "/": numpy array} of parameters that do not start from `init`.
    alarms: {term of the loss: (least value, warning)}. These terms are not logged. The run warns
      if the first one after a start is below its least value.
  """

  init: Callable
  loss: Callable
  predict: Callable
  views: data.Views
  source: Callable
  optimizer: Callable
  frozen: Any = ()
  identity: dict[str, Any] = {}
  notes: tuple[str, ...] = ()
  pretrained: dict[str, Any] = {}
  alarms: dict[str, tuple[float, str]] = {}


class TrainState(NamedTuple):
  """Everything that a run needs to resume, besides its configuration."""

  step: jax.Array  # updates done, int32
  params: Any
  extra: Any
  opt_state: Any
  mean_grad_norm: jax.Array  # running mean of the gradient's norm, float32; 0 before the first step


class Plan(NamedTuple):
  """A run before anything is computed: its length, its arrays and where they lie.

  Attributes:
    mesh: the devices, which need not be there.
    steps: length of the training.
    init: (key, task.pretrained) -> TrainState.
    step: (state, frozen, batch) -> (state, metrics), jitted, with the state donated.
    open_loader: first step (from 0) -> iterator of this host's batches, numpy arrays.
    state, frozen, batch: arguments of `step`, each a `jax.ShapeDtypeStruct` with a sharding.
  """

  mesh: jax.sharding.Mesh
  steps: optim.Steps
  init: Callable
  step: Callable
  open_loader: Callable
  state: Any
  frozen: Any
  batch: dict[str, jax.ShapeDtypeStruct]


def fit(config, task: Task, workdir: str | Path) -> TrainState:
  """Trains `task` to the end of its schedule, resuming what `workdir` holds.

  Raises:
    DataError, WorkdirError, StorageError, NonFiniteError: with a message for the user.
    Interrupted: a signal came; the state is saved.
  """
  mesh = sharding.make_mesh(**config.mesh)
  plan = make_plan(config, task, mesh)  # shapes, shardings, the jitted step; computes nothing
  with Run(config, task, plan, workdir, identity(config, task)) as run:  # closed in reverse order
    state = run.restore_or_init()  # 1. own workdir  2. pretrained weights  3. scratch
    for step, batch in run.batches(state):  # heartbeat, signals and data-wait time live here
      state, metrics = run.train_step(state, batch)
      run.record(step, state, metrics)  # fetched one step later, so that the device never waits
      run.save_if_due(step)  # flushes `record` first: a bad step is never saved or shown
      run.evaluate_if_due(step)
  return state


def check(config, task: Task) -> TrainState:
  """Does everything that `fit` does up to and including the first step, and writes nothing.

  Raises:
    DataError, NonFiniteError: with a message for the user.
  """
  mesh = sharding.make_mesh(**config.mesh)
  plan = make_plan(config, task, mesh)
  run = Run(config, task, plan, None, {})
  try:
    state = run.restore_or_init()
    batch = run.first_batch(0)
    run.open_evaluators()
    compiled = run.compile(state, batch)
    state, metrics = run.train_step(state, batch)
  finally:
    run.close()
  metrics = jax.device_get(metrics)
  for warning in take_alarms(metrics, task.alarms):
    print(warning, flush=True)
  if nonfinite.Skips(config.optim.max_skips).count(1, metrics):
    raise NonFiniteError(f"step 1: {nonfinite.skip_reason(metrics)}; {nonfinite.HINT}")
  numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
  print(
    f"{compiled}; one step gave {numbers}. Nothing was written.",
    flush=True,
  )
  return state


def make_plan(config, task: Task, mesh, num_images: int | None = None) -> Plan:
  """Returns the plan of a task on a mesh, whose devices need not be there.

  Args:
    config: validated configuration.
    task: what to train.
    mesh: of `sharding.make_mesh`.
    num_images: training images; None: those of the task's source.
  """
  source = task.source("train")
  steps = optim.count_steps(config, len(source) if num_images is None else num_images)
  tx, schedule = task.optimizer(steps)
  tx = optim.skippable(tx)

  def init(key, pretrained):
    params, extra = task.init(key)
    params = with_pretrained(params, pretrained)
    return TrainState(jnp.int32(0), params, extra, tx.init(params), jnp.float32(0))

  def with_sharding(shapes):
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(struct, shapes, sharding.fsdp_shardings(shapes, mesh))

  state = jax.eval_shape(init, jax.random.key(config.seed), task.pretrained)
  elements = data.element_shapes(source, task.views.train, data.loader_options(config.data))
  batch = {
    name: jax.ShapeDtypeStruct(
      (config.batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in elements.items()
  }
  state, frozen = with_sharding(state), with_sharding(task.frozen)
  # Arrays that fsdp divides are gathered where they are used. Without this constraint XLA would
  # also divide the activations of small batches, and exchange activations instead of parameters.
  gather = lambda tree: jax.lax.with_sharding_constraint(tree, sharding.replicated(mesh))
  step = make_train_step(
    task, tx, schedule, config.seed, config.optim.accum_steps, config.optim.max_spike, gather
  )
  state_shardings = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(mesh)))
  open_loader = functools.partial(_open_loader, config, task)
  return Plan(mesh, steps, init, step, open_loader, state, frozen, batch)


def _open_loader(config, task: Task, first_step: int) -> data.Batches:
  return data.train_batches(
    task.source("train"),
    task.views.train,
    seed=config.seed,
    batch_size=config.batch_size,
    first_step=first_step,
    shard=jax.process_index(),
    num_shards=jax.process_count(),
    options=data.loader_options(config.data),
  )


def make_train_step(
  task: Task,
  tx: optax.GradientTransformationExtraArgs,
  schedule: optax.Schedule,
  seed: int,
  accum_steps: int = 1,
  max_spike: float = 0.0,
  gather: Callable = lambda tree: tree,
):
  """Returns (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

  A step whose loss or gradient is not finite changes nothing but the step number; with
  `max_spike` > 0 the same holds for a gradient whose norm is more than `max_spike` times its
  running mean. The metric "skipped" is then 1.

  Args:
    task: what to train.
    tx: of `optim.skippable`.
    schedule: step -> learning rate, for the metrics.
    seed: of all randomness in the steps.
    accum_steps: micro-batches per update, see `accumulate`.
    max_spike: see above; 0 accepts every finite gradient.
    gather: applied to parameters, extra and frozen arrays where they are used.
  """

  def gradients(params, extra, frozen, batch, keys):
    def loss(params):
      return task.loss(gather(params), gather(extra), gather(frozen), batch, keys)

    (loss, (terms, extra)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return (grads, {"loss": loss, **terms}), extra

  def train_step(state: TrainState, frozen, batch):
    keys = sample_keys(seed, state.step, len(jax.tree.leaves(batch)[0]))
    compute = gradients if accum_steps == 1 else accumulate(gradients, accum_steps)
    (grads, metrics), extra = compute(state.params, state.extra, frozen, batch, keys)
    norm, mean_norm = optim.global_norm(grads), state.mean_grad_norm
    bad = ~jnp.isfinite(metrics["loss"] + norm)
    if max_spike:
      bad |= (mean_norm > 0) & (norm > max_spike * mean_norm)
    followed = jnp.where(mean_norm > 0, 0.98 * mean_norm + 0.02 * norm, norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, bad=bad)
    params = optim.keep_if(bad, state.params, optax.apply_updates(state.params, updates))
    metrics |= {
      "skipped": bad.astype(jnp.int32),
      "lr": schedule(state.step),
      "grad_norm": norm,
      **update_norms(params, updates),
    }
    extra = optim.keep_if(bad, state.extra, extra)
    mean_norm = jnp.where(bad, mean_norm, followed)
    return TrainState(state.step + 1, params, extra, opt_state, mean_norm), metrics

  return train_step


def update_norms(params, updates) -> dict[str, jax.Array]:
  """Returns the norms of new parameters and of their updates, as metrics.

  XLA would add up what it writes in the kernel that writes it. On a GPU such a kernel does not
  write into the arrays of the state, which are then copied, one by one.
  """
  if target.compute_capability():
    params, updates = jax.lax.optimization_barrier((params, updates))
  return {"param_norm": optim.global_norm(params), "update_norm": optim.global_norm(updates)}


def accumulate(gradients: Callable, accum_steps: int) -> Callable:
  """Returns `gradients` for micro-batches: means over them; `extra` passes from one to the next.

  Args:
    gradients: (params, extra, frozen, batch, keys) -> (tree of means over the batch, extra).
    accum_steps: number of micro-batches. Number i takes every accum_steps-th example from i on, so
      that each device keeps its own rows.
  """

  def accumulated(params, extra, frozen, batch, keys):
    split = lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)
    inputs = jax.tree.map(split, (batch, keys))
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes, _ = jax.eval_shape(gradients, params, extra, frozen, *first)

    def add(carry, micro):
      total, extra = carry
      part, extra = gradients(params, extra, frozen, *micro)
      return (jax.tree.map(jnp.add, total, part), extra), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, extra), _ = jax.lax.scan(add, (zeros, extra), inputs)
    return jax.tree.map(lambda x: x / accum_steps, total), extra

  return accumulated


def sample_keys(seed: int, step, batch_size: int) -> jax.Array:
  """Returns one key per example of the global batch, [B].

  Randomness depends on seed, step and place in the batch alone. It is the same on any number of
  devices and for any number of micro-batches.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))


def with_pretrained(params, pretrained: dict[str, Any]):
  """Returns `params` with the values of `pretrained` ({path joined by "/": array}) in their places.

  Raises:
    ValueError: `pretrained` holds a path that `params` has not, or an array of another shape.
  """
  path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  shapes = {path_of(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
  wrong = [name for name, x in pretrained.items() if shapes.get(name) != x.shape]
  if wrong:
    raise ValueError(
      f"pretrained parameters do not fit: {', '.join(wrong[:3])} ({len(wrong)} in all)"
    )
  return jax.tree_util.tree_map_with_path(lambda path, x: pretrained.get(path_of(path), x), params)


def identity(config, task: Task) -> dict[str, Any]:
  """Returns what must stay the same when a run is resumed: all that changes its numbers.

  Teachers and pretrained weights count by their values, which the task names, not by their paths.
  """
  source = task.source("train")
  fingerprint = {"train images": source.fingerprint, CONTENTS: data.sample_contents(source)}
  return config_lib.identity(config) | fingerprint | task.identity


def host_agreement(config, task: Task) -> dict[str, Any]:
  """Returns what must be the same on all hosts of a run: configuration, images and code."""
  files = sorted(Path(__file__).parent.rglob("*.py"))
  code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
  environment = {"code": code[:12], "jax": jax.__version__}
  source = task.source("train")
  contents = hashlib.sha256("".join(data.sample_contents(source)).encode()).hexdigest()
  images = {"images": source.fingerprint, "contents of the images": contents[:12]}
  return config_lib.shared_values(config) | images | environment | task.identity
