"""Checkpoints whose bits, files, disks or settings have changed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrmae_jax import config as config_lib
from mrmae_jax import preflight, sharding, train
from mrmae_jax.errors import DataError, NonFiniteError, StorageError, WorkdirError
from mrmae_jax.runs import checkpoint, nonfinite, tensorboard, workdir
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.log import Goodput, Log
from mrmae_jax.runs.metrics import read_metrics
from tests.faults import small
from tests.helpers.cli import run_command
from tests.helpers.programs import run_program, xla_flags
from tests.helpers.tasks import init_state, make_tx

# Nothing awaits the tasks that orbax leaves behind after a failed read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parent.parent.parent
GOLDENS = ROOT / "tests" / "goldens"


def state_of(step, rng=np.random.default_rng):
  """Returns arrays of all kinds, as hard to compress as weights."""
  r = rng(step)
  return {
    "params": {
      "kernel": jnp.asarray(r.standard_normal((7, 33)), jnp.float32),
      "half": jnp.asarray(r.standard_normal(50), jnp.bfloat16),
      "zeros": jnp.zeros((40, 5)),
    },
    "opt_state": [{"mu": jnp.asarray(r.standard_normal(64), jnp.float32)}],
    "step": jnp.int32(step),
  }


def shapes(state):
  on_one_device = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one_device)
  return jax.tree.map(as_shape, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Two checkpoints, 4 and 8."""
  folder = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(folder, {"seed": 0})
  for step in (4, 8):
    assert checkpoints.save(step, state_of(step), wait=True) == ""
  checkpoints.close()
  return folder


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def outcome(folder):
  """Returns what a restart restores: "the newest", or "the previous" and a warning."""
  checkpoints = Checkpoints(folder, {"seed": 0})
  try:
    restored = checkpoints.restore(shapes(state_of(0)))
    if restored.step == 8 and equal(restored.state, state_of(8)) and not restored.notes:
      return "the newest"
    if (
      restored.step == 4
      and equal(restored.state, state_of(4))
      and "checkpoint 8 is damaged" in restored.notes[0]
    ):
      return "the previous"
    return f"wrong: step {restored.step}, {restored.notes}"
  finally:
    checkpoints.close()


