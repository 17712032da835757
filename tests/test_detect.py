"""Detection as a task: its loss and predictions, starts from every kind of file, mistakes with
their words.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mrmae_jax import checks
from mrmae_jax import config as config_lib
from mrmae_jax.configs import detect as detect_configs
from mrmae_jax.errors import ConfigError
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.models.mask_rcnn import make_mask_rcnn, usual_global_blocks
from mrmae_jax.tasks import detect
from mrmae_jax.weights import model_files, positions
from tests import tiny
from tests.helpers.models import GRID, make_student


def batch_of(task, count=2):
  source = task.source("train")
  rows = [task.views.train(source[i], np.random.default_rng(i)) for i in range(count)]
  return jax.tree.map(lambda *x: jnp.stack(x), *rows)


@pytest.mark.parametrize("encoder", ["vit", pytest.param("convvit", marks=pytest.mark.variant)])
def test_the_task_learns_from_objects_and_predicts_them(encoder):
  fields = {} if encoder == "vit" else {"rcnn.pyramid": "fpn", "rcnn.norm": "bn"}
  task = detect.make(tiny.detect_config(encoder, **fields))
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
  assert terms.keys() == {"rpn_class", "rpn_box", "class", "box", "mask"}
  assert np.isclose(total, sum(terms.values())) and all(x > 0 for x in terms.values())
  unused = ("encoder/norm/", "pyramid/p5_")  # no sampled anchor may be that large
  for name, x in flatten_dict(gradients, sep="/").items():
    assert np.isfinite(x).all() and (np.any(x) or name.startswith(unused)), name
  assert bool(extra) == (encoder == "convvit")
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), extra, moved)
  assert jax.tree.all(changed)
  if encoder == "convvit":
    predict = jax.jit(lambda batch: task.predict(params, extra, task.frozen, batch, keys))
    predicted = predict(batch)
    assert predicted["boxes"].shape == (2, 5, 4) and predicted["masks"].shape == (2, 5, 28, 28)
    assert predicted["is_truncated"].shape == (2,)

  empty = {"classes": jnp.full_like(batch["classes"], -1)}
  empty |= {name: jnp.zeros_like(batch[name]) for name in ("boxes", "masks", "image")}
  (total, (terms, _)), gradients = step(batch | empty)
  assert np.isfinite(total) and terms["rpn_class"] > 0 and terms["class"] > 0
  assert terms["rpn_box"] == terms["box"] == terms["mask"] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  assert not any(np.any(x) for x in jax.tree.leaves(gradients["mask_head"]))


@pytest.mark.parametrize("kind", ["vit", "convvit"])
def test_a_pretrained_encoder_starts_detection(tmp_path, kind):
  if kind == "vit":
    encoder = ViT(8, 24, 2, 2, 48, learned_positions=True)
  else:
    encoder = ConvViT((2, 2, 2), (8, 12, 24), (1, 1, 1), 2, learned_positions=True)
  student, path = make_student(encoder), tmp_path / "model.safetensors"
  model_files.write_model(student, path, "timm" if kind == "vit" else "convmae")
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
  assert "left out of detection: " in text and "new: tables of distances (decomposed)" in text
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
