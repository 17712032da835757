"""BEiT V2 equals its authors' network, on their weights, and its files come in and go out.

Each case is NAME.json (dimensions) and NAME.safetensors (inputs, weights in the authors' names,
outputs, gradients) in the folder MRMAE_BEIT_GOLDENS, by default tests/goldens/beitv2. Beside them
lie the same weights as files of the authors, of timm and of transformers, and files to refuse.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import configs.finetune
import mrmae_jax
from mrmae_jax import interpolation, optim, preflight, teachers
from mrmae_jax.constants import BEIT, IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.errors import ConfigError, WeightsError
from mrmae_jax.mixup import smooth_one_hot, soft_cross_entropy
from mrmae_jax.models import ViT, head_attention
from mrmae_jax.models.attention import RelativePositions
from mrmae_jax.models.classifier import Classifier
from mrmae_jax.models.layers import Mask
from mrmae_jax.pretrained import PretrainedModel
from mrmae_jax.tasks import finetune, pretrain, probe
from mrmae_jax.weights import beit, loaded_model, model_sources, positions, readers, writers
from mrmae_jax.weights.table import export
from tests import tiny
from tests.helpers.goldens import close, read_tensors
from tests.helpers.programs import Program, run_program, wait_for
from tests.helpers.runs import metrics

GOLDENS = Path(os.environ.get("MRMAE_BEIT_GOLDENS", Path(__file__).parent / "goldens" / "beitv2"))
FORWARD, GRADIENT = 1e-5, 1e-4  # relative to the largest entry
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*.json"))}
CLASSIFIERS = [name for name, case in CASES.items() if "num_classes" in case]
PRETRAINED = [name for name, case in CASES.items() if "vocab_size" in case]
TABLES = [name for name, case in CASES.items() if "cases" in case and name != "index"]


def named(name, prefix):
  return read_tensors(GOLDENS, name, prefix)


def grid_of(case):
  return tuple(side // case["patch_size"] for side in case["image_size"])


def stored(tmp_path, name):
  """The model of a case, out of a file in the authors' names."""
  path = tmp_path / f"{name}.safetensors"
  save_file({key: np.array(x) for key, x in named(name, "param.").items()}, path)
  return readers.read_model(path, grid=grid_of(CASES[name]))


def images_of(name):
  return jnp.asarray(named(name, "in.")["image"].transpose(0, 2, 3, 1))


def same(actual, expected):
  """The same network, with the same parameters bit for bit."""
  fields = ("encoder", "grid", "has_norm", "mean", "std", "classes")
  assert [getattr(actual, x) for x in fields] == [getattr(expected, x) for x in fields]
  actual, expected = (flatten_dict(x.params, sep="/") for x in (actual, expected))
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(actual[name], x, err_msg=name)


