"""Bad, changing or stalled data and dying workers: every loss is reported and nothing hangs."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest

from mrmae_jax import config as config_lib
from mrmae_jax import preflight, train
from mrmae_jax.cli import classifiers, knn, replay
from mrmae_jax.cli.verify import _classify_file
from mrmae_jax.data import (
  LoaderOptions,
  augment,
  element_shapes,
  open_source,
  sample_contents,
)
from mrmae_jax.data.sources.quarantine import FilteredSource
from mrmae_jax.errors import ConfigError, DataError, UserError, WorkdirError
from mrmae_jax.runs import checkpoint
from mrmae_jax.weights import files
from tests.faults import small
from tests.helpers import coco
from tests.helpers.cli import run_command
from tests.helpers.images import (
  SIZE,
  Numbered,
  assert_same,
  encode,
  eval_loader,
  good_files,
  lying_jpeg,
  make_views,
  photo,
  png_header,
  train_loader,
  train_steps,
  write_images,
)
from tests.helpers.programs import Program

ROOT = pathlib.Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
COUNT = 24
JPEG = encode(photo(200, 300))
BAD = {  # image of the folder below -> content of its file; None: the file is missing
  3: b"",
  4: b"<!DOCTYPE html><html>404</html>",
  10: JPEG[: len(JPEG) // 2],
  17: None,
}


def name(i):
  return f"{'ab'[i % 2]}/{i:02d}.jpg"


def damage(root):
  for i, content in BAD.items():
    (root / name(i)).unlink()
    if content is not None:
      (root / name(i)).write_bytes(content)


@pytest.fixture
def folders(tmp_path):
  """Returns an intact source of 24 images, one with bad files, and the places of these.

  Files 3, 4, 10 and 17 (missing) went bad after the second source was opened.
  """
  sources = []
  for folder in ("intact", "bad"):
    write_images(tmp_path / folder, map(name, range(COUNT)))
    sources.append(open_source(f"folder:{tmp_path}/{folder}", "train", holdout_every=0))
  damage(tmp_path / "bad")
  order = sorted(range(COUNT), key=name)  # of the images in the source
  return *sources, {order.index(i) for i in BAD}


def join_steps(source, steps, **options):
  return {
    key: np.concatenate([step[key] for step in train_steps(source, steps, **options)])
    for key in ("image", "label")
  }


# F26: images that cannot be read.


SKIP = dict(on_error="skip", max_skipped=0.2)


def test_f26_skip_replaces_bad_images_and_changes_no_other(folders):
  intact, bad, places = folders
  expected, actual = join_steps(intact, 7), join_steps(bad, 7, **SKIP)
  index = join_steps(Numbered(COUNT), 7)["label"]  # of the image at each place of the stream
  is_replaced = np.isin(index, list(places))
  assert 8 <= is_replaced.sum() <= 12  # two epochs and a part
  for key in expected:
    np.testing.assert_array_equal(actual[key][~is_replaced], expected[key][~is_replaced])
  is_same = (actual["image"] == expected["image"]).all((1, 2, 3))
  np.testing.assert_array_equal(is_same, ~is_replaced)


class Unreadable(Numbered):
  """Every fourth image cannot be read."""

  def __getitem__(self, index):
    if index % 4 == 3:
      raise DataError(f"{index}: cannot be read")
    return super().__getitem__(index)


def test_f26_each_place_draws_its_own_substitute():
  epochs = 8
  steps = epochs * COUNT // 8
  labels = join_steps(Unreadable(COUNT), steps, on_error="skip", max_skipped=1.0)["label"]
  index = join_steps(Numbered(COUNT), steps)["label"]
  np.testing.assert_array_equal(labels != index, index % 4 == 3)
  drawn = np.bincount(labels[index % 4 == 3], minlength=COUNT)  # 48 draws of 18 images
  assert drawn[3::4].sum() == 0 and drawn.max() <= 10 and (drawn > 0).sum() >= 12


@pytest.mark.parametrize(
  "shards, workers, first",
  [
    (2, 0, 0),
    (1, 2, 3),
    *(pytest.param(*x, marks=pytest.mark.variant) for x in ((1, 1, 0), (2, 2, 1))),
  ],
)
def test_f26_skip_does_not_depend_on_shards_workers_or_start(folders, shards, workers, first):
  reference = train_steps(folders[1], 7, **SKIP)
  actual = train_steps(
    folders[1], 7 - first, shards=shards, workers=workers, first_step=first, **SKIP
  )
  assert_same(actual, reference[first:])


@pytest.mark.parametrize("workers", [0, 1])
def test_f26_each_skipped_image_is_named_once(folders, capfd, workers):
  _, bad, places = folders
  with contextlib.closing(train_loader(bad, workers=workers, **SKIP)) as batches:
    for _ in range(12):  # four epochs
      assert next(batches).keys() == {"image", "label"}
    assert batches.skipped.keys() == places
  lines = [
    line for line in capfd.readouterr().err.splitlines() if "another image takes its place" in line
  ]
  assert len(lines) == len(BAD) and all(line.startswith("warning: ") for line in lines)
  for i, cause in {
    3: "is empty",
    4: "begins b'<!DOCTYPE html><'",
    10: "truncated",
    17: "No such file",
  }.items():
    assert any(name(i) in line and cause in line for line in lines)
  assert "(4 of 24 images skipped so far, at most 4)" in lines[-1]


@pytest.mark.parametrize("shards", [1, 2])
def test_f26_too_many_skipped_images_end_the_run(folders, shards):
  options = dict(on_error="skip", max_skipped=0.1, num_shards=shards, shard=shards - 1)
  batches = train_loader(folders[1], **options)
  with pytest.raises(
    DataError, match="3 of 24 images could not be read, max_skipped=0.1 allows 2; list them"
  ):
    for _ in range(20):
      next(batches)
  with pytest.raises(
    DataError, match="1 of 24 images could not be read, max_skipped=0.01 allows 0"
  ):
    train_steps(folders[1], 20, on_error="skip")  # the default allows none


def test_f26_a_source_without_a_readable_image_ends_the_run(tmp_path):
  write_images(tmp_path, ["a.jpg", "b.jpg"])
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  for path in tmp_path.iterdir():
    path.unlink()
  with pytest.raises(DataError, match="cannot be read.*of 99 others drawn in its place none"):
    train_steps(source, 1, on_error="skip", max_skipped=1.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_f26_evaluation_does_not_count_bad_images_and_says_so(folders, shards, capsys):
  intact, bad, places = folders
  expected = list(eval_loader(intact))
  parts = [list(eval_loader(bad, shard=i, num_shards=shards, **SKIP)) for i in range(shards)]
  actual = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)
  ]
  actual, expected = (
    {key: np.concatenate([step[key] for step in steps]) for key in steps[0]}
    for steps in (actual, expected)
  )
  np.testing.assert_array_equal(np.flatnonzero(~actual["valid"]), sorted(places))
  for key in ("image", "label"):
    np.testing.assert_array_equal(actual[key][actual["valid"]], expected[key][actual["valid"]])
  assert not actual["label"][~actual["valid"]].any() and not actual["image"][~actual["valid"]].any()
  assert capsys.readouterr().err.count("it is not counted") == len(BAD)
  with pytest.raises(DataError, match="cannot be"):
    list(eval_loader(bad))


def test_f26_a_run_with_a_quarantine_list_equals_one_without_these_files(folders, tmp_path, capsys):
  report, list_path = tmp_path / "report.json", tmp_path / "list.json"
  (tmp_path / "bad" / name(17)).write_bytes(JPEG[:20])
  source = f"folder:{tmp_path}/bad"
  options = [f"--source={source}", "--holdout_every=0", "--splits=train", "--workers=2"]
  assert run_command(["verify", *options, f"--json={report}", f"--quarantine={list_path}"]) == 3
  assert json.loads(list_path.read_text())["train"].keys() == {name(i) for i in BAD}
  assert "4 of 24 images are bad" in capsys.readouterr().err
  remaining = open_source(source, "train", holdout_every=0, quarantine=str(list_path))
  shutil.copytree(tmp_path / "intact", tmp_path / "good")
  for i in BAD:
    (tmp_path / "good" / name(i)).unlink()
  expected = open_source(f"folder:{tmp_path}/good", "train", holdout_every=0)
  assert (
    len(remaining) == 20
    and "24 images, 2 classes; nothing held out; without 4 of these in quarantine"
    in remaining.description
  )
  assert_same(train_steps(remaining, 5, workers=1), train_steps(expected, 5))
  assert remaining.fingerprint not in (
    expected.fingerprint,
    open_source(source, "train", holdout_every=0).fingerprint,
  )
  assert [remaining.name(i) for i in range(20)] == [expected.name(i) for i in range(20)]


def test_f26_quarantine_keeps_the_split_of_the_others(tmp_path):
  (tmp_path / "list.json").write_text(
    json.dumps({"train": ["digits/0000"], "eval": {"digits/0009": "cause"}})
  )
  for split, excluded in (("train", "digits/0000"), ("eval", "digits/0009")):
    original, remaining = (
      open_source("digits", split, quarantine=path) for path in ("", str(tmp_path / "list.json"))
    )
    names = [original.name(i) for i in range(len(original))]
    assert names[0] == excluded and [remaining.name(i) for i in range(len(remaining))] == names[1:]
    assert remaining[3]["name"] == remaining.name(3)


def test_f26_a_list_of_both_splits_counts_where_nothing_is_held_out(tmp_path):
  """Not where a folder has splits of its own, whose files may have the same names."""
  photographs(tmp_path / "all", count=20)
  listed = {}
  for split in ("train", "eval"):
    source = open_source(f"folder:{tmp_path}/all", split, holdout_every=5)
    listed[split] = [source.name(0)]
  options = {"holdout_every": 0, "quarantine": str(tmp_path / "list.json")}
  (tmp_path / "list.json").write_text(json.dumps(listed))
  source = open_source(f"folder:{tmp_path}/all", "train", **options)
  names = {source.name(i) for i in range(len(source))}
  assert len(names) == 18 and names.isdisjoint(listed["train"] + listed["eval"])

  for split in ("train", "val"):
    photographs(tmp_path / "splits" / split, count=4)
  (tmp_path / "list.json").write_text(json.dumps({"eval": ["a/000.png"]}))
  lengths = [len(open_source(f"folder:{tmp_path}/splits", x, **options)) for x in ("train", "eval")]
  assert lengths == [4, 3]

  photographs(tmp_path / "broken" / "train", count=4)
  (tmp_path / "broken" / "val" / "a").mkdir(parents=True)
  with pytest.raises(DataError, match="val: no images"):  # which is no matter to the other split
    open_source(f"folder:{tmp_path}/broken", "eval", holdout_every=0)
  (tmp_path / "list.json").write_text('{"train": ["a/000.png"]}')
  assert len(open_source(f"folder:{tmp_path}/broken", "train", **options)) == 3


@pytest.mark.parametrize(
  "content, message",
  [
    (
      '{"train": ["digits/0000", "digits/9999"]}',
      "1 of its 2 'train' images are not in digits.*: digits/9999;",
    ),
    ('{"train": ["digits/0009"]}', "not in digits"),  # that one is held out
    (None, "No such file"),
    ("[1]", "expected an object"),
    ('{"test": []}', "expected an object"),
    ("{", "cannot be read"),
  ],
)
def test_f26_quarantine_lists_that_do_not_fit(tmp_path, content, message):
  if content is not None:
    (tmp_path / "list.json").write_text(content)
  with pytest.raises(DataError, match=message):
    open_source("digits", "train", quarantine=str(tmp_path / "list.json"))
  config = config_lib.pretrain()
  config.batch_size, config.teacher.path = 8, ""
  config.data.update(source="digits", quarantine=str(tmp_path / "list.json"))
  with pytest.raises(ConfigError, match=f"config.data: quarantine .*{message}"):
    preflight.check(config, 8)


def test_f26_quarantine_of_everything(tmp_path):
  (tmp_path / "list.json").write_text('{"train": ["0", "1"]}')
  source = Numbered(2)
  source.name = str
  with pytest.raises(DataError, match="leaves nothing"):
    FilteredSource(source, ("train",), str(tmp_path / "list.json"))


def test_f26_the_policy_may_change_when_a_run_continues():
  config = config_lib.pretrain()

  def identity(num_files):
    source = Numbered(num_files)
    source.fingerprint = f"{num_files} files"
    return train.identity(config, train.Task(None, None, None, None, lambda split: source, None))

  before = identity(3)
  config.data.update(on_error="skip", max_skipped=0.5, timeout_s=1.0, workers=3)
  assert identity(3) == before
  assert identity(2) != before  # a quarantine changes the images


@pytest.mark.parametrize(
  "key, value",
  [("on_error", "ignore"), ("max_skipped", 1.5), ("max_skipped", -0.1), ("timeout_s", -1.0)],
)
def test_f26_options_that_do_not_fit(key, value):
  config = config_lib.pretrain()
  config.batch_size, config.teacher.path, config.data.source, config.data[key] = (
    8,
    "",
    "digits",
    value,
  )
  with pytest.raises(ConfigError, match=f"config.data.{key}={value!r}"):
    preflight.check(config, 8)


# Formats with another rule than Pillow's; tests/test_data.py has the other formats.


@pytest.mark.parametrize("form, options", [("WEBP", {"lossless": True}), ("GIF", {}), ("PNG", {})])
def test_f26_of_an_animation_the_first_frame_is_taken(form, options):
  frames = [augment.Image.fromarray(np.full((20, 30, 3), color, np.uint8)) for color in (50, 200)]
  image = augment.decode_image(
    encode(frames[0], form, save_all=True, append_images=frames[1:], **options), "x"
  )
  np.testing.assert_array_equal(image, np.full((20, 30, 3), 50))


def test_f26_sixteen_bit_colour_keeps_its_high_byte():
  values = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3), np.uint16)
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  chunk = lambda kind, body: (
    len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
  )
  data = b"\x89PNG\r\n\x1a\n" + b"".join(
    map(
      chunk,
      (b"IHDR", b"IDAT", b"IEND"),
      (struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0), zlib.compress(rows), b""),
    )
  )
  np.testing.assert_array_equal(augment.decode_image(data, "x"), values >> 8)
  assert ("kind", "16-bit") in _classify_file(data)


# mrmae verify.


def make_noticed_flip():
  """A JPEG with one changed byte, which Pillow reads and whose damage the decoder notices."""
  for i in range(len(JPEG) // 2, len(JPEG)):
    data = JPEG[:i] + bytes([JPEG[i] ^ 255]) + JPEG[i + 1 :]
    with contextlib.suppress(DataError):
      augment.decode_image(data, "x")
      try:
        augment.decode_image(data, "x", strict=True)
      except DataError:
        return data


def test_f26_verify_counts_everything_and_finds_what_is_bad(tmp_path, capsys):
  deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
  frames = [augment.Image.fromarray(photo(40, 50, i)) for i in range(2)]
  good = {f"{i:02d}_{name}": data for i, (name, data) in enumerate(good_files().items())} | {
    "deep.png": encode(deep, "PNG"),
    "moves.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
  }
  bad = {
    "empty.jpg": (b"", "is empty"),
    "page.jpg": (b"<html>", "not an image"),
    "short.jpg": (BAD[10], "Premature end|truncated"),
    "flip.jpg": (make_noticed_flip(), "cannot be decoded"),
    "bomb.png": (png_header(60000, 60000), "3600000000|60000"),
  }
  folder, files = tmp_path / "images", good | {name: data for name, (data, _) in bad.items()}
  folder.mkdir()
  for file, data in files.items():
    (folder / file).write_bytes(data)
  (folder / "nobody.jpg").symlink_to(tmp_path / "gone.jpg")
  assert (
    run_command(
      [
        "verify",
        f"--source=folder:{folder}",
        "--holdout_every=0",
        "--splits=train",
        f"--json={tmp_path}/report.json",
      ]
    )
    == 3
  )
  output = capsys.readouterr()
  report = json.loads((tmp_path / "report.json").read_text())
  assert json.loads(output.out) == report
  assert "6 of 22 images are bad, the first: bomb.png: " in output.err
  statistics = report["train"]
  assert statistics["images"] == 22 and statistics["bad"] == 6
  assert list(statistics["causes"]) == sorted([*bad, "nobody.jpg"])
  for file, (_, cause) in bad.items():
    assert re.search(cause, statistics["causes"][file])
  assert "No such file" in statistics["causes"]["nobody.jpg"]
  assert statistics["format"] == {"JPEG": 7, "PNG": 7, "WEBP": 2}
  assert statistics["kind"] == {
    "gray": 4,
    "cmyk": 1,
    "alpha": 2,
    "16-bit": 1,
    "exif-turned": 1,
    "animated": 1,
  }
  assert statistics["short_side"] == {"32-63": 1, "64-127": 1, "128-255": 14}
  pixels = (
    np.concatenate([augment.decode_image(data, name).reshape(-1, 3) for name, data in good.items()])
    / 255
  )
  assert statistics["pixels"] == len(pixels)
  np.testing.assert_allclose(statistics["mean"], pixels.mean(0), rtol=1e-9)
  np.testing.assert_allclose(statistics["std"], pixels.std(0), rtol=1e-9)


def test_f26_verify_of_good_images(tmp_path, capsys):
  list_path = tmp_path / "list.json"
  assert (
    run_command(
      [
        "verify",
        "--source=digits",
        "--splits=eval",
        "--workers=1",
        f"--quarantine={list_path}",
      ]
    )
    == 0
  )
  assert json.loads(list_path.read_text()) == {"eval": {}}
  out = capsys.readouterr().out
  assert out.endswith("all 179 images are good\n") and '"pixels": 179' in out
  assert len(open_source("digits", "eval", quarantine=str(list_path))) == 179


@pytest.mark.parametrize(
  "options, message",
  [
    ([], "--source"),
    (["--source=digits", "look"], "look"),
    (["--source=digits", "--splits=dev"], "--splits=dev must be"),
  ],
)
def test_f26_command_lines_that_do_not_fit(options, message, capsys):
  assert run_command(["verify", *options]) == 2
  assert message in capsys.readouterr().err


# F27: decompression bombs.


def png_bomb(side):
  """A black PNG of side x side pixels: megabytes that become gigabytes."""
  small = png_header(side, side)
  squeeze, row = zlib.compressobj(1), bytes(1 + 3 * side)
  body = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
  chunk = (
    len(body).to_bytes(4, "big") + b"IDAT" + body + zlib.crc32(b"IDAT" + body).to_bytes(4, "big")
  )
  start, end = small.index(b"IDAT") - 4, small.index(b"IEND") - 4
  return small[:start] + chunk + small[end:]


MEASURE = """
import re, sys
from mrmae_jax.data import augment
from mrmae_jax.errors import DataError
augment.Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which other libraries switch off
with open(sys.argv[1], "rb") as file:
  data = file.read()
