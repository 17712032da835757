"""Images that are not RGB at 224 pixels: more channels, gray, sides that differ, an RGB teacher."""

import io
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import mrmae_jax
from mrmae_jax import config as config_lib
from mrmae_jax import data, preflight, teachers, train
from mrmae_jax.cli import show_teacher
from mrmae_jax.data import augment
from mrmae_jax.data.pack import write_packed
from mrmae_jax.errors import ConfigError, DataError, WeightsError
from mrmae_jax.evals import reconstruct
from mrmae_jax.models import ConvViT, Decoder, ViT
from mrmae_jax.tasks import finetune, pretrain, probe
from mrmae_jax.viz import grid
from mrmae_jax.weights import files, loaded_model, writers
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.images import eval_loader, photo, train_steps
from tests.helpers.runs import finished_run

MEAN, STD = (0.1, 0.3, 0.5, 0.7), (0.2, 0.25, 0.3, 0.15)
BANDS = (2, 1, 0)


def multispectral(height, width, seed=0):
  """A photograph and a fourth band: uint8 [H, W, 4]."""
  return np.concatenate(
    [photo(height, width, seed), photo(height, width, seed + 100)[..., :1]], axis=2
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """24 images of four channels and different sizes in two classes; every fourth is held out."""
  root = tmp_path_factory.mktemp("bands")
  for i in range(24):
    (root / "ab"[i % 2]).mkdir(exist_ok=True)
    np.save(root / "ab"[i % 2] / f"{i:02}.npy", multispectral(170 + i, 260 - i, i))
  return root


def bands_config(folder, **values):
  """Pre-training on them with an RGB teacher: 10 x 14 tokens of 16 pixels."""
  c = tiny.changed(
    tiny.get_config("vit"),
    image_size=(160, 224),
    batch_size=8,
    epochs=1.0,
    encoder__patch_size=16,
    teacher__bands=BANDS,
    data__source=f"folder:{folder}",
    data__holdout_every=4,
    data__mean=MEAN,
    data__std=STD,
  )
  return tiny.changed(c, **values)


# Decoding.


def source_of(tmp_path, files_in):
  """Writes {name: array or encoded bytes} to a folder; returns a function from name to example."""
  for name, content in files_in.items():
    if isinstance(content, bytes):
      (tmp_path / name).write_bytes(content)
    elif name.endswith(".npy"):
      np.save(tmp_path / name, content)
    else:
      Image.fromarray(content).save(tmp_path / name)
  source = data.open_source(f"folder:{tmp_path}", "train", holdout_every=0)
  return lambda name: source[[source.name(i) for i in range(len(source))].index(name)]


@pytest.mark.parametrize(
  "shape, order",
  [((5, 7, 4), "C"), ((5, 7, 4), "F"), ((5, 7), "C"), ((5, 7, 1), "C"), ((5, 7, 13), "C")],
)
def test_npy_files_hold_any_number_of_channels(tmp_path, shape, order):
  array = np.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), order=order)
  image = augment.pixels(
    source_of(tmp_path, {"x.npy": array})("x.npy"), shape[2] if len(shape) == 3 else 1
  )
  assert image.dtype == np.uint8 and type(image) is np.ndarray
  np.testing.assert_array_equal(image, array.reshape(5, 7, -1))


