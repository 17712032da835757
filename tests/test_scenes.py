"""Scenes: an image and the class of every pixel, from files to the batches of training."""

import functools
import json
import os
import pickle
import types
import zipfile
import zlib
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mrmae_jax import bilinear, data, segmentation
from mrmae_jax.cli.verify import inspect_images, summarize
from mrmae_jax.constants import IGNORED, IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.data import photometric
from mrmae_jax.data.scenes import choose_corner, resize_label
from mrmae_jax.data.sources.scenes import read_classes, read_label, to_classes
from mrmae_jax.errors import DataError
from tests.helpers.cli import run_command
from tests.helpers.images import assert_same, encode, photo, png_header, take

GOLDENS = Path(
  os.environ.get("MRMAE_SEGMENTATION_GOLDENS", Path(__file__).parent / "goldens" / "segmentation")
)
SAMPLE = os.environ.get("MRMAE_SCENEPARSING_SAMPLE", "")  # three pictures of ADE20K
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*.json"))}
CLASSES = "sky\nsea\nsand\n"


def cases(kind):
  return pytest.mark.parametrize("name", [name for name in CASES if name.startswith(kind)])


def label_of(height=30, width=40, seed=0, values=(0, 1, 2)):
  """Blocks of 5 x 5 pixels of random values, uint8 [H, W]."""
  coarse = np.random.default_rng(seed).choice(np.array(values, np.uint8), (height // 5, width // 5))
  return coarse.repeat(5, 0).repeat(5, 1)


def write(root, files):
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return root


def scene_files(splits=("training/", "validation/"), count=3, classes=CLASSES):
  """{name: content} of scenes in ADE20K's layout."""
  files = {"classes.txt": classes}
  for seed in range(count * len(splits)):
    name = f"{splits[seed // count]}scene_{seed % count}"
    files[f"images/{name}.jpg"] = encode(photo(30, 40, seed))
    files[f"annotations/{name}.png"] = encode(label_of(seed=seed), "PNG")
  return files


def scenes(root, split="train", zero_is_unlabelled=False, **rules):
  rules = dict(eval_split="validation") | rules
  return data.open_source(f"scenes:{root}", split, zero_is_unlabelled=zero_is_unlabelled, **rules)


def make_views(size=(24, 32), **values):
  keys = dict(
    mean=IMAGENET_MEAN, std=IMAGENET_STD, flip=True, resize="pillow", exif="ignore", scale=(0.5, 2)
  )
  section = types.SimpleNamespace(**keys | dict(max_share=0.75, photometric=True) | values)
  return data.scene_views(types.SimpleNamespace(image_size=size, data=section))


# The published laws.


@cases("photometric")
def test_colors_change_as_published(name):
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  for i, case in enumerate(CASES[name]["cases"]):
    ours = photometric.distort(tensors[f"in.image{i}"], photometric.Distortion(**case))
    error = np.abs(ours.astype(int) - tensors[f"out.image{i}"])
    assert error.max() <= 1 and (error > 0).mean() < 1e-3, i
  hsv = photometric.to_hsv(tensors["in.rgb"])
  np.testing.assert_array_equal(np.stack(hsv, axis=-1), tensors["out.hsv"])
  rgb = photometric.to_rgb(*np.moveaxis(tensors["in.hsv"], 2, 0)).astype(int)
  assert np.abs(rgb - tensors["out.rgb"]).max() <= 1 and (rgb != tensors["out.rgb"]).mean() < 3e-3


def test_changes_are_drawn_as_published():
  rng = np.random.default_rng(0)
  draws = [photometric.draw_distortion(rng) for _ in range(2000)]
  ranges = dict(brightness=(-32, 32), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-18, 17))
  for name, (low, high) in ranges.items():
    drawn = np.array([x for draw in draws if (x := getattr(draw, name)) is not None])
    assert 900 < len(drawn) < 1100 and drawn.min() >= low and drawn.max() <= high
    assert drawn.min() < low + 0.1 * (high - low) and drawn.max() > high - 0.1 * (high - low)
  assert 900 < sum(draw.contrast_first for draw in draws) < 1100


@cases("crop_law")
def test_crops_are_chosen_as_published(name):
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  for i, case in enumerate(CASES[name]["cases"]):
    label, size, corners = tensors[f"in.label{i}"], case["crop"], iter(case["offsets_drawn"])
    corner = choose_corner(label, size, case["cat_max_ratio"], corners)
    assert list(corner) == case["chosen"] and next(corners, None) is None, i
    (top, left), (height, width) = corner, size
    assert list(label[top : top + height, left : left + width].shape) == case["size"]
    for drawn in case["offsets_drawn"]:
      room = [max(old - new, 0) for old, new in zip(label.shape, size)]
      assert all(0 <= x <= most for x, most in zip(drawn, room))


@cases("resize_law")
@pytest.mark.parametrize("resize", ["pillow", "cv2"])
def test_labels_are_resized_to_nearest_neighbors(name, resize):
  if resize == "cv2":
    pytest.importorskip("cv2")
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  for key in [key for key in tensors if key.startswith(f"out.label_{resize}_")]:
    label = tensors[f"in.label{key.rsplit('_', 1)[1]}"]
    ours = resize_label(label, tensors[key].shape, resize)
    np.testing.assert_array_equal(ours, tensors[key])


@pytest.mark.parametrize("size", [(45, 61), (20, 31), (30, 40)])
def test_a_box_of_a_resized_image_is_that_of_the_whole(size):
  image, box = photo(30, 40), (slice(3, 19), slice(7, 29))
  whole = bilinear.resize_image(image, size)
  np.testing.assert_array_equal(bilinear.resize_image(image, size, box), whole[box])


@pytest.mark.skipif(not SAMPLE, reason="MRMAE_SCENEPARSING_SAMPLE is not set")
def test_pictures_of_ade20k(tmp_path):
  for name in ("images", "annotations"):
    (tmp_path / name).symlink_to(Path(SAMPLE) / "sampleData" / name)
  (tmp_path / "objectInfo150.csv").symlink_to(Path(SAMPLE) / "objectInfo150.csv")
  source, golden = scenes(tmp_path, zero_is_unlabelled=True, holdout_every=0), CASES["ade_sample"]
  assert len(source.class_names) == 150 and source.class_names[:2] == ("wall", "building")
  intersect, predicted, true = np.zeros((3, 150), np.int64)
  for i, case in enumerate(golden["images"]):
    image, label = data.decode_scene(source[i], 3)
    assert list(label.shape) == case["size"] == list(image.shape[:2])
    assert (label == IGNORED).sum() == case["unlabelled"]
    is_valid = label != IGNORED
    assert len(np.unique(label[is_valid])) == case["classes_true"]
    assert label[is_valid].max() == case["largest_label"] - 1
    shifted = np.roll(np.where(is_valid, label, 0), 7, axis=1)[is_valid]
    hits = shifted[shifted == label[is_valid]]
    assert len(hits) == case["intersect"]
    for total, x in zip((intersect, predicted, true), (hits, shifted, label[is_valid])):
      total += np.bincount(x, minlength=150)
  union = predicted + true - intersect
  assert np.mean((intersect / np.maximum(union, 1))[union > 0]) == pytest.approx(golden["mIoU"])


# Label files.


def gray_png(values, bits):
  """A gray PNG of 1, 2 or 4 bits, which Pillow does not write; rows must fill whole bytes."""
  head = bytearray(png_header(values.shape[1], values.shape[0])[:33])
  head[24:26] = bits, 0  # depth, gray
  head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
  places = np.unpackbits(values[:, :, None].astype(np.uint8), axis=2)[:, :, -bits:]
  rows = np.packbits(places.reshape(len(values), -1), axis=1)
  body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
  chunks = b""
  for kind, content in ((b"IDAT", body), (b"IEND", b"")):
    check = zlib.crc32(kind + content).to_bytes(4, "big")
    chunks += len(content).to_bytes(4, "big") + kind + content + check
  return bytes(head) + chunks


def palette_png(values, **options):
  picture = Image.fromarray(values)
  picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
  return encode(picture, "PNG", **options)


@pytest.mark.parametrize("form", ["L", "P", "P4", "P2", "1", "I;16", "gray2", "gray4", "alpha_P"])
def test_values_are_read_as_they_are_stored(form):
  values = label_of(values=(0, 1) if form == "1" else (0, 1, 2))
  stored = {
    "L": lambda: encode(values, "PNG"),
    "P": lambda: palette_png(values),
    "P4": lambda: palette_png(values, bits=4),
    "P2": lambda: palette_png(values, bits=2),
    "alpha_P": lambda: palette_png(values, transparency=1),
    "1": lambda: encode(Image.fromarray(values.astype(bool)), "PNG"),
    "I;16": lambda: encode(values.astype(np.uint16), "PNG"),
    "gray2": lambda: gray_png(values, 2),
    "gray4": lambda: gray_png(values, 4),
  }[form]()
  label = read_label(stored, "x.png", 3, False)
  assert label.dtype == np.uint8
  np.testing.assert_array_equal(label, values)


@pytest.mark.parametrize("zero_is_unlabelled", [False, True])
def test_every_value_means_one_class_or_none(zero_is_unlabelled):
  values = np.array([[0, 1, 2, 3, 255]], np.uint8)
  count = 3 if zero_is_unlabelled else 4
  expected = [255, 0, 1, 2, 255] if zero_is_unlabelled else [0, 1, 2, 3, 255]
  label = read_label(encode(values, "PNG"), "x.png", count, zero_is_unlabelled)
  assert label.tolist() == [expected]


@cases("metrics")
def test_all_stored_values_mean_what_the_reference_says(name):
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  classes = to_classes(tensors["in.raw_labels"][None], "x.png", 254, True)
  np.testing.assert_array_equal(classes[0], tensors["out.zero_is_unlabelled"])


COLORS = photo(8, 8)
BINARY = np.array([[0, 255, 255]], np.uint8)
REFUSED = {
  "rgb": (encode(COLORS, "PNG"), "x.png: label has 3 channels; expected an index PNG"),
  "rgba": (encode(Image.fromarray(COLORS).convert("RGBA"), "PNG"), "label has 4 channels"),
  "la": (encode(Image.fromarray(COLORS).convert("LA"), "PNG"), "label has 2 channels"),
  "jpeg": (encode(COLORS[:, :, 0]), "label is a JPEG file; compression invents classes"),
  "webp": (encode(COLORS, "WEBP"), "label is a WEBP file; compression invents classes"),
  "16 bits": (encode(np.full((2, 2), 300, np.uint16), "PNG"), "16 bits and values up to 300"),
  "range": (encode(np.array([[0, 7, 7]], np.uint8), "PNG"), "value 7 in 2 pixels; expected 0 to 2"),
  "several": (encode(np.array([[9, 7]], np.uint8), "PNG"), r"7 in 1 pixels \(and 1 other values\)"),
  "shifted": (encode(np.array([[1, 2, 3]], np.uint8), "PNG"), "is zero_is_unlabelled right"),
  "254": (encode(np.array([[0, 254]], np.uint8), "PNG"), "value 254 in 1 pixels"),
  "empty": (b"", "x.png: the file is empty"),
  "damaged": (encode(label_of(), "PNG")[:-40], "x.png: cannot be decoded"),
  "text": (b"<html>", "x.png: cannot be decoded"),
  "bomb": (png_header(8000, 8000), "its header claims 8000 x 8000 pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_are_refused(case):
  stored, message = REFUSED[case]
  with pytest.raises(DataError, match=message):
    read_label(stored, "x.png", 3, False)


@pytest.mark.parametrize("zero_is_unlabelled", [False, True])
def test_binary_masks_of_0_and_255_are_refused(zero_is_unlabelled):
  message = "values 0 and 255 only: 255 means ignored. Store the second class as 1"
  with pytest.raises(DataError, match=message):
    read_label(encode(BINARY, "PNG"), "x.png", 2, zero_is_unlabelled)
  # With more classes such a scene shows the first one, and parts that nobody labelled.
  assert read_label(encode(BINARY, "PNG"), "x.png", 3, False).tolist() == BINARY.tolist()


# Folders.


@pytest.mark.parametrize(
  "splits", [("training/", "validation/"), ("train/", "val/"), ("train/a/", "val/a/")]
)
def test_folders_of_scenes(tmp_path, splits):
  files = scene_files(splits)
  source = pickle.loads(pickle.dumps(scenes(write(tmp_path, files))))
  assert len(source) == 3 and source.class_names == ("sky", "sea", "sand")
  held_out = scenes(tmp_path, "eval")
  assert held_out.class_names == source.class_names
  image, label = data.decode_scene(held_out[1], 3)
  assert image.shape == (30, 40, 3)
  np.testing.assert_array_equal(label, label_of(seed=4))
  assert held_out.name(1).endswith("scene_1.jpg")


def test_scenes_without_splits_are_held_out(tmp_path):
  write(tmp_path, scene_files(("",), count=4))
  rules = dict(holdout_every=2)
  names = [
    [s.name(i) for i in range(len(s))]
    for s in (scenes(tmp_path, split, **rules) for split in ("train", "eval"))
  ]
  assert names == [["scene_0.jpg", "scene_2.jpg"], ["scene_1.jpg", "scene_3.jpg"]]
  np.testing.assert_array_equal(scenes(tmp_path, "eval", **rules)[1]["label"], label_of(seed=3))


def test_an_archive_is_read_as_its_folder(tmp_path):
  files = scene_files()
  write(tmp_path / "scenes", files)
  with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as archive:
    for name, content in files.items():
      archive.writestr(f"scenes/{name}", content)
  folder, packed = scenes(tmp_path / "scenes"), scenes(tmp_path / "scenes.zip")
  assert folder.fingerprint == packed.fingerprint and folder.class_names == packed.class_names
  np.testing.assert_array_equal(folder[2]["label"], packed[2]["label"])


def test_images_alone_need_no_labels(tmp_path):
  write(tmp_path, {k: x for k, x in scene_files().items() if k.startswith("images")})
  source = scenes(tmp_path, zero_is_unlabelled=None)
  assert source[0]["label"] == -1 and source.class_names == () and len(source) == 3
  assert "labels are not read" in source.description
  assert scenes("digits", zero_is_unlabelled=None)[0]["label"] == -1


def test_names_of_ade20k(tmp_path):
  rows = "Idx\tRatio\tTrain\tVal\tName\n1  \t0.1\t 7\t1\twall\n2\t0.1\t7\t1\tbuilding, edifice\n"
  rows += "3\t0.1\t7\t1\tscreen, CRT screen\n4\t0.1\t7\t1\tscreen, projection screen\n"
  names = ("wall", "building", "screen, CRT screen", "screen, projection screen")
  for name, text in (("objectInfo150.txt", rows), ("objectInfo150.csv", None)):
    text = text or rows.replace(", ", ";").replace("\t", ",")
    root = write(tmp_path / name[-3:], {name: text})
    assert tuple(x.replace(";", ", ") for x in read_classes(str(root), True)) == names


BROKEN = {  # changes of the files, None for one that is removed; the message
  "no labels": (
    {"annotations/training/*": None},
    "no annotations/training; expected images/{train",
  ),
  "no images": ({"images/*": None}, "no images/; expected images/{training,validation} and annot"),
  "no names": ({"classes.txt": None}, "no classes.txt; expected the name of a class in each line"),
  "one name": ({"classes.txt": "sky"}, "classes.txt: 1 names; expected 2 to 255 classes"),
  "twice": ({"classes.txt": "a\nb\na"}, "classes.txt: 'a' stands twice"),
  "gap": ({"classes.txt": "\nb\na"}, "classes.txt: name 1 is empty"),
  "no label": (
    {"annotations/training/scene_1.png": None},
    "1 of 3 images have no label: scene_1.jpg; 0 of 2 labels have no image: none; looked in .*.png",
  ),
  "no image": ({"images/training/scene_1.jpg": None}, "1 of 3 labels have no image: scene_1.png"),
  "jpeg": (
    {"annotations/training/*": None, "annotations/training/scene_0.jpg": encode(COLORS)},
    r"3 of 3 images have no label: .*, found 1 .jpg of annotations \(only PNG keeps classes\)",
  ),
  "two images": ({"images/training/scene_1.png": encode(COLORS, "PNG")}, "would share a label"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_are_refused(tmp_path, case):
  changes, message = BROKEN[case]
  files = scene_files()
  for name, content in changes.items():
    if content is None:
      files = {k: x for k, x in files.items() if not k.startswith(name.rstrip("*"))}
    else:
      files[name] = content
  with pytest.raises(DataError, match=message.replace("{", r"\{")):
    scenes(write(tmp_path, files))


def test_files_that_are_not_read_are_counted(tmp_path):
  others = {"images/training/a.txt": "", "annotations/training/a.xml": ""}
  others["annotations/training/scene_0.jpg"] = encode(COLORS)
  source = scenes(write(tmp_path, scene_files() | others))
  assert source.left_out == "left out: 1 .txt; 1 .xml, 1 .jpg of annotations"
  assert source.description.endswith(source.left_out) and len(source) == 3


def test_at_most_three_names_of_each_kind(tmp_path):
  files = scene_files(count=8)
  files = {k: x for k, x in files.items() if not k.startswith("annotations/training/scene")}
  files["annotations/training/other.png"] = encode(label_of(), "PNG")
  with pytest.raises(DataError, match="scene_0.jpg, scene_1.jpg, scene_2.jpg and 5 more; 1 of 1"):
    scenes(write(tmp_path, files))


def test_where_scenes_are_expected(tmp_path):
  section = ml_collections.ConfigDict(
    dict(source="digits", train_split="train", eval_split="validation", data_dir="")
    | dict(holdout_every=10, quarantine="", zero_is_unlabelled=False)
  )
  with pytest.raises(DataError, match="source='digits' given; expected scenes:/path"):
    data.open_split(section, "train")
  section.source = "scenes:digits"
  assert len(data.open_split(section, "train").class_names) == 11
  with section.unlocked():
    section.zero_is_unlabelled = None
  with pytest.raises(DataError, match="zero_is_unlabelled is not set; expected True if"):
    data.open_split(section, "train")


def test_a_pipe_in_the_place_of_a_label_is_an_error(tmp_path):
  write(tmp_path, scene_files())
  source, path = scenes(tmp_path), tmp_path / "annotations/training/scene_0.png"
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(DataError, match="scene_0.png: is a pipe"):
    source[0]


def test_labels_are_among_the_contents_that_a_run_remembers(tmp_path):
  source = scenes(write(tmp_path, scene_files()))
  before = data.sample_contents(source)
  write(tmp_path, {"annotations/training/scene_1.png": encode(label_of(seed=99), "PNG")})
  after = data.sample_contents(scenes(tmp_path))
  assert len(before) == 3 and sum(map(str.__ne__, before, after)) == 1


# Sizes.


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(photo(30, 40), exif=exif)


@pytest.mark.parametrize(
  "orientation, shape, exif, message",
  [
    (1, (40, 30), "ignore", "y.png: 40 x 30, its image is 30 x 40; write the label again"),
    (6, (40, 30), "ignore", "40 x 30, its image is 30 x 40; the label is upright.*exif=apply"),
    (6, (30, 40), "apply", "30 x 40, its image is 40 x 30; the label is as .*exif=ignore"),
    (6, (20, 30), "ignore", "y.png: 20 x 30, its image is 30 x 40; write the label again"),
    (6, (30, 40), "ignore", None),
    (6, (40, 30), "apply", None),
  ],
)
def test_a_label_has_the_size_of_its_image(orientation, shape, exif, message):
  example = {"image": turned(orientation), "name": "y.jpg", "label_name": "y.png"}
  example["label"] = np.zeros(shape, np.uint8)
  if not message:
    assert data.decode_scene(example, 3, exif)[0].shape[:2] == shape
    return
  with pytest.raises(DataError, match=message):
    data.decode_scene(example, 3, exif)


# Views.


def painted(label):
  """An example whose pixels tell their class: 60 times it."""
  image = np.repeat(60 * label[:, :, None], 3, axis=2).astype(np.uint8)
  return {"image": image, "label": label, "name": "x", "label_name": "x"}


def test_training_sees_parts_of_scenes_with_their_labels():
  example = painted(label_of().repeat(4, 0).repeat(4, 1))
  view, mean_pixel = make_views(photometric=False).train, np.rint(255 * np.array(IMAGENET_MEAN))
  padded = 0
  for seed in range(30):
    out = pickle.loads(pickle.dumps(view))(example, np.random.default_rng(seed))
    again = view(example, np.random.default_rng(seed))
    assert_same([out], [again])
    assert out["image"].shape == (24, 32, 3) and out["label"].shape == (24, 32)
    assert out["image"].dtype == out["label"].dtype == np.uint8
    is_padded = out["label"] == IGNORED
    assert (out["image"][is_padded] == mean_pixel).all()
    inside = out["image"][~is_padded][:, 0]
    close = np.abs(inside.astype(int) - 60 * out["label"][~is_padded].astype(int)) < 30
    assert close.mean() > 0.75  # all but at the borders of classes
    padded += is_padded.any()
  assert 0 < padded < 30


def test_training_at_scale_one_sees_the_pixels_of_the_evaluation():
  example = painted(label_of(50, 90)) | {"image": photo(50, 90)}
  window, mean = (32, 48), tuple(IMAGENET_MEAN)
  (measured,) = segmentation.make_views(example["image"], mean, segmentation.Rule(window, window))
  view = make_views(window, scale=(1.0, 1.0), flip=False, photometric=False, max_share=1.0).train
  trained = view(example, np.random.default_rng(0))["image"]
  height, width = measured.size
  corners = [(top, left) for top in range(height - 31) for left in range(width - 47)]
  crops = [measured.pixels[top : top + 32, left : left + 48] for top, left in corners]
  assert any((crop == trained).all() for crop in crops)


def test_opencv_gives_the_same_crops_in_other_pixels():
  pytest.importorskip("cv2")
  example = painted(label_of().repeat(4, 0).repeat(4, 1)) | {"image": photo(120, 160)}
  for seed in range(3):
    pillow, cv2 = (
      make_views(resize=resize, photometric=False).train(example, np.random.default_rng(seed))
      for resize in ("pillow", "cv2")
    )
    assert np.abs(pillow["image"].astype(int) - cv2["image"]).max() <= 1
    assert (pillow["label"] != cv2["label"]).mean() < 0.3


def test_half_of_the_views_are_mirrored():
  label = np.zeros((24, 32), np.uint8)
  label[:, 16:] = 1
  view = make_views(scale=(1.0, 1.0), photometric=False).train
  sides = [view(painted(label), np.random.default_rng(i)) for i in range(40)]
  assert 10 < sum(int(out["label"][0, 0]) for out in sides) < 30
  assert all(out["image"][0, 0, 0] == 60 * out["label"][0, 0] for out in sides)


def test_options_of_the_views():
  example = painted(label_of(60, 80))
  both = [make_views(photometric=on).train(example, np.random.default_rng(0)) for on in (0, 1)]
  np.testing.assert_array_equal(both[0]["label"], both[1]["label"])
  assert (both[0]["image"] != both[1]["image"]).any()
  views = make_views()
  assert_same(*([views.eval(example, np.random.default_rng(1))] for _ in range(2)))
  assert (views.eval(example, np.random.default_rng(1))["label"] != IGNORED).all()
  gray = dict(mean=(0.5,), std=(0.25,), photometric=False)
  assert make_views(**gray).train(example, np.random.default_rng(0))["image"].shape == (24, 32, 1)
  with pytest.raises(DataError, match="images of 1 channels have no hue: set photometric=False"):
    make_views(**gray | dict(photometric=True))


def test_a_class_seldom_fills_a_crop():
  label = np.zeros((96, 128), np.uint8)
  label[:48, :64] = 1
  fits = {}
  for max_share in (0.75, 1.0):
    view = make_views(scale=(2.0, 2.0), max_share=max_share).train
    views = [view(painted(label), np.random.default_rng(i)) for i in range(40)]
    fits[max_share] = np.mean([0.25 < out["label"].mean() < 0.75 for out in views])
  assert fits[0.75] > 0.9 > fits[1.0] + 0.1


def test_batches_of_scenes_leave_bad_ones_out(tmp_path):
  bad = {"annotations/training/scene_1.png": encode(np.full((30, 40), 9, np.uint8), "PNG")}
  source = scenes(write(tmp_path, scene_files() | bad))
  start = functools.partial(data.train_batches, source, make_views().train, seed=1, batch_size=4)
  with pytest.raises(DataError, match="scene_1.png: value 9 in 1,200 pixels; expected 0 to 2"):
    take(start(), 2)
  options = data.LoaderOptions(on_error="skip", max_skipped=0.5)
  batches = take(start(options=options), 2)
  assert batches[0]["image"].shape == (4, 24, 32, 3) and batches[0]["label"].dtype == np.uint8
  assert_same(take(start(options=options, first_step=1), 1), batches[1:])
  listed = write(tmp_path, {"bad.json": json.dumps({"train": ["scene_1.jpg"]})}) / "bad.json"
  rest = scenes(tmp_path, quarantine=str(listed))
  assert len(rest) == 2 and rest.class_names == source.class_names
  take(data.train_batches(rest, make_views().train, seed=1, batch_size=4), 2)


# Scenes of digits.


def test_scenes_of_digits():
  train, held_out = scenes("digits"), scenes("digits", "eval")
  assert (len(train), len(held_out)) == (2000, 200) and len(train.class_names) == 11
  assert train.class_names[:2] == ("ground", "0") and train.fingerprint != held_out.fingerprint
  again, classes = pickle.loads(pickle.dumps(train)), set()
  for i in range(60):
    image, label = data.decode_scene(train[i], 3)
    np.testing.assert_array_equal(again[i]["image"], image)
    assert label.shape == (32, 32) and len(np.unique(label)) == 2
    classes |= set(np.unique(label))
  assert classes == set(range(11)) and (train[0]["image"] != held_out[0]["image"]).any()
  unlabelled = scenes("digits", zero_is_unlabelled=True)
  assert unlabelled.class_names == train.class_names[1:]
  is_ground = train[3]["label"] == 0
  np.testing.assert_array_equal(
    unlabelled[3]["label"], np.where(is_ground, IGNORED, train[3]["label"] - 1)
  )


# What a user is told.


def test_the_shares_of_the_classes(tmp_path):
  files = scene_files(classes="a\nb\nc\nd\n")
  label = np.zeros((30, 40), np.uint8)
  label[:15], label[15:18] = 1, IGNORED
  for i in range(3):
    files[f"annotations/training/scene_{i}.png"] = encode(label, "PNG")
  source = scenes(write(tmp_path, files))
  text = "pixels of the first 3 labels: b: 50.0%, a: 40.0%; unlabelled: 10.0%; no pixel of c, d"
  assert data.describe_labels(source) == text
  write(tmp_path, {"annotations/training/scene_2.png": b"no"})
  with pytest.raises(DataError, match="scene_2.png: cannot be decoded"):
    data.describe_labels(source)
  assert "b: 50.0%" in data.describe_labels(source, should_skip=True)


def verify(root, *options):
  words = [f"--source=scenes:{root}", "--splits=train", "--workers=1", *options]
  return run_command(["verify", *words])


def test_the_report_of_verify(tmp_path):
  source = scenes(write(tmp_path, scene_files(classes="sea\nsand\n")), zero_is_unlabelled=True)
  report = summarize(inspect_images(source, 3, range(3)), source)
  labels = np.stack([label_of(seed=seed) for seed in range(3)])
  shares = [pytest.approx(np.mean(labels == value)) for value in range(3)]
  classes = {"sea": shares[1], "sand": shares[2]}
  assert report["labels"] == {"classes": classes, "unlabelled": shares[0]}
  write(tmp_path, {"annotations/training/scene_1.png": encode(label_of(20, 40), "PNG")})
  bad = inspect_images(source, 3, range(3)).bad
  assert bad.keys() == {"scene_1.jpg"}
  assert "scene_1.png: 20 x 40, its image is 30 x 40" in bad["scene_1.jpg"]


def test_verify_lists_bad_labels(tmp_path, capsys):
  files = scene_files(("training/",), count=2)
  for i, content in enumerate((encode(COLORS, "PNG"), encode(0 * label_of(), "PNG"))):
    files[f"annotations/training/scene_{i}.png"] = content
  root = write(tmp_path / "scenes", files)
  options = ["--holdout_every=0", "--zero_is_unlabelled=True"]
  assert verify(root, *options, f"--quarantine={tmp_path}/bad.json") == 3
  assert "1 of 2 images are bad, the first: scene_0.jpg: " in capsys.readouterr().err
  bad = json.loads((tmp_path / "bad.json").read_text())["train"]
  assert list(bad) == ["scene_0.jpg"] and "label has 3 channels" in bad["scene_0.jpg"]


@pytest.mark.variant
def test_verify_finds_no_label_at_all(tmp_path, capsys):
  files = scene_files(("training/",), count=1)
  files["annotations/training/scene_0.png"] = encode(0 * label_of(), "PNG")
  root = write(tmp_path, files)
  assert verify(root, "--holdout_every=0", "--zero_is_unlabelled=true") == 3
  assert "train: no labelled pixel in all 1 files" in capsys.readouterr().err


def test_no_label_at_all_is_an_error(tmp_path):
  files = scene_files(count=1)
  files["annotations/training/scene_0.png"] = encode(0 * label_of(), "PNG")
  source = scenes(write(tmp_path, files), zero_is_unlabelled=True)
  with pytest.raises(DataError, match="no labelled pixel in the first 1 files; is zero_is_unlabel"):
    data.describe_labels(source)


@pytest.mark.parametrize("source, option", [("scenes:x", []), ("digits", ["true"])])
def test_verify_asks_what_zero_means(capsys, source, option):
  words = [f"--zero_is_unlabelled={x}" for x in option]
  assert run_command(["verify", f"--source={source}", *words]) == 2
  assert "scenes need it, true or false" in capsys.readouterr().err
