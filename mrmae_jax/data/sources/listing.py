"""Lists the images of a folder or an archive, and counts the files that are left out."""

import collections
import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from PIL import features

from mrmae_jax.data.sources.archive import COMPRESSED, SUFFIXES, Entry, split_archive
from mrmae_jax.errors import DataError

ARRAY_SUFFIX = ".npy"
# Endings of the formats that `augment.decode_image` reads, see `augment.FORMATS`.
IMAGE_SUFFIXES = (
  *(".jpg", ".jpeg", ".jpe", ".jfif", ARRAY_SUFFIX, ".png", ".apng", ".webp", ".gif"),
  *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
  *((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx") if features.check("jpg_2000") else ()),
  *((".avif", ".avifs") if features.check("avif") else ()),
)
# Folders and files of file managers, network disks and operating systems, in lower case
SYSTEM_FOLDERS = re.compile(
  r"\..*|@(eadir|tmp|recycle|recently-snapshot|__thumb|sharebin|synoresource)|#(recycle|snapshot)"
  r"|\$?recycle\.bin|recycler|recycled|\$extend|system volume information|found\.\d{3}|lost\+found"
  r"|~snapshot|__macosx|__pycache__|network trash folder|temporary items|ipod photo cache|_gsdata_"
)
SYSTEM_FILES = re.compile(
  r"\..*|(eh)?thumbs(_vista)?\.db|desktop\.ini|picasa\.ini|icon\r|zbthumbnail\.info"
  r"|.*:zone\.identifier"
)
MAX_NAMES = 5  # that a message lists


class Listing(NamedTuple):
  """The images below a folder.

  Attributes:
    paths: sorted, relative to the folder.
    other_suffixes: how many files have another suffix than those of images, by suffix.
    empty_folders: first-level folders without images.
  """

  paths: list[str]
  other_suffixes: collections.Counter
  empty_folders: tuple[str, ...]

  @property
  def left_out(self) -> str:
    """What of the folder is not read, "" if everything is."""
    parts = [describe_suffixes(self.other_suffixes)] if self.other_suffixes else []
    if self.empty_folders:
      parts.append(f"no images in {first_names(f'{name}/' for name in self.empty_folders)}")
    return "; ".join(parts)


def describe_suffixes(counts: collections.Counter) -> str:
  """Returns "3 .heic, 2 .txt" for the files that have these suffixes."""
  parts = [f"{count} {suffix}" for suffix, count in counts.most_common(MAX_NAMES)]
  rest = counts.total() - sum(count for _, count in counts.most_common(MAX_NAMES))
  return ", ".join(parts) + (f" and {rest} others" if rest else "")


def first_names(names, most: int = MAX_NAMES) -> str:
  """Returns the first of some names in order, and how many more there are; "none" without any."""
  names = sorted(names)
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more if names else "none"


@functools.lru_cache(maxsize=4)  # a run asks half a dozen times
def list_images(root: str) -> Listing:
  """Lists the images below a folder, once a process.

  Hidden files and directories are skipped, as are those of file managers. Symbolic links are
  followed; a directory reached twice is read once, so that links cannot loop.

  Raises:
    DataError: there are no images, or a folder cannot be listed.
  """
  paths, other_suffixes, place = [], collections.Counter(), split_archive(root)
  if place and place[0].num_links:
    other_suffixes["links"] = place[0].num_links
  for relative, files in _walk(root):
    for name in files:
      if _is_image(name):
        paths.append(os.path.join(relative, name))
      else:
        other_suffixes[os.path.splitext(name)[1].lower() or "no suffix"] += 1
  if not paths:
    others, advice = describe_suffixes(other_suffixes), "point at the images or convert them"
    if other_suffixes.keys() & {*SUFFIXES, *COMPRESSED, ".gz"}:
      advice = "archives are read one by one (folder:/path/x.tar); unpack those inside of others"
    raise DataError(
      f"folder:{root}: no images; looked for {', '.join(IMAGE_SUFFIXES)} at any depth, found"
      f" {others or 'no files'}; {advice}"
    )
  paths.sort()
  with_images = {path.split(os.sep, 1)[0] for path in paths}
  empty = tuple(name for name in subfolders(root) if name not in with_images)
  return Listing(paths, other_suffixes, empty)


def has_images(root: str) -> bool:
  """Returns whether a folder holds images at any depth; stops at the first."""
  return any(_is_image(name) for _, files in _walk(root) for name in files)


def is_folder(path: str) -> bool:
  """Returns whether a path is that of a folder, on disk or in an archive, or of an archive."""
  if place := split_archive(path):
    archive, folder = place
    return archive.has_folder(folder)
  return os.path.isdir(path)


def subfolders(root: str) -> list[str]:
  """Returns the sorted names of the folders in a folder, without those of file managers."""
  return sorted(
    entry.name
    for entry in _scan(root)
    if entry.is_folder and not SYSTEM_FOLDERS.fullmatch(entry.name.lower())
  )


def loose_images(root: str) -> list[str]:
  """Returns the sorted names of the images that lie in a folder itself."""
  return sorted(
    entry.name
    for entry in _scan(root)
    if _is_image(entry.name) and not SYSTEM_FILES.fullmatch(entry.name.lower())
  )


def _scan(root: str) -> list[Entry]:
  if place := split_archive(root):
    archive, folder = place
    return archive.scan(folder)
  try:
    with os.scandir(root) as entries:
      return [Entry(entry.name, entry.is_dir()) for entry in entries]
  except OSError as error:
    _refuse(error)


def _is_image(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
  """Yields (relative path, "" for the root itself; file names) of each folder below `root`."""
  if split_archive(root):
    yield from _walk_archive(root, "")
    return
  visited = set()
  for directory, subdirectories, files in os.walk(root, followlinks=True, onerror=_refuse):
    real = os.path.realpath(directory)
    if real in visited:
      subdirectories.clear()
      continue
    visited.add(real)
    subdirectories[:] = sorted(
      name for name in subdirectories if not SYSTEM_FOLDERS.fullmatch(name.lower())
    )
    relative = os.path.relpath(directory, root)
    yield (
      "" if relative == "." else relative,
      [name for name in files if not SYSTEM_FILES.fullmatch(name.lower())],
    )


def _walk_archive(root: str, folder: str) -> Iterator[tuple[str, list[str]]]:
  """Does as `_walk` below a folder of an archive; `folder` is relative to `root`."""
  files = [entry.name for entry in _scan(os.path.join(root, folder)) if not entry.is_folder]
  yield folder, [name for name in files if not SYSTEM_FILES.fullmatch(name.lower())]
  for name in subfolders(os.path.join(root, folder)):
    yield from _walk_archive(root, os.path.join(folder, name))


def _refuse(error: OSError):
  # Skipping a folder that cannot be listed would quietly train on less data.
  raise DataError(
    f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it out of"
    " the dataset"
  ) from error
