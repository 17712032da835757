"""Detection as a task: its loss and predictions, starts from every kind of file, mistakes with
their words.
"""

import csv
import functools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import mrmae_jax
from mrmae_jax import boxes, checks, data, optim, sharding, train
from mrmae_jax import config as config_lib
from mrmae_jax.cli import object_pictures
from mrmae_jax.configs import detect as detect_configs
from mrmae_jax.errors import ConfigError, WeightsError
from mrmae_jax.evals import coco_ap
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.models.mask_rcnn import MaskRCNN, make_mask_rcnn, usual_global_blocks
from mrmae_jax.runs.metrics import is_detail
from mrmae_jax.tasks import detect
from mrmae_jax.weights import detectron2, positions, tower_params, writers
from tests import tiny
from tests.helpers import coco as fake
from tests.helpers.cli import run_command
from tests.helpers.models import GRID, make_detector, make_student
from tests.helpers.tasks import init_state


def batch_of(task, count=2):
  source = task.source("train")
  rows = [task.views.train(source[i], np.random.default_rng(i)) for i in range(count)]
  return jax.tree.map(lambda *x: jnp.stack(x), *rows)


DETECTORS = {
  "simple": {},
  "fpn": {"rcnn.pyramid": "fpn", "rcnn.norm": "bn"},
  "cascade": {"rcnn.stages": 3},
  "boxes_alone": {"rcnn.masks": False},
  "no_windows": {"rcnn.window": 0},
}


@pytest.mark.parametrize(
  "kind", ["simple", *(pytest.param(x, marks=pytest.mark.variant) for x in [*DETECTORS][1:])]
)
def test_the_task_learns_from_objects_and_predicts_them(kind):
  encoder = "convvit" if kind == "fpn" else "vit"
  task = detect.make(tiny.detect_config(encoder, **DETECTORS[kind]))
  batch, keys = batch_of(task), jax.random.split(jax.random.key(3), 2)
  assert (batch["classes"] >= 0).any() and batch["image"].shape == (2, 64, 96, 3)

  shapes, extra = jax.eval_shape(task.init, jax.random.key(0))
  rng = np.random.default_rng(0)  # by hand: an initialization takes longer to compile than a test
  fill = lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32)
  params, extra = jax.tree.map(fill, shapes), jax.tree.map(lambda x: jnp.ones(x.shape), extra)

  @jax.jit
  def step(batch):
    loss = lambda params: task.loss(params, extra, task.frozen, batch, keys)
    return jax.value_and_grad(loss, has_aux=True)(params)

  (total, (terms, moved)), gradients = step(batch)
  stages = ("0", "1", "2") if kind == "cascade" else ("",)
  masks = ["mask"] if kind != "boxes_alone" else []
  names = [f"{name}{stage}" for name in ("class", "box") for stage in stages]
  assert terms.keys() == {"rpn_class", "rpn_box", *names, *masks}
  assert np.isclose(total, sum(terms.values())) and all(x > 0 for x in terms.values())
  unused = ("encoder/norm/", "pyramid/p5_")  # no sampled anchor may be that large
  for name, x in flatten_dict(gradients, sep="/").items():
    assert np.isfinite(x).all() and (np.any(x) or name.startswith(unused)), name
  assert bool(extra) == (kind == "fpn")
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), extra, moved)
  assert jax.tree.all(changed)
  if kind != "simple":
    predict = jax.jit(lambda batch: task.predict(params, extra, task.frozen, batch, keys))
    predicted = predict(batch)
    assert predicted["boxes"].shape == (2, 5, 4) and ("masks" in predicted) == bool(masks)
    assert not masks or predicted["masks"].shape == (2, 5, 28, 28)
    assert predicted["is_truncated"].shape == (2,)

  empty = {"classes": jnp.full_like(batch["classes"], -1)}
  empty |= {name: jnp.zeros_like(batch[name]) for name in batch.keys() - {"size", "classes"}}
  (total, (terms, _)), gradients = step(batch | empty)
  is_class = lambda name: name.rstrip("012") in ("rpn_class", "class")
  assert np.isfinite(total) and all((x > 0) == is_class(name) for name, x in terms.items())
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  assert not any(np.any(x) for x in jax.tree.leaves(gradients.get("mask_head", ())))


