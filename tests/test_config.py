"""Configurations: all that ship load, validate and build at their published size; mistakes get one clear line each."""

import json
import math
import os
from pathlib import Path
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import convmae, demo, mae, mrmae
from mrmae_jax import config as config_lib
from mrmae_jax.config import ConfigError, validate
from mrmae_jax.mrmae import sample_mask
from mrmae_jax.tasks import pretrain
from tests import tiny

ROOT = Path(__file__).parent.parent


def shapes(config, teacher_dim=None):
  """The parameter shapes of a configuration's student, and the loss on them, without computing anything."""
  model = pretrain.make_model(config, teacher_dim)
  grid = tuple(side // model.encoder.patch_size for side in config.image_size)

  def init(key):
    pixels, noise = jnp.zeros((1, *config.image_size, 3)), jax.random.uniform(key, (1, math.prod(grid)))
    mask = sample_mask(noise, config.method.mask_ratio)
    tokens, encoder = model.encoder.init_with_output(key, pixels, mask)
    head = {"mimic_head": model.mimic_head.init(key, tokens[0])["params"]} if teacher_dim else {}
    return {"encoder": encoder["params"], "decoder": model.decoder.init(key, tokens[0], mask, grid)["params"]} | head
  return jax.eval_shape(init, jax.random.key(0))


def millions(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6


@pytest.fixture
def clip_b16(tmp_path):
  """The config.json of openai/clip-vit-base-patch16: enough for validation, weights are read later."""
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 512, "vision_config": dict(
      patch_size=16, image_size=224, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
      layer_norm_eps=1e-5, hidden_act="quick_gelu")}))
  return tmp_path


CONFIGS = [(module, size) for module in (convmae, mae, mrmae) for size in ("small", "base", "large", "huge")]


@pytest.mark.parametrize("module, size", CONFIGS, ids=[f"{m.__name__}:{s}" for m, s in CONFIGS])
def test_shipped_configs_validate_and_build(module, size, clip_b16, tmp_path):
  config = module.get_config(size)
  (tmp_path / "photo.png").touch()
  config.data.source = f"folder:{tmp_path}"  # what ships is tfds:imagenet2012, which has to be prepared first
  if module is mrmae:
    config.teacher.path = str(clip_b16)
  validate(config, num_devices=32)
  params = shapes(config, 768 if module is mrmae else None)
  assert millions(params) > 20
  for word in ("Command:", "Hardware:", "Cost:", "Expected:"):
    assert word in module.__doc__


def test_demo_validates():
  validate(demo.get_config(), num_devices=1)
  assert sum(f.stat().st_size for f in (ROOT / "configs" / "demo_teacher").iterdir()) < 2_000_000


# Counted on the reference code of these sizes: encoder without the fusion convolutions, those, decoder, in millions
@pytest.mark.parametrize("size, encoder, fusion, decoder", [
    ("small", 21.87, 1.18, 25.81), ("base", 84.46, 4.33, 26.01), ("large", 321.75, 9.44, 42.93), ("huge", 679.21, 20.97, 43.06)])
def test_parameter_counts_are_the_published_ones(size, encoder, fusion, decoder):
  params = shapes(convmae.get_config(size))
  fused = {name: part for name, part in params["encoder"].items() if name.endswith("output_decode")}
  own = {name: part for name, part in params["encoder"].items() if name not in fused}
  assert [round(millions(x), 2) for x in (own, fused, params["decoder"])] == [encoder, fusion, decoder]
  if size == "base":
    assert round(millions(params), 2) == 114.79


def test_mae_base_has_the_parameters_of_vit_b():
  assert round(millions(shapes(mae.get_config("base"))["encoder"]), 2) == 85.65  # ViT-B/16 without head; positions are constants


def test_configs_are_read_without_jax():
  code = ("import sys; from configs import demo, mrmae, mae, convmae\n"
          "for m in (mrmae, mae, convmae): m.get_config('huge')\n"
          "demo.get_config().to_json(); print([m for m in ('jax', 'flax', 'torch', 'tensorflow') if m in sys.modules])")
  out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert out.strip() == "[]"


def changed(**overrides):
  c = tiny.get_config()
  with c.unlocked():
    for name, value in overrides.items():
      *parents, leaf = name.split("__")
      node = c
      for parent in parents:
        node = node[parent]
      node[leaf] = value
  return c