def test_the_folder_holds_cases():
  assert CLASSIFIERS and (PRETRAINED and TABLES or "MRMAE_BEIT_GOLDENS" in os.environ)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_layers_logits_and_every_gradient(tmp_path, name):
  case, model = CASES[name], stored(tmp_path, name)
  expected, images = named(name, "out."), images_of(name)
  labels = smooth_one_hot(jnp.asarray(named(name, "in.")["label"]), case["num_classes"], 0.0)
  pool = "mean" if "fc_norm" in model.params["classifier"] else "cls"
  network = Classifier(model.encoder, case["num_classes"], pool)

  def loss(params):
    logits, out = network.apply({"params": params}, images)
    _, encoded = model.encoder.apply({"params": params["encoder"]}, images)
    return soft_cross_entropy(logits, labels), (logits, out["features"], encoded["layers"])

  params = {"encoder": model.params["encoder"], **model.params["classifier"]}
  value_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (logits, pooled, layers)), gradients = value_and_gradients(params)
  close(value[None], expected["loss"], FORWARD, "loss")
  close(logits, expected["logits"], FORWARD, "logits")
  close(pooled, expected["pooled"], FORWARD, "pooled")
  for i, layer in enumerate(layers):
    close(layer, expected[f"layer{i}"], FORWARD, f"layer{i}")

  if not model.has_norm:
    assert not np.any(gradients["encoder"].pop("norm")["scale"])
  classifier = {name: gradients.pop(name) for name in model.params["classifier"]}
  table = beit.write_table(model.encoder, "timm", tuple(classifier), model.has_norm)
  ours = export({"encoder": gradients["encoder"], "classifier": classifier}, table)
  theirs = named(name, "grad.param.")
  assert ours.keys() == theirs.keys() == named(name, "param.").keys()
  largest = max(np.abs(x).max() for x in theirs.values())
  for key, gradient in ours.items():
    close(gradient, theirs[key], GRADIENT, key, largest)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_bias_is_the_table_at_the_authors_index(name):
  case, expected = CASES[name], named(name, "out.")
  np.testing.assert_array_equal(beit.relative_index(grid_of(case)), expected["index"])
  table = named(name, "param.")["blocks.0.attn.relative_position_bias_table"]
  bias = jax.jit(RelativePositions(grid_of(case), True).bias)(table)
  np.testing.assert_array_equal(bias, expected["bias0"])


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_network_of_pretraining(tmp_path, name):
  model, expected = stored(tmp_path, name), named(name, "out.")
  x, out = jax.jit(model.encoder.apply)({"params": model.params["encoder"]}, images_of(name))
  close(x, expected["tokens"], FORWARD, "tokens")
  for i, layer in enumerate(out["layers"]):
    close(layer, expected[f"layer{i}"], FORWARD, f"layer{i}")
  assert "dropped by design: cls_pt_layers; lm_head; mask_token" in str(model.report)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_interpolated_by_the_authors_rule(name):
  tensors = load_file(GOLDENS / f"{name}.safetensors")
  for key, case in CASES[name]["cases"].items():
    old, new = case["old_grid"], case["new_grid"]
    distances = tensors[f"out.source_positions.{key}"]
    np.testing.assert_allclose(positions.source_distances(old, new), distances, rtol=1e-6)
    table = positions.resize_relative(tensors[f"in.{key}"], (old, old), (new, new))
    np.testing.assert_allclose(table, tensors[f"out.unilm.{key}"], atol=1e-6)
    same_grid = positions.resize_relative(tensors[f"in.{key}"], (old, old), (old, old))
    np.testing.assert_array_equal(same_grid, tensors[f"in.{key}"])


def test_both_axes_of_a_table_are_interpolated_apart():
  rng = np.random.default_rng(0)
  rows, columns = (rng.standard_normal((9, 1, 2)), rng.standard_normal((1, 5, 2)))
  table = np.concatenate([(rows * columns).reshape(-1, 2), np.ones((3, 2))]).astype(np.float32)
  actual = positions.resize_relative(table, (5, 3), (7, 3))
  maps = actual[:-3].reshape(13, 5, 2)
  line = positions.resize_relative(rows[:, 0].astype(np.float32), (5, 1), (7, 1))
  np.testing.assert_allclose(maps, line[:, None] * columns, atol=1e-5)
  np.testing.assert_array_equal(actual[-3:], 1)
  for old, new in ((1, 4), (2, 3), (3, 2)):  # of few distances
    constant = np.ones(((2 * old - 1) ** 2, 1), np.float32)
    resized = positions.resize_relative(constant, (old, old), (new, new))
    np.testing.assert_allclose(resized, np.ones(((2 * new - 1) ** 2, 1)), atol=1e-6)


FILES = {  # of the authors, of timm and of transformers: the same weights
  "unilm_mean.pth": "mean",
  "unilm_cls.pth": "cls",
  "unilm_cls_deepspeed.pth": "cls",
  "unilm_pretrained.pth": "pretrained",
  "timm_mean.safetensors": "mean",
  "timm_cls.safetensors": "cls",
  "hf_mean": "mean",
  "hf_cls": "cls",
}


