"""UperNet on ConvViT and ViT equals the published networks, on weights in mmsegmentation's names.

Each case is NAME.json (dimensions) and NAME.safetensors (inputs, weights, outputs, gradients) in
the folder MRMAE_SEGMENTATION_GOLDENS, by default tests/goldens/segmentation.
"""

import csv
import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

import mrmae_jax
from mrmae_jax import bilinear, mrmae, segmentation
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ConvViT, ViT, maps, upernet
from mrmae_jax.models.layers import Mask
from mrmae_jax.pretrained import PretrainedModel
from mrmae_jax.viz import grid
from mrmae_jax.weights import loaded_model, mmseg, readers, writers
from mrmae_jax.weights.model_sources import METADATA_KEY
from mrmae_jax.weights.table import convert, export
from tests.helpers.cli import run_command
from tests.helpers.goldens import close, read_tensors
from tests.helpers.images import photo
from tests.helpers.models import make_segmenter, make_student

GOLDENS = Path(
  os.environ.get("MRMAE_SEGMENTATION_GOLDENS", Path(__file__).parent / "goldens" / "segmentation")
)
FORWARD, GRADIENT = 1e-5, 1e-4  # relative to the largest entry, of gradients to that of all
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*.json"))}
NETWORKS = [name for name, case in CASES.items() if "image_size" in case and "channels" in case]


def named(name, prefix):
  return read_tensors(GOLDENS, name, prefix)


def channels_last(x):
  return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def channels_first(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


def check_training(expected, case, loss, params, stats, table):
  """Compares losses, logits, every gradient and running statistic of one training step."""
  (total, (logits, aux, moved, parts)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  out = expected("out.")
  close(total[None], out["loss.total"], FORWARD, "loss")
  for name, value in parts.items():
    close(value[None], out[f"loss.{name}"], FORWARD, name)
  close(channels_first(logits), out["train.decode"], FORWARD, "train.decode")
  close(channels_first(aux), out["train.aux"], FORWARD, "train.aux")
  running = expected("running.")
  ours = export({**params, "batch_stats": moved}, table)
  for name, x in running.items():
    close(ours[name], x, FORWARD, name)
  theirs = expected("grad.param.")
  ours = export({**gradients, "batch_stats": stats}, table)
  assert theirs.keys() == ours.keys() - running.keys()
  largest = max(np.abs(x).max() for x in theirs.values())
  for name, x in theirs.items():
    close(ours[name], x, GRADIENT, f"gradient of {name}", largest)


def losses(logits, aux, label):
  """The loss of training, and its parts as the cases name them."""
  parts = {
    f"{head}_{kind}": segmentation.cross_entropy(x, label, of_all=kind == "all")
    for head, x in (("decode", logits), ("aux", aux))
    for kind in ("all", "valid")
  }
  parts["aux_all_weighted"] = 0.4 * parts.pop("aux_all")
  return parts["decode_all"] + parts["aux_all_weighted"], parts


def test_the_folder_holds_cases():
  assert CASES


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "in_channels" in case])
def test_heads_alone(name):
  case, expected = CASES[name], lambda prefix: named(name, prefix)
  inputs = expected("in.")
  levels = [channels_last(inputs[f"level{i}"]) for i in range(4)]
  head = upernet.UperHead(case["num_classes"], case["channels"], tuple(case["pool_scales"]))
  aux_head = upernet.FCNHead(case["num_classes"], case["aux_channels"])
  aux_level, label = levels[case["aux_level"]], jnp.asarray(inputs["label"])
  shapes = {
    "decode_head": jax.eval_shape(head.init, jax.random.key(0), levels),
    "auxiliary_head": jax.eval_shape(aux_head.init, jax.random.key(0), aux_level),
  }
  table = mmseg.head_table(len(case["pool_scales"]), has_aux=True)
  tree = {
    "segmenter": {name: x["params"] for name, x in shapes.items()},
    "batch_stats": {name: x["batch_stats"] for name, x in shapes.items()},
  }
  params = convert(expected("param."), table, tree, source=name)
  stats = params.pop("batch_stats")

  def apply(params, levels, keep=(None, None), **options):
    out = []
    for module, part, x, mask in zip(
      (head, aux_head), shapes, (levels, levels[case["aux_level"]]), keep
    ):
      variables = {"params": params["segmenter"][part], "batch_stats": stats[part]}
      out.append(module.apply(variables, x, keep=mask, **options))
    return out

  keep = [jnp.asarray(inputs[f"keep.{part}"]) for part in shapes]
  for kind, masks in (("eval", (None, None)), ("dropout", keep)):
    mode = dict(train=True, mutable=["batch_stats"]) if kind == "dropout" else {}
    logits = jax.jit(lambda levels: apply(params, levels, masks, **mode))(levels)
    for x, part in zip(logits, ("decode", "aux")):
      x = x[0] if mode else x
      close(channels_first(x), expected("out.")[f"{kind}.{part}"], FORWARD, f"{kind}.{part}")

  def loss(params, levels=levels):
    (logits, moved), (aux, aux_moved) = apply(params, levels, train=True, mutable=["batch_stats"])
    moved = {"decode_head": moved["batch_stats"], "auxiliary_head": aux_moved["batch_stats"]}
    total, parts = losses(logits, aux, label)
    return total, (logits, aux, moved, parts)

  check_training(expected, case, loss, params, stats, table)
  gradients = jax.jit(jax.grad(lambda levels: loss(params, levels)[0]))(levels)
  theirs = expected("grad.in.")
  for i, x in enumerate(gradients):
    close(channels_first(x), theirs[f"level{i}"], GRADIENT, f"gradient of level{i}")