@pytest.mark.parametrize("kind", ["convvit", pytest.param("vit", marks=pytest.mark.variant)])
def test_a_pretrained_encoder_starts_detection(tmp_path, kind):
  if kind == "vit":
    encoder = ViT(8, 24, 2, 2, 48, learned_positions=True)
  else:
    encoder = ConvViT((2, 2, 2), (8, 12, 24), (1, 1, 1), 2, learned_positions=True)
  student, path = make_student(encoder, None, classes=3), tmp_path / "model.safetensors"
  writers.write_model(student, path, "timm" if kind == "vit" else "convmae")
  config = tiny.detect_config(kind, init_from=str(path))
  config.data.update(mean=student.mean, std=student.std)
  task = detect.make(config)
  shapes = flatten_dict(jax.eval_shape(task.init, jax.random.key(0))[0], sep="/")
  given = flatten_dict(student.params["encoder"], sep="/")
  for name, x in task.pretrained.items():
    assert x.shape == shapes[name].shape, name
    if name == "encoder/pos_embed":
      table = given["pos_embed"][:, 1:] if kind == "vit" else given["pos_embed"]
      x = positions.resize(table, GRID, (4, 6), student.rule) - x
      np.testing.assert_allclose(x, 0, atol=1e-6)
    else:
      np.testing.assert_array_equal(x, given[name.removeprefix("encoder/")])
  new = {name.split("/")[0] for name in shapes.keys() - task.pretrained.keys()}
  assert new == {"encoder", "pyramid", "rpn_head", "box_heads_0", "mask_head"}
  own = {name for name in shapes.keys() - task.pretrained.keys() if name.startswith("encoder/")}
  assert {name.split("/")[-1] for name in own} == {"rel_pos_h", "rel_pos_w", "scale", "bias"}
  text = "\n".join(task.notes)
  assert (
    "left out of detection: classifier, " in text
    and "new: tables of distances (decomposed)" in text
  )
  assert "position table 3x5 interpolated to 4x6" in text


@pytest.mark.parametrize(
  "encoder, values, words",
  [
    ("vit", {"rcnn.global_blocks": (2,)}, "must be different blocks from 0 to 1"),
    ("vit", {"rcnn.window": 0, "rcnn.global_blocks": (1,)}, "all blocks are global"),
    ("vit", {"encoder.relative_positions": True}, "set these to False and 0"),
    ("vit", {"rcnn.pyramid": "fpn"}, "a vit has config.rcnn.pyramid=simple"),
    ("convvit", {"encoder.cls_token": True}, "nor the CLS token of a convvit"),
    ("vit", {"image_size": (64, 104)}, "must hold multiples of two tokens, 16 pixels"),
    ("vit", {"image_size": (16, 64)}, "at least 32; nearest: (64, 64)"),
    ("vit", {"rcnn.anchor_iou": (0.7, 0.3)}, "must satisfy low <= high"),
  ],
)
def test_mistakes_of_a_detector_have_their_words(encoder, values, words):
  with pytest.raises(ConfigError) as error:
    checks.find_mistakes(tiny.detect_config(encoder, **values)).report()
  assert words in str(error.value)


def test_the_tiny_configuration_and_the_recipe_are_right():
  checks.find_mistakes(tiny.detect_config("vit")).report()
  checks.find_mistakes(tiny.detect_config("convvit", **{"rcnn.pyramid": "fpn"})).report()
  recipe = config_lib.detect()
  recipe.init_from, recipe.data.source = "", "coco:digits"
  checks.find_mistakes(recipe).report()


SIZES = {  # millions of parameters, of all and of the encoder (detectron2's own count)
  "vitdet_base": (110.90, 85.89),
  "vitdet_large": (330.68, 303.43),
  "vitdet_huge": (661.20, 631.12),
}


@pytest.mark.parametrize(
  "name",
  ["vitdet_base"]
  + [pytest.param(x, marks=pytest.mark.variant) for x in detect_configs.RECIPES][1:],
)
def test_recipes_are_right_and_have_the_published_sizes(name):
  config = detect_configs.get_config(name)
  config.init_from, config.data.source = "", "coco:digits"
  checks.find_mistakes(config).report()
  network = make_mask_rcnn(config.encoder, config.rcnn, 80, jnp.float32)
  pixels = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), pixels)["params"]
  del params["encoder"]["norm"]  # of pre-training
  count = lambda tree: round(sum(x.size for x in jax.tree.leaves(tree)) / 1e6, 2)
  if name in SIZES:
    assert (count(params), count(params["encoder"])) == SIZES[name]


