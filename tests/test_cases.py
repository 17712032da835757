"""Folders of images and files of weights as people have them."""

import ast
import functools
import io
import json
import os
import pathlib
import re
import shutil
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file

import mrmae_jax
from mrmae_jax import config as config_lib
from mrmae_jax import mrmae, preflight, sharding, teachers, train
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
from mrmae_jax.errors import ConfigError, DataError, UsageError, WeightsError, WorkdirError
from mrmae_jax.pretrained import PretrainedModel
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.runs.run import make_evaluators
from mrmae_jax.tasks import finetune, pretrain, probe
from mrmae_jax.train import TrainState
from mrmae_jax.weights import families, networks, readers, tower_params, towers, writers
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
  of_val = [opened, evaluators(tmp_path, data__holdout_every=0)[0]]  # there is a split of its own
  np.testing.assert_array_equal(*(x["reconstruct"]._batch["image"] for x in of_val))
  config = tiny.finetune_config("vit", data__source=f"folder:{tmp_path}")
  with pytest.raises(DataError, match="2 lie outside of class folders.*no classes to measure"):
    finetune.make(config)


def test_micro_batches_of_a_run_stay_where_its_targets_are_of_a_batch():
  values = {"teacher__target_norm": "batch", "optim__accum_steps": 2}
  assert (
    pretrain.make(tiny.changed(tiny.get_config("vit"), **values)).identity["micro-batches"] == 2
  )
  assert "micro-batches" not in pretrain.make(tiny.get_config("vit")).identity


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


# Weight files, as trainers write them.


@pytest.fixture(scope="module")
def mae_tensors():
  """The tensors of a small MAE in its authors' names."""
  stored = load_file(Path(__file__).parent / "goldens" / "mae_pretrain.safetensors")
  return {name[6:]: x for name, x in stored.items() if name.startswith("param.")}


def read(path, **hints):
  return readers.read_model(path, num_heads=3, decoder_heads=4, **hints)


def check_same(model, tensors):
  np.testing.assert_array_equal(
    model.params["encoder"]["blocks_2"]["fc2"]["bias"], tensors["blocks.2.mlp.fc2.bias"]
  )
  assert model.params.keys() == {"encoder", "decoder"}


def test_weights_behind_the_words_of_trainers_load(tmp_path, mae_tensors):
  words = "module. _orig_mod. model. backbone. encoder. net. student. model.module._orig_mod."
  for prefix in f"{words} _fsdp_wrapped_module. _forward_module.model. learner.vit.".split():
    save_file({prefix + name: x for name, x in mae_tensors.items()}, tmp_path / "x.safetensors")
    network = networks.open_network(tmp_path / "x.safetensors")
    assert network.tensors.keys() == mae_tensors.keys()
    assert (network.wrapper, network.left_out) == (prefix, ())
  model = read(tmp_path / "x.safetensors")
  check_same(model, mae_tensors)
  assert "MAE's names behind 'learner.vit.'" in str(model.report)


def test_weights_of_wrapped_blocks_load(tmp_path, mae_tensors):
  wrap = lambda name: re.sub(r"(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module._orig_mod.", name)
  save_file({wrap(name): x for name, x in mae_tensors.items()}, tmp_path / "x.safetensors")
  check_same(read(tmp_path / "x.safetensors"), mae_tensors)
  double = mae_tensors | {"module.norm.bias": mae_tensors["norm.bias"]}
  save_file(double, tmp_path / "x.safetensors")
  with pytest.raises(WeightsError, match="two tensors for norm.bias: .*module.norm"):
    read(tmp_path / "x.safetensors")


