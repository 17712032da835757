"""Images in archives, tables of labels, tar shards and Hugging Face data sets."""

import io
import json
import os
import pickle
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from mrmae_jax.cli.verify import inspect_images
from mrmae_jax.data import LoaderOptions, center_view, eval_batches, open_source
from mrmae_jax.errors import DataError
from tests.helpers.images import train_loader


def png(seed):
  """Returns the bytes of a tiny picture of noise."""
  noise, file = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), io.BytesIO()
  Image.fromarray(noise).save(file, "PNG")
  return file.getvalue()


def files_of(*names):
  """{name: bytes}; a name that ends in / stands for three pictures below it."""
  paths = [p for n in names for p in ([f"{n}{i}.png" for i in range(3)] if n[-1] == "/" else [n])]
  return {path: png(seed) for seed, path in enumerate(paths)}


def write_folder(root, files):
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  return root


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def write_tar(path, files, mode="w"):
  with tarfile.open(path, mode) as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def open_pair(spec, **options):
  options = {"eval_split": "validation", "holdout_every": 3} | options
  return [open_source(spec, split, **options) for split in ("train", "eval")]


def content(source):
  """Returns what a source holds, but not where it lies."""
  examples = [source[i] for i in range(len(source))]
  names = [source.name(i) for i in range(len(source))]
  return [(name, x["label"], bytes(x["image"])) for name, x in zip(names, examples)]


# Archives.

TREES = [
  ("a/", "b/"),
  ("photos/train/a/", "photos/train/b/", "photos/val/a/", "__MACOSX/photos/._0.png"),
  ("Training/a/", "Training/b/", "Testing/b/", "Testing/read.txt", "0.png"),
  ("./a/0.png", "./a/1.png", "./b/0.png", "./b/1.png"),
  ("0.png", "1.png", "2.png"),
]


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("names", TREES, ids=lambda names: names[0])
def test_an_archive_is_read_as_its_folder_would_be(tmp_path, write, names):
  files = files_of(*names)
  folder = write_folder(tmp_path / "x", files)
  archive = write(tmp_path / f"x.{write.__name__[6:]}", files)
  for plain, packed in zip(open_pair(f"folder:{folder}"), open_pair(f"folder:{archive}")):
    assert content(plain) == content(packed) and plain.fingerprint == packed.fingerprint
    assert packed.class_names == plain.class_names and packed.left_out == plain.left_out
    assert packed.description.replace(str(archive), "") == plain.description.replace(
      str(folder), ""
    )
    assert packed[0]["name"].startswith(f"{archive}/")
    assert content(pickle.loads(pickle.dumps(packed))) == content(packed)


def test_batches_of_an_archive_are_those_of_its_folder_and_resume(tmp_path):
  files = files_of("a/", "b/")
  sources = [
    open_source(f"folder:{root}", "train", holdout_every=0)
    for root in (write_folder(tmp_path / "x", files), write_zip(tmp_path / "x.zip", files))
  ]
  whole, again = train_loader(sources[0], batch_size=4), train_loader(sources[1], batch_size=4)
  later = train_loader(sources[1], batch_size=4, first_step=2)
  steps = [(next(whole), next(again)) for _ in range(4)]
  for step, (left, right) in enumerate(steps):
    np.testing.assert_array_equal(left["image"], right["image"])
    if step >= 2:
      np.testing.assert_array_equal(left["image"], next(later)["image"])
  for batches in (whole, again, later):
    batches.close()


def damaged(path, place, value=b"\xff" * 40):
  """Overwrites some bytes of a file."""
  with open(path, "r+b") as file:
    file.seek(place)
    file.write(value)
  return path


