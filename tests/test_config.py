"""Configurations: those in configs/ load, pass the checks and build; a mistake has one line."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import cifar10, convmae, demo, finetune, mae, mrmae, probe
from configs.sweeps import ablation
from mrmae_jax import __main__ as entry
from mrmae_jax import __version__, data, preflight
from mrmae_jax import config as config_lib
from mrmae_jax.cli.configs import load_config
from mrmae_jax.cli.train import settle_source
from mrmae_jax.errors import ConfigError, UsageError
from mrmae_jax.tasks import pretrain
from mrmae_jax.weights.hub import PRESETS
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.programs import run_program

ROOT = Path(__file__).parent.parent


def shapes(config, teacher_dims=None):
  """The parameter shapes of a configuration's student, without computing anything."""
  model = pretrain.make_model(config, teacher_dims or {})
  return shapes_of(model, tuple(config.image_size), config.method.mask_ratio)


@functools.cache
def shapes_of(model, image_size, mask_ratio):
  init = functools.partial(pretrain.init_params, model, image_size, mask_ratio)
  return jax.eval_shape(init, jax.random.key(0))


def millions(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """An offline cache of the Hugging Face hub with the config.json of CLIP-B/16 and DINO-B/16."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  sizes = dict(
    patch_size=16,
    image_size=224,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
  )
  for name, config in (
    (
      "clip_vit_b16",
      {
        "model_type": "clip",
        "projection_dim": 512,
        "vision_config": sizes | dict(layer_norm_eps=1e-5, hidden_act="quick_gelu"),
      },
    ),
    ("dino_vit_b16", {"model_type": "vit", "layer_norm_eps": 1e-12, "hidden_act": "gelu"} | sizes),
  ):
    preset = PRESETS[name]
    commit = preset.revision if len(preset.revision) == 40 else "0" * 40
    root = tmp_path / "hub" / f"models--{preset.repo.replace('/', '--')}"
    ref = root / "refs" / preset.revision
    ref.parent.mkdir(parents=True)
    ref.write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    (root / "snapshots" / commit / "config.json").write_text(json.dumps(config))


SLOW_SIZES = ("large", "huge")  # 24 and 32 blocks take seconds to trace
CONFIGS = [
  (module, size) for module in (convmae, mae, mrmae) for size in ("small", "base", "large", "huge")
]


@pytest.mark.parametrize(
  "module, size",
  [
    pytest.param(m, s, id=f"{m.__name__}:{s}", marks=[pytest.mark.variant] * (s in SLOW_SIZES))
    for m, s in CONFIGS
  ],
)
def test_shipped_configs_validate_and_build(module, size, hub, tmp_path):
  config = module.get_config(size)
  (tmp_path / "photo.png").touch()
  config.data.source = f"folder:{tmp_path}"  # instead of tfds:imagenet2012, which needs preparation
  preflight.check(config, num_devices=32)
  params = shapes(config, {"mimic": 768})
  assert millions(params) > 20 and ("mimic_heads" in params) == (module is mrmae)
  for word in ("Command:", "Hardware:", "Cost:", "Expected:"):
    assert word in module.__doc__


def test_the_full_recipe_and_its_arguments():
  c = mrmae.get_config()
  assert (
    c.method.masking == "focused" and c.encoder.fuse_layers == (2, 5, 8) and c.encoder.fuse_stages
  )
  assert c.teacher.name == "clip_vit_b16" and not c.extra_teachers
  c = mrmae.get_config(
    "large,encoder=vit,teacher=clip_vit_l14+dino_vit_b16,masking=random,fusion=none,tokens=masked,masks=4"
  )
  assert c.encoder.name == "vit" and c.encoder.depth == 24 and c.encoder.fuse_layers == ()
  assert (c.teacher.name, c.extra_teachers.dino_vit_b16.name) == ("clip_vit_l14", "dino_vit_b16")
  assert (
    c.extra_teachers.dino_vit_b16.tokens == c.teacher.tokens == "masked"
    and c.method.pixel_weight == 0
  )
  assert c.method.masking == "random" and c.method.complementary_masks == 4 and c.optim.blr == 6e-4
  for argument, message in (
    ("giant", "size 'giant' is not one of small, base"),
    ("base,maskin=random", "the argument 'maskin=random'"),
    ("fusion=all", "fusion=all must be"),
    ("masks=many", "'masks=many': expected a value like 1"),
  ):
    with pytest.raises(ConfigError, match=message):
      mrmae.get_config(argument)


def test_every_ablation_validates_and_builds(hub, tmp_path):
  (tmp_path / "photo.png").touch()
  distinct = set()
  for item in ablation.sweep():
    config = ablation.get_config(item.pop("argument"))
    config.update_from_flattened_dict(item)
    config.data.source = f"folder:{tmp_path}"
    preflight.check(config, num_devices=8)
    params = shapes(config, {"mimic": 768, "mimic_dino_vit_b16": 768})
    assert len(params["mimic_heads"]) == 1 + len(config.extra_teachers)
    distinct.add(config.to_json())
  assert len(distinct) == 11


def test_demo_validates():
  preflight.check(demo.get_config(), num_devices=1)
  assert sum(f.stat().st_size for f in (ROOT / "configs" / "demo_teacher").iterdir()) < 2_000_000


@pytest.mark.parametrize(
  "module, argument",
  [
    (finetune, "base"),
    (finetune, "large,encoder=vit"),
    (finetune, "base,encoder=beitv2"),
    (finetune, "huge"),
    (probe, "base"),
    (probe, "small,encoder=vit"),
    (probe, "large,encoder=beitv2"),
  ],
)
def test_configs_that_need_labels(module, argument, tmp_path):
  for split in ("train", "validation"):
    for name in "ab":
      (tmp_path / split / name).mkdir(parents=True)
      (tmp_path / split / name / "photo.png").touch()
  config = module.get_config(argument)
  config.data.source, config.init_from = f"folder:{tmp_path}", ""
  preflight.check(config, num_devices=32)
  for word in ("Command:", "Hardware:", "Cost:", "Expected:"):
    assert word in module.__doc__


@pytest.mark.parametrize("module", [finetune, probe])
def test_a_workdir_instead_of_a_size(module, tmp_path):
  """Encoder, images and precision of the run, the recipe of the file."""
  ours = tiny.get_config()
  ours.data.mean = (0.1, 0.2, 0.3)
  ours.encoder.learned_positions = True  # as after fine-tuning
  (tmp_path / "config.json").write_text(ours.to_json())
  config = module.get_config(str(tmp_path))
  assert (
    config.init_from == str(tmp_path)
    and config.image_size == (32, 48)
    and config.dtype == "float32"
  )
  assert (
    config.data.source == "digits"
    and config.data.mean == (0.1, 0.2, 0.3)
    and config.data.holdout_every == 5
  )
  assert config.encoder.embed_dims == (8, 12, 24) and config.encoder.drop_path == (
    0.1 if module is finetune else 0.0
  )
  assert config.encoder.learned_positions  # a probe takes the encoder as it is
  config.batch_size, config.optim.warmup_epochs = 32, 0.0
  preflight.check(config, num_devices=8)
  with pytest.raises(ConfigError, match="none is neither a size nor the workdir of a run"):
    module.get_config(str(tmp_path / "none"))


@pytest.mark.variant
def test_the_ladder_has_one_compute_budget():
  """The costs that the epochs follow from are XLA's counts."""
  flops, epochs = {}, {}
  for method in cifar10.COST:
    config = cifar10.get_config(method)
    config.data.source = "digits"
    if method == "mrmae":
      # As large as the teacher that the README trains
      config.teacher.path = demo.get_config().teacher.path
    task, keys = (
      pretrain.make(config),
      jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8)),
    )
    batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)}
    gradient = jax.jit(
      lambda *inputs, task=task: jax.value_and_grad(task.loss, has_aux=True)(*inputs)
    )
    lowered = gradient.lower(
      *jax.eval_shape(task.init, jax.random.key(0)), task.frozen, batch, keys
    )
    flops[method], epochs[method] = lowered.cost_analysis()["flops"], config.epochs
  budget = flops["convmae"] * epochs["convmae"]
  for method in flops:
    assert abs(flops[method] * epochs[method] / budget - 1) < 0.03, method
  assert epochs["mae"] > epochs["convmae"] > epochs["mrmae"]


