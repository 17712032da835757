"""Packed sources give the examples and batches of the original; resizes of training crops."""

import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from mrmae_jax import config as config_lib
from mrmae_jax import preflight
from mrmae_jax.data import augment, open_source
from mrmae_jax.data.pack import write_packed
from mrmae_jax.data.sources.packed import verify_packed
from mrmae_jax.errors import ConfigError, DataError
from tests.helpers.cli import run_command
from tests.helpers.images import (
  SIZE,
  as_pillow,
  assert_same,
  encode,
  make_views,
  photo,
  train_loader,
  train_steps,
  write_images,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """27 images in two classes, JPEG and PNG, and a packed copy in shards of 9, 8, 8, 1 and 1."""
  root = tmp_path_factory.mktemp("pack")
  suffixes = ("jpg", "png")
  write_images(
    root / "folder", [f"{'ab'[i % 2]}/{i:02d}.{suffixes[i % 3 == 0]}" for i in range(27)]
  )
  assert (
    run_command(["pack", f"--source=folder:{root}/folder", f"--out={root}/packed", "--shards=3"])
    == 0
  )
  return root


@pytest.fixture
def copy(root, tmp_path):
  """A packed folder to be damaged."""
  return shutil.copytree(root / "packed", tmp_path / "copy")


def examples(source):
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("split, count", [("train", 25), ("eval", 2)])
def test_examples_are_those_of_the_source(root, split, count):
  original, copy = (
    open_source(spec, split) for spec in (f"folder:{root}/folder", f"packed:{root}/packed")
  )
  assert len(copy) == count and examples(copy) == examples(original)
  assert copy.class_names == original.class_names == ("a", "b")
  assert f"{count} images, 2 classes; {split} of folder:" in copy.description
  assert examples(pickle.loads(pickle.dumps(copy))) == examples(original)


def test_files_of_a_packed_folder(root):
  index = json.loads((root / "packed" / "index.json").read_text())
  assert [shard["images"] for shard in index["splits"]["train"]] == [9, 8, 8]
  assert [shard["images"] for shard in index["splits"]["eval"]] == [1, 1]  # no empty shards
  files = {shard["file"] for shards in index["splits"].values() for shard in shards}
  assert {path.name for path in (root / "packed").iterdir()} == files | {"index.json"}
  assert index["options"]["holdout_every"] == 10 and index["options"]["short_side"] == 0


@pytest.mark.parametrize(
  "workers", [0, 2, *(pytest.param(x, marks=pytest.mark.variant) for x in (1, 4))]
)
def test_batches_are_those_of_the_source_for_any_number_of_workers(root, workers):
  original, copy = (
    open_source(spec, "train") for spec in (f"folder:{root}/folder", f"packed:{root}/packed")
  )
  assert_same(train_steps(copy, 4, workers=workers), train_steps(original, 4))


def test_fingerprint_tells_contents_apart_wherever_they_lie(root, copy, tmp_path):
  fingerprint = open_source(f"packed:{root}/packed", "train").fingerprint
  assert open_source(f"packed:{copy}", "train").fingerprint == fingerprint
  shutil.copytree(root / "folder", tmp_path / "folder")
  next((tmp_path / "folder").rglob("01.jpg")).write_bytes(encode(photo(seed=99)))
  assert run_command(["pack", f"--source=folder:{tmp_path}/folder", f"--out={tmp_path}/other"]) == 0
  assert open_source(f"packed:{tmp_path}/other", "train").fingerprint != fingerprint


def test_pixels_without_a_file_are_packed_as_they_are(tmp_path):
  original = open_source("digits", "eval")
  write_packed({"eval": original}, tmp_path / "packed", {"source": "digits"})
  copy = open_source(f"packed:{tmp_path}/packed", "eval")
  for one, other in zip(examples(copy), examples(original)):
    np.testing.assert_array_equal(one.pop("image"), other.pop("image"), strict=True)
    assert one == other


def test_short_side_shrinks_what_is_larger(tmp_path):
  large, small = photo(90, 121), encode(photo(40, 99, 1))
  (tmp_path / "a.png").write_bytes(encode(large, "PNG"))
  (tmp_path / "b.jpg").write_bytes(small)
  assert (
    run_command(
      [
        "pack",
        f"--source=folder:{tmp_path}",
        f"--out={tmp_path}/packed",
        "--splits=train",
        "--holdout_every=0",
        "--short_side=40",
        "--quality=90",
      ]
    )
    == 0
  )
  source = open_source(f"packed:{tmp_path}/packed", "train")
  assert source[1]["image"] == small
  expected = Image.fromarray(large).resize((121 * 40 // 90, 40), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(
    as_pillow(source[0]["image"]), as_pillow(encode(expected, quality=90))
  )
  # The evaluation view of that size differs by JPEG's losses alone.
  view = augment.center_crop(augment.pixels(source[0]), (35, 35))
  assert np.abs(view.astype(int) - augment.center_crop(large, (35, 35))).mean() < 8


def test_an_image_that_cannot_be_decoded_is_named_and_nothing_is_left(tmp_path, capsys):
  write_images(tmp_path / "folder", ["a.jpg", "c.jpg"])
  (tmp_path / "folder" / "b.jpg").write_bytes(b"<html>")
  assert (
    run_command(
      [
        "pack",
        f"--source=folder:{tmp_path}/folder",
        f"--out={tmp_path}/packed",
        "--splits=train",
        "--holdout_every=0",
      ]
    )
    == 3
  )
  assert "b.jpg: cannot be decoded" in capsys.readouterr().err
  assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
  "options, message",
  [
    (["--out=x"], "give --source and --out"),
    (["--source=digits"], "give --source and --out"),
    (["--source=digits", "--out=x", "--verify=x"], "or --verify alone"),
    (["--source=digits", "--out=/tmp"], "--out=/tmp exists"),
    (["--source=digits", "--out=x", "--splits=dev"], "--splits=dev must be train, eval or both"),
    (["--source=digits", "--out=x", "--quality=0"], "quality"),
  ],
)
def test_command_lines_that_do_not_fit(options, message, capsys):
  assert run_command(["pack", *options]) == 2
  assert message in capsys.readouterr().err


def test_nothing_is_overwritten(copy):
  before = sorted(copy.iterdir())
  with pytest.raises(FileExistsError, match="give another name"):
    write_packed({"eval": open_source("digits", "eval")}, copy, {})
  assert sorted(copy.iterdir()) == before


def test_a_split_that_was_not_packed(tmp_path):
  write_packed({"eval": open_source("digits", "eval")}, tmp_path / "packed", {"source": "digits"})
  with pytest.raises(
    DataError, match="holds eval, not 'train'; pack again with --splits=train,eval"
  ):
    open_source(f"packed:{tmp_path}/packed", "train")


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": "other"}'])
def test_no_packed_folder(tmp_path, content):
  if content is not None:
    (tmp_path / "index.json").write_text(content)
  with pytest.raises(DataError, match="not a packed folder.*mrmae pack"):
    open_source(f"packed:{tmp_path}", "train")


def test_shards_that_are_missing_or_cut_short_are_found_at_once(copy):
  shard = copy / "train-00001-of-00003.array_record"
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  for attempt in (lambda: open_source(f"packed:{copy}", "train"), lambda: verify_packed(copy)):
    with pytest.raises(
      DataError,
      match=f"00001-of-00003.array_record: has {len(data) - 1:,} bytes, expected {len(data):,}",
    ):
      attempt()
  shard.unlink()
  with pytest.raises(DataError, match="00001-of-00003.array_record: is missing"):
    open_source(f"packed:{copy}", "train")
  assert len(open_source(f"packed:{copy}", "eval")) == 2


def test_changed_bytes_are_found_by_verify_and_by_reading(copy, capsys):
  assert run_command(["pack", f"--verify={copy}"]) == 0
  assert "27 images in 5 shards are as written" in capsys.readouterr().out
  source = open_source(f"packed:{copy}", "train")
  shard = copy / "train-00000-of-00003.array_record"
  data = bytearray(shard.read_bytes())
  data[data.index(source[3]["image"][-500:])] ^= 1
  shard.write_bytes(data)
  assert run_command(["pack", f"--verify={copy}"]) == 3
  assert "train-00000-of-00003.array_record: was changed" in capsys.readouterr().err
  with pytest.raises(DataError, match="image 3 of 'train' cannot be read.*--verify="):
    examples(open_source(f"packed:{copy}", "train"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_does_not_grow(root):
  batches = train_loader(open_source(f"packed:{root}/packed", "train"), batch_size=16)

  def resident(steps):
    for _ in range(steps):
      next(batches)
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

  before, after = resident(30), resident(120)
  batches.close()
  assert after - before < 2e6  # the 1,920 views are 3.3 MB


# The resize of training crops.


def test_pillow_is_the_default_and_evaluation_has_no_choice(root, monkeypatch):
  source = open_source(f"folder:{root}/folder", "train")
  assert config_lib.pretrain().data.resize == config_lib.RESIZE[0] == "pillow"
  assert_same(train_steps(source, 2, resize="pillow"), train_steps(source, 2))
  monkeypatch.setattr(augment, "resizer", lambda name: None)  # training crops would fail
  image = make_views(resize="cv2").eval(source[0], None)["image"]
  np.testing.assert_array_equal(image, augment.center_crop(augment.pixels(source[0]), SIZE))


@pytest.mark.parametrize(
  "resize, message",
  [("cv2", "needs OpenCV.*the fast extra"), ("nearest", "'pillow'.*'cv2'|pillow, cv2")],
)
def test_resizes_that_are_not_there(root, monkeypatch, resize, message):
  monkeypatch.setitem(sys.modules, "cv2", None)
  augment.load_cv2.cache_clear()
  source = open_source(f"folder:{root}/folder", "train")
  with pytest.raises(DataError, match=message):
    train_steps(source, 1, resize=resize)
  config = config_lib.pretrain()
  config.batch_size, config.teacher.path = 8, ""
  config.data.update(source=f"folder:{root}/folder", resize=resize)
  with pytest.raises(ConfigError, match=f"config.data.resize='{resize}'.*({message})"):
    preflight.check(config, 8)


def test_cv2_gives_the_same_crops_in_other_pixels(root):
  cv2 = pytest.importorskip("cv2")
  source = open_source(f"folder:{root}/folder", "train")
  fast = train_steps(source, 2, resize="cv2")
  assert cv2.getNumThreads() == 1
  assert_same(train_steps(source, 2, resize="cv2", workers=1), fast)
  for one, other in zip(fast, train_steps(source, 2)):
    assert one["image"].shape == other["image"].shape and one["image"].dtype == np.uint8
    np.testing.assert_array_equal(one["label"], other["label"])
    assert 0 < np.abs(one["image"].astype(int) - other["image"]).mean() < 4