def half(path):
  with open(path, "r+b") as file:
    file.truncate(path.stat().st_size // 2)
  return path


def encrypted(path):
  """Sets the flags of an encrypted member in the directory of a .zip."""
  data = bytearray(path.read_bytes())
  data[data.index(b"PK\x01\x02") + 8] |= 1
  path.write_bytes(data)
  return path


def shortened(path):
  """Makes the comment of the last but one entry of a .zip swallow the last one."""
  data = bytearray(path.read_bytes())
  last = data.rindex(b"PK\x01\x02")
  entry = data.rindex(b"PK\x01\x02", 0, last)
  data[entry + 32 : entry + 34] = (data.rindex(b"PK\x05\x06") - last).to_bytes(2, "little")
  path.write_bytes(data)
  return path


def joined(path):
  path.write_bytes(path.read_bytes() * 2)
  return path


GOOD = files_of("a/", "b/")


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda p: half(write_zip(p / "x.zip", GOOD)), "is no zip archive, or is damaged or cut short"),
    (lambda p: half(write_tar(p / "x.tar", GOOD)), "is damaged or cut short|is cut short, its end"),
    (lambda p: damaged(write_tar(p / "x.tar", GOOD), 1024), "is damaged at byte 1,024.*first 1 "),
    (lambda p: damaged(write_tar(p / "x.tar", GOOD), 0), "is no tar archive"),
    (lambda p: shortened(write_zip(p / "x.zip", GOOD)), "its directory holds 5 of 6 members"),
    (lambda p: joined(write_tar(p / "x.tar", GOOD)), "goes on after its end"),
    (lambda p: write_tar(p / "x.tar.gz", GOOD, "w:gz"), "is compressed as a whole.*gunzip"),
    (lambda p: write_tar(p / "x.tar", GOOD, "w:gz"), "is no tar archive"),
    (lambda p: write_tar(p / "x.zip", GOOD), "is no zip archive"),
    (lambda p: encrypted(write_zip(p / "x.zip", GOOD)), "a/0.png is encrypted"),
    (lambda p: write_zip(p / "x.zip", {"../x.png": b""}), "'../x.png', which leads out"),
    (lambda p: write_tar(p / "x.tar", {"/etc/x.png": b""}), "'/etc/x.png', which leads out"),
    (lambda p: write_tar(p / "x.tar", {"a/../../x.png": b""}), "which leads out"),
    (lambda p: write_tar(p / "x.tar", {"a.png": b"", "./a.png": b""}), "holds a.png twice"),
    (lambda p: write_tar(p / "x.tar", {"a.png": b"", "a.png/b.png": b""}), "twice"),
    (lambda p: write_zip(p / "x.zip", {"a.tar": b"", "b.zip": b""}), "unpack those inside"),
    (lambda p: write_folder(p / "x", {"a.tar": b"", "b.tar": b""}), "are read one by one"),
    (lambda p: write_zip(p / "x.zip", {}), "no images"),
    (lambda p: write_folder(p, {"x.7z": b""}) / "x.7z", "is compressed as a whole"),
    (lambda p: p / "none.zip", "does not exist"),
    (lambda p: write_zip(p / "x.zip", GOOD) / "c", "does not exist"),
  ],
)
def test_a_bad_archive_is_refused_at_once(tmp_path, make, message):
  with pytest.raises(DataError, match=message) as caught:
    open_source(f"folder:{make(tmp_path)}", "train")
  assert "\n" not in str(caught.value)


def test_names_of_windows_and_links_in_archives(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    for name in ("a/0.png", "b/0.png"):
      info = zipfile.ZipInfo("x")
      info.filename, info.create_system = name.replace("/", "\\"), 0
      archive.writestr(info, png(0))
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "0.png")
  source = open_source(f"folder:{tmp_path}/x.zip", "train", holdout_every=0)
  assert source.class_names == ("a", "b") and source.left_out == "left out: 1 links"


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_bad_members_are_treated_as_bad_files(tmp_path, write):
  files = files_of("a/", "b/") | {"a/1.png": b"not a picture" * 9}
  path = write(tmp_path / f"x.{write.__name__[6:]}", files)
  # A changed byte: the checksums of a .zip find it, in a .tar those of the PNG.
  damaged(path, path.read_bytes().index(b"b/2.png") + (49 if write is write_zip else 512))
  source = open_source(f"folder:{path}", "train", holdout_every=0)
  bad = inspect_images(source, 3, range(6)).bad
  assert set(bad) == {"a/1.png", "b/2.png"}
  (tmp_path / "bad.json").write_text(json.dumps({"train": bad}))
  rest = {"holdout_every": 0, "quarantine": f"{tmp_path}/bad.json"}
  assert len(open_source(f"folder:{path}", "train", **rest)) == 4
  skip = LoaderOptions(on_error="skip", max_skipped=0.5)
  batch = next(eval_batches(source, center_view((8, 8), 1.0), batch_size=6, options=skip))
  assert batch["valid"].tolist() == [True, False, True, True, True, False]


