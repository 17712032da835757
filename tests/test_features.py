"""`mrmae_jax.load` and mrmae features: any size, any type of image, every image once."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mrmae_jax
from mrmae_jax import data
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.weights import readers, writers
from tests.helpers.cli import run_command
from tests.helpers.models import make_student


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  """Files of a ConvViT with 8-pixel tokens and of two ViTs with 4-pixel tokens and trained
  positions.

  One of the ViTs is fine-tuned.
  """
  folder = tmp_path_factory.mktemp("models")
  convvit, vit = (
    ConvViT((2, 2, 2), (8, 12, 16), (1, 1, 1), 2, (2.0, 2.0, 2.0)),
    ViT(4, 16, 1, 2, 32, learned_positions=True),
  )
  paths = {}
  for name, student, form in (
    ("convvit", make_student(convvit, None), "convmae"),
    ("vit", make_student(vit, None), "timm"),
    ("finetuned", make_student(vit, None, classes=3, has_norm=False), "timm"),
  ):
    paths[name] = folder / f"{name}.safetensors"
    writers.write_model(student, paths[name], form)
  return paths


def test_any_size_and_type(paths):
  rng = np.random.default_rng(0)
  for name, token in (("convvit", 8), ("vit", 4)):
    model = mrmae_jax.load(paths[name])
    assert model.config["image_size"] == (3 * token, 5 * token) and model.config["classes"] == 0
    for height, width in ((24, 40), (8, 16)):
      images = rng.integers(0, 256, (2, height, width, 3), np.uint8)
      features = model.encode(images)
      count = height // token * (width // token)
      assert features["tokens"].shape == (2, count, 16) and features["pooled"].shape == (2, 16)
      assert {key: x.shape[1:] for key, x in features.items() if key.startswith("stage")} == (
        {"stage1": (height // 2, width // 2, 8), "stage2": (height // 4, width // 4, 12)}
        if name == "convvit"
        else {}
      )
      assert ("cls" in features) == (name == "vit") and all(
        x.dtype == jnp.float32 for x in features.values()
      )
      np.testing.assert_allclose(features["tokens"].mean(1), features["pooled"], atol=1e-5)
      for same in (
        images.astype(np.float32) / 255,
        images.astype(np.float64) / 255,
        jnp.asarray(images),
      ):
        np.testing.assert_allclose(model.encode(same)["tokens"], features["tokens"], atol=1e-5)


def test_lists_and_arrays_of_every_library_are_taken(paths):
  model = mrmae_jax.load(paths["vit"])
  images = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 3), np.uint8)
  pixels = (images / 255).astype(np.float32)
  expected = model.encode(images)["pooled"]
  pictures = [Image.fromarray(image) for image in images]
  for same in (list(images), tuple(map(jnp.asarray, images)), pictures, pixels.tolist()):
    np.testing.assert_allclose(model.encode(same)["pooled"], expected, atol=1e-5)
  gray = Image.fromarray(images[0, :, :, 0])
  np.testing.assert_allclose(
    model.encode([gray])["pooled"],
    model.encode(np.repeat(images[:1, :, :, :1], 3, axis=3))["pooled"],
    atol=1e-5,
  )
  assert jax.jit(lambda x: model.encode(x)["pooled"])(pixels).shape == expected.shape


def test_images_are_normalised_with_what_the_file_says(paths):
  student = readers.read_model(paths["vit"])
  model, images = (
    mrmae_jax.load(paths["vit"]),
    np.random.default_rng(0).random((2, 12, 20, 3), np.float32),
  )
  assert model.config["mean"] == (0.1, 0.2, 0.3)
  pixels = (images - np.float32([0.1, 0.2, 0.3])) / np.float32([0.4, 0.5, 0.6])
  expected, _ = student.encoder.apply({"params": student.params["encoder"]}, pixels)
  np.testing.assert_allclose(model.encode(images)["tokens"], expected[:, 1:], atol=1e-5)
  np.testing.assert_allclose(model.encode(images)["cls"], expected[:, 0], atol=1e-5)


def test_each_shape_is_compiled_once(paths):
  model = mrmae_jax.load(paths["vit"])
  for shape in ((2, 8, 8, 3), (2, 8, 8, 3), (3, 8, 8, 3), (2, 8, 8, 3)):
    model.encode(np.zeros(shape, np.uint8))
  assert model._encode._cache_size() == 2


def test_a_fine_tuned_vit(paths):
  model = mrmae_jax.load(paths["finetuned"])
  student, images = (
    model.network,
    np.random.default_rng(0).integers(0, 256, (2, 12, 20, 3), np.uint8),
  )
  pixels = (images / np.float32(255) - np.float32(student.mean)) / np.float32(student.std)
  _, out = student.encoder.apply({"params": student.params["encoder"]}, pixels)
  x = np.asarray(out["layers"][-1][:, 1:].mean(1))
  np.testing.assert_allclose(
    model.encode(images)["pooled"], x, atol=1e-5
  )  # no norm that nobody has trained
  norm, head = student.params["classifier"]["fc_norm"], student.params["classifier"]["head"]
  x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6) * norm[
    "scale"
  ] + norm["bias"]
  np.testing.assert_allclose(model.classify(images), x @ head["kernel"] + head["bias"], atol=1e-4)
  assert model.config["classes"] == 3


@pytest.mark.parametrize(
  "images, message",
  [
    (np.zeros((2, 12, 10, 3), np.uint8), "multiples of the token size 8"),
    (np.zeros((8, 8, 3), np.uint8), r"expected \[B, H, W, 3\]"),
    (np.zeros((1, 3, 8, 8), np.uint8), r"expected \[B, H, W, 3\]"),
    (np.zeros((0, 8, 8, 3), np.uint8), "B > 0"),
    (np.zeros((1, 8, 8, 3), np.int32), "expected uint8, or float"),
    (np.full((1, 8, 8, 3), 200.0), "divide by 255 first"),
    (jnp.full((1, 8, 8, 3), 200.0), "divide by 255 first"),
    ([np.full((8, 8, 3), 200.0)], "divide by 255 first"),
    (jnp.full((1, 8, 8, 3), -1.0), "before normalization"),
    (jnp.full((1, 8, 8, 3), jnp.nan), "some values are not numbers"),
    (jnp.zeros((1, 8, 8, 3), jnp.int32), "expected uint8, or float"),
    (np.zeros((1, 8, 8, 3), np.uint8).tolist(), "expected uint8, or float"),
    (np.zeros((1, 3, 8, 8), np.float32), "put the channels last"),
    (np.zeros((8, 8, 3), np.uint8), r"of one image make a batch: images\[None\]"),
    (Image.new("RGB", (8, 8)), r"put it into a list, \[image\]"),
    ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], "resize them to one size"),
    ([Image.new("I", (8, 8))], "no defined range: give"),
    ("photo.jpg", "open files with PIL.Image.open"),
    (["a.jpg", "b.jpg"], "open files with PIL.Image.open"),
    (None, "NoneType given; expected an array"),
  ],
)
def test_what_is_no_batch_of_images(paths, images, message):
  with pytest.raises(ValueError, match=message) as caught:
    mrmae_jax.load(paths["convvit"]).encode(images)
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Seven images of different sizes in two classes."""
  root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
  for i in range(7):
    (root / "ab"[i % 2]).mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (30 + i, 50 - i, 3), np.uint8)).save(
      root / "ab"[i % 2] / f"{i}.png"
    )
  return root


