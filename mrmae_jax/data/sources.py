"""Where images come from: digits, a folder, a prepared tfds dataset, shards.

A source is a random-access sequence of still encoded images. It holds no open
handle that cannot cross a process boundary, so that grain's worker processes
can have their own copy.
"""

import collections
import functools
import hashlib
import json
import math
import os
from typing import Protocol

import numpy as np
from PIL import Image

from mrmae_jax.errors import DataError, WorkdirError
from mrmae_jax.runs import paths

ARRAY_SUFFIX = ".npy"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ARRAY_SUFFIX, ".png", ".webp")
# Of the pixels in a .npy file: what the largest RGB image takes, too.
MAX_ARRAY_BYTES = 512 * 2**20
# Tried in this order when the requested evaluation folder is absent.
EVAL_FOLDERS = ("val", "validation", "test")
DIGITS_SIZE = 32


class Source(Protocol):
  """What the loader needs of a dataset.

  `source[i]` is `{"image", "label", "name"}`: the encoded bytes of one image or
  its pixels (uint8 [H, W, C]); an int label, -1 when there is none; and a name
  by which a person can find the image.

  Attributes:
    class_names: one name per label; empty when the images have no labels.
    description: one line for the log.
    fingerprint: of the images by number and name; the same on every host that
      has the same ones, wherever they lie.
  """

  class_names: tuple[str, ...]
  description: str
  fingerprint: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict: ...

  def name(self, index: int) -> str:
    """Of one image among those of the source, without reading it.

    It does not say where the source lies, as the "name" of an example may.
    """
    ...


def open_source(
  spec: str,
  split: str,
  *,
  train_split: str = "train",
  eval_split: str = "test",
  data_dir: str = "",
  holdout_every: int = 10,
  quarantine: str = "",
) -> Source:
  """Opens one split of a dataset.

  Args:
    spec: `digits`, `folder:/path`, `tfds:name[/config][:version]` or
      `packed:/path`, what `mrmae pack` has made of one of these; its splits were
      fixed then.
    split: "train" or "eval".
    train_split: sub-folder or tfds split (slicing allowed) behind "train".
    eval_split: the same for "eval". A folder dataset without it falls back to
      val, validation, test, and then to held-out training images.
    data_dir: tfds only: where datasets were prepared, or the directory of one
      prepared dataset (the one with dataset_info.json), on disk or gs://; "" is
      tfds' default.
    holdout_every: where the data has no split of its own, every k-th image
      (index % k == k - 1 in sorted order) is "eval" and the rest "train"; 0
      trains on everything.
    quarantine: a file that lists images to be left out, see `Remaining`; the
      split of the others is what it would be with them. "" for none.

  Raises:
    DataError: anything that keeps the images from being found.
  """
  if split not in ("train", "eval"):
    raise DataError(f"split {split!r} given; expected 'train' or 'eval'")
  if holdout_every < 0 or holdout_every == 1:
    raise DataError(
      f"holdout_every={holdout_every} given; expected 0 (train on everything)"
      " or at least 2 (1 would leave nothing to train on)"
    )
  source = _open_whole(spec, split, train_split, eval_split, data_dir, holdout_every)
  return Remaining(source, split, quarantine) if quarantine else source


def _open_whole(spec, split, train_split, eval_split, data_dir, holdout_every) -> Source:
  """`open_source` without a quarantine."""
  kind, _, rest = spec.partition(":")
  if spec == "digits":
    return DigitsSource(split, holdout_every)
  if kind == "folder" and rest:
    return _open_folder(rest, split, train_split, eval_split, holdout_every)
  if kind == "tfds" and rest:
    return _open_tfds(rest, train_split if split == "train" else eval_split, data_dir)
  if kind == "packed" and rest:
    from mrmae_jax.data import packed  # it imports this

    return packed.PackedSource(rest, split)
  raise DataError(
    f"dataset {spec!r} given; expected 'digits', 'folder:/path/to/images',"
    " 'tfds:name[/config][:version]' or 'packed:/path'"
  )


def open_split(config, split: str) -> Source:
  """`open_source` with the keys of a run's `config.data`."""
  return open_source(
    config.source,
    split,
    train_split=config.train_split,
    eval_split=config.eval_split,
    data_dir=config.data_dir,
    holdout_every=config.holdout_every,
    quarantine=config.quarantine,
  )