def flip(path, bit):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def flips(saved, tmp_path, count):
  """Returns the outcomes of at least `count` flipped bits, as many of each file of step 8.

  One is flipped at a time, and none twice.
  """
  files = sorted(
    p for p in (saved / "checkpoints" / "8").rglob("*") if p.is_file() and p.stat().st_size
  )
  rng, outcomes = np.random.default_rng(0), {}
  places = []
  for path in files:
    num_bits = 8 * path.stat().st_size
    flipped = rng.choice(num_bits, min(num_bits, -(-count // len(files))), replace=False)
    places += [(path, int(bit)) for bit in flipped]
  for path, bit in places:
    folder = shutil.copytree(saved, tmp_path / "run")
    flip(folder / path.relative_to(saved), bit)
    outcomes[str(path.relative_to(saved)), bit] = outcome(folder)
    if outcomes[str(path.relative_to(saved)), bit] == "the previous":
      assert (folder / "damaged" / "8").is_dir()  # nothing is deleted
    shutil.rmtree(folder)
  return outcomes


def test_f15_a_flipped_bit_is_harmless_or_found(saved, tmp_path):
  outcomes = flips(saved, tmp_path, 50)
  assert set(outcomes.values()) == {"the newest", "the previous"}, outcomes


@pytest.mark.slow
def test_f15_a_thousand_flipped_bits(saved, tmp_path):
  outcomes = list(flips(saved, tmp_path, 1000).values())
  print({kind: outcomes.count(kind) for kind in sorted(set(outcomes))})
  assert set(outcomes) == {"the newest", "the previous"}


def test_f15_no_intact_checkpoint_is_an_error_and_nothing_is_touched(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "run")
  for step in (4, 8):
    for data in (folder / "checkpoints" / str(step) / "state").rglob("d/*"):
      data.write_bytes(b"")
  before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
  checkpoints = Checkpoints(folder, {"seed": 0})
  with pytest.raises(StorageError, match="no checkpoint in .* is intact \\(step 8: .*; step 4: "):
    checkpoints.restore(shapes(state_of(0)))
  checkpoints.close()
  assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before


@pytest.mark.parametrize("damage", ["trim", "empty", "delete"])
def test_f16_files_that_are_cut_empty_or_gone(saved, tmp_path, damage):
  files = sorted(
    p for p in (saved / "checkpoints" / "8").rglob("*") if p.is_file() and p.stat().st_size
  )
  for path in files:
    folder = shutil.copytree(saved, tmp_path / "run")
    target = folder / path.relative_to(saved)
    if damage == "delete":
      target.unlink()
    else:
      target.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "trim" else 0])
    assert outcome(folder) in ("the newest", "the previous"), path
    shutil.rmtree(folder)


def test_f16_a_checkpoint_without_its_record_does_not_count(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "run")
  shutil.rmtree(folder / "checkpoints" / "8" / "run")
  assert outcome(folder) == "the previous"


def test_f15_features_come_from_an_intact_checkpoint(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "run")
  config = small.get_config()
  (folder / "config.json").write_text(config.to_json())
  params, _, step, *_ = checkpoint.read_params(folder, "kernel")
  assert step == 8
  np.testing.assert_array_equal(params["kernel"], state_of(8)["params"]["kernel"])
  for data in (folder / "checkpoints" / "8" / "state").rglob("d/*"):
    for place in range(100, data.stat().st_size, 50):
      flip(data, 8 * place)
  params, _, step, *_ = checkpoint.read_params(folder, "kernel")
  assert step == 4
  np.testing.assert_array_equal(params["kernel"], state_of(4)["params"]["kernel"])


def test_f15_the_checksum_sees_every_kind_of_change():
  total = lambda x: int(checkpoint._checksum(x))
  r = np.random.default_rng(0)
  for x in (
    r.standard_normal((5, 6)).astype(np.float32),
    r.integers(0, 9, (4, 7)).astype(np.int32),
    np.asarray(jnp.asarray(r.standard_normal(12), jnp.bfloat16)),
    r.integers(0, 2, 16).astype(bool),
  ):
    base = total(x)
    for i in range(x.size):
      changed = x.copy()
      changed.reshape(-1)[i] = (
        ~changed.reshape(-1)[i] if x.dtype == bool else changed.reshape(-1)[i] + x.dtype.type(1)
      )
      assert total(changed) != base
    rolled = np.roll(x, 1)
    assert total(rolled) != base or np.array_equal(rolled, x)
  mesh = sharding.make_mesh(fsdp=4)
  x = jnp.asarray(r.standard_normal((16, 12)), jnp.float32)
  for spec in (("data",), (None, "fsdp"), ("data", "fsdp")):
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    assert total(placed) == total(x)


def test_keys_that_came_after_a_run_have_their_defaults(described, tmp_path):
  config = json.loads((described / "config.json").read_text())
  shutil.copytree(described, tmp_path / "run")
  older = {name: dict(part) if isinstance(part, dict) else part for name, part in config.items()}
  del older["optim"]["warmup_steps"], older["encoder"]["num_registers"], older["hang_s"]
  (tmp_path / "run" / "config.json").write_text(json.dumps(older))
  assert checkpoint.read_config(tmp_path / "run") == config
  assert checkpoint.read_params(tmp_path / "run", "kernel").step == 4


@pytest.fixture(scope="module")
def described(tmp_path_factory):
  """A checkpoint of a run, and its configuration."""
  folder, config = tmp_path_factory.mktemp("described"), small.get_config()
  checkpoints = Checkpoints(folder, config_lib.identity(config) | {"classes": ["a"]})
  assert checkpoints.save(4, state_of(4), wait=True) == ""
  checkpoints.close()
  (folder / "config.json").write_text(config.to_json())
  return folder


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "cannot be read .Expecting value"),
    ("[1, 2]", "holds no run: expected the keys"),
    ("null", "holds no run: expected the keys"),
    ("[" * 100_000, "cannot be read .maximum recursion"),
    ('{"a":' * 700 + "1" + "}" * 700, "(cannot be read|holds no run)"),
    ("{}", "holds no run: expected the keys"),
    ({"encoder": {"depth": 10**8}}, r"encoder.depth: 100000000 in the file, 1 in the checkpoint"),
    ({"image_size": [10**8] * 2}, r"image_size: .100000000, 100000000. in the file, .32, 48. in"),
    ({"encoder": []}, "encoder.depth: missing in the file, 1 in the checkpoint"),
    ({"image_size": None, "data": "x"}, "data.crop_scale: missing in the file"),
    # Keys that an identity does not name: they have their defaults, or may change
    ({"encoder": {"num_registers": 8}}, "encoder.num_registers: 8 in the file, 0 in the check"),
    ({"encoder": {"activation": "x"}}, "encoder.activation='x' is not one of gelu"),
    ({"encoder": {"remat": [10**8]}}, r"encoder.remat=.100000000. must be of type str"),
    ({"encoder": {"nonsense": 1}}, "encoder.nonsense is not a key"),
    ({"evals": 3}, "is not that of its checkpoint .*int"),
  ],
)
def test_a_config_that_is_not_that_of_its_checkpoint(described, tmp_path, content, message):
  """Its sizes would otherwise meet the arrays of the checkpoint, or ask for all memory."""
  folder = shutil.copytree(described, tmp_path / "run")
  config = checkpoint.read_config(folder)
  assert config["encoder"]["depth"] == 1
  if isinstance(content, dict):
    changed = {
      key: config[key] | value if isinstance(value, dict) else value
      for key, value in content.items()
    }
    content = json.dumps(config | changed)
  (folder / "config.json").write_text(content)
  with pytest.raises(WorkdirError, match=f"config.json .*{message}"):
    checkpoint.read_config(folder)
  assert run_command(["features", f"--model={folder}", "--images=digits", "--out=x.npz"]) == 2


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda record: [], "its record is not an object"),
    (lambda record: {"format": 2}, "its record holds no identity or no arrays"),
    (lambda record: record | {"format": {}}, r"written in format \{\} .with "),
    (lambda record: record | {"identity": {"classes": 3}}, "its record holds classes of another"),
    (lambda record: record | {"arrays": {"step": [1, 2]}}, "its record holds step of another type"),
    (lambda record: record | {"arrays": {"step": ["int32", ["x"], 0]}}, "holds step of another"),
  ],
)
def test_f15_a_record_of_another_shape_with_a_right_checksum(described, tmp_path, change, message):
  """As a stranger could write it."""
  folder = shutil.copytree(described, tmp_path / "run")
  path = folder / "checkpoints" / "4" / "run" / "metadata"
  record = change(json.loads(path.read_text())["record"])
  digest = checkpoint.record_digest(record)
  path.write_text(json.dumps({"record": record, "sha256": digest}))
  checkpoints = Checkpoints(folder, {})
  with pytest.raises((StorageError, WorkdirError), match=message):
    checkpoints.restore(shapes(state_of(4)))
  checkpoints.close()


