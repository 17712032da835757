"""Several fine-tuned models as one: averages by definition, each model at its own size, other
classes refused.
"""

import json

import numpy as np
import pytest
from PIL import Image

import mrmae_jax
from mrmae_jax import data
from mrmae_jax.cli import ensemble
from mrmae_jax.models import ViT
from mrmae_jax.weights import model_files
from tests.helpers.cli import run_command
from tests.helpers.models import make_student


def test_averages_by_definition():
  rng = np.random.default_rng(0)
  logits = [rng.standard_normal((40, 6)) * scale for scale in (1, 2, 10)]
  p = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits]
  np.testing.assert_allclose(ensemble.combine(logits, "probabilities"), (p[0] + p[1] + p[2]) / 3)
  np.testing.assert_allclose(
    ensemble.combine(logits, "logits"), (logits[0] + logits[1] + logits[2]) / 3
  )
  assert np.isfinite(ensemble.combine([x * 1e4 for x in logits], "probabilities")).all()
  # One sure model outvotes two that agree if logits are averaged, not if probabilities are.
  votes = [np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), np.array([[0.0, 9.0]])]
  assert ensemble.combine(votes, "logits").argmax() == 1
  labels = rng.integers(0, 6, 40)
  order = np.argsort(-logits[0], axis=1)
  assert ensemble.accuracy(logits[0], labels) == {
    "top1": (order[:, 0] == labels).mean(),
    "top5": (order[:, :5] == labels[:, None]).any(1).mean(),
  }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Files of fine-tuned ViTs, two for the classes of the images, one for five, one for another
  order; and the images.
  """
  root, rng = tmp_path_factory.mktemp("ensemble"), np.random.default_rng(0)
  for seed, (name, classes, patch) in enumerate((("a", 3, 4), ("b", 3, 8), ("five", 5, 4))):
    student = make_student(
      ViT(patch, 16, 1, 2, 32, learned_positions=True),
      None,
      classes=classes,
      has_norm=False,
      seed=seed,
    )
    model_files.write_model(
      student._replace(classes=tuple("xyzuv"[:classes])), root / f"{name}.safetensors", "timm"
    )
  order = make_student(
    ViT(4, 16, 1, 2, 32, learned_positions=True), None, classes=3, has_norm=False
  )._replace(classes=("x", "z", "y"))
  model_files.write_model(order, root / "order.safetensors", "timm")
  for split, count in (("train", 1), ("validation", 7)):
    for name in "xyz":
      (root / "photos" / split / name).mkdir(parents=True)
      for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(
          root / "photos" / split / name / f"{i}.png"
        )
  return root


@pytest.mark.parametrize("average", ("probabilities", "logits"))
def test_the_tool(models, average, tmp_path, capsys):
  paths = [str(models / f"{name}.safetensors") for name in "ab"]
  assert (
    run_command(
      [
        "ensemble",
        f"--models={','.join(paths)}",
        f"--images=folder:{models}/photos",
        f"--average={average}",
        f"--out={tmp_path}/x.json",
        "--batch_size=4",
      ]
    )
    == 0
  )
  source, scores = data.open_source(f"folder:{models}/photos", "eval", eval_split="validation"), []
  for path in paths:
    model = mrmae_jax.load(path)
    batch = next(
      data.eval_batches(source, data.center_view(model.config["image_size"], 0.875), batch_size=21)
    )
    scores.append(np.asarray(model.classify(batch["image"])))
  result = json.loads((tmp_path / "x.json").read_text())
  assert result["images"] == 21 and scores[0].shape == (21, 3)
  for name, own in zip([*paths, "ensemble"], [*scores, ensemble.combine(scores, average)]):
    assert result["accuracy"][name] == pytest.approx(ensemble.accuracy(own, batch["label"]))
  printed = capsys.readouterr().out
  assert f"21 images, mean of the {average}" in printed and printed.count("top-1") == 3


def test_mistakes(models, capsys):
  a, five, photos = models / "a.safetensors", models / "five.safetensors", f"folder:{models}/photos"
  for options, code, message in (
    ((f"--models={a}", f"--images={photos}"), 2, "--models needs two or more different ones"),
    ((f"--models={a},{a}", f"--images={photos}"), 2, "--models needs two or more different ones"),
    (
      (f"--models={a},{five}", f"--images={photos}"),
      2,
      "tells 5 classes apart (0: it is not fine-tuned); the images have 3",
    ),
    (
      (f"--models={a},{models}/order.safetensors", f"--images={photos}"),
      2,
      "class 1 is 'z' there and 'y' in the images (2 differ)",
    ),
    (
      (f"--models={a},{five}", f"--images={photos}/train/x", "--holdout_every=0"),
      3,
      "has no evaluation split",
    ),
    ((f"--models={a},{models}/none", f"--images={photos}"), 2, "no such file or folder"),
  ):
    assert run_command(["ensemble", *options]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0], error