def test_grey_and_rgb_become_each_other_and_nothing_else_does(tmp_path):
  rgb, gray, four = photo(20, 30), photo(20, 30)[..., 0], multispectral(20, 30)
  luma, repeated = (
    np.asarray(Image.fromarray(rgb).convert("L"))[..., None],
    np.stack([gray] * 3, axis=2),
  )
  example = source_of(
    tmp_path, {"rgb.png": rgb, "rgb.npy": rgb, "gray.png": gray, "gray.npy": gray, "four.npy": four}
  )
  for name, channels, expected in (
    ("rgb.png", 1, luma),
    ("rgb.npy", 1, luma),
    ("gray.png", 1, gray[..., None]),
    ("gray.npy", 1, gray[..., None]),
    ("gray.png", 3, repeated),
    ("gray.npy", 3, repeated),
    ("rgb.png", 3, rgb),
    ("rgb.npy", 3, rgb),
    ("four.npy", 4, four),
  ):
    np.testing.assert_array_equal(
      augment.pixels(example(name), channels), expected, err_msg=f"{name}, {channels} channels"
    )
  for name, given, channels in (
    ("rgb.png", 3, 4),
    ("four.npy", 4, 3),
    ("four.npy", 4, 1),
    ("gray.npy", 1, 4),
    ("rgb.npy", 3, 2),
  ):
    shape = rf"\(20 x 30 x {given}\)"
    message = f"/{name}: has {given} channels {shape}; expected {channels}, .*config.data.mean"
    with pytest.raises(DataError, match=message):
      augment.pixels(example(name), channels)


def npy_header(shape, dtype="|u1"):
  text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
  text += b" " * (-(len(text) + 11) % 64) + b"\n"
  return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def pickled():
  file = io.BytesIO()
  np.save(file, np.array([print, {}], dtype=object), allow_pickle=True)
  return file.getvalue()


@pytest.mark.parametrize(
  "content, cause",
  [
    (b"", "not an array"),
    (b"<html>404</html>", "not an array"),
    (npy_header((4, 4))[:20], "not an array"),
    (b"\x93NUMPY\x09\x00", "not an array"),
    (npy_header((4, 4)).replace(b"fortran", b"__import"), "not an array"),
    (pickled(), "holds object of shape"),
    (np.zeros((4, 4, 3), np.float32), r"holds float32 of shape \(4, 4, 3\); expected uint8"),
    (np.zeros((4, 4), np.uint16), "holds uint16"),
    (np.zeros(4, np.uint8), "holds uint8 of shape"),
    (np.zeros((2, 4, 4, 3), np.uint8), "holds uint8 of shape"),
    (np.zeros((4, 0, 3), np.uint8), "holds uint8 of shape"),
    (npy_header((-1, 1)) + bytes(9), "holds uint8 of shape"),
    (npy_header((4, 4, 3)) + bytes(47), "is damaged"),
    (npy_header((4, 4, 3)), "is damaged"),
    (
      npy_header((60000, 60000, 4)) + bytes(99),
      r"claims the shape \(60000, 60000, 4\), at most 536,870,912",
    ),
  ],
)
def test_bad_npy_files_are_named(tmp_path, monkeypatch, content, cause):
  example = source_of(tmp_path, {"x.npy": content})
  if (
    isinstance(content, np.ndarray) or b"60000" in content or b"object" in content
  ):  # decided by the header alone
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("read"))
  with pytest.raises(DataError, match=f"/x.npy: .*{cause}") as error:
    example("x.npy")
  assert "\n" not in str(error.value)


# Views.


def test_bands_are_resized_as_those_of_rgb():
  four = multispectral(61, 97)
  rgb = np.ascontiguousarray(four[..., :3])
  rng = np.random.default_rng
  for name, view in {
    "resized": lambda x: augment.resize_pillow(x, (20, 33)),
    "enlarged": lambda x: augment.resize_pillow(x, (70, 120)),
    "crop": lambda x: augment.random_resized_crop(x, rng(3), (24, 40)),
    "centre": lambda x: augment.center_crop(x, (24, 40)),
    "flip": lambda x: augment.random_flip(x, rng(1)),
  }.items():
    expected, found = view(rgb), view(four)
    assert found.dtype == np.uint8 and found.shape == (*expected.shape[:2], 4)
    np.testing.assert_array_equal(found[..., :3], expected, err_msg=name)
    assert (found[..., 3] != found[..., 0]).any()
    for band in range(4):
      np.testing.assert_array_equal(
        view(four[..., band : band + 1]), found[..., band : band + 1], err_msg=name
      )