def stored(tmp_path, name):
  """The model of a case, out of a file in the published names."""
  case, path = CASES[name], tmp_path / f"{name}.safetensors"
  save_file({key: np.ascontiguousarray(x) for key, x in named(name, "param.").items()}, path)
  return readers.read_model(path, **hints_of(case))


def hints_of(case):
  patch = 16
  return dict(
    grid=tuple(side // patch for side in case["image_size"]),
    num_heads=case["num_heads"],
    levels=tuple(case.get("out_indices", ())),
  )


@pytest.mark.parametrize(
  "name",
  [pytest.param(x, marks=() if x.startswith("conv") else pytest.mark.variant) for x in NETWORKS],
)
def test_levels_logits_losses_gradients_and_statistics(tmp_path, name):
  case, expected, model = CASES[name], lambda prefix: named(name, prefix), stored(tmp_path, name)
  segmenter, inputs = model.segmenter, expected("in.")
  images, label = channels_last(inputs["image"]), jnp.asarray(inputs["label"])
  params = dict(model.params)
  stats = params.pop("batch_stats")
  variables = lambda params: {
    "params": {"encoder": params["encoder"], **params["segmenter"]},
    "batch_stats": stats,
  }
  logits, out = jax.jit(segmenter.apply)(variables(params), images)
  theirs = expected("out.")
  close(channels_first(logits), theirs["eval.decode"], FORWARD, "eval.decode")
  close(channels_first(out["aux"]), theirs["eval.aux"], FORWARD, "eval.aux")
  for i, level in enumerate(out["levels"]):
    close(channels_first(level), theirs[f"eval.level{i}"], FORWARD, f"eval.level{i}")

  def loss(params):
    (logits, out), moved = segmenter.apply(
      variables(params), images, train=True, mutable=["batch_stats"]
    )
    total, parts = losses(logits, out["aux"], label)
    return total, (logits, out["aux"], moved["batch_stats"], parts)

  params["encoder"].pop("norm")  # of pre-training; nothing reads it
  norm = {"scale": jnp.ones(segmenter.encoder.dim), "bias": jnp.zeros(segmenter.encoder.dim)}
  with_norm = lambda params: params | {"encoder": params["encoder"] | {"norm": norm}}
  table = mmseg.segmenter_table(segmenter)
  check_training(expected, case, lambda x: loss(with_norm(x)), params, stats, table)


def windows_of(name):
  """The network of a case: a convolution whose border depends on where a window ends."""
  param = named(name, "param.")
  kernel, bias = jnp.asarray(param["weight"].transpose(2, 3, 1, 0)), jnp.asarray(param["bias"])

  def network(x):
    dimensions = ("NHWC", "HWIO", "NHWC")
    options = dict(window_strides=(4, 4), padding=((2, 2), (2, 2)))
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=dimensions, **options) + bias

  slide = jax.jit(functools.partial(segmentation.slide, network), static_argnames="crop")
  return lambda rule: lambda v: slide(v.pixels, v.starts, v.count, crop=rule.crop)


