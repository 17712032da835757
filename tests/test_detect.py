"""Detection as a task: its loss and predictions, starts from every kind of file, mistakes with
their words.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mrmae_jax import checks
from mrmae_jax.models import ConvViT, ViT
from mrmae_jax.tasks import detect
from mrmae_jax.weights import model_files, positions
from tests import tiny
from tests.helpers.models import GRID, make_student


def mistakes(**values):
  return "\n".join(text for text, *_ in [checks.find_mistakes(tiny.detect_config(**values))])


@functools.cache
def digits():
  return detect.make(tiny.detect_config())


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

  @jax.jit
  def step():
    params, extra = task.init(jax.random.key(0))
    loss = lambda params: task.loss(params, extra, task.frozen, batch, keys)
    result = jax.value_and_grad(loss, has_aux=True)(params)
    return result, task.predict(params, extra, task.frozen, batch, keys), params, extra

  ((total, (terms, moved)), gradients), predicted, params, extra = step()
  assert terms.keys() == {"rpn_class", "rpn_box", "class", "box", "mask"}
  assert np.isclose(total, sum(terms.values())) and all(x > 0 for x in terms.values())
  unused = {"encoder/norm/scale", "encoder/norm/bias"}
  for name, x in flatten_dict(gradients, sep="/").items():
    assert np.isfinite(x).all() and (np.any(x) or name in unused), name
  assert bool(extra) == (encoder == "convvit")
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), extra, moved)
  assert jax.tree.all(changed)
  assert predicted["boxes"].shape == (2, 5, 4) and predicted["masks"].shape == (2, 5, 28, 28)
  assert predicted["is_truncated"].shape == (2,)


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