class Remaining:
  """A source without the images that a quarantine list names.

  The list is JSON, `{"train": {NAME: REASON, ...}, "eval": {...}}`, as
  `mrmae verify` writes it; lists of names will do in place of the inner
  objects, and a split may be absent. Names are those of `Source.name`.
  """

  def __init__(self, source: Source, split: str, path: str):
    """Finds the images of the list.

    Args:
      source: the split.
      split: "train" or "eval".
      path: of the list.

    Raises:
      DataError: no such list, a name that no image has, or nothing remains.
    """
    try:
      with open(os.path.expanduser(path), encoding="utf-8") as file:
        listed = json.load(file)
      if not isinstance(listed, dict) or not listed.keys() <= {"train", "eval"}:
        raise ValueError("expected an object with 'train' and 'eval'")
      names = set(listed.get(split, ()))
    except (OSError, ValueError, TypeError) as error:
      raise DataError(
        f"quarantine {path}: cannot be read ({error}); write it with python -m"
        " mrmae_jax.cli.verify verify --quarantine=FILE"
      ) from error
    out = {name: i for i in range(len(source)) if (name := source.name(i)) in names}
    if absent := sorted(names - out.keys()):
      raise DataError(
        f"quarantine {path}: {len(absent)} of its {len(names)} {split!r} images"
        f" are not in {source.description}: {', '.join(absent[:3])}"
        f"{', ...' if len(absent) > 3 else ''}; write it again with python -m"
        " mrmae_jax.cli.verify verify and the options of this run"
      )
    if len(out) == len(source):
      raise DataError(f"quarantine {path} leaves nothing of {source.description}")
    self._source = source
    self._indices = np.delete(np.arange(len(source)), list(out.values()))
    self.class_names = source.class_names
    self.description = f"{source.description}; without {len(out)} of these in quarantine"
    digest = hashlib.sha256("\0".join(out).encode(errors="surrogateescape"))
    self.fingerprint = f"{source.fingerprint}, without {len(out)}, names {digest.hexdigest()[:12]}"

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict:
    return self._source[int(self._indices[index])]

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))


def _hold_out(count: int, split: str, every: int, what: str) -> np.ndarray:
  """Indices (int64, sorted) of `split` among `count` images without splits."""
  if not every:
    if split == "eval":
      raise DataError(
        f"{what} has no evaluation split and holdout_every=0 keeps every image"
        " for training; set holdout_every=10, say, or add an evaluation split"
      )
    return np.arange(count)
  held_out = np.arange(count) % every == every - 1
  indices = np.flatnonzero(held_out if split == "eval" else ~held_out)
  if not indices.size:
    raise DataError(
      f"{what} has {count} images; holding out one in {every} leaves none for"
      f" {split!r}; set holdout_every to at most {count}"
    )
  return indices


def _holdout_note(split: str, every: int) -> str:
  if not every:
    return "nothing held out"
  return f"the held-out one in {every}" if split == "eval" else f"one in {every} held out"


class DigitsSource:
  """The 1,797 handwritten digits which come with scikit-learn.

  8x8 images with values 0..16, enlarged to 32x32 with Pillow's bicubic filter.
  Nearest-neighbour would make 4x4 blocks of one value: a small patch then has
  no variance, and the per-patch normalised reconstruction target is 0 / 0.
  """

  def __init__(self, split: str, holdout_every: int):
    try:
      from sklearn import datasets
    except ImportError as error:
      raise DataError(
        "dataset 'digits' needs scikit-learn, which is not installed; run"
        " `pip install scikit-learn`"
      ) from error
    digits = datasets.load_digits()
    indices = _hold_out(len(digits.target), split, holdout_every, "digits")
    small = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
    self._images = np.stack(
      [
        Image.fromarray(image).resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
        for image in small
      ]
    )  # uint8 [N, 32, 32]; the three equal channels are made on access.
    self._labels = digits.target[indices]
    self._indices = indices
    self.class_names = tuple(str(name) for name in digits.target_names)
    self.description = (
      f"digits: {len(self)} images, 10 classes; {_holdout_note(split, holdout_every)}"
    )
    self.fingerprint = self.description

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict:
    return {
      "image": np.repeat(self._images[index][:, :, None], 3, axis=2),
      "label": int(self._labels[index]),
      "name": self.name(index),
    }

  def name(self, index: int) -> str:
    return f"digits/{self._indices[index]:04d}"


