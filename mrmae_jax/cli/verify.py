"""Decodes every image of a data set and reports those that cannot be read."""

import collections
import io
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from mrmae_jax import data
from mrmae_jax.cli.pack import open_splits
from mrmae_jax.constants import IGNORED
from mrmae_jax.data import augment, detection, scenes
from mrmae_jax.data.scenes import count_pixels, label_shares
from mrmae_jax.errors import DataError, UsageError, printable
from mrmae_jax.runs.paths import atomic_write, require_writable

CHUNK = 16  # images that a process takes at a time
ORIENTATION = 0x0112  # EXIF tag; 1: as stored


class ImageStatistics(NamedTuple):
  """Statistics of a set of images; `+` merges two sets.

  Attributes:
    bad: {name: cause}.
    counts: number of images with ("format", "JPEG"), ("mode", "RGB"), ("kind", "gray"),
      ("short_side", 128), which stands for 128 to 255, ...
    values: how often each channel has each value, int64 [C, 256].
    labels: how many pixels of scenes have each class, and 255 for ignored ones, int64 [256].
  """

  bad: dict[str, str]
  counts: collections.Counter
  values: np.ndarray
  labels: np.ndarray

  def __add__(self, other):
    return ImageStatistics(
      self.bad | other.bad,
      self.counts + other.counts,
      self.values + other.values,
      self.labels + other.labels,
    )


def empty_statistics(channels: int) -> ImageStatistics:
  """Returns the statistics of zero images with `channels` channels."""
  values, labels = np.zeros((channels, 256), np.int64), np.zeros(256, np.int64)
  return ImageStatistics({}, collections.Counter(), values, labels)


def inspect_images(source, channels: int, indices: Iterable[int]) -> ImageStatistics:
  """Reads and decodes some images of a source."""
  total = empty_statistics(channels)
  for i in indices:
    name, labels = source.name(i), np.zeros(256, np.int64)
    try:
      example = source[i]
      image, counts = example["image"], [("format", "pixels")]
      if not isinstance(image, np.ndarray):
        file, image = image, augment.decode_image(image, name, strict=True)
        counts = _classify_file(file)
      image = augment.with_channels(image, channels, name)
      if isinstance(example["label"], np.ndarray):  # of a scene
        scenes.check_size(example, image.shape[:2])
        labels = count_pixels(example["label"])
      if "objects" in example:
        detection.check_size(example, image.shape[:2])
    except DataError as error:
      cause = str(error).removeprefix(f"{printable(name)}: ")
      total += empty_statistics(channels)._replace(bad={name: cause})
      continue
    counts.append(("short_side", 1 << (min(image.shape[:2]).bit_length() - 1)))
    histograms = [picture.histogram() for picture in augment.pictures(image)]
    values = np.array(histograms).reshape(channels, 256)
    total += ImageStatistics({}, collections.Counter(counts), values, labels)
  return total


def _classify_file(data: bytes) -> list[tuple[str, str]]:
  """Returns the keys of `ImageStatistics.counts` that an image file adds to."""
  with Image.open(io.BytesIO(data)) as picture:
    mode = picture.mode
    try:
      is_turned = picture.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF raises errors of any type, and says nothing
      is_turned = False
    kinds = {
      "gray": mode in ("1", "L", "LA") or mode.startswith("I;16"),
      "cmyk": mode == "CMYK",
      "alpha": mode in ("RGBA", "LA", "PA") or "transparency" in picture.info,
      # Pillow shows 16-bit color as 8-bit; a PNG's header tells.
      "16-bit": mode.startswith("I;16") or (picture.format == "PNG" and data[24] == 16),
      "exif-turned": is_turned,
      "animated": getattr(picture, "is_animated", False),
    }
    return [
      ("format", picture.format),
      ("mode", mode),
      *(("kind", kind) for kind, is_present in kinds.items() if is_present),
    ]


def summarize(statistics: ImageStatistics, source: data.Source) -> dict[str, Any]:
  """Returns the report on a split, as JSON values."""
  level, pixels = np.arange(256), int(statistics.values[0].sum())
  mean = [int(v @ level) / (255 * pixels) if pixels else None for v in statistics.values]
  std = [
    (int(v @ level**2) / (255**2 * pixels) - m**2) ** 0.5 if pixels else None
    for v, m in zip(statistics.values, mean)
  ]
  table = {kind: {} for kind in ("format", "mode", "kind", "short_side")}
  for (kind, name), count in statistics.counts.most_common():
    table[kind][name] = count
  table["short_side"] = {
    f"{least}-{2 * least - 1}": count for least, count in sorted(table["short_side"].items())
  }
  if statistics.labels.any():
    classes, unlabelled = label_shares(statistics.labels, source.class_names)
    table["labels"] = {"classes": classes, "unlabelled": unlabelled}
  return {
    "images": len(source),
    "bad": len(statistics.bad),
    "pixels": pixels,
    "mean": mean,
    "std": std,
    **table,
    "causes": statistics.bad,
  }