def test_f15_files_of_orbax_that_it_would_not_write(described, tmp_path):
  folder = shutil.copytree(described, tmp_path / "run")
  path = folder / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"item_handlers": 0.5}))
  with pytest.raises(StorageError, match="holds a checkpoint that is damaged.*move the newest"):
    Checkpoints(folder, {})
  with pytest.raises(StorageError, match="holds a checkpoint that is damaged"):
    checkpoint.read_config(folder)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "run/metadata", "state/x"])
def test_f15_a_pipe_in_a_checkpoint_is_not_waited_for(described, tmp_path, name):
  folder = shutil.copytree(described, tmp_path / "run")
  path = folder / "checkpoints" / "4" / name
  path.unlink(missing_ok=True)
  os.mkfifo(path)
  for read in (lambda: Checkpoints(folder, {}), lambda: checkpoint.read_config(folder)):
    with pytest.raises(StorageError, match=f"4/{name} is no file, .*; remove it"):
      read()


@pytest.mark.parametrize(
  "account", ["[" * 100_000, "3", {"reached": "x"}, {"starts": []}, {"seconds": {"step": {}}}]
)
def test_an_account_of_time_that_is_none_begins_anew(tmp_path, account):
  whole = {"starts": 3, "seconds": {"step": 1.0}, "steps": 8, "replayed_steps": 0, "reached": 8}
  whole["goodput"] = 0.5
  text = account if isinstance(account, str) else json.dumps(whole | account)
  (tmp_path / "goodput.json").write_text(text)
  assert Goodput(tmp_path, 8).account(9)["starts"] == 1
  (tmp_path / "goodput.json").write_text(json.dumps(whole))
  assert Goodput(tmp_path, 8).account(9)["starts"] == 4


