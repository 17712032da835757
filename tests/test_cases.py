"""Folders of images as people have them: split names, suffixes, leftovers of file managers."""

import functools
import io
import json
import os
import re
import shutil
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from mrmae_jax import config as config_lib
from mrmae_jax import sharding, train
from mrmae_jax.cli import doctor
from mrmae_jax.cli.images import find_images, find_view
from mrmae_jax.cli.subject import read_all
from mrmae_jax.data import (
  LoaderOptions,
  augment,
  image_views,
  open_source,
  open_split,
  pair_views,
)
from mrmae_jax.data.sources.splits import split_kind
from mrmae_jax.errors import ConfigError, DataError, UsageError, WorkdirError
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.run import make_evaluators
from mrmae_jax.tasks import finetune, pretrain
from tests import tiny
from tests.helpers.cli import parse_options, run_command
from tests.helpers.runs import finished_run

FORMS = {".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP", ".pgm": "PPM", ".j2k": "JPEG2000"}


def pictures(root, *names):
  """Writes tiny pictures of noise; a name that ends in / stands for three pictures below it."""
  for name in names:
    for path in [root / name / f"{i}.png" for i in range(3)] if name[-1] == "/" else [root / name]:
      path.parent.mkdir(parents=True, exist_ok=True)
      seed = zlib.crc32(str(path.relative_to(root)).encode())
      noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
      picture = Image.fromarray(noise)
      picture = picture.convert("L") if path.suffix == ".pgm" else picture
      picture.save(path, FORMS.get(path.suffix))


def open_pair(root, **options):
  """Opens both splits with the split names of a configuration."""
  options = {"eval_split": "validation", "holdout_every": 3} | options
  return [open_source(f"folder:{root}", split, **options) for split in ("train", "eval")]


def places(source, root):
  """The folders of the images of a source, relative to `root`."""
  names = [source[i]["name"] for i in range(len(source))]
  return {os.path.relpath(os.path.dirname(name), root) for name in names}


# Split names.


@pytest.mark.parametrize(
  "train, evaluation",
  [
    ("Training", "Testing"),  # Kaggle
    ("train", "valid"),  # Roboflow
    ("train", "dev"),
    ("TRAIN", "VAL"),
    ("Train", "Eval"),
    ("train", "test1"),
    ("training_set", "test_set"),
    ("train2017", "val2017"),
    ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
    ("TrainingData", "ValidationData"),
    ("trainset", "holdout"),
    ("Training", "PublicTest"),
  ],
)
def test_folders_are_splits_by_the_usual_names(tmp_path, train, evaluation):
  pictures(tmp_path, f"{train}/a/", f"{train}/b/", f"{evaluation}/a/", f"{evaluation}/b/")
  training, held_out = open_pair(tmp_path)
  assert training.class_names == held_out.class_names == ("a", "b")
  assert places(training, tmp_path) == {f"{train}/a", f"{train}/b"}
  assert places(held_out, tmp_path) == {f"{evaluation}/a", f"{evaluation}/b"}
  assert f"train: {train}/, eval: {evaluation}/" in training.description


@pytest.mark.parametrize(
  "name",
  ["trains", "trainer", "testament", "contest", "train_val", "train_labels", "values", "列車"],
)
def test_other_words_are_no_splits(name):
  assert split_kind(name) == ""


def test_of_three_splits_the_test_images_are_left_out(tmp_path):
  pictures(tmp_path, "Train/a/", "Train/b/", "Val/a/", "Val/b/", "Test/a/", "extra/", "0.png")
  training, held_out = open_pair(tmp_path)
  note = "train: Train/, eval: Val/, left out: 1 image beside them, Test/, extra/"
  assert note in training.description and note in held_out.description
  assert places(open_pair(tmp_path, eval_split="test")[1], tmp_path) == {"Test/a"}


def test_archives_hold_folders_of_folders(tmp_path):
  pictures(tmp_path, "archive/seg/train/a/", "archive/seg/train/b/", "archive/seg/test/a/")
  pictures(tmp_path, "__MACOSX/archive/._0.png")
  training, held_out = open_pair(tmp_path)
  assert len(training) == 6 and places(held_out, tmp_path) == {"archive/seg/test/a"}
  pictures(tmp_path / "intel", "seg_train/seg_train/a/", "seg_train/seg_train/b/")
  pictures(tmp_path / "intel", "seg_test/seg_test/a/", "seg_test/seg_test/b/")
  training, held_out = open_pair(tmp_path / "intel")
  assert training.class_names == held_out.class_names == ("a", "b")