@pytest.mark.parametrize("overrides, message", [
    (dict(optim__blr=float("nan")), r"config\.optim\.blr=nan must be a finite number > 0"),
    (dict(optim__blr=-1e-4), r"config\.optim\.blr=-0\.0001 must be a finite number > 0"),
    (dict(epochs=float("inf")), r"config\.epochs=inf must be a finite number > 0"),
    (dict(optim__weight_decay=-0.1), r"config\.optim\.weight_decay=-0\.1 must be a finite number >= 0"),
    (dict(optim__b2=1.0), r"config\.optim\.b2=1\.0 must lie in \[0, 1\)"),
    (dict(optim__warmup_epochs=5.0), r"warmup_epochs=5\.0 is longer than config\.epochs"),
    (dict(image_size=(36, 48), teacher__path=""),
     r"config\.image_size=\(36, 48\) is not a multiple of the token size 8; nearest: \(32, 48\)"),
    (dict(image_size=(32,)), r"config\.image_size=\(32,\) must hold two numbers"),
    (dict(batch_size=20), r"config\.batch_size=20 is not divisible by 8 devices x 1 accumulation steps; nearest: 16 or 24"),
    (dict(batch_size=24, optim__accum_steps=2), r"batch_size=24 is not divisible by 8 devices x 2 .* nearest: 16 or 32"),
    (dict(batch_size=4), r"nearest: 8$"),
    (dict(mesh__fsdp=3), r"config\.mesh data=-1 x fsdp=3 does not fit 8 devices"),
    (dict(method__mask_ratio=1.0), r"mask_ratio=1\.0 leaves 0 of 24 tokens visible"),
    (dict(method__mask_ratio=0.99), r"mask_ratio=0\.99 leaves 0 of 24 tokens visible"),
    (dict(encoder__num_heads=5), r"config\.encoder: width 24 must be a multiple of 4 and of num_heads=5"),
    (dict(dtype="float16"), r"config\.dtype='float16' must be 'float32' or 'bfloat16'"),
    (dict(data__source=None), r"config\.data\.source is not set"),
    (dict(data__source="folder:/no/such/folder"), r"config\.data: folder:/no/such/folder: does not exist"),
    (dict(data__source="didgits"), r"config\.data: dataset 'didgits' given; expected 'digits', 'folder:"),
    (dict(data__crop_scale=(0.0, 1.0)), r"config\.data\.crop_scale=\(0\.0, 1\.0\)"),
    (dict(data__std=(0.5, 0.0, 0.5)), r"std > 0"),
    (dict(teacher__path=None), r"config\.teacher\.path is not set; .*hf download"),
    (dict(teacher__path="/no/such/teacher"), r"config\.teacher\.path: teacher /no/such/teacher: .*no such folder"),
    (dict(encoder__patch_sizes=(4, 2, 2)),
     r"the teacher's grid of 4x6 tokens \(8-pixel patches\) does not fit the student's 2x3 \(16-pixel tokens\) on 32x48 images"),
])
def test_mistakes_are_named(overrides, message):
  with pytest.raises(ConfigError) as error:
    validate(changed(**overrides), num_devices=8)
  assert re.search(message, str(error.value)), error.value
  assert len(str(error.value).splitlines()) == 1


def test_all_mistakes_are_reported_at_once():
  with pytest.raises(ConfigError) as error:
    validate(changed(optim__blr=-1.0, batch_size=20, data__source="folder:/nope", teacher__path="/nope"), num_devices=8)
  assert len(str(error.value).splitlines()) == 4


def test_validation_comes_before_compilation(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ConfigError, match="no images; looked for .jpg"):
    validate(changed(data__source=f"folder:{tmp_path}/empty"), num_devices=8)


def command(*arguments):
  env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), XLA_FLAGS="--xla_backend_optimization_level=0")
  done = subprocess.run([sys.executable, "-m", "mrmae_jax.main", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
  return done.returncode, done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--config.optim.lr=1"], "--config.optim.lr=1: config.optim has no key 'lr'; did you mean config.optim.blr?"),
    (["--config.optm.blr=1"], "config has no key 'optm'; did you mean config.optim?"),
    (["config.seed=3"], "'config.seed=3' is not an option; did you mean --config.seed=3?"),
    (["--config.batch_size=many"], "flag --config.batch_size=many: invalid literal for int()"),
    (["--worrkdir=/tmp/x"], "Unknown command line flag 'worrkdir'. Did you mean: workdir"),
    (["--config=configs/none.py"], "--config=configs/none.py: no such file"),
    (["--config=configs/mae.py:giant"], "size 'giant' is not one of small, base, large, huge"),
])
def test_mistyped_command_lines(arguments, message):
  code, err = command("--config=configs/demo.py", "--workdir=/nonexistent", *arguments)
  assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_missing_flag_is_named():
  code, err = command("--config=configs/demo.py")
  assert code == 2 and "--workdir is missing" in err and err.count("\n") == 1


def test_help():
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  out = subprocess.run([sys.executable, "-m", "mrmae_jax.main", "--help"], cwd=ROOT, env=env, capture_output=True, text=True,
                       check=True).stdout
  assert "python -m mrmae_jax.main --config=configs/demo.py" in out and "--check: " in out and "--workdir: " in out


def test_an_unreadable_image_is_named(tmp_path):
  for i in range(20):
    (tmp_path / f"{i:02}.jpg").write_bytes(b"<html>not found</html>")
  code, err = command("--config=tests/tiny.py", f"--workdir={tmp_path}/run", f"--config.data.source=folder:{tmp_path}")
  assert code == 3 and re.search(r"error: .*\d\d\.jpg", err) and "Traceback" not in err


def test_wrong_teacher_weights_stop_the_run_before_compilation(tmp_path):
  teacher = ROOT / "tests" / "goldens" / "teachers" / "reject_missing_key"
  code, err = command("--config=tests/tiny.py", f"--workdir={tmp_path}/run", f"--config.teacher.path={teacher}")
  assert code == 2 and "missing: " in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_help_of_every_key():
  """Each key of the schema is explained by a comment on its line or by the comment above it."""
  source = Path(config_lib.__file__).read_text()
  body = source[source.index("def pretrain("):source.index("def validate(")]
  bare = [line.strip() for line in body.splitlines()
          if re.match(r"\s+c\.[\w.]+ = ", line) and "ConfigDict(" not in line and "#" not in line]
  assert bare == ['c.task = "pretrain"', "c.data.std = IMAGENET_STD"]