@pytest.mark.parametrize(
  "size, encoder, fusion, decoder",
  [
    ("small", 21.87, 1.18, 25.81),
    ("base", 84.46, 4.33, 26.01),
    ("large", 321.75, 9.44, 42.93),
    ("huge", 679.21, 20.97, 43.06),
  ],
)
def test_parameter_counts_are_the_published_ones(size, encoder, fusion, decoder):
  """Millions, counted on the reference code: encoder without fusion, its fusion, decoder."""
  params = shapes(convmae.get_config(size))
  fused = {name: part for name, part in params["encoder"].items() if name.endswith("output_decode")}
  rest = {name: part for name, part in params["encoder"].items() if name not in fused}
  assert [round(millions(x), 2) for x in (rest, fused, params["decoder"])] == [
    encoder,
    fusion,
    decoder,
  ]
  if size == "base":
    assert round(millions(params), 2) == 114.79


def test_mae_base_has_the_parameters_of_vit_b():
  assert (
    round(millions(shapes(mae.get_config("base"))["encoder"]), 2) == 85.65
  )  # ViT-B/16 without head; positions are constants


def test_configs_are_read_without_jax_and_without_a_checkout(tmp_path):
  """The folder configs/ is not on the path, and the current folder is another."""
  (tmp_path / "mrmae_jax").symlink_to(ROOT / "mrmae_jax")
  code = (
    "import runpy, sys; from pathlib import Path\n"
    f"for path in sorted(Path({str(ROOT / 'configs')!r}).rglob('*.py')):\n"
    "  run = runpy.run_path(str(path))\n"
    "  if 'get_config' in run: print(run['get_config']().task)\n"
    "print([m for m in ('jax', 'flax', 'torch', 'tensorflow', 'configs') if m in sys.modules])"
  )
  out = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  assert len(out) > 10 and out[-1] == "[]"


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