@pytest.mark.parametrize(
  "file",
  [pytest.param(x, marks=[pytest.mark.torch] if x.endswith("pth") else []) for x in FILES],
)
def test_files_of_others(tmp_path, file):
  if file.endswith("pth"):
    pytest.importorskip("torch")
  if not (GOLDENS / file).exists():
    pytest.skip(f"no {file} in {GOLDENS}")
  name = FILES[file]
  grid = grid_of(CASES[name]) if file.startswith("timm") else None  # the others tell
  model, expected = readers.read_model(GOLDENS / file, grid=grid), stored(tmp_path, name)
  classes = tuple(f"class {i}" for i in range(CASES[name].get("num_classes", 0)))
  same(model._replace(classes=(), mean=expected.mean, std=expected.std), expected)
  assert model.classes == (classes if file.startswith("hf") else ())
  if file.startswith("hf"):
    preprocessor = json.loads((GOLDENS / file / "preprocessor_config.json").read_text())
    assert model.mean == tuple(preprocessor["image_mean"])
  statistics = beit.STATISTICS_NOTE in str(model.report)
  assert statistics != file.startswith("hf")  # whose folder tells
  if file.endswith("pth"):
    wrapper = "module." if "deepspeed" in file else "model."
    assert f"behind '{wrapper}'" in str(model.report)


@pytest.mark.parametrize("form", ["timm", "hf"])
@pytest.mark.parametrize("name", CLASSIFIERS + PRETRAINED)
def test_what_is_written_is_read_bit_for_bit(tmp_path, name, form):
  path = tmp_path / ("x" if form == "hf" else "x.safetensors")
  model = stored(tmp_path, name)
  for part in (model, loaded_model.encoder_only(model)):
    writers.write_model(part, path, form)
    same(readers.read_model(path), part)
  if form == "timm":
    writers.write_model(model, path, form)
    written, expected = load_file(path), named(name, "param.")
    table = expected.pop("rel_pos_bias.relative_position_bias_table", None)
    for key, x in written.items():
      np.testing.assert_array_equal(x, table if key not in expected else expected[key])