def inspect_source(source, channels: int, workers: int, progress) -> ImageStatistics:
  """Inspects every image of a source in worker processes.

  Args:
    source: a source of `mrmae_jax.data`.
    channels: number of channels that its images should have.
    workers: number of processes.
    progress: called with the number of images done since the last call.

  Raises:
    DataError: a process died.
  """
  context = multiprocessing.get_context("forkserver")  # imports once, however many the workers
  context.set_forkserver_preload([__name__])
  chunks = iter([range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)])
  total = empty_statistics(channels)
  with futures.ProcessPoolExecutor(workers, context) as pool:
    running = {
      pool.submit(inspect_images, source, channels, chunk): chunk
      for chunk in itertools.islice(chunks, 2 * workers)
    }
    while running:
      for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
        chunk = running.pop(future)
        try:
          total += future.result()
        except BrokenProcessPool:
          raise DataError(
            f"a process died at one of {', '.join(map(source.name, chunk))}, or of the images of"
            f" the {workers - 1} other processes: it crashed, or memory ran out; try --workers=1"
          ) from None
        progress(len(chunk))
        for chunk in itertools.islice(chunks, 1):
          running[pool.submit(inspect_images, source, channels, chunk)] = chunk
  order = {source.name(i): i for i in range(len(source))} if total.bad else {}
  return total._replace(bad=dict(sorted(total.bad.items(), key=lambda item: order[item[0]])))


def run(options) -> str:
  """Carries out `mrmae verify`.

  Raises:
    UsageError, DataError: options that do not fit; bad images, after the files are written.
  """
  for path in filter(None, (options.json, options.quarantine)):
    require_writable(path)
  is_given, has_scenes = bool(options.zero_is_unlabelled), options.source.startswith("scenes:")
  if is_given != has_scenes:
    raise UsageError(
      f"--source={options.source}, --zero_is_unlabelled={options.zero_is_unlabelled or '(none)'}:"
      " scenes need it, true or false (what the value 0 means in their label files), and others"
      " do not take it"
    )
  zero_is_unlabelled = options.zero_is_unlabelled == "true" if has_scenes else None
  max_dropped = 1.0 if options.source.startswith("coco:") else None
  sources = open_splits(options, zero_is_unlabelled=zero_is_unlabelled, max_dropped=max_dropped)
  for split, source in sources.items():
    print(f"{split}: {source.description}", file=sys.stderr, flush=True)
  total = sum(map(len, sources.values()))
  workers = options.workers or os.cpu_count() or 1
  with tqdm(total=total, unit="image", smoothing=0.05) as bar:  # shows rate and time left
    statistics = {
      split: inspect_source(source, options.channels, workers, bar.update)
      for split, source in sources.items()
    }
  report = {split: summarize(statistics[split], source) for split, source in sources.items()}
  report = {"source": options.source, **report}
  for split, source in sources.items():
    report[split]["description"] = source.description
  print(json.dumps(report, indent=2), flush=True)
  quarantine = {split: value.bad for split, value in statistics.items()}
  for path, content in ((options.json, report), (options.quarantine, quarantine)):
    if path:
      with atomic_write(Path(path).expanduser()) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
  bad = [": ".join(item) for value in statistics.values() for item in value.bad.items()]
  if bad:
    advice = (
      f"config.data.quarantine={options.quarantine}"
      if options.quarantine
      else "--quarantine=FILE here, config.data.quarantine=FILE"
    )
    raise DataError(
      f"{len(bad)} of {total} images are bad, the first: {bad[0]}; leave them out with {advice} "
      "in a run, or repair them"
    )
  for split, value in statistics.items():
    if 0 < value.labels.sum() == value.labels[IGNORED]:
      raise DataError(
        f"{split}: no labelled pixel in all {len(sources[split])} files; is --zero_is_unlabelled"
        " right?"
      )
  left_out = dict.fromkeys(getattr(source, "left_out", "") for source in sources.values())
  return "; ".join([f"all {total} images are good", *filter(None, left_out)])