def expected(path, folder, size, crop):
  """Names, labels and features one image at a time."""
  model, source = (
    mrmae_jax.load(path),
    data.open_source(f"folder:{folder}", "train", holdout_every=0),
  )
  batches = data.eval_batches(source, data.center_view(size, crop), batch_size=1)
  rows = [
    (source[i]["name"], int(b["label"][0]), np.asarray(model.encode(b["image"])["pooled"][0]))
    for i, b in enumerate(batches)
  ]
  return [np.stack(column) if i == 2 else list(column) for i, column in enumerate(zip(*rows))]


@pytest.mark.parametrize(
  "batch_size", [7, *(pytest.param(n, marks=pytest.mark.variant) for n in (3, 16))]
)
def test_every_image_once(paths, folder, tmp_path, batch_size, capsys):
  names, labels, vectors = expected(paths["convvit"], folder, (24, 40), 0.875)
  for out in ("x.npz", "x.parquet"):
    assert (
      run_command(
        [
          "features",
          f"--model={paths['convvit']}",
          f"--images=folder:{folder}",
          f"--out={tmp_path / out}",
          f"--batch_size={batch_size}",
        ]
      )
      == 0
    )
  assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz", "x.parquet"]
  printed = capsys.readouterr()
  assert (
    "pooled features of 7 images at 24x40" in printed.out
    and "encoder-only" in printed.out
    and "7/7" in printed.err
  )
  table, archive = pq.read_table(tmp_path / "x.parquet"), np.load(tmp_path / "x.npz")
  assert len(set(names)) == 7 and names == archive["names"].tolist() == table["name"].to_pylist()
  assert labels == archive["labels"].tolist() == table["label"].to_pylist()
  assert archive["class_names"].tolist() == ["a", "b"] and table["class_name"].to_pylist() == [
    "ab"[i] for i in labels
  ]
  np.testing.assert_allclose(archive["features"], vectors, atol=1e-5)
  np.testing.assert_allclose(table["feature"].to_pylist(), vectors, atol=1e-5)
  assert archive["features"].dtype == np.float32 and np.abs(np.diff(vectors, axis=0)).max() > 1e-2