def test_a_recipe_starts_from_a_run(tmp_path):
  pretrained = tiny.get_config("vit")
  (tmp_path / "config.json").write_text(pretrained.to_json_best_effort())
  config = detect_configs.get_config(str(tmp_path))
  assert config.init_from == str(tmp_path) and config.encoder.dim == 24
  assert tuple(config.rcnn.position_grid) == (4, 6) and config.image_size == (1024, 1024)
  assert config.optim.layer_decay == 0.7 and config.batch_size == 64
  (tmp_path / "config.json").write_text(tiny.detect_config("convvit").to_json_best_effort())
  config = detect_configs.get_config(str(tmp_path))
  assert config.rcnn.window == 3 and tuple(config.image_size) == (64, 96)
  assert config.optim.layer_decay == 0.8


def test_published_layouts_have_the_last_block_of_each_quarter_global():
  assert usual_global_blocks(12) == (2, 5, 8, 11) and usual_global_blocks(11) == (1, 4, 7, 10)
  assert usual_global_blocks(24) == (5, 11, 17, 23) and usual_global_blocks(2) == (0, 1)


@pytest.mark.variant
def test_eight_devices_equal_one_and_one_program_serves_all_images():
  """The loss and every gradient; images of several sizes and numbers of objects, and empty ones."""
  task = detect.make(tiny.detect_config())
  tx = optim.skippable(optax.sgd(1.0))
  state = jax.jit(lambda: init_state(task, tx))()
  source, rng = task.source("train"), np.random.default_rng(0)
  batches = []
  for first in (0, 8):
    rows = [task.views.train(source[first + i], rng) for i in range(8)]
    batches.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
  batches[1]["classes"][3:] = -1
  assert len({tuple(size) for size in batches[0]["size"]}) > 3
  assert len({(row >= 0).sum() for row in batches[0]["classes"]}) > 1
  keys = train.sample_keys(0, jnp.int32(0), 8)
  loss = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  (expected, _), gradients = loss(state.params, state.extra, task.frozen, batches[0], keys)

  mesh = sharding.make_mesh()
  step = jax.jit(train.make_train_step(task, tx, lambda step: 1.0, 0, accum_steps=1, max_spike=0.0))
  placed = jax.device_put((state, task.frozen), sharding.replicated(mesh))
  moved, metrics = step(*placed, sharding.global_batch(batches[0], mesh))
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(metrics["loss"], expected)
  jax.tree.map(lambda old, new, g: close(old - new, g), state.params, moved.params, gradients)
  _, metrics = step(moved, placed[1], sharding.global_batch(batches[1], mesh))
  assert np.isfinite(metrics["loss"]) and step._cache_size() <= 2  # of placed and of moved arrays


@pytest.mark.variant
def test_a_run_that_lost_its_last_steps_does_them_again_bit_for_bit(tmp_path):
  config = tiny.detect_config(keep_checkpoints=3)
  del config.evals["coco_ap"]
  whole = jax.device_get(train.fit(config, detect.make(config), tmp_path))
  assert whole.step == 2
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  again = jax.device_get(train.fit(config, detect.make(config), tmp_path))
  jax.tree.map(np.testing.assert_array_equal, again, whole)


# --- a trained detector in use ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A detector in detectron2's names, and the folder it lies in."""
  path = tmp_path_factory.mktemp("detector") / "detector.safetensors"
  writers.write_model(make_detector(), path, "detectron2")
  return path


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  """Images with the classes of the detector."""
  return fake.write(tmp_path_factory.mktemp("data") / "coco")


def further_config(written, address, **values):
  """Detection that starts from the detector."""
  rcnn = dict(window=4, position_grid=(8, 8), anchor_ratios=(1.0,), anchor_sizes=ANCHOR_SIZES)
  fields = {f"rcnn.{key}": x for key, x in rcnn.items()} | {"rcnn.global_blocks": (1,)}
  fields |= {"data.source": address, "init_from": str(written), "image_size": (64, 64)}
  return tiny.detect_config("vit", **(fields | values))


