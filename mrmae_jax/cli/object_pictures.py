"""Pictures of objects, and results in COCO's format, by a detector."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae_jax.cli import classifiers
from mrmae_jax.cli.evaluate import write_csv
from mrmae_jax.cli.label_pictures import color_text
from mrmae_jax.data.sources import segmentations
from mrmae_jax.evals import coco_ap
from mrmae_jax.viz.grid import class_colors, draw_objects


class ObjectPictures:
  """Writes images with their objects, results.json, images.json and a table of the classes.

  Images and classes keep the ids that COCO's annotations give them. Others count from 1.
  """

  def __init__(self, folder: Path, path: str, model, source, options):
    """Finds names and ids of the classes.

    Args:
      folder: to write into.
      path: of the model, for messages.
      model: that detects.
      source: of the images.
      options: of the command.

    Raises:
      UsageError: --classes does not fit.
      DataError: masks need pycocotools, which is not installed.
    """
    if model.network.detector.mask_convs:
      segmentations.load_pycocotools()
    self._folder, self._model, self._source = folder, model, source
    self._min_shown = coco_ap.MIN_SHOWN if options.min_score is None else options.min_score
    self._min_score = min(model.network.rules.min_score, self._min_shown)
    count = model.config["classes"]
    self._category_ids = getattr(source, "category_ids", ())  # () for images without annotations
    theirs = dict(zip(source.class_names, self._category_ids))
    if model.class_names or options.classes:
      self._names = classifiers.class_names(path, model, options.classes)
    elif len(theirs) == count:
      self._names = tuple(theirs)
    else:
      self._names = tuple(f"class {i}" for i in range(count))
    has_ids = set(self._names) <= theirs.keys()
    ids = (theirs[name] for name in self._names) if has_ids else range(1, count + 1)
    self._ids = tuple(ids)
    self._counts = np.zeros(count, np.int64)
    self._images, self._results = [], []

  def add(self, index: int, file: str, image: np.ndarray) -> None:
    """Writes overlays/FILE, and notes the results."""
    (found,) = self._model.detect([image], min_score=self._min_score)
    image_id = self._source.image_id(index) if self._category_ids else index + 1
    height, width = image.shape[:2]
    name = str(self._source.name(index))
    self._images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    self._results += coco_ap.to_results(found, found.get("masks"), image_id, self._ids)
    shown = found["scores"] >= self._min_shown
    classes = found["classes"][shown]
    self._counts += np.bincount(classes, minlength=len(self._counts))
    texts = [
      f"{self._names[class_]} {score:.2f}" for class_, score in zip(classes, found["scores"][shown])
    ]
    masks = found["masks"][shown] if "masks" in found else []
    gray = image[:, :, :1] if image.shape[2] != 3 else image
    path = self._folder / "overlays" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_objects(gray, found["boxes"][shown], masks, classes, texts)
    Image.fromarray(drawn).save(path)

  def finish(self) -> str:
    """Writes results.json, images.json and classes.csv; returns what the folder holds."""
    categories = [{"id": i, "name": name} for i, name in zip(self._ids, self._names)]
    about = {"images": self._images, "categories": categories}
    for name, content in (("results", self._results), ("images", about)):
      (self._folder / f"{name}.json").write_text(json.dumps(content))
    rows = zip(self._ids, self._names, map(color_text, class_colors(len(self._ids))), self._counts)
    write_csv(self._folder / "classes.csv", ("category_id", "class", "color", "objects"), rows)
    return f"{len(self._results)} objects in results.json, overlays and classes.csv"
