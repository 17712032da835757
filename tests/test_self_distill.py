"""A teacher trained here is reproducible, blind to labels, readable by others, and informative."""

import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import mrmae_jax
from configs import teacher as recipe
from mrmae_jax import __main__ as entry
from mrmae_jax import config as config_lib
from mrmae_jax import data, preflight, sharding, teachers, train
from mrmae_jax.cli import teacher as teacher_cli
from mrmae_jax.errors import ConfigError, UsageError, WeightsError
from mrmae_jax.evals.knn import knn_classify
from mrmae_jax.mrmae import normalize
from mrmae_jax.runs.log import read_metrics
from mrmae_jax.runs.run import Run
from mrmae_jax.tasks import self_distill
from tests.helpers.specs import read_spec

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "configs" / "demo_teacher"
TINY = {
  "image_size": (16, 16),
  "batch_size": 256,
  "epochs": 0.8,  # 4 steps
  "encoder": {"patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 64},
  "distill": {"prototypes": 32},
  "optim": {"warmup_epochs": 0.2},
}


def tiny(**changes):
  config = config_lib.self_distill()
  config.update(TINY)
  config.update(changes)
  return config


def fit(config, workdir):
  return train.fit(config, self_distill.make(config), workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, configuration, task, final state) of a run whose teacher is in WORKDIR/teacher."""
  workdir, config = tmp_path_factory.mktemp("tiny"), tiny()
  task = self_distill.make(config)
  assert teacher_cli.run_teacher(config, task, workdir) == f"teacher: {workdir / 'teacher'}"
  return workdir, config, task, train.fit(config, task, workdir)


def test_the_recipe_has_the_defaults_and_that_of_photographs_is_valid():
  assert recipe.get_config().to_dict() == config_lib.self_distill().to_dict()
  photos = recipe.get_config("photos")
  with pytest.raises(ConfigError, match="config.data.source is not set"):
    preflight.check(photos, 8)
  photos.data.source = "digits"
  preflight.check(photos, 8)
  with pytest.raises(ConfigError, match="images 'videos' is not one of digits, photos"):
    recipe.get_config("videos")


def leaves(params):
  return [np.asarray(x) for x in jax.tree.leaves(params)]


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def accuracies(workdir):
  return {r["step"]: r["knn/accuracy"] for r in read_metrics(workdir) if "knn/accuracy" in r}


def test_folder_gives_the_features_of_the_trained_model(trained):
  workdir, config, task, state = trained
  folder = workdir / "teacher"
  params = self_distill.center_tokens(config, task, state)
  with safe_open(folder / "model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}
    names = set(file.keys())
    # torch's layout: (out, in)
    key = file.get_tensor("encoder.layer.1.attention.attention.key.weight")
  block = [
    f"{layer}.{kind}"
    for kind in ("weight", "bias")
    for layer in (
      "attention.attention.query",
      "attention.attention.key",
      "attention.attention.value",
      "attention.output.dense",
      "intermediate.dense",
      "output.dense",
      "layernorm_before",
      "layernorm_after",
    )
  ]
  assert names == {
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
    "layernorm.weight",
    "layernorm.bias",
    *(f"encoder.layer.{i}.{name}" for i in range(2) for name in block),
  }
  np.testing.assert_array_equal(key, params["blocks_1"]["attn"]["qkv"]["kernel"][:, 16:32].T)

  spec = read_spec(path=folder, image_size=(16, 16), token_size=8, dtype="float32")
  teacher = teachers.load(spec)
  images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
  _, out = jax.jit(spec.module.apply)({"params": params}, normalize(images, (0.5,) * 3, (0.5,) * 3))
  np.testing.assert_allclose(
    jax.jit(teacher.forward)(teacher.params, images).features, out["layers"][-1][:, 1:], atol=1e-5
  )


def test_tokens_are_centered_and_nothing_else_changes(trained):
  _, config, task, state = trained
  centered = self_distill.center_tokens(config, task, state)
  extra = {"teacher": {"encoder": centered}}
  images = np.stack([task.views.eval(task.source("train")[i], None)["image"] for i in range(1438)])
  features = jax.jit(task.predict)((), extra, (), {"image": images}, None)["features"]
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
  before = state.extra["teacher"]["encoder"]
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, centered)
  assert changed["blocks_1"]["fc2"]["bias"] and sum(jax.tree.leaves(changed)) == 1


def test_the_log_has_the_accuracy_before_and_after(trained):
  found = accuracies(trained[0])
  assert set(found) == {0, 4} and all(0 < value <= 1 for value in found.values())


def test_the_command_given_again_writes_the_folder_again_whole_or_not_at_all(trained, monkeypatch):
  workdir, config, task, _ = trained
  weights = workdir / "teacher" / "model.safetensors"
  before = weights.read_bytes()
  weights.unlink()
  teacher_cli.run_teacher(config, task, workdir)
  assert weights.read_bytes() == before

  def fail(*args):
    raise OSError("the disk is full")

  monkeypatch.setattr(teacher_cli, "verify_folder", fail)
  with pytest.raises(OSError, match="the disk is full"):
    teacher_cli.run_teacher(config, task, workdir)
  assert weights.read_bytes() == before
  assert not list(workdir.glob(".teacher*"))


def test_other_files_are_not_replaced(trained, tmp_path):
  (tmp_path / "photo.png").touch()
  for out, message in (
    (tmp_path, "holds photo.png"),
    (tmp_path / "photo.png", "is a file"),
    ("gs://bucket/teacher", "in a bucket"),
  ):
    with pytest.raises(UsageError, match=message):
      teacher_cli.run_teacher(*trained[1:3], trained[0], str(out))
  with pytest.raises(UsageError, match="--out is missing and --workdir=gs://bucket/run"):
    teacher_cli.find_folder(None, "gs://bucket/run")


def test_a_run_of_self_distillation_is_not_taken_for_a_student(trained):
  workdir = trained[0]
  with pytest.raises(WeightsError, match=f"the folder {workdir}/teacher"):
    mrmae_jax.load(workdir)
  path = f"checkpoint:{workdir}"
  with pytest.raises(WeightsError, match=f"teacher.path={workdir}/teacher"):
    read_spec(path=path, image_size=(16, 16), token_size=8)


class ShuffledLabels:
  def __init__(self, source):
    self.given = 0
    self._source, self._labels = source, np.random.default_rng(0).integers(0, 10, len(source))

  def __len__(self):
    return len(self._source)

  def __getattr__(self, name):
    return getattr(self._source, name)

  def __getitem__(self, index):
    self.given += 1
    return self._source[index] | {"label": int(self._labels[index])}


def test_training_moves_the_weights(trained):
  _, _, task, state = trained
  fresh, _ = jax.jit(task.init)(jax.random.key(0))
  fc1 = lambda params: leaves(params["encoder"]["blocks_0"]["fc1"])
  assert not any(np.array_equal(a, b) for a, b in zip(fc1(state.params), fc1(fresh)))


@pytest.mark.variant
def test_another_seed_gives_other_weights(trained, tmp_path):
  other = fit(tiny(seed=1, evals={}), tmp_path)
  assert not equal(trained[3].extra["teacher"], other.extra["teacher"])


def test_a_run_that_died_resumes_bit_for_bit_and_labels_have_no_influence(
  trained, tmp_path, monkeypatch
):
  config, shuffled = tiny(checkpoint_every=0.178, evals={}), []  # saved after every step
  open_split = data.open_split

  def open_shuffled(*args):
    shuffled.append(ShuffledLabels(open_split(*args)))
    return shuffled[-1]

  def die(run, step):
    if step == 2:
      raise RuntimeError("killed")

  monkeypatch.setattr(data, "open_split", open_shuffled)
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
    patch.setattr(Run, "evaluate_if_due", die)
    fit(config, tmp_path)
  assert [r["step"] for r in read_metrics(tmp_path) if "loss" in r][-1] < 3
  assert equal(trained[3], fit(config, tmp_path))
  assert any(source.given for source in shuffled)  # the task did read shuffled labels


@pytest.mark.variant
def test_same_numbers_on_one_and_eight_devices():
  # The gradient of the keys' biases is zero. A small epsilon would scale its rounding errors up.
  config = tiny()
  config.optim.eps = 1e-3
  task = self_distill.make(config)
  batches = data.train_batches(
    task.source("train"), task.views.train, seed=0, batch_size=config.batch_size
  )
  batches, loader = [next(batches) for _ in range(3)], batches
  loader.close()
  results = []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.make_mesh(devices=devices)
    plan = train.make_plan(config, task, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, plan.state)
    state = jax.jit(plan.init, out_shardings=shardings)(jax.random.key(0), {})
    losses = []
    for batch in batches:
      state, metrics = plan.step(state, (), sharding.global_batch(batch, mesh))
      losses.append(metrics["loss"])
    results.append(jax.device_get((losses, state.params, state.extra)))
  for one, eight in zip(*map(leaves, results), strict=True):
    np.testing.assert_allclose(one, eight, atol=1e-5)


def test_views_of_a_folder(tmp_path):
  rng = np.random.default_rng(0)
  for i, size in enumerate([(40, 30), (25, 60), (33, 33)]):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
  source = data.open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  config = tiny()
  config.data.flip = True
  views = pickle.loads(pickle.dumps(data.pair_views(config)))

  def read(seed):
    batches = data.train_batches(source, views.train, seed=seed, batch_size=2)
    images = [next(batches)["image"] for _ in range(2)]
    batches.close()
    return images

  first, again, other = read(0), read(0), read(1)
  assert [x.shape for x in first] == [(2, 2, 16, 16, 3)] * 2 and first[0].dtype == np.uint8
  assert np.array_equal(first, again) and not np.array_equal(first, other)
  assert not np.array_equal(first[0], first[1])
  for a, b in first[0]:  # two crops, not one crop and its mirror image
    assert not np.array_equal(a, b) and not np.array_equal(a[:, ::-1], b)
  assert views.eval(source[0], None)["image"].shape == (16, 16, 3)


def test_loss_is_least_where_the_views_agree():
  # [2 views, 3 images, 4 prototypes]
  assigned = jax.nn.one_hot(jnp.array([[0, 1, 2], [0, 1, 2]]), 4)
  crossed = assigned[:, ::-1]
  loss = lambda student, teacher: self_distill.dino_loss(student, teacher, jnp.zeros(4), 0.04, 0.1)
  assert loss(assigned, assigned) < 1e-3 < 1 < loss(crossed, assigned)
  # Each view is compared with the other one: views that differ cost, even if every view agrees with
  # itself.
  apart = jnp.stack([assigned[0], crossed[0]])
  assert loss(apart, apart) > 1


def test_contrast_by_its_definition():
  rng = np.random.default_rng(0)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.standard_normal((2, 2, 5, 3)))
  expected = []
  for view in range(2):
    similarity = np.exp(q[view] @ k[1 - view].T / 0.2)
    expected += list(-np.log(np.diag(similarity) / similarity.sum(1)))
  loss = self_distill.contrast_loss
  np.testing.assert_allclose(loss(q, k, 0.2), np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(loss(q * 0, k, 0.2), np.log(5), rtol=1e-5)


def test_the_teacher_and_the_center_follow_and_prototypes_rest_in_the_first_epoch():
  config = tiny(batch_size=8)
  task = self_distill.make(config)
  params, extra = jax.jit(task.init)(jax.random.key(0))
  student = jax.tree.map(lambda x: x + 0.1, params)
  batch = {"image": np.random.default_rng(0).integers(0, 256, (8, 2, 16, 16, 3), np.uint8)}
  keys = jax.random.split(jax.random.key(1), 8)
  grad = jax.jit(jax.grad(task.loss, has_aux=True))
  per_epoch, total = 1438 / 8, round(0.8 * 1438 / 8)
  for step, moves in ((1, False), (int(per_epoch), False), (int(per_epoch) + 1, True)):
    grads, (_, new) = grad(student, extra | {"step": jnp.int32(step)}, (), batch, keys)
    assert np.any(grads["head"]["prototypes"]) == moves and np.any(grads["head"]["fc3"])
    momentum = 1 - 0.02 * 0.5 * (1 + np.cos(np.pi * (step - 1) / total))
    follow = lambda t, s: momentum * t + (1 - momentum) * s
    expected = jax.tree.map(follow, params, student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new["teacher"], expected)
    assert new["step"] == step + 1
    # Mean cosines of the teacher's projections, a tenth of them.
    assert 0 < np.abs(new["center"]).max() < 0.1
  assert self_distill.teacher_momentum(0.98, total, total) == 1


@pytest.mark.variant
def test_a_teacher_by_contrast(trained, tmp_path):
  config = tiny(evals={}, distill={"objective": "contrast", "color": 0.4})
  state = fit(config, tmp_path)
  assert all(np.isfinite(x).all() for x in leaves(state.params))
  assert "prototypes" not in state.params["head"]
  teacher = lambda state: state.extra["teacher"]["encoder"]
  assert not equal(teacher(state), teacher(trained[3]))


def test_colors_turn_and_brightness_stays():
  # far from black and white: nothing is clipped
  images = np.random.default_rng(0).integers(110, 146, (64, 8, 8, 3), np.uint8)
  keys = jax.random.split(jax.random.key(0), 64)
  plain, turned = (
    np.asarray(jax.vmap(lambda k, x: self_distill.augment_colors(k, x, 0.0, color))(keys, images))
    for color in (0.0, 0.4)
  )
  brightness = self_distill.YIQ[0]
  np.testing.assert_allclose(plain @ brightness, turned @ brightness, atol=0.03)
  grey = np.ptp(plain, axis=-1).max((1, 2)) < 1e-5
  change = np.abs(plain - turned).max((1, 2, 3))
  assert 0.05 < grey.mean() < 0.4
  assert np.ptp(turned[grey], axis=-1).max() < 1e-5
  assert change[~grey].min() > 5e-3


@pytest.mark.parametrize(
  "arguments, code, message",
  [
    (["--config.image_size=(30, 30)"], 2, "not a multiple of the token size 8"),
    (["--config.encoder.num_heads=3"], 2, "num_heads=3"),
    (["--config.batch_size=1"], 2, "batch_size=1 must be 2 or more"),
    (["--config.optim.accum_steps=2"], 2, "the projection head normalizes over the batch"),
    (["--config.encoder.learned_positions=False"], 2, "as in Hugging Face's ViT"),
    (["--config.distill.colour=1"], 2, "config.distill.color"),
    (["--config.distill.color=2"], 2, "config.distill.color=2"),
    (["--config.distill.visible=0.1"], 2, "must leave one of 4 patches"),
    (["--config.distill.objective=clip"], 2, "objective"),
    (["surplus"], 2, "'surplus' is not an option"),
    (["--config.data.source=nowhere"], 2, "'nowhere' given"),
    pytest.param(
      ["--config.optim.blr=1e20", "--config.optim.max_skips=1"],
      4,
      "grad_norm=nan",
      marks=pytest.mark.variant,
    ),
  ],
)
def test_errors_are_one_line(arguments, code, message, tmp_path, capsys):
  keys = config_lib.flatten(config_lib.ConfigDict(TINY))
  names = {word.split("=")[0] for word in arguments}
  words = [f"--config.{name}={keys[name]}" for name in keys if f"--config.{name}" not in names]
  command = ["mrmae", "teacher", "--config=teacher", f"--workdir={tmp_path}/run"]
  assert entry.main([*command, *words, *arguments]) == code
  lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error:")]
  # One image is no batch for the eight devices of the tests either.
  assert len(lines) == 1 or "--config.batch_size=1" in arguments
  assert message in lines[0]
  assert not (tmp_path / "run" / "teacher").exists()


@pytest.fixture(scope="module")
def bundled():
  spec = read_spec(path=BUNDLED, image_size=(32, 32), token_size=4, dtype="float32")
  splits = []
  for split in ("train", "eval"):
    source = data.open_source("digits", split, holdout_every=5)
    examples = [source[i] for i in range(len(source))]
    splits.append(
      (np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples]))
    )
  return spec, teachers.load(spec), splits


def features(teacher, params, images):
  apply = jax.jit(teacher.forward)
  return np.concatenate([apply(params, part).features for part in np.array_split(images, 8)])


def test_bundled_teacher_is_small_and_of_the_default_size(bundled):
  spec, teacher, _ = bundled
  assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 2e6
  assert spec.mean == spec.std == (0.5, 0.5, 0.5) and spec.grid == (8, 8)
  stored = json.loads((BUNDLED / "config.json").read_text())
  config = config_lib.self_distill()
  assert config.image_size == (stored["image_size"],) * 2
  for key, theirs in (
    ("patch_size", "patch_size"),
    ("dim", "hidden_size"),
    ("depth", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("mlp_dim", "intermediate_size"),
  ):
    assert config.encoder[key] == stored[theirs]


@pytest.mark.variant
def test_bundled_teacher_knows_digits_it_has_not_seen(bundled):
  spec, teacher, ((bank, bank_labels), (queries, labels)) = bundled
  random = spec.module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  # The sine-cosine table, from which training starts, knows something already: without it, noise.
  shape = random["pos_embed"].shape
  random = random | {"pos_embed": 0.02 * jax.random.normal(jax.random.key(1), shape)}

  def accuracy(params):
    means = [features(teacher, params, x).mean(1) for x in (queries, bank)]
    return (knn_classify(*means, bank_labels, 10, (20,), 0.07)[20] == labels).mean()

  trained, untrained = accuracy(teacher.params), accuracy(random)
  # Measured: 0.916 and 0.50.
  assert trained > 0.88 and untrained < 0.7, (trained, untrained)


def test_bundled_patch_features_are_not_collapsed(bundled):
  _, teacher, (_, (queries, _)) = bundled
  found = features(teacher, teacher.params, queries)  # [359, 64, D]
  total = found.var((0, 1)).sum()
  assert (
    np.square(found.mean((0, 1))).sum() < 0.05 * total
  )  # centred: what all tokens share would drown the rest
  assert found.mean(1).var(0).sum() > 0.05 * total  # images differ
  assert found.var(1).mean(0).sum() > 0.05 * total  # patches of an image differ
  # The same place in different images differs too: it is not the position alone.
  assert found.var(0).mean(0).sum() > 0.2 * total


@pytest.mark.torch
def test_transformers_reads_it_too(bundled):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  spec, teacher, (_, (queries, _)) = bundled
  model = transformers.ViTModel.from_pretrained(BUNDLED, add_pooling_layer=False).eval()
  x = np.asarray(normalize(queries[:8], spec.mean, spec.std))
  with torch.no_grad():
    out = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
  y, ours = spec.module.apply({"params": teacher.params}, x)
  np.testing.assert_allclose(
    ours["layers"][-1], out.hidden_states[-1].numpy(), atol=1e-5, rtol=1e-5
  )
  np.testing.assert_allclose(y, out.last_hidden_state.numpy(), atol=1e-5, rtol=1e-5)