def test_f18_the_checkpoint_of_format_2_still_opens(tmp_path):
  folder = shutil.copytree(GOLDENS / "checkpoint_format_2", tmp_path / "run")
  checkpoints = Checkpoints(folder, {"seed": 0})
  restored = checkpoints.restore(shapes(state_of(0)))
  checkpoints.close()
  assert restored.step == 4 and equal(restored.state, state_of(4))


def test_f18_another_format_is_refused_with_versions(tmp_path):
  folder = shutil.copytree(GOLDENS / "checkpoint_format_1", tmp_path / "run")
  checkpoints = Checkpoints(folder, {"seed": 0})
  with pytest.raises(
    WorkdirError, match=r"written in format 1 \(with \{.*'jax': .*this version reads format 2"
  ):
    checkpoints.restore(shapes(state_of(0)))
  checkpoints.close()


def test_f19_too_little_space_is_seen_before_saving(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path, {})
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
  assert "are free on the disk" in checkpoints.save(4, state_of(4), wait=True)
  assert not (tmp_path / "checkpoints" / "4").exists()
  monkeypatch.undo()
  assert (
    checkpoints.save(5, state_of(5), wait=True) == "" and (tmp_path / "checkpoints" / "5").exists()
  )
  checkpoints.close()


def test_f19_a_save_that_fails_leaves_the_one_before(tmp_path):
  """From the second save on, the disk takes no file above a size.

  The run goes on and warns; because its last checkpoint is missing, it ends with exit code 5.
  """
  code = """if True:
    import resource, signal, sys
    from mrmae_jax import __main__ as entry
    from mrmae_jax.runs import checkpoint
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = checkpoint.Checkpoints.save
    def limit(size):
      hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    def limited(self, step, *a, **k):
      limit(10**9 if step in (1, 4) else 1500)
      try:
        return save(self, step, *a, **(k | {"wait": True}))
      finally:
        limit(10**9)
    checkpoint.Checkpoints.save = limited
    arguments = ["--config=tests/faults/small.py", "--workdir=WORKDIR"]
    sys.exit(entry.main(["mrmae", "pretrain", *arguments]))
  """.replace("WORKDIR", str(tmp_path))
  # Its output goes to pipes, which the limit leaves alone.
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert done.returncode == 5, done.stderr[-2000:]
  assert "error: checkpoint 20 could not be saved: " in done.stderr
  assert "warning: checkpoint 8 is not saved" in done.stdout and "step 20/20" in done.stdout
  assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] in (
    ["1", "4"],
    ["4", "1"],
    ["4"],
  )


def toy_run(folder, task=None, **values):
  config = small.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(
      {key.replace("__", "."): value for key, value in values.items()}
    )
  return train.fit(config, task or small.toy_task(), folder), read_metrics(folder)


@pytest.mark.parametrize(
  "fault, log_every",
  [
    ("renamed", 100),
    pytest.param("renamed", 1, marks=pytest.mark.variant),
    pytest.param("file", 1, marks=pytest.mark.variant),
    pytest.param("another", 100, marks=pytest.mark.variant),
    pytest.param("foreign", 1, marks=pytest.mark.variant),
  ],
)
def test_f20_a_workdir_that_vanishes(tmp_path, monkeypatch, fault, log_every):
  """The workdir is moved after the first save. Nothing is written in its place."""
  save, folder = Checkpoints.save, tmp_path / "run"

  def save_and_move(self, step, *args, **kwargs):
    result = save(self, step, *args, **kwargs)
    if step == 1:
      folder.rename(tmp_path / "moved")
      if fault == "file":
        folder.write_text("a file")
      elif fault == "another":  # as the folder below a disk that was unmounted
        folder.mkdir()
      elif fault == "foreign":
        folder.mkdir()
        (folder / "starts.jsonl").write_text('{"first_step": 0}\n')
    return result

  monkeypatch.setattr(Checkpoints, "save", save_and_move)
  with pytest.raises(StorageError, match="run is no longer the folder in which this run began"):
    toy_run(folder, log_every=log_every)
  written = {path.name for path in tmp_path.glob("run/*")}
  assert written <= {"starts.jsonl"}
  assert folder.exists() == (fault != "renamed")
  (tmp_path / "found").mkdir()
  if folder.exists():
    folder.rename(tmp_path / "found" / "run")
  (tmp_path / "moved").rename(folder)
  monkeypatch.undo()
  _, records = toy_run(folder, log_every=1)
  assert [r["step"] for r in records] == list(range(1, 21))


