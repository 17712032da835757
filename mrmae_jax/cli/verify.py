"""What is in a data set, and which of its images are bad: before a run of days meets them.

  mrmae verify --source=folder:/path/to/photos
  mrmae verify --source=folder:/path/to/photos --json=report.json --quarantine=bad.json
  mrmae pretrain --config=... --config.data.source=folder:/path/to/photos --config.data.quarantine=bad.json

verify decodes every image of the splits and prints a report in JSON: how many images, which are bad and why, how large they are
(shorter side), how many are grey, CMYK, 16-bit, with alpha, animated, or turned by their EXIF orientation (which training ignores),
and the mean and deviation of each channel over all pixels at full size, in [0, 1], for config.data.mean and std. --channels says how
many there are: 3 for RGB, 1 for grey, others in .npy files. Bad is what training cannot read, and besides a JPEG that it would read
in spite of damage that its decoder notices. Not all damage can be seen: of random changes of one byte in JPEGs about one in six is,
in PNGs all are. --quarantine writes the list of bad images that runs leave out; give verify the source and split options of the run.
Exit code: 0 all images are good, 3 some are bad (the report and the list are written), 2 usage.
"""

import collections
import io
import itertools
import json
import multiprocessing
import os
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from mrmae_jax.cli.pack import open_splits
from mrmae_jax.data import augment
from mrmae_jax.errors import DataError
from mrmae_jax.runs.paths import atomic_write

CHUNK = 16  # images that a process takes at a time
ORIENTATION = 0x0112  # EXIF tag; 1: as stored


class Found(NamedTuple):
  """What some images are; of several the sum.

  Attributes:
    bad: {name: cause}.
    counts: of ("format", "JPEG"), ("mode", "RGB"), ("kind", "grey"), ("short_side", 128) for 128 to 255, ...
    values: how often each channel has each value, int64 [C, 256].
  """

  bad: dict[str, str]
  counts: collections.Counter
  values: np.ndarray

  def __add__(self, other):
    return Found(self.bad | other.bad, self.counts + other.counts, self.values + other.values)


def nothing(channels: int) -> Found:
  """What no images of so many channels are."""
  return Found({}, collections.Counter(), np.zeros((channels, 256), np.int64))


def inspect(source, channels: int, indices) -> Found:
  """Reads and decodes some images of a source."""

  found = nothing(channels)
  for i in indices:
    try:
      image, counts = source[i]["image"], [("format", "pixels")]
      if not isinstance(image, np.ndarray):
        data, image = image, augment.decode_image(image, source.name(i), strict=True)
        counts = _about(data)
      image = augment.with_channels(image, channels, source.name(i))
    except DataError as error:
      name = source.name(i)
      found += nothing(channels)._replace(bad={name: str(error).removeprefix(f"{name}: ")})
      continue
    counts.append(("short_side", 1 << (min(image.shape[:2]).bit_length() - 1)))
    values = np.array([picture.histogram() for picture in augment.pictures(image)]).reshape(
      channels, 256
    )
    found += Found({}, collections.Counter(counts), values)
  return found


def _about(data: bytes) -> list[tuple[str, str]]:
  """What `Found.counts` counts, of an image file that can be decoded."""

  with Image.open(io.BytesIO(data)) as picture:
    mode = picture.mode
    try:
      turned = picture.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF raises as much as damaged images, and says nothing
      turned = False
    kinds = {
      "grey": mode in ("1", "L", "LA") or mode.startswith("I;16"),
      "cmyk": mode == "CMYK",
      "alpha": mode in ("RGBA", "LA", "PA") or "transparency" in picture.info,
      # Pillow shows 16-bit colour as 8-bit; a PNG's header tells.
      "16-bit": mode.startswith("I;16") or (picture.format == "PNG" and data[24] == 16),
      "exif-turned": turned,
      "animated": getattr(picture, "is_animated", False),
    }
    return [
      ("format", picture.format),
      ("mode", mode),
      *(("kind", name) for name, yes in kinds.items() if yes),
    ]


def summary(found: Found, images: int) -> dict:
  """The report on a split of so many images, as JSON values."""
  level, number = np.arange(256), int(found.values[0].sum())
  mean = [int(v @ level) / (255 * number) if number else None for v in found.values]
  std = [
    (int(v @ level**2) / (255**2 * number) - m**2) ** 0.5 if number else None
    for v, m in zip(found.values, mean)
  ]
  table = {kind: {} for kind in ("format", "mode", "kind", "short_side")}
  for (kind, name), count in found.counts.most_common():
    table[kind][name] = count
  table["short_side"] = {
    f"{least}-{2 * least - 1}": count for least, count in sorted(table["short_side"].items())
  }
  return {
    "images": images,
    "bad": len(found.bad),
    "pixels": number,
    "mean": mean,
    "std": std,
    **table,
    "causes": found.bad,
  }


def verify(source, channels: int, workers: int, progress) -> Found:
  """Inspects every image of a source in processes.

  Args:
    source: of `mrmae_jax.data`.
    channels: that its images should have.
    workers: number of processes.
    progress: called with the number of images done since the last call.

  Raises:
    DataError: a process died.
  """
  chunks = iter([range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)])
  total = nothing(channels)
  with futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
    running = {
      pool.submit(inspect, source, channels, chunk): chunk
      for chunk in itertools.islice(chunks, 2 * workers)
    }
    while running:
      for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
        chunk = running.pop(future)
        try:
          total += future.result()
        except BrokenProcessPool:
          raise DataError(
            f"a process died at one of {', '.join(map(source.name, chunk))}, or of what the {workers - 1} others "
            "had: it crashed, or memory ran out; try --workers=1"
          ) from None
        progress(len(chunk))
        for chunk in itertools.islice(chunks, 1):
          running[pool.submit(inspect, source, channels, chunk)] = chunk
  order = {source.name(i): i for i in range(len(source))} if total.bad else {}
  return total._replace(bad=dict(sorted(total.bad.items(), key=lambda item: order[item[0]])))


def run(options) -> str:
  """Carries out `mrmae verify`.

  Raises:
    UsageError, DataError: options that do not fit; bad images, after the files are written.
  """
  sources = open_splits(options)
  with tqdm(
    total=sum(map(len, sources.values())), unit="image", smoothing=0.05
  ) as bar:  # shows rate and time left
    found = {
      split: verify(source, options.channels, options.workers or os.cpu_count() or 1, bar.update)
      for split, source in sources.items()
    }
  report = {
    "source": options.source,
    **{split: summary(one, len(sources[split])) for split, one in found.items()},
  }
  print(json.dumps(report, indent=2), flush=True)
  for path, content in (
    (options.json, report),
    (options.quarantine, {split: one.bad for split, one in found.items()}),
  ):
    if path:
      with atomic_write(Path(path).expanduser()) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
  images, bad = (
    sum(one[key] for one in report.values() if isinstance(one, dict)) for key in ("images", "bad")
  )
  if bad:
    first = next(": ".join(item) for one in found.values() for item in one.bad.items())
    advice = (
      f"config.data.quarantine={options.quarantine}"
      if options.quarantine
      else "--quarantine=FILE here, config.data.quarantine=FILE"
    )
    raise DataError(
      f"{bad} of {images} images are bad, the first: {first}; leave them out with {advice} in a run, or repair them"
    )
  return f"all {images} images are good"
