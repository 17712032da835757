"""The input pipeline: sources, pixels, and the order of batches."""

import json
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageFile
from sklearn import datasets

from mrmae_jax import data
from mrmae_jax.data import augment, loader, open_source
from mrmae_jax.errors import DataError
from tests.helpers.images import (
  SIZE,
  Numbered,
  as_pillow,
  assert_same,
  encode,
  eval_loader,
  good_files,
  lying_jpeg,
  make_views,
  photo,
  png_header,
  take,
  train_loader,
  train_steps,
  write_images,
)
from tests.helpers.tfds import prepare_tfds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """23 images in two classes; the source keeps them all for training."""
  root = tmp_path_factory.mktemp("folder")
  write_images(root, [f"{'ab'[i % 2]}/{i:02d}.jpg" for i in range(23)])
  return open_source(f"folder:{root}", "train", holdout_every=0)


# The order of batches.


@pytest.fixture(scope="module")
def reference(folder):
  """Seven steps of eight cross two epochs of 23."""
  return train_steps(folder, 7)


@pytest.mark.parametrize(
  "shards, workers, first",
  [
    (2, 0, 0),
    (4, 0, 0),
    (1, 0, 3),
    (2, 2, 2),
    pytest.param(1, 1, 0, marks=pytest.mark.variant),
    pytest.param(1, 4, 1, marks=pytest.mark.variant),
  ],
)
def test_global_batch_is_a_function_of_seed_and_step(folder, reference, shards, workers, first):
  actual = train_steps(folder, 7 - first, shards=shards, workers=workers, first_step=first)
  assert_same(actual, reference[first:])


def test_batch_format(reference):
  for batch in reference:
    assert batch["image"].shape == (8, *SIZE, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert set(batch["label"]) <= {0, 1}


def test_epochs_are_different_permutations():
  steps = train_steps(Numbered(10), 10, batch_size=4)
  epochs = np.concatenate([step["label"] for step in steps]).reshape(4, 10)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_each_view_of_an_image_is_different():
  steps = train_steps(Numbered(1), 1, batch_size=6)
  assert len({image.tobytes() for image in steps[0]["image"]}) == 6


def test_seeds_give_unrelated_orders():
  def epochs(seed):
    steps = train_steps(Numbered(12), 3, batch_size=12, seed=seed)
    return [tuple(step["label"]) for step in steps]

  # No seed may start where the next seed is one epoch later.
  assert len(set(epochs(0) + epochs(1) + epochs(2))) == 9


def test_views_depend_on_the_seed_not_only_on_the_order():
  first, second = (train_steps(Numbered(1), 1, batch_size=1, seed=seed)[0] for seed in (0, 1))
  assert not np.array_equal(first["image"], second["image"])


def test_flip_is_optional_and_applied_to_half():
  def mirrored(flip):
    steps = train_steps(
      Numbered(1),
      1,
      batch_size=200,
      flip=flip,
      image_size=(30, 30),
      crop_scale=(0.999, 1.0),
    )
    plain = photo(30, 30, 0).astype(int)
    distance = lambda image, other: np.abs(image - other).mean()
    return sum(
      distance(image, plain[:, ::-1]) < distance(image, plain)
      for image in steps[0]["image"].astype(int)
    )

  assert mirrored(False) == 0
  assert 70 < mirrored(True) < 130


def test_workers_end_when_the_iterator_is_closed(folder):
  iterator = train_loader(folder, batch_size=4, workers=1)
  next(iterator)
  assert multiprocessing.active_children()
  iterator.close()
  assert not multiprocessing.active_children()


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(batch_size=10, num_shards=4), "nearest: 8 or 12"),
    (dict(batch_size=3, num_shards=4), "nearest: 4 or 4"),
    (dict(batch_size=0), "batch size 0"),
    (dict(shard=2, num_shards=2), "expected 0 to 1"),
    (dict(workers=-1), "workers=-1"),
    (dict(seed=-1), "seed=-1"),
    (dict(first_step=-1), "first_step=-1"),
  ],
)
def test_arguments_that_do_not_fit(options, message):
  with pytest.raises(DataError, match=message):
    train_loader(Numbered(3), **options)