class FolderSource:
  """Image files under one directory, read when they are asked for.

  Of .npy files, for images of any number of channels, examples hold the pixels.
  """

  def __init__(
    self,
    root: str,
    paths: list[str],
    class_names: tuple[str, ...],
    description: str,
  ):
    """`paths` are relative to `root`; with classes they start with one."""
    self._root = root
    self._paths = paths
    label_of = {name: label for label, name in enumerate(class_names)}
    self._labels = np.array(
      [label_of.get(path.split(os.sep, 1)[0], -1) for path in paths], np.int32
    )
    self.class_names = class_names
    self.description = description

  @property
  def fingerprint(self) -> str:
    names = "\0".join(self._paths).encode(errors="surrogateescape")
    digest = hashlib.sha256(names).hexdigest()[:12]
    return f"{len(self._paths)} files, names {digest}"

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict:
    path = os.path.join(self._root, self._paths[index])
    read = _read_array if path.lower().endswith(ARRAY_SUFFIX) else _read_bytes
    try:
      image = read(path)
    except OSError as error:
      raise DataError(
        f"{path}: cannot be read ({error.strerror}); it was there when the"
        " folder was listed, restore it or start again without it"
      ) from error
    return {"image": image, "label": int(self._labels[index]), "name": path}

  def name(self, index: int) -> str:
    return self._paths[index]


def _read_bytes(path: str) -> bytes:
  with open(path, "rb") as file:
    return file.read()


def _read_array(path: str) -> np.ndarray:
  """The image in a .npy file, uint8 [H, W, C]; [H, W] is one channel.

  No pickle is read, and no memory taken for pixels before the header is known.

  Raises:
    DataError: another array, one of more than MAX_ARRAY_BYTES, or damaged.
    OSError: the file cannot be read.
  """
  with open(path, "rb") as file:
    try:
      version = np.lib.format.read_magic(file)
      header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, _, dtype = header(file)
    except OSError:
      raise
    # It is parsed as Python; what hostile text raises there is not listed.
    except Exception as error:
      raise DataError(
        f"{path}: no array ({_first_line(error)}); write it with numpy.save, or remove it"
      ) from error
    if dtype != np.uint8 or len(shape) not in (2, 3) or min(shape) < 1:
      raise DataError(
        f"{path}: holds {dtype} of shape {shape}; expected uint8 [H, W, C], or"
        " [H, W] of one channel; bring it to 0..255 and this order"
      )
    if math.prod(shape) > MAX_ARRAY_BYTES:
      raise DataError(
        f"{path}: its header claims the shape {shape}, at most"
        f" {MAX_ARRAY_BYTES:,} values are read; cut it into parts"
      )
    file.seek(0)
    try:
      image = np.load(file, allow_pickle=False)
    except ValueError as error:
      raise DataError(f"{path}: is damaged ({_first_line(error)}); replace or remove it") from error
  return image.reshape(*shape[:2], -1)


def _open_folder(
  root: str, split: str, train_split: str, eval_split: str, every: int
) -> FolderSource:
  """Applies the split rules of `open_source` to one directory."""
  if "://" in root:
    raise DataError(
      f"folder:{root}: a folder of images must be on a disk; from a bucket"
      " prepared datasets are read (tfds:NAME with data_dir=gs://BUCKET/FOLDER),"
      " folders once they are mounted (gcsfuse, say)"
    )
  root = os.path.abspath(os.path.expanduser(root))
  if not os.path.isdir(root):
    state = "is a file" if os.path.exists(root) else "does not exist"
    raise DataError(
      f"folder:{root}: {state}; expected a directory of images, or one with"
      f" the sub-folders {train_split!r} and {eval_split!r}"
    )
  eval_names = dict.fromkeys((eval_split, *EVAL_FOLDERS))  # Ordered, unique.
  eval_names = [
    name
    for name in eval_names
    if name and name != train_split and os.path.isdir(os.path.join(root, name))
  ]
  train_root = os.path.join(root, train_split)
  has_train = bool(train_split) and os.path.isdir(train_root)
  if eval_names and not has_train:
    # Read as one tree, the splits would pass for classes, or mix.
    raise DataError(
      f"folder:{root}: has {eval_names[0]!r} but no {train_split!r}; name the"
      " training sub-folder with train_split"
    )
  if not has_train:
    train_root = root
  train_paths, train_classes = _list_images(train_root)

  if split == "eval" and eval_names:
    eval_root = os.path.join(root, eval_names[0])
    paths, class_names = _list_images(eval_root)
    if class_names != train_classes:
      raise DataError(_class_difference(train_root, train_classes, eval_root, class_names))
    return FolderSource(
      eval_root,
      paths,
      class_names,
      _describe_folder(eval_root, paths, class_names),
    )
  if split == "train" and eval_names:
    return FolderSource(
      train_root,
      train_paths,
      train_classes,
      _describe_folder(train_root, train_paths, train_classes),
    )
  kept = _hold_out(len(train_paths), split, every, f"folder:{train_root}")
  paths = [train_paths[i] for i in kept]
  return FolderSource(
    train_root,
    paths,
    train_classes,
    _describe_folder(train_root, paths, train_classes) + f"; {_holdout_note(split, every)}",
  )