def test_of_two_networks_the_report_names_both(tmp_path, mae_tensors):
  path = tmp_path / "x.safetensors"
  ema = {f"model_ema.module.{name}": x * np.float32(1.5) for name, x in mae_tensors.items()}
  model = {f"model.{name}": x for name, x in mae_tensors.items()}
  save_file(model | ema | {"criterion.weight": np.ones(3, np.float32)}, path)
  report = str(read(path).report)
  assert "behind 'model.'" in report and "criterion (1 tensor)" in report
  assert "model_ema (74 tensors; another network, --weights=model_ema takes it)" in report
  for word in ("ema", "model_ema"):
    taken = read(path, weights=word)
    assert "model (74 tensors; another network" in str(taken.report)
    check_same(taken, {name: x * np.float32(1.5) for name, x in mae_tensors.items()})
  with pytest.raises(WeightsError, match=r"2 networks \(model, model_ema\).*--weights=x fits 0"):
    read(path, weights="x")
  save_file({f"{part}.{n}": x for part in "qk" for n, x in mae_tensors.items()}, path)
  with pytest.raises(WeightsError, match=r"2 networks \(k, q\), and none is usual; take one with"):
    read(path)
  words = [f"--model={path}", f"--out={tmp_path}/q.safetensors", "--weights=q", "--format=timm"]
  assert run_command(["convert", *words, "--num_heads=3", "--decoder_heads=4"]) == 0
  check_same(read(tmp_path / "q.safetensors"), mae_tensors)


def test_a_linear_probe_of_mae_gives_its_encoder(tmp_path, mae_tensors):
  encoder = {n: x for n, x in mae_tensors.items() if not n.startswith(("decoder", "mask_token"))}
  head = {"head.0.running_mean": np.zeros(48), "head.0.running_var": np.ones(48)}
  head |= {"head.0.num_batches_tracked": np.array(9), "head.1.weight": np.ones((10, 48))}
  save_file(encoder | head | {"head.1.bias": np.zeros(10)}, tmp_path / "x.safetensors")
  model = read(tmp_path / "x.safetensors")
  assert model.params.keys() == {"encoder"}
  assert "head (a linear probe behind BatchNorm)" in str(model.report)


@pytest.mark.torch
def test_checkpoints_of_trainers_load_without_running_code(tmp_path, mae_tensors):
  torch = pytest.importorskip("torch")
  state = {name: torch.from_numpy(x) for name, x in mae_tensors.items()}
  optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
  numbers = {"best": np.float64(0.8), "flag": np.bool_(True), "curve": np.arange(3)}
  for content in (
    {"module": state},
    {"net": state, "epoch": 3},
    {"model": state, **numbers},
    {"state_dict": {f"model.{k}": x for k, x in state.items()}, "rng": torch.get_rng_state()},
    {"model": state, "model_ema": state, "optimizer": optimizer},
    {
      "teacher": {f"backbone.{k}": x for k, x in state.items()},
      "student": {"a": state["norm.bias"]},
    },
  ):
    torch.save(content, tmp_path / "x.pth")
    check_same(read(tmp_path / "x.pth"), mae_tensors)
  nested = {"model": state}
  nested["again"] = nested
  torch.save(nested, tmp_path / "x.pth")
  check_same(read(tmp_path / "x.pth"), mae_tensors)
  torch.save({"model": state, "x": pathlib.PurePosixPath("x")}, tmp_path / "x.pth")
  with pytest.raises(WeightsError, match="needs pickled class pathlib.*refusing"):
    read(tmp_path / "x.pth")


# Runs that start from weights.


def start(tmp_path, encoder="convvit", **values):
  """Pre-training of `tiny` from `tmp_path`/run, or from the file that `values` names."""
  values = {"teacher__path": "", "init_from": f"{tmp_path}/run"} | values
  return pretrain.make(tiny.changed(tiny.get_config(encoder), **values))


@pytest.mark.parametrize("encoder", ["convvit", "vit"])
def test_pretraining_goes_on_from_a_run(tmp_path, encoder):
  _, params = finished_run(tmp_path / "run", encoder)
  task = start(tmp_path, encoder)
  expected = flatten_dict(params, sep="/")
  assert task.pretrained.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(task.pretrained[name], x)
  [note] = task.notes
  assert "starting from" in note and "new" not in note and "left out" not in note
  assert "start" in task.identity and "start" not in start(tmp_path, encoder, init_from="").identity