def peak():  # in KiB, of this program alone: ru_maxrss begins at the value of the parent
  with open("/proc/self/status") as status:
    return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])
before = peak()
try:
  augment.decode_image(data, "bomb")
except DataError as error:
  print(error)
print(peak() - before)
"""


def measure_growth(path):
  """Returns the messages of decoding a file and by how many MB the process grows."""
  process = subprocess.run(
    [sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True, check=True
  )
  *messages, kib = process.stdout.splitlines()
  return messages, int(kib) / 1024


@needs_proc
@pytest.mark.parametrize(
  "kind",
  [
    pytest.param("png 14000", marks=pytest.mark.variant),
    "png 20000",
    pytest.param("jpeg 65500", marks=pytest.mark.variant),
  ],
)
def test_f27_bombs_are_refused_from_their_header(tmp_path, kind):
  (tmp_path / "bomb").write_bytes(
    lying_jpeg() if kind == "jpeg 65500" else png_bomb(int(kind.split()[1]))
  )
  messages, megabytes = measure_growth(tmp_path / "bomb")
  assert (
    len(messages) == 1 and messages[0].startswith("bomb: cannot be decoded: ") and megabytes < 200
  )


@needs_proc
def test_f27_the_measure_sees_what_is_decoded(tmp_path):
  (tmp_path / "image").write_bytes(png_bomb(7500))  # 169 MB, and Pillow's own 225, below the limit
  messages, megabytes = measure_growth(tmp_path / "image")
  assert not messages and megabytes > 200


# F28: data that changes during a run.


@pytest.mark.parametrize("shards", [1, 2])
def test_f28_a_file_that_goes_away_makes_no_epoch_shorter(tmp_path, shards):
  write_images(tmp_path, map(name, range(COUNT)))
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  expected = join_steps(source, 6)
  (tmp_path / name(17)).unlink()
  with pytest.raises(DataError, match=name(17) + ": cannot be read .No such file"):
    train_steps(source, 6)
  actual = join_steps(source, 6, shards=shards, **SKIP)  # two epochs
  assert (actual["image"] == expected["image"]).all((1, 2, 3)).sum() == 2 * COUNT - 2
  parts = [
    list(eval_loader(source, batch_size=6, shard=i, num_shards=shards, **SKIP))
    for i in range(shards)
  ]
  assert {len(part) for part in parts} == {4} and sum(
    int(b["valid"].sum()) for part in parts for b in part
  ) == COUNT - 1


@pytest.mark.parametrize("workers", [0, 1])
def test_f28_a_packed_shard_that_is_cut_during_a_run(tmp_path, workers):
  write_images(tmp_path / "intact", map(name, range(COUNT)))
  assert (
    run_command(
      [
        "pack",
        f"--source=folder:{tmp_path}/intact",
        f"--out={tmp_path}/packed",
        "--shards=4",
        "--splits=train",
        "--holdout_every=0",
      ]
    )
    == 0
  )
  expected = join_steps(open_source(f"packed:{tmp_path}/packed", "train"), 3)
  source = open_source(f"packed:{tmp_path}/packed", "train")
  shard = tmp_path / "packed" / "train-00002-of-00004.array_record"
  os.truncate(shard, shard.stat().st_size // 4)
  with pytest.raises(
    DataError,
    match="packed:.*image 1[2-7] of 'train' cannot be read.*find the damaged shard.*--verify=",
  ):
    train_steps(source, 3, workers=workers)
  actual = join_steps(source, 3, workers=workers, on_error="skip", max_skipped=0.3)
  is_same = (actual["image"] == expected["image"]).all((1, 2, 3))
  index = join_steps(Numbered(COUNT), 3)["label"]
  assert (
    len(actual["label"]) == 24 and is_same[(index < 12) | (index >= 18)].all() and not is_same.all()
  )


# F29 and F36: workers that die.


def workers_of(pid):
  """Returns the ids of the decoding processes that are children of a process."""
  pids = []
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError, IndexError):
      parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
      if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
        pids.append(int(path.name))
  return pids


@needs_proc
def test_f29_a_killed_worker_is_reported(tmp_path):
  batches = train_loader(Numbered(9), workers=2, timeout_s=60.0)
  next(batches)
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
  began = time.monotonic()
  with pytest.raises(DataError) as error:
    while time.monotonic() < began + 20:
      next(batches)
  assert time.monotonic() < began + 5
  assert "killed by signal 9: probably out of memory (of " in str(error.value)
  assert "GiB on this machine" in str(error.value) and "use fewer data.workers" in str(error.value)
  assert not multiprocessing.active_children() and "\n" not in str(error.value)


class Ends(Numbered):
  """A decoder that crashes the process."""

  def __getitem__(self, index):
    if index == 3:
      os.kill(os.getpid(), signal.SIGSEGV)
    return super().__getitem__(index)


def test_f29_a_worker_that_crashes_is_reported():
  with pytest.raises(DataError, match="ended with signal 11; .*mrmae verify finds the image"):
    train_steps(Ends(9), 3, workers=1)


class Hungry(Numbered):
  """Limits a worker to 128 MB more than it has while it decodes an image that takes 400."""

  def __getitem__(self, index):
    limit = resource.RLIM_INFINITY
    if index == 3:
      with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + 2**27
    if multiprocessing.parent_process():
      resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    if index == 3:
      return {"image": png_header(10000, 10000) + bytes(20_000), "label": 3, "name": "3"}
    return super().__getitem__(index)


@needs_proc
def test_f36_a_worker_out_of_memory_is_reported_and_no_image_blamed():
  with pytest.raises(
    DataError,
    match=r"memory ran out .*of [0-9.]+ GiB on this machine [0-9.]+ are available now.*use fewer",
  ):
    train_steps(Hungry(9), 3, workers=1, on_error="skip", max_skipped=1.0, timeout_s=100.0)


# F30: images that never come.


class Slow(Numbered):
  description = "slow"

  def name(self, index):
    return f"image {index}!"

  def __getitem__(self, index):
    if index == 7:
      time.sleep(
        60 if multiprocessing.parent_process() else 4
      )  # a thread is waited for when the tests end
    return super().__getitem__(index)


@pytest.mark.parametrize("workers, shards", [(0, 1), (0, 2), (2, 1)])
def test_f30_a_stalled_image_is_named(workers, shards):
  order = [step["label"].reshape(shards, -1) for step in train_steps(Numbered(40), 8, first_step=2)]
  step, shard = next(
    (i, s) for i, labels in enumerate(order) for s in range(shards) if 7 in labels[s]
  )
  batches = train_loader(
    Slow(40), workers=workers, first_step=2, timeout_s=100.0, shard=shard, num_shards=shards
  )
  assert step  # the first batch waits for workers to start, so it must not be the stalled one
  for _ in range(step):
    next(batches)
  batches._options = batches._options._replace(timeout_s=1.0)
  start_time = time.monotonic()
  with pytest.raises(DataError, match="waited 1 s") as error:
    next(batches)
  assert time.monotonic() - start_time < 10
  assert f"for batch {2 + step} (the first is 0) of slow" in str(error.value)
  names = str(error.value).split("the images of this batch: ")[1].split(", ")
  assert names == [f"image {k}!" for k in order[step][shard]]
  assert not multiprocessing.active_children()


def test_f30_evaluation_too():
  batches = eval_loader(Slow(10), batch_size=4, timeout_s=1.0)
  next(batches)
  with pytest.raises(
    DataError, match="waited 1 s for batch 1 .*: image 4!, image 5!, image 6!, image 7!$"
  ):
    next(batches)


def test_f30_the_first_image_too():
  class Stalled(Slow):
    def __getitem__(self, index):
      return super().__getitem__(7)

  with pytest.raises(DataError, match="waited 0.2 s for the first image of slow .image 0!."):
    element_shapes(Stalled(8), make_views().train, LoaderOptions(timeout_s=0.2))


# A pipe stands for a disk that does not answer: it is opened, although it is no file.
UNCHECKED = """
import sys
from mrmae_jax import data
from mrmae_jax.data.sources import folder
folder._check_file = lambda path: None
data.sample_contents = lambda source: []  # it would read the pipe before the first step
sys.argv[0] = "mrmae"
from mrmae_jax import __main__ as entry
entry.run_process()
"""


def start_run(tmp_path, *arguments, code=""):
  """Starts a training run in another process, on one device; `code` in the place of the program."""
  words = [
    *(("-c", code) if code else ("-m", "mrmae_jax")),
    "pretrain",
    "--config=tests/tiny.py",
    f"--workdir={tmp_path}/run",
    f"--config.data.source=folder:{tmp_path}/images",
    "--config.data.holdout_every=0",
    "--config.teacher.path=",
    "--config.optim.warmup_epochs=0",
    *arguments,
  ]
  return Program(words, tmp_path / "log")


def test_f30_a_run_ends_although_a_thread_waits_for_ever(tmp_path):
  write_images(tmp_path / "images", [f"{i}.jpg" for i in range(16)])
  os.mkfifo(tmp_path / "images" / "stalled.jpg")  # it has no writer
  process = start_run(tmp_path, "--config.data.timeout_s=3", "--config.epochs=10", code=UNCHECKED)
  try:
    assert process.wait(100) == DataError.exit_code
  finally:
    process.kill()
  errors = [
    line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")
  ]
  assert len(errors) == 1 and "waited 3 s for batch" in errors[0] and "stalled.jpg" in errors[0]


# F31: a trainer that is killed.


def kill_survivors(pids):
  """Returns the processes that are alive after five seconds, and kills them."""
  end, survivors = time.monotonic() + 5, pids
  while survivors and time.monotonic() < end:
    time.sleep(0.1)
    survivors = [
      pid
      for pid in pids
      if os.path.exists(f"/proc/{pid}")
      and "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    ]
  for pid in survivors:
    os.kill(pid, signal.SIGKILL)
  return survivors


LOOP = """
import time
from mrmae_jax.data import open_source
from tests.helpers.images import train_loader
if __name__ == "__main__":
  batches = train_loader(open_source("digits", "train"), image_size=(8, 8), workers=2)
  print(len(next(batches)["label"]), flush=True)
  time.sleep(60)