ANCHOR_SIZES = (8.0, 16.0, 24.0, 32.0, 48.0)


@pytest.mark.parametrize(
  "values, missing, words",
  [
    ({"image_size": (64, 96)}, "", "position table 8x8 interpolated to 8x12"),
    ({"head": "new"}, "(box_heads_0|mask_head)/(logits|deltas)/.*", "config.head=new"),
    ({"rcnn.masks": False}, "", "left out: mask_head"),
    (
      {"rcnn.anchor_sizes": (16.0,) * 5},
      "",
      "other rules: anchor_sizes (8, 16, 24, 32, 48) there, (16.0, ",
    ),
  ],
)
def test_a_detector_starts_detection(written, address, values, missing, words):
  task = detect.make(further_config(written, address, **values))
  shapes = flatten_dict(jax.eval_shape(task.init, jax.random.key(0))[0], sep="/")
  assert {x: y.shape for x, y in task.pretrained.items()}.items() <= {
    x: y.shape for x, y in shapes.items()
  }.items()
  new = [name for name in shapes if name not in task.pretrained and "encoder/norm/" not in name]
  assert all(re.fullmatch(missing, name) for name in new) and bool(new) == bool(missing)
  assert words in "\n".join(task.notes)


@pytest.mark.parametrize(
  "values, words",
  [
    ({"encoder.dim": 48}, "another architecture: dim 24 there, 48 here. Set config.encoder"),
    ({"rcnn.channels": 16}, "channels 8 there, 16 here. Set --config.rcnn.channels=8"),
    ({"rcnn.stages": 3}, "Set --config.rcnn.stages=1"),
    ({"rcnn.anchor_ratios": (0.5, 1.0)}, "Set --config.rcnn.anchor_ratios=(1.0,)"),
    ({"rcnn.global_blocks": (0,)}, "Set --config.rcnn.global_blocks=(1,)"),
  ],
)
def test_another_detector_is_named_with_its_options(written, address, values, words):
  with pytest.raises(WeightsError) as error:
    detect.make(further_config(written, address, **values))
  assert words in str(error.value)


def test_detectors_of_other_classes_and_heads(tmp_path, address):
  path = tmp_path / "other.safetensors"
  writers.write_model(make_detector(classes=("cat", "dog", "emu")), path, "detectron2")
  with pytest.raises(WeightsError, match="3 classes apart.* has 3; only there: emu; only here: co"):
    detect.make(further_config(path, address))
  writers.write_model(make_detector(classes=("dog", "cat", "cow")), path, "detectron2")
  with pytest.raises(WeightsError, match="are the same in another order. config.head=new"):
    detect.make(further_config(path, address))
  writers.write_model(make_detector(mask_convs=0), path, "detectron2")
  task = detect.make(further_config(path, address))
  assert "new, with random weights: mask_head" in "\n".join(task.notes)
  assert not any(name.startswith("mask_head") for name in task.pretrained)
  writers.write_model(make_detector(box_size=5), path, "detectron2")
  with pytest.raises(WeightsError, match="box_size 5 there, 7 here. No key of config.rcnn changes"):
    detect.make(further_config(path, address))