def test_batches_of_bands_are_those_of_rgb(tmp_path):
  for name, part in (("four", slice(0, 4)), ("rgb", slice(0, 3))):
    (tmp_path / name).mkdir()
    for i in range(5):
      np.save(tmp_path / name / f"{i}.npy", multispectral(40 + i, 60, i)[..., part])
  four, rgb = (
    data.open_source(f"folder:{tmp_path}/{name}", "train", holdout_every=0)
    for name in ("four", "rgb")
  )
  expected, found = train_steps(rgb, 3), train_steps(four, 3, channels=4)
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_array_equal(b["image"][..., :3], a["image"])
  np.testing.assert_array_equal(
    train_steps(four, 1, channels=4, workers=1)[0]["image"], found[0]["image"]
  )
  options = dict(batch_size=4, image_size=(16, 24), crop_pct=0.9)
  for a, b in zip(
    eval_loader(rgb, **options), eval_loader(four, channels=4, **options), strict=True
  ):
    np.testing.assert_array_equal(b["image"][..., :3], a["image"])
    assert b["image"].shape == (4, 16, 24, 4) and not b["image"][~b["valid"]].any()
  with pytest.raises(DataError, match="has 4 channels"):
    train_steps(four, 1)
  with pytest.raises(DataError, match="randaug='rand-inc1' given; of 4 channels"):
    train_steps(four, 1, channels=4, randaug="rand-inc1")


def test_noise_has_the_statistics_of_each_channel():
  image, mean, std = (
    np.full((120, 120, 5), 7, np.uint8),
    np.array([0.2, 0.3, 0.4, 0.5, 0.6]),
    np.array([0.01, 0.02, 0.03, 0.04, 0.05]),
  )
  erased = (
    np.concatenate(
      [
        (x := augment.random_erase(image, np.random.default_rng(i), 1.0, tuple(mean), tuple(std)))[
          (x != 7).all(2)
        ]
        for i in range(20)
      ]
    )
    / 255
  )
  assert len(erased) > 10_000
  np.testing.assert_allclose(erased.mean(0), mean, atol=0.003)
  np.testing.assert_allclose(erased.std(0), std, atol=0.003)


def test_packed_bands(folder, tmp_path):
  source = data.open_source(f"folder:{folder}", "train", holdout_every=4)
  for short_side in (0, 64):
    write_packed(
      {"train": source}, tmp_path / str(short_side), {"source": "x"}, short_side=short_side
    )
    copy = data.open_source(f"packed:{tmp_path}/{short_side}", "train")
    for i in (0, 17):
      image = augment.pixels(source[i])
      height, width = image.shape[:2]
      expected = augment.resize_pillow(image, (64, width * 64 // height)) if short_side else image
      np.testing.assert_array_equal(augment.pixels(copy[i], 4), expected)


def test_verify_counts_channels(folder, tmp_path, capsys):
  command = [
    "verify",
    f"--source=folder:{folder}",
    "--holdout_every=0",
    "--splits=train",
    "--workers=1",
  ]
  assert run_command([*command, "--channels=4", f"--json={tmp_path}/report.json"]) == 0
  statistics = json.loads((tmp_path / "report.json").read_text())["train"]
  pixels = np.concatenate([np.load(path).reshape(-1, 4) for path in folder.glob("*/*.npy")]) / 255
  assert (
    statistics["pixels"] == len(pixels)
    and statistics["format"] == {"pixels": 24}
    and statistics["bad"] == 0
  )
  np.testing.assert_allclose(statistics["mean"], pixels.mean(0), rtol=1e-9)
  np.testing.assert_allclose(statistics["std"], pixels.std(0), rtol=1e-9)
  capsys.readouterr()
  assert run_command(command) == 3
  assert "24 of 24 images are bad, the first: a/00.npy: has 4 channels" in capsys.readouterr().err
  assert (
    run_command(["verify", "--source=digits", "--splits=eval", "--workers=1", "--channels=1"]) == 0
  )
  assert len(json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")["eval"]["mean"]) == 1


# What is refused before anything is read.


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(data__std=STD[:3]), "must hold a number each for every channel"),
    (dict(data__mean=(), data__std=()), "must hold a number each"),
    (dict(data__std=(0.2, 0.2, 0.0, 0.2)), "must satisfy 0 < x <= 1"),
    (dict(data__mean=(0.1, 0.2, float("nan"), 0.4)), r"must lie in \[0, 1\]"),
    (
      dict(data__randaug="rand-m9-inc1"),
      "config.data.randaug='rand-m9-inc1' is for RGB; leave it empty for images of 4 channels",
    ),
    (
      dict(teacher__bands=()),
      r"config.teacher: bands=\(\) given; images have 4 channels \(config.data.mean\), "
      ".*hf_clip_full sees 3: give",
    ),
    (
      dict(teacher__bands=(0, 1)),
      r"bands=\(0, 1\) given.*from 0 to 3, those of red, green and blue",
    ),
    (dict(teacher__bands=(0, 1, 4)), "from 0 to 3"),
    (dict(teacher__bands=(-1, 1, 2)), "must be from 0 to 1000"),
    (
      dict(data__mean=(0.5, 0.5), data__std=(0.2, 0.2), teacher__bands=()),
      "images have 2 channels",
    ),
  ],
)
def test_configurations_that_do_not_fit(folder, values, message):
  preflight.check(bands_config(folder), 8)
  with pytest.raises(ConfigError, match=message):
    preflight.check(bands_config(folder, **values), 8)