REFUSALS = {
  "missing_q_bias": "missing: blocks.1.attn.q_bias, beside blocks.0.attn.q_bias",
  "table_rows": r"blocks.0.attn.relative_position_bias_table has 44 rows, expected "
  r"\(2h-1\)\(2w-1\)\+3, 48 for 3 x 5; give grid=",
  "tables_of_two_grids": "blocks.0.attn.relative_position_bias_table has 52 rows, .*48 for 3 x 5",
  "shared_and_own_tables": "holds rel_pos_bias.relative_position_bias_table, one table for all "
  "blocks, and blocks.0.attn.relative_position_bias_table",
  "gamma_in_one_block_only": "missing: blocks.1.gamma_1, blocks.1.gamma_2, beside blocks.0.gamma_1",
  "key_bias": "blocks.0.attn.k_bias is not zero",
  "nan": "non-finite values in blocks.1.mlp.fc1.weight",
  "unknown_tensor": "unknown: blocks.0.attn.q_norm.weight",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_files_to_refuse(name):
  path = GOLDENS / "reject" / f"{name}.safetensors"
  if not path.is_file():
    pytest.skip(f"no {path}")
  with pytest.raises(WeightsError, match=REFUSALS[name]) as error:
    readers.read_model(path, grid=(3, 5))
  assert "\n" not in str(error.value)


# The fields of the network, and its files as students and teachers.


def random_model(grid=(3, 5), **fields):
  """A tiny BEiT with every parameter away from its start."""
  encoder = ViT(8, 16, 2, 2, 32, **BEIT | fields)
  images = jnp.zeros((1, 8 * grid[0], 8 * grid[1], 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) * 0.3, shapes)
  model = loaded_model.LoadedModel(
    encoder, None, {"encoder": params}, grid, IMAGENET_MEAN, IMAGENET_STD, {}, True, None
  )
  return model._replace(method=model_sources.METHOD, rule=interpolation.BEIT)


def test_hidden_patches_take_their_rows_and_columns_away():
  grid, rng = (2, 3), np.random.default_rng(0)
  for cls_token in (True, False):
    relative = RelativePositions(grid, cls_token)
    table = rng.standard_normal((relative.num_rows, 2), np.float32)
    order = np.stack([rng.permutation(6) for _ in range(4)])
    mask = Mask(jnp.asarray(order[:, :3]), jnp.asarray(np.argsort(order)))
    rows = np.concatenate([np.zeros((4, 1), int), 1 + order[:, :3]], axis=1)[:, 1 - cls_token :]
    index = beit.relative_index(grid)[rows[:, :, None], rows[:, None]]
    whole = lambda table: table[index].transpose(0, 3, 1, 2)
    weights = rng.standard_normal(whole(table).shape, np.float32)
    ours = jax.value_and_grad(lambda t: (relative.bias(t, mask) * weights).sum(), argnums=0)
    theirs = jax.value_and_grad(lambda t: (whole(t) * weights).sum())
    np.testing.assert_array_equal(jax.jit(relative.bias)(table, mask), whole(table))
    for actual, expected in zip(jax.jit(ours)(table), jax.jit(theirs)(jnp.asarray(table))):
      np.testing.assert_allclose(actual, expected, atol=1e-5)
    # The gradient adds up in one order on every device.
    assert "scatter" not in jax.jit(ours).lower(table).as_text()


def test_an_encoder_sees_a_whole_image_as_it_sees_all_patches_of_a_mask():
  model = random_model()
  images = np.random.default_rng(1).standard_normal((2, 24, 40, 3)).astype(np.float32)
  order = np.stack([np.random.default_rng(i).permutation(15) for i in range(2)])
  mask = Mask(jnp.asarray(order), jnp.asarray(np.argsort(order)))
  apply = jax.jit(model.encoder.apply)
  variables = {"params": model.params["encoder"]}
  whole, out = apply(variables, images)
  masked, _ = apply(variables, images, mask)
  expected = np.take_along_axis(np.asarray(whole[:, 1:]), order[..., None], axis=1)
  np.testing.assert_allclose(masked[:, 1:], expected, atol=1e-5)
  weights = jax.jit(lambda p: head_attention(model.encoder, p, images))(model.params["encoder"])
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  np.testing.assert_allclose(weights[:, :, 0, 1:].mean(1), out["attention"], atol=1e-5)


def test_registers_have_no_relative_positions():
  with pytest.raises(ValueError, match="2 registers have no relative positions"):
    jax.eval_shape(
      ViT(8, 16, 1, 2, 32, num_registers=2, relative_positions=True).init,
      jax.random.key(0),
      jnp.zeros((1, 8, 8, 3)),
    )


@pytest.mark.parametrize(
  "fields",
  [
    dict(positions="table", learned_positions=True, key_bias=True),  # MAE's segmenter
    dict(positions="table"),
    dict(layer_scale=False, fuse_layers=(0,)),
    dict(activation="silu"),
  ],
  ids=["segmenter", "constant", "fused", "silu"],
)
def test_relatives_of_the_network_are_written(tmp_path, fields):
  model, path = random_model(**fields), tmp_path / "x.safetensors"
  if "activation" in fields:
    with pytest.raises(WeightsError, match="with activation has no place"):
      writers.write_model(model, path, "timm")
    return
  writers.write_model(model, path, "timm")
  read = readers.read_model(path)
  has_table = "a position table beside the relative positions" in str(read.report)
  assert has_table == ("positions" in fields)
  if fields == dict(positions="table"):
    assert read.encoder.learned_positions and read.params["encoder"].pop("pos_embed").shape
    read = read._replace(encoder=model.encoder)
  same(read, model)
  if "fuse_layers" in fields or "key_bias" in fields:
    with pytest.raises(WeightsError, match="Beit has no place for fused layers or a bias of the k"):
      writers.write_model(model, tmp_path / "y", "hf")
    return
  writers.write_model(model, tmp_path / "y", "hf")
  features = lambda path: mrmae_jax.load(path).encode(np.zeros((1, 24, 40, 3), np.uint8))["pooled"]
  np.testing.assert_allclose(features(tmp_path / "y"), features(path), atol=1e-6)


def test_other_sizes_interpolate_every_table(tmp_path):
  model = random_model((4, 4))
  resized = loaded_model.params_at(model, (6, 5))["encoder"]
  for i in range(2):
    table = model.params["encoder"][f"blocks_{i}"]["attn"]["relative_positions"]
    expected = positions.resize_relative(table, (4, 4), (6, 5))
    np.testing.assert_array_equal(resized[f"blocks_{i}"]["attn"]["relative_positions"], expected)
  writers.write_model(model, tmp_path / "x.safetensors", "timm")
  images = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), np.uint8)
  features = mrmae_jax.load(tmp_path / "x.safetensors").encode(images)["tokens"]
  path, student = str(tmp_path / "x.safetensors"), teachers.StudentImages((48, 40), 8)
  for layer in ("normed", "raw"):
    options = teachers.TeacherOptions(path=path, layer=layer, dtype="float32")
    spec = teachers.read_spec(options, student)
    teacher = teachers.load(spec)
    out = jax.jit(teacher.forward)(teacher.params, images)
    assert (layer == "raw") != np.allclose(out.features, features, atol=1e-5)
    assert out.cls.shape == (2, 16) and out.attention.shape == (2, 30)
  assert "BEiT ViT/8" in spec.description
  assert "position table 4x4 resized (BEiT's spline)" in spec.description


