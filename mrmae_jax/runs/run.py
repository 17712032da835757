"""One run of a task: what the loop in `train.fit` delegates.

A `Run` owns the log, the checkpoints, the evaluators and the loader. It opens them in an order in
which each may fail early, and closes them in reverse order, whatever ends the run.
"""

import contextlib
import importlib
import io
import math
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import jax
from clu import parameter_overview
from PIL import Image

from mrmae_jax import config as config_lib
from mrmae_jax import optim, sharding
from mrmae_jax.errors import (
  ConfigError,
  DataError,
  Interrupted,
  NonFiniteError,
  StorageError,
  one_line,
)
from mrmae_jax.runs import nonfinite, supervision
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.log import Clock, Log, summary
from mrmae_jax.runs.metrics import read_metrics
from mrmae_jax.runs.paths import open_folder, write_bytes

CACHE_HIT = "/jax/compilation_cache/cache_hits"  # the event of jax.monitoring


class Pending(NamedTuple):
  """A step whose metrics are still on the devices."""

  step: int
  metrics: dict[str, jax.Array]
  batch: dict[str, jax.Array]


class Run:
  """The run of a task in a working directory; a context manager.

  On a signal, an image that cannot be read, or an evaluation that fails, leaving the context saves
  the newest state.
  """

  def __init__(self, config, task, plan, workdir: str | Path | None, identity: dict[str, Any]):
    """Opens nothing yet but the checkpoints.

    Args:
      config: validated configuration.
      task: a `train.Task`.
      plan: its `train.Plan`.
      workdir: folder of the run; None: nothing is read or written.
      identity: what must not change when the run is resumed, see `train.identity`.
    """
    self._config, self._task, self._plan = config, task, plan
    self._total = plan.steps.total
    self._closing = contextlib.ExitStack()
    self._scores: dict[int, float] = {}  # step -> value of config.keep_best
    self._started = False  # the loop has begun
    self._evaluating = False
    self._step, self._state, self._batch = 0, None, None
    self._pending: Pending | None = None
    self._log = self._loader = self._checkpoints = None
    self._evaluators, self._pictures = {}, {}
    self._workdir = workdir and open_folder(workdir)
    if workdir:
      self._checkpoints = Checkpoints(
        self._workdir, identity, config.keep_checkpoints, self._scores
      )
      self._closing.callback(self._checkpoints.close)

  def __enter__(self) -> "Run":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    with self._closing:
      # With several hosts the others are not at the step of an unreadable image, and a save needs
      # all.
      alone = jax.process_count() == 1
      stopped = isinstance(error, Interrupted) or (isinstance(error, DataError) and alone)
      # The state is good where an evaluation of it failed, for whatever reason.
      stopped |= self._evaluating and isinstance(error, Exception) and alone
      if stopped and self._started:
        self._save_interrupted()
      elif isinstance(error, Interrupted) and self._log:
        self._log.say("stopped before the first step: nothing is lost; run the same command again")

  def close(self) -> None:
    """Closes everything, in reverse order of opening."""
    self._closing.close()

  # Before the first step.

  def restore_or_init(self):
    """Returns the state to start from: of the newest checkpoint, else initialized in place."""
    plan = self._plan
    place = lambda shapes: jax.tree.map(lambda x: x.sharding, shapes)
    self._frozen = jax.device_put(self._task.frozen, place(plan.frozen))
    restored = None
    if self._checkpoints:
      with supervision.phase("restore"):
        restored = self._checkpoints.restore(plan.state)
    if restored:
      self._step, self._state, notes = restored
    else:
      init = jax.jit(plan.init, out_shardings=place(plan.state))
      key = jax.random.key(self._config.seed)
      self._state, notes = init(key, self._task.pretrained), []
    self._first_step = self._step
    lines = "\n".join([self._description(), *notes, *self._task.notes])
    if self._checkpoints:
      self._open_log(lines)
    else:
      print(lines, flush=True)
    return self._state

  def _open_log(self, lines: str) -> None:
    config = self._config
    settings = config_lib.shared_values(config)
    self._log = Log(self._workdir, self._total, self._first_step, settings, config.wandb)
    self._closing.callback(self._log.close)
    self._log.text("config.json", config.to_json(indent=2))
    overview = parameter_overview.get_parameter_overview(
      self._plan.state.params, include_stats=False
    )
    self._log.text("parameters.txt", overview)
    self._log.say(lines)

  def _description(self) -> str:
    """Returns the first lines of the log: devices, data, number of parameters, length."""
    config, mesh = self._config, self._plan.mesh
    devices = mesh.devices.flatten()
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree)) / 1e6
    params = self._plan.state.params
    sizes = ", ".join(f"{name} {count(part):.2f} M" for name, part in params.items())
    peak = optim.peak_rate(config.optim, config.batch_size)
    resumed = f"; resuming after step {self._first_step}" if self._first_step else ""
    eval_line = []
    if config.evals:
      # Without such images the evaluators say what they do.
      with contextlib.suppress(DataError):
        eval_line = [f"eval: {self._task.source('eval').description}"]
    return "\n".join(
      [
        f"process {jax.process_index()} of {jax.process_count()}: {len(devices)} x "
        f"{devices[0].device_kind}, mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}",
        f"data: {self._task.source('train').description}",
        *eval_line,
        f"parameters: {count(params):.2f} M ({sizes})",
        f"batch {config.batch_size}, learning rate {peak:.3g} at its peak, "
        f"{config.epochs:g} epochs = {self._total} steps{resumed}",
      ]
    )

  def first_batch(self, first_step: int) -> dict[str, jax.Array]:
    """Starts the loader at `first_step` and returns its first global batch."""
    self._loader = self._plan.open_loader(first_step)
    self._closing.callback(self._loader.close)
    return self._next_batch()

  def _next_batch(self) -> dict[str, jax.Array]:
    with supervision.phase("data"):
      return sharding.global_batch(next(self._loader), self._plan.mesh)

  def compile(self, state, batch) -> str:
    """Compiles the training step, or takes it from JAX's cache of programs; returns a line."""
    began, found = time.monotonic(), []
    note_hit = lambda event, **_: found.append(event) if event == CACHE_HIT else None
    jax.monitoring.register_event_listener(note_hit)
    try:
      with supervision.phase("compile", interruptible=True):
        lowered = self._plan.step.lower(state, self._frozen, batch)
        traced = time.monotonic()
        self._program = lowered.compile()
    finally:
      jax.monitoring.unregister_event_listener(note_hit)
    cache = jax.config.jax_compilation_cache_dir
    done = f"took it compiled from {cache}" if found else "compiled it"
    seconds = time.monotonic() - traced
    return f"traced the training step in {traced - began:.1f} s, {done} in {seconds:.1f} s"

  def open_evaluators(self) -> None:
    """Opens the evaluators of the configuration, and says which can not measure anything."""
    with supervision.phase("evaluation"):
      self._evaluators, notes = make_evaluators(
        self._config, self._task, self._frozen, self._plan.mesh, self._workdir
      )
    say = self._log.say if self._log else print
    for note in notes:
      say(note)

  # The steps.

  def batches(self, state) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """Yields (number of the step, its global batch) from the first step to do to the last.

    Before the first one it opens the evaluators, compiles the step and evaluates `state` where that
    is due. Between two of them it shows a sign of life, which is where a signal ends the run.
    """
    first = self._first_step
    records = read_metrics(self._workdir)
    evaluated = not self._config.evals or (
      first > 0 and any("evaluation_s" in record for record in records if record["step"] == first)
    )
    if first >= self._total and evaluated:
      already = f"finished: {self._workdir} already holds all {self._total} steps of this run"
      self._log.say("\n  ".join([already, *summary(self._log.path.parent)]))
      return
    self._batch = self.first_batch(first)
    self.open_evaluators()  # before compiling, which may take longer than to find a mistake
    self._log.say(self.compile(state, self._batch))
    for record in records:
      self._score(record["step"], record)
    self._skips = nonfinite.Skips(self._config.optim.max_skips)
    self._clock = Clock(
      self._program, self._config.batch_size, self._config.optim.accum_steps, self._plan.mesh
    )
    self._clock.start(first)
    self._started = True
    if first == 0 or not evaluated and self._is_due(first, self._config.eval_every):
      self._evaluate(first)
    self._closing.enter_context(supervision.phase("step"))
    for step in range(first + 1, self._total + 1):
      yield step, self._batch
      supervision.beat()
      if step < self._total:
        self._batch = self._next_batch()
    self._say_done()

  def train_step(self, state, batch):
    """Does one update: (new state, metrics), both still being computed when it returns."""
    return self._program(state, self._frozen, batch)

  def record(self, step: int, state, metrics: dict[str, jax.Array]) -> None:
    """Takes the result of a step, and reports the metrics of the step before.

    Raises:
      NonFiniteError: too many updates in a row were left out.
    """
    earlier, self._pending = self._pending, Pending(step, metrics, self._batch)
    self._step, self._state = step, state
    if earlier:
      self._report(earlier, metrics)

  def _flush(self) -> None:
    """Reports the metrics that `record` still holds back."""
    pending, self._pending = self._pending, None
    if pending:
      self._report(pending, pending.metrics)

  def _report(self, pending: Pending, newest: dict[str, jax.Array]) -> None:
    """Fetches the metrics of a step and logs them where that is due.

    `newest` are the metrics of the newest step: if that one is good, the run has recovered.
    """
    step, config = pending.step, self._config
    metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    warnings = take_alarms(metrics, self._task.alarms)
    if warning := self._skips.count(step, metrics):
      self._log.say(warning)
      if self._skips.must_stop and newest["skipped"]:
        folder = nonfinite.write_bundle(
          self._workdir,
          config,
          self._checkpoints.identity,
          step,
          self._state,
          pending.batch,
          metrics,
        )
        raise NonFiniteError(
          f"step {step}: {nonfinite.skip_reason(metrics)}, and {config.optim.max_skips} updates in "
          f"a row were skipped; {nonfinite.HINT}. To look at it: mrmae replay --bundle={folder}"
        )
    del metrics["skipped"]
    self._log.advance(step)
    if warnings and step == self._first_step + 1:
      self._log.say("\n".join(warnings))
    if is_due(step, config.log_every, self._total) or step == self._first_step + 1:
      speed = self._clock.measure(step)
      counts = {"skipped": self._skips.total} if self._skips.total else {}
      eta = (self._total - step) * config.batch_size / speed["images_per_s"]
      self._log.scalars(step, metrics | counts | speed, eta=eta)

  def _is_due(self, step: int, epochs: float) -> bool:
    return is_due(step, epochs * self._plan.steps.per_epoch, self._total)

  # Checkpoints.

  def save_if_due(self, step: int) -> None:
    """Saves the newest state every `checkpoint_every` epochs, after the first and the last step.

    The metrics of the step are reported first: a bad step is never saved. Storage that fails does
    so after the first step already.

    Raises:
      StorageError: the last checkpoint of the run could not be saved.
      NonFiniteError: see `record`.
    """
    if self._is_due(step, self._config.checkpoint_every) or step == 1:
      self._flush()
      self._save(step, is_last=step == self._total)

  def _save(self, step: int, is_last: bool) -> None:
    with supervision.phase("saving"):
      self._log.check_folder()
      self._log.sync()
      problem = self._checkpoints.save(step, self._state, wait=is_last or step == 1)
    if problem:
      if is_last:
        raise StorageError(f"checkpoint {step} could not be saved: {problem}")
      self._log.say(
        f"warning: checkpoint {step} is not saved: {problem}; the run goes on and tries again at "
        "the next save"
      )

  def _save_interrupted(self) -> None:
    """Saves the newest state of a run that ends early."""
    self._flush()
    if self._step:
      self._save(self._step, is_last=True)
    saved = ", which is saved" if self._step else ""
    self._log.say(
      f"stopped after step {self._step} of {self._total}{saved}; run the same command to resume"
    )

  # Evaluations.

  def evaluate_if_due(self, step: int) -> None:
    """Evaluates the newest state every `eval_every` epochs and after the last step."""
    if self._is_due(step, self._config.eval_every):
      self._flush()
      self._evaluate(step)

  def _evaluate(self, step: int) -> None:
    if not self._evaluators:
      return
    self._log.check_folder()
    began, results, state = time.monotonic(), {}, self._state
    self._evaluating = True
    averaged = optim.averaged_params(state.opt_state)
    params = state.params if averaged is None else averaged
    with supervision.phase("evaluation"):
      for name, evaluator in self._evaluators.items():
        try:
          result = evaluator.run(params, state.extra, step)
        except OSError as error:  # a picture that finds no space, for example
          self._log.say(f"warning: {name} of step {step} is left out: {one_line(error)}")
          continue
        self._write_files(step, name, result.pop("pictures", {}), result.pop("files", {}))
        results |= {f"{name}/{key}": value for key, value in result.items()}
    self._evaluating = False
    self._score(step, results)
    self._log.scalars(step, results | {"evaluation_s": time.monotonic() - began})

  def _write_files(self, step: int, name: str, pictures: dict, files: dict) -> None:
    """Writes what an evaluator has drawn, {path: uint8 [H, W, 3]}, and its files, {path: bytes}.

    The numbers stay where there is no space for a file.
    """
    if jax.process_index():
      return
    for path, content in [*files.items(), *pictures.items()]:
      if path in pictures:
        self._log.image(step, f"{name}/{Path(path).parent.name}", content)
        encoded = io.BytesIO()
        Image.fromarray(content).save(encoded, "PNG")
        content = encoded.getvalue()
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
      except OSError as error:
        self._log.say(f"warning: {name} of step {step}: no {path.name}: {one_line(error)}")
      else:
        if path in pictures:
          self._pictures[name] = path

  def _score(self, step: int, record: dict[str, float]) -> None:
    """Notes the value of `keep_best`, which decides on the checkpoint that stays."""
    score = record.get(self._config.keep_best, math.nan)
    if math.isfinite(score):
      self._scores[step] = score

  def _say_done(self) -> None:
    self._log.say(
      "\n  ".join(
        [
          f"done: {self._total} steps",
          *summary(self._log.path.parent),
          *(f"{name}: {path}" for name, path in self._pictures.items()),
          f"TensorBoard log: {self._log.tensorboard}",
          f"checkpoint: {self._checkpoints.directory / str(self._total)}",
          self._log.goodput.line(self._total),
        ]
      )
    )