def test_what_starts_anew_in_pretraining_is_named(tmp_path):
  finished_run(tmp_path / "run", encoder__fuse_layers=(0,))
  task = start(tmp_path, decoder__num_heads=4, teacher__path=str(tiny.TEACHERS / "hf_clip_full"))
  note = task.notes[-1]
  assert "another decoder: num_heads 2 there, 4 here" in note
  assert "left out: decoder, encoder fusion" in note
  assert "new, with random weights: decoder, mimic head mimic" in note
  assert {name.split("/")[0] for name in task.pretrained} == {"encoder"}
  with pytest.raises(WeightsError, match="another architecture: depths"):
    start(tmp_path, encoder__depths=(1, 1, 3))


def test_pretraining_goes_on_from_published_files(tmp_path, mae_tensors):
  sizes = dict(patch_size=16, dim=48, depth=3, num_heads=3, mlp_dim=192)
  values = {f"encoder__{name}": x for name, x in sizes.items()}
  values |= dict(decoder__dim=32, decoder__depth=2, decoder__num_heads=4)
  file = tmp_path / "x.safetensors"
  save_file({f"module.{name}": x for name, x in mae_tensors.items()}, file)
  task = start(tmp_path, "vit", init_from=str(file), **values)
  assert "behind 'module.'" in task.notes[0] and "new" not in task.notes[0]
  assert len(task.pretrained) == 41 + 31
  encoder = {n: x for n, x in mae_tensors.items() if not n.startswith(("decoder", "mask_token"))}
  save_file(encoder, file)
  task = start(tmp_path, "vit", init_from=str(file), **values)
  assert "new, with random weights: decoder" in task.notes[0] and len(task.pretrained) == 41
  beit = {n: x for n, x in encoder.items() if n != "pos_embed"}
  save_file(beit | {"blocks.0.gamma_1": np.ones(48)}, file)
  with pytest.raises(WeightsError, match="missing: blocks.0.gamma_2, .*beside blocks.0.gamma_1"):
    start(tmp_path, "vit", init_from=str(file), **values)


def test_more_epochs_are_refused_with_the_command_that_goes_on(tmp_path):
  identity = {"task": "pretrain", "epochs": 3.0}
  saving = Checkpoints(tmp_path, identity)
  saving.save(1, {"x": jnp.zeros(2)}, wait=True)
  saving.close()
  opened = Checkpoints(tmp_path, identity | {"epochs": 6.0})
  words = f"mrmae pretrain --workdir=NEW --config.init_from={tmp_path}"
  with pytest.raises(WorkdirError, match=f"epochs: 3.0 in the checkpoint, 6.0 now.*{words}"):
    opened.restore({"x": jnp.zeros(2)})
  opened.close()
  words = ["--config=tests/tiny.py", f"--workdir={tmp_path}", f"--config.init_from={tmp_path}/"]
  assert run_command(["pretrain", *words]) == 2


def test_a_classifier_goes_on_by_the_names_of_its_classes(tmp_path):
  config = tiny.finetune_config("vit")
  model = finetune.make_model(config, 2)
  leaves = lambda: jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
  params = jax.tree.map(
    lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), leaves()["params"]
  )
  saving = Checkpoints(tmp_path, {"classes": ["b", "a"]})
  saving.save(1, TrainState(jnp.int32(1), params, (), (), jnp.float32(0)), wait=True)
  saving.close()
  (tmp_path / "config.json").write_text(config.to_json())
  config.init_from = str(tmp_path)
  pretrained, notes = finetune.read_pretrained(config, model, ("a", "b"))
  np.testing.assert_array_equal(pretrained["head/bias"], [1, 0])
  np.testing.assert_array_equal(pretrained["head/kernel"], params["head"]["kernel"][:, ::-1])
  assert "fc_norm/scale" in pretrained and "left out: its" not in notes[0]
  pretrained, notes = finetune.read_pretrained(config, model, ("a", "c"))
  assert "head/bias" not in pretrained and "left out: its classifier" in notes[0]


# Vision towers of others, as students and as teachers.

TOWERS = Path(__file__).parent / "goldens" / "teachers"
CLIP = dict(
  patch_size=8, dim=48, depth=3, num_heads=4, mlp_dim=72, eps=1e-5, learned_positions=True
)
CLIP |= dict(activation="quick_gelu", norm_pre=True, patch_bias=False)


