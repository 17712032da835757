"""Labels of images from a table: CSV, TSV, or words with blanks; a file and its label per row.

A first row may name the columns. Without names these are the first and the second one.
"""

import collections
import csv
import io
import os
from typing import NamedTuple

from mrmae_jax.data.sources.archive import open_file
from mrmae_jax.data.sources.listing import IMAGE_SUFFIXES, first_names
from mrmae_jax.errors import DataError

FILE_COLUMNS = (
  *("file", "filename", "file_name", "filepath", "path", "image", "image_id", "imageid", "img"),
  *("image_name", "image_path", "name", "id"),
)
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "labels", "species", "breed")
TINY_IMAGENET = "val_annotations.txt"  # its table, in val/ beside the images


class Row(NamedTuple):
  """A row of a table: its number from 1, the name of a file, its label."""

  number: int
  file: str
  label: str


def read_labels(table: str, paths: list[str]) -> list[str]:
  """Returns the label of each image by a table, "" for those that it does not name.

  A name in the table may be the path of an image, the end of it, or either without the suffix.

  Args:
    table: the file, on disk or in an archive.
    paths: all images that the table may name.

  Raises:
    DataError: the table cannot be read, names an image that is not there, or several at once, or
      an image twice with different labels.
  """
  rows, find = _read_rows(table), _Finder(paths)
  if len(rows) > 1 and not find(rows[0].file) and rows[0].label not in {r.label for r in rows[1:]}:
    del rows[0]  # names of the columns
  labels, unknown = [""] * len(paths), []
  for row in rows:
    matches = find(row.file)
    if len(matches) > 1:
      raise DataError(
        f"labels {table}, row {row.number}: {row.file} is the name of {len(matches)} images:"
        f" {first_names(paths[i] for i in matches)}; write their folders into the table"
      )
    if not matches:
      unknown.append(row.file)
    elif labels[matches[0]] not in ("", row.label):
      raise DataError(
        f"labels {table}, row {row.number}: {row.file} is {row.label!r} here and"
        f" {labels[matches[0]]!r} in a row above; an image has one label"
      )
    else:
      labels[matches[0]] = row.label
  if unknown:
    raise DataError(
      f"labels {table}: {len(unknown)} of its {len(rows)} rows name no image, the first:"
      f" {unknown[0]!r}; the images are called {first_names(paths)}; correct the table, or restore"
      f" the images (columns of other names: call them {FILE_COLUMNS[0]} and {LABEL_COLUMNS[0]})"
    )
  return labels


def sort_classes(names) -> tuple[str, ...]:
  """Returns the names of classes in order: numbers by value, other names by their letters."""
  names = set(names)
  return tuple(sorted(names, key=int if all(map(_is_number, names)) else None))


def _is_number(name: str) -> bool:
  return name.isascii() and name.isdigit()


def _read_rows(table: str) -> list[Row]:
  """Returns the rows of a table that have a file and a label."""
  try:
    with open_file(table) as file:
      text = file.read().decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(
      f"labels {table}: cannot be read ({error}); expected a table in UTF-8 with a file and its"
      " label in each row"
    ) from error
  head = text.lstrip().split("\n", 1)[0]
  delimiter = next((mark for mark in "\t,; " if mark in head), ",")
  try:
    lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
  except csv.Error as error:
    raise DataError(f"labels {table}: is no table ({error}); expected CSV or TSV") from error
  cells = [(i, [cell.strip() for cell in line]) for i, line in enumerate(lines, 1) if any(line)]
  names = [name.lower() for name in cells[0][1]] if cells else []
  file = next((names.index(name) for name in FILE_COLUMNS if name in names), None)
  label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
  if file is None or label is None:
    file, label = 0, 1
  else:
    del cells[0]
  if not cells:
    raise DataError(f"labels {table}: is empty; expected a file and its label in each row")
  for number, row in cells:
    if len(row) <= max(file, label) or not row[file] or not row[label]:
      raise DataError(
        f"labels {table}, row {number}: {delimiter.join(row)!r} has no file or no label; expected"
        " both, divided by tabs or commas"
      )
  return [Row(number, row[file], row[label]) for number, row in cells]


class _Finder:
  """Finds images by names that may lack the first folders, the suffix, or both."""

  def __init__(self, paths: list[str]):
    self._parts = [path.split(os.sep) for path in paths]
    self._by_name, self._by_stem = collections.defaultdict(list), collections.defaultdict(list)
    for i, (*_, name) in enumerate(self._parts):
      self._by_name[name].append(i)
      self._by_stem[os.path.splitext(name)[0]].append(i)

  def __call__(self, name: str) -> list[int]:
    """Returns the indices of the images that a name may mean."""
    *folders, last = name.replace("\\", "/").removeprefix("./").split("/")
    folders = [part for part in folders if part]
    has_suffix = os.path.splitext(last)[1].lower() in IMAGE_SUFFIXES
    candidates = self._by_name.get(last) or (not has_suffix and self._by_stem.get(last)) or []
    # `folders` is the end of an image's folders, or the other way round if the table lies above.
    ends = lambda long, short: not short or long[-len(short) :] == short
    fits = lambda own: ends(own, folders) or ends(folders, own)
    return [i for i in candidates if fits(self._parts[i][:-1])]
