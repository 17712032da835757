"""Input pipeline: sources of images, views of them, and batches per step."""

from mrmae_jax.data.augment import resizer
from mrmae_jax.data.detection import (
  DetectionView,
  WholeView,
  check_objects,
  detection_views,
)
from mrmae_jax.data.loader import (
  Batches,
  LoaderOptions,
  element_shapes,
  eval_batches,
  loader_options,
  train_batches,
)
from mrmae_jax.data.scenes import (
  SceneView,
  decode_scene,
  describe_labels,
  scene_views,
)
from mrmae_jax.data.sources import (
  Source,
  check_same_classes,
  describe_kinds,
  open_source,
  open_split,
  sample_contents,
  with_absolute_path,
)
from mrmae_jax.data.views import (
  ImageView,
  PairView,
  View,
  Views,
  center_view,
  image_views,
  pair_views,
)

__all__ = [
  "Batches",
  "DetectionView",
  "ImageView",
  "LoaderOptions",
  "PairView",
  "SceneView",
  "Source",
  "View",
  "Views",
  "WholeView",
  "check_objects",
  "check_same_classes",
  "center_view",
  "decode_scene",
  "describe_kinds",
  "describe_labels",
  "detection_views",
  "element_shapes",
  "eval_batches",
  "image_views",
  "loader_options",
  "open_source",
  "open_split",
  "pair_views",
  "resizer",
  "sample_contents",
  "scene_views",
  "train_batches",
  "with_absolute_path",
]