def tower_config(make, path, **fields):
  values = {f"encoder__{name}": x for name, x in fields.items()}
  config = make("vit", init_from=str(path), **values)
  preflight.check(config, num_devices=8)
  return config


def test_a_tower_is_finetuned_and_probed_with_the_blocks_of_its_family():
  path = TOWERS / "hf_clip_full"
  with pytest.raises(WeightsError) as error:
    finetune.make(tower_config(tiny.finetune_config, path))
  options = str(error.value).split("checkpoint: ")[1].split()
  config = tiny.finetune_config("vit", init_from=str(path))
  for option in options:  # what the message says works
    key, value = option.removeprefix("--config.").split("=")
    value = value if value in ("quick_gelu",) else ast.literal_eval(value)
    config = tiny.changed(config, **{key: value})
  assert {key: config.encoder[key] for key in CLIP} == CLIP
  task = finetune.make(config)
  assert "starting from" in task.notes[0] and "CLIP's blocks" in task.notes[0]
  assert "projection; text_model" in task.notes[0] and "eps" not in task.notes[0]
  assert "position table 4x4 interpolated to 4x6" in task.notes[0]
  assert "mean of its images was 0.481,0.458,0.408, config.data.mean is 0.485" in task.notes[0]

  model = mrmae_jax.load(path)
  config = tower_config(tiny.probe_config, path, **CLIP)
  config.update(image_size=(32, 32), pool="cls")
  task = probe.make(config)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  network = model.network._replace(mean=config.data.mean, std=config.data.std)
  expected = PretrainedModel(network).encode(images)["cls"]
  encoder = finetune.make_model(config, 1).encoder
  pixels = mrmae.normalize(images, network.mean, network.std)
  x, _ = jax.jit(encoder.apply)({"params": task.frozen["encoder"]}, pixels)
  np.testing.assert_allclose(x[:, 0], expected, atol=1e-5)


def test_features_of_a_tower_are_those_of_the_teacher():
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  for name in ("hf_dino", "openai_clip.safetensors"):
    model = mrmae_jax.load(TOWERS / name, num_heads=4 if name == "hf_dino" else 0)
    options = teachers.TeacherOptions(path=str(TOWERS / name), layer="normed", dtype="float32")
    teacher = teachers.load(teachers.read_spec(options, teachers.StudentImages((32, 32), 8)))
    expected = jax.jit(teacher.forward)(teacher.params, images).features
    np.testing.assert_allclose(model.encode(images)["tokens"], expected, atol=1e-5)
  with pytest.raises(WeightsError, match="has no place in the format timm.*mrmae export"):
    writers.write_model(model.network, "x.safetensors", "timm")
  with pytest.raises(WeightsError, match="SigLIP.*loads as a teacher alone"):
    readers.read_model(TOWERS / "reject_siglip")


def test_a_vit_for_image_classification_brings_its_classes(tmp_path):
  tensors = load_file(TOWERS / "hf_dino" / "model.safetensors")
  bare = lambda name: name if name.startswith("vit.") else f"vit.{name}"
  rng = np.random.default_rng(0)
  head = {"classifier.weight": rng.standard_normal((3, 48), np.float32)}
  head["classifier.bias"] = np.arange(3, dtype=np.float32)
  tensors = {bare(name): x for name, x in tensors.items() if "pooler" not in name} | head
  save_file(tensors, tmp_path / "model.safetensors")
  config = json.loads((TOWERS / "hf_dino" / "config.json").read_text())
  config["id2label"] = {"0": "cat", "1": "dog", "2": "emu"}
  (tmp_path / "config.json").write_text(json.dumps(config))
  model = mrmae_jax.load(tmp_path)
  assert model.class_names == ("cat", "dog", "emu")
  images = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
  cls = np.asarray(model.encode(images)["cls"])
  expected = cls @ head["classifier.weight"].T + head["classifier.bias"]
  np.testing.assert_allclose(model.classify(images), expected, atol=1e-4)