def make_evaluators(config, task, frozen, mesh, workdir) -> tuple[dict[str, Any], list[str]]:
  """Returns the evaluators of a configuration by name, and their notes.

  Args:
    config: validated configuration.
    task: a `train.Task`.
    frozen: its frozen arrays.
    mesh: of the run.
    workdir: folder of the run; None: the evaluators are not run.

  Raises:
    DataError: images that an evaluator cannot do without are absent or cannot be read.
    ConfigError: the result of config.keep_best is not measured.
  """
  evaluators = {}
  for name, options in config.evals.items():
    module = importlib.import_module(f"mrmae_jax.evals.{name}")
    evaluators[name] = module.Evaluator(task, frozen, config, mesh, workdir or Path(), **options)
  notes = [note for e in evaluators.values() if (note := getattr(e, "note", ""))]
  results = [f"{name}/{x}" for name, e in evaluators.items() for x in getattr(e, "results", ())]
  if config.keep_best and config.keep_best not in results:
    raise ConfigError(
      f"config.keep_best={config.keep_best!r} is not among the results of this run: "
      f"{', '.join(results) or 'none'}; name one of them, or leave it empty"
      + "".join(f" ({note})" for note in notes)
    )
  return evaluators, notes


def take_alarms(metrics: dict[str, float], alarms: dict[str, tuple[float, str]]) -> list[str]:
  """Removes the terms of `Task.alarms` from the metrics of a step; returns the warnings."""
  values = {term: metrics.pop(term) for term in alarms}
  return [
    f"warning: {warning} ({term} {values[term]:.2g}, expected at least {least:g})"
    for term, (least, warning) in alarms.items()
    if values[term] < least
  ]


def is_due(step: int, every: float, total: int) -> bool:
  """Returns whether something done every `every` steps is done after update `step` of `total`.

  `every` may be a fraction. After the last step everything is due.
  """
  return step == total or int(step / every) > int((step - 1) / every)