def test_a_lone_training_folder_is_held_out_of(tmp_path):
  pictures(tmp_path, "Training/a/", "Training/b/", "notes/.0.png")
  training, held_out = open_pair(tmp_path)
  assert (len(training), len(held_out)) == (4, 2)
  assert "train: Training/, eval: held out of Training/" in training.description


@pytest.mark.parametrize(
  "names, message, options",
  [
    (["train/", "Training/", "val/"], "Training/, train/ all mean 'train'", "train_split=./train"),
    (["train/", "val/", "valid/"], "val/, valid/ all mean 'val'", "eval_split=./val"),
    (["train/", "bus/", "car/"], "one folder among bus/, car/", "train_split=./train"),
    (["Training/a/", "2020/b/"], "one folder among 2020/", "train_split=./Training"),
    (["Testing/", "good/"], "has 'Testing' but no 'train'", "train_split=good"),
    (["a/train/", "a/test/", "b/train/", "b/test/"], "lie inside of its sub-folders", ""),
    (["a/", "b/"], "has no sub-folder 'trian'", "train_split=a"),
  ],
)
def test_ambiguous_names_are_refused_with_what_helps(tmp_path, names, message, options):
  pictures(tmp_path, *names)
  typo = {"train_split": "trian"} if "trian" in message else {}
  with pytest.raises(DataError, match=message) as caught:
    open_pair(tmp_path, **typo)
  assert "\n" not in str(caught.value)
  if options:  # the advice can be followed
    open_pair(tmp_path, **dict([options.split("=")]))
  whole, _ = open_pair(tmp_path, train_split=".")
  assert whole.class_names == tuple(sorted({name.split("/")[0] for name in names}))


# Files that are left out.


def test_every_format_of_the_decoder_is_listed_and_the_rest_counted(tmp_path, capsys):
  suffixes = "jpg jpeg jpe jfif png webp gif bmp dib tif tiff ppm pgm jp2 j2k avif".split()
  pictures(tmp_path, *(f"a/0.{suffix}" for suffix in suffixes), "b/0.JPG")
  for name in ("b/0.heic", "b/1.HEIC", "b/0.txt", "c/0.heic", "c/README"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
  source = open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  assert len(source) == len(suffixes) + 1
  for i in range(len(source)):
    assert augment.pixels(source[i]).shape == (8, 8, 3)
  left_out = "left out: 3 .heic, 1 .txt, 1 no suffix; no images in c/"
  assert sorted(source.left_out) == sorted(left_out) and source.left_out in source.description
  options = [f"--source=folder:{tmp_path}", "--holdout_every=0", "--splits=train", "--workers=1"]
  assert run_command(["verify", *options]) == 0
  printed = capsys.readouterr()
  assert printed.out.endswith(f"all 17 images are good; {source.left_out}\n")
  assert f"train: {source.description}\n" in printed.err


def test_images_without_an_evaluation_split_are_verified_and_packed(tmp_path, capsys):
  pictures(tmp_path, "x/0.png", "x/1.png", "x/2.png")
  words = [f"--source=folder:{tmp_path}/x", "--holdout_every=0"]
  assert run_command(["verify", *words, "--workers=1"]) == 0
  printed = capsys.readouterr()
  assert "all 3 images are good" in printed.out and "eval: none (" in printed.err
  assert run_command(["pack", *words, f"--out={tmp_path}/packed"]) == 0
  assert len(open_source(f"packed:{tmp_path}/packed", "train")) == 3
  assert run_command(["verify", *words, "--splits=eval"]) == 3


@pytest.mark.parametrize("every", [0, 10])
def test_the_advice_about_a_hold_out_can_be_followed(tmp_path, every):
  pictures(tmp_path, "x/0.png", "x/1.png")
  with pytest.raises(DataError) as caught:
    open_source(f"folder:{tmp_path}/x", "eval", holdout_every=every)
  advice = int(re.search(r"set holdout_every(?:=| to at most )(\d+)", str(caught.value))[1])
  assert len(open_source(f"folder:{tmp_path}/x", "eval", holdout_every=advice)) == 1


# Folders of file managers.


def test_folders_and_files_of_file_managers_are_no_images(tmp_path):
  pictures(tmp_path, "cats/", "dogs/")
  expected = open_source(f"folder:{tmp_path}", "train").fingerprint
  junk = "@eaDir __MACOSX .ipynb_checkpoints .thumbnails #recycle $RECYCLE.BIN lost+found".split()
  for name in (*junk, "System Volume Information"):
    pictures(tmp_path, f"{name}/x/", f"cats/{name}/0.png")
  pictures(tmp_path, "cats/._0.png")
  for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "cats/0.png:Zone.Identifier"):
    (tmp_path / name).write_text("x")
  list_again = tmp_path.with_name(f"{tmp_path.name}_again")
  list_again.symlink_to(tmp_path)
  source = open_source(f"folder:{list_again}", "train")
  assert (source.fingerprint, source.class_names) == (expected, ("cats", "dogs"))
  assert source.left_out == ""


