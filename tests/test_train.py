"""The loop: the same numbers on any devices, one compilation, exact resumption, nothing saved that
is not finite.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file

from mrmae_jax import data, hardware, optim, sharding, train
from mrmae_jax.errors import WorkdirError
from mrmae_jax.runs import log
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.run import is_due
from mrmae_jax.tasks import pretrain
from tests import tiny
from tests.helpers.programs import Program, run_program, wait_for
from tests.helpers.tasks import init_state, make_tx

ROOT = Path(__file__).parent.parent
SHARED = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module", params=["vit", pytest.param("convvit", marks=pytest.mark.variant)])
def setup(request):
  """Tiny configuration, its task, five batches, and the state before the first step."""
  config = tiny.get_config(request.param)
  source = data.open_split(config.data, "train")
  plain = config.copy_and_resolve_references()
  plain.data.update(crop_scale=(0.5, 1.0), flip=False)
  view = data.image_views(plain).train
  stream = data.train_batches(source, view, seed=0, batch_size=16)
  batches = [next(stream) for _ in range(5)]
  stream.close()
  task = pretrain.make(config)
  tx, _ = make_tx(task, 50, 8)
  state = jax.jit(lambda: init_state(task, tx))()
  return config, task, batches, jax.device_get(state)


def five_steps(setup, num_devices, fsdp=1, accum_steps=1):
  """Losses of five steps, final parameters, and the shardings they had."""
  _, task, batches, state = setup
  mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:num_devices])
  tx, schedule = make_tx(task, 50, 8)
  shardings = sharding.fsdp_shardings(state, mesh, min_size=64)
  state = jax.device_put(state, shardings)
  frozen = jax.device_put(task.frozen, sharding.fsdp_shardings(task.frozen, mesh, min_size=64))
  gather = lambda tree: jax.lax.with_sharding_constraint(tree, sharding.replicated(mesh))
  train_step = train.make_train_step(
    task, tx, schedule, seed=0, accum_steps=accum_steps, gather=gather
  )
  step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
  losses = []
  for batch in batches:
    state, terms = step(state, frozen, sharding.global_batch(batch, mesh))
    losses.append([float(terms[name]) for name in ("loss", "pixel", "mimic", "grad_norm")])
  assert int(state.step) == 5
  assert step._cache_size() == 1
  return np.array(losses), jax.device_get(state.params), shardings


@pytest.fixture(scope="module")
def reference(setup):
  return five_steps(setup, 1)


@pytest.mark.parametrize(
  "num_devices, fsdp, accum_steps",
  [
    (4, 2, 2),
    *(
      pytest.param(*other, marks=pytest.mark.variant) for other in ((8, 1, 1), (8, 4, 1), (1, 1, 4))
    ),
  ],
)
def test_f11_f14_five_steps_agree_on_any_devices(setup, reference, num_devices, fsdp, accum_steps):
  losses, params, shardings = five_steps(setup, num_devices, fsdp, accum_steps)
  np.testing.assert_allclose(losses, reference[0], rtol=1e-5)

  def compare(path, a, b):
    if path[-2:] == (jax.tree_util.DictKey("qkv"), jax.tree_util.DictKey("bias")):
      # Softmax does not see a key bias: its gradient is zero but for rounding, which Adam blows up
      # to full steps.
      a, b = np.delete(a.reshape(3, -1), 1, axis=0), np.delete(b.reshape(3, -1), 1, axis=0)
    np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(compare, params, reference[1])
  specs = {s.spec for s in jax.tree.leaves(shardings)}
  assert any("fsdp" in spec for spec in specs) == (fsdp > 1)
  assert np.abs(np.diff(losses[:, 0])).min() > 1e-3  # the model did move


def test_fsdp_rule():
  mesh = sharding.make_mesh(fsdp=4)
  tree = {
    "matrix": np.zeros((12, 64)),
    "odd": np.zeros((7, 9)),
    "small": np.zeros(8),
    "scalar": np.zeros(()),
  }
  specs = {k: s.spec for k, s in sharding.fsdp_shardings(tree, mesh, min_size=16).items()}
  assert specs["matrix"] == jax.sharding.PartitionSpec(None, "fsdp")
  assert all(specs[name] == jax.sharding.PartitionSpec() for name in ("odd", "small", "scalar"))
  with pytest.raises(ValueError, match="data=3 x fsdp=2 does not fit 8 devices"):
    sharding.make_mesh(data=3, fsdp=2)


def test_masks_and_images_differ_within_a_batch_and_between_steps():
  keys = jax.random.key_data(train.sample_keys(0, jnp.int32(3), 4))
  assert (
    len(
      np.unique(
        np.concatenate(
          [
            keys,
            jax.random.key_data(train.sample_keys(0, jnp.int32(4), 4)),
            jax.random.key_data(train.sample_keys(1, jnp.int32(3), 4)),
          ]
        ),
        axis=0,
      )
    )
    == 12
  )
  np.testing.assert_array_equal(
    keys[:2], jax.random.key_data(train.sample_keys(0, jnp.int32(3), 2))
  )


def test_schedule_equals_the_reference():
  golden = json.loads((SHARED / "cosine_schedule.json").read_text())
  schedule = optim.warmup_cosine(
    golden["lr"], golden["min_lr"], golden["warmup_epochs"] * 4, golden["epochs"] * 4
  )
  np.testing.assert_allclose(
    [schedule(4 * epoch) for epoch in golden["epoch"]], golden["value"], rtol=1e-5, atol=1e-12
  )


def test_adamw_equals_torch():
  golden = load_file(SHARED / "adamw_lr1.5e-3_b0.9_0.95_wd0.05.safetensors")
  config = tiny.get_config().optim
  config.update(blr=1.5e-3, min_lr=1.5e-3, warmup_epochs=0.0)  # a constant rate
  tx, _ = optim.make_optimizer(config, 256, optim.Steps(1, 10))
  params = {"w": jnp.asarray(golden["w0"])}
  state = tx.init(params)
  for step in range(5):
    updates, state = tx.update({"w": jnp.asarray(golden[f"gw{step}"])}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], golden[f"w{step + 1}"], atol=1e-6)


def test_weight_decay_spares_vectors_only():
  config = tiny.get_config("vit")
  params, _ = jax.eval_shape(pretrain.make(config).init, jax.random.key(0))
  decayed = {
    "/".join(k.key for k in path): d
    for path, d in jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))
  }
  assert not any(d for name, d in decayed.items() if name.endswith(("bias", "scale")))
  assert all(
    d for name, d in decayed.items() if name.endswith(("kernel", "cls_token", "mask_token"))
  )
  conv = jax.eval_shape(pretrain.make(tiny.get_config()).init, jax.random.key(0))[0]["encoder"][
    "blocks1_0"
  ]
  decayed = optim.decay_mask(conv)
  assert decayed["depthwise_kernel"] and not decayed["depthwise_bias"]


def test_due():
  assert [s for s in range(1, 11) if is_due(s, 4, 10)] == [4, 8, 10]
  assert [s for s in range(1, 11) if is_due(s, 2.5, 10)] == [3, 5, 8, 10]


# --- whole runs, in processes of their own ---


def command(workdir, *overrides):
  return [
    "-m",
    "mrmae_jax",
    "pretrain",
    "--config=tests/tiny.py:vit",
    f"--workdir={workdir}",
    *(f"--config.{o}" if not o.startswith("--") else o for o in overrides),
  ]


def run(workdir, *overrides, devices=1):
  return run_program(command(workdir, *overrides), devices=devices)


def losses(workdir):
  """{step: (loss, pixel, mimic)} as hexadecimal floats; a step logged twice is an error."""
  records = [r for r in log.read_metrics(workdir) if "loss" in r]
  assert len({r["step"] for r in records}) == len(records)
  return {r["step"]: tuple(r[k].hex() for k in ("loss", "pixel", "mimic")) for r in records}


LONG = ("epochs=0.225",)  # 20 steps, a checkpoint after every fourth
SLOW = (
  "eval_every=0.011",
  "evals.knn.bank=1400",
)  # an evaluation after every step leaves time to kill the run


def saved_steps(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """An uninterrupted run on 8 devices, and one that was killed between its first checkpoint and its
  end.
  """
  folder = tmp_path_factory.mktemp("runs")
  whole = command(folder / "whole", *LONG)
  code, out, err = run_program(whole, devices=8, env={"JAX_LOG_COMPILES": "1"})
  assert code == 0, err
  (folder / "whole.err").write_text(err)
  killed = folder / "killed"
  process = Program(command(killed, *LONG, *SLOW), folder / "log", devices=8)
  wait_for(
    lambda: saved_steps(killed) and max(losses(killed), default=0) >= saved_steps(killed)[-1] + 2,
    process,
    folder / "log",
  )
  process.kill()
  process.wait()
  assert max(losses(folder / "killed")) < 20
  return folder, out


def test_a_run_says_what_it_did(runs):
  folder, out = runs
  assert "parameters: " in out and "encoder" in out and "mimic_heads" in out
  assert "learning rate 0.0025 at its peak" in out and "= 20 steps" in out
  last = out[out.index("done: 20 steps") :]
  assert (
    f"checkpoint: {folder}/whole/checkpoints/20" in last
    and f"TensorBoard log: {folder}/whole/tensorboard" in last
  )
  assert f"reconstruct: {folder}/whole/reconstructions/step_0000020.png" in last
  assert (
    re.search(r"knn/accuracy: 0\.\d+ at step 0, 0\.\d+ at step 20", last)
    and "mimic: " in last
    and "pixel: " in last
  )
  with Image.open(folder / "whole" / "reconstructions" / "step_0000020.png") as picture:
    assert picture.size[0] > 4 * 128
  accuracy = [r["knn/accuracy"] for r in log.read_metrics(folder / "whole") if "knn/accuracy" in r]
  assert len(accuracy) == 2 and all(0 <= a <= 1 for a in accuracy)
  assert any((folder / "whole" / "tensorboard").iterdir())
  assert json.loads((folder / "whole" / "config.json").read_text())["image_size"] == [32, 48]
  assert "blocks_1" in (folder / "whole" / "parameters.txt").read_text()


def test_f2_killed_and_resumed_equals_uninterrupted_bit_for_bit(runs):
  folder, _ = runs
  resumed = shutil.copytree(folder / "killed", folder / "resumed")
  code, out, err = run(resumed, *LONG, devices=8)
  assert code == 0 and f"resuming after step {saved_steps(folder / 'killed')[-1]}" in out, err
  assert losses(resumed) == losses(folder / "whole")
  states = [restore(folder / name) for name in ("whole", "resumed")]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_saved_on_8_devices_continues_on_1(runs):
  folder, _ = runs
  moved = shutil.copytree(folder / "killed", folder / "moved")
  code, out, err = run(moved, *LONG, devices=1)
  assert code == 0 and f"resuming after step {saved_steps(folder / 'killed')[-1]}" in out, err
  numbers = [
    np.array([[float.fromhex(v) for v in row] for _, row in sorted(losses(folder / name).items())])
    for name in ("moved", "whole")
  ]
  np.testing.assert_allclose(*numbers, rtol=1e-5)


def test_a_finished_run_says_so(runs):
  folder, _ = runs
  before = losses(folder / "whole")
  code, out, _ = run(folder / "whole", *LONG, devices=8)
  assert code == 0 and "finished: " in out and "all 20 steps" in out
  assert losses(folder / "whole") == before


def test_f13_a_different_run_in_the_workdir_is_refused(runs):
  folder, _ = runs
  code, _, err = run(folder / "whole", *LONG, "optim.blr=0.01", "log_every=3", devices=8)
  assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
  assert "optim.blr: 0.04 in the checkpoint, 0.01 now" in err and "log_every" not in err


def restore(workdir):
  config = tiny.get_config("vit")
  config.epochs = 0.225
  task = pretrain.make(config)
  tx, _ = make_tx(task, 50, 8)
  init = lambda key: init_state(task, tx, key)
  one = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
    jax.eval_shape(init, jax.random.key(0)),
  )
  checkpoints = Checkpoints(workdir, train.identity(config, task))
  found = checkpoints.restore(shapes)
  checkpoints.close()
  return jax.device_get(found.state)


def test_f17_checkpoints_of_another_shape_or_type_are_refused(tmp_path):
  one = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
  checkpoints = Checkpoints(tmp_path, {"seed": 0})
  checkpoints.save(3, {"w": jnp.arange(6.0).reshape(2, 3)})
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, {"seed": 0})
  found = checkpoints.restore({"w": struct((2, 3), jnp.float32)})
  assert found.step == 3 and not found.notes
  np.testing.assert_array_equal(found.state["w"], np.arange(6.0).reshape(2, 3))
  for wanted, message in (
    ({"w": struct((2, 3), jnp.int32)}, r"w is float32 \(2, 3\), the run needs int32 \(2, 3\)"),
    (
      {"w": struct((3, 3), jnp.float32)},
      r"does not fit this model: w is float32 \(2, 3\), the run needs float32 \(3, 3\)",
    ),
    (
      {"w": struct((2, 3), jnp.float32), "v": struct((1,), jnp.float32)},
      r"v is missing, the run needs float32 \(1,\)",
    ),
    ({}, "w is float32 \\(2, 3\\), the run needs missing"),
  ):
    with pytest.raises(WorkdirError, match=message):
      checkpoints.restore(wanted)
  checkpoints.close()
  other = Checkpoints(tmp_path, {"seed": 1})
  with pytest.raises(WorkdirError, match="seed: 0 in the checkpoint, 1 now"):
    other.restore({"w": struct((2, 3), jnp.float32)})
  other.close()


def test_non_finite_loss_stops_the_run_and_is_not_saved(tmp_path):
  code, out, err = run(tmp_path, "optim.blr=1.6e17", "optim.warmup_epochs=0.0", "optim.max_skips=3")
  assert code == 4 and err.count("\n") == 1, err
  assert (
    "step 4: " in err
    and "pixel=" in err
    and "mimic=" in err
    and "3 updates in a row were skipped" in err
  )
  assert out.count("update skipped") == 3
  assert not (tmp_path / "checkpoints" / "4").exists()


def test_check_writes_nothing(tmp_path):
  code, out, err = run(tmp_path / "absent", "--check")
  assert code == 0 and "Nothing was written" in out, err
  assert not (tmp_path / "absent").exists()


def test_one_compilation(runs):
  errors = (runs[0] / "whole.err").read_text()
  assert errors.count("Finished XLA compilation of jit(train_step)") == 1


def test_log_survives_a_torn_line_and_drops_what_is_computed_again(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo'
  )
  assert [r["step"] for r in log.read_metrics(tmp_path)] == [1, 2]
  writer = log.Log(tmp_path, 5, first_step=1)
  writer.scalars(2, {"loss": 0.25})
  writer.close()
  assert log.read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.25}]


def test_mfu_counts_every_micro_batch(monkeypatch):
  spent = {"step": 100.0, "data": 3.0, "evaluation": 7.0}
  monkeypatch.setattr(log.supervision, "seconds", lambda: dict(spent))
  chip = hardware.Chip("known", peak_flops=1e9, bandwidth=1e9, memory=1e9)
  monkeypatch.setattr(hardware, "find_chip", lambda device: chip)
  program = type("Program", (), {"cost_analysis": lambda self: {"flops": 5e6}})()
  clock = log.Clock(program, 16, 4, sharding.make_mesh(devices=jax.devices()[:1]))
  clock.start(10)
  spent.update(step=104.5, data=4.5, evaluation=90.0)
  values = clock.measure(
    12
  )  # 2 steps of 16 images in 6 seconds, a quarter of them for data; the evaluation does not count
  assert values["data_wait"] == pytest.approx(0.25)
  assert values["images_per_s"] == pytest.approx(32 / 6) and values["mfu"] == pytest.approx(
    2 * 4 * 5e6 / 6 / 1e9
  )


def test_a_chip_is_found_by_the_longest_name():
  find = lambda kind: hardware.find_chip(type("Device", (), {"device_kind": kind}))
  assert find("NVIDIA H200").peak_flops == 989e12 and find("NVIDIA L40S").name == "L40S"
  assert find("TPU v5 lite").peak_flops == 197e12 and find("TPU v5p").peak_flops == 459e12
  assert find("cpu") is None


class Objects:
  """Stands in for a bucket: whole objects by name, no appending, no renaming."""

  def __init__(self, monkeypatch):
    import fsspec
    from etils.epath import backend

    self.files = fsspec.filesystem("memory")
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: self.files)

  def names(self):
    return sorted(name.split("bucket/", 1)[1] for name in self.files.store)


def test_logs_of_a_run_in_a_bucket(monkeypatch):
  """They grow on disk and arrive in the bucket; a resumed run starts from what is there."""
  bucket = Objects(monkeypatch)
  writer = log.Log(epath.Path("gs://bucket/run"), 10)
  writer.scalars(1, {"loss": 0.5})
  writer.scalars(2, {"loss": 0.25})
  writer.text("config.json", "{}")
  assert log.read_metrics("gs://bucket/run") == []  # not yet: once a minute, and at the end
  writer.close()
  assert [r["loss"] for r in log.read_metrics("gs://bucket/run")] == [0.5, 0.25]
  names = bucket.names()
  assert {"run/metrics.jsonl", "run/config.json"} < set(names) and any(
    n.startswith("run/tensorboard/events") for n in names
  )
  writer = log.Log(epath.Path("gs://bucket/run"), 10, first_step=1)
  writer.scalars(2, {"loss": 0.125})
  writer.close()
  assert [(r["step"], r["loss"]) for r in log.read_metrics("gs://bucket/run")] == [
    (1, 0.5),
    (2, 0.125),
  ]
  assert not Path("gs:").exists()


@pytest.mark.parametrize(
  "workdir, message",
  [
    (
      "gs://bucket/run",
      r"gs://bucket/run cannot be reached \(no credentials\); it needs pip install "
      r"'mrmae_jax\[gcs\]'",
    ),
    ("s3://bucket/run", "folders on disk and gs:// buckets are supported"),
  ],
)
def test_buckets_that_cannot_be_used(monkeypatch, workdir, message):
  from etils.epath import backend

  def refuse(name):
    raise OSError("no credentials")

  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", refuse)
  with pytest.raises(WorkdirError, match=message):
    Checkpoints(workdir, {})