@pytest.mark.parametrize(
  "overrides, message",
  [
    (dict(optim__blr=float("nan")), r"config\.optim\.blr=nan must be a finite number > 0"),
    (dict(optim__blr=-1e-4), r"config\.optim\.blr=-0\.0001 must be a finite number > 0"),
    (dict(epochs=float("inf")), r"config\.epochs=inf must be a finite number > 0"),
    (
      dict(optim__weight_decay=-0.1),
      r"config\.optim\.weight_decay=-0\.1 must be a finite number >= 0",
    ),
    (dict(optim__b2=1.0), r"config\.optim\.b2=1\.0 must lie in \[0, 1\)"),
    (dict(optim__warmup_epochs=5.0), r"warmup_epochs=5\.0 is longer than config\.epochs"),
    (
      dict(image_size=(36, 48), teacher__path=""),
      r"config\.image_size=\(36, 48\) is not a multiple of the token size 8; nearest: \(32, 48\)",
    ),
    (dict(image_size=(32,)), r"config\.image_size=\(32,\) must hold two numbers"),
    (
      dict(batch_size=20),
      r"config\.batch_size=20 is not divisible by 8 devices x 1 accumulation steps; "
      r"nearest: 16 or 24",
    ),
    (
      dict(batch_size=24, optim__accum_steps=2),
      r"batch_size=24 is not divisible by 8 devices x 2 .* nearest: 16 or 32",
    ),
    (dict(batch_size=4), r"nearest: 8$"),
    (dict(mesh__fsdp=3), r"config\.mesh data=-1 x fsdp=3 does not fit 8 devices"),
    (dict(method__mask_ratio=1.0), r"mask_ratio=1\.0 leaves 0 of 24 tokens visible"),
    (dict(method__mask_ratio=0.99), r"mask_ratio=0\.99 leaves 0 of 24 tokens visible"),
    (
      dict(encoder__num_heads=5),
      r"config\.encoder: width 24 must be a multiple of 4 and of num_heads=5",
    ),
    (dict(dtype="float16"), r"config\.dtype='float16' is not one of bfloat16, float32"),
    (dict(data__source=None), r"config\.data\.source is not set"),
    (
      dict(data__source="folder:/no/such/folder"),
      r"config\.data: folder:/no/such/folder: does not exist",
    ),
    (
      dict(data__source="didgits"),
      r"config\.data: dataset 'didgits' given; expected digits, folder:",
    ),
    (dict(data__crop_scale=(0.0, 1.0)), r"config\.data\.crop_scale=\(0\.0, 1\.0\)"),
    (
      dict(data__std=(0.5, 0.0, 0.5)),
      r"config\.data\.std=\(0\.5, 0\.0, 0\.5\) must satisfy 0 < x <= 1",
    ),
    (
      dict(teacher__path=None),
      r"config\.teacher is not set; give config\.teacher\.name=clip_vit_b16",
    ),
    (dict(teacher__path="/no/such/teacher"), r"config\.teacher: .*/no/such/teacher"),
    (dict(teacher__name="clip_vit_b17"), r"config\.teacher: .*clip_vit_b17.*clip_vit_b16"),
    (
      dict(teacher__loss="huber"),
      r"config\.teacher\.loss='huber' is not one of mse, smooth_l1, cosine, l1",
    ),
    (dict(teacher__weight=-1.0), r"config\.teacher\.weight=-1\.0 must be a finite number >= 0"),
    (dict(teacher__salient_share=0.0), r"config\.teacher\.salient_share=0\.0 must satisfy"),
    (
      dict(teacher__tokens="visible+cls"),
      r"tokens='visible\+cls' needs a student with a CLS token: config\.encoder\.cls_token=True",
    ),
    (dict(teacher__layer="proj", teacher__last_k=2), r"config\.teacher: .*last_k"),
    (
      dict(method__masking="focused", teacher__path=""),
      r"config\.method\.masking='focused' needs config\.teacher",
    ),
    (
      dict(method__masking="focussed"),
      r"config\.method\.masking='focussed' is not one of random, focused",
    ),
    (dict(method__pixel_weight=0.0, teacher__path=""), r"leaves nothing to learn"),
    (
      dict(method__complementary_masks=5),
      r"complementary_masks=5 sets of 6 visible tokens do not fit 24; "
      r"it must be a whole number from 1 to 4",
    ),
    (dict(method__complementary_masks=0), r"complementary_masks=0 sets of"),
    (dict(encoder__drop_path=0.1), r"encoder.drop_path=0.1 is for fine-tuning"),
    (
      dict(method__attention_temperature=0.0),
      r"attention_temperature=0\.0 must be a finite number > 0",
    ),
    (dict(method__attention_mix=1.5), r"attention_mix=1\.5 must lie in \[0, 1\]"),
    (
      dict(encoder__fuse_layers=(0, 1), encoder__depths=(1, 1, 2)),
      r"fuse_layers=\(0, 1\) must be different blocks from 0 to 0; the last, 1,",
    ),
  ],
)
def test_mistakes_are_named(overrides, message):
  with pytest.raises(ConfigError) as error:
    preflight.check(changed(**overrides), num_devices=8)
  assert re.search(message, str(error.value)), error.value
  assert len(str(error.value).splitlines()) == 1