@pytest.mark.parametrize("crop_pct", [0, 1.1])
def test_crop_fraction_out_of_range(crop_pct):
  with pytest.raises(DataError, match=f"crop_pct={crop_pct}"):
    eval_loader(Numbered(3), crop_pct=crop_pct)


def test_reading_ahead_is_bounded():
  class Counting(Numbered):
    reads = 0

    def __getitem__(self, index):
      Counting.reads += 1
      return super().__getitem__(index)

  batches = train_loader(Counting(1), batch_size=4)
  next(batches)
  time.sleep(0.3)  # Unbounded, this reads a thousand batches.
  batches.close()
  assert 4 <= Counting.reads <= 4 * (loader.MAX_THREADS + 1)


def test_empty_source():
  with pytest.raises(DataError, match="empty"):
    train_steps(Numbered(0), 1)
  with pytest.raises(DataError, match="empty"):
    eval_loader(Numbered(0))


# Evaluation.


@pytest.mark.parametrize("count", [1, 5, 6, 7, 13])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_evaluation_sees_every_image_once(count, shards):
  parts = [
    list(eval_loader(Numbered(count), batch_size=6, shard=i, num_shards=shards))
    for i in range(shards)
  ]
  assert {len(part) for part in parts} == {-(-count // 6)}
  labels = np.concatenate([part["label"] for step in zip(*parts) for part in step])
  valid = np.concatenate([part["valid"] for step in zip(*parts) for part in step])
  assert valid.dtype == bool and labels.dtype == np.int32
  np.testing.assert_array_equal(labels[valid], np.arange(count))
  np.testing.assert_array_equal(valid, np.arange(len(valid)) < count)
  for step in zip(*parts):
    for part in step:
      assert part["image"].shape == (6 // shards, *SIZE, 3)
      for image, label, ok in zip(part["image"], part["label"], part["valid"]):
        expected = augment.center_crop(photo(30, 30, label), SIZE) if ok else 0 * image
        np.testing.assert_array_equal(image, expected)


def test_evaluation_limit_is_evenly_spaced():
  def labels(limit):
    batches = eval_loader(Numbered(10), batch_size=3, limit=limit)
    return [label for batch in batches for label in batch["label"][batch["valid"]].tolist()]

  assert labels(4) == [0, 2, 5, 7]
  assert labels(99) == list(range(10))


def test_evaluation_with_workers(folder):
  assert_same(
    list(eval_loader(folder, batch_size=4, workers=2)), list(eval_loader(folder, batch_size=4))
  )


# The contract of views.


def noisy_view(example, rng):
  """Rows of other names, shapes and dtypes than images have."""
  return {"boxes": rng.random((3, 4), np.float32), "target": np.float32(example["label"])}


class PartlyUnreadable(Numbered):
  """Image 0 cannot be read."""

  def __getitem__(self, index):
    if index == 0:
      raise DataError("0: cannot be read")
    return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.variant)])
def test_the_loader_knows_no_field_of_a_batch(workers):
  source, options = Numbered(5), data.LoaderOptions(workers=workers)
  [batch] = take(data.train_batches(source, noisy_view, seed=0, batch_size=4, options=options), 1)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    "boxes": ((4, 3, 4), np.float32),
    "target": ((4,), np.float32),
  }
  first, last = data.eval_batches(source, noisy_view, batch_size=4, options=options)
  np.testing.assert_array_equal(first["target"], [0, 1, 2, 3])
  np.testing.assert_array_equal(last["valid"], [True, False, False, False])
  assert not last["target"][1:].any() and not last["boxes"][1:].any() and last["boxes"][0].all()


def test_random_numbers_of_an_evaluation_view_belong_to_the_image():
  views = {}
  for limit, batch_size, shard in ((0, 2, 0), (4, 4, 0), (0, 6, 1)):
    num_shards = 1 + shard
    for batch in data.eval_batches(
      Numbered(8),
      noisy_view,
      batch_size=batch_size,
      limit=limit,
      shard=shard,
      num_shards=num_shards,
    ):
      for target, boxes, valid in zip(batch["target"], batch["boxes"], batch["valid"]):
        if valid:
          np.testing.assert_array_equal(views.setdefault(int(target), boxes), boxes)
  assert len({boxes.tobytes() for boxes in views.values()}) == len(views) == 8