def test_cls_size_and_unlabelled_images(paths, folder, tmp_path):
  assert (
    run_command(
      [
        "features",
        f"--model={paths['vit']}",
        f"--images=folder:{folder / 'a'}",
        f"--out={tmp_path}/x.npz",
        "--feature=cls",
        "--image_size=16",
        "--crop=1",
      ]
    )
    == 0
  )
  archive, model = np.load(tmp_path / "x.npz"), mrmae_jax.load(paths["vit"])
  batch = next(
    data.eval_batches(
      data.open_source(f"folder:{folder / 'a'}", "train", holdout_every=0),
      data.center_view((16, 16), 1.0),
      batch_size=4,
    )
  )
  np.testing.assert_allclose(archive["features"], model.encode(batch["image"])["cls"], atol=1e-5)
  assert archive["labels"].tolist() == [-1] * 4 and archive["class_names"].size == 0


def test_tokens_maps_and_rectangular_sizes(paths, folder, tmp_path, capsys):
  images = ["--images=folder:" + str(folder), "--image_size=16,24", "--crop=1", "--batch_size=4"]
  batches = data.eval_batches(
    data.open_source(f"folder:{folder}", "train", holdout_every=0),
    data.center_view((16, 24), 1.0),
    batch_size=7,
  )
  expected = mrmae_jax.load(paths["convvit"]).encode(next(batches)["image"])
  for feature, shape in (("tokens", (6, 16)), ("stage1", (8, 12, 8)), ("stage2", (4, 6, 12))):
    words = [f"--model={paths['convvit']}", f"--feature={feature}", *images]
    for suffix in ("npz", "parquet") if feature == "stage2" else ("npz",):
      assert run_command(["features", *words, f"--out={tmp_path}/x.{suffix}"]) == 0
    stored = np.load(tmp_path / "x.npz")["features"]
    assert stored.shape == (7, *shape)
    np.testing.assert_allclose(stored, expected[feature], atol=1e-5)
  table = pq.read_table(tmp_path / "x.parquet")
  assert json.loads(table.schema.metadata[b"shape"]) == [4, 6, 12]
  rows = np.array(table["feature"].to_pylist()).reshape(7, 4, 6, 12)
  np.testing.assert_allclose(rows, stored, atol=1e-6)
  files = [f"--{name}={tmp_path}/x.npz" for name in ("train", "eval")]
  assert run_command(["knn", *files, f"--out={tmp_path}/x.json"]) == 2
  assert "one vector an image is expected" in capsys.readouterr().err


def test_statistics_of_the_input_can_be_given(paths, folder, tmp_path, capsys):
  words = ["features", "--model=pixels", f"--images=folder:{folder}", f"--out={tmp_path}/x.npz"]
  assert run_command([*words, "--mean=0.5", "--std=0.25", "--image_size=8,4"]) == 0
  pixels = np.load(tmp_path / "x.npz")["features"]
  assert pixels.shape == (7, 32) and pixels.min() >= -2 and pixels.max() <= 2
  assert run_command([*words, "--mean=0.5"]) == 2
  assert "--mean and --std must have a number for each channel" in capsys.readouterr().err
  words = [words[0], f"--model={paths['vit']}", *words[2:], "--feature=stage1"]
  assert run_command(words) == 2
  assert "the model has no such stage; use tokens" in capsys.readouterr().err


def test_parquet_without_pyarrow(paths, folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  command = ["features", f"--model={paths['convvit']}", f"--images=folder:{folder}"]
  assert (
    run_command([*command, f"--out={tmp_path}/x.parquet"]) == 2
    and "needs pyarrow" in capsys.readouterr().err
  )
  assert run_command([*command, f"--out={tmp_path}/x.npz"]) == 0


def test_errors_leave_no_file(paths, folder, tmp_path, capsys):
  (tmp_path / "photos").mkdir()
  for name in ("a.png", "b.png"):
    (tmp_path / "photos" / name).write_bytes((folder / "a" / "0.png").read_bytes())
  (tmp_path / "photos" / "b.png").write_bytes(b"no image")
  good = {"model": paths["convvit"], "images": f"folder:{folder}", "out": tmp_path / "x.npz"}
  for change, code, message in (
    ({"model": ""}, 2, "--model is missing"),
    ({"out": tmp_path / "x.csv"}, 2, "must end in .npz or .parquet"),
    ({"image_size": 20}, 2, "not a multiple of the model's token size 8"),
    ({"feature": "cls"}, 2, "has no CLS token"),
    ({"model": tmp_path / "none"}, 2, "no such file or folder"),
    ({"images": "folder:/none"}, 3, "does not exist"),
    ({"size": 3}, 2, "size"),
    ({"batch_size": 0}, 2, "'0' given"),
    ({"images": f"folder:{tmp_path}/photos"}, 3, "b.png"),
    (
      {"images": f"folder:{tmp_path}/photos", "out": tmp_path / "x.parquet", "batch_size": 1},
      3,
      "b.png",
    ),
  ):
    assert (
      run_command(["features", *(f"--{key}={value}" for key, value in (good | change).items())])
      == code
    )
    error = [
      line
      for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
      if line.startswith("error:")
    ]
    assert len(error) == 1 and message in error[0]
  assert [p.name for p in tmp_path.iterdir()] == ["photos"]