"""


@needs_proc
def test_f31_workers_do_not_outlive_their_parent(tmp_path):
  (tmp_path / "loop.py").write_text(LOOP)
  process = subprocess.Popen(
    [sys.executable, tmp_path / "loop.py"],
    env=dict(os.environ, PYTHONPATH=str(ROOT)),
    stdout=subprocess.PIPE,
  )
  try:
    assert process.stdout.readline() == b"8\n"
    workers = workers_of(process.pid)
  finally:
    process.kill()
    process.wait()
  assert len(workers) == 2 and not kill_survivors(workers)


@pytest.mark.slow
@needs_proc
def test_f31_workers_do_not_outlive_the_trainer(tmp_path):
  write_images(tmp_path / "images", [f"{i}.jpg" for i in range(16)])
  (tmp_path / "images" / "bad.jpg").write_bytes(b"<html>")
  process = start_run(
    tmp_path,
    "--config.data.workers=2",
    "--config.epochs=1000",
    "--config.data.on_error=skip",
    "--config.data.max_skipped=0.1",
    "--config.checkpoint_every=1000",
    "--config.eval_every=1000",
    "--config.evals.reconstruct.images=1",
  )
  try:
    end, log = time.monotonic() + 100, tmp_path / "log"
    while "step 5/" not in log.read_text() and time.monotonic() < end and process.poll() is None:
      time.sleep(0.1)
    workers = workers_of(process.pid)
    assert len(workers) == 2, log.read_text()[-2000:]
  finally:
    process.kill()
    process.wait()
  assert not kill_survivors(workers)
  assert (
    "bad.jpg: cannot be decoded: not an image that is read" in log.read_text()
  )  # the warning of a worker process reaches the user


# F32: fewer images than a batch.


@pytest.mark.parametrize("count", [1, 7, 9])  # of batches of 8
@pytest.mark.parametrize("shards", [1, 2])
def test_f32_any_number_of_images_on_any_number_of_shards(count, shards):
  labels = join_steps(Numbered(count), count, shards=shards)["label"]
  np.testing.assert_array_equal(labels, join_steps(Numbered(count), count)["label"])
  assert labels.shape == (8 * count,)
  np.testing.assert_array_equal(
    np.bincount(labels), np.full(count, 8)
  )  # eight epochs, each image once in each
  parts = [
    list(eval_loader(Numbered(count), crop_pct=1.0, shard=i, num_shards=shards))
    for i in range(shards)
  ]
  assert {len(part) for part in parts} == {-(-count // 8)}
  predict = lambda batch: (
    batch["image"][:, 0, 0, 0] % 2
  )  # whatever it is, it must not depend on the shards
  hits = sum(
    int(((predict(b) == b["label"] % 2) & b["valid"]).sum()) for part in parts for b in part
  )
  expected = [
    augment.center_crop(photo(30, 30, i), SIZE, 1.0)[0, 0, 0] % 2 == i % 2 for i in range(count)
  ]
  assert (
    hits == sum(expected) and sum(int(b["valid"].sum()) for part in parts for b in part) == count
  )


def test_only_files_of_a_sane_size_are_opened(tmp_path):
  """A pipe would be read for ever, and a file with holes would fill the memory."""
  write_images(tmp_path, ["a.jpg", "b.jpg"])
  os.mkfifo(tmp_path / "c.jpg")
  (tmp_path / "d.jpg").symlink_to("/dev/zero")
  with open(tmp_path / "e.jpg", "wb") as file:
    file.truncate(60 * 2**30)
  with open(tmp_path / "f.jpg", "wb") as file:
    file.write((tmp_path / "a.jpg").read_bytes())
    file.truncate(6 * 2**30)
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  kinds = {"c.jpg": "is a pipe", "d.jpg": "is a device", "e.jpg": "has 64,424,509,440 bytes"}
  kinds["f.jpg"] = "has 6,442,450,944 bytes; at most 1,073,741,824 are read"
  for index in range(len(source)):
    if (name := source.name(index)) in kinds:
      with pytest.raises(DataError, match=f"{name}: {kinds[name]}"):
        source[index]
    else:
      assert source[index]["image"]


def readers(root):
  """Yields (path, function) of all files beside images and weights that a command reads."""
  write_images(root / "images", ["1.jpg", "2.jpg"])
  write_images(root / "scenes" / "images", ["1.jpg", "2.jpg"])
  (root / "scenes" / "annotations").mkdir()
  (root / "objects" / "images").mkdir(parents=True)
  (root / "objects" / "annotations").mkdir()
  folder = f"folder:{root}/images"
  read = lambda address, **options: open_source(address, "train", holdout_every=0, **options)
  yield root / "labels.csv", lambda: read(folder, labels=f"{root}/labels.csv")
  yield root / "bad.json", lambda: read(folder, quarantine=f"{root}/bad.json")
  yield (
    root / "scenes" / "classes.txt",
    lambda: read(f"scenes:{root}/scenes", zero_is_unlabelled=False),
  )
  yield (
    root / "objects" / "annotations" / "instances_images.json",
    lambda: read(f"coco:{root}/objects", max_dropped=0.0),
  )
  yield root / "packed" / "index.json", lambda: read(f"packed:{root}/packed")
  yield root / "classes", lambda: classifiers.class_names("m", OneModel, f"{root}/classes")
  yield root / "features.npz", lambda: knn.read_features(f"{root}/features.npz")
  yield root / "bundle" / "bundle.json", lambda: replay.read_bundle(f"{root}/bundle")
  yield root / "config.json", lambda: files.read_json(root / "config.json")


class OneModel:
  class_names, config = (), {"classes": 2}


@pytest.mark.parametrize("kind", ["pipe", "holes"])
def test_tables_lists_and_notes_must_be_files_of_a_sane_size(tmp_path, kind):
  refusals = "is a pipe|has 64,424,509,440 bytes; at most 4,294,967,296"
  refusals += "|no classes.txt|no annotations of|not a zip file"
  for path, read in readers(tmp_path):
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
      os.mkfifo(path)
    else:
      with open(path, "wb") as file:
        file.truncate(60 * 2**30)
    with pytest.raises(UserError, match=refusals):
      read()


def test_a_pipe_in_a_prepared_data_set_is_not_waited_for(tmp_path):
  (tmp_path / "dataset_info.json").write_text("{}")
  os.mkfifo(tmp_path / "features.json")
  with pytest.raises(DataError, match="features.json is no file; remove it"):
    open_source("tfds:x", "train", data_dir=str(tmp_path))


def test_holes_behind_a_tar_are_not_read(tmp_path):
  with open(tmp_path / "x.tar", "wb") as file:
    file.truncate(60 * 2**30)
  with pytest.raises(DataError, match="x.tar: goes on after its end at byte"):
    open_source(f"folder:{tmp_path}/x.tar", "train", holdout_every=0)


# Data that change while a run reads them.

BOTH = [0, pytest.param(2, marks=pytest.mark.variant)]  # worker processes


def read_on(source, change, workers=0, steps=40):
  """Returns the batches of a source that changes after the second one, as one array."""
  with contextlib.closing(train_loader(source, workers=workers)) as batches:
    first = [next(batches)["image"] for _ in range(2)]
    change()
    return np.concatenate(first + [next(batches)["image"] for _ in range(steps)])


@pytest.mark.parametrize("workers", BOTH)
def test_f28_a_folder_that_changes_while_it_is_read(tmp_path, workers):
  """A replaced picture is read, a new one is not, and a bad or missing one is named."""
  changes = {
    "replaced": lambda path: path.write_bytes(encode(photo(30, 20, 99))),
    "added": lambda path: shutil.copy(path, path.with_name(f"new_{path.name}")),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": lambda path: path.unlink(),
  }
  before = None
  for kind, change in changes.items():
    write_images(tmp_path / kind, map(name, range(COUNT)))
    source = open_source(f"folder:{tmp_path}/{kind}", "train", holdout_every=0)
    if before is None:
      before = read_on(source, lambda: None, workers)
    files = sorted((tmp_path / kind).rglob("*.jpg"))
    change_all = lambda files=files, change=change: [change(path) for path in files]
    if kind in ("cut", "deleted"):
      cause = {  # a picture that is cut within its header cannot be loaded
        "cut": "([Tt]runcated|cannot load)",
        "deleted": "No such file .* there when the folder was listed",
      }
      with pytest.raises(DataError, match=rf"{kind}/[ab]/\d\d.jpg: cannot be .*{cause[kind]}"):
        read_on(source, change_all, workers)
      continue
    is_same = (read_on(source, change_all, workers) == before).all((1, 2, 3))
    assert is_same[:16].all() and (is_same.all() if kind == "added" else not is_same[-8:].any())


@pytest.mark.parametrize("workers", BOTH)
@pytest.mark.parametrize("kind", ["zip", "tar", "packed"])
def test_f28_an_archive_that_changes_while_it_is_read(tmp_path, kind, workers):
  """One that is written anew in its place is named; one that is replaced is read to its end."""
  archives = []
  for seed in range(2):
    photographs(tmp_path / f"photos{seed}", seed, 24)
    if kind == "packed":
      out = f"--out={tmp_path}/{seed}"
      source = f"--source=folder:{tmp_path}/photos{seed}"
      options = ["--splits=train", "--holdout_every=0", "--shards=1"]
      assert run_command(["pack", source, out, *options]) == 0
      archives += (tmp_path / str(seed)).glob("*.array_record")
    else:
      made = shutil.make_archive(tmp_path / str(seed), kind, tmp_path / f"photos{seed}")
      archives.append(pathlib.Path(made))
  path, other = archives
  address = f"packed:{path.parent}" if kind == "packed" else f"folder:{path}"
  source = open_source(address, "train", holdout_every=0)
  before = read_on(source, lambda: None, workers)
  kept = path.read_bytes()
  replaced = read_on(
    source, lambda: (other.rename(path), path.with_suffix(".x").write_bytes(kept)), workers
  )
  np.testing.assert_array_equal(replaced, before)
  with pytest.raises(DataError, match=f"{path.name}:? was changed "):  # by a process that opens it
    read_on(pickle.loads(pickle.dumps(source)), lambda: None, workers)
  if kind == "packed":  # another test cuts a shard
    return
  source = open_source(address, "train", holdout_every=0)
  with pytest.raises(
    DataError, match=f"{path.name}: was changed after its files were listed; start"
  ):
    read_on(source, lambda: path.write_bytes(kept[:-2000]), workers)


# Images that are replaced by others under the same names.


def photographs(root, seed=0, count=40):
  """Writes small photographs that differ with the seed."""
  for i in range(count):
    path = root / "ab"[i % 2] / f"{i:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(photo(8, 8, 1000 * seed + i), "PNG"))


def contents(root):
  return sample_contents(open_source(f"folder:{root}", "train", holdout_every=0))


def test_replaced_images_are_told_from_repaired_ones(tmp_path):
  photographs(tmp_path / "photos")
  before = contents(tmp_path / "photos")
  assert len(before) == 40 and contents(tmp_path / "photos") == before
  shutil.copytree(tmp_path / "photos", tmp_path / "moved")
  assert contents(tmp_path / "moved") == before
  first, second, third = sorted((tmp_path / "moved").rglob("*.png"))[:3]
  first.write_bytes(encode(photo(8, 8, 5000), "PNG"))
  second.write_bytes(b"")  # unreadable, then or now: does not count
  third.unlink()
  repaired = contents(tmp_path / "moved")
  compare = checkpoint._compare_contents
  assert compare(before, repaired) == (
    False,
    "1 of 38 training images that were compared have other contents now",
  )
  assert compare(before, before) == (False, "")
  assert compare(None, before) == compare([], []) == (False, "")
  photographs(tmp_path / "photos", seed=1)
  assert compare(before, contents(tmp_path / "photos"))[0]
  assert compare(["a"], ["b"])[0] and compare(["a", "b"], ["c", "d"])[0]
  assert not compare(["a", "b"], ["a", "c"])[0]


def test_replaced_labels_of_scenes_are_seen_and_moved_boxes_too(tmp_path):
  """Images, names and sizes of all files stay as they are."""
  samples, prints = [], []
  for seed in (0, 1):
    photographs(tmp_path / "images", 0, 6)
    for path in sorted((tmp_path / "images").rglob("*.png")):
      label = tmp_path / "annotations" / path.relative_to(tmp_path / "images")
      label.parent.mkdir(parents=True, exist_ok=True)
      values = (np.arange(64).reshape(8, 8) // (9 + seed)) % 2
      label.write_bytes(encode(values.astype(np.uint8), "PNG"))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    options = {"holdout_every": 0, "zero_is_unlabelled": False}
    samples.append(sample_contents(open_source(f"scenes:{tmp_path}", "train", **options)))
    objects = coco.document()
    objects["annotations"][0]["segmentation"][0][0] += seed
    (tmp_path / str(seed)).mkdir()
    address = coco.write(tmp_path / str(seed), objects)
    prints.append(open_source(address, "train", holdout_every=0, max_dropped=0.0).fingerprint)
  assert len(samples[0]) == 6 and not set(samples[0]) & set(samples[1])
  assert prints[0] != prints[1]


@pytest.mark.parametrize("kind", ["zip", "wds", "quarantine"])
def test_archives_and_lists_know_contents_too(tmp_path, kind):
  samples = []
  for seed in (0, 1):
    photographs(tmp_path / "photos", seed, 6)
    source, options = f"folder:{tmp_path}/photos", {}
    if kind == "zip":
      source = f"folder:{shutil.make_archive(tmp_path / f'{seed}', 'zip', tmp_path / 'photos')}"
    elif kind == "wds":
      source = f"wds:{tmp_path}/{seed}.tar"
      with tarfile.open(tmp_path / f"{seed}.tar", "w") as archive:
        for path in sorted((tmp_path / "photos").rglob("*.png")):
          archive.add(path, path.name)
    else:
      options = {"quarantine": str(tmp_path / "list.json")}
      (tmp_path / "list.json").write_text('{"train": ["a/000.png"]}')
    samples.append(sample_contents(open_source(source, "train", holdout_every=0, **options)))
  assert len(samples[0]) == len(samples[1]) == 6 - (kind == "quarantine")
  assert not set(samples[0]) & set(samples[1])


def test_large_images_make_a_smaller_sample_and_digits_none(tmp_path, monkeypatch):
  photographs(tmp_path)
  size = (tmp_path / "a" / "000.png").stat().st_size
  monkeypatch.setattr("mrmae_jax.data.sources.base.SAMPLE_BYTES", 10 * size)
  assert 8 <= len(contents(tmp_path)) <= 12
  assert sample_contents(open_source("digits", "train")) == []


def test_a_run_whose_images_were_replaced_does_not_resume(tmp_path, capsys):
  photographs(tmp_path / "photos", count=64)
  config = small.get_config()
  config.data.source, config.data.holdout_every = f"folder:{tmp_path}/photos", 0
  config.epochs, config.log_every = 1.0, 4

  def fit():
    source = open_source(config.data.source, "train", holdout_every=0)
    task = small.toy_task()._replace(source=lambda split: source)
    train.fit(config, task, tmp_path / "run")

  fit()
  photographs(tmp_path / "photos", seed=1, count=2)
  fit()
  assert "warning: 2 of 64 training images that were compared have other contents now" in (
    capsys.readouterr().out
  )
  photographs(tmp_path / "photos", seed=1, count=64)
  with pytest.raises(WorkdirError, match="holds a different run .64 of 64 training images that"):
    fit()
  photographs(tmp_path / "more", seed=1, count=66)  # of which others are compared
  config.data.source = f"folder:{tmp_path}/more"
  with pytest.raises(WorkdirError, match="holds a different run .train images: [^;]*. Choose"):
    fit()
