"""One loop for every task. It knows no model and no loss: a task brings them as pure functions."""

import contextlib
import hashlib
import importlib
import json
import math
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from mrmae_jax import data, optim, sharding
from mrmae_jax.errors import DataError, Interrupted, NonFiniteError, StorageError
from mrmae_jax.runs import nonfinite, supervision
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.log import Clock, Log, read_metrics, summary
from mrmae_jax.runs.paths import open_folder

HINT = "try a lower optim.blr, a longer warm-up, optim.clip_norm, or dtype=float32"


class Task(NamedTuple):
  """What to train, as pure functions. B images of a batch {"image": uint8 [B, H, W, C], "label": int32 [B]}.

  Attributes:
    init: key -> params.
    loss: (params, frozen, batch, keys [B]) -> (scalar loss, {name: scalar} of its terms); means over the batch.
    predict: (params, frozen, batch, keys [B]) -> {name: array}; evaluators take what they need, jit drops the rest.
    frozen: arrays that the functions need and that are not trained, e.g. a teacher.
    identity: JSON values that tell this task from others when a run continues.
    notes: lines for the start of the run's log.
    pretrained: {path joined by "/": numpy array} of parameters that do not start from `init`.
  """

  init: Callable
  loss: Callable
  predict: Callable
  frozen: Any
  identity: dict[str, Any]
  notes: tuple[str, ...] = ()
  pretrained: dict[str, Any] = {}


class TrainState(NamedTuple):
  """Everything that a run needs to continue, besides its configuration."""

  step: jax.Array  # steps done, int32
  params: Any
  opt_state: Any
  usual_norm: jax.Array  # running mean of the gradient's norm, float32; 0 before the first step