# The teacher.


def look(config, images):
  teacher = teachers.load(teachers.configured_spec(config.teacher, config))
  return np.asarray(jax.jit(teacher.forward)(teacher.params, images).features)


def test_a_teacher_sees_three_channels_of_many():
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 4), np.uint8)
  rgb, four = (
    tiny.get_config(),
    tiny.changed(tiny.get_config(), data__mean=MEAN, data__std=STD, teacher__bands=(3, 1, 0)),
  )
  seen = np.ascontiguousarray(images[..., [3, 1, 0]])
  np.testing.assert_array_equal(look(four, images), look(rgb, seen))
  assert np.abs(look(four, images) - look(rgb, images[..., :3])).max() > 0.1
  assert "of channels 3, 1, 0" in teachers.configured_spec(four.teacher, four).description
  # The student's statistics are those of these channels.
  four.teacher.input_norm = rgb.teacher.input_norm = "student"
  rgb.data.update(mean=(MEAN[3], MEAN[1], MEAN[0]), std=(STD[3], STD[1], STD[0]))
  np.testing.assert_array_equal(look(four, images), look(rgb, seen))


def test_a_teacher_sees_grey_in_each_of_its_channels():
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 1), np.uint8)
  gray = tiny.changed(tiny.get_config(), data__mean=(0.4,), data__std=(0.3,))
  np.testing.assert_array_equal(look(gray, images), look(tiny.get_config(), images.repeat(3, 3)))
  assert (
    "channels"
    not in teachers.configured_spec(tiny.get_config().teacher, tiny.get_config()).description
  )