# Tables of labels.

FLAT = files_of("0.png", "1.png", "2.png", "3.png")


@pytest.mark.parametrize(
  "name, text",
  [
    ("x.csv", "0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n"),
    ("x.csv", "\ufefffile,label\n0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog"),
    ("x.csv", "id,breed\r\n0,cat\r\n1,dog\r\n2,cat\r\n3,dog\r\n"),
    ("x.csv", "label,author,image_id\ncat,me,0.png\ndog,me,1.png\ncat,,2.png\ndog,,3.png\n"),
    ("x.csv", "picture,what it is\n3.png,dog\n2.png,cat\n1.png,dog\n0.png,cat\n"),
    ("x.csv", '"0.png";"cat"\n"1.png";"dog"\n"2.png";"cat"\n"3.png";"dog"\n'),
    ("x.tsv", "0.png\tcat\t1\t2\n1.png\tdog\t1\t2\n2.png\tcat\t1\t2\n3.png\tdog\t1\t2\n"),
    ("x.txt", "x/0.png cat\n/data/x/1.png dog\n./2.png cat\nx\\3.png dog\n"),
  ],
)
def test_labels_come_from_a_table(tmp_path, name, text):
  root = write_folder(tmp_path / "x", FLAT)
  (tmp_path / name).write_text(text, encoding="utf-8", newline="")
  source = open_source(f"folder:{root}", "train", holdout_every=0, labels=f"{tmp_path}/{name}")
  assert source.class_names == ("cat", "dog")
  assert [source[i]["label"] for i in range(4)] == [0, 1, 0, 1]
  plain = open_source(f"folder:{root}", "train", holdout_every=0)
  assert plain.class_names == () and source.fingerprint.startswith(plain.fingerprint)
  assert source.fingerprint != plain.fingerprint


def test_a_table_labels_both_splits_by_name_and_numbers_count_by_value(tmp_path):
  files = files_of("train/0.png", "train/1.png", "val/0.png", "val/9.png", "test/5.png")
  archive = write_zip(tmp_path / "x.zip", files)
  rows = "train/0.png,10\ntrain/1.png,9\nval/0.png,9\nval/9.png,9\ntest/5.png,10\n"
  (tmp_path / "x.csv").write_text(f"path,label\n{rows}")
  train, held_out = open_pair(f"folder:{archive}", labels=f"{tmp_path}/x.csv")
  assert train.class_names == held_out.class_names == ("9", "10")
  assert [train[i]["label"] for i in range(2)] == [1, 0]
  assert [held_out[i]["label"] for i in range(2)] == [0, 0]
  assert "no images of 1 of its classes: 10" in held_out.description
  (tmp_path / "x.csv").write_text("train/0.png,10\ntrain/1.png,9\n")
  os.utime(tmp_path / "x.csv", (1, 1))
  train, held_out = open_pair(f"folder:{archive}", labels=f"{tmp_path}/x.csv")
  assert len(train.class_names) == 2 and held_out.class_names == ()
  assert "no labels (no image is in " in held_out.description