def test_a_picture_beside_the_classes_is_named(tmp_path):
  pictures(tmp_path, "cats/", "dogs/", "README.png")
  config = tiny.finetune_config("vit", data__source=f"folder:{tmp_path}")
  with pytest.raises(
    DataError, match="README.png lies outside of the folders cats/, dogs/.*no lab"
  ):
    finetune.make(config)


# Images to measure on that cannot be used.


def evaluators(root, **values):
  config = tiny.changed(
    tiny.get_config("vit"), teacher__path="", data__source=f"folder:{root}", **values
  )
  return make_evaluators(config, pretrain.make(config), {}, sharding.make_mesh(), None)


def test_pretraining_needs_no_labels_to_measure_on(tmp_path):
  pictures(tmp_path, "train/a/", "train/b/", "val/ILSVRC2012_val_1.JPEG", "val/2.JPEG")
  opened, notes = evaluators(tmp_path)
  assert opened["reconstruct"].note == "" and opened["knn"].run({}, (), 0) == {}
  [note] = notes
  assert "no k-NN evaluation" in note and "2 lie outside of class folders as a, b" in note
  config = tiny.finetune_config("vit", data__source=f"folder:{tmp_path}")
  with pytest.raises(DataError, match="2 lie outside of class folders.*no classes to measure"):
    finetune.make(config)


def test_the_best_checkpoint_needs_a_result_that_is_measured(tmp_path):
  pictures(tmp_path, "train/a/", "train/b/", "val/1.png")
  with pytest.raises(ConfigError, match="'knn/accuracy' is not among .*: none; .*no k-NN evaluat"):
    evaluators(tmp_path, keep_best="knn/accuracy")
  pictures(tmp_path / "good", "train/a/", "train/b/", "val/a/")
  evaluators(tmp_path / "good", keep_best="knn/accuracy")
  with pytest.raises(ConfigError, match="'knn/acc' is not among .*: knn/accuracy; name one"):
    evaluators(tmp_path / "good", keep_best="knn/acc")


def test_pretraining_needs_no_images_to_measure_on(tmp_path):
  pictures(tmp_path, "a/0.png", "b/0.png")
  _, notes = evaluators(tmp_path, data__holdout_every=10)
  assert len(notes) == 2 and all("set holdout_every to at most 2" in note for note in notes)
  assert "the reconstructions are of training images" in "".join(notes)
  pictures(tmp_path / "only", "0.png")
  with pytest.raises(DataError, match="has 1 image; .*one is for training: add images"):
    open_source(f"folder:{tmp_path}/only", "eval")


def test_doctor_names_the_evaluations_that_are_left_out(tmp_path, examine, monkeypatch):
  monkeypatch.setattr(doctor, "describe_plan", lambda *_: None)  # traces the step
  pictures(tmp_path / "x", "train/a/", "train/b/", "val/1.png", "val/2.png")
  code, out = examine("teacher.path=", f"data.source=folder:{tmp_path}/x", workdir=None)
  assert code == 0 and "warn  no k-NN evaluation, the images have no labels: " in out, out


def test_classes_without_images_to_measure_on_are_named(tmp_path):
  pictures(tmp_path, "train/a/", "train/b/", "train/c/", "val/b/", "val/c/")
  _, held_out = open_pair(tmp_path)
  assert held_out.class_names == ("a", "b", "c")
  assert sorted({held_out[i]["label"] for i in range(6)}) == [1, 2]
  assert "no images of 1 of its classes: a" in held_out.description
  assert evaluators(tmp_path)[1] == []
  finetune.make(tiny.finetune_config("vit", data__source=f"folder:{tmp_path}"))