def test_all_mistakes_are_reported_at_once():
  with pytest.raises(ConfigError) as error:
    preflight.check(
      changed(optim__blr=-1.0, batch_size=20, data__source="folder:/nope", teacher__path="/nope"),
      num_devices=8,
    )
  assert len(str(error.value).splitlines()) == 4


def test_validation_comes_before_compilation(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ConfigError, match="no images; looked for .jpg"):
    preflight.check(changed(data__source=f"folder:{tmp_path}/empty"), num_devices=8)


def command(*arguments):
  done = run_program(["-m", "mrmae_jax", "pretrain", *arguments])
  return done.returncode, done.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      ["--config.optim.lr=1"],
      "--config.optim.lr=1: config.optim has no key 'lr'; did you mean config.optim.blr?",
    ),
    (["--config.optm.blr=1"], "config has no key 'optm'; did you mean config.optim?"),
    (["config.seed=3"], "'config.seed=3' is not an option; did you mean --config.seed=3?"),
    (["--config.batch_size=many"], "--config.batch_size=many given; expected a whole number"),
    (["--config.data.flip=yes"], "--config.data.flip=yes given; expected True or False"),
    (["--config.epochs=many"], "--config.epochs=many given; expected a number"),
    (["-config.seed=3"], "'-config.seed=3' is not an option; did you mean --config.seed=3?"),
    (["--on_error=skip"], "did you mean --config.data.on_error=VALUE?"),
    (["-multihost"], "'-multihost' is not an option; did you mean --multihost?"),
    (["--check=yes"], "--check=yes given; it takes no value: give --check or leave it out"),
    (["--worrkdir=/tmp/x"], "'--worrkdir=/tmp/x' is not an option; did you mean --workdir?"),
    (["--config=configs/none.py"], "--config=configs/none.py: no such file"),
    (["--config=configs/mae.py:giant"], "size 'giant' is not one of small, base, large, huge"),
    (
      ["--config=configs/mrmae.py:base,mask=random"],
      "the argument 'mask=random' is not one of size=base, encoder=convvit",
    ),
  ],
)
def test_mistyped_command_lines(arguments, message, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  given = [] if arguments[0].startswith("--config=") else ["--config=configs/demo.py"]
  assert run_command(["pretrain", *given, "--workdir=/nonexistent", *arguments]) == 2
  err = capsys.readouterr().err
  assert message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["None", "none", "null", ""])