def test_shapes_of_a_batch_are_those_of_the_first_readable_image():
  skip = data.LoaderOptions(on_error="skip", max_skipped=0.25)
  shapes = {"boxes": ((3, 4), np.float32), "target": ((), np.float32)}
  assert data.element_shapes(Numbered(4), noisy_view) == shapes
  assert data.element_shapes(PartlyUnreadable(4), noisy_view, skip) == shapes
  assert data.element_shapes(Numbered(1), make_views().train) == {
    "image": ((*SIZE, 3), np.uint8),
    "label": ((), np.int32),
  }
  for source, options in (
    (PartlyUnreadable(4), data.LoaderOptions()),
    (PartlyUnreadable(3), skip),  # a quarter of three images is none
    (PartlyUnreadable(1), skip._replace(max_skipped=1.0)),
  ):
    with pytest.raises(DataError, match="0: cannot be read"):
      data.element_shapes(source, noisy_view, options)
  with pytest.raises(DataError, match="empty"):
    data.element_shapes(Numbered(0), noisy_view)


@pytest.mark.parametrize("task", ["pretrain", "probe"])
def test_views_travel_to_worker_processes(task):
  options = dict(task=task, randaug="rand-m9-inc1", erase_prob=0.5)
  views, example = make_views(**options), Numbered(1)[0]
  for view, other in zip(views, pickle.loads(pickle.dumps(views))):
    draws = [v(example, np.random.default_rng(3))["image"] for v in (view, other)]
    np.testing.assert_array_equal(*draws)


# Views of images.


def test_crop_boxes_follow_the_law():
  # At most 0.5 of a square: every draw fits, so no draw is ever rejected.
  side, scale, ratio = 1000, (0.2, 0.5), (3 / 4, 4 / 3)
  rng = np.random.default_rng(0)
  boxes = np.array([augment.crop_box(side, side, rng, scale, ratio) for _ in range(4000)])
  top, left, height, width = boxes.T
  area = (height * width / side**2 - scale[0]) / (scale[1] - scale[0])
  aspect = np.log(width / height) / np.log(ratio[1])  # In [-1, 1].
  slack = 0.01  # Sides are whole pixels.
  uniform = {
    "area": area,
    "log aspect": (aspect + 1) / 2,
    "top": top / (side - height),
    "left": left / (side - width),
  }
  for name, values in uniform.items():
    assert values.min() > -slack and values.max() < 1 + slack, name
    counts = np.histogram(values, 8, (0, 1))[0]
    # 500 expected in each bin, with a standard deviation of 21.
    assert np.abs(counts - 500).max() < 100, (name, counts)
  corner = np.corrcoef([area, aspect, uniform["top"], uniform["left"]])
  assert np.abs(corner - np.eye(4)).max() < 0.08


def test_crop_boxes_lie_inside():
  rng = np.random.default_rng(1)
  for height, width in ((1, 1), (1, 2), (3, 2), (37, 50), (200, 90)):
    for _ in range(300):
      top, left, h, w = augment.crop_box(height, width, rng, (0.01, 1.0))
      assert 0 <= top <= top + h <= height and h > 0
      assert 0 <= left <= left + w <= width and w > 0


def test_crop_falls_back_to_the_centre():
  rng = np.random.default_rng(0)
  scale = (0.2, 1.0)
  assert augment.crop_box(10, 1000, rng, scale) == (0, 493, 10, 13)
  assert augment.crop_box(1000, 10, rng, scale) == (493, 0, 13, 10)
  # Nothing larger than the image fits: all of it, as its aspect is allowed.
  assert augment.crop_box(90, 100, rng, (2.0, 3.0)) == (0, 0, 90, 100)


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (90, 70)])
def test_random_resized_crop_is_crop_then_bicubic(size):
  image = photo(61, 83)
  touches_outside = 0
  for seed in range(8):
    got = augment.random_resized_crop(image, np.random.default_rng(seed), size, (0.2, 0.6))
    top, left, h, w = augment.crop_box(61, 83, np.random.default_rng(seed), (0.2, 0.6))
    box = (left, top, left + w, top + h)
    picture = Image.fromarray(image)
    expected = picture.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(expected))
    other = picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    touches_outside += not np.array_equal(got, np.asarray(other))
  assert touches_outside  # The two ways do differ on these images.


