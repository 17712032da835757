"""Decodes images and crops, resizes and erases them, pixel for pixel as torchvision and Pillow do.

Images are numpy arrays, uint8 [H, W, C]; three channels are RGB, one is gray. Sizes are
(height, width).
"""

import functools
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from mrmae_jax.errors import DataError

# Formats of photographs. Pillow recognizes 40 more by their content, whatever the file's name, and
# some of them run other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Pillow's own limit, 537 MB as RGB. It is checked here too, because Pillow's is a global variable
# that other libraries switch off.
MAX_PIXELS = 178_956_970
MAX_PIXELS_PER_BYTE = 10_000  # a solid black PNG, the smallest of all, has 8,256
ORIENTATION = 0x0112  # EXIF tag
_BACK, _SAME = slice(None, None, -1), slice(None)
# Value of the tag -> (whether rows and columns are exchanged, then their directions)
TURNS = {
  1: (False, (_SAME, _SAME)),
  2: (False, (_SAME, _BACK)),
  3: (False, (_BACK, _BACK)),
  4: (False, (_BACK, _SAME)),
  5: (True, (_SAME, _SAME)),
  6: (True, (_SAME, _BACK)),
  7: (True, (_BACK, _BACK)),
  8: (True, (_BACK, _SAME)),
}
CROP_TRIES = 10
ERASE_TRIES = 10
ERASE_AREA = (0.02, 1 / 3)  # relative to the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width


def pixels(
  example: dict[str, Any], channels: int | None = None, exif: str = "ignore"
) -> np.ndarray:
  """Returns the pixels of a source's example, uint8 [H, W, C].

  Args:
    example: an example of a source.
    channels: C, see `with_channels`; None leaves the image as it is.
    exif: "ignore" or "apply", see `decode_image`.

  Raises:
    DataError: as in `decode_image` and `with_channels`.
  """
  image = example["image"]
  if not isinstance(image, np.ndarray):
    image = decode_image(image, example["name"], exif=exif)
  if channels is None:
    return image
  return with_channels(image, channels, example["name"])


def with_channels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
  """Converts an image to a number of channels, uint8 [H, W, channels].

  RGB becomes gray by Pillow's luma, gray becomes RGB by repetition. Other conversions are refused,
  because the meaning of other channels is not known here.

  Args:
    image: uint8 [H, W, C].
    channels: number of channels of the result.
    name: name of the image, for the message.

  Raises:
    DataError: the image cannot be converted.
  """
  height, width, given = image.shape
  if given == channels:
    return image
  if (given, channels) == (3, 1):
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
  if (given, channels) == (1, 3):
    return np.repeat(image, 3, axis=2)
  raise DataError(
    f"{name}: has {given} channels ({height} x {width} x {given}); expected {channels}, one for"
    " each number of config.data.mean and std; give as many of these as the images have channels,"
    " or remove it"
  )


def decode_image(data: bytes, name: str, strict: bool = False, exif: str = "ignore") -> np.ndarray:
  """Decodes one image file to uint8 [H, W, 3].

  The result is that of Pillow's `convert("RGB")`, the field's convention: gray is repeated, a
  palette is looked up, alpha is dropped without compositing, of an animation the first frame is
  taken. There are two exceptions. 16-bit gray keeps its high byte (as Pillow does for 16-bit
  color), since `convert` would clip it to white. 32-bit gray is refused, since nothing says which
  value is white. The EXIF orientation is ignored, as torchvision ignores it, unless exif="apply".

  simplejpeg decodes color and gray JPEGs: it gives the same pixels in two thirds of the time. A
  JPEG that its strict mode refuses is left to Pillow, so that a file is good exactly when the
  reference implementations read it.

  Args:
    data: content of the file.
    name: name of the file, for messages.
    strict: refuse color and gray JPEGs, too, that Pillow reads in spite of damage that the decoder
      has noticed.
    exif: "apply" turns the image as its EXIF orientation says.

  Raises:
    DataError: the file is not in FORMATS, is damaged, or has more pixels than MAX_PIXELS or than
      its bytes can hold. The size is read from the header, before any pixel memory is allocated.
    MemoryError: memory ran out, which says nothing about the file.
  """

  def convert(picture):
    image = _decode_opened(picture, data, strict)
    return turn(image, orientation(picture)) if exif == "apply" else image

  return convert_file(data, name, convert)