def test_a_fine_tuned_file_is_a_teacher_by_its_last_block_alone():
  path = GOLDENS / "timm_mean.safetensors"
  if not path.is_file():
    pytest.skip(f"no {path}")
  student = teachers.StudentImages((32, 48), 16)
  options = teachers.TeacherOptions(path=str(path), dtype="float32")
  teacher = teachers.load(teachers.read_spec(options, student))
  assert teacher.params["blocks_0"]["attn"]["relative_positions"].shape == (3 * 5 + 3, 2)
  with pytest.raises(WeightsError, match="no last norm, .*choose layer raw"):
    teachers.read_spec(options._replace(layer="normed"), student)


def test_what_does_not_fit_together_is_refused(tmp_path):
  model, path = random_model((3, 5)), tmp_path / "x.safetensors"
  writers.write_model(model, path, "timm")
  tensors = load_file(path)
  index = beit.relative_index((3, 5))
  table = "blocks.0.attn.relative_position_bias_table"
  row = table.replace("bias_table", "index")
  without = lambda *parts: {n: x for n, x in tensors.items() if not n.endswith(parts)}
  head = {"head.weight": np.ones((2, 16), np.float32), "head.bias": np.ones(2, np.float32)}
  for content, message in (
    (tensors, r"has 48 rows, expected \(2h-1\)\(2w-1\)\+3, 52 for 4 x 4; give grid="),
    (tensors | {row: index.T.copy()}, f"{row} differs from BEiT's .query minus key"),
    (without("norm.weight", "norm.bias") | head | {row: index}, "head.weight, but neither of"),
    (without("bias_table"), "holds no positions, neither pos_embed nor"),
  ):
    save_file(content, path)
    with pytest.raises(WeightsError, match=message):
      readers.read_model(path)
  zero = {"blocks.0.attn.k_bias": np.zeros(16, np.float32)}
  save_file(tensors | {row: index} | zero, path)  # the index tells the grid
  read = readers.read_model(path)
  assert read.grid == (3, 5) and "relative_position_index (computed here)" in str(read.report)


