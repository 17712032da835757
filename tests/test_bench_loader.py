"""The benchmark of the loader: what it compares is equal, and it says so."""

import json
from types import SimpleNamespace

import pytest

from mrmae_jax.cli.bench import loader
from tests.helpers.cli import run_command
from tests.helpers.images import write_images


@pytest.fixture
def bench(tmp_path):
  """Runs the command on six images; returns its exit code and its figures."""
  write_images(tmp_path / "photos", [f"{i}.jpg" for i in range(6)])

  def run(*options):
    code = run_command(
      [
        "bench",
        "loader",
        f"--source=folder:{tmp_path}/photos",
        "--image_size=16",
        "--batch_size=4",
        "--workers=0",
        "--images=8",
        "--rounds=2",
        f"--json={tmp_path}/result.json",
        *options,
      ]
    )
    return code, json.loads((tmp_path / "result.json").read_text())

  return run


def test_table(bench, capsys):
  code, result = bench()
  assert code == 0 and result["equal"]
  assert {"ours, pillow", "ours, pillow, packed", "ours, pillow, packed at 256"} <= set(
    result["rounds"]
  )
  assert all(
    len(rounds) == 2 and rounds[0]["images_per_s"] > 0 for rounds in result["rounds"].values()
  )
  assert "PIL chain: equal" in capsys.readouterr().out


def test_no_ratio_without_equal_pixels(bench, monkeypatch, capsys):
  monkeypatch.setattr(loader, "_has_pixels_of_pil", lambda *_: False)
  code, result = bench()
  assert code == 0 and not result["equal"] and "DIFFERENT" in capsys.readouterr().out
  table = result["lines"][3:]
  assert all(line.count("[") <= 2 for line in table)


@pytest.mark.torch
def test_torch_sees_the_same_source(bench):
  pytest.importorskip("torch")
  _, result = bench()
  assert loader.PEER in result["rounds"]
  assert all(line.count("[") == 4 for line in result["lines"][3:-1])


def test_memory(bench):
  code, result = bench("--memory_batches=20")
  assert code == 0 and list(result["resident_mb"]) == ["1", "2", "10", "20"]
  assert result["resident_mb"]["1"] > 10


@pytest.mark.parametrize(
  "images, workers, batches", [(960, 2, 16), (960, 0, 15), (960, 16, 64), (8, 0, 4)]
)
def test_each_worker_makes_as_many_of_the_timed_batches(images, workers, batches):
  """16 workers that begin together would bring 15 batches in no time."""
  options = SimpleNamespace(images=images, batch_size=64, workers=workers)
  assert loader._count_batches(options) == batches