@pytest.mark.parametrize(
  "shape, size, crop_pct, resized, corner",
  [
    ((300, 400), (224, 224), 0.875, (256, 341), (16, 58)),
    ((400, 300), (224, 224), 0.875, (341, 256), (58, 16)),
    ((50, 60), (24, 24), 1.0, (24, 28), (0, 2)),
    ((100, 100), (32, 64), 0.875, (73, 73), (20, 4)),
    ((40, 400), (64, 32), 0.875, (73, 730), (4, 349)),
  ],
)
def test_center_crop(shape, size, crop_pct, resized, corner):
  image = photo(*shape)
  expected = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC))[
    corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]
  ]
  got = augment.center_crop(image, size, crop_pct)
  assert got.shape == (*size, 3)
  np.testing.assert_array_equal(got, expected)


# Decoding.


@pytest.mark.parametrize("name, data", good_files().items())
def test_decoding_equals_pillow(name, data):
  image = augment.decode_image(data, name)
  assert image.dtype == np.uint8 and image.shape == (203, 301, 3)
  np.testing.assert_array_equal(image, as_pillow(data))


def test_color_jpegs_do_not_go_through_pillow(monkeypatch):
  data = encode(photo())
  expected = as_pillow(data)
  monkeypatch.setattr(Image.Image, "convert", None)
  np.testing.assert_array_equal(augment.decode_image(data, "x"), expected)