def image_of(x):
  return np.ascontiguousarray(x.transpose(1, 2, 0))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("slide")])
def test_sliding_windows(name):
  expected, networks = named(name, "out."), windows_of(name)
  for key, case in CASES[name]["cases"].items():
    pixels = image_of(named(name, f"in.{key}.image")[""])
    # The reference's window is as small as the image, which a ViT cannot read; ours is padded.
    crop = tuple(np.minimum(case["crop"], case["image"]).tolist())
    rule = segmentation.Rule(crop, tuple(case["stride"]))
    view = segmentation.make_view(pixels, (0.5,) * 3, rule)
    corners = [window[:2] for window in case["windows"]]
    assert view.starts[: view.count].tolist() == corners
    height, width = case["image"]
    logits = networks(rule)(view)
    theirs = expected[f"{key}.logits"].transpose(1, 2, 0)
    close(logits[:height, :width], theirs, FORWARD, f"{key}.logits")
    labels = segmentation.predict(networks(rule), [view], tuple(case["original"]))
    np.testing.assert_array_equal(labels, expected[f"{key}.prediction"])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("flip")])
def test_mirrored_and_scaled_views(name):
  case, expected, inputs = CASES[name], named(name, "out."), named(name, "in.")
  rule = segmentation.Rule(tuple(case["crop"]), tuple(case["stride"]))
  views = [
    segmentation.make_view(image_of(inputs[f"view{i}"]), (0.5,) * 3, rule, is_mirrored)
    for i, (_, is_mirrored) in enumerate(case["views"])
  ]
  network, size = windows_of(name)(rule), tuple(case["original"])
  maps = [network(view) for view in views]
  bands = np.concatenate(list(segmentation.mean_probabilities(maps, views, size)))
  close(bands.transpose(2, 0, 1), expected["probabilities"], FORWARD, "probabilities")
  labels = segmentation.predict(network, views, size)
  np.testing.assert_array_equal(labels, expected["prediction"])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("resize_law")])
