"""Files inside of a .zip or .tar, read in any order without unpacking it."""

import collections
import errno
import functools
import io
import lzma
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mrmae_jax.data.sources.base import first_line
from mrmae_jax.errors import DataError
from mrmae_jax.runs.paths import open_regular

SUFFIXES = (".zip", ".tar")
# Compressed as a whole: a member cannot be read without all that lie before it.
COMPRESSED = (
  *(".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
  *(".7z", ".rar"),
)
MAX_BYTES = 512 * 2**20  # of a member: more than an image file has
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
BLOCK = 512  # bytes, of a tar
END_BYTES = 2**16 + 22  # the most that the end of a .zip takes
MAX_PADDING = 64 * 2**20  # bytes of zeros behind a tar; its writers fill up kilobytes
DAMAGE = (  # what zipfile and its decompressors raise of damaged bytes
  *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
  *(EOFError, ValueError, RuntimeError, OSError),
)


class Entry(NamedTuple):
  """A file or folder in a folder."""

  name: str
  is_folder: bool


class Archive:
  """The files of an archive by their names. It can be sent to other processes.

  Attributes:
    path: of the archive.
    sizes: {name: bytes} of the files, in the order of the archive.
    num_links: members that are neither files nor folders, which are not read.
  """

  def __init__(self, path: str):
    """Starts without files; `add` adds them."""
    self.path, self.sizes, self.num_links = path, {}, 0
    self._folders = collections.defaultdict(dict)  # folder -> {name: is it a folder}
    self._file, self._lock = None, threading.Lock()
    self._version = file_version(os.stat(path))

  def __getstate__(self):
    return self.__dict__ | {"_lock": None, "_file": None}

  def __setstate__(self, state):
    self.__dict__ |= state | {"_lock": threading.Lock()}

  def add(self, name: str, size: int) -> str:
    """Adds a file; returns its name without what says nothing, such as a leading "./".

    Raises:
      DataError: two files have this name, or it leads out of the archive.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts:
      raise DataError(
        f"{self.path}: holds a file named {name!r}, which leads out of the archive; do not trust"
        " it, or write it again with relative names"
      )
    name = "/".join(parts)
    for i in range(len(parts)):
      folder, is_folder = self._folders["/".join(parts[:i])], i < len(parts) - 1
      if folder.setdefault(parts[i], is_folder) != is_folder or name in self.sizes:
        raise DataError(
          f"{self.path}: holds {name} twice; write it again with each file once (tar -r appends a"
          " file that was changed to the old one)"
        )
    self.sizes[name] = size
    return name

  def scan(self, folder: str) -> list[Entry]:
    """Returns what lies in a folder; "" is the top."""
    return [Entry(*item) for item in self._folders.get(folder, {}).items()]

  def has_folder(self, folder: str) -> bool:
    """Returns whether there is such a folder with files at some depth."""
    return folder in self._folders

  def read(self, name: str) -> bytes:
    """Returns the content of a file; threads may call this at the same time.

    Raises:
      DataError: it is damaged, or larger than an image file.
      OSError: there is no such file, or the archive cannot be read.
    """
    if name not in self.sizes:
      raise FileNotFoundError(errno.ENOENT, "not in the archive", name)
    if self.sizes[name] > MAX_BYTES:
      raise DataError(
        f"{self.path}/{name}: has {self.sizes[name]:,} bytes; at most {MAX_BYTES:,} are read"
      )
    try:
      return self._read(name)
    finally:  # its files would be sought where they were; one that was replaced is open still
      if file_version(os.fstat(self._fileno())) != self._version:
        raise DataError(
          f"{self.path}: was changed after its files were listed; start again, or restore it"
        )


class ZipArchive(Archive):
  """A .zip; its members may be compressed one by one."""

  def __init__(self, path: str):
    super().__init__(path)
    self._members = {}  # name -> as the archive has it
    members = self._open().infolist()
    self._check_count(len(members))
    for info in members:
      if info.is_dir():
        continue
      if stat.S_ISLNK(info.external_attr >> 16):
        self.num_links += 1
        continue
      # Old Windows tools write backslashes.
      name = info.filename.replace("\\", "/") if not info.create_system else info.filename
      if info.flag_bits & 1 or info.compress_type not in METHODS:
        how = "is encrypted" if info.flag_bits & 1 else f"uses method {info.compress_type}"
        raise DataError(f"{path}: {name} {how}, which is not read; unpack it, or pack it again")
      self._members[self.add(name, info.file_size)] = info.filename

  def _check_count(self, count: int) -> None:
    """Raises DataError unless the end of the archive names as many members as were found.

    `zipfile` stops at a damaged entry of the directory without a word.
    """
    with open(self.path, "rb") as file:
      file.seek(-min(END_BYTES, os.path.getsize(self.path)), os.SEEK_END)
      end = file.read()
    (expected,) = struct.unpack_from("<H", end, end.rindex(b"PK\5\6") + 10)
    if expected not in (count % 2**16, 2**16 - 1):  # the last: the number stands elsewhere
      raise DataError(
        f"{self.path}: is damaged: its directory holds {count} of {expected} members; copy or"
        " download it again"
      )

  def _open(self) -> zipfile.ZipFile:
    with self._lock:
      if self._file is None:
        try:
          self._file = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
          raise DataError(
            f"{self.path}: is no zip archive, or is damaged or cut short ({first_line(error)});"
            " copy or download it again"
          ) from error
      return self._file

  def _fileno(self) -> int:
    return self._open().fp.fileno()

  def _read(self, name: str) -> bytes:
    try:
      return self._open().read(self._members[name])
    except DAMAGE as error:
      raise DataError(
        f"{self.path}/{name}: is damaged ({first_line(error)}); copy the archive again, or leave"
        " the file out"
      ) from error


class TarArchive(Archive):
  """A .tar that is not compressed."""

  def __init__(self, path: str):
    super().__init__(path)
    self._offsets = {}
    try:
      with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
          tar.members = []  # of a million images they would take a gigabyte
          if member.isreg() and not member.issparse():
            self._offsets[self.add(member.name, member.size)] = member.offset_data
          elif not member.isdir():
            self.num_links += 1
        end = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
      raise DataError(
        f"{path}: is no tar archive, or is damaged or cut short ({first_line(error)}); copy or"
        " download it again"
      ) from error
    self._check_end(end)

  def _check_end(self, end: int) -> None:
    """Raises DataError unless the archive ends where its last member does.

    `tarfile` stops at a damaged header and at the end of the first of several archives, without a
    word.
    """
    with open(self.path, "rb") as file:
      file.seek(end)
      first, problem = file.read(BLOCK), ""
      padding = os.path.getsize(self.path) - end
      if len(first) < BLOCK:
        problem = "is cut short, its end is missing"
      elif any(first):
        problem = f"is damaged at byte {end:,}"
      elif padding > MAX_PADDING or any(map(any, iter(lambda: file.read(2**20), b""))):
        problem = f"goes on after its end at byte {end:,}, as archives do that were joined with cat"
    if problem:
      raise DataError(
        f"{self.path}: {problem}; what follows its first {len(self.sizes)} files would be lost:"
        " write or copy it again"
      )

  def _fileno(self) -> int:
    with self._lock:
      if self._file is None:
        self._file = open(self.path, "rb", buffering=0)
      return self._file.fileno()

  def _read(self, name: str) -> bytes:
    size = self.sizes[name]
    content = os.pread(self._fileno(), size, self._offsets[name])
    if len(content) < size:
      raise DataError(f"{self.path}/{name}: is cut short; copy the archive again")
    return content


def file_version(info: os.stat_result) -> tuple[int, int]:
  """Returns what tells a file from what is written in its place later."""
  return info.st_size, info.st_mtime_ns


@functools.lru_cache(maxsize=4)  # a run asks for it once for each folder
def _open_archive(path: str, modified: int) -> Archive:
  del modified  # a file that was written anew is another one
  return ZipArchive(path) if path.lower().endswith(".zip") else TarArchive(path)


def open_archive(path: str) -> Archive:
  """Opens a .zip or .tar, once a process.

  Raises:
    DataError: it is damaged, compressed as a whole, or has names that are not safe.
    OSError: it cannot be read.
  """
  if path.lower().endswith(COMPRESSED):
    raise DataError(
      f"{path}: is compressed as a whole, so that its images cannot be read in any order; unpack"
      " it, or only its compression (gunzip leaves a .tar, which is read)"
    )
  return _open_archive(path, os.stat(path).st_mtime_ns)


def split_archive(path: str) -> tuple[Archive, str] | None:
  """Returns the archive in which a path lies and the part inside of it, or None."""
  lower = path.lower()
  if not any(suffix in lower for suffix in SUFFIXES):
    return None
  parts = path.split(os.sep)
  for i, part in enumerate(parts, 1):
    outer = os.sep.join(parts[:i])
    if part.lower().endswith(SUFFIXES) and os.path.isfile(outer):
      return open_archive(outer), "/".join(parts[i:]).strip("/")
  return None


def is_file(path: str) -> bool:
  """Returns whether a path is that of a file, on disk or in an archive."""
  if place := split_archive(path):
    archive, name = place
    return name in archive.sizes
  return os.path.isfile(path)


def open_file(path: str) -> BinaryIO:
  """Opens a file on disk or in an archive for reading bytes.

  Raises:
    DataError: a damaged archive.
    OSError: there is no such file, or it cannot be read.
  """
  place = split_archive(path)
  if place is None:
    return open_regular(Path(path))
  archive, name = place
  return io.BytesIO(archive.read(name))
