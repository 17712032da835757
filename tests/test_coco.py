"""COCO's files are read strictly, seen through large-scale jitter, and measured as COCO does."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from mrmae_jax import data, preflight, sharding
from mrmae_jax.boxes import bin_matrix
from mrmae_jax.data import detection
from mrmae_jax.data.sources import annotations, open_source, segmentations
from mrmae_jax.data.views import Views
from mrmae_jax.detection import in_original, paste_masks
from mrmae_jax.errors import ConfigError, DataError, MissingSplitError
from mrmae_jax.evals import coco_ap
from mrmae_jax.train import Task
from tests import tiny
from tests.helpers import coco as fake

GOLDENS = Path(
  os.environ.get("MRMAE_DETECTION_GOLDENS", Path(__file__).parent / "goldens" / "detection")
)
open_coco = functools.partial(open_source, max_dropped=0.01, eval_split="validation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("coco") / "small"
  fake.write(root)
  return root


def read_case(name):
  """Returns the dimensions and the tensors of a case."""
  return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(
    GOLDENS / f"{name}.safetensors"
  )


def read(tmp_path, content, max_dropped=0.01):
  """Reads a file of annotations that holds `content`."""
  path = tmp_path / "instances.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  annotations._read.cache_clear()
  return annotations.read_annotations(str(path), max_dropped)


# --- the source ---


def test_objects_of_a_folder(folder):
  train, held_out = (open_coco(f"coco:{folder}", split) for split in ("train", "eval"))
  assert train.class_names == held_out.class_names == ("cat", "dog", "cow")
  assert train.category_ids == (3, 7, 90) and len(train) == len(held_out) == 2
  assert "2 images, 4 objects of 3 classes, annotations: instances_train.json" in train.description
  example = held_out[0]
  objects = example["objects"]
  assert example["id"] == held_out.image_id(0) == 100 and example["label"] == -1
  assert example["name"].endswith("val/0100.png") and held_out.name(0) == "0100.png"
  assert objects.size == (40, 60) and objects.ids.tolist() == [1000, 1001]
  assert objects.classes.tolist() == [0, 2]  # of the ids 3 and 90
  assert objects.boxes.tolist() == [[4, 6, 24, 16], [30, 20, 54, 36]]
  assert objects.areas.tolist() == [200, 384] and not objects.is_crowd.any()
  mask = segmentations.to_mask(objects.segmentations[0], objects.size)
  assert mask.sum() == 200 and mask[6:16, 4:24].all()


def test_a_source_for_pretraining_reads_no_annotations(folder):
  source = open_source(f"coco:{folder}", "train")
  assert "annotations are not read" in source.description and not source.class_names
  assert len(source) == 2 and set(source[0]) == {"image", "label", "name"}


def test_tasks_that_need_objects_get_them(folder):
  section = ConfigDict(
    dict(source=f"coco:{folder}", train_split="train", eval_split="validation", data_dir="")
    | dict(holdout_every=10, quarantine="", max_skipped=0.5, max_boxes=10)
  )
  assert data.open_split(section, "train").category_ids == (3, 7, 90)
  section.source = "digits"
  with pytest.raises(DataError, match="source='digits' given; expected coco:/path or coco:digits"):
    data.open_split(section, "train")
  with pytest.raises(ConfigError, match="source is not set; use coco:/path or coco:digits, images"):
    preflight.check(tiny.detect_config(data__source=None), 1)


def test_images_are_sorted_and_those_without_objects_only_evaluated(tmp_path):
  content = fake.document(images=4)
  content["images"].reverse()
  one, two, three, four = (copy.deepcopy(content["annotations"][i : i + 2]) for i in (0, 2, 4, 6))
  three[0]["iscrowd"], three[1]["iscrowd"] = 1, 1
  content["annotations"] = [*four, *three, *one]
  fake.write(tmp_path / "x", train=content, val=content)
  train, held_out = (open_coco(f"coco:{tmp_path}/x", split) for split in ("train", "eval"))
  assert [train.image_id(i) for i in range(len(train))] == [1, 4]
  assert "2 images without objects are not trained on" in train.description
  assert [held_out.image_id(i) for i in range(len(held_out))] == [1, 2, 3, 4]
  assert len(held_out.objects(1).ids) == 0 and held_out.objects(2).is_crowd.all()
  assert held_out.objects(3).ids.tolist() == [40, 41]


def test_a_split_may_be_held_out_of_one_folder(tmp_path):
  content = fake.document(images=20)
  fake.write(tmp_path, train=content)
  images = tmp_path / "images"
  (tmp_path / "train").rename(images)
  (tmp_path / "annotations" / "instances_val.json").unlink()
  (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations.json")
  for name in (tmp_path / "val").iterdir():
    name.unlink()
  (tmp_path / "val").rmdir()
  train, held_out = (open_coco(f"coco:{tmp_path}", split) for split in ("train", "eval"))
  assert (len(train), len(held_out)) == (18, 2)
  assert [held_out.image_id(i) for i in range(2)] == [10, 20]


def test_a_fingerprint_changes_with_an_annotation(tmp_path):
  content = fake.document()
  address = fake.write(tmp_path / "x", train=content)
  first = open_coco(address, "train").fingerprint
  content["annotations"][0]["bbox"][0] += 1
  fake.write_annotations(tmp_path / "x", content)
  annotations._read.cache_clear()
  assert open_coco(address, "train").fingerprint != first


def test_digits_have_exact_boxes_and_masks():
  source = open_coco("coco:digits", "eval")
  example, again = source[8], source[8]
  objects = example["objects"]
  assert (len(source), source.class_names[0], source.category_ids[0]) == (200, "0", 1)
  assert np.array_equal(example["image"], again["image"]) and len(objects.ids) > 1
  for box, area, segmentation in zip(objects.boxes, objects.areas, objects.segmentations):
    mask = segmentations.to_mask(segmentation, objects.size)
    assert mask.sum() == area > 0
    assert segmentations.box_of_masks(mask[None])[0].tolist() == box.tolist()


def test_boxes_of_masks_end_behind_the_last_pixel():
  masks = np.zeros((3, 6, 8), bool)
  masks[0, 2, 5] = masks[1] = True
  assert segmentations.box_of_masks(masks).tolist() == [[5, 2, 6, 3], [0, 0, 8, 6], [0, 0, 0, 0]]


# --- bad files: a message each ---


def change(**fields):
  """Returns a function that sets fields of the first annotation."""
  return lambda content: content["annotations"][0].update(fields)


def change_image(**fields):
  return lambda content: content["images"][0].update(fields)


def change_all(key, convert):
  def apply(content):
    for row in content["annotations"]:
      row[key] = convert(row[key])

  return apply


def rle(counts, size=(40, 60)):
  return change(segmentation={"size": list(size), "counts": counts})


REFUSED = {
  "no_images": (
    lambda c: c.pop("images"),
    "no list images; found the keys categories, annotations",
  ),
  "entry": (lambda c: c["images"].append(5), "entry 2 of images is 5; expected an object"),
  "image_id": (change(image_id=77), "1 annotations have an unknown image_id: 77 .annotations 10."),
  "category": (change(category_id=4), "1 annotations have an unknown category_id: 4 "),
  "twice": (change(id=11), "1 ids of annotations stand there twice: 11"),
  "image_twice": (change_image(id=2), "1 ids of images stand there twice: 2"),
  "text_id": (change_image(id="a"), "an image has id='a'; expected a whole number"),
  "name": (change_image(file_name="../x.png"), "expected a path below the images' folder"),
  "size": (change_image(width=10**9), "width=1000000000; expected whole numbers of pixels"),
  "no_size": (change_image(height=None), "height=None"),
  "xyxy": (
    change_all("bbox", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]),
    r"50% of the boxes end outside of their image \(annotations 11, 21\).*like x1, y1, x2, y2",
  ),
  "exchanged": (
    lambda c: [image.update(height=60, width=40) for image in c["images"]],
    "like images whose height and width are exchanged; expected x, y, width, height in pixels",
  ),
  "normalized": (change_all("bbox", lambda b: [x / 60 for x in b]), "no box reaches beyond 1"),
  "negative": (change(bbox=[3, 3, -2, 5]), "1: the box is not x, y, width, height .annotation 10"),
  "three": (change(bbox=[3, 3, 2]), "the box is not x, y, width, height"),
  "text": (change(bbox=[3, 3, "2", 1]), "the box is not x, y, width, height"),
  "nan": (change(bbox=[3, 3, math.nan, 1]), "the box is not x, y, width, height"),
  "huge": (change(bbox=[3, 3, 10**400, 1]), "the box is not x, y, width, height"),
  "no_area": (change(bbox=[3, 3, 0, 5]), "1: the box has no size inside of its image"),
  "outside": (
    change(bbox=[-9, 3, 5, 5]),
    "expected at most the share config.data.max_skipped=0.01",
  ),
  "crowd": (change(iscrowd=2), "iscrowd is neither 0 nor 1"),
  "two_points": (change(segmentation=[[1, 1, 2, 2]]), "not polygons of at least 3 points"),
  "odd": (change(segmentation=[[1, 1, 2, 2, 3, 3, 4]]), "not polygons of at least 3 points"),
  "texts": (change(segmentation=[["1", 1, 2, 2, 3, 3]]), "not polygons of at least 3 points"),
  "far": (change(segmentation=[[1, 1, 9e8, 2, 3, 3]]), "not polygons of at least 3 points"),
  "flat": (change(segmentation=[1, 1, 9, 2, 3, 3]), "not polygons of at least 3 points"),
  "rle_size": (rle([2400], (60, 40)), r"an RLE of size \[60, 40\], its image is \[40, 60\]"),
  "rle_sum": (rle([2000, 300]), "an RLE of 2300 pixels, its image has 2400"),
  "rle_negative": (rle([2500, -100]), "runs that do not fit into its image"),
  "rle_float": (rle([2400.0]), "neither a text nor whole numbers"),
  "rle_cut": (rle("PZ1"[:1] + "o"), "damaged or cut off"),
  "rle_code": (rle("0\x7f"), "damaged or cut off"),
  "rle_long": (rle("P" * 40 + "0"), "a run that is too long"),
  "rle_sum_of_text": (rle("0"), "an RLE of 0 pixels"),
  "segmentation": (change(segmentation="abc"), "neither polygons nor an RLE"),
  "categories": (lambda c: c.update(categories=[]), "no categories"),
  "same_name": (lambda c: c["categories"][0].update(name="dog"), "are called 'dog'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_annotations_that_are_refused(tmp_path, name):
  alter, message = REFUSED[name]
  content = copy.deepcopy(fake.document())
  alter(content)
  with pytest.raises(DataError, match=message):
    read(tmp_path, content)


@pytest.mark.parametrize(
  "text, message",
  [
    ("[1, 2", "cannot be read as JSON"),
    ("[" * 100_000, "cannot be read as JSON"),
    ('[{"image_id": 1, "score": 0.5}]', "is a list that looks like results of a detector"),
    ('{"a": 1}', "no list images, annotations, categories; found the keys a"),
  ],
)
def test_files_that_are_not_cocos(tmp_path, text, message):
  with pytest.raises(DataError, match=message):
    read(tmp_path, text)


def test_a_few_unusable_annotations_are_dropped_and_counted(tmp_path):
  content = fake.document(images=3)
  change(segmentation=[[1, 1, 2, 2]])(content)
  content["annotations"][1]["bbox"] = [5, 5, 0, 3]
  found = read(tmp_path, content, max_dropped=0.5)
  assert found.note.startswith(
    "2 of 6 annotations are not used: 1: the segmentation is not polygon"
  )
  assert "1: the box has no size inside of its image (annotation 11)" in found.note
  # A box without a size is not trained on, but COCO's measures know it.
  assert (
    found.ids.tolist() == [11, 20, 21, 30, 31] and found.is_usable.tolist() == [False] + [True] * 4
  )


def test_folders_that_do_not_fit(tmp_path):
  address = fake.write(tmp_path / "x")
  root = tmp_path / "x"
  (root / "annotations" / "train.json").write_text("{}")
  with pytest.raises(
    DataError, match="several files may annotate 'train'.*config.data.train_split"
  ):
    open_coco(address, "train")
  (root / "annotations" / "train.json").unlink()

  other = fake.document(first_id=100)
  other["categories"] = [*other["categories"][:2], {"id": 90, "name": "horse"}]
  fake.write_annotations(root, other, "val")
  annotations._read.cache_clear()
  with pytest.raises(DataError, match="only the first: 90: horse; only the second: 90: cow"):
    open_coco(address, "eval")

  fake.write_annotations(root, fake.document(first_id=100) | {"annotations": []}, "val")
  annotations._read.cache_clear()
  with pytest.raises(MissingSplitError, match="annotates no object in its 2 images"):
    open_coco(address, "eval")

  (root / "train" / "0001.png").unlink()
  with pytest.raises(DataError, match="1 of 2 images are not in .*train: 0001.png"):
    open_coco(address, "train")
  (root / "annotations" / "instances_train.json").unlink()
  with pytest.raises(
    DataError, match="no annotations of 'train'; looked for annotations/instances_t"
  ):
    open_coco(address, "train")


def test_pictures_of_one_name_in_two_folders_are_told_apart(tmp_path):
  content = fake.document()
  address = fake.write(tmp_path / "x", train=content)
  train = tmp_path / "x" / "train"
  for image, folder in zip(content["images"], ("a", "b")):
    (train / folder).mkdir()
    (train / image["file_name"]).rename(train / folder / "same.png")
    image["file_name"] = f"{folder}\\same.png"  # as Windows writes it
  fake.write_annotations(tmp_path / "x", content)
  annotations._read.cache_clear()
  source = open_coco(address, "train")
  assert [source.name(i) for i in range(2)] == ["a/same.png", "b/same.png"]


def test_random_damage_is_refused_or_harmless(tmp_path):
  """A changed value gives a message, or a file whose objects can all be drawn."""
  rng = random.Random(0)
  values = [None, True, -1, 0, 2, 1e300, math.nan, 10**30, "x", [], {}, [[]], [None], {"size": 1}]
  for _ in range(300):
    content = json.loads(json.dumps(fake.document()))
    content["annotations"][1]["segmentation"] = {"size": [40, 60], "counts": [900, 500, 1000]}
    place, value = None, content
    while isinstance(value, (dict, list)) and value and (place is None or rng.random() < 0.9):
      key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
      place, value = value, value[key]
    place[key] = rng.choice(values)
    try:
      found = read(tmp_path, content, max_dropped=1.0)
    except DataError as error:
      assert "instances.json: " in str(error)
      continue
    for i, segmentation in enumerate(map(found.segmentation, range(len(found.ids)))):
      image = np.searchsorted(found.starts, i, side="right") - 1
      size = tuple(found.sizes[image].tolist())
      if segmentation is not None:
        assert segmentations.to_mask(segmentation, size).shape == size


# --- run lengths ---


def random_mask(seed, size=(17, 23)):
  rng = np.random.default_rng(seed)
  return np.cumsum(rng.random(size) < 0.1, axis=0) % 2 == 1


def test_run_lengths_are_those_of_pycocotools():
  mask_util = segmentations.load_pycocotools()
  for seed in range(20):
    mask = random_mask(seed) if seed else np.ones((300, 500), bool)
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = encoded["counts"].decode()
    counts = annotations.encode_mask(mask)
    assert annotations.parse_counts(text).tolist() == counts
    checked = annotations.check_rle({"size": list(mask.shape), "counts": counts}, mask.shape)
    for segmentation in (text, checked):
      assert np.array_equal(segmentations.to_mask(segmentation, mask.shape), mask)


def test_empty_runs_are_joined():
  join = lambda counts: annotations.check_rle({"size": [2, 5], "counts": counts}, (2, 5))
  assert join([2, 3, 0, 1, 4]) == [2, 4, 4]
  assert join([0, 3, 0, 0, 0, 4, 3]) == [0, 7, 3]
  assert join([5, 0, 5]) == [10]


def test_damaged_run_lengths_never_reach_pycocotools():
  """What passes the check has runs that sum up to the image: its C code trusts them."""
  mask_util, rng = segmentations.load_pycocotools(), random.Random(0)
  mask = random_mask(3)
  good = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
  passed = 0
  for _ in range(3000):
    letters = list(good)
    for _ in range(rng.randint(1, 3)):
      where = rng.randrange(len(letters))
      letters[where] = rng.choice([chr(rng.randrange(30, 130)), "", letters[where] * 2])
    try:
      checked = annotations.check_rle(
        {"size": list(mask.shape), "counts": "".join(letters)}, mask.shape
      )
    except ValueError:
      continue
    passed += 1
    counts = annotations.parse_counts(checked) if isinstance(checked, str) else checked
    assert min(counts) >= 0 and sum(counts) == mask.size
    assert segmentations.to_mask(checked, mask.shape).shape == mask.shape
  assert passed


# --- views ---


def test_large_scale_jitter():
  dims, tensors = read_case("lsj")
  size, old = (dims["target"],) * 2, (dims["height"], dims["width"])
  for i, drawn in enumerate(dims["cases"]):
    jitter = detection.make_jitter(
      old, size, drawn["flip"], drawn["scale"], drawn["offset_fraction"]
    )
    assert jitter[2:] == tuple(tuple(drawn[x]) for x in ("resized", "offset", "size"))
    np.testing.assert_array_equal(jitter.image(tensors["in.image"]), tensors[f"out.{i}.image"])
    moved = [
      detection.move_object(box, polygons, jitter)
      for box, polygons in zip(tensors["in.boxes"], dims["polygons"])
    ]
    kept = [k for k, (box, _) in enumerate(moved) if min(box[2:] - box[:2]) > 1e-5]
    assert kept == tensors[f"out.{i}.kept"].tolist()
    np.testing.assert_allclose([moved[k][0] for k in kept], tensors[f"out.{i}.boxes"], atol=1e-4)
    # Polygons that are cut get new corners in the reference, which move single pixels.
    allowed = 4 * (jitter.resized != jitter.shown)
    for k, mask in zip(kept, tensors[f"out.{i}.masks"]):
      assert (moved[k][1] != mask).sum() <= allowed
  whole = detection.fit(old, size).image(tensors["in.image"])
  np.testing.assert_array_equal(whole, tensors["out.test.image"])


def test_boxes_of_polygons_are_those_of_what_is_shown():
  box = lambda ring, size: detection.box_of_polygons([np.array(ring, float)], size).tolist()
  square = [(-5, -5), (50, -5), (50, 60), (-5, 60)]
  assert box(square, (20, 30)) == [0, 0, 30, 20]  # only the image's corners
  assert box([(-5, 5), (10, 5), (10, 8), (-5, 8)], (20, 30)) == [0, 5, 10, 8]
  # Both arms of a U reach in, the upper one alone is shown: the other's edge does not count.
  u = [(-9, 0), (5, 0), (5, 2), (-5, 2), (-5, 20), (5, 20), (5, 25), (-9, 25)]
  assert box(u, (10, 30)) == [0, 0, 5, 2]
  assert box([(40, 1), (50, 1), (45, 5)], (20, 30)) == [0, 0, 0, 0]


def test_masks_of_a_batch_are_cut_out_by_roi_align():
  y, x = np.mgrid[:600, :800]
  matrix = jax.jit(functools.partial(bin_matrix, bins=56, samples=8), static_argnames="length")
  for radius, center in ((280, (300, 400)), (90, (100, 120)), (9, (20, 30))):
    mask = (y - center[0]) ** 2 + (x - 1.3 * center[1]) ** 2 < radius**2
    box = segmentations.box_of_masks(mask[None])[0].astype(float) + (0.3, -0.4, 0.2, 0.1)
    rows, columns = (
      np.asarray(matrix(box[i], box[i + 2], length=mask.shape[1 - i])) for i in (1, 0)
    )
    exact = rows @ mask @ columns.T
    found = detection.crop_mask(mask, box) / 255
    assert np.abs(found - exact).mean() < 0.01 and ((found >= 0.5) != (exact >= 0.5)).mean() < 0.01


def view(**fields):
  return data.DetectionView((64, 64), 3, fields.pop("max_boxes", 4), **fields)


def test_a_view_pads_what_varies(folder):
  example = open_coco(f"coco:{folder}", "train")[0]
  row = view()(example, np.random.default_rng(0))
  assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == {
    "image": ((64, 64, 3), "uint8"),
    "size": ((2,), "int32"),
    "boxes": ((4, 4), "float32"),
    "classes": ((4,), "int32"),
    "masks": ((4, 56, 56), "uint8"),
  }
  assert row["size"].tolist() == [43, 64] and not row["image"][43:].any()
  assert row["classes"].tolist() == [2, 0, -1, -1]  # the largest first
  scale = 64 / 60
  np.testing.assert_allclose(row["boxes"][0], np.array([30, 20, 54, 36]) * scale, rtol=0.02)
  # Rectangles fill their boxes but for pixels that they share with the ground.
  assert (row["masks"][:2, 4:-4, 4:-4] == 255).all() and not row["masks"][2:].any()


def test_flips_move_boxes_and_masks_with_the_pixels(folder):
  example = open_coco(f"coco:{folder}", "train")[0]
  seen = set()
  for seed in range(8):
    row = view(flip=True, scale=(0.5, 2.0))(example, np.random.default_rng(seed))
    for box, mask in zip(row["boxes"], row["masks"][row["classes"] >= 0]):
      x1, y1, x2, y2 = np.rint(box).astype(int)
      if min(x2 - x1, y2 - y1) > 6:
        assert (row["image"][y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] > 150).all()  # the bright rectangle
        assert (mask[14:-14, 14:-14] == 255).all()
    seen.add(bool(row["boxes"][1, 0] > 32))
  assert seen == {True, False}


def test_masks_of_run_lengths_and_polygons_agree():
  polygon = [[4, 6, 24, 6, 24, 16, 4, 16]]
  counts = annotations.encode_mask(segmentations.to_mask(polygon, (40, 60)))
  jitter = detection.make_jitter((40, 60), (64, 64), True, 1.3, 0.5)
  (box, mask), (same, other) = (
    detection.move_object(np.array([4.0, 6, 24, 16]), x, jitter) for x in (polygon, counts)
  )
  assert np.abs(box - same).max() < 1.5 and (mask & other).sum() / (mask | other).sum() > 0.9


def test_crowds_and_boxes_without_a_size_are_measured_alone(tmp_path):
  content = fake.document()
  crowd, run_lengths, flat, _ = content["annotations"]
  crowd["iscrowd"] = 1  # it decides, and not the form of the mask
  run_lengths["segmentation"] = {"size": [40, 60], "counts": [900, 500, 1000]}
  flat["bbox"][2] = 0  # what its polygon says counts no more
  source = open_coco(fake.write(tmp_path / "x", train=content), "train", max_dropped=0.3)
  assert "2 images, 2 objects of 3 classes, annotations" in source.description
  assert [source.objects(i).is_trained.tolist() for i in range(2)] == [[False, True]] * 2
  assert [
    view()(source[i], np.random.default_rng(0))["classes"][:2].tolist() for i in range(2)
  ] == [[2, -1]] * 2
  truth = coco_ap.ground_truth(source, has_masks=True)["annotations"]
  assert [row["iscrowd"] for row in truth] == [1, 0, 0, 0]
  assert segmentations.load_pycocotools().area(truth[1]["segmentation"]) == 500


def test_objects_outside_of_what_is_seen_are_not_trained_on(folder):
  example = open_coco(f"coco:{folder}", "train")[0]
  objects = example["objects"]
  assert view(max_boxes=1)(example, np.random.default_rng(0))["classes"].tolist() == [2]
  nothing = example | {"objects": objects._replace(is_trained=np.array([False, False]))}
  row = view()(nothing, np.random.default_rng(0))
  assert (row["classes"] == -1).all() and not row["boxes"].any() and not row["masks"].any()


def test_an_image_of_another_size_than_annotated_is_refused(folder):
  example = open_coco(f"coco:{folder}", "train")[0]
  wrong = example | {"objects": example["objects"]._replace(size=(41, 60))}
  with pytest.raises(
    DataError, match="0001.png: 40 x 60 pixels, annotated as 41 x 60 .image 1.; res"
  ):
    view()(wrong, np.random.default_rng(0))
  file = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(file, "JPEG", exif=exif)
  turned = example | {
    "image": file.getvalue(),
    "objects": example["objects"]._replace(size=(60, 40)),
  }
  with pytest.raises(DataError, match="the annotation is upright.*set config.data.exif=apply"):
    view()(turned, np.random.default_rng(0))
  view(exif="apply")(turned, np.random.default_rng(0))


def test_objects_without_masks_and_too_many_are_told(tmp_path):
  content = fake.document()
  del content["annotations"][1]["segmentation"]
  source = open_coco(fake.write(tmp_path / "x", train=content), "train")
  assert source.objects(0).segmentations[1] is None
  assert "4 objects of 3 classes, 1 of them without a mask, annotations" in source.description
  with pytest.raises(
    DataError, match="annotation 11 has no segmentation; add masks, or train boxes"
  ):
    data.check_objects(source, 10, has_masks=True)
  assert data.check_objects(source, 10, has_masks=False) == ""
  note = data.check_objects(source, 1, has_masks=False)
  assert note.startswith("2 images have more than config.data.max_boxes=1 objects: the smallest 2")
  with pytest.raises(DataError, match="annotation 11 has no segmentation"):
    view()(source[0], np.random.default_rng(0))
  assert "masks" not in view(has_masks=False)(source[0], np.random.default_rng(0))


def test_batches_of_objects_without_those_in_quarantine(tmp_path):
  address = fake.write(tmp_path / "x", train=fake.document(images=5))
  (tmp_path / "bad.json").write_text('{"train": ["0002.png"]}')
  source = open_coco(address, "train", quarantine=str(tmp_path / "bad.json"))
  assert [source.image_id(i) for i in range(len(source))] == [1, 3, 4, 5]
  assert source.category_ids == (3, 7, 90) and source.objects(1).ids.tolist() == [30, 31]
  batches = data.train_batches(source, view(flip=True), batch_size=2, seed=0)
  batch = next(batches)
  batches.close()
  assert batch["boxes"].shape == (2, 4, 4) and batch["masks"].shape == (2, 4, 56, 56)
  assert (batch["classes"][:, :2] >= 0).all()


# --- COCO's measures ---


def compare_measures(found, expected):
  numbers = [expected[name] for name in AP_NAMES]
  for (name, x), y in zip(found.items(), numbers):
    assert math.isnan(x) if y in (-1, None) else abs(x - y) < 1e-9, (name, x, y)


AP_NAMES = "AP AP50 AP75 APs APm APl AR@1 AR@10 AR@100 ARs ARm ARl".split()


def test_measures_are_cocos():
  expected, truth, results = (
    json.loads((GOLDENS / f"{name}.json").read_text()) for name in ("ap", "ap_gt", "ap_dt")
  )
  before = copy.deepcopy((truth, results))
  ids = [image["id"] for image in truth["images"]]
  for kind in ("bbox", "segm"):
    compare_measures(coco_ap.measure(truth, results, kind, ids), expected[kind])
    shuffled = random.Random(1).sample(results, len(results))
    found = coco_ap.measure(truth, shuffled, kind, ids)
    assert abs(found["ap"] - expected[kind]["AP"]) < 0.02  # equal scores come in another order
  some = expected["bbox_of_two_images"]["images"]
  kept = [row for row in results if row["image_id"] in some]
  compare_measures(coco_ap.measure(truth, kept, "bbox", some), expected["bbox_of_two_images"])
  assert (truth, results) == before


def test_no_detections_are_zero_and_no_truth_is_not_a_number():
  truth = fake.document()
  ids = [image["id"] for image in truth["images"]]
  nothing = coco_ap.measure(truth, [], "bbox", ids)
  assert nothing["ap"] == nothing["ar100"] == nothing["ap_small"] == 0
  assert math.isnan(nothing["ap_large"])
  assert all(
    map(math.isnan, coco_ap.measure(truth | {"annotations": []}, [], "segm", ids).values())
  )


def feed_back(truth, kind):
  """Returns the measures of the truth as detections."""
  results = [
    {key: row[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9}
    for row in truth["annotations"]
    if not row["iscrowd"]
  ]
  return coco_ap.measure(truth, results, kind, [image["id"] for image in truth["images"]])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_itself_has_a_precision_of_one(tmp_path, kind):
  content = fake.document()
  content["annotations"][0]["id"] = 0  # pycocotools takes it for no match
  source = open_coco(fake.write(tmp_path / "x", train=content), "train")
  found = feed_back(coco_ap.ground_truth(source, has_masks=True), kind)
  assert found["ap"] == found["ar100"] == 1
  content["annotations"][1]["area"] = None
  fake.write_annotations(tmp_path / "x", content)
  annotations._read.cache_clear()
  truth = coco_ap.ground_truth(open_coco(f"coco:{tmp_path}/x", "train"), has_masks=True)
  assert [row["area"] for row in truth["annotations"]][:2] == [200, 384]


def test_detections_come_back_to_the_original_pixels():
  dims, tensors = read_case("mask_rcnn")
  for i, expected in enumerate(dims["postprocessed"]):
    row = {
      "boxes": tensors["out.det_boxes"][i],
      "scores": tensors["out.det_scores"][i],
      "classes": tensors["out.det_classes"][i],
      "masks": tensors["out.det_masks"][i],
      "is_valid": tensors["out.det_classes"][i] >= 0,
    }
    size, ids = tuple(dims["original_sizes"][i]), range(10, 10 + dims["classes"])
    found = in_original(row, dims["image_sizes"][i], size)
    results = coco_ap.to_results(found, paste_masks(found, size), 5, ids)
    corners = [(x, y, x + w, y + h) for x, y, w, h in (result["bbox"] for result in results)]
    np.testing.assert_allclose(corners, expected["boxes"], atol=1e-3)
    np.testing.assert_allclose([x["score"] for x in results], expected["scores"], atol=1e-5)
    assert [x["category_id"] - 10 for x in results] == expected["classes"]
    for result, text in zip(results, expected["rle"]):
      ours, theirs = (
        segmentations.load_pycocotools().decode(
          {"size": dims["original_sizes"][i], "counts": counts}
        )
        for counts in (result["segmentation"]["counts"], text)
      )
      assert (ours != theirs).sum() <= 1  # of values within 1e-5 of 0.5
    assert json.loads(json.dumps(results)) == results


def perfect_task(source, image_size, masks=True):
  """A task that detects the objects of the image whose id stands in its first pixels."""
  most, rows = 6, 1 + max(source.image_id(i) for i in range(len(source)))
  table = {
    "boxes": np.zeros((rows, most, 4), np.float32),
    "scores": np.zeros((rows, most), np.float32),
    "classes": np.full((rows, most), -1, np.int32),
    "masks": np.zeros((rows, most, 28, 28), np.float32),
    "is_truncated": np.arange(rows) % 2 == 1,
  }
  for index in range(len(source)):
    image_id, objects = source.image_id(index), source.objects(index)
    jitter = detection.fit(objects.size, image_size)
    for i, (box, segmentation) in enumerate(zip(objects.boxes, objects.segmentations)):
      moved, mask = detection.move_object(box, segmentation, jitter)
      values = moved, 0.9 - 0.1 * i, objects.classes[i], detection.crop_mask(mask, moved, 28) / 255
      for name, value in zip(table, values):
        table[name][image_id, i] = value
  table["is_valid"] = table["classes"] >= 0
  table = {name: x for name, x in table.items() if masks or name != "masks"}

  def predict(params, extra, frozen, batch, keys):
    del params, extra, frozen, keys
    return {name: jnp.asarray(x)[batch["image"][:, 0, 0, 0]] for name, x in table.items()}

  views = Views(None, data.WholeView(image_size, 3))
  fields = dict(init=None, loss=None, optimizer=None)
  return Task(predict=predict, views=views, source=lambda split: source, **fields)


@pytest.mark.parametrize("masks", [True, False])
def test_every_image_is_measured_once_on_all_devices(tmp_path, masks):
  content = fake.document(first_id=1, images=11)
  root = tmp_path / "x"
  fake.write(root, val=content)
  for image in content["images"]:  # its id in the first pixel, far from any box
    path = root / "val" / image["file_name"]
    picture = np.asarray(Image.open(path)).copy()
    picture[:4, :4] = image["id"]
    Image.fromarray(picture).save(path)
  source = open_coco(f"coco:{root}", "eval")
  loader = dict(workers=0, on_error="raise", max_skipped=0.01, timeout_s=60.0)
  config = ConfigDict(
    dict(image_size=(64, 64), hang_s=0, data=dict(mean=(0.5,) * 3, exif="ignore", **loader))
    | dict(rcnn=dict(masks=masks))
  )
  task, mesh = perfect_task(source, (64, 64), masks), sharding.make_mesh()
  options = dict(batch_size=3, images=2)
  evaluator = coco_ap.Evaluator(task, (), config, mesh, tmp_path, **options)
  found = evaluator.run({}, (), 7)
  assert found["images"] == 11 and found["detections"] == 22 and found["truncated"] == 6
  assert found["box_ap"] > 0.95 and ("mask_ap" in found) == masks
  assert not masks or found["mask_ap"] > 0.9
  assert math.isnan(found["box_ap_large"]) and set(evaluator.results) <= set(found)
  ((path, results),) = found["files"].items()
  assert path == tmp_path / "detections" / "step_0000007.json"
  written = json.loads(results)
  assert len(written) == 22 and {row["category_id"] for row in written} == {3, 90}
  (path, picture), *_ = found["pictures"].items()
  assert path.suffix == ".png" and picture.shape[0] > 640

  for row in content["annotations"]:
    row.pop("segmentation")
  fake.write_annotations(root, content, "val")
  task = task._replace(source=functools.partial(open_coco, f"coco:{root}"))
  raises = pytest.raises(DataError, match="10 and 21 others has no segmentation")
  with raises if masks else contextlib.nullcontext():
    coco_ap.Evaluator(task, (), config, mesh, tmp_path, **options)


def test_without_pycocotools_a_message_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "pycocotools", None)
  with pytest.raises(DataError, match=r'pip install "mrmae_jax\[detect\]"'):
    coco_ap.Evaluator(None, (), None, None, None, batch_size=1, images=0)
  with pytest.raises(DataError, match="masks and COCO's measures need pycocotools"):
    data.detection_views(tiny.detect_config(), has_masks=True)
  data.detection_views(tiny.detect_config(), has_masks=False)


@pytest.mark.parametrize("problem", ["annotates no object", "no annotations of 'eval'"])
def test_without_annotated_images_measures_are_left_out_with_a_note(tmp_path, problem):
  empty = fake.document(first_id=100) | {"annotations": []}
  address = fake.write(tmp_path / "x", val=empty)
  if "no annotations" in problem:
    (tmp_path / "x" / "annotations" / "instances_val.json").unlink()
  task = perfect_task(open_coco(address, "train"), (64, 64))._replace(
    source=functools.partial(open_coco, address)
  )
  config = ConfigDict(dict(data=dict(mean=(0.5,) * 3)))
  evaluator = coco_ap.Evaluator(
    task, (), config, sharding.make_mesh(), tmp_path, batch_size=1, images=0
  )
  assert evaluator.note.startswith("COCO's measures are left out: coco:")
  assert problem in evaluator.note and "config.data" in evaluator.note
  assert evaluator.run({}, (), 1) == {} and evaluator.results == ()
  run = tiny.detect_config(data__source=address)
  preflight.check(run, 1)
  assert preflight.open_task(run).pretrained == {}  # trains all the same
  run.data.source = f"{address}/train"
  with pytest.raises(ConfigError, match="no annotations of 'train'"):
    preflight.check(run, 1)