def test_images_of_unknown_classes_are_refused_by_finetuning(tmp_path):
  pictures(tmp_path, "train/a/", "train/b/", "val/A/", "val/b/")
  with pytest.raises(DataError, match="A is not among the classes of .*train: a, b.*no classes to"):
    finetune.make(tiny.finetune_config("vit", data__source=f"folder:{tmp_path}"))


# Photographs that lie on their side.


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_has_one_meaning_everywhere(tmp_path, form):
  noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
  for value in (1, 2, 3, 4, 5, 6, 7, 8, 9):
    exif, file = Image.Exif(), io.BytesIO()
    exif[augment.ORIENTATION] = value
    Image.fromarray(noise).save(file, form, exif=exif)
    data = file.getvalue()
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    turned = augment.decode_image(data, "x", exif="apply")
    np.testing.assert_array_equal(turned, np.asarray(expected))
    example = {"image": data, "label": 0, "name": "x"}
    config = tiny.changed(tiny.get_config("vit"), data__exif="apply", data__crop_scale=(1.0, 1.0))
    for views in (image_views(config), pair_views(config)):
      upright = {"image": np.asarray(expected), "label": 0, "name": "x"}
      for view in views:
        one, other = (view(e, np.random.default_rng(0))["image"] for e in (example, upright))
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing():
  file = io.BytesIO()
  Image.new("RGB", (6, 4)).save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
  assert augment.decode_image(file.getvalue(), "x", exif="apply").shape == (4, 6, 3)


def test_packed_images_keep_their_orientation(tmp_path):
  exif = Image.Exif()
  exif[augment.ORIENTATION] = 6
  (tmp_path / "x").mkdir()
  Image.new("RGB", (60, 40)).save(tmp_path / "x/0.jpg", exif=exif)
  for size in (0, 20):
    out = tmp_path / f"packed{size}"
    words = [f"--source=folder:{tmp_path}/x", f"--out={out}", f"--short_side={size}"]
    assert run_command(["pack", *words]) == 0
    example = open_source(f"packed:{out}", "train")[0]
    assert augment.pixels(example, exif="apply").shape == ((30, 20, 3) if size else (60, 40, 3))


def test_the_orientation_is_that_of_the_run(run_of_photos, tmp_path):
  shutil.copytree(run_of_photos / "run", tmp_path / "run")
  words = ["features", f"--model={tmp_path}/run", "--out=x.npz"]
  assert images_of(*words)[1]["exif"] == "ignore"
  config = json.loads((tmp_path / "run/config.json").read_text())
  config["data"]["exif"] = "apply"
  (tmp_path / "run/config.json").write_text(json.dumps(config))
  assert images_of(*words)[1]["exif"] == "apply"
  assert images_of(*words, "--exif=ignore")[1]["exif"] == "ignore"
  # A run of a version without the key is the same run.
  assert "data.exif" not in config_lib.identity(tiny.get_config())
  assert "data.exif" in config_lib.identity(tiny.changed(tiny.get_config(), data__exif="apply"))


# Images that moved.