@pytest.mark.variant
def test_a_detector_in_fpn_style_starts_detection(tmp_path, address):
  backbone = dict(window=2, global_blocks=(0,), distances="shared", learned_positions=True)
  encoder = ConvViT((4, 2, 2), (4, 8, 64), (1, 1, 2), 1, fuse_stages=False, **backbone)
  heads = dict(box_convs=1, box_hidden=8, rpn_convs=1, mask_convs=1)
  network = MaskRCNN(encoder, 3, "fpn", 8, "bn", **heads)
  shapes = detectron2.detector_shapes(network, (64, 64))
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  params["encoder"]["norm"] = tower_params.fresh_norm(64)
  model = make_detector()._replace(encoder=encoder, detector=network, params=params, grid=(4, 4))
  writers.write_model(model, tmp_path / "fpn.safetensors", "detectron2")
  fields = dict(patch_sizes=(4, 2, 2), embed_dims=(4, 8, 64), depths=(1, 1, 2), num_heads=1)
  values = {f"encoder.{key}": x for key, x in fields.items()}
  rcnn = dict(pyramid="fpn", norm="bn", distances="shared", window=2, box_hidden=8)
  values |= {f"rcnn.{key}": x for key, x in rcnn.items()} | {"rcnn.anchor_ratios": (0.5, 1.0, 2.0)}
  values |= {"data.source": address, "init_from": str(tmp_path / "fpn.safetensors")}
  config = tiny.detect_config("convvit", image_size=(64, 64), **values)
  config.rcnn.global_blocks = (0,)
  with pytest.raises(WeightsError, match=r"Set --config.rcnn.position_grid=\(4,4\)$"):
    detect.make(config)
  config.rcnn.position_grid = (4, 4)
  task = detect.make(config)
  shapes, extra = jax.eval_shape(task.init, jax.random.key(0))
  new = flatten_dict(shapes, sep="/").keys() - task.pretrained.keys()
  assert new == {"encoder/norm/scale", "encoder/norm/bias"} and jax.tree.leaves(extra)


