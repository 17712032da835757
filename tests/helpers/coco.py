"""Small data sets in COCO's format, with exact boxes and masks."""

import json

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "cow"}]


def rectangle(x, y, w, h):
  return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number, image_id, box, category_id=3, **fields):
  """Returns a filled rectangle as an annotation."""
  x, y, w, h = box
  default = {
    "id": number,
    "image_id": image_id,
    "category_id": category_id,
    "bbox": list(box),
    "area": w * h,
    "iscrowd": 0,
    "segmentation": rectangle(*box),
  }
  return default | fields


def document(first_id=1, images=2, size=(40, 60)):
  """Returns a file of annotations, two rectangles in each image."""
  height, width = size
  ids = range(first_id, first_id + images)
  return {
    "images": [
      {"id": i, "file_name": f"{i:04d}.png", "height": height, "width": width} for i in ids
    ],
    "categories": CATEGORIES,
    "annotations": [
      row
      for i in ids
      for row in (
        annotation(10 * i, i, (4 + i % 5, 6, 20, 10)),
        annotation(10 * i + 1, i, (30, 20, 24, 16), 90),
      )
    ],
  }


def draw(content):
  """Returns {file name: uint8 [H, W, 3]}, boxes bright on noise."""
  images = {}
  for image in content["images"]:
    rng = np.random.default_rng(image["id"])
    picture = rng.integers(0, 60, (image["height"], image["width"], 3), np.uint8)
    for row in content["annotations"]:
      if row["image_id"] == image["id"]:
        x, y, w, h = map(int, row["bbox"])
        picture[y : y + h, x : x + w] = 200
    images[image["file_name"]] = picture
  return images


def write(root, train=None, val=None):
  """Writes a data set with the splits train and val; returns its address."""
  contents = {"train": train or document(), "val": val or document(first_id=100)}
  (root / "annotations").mkdir(parents=True)
  for split, content in contents.items():
    (root / split).mkdir()
    for name, picture in draw(content).items():
      Image.fromarray(picture).save(root / split / name)
    write_annotations(root, content, split)
  return f"coco:{root}"


def write_annotations(root, content, split="train"):
  (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