@pytest.mark.torch
def test_a_folder_of_deepspeed_holds_a_model(tmp_path):
  torch = pytest.importorskip("torch")
  model = random_model((4, 4))
  writers.write_model(model, tmp_path / "x.safetensors", "timm")
  tensors = {x: torch.from_numpy(t) for x, t in load_file(tmp_path / "x.safetensors").items()}
  moments = {"exp_avg": torch.ones(2)}
  (tmp_path / "step").mkdir()
  content = {"module": tensors, "optimizer": moments, "epoch": 1}
  torch.save(content, tmp_path / "step" / "mp_rank_00_model_states.pt")
  read = readers.read_model(tmp_path / "step")
  assert "behind 'module.'" in str(read.report) and "optimizer (1 tensor)" in str(read.report)
  same(read, model)


def test_the_network_of_a_segmenter_without_its_head_is_taken_out_of_its_file(tmp_path):
  model, path = random_model((4, 4)), tmp_path / "x.safetensors"
  writers.write_model(model, path, "timm")
  tensors = {f"state_dict.backbone.{name}": x for name, x in load_file(path).items()}
  others = ("state_dict.backbone.fpn1.0.weight", "state_dict.neck.conv.weight")
  tensors |= {name: np.ones((2, 2), np.float32) for name in others}
  save_file({name: x for name, x in tensors.items() if ".norm." not in name}, path)
  read = readers.read_model(path)
  report = str(read.report)
  assert "behind 'state_dict.backbone.'" in report and "fpn1.0.weight" in report
  assert "state_dict (1 tensor)" in report and "norm (the source does not hold it)" in report
  with pytest.raises(WeightsError, match="holds no classifier"):
    PretrainedModel(read).classify(np.zeros((1, 32, 32, 3), np.uint8))


# Runs.


FIELDS = dict(patch_size=8, dim=16, depth=2, num_heads=2, mlp_dim=32)


def run_config(make, path):
  """A run that starts from the tiny network in a file, on the digits."""
  values = {f"encoder__{name}": x for name, x in (FIELDS | BEIT).items()}
  return tiny.changed(make("vit"), init_from=str(path), **values)


def test_the_recipe_is_the_authors():
  for argument, values in (
    ("base,encoder=beitv2", (100, 20, 5e-4, 0.6, 0.2)),
    ("large,encoder=beitv2", (50, 5, 2e-4, 0.8, 0.2)),
  ):
    c = configs.finetune.get_config(argument)
    actual = (c.epochs, c.optim.warmup_epochs, optim.peak_rate(c.optim, 1024))
    np.testing.assert_allclose(
      (*actual, c.optim.layer_decay, c.encoder.drop_path), values, rtol=1e-9
    )
    assert {key: c.encoder[key] for key in BEIT} == BEIT
  with pytest.raises(ConfigError, match="size 'huge' is not one of base, large"):
    configs.finetune.get_config("huge,encoder=beitv2")


def test_rates_and_decay_are_the_authors():
  params = random_model().params
  scales = flatten_dict(optim.layer_scales({**params, "head": {"bias": 0.0}}, 0.5), sep="/")
  decayed = flatten_dict(optim.decay_mask(params, ("pos_embed", "cls_token")), sep="/")
  for name, scale in (("cls_token", 1 / 8), ("patch_embed/kernel", 1 / 8), ("norm/scale", 1)):
    assert scales[f"encoder/{name}"] == scale
  assert scales["encoder/blocks_0/attn/relative_positions"] == 1 / 4
  expected = {"kernel": True, "relative_positions": True}
  for name, is_decayed in decayed.items():
    assert is_decayed == expected.get(name.split("/")[-1], False), name