def test_f20_a_folder_with_a_new_number_is_still_the_workdir(tmp_path):
  """Some network file systems renumber their folders."""
  run_log = Log(tmp_path / "run", 9)
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  shutil.rmtree(tmp_path / "run")
  (tmp_path / "copy").rename(tmp_path / "run")
  run_log.check_folder()
  (tmp_path / "run" / "starts.jsonl").unlink()
  with pytest.raises(StorageError, match="no longer the folder"):
    run_log.check_folder()
  run_log.close()


def test_f22_slow_storage_does_not_stop_the_steps(tmp_path, monkeypatch, capsys):
  """Each save takes longer than four steps: saves in between are skipped, the last one waits."""
  saver = checkpoint.ocp.PyTreeCheckpointHandler
  finalize = saver.finalize
  monkeypatch.setattr(
    saver, "finalize", lambda self, directory: (time.sleep(1.5), finalize(self, directory))[1]
  )
  _, records = toy_run(tmp_path)
  output = capsys.readouterr().out
  assert "checkpoint 8 is not saved: the previous save is still in progress" in output
  assert (tmp_path / "checkpoints" / "20").is_dir() and {
    r["step"] for r in records if "loss" in r
  } == set(range(1, 21))
  assert json.loads((tmp_path / "goodput.json").read_text())["seconds"]["saving"] > 1.5


def test_f25_nan_is_never_the_best(tmp_path):
  scores = {}
  checkpoints = Checkpoints(tmp_path, {}, keep=1, scores=scores)
  for step, score in ((1, 0.5), (2, 0.7), (3, float("nan")), (4, 0.6), (5, 0.6)):
    checkpoints.save(step, state_of(step), wait=True)
    if np.isfinite(score):  # as train.fit does, see below
      scores[step] = score
  checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
    2,
    5,
  ]


def test_f25_the_best_checkpoint_of_a_run_stays(tmp_path, monkeypatch):
  values = iter([0.1, 0.2, 0.5, float("nan"), 0.9, float("nan"), 0.3])

  class Evaluator:
    note, results = "", ("accuracy",)

    def __init__(self, *args):
      pass

    def run(self, params, extra, step):
      return {"accuracy": next(values)}

  monkeypatch.setitem(sys.modules, "mrmae_jax.evals.fake", type(sys)("fake"))
  sys.modules["mrmae_jax.evals.fake"].Evaluator = Evaluator
  save = Checkpoints.save  # the toy's steps are faster than any disk
  monkeypatch.setattr(
    Checkpoints, "save", lambda self, step, state, wait: save(self, step, state, wait=True)
  )
  _, records = toy_run(
    tmp_path,
    evals__fake=config_lib.ConfigDict(),
    keep_best="fake/accuracy",
    keep_checkpoints=1,
    eval_every=small.get_config().checkpoint_every,
  )
  # evaluated at 0, 4, 8, 12 (nan), 16, 20 (nan): the best is 16
  assert {r["step"]: r.get("fake/accuracy") for r in records if "evaluation_s" in r} == {
    0: 0.1,
    4: 0.2,
    8: 0.5,
    12: None,
    16: 0.9,
    20: None,
  }
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
    16,
    20,
  ]


def test_f23_a_step_that_is_not_finite_changes_nothing():
  task = small.toy_task(lambda x: jnp.where(x > 0.3, jnp.nan, 0.0))
  tx, schedule = make_tx(task, 90.0, 20)
  step = jax.jit(train.make_train_step(task, tx, schedule, 0))
  state = init_state(task, tx)
  dark, bright = ({"image": np.full((16, 32, 48, 3), value, np.uint8)} for value in (40, 200))
  state1, metrics = step(state, {}, dark)
  state2, bad_metrics = step(state1, {}, bright)
  assert (int(metrics["skipped"]), int(bad_metrics["skipped"]), int(state2.step)) == (0, 1, 2)
  assert equal(
    (state1.params, state1.opt_state, state1.mean_grad_norm),
    (state2.params, state2.opt_state, state2.mean_grad_norm),
  )
  state3, _ = step(state2, {}, dark)
  assert not equal(state2.params, state3.params)