def test_an_encoder_of_four_channels_is_a_teacher_for_four(tmp_path):
  model, params = finished_run(tmp_path, "vit", data__mean=MEAN, data__std=STD)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 4), np.uint8)
  config = tiny.changed(
    tiny.get_config(),
    data__mean=MEAN,
    data__std=STD,
    teacher__path=f"checkpoint:{tmp_path}",
    teacher__layer="normed",
  )
  expected, _ = model.encoder.apply(
    {"params": params["encoder"]}, (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
  )
  np.testing.assert_allclose(look(config, images), expected[:, 1:], atol=1e-5)
  config.data.update(mean=MEAN[:3], std=STD[:3])
  with pytest.raises(
    WeightsError, match="images have 3 channels .* sees 4: give the 4 that it sees"
  ):
    teachers.configured_spec(config.teacher, config)


# Weights.


CONVVIT = ConvViT((2, 2, 2), (8, 12, 16), (1, 1, 1), 2, (2.0, 3.0, 2.5))
VIT = ViT(8, 16, 1, 2, 36)


def student_of(encoder, channels, grid=(3, 5)):
  decoder, rng = Decoder(8 * 8 * channels, 12, 1, 3, 2), np.random.default_rng(0)
  shapes = loaded_model.param_shapes(encoder, decoder, grid, channels=channels)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.3, shapes)
  return loaded_model.LoadedModel(
    encoder,
    decoder,
    params,
    grid,
    (MEAN * 2)[:channels],
    (STD * 2)[:channels],
    {"mask_ratio": 0.6, "norm_pix": False},
    True,
    None,
  )


@pytest.mark.parametrize(
  "form, channels",
  [
    *(pytest.param("convmae", n, marks=pytest.mark.variant) for n in (1, 4)),
    ("timm", 7),
    ("hf", 2),
  ],
)
def test_files_keep_the_channels(tmp_path, form, channels):
  student = student_of(CONVVIT if form == "convmae" else VIT, channels)
  path = tmp_path / ("hf" if form == "hf" else "x.safetensors")
  writers.write_model(student, path, form)
  tensors = files.open_weights(path)
  name = {
    "convmae": "patch_embed1.proj.weight",
    "timm": "patch_embed.proj.weight",
    "hf": "vit.embeddings.patch_embeddings.projection.weight",
  }[form]
  assert tensors[name].shape[1] == channels
  if form == "hf":
    assert json.loads((path / "config.json").read_text())["num_channels"] == channels
  model = mrmae_jax.load(path)
  assert (model.config["mean"], model.config["std"], model.config["grid"]) == (
    student.mean,
    student.std,
    (3, 5),
  )
  found, expected = (
    flatten_dict(model.network.params, sep="/"),
    flatten_dict(student.params, sep="/"),
  )
  assert found.keys() == expected.keys() and all(
    np.array_equal(found[name], x) for name, x in expected.items()
  )
  images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, channels), np.uint8)
  assert (
    model.encode(images)["pooled"].shape == (2, 16)
    and model.reconstruct(images)["pasted"].shape == images.shape
  )
  with pytest.raises(ValueError, match=rf"expected \[B, H, W, {channels}\]"):
    model.encode(np.zeros((2, 24, 40, channels + 1), np.uint8))
  fresh = flatten_dict(loaded_model.untrained(student).params["encoder"], sep="/")
  assert {name: x.shape for name, x in fresh.items()} == {
    name: x.shape for name, x in flatten_dict(student.params["encoder"], sep="/").items()
  }


def test_foreign_files_that_do_not_tell_their_statistics(tmp_path):
  student = student_of(VIT, 4)
  writers.write_model(student, tmp_path / "notes.safetensors", "timm")
  tensors = {
    name: np.asarray(x) for name, x in files.open_weights(tmp_path / "notes.safetensors").items()
  }
  files.write_safetensors(tmp_path / "bare.safetensors", tensors)
  given = dict(num_heads=2, decoder_heads=2, grid=(3, 5))
  with pytest.raises(
    WeightsError, match=r"takes images of 4 channels and tells of mean \(\) and std \(\); give both"
  ):
    mrmae_jax.load(tmp_path / "bare.safetensors", **given)
  with pytest.raises(WeightsError, match="takes images of 4 channels"):
    mrmae_jax.load(tmp_path / "bare.safetensors", **given, mean=MEAN[:3], std=STD[:3])
  assert (
    mrmae_jax.load(tmp_path / "bare.safetensors", **given, mean=MEAN, std=STD).config["mean"]
    == MEAN
  )