def test_sizes_and_resized_images(name):
  for row in CASES[name]["table"]:
    width, height, ratio, long, short, new_width, new_height = row
    if (long, short) == (int(2048 * ratio), int(512 * ratio)):
      assert bilinear.fit_size((height, width), 512, ratio) == (new_height, new_width)
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  for key in [key for key in tensors if key.startswith("out.image_cv2_")]:
    theirs, number = tensors[key].astype(int), key.removeprefix("out.image_cv2_")
    ours = bilinear.resize_image(tensors[f"in.image{number}"], theirs.shape[:2])
    assert np.abs(ours - theirs).max() <= 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The file of `make_segmenter`."""
  path = tmp_path_factory.mktemp("segmentation") / "model.safetensors"
  writers.write_model(make_segmenter(), path, "mmseg")
  return path


def same_params(actual, expected):
  actual, expected = (flatten_dict(x, sep="/") for x in (actual, expected))
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(actual[name], x, err_msg=name)


def test_a_written_file_gives_the_model_bit_for_bit(written):
  model, expected = readers.read_model(written), make_segmenter()
  for field in ("encoder", "segmenter", "grid", "mean", "std", "classes", "has_norm"):
    assert getattr(model, field) == getattr(expected, field)
  same_params(model.params, expected.params)


def test_a_file_of_the_authors_goes_in_and_out(tmp_path):
  pytest.importorskip("torch")
  for file in GOLDENS.glob("*_released.pth"):
    name = file.stem.removesuffix("_released")
    model = readers.read_model(file, **hints_of(CASES[name]))
    assert model.classes == tuple(f"class {i}" for i in range(CASES[name]["num_classes"]))
    assert "counters and table indices" in str(model.report)
    assert "statistics (28 tensors)" in str(model.report)
    same_params(model.params, stored(tmp_path, name).params)
    out = tmp_path / "out.safetensors"
    writers.write_model(model, out, "mmseg")
    theirs = named(name, "param.")
    assert load_file(out).keys() == theirs.keys()
    for key, x in load_file(out).items():
      np.testing.assert_array_equal(x, theirs[key], err_msg=key)
    same_params(readers.read_model(out).params, model.params)


def test_its_encoder_can_be_written_and_read_alone(tmp_path, written):
  for model, form in (
    (readers.read_model(written), "timm"),
    *((stored(tmp_path, x), "convmae") for x in NETWORKS if x.startswith("convmae")),
  ):
    out = tmp_path / f"{form}.safetensors"
    writers.write_model(loaded_model.encoder_only(model), out, form)
    alone = readers.read_model(out)
    assert alone.encoder == model.encoder and not alone.has_norm and alone.segmenter is None
    same_params(alone.params["encoder"], model.params["encoder"])


def test_files_that_do_not_fit_are_named(tmp_path, written):
  tensors = load_file(written)

  def refused(message, change, **hints):
    path = tmp_path / "changed.safetensors"
    changed = dict(tensors)
    change(changed)
    save_file({name: np.ascontiguousarray(x) for name, x in changed.items()}, path)
    with pytest.raises(WeightsError, match=message):
      readers.read_model(path, **hints)

  nothing = lambda x: None
  refused("levels=.0, 1, 2, 9. are not four of the blocks 0 to 3", nothing, levels=(0, 1, 2, 9))
  refused(
    "missing: decode_head.fpn_bottleneck.bn.running_var", remove("fpn_bottleneck.bn.running_var")
  )
  refused("unknown: decode_head.extra", lambda x: x.update({"decode_head.extra": np.ones(3)}))
  refused("conv_seg.weight is missing", remove("decode_head.conv_seg"))
  refused("psp_modules has 3 pooled maps, expected 4", remove("psp_modules.3"))
  refused("missing: auxiliary_head", remove("auxiliary_head.conv_seg.bias"))
  refused("gamma|relative", remove("blocks.2.attn.relative_position_bias_table"))
  refused("non-finite", lambda x: x.update({"decode_head.conv_seg.bias": np.full(4, np.nan)}))


def remove(part):
  def change(tensors):
    for name in [name for name in tensors if part in name]:
      del tensors[name]

  return change


def test_other_models_do_not_segment_and_say_what_they_hold():
  vit = ViT(8, 16, 1, 2, 32)
  images = np.zeros((1, 32, 32, 3), np.uint8)
  report = loaded_model.Report("x.pth", "", (), (), ())
  classifier = PretrainedModel(make_student(vit, None, classes=3)._replace(report=report))
  with pytest.raises(WeightsError, match=r"x.pth holds a classifier \(head \[3, 16\]\) and no dec"):
    classifier.segment(images)
  encoder = PretrainedModel(make_student(vit, None)._replace(report=report))
  with pytest.raises(WeightsError, match="holds no decode_head"):
    encoder.segment(images)


def test_images_of_any_size_are_segmented_with_few_programs(written):
  model = mrmae_jax.load(written)
  sizes = [(50, 71), (50, 72), (52, 75), (20, 20), (9, 200), (32, 32)]
  images = [photo(*size, seed=i) for i, size in enumerate(sizes)]
  labels = model.segment([*images, Image.fromarray(images[0]), images[0] / np.float32(255)])
  assert [x.shape for x in labels[:6]] == sizes and {x.dtype for x in labels} == {
    np.dtype(np.uint8)
  }
  assert len({int(v) for x in labels for v in np.unique(x)}) > 1
  for same in labels[6:]:
    np.testing.assert_array_equal(same, labels[0])
  assert model._slide._cache_size() == 3  # buckets, not sizes: 32 x 48, 32 x 32 and 32 x 128
  assert [model.segment(np.stack([x] * 2))[1].shape for x in images[:1]] == sizes[:1]
  # One window of the size of training is the network itself.
  direct = model.network.segmenter.apply(
    {
      "params": {"encoder": model.network.params["encoder"], **model.network.params["segmenter"]},
      "batch_stats": model.network.params["batch_stats"],
    },
    mrmae.normalize(images[5][None], model.network.mean, model.network.std),
  )[0]
  expected = maps.resize(direct, (32, 32))[0].argmax(-1)
  assert np.mean(labels[5] == expected) > 0.999
  whole = model.segment(images[5:], mode="whole")[0]
  np.testing.assert_array_equal(whole, labels[5])
  assert model.segment(images[5:], scales=(0.5, 1), flip=True)[0].shape == sizes[5]


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(mode="all"), "mode='all' given; expected slide or whole"),
    (dict(stride=(0, 8)), "at least 1 and at most the window's"),
    (dict(stride=(33, 8)), "at least 1 and at most the window's"),
    (dict(scales=()), "expected numbers above 0"),
    (dict(scales=(0.0,)), "expected numbers above 0"),
  ],
)
def test_impossible_ways_to_look_are_refused(written, options, message):
  model = mrmae_jax.load(written)
  with pytest.raises(ValueError, match=message):
    model.segment(np.zeros((1, 32, 32, 3), np.uint8), **options)
  with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
    model.segment(np.zeros((32, 32, 3), np.uint8))


@pytest.fixture
def photos(tmp_path):
  """A folder with two images in different sub-folders, and one that is damaged."""
  for i, name in enumerate(("a/x.jpg", "b/x.png")):
    (tmp_path / "photos" / name).parent.mkdir(parents=True)
    Image.fromarray(photo(40 + 8 * i, 60, seed=i)).save(tmp_path / "photos" / name)
  (tmp_path / "photos" / "b" / "broken.jpg").write_bytes(b"<html>")
  return tmp_path / "photos"


def test_predict_writes_label_pictures(written, photos, tmp_path, capsys):
  words = ["predict", f"--models={written}", f"--images=folder:{photos}", f"--out={tmp_path}/out"]
  assert run_command(words) == 3
  assert "broken.jpg" in capsys.readouterr().err and not (tmp_path / "out").exists()
  assert run_command([*words, "--on_error=skip", "--max_skipped=0.5"]) == 0
  assert "labels, overlays and classes.csv of 2 images" in capsys.readouterr().out
  model, total = mrmae_jax.load(written), []
  for name in ("a/x.jpg", "b/x.png"):
    picture = np.asarray(Image.open(photos / name))
    file = Path(name).with_suffix(".png")
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / file))
    np.testing.assert_array_equal(label, model.segment([picture])[0])
    overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / file))
    assert overlay.shape == picture.shape
    color = grid.class_colors(4)[label[0, 0]]
    assert np.abs(overlay[0, 0] - (picture[0, 0] / 2 + color / 2)).max() <= 1
    total.append(label.reshape(-1))
  with open(tmp_path / "out" / "classes.csv", newline="") as file:
    header, *rows = csv.reader(file)
  assert header == ["value", "class", "color", "share of pixels"]
  assert [row[1] for row in rows] == ["sky", "sea", "land", "other"]
  shares = np.bincount(np.concatenate(total), minlength=4) / sum(map(len, total))
  np.testing.assert_allclose([float(row[3]) for row in rows], shares, rtol=1e-4)
  assert run_command([*words, "--on_error=skip"]) == 2
  assert "exists; give another name or remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
  "options, message",
  [
    (["--out=x.csv"], "classes of pixels apart, not of images"),
    (["--out=x.csv", "--flip"], "--mode, --scales and --flip are for segmentation"),
    (["--out=x.txt"], "must end in .csv or .parquet"),
    (["--out=x", "--crop=1"], "--crop and --average are for classifiers"),
    (["--out=x", "--scales=9"], "give numbers above 0 and at most 8"),
    (["--out=x", "--min_score=0.5"], "--min_score is for detection"),
    (["--out=x.csv", "--min_score=2"], "expected a number from 0 to 1"),
    (["--out=x", "--models=a,b"], "segmentation and detection take one model"),
    (
      ["--out=x", "--models=CLASSIFIER"],
      "neither classes of pixels nor objects; --out=x must end in .csv",
    ),
  ],
)
def test_predict_refuses_what_does_not_fit(written, photos, tmp_path, options, message, capsys):
  student = make_student(ViT(8, 16, 1, 2, 32), None, classes=3)
  writers.write_model(student, tmp_path / "classifier.safetensors", "timm")
  given = [x.replace("CLASSIFIER", f"{tmp_path}/classifier.safetensors") for x in options]
  words = ["predict", f"--models={written}", f"--images=folder:{photos}", *given]
  assert run_command(words) == 2
  assert message in capsys.readouterr().err


def test_pictures_of_one_name_are_refused(written, photos, tmp_path, capsys):
  Image.fromarray(photo(40, 60)).save(photos / "a" / "x.png")
  words = ["predict", f"--models={written}", f"--images=folder:{photos}", f"--out={tmp_path}/out"]
  assert run_command(words) == 2
  assert "would both be written as overlays/a/x.png; rename one" in capsys.readouterr().err


def test_colors_differ():
  colors = grid.class_colors(256)
  assert len({tuple(color) for color in colors.tolist()}) == 256 and colors.max() < 256


def test_damaged_notes_are_an_error(tmp_path, written):
  with safetensors.safe_open(written, "numpy") as file:
    notes = json.loads(file.metadata()[METADATA_KEY])
  tensors, path = load_file(written), tmp_path / "changed.safetensors"
  for change, message in (
    ({"segmenter": {"levels": [0, 1], "pool_scales": [1, 2, 3, 6]}}, "are not four of the blocks"),
    ({"segmenter": {"levels": [0, 1, 2, 3], "pool_scales": [0, 2, 3, 6]}}, "notes about the model"),
    ({"segmenter": {"levels": "all"}}, "notes about the model"),
    ({"segmenter": [1]}, "notes about the model"),
    ({"grid": "4x4"}, "notes about the model"),
    ({"grid": [1, 16]}, "needs at least 2 x 2 tokens"),
    ({"grid": [5, 5]}, "pos_embed has 17 rows"),
    ({"has_norm": 1}, "notes about the model"),
    ({"classes": ["sky"]}, "names 1 classes and holds 4"),
    ({"encoder": notes["encoder"] | {"depth": 5}}, "missing"),
    ({"encoder": notes["encoder"] | {"cls_token": False}}, "disagree|rows|expected"),
  ):
    save_file(tensors, path, {METADATA_KEY: json.dumps(notes | change)})
    with pytest.raises(WeightsError, match=message):
      readers.read_model(path)


def test_channels_are_dropped_image_by_image():
  segmenter = make_segmenter().segmenter
  keys = jax.random.split(jax.random.key(0), 200)
  keep = {head: segmenter._keep(head, 64, keys) for head in ("decode_head", "auxiliary_head")}
  for x in keep.values():
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.9], rtol=1e-6)
    assert abs(float((x == 0).mean()) - 0.1) < 0.01
  assert not np.array_equal(*keep.values())
  alone = segmenter._keep("decode_head", 64, keys[7:8])
  np.testing.assert_array_equal(alone[0], keep["decode_head"][7])
  assert segmenter._keep("decode_head", 64, None) is None
  assert segmenter.clone(dropout=0.0)._keep("decode_head", 64, keys) is None


def test_the_loss_of_nothing_labelled_is_zero():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32))
  labels = jnp.full((2, 70, 9), 255, jnp.uint8)
  for of_all in (True, False):
    loss = lambda x: segmentation.cross_entropy(x, labels, of_all)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("old, new", [(15, 2), (15, 6), (16, 3), (2, 6), (3, 3)])
def test_windows_of_pooling(old, new):
  matrix = upernet.pooling_matrix(old, new)
  for i, row in enumerate(matrix):
    inside = np.arange(math.floor(i * old / new), math.ceil((i + 1) * old / new))
    np.testing.assert_array_equal(np.flatnonzero(row), inside)
    np.testing.assert_allclose(row[inside], 1 / len(inside), rtol=1e-6)


def test_levels_as_published():
  assert upernet.usual_levels(12) == (3, 5, 7, 11) and upernet.usual_levels(24) == (7, 11, 15, 23)


def test_relative_positions_of_a_convvit_know_the_visible_tokens():
  fields = dict(fuse_stages=False, relative_positions=True, layer_scale=True)
  sparse = ConvViT((2, 2, 2), (4, 8, 16), (1, 1, 1), 2, (2, 2, 2), **fields)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 32, 3)).astype(np.float32))
  shapes = jax.eval_shape(sparse.init, jax.random.key(0), images)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
  ids = np.stack([rng.permutation(12) for _ in range(2)])
  mask = Mask(jnp.asarray(ids[:, :5]), jnp.asarray(np.argsort(ids, axis=1)))

  @jax.jit
  def encode(params):
    without = jax.tree_util.tree_map_with_path(
      lambda path, x: x * (path[-1].key != "relative_positions"), params
    )
    return [
      sparse.clone(sparse=is_sparse).apply(tree, images, mask)[0]
      for is_sparse, tree in ((True, params), (False, params), (True, without))
    ]

  visible, dense, without = encode(params)
  close(visible, np.asarray(dense), FORWARD, "sparse against dense")
  assert np.abs(visible - without).max() > 1e-3
