"""Fine-tuned models on labelled and other images: averages by definition, each model at its own
size, classes told by name.
"""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mrmae_jax
from mrmae_jax import data
from mrmae_jax.cli import classifiers, evaluate, images
from mrmae_jax.errors import DataError
from mrmae_jax.models import ViT
from mrmae_jax.weights import writers
from tests import tiny
from tests.helpers.cli import parse_options, run_command
from tests.helpers.models import make_student


def test_averages_by_definition():
  rng = np.random.default_rng(0)
  logits = [rng.standard_normal((40, 6)) * scale for scale in (1, 2, 10)]
  softmax = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
  mean = lambda xs: (xs[0] + xs[1] + xs[2]) / 3
  combine = classifiers.combine
  np.testing.assert_allclose(combine(logits, "probabilities"), mean([softmax(x) for x in logits]))
  np.testing.assert_allclose(combine(logits, "logits"), softmax(mean(logits)))
  np.testing.assert_allclose(combine(logits[:1], "logits"), softmax(logits[0]))
  assert np.isfinite(combine([x * 1e4 for x in logits], "probabilities")).all()
  # One sure model outvotes two that agree if logits are averaged, not if probabilities are.
  votes = [np.array([[2.0, 0.0]]), np.array([[2.0, 0.0]]), np.array([[0.0, 9.0]])]
  assert combine(votes, "logits").argmax() == 1
  assert combine(votes, "probabilities").argmax() == 0


def test_counts_by_definition():
  rng = np.random.default_rng(0)
  scores, labels = rng.standard_normal((40, 7)), rng.integers(0, 6, 40)  # none of class 6
  counts, order = evaluate.count(scores, labels), np.argsort(-scores, axis=1)
  hit = order[:, 0] == labels
  recalls = [hit[labels == c].mean() for c in range(6)]
  assert counts.accuracy == pytest.approx(
    {
      "top1": hit.mean(),
      "top5": (order[:, :5] == labels[:, None]).any(1).mean(),
      "per_class": np.mean(recalls),
    }
  )
  for i, j in np.ndindex(7, 7):
    assert counts.confusion[i, j] == ((labels == i) & (order[:, 0] == j)).sum()
  rows = evaluate.class_rows(counts, "abcdefg")
  assert [row["accuracy"] for row in rows] == pytest.approx([*recalls, None])
  assert rows[6]["images"] == 0 and rows[6]["precision"] == 0
  assert rows[2]["precision"] == pytest.approx((labels[order[:, 0] == 2] == 2).mean())
  # Half of the classes in any order of the columns: the numbers of a class go with its name.
  turned = evaluate.count(scores[:, ::-1], 6 - labels)
  assert turned.accuracy == counts.accuracy