def test_weights_for_rgb_do_not_start_a_run_on_four_channels(folder, tmp_path):
  finished_run(tmp_path)
  config = config_lib.finetune()
  config_lib.start_from(config, str(tmp_path))
  config.data.update(source=f"folder:{folder}", mean=MEAN, std=STD, randaug="")
  config.image_size = (160, 224)
  for task in (finetune, probe):
    with pytest.raises(
      WeightsError,
      match="takes images of 3 channels, config.data.mean has 4; weights cannot"
      " be converted between numbers of channels",
    ):
      task.make(tiny.changed(config, optim__grid=(1.0,)) if task is probe else config)


# Whole runs.


@pytest.mark.variant
def test_grey_images_train(tmp_path, capsys):
  config = tiny.changed(tiny.get_config("vit"), data__mean=(0.3,), data__std=(0.35,))
  preflight.check(config, 8)
  task = pretrain.make(config)
  params = train.check(config, task).params
  assert params["encoder"]["patch_embed"]["kernel"].shape == (8 * 8 * 1, 24)
  assert params["decoder"]["pred"]["kernel"].shape == (16, 8 * 8 * 1)
  assert "skipped 0" in capsys.readouterr().out
  predict = lambda params, extra, frozen, batch, keys: dict.fromkeys(
    reconstruct.COLUMNS, batch["image"] / 255
  )
  evaluator = reconstruct.Evaluator(
    task._replace(predict=predict), {}, config, train.sharding.make_mesh(), tmp_path, images=2
  )
  ((path, picture),) = evaluator.run({}, (), 0)["pictures"].items()
  assert (
    path.suffix == ".png"
    and np.ptp(picture.astype(int), axis=2).max() == 0
    and len(np.unique(picture)) > 20
  )


@pytest.mark.parametrize(
  "channels, bands, expected, caption",
  [
    (1, (), [0, 0, 0], ""),
    (2, (1, 0, 1), [1, 0, 1], "channels 1, 0, 1 as RGB"),
    (2, (), [0, 1, 1], "channels 0, 1, 1 as RGB"),
    (3, (2, 1, 0), [0, 1, 2], ""),
    (4, BANDS, [2, 1, 0], "channels 2, 1, 0 as RGB"),
    (4, (0, 1, 2, 3), [0, 1, 2], "channels 0, 1, 2 as RGB"),
  ],
)
def test_channels_that_are_shown(channels, bands, expected, caption):
  config = tiny.changed(tiny.get_config(), data__mean=(0.5,) * channels, teacher__bands=bands)
  assert grid.bands_shown(config) == (expected, caption)


# From files of four channels to features, at 160 x 224 pixels, with an RGB teacher.


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """A pre-training run; the other tests read it."""
  path = tmp_path_factory.mktemp("bands_run") / "run"
  config = bands_config(folder)
  config.evals.knn.update(k=3)
  preflight.check(config, 8)
  task = pretrain.make(config)
  state = train.fit(config, task, path)
  assert train.identity(config, task)["teacher.bands"] == list(BANDS)
  assert state.params["encoder"]["patch_embed"]["kernel"].shape == (16 * 16 * 4, 24)
  return path


@pytest.fixture(scope="module")
def held_out_views(folder):
  """Evaluation views of the first two images that are held out, uint8 [2, 160, 224, 4]."""
  source = data.open_split(bands_config(folder).data, "eval")
  return np.stack([augment.center_crop(augment.pixels(source[i]), (160, 224)) for i in range(2)])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  """The pre-trained model in the format of Hugging Face."""
  path = tmp_path_factory.mktemp("bands_hf") / "hf"
  assert run_command(["convert", f"--model={run}", f"--out={path}", "--format=hf"]) == 0
  return path


def read_records(path):
  return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_four_channels_pretrain(run, held_out_views):
  records = read_records(run)
  losses = [(r["mimic"], r["pixel"]) for r in records if "mimic" in r]
  assert len(losses) == 2 and np.isfinite(losses).all()
  assert any("knn/accuracy" in r for r in records)
  picture = np.asarray(Image.open(run / "reconstructions" / "step_0000002.png"))
  # The first picture of the first column is the image.
  np.testing.assert_array_equal(picture[20:180, 4:228], held_out_views[0][..., BANDS])