def sample_keys(seed: int, step, batch_size: int) -> jax.Array:
  """One key per image of the global batch, [B]: randomness depends on seed, step and place in the batch alone, so it is
  the same on any number of devices and for any number of micro-batches."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))


def make_train_step(
  task: Task,
  tx: optax.GradientTransformationExtraArgs,
  schedule,
  seed: int,
  accum_steps: int = 1,
  whole=None,
  max_spike: float = 0.0,
  safeguards: bool = True,
):
  """(state, frozen, batch) -> (state, metrics), to be jitted with the state donated; `tx` and `schedule` as of `optim.make`.

  Arrays that fsdp divides are gathered where they are used, as `whole`, a replicated sharding, says; None leaves it to XLA, which
  then divides the activations of small batches as it has found the parameters, and exchanges those instead.

  A step whose loss or gradient is not finite changes nothing but the step number; with `max_spike` > 0 nor does one whose gradient's
  norm is more than so many times its running mean. "skipped" in the metrics is then 1. Without `safeguards` every update is made:
  what they cost is the difference.
  """
  gathered = lambda tree: tree if whole is None else jax.lax.with_sharding_constraint(tree, whole)

  def gradients(params, frozen, batch, keys):
    loss = lambda params, frozen, *inputs: task.loss(gathered(params), gathered(frozen), *inputs)
    (loss, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, keys)
    return grads, {"loss": loss, **terms}

  def train_step(state: TrainState, frozen, batch):
    inputs = (batch, sample_keys(seed, state.step, len(batch["image"])))
    if accum_steps == 1:
      grads, metrics = gradients(state.params, frozen, *inputs)
    else:  # micro-batch i takes every accum_steps-th image, so that each device keeps its own rows
      inputs = jax.tree.map(
        lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1), inputs
      )
      accumulate = lambda total, micro: (
        jax.tree.map(jnp.add, total, gradients(state.params, frozen, *micro)),
        None,
      )
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradients, state.params, frozen, *jax.tree.map(lambda x: x[0], inputs)),
      )
      total, _ = jax.lax.scan(accumulate, zeros, inputs)
      grads, metrics = jax.tree.map(lambda x: x / accum_steps, total)
    norm, usual, bad = optax.global_norm(grads), state.usual_norm, False
    if safeguards:  # an update that cannot be good is left out, and the state, moments and all, stays as it was, bit for bit
      bad = ~jnp.isfinite(metrics["loss"] + norm)
      if max_spike:
        bad |= (usual > 0) & (norm > max_spike * usual)
      usual = jnp.where(bad, usual, jnp.where(usual > 0, 0.98 * usual + 0.02 * norm, norm))
      metrics["skipped"] = bad.astype(jnp.int32)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, bad=bad)
    params = optim.keep_if(bad, state.params, optax.apply_updates(state.params, updates))
    metrics |= {
      "lr": schedule(state.step),
      "grad_norm": norm,
      "param_norm": optax.global_norm(params),
      "update_norm": optax.global_norm(updates),
    }
    return TrainState(state.step + 1, params, opt_state, usual), metrics

  return train_step


class Plan(NamedTuple):
  """A run before anything is computed: how long it is, what its arrays are and where they lie.

  Attributes:
    steps_per_epoch, total_steps: of the training; the first is a fraction.
    init: (key, task.pretrained) -> TrainState.
    step: (state, frozen, batch) -> (state, metrics), jitted, the state donated.
    state, frozen, batch: shapes with shardings of its arguments, `jax.ShapeDtypeStruct`s.
  """

  steps_per_epoch: float
  total_steps: int
  init: Callable
  step: Callable
  state: Any
  frozen: Any
  batch: dict[str, jax.ShapeDtypeStruct]


def plan(config, task: Task, mesh, num_images: int, safeguards: bool = True) -> Plan:
  """The plan of a configuration on a mesh, whose devices need not be there, for so many training images.

  `safeguards`: see make_train_step.
  """
  steps_per_epoch = num_images / config.batch_size
  total_steps = max(1, round(config.epochs * steps_per_epoch))
  tx, schedule = optim.make(config.optim, config.batch_size, steps_per_epoch, total_steps)

  def init(key, pretrained):
    params = replaced(task.init(key), pretrained)
    return TrainState(jnp.int32(0), params, tx.init(params), jnp.float32(0))

  def placed(shapes):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharding.fsdp_shardings(shapes, mesh),
    )

  state, frozen = (
    placed(jax.eval_shape(init, jax.random.key(config.seed), task.pretrained)),
    placed(task.frozen),
  )
  rows = {
    "image": ((*config.image_size, len(config.data.mean)), jnp.uint8),
    "label": ((), jnp.int32),
  }
  batch = {
    name: jax.ShapeDtypeStruct(
      (config.batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in rows.items()
  }
  train_step = make_train_step(
    task,
    tx,
    schedule,
    config.seed,
    config.optim.accum_steps,
    sharding.replicated(mesh),
    config.optim.max_spike,
    safeguards,
  )
  step = jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
  )
  return Plan(steps_per_epoch, total_steps, init, step, state, frozen, batch)


def due(step: int, every: float, total: int) -> bool:
  """Whether something that happens every `every` steps (a fraction is fine) happens after update `step` of `total`."""
  return step == total or int(step / every) > int((step - 1) / every)


def fit(config, task: Task, workdir: str | Path, check: bool = False) -> TrainState:
  """Trains `task` to the end of the configured schedule, continuing what `workdir` holds.

  Args:
    config: validated configuration, see config.py.
    task: what to train.
    workdir: folder for checkpoints, metrics, pictures.
    check: stop after one step; nothing is written.

  Returns:
    The final state.

  Raises:
    DataError, WorkdirError, StorageError, NonFiniteError: with a message for the user.
    Interrupted: a signal came; the state is saved.
  """
  with (
    contextlib.ExitStack() as closing
  ):  # whatever ends the run: a save under way is finished, workers and logs are closed
    return _fit(config, task, workdir, check, closing)


def _fit(config, task: Task, workdir, check: bool, closing: contextlib.ExitStack) -> TrainState:
  # 1. Devices and data. The schedule follows from the number of training images.
  mesh = sharding.make_mesh(**config.mesh)
  source = data.open_split(config.data, "train")

  # 2. Shapes first, then where every array lies, then the arrays, created in place or restored.
  steps_per_epoch, total_steps, init, step_fn, shapes, frozen_shapes, _ = plan(
    config, task, mesh, len(source)
  )
  place = lambda shapes: jax.tree.map(lambda x: x.sharding, shapes)
  frozen = jax.device_put(task.frozen, place(frozen_shapes))
  found, scores = None, {}
  if not check:
    workdir = open_folder(workdir)
    checkpoints = Checkpoints(
      workdir, identity(config, task, source), config.keep_checkpoints, scores
    )
    closing.callback(checkpoints.close)
    with supervision.phase("restore"):
      found = checkpoints.restore(shapes)
  first_step, state, notes = found or (
    0,
    jax.jit(init, out_shardings=place(shapes))(jax.random.key(config.seed), task.pretrained),
    [],
  )
  start = "\n".join(
    [describe(config, mesh, source, total_steps, first_step, shapes.params), *notes, *task.notes]
  )
  if check:
    print(start, flush=True)
  else:
    log = Log(workdir, total_steps, first_step, _flat(config), config.wandb)
    closing.callback(log.close)
    log.text("config.json", config.to_json(indent=2))
    log.text(
      "parameters.txt",
      parameter_overview.get_parameter_overview(shapes.params, include_stats=False),
    )
    log.say(start)
  evaluated = (
    not config.evals
    or first_step
    and any("evaluation_s" in record for record in read_metrics(workdir) if record["step"] == first_step)
  )
  if first_step >= total_steps and evaluated:
    log.say(
      "\n  ".join(
        [
          f"finished: {workdir} already holds all {total_steps} steps of this run",
          *summary(log.path.parent),
        ]
      )
    )
    return state

  # 3. One program, compiled before the first batch is used.
  batches = data.train_batches(
    source,
    seed=config.seed,
    batch_size=config.batch_size,
    image_size=tuple(config.image_size),
    crop_scale=tuple(config.data.crop_scale),
    single_try=config.data.single_try,
    resize=config.data.resize,
    flip=config.data.flip,
    randaug=config.data.randaug,
    erase_prob=config.data.erase_prob,
    mean=tuple(config.data.mean),
    std=tuple(config.data.std),
    first_step=first_step,
    shard=jax.process_index(),
    num_shards=jax.process_count(),
    **data.loader_options(config.data),
  )
  closing.callback(batches.close)
  batch = sharding.global_batch(next(batches), mesh)
  began = time.monotonic()
  with supervision.phase("compile", at_once=True):
    step_fn = step_fn.lower(state, frozen, batch).compile()
  compiled = f"compiled the training step in {time.monotonic() - began:.1f} s"
  skips = nonfinite.Skips(config.optim.max_skips)
  if check:
    state, metrics = step_fn(state, frozen, batch)
    if skips.count(1, metrics := jax.device_get(metrics)):
      raise NonFiniteError(f"step 1: {nonfinite.reason(metrics)}; {HINT}")
    print(
      f"{compiled}; one step gave {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}. Nothing was written.",
      flush=True,
    )
    return state
  log.say(compiled)

  # 4. Evaluators, and what is done with the numbers of a step. They are fetched one step behind, so that the device never waits.
  with supervision.phase("evaluation"):
    evaluators = {
      name: importlib.import_module(f"mrmae_jax.evals.{name}").Evaluator(
        task, frozen, config, mesh, workdir, **options
      )
      for name, options in config.evals.items()
    }
  for evaluator in evaluators.values():
    if evaluator.note:
      log.say(evaluator.note)
  pictures = {}  # the newest of each evaluator
  clock = Clock(step_fn, config.batch_size, config.optim.accum_steps, mesh)

  def evaluate(step):
    if not evaluators:
      return
    began, results = time.monotonic(), {}
    with supervision.phase("evaluation"):
      averaged = optim.averaged_params(state.opt_state)
      for name, evaluator in evaluators.items():
        result = evaluator.run(state.params if averaged is None else averaged, step)
        for path, picture in result.pop("pictures", {}).items():
          log.image(step, f"{name}/{Path(path).parent.name}", picture)
          pictures[name] = path
        results |= {f"{name}/{key}": value for key, value in result.items()}
    rate(step, results)
    log.scalars(step, results | {"evaluation_s": time.monotonic() - began})

  def rate(step, record):
    score = record.get(config.keep_best, math.nan)
    if math.isfinite(score):
      scores[step] = score

  def report(step, metrics, batch, newest):
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if left_out := skips.count(step, metrics):
      log.say(left_out)
      if skips.enough and newest["skipped"]:  # else the run has just found its way back
        folder = nonfinite.keep(workdir, config, checkpoints.identity, step, state, batch, metrics)
        raise NonFiniteError(
          f"step {step}: {nonfinite.reason(metrics)}, and {config.optim.max_skips} updates in a row were "
          f"left out; {HINT}. To look at it: mrmae replay --bundle={folder}"
        )
    del metrics["skipped"]
    log.advance(step)
    if due(step, config.log_every, total_steps) or step == first_step + 1:
      speed = clock.read(step)
      counts = {"skipped": skips.total} if skips.total else {}
      log.scalars(
        step,
        metrics | counts | speed,
        eta=(total_steps - step) * config.batch_size / speed["images_per_s"],
      )

  def save(step, last=False):
    with supervision.phase("saving"):
      if problem := checkpoints.save(step, state, wait=last or step == 1):
        log.say(f"warning: checkpoint {step} is not saved: {problem}")
        if last:
          raise StorageError(f"checkpoint {step} could not be saved: {problem}")

  # 5. The loop. What a signal or an image that cannot be read interrupts is saved as it is.
  for record in read_metrics(workdir):
    rate(record["step"], record)
  clock.start(first_step)
  step, pending = first_step, None
  try:
    if (
      first_step == 0
      or not evaluated
      and due(first_step, config.eval_every * steps_per_epoch, total_steps)
    ):
      evaluate(first_step)
    with supervision.phase("step"):
      for step in range(first_step + 1, total_steps + 1):
        state, metrics = step_fn(state, frozen, batch)
        earlier, pending = pending, (step, metrics, batch)
        if earlier:
          report(*earlier, metrics)
        if step < total_steps:
          with supervision.phase("data"):
            batch = sharding.global_batch(next(batches), mesh)
        eval_now = due(step, config.eval_every * steps_per_epoch, total_steps)
        save_now = due(step, config.checkpoint_every * steps_per_epoch, total_steps) or step == 1
        if eval_now or save_now:  # nothing is saved or shown that was not checked
          report(*pending, metrics)
          pending = None
        if save_now:  # after the first step too: storage that fails does so at once
          save(step, last=step == total_steps)
        if eval_now:
          evaluate(step)
        supervision.beat()
  except (Interrupted, DataError) as error:
    if isinstance(error, DataError) and jax.process_count() > 1:
      raise  # the others are not at this step, and a save needs all
    if pending:
      report(*pending, pending[1])
    if step:
      save(step, last=True)
    log.say(
      f"stopped after step {step} of {total_steps}{', which is saved' if step else ''}; the same command goes on from there"
    )
    raise
  log.say(
    "\n  ".join(
      [
        f"done: {total_steps} steps",
        *summary(log.path.parent),
        *(f"{name}: {path}" for name, path in pictures.items()),
        f"TensorBoard log: {log.tensorboard}",
        f"checkpoint: {checkpoints.directory / str(total_steps)}",
        log.goodput.line(total_steps),
      ]
    )
  )
  return state


def replaced(params, pretrained: dict[str, Any]):
  """`params` with the values of `pretrained` ({path joined by "/": array}) in their places."""
  name = lambda path: "/".join(key.key for key in path)
  return jax.tree_util.tree_map_with_path(lambda path, x: pretrained.get(name(path), x), params)


def identity(config, task: Task, source) -> dict[str, Any]:
  """What must stay the same when a run continues: all that changes its numbers, and not where it runs or what it reports.

  Teachers and pretrained weights count by their values, which the task names, not by where they lie.
  """
  free = {
    "encoder.remat",
    "data.workers",
    "data.on_error",
    "data.max_skipped",
    "data.timeout_s",
    "optim.accum_steps",
    "optim.max_skips",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "hang_s",
    "wandb",
  }
  flat = {
    name: value
    for name, value in _flat(config).items()
    if name not in free and not name.startswith(("mesh.", "evals."))
  }
  return flat | {"train images": source.fingerprint} | task.identity


def agreed(config, task: Task) -> dict[str, Any]:
  """What must be the same on all hosts of a run: its configuration, its images and the code."""
  code = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
  )
  images = data.open_split(config.data, "train").fingerprint
  return (
    _flat(config)
    | {"images": images, "code": code.hexdigest()[:12], "jax": jax.__version__}
    | task.identity
  )


def _flat(config) -> dict[str, Any]:
  """A configuration as {"optim.blr": 1.5e-4, ...}, without what says where things lie on a host."""
  flat = {}

  def walk(node, prefix):
    for key, value in node.items():
      name = f"{prefix}{key}"
      if isinstance(value, dict):
        walk(value, f"{name}.")
      elif name not in ("init_from", "data.workers", "data.data_dir", "data.quarantine") and not (
        "teacher" in name and key in ("name", "path")
      ):
        flat[name] = value

  walk(json.loads(config.to_json()), "")
  return flat


def describe(config, mesh, source, total_steps: int, first_step: int, params) -> str:
  """The first lines of a run: what runs where, from which data, how long, how large."""
  devices = mesh.devices.flatten()
  sizes = {name: sum(x.size for x in jax.tree.leaves(part)) / 1e6 for name, part in params.items()}
  return "\n".join(
    [
      f"process {jax.process_index()} of {jax.process_count()}: {len(devices)} x {devices[0].device_kind}, "
      f"mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}",
      f"data: {source.description}",
      f"parameters: {sum(sizes.values()):.2f} M ({', '.join(f'{name} {size:.2f} M' for name, size in sizes.items())})",
      f"batch {config.batch_size}, learning rate {config.optim.blr * config.batch_size / 256:.3g} at its peak, "
      f"{config.epochs:g} epochs = {total_steps} steps"
      + (f"; continuing after step {first_step}" if first_step else ""),
    ]
  )