def test_f24_a_spike_may_be_left_out():
  task = small.toy_task()
  tx, schedule = make_tx(task, 90.0, 20)
  state = init_state(task, tx)
  usual = {"image": np.random.default_rng(0).integers(0, 40, (16, 32, 48, 3), np.uint8)}
  for max_spike, skipped in ((0.0, 0), (100.0, 1)):
    scaled = task._replace(
      loss=lambda p, e, f, b, k: jax.tree.map(lambda v: v * b["scale"], task.loss(p, e, f, b, k))
    )
    step = jax.jit(train.make_train_step(scaled, tx, schedule, 0, max_spike=max_spike))
    before, _ = step(state, {}, usual | {"scale": 1.0})
    after, metrics = step(before, {}, usual | {"scale": 1e4})
    assert int(metrics["skipped"]) == skipped and equal(before.params, after.params) == bool(
      skipped
    )
    assert "more than optim.max_spike times" in nonfinite.skip_reason(
      {k: float(v) for k, v in metrics.items()}
    )


def test_f23_a_run_that_is_lost_leaves_a_bundle_that_replays(tmp_path, monkeypatch, capsys):
  """Every loss becomes nan: after three the run ends, and replay gives the same numbers."""

  monkeypatch.chdir(ROOT)
  config = small.get_config()
  with config.unlocked():
    config.optim.update(max_skips=3, blr=1e14)
  preflight.check(config, jax.device_count())
  from mrmae_jax.tasks import pretrain

  with pytest.raises(
    NonFiniteError, match="3 updates in a row were skipped.*mrmae replay --bundle="
  ) as error:
    train.fit(config, pretrain.make(config), tmp_path)
  bundle = Path(str(error.value).split("--bundle=")[1])
  record = json.loads((bundle / "bundle.json").read_text())
  output = capsys.readouterr().out
  assert output.count("update skipped") >= 3 and record["step"] >= 3 and record["state"] == "saved"
  assert not any((tmp_path / "checkpoints").glob(str(record["step"])))
  assert run_command(["replay", f"--bundle={bundle}"]) == 0
  output = capsys.readouterr().out
  assert "the same numbers, bit for bit" in output and "not the same\n" not in output, output
  assert "gradients that are not finite: " in output and "encoder/" in output
  assert (
    run_command(["replay", f"--bundle={tmp_path}"]) == 2
    and "is not a bundle" in capsys.readouterr().err
  )


def test_f23_a_few_bad_batches_do_not_end_a_run(tmp_path, capsys):
  task = small.toy_task(lambda x: jnp.where((x * 1e4).astype(int) % 5 == 0, jnp.inf, 0.0))
  _, records = toy_run(tmp_path, task)
  output = capsys.readouterr().out
  count = output.count("update skipped")
  assert 1 <= count < 15
  last = [r for r in records if "lr" in r][-1]
  assert last["step"] == 20 and last["skipped"] == count
  assert all(np.isfinite(v) for r in records for v in r.values())  # JSON knows no infinity


def test_f26_what_was_trained_before_a_bad_image_is_saved(tmp_path, monkeypatch):
  """The batch of step 8 cannot be read: 7 steps are saved.

  With the image back, the resumed run has the losses of a run without the fault.
  """
  _, reference = toy_run(tmp_path / "reference")
  batches = train.data.train_batches

  def failing(*args, **kwargs):
    stream = batches(*args, **kwargs)

    class Failing:
      close = stream.close
      count = 0

      def __next__(self):
        self.count += 1
        if self.count == 8:
          raise DataError("planted")
        return next(stream)

    return Failing()

  monkeypatch.setattr(train.data, "train_batches", failing)
  with pytest.raises(DataError, match="planted"):
    toy_run(tmp_path / "run")
  monkeypatch.undo()
  assert (tmp_path / "run" / "checkpoints" / "7").is_dir()
  _, records = toy_run(tmp_path / "run")
  losses = lambda rows: {r["step"]: r["loss"].hex() for r in rows if "loss" in r}
  assert losses(records) == losses(reference) and len(losses(reference)) == 20


def test_f38_a_logger_that_breaks_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
  def broken(*args, **kwargs):
    raise RuntimeError("the logger is down")

  monkeypatch.setattr(tensorboard.EventFile, "add_scalars", broken)
  _, records = toy_run(tmp_path)
  assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
  assert capsys.readouterr().out.count("the logger is down") == 1