def test_sixteen_bit_grey_is_scaled_not_clipped():
  values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16 + 5
  data = encode(values, "PNG")
  assert np.mean(as_pillow(data) == 255) > 0.9  # What must not happen.
  image = augment.decode_image(data, "deep.png")
  assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
  np.testing.assert_array_equal(image[..., 1], values // 256)
  assert np.ptp(image, axis=2).max() == 0


def bad_files():
  jpeg, png = encode(photo(200, 300)), encode(photo(200, 300), "PNG")
  return {
    "empty.jpg": (b"", "is empty"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "<!DOCTYPE html>"),
    "short.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
    "header_only.jpg": (jpeg[:20], "cannot be decoded"),
    "short.png": (png[: len(png) // 2], "truncated"),
    "bomb.png": (png_header(60000, 60000), "3600000000|60000"),
    "bomb.jpg": (lying_jpeg(), "4290250000|65500"),
    "float.tif": (encode(np.ones((4, 4), np.float32), "TIFF"), "mode 'F'"),
  }


@pytest.mark.parametrize("name, case", bad_files().items())
def test_bad_files_are_named(name, case):
  data, cause = case
  with pytest.raises(DataError, match=cause) as caught:
    augment.decode_image(data, f"/some/{name}")
  assert str(caught.value).startswith(f"/some/{name}: ")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg"])
def test_size_limit_holds_without_that_of_pillow(monkeypatch, name):
  data, _ = bad_files()[name]
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
  monkeypatch.setattr(augment.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
  with pytest.raises(DataError, match="60000 x 60000|65500 x 65500"):
    augment.decode_image(data, name)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_file_is_named_by_the_loader(tmp_path, workers):
  write_images(tmp_path, ["a.jpg", "c.jpg"])
  (tmp_path / "b.jpg").write_bytes(b"<html>")
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  with pytest.raises(DataError, match="b.jpg: cannot be decoded"):
    train_steps(source, 1, batch_size=3, workers=workers)
  if not workers:
    with pytest.raises(DataError, match="b.jpg: cannot be decoded"):
      list(eval_loader(source, batch_size=3))


def test_file_removed_during_the_run(tmp_path):
  write_images(tmp_path, ["a.jpg", "b.jpg"])
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  (tmp_path / "b.jpg").unlink()
  with pytest.raises(DataError, match="b.jpg: cannot be read"):
    train_steps(source, 1)


# Folders.


def open_pair(root, **options):
  return [open_source(f"folder:{root}", s, **options) for s in ("train", "eval")]


def listing(source, root):
  return [
    (os.path.relpath(source[i]["name"], root), source[i]["label"]) for i in range(len(source))
  ]


def test_one_tree_with_classes_is_held_out(tmp_path):
  write_images(
    tmp_path,
    [
      "cat/1.jpg",
      "cat/deep/2.PNG",
      "cat/3.JPEG",
      "dog/1.jpg",
      "dog/2.jpg",
      ".hidden/4.jpg",
      "dog/.5.jpg",
    ],
  )
  (tmp_path / "empty_class").mkdir()
  (tmp_path / "notes.txt").write_text("not an image")
  train, evaluation = open_pair(tmp_path, holdout_every=2)
  assert train.class_names == evaluation.class_names == ("cat", "dog")
  # Sorted by path: cat/1, cat/3, cat/deep/2, dog/1, dog/2.
  assert listing(train, tmp_path) == [("cat/1.jpg", 0), ("cat/deep/2.PNG", 0), ("dog/2.jpg", 1)]
  assert listing(evaluation, tmp_path) == [("cat/3.JPEG", 0), ("dog/1.jpg", 1)]
  assert "3 images, 2 classes; one in 2 held out" in train.description
  assert train[0]["image"] == (tmp_path / "cat/1.jpg").read_bytes()


@pytest.mark.parametrize(
  "names",
  [
    ["b.jpg", "a.png"],  # Flat.
    ["only/a.jpg", "only/b.jpg"],  # One directory is no classification.
    ["x/a.jpg", "y/b.jpg", "stray.jpg"],  # One image is in no directory.
  ],
)
def test_no_labels(tmp_path, names):
  write_images(tmp_path, names)
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  assert source.class_names == () and "no labels" in source.description
  assert listing(source, tmp_path) == [(name, -1) for name in sorted(names)]


def test_split_folders(tmp_path):
  write_images(
    tmp_path,
    [
      "train/a/1.jpg",
      "train/b/1.jpg",
      "val/a/2.jpg",
      "val/b/2.jpg",
      "extra/b/3.jpg",
      "extra/a/3.jpg",
    ],
  )
  train, evaluation = open_pair(tmp_path)  # "test" is absent, "val" is there.
  assert listing(train, tmp_path) == [("train/a/1.jpg", 0), ("train/b/1.jpg", 1)]
  assert listing(evaluation, tmp_path) == [("val/a/2.jpg", 0), ("val/b/2.jpg", 1)]
  train, evaluation = open_pair(tmp_path, train_split="val", eval_split="extra")
  assert [name for name, _ in listing(train, tmp_path)][0] == "val/a/2.jpg"
  assert [name for name, _ in listing(evaluation, tmp_path)][0] == "extra/a/3.jpg"


def test_training_folder_without_evaluation_folder(tmp_path):
  write_images(tmp_path, [f"train/{i}.jpg" for i in range(4)])
  train, evaluation = open_pair(tmp_path, holdout_every=4)
  assert [n for n, _ in listing(train, tmp_path)] == ["train/0.jpg", "train/1.jpg", "train/2.jpg"]
  assert [n for n, _ in listing(evaluation, tmp_path)] == ["train/3.jpg"]


def test_evaluation_folder_without_training_folder(tmp_path):
  write_images(tmp_path, ["images_1/1.jpg", "val/1.jpg"])
  with pytest.raises(DataError, match="has 'val' but no 'train'"):
    open_source(f"folder:{tmp_path}", "train")


def test_images_of_other_classes_have_no_labels(tmp_path):
  write_images(
    tmp_path,
    [
      "train/a/1.jpg",
      "train/b/1.jpg",
      "test/b/1.jpg",
      "test/c/1.jpg",
      "val/1.jpg",
      "val/2.jpg",
    ],
  )
  assert open_source(f"folder:{tmp_path}", "train").class_names == ("a", "b")
  other = open_source(f"folder:{tmp_path}", "eval")
  assert other.class_names == () and "no labels (c is not among the classes" in other.description
  flat = open_source(f"folder:{tmp_path}", "eval", eval_split="val")
  assert flat.class_names == () and "2 lie outside of class folders as a, b" in flat.description


def test_links_are_followed_and_cannot_loop(tmp_path):
  write_images(tmp_path / "store", ["x/1.jpg", "2.jpg"])
  root = tmp_path / "root"
  (root / "b").mkdir(parents=True)
  (root / "a").symlink_to(tmp_path / "store" / "x")
  (root / "b" / "2.jpg").symlink_to(tmp_path / "store" / "2.jpg")
  (root / "b" / "up").symlink_to(root)
  source = open_source(f"folder:{root}", "train", holdout_every=0)
  assert listing(source, root) == [("a/1.jpg", 0), ("b/2.jpg", 1)]


def test_folders_that_cannot_be_used(tmp_path):
  with pytest.raises(DataError, match="does not exist"):
    open_source(f"folder:{tmp_path}/nowhere", "train")
  file = tmp_path / "file"
  file.write_text("x")
  with pytest.raises(DataError, match="is a file"):
    open_source(f"folder:{file}", "train")
  with pytest.raises(DataError, match=r"\.jpg, .*\.webp, .*found 1 no suffix"):
    open_source(f"folder:{tmp_path}", "train")
  (tmp_path / "none").mkdir()
  with pytest.raises(DataError, match="found no files"):
    open_source(f"folder:{tmp_path}/none", "train")
  write_images(tmp_path / "few", ["1.jpg", "2.jpg"])
  with pytest.raises(DataError, match="has 2 images.*none for 'eval'"):
    open_source(f"folder:{tmp_path}/few", "eval")
  with pytest.raises(DataError, match="holdout_every=0"):
    open_source(f"folder:{tmp_path}/few", "eval", holdout_every=0)
  with pytest.raises(DataError, match="holdout_every=1"):
    open_source(f"folder:{tmp_path}/few", "train", holdout_every=1)


@pytest.mark.parametrize("spec", ["", "cifar10", "folder:", "digits:1", "/data"])
def test_unknown_form(spec):
  with pytest.raises(DataError, match="expected digits, folder:.*tfds:"):
    open_source(spec, "train")


def test_a_package_that_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  monkeypatch.delitem(sys.modules, "mrmae_jax.data.sources.digits", raising=False)
  with pytest.raises(DataError, match="dataset 'digits' needs .*pip install scikit-learn"):
    open_source("digits", "train")


def test_unknown_split():
  with pytest.raises(DataError, match="'train' or 'eval'"):
    open_source("digits", "test")


# Digits.


def test_digits():
  train, evaluation = (open_source("digits", s) for s in ("train", "eval"))
  assert (len(train), len(evaluation)) == (1618, 179)
  names = [s[i]["name"] for s in (train, evaluation) for i in range(len(s))]
  assert len(set(names)) == 1797
  assert evaluation[0]["name"] == "digits/0009"
  assert evaluation.class_names == tuple("0123456789")
  digits = datasets.load_digits()
  for k, index in enumerate(range(9, 1797, 10)):
    image = evaluation[k]["image"]
    assert evaluation[k]["label"] == digits.target[index]
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert np.ptp(image, axis=2).max() == 0
    coarse = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3)) / 255 * 16
    assert np.corrcoef(coarse.ravel(), digits.images[index].ravel())[0, 1] > 0.95
  assert evaluation[0]["image"].max() > 200
  # A 4x4 patch that is one flat color has no normalized target.
  blocks = evaluation[0]["image"][..., 0].reshape(8, 4, 8, 4)
  assert (np.ptp(blocks, axis=(1, 3)) > 0).mean() > 0.5


# Prepared tfds datasets.


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  rows = [
    # A second feature of type Image that holds other bytes: it must not be decoded.
    {"image": encode(photo(seed=i)), "label": i % 3, "mask": b"not an image"}
    for i in range(11)
  ]
  features = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
    "mask": tfds.features.Image(),
  }
  prepare_tfds("TestPhotos", data_dir, features, {"train": rows[:8], "test": rows[8:]})
  raw = tfds.features.Tensor(shape=(4, 5, 1), dtype=np.uint8)
  prepare_tfds(
    "TestTensors",
    data_dir,
    {"image": raw},
    {"train": [{"image": np.full((4, 5, 1), i, np.uint8)} for i in range(3)]},
  )
  prepare_tfds(
    "TestTexts",
    data_dir,
    {"text": tfds.features.Text()},
    {"train": [{"text": "words"}]},
  )
  return data_dir


def tfds_index(source, k):
  """Which of the images of the fixture source[k] is; tfds shuffles on writing."""
  return [encode(photo(seed=i)) for i in range(11)].index(source[k]["image"])


def test_tfds_is_read(tfds_dir):
  train = open_source("tfds:test_photos", "train", data_dir=str(tfds_dir))
  evaluation = open_source("tfds:test_photos:1.0.0", "eval", data_dir=str(tfds_dir))
  assert train.class_names == ("x", "y", "z")
  assert "8 images, 3 classes" in train.description
  indices = [tfds_index(train, k) for k in range(8)]
  assert sorted(indices) == list(range(8))
  assert [train[k]["label"] for k in range(8)] == [i % 3 for i in indices]
  assert sorted(tfds_index(evaluation, k) for k in range(3)) == [8, 9, 10]
  assert len({train[k]["name"] for k in range(8)}) == 8

  sliced = open_source(
    "tfds:test_photos",
    "eval",
    eval_split="train[25%:75%]",
    data_dir=str(tfds_dir / "test_photos" / "1.0.0"),
  )
  assert [tfds_index(sliced, k) for k in range(len(sliced))] == indices[2:6]


def test_tfds_through_workers(tfds_dir):
  source = open_source("tfds:test_photos", "train", data_dir=str(tfds_dir))
  copy = pickle.loads(pickle.dumps(source))
  assert len(copy) == 8 and copy[3] == source[3]
  assert_same(train_steps(source, 3, workers=1), train_steps(source, 3))


def test_tfds_tensor_images_without_labels(tfds_dir):
  source = open_source("tfds:test_tensors", "train", data_dir=str(tfds_dir))
  assert source.class_names == () and source[0]["label"] == -1
  assert source[0]["image"].shape == (4, 5, 3)
  assert {int(source[k]["image"].min()) for k in range(3)} == {0, 1, 2}
  assert set(train_steps(source, 1)[0]["label"]) == {-1}


def test_tfds_errors(tfds_dir, tmp_path):
  def error(name, data_dir=tfds_dir, **options):
    with pytest.raises(DataError) as caught:
      open_source(f"tfds:{name}", "train", data_dir=str(data_dir), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  assert "no_such_set" in (text := error("no_such_set")) and len(text) < 500
  assert "splits are train, test" in error("test_photos", train_split="dev")
  assert "splits are train" in error("test_photos", train_split="train[:x]")
  assert "1.0.0" in error("test_photos:7.0.0")
  assert "features are text" in error("test_texts")
  unprepared = error("test_photos", tmp_path)
  assert "is not prepared in" in unprepared
  assert "file_format='array_record'" in unprepared
  assert "download_and_prepare()" in unprepared and str(tmp_path) in unprepared
  # The same records under another format's name.
  info = json.loads((tfds_dir / "test_photos/1.0.0/dataset_info.json").read_text())
  other = tmp_path / "test_photos" / "1.0.0"
  other.mkdir(parents=True)
  features = (tfds_dir / "test_photos/1.0.0/features.json").read_text()
  (other / "features.json").write_text(features)
  (other / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
  assert "as tfrecord; expected array_record" in error("test_photos", tmp_path)


# What gets imported.

READ_ALL = """
import sys
import mrmae_jax.data as data
print("early", sorted({"sklearn", "tensorflow_datasets"} & set(sys.modules)))
view = data.center_view((8, 8), 1.0)
for spec in ("tfds:test_photos", "digits"):
  source = data.open_source(spec, "train", data_dir=sys.argv[1])
  batches = data.train_batches(source, view, seed=0, batch_size=4)
  print(next(batches)["image"].shape)
  batches.close()
print("heavy", sorted({"tensorflow", "torch"} & set(sys.modules)))
"""


def test_neither_tensorflow_nor_torch_is_imported(tfds_dir, tmp_path):
  # Empty stand-ins, so that an import succeeds and shows up in sys.modules.
  for name in ("tensorflow", "torch"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
  root = str(pathlib.Path(__file__).parents[1])
  result = subprocess.run(
    [sys.executable, "-c", READ_ALL, str(tfds_dir)],
    env=os.environ | {"PYTHONPATH": os.pathsep.join([root, str(tmp_path)])},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == ["early []", "(4, 8, 8, 3)", "(4, 8, 8, 3)", "heavy []"]