def test_a_run_whose_images_moved_is_the_same_run(tmp_path):
  pictures(tmp_path / "a", "cats/", "dogs/")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  shutil.copytree(tmp_path / "a", tmp_path / "c")
  pictures(tmp_path / "c", "dogs/more.png")
  identities = []
  for name in "abc":
    config = tiny.finetune_config("vit", data__source=f"folder:{tmp_path / name}")
    task = types.SimpleNamespace(identity={}, source=functools.partial(open_split, config.data))
    identities.append(train.identity(config, task))
  workdir = tmp_path / "run"
  state = {"x": jnp.zeros(3)}
  # Older versions noted the folder too.
  saving = Checkpoints(workdir, identities[0] | {"data.source": f"folder:{tmp_path}/a"})
  saving.save(1, state, wait=True)
  saving.close()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = {"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place)}
  for identity in identities[:2]:
    restoring = Checkpoints(workdir, identity)
    assert restoring.restore(shapes).step == 1
    restoring.close()
  restoring = Checkpoints(workdir, identities[2])
  with pytest.raises(
    WorkdirError, match="different run .train images: .* in the checkpoint, .* now"
  ):
    restoring.restore(shapes)
  restoring.close()


# Images that cannot be read, in the tools.


@pytest.fixture
def one_bad(tmp_path):
  pictures(tmp_path / "x", "cats/", "dogs/")
  (tmp_path / "x/cats/1.png").write_text("not a picture")
  (tmp_path / "list.json").write_text('{"train": ["cats/1.png"]}')
  return tmp_path


@pytest.mark.parametrize("options", [["--on_error=skip", "--max_skipped=0.2"], ["--quarantine"]])
def test_features_leave_out_what_cannot_be_read(one_bad, options, capsys):
  options = [word.replace("quarantine", f"quarantine={one_bad}/list.json") for word in options]
  words = ["--model=pixels", f"--images=folder:{one_bad}/x", f"--out={one_bad}/x.npz"]
  assert run_command(["features", *words]) == 3
  assert run_command(["features", *words, *options, "--batch_size=4"]) == 0
  assert "features of 5 images" in capsys.readouterr().out
  with np.load(one_bad / "x.npz") as file:
    names = [os.path.relpath(name, one_bad / "x") for name in file["names"]]
    assert names == ["cats/0.png", "cats/2.png", "dogs/0.png", "dogs/1.png", "dogs/2.png"]
    np.testing.assert_array_equal(file["labels"], [0, 0, 1, 1, 1])
    assert len(file["features"]) == 5


def test_names_of_any_bytes_are_written(tmp_path, capsys):
  pictures(tmp_path, "x/a/0.png", "x/b/0.png")
  os.rename(tmp_path / "x/a/0.png", os.fsencode(tmp_path / "x/a") + b"/caf\xe9.png")
  os.rename(tmp_path / "x/b", os.fsencode(tmp_path / "x") + b"/\xe9t\xe9")
  for suffix in ("npz", "parquet"):
    words = ["--model=pixels", f"--images=folder:{tmp_path}/x", f"--out={tmp_path}/x.{suffix}"]
    assert run_command(["features", *words]) == 0
  table = pq.read_table(tmp_path / "x.parquet").to_pydict()
  assert table["name"] == [f"{tmp_path}/x/a/caf\\xe9.png", f"{tmp_path}/x/\\xe9t\\xe9/0.png"]
  assert table["class_name"] == ["a", "\\xe9t\\xe9"]


@pytest.mark.parametrize("command", ["teacher", "show-teacher"])
def test_commands_with_a_configuration_name_the_key_for_bad_images(command, capsys):
  for option in ("on_error=skip", "quarantine=bad.json"):
    assert run_command([command, f"--{option}"]) == 2
    key = option.split("=")[0]
    assert f"did you mean --config.data.{key}=VALUE?" in capsys.readouterr().err


def test_pack_leaves_out_what_is_in_quarantine(one_bad):
  words = [f"--source=folder:{one_bad}/x", "--holdout_every=0", "--splits=train"]
  words += [f"--out={one_bad}/packed", f"--quarantine={one_bad}/list.json"]
  assert run_command(["pack", *words]) == 0
  assert len(open_source(f"packed:{one_bad}/packed", "train")) == 5


def test_pack_leaves_out_what_cannot_be_read(one_bad, capsys):
  words = [f"--source=folder:{one_bad}/x", "--holdout_every=0", f"--out={one_bad}/packed"]
  assert run_command(["pack", *words]) == 3
  assert run_command(["pack", *words, "--on_error=skip"]) == 3
  assert "max_skipped=0.01 allows 0" in capsys.readouterr().err
  assert not (one_bad / "packed").exists()
  words += ["--on_error=skip", "--max_skipped=0.2", "--shards=6"]
  assert run_command(["pack", *words]) == 0
  printed = capsys.readouterr()
  assert "5 images, 1 left out" in printed.out and "cats/1.png" in printed.err
  source = open_source(f"packed:{one_bad}/packed", "train")
  assert [source[i]["label"] for i in range(len(source))] == [0, 0, 1, 1, 1]


def test_pictures_leave_out_what_cannot_be_read(one_bad):
  source = open_source(f"folder:{one_bad}/x", "train", holdout_every=0)
  skip = LoaderOptions(on_error="skip", max_skipped=1.0)
  indices, images = read_all(source, [0, 1, 2, 5], (8, 8, 3), skip)
  assert indices == [0, 2, 5] and images.shape == (3, 8, 8, 3)


# The images of a run, for the commands that look at it.


@pytest.fixture(scope="module")
def run_of_photos(tmp_path_factory):
  """The workdir of a run that holds out every third of six photographs, and their folder."""
  root = tmp_path_factory.mktemp("run_of_photos")
  pictures(root / "photos", "cats/", "dogs/")
  source = {"source": f"folder:{root}/photos", "holdout_every": 3, "eval_crop": 1.0}
  finished_run(root / "run", "vit", **{f"data__{key}": value for key, value in source.items()})
  return root


def images_of(*words):
  """Returns what a command reads: (images, how they are shown)."""
  options = parse_options(*words)
  models = options.models if options.command == "ensemble" else [options.model]
  return find_images(options, models, holdout_every=10), find_view(options, models[0])


def test_a_command_reads_the_images_of_its_run_as_the_run_does(run_of_photos):
  run, photos = run_of_photos / "run", run_of_photos / "photos"
  moved = run_of_photos / "moved"
  shutil.copytree(photos, moved)
  (run_of_photos / "link").symlink_to(photos)
  for name in ("", "photos", "link", "moved"):
    words = [f"--images=folder:{run_of_photos}/{name}"] if name else []
    images, view = images_of("features", f"--model={run}", "--out=x.npz", *words)
    assert (images.holdout_every, view["crop"]) == (3, 1.0), name
    assert images.source == f"folder:{run_of_photos}/{name or 'photos'}"
  options = ["--holdout_every=2", "--crop=0.5", "--quarantine=list.json"]
  images, view = images_of("features", f"--model={run}", "--out=x.npz", *options)
  assert (images.holdout_every, images.quarantine, view["crop"]) == (2, "list.json", 0.5)
  # Of other images nothing is known but how the model was trained to see them.
  pictures(run_of_photos, "others/a/", "others/b/")
  other = f"--images=folder:{run_of_photos}/others"
  images, view = images_of("features", f"--model={run}", "--out=x.npz", other)
  assert (images.holdout_every, view["crop"]) == (10, 1.0)
  images, view = images_of("features", "--model=pixels", "--out=x.npz", other)
  assert (images.holdout_every, view["crop"]) == (10, 0.875)


def test_runs_that_hold_out_other_images_are_not_compared(run_of_photos, tmp_path):
  shutil.copytree(run_of_photos / "run", tmp_path / "other")
  config = json.loads((tmp_path / "other/config.json").read_text())
  config["data"]["holdout_every"] = 2
  (tmp_path / "other/config.json").write_text(json.dumps(config))
  words = ["ensemble", f"--models={run_of_photos}/run,{tmp_path}/other"]
  with pytest.raises(
    UsageError, match="config.data.holdout_every is 3 in .*, 2 in .*; choose with"
  ):
    images_of(*words)
  assert images_of(*words, "--holdout_every=2")[0].holdout_every == 2
  with pytest.raises(UsageError, match="--images is missing: pixels is not a run"):
    images_of("features", "--model=pixels", "--out=x.npz")


def test_neighbors_do_not_know_the_answers(run_of_photos, tmp_path, capsys):
  photos = f"--images=folder:{run_of_photos}/photos"
  command = ["features", "--model=pixels", "--image_size=8", photos]
  files = {
    "all": [],
    "train": ["--holdout_every=3"],
    "eval": ["--holdout_every=3", "--split=eval"],
    "copies": ["--images=folder:" + str(run_of_photos / "copies")],
  }
  shutil.copytree(run_of_photos / "photos", run_of_photos / "copies")
  for name, options in files.items():
    assert run_command([*command, *options, f"--out={tmp_path}/{name}.npz"]) == 0
  measure = ["knn", f"--eval={tmp_path}/eval.npz", f"--out={tmp_path}/x.json", "--blr=", "--shots="]
  capsys.readouterr()
  assert run_command([*measure, f"--train={tmp_path}/all.npz"]) == 2
  error = capsys.readouterr().err
  assert "2 of the 2 images of --eval are in --train too" in error and "cats/2.png" in error
  assert run_command([*measure, f"--train={tmp_path}/train.npz"]) == 0
  assert "warning" not in capsys.readouterr().out
  assert run_command([*measure, f"--train={tmp_path}/copies.npz"]) == 0
  assert "warning: 2 images to measure on have exactly the features" in capsys.readouterr().out