def dinov2_in_other_names(naming):
  """The tensors of a small DINOv2 of transformers in the names of its authors or of timm."""
  tensors = load_file(TOWERS / "reject_dinov2" / "model.safetensors")
  words = {"attention.output.dense": "attn.proj", "layer_scale": "ls", "lambda1": "gamma"}
  words |= {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
  words |= {"embeddings.position_embeddings": "pos_embed", "encoder.layer": "blocks"}
  words |= {"embeddings.": ""}
  named = {}
  for name, x in tensors.items():
    for old, new in words.items():
      name = name.replace(old, new)
    named[name] = x
  for i in range(2):
    for kind in ("weight", "bias"):
      parts = (f"blocks.{i}.attention.attention.{x}.{kind}" for x in ("query", "key", "value"))
      named[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate([named.pop(x) for x in parts])
  named["mask_token"] = named.pop("mask_token", np.zeros((1, 48), np.float32))
  if naming != "authors":
    del named["mask_token"]
  return named


@pytest.mark.parametrize("naming", ["authors", "timm", "registers", "timm registers"])
def test_dinov2_in_the_names_of_its_authors_and_of_timm(tmp_path, naming):
  tensors = dinov2_in_other_names(naming.split()[0])
  registers = np.ones((1, 4, 48), np.float32)
  table = tensors["pos_embed"]
  if naming == "registers":
    tensors |= {"register_tokens": registers, "mask_token": np.zeros((1, 48), np.float32)}
  if naming == "timm registers":
    cls = tensors["cls_token"] + table[:, :1]
    tensors |= {"reg_token": registers, "cls_token": cls, "pos_embed": table[:, 1:]}
  save_file({name: np.array(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
  read = lambda path: tower_params.read_params(
    towers.open_tower(path, "", towers.Overrides(num_heads=4), "float32"), (4, 4)
  )[0]
  params, expected = read(tmp_path / "x.safetensors"), read(TOWERS / "reject_dinov2")
  rows = [x.pop("cls_token") + x["pos_embed"][:, :1] for x in (params, expected)]
  np.testing.assert_array_equal(*rows)
  np.testing.assert_array_equal(params.pop("pos_embed")[:, 1:], expected.pop("pos_embed")[:, 1:])
  if "registers" in naming:
    np.testing.assert_array_equal(params.pop("registers"), registers)
  flat, expected = (flatten_dict(x, sep="/") for x in (params, expected))
  assert flat.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(flat[name], x)
  model = readers.read_model(tmp_path / "x.safetensors", num_heads=4)
  assert model.encoder.layer_scale and model.encoder.num_registers == 4 * ("registers" in naming)


def test_gated_mlps_of_dinov2_are_told_by_their_width():
  family = families.find_family({"cls_token": (), "blocks.0.ls1.gamma": ()})[0]
  shapes = {"blocks.0.mlp.fc2.weight": (8, 12), "patch_embed.proj.weight": (8, 3, 2, 2)}
  shapes |= {"pos_embed": (1, 5, 8)}
  for width, gated in ((24, True), (12, False)):
    fc1 = {"blocks.0.mlp.fc1.weight": (width, 8)}
    fields, _ = towers.tower_shapes(family, "", shapes | fc1, "x")
    assert (fields["gated"], fields["mlp_dim"]) == (gated, 12)


def test_runs_older_than_the_keys_of_towers_resume():
  config = tiny.get_config("vit")
  assert not config_lib.identity(config).keys() & {f"encoder.{x}" for x in config_lib.TOWER}
  changed = tiny.changed(config, encoder__layer_scale=True)
  assert config_lib.identity(changed)["encoder.layer_scale"] is True


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
  models = options.models if options.command == "evaluate" else [options.model]
  return find_images(options, models), find_view(options, models[0])


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
  assert (images.holdout_every, view["crop"]) == (0, 1.0)
  images, view = images_of("features", "--model=pixels", "--out=x.npz", other)
  assert (images.holdout_every, view["crop"]) == (0, 0.875)


def test_runs_that_hold_out_other_images_are_not_compared(run_of_photos, tmp_path):
  shutil.copytree(run_of_photos / "run", tmp_path / "other")
  config = json.loads((tmp_path / "other/config.json").read_text())
  config["data"]["holdout_every"] = 2
  (tmp_path / "other/config.json").write_text(json.dumps(config))
  words = ["evaluate", f"--models={run_of_photos}/run,{tmp_path}/other"]
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
