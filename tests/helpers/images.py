"""Images, sources and batches for tests."""

import io
import pathlib
import struct
import types
import zlib

import numpy as np
from PIL import Image

from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.data import LoaderOptions, center_view, eval_batches, image_views, train_batches

SIZE = (24, 24)
DATA = dict(
  mean=IMAGENET_MEAN,
  std=IMAGENET_STD,
  crop_scale=(0.2, 1.0),
  flip=True,
  resize="pillow",
  randaug="",
  erase_prob=0.0,
  eval_crop=0.875,
  exif="ignore",
)


def photo(height=60, width=80, seed=0):
  """Smooth random colors with some noise, uint8 [H, W, 3]."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
  smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
  noise = rng.integers(-9, 10, smooth.shape)
  return np.clip(smooth.astype(int) + noise, 0, 255).astype(np.uint8)


def encode(pixels, form="JPEG", **options):
  buffer = io.BytesIO()
  picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  picture.save(buffer, form, **options)
  return buffer.getvalue()


def write_images(root, names):
  for seed, name in enumerate(names):
    path = pathlib.Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    form = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    path.write_bytes(encode(photo(50 + seed % 7, 40 + seed % 11, seed), form))


class Numbered:
  """A source whose image i is a texture with label i."""

  class_names = ()
  description = "numbered"

  def __init__(self, count):
    self._images = [photo(30, 30, seed) for seed in range(count)]

  def __len__(self):
    return len(self._images)

  def __getitem__(self, index):
    return {"image": self._images[index], "label": index, "name": str(index)}


def take(iterator, steps):
  batches = [next(iterator) for _ in range(steps)]
  iterator.close()
  return batches


def make_views(*, task="pretrain", image_size=SIZE, channels=3, **data):
  """Returns the views of a configuration with these keys of `config.data`."""
  statistics = {} if channels == 3 else dict(mean=(0.5,) * channels, std=(0.25,) * channels)
  section = types.SimpleNamespace(**DATA | statistics | data)
  return image_views(types.SimpleNamespace(task=task, image_size=image_size, data=section))


def split_options(options):
  """Separates the fields of LoaderOptions from other keyword arguments."""
  fields = options.keys() & set(LoaderOptions._fields)
  others = {name: value for name, value in options.items() if name not in fields}
  return LoaderOptions(**{name: options[name] for name in fields}), others


def train_loader(source, *, seed=5, batch_size=8, first_step=0, shard=0, num_shards=1, **options):
  """Starts training batches; `options` are those of the loader and of `make_views`."""
  loader, view = split_options(options)
  return train_batches(
    source,
    make_views(**view).train,
    seed=seed,
    batch_size=batch_size,
    first_step=first_step,
    shard=shard,
    num_shards=num_shards,
    options=loader,
  )


def eval_loader(
  source,
  *,
  batch_size=8,
  image_size=SIZE,
  crop_pct=0.875,
  channels=3,
  limit=0,
  shard=0,
  num_shards=1,
  **options,
):
  """Starts evaluation batches of central crops; `options` are those of the loader."""
  return eval_batches(
    source,
    center_view(image_size, crop_pct, channels),
    batch_size=batch_size,
    limit=limit,
    shard=shard,
    num_shards=num_shards,
    options=LoaderOptions(**options),
  )


def train_steps(source, steps, *, shards=1, **options):
  """Returns global batches: the shards of each step joined in order."""
  parts = [
    take(train_loader(source, shard=i, num_shards=shards, **options), steps) for i in range(shards)
  ]
  return [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)
  ]


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def as_pillow(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def good_files():
  pixels = photo(203, 301)
  picture = Image.fromarray(pixels)
  alpha = picture.convert("RGBA")
  alpha.putalpha(77)
  palette = picture.quantize(16)
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: turn by 90 degrees.
  return {
    "color.jpg": encode(pixels, quality=90),
    "progressive.jpg": encode(pixels, quality=75, progressive=True),
    "full_chroma.jpg": encode(pixels, quality=95, subsampling=0),
    "gray.jpg": encode(picture.convert("L")),
    "cmyk.jpg": encode(picture.convert("CMYK")),
    "exif.jpg": encode(pixels, exif=exif),
    "trailing.jpg": encode(pixels) + b"some trailing bytes",
    "color.png": encode(pixels, "PNG"),
    "alpha.png": encode(alpha, "PNG"),
    "palette.png": encode(palette, "PNG"),
    "clear_palette.png": encode(palette, "PNG", transparency=0),
    "gray.png": encode(picture.convert("L"), "PNG"),
    "bilevel.png": encode(picture.convert("1"), "PNG"),
    "color.webp": encode(pixels, "WEBP"),
  }


def png_header(width, height):
  def chunk(kind, body):
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(bytes(100)))
    + chunk(b"IEND", b"")
  )


def lying_jpeg():
  data = bytearray(encode(photo()))
  start = data.index(b"\xff\xc0") + 5  # Height and width in the frame header.
  data[start : start + 4] = struct.pack(">HH", 65500, 65500)
  return bytes(data)