def convert_file(data: bytes, name: str, convert: Callable[[Image.Image], Any]) -> Any:
  """Returns what a function makes of the picture in an image file.

  Args:
    data: content of the file.
    name: name of the file, for messages.
    convert: decodes an opened picture of acceptable size; its errors are those of the file.

  Raises:
    DataError, MemoryError: as in `decode_image`.
  """
  if not data:
    raise DataError(f"{name}: the file is empty; replace or remove it")
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
      width, height = picture.size
      most = min(MAX_PIXELS, MAX_PIXELS_PER_BYTE * len(data))
      if width * height <= most:
        return convert(picture)
    cause = (
      f"its header claims {width} x {height} pixels, at most {most:,} of {len(data):,} bytes are"
      " decoded"
    )
    error = None
  except Image.UnidentifiedImageError as caught:
    cause, error = f"not an image that is read, it begins {data[:16]!r}", caught
  except MemoryError:
    raise
  # Decoders meet hostile bytes here, and Pillow's raise nearly every type: OSError, SyntaxError,
  # EOFError, struct.error, zlib.error, KeyError, ...
  except Exception as caught:
    cause, error = f"{caught or type(caught).__name__}", caught
  try:
    raise DataError(f"{name}: cannot be decoded: {cause}; replace or remove it") from error
  finally:
    del error  # its traceback refers to this frame, and would keep half-decoded pixels


def orientation(picture: Image.Image) -> int:
  """Returns the EXIF orientation of a decoded picture, 1 to 8; 1, as stored, if it has none."""
  try:
    value = picture.getexif().get(ORIENTATION, 1)
  except Exception:  # damaged EXIF raises errors of any type, and says nothing
    return 1
  return value if value in TURNS else 1


def orientation_of(image: bytes | np.ndarray) -> int:
  """Returns the EXIF orientation of an image that can be decoded; of pixels it is 1."""
  if isinstance(image, np.ndarray):
    return 1
  with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
    picture.load()  # Pillow turns TIFF itself, and then forgets its orientation
    return orientation(picture)


def turn(image: np.ndarray, orientation: int) -> np.ndarray:
  """Turns an image [H, W, C] that is stored with an EXIF orientation into the upright one."""
  transpose, flip = TURNS[orientation]
  if transpose:
    image = image.swapaxes(0, 1)
  return np.ascontiguousarray(image[flip])


def _decode_opened(picture: Image.Image, data: bytes, strict: bool) -> np.ndarray:
  """Returns the pixels of an opened picture of acceptable size, uint8 [H, W, 3]."""
  # The mode decides, not a refusal: simplejpeg does read CMYK, to other colors.
  if data[:2] == b"\xff\xd8" and picture.mode in ("RGB", "L"):
    try:
      return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
      if strict:
        raise
  if picture.mode.startswith("I;16"):
    high_byte = (np.asarray(picture) >> 8).astype(np.uint8)
    return np.repeat(high_byte[:, :, None], 3, axis=2)
  if picture.mode in ("I", "F"):
    raise ValueError(f"pixels of mode {picture.mode!r} have no defined range")
  if picture.mode != "RGB":  # of an RGB picture `convert` would make a copy
    picture = picture.convert("RGB")
  return np.asarray(picture)


def crop_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  single_try: bool = False,
) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) by the RandomResizedCrop law.

  The law is torchvision's: the area is uniform in `scale` times that of the image, the aspect
  width / height log-uniform in `ratio`, the place uniform. Crops that do not fit are drawn again,
  ten times in all; after that comes the largest central crop whose aspect is in `ratio`. The
  aspect is that of the crop in the image, also when the output is not square.

  With `single_try` the first draw counts: a side that does not fit is cut to that of the image
  (facebookresearch/mae util/crop.py, after BYOL's TensorFlow code; MAE's linear probe). Crops then
  reach the borders more often.
  """
  for _ in range(CROP_TRIES):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_height = round(math.sqrt(area / aspect))
    crop_width = round(math.sqrt(area * aspect))
    if single_try:
      crop_height = min(max(crop_height, 1), height)
      crop_width = min(max(crop_width, 1), width)
    if 0 < crop_height <= height and 0 < crop_width <= width:
      top = int(rng.integers(height - crop_height + 1))
      left = int(rng.integers(width - crop_width + 1))
      return top, left, crop_height, crop_width
  aspect = min(max(width / height, ratio[0]), ratio[1])
  crop_height = min(height, round(width / aspect))
  crop_width = min(width, round(height * aspect))
  return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def pictures(image: np.ndarray) -> list[Image.Image]:
  """Converts an image uint8 [H, W, C] for Pillow: RGB to one picture, others band by band."""
  if image.shape[2] == 3:
    return [Image.fromarray(image)]
  return [Image.fromarray(band) for band in np.moveaxis(image, 2, 0)]


def resize_pillow(
  image: np.ndarray, size: tuple[int, int], resample=Image.Resampling.BICUBIC
) -> np.ndarray:
  """Resizes with Pillow, by default bicubic with antialiasing; returns uint8 [H, W, C]."""
  resized = [
    np.asarray(picture.resize((size[1], size[0]), resample)) for picture in pictures(image)
  ]
  return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=2)


def resize_cv2(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes by OpenCV's bicubic, without antialiasing; returns uint8 [H, W, C].

  On 1,000 ImageNet photographs, random crops to 224 pixels, the values differ from Pillow's by 2.3
  levels on average, 48 at the 99.9th percentile, 173 at most: crops that shrink are aliased.
  """
  cv2 = load_cv2()
  resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
  return resized.reshape(*size, -1)  # cv2 drops the axis of one channel


