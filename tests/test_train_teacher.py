"""A teacher trained here is what the tool says it is: reproducible, blind to labels, readable by others, and informative."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from mrmae_jax import data, teachers
from mrmae_jax.cli import teacher as teacher_cli
from mrmae_jax.evals.knn import knn_classify
from mrmae_jax.mrmae import normalise
from tests.helpers.specs import read_spec

BUNDLED = Path(__file__).parent.parent / "configs" / "demo_teacher"
TINY = dict(
  image_size=16, patch_size=8, width=16, depth=2, heads=2, prototypes=32, batch_size=256, epochs=0.8
)  # 4 steps


def options(**changes):
  own = teacher_cli.define_flags()
  own(["test"] + [f"--{name}={value}" for name, value in (TINY | changes).items()])
  return SimpleNamespace(**own.flag_values_dict())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny") / "teacher"
  return folder, *teacher_cli.train(options(out=folder))


def leaves(params):
  return [np.asarray(x) for x in jax.tree.leaves(params)]


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_folder_gives_the_features_of_the_trained_model(trained):
  folder, vit, params, history = trained
  teacher_cli.save(folder, vit, params, 16)
  with safe_open(folder / "model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}
    names = set(file.keys())
    key = file.get_tensor(
      "encoder.layer.1.attention.attention.key.weight"
    )  # torch's layout: (out, in)
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

  teacher = teachers.load(
    read_spec(path=folder, image_size=(16, 16), token_size=8, dtype="float32")
  )
  images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
  _, out = vit.apply({"params": params}, normalise(images, (0.5,) * 3, (0.5,) * 3))
  np.testing.assert_allclose(
    teacher.forward(teacher.params, images).features, out["layers"][-1][:, 1:], atol=1e-5
  )
  assert set(history) == {0, 0.8} and all(
    0 < value <= 1 for row in history.values() for value in row.values()
  )


class ShuffledLabels:
  def __init__(self, source):
    self._source, self._labels = source, np.random.default_rng(0).integers(0, 10, len(source))
    self.class_names, self.description = source.class_names, source.description

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._source[index] | {"label": int(self._labels[index])}


def test_same_seed_same_weights_and_labels_have_no_influence(trained, monkeypatch):
  _, vit, params, history = trained
  fresh = vit.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  assert not any(
    np.array_equal(a, b)
    for a, b in zip(leaves(params["blocks_0"]["fc1"]), leaves(fresh["blocks_0"]["fc1"]))
  )
  open_source = data.open_source
  monkeypatch.setattr(
    data, "open_source", lambda *args, **kw: ShuffledLabels(open_source(*args, **kw))
  )
  _, again, shuffled_history = teacher_cli.train(options(out="unused"))
  assert (
    shuffled_history[0]["patch"] < 0.25 < history[0]["patch"]
  )  # the shuffling did reach the tool
  assert equal(params, again)


def test_another_seed_gives_other_weights(trained):
  assert not equal(trained[2], teacher_cli.train(options(out="unused", seed=1))[1])


def test_views_of_a_folder(tmp_path):
  rng = np.random.default_rng(0)
  for i, size in enumerate([(40, 30), (25, 60), (33, 33)]):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
  source = data.open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  first, again, other = (
    list(
      teacher_cli.view_batches(source, options(out="", batch_size=2, flip=True, seed=seed), 1, 2)
    )
    for seed in (0, 0, 1)
  )
  assert [x.shape for x in first] == [(2, 2, 16, 16, 3)] * 2 and first[0].dtype == np.uint8
  assert np.array_equal(first, again) and not np.array_equal(first, other)
  assert not np.array_equal(first[0], first[1])
  for a, b in zip(*first[0]):  # two crops, not one crop and its mirror image
    assert not np.array_equal(a, b) and not np.array_equal(a[:, ::-1], b)


def test_loss_is_least_where_the_views_agree():
  assigned = jax.nn.one_hot(
    jnp.array([[0, 1, 2], [0, 1, 2]]), 4
  )  # [2 views, 3 images, 4 prototypes]
  crossed = assigned[:, ::-1]
  agree, mean = teacher_cli.dino_loss(assigned, assigned, jnp.zeros(4), 0.04)
  differ, _ = teacher_cli.dino_loss(crossed, assigned, jnp.zeros(4), 0.04)
  assert agree < 1e-3 < 1 < differ
  np.testing.assert_allclose(mean, [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
  # Each view is compared with the other one: views that differ cost, even if every view agrees with itself.
  apart = jnp.stack([assigned[0], crossed[0]])
  assert teacher_cli.dino_loss(apart, apart, jnp.zeros(4), 0.04)[0] > 1


def test_contrast_by_its_definition():
  rng = np.random.default_rng(0)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.standard_normal((2, 2, 5, 3)))
  expected = []
  for view in range(2):
    similarity = np.exp(q[view] @ k[1 - view].T / 0.2)
    expected += list(-np.log(np.diag(similarity) / similarity.sum(1)))
  np.testing.assert_allclose(teacher_cli.contrast_loss(q, k, 0.2), np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(teacher_cli.contrast_loss(q * 0, k, 0.2), np.log(5), rtol=1e-5)


def test_a_teacher_by_contrast():
  _, params, history = teacher_cli.train(options(out="unused", objective="contrast", colour=0.4))
  assert all(np.isfinite(x).all() for x in leaves(params)) and set(history) == {0, 0.8}
  _, other, _ = teacher_cli.train(options(out="unused", objective="dino", colour=0.4))
  assert not equal(params, other)


def test_colours_turn_and_brightness_stays():
  images = np.random.default_rng(0).integers(
    110, 146, (64, 8, 8, 3), np.uint8
  )  # far from black and white: nothing is clipped
  plain, turned = (
    np.asarray(teacher_cli.photometric(jax.random.key(0), images, 0.0, colour))
    for colour in (0.0, 0.4)
  )
  np.testing.assert_allclose(plain @ teacher_cli.YIQ[0], turned @ teacher_cli.YIQ[0], atol=0.03)
  grey = np.ptp(plain, axis=-1).max((1, 2)) < 1e-5
  change = np.abs(plain - turned).max((1, 2, 3))
  assert (
    0.05 < grey.mean() < 0.4
    and np.ptp(turned[grey], axis=-1).max() < 1e-5
    and change[~grey].min() > 5e-3
  )


@pytest.mark.parametrize(
  "arguments, code, message",
  [
    (["--out="], 2, "--out is missing"),
    (["--image_size=30"], 2, "--image_size=30 is not a multiple of --patch_size=8"),
    (["--heads=3"], 2, "--heads=3"),
    (["--batch_size=2000"], 2, "more than the 1438 training images"),
    (["--color=1"], 2, "color"),
    (["--colour=2"], 2, "--colour"),
    (["--objective=clip"], 2, "objective"),
    (["surplus"], 2, "'surplus' is not an option"),
    (["--source=nowhere"], 3, "'nowhere' given"),
    (["--lr=1e30"], 2, "the loss is nan"),
  ],
)
def test_errors_are_one_line(arguments, code, message, tmp_path, capsys):
  tiny = [f"--{name}={value}" for name, value in TINY.items()]
  assert teacher_cli.main(["train_teacher", f"--out={tmp_path / 'out'}", *tiny, *arguments]) == code
  lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error:")]
  assert len(lines) == 1 and message in lines[0]
  assert not (tmp_path / "out").exists()


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
  defaults, config = teacher_cli.define_flags(), json.loads((BUNDLED / "config.json").read_text())
  for flag, key in (
    ("image_size", "image_size"),
    ("patch_size", "patch_size"),
    ("width", "hidden_size"),
    ("depth", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
  ):
    assert defaults[flag].default == config[key]


def test_bundled_teacher_knows_digits_it_has_not_seen(bundled):
  spec, teacher, ((bank, bank_labels), (queries, labels)) = bundled
  random = spec.module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  # A fresh table is the sine-cosine one, with which even random weights know 75 % of the digits.
  table = random["pos_embed"]
  random["pos_embed"] = 0.02 * jax.random.normal(jax.random.key(1), table.shape)

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
  x = np.asarray(normalise(queries[:8], spec.mean, spec.std))
  with torch.no_grad():
    out = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
  y, ours = spec.module.apply({"params": teacher.params}, x)
  np.testing.assert_allclose(
    ours["layers"][-1], out.hidden_states[-1].numpy(), atol=1e-5, rtol=1e-5
  )
  np.testing.assert_allclose(y, out.last_hidden_state.numpy(), atol=1e-5, rtol=1e-5)