def test_f39_half_a_line_and_a_clock_that_jumps(tmp_path, monkeypatch):
  toy_run(tmp_path / "reference")
  toy_run(tmp_path / "run", checkpoint_every=1000.0)
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")  # step 1 is left
  with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"step": 21, "lo')
  now = time.time
  monkeypatch.setattr(time, "time", lambda: now() - 1e6)
  _, records = toy_run(tmp_path / "run", checkpoint_every=1000.0)
  losses = lambda rows: {r["step"]: r["loss"].hex() for r in rows if "loss" in r}
  assert (
    losses(records) == losses(read_metrics(tmp_path / "reference")) and len(losses(records)) == 20
  )


def test_f21_two_runs_in_one_workdir(tmp_path):
  with workdir.lock_workdir(tmp_path) as note:
    assert note == ""
    holder = json.loads((tmp_path / "lock").read_text())
    assert holder["pid"] == os.getpid()
    with pytest.raises(WorkdirError, match=f"is in use by process {os.getpid()} on .* since 20"):
      with workdir.lock_workdir(tmp_path):
        pass
  with workdir.lock_workdir(tmp_path) as note:
    assert note == ""


def test_f21_a_holder_elsewhere_is_given_time_to_end(tmp_path, monkeypatch):
  with workdir.lock_workdir(tmp_path):
    monkeypatch.setattr(workdir.socket, "gethostname", lambda: "another")
    monkeypatch.setattr(workdir, "PATIENCE_S", 0.1)
    waited = []
    monkeypatch.setattr(workdir.time, "sleep", waited.append)
    monkeypatch.setattr(workdir.time, "monotonic", iter([0.0, 0.05, 0.09, 0.2]).__next__)
    with pytest.raises(WorkdirError, match="is in use by process"):
      with workdir.lock_workdir(tmp_path):
        pass
    assert waited == [1, 1]


def test_f21_a_lock_ends_with_its_process(tmp_path):
  code = (
    "from mrmae_jax.runs import workdir\nimport os\n"
    f"with workdir.lock_workdir({str(tmp_path)!r}):\n  os._exit(9)"
  )
  assert run_program(["-c", code]).returncode == 9
  with workdir.lock_workdir(tmp_path) as note:
    assert "the previous run (process " in note and "did not shut down cleanly" in note


def test_f37_out_of_memory_says_what_to_turn():
  from mrmae_jax.cli import train as cli_train

  config = small.get_config()
  text = cli_train.out_of_memory(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes. Largest program "
    "allocations: "
    "1. Size: 4.00G shape: bf16[1024,784,384]{2,1,0} 2. f32[1024,3136,256]",
    config,
  )
  assert "17179869184" in text and "bf16[1024,784,384], f32[1024,3136,256]" in text
  assert (
    "config.optim.accum_steps=2" in text
    and "config.encoder.remat=full" in text
    and "\n" not in text
  )


@pytest.mark.slow
def test_f42_a_long_run_does_not_grow(tmp_path):
  """Resident memory after 2,000 steps hardly exceeds that after 500."""
  code = f"""if True:
    from pathlib import Path
    from mrmae_jax import train
    from mrmae_jax.runs import supervision
    from tests.faults import small
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    sizes, beat = [], supervision.beat
    supervision.beat = lambda: (sizes.append(resident()), beat())
    config = small.get_config()
    config.update(epochs=2000 * 16 / 1438, log_every=10, checkpoint_every=200 * 16 / 1438)
    train.fit(config, small.toy_task(), {str(tmp_path)!r})
    print("MEMORY", len(sizes), sizes[499], sizes[1999])
  """
  out = run_program(["-c", code], timeout=600).stdout
  count, early, late = map(float, out.split("MEMORY ")[1].split())
  print(f"{early:.1f} MB after 500 steps, {late:.1f} MB after 2,000")
  assert count == 2000 and late - early < 20


def test_of_a_run_of_another_task_nothing_else_is_said(tmp_path):
  now = SimpleNamespace(directory=tmp_path / "checkpoints", identity={"task": "probe", "epochs": 3})
  with pytest.raises(WorkdirError) as caught:
    Checkpoints._check_identity(now, {"task": "pretrain", "epochs": 5, "dtype": "float32"})
  assert str(caught.value) == (
    f"{tmp_path} holds a run of the task 'pretrain', this one is 'probe'; choose another --workdir"
  )