def test_tiny_imagenet_is_read_as_it_is(tmp_path):
  files = files_of("train/n01/images/", "train/n02/images/", "val/images/", "test/images/")
  files |= {"train/n01/n01_boxes.txt": b"x", "wnids.txt": b"n01\nn02\n"}
  rows = ["val_0", "val_1", "val_2"]
  files = {name.replace("val/images/", "val/images/val_"): x for name, x in files.items()}
  labels = "".join(f"{r}.png\t{c}\t0\t0\t9\t9\n" for r, c in zip(rows, ("n02", "n01", "n02")))
  files["val/val_annotations.txt"] = labels.encode()
  for root in (
    write_folder(tmp_path / "tiny", files),
    write_zip(tmp_path / "tiny.zip", {f"tiny/{name}": x for name, x in files.items()}),
  ):
    train, held_out = open_pair(f"folder:{root}")
    assert train.class_names == held_out.class_names == ("n01", "n02")
    assert [held_out[i]["label"] for i in range(3)] == [1, 0, 1]
    assert "left out: test/" in train.description


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "is empty"),
    ("file,label\n", "is empty"),
    ("0.png,a\n1.png,b\n2.png,a\n", "no row for 1 of the 4 images of .*: 3.png"),
    ("0.png,a\n1.png,b\n2.png,a\n3.png,\n", "row 4: '3.png,' has no file or no label"),
    ("0.png,a\n1.png,b\n2.png,a\n3.png,b\n4.png,b\n", "1 of its 5 rows name no image.*'4.png'"),
    ("0.png,a\n0.png,b\n1.png,b\n2.png,a\n3.png,b\n", "row 2: 0.png is 'b' here and 'a' in a row"),
    ("0.png\n1.png\n", "row 1: '0.png' has no file or no label"),
    (b"0.png,\xff\n", "cannot be read"),
    (None, "cannot be read"),
  ],
)
def test_a_bad_table_is_refused_at_once(tmp_path, text, message):
  root = write_folder(tmp_path / "x", FLAT)
  if text is not None:
    (tmp_path / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(DataError, match=message) as caught:
    open_source(f"folder:{root}", "train", labels=f"{tmp_path}/x.csv")
  assert "\n" not in str(caught.value)


def test_names_of_several_images_need_their_folders(tmp_path):
  root = write_folder(tmp_path / "x", files_of("p/0.png", "q/0.png"))
  (tmp_path / "x.csv").write_text("0.png,a\n")
  with pytest.raises(DataError, match="0.png is the name of 2 images: p/0.png, q/0.png; write"):
    open_source(f"folder:{root}", "train", labels=f"{tmp_path}/x.csv")
  (tmp_path / "y.csv").write_text("q/0.png,a\np/0.png,b\n")
  source = open_source(f"folder:{root}", "train", holdout_every=0, labels=f"{tmp_path}/y.csv")
  assert [source[i]["label"] for i in range(2)] == [1, 0]
  with pytest.raises(DataError, match="labels='x.csv' given; .*'digits' has its own"):
    open_source("digits", "train", labels="x.csv")


# Tar shards of WebDataset.


def samples(*keys, label=lambda key: len(key) % 2):
  """{member: bytes} of samples with an image and a class each."""
  files = {}
  for seed, key in enumerate(keys):
    files[f"{key}.png"], files[f"{key}.cls"] = png(seed), str(label(key)).encode()
  return files


def write_shards(root, **shards):
  root.mkdir(exist_ok=True)
  for name, files in shards.items():
    write_tar(root / f"{name.replace('__', '/')}.tar", files)
  return root


def test_shards_are_read_in_any_order_and_held_out_of(tmp_path):
  label = lambda key: "10" if key in ("a", "d") else "9"
  root = write_shards(
    tmp_path / "x", s0=samples("a", "b", label=label), s1=samples("c", "d", "e.f", label=label)
  )
  for spec in (f"wds:{root}", f"wds:{root}/*.tar", f"wds:{root}/s[01].tar"):
    train, held_out = open_pair(spec)
    assert train.class_names == held_out.class_names == ("9", "10")
    names = [source.name(i) for source in (train, held_out) for i in range(len(source))]
    assert names == [
      "s0.tar/a.png",
      "s0.tar/b.png",
      "s1.tar/d.png",
      "s1.tar/e.f.png",
      "s1.tar/c.png",
    ]
    assert [train[i]["label"] for i in (3, 0, 2, 1)] == [0, 1, 1, 0]
    assert train[0]["image"] == png(0) and held_out[0]["image"] == png(0)
  copy = pickle.loads(pickle.dumps(train))
  assert content(copy) == content(train) and copy.fingerprint == train.fingerprint
  whole, later = train_loader(train, batch_size=2), train_loader(copy, batch_size=2, first_step=1)
  next(whole)
  np.testing.assert_array_equal(next(whole)["image"], next(later)["image"])
  whole.close()
  later.close()


def test_shards_in_braces(tmp_path):
  pytest.importorskip("braceexpand")
  root = write_shards(tmp_path / "x", **{f"s{i:02}": samples("a", "bb") for i in range(8, 12)})
  assert len(open_source(f"wds:{root}/s{{09..11}}.tar", "train", holdout_every=0)) == 6
  with pytest.raises(DataError, match="s12.tar does not exist"):
    open_source(f"wds:{root}/s{{09..12}}.tar", "train")
  with pytest.raises(DataError, match="close each brace"):
    open_source(f"wds:{root}/s{{09..12.tar", "train")


@pytest.mark.parametrize(
  "train, evaluation",
  [
    ("imagenet1k-train-000", "imagenet1k-validation-000"),
    ("train__000", "val__000"),
    ("data_train_0", "data_test_0"),
  ],
)
def test_shards_are_splits_by_the_words_in_their_names(tmp_path, train, evaluation):
  (tmp_path / "x/train").mkdir(parents=True)
  (tmp_path / "x/val").mkdir()
  root = write_shards(
    tmp_path / "x", **{train: samples("a", "bb", "c"), evaluation: samples("d", "ee")}
  )
  whole = open_source(f"wds:{root}", "train", train_split=".", holdout_every=0)
  assert len({whole.name(i) for i in range(5)}) == 5
  training, held_out = open_pair(f"wds:{root}")
  assert (len(training), len(held_out)) == (3, 2)
  assert "train: " in training.description and held_out.class_names == ("0", "1")


def test_shards_without_classes_are_images(tmp_path):
  files = {name: x for name, x in samples("a", "b").items() if name.endswith("png")}
  root = write_shards(tmp_path / "x", s0=files | {"a.txt": b"a caption", "a.json": b"{}"})
  source = open_source(f"wds:{root}", "train", holdout_every=0)
  assert source.class_names == () and source[1]["label"] == -1
  assert source.left_out == "left out: 1 .txt, 1 .json" and source.left_out in source.description


@pytest.mark.parametrize(
  "shards, message",
  [
    ({"s0": {"a.cls": b"1"}}, "no images; it holds a.cls"),
    ({"s0": samples("a", "b") | {"c.png": png(0)}}, "1 of its 3 samples have no class.*: c"),
    ({"s0": samples("a") | {"b.cls": b"1"}}, "1 samples have a class and no image.*: b"),
    ({"s0": samples("a") | {"a.jpg": b""}}, "a has two images, a.png and a.jpg"),
    ({"train0": samples("a"), "s0": samples("b")}, "names of s0.tar do not say"),
    ({"val0": samples("a")}, "names of val0.tar do not say"),
    ({"train-val-0": samples("a")}, "words of several splits"),
    ({"s0": {"../a.png": b""}}, "leads out of the archive"),
    ({}, "does not exist"),
  ],
)
def test_bad_shards_are_refused_at_once(tmp_path, shards, message):
  with pytest.raises(DataError, match=message):
    open_source(f"wds:{write_shards(tmp_path / 'x', **shards)}", "train")


def test_shards_that_cannot_be_read_in_any_order_are_refused(tmp_path):
  for address, message in (
    ("gs://bucket/{0..9}.tar", "must be on a disk"),
    (str(half(write_tar(tmp_path / "s.tar", samples(*"abcd")))), "cut short"),
    (str(write_tar(tmp_path / "x.tar.gz", samples("a"), "w:gz")), "compressed"),
  ):
    with pytest.raises(DataError, match=message):
      open_source(f"wds:{address}", "train")


# Data sets of Hugging Face.


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
  """The library, and a folder for its cache."""
  datasets = pytest.importorskip("datasets")
  datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf_cache")
  return datasets


def hf_set(hf, labels, feature=None, column="label", image="image", first=0):
  images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
  features = hf.Features(
    {image: hf.Image(), column: feature or hf.ClassLabel(names=["cat", "dog"])}
  )
  return hf.Dataset.from_dict({image: images, column: labels}, features=features)


def write_disk(splits, root):
  type(splits).save_to_disk(splits, root)


def write_parquet(splits, root):
  for name, split in splits.items():
    split.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")


@pytest.mark.parametrize("write", [write_disk, write_parquet])
def test_hugging_face_folders_have_splits_and_classes(hf, tmp_path, write):
  (tmp_path / "x/data").mkdir(parents=True)
  train = hf_set(hf, [0, 1, 0, 1, 1])
  splits = hf.DatasetDict({"train": train, "test": hf_set(hf, [1, 0], first=5)})
  write(splits, tmp_path / "x")
  training, held_out = open_pair(f"hf:{tmp_path}/x")
  assert training.class_names == held_out.class_names == ("cat", "dog")
  assert content(training) == [(f"train[{i}]", [0, 1, 0, 1, 1][i], png(i)) for i in range(5)]
  assert content(held_out) == [("test[0]", 1, png(5)), ("test[1]", 0, png(6))]
  assert "5 images, 2 classes; train of train, test" in training.description
  copy = pickle.loads(pickle.dumps(training))
  assert content(copy) == content(training) and copy.fingerprint == training.fingerprint
  whole = train_loader(training, batch_size=2)
  later = train_loader(copy, batch_size=2, first_step=1)
  next(whole)
  np.testing.assert_array_equal(next(whole)["image"], next(later)["image"])
  whole.close()
  later.close()
  with pytest.raises(
    DataError, match="has no split 'extra', which eval_split names; .*train, test"
  ):
    open_source(f"hf:{tmp_path}/x", "eval", eval_split="extra")


def test_hugging_face_sets_of_one_split_are_held_out_of(hf, tmp_path):
  hf_set(hf, ["10", "9", "9", "10"], hf.Value("string"), image="img").save_to_disk(tmp_path / "x")
  training, held_out = open_pair(f"hf:{tmp_path}/x")
  assert training.class_names == ("9", "10") and held_out[0]["label"] == 0
  assert [training.name(i) for i in range(3)] == ["train[0]", "train[1]", "train[3]"]
  assert held_out.name(0) == "train[2]" and held_out[0]["image"] == png(2)
  file = tmp_path / "one.parquet"
  hf_set(hf, [3, 1], hf.Value("int64"), column="target").to_parquet(file)
  source = open_source(f"hf:{file}", "train", holdout_every=0)
  assert source.class_names == ("1", "3") and source[0]["label"] == 1
  assert "2 classes by 'target'" in source.description


def test_hugging_face_rows_without_labels_are_images(hf, tmp_path):
  hidden = hf.DatasetDict({"train": hf_set(hf, [0, 1]), "test": hf_set(hf, [-1, -1])})
  hidden.save_to_disk(tmp_path / "x")
  training, held_out = open_pair(f"hf:{tmp_path}/x")
  assert len(training.class_names) == 2 and held_out.class_names == ()
  assert "no labels (2 have none)" in held_out.description and held_out[0]["label"] == -1
  several = hf_set(hf, [[0, 1], [1]], hf.List(hf.ClassLabel(names=["a", "b"])), column="labels")
  several.save_to_disk(tmp_path / "y")
  assert open_source(f"hf:{tmp_path}/y", "train", holdout_every=0).class_names == ()


def test_bad_rows_of_hugging_face_are_treated_as_bad_files(hf, tmp_path):
  features = hf.Features({"image": hf.Image(), "label": hf.Value("string")})
  images = [png(0), b"not a picture", None, b""]
  rows = [x if x is None else {"bytes": x, "path": None} for x in images]
  table = hf.Dataset.from_dict({"image": rows, "label": list("abaa")}, features=features)
  table.save_to_disk(tmp_path / "x")
  source = open_source(f"hf:{tmp_path}/x", "train", holdout_every=0)
  bad = inspect_images(source, 3, range(4)).bad
  assert set(bad) == {f"train[{i}]" for i in range(1, 4)}, bad
  assert "holds no image" in bad["train[2]"]


def test_hugging_face_sets_that_cannot_be_used_are_refused_at_once(hf, tmp_path):
  def refused(message):
    with pytest.raises(DataError, match=message) as caught:
      open_source(f"hf:{tmp_path}/x", "train")
    assert "\n" not in str(caught.value)
    hf_source._load.cache_clear()

  from mrmae_jax.data.sources import hf as hf_source

  refused("cannot be opened")
  (tmp_path / "x").mkdir()
  refused("cannot be opened")
  (tmp_path / "x/train.parquet").write_bytes(b"PAR1 not so")
  refused("cannot be opened .*[Pp]arquet")
  (tmp_path / "x/train.parquet").unlink()
  hf.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "x")
  refused("has 0 columns of images among text; expected one")
  hf.Dataset.from_dict({"image": [1, 2]}).save_to_disk(tmp_path / "x")
  refused("the column 'image' holds .*int64.*, not images")
  hf_set(hf, [0] * 9).save_to_disk(tmp_path / "x")
  half(next((tmp_path / "x").glob("*.arrow")))
  refused("cannot be opened")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  monkeypatch.delitem(sys.modules, "mrmae_jax.data.sources.hf", raising=False)
  with pytest.raises(DataError, match=r"pip install 'mrmae_jax\[hf\]'"):
    open_source("hf:x", "train")