def picture(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_objects_come_in_pixels_of_images_of_any_size(written, monkeypatch):
  model = mrmae_jax.load(written)
  assert model.class_names == ("cat", "dog", "cow") and model.config["classes"] == 3
  found = {  # in a network of 64 x 64 pixels
    "boxes": np.array([[[8, 4, 40, 20], [0, 0, 64, 64], [70, 0, 80, 9], [0, 0, 0, 0]]], np.float32),
    "scores": np.array([[0.9, 0.8, 0.7, 0]], np.float32),
    "classes": np.array([[2, 0, 1, -1]], np.int32),
    "is_valid": np.array([[True, True, True, False]]),
    "is_truncated": np.array([False]),
  }
  masks = np.zeros((1, 4, 28, 28), np.float32)
  masks[:, :, :14] = 1  # the upper half
  given = []

  def detect(params, image, size, anchors, rules):
    given.append((image.shape, tuple(size), rules.min_score))
    return boxes.Detections(**found), masks

  monkeypatch.setattr(model, "_detect", detect)
  small, large = model.detect([picture(32, 64), Image.fromarray(picture(100, 128))], min_score=0.2)
  assert given == [((64, 64, 3), (32, 64), 0.2), ((64, 64, 3), (50, 64), 0.2)]
  np.testing.assert_array_equal(small["boxes"], [[8, 4, 40, 20], [0, 0, 64, 32]])  # inside of it
  np.testing.assert_array_equal(large["boxes"], [[16, 8, 80, 40], [0, 0, 128, 100]])
  assert large["boxes"].dtype == np.float32 and large["classes"].tolist() == [2, 0]
  assert large["masks"].shape == (2, 100, 128) and large["masks"].dtype == bool
  assert large["masks"][0, 9:23, 17:79].all() and large["masks"][0].sum() == 16 * 64
  monkeypatch.setattr(model, "_detect", lambda *args, **_: (boxes.Detections(**found), None))
  assert "masks" not in model.detect(picture(32, 64)[None])[0]


def test_what_detects_nothing_is_refused(written, tmp_path):
  model = mrmae_jax.load(written)
  with pytest.raises(ValueError, match="min_score=1.5 given; expected a number from 0 to 1"):
    model.detect([picture(8, 8)], min_score=1.5)
  with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
    model.detect(picture(8, 8))
  with pytest.raises(WeightsError, match="holds no decode_head; give a run of mrmae segment"):
    model.segment([picture(8, 8)])
  for classes, words in (
    (0, "holds no roi_heads; give a run of mrmae detect"),
    (3, "no roi_heads"),
  ):
    student = make_student(ViT(8, 16, 1, 2, 32), None, classes=classes)
    writers.write_model(student, tmp_path / "other.safetensors", "timm")
    with pytest.raises(WeightsError, match=words):
      mrmae_jax.load(tmp_path / "other.safetensors").detect([picture(8, 8)])


def test_the_encoder_of_a_detector_is_exported_for_any_number_of_images(written):
  model = mrmae_jax.load(written)
  exported = model.export((64, 64), False)
  (batch, *_), *_ = (x.shape for x in jax.tree.leaves(exported.out_avals))
  assert str(batch) == "batch"


def test_predict_writes_objects_as_coco_does(written, tmp_path, capsys):
  fake.write(tmp_path / "coco")
  words = ["predict", f"--models={written}", f"--images=coco:{tmp_path}/coco", "--min_score=0"]
  assert run_command([*words, f"--out={tmp_path}/out"]) == 0
  assert "overlays and classes.csv of 2 images" in capsys.readouterr().out
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  about = json.loads((tmp_path / "out" / "images.json").read_text())
  assert [row["id"] for row in about["images"]] == [100, 101]
  assert about["categories"] == fake.CATEGORIES
  sizes = {row["id"]: [row["height"], row["width"]] for row in about["images"]}
  assert results and {row["category_id"] for row in results} <= {3, 7, 90}
  for row in results:
    assert row["segmentation"]["size"] == sizes[row["image_id"]] and row["bbox"][2] > 0
  for row in about["images"]:
    assert (tmp_path / "out" / "overlays" / row["file_name"]).with_suffix(".png").exists()
  with open(tmp_path / "out" / "classes.csv", newline="") as file:
    header, *rows = csv.reader(file)
  assert header == ["category_id", "class", "color", "objects"]
  assert sum(int(row[3]) for row in rows) == len(results)


@pytest.mark.parametrize(
  "options, message",
  [
    (["--out=x.csv"], "classes of objects apart, not of images"),
    (["--out=x", "--flip"], "--mode, --scales and --flip are for segmentation"),
    (["--out=x.csv", "--min_score=0.1"], "--min_score is for detection, whose --out is a folder"),
  ],
)
def test_predict_refuses_what_does_not_fit(written, options, message, capsys):
  assert run_command(["predict", f"--models={written}", "--images=coco:digits", *options]) == 2
  assert message in capsys.readouterr().err


def test_the_log_shows_the_main_results_alone():
  shown = [
    name
    for kind in coco_ap.KINDS
    for name in coco_ap.MEASURES
    if not is_detail(f"coco_ap/{kind}_{name}")
  ]
  assert shown == 2 * ["ap", "ap50", "ap75"]


@pytest.mark.parametrize(
  "names, kind, expected",
  [
    ((), "folder", {1: "class 0", 2: "class 1", 3: "class 2"}),
    ((), "coco", {3: "cat", 7: "dog", 90: "cow"}),
    (("cow", "cat", "dog"), "coco", {90: "cow", 3: "cat", 7: "dog"}),
    (("cow", "cat", "emu"), "coco", {1: "cow", 2: "cat", 3: "emu"}),
  ],
)
def test_classes_keep_the_ids_of_the_annotations(tmp_path, names, kind, expected):
  fake.write(tmp_path / "data")
  path = tmp_path / "data" / ("val" if kind == "folder" else "")
  rules = dict(holdout_every=0, max_dropped=0.1) if kind == "coco" else dict(holdout_every=0)
  source = data.open_source(f"{kind}:{path}", "eval" if kind == "coco" else "train", **rules)
  found = {
    "boxes": np.float32([[1, 2, 3, 5]]),
    "scores": np.float32([0.5]),
    "classes": np.int32([1]),
  }
  model = SimpleNamespace(
    network=make_detector()._replace(detector=make_detector(mask_convs=0).detector),
    config={"classes": 3},
    class_names=names,
    detect=lambda images, min_score: [found],
  )
  options = SimpleNamespace(min_score=None, classes="")
  pictures = object_pictures.ObjectPictures(tmp_path, "model", model, source, options)
  pictures.add(0, "a/0.png", np.zeros((40, 60, 3), np.uint8))
  assert "1 objects in results.json" in pictures.finish()
  about = json.loads((tmp_path / "images.json").read_text())
  assert {row["id"]: row["name"] for row in about["categories"]} == expected
  image_id = 100 if kind == "coco" else 1
  assert about["images"][0]["id"] == image_id
  assert json.loads((tmp_path / "results.json").read_text()) == [
    {"image_id": image_id, "category_id": [*expected][1], "bbox": [1, 2, 2, 3], "score": 0.5}
  ]
  assert (tmp_path / "overlays" / "a" / "0.png").exists()
