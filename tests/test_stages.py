"""The encoder of an earlier run as teacher, and the tool that looks at teachers."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mrmae_jax import config as config_lib
from mrmae_jax import mrmae, preflight, teachers
from mrmae_jax.cli import show_teacher
from mrmae_jax.errors import ConfigError
from mrmae_jax.tasks import pretrain
from mrmae_jax.viz import grid
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.runs import finished_run


@pytest.mark.parametrize(
  "encoder, values",
  [
    pytest.param("convvit", dict(encoder__depths=(1, 1, 2)), marks=pytest.mark.variant),
    ("convvit", dict(encoder__cls_token=True, encoder__depths=(1, 1, 2))),
    pytest.param("vit", {}, marks=pytest.mark.variant),
  ],
)
@pytest.mark.parametrize(
  "layer, last_k",
  [
    ("raw", 2),
    pytest.param("raw", 1, marks=pytest.mark.variant),
    pytest.param("normed", 1, marks=pytest.mark.variant),
  ],
)
def test_a_trained_encoder_is_a_teacher(tmp_path, encoder, values, layer, last_k):
  model, params = finished_run(tmp_path, encoder, **values)
  config = tiny.changed(
    tiny.get_config(),
    teacher__path=f"checkpoint:{tmp_path}",
    teacher__layer=layer,
    teacher__last_k=last_k,
  )
  preflight.check(config, num_devices=8)
  spec = teachers.configured_spec(config.teacher, config)
  teacher = teachers.load(spec)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
  output = jax.jit(teacher.forward)(teacher.params, images)
  pixels = mrmae.normalize(images, model.mean, model.std)
  x, out = jax.jit(model.encoder.apply)({"params": params["encoder"]}, pixels)
  norm = lambda t: (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-5)
  x = (
    x
    if layer == "normed"
    else out["layers"][-1]
    if last_k == 1
    else sum(norm(np.asarray(t)) for t in out["layers"][-2:]) / 2
  )
  np.testing.assert_allclose(output.features, np.asarray(x)[:, -24:], atol=1e-5)
  cls = encoder == "vit" or values.get("encoder__cls_token", False)
  assert (
    spec.has_cls == spec.has_attention == cls
    and teacher.dim == 24
    and str(tmp_path) in spec.description
  )
  if cls:
    np.testing.assert_allclose(output.cls, np.asarray(x)[:, 0], atol=1e-5)
    np.testing.assert_allclose(output.attention, out["attention"], atol=1e-6)
  else:
    assert output.cls is None and output.attention is None


def test_the_second_stage_learns_from_it(tmp_path):
  finished_run(tmp_path)
  config = tiny.changed(tiny.get_config("vit"), teacher__path=f"checkpoint:{tmp_path}")
  task = pretrain.make(config)
  params, extra = jax.jit(task.init)(jax.random.key(0))
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
  keys = jax.random.split(jax.random.key(1), 2)
  loss, (terms, _) = jax.jit(task.loss)(params, extra, task.frozen, {"image": images}, keys)
  assert np.isfinite(loss) and 0.5 < terms["mimic"] < 10
  (tmp_path / "other").mkdir()
  finished_run(tmp_path / "other", encoder__embed_dims=(8, 12, 20))
  other = pretrain.make(
    tiny.changed(tiny.get_config("vit"), teacher__path=f"checkpoint:{tmp_path}/other")
  )
  assert task.identity != other.identity  # a workdir is refused when its teacher changes


def test_several_teachers_of_a_configuration(tmp_path):
  config = tiny.get_config("vit")
  finished_run(tmp_path)
  for name, path, options in (
    ("dino", tiny.TEACHERS / "hf_dino", dict(loss="cosine", layer="normed", weight=0.5)),
    ("own", f"checkpoint:{tmp_path}", dict(head="mlp", tokens="masked")),
  ):
    config.extra_teachers[name] = config_lib.teacher_section()
    config.extra_teachers[name].update(path=str(path), dtype="float32", **options)
  preflight.check(config, num_devices=8)
  task = pretrain.make(config)
  params, extra = jax.jit(task.init)(jax.random.key(0))
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
  keys = jax.random.split(jax.random.key(1), 2)
  loss, (terms, _) = jax.jit(task.loss)(params, extra, task.frozen, {"image": images}, keys)
  np.testing.assert_allclose(
    loss,
    terms["pixel"] + terms["mimic"] + 0.5 * terms["mimic_dino"] + terms["mimic_own"],
    rtol=1e-5,
  )
  assert set(params["mimic_heads"]) == {"mimic", "mimic_dino", "mimic_own"} == set(task.frozen)
  assert len(task.notes) == 3 and task.notes[1].startswith("mimic_dino: teacher DINO ViT/8")
  config.extra_teachers.dino.loss = "huber"
  with pytest.raises(ConfigError, match="config.extra_teachers.dino.loss='huber' is not one of"):
    preflight.check(config, num_devices=8)


@pytest.mark.parametrize(
  "values, message",
  [
    (
      dict(teacher__path="checkpoint:/no/such/run"),
      "config.teacher: .*holds no run with a checkpoint",
    ),
    (dict(teacher__name="clip_vit_b16"), "config.teacher: .*leave teacher.name"),
    (dict(teacher__layer="proj"), "config.teacher: no projection in .*choose layer raw or normed"),
    (dict(teacher__last_k=3), "config.teacher: last_k=3 needs .* 1 to 1 blocks"),
    (
      dict(method__masking="focused"),
      "masking='focused' needs the attention of a CLS token, which encoder of .* lacks",
    ),
    (dict(teacher__salient_share=0.5), "salient_share=0.5 needs the attention of a CLS token"),
    (
      dict(encoder__cls_token=True, teacher__tokens="visible+cls"),
      "tokens='visible\\+cls': encoder of .* has no CLS token",
    ),
  ],
)
def test_what_such_a_teacher_cannot_do(tmp_path, values, message):
  finished_run(tmp_path)
  config = tiny.changed(tiny.get_config(), **dict(teacher__path=f"checkpoint:{tmp_path}") | values)
  with pytest.raises(ConfigError, match=message) as error:
    preflight.check(config, num_devices=8)
  assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def show(tmp_path, capsys, monkeypatch):
  def run(*arguments):
    monkeypatch.setattr(
      sys,
      "argv",
      [
        "show-teacher",
        "--config=tests/tiny.py",
        f"--out={tmp_path}/teacher.png",
        "--statistics=20",
        "--count=3",
        *arguments,
      ],
    )
    return run_command(sys.argv), capsys.readouterr()

  return run


def test_show_teacher(tmp_path, show):
  code, printed = show()
  assert code == 0, printed.err
  assert re.search(
    r"CLIP ViT/8 .*grid 4x6, position table 4x4 resized \(bicubic\); 20 images", printed.out
  )
  assert re.search(r"constant share of the targets: layer_norm \d+%, batch 0%", printed.out)
  assert re.search(r"spreads over \d+ of 24 tokens", printed.out)
  picture = np.asarray(Image.open(tmp_path / "teacher.png"))
  assert picture.shape == (3 * (96 + 4) + 4 + 32, 5 * (144 + 4) + 4, 3)
  assert np.abs(np.diff(picture.reshape(-1, 3).astype(int), axis=0)).sum() > 0


def test_show_teacher_names_mistakes(show):
  for arguments, code, message in (
    (["--images=folder:/no/such"], 3, "/no/such: does not exist"),
    (["--config.teacher.path=/no/such"], 2, "/no/such"),
    (["--imags=x"], 2, "imags"),
  ):
    exit_code, printed = show(*arguments)
    assert (
      exit_code == code
      and message in printed.err
      and printed.err.startswith("error: ")
      and printed.err.count("\n") == 1
    )


def test_constant_share():
  rng = np.random.default_rng(0)
  features = rng.standard_normal((4, 9, 16)).astype(np.float32)
  assert show_teacher.constant_share(features, "none") < 0.1
  share = show_teacher.constant_share(features + 10 * rng.standard_normal(16), "layer_norm")
  assert share > 0.95 and show_teacher.constant_share(features * 2 + 5, "batch") < 1e-6


def test_principal_colors_follow_the_largest_differences():
  features = np.zeros((1, 4, 6), np.float32)
  features[0, 2:, 3] = 5
  colors = grid.principal_colors(features)
  assert (
    colors.shape == (1, 4, 3)
    and abs(colors[0, 0, 0] - colors[0, 3, 0]) == 1
    and (colors[0, 0] == colors[0, 1]).all()
  )


def test_every_preset_word_is_known_to_the_schema():
  """The choices that validation allows are those that the code knows."""
  from mrmae_jax.models.decoder import MimicHead

  assert config_lib.LAYERS == teachers.LAYERS
  assert set(config_lib.LOSSES) == set(mrmae.DISTANCES)
  x = jnp.ones((1, 2, 8))
  trees = {
    kind: jax.tree.structure(jax.eval_shape(MimicHead(4, kind).init, jax.random.key(0), x))
    for kind in config_lib.HEADS
  }
  assert len(set(trees.values())) == len(trees)