def test_none_means_no_text(text):
  overrides = ["teacher.path", "teacher.name", "data.quarantine"]
  config = load_config("demo", [f"--config.{key}={text}" for key in overrides])
  assert (config.teacher.path, config.teacher.name, config.data.quarantine) == ("", "", "")


def test_of_a_key_that_is_given_twice_the_last_counts():
  twice = ["--config.data.crop_scale=(0.1, 0.5)", "--config.batch_size=8"]
  config = load_config("demo", [*twice, "--config.data.crop_scale=(0.2, 1.0)"])
  assert config.data.crop_scale == (0.2, 1.0) and config.batch_size == 8


def test_a_run_knows_its_images_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for written, stored in (
    ("folder:photos", f"folder:{tmp_path}/photos"),
    ("packed:../x", f"packed:{tmp_path.parent}/x"),
    ("coco:/data/coco", "coco:/data/coco"),
    ("coco:digits", "coco:digits"),
    ("scenes:digits", "scenes:digits"),
    ("packed:gs://bucket/x", "packed:gs://bucket/x"),
    ("tfds:imagenet2012", "tfds:imagenet2012"),
    ("digits", "digits"),
    ("folder:", "folder:"),
  ):
    assert data.with_absolute_path(written) == stored
  config = load_config("photos", ["--config.data.source=folder:photos"])
  settle_source(config, "run")
  assert config.data.source == f"folder:{tmp_path}/photos"
  with pytest.raises(UsageError, match="--workdir=photos/run lies in the folder of the images"):
    settle_source(config, "photos/run")


def test_a_recipe_that_needs_images_says_so(tmp_path, capsys):
  for words in (["pretrain"], ["doctor"]):
    words += ["--config=photos", f"--workdir={tmp_path}/run", "--config.teacher.path="]
    assert run_command(words) == 2
    assert "config.data.source is not set; use digits, folder:" in "".join(capsys.readouterr())


def test_warnings_of_a_process_begin_as_its_other_lines():
  code = "from mrmae_jax.cli import console; console.show_warnings(); from absl import logging; "
  command = [sys.executable, "-c", f"{code}logging.warning('%s is old', 'x'); logging.info('no')"]
  done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
  assert done.stderr == "warning: x is old\n"


def test_none_that_is_a_choice_stays():
  overrides = ["--config.encoder.remat=none", "--config.teacher.target_norm=none"]
  config = load_config("demo", overrides)
  assert (config.encoder.remat, config.teacher.target_norm) == ("none", "none")


@pytest.mark.parametrize("make", ["vit", "finetune", "evals", "teachers"])
def test_the_configuration_of_a_run_is_a_configuration(make, tmp_path):
  config = tiny.get_config("vit" if make == "vit" else "convvit")
  if make == "finetune":
    config = tiny.finetune_config()
  if make == "evals":
    del config.evals.reconstruct
  if make == "teachers":
    config.extra_teachers.dino = config_lib.teacher_section()
    config.extra_teachers.dino.path = "/teacher"
  (tmp_path / "config.json").write_text(config.to_json())
  for name in (tmp_path, tmp_path / "config.json"):
    assert load_config(str(name)).to_json() == config.to_json()
  assert load_config(str(tmp_path), ["--config.data.source=x"]).data.source == "x"