@functools.lru_cache(maxsize=4)  # a run asks half a dozen times
def _list_images(root: str) -> tuple[list[str], tuple[str, ...]]:
  """Sorted relative image paths, and the class names; listed once a process.

  The classes are the first-level directories which hold images, provided that
  every image lies in one and that there are at least two; otherwise the images
  have no labels. Hidden files and directories are skipped. Symbolic links are
  followed; a directory reached twice is read once, so that links cannot loop.
  """

  def refuse(error: OSError):
    # Skipping what cannot be listed would quietly train on less data.
    raise DataError(
      f"{error.filename}: cannot be listed ({error.strerror}); make it"
      " readable or move it out of the dataset"
    )

  paths, other_suffixes, seen = [], collections.Counter(), set()
  for directory, subdirectories, files in os.walk(root, followlinks=True, onerror=refuse):
    real = os.path.realpath(directory)
    if real in seen:
      subdirectories.clear()
      continue
    seen.add(real)
    relative = os.path.relpath(directory, root)
    subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
    for name in files:
      if name.startswith("."):
        continue
      suffix = os.path.splitext(name)[1].lower()
      if suffix in IMAGE_SUFFIXES:
        paths.append(name if relative == "." else os.path.join(relative, name))
      else:
        other_suffixes[suffix or "no suffix"] += 1
  if not paths:
    found = ", ".join(f"{count} {suffix}" for suffix, count in other_suffixes.most_common(5))
    raise DataError(
      f"folder:{root}: no images; looked for {', '.join(IMAGE_SUFFIXES)} at"
      f" any depth, found {found or 'no files'}; point at the images or"
      " convert them"
    )
  paths.sort()
  in_directory = all(os.sep in path for path in paths)
  names = tuple(sorted({path.split(os.sep, 1)[0] for path in paths}))
  return paths, names if in_directory and len(names) > 1 else ()


def _describe_folder(root, paths, class_names) -> str:
  classes = f"{len(class_names)} classes" if class_names else "no labels"
  return f"folder:{root}: {len(paths)} images, {classes}"


def _class_difference(train_root, train_classes, eval_root, eval_classes):
  """One line saying how the class folders of the two splits differ."""

  def some(names):
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"

  return (
    f"the classes of {train_root} ({len(train_classes)}) and {eval_root}"
    f" ({len(eval_classes)}) must agree; only in training:"
    f" {some(set(train_classes) - set(eval_classes))}; only in evaluation:"
    f" {some(set(eval_classes) - set(train_classes))}; make the class folders"
    " equal or choose another folder with eval_split"
  )