def test_a_file_is_fine_tuned_probed_and_trained_further(tmp_path):
  model, path = random_model((4, 4)), tmp_path / "x.safetensors"
  writers.write_model(model, path, "timm")
  config = run_config(tiny.finetune_config, path)
  preflight.check(config, num_devices=8)
  task = finetune.make(config)
  assert "BEiT's blocks" in task.notes[0]
  assert "tables of distances 4x4 interpolated to 4x6" in task.notes[0]
  expected = flatten_dict(loaded_model.params_at(model, (4, 6))["encoder"], sep="/")
  assert task.pretrained.keys() == {f"encoder/{name}" for name in expected}
  for name, x in expected.items():
    np.testing.assert_array_equal(task.pretrained[f"encoder/{name}"], x)
  shapes = flatten_dict(jax.eval_shape(task.init, jax.random.key(0))[0], sep="/")
  assert all(shapes[name].shape == x.shape for name, x in task.pretrained.items())
  further = pretrain.make(tiny.changed(run_config(tiny.get_config, path), teacher__path=""))
  assert "tables of distances 4x4 interpolated to 4x6" in further.notes[0]
  assert further.pretrained.keys() == task.pretrained.keys()
  probed = probe.make(run_config(tiny.probe_config, path))
  frozen = flatten_dict(probed.frozen["encoder"], sep="/")
  np.testing.assert_array_equal(frozen["cls_token"], expected["cls_token"])
  config.encoder.learned_positions = True
  with pytest.raises(ConfigError, match="no position table to train; add --config.encoder.learned"):
    preflight.check(config, num_devices=8)
  plain = tiny.finetune_config("vit", init_from=str(path))
  with pytest.raises(WeightsError, match="--config.encoder.relative_positions=True") as error:
    finetune.make(plain)
  for option in ("positions=none", "key_bias=False", "layer_scale=True", "learned_positions=False"):
    assert f"--config.encoder.{option}" in str(error.value)


@pytest.mark.variant
def test_a_run_from_a_file_learns_and_resumes_bit_for_bit(tmp_path):
  encoder = ViT(**(FIELDS | BEIT))
  images = jnp.zeros((1, 32, 32, 3))
  params = jax.tree.map(np.asarray, jax.jit(encoder.init)(jax.random.key(0), images)["params"])
  model = random_model((4, 4))._replace(params={"encoder": params})
  writers.write_model(model, tmp_path / "x.safetensors", "timm")
  values = {f"encoder.{name}": x for name, x in FIELDS.items()}
  values |= {"image_size": "(32,32)", "batch_size": 64, "mix.groups": 1, "epochs": 3}
  values |= {"data.source": "digits", "data.holdout_every": 5, "data.flip": False}
  values |= {"data.randaug": "", "data.erase_prob": 0, "data.crop_scale": "(0.7,1.0)"}
  values |= {"mix.mixup_alpha": 0, "mix.cutmix_alpha": 0, "optim.blr": 2e-2, "dtype": "float32"}
  values |= {"optim.layer_decay": 0.9, "encoder.drop_path": 0.1, "optim.warmup_epochs": 0.5}
  values |= {"init_from": tmp_path / "x.safetensors", "checkpoint_every": 0.5, "log_every": 1}
  command = lambda workdir: [
    *("-m", "mrmae_jax", "finetune", "--config=finetune:base,encoder=beitv2"),
    f"--workdir={tmp_path / workdir}",
    *(f"--config.{name}={value}" for name, value in values.items()),
  ]
  code, _, err = run_program(command("whole"))
  assert code == 0, err
  losses, accuracies = metrics(tmp_path / "whole")
  first, last = (accuracies[step]["accuracy/top1"] for step in (0, max(accuracies)))
  assert last > first + 0.1
  process, log = Program(command("killed"), tmp_path / "log"), tmp_path / "killed/metrics.jsonl"
  wait_for(lambda: log.is_file() and '"step": 20,' in log.read_text(), process, tmp_path / "log")
  process.kill()
  process.wait()
  code, out, err = run_program(command("killed"))
  assert code == 0 and "resuming after step" in out, err
  resumed = metrics(tmp_path / "killed")[0]
  assert {i: row["loss"] for i, row in resumed.items()} == {
    i: row["loss"] for i, row in losses.items()
  }
  models = [readers.read_model(tmp_path / name) for name in ("whole", "killed")]
  jax.tree.map(np.testing.assert_array_equal, *(model.params for model in models))