CLASSES = {"a": "xyz", "b": "zxy", "five": "xyzuv", "other": "xyw", "nameless": ""}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Files of fine-tuned ViTs, two of them for the classes of the images; and the images."""
  root, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
  for seed, (name, classes) in enumerate(CLASSES.items()):
    vit = ViT(8 if name == "b" else 4, 16, 1, 2, 32, learned_positions=True)
    student = make_student(vit, None, classes=len(classes) or 3, has_norm=False, seed=seed)
    file = root / f"{name}.safetensors"
    writers.write_model(student._replace(classes=tuple(classes)), file, "timm")
  for split, count in (("train", 1), ("validation", 7)):
    for name in "xyz":
      (root / "photos" / split / name).mkdir(parents=True)
      for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(
          root / "photos" / split / name / f"{i}.png"
        )
  (root / "names.txt").write_text("z\nx\ny\n")
  return root


def logits_by_name(models, name):
  """Labels, and the logits of a model for x, y and z."""
  source = data.open_source(f"folder:{models}/photos", "eval")
  model = mrmae_jax.load(models / f"{name}.safetensors")
  view = data.center_view(model.config["image_size"], 0.875)
  batch = next(data.eval_batches(source, view, batch_size=21))
  order = [model.class_names.index(c) for c in "xyz"]
  return batch["label"], np.asarray(model.classify(batch["image"]))[:, order]


def read_csv(path):
  with open(path, newline="") as file:
    return list(csv.reader(file))


@pytest.mark.parametrize("average", ("probabilities", "logits"))
def test_evaluate_tells_classes_by_name(models, average, tmp_path, capsys):
  paths = [str(models / f"{name}.safetensors") for name in "ab"]
  words = [f"--models={','.join(paths)}", f"--images=folder:{models}/photos"]
  words += [f"--average={average}", f"--out={tmp_path}/x", "--batch_size=4"]
  assert run_command(["evaluate", *words]) == 0
  labels, a = logits_by_name(models, "a")
  _, b = logits_by_name(models, "b")
  result = json.loads((tmp_path / "x/result.json").read_text())
  assert result["images"] == 21
  joined = classifiers.combine([a, b], average)
  for name, scores in zip([*paths, "ensemble"], [a, b, joined]):
    assert result["accuracy"][name] == pytest.approx(evaluate.count(scores, labels).accuracy)
  header, *rows = read_csv(tmp_path / "x/confusion.csv")
  assert header == ["true class", "x", "y", "z"] and [row[0] for row in rows] == ["x", "y", "z"]
  confusion = np.array([row[1:] for row in rows], int)
  np.testing.assert_array_equal(confusion, evaluate.count(joined, labels).confusion)
  rows = read_csv(tmp_path / "x/classes.csv")
  assert rows[0][:2] == ["class", "images"] and [row[1] for row in rows[1:]] == ["7"] * 3
  assert Image.open(tmp_path / "x/confusion.png").size > (300, 300)
  printed = capsys.readouterr().out
  assert f"21 images, 3 classes; ensemble: mean of the {average}" in printed
  assert printed.count("top-1") == 3 and printed.count("precision") == 3


def test_predict_names_the_class_of_each_image(models, tmp_path):
  (tmp_path / "flat").mkdir()
  for i, name in enumerate(("b.png", "a.png", b"caf\xe9.png".decode("utf-8", "surrogateescape"))):
    pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "flat" / name)
  words = ["predict", f"--models={models}/b.safetensors", f"--images=folder:{tmp_path}/flat"]
  assert run_command([*words, f"--out={tmp_path}/x.csv", "--batch_size=2"]) == 0
  assert run_command([*words, f"--out={tmp_path}/x.parquet"]) == 0
  source = data.open_source(f"folder:{tmp_path}/flat", "train", holdout_every=0)
  model = mrmae_jax.load(models / "b.safetensors")
  view = data.center_view(model.config["image_size"], 0.875)
  batch = next(data.eval_batches(source, view, batch_size=3))
  p = classifiers.softmax(np.asarray(model.classify(batch["image"]), np.float64))
  with open(tmp_path / "x.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
    header, *rows = csv.reader(file)
  assert header == ["name", "class", "probability"]
  assert [row[0] for row in rows] == [source[i]["name"] for i in range(3)]
  assert [row[1] for row in rows] == ["zxy"[i] for i in p.argmax(1)]
  np.testing.assert_allclose([float(row[2]) for row in rows], p.max(1), rtol=1e-4)
  table = pq.read_table(tmp_path / "x.parquet").to_pydict()
  assert table["class"] == [row[1] for row in rows] and table["name"][0] == rows[0][0]


def test_a_part_of_the_classes_is_measured_by_name(models, tmp_path, capsys):
  (tmp_path / "z").symlink_to(models / "photos/validation/z")
  (tmp_path / "y").symlink_to(models / "photos/validation/y")
  words = [f"--models={models}/five.safetensors", f"--images=folder:{tmp_path}"]
  assert run_command(["evaluate", *words, f"--out={tmp_path}/out"]) == 0
  labels, _ = logits_by_name(models, "a")
  _, five = logits_by_name(models, "five")
  source = data.open_source(f"folder:{models}/photos", "eval")
  model = mrmae_jax.load(models / "five.safetensors")
  view = data.center_view(model.config["image_size"], 0.875)
  batch = next(data.eval_batches(source, view, batch_size=21))
  best = np.asarray(model.classify(batch["image"])).argmax(1)[labels > 0]  # of x, y, z, u, v
  result = json.loads((tmp_path / "out/result.json").read_text())
  [accuracy] = result["accuracy"].values()
  assert accuracy["top1"] == (best == labels[labels > 0]).mean() and result["images"] == 14
  assert "no images of 3 classes that the model knows: u, v, x" in capsys.readouterr().out


def test_the_images_are_those_of_the_run_unless_told_otherwise(tmp_path, monkeypatch):
  stored = tiny.changed(tiny.get_config("vit"), data__holdout_every=7).data
  monkeypatch.setattr(images, "read_run_data", lambda model: stored)
  words = lambda *options: parse_options("evaluate", f"--models={tmp_path}/run", *options)
  count = lambda *options: len(classifiers.open_source(words(*options)))
  assert count() == count("--images=digits") == 256
  assert count("--split=train") == 1797 - 256
  assert count("--holdout_every=0") == 1797
  assert count("--holdout_every=3") == 599
  for i in range(14):  # other images: all of them
    (tmp_path / "photos").mkdir(exist_ok=True)
    (tmp_path / f"photos/{i}.png").touch()
  assert count(f"--images=folder:{tmp_path}/photos") == 14
  stored.holdout_every = 0  # then the run was trained on all that it has
  with pytest.raises(DataError, match="keeps every image for training"):
    count()
  assert count("--holdout_every=0") == 1797


@pytest.mark.parametrize(
  "names, options, code, message",
  [
    ("a,a", "", 2, "names a model twice"),
    ("a,none", "", 2, "no such file or folder"),
    ("a,five", "", 2, "only the first knows u, v, only the second none"),
    ("other", "", 2, "1 of the 3 classes of the images are not among the 3 of the model: z"),
    ("nameless", "", 2, "has no names of classes; give --classes=FILE with 3 names"),
    ("nameless", "--classes={models}/a.safetensors", 2, "cannot be read"),
    ("nameless", "--classes={models}/short.txt", 2, "holds 2 names, 1 of them different"),
    ("a", "--images=folder:{models}/photos/train/x", 3, "no labels to measure"),
    ("a", "--images=", 2, "--images is missing"),
  ],
)
def test_mistakes(models, names, options, code, message, capsys):
  (models / "short.txt").write_text("x\nx\n")
  paths = ",".join(f"{models}/{name}.safetensors" for name in names.split(","))
  words = [f"--models={paths}", f"--images=folder:{models}/photos"]
  assert run_command(["evaluate", *words, *options.format(models=models).split()]) == code
  error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert len(error) == 1 and message in error[0], error


def test_a_file_gives_the_names_of_classes(models, capsys):
  words = [f"--models={models}/nameless.safetensors", f"--images=folder:{models}/photos"]
  assert run_command(["evaluate", *words, f"--classes={models}/names.txt"]) == 0
  assert "21 images, 3 classes" in capsys.readouterr().out
