"""COCO's average precision of boxes and masks over every held-out image, each exactly once.

The numbers are pycocotools': a property of the whole set, which no mean over batches or hosts
gives. All devices detect; each host brings its share of the detections to the original pixels;
host 0 compares all of them with the truth, and every host gets its numbers.
"""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from mrmae_jax import data, detection, evals, sharding
from mrmae_jax.data import augment
from mrmae_jax.data.sources import segmentations
from mrmae_jax.errors import MissingSplitError
from mrmae_jax.runs import distributed, supervision
from mrmae_jax.viz.grid import bands_shown, draw_grid, draw_objects

MEASURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
MEASURES += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
KINDS = {"box": "bbox", "mask": "segm"}  # as results are called -> as COCO calls it
TITLES = ("truth", "detections")
MIN_SHOWN = 0.3  # score of detections in the pictures
NEVER_S = 1e6  # a limit where config.hang_s sets none
CELL = 320  # pixels of a picture's side


def measure(
  truth: dict[str, list[dict]], results: list[dict], kind: str, image_ids: list[int]
) -> dict[str, float]:
  """Returns COCO's 12 numbers, nan where there is no truth of the kind.

  Args:
    truth: "images", "annotations" and "categories" as in COCO's files; whoever made it has checked
      its masks, see `annotations.check_rle`.
    results: detections as COCO writes them: "image_id", "category_id", "score", and "bbox" or
      "segmentation" or both.
    kind: a value of KINDS.
    image_ids: of the images that were looked at; others do not count.
  """
  segmentations.load_pycocotools()
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  # It changes what it is given, and takes an annotation of id 0 for none at all.
  truth = truth | {
    "annotations": [row | {"id": i} for i, row in enumerate(truth["annotations"], 1)]
  }
  if kind == "segm":  # the area of a detection would else be that of its box
    results = [{k: x for k, x in row.items() if k != "bbox"} for row in results]
  with contextlib.redirect_stdout(io.StringIO()):
    expected, found = COCO(), COCO()
    expected.dataset = truth
    expected.createIndex()
    if results:
      found = expected.loadRes([dict(row) for row in results])
    else:
      found.dataset = truth | {"annotations": []}
      found.createIndex()
    evaluation = COCOeval(expected, found, kind)
    evaluation.params.imgIds = sorted(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
  return {
    name: float(x) if x > -1 else math.nan for name, x in zip(MEASURES, evaluation.stats.tolist())
  }


def ground_truth(source: data.Source, has_masks: bool) -> dict[str, list[dict]]:
  """Returns what a source says of its images, in the form of COCO's files.

  Args:
    source: of images with objects.
    has_masks: whether masks are part of it.
  """
  images, annotations = [], []
  for index in range(len(source)):
    image_id, objects = source.image_id(index), source.objects(index)
    height, width = objects.size
    images.append({"id": image_id, "height": height, "width": width})
    for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
      area, mask = float(objects.areas[i]), {}
      segmentation = objects.segmentations[i]
      if segmentation is None:
        segmentation = [[x1, y1, x2, y1, x2, y2, x1, y2]]  # of a crowd, or for boxes alone
      if has_masks:
        mask = {"segmentation": segmentations.to_rle(segmentation, objects.size)}
      if math.isnan(area):
        area = float(segmentations.to_mask(segmentation, objects.size).sum())
      annotation = {
        "id": int(objects.ids[i]),
        "image_id": image_id,
        "category_id": source.category_ids[objects.classes[i]],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
        "iscrowd": int(objects.is_crowd[i]),
      }
      annotations.append(annotation | mask)
  categories = [{"id": i, "name": name} for i, name in zip(source.category_ids, source.class_names)]
  return {"images": images, "annotations": annotations, "categories": categories}


def to_results(
  found: dict[str, np.ndarray],
  masks: Iterable[np.ndarray] | None,
  image_id: int,
  category_ids: Sequence[int],
) -> list[dict[str, Any]]:
  """Returns the objects of an image as COCO writes results.

  Args:
    found: "boxes" [N, 4], "scores" [N] and "classes" [N], in pixels of the original image.
    masks: bool [H, W] of each object; None without masks.
    image_id: of the image.
    category_ids: of the classes.
  """
  results = []
  for box, score, class_ in zip(found["boxes"], found["scores"], found["classes"]):
    x1, y1, x2, y2 = box.tolist()
    results.append(
      {
        "image_id": image_id,
        "category_id": category_ids[class_],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": float(score),
      }
    )
  for result, mask in zip(results, () if masks is None else masks):
    result["segmentation"] = segmentations.encode_rle(mask)
  return results


@dataclasses.dataclass(frozen=True)
class IdView:
  """Adds "id" to the rows of a view, the id of the image, int64."""

  view: data.View

  def __call__(self, example: dict[str, Any], rng) -> dict[str, np.ndarray]:
    return self.view(example, rng) | {"id": np.int64(example["id"])}


class Evaluator:
  """COCO's measures of what the task predicts of whole images.

  `task.predict` returns the fields of `boxes.Detections` for B images, and "masks" float32 [B, N,
  h, w] in [0, 1], each in its box, unless boxes alone are detected.
  """

  def __init__(self, task, frozen, config, mesh, workdir, *, batch_size: int, images: int):
    """Opens the held-out split.

    Without annotated images there is nothing to measure: `note` then says so, and `run` returns {}.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      batch_size: images per forward pass, rounded up to a multiple of the devices.
      images: rows of the pictures; 0: no pictures.

    Raises:
      DataError: pycocotools is not installed, or an object to measure masks on has none.
    """
    segmentations.load_pycocotools()
    self._frozen, self._config, self._mesh = frozen, config, mesh
    self._view, self.note, self.results = IdView(task.views.eval), "", ()
    try:
      self._source = task.source("eval")
    except MissingSplitError as error:
      self.note = f"COCO's measures are left out: {error}"
      return
    self._batch_size = evals.padded_batch_size(batch_size, mesh)
    self._folder, self._images = workdir / "detections", images
    self._bands, _ = bands_shown(config)
    self._index = {self._source.image_id(i): i for i in range(len(self._source))}
    self._kinds = tuple(KINDS) if config.rcnn.masks else ("box",)
    data.check_objects(self._source, self._source.most_objects, config.rcnn.masks)
    self.results = tuple(f"{kind}_{name}" for kind in self._kinds for name in MEASURES)
    keys = jax.random.split(jax.random.key(0), self._batch_size)  # predictions do not need them
    self._predict = jax.jit(
      lambda params, extra, frozen, batch: task.predict(params, extra, frozen, batch, keys),
      out_shardings=sharding.replicated(mesh),
    )

  def run(self, params, extra, step: int) -> dict[str, Any]:
    """Returns "box_ap" and the like, and "mask_ap" and the like; nan without truth of the kind.

    Beside them are "images": how many were looked at; "detections"; "truncated": in how many images
    more candidates might have changed them; "files" with the detections; and "pictures" of the
    first images.
    """
    if self.note:
      return {}
    results, image_ids, truncated = [], [], 0
    for row in self._rows(params, extra):
      image_id = int(row["id"])
      size = self._source.objects(self._index[image_id]).size
      found = detection.in_original(row, row["size"], size)
      masks = detection.paste_masks(found, size) if "masks" in found else None
      results += to_results(found, masks, image_id, self._source.category_ids)
      image_ids.append(image_id)
      truncated += int(row["is_truncated"])
    parts = gather(json.dumps([results, image_ids, truncated]))
    if jax.process_index() == 0:
      numbers, written = self._measure(parts, step)
    text = json.dumps(numbers) if jax.process_index() == 0 else ""
    limit = self._config.hang_s or NEVER_S
    numbers = json.loads(distributed.exchange("COCO's measures", text, limit)[0])
    return numbers | (written if jax.process_index() == 0 else {})

  def _rows(self, params, extra):
    """Yields what the task predicts of each of this host's images, and its "id" and "size"."""
    batches = evals.host_batches(self._source, self._view, self._config, self._batch_size)
    for batch in batches:
      ids = batch.pop("id")
      placed = sharding.global_batch(batch, self._mesh)
      predicted = jax.device_get(self._predict(params, extra, self._frozen, placed))
      first = jax.process_index() * len(ids)  # rows of the global batch are in order of the hosts
      for i in np.flatnonzero(batch["valid"]):
        row = jax.tree.map(lambda x: x[first + i], predicted)
        yield row | {"id": ids[i], "size": batch["size"][i]}

  def _measure(self, parts: list[str], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the numbers of all hosts' results, and what is written: {"files", "pictures"}."""
    by_host = list(map(json.loads, parts))
    results = sorted(
      (row for part, *_ in by_host for row in part),
      key=lambda row: (self._index[row["image_id"]], -row["score"]),
    )
    image_ids = sorted(i for _, ids, *_ in by_host for i in ids)
    assert len(set(image_ids)) == len(image_ids), "an image was looked at twice"
    is_whole = len(image_ids) == len(self._source) or self._config.data.on_error == "skip"
    assert is_whole, "an image was not looked at"
    written = {"files": {self._folder / f"step_{step:07d}.json": json.dumps(results).encode()}}
    truth = ground_truth(self._source, "mask" in self._kinds)
    numbers = {}
    for kind in self._kinds:
      supervision.beat()
      measured = measure(truth, results, KINDS[kind], image_ids)
      numbers |= {f"{kind}_{name}": x for name, x in measured.items()}
    numbers |= {
      "images": len(image_ids),
      "detections": len(results),
      "truncated": sum(part[2] for part in by_host),
    }
    shown = image_ids[: self._images]
    if shown:
      written["pictures"] = self._draw(shown, truth, results, step)
    return numbers, written

  def _draw(self, shown: list[int], truth, results: list[dict], step: int) -> dict:
    """Returns {path: picture} of the first images with their truth and detections."""
    names = dict(zip(self._source.category_ids, self._source.class_names))
    sure = [row for row in results if row["score"] >= MIN_SHOWN]
    columns = [[], []]
    for image_id in shown:
      example = self._source[self._index[image_id]]
      image = augment.pixels(example, len(self._config.data.mean), self._config.data.exif)
      for column, rows in zip(columns, (truth["annotations"], sure)):
        rows = [row for row in rows if row["image_id"] == image_id]
        texts = [
          f"{names[row['category_id']]} {row['score']:.2f}"
          if "score" in row
          else names[row["category_id"]]
          for row in rows
        ]
        drawn = draw_rows(image[..., self._bands], rows, self._source.category_ids, texts)
        column.append(ImageOps.pad(Image.fromarray(drawn), (CELL, CELL), color="white"))
    note = f"detections of a score of at least {MIN_SHOWN}"
    picture = draw_grid([np.stack(column) / 255 for column in columns], list(TITLES), note)
    return {self._folder / f"step_{step:07d}.png": picture}


def draw_rows(image: np.ndarray, rows: list[dict], category_ids, texts: list[str]) -> np.ndarray:
  """Draws annotations or results of COCO's format over an image; see `draw_objects`."""
  boxes = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows)]
  masks = [
    segmentations.load_pycocotools().decode(row["segmentation"]).astype(bool)
    for row in rows
    if "segmentation" in row
  ]
  classes = [category_ids.index(row["category_id"]) for row in rows]
  return draw_objects(image, np.reshape(boxes, (-1, 4)), masks, classes, texts)


def gather(text: str) -> list[str]:
  """Returns the texts of all processes, which may be long, in their order."""
  if jax.process_count() == 1:
    return [text]
  from jax.experimental import multihost_utils  # slow to import, and one process needs none

  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(content)] = content
  rows = multihost_utils.process_allgather(padded)
  return [row[:length].tobytes().decode() for row, length in zip(rows, lengths)]