def test_four_channels_are_visualized(run, folder, tmp_path):
  out, panels = tmp_path / "look", "reconstruction,attention,pca,cosine,neighbors"
  command = ["visualize", f"--model={run}", "--count=2", f"--out={out}", f"--panels={panels}"]
  assert run_command(command) == 0
  picture = np.asarray(Image.open(out / "reconstruction.png"))
  source = data.open_split(bands_config(folder).data, "eval")
  image = augment.center_crop(augment.pixels(source[0]), (160, 224), 1.0)[..., BANDS]
  heights = range(len(picture) - 160)
  assert sum((picture[y : y + 160, 4:228] == image).all() for y in heights) == 1
  assert "channels 2, 1, 0 as RGB" in (out / "index.html").read_text()


@pytest.mark.variant
def test_four_channels_finetune(run, held_out_views, tmp_path):
  config = config_lib.finetune()
  config_lib.start_from(config, str(run))
  tiny.changed(
    config,
    batch_size=8,
    epochs=1.0,
    data__randaug="",
    data__erase_prob=0.5,
    evals__accuracy__batch_size=8,
    optim__warmup_epochs=0.5,
  )
  preflight.check(config, 8)
  assert config.data.mean == MEAN and config.image_size == (160, 224)
  train.fit(config, finetune.make(config), tmp_path / "tuned")
  assert read_records(tmp_path / "tuned")[-1]["accuracy/images"] == 6
  out = tmp_path / "tuned.safetensors"
  assert run_command(["convert", f"--model={tmp_path}/tuned", f"--out={out}", "--format=timm"]) == 0
  assert mrmae_jax.load(out).classify(held_out_views).shape == (2, 2)


def test_four_channels_exported(run, exported, held_out_views, folder, tmp_path):
  model = mrmae_jax.load(exported)
  expected = {"mean": MEAN, "image_size": (160, 224), "grid": (10, 14)}
  assert {name: model.config[name] for name in expected} == expected
  features = model.encode(held_out_views)
  trained = mrmae_jax.load(run).encode(held_out_views)
  np.testing.assert_array_equal(features["tokens"], trained["tokens"])
  assert features["tokens"].shape == (2, 140, 24)
  assert np.abs(features["pooled"][0] - features["pooled"][1]).max() > 1e-4
  assert model.reconstruct(held_out_views)["pasted"].shape == (2, 160, 224, 4)
  images = [f"--images=folder:{folder}", "--split=eval", "--holdout_every=4"]
  assert run_command(["features", f"--model={exported}", *images, f"--out={tmp_path}/x.npz"]) == 0
  archive = np.load(tmp_path / "x.npz")
  np.testing.assert_allclose(archive["features"][:2], features["pooled"], atol=1e-5)
  assert archive["features"].shape == (6, 24)


@pytest.mark.variant
def test_doctor_and_show_teacher_on_four_channels(folder, tmp_path, examine):
  code, out = examine(
    "image_size=(160, 224)",
    "batch_size=8",
    "epochs=1",
    "encoder.patch_sizes=(4, 2, 2)",
    f"data.source=folder:{folder}",
    f"data.mean={MEAN}",
    f"data.std={STD}",
    f"teacher.bands={BANDS}",
    f"--out={tmp_path}/views.png",
    config="tests/tiny.py",
  )
  assert code == 0 and "of channels 2, 1, 0" in out and "deviation" not in out, out
  config = bands_config(folder)
  images = np.stack([multispectral(160, 224, i) for i in range(2)])
  picture = show_teacher.draw_teacher(images, show_teacher.run_teacher(config, images)[1], config)
  np.testing.assert_array_equal(picture[20:180, 4:228], images[0][..., BANDS])