def _open_tfds(name: str, split: str, data_dir: str) -> "TfdsSource":
  """Finds a prepared tfds dataset, with its code or from its files alone."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise DataError(
      f"dataset 'tfds:{name}' needs tensorflow-datasets: {error}; run `pip"
      " install tensorflow-datasets array_record importlib_resources`"
    ) from error
  directory = os.path.expanduser(data_dir)
  try:
    folder = paths.open_folder(directory)
  except WorkdirError as error:
    raise DataError(f"dataset 'tfds:{name}', data_dir: {error}") from error
  if not (folder / "dataset_info.json").is_file():
    try:
      builder = tfds.builder(name, data_dir=directory or None)
      prepared = builder.is_prepared()
    # tfds reports bad names, configs and versions as AssertionError, ValueError
    # and DatasetNotFoundError, the last listing some thousand names.
    except Exception as error:
      raise DataError(
        f"dataset 'tfds:{name}' cannot be opened ({_first_line(error)}); check"
        " name, config and version against"
        " https://www.tensorflow.org/datasets/catalog, and set data_dir"
        f" ({data_dir or 'default'!r} now) to where it was prepared"
      ) from error
    if not prepared:
      raise DataError(
        f"dataset 'tfds:{name}' is not prepared in {builder.data_dir};"
        f" {_prepare_hint(name, data_dir)}, or set data_dir to where it is"
      )
    directory = str(builder.data_dir)
  return TfdsSource(name, directory, split)


def _first_line(error: Exception) -> str:
  return (str(error).strip("\"' ").splitlines() or [type(error).__name__])[0]


def _prepare_hint(name: str, data_dir: str = "") -> str:
  where = f", data_dir={data_dir!r}" if data_dir else ""
  return (
    f"run `tfds.builder({name!r}, file_format='array_record'{where})"
    ".download_and_prepare()` once (some datasets need TensorFlow for that,"
    " none to be read)"
  )


class TfdsSource:
  """One split of a tfds dataset prepared in the array_record format.

  Only the features `image` and (if it is there) `label` are parsed, and images
  stay encoded: tfds' own decoding is slower and needs OpenCV for speed.
  """

  def __init__(self, name: str, directory: str, split: str):
    self._name = name
    self._directory = directory
    self._split = split
    self._records = None
    features = self._open()
    self.class_names = tuple(getattr(features.get("label"), "names", ()))
    classes = f"{len(self.class_names)} classes"
    self.fingerprint = (
      f"tfds:{name} split {split}: {len(self)} images,"
      f" {classes if self.class_names else 'no labels'}"
    )
    self.description = f"{self.fingerprint} ({directory})"

  def _open(self):
    """Opens the record files; returns the features that are read."""
    import tensorflow_datasets as tfds

    what = f"dataset 'tfds:{self._name}' in {self._directory}"
    try:
      builder = tfds.builder_from_directory(self._directory)
    except Exception as error:
      raise DataError(
        f"{what} cannot be read ({_first_line(error)}); {_prepare_hint(self._name)}"
      ) from error
    stored = dict(builder.info.features.items())
    image, label = stored.get("image"), stored.get("label")
    encoded = isinstance(image, tfds.features.Image) and image.np_dtype != np.float32
    pixels = (
      type(image) is tfds.features.Tensor
      and image.np_dtype == np.uint8
      and len(image.shape) == 3
      and image.shape[-1] in (1, 3)
    )
    if not (encoded or pixels):
      raise DataError(
        f"{what} has no image to read: feature 'image' is {image!r}; expected"
        " an integer image, or a uint8 [H, W, 1 or 3] tensor; its features"
        f" are {', '.join(stored)}; choose another dataset"
      )
    features = {"image": image}
    # Other labels (several per image, free text) are no class index.
    if isinstance(label, tfds.features.ClassLabel):
      features["label"] = label
    formats = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
      raise DataError(
        f"{what} was prepared as {', '.join(sorted(formats))}; expected"
        f" array_record: move it away and {_prepare_hint(self._name)}"
      )
    try:
      self._records = builder.as_data_source(
        self._split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
      )
    except Exception as error:
      raise DataError(
        f"{what}: split {self._split!r} cannot be read ({_first_line(error)});"
        f" its splits are {', '.join(builder.info.splits)}; choose with"
        " train_split and eval_split"
      ) from error
    self._features = tfds.features.FeaturesDict(features)
    self._decoders = {"image": tfds.decode.SkipDecoding()}
    return features

  def __getstate__(self):
    # Readers stay in their process; another one opens its own.
    return self.__dict__ | {"_records": None, "_features": None, "_decoders": None}

  def __len__(self) -> int:
    if self._records is None:
      self._open()
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    if self._records is None:
      self._open()
    try:
      example = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
    except MemoryError:
      raise
    # The reader raises what its C++ has: RuntimeError, ValueError, IndexError.
    except Exception as error:
      raise DataError(
        f"{self.name(index)}: cannot be read from {self._directory}"
        f" ({_first_line(error)}); copy or prepare the dataset again"
      ) from error
    image = example["image"]
    if isinstance(image, np.ndarray) and image.shape[-1] == 1:
      image = np.repeat(image, 3, axis=2)
    return {
      "image": image,
      "label": int(example.get("label", -1)),
      "name": self.name(index),
    }

  def name(self, index: int) -> str:
    return f"tfds:{self._name}/{self._split}[{index}]"