@functools.cache
def load_cv2():
  """Returns the module cv2, which an extra installs; ImportError without it."""
  import cv2

  cv2.setNumThreads(0)  # the loader has threads or processes itself
  return cv2


def resizer(name: str) -> Callable[[np.ndarray, tuple[int, int]], np.ndarray]:
  """Returns the function that resizes training crops, `resize_pillow` or `resize_cv2`.

  Raises:
    DataError: a name other than "pillow" or "cv2", or OpenCV is not installed.
  """
  if name == "pillow":
    return resize_pillow
  if name != "cv2":
    raise DataError(f"resize={name!r} given; expected 'pillow' or 'cv2'")
  try:
    load_cv2()
  except ImportError as error:
    raise DataError(
      f"resize='cv2' needs OpenCV ({error}); install the fast extra (pip install mrmae_jax[fast])"
      " or use 'pillow'"
    ) from error
  return resize_cv2


def random_resized_crop(
  image: np.ndarray,
  rng: np.random.Generator,
  size: tuple[int, int],
  scale: tuple[float, float] = (0.2, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  single_try: bool = False,
  resize: Callable = resize_pillow,
) -> np.ndarray:
  """Cuts out a random box (see `crop_box`) and resizes it to `size`.

  The box is cut out before resizing, because Pillow's `resize(box=)` uses pixels outside the box
  and gives other values. `resize` is a function that `resizer` returns.
  """
  top, left, height, width = crop_box(*image.shape[:2], rng, scale, ratio, single_try)
  return resize(image[top : top + height, left : left + width], size)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right with probability one half."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def random_erase(
  image: np.ndarray,
  rng: np.random.Generator,
  prob: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> np.ndarray:
  """Fills one random rectangle with noise, with probability `prob`.

  The law is that of timm (data/random_erasing.py, mode "pixel", count 1; Zhong et al. 2020): the
  area is uniform in ERASE_AREA times that of the image, the aspect height / width log-uniform in
  ERASE_ASPECT, the place uniform. A rectangle as high or as wide as the image is drawn again, ten
  times in all; then the image stays as it is.

  In timm each value becomes N(0, 1) after normalization. Here it becomes the pixel that the
  normalization maps to that, 255 * (mean + std * N(0, 1)), rounded and clipped to 0..255. The
  batch stays uint8, at the price of the tails beyond the range of pixels: with ImageNet's
  statistics 3 % of the values are clipped, at 1.8 deviations or more, and the noise has deviation
  0.97.

  Args:
    image: uint8 [H, W, C]; not changed.
    rng: source of all random numbers.
    prob: probability of erasing.
    mean, std: statistics that normalize pixels in [0, 1], per channel.

  Returns:
    uint8 [H, W, C].
  """
  if rng.random() >= prob:
    return image
  height, width = image.shape[:2]
  for _ in range(ERASE_TRIES):
    area = height * width * rng.uniform(*ERASE_AREA)
    aspect = math.exp(rng.uniform(*np.log(ERASE_ASPECT)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if h < height and w < width:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      noise = mean + rng.standard_normal((h, w, image.shape[2])) * std
      image = image.copy()
      image[top : top + h, left : left + w] = (noise * 255).round().clip(0, 255)
      return image
  return image


def center_crop(image: np.ndarray, size: tuple[int, int], crop_pct: float = 0.875) -> np.ndarray:
  """Resizes with the aspect kept and cuts out the center: the evaluation view.

  The image is scaled until it just covers floor(size / crop_pct) on both sides; for a square size
  this is the usual "short side to 256, center 224". The longer side is rounded down and the offset
  to nearest, both as torchvision does.
  """
  height, width = image.shape[:2]
  cover = [math.floor(side / crop_pct) for side in size]
  if cover[0] * width >= cover[1] * height:  # the height binds
    resized = cover[0], cover[0] * width // height
  else:
    resized = cover[1] * height // width, cover[1]
  top = round((resized[0] - size[0]) / 2)
  left = round((resized[1] - size[1]) / 2)
  image = resize_pillow(image, resized)
  return image[top : top + size[0], left : left + size[1]]