def test_another_json_file_is_not_a_configuration(tmp_path):
  for text in ("{}", "[]", "{", '{"task": "pretrain"}', '{"task": "fly"}', '{"task": []}'):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="not the configuration of a run") as caught:
      load_config(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_version_is_told(capsys):
  assert entry.main(["mrmae", "--version"]) == 0
  assert capsys.readouterr().out == f"mrmae_jax {__version__}\n"


def test_a_missing_flag_is_named(capsys):
  assert run_command(["pretrain", "--config=configs/demo.py"]) == 2
  err = capsys.readouterr().err
  assert "--workdir is missing" in err and err.count("\n") == 1


def test_help(capsys):
  assert run_command(["pretrain", "--help"]) == 0
  out = capsys.readouterr().out
  assert all(word in out for word in ("usage: mrmae pretrain", "--check", "--workdir"))
  assert "base learning rate; the peak is blr * batch_size / 256" in out


def test_an_unreadable_image_is_named(tmp_path):
  (tmp_path / "images").mkdir()
  for i in range(20):
    (tmp_path / "images" / f"{i:02}.jpg").write_bytes(b"<html>not found</html>")
  source = f"--config.data.source=folder:{tmp_path}/images"
  code, err = command("--config=tests/tiny.py", f"--workdir={tmp_path}/run", source)
  assert code == 3 and re.search(r"error: .*\d\d\.jpg", err) and "Traceback" not in err


def test_wrong_teacher_weights_stop_the_run_before_compilation(tmp_path):
  teacher = ROOT / "tests" / "goldens" / "teachers" / "reject_missing_key"
  code, err = command(
    "--config=tests/tiny.py", f"--workdir={tmp_path}/run", f"--config.teacher.path={teacher}"
  )
  assert (
    code == 2 and "missing: " in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
  )


def test_every_key_is_explained_and_takes_its_default():
  for task in config_lib.TASKS:
    config = config_lib.defaults(task)
    keys, values = config_lib.find_keys(config), config_lib.flatten(config)
    assert keys.keys() == values.keys() and all(key.help for key in keys.values())
    assert [name for name, _, _ in config_lib.describe(config)] == list(values)
    for name, key in keys.items():
      if type(key.allowed) is tuple:
        assert values[name] in key.allowed and key.default == key.allowed[0]
  rows = {name: text for name, _, text in config_lib.describe(config_lib.pretrain())}
  assert rows["teacher.loss"] == "distance to its features (mse, smooth_l1, cosine, l1)"


def test_what_a_run_that_resumes_may_change():
  config = tiny.get_config()
  config.extra_teachers.dino = config_lib.teacher_section()
  config.data.exif, config.optim.schedule = "apply", "poly"  # keys that came later
  config.optim.update(warmup_steps=5, decay_of="all", full_rate=("pos_embed",))
  config.encoder.update(eps=1e-5, layer_scale=True, relative_positions=True)
  before = config_lib.identity(config)
  json.dumps(before)  # as it is stored
  assert before["image_size"] == [32, 48] and before["extra_teachers.dino.loss"] == "mse"
  free = (
    "encoder.remat data.source data.workers data.data_dir data.labels data.quarantine "
    "data.on_error data.max_skipped data.timeout_s optim.accum_steps optim.max_skips log_every "
    "eval_every "
    "checkpoint_every keep_checkpoints keep_best hang_s wandb mesh.data mesh.fsdp evals.knn.k "
    "evals.knn.temperature evals.knn.batch_size evals.knn.bank evals.reconstruct.images "
    "teacher.name teacher.path extra_teachers.dino.name extra_teachers.dino.path init_from"
  )
  assert config_lib.flatten(config).keys() - before.keys() == set(free.split())
  local = {name for name in free.split() if config_lib.find_keys(config)[name].resume == "local"}
  assert local == config_lib.flatten(config).keys() - config_lib.shared_values(config).keys()
  assert local == {name for name in free.split() if name.endswith((".name", ".path"))} | {
    "data.source",
    "data.workers",
    "data.data_dir",
    "data.labels",
    "data.quarantine",
    "init_from",
  }
  config.log_every, config.evals = 7, {}
  assert config_lib.identity(config) == before
  config.optim.blr = 1.0
  assert config_lib.identity(config) != before


def test_self_distillation():
  """Its defaults are those of the bundled teacher's training, and mistakes have a line each."""
  config = config_lib.self_distill()
  preflight.check(config, num_devices=8)
  assert config.optim.blr * config.batch_size / 256 == pytest.approx(2e-3)
  config.data.mean = config.data.std = (0.5,)
  config.distill.update(objective="byol", visible=0.001, color=2.0)
  with pytest.raises(ConfigError) as error:
    preflight.check(config, num_devices=8)
  lines = str(error.value).splitlines()
  assert lines == [
    "config.distill.objective='byol' is not one of dino, contrast",
    "config.distill.color=2.0 must lie in [0, 1]",
  ]
  config.distill.update(objective="dino", color=0.0)
  with pytest.raises(ConfigError) as error:
    preflight.check(config, num_devices=8)
  first, second = str(error.value).splitlines()
  assert "self-distillation is for RGB" in first and "must leave one of 64 patches" in second
