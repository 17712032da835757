"""Trained models in and out: published names, sizes from shapes, exact round trips, refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import mrmae_jax
from mrmae_jax import interpolation, mrmae, train
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ConvViT, Decoder, ViT
from mrmae_jax.models.layers import sincos_2d
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.tasks import pretrain
from mrmae_jax.weights import files, loaded_model, model_sources, positions, readers, writers
from mrmae_jax.weights.table import mlp_ratio
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.models import CONVVIT, DECODER, GRID, VIT, make_student, random_params


def same(actual, expected):
  """The same student: networks, parameters bit for bit, and all that stands beside them."""
  assert actual._replace(params=None, report=None) == expected._replace(params=None, report=None)
  actual, expected = flatten_dict(actual.params, sep="/"), flatten_dict(expected.params, sep="/")
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    assert actual[name].dtype == np.float32
    np.testing.assert_array_equal(actual[name], x, err_msg=name)


STUDENTS = {
  "convvit": (CONVVIT, {}),
  "encoder only": (CONVVIT, dict(decoder=None)),
  "cls": (CONVVIT.clone(cls_token=True), {}),
  "fusion": (CONVVIT.clone(fuse_layers=(0,)), {}),
  "learned": (
    CONVVIT.clone(learned_positions=True),
    dict(decoder=DECODER.clone(learned_positions=True)),
  ),
  "no stages": (CONVVIT.clone(fuse_stages=False), dict(decoder=None, classes=3)),
  "vit": (VIT, {}),
  "vit learned": (VIT.clone(learned_positions=True), dict(decoder=None, classes=3)),
  "vit fusion": (VIT.clone(fuse_layers=(0,)), {}),
  "vit cls head": (VIT, dict(decoder=None, classes=3, fc_norm=False)),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_round_trip_of_files(tmp_path, name):
  encoder, options = STUDENTS[name]
  student, path = make_student(encoder, **options), tmp_path / "x.safetensors"
  writers.write_model(student, path, "timm" if isinstance(encoder, ViT) else "convmae")
  assert [p.name for p in tmp_path.iterdir()] == [
    "x.safetensors"
  ] and path.stat().st_mode & 0o044  # others may read it
  result = readers.read_model(path)
  same(result, student)
  assert str(path) in str(result.report) and ("cannot reconstruct" in str(result.report)) == (
    student.decoder is None
  )
  encoder_only = readers.read_model(path, decoder=False)
  assert encoder_only.decoder is None
  assert ("decoder (not asked for)" in str(encoder_only.report)) == (student.decoder is not None)


@pytest.mark.parametrize("encoder", [CONVVIT, VIT], ids=["convvit", "vit"])
def test_fine_tuned_encoder_without_its_last_norm(tmp_path, encoder):
  student = make_student(
    encoder.clone(learned_positions=True), decoder=None, classes=3, has_norm=False
  )
  path = tmp_path / "x.safetensors"
  writers.write_model(student, path, "timm" if encoder is VIT else "convmae")
  assert not [name for name in load_file(path) if name.startswith("norm.")]
  result = readers.read_model(path)
  assert not result.has_norm and "norm (fine-tuning replaces" in str(result.report)
  fresh = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
  same(
    result,
    student._replace(
      params=student.params | {"encoder": student.params["encoder"] | {"norm": fresh}}
    ),
  )


@pytest.mark.parametrize(
  "decoder",
  [DECODER, None, DECODER.clone(learned_positions=True)],
  ids=["whole", "encoder", "learned"],
)
def test_round_trip_of_hf_folders(tmp_path, decoder):
  student = make_student(VIT.clone(learned_positions=decoder is not DECODER), decoder)
  writers.write_model(student, tmp_path / "hf", "hf")
  assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
  ]
  same(readers.read_model(tmp_path / "hf"), student)
  # In transformers 5's own names of the decoder's blocks.
  if decoder is not None:
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {
      name.replace("decoder_layers.", "decoder_encoder.layer."): x
      for name, x in load_file(file).items()
    }
    files.write_safetensors(file, tensors)
    same(readers.read_model(tmp_path / "hf"), student)


def test_the_tool_converts_there_and_back(tmp_path, capsys):
  student = make_student(VIT)
  writers.write_model(student, tmp_path / "a.safetensors", "timm")
  steps = (("a.safetensors", "hf", "hf"), ("hf", "b.safetensors", "timm"))
  for model, out, form in steps:
    assert (
      run_command(
        ["convert", f"--model={tmp_path / model}", f"--out={tmp_path / out}", f"--format={form}"]
      )
      == 0
    )
  a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
  assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
  assert (
    run_command(
      [
        "convert",
        f"--model={tmp_path}/hf",
        f"--out={tmp_path}/c.safetensors",
        "--format=timm",
        "--parts=encoder",
      ]
    )
    == 0
  )
  same(readers.read_model(tmp_path / "c.safetensors"), loaded_model.encoder_only(student))
  assert capsys.readouterr().err == ""
  for arguments, message in (
    (["--out=x.safetensors"], "--model is missing"),
    (["--model=x"], "--out is missing"),
    (
      [f"--model={tmp_path}/hf", "--out=x.safetensors"],
      "cannot be written as 'convmae'; use timm or hf",
    ),
    ([f"--model={tmp_path}/hf", "--out=x", "--format=timm"], "name it *.safetensors"),
    (
      [f"--model={tmp_path}/hf", f"--out={tmp_path}/a.safetensors", "--format=hf"],
      "is a file; format hf is a folder",
    ),
    ([f"--model={tmp_path}/none", "--out=x.safetensors"], "none: no such file or folder"),
    (["--modle=x"], "modle"),
  ):
    assert run_command(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
  assert not Path("x.safetensors").exists()


@pytest.mark.parametrize(
  "student, form, message",
  [
    (make_student(VIT, None, classes=2), "hf", "no place for a classifier"),
    (make_student(VIT.clone(fuse_layers=(0,))), "hf", "fused layers"),
    (make_student(CONVVIT), "hf", "use convmae"),
    (make_student(CONVVIT), "torch", "not one of convmae, timm, hf"),
  ],
)
def test_forms_that_a_student_cannot_take(tmp_path, student, form, message):
  with pytest.raises(WeightsError, match=message):
    writers.write_model(student, tmp_path / "x", form)
  assert not list(tmp_path.iterdir())


# Files that say nothing of themselves, as published.


def published(
  tmp_path, encoder=CONVVIT, decoder=DECODER, change=lambda tensors: tensors, grid=(4, 4), **options
):
  """A student's tensors in a file without notes, after a change; and the student."""
  student = make_student(encoder, decoder, **options)._replace(grid=grid)
  path = tmp_path / "published.safetensors"
  writers.write_model(student, path, "timm" if isinstance(encoder, ViT) else "convmae")
  tensors = load_file(path)
  files.write_safetensors(path, change(tensors) or tensors)
  return path, student


@pytest.mark.parametrize(
  "encoder", [CONVVIT, VIT, CONVVIT.clone(cls_token=True)], ids=["convmae", "mae", "convmae v2"]
)
def test_sizes_are_read_off_the_tensors(tmp_path, encoder):
  path, student = published(tmp_path, encoder)
  result = readers.read_model(path, num_heads=2, decoder_heads=3)
  same(result._replace(mean=student.mean, std=student.std, method=student.method), student)
  assert result.mean == (0.485, 0.456, 0.406) and result.method == {
    "mask_ratio": 0.75,
    "norm_pix": True,
  }
  dropped = str(result.report).split("dropped by design: ")[1]
  assert dropped == "pos_embed (the sine-cosine table); decoder_pos_embed (the sine-cosine table)"


def test_published_numbers_of_tensors():
  """Of ConvMAE-B: 313 in pre-training and 207 after fine-tuning for 1000 classes, position tables
  among them.
  """
  named = lambda *student: {
    name for entry in loaded_model.name_table(*student) for name in entry.theirs
  }
  assert len(named(ConvViT(), Decoder(768), (), True)) + 2 == 313
  finetuned = ConvViT(fuse_stages=False, learned_positions=True)
  assert len(named(finetuned, None, ("fc_norm", "head"), False)) == 207


def test_mlp_ratio_gives_back_the_hidden_width():
  pairs = [(hidden, width) for width in range(1, 400) for hidden in range(1, 5 * width, 11)]
  assert any(
    int(width * (hidden / width)) != hidden for hidden, width in pairs
  )  # plain division would not do
  assert all(int(width * mlp_ratio(hidden, width)) == hidden for hidden, width in pairs)


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_usual_numbers_of_heads(tmp_path, width, heads):
  path, _ = published(tmp_path, ViT(4, width, 1, heads, 8), Decoder(48, 512, 1, 16, 0.1))
  result = readers.read_model(path)
  assert result.encoder.num_heads == heads and result.decoder.num_heads == 16


def test_other_position_tables_are_kept(tmp_path):
  def shift(tensors, by):
    tensors["pos_embed"] = tensors["pos_embed"] + np.float32(by)
    tensors["decoder_pos_embed"] = tensors["decoder_pos_embed"] - np.float32(by)

  for by, learned in ((1e-6, False), (1e-3, True)):
    path, student = published(tmp_path, change=lambda t: shift(t, by))
    result = readers.read_model(path, num_heads=2, decoder_heads=3)
    assert result.encoder.learned_positions == result.decoder.learned_positions == learned
    assert ("pos_embed (4x4 tokens)" in str(result.report)) == learned
    assert ("the sine-cosine table to 1e-06" in str(result.report)) != learned
    if learned:
      np.testing.assert_array_equal(
        result.params["encoder"]["pos_embed"], load_file(path)["pos_embed"]
      )
      np.testing.assert_array_equal(
        result.params["decoder"]["pos_embed"], load_file(path)["decoder_pos_embed"]
      )
  path, _ = published(tmp_path, change=lambda t: shift(t, np.nan))
  with pytest.raises(WeightsError, match="non-finite values in pos_embed"):
    readers.read_model(path, num_heads=2, decoder_heads=3)


def test_positions_can_be_kept_for_training(tmp_path):
  path, _ = published(tmp_path)
  result = readers.read_model(path, num_heads=2, decoder=False, learned_positions=True)
  assert result.encoder.learned_positions
  np.testing.assert_array_equal(result.params["encoder"]["pos_embed"], sincos_2d(16, (4, 4))[None])


def test_a_row_for_cls_in_the_table_of_convmae_v2(tmp_path):
  row = np.random.default_rng(1).standard_normal((1, 1, 16)).astype(np.float32)

  def add_row(tensors):
    tensors["pos_embed"] = np.concatenate([row, tensors["pos_embed"]], axis=1)

  path, student = published(tmp_path, CONVVIT.clone(cls_token=True), None, add_row)
  result = readers.read_model(path, num_heads=2)
  assert (
    result.grid == (4, 4)
    and not result.encoder.learned_positions
    and "CLS's row" in str(result.report)
  )
  np.testing.assert_array_equal(
    result.params["encoder"]["cls_token"], student.params["encoder"]["cls_token"] + row
  )


def remove(*names):
  return lambda tensors: {name: x for name, x in tensors.items() if not name.startswith(names)}


def released_v1(tensors):
  return remove("decoder", "mask_token", "stage")(tensors)


def test_encoder_only_files_say_so(tmp_path):
  path, student = published(tmp_path, change=released_v1)
  model = mrmae_jax.load(path, num_heads=2)
  assert "new by design: no decoder (the source is encoder-only" in str(
    model.report
  ) and "no fusion" in str(model.report)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  complete = mrmae_jax.load(published(tmp_path)[0], num_heads=2, decoder_heads=3)
  np.testing.assert_array_equal(
    model.encode(images)["pooled"], complete.encode(images)["pooled"]
  )  # stages are fused after that
  with pytest.raises(WeightsError, match="was loaded without a decoder and cannot reconstruct"):
    model.reconstruct(images)
  for ratio in (-1, 0.0, 0.999, 1.0, 1.5):
    with pytest.raises(ValueError, match=f"mask_ratio={ratio} given; .* of the 16 patches"):
      complete.reconstruct(images, mask_ratio=ratio)
  pictures = complete.reconstruct(images)
  assert {x.shape for x in pictures.values()} == {images.shape}
  changed = np.abs(np.asarray(pictures["pasted"]) - pictures["original"]) > 1e-6
  assert 0.6 < changed.mean() < 0.8  # 0.75 of the tokens
  with pytest.raises(WeightsError, match="holds no classifier"):
    model.classify(images)


@pytest.mark.parametrize(
  "encoder, change, message",
  [
    (CONVVIT, remove("blocks3.1."), None),  # one block less is another model; the file cannot know
    (
      CONVVIT,
      remove("blocks3.0.norm1"),
      r"missing: blocks3.0.norm1.bias, blocks3.0.norm1.weight \(another depth",
    ),
    (CONVVIT, remove("blocks2.0."), "blocks2.0.mlp.fc1.weight is missing"),
    (CONVVIT, remove("blocks3.1.attn"), "missing: blocks3.1.attn.proj.bias, .*qkv.weight"),
    (CONVVIT, remove("stage2"), "missing: stage2_output_decode.bias"),
    (CONVVIT, remove("pos_embed"), "pos_embed is missing"),
    (CONVVIT, remove("norm."), "missing: norm.bias, norm.weight"),
    (CONVVIT, remove("decoder_blocks.0"), "decoder_blocks.0.mlp.fc1.weight is missing"),
    (CONVVIT, remove("decoder_pos"), "decoder_pos_embed is missing"),
    (CONVVIT, remove("decoder_embed"), "unknown: decoder_blocks.0"),
    (
      CONVVIT,
      lambda t: t | {"blocks3.0.ls1.gamma": np.ones(16, np.float32)},
      "unknown: blocks3.0.ls1.gamma",
    ),
    (
      CONVVIT,
      lambda t: t | {"patch_embed4.bias": np.ones(8, np.float32)},
      r"misshapen: patch_embed4.bias \(8,\)",
    ),
    (
      CONVVIT,
      lambda t: t | {"pos_embed": np.ones((1, 15, 16), np.float32)},
      "pos_embed has 15 rows, which is not square",
    ),
    (
      CONVVIT,
      lambda t: t | {"decoder_pos_embed": np.ones((1, 9, 12), np.float32)},
      r"has shape \(1, 9, 12\), expected \(1, 16, 12\)",
    ),
    (
      CONVVIT,
      lambda t: t | {"norm.bias": np.full(16, np.inf, np.float32)},
      "non-finite values in norm.bias",
    ),
    (VIT, remove("cls_token"), "is not a model"),
    (VIT, remove("blocks.1.mlp"), "missing: blocks.1.mlp.fc1.bias"),
    (VIT, lambda t: t | {"norm_pre.weight": np.ones(16, np.float32)}, "unknown: norm_pre.weight"),
  ],
)
def test_anything_else_is_an_error(tmp_path, encoder, change, message):
  path, _ = published(tmp_path, encoder, change=change)
  if message is None:
    assert readers.read_model(path, num_heads=2, decoder_heads=3).encoder.depth == 1
  else:
    with pytest.raises(WeightsError, match=message) as error:
      readers.read_model(path, num_heads=2, decoder_heads=3)
    assert "\n" not in str(error.value)


def test_heads_that_no_file_tells(tmp_path):
  path, _ = published(tmp_path)
  for options, message in (
    (dict(), "number of heads for width 16, .* give num_heads"),
    (dict(num_heads=2), "number of heads for width 12, .* give decoder_heads"),
    (dict(num_heads=3, decoder_heads=3), "width 16 does not divide into 3 heads; check num_heads"),
  ):
    with pytest.raises(WeightsError, match=message):
      readers.read_model(path, **options)
  assert readers.read_model(path, num_heads=2, decoder=False).decoder is None


def test_a_file_that_lost_blocks_since_it_was_written_here(tmp_path):
  path = tmp_path / "x.safetensors"
  writers.write_model(make_student(CONVVIT), path, "convmae")
  files.write_safetensors(path, remove("blocks3.1.")(load_file(path)), files.read_metadata(path))
  with pytest.raises(WeightsError, match="missing: blocks3.1.*another depth"):
    readers.read_model(path)
  files.write_safetensors(
    path, load_file(path), {model_sources.METADATA_KEY: '{"encoder": {"name": "swin"}}'}
  )
  with pytest.raises(WeightsError, match="is damaged: its notes about the model"):
    readers.read_model(path)
  writers.write_model(
    make_student(CONVVIT, None, classes=3)._replace(classes=("x", "y")), path, "convmae"
  )
  with pytest.raises(WeightsError, match="is damaged: it names 2 classes and holds 3"):
    readers.read_model(path)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"num_hidden_layers": 1}, "unknown: vit.encoder.layer.1."),
    ({"num_hidden_layers": 3}, "missing: vit.encoder.layer.2."),
    ({"model_type": "vit"}, "model_type is 'vit', expected 'vit_mae'"),
    ({"hidden_act": "relu"}, "expected 'gelu'"),
    ({"decoder_intermediate_size": float("nan")}, "decoder_intermediate_size=nan given; expected"),
    ({"decoder_intermediate_size": 1e-300}, "expected whole numbers from 1"),
    ({"patch_size": [8, 4]}, "must be square"),
    ({"image_size": 64}, "not a grid of 8x8"),
  ],
)
def test_hf_folders_that_do_not_fit(tmp_path, change, message):
  writers.write_model(make_student(VIT), tmp_path, "hf")
  config = tmp_path / "config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | change))
  with pytest.raises(WeightsError, match=message):
    readers.read_model(tmp_path)
  config.unlink()
  with pytest.raises(WeightsError, match="config.json, which tells heads and eps"):
    readers.read_model(tmp_path)


def test_a_tower_that_is_no_student():
  with pytest.raises(WeightsError, match="unknown: ") as error:
    path = Path(__file__).parent / "goldens" / "teachers" / "timm_clip.safetensors"
    readers.read_model(path, num_heads=4)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoder", ["convvit", pytest.param("vit", marks=pytest.mark.variant)])
def test_runs(tmp_path, encoder):
  """A run of this project: all of it, its encoder, and the file that it is converted to."""
  config = tiny.get_config(encoder)
  model = pretrain.make_model(config, {"mimic": 48})
  params = random_params(model, (32, 48))
  checkpoints = Checkpoints(tmp_path / "run", {})
  checkpoints.save(7, train.TrainState(jnp.int32(7), params, (), {}, jnp.float32(0)))
  checkpoints.close()
  (tmp_path / "run" / "config.json").write_text(config.to_json())

  result = readers.read_model(tmp_path / "run")
  assert (
    result.grid == (4, 6)
    and result.mean == tuple(config.data.mean)
    and result.decoder.num_heads == 2
  )
  assert "after 7 steps" in str(result.report) and "dropped by design: mimic heads" in str(
    result.report
  )
  del params["mimic_heads"]
  jax.tree.map(np.testing.assert_array_equal, result.params, params)
  writers.write_model(result, tmp_path / "x.safetensors", "timm" if encoder == "vit" else "convmae")
  same(readers.read_model(tmp_path / "x.safetensors"), result)

  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
  features = mrmae_jax.load(tmp_path / "run").encode(images)
  np.testing.assert_allclose(
    features["pooled"], jax.jit(lambda x: pretrain.features(model, params, x))(images), atol=1e-5
  )
  learned = mrmae_jax.load(tmp_path / "run", learned_positions=True, decoder=False)
  np.testing.assert_allclose(learned.encode(images)["tokens"], features["tokens"], atol=1e-5)
  assert (
    "decoder" not in learned.network.params and "pos_embed" in learned.network.params["encoder"]
  )
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(WeightsError, match="holds no run"):
    readers.read_model(tmp_path / "run")


@pytest.mark.parametrize(
  "encoder",
  [
    pytest.param(CONVVIT.clone(depths=(1, 1, 1)), marks=pytest.mark.variant),
    pytest.param(CONVVIT.clone(depths=(1, 1, 1), sparse=False), marks=pytest.mark.variant),
    VIT,
  ],
  ids=["sparse", "dense", "vit"],
)
def test_learned_positions_start_as_the_constant(encoder):
  """... and give the same numbers; a gradient reaches the rows of the tokens that are seen."""
  images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 24, 40, 3)), jnp.float32)
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(1), (1, 15)), 0.6)
  learned = encoder.clone(learned_positions=True)

  @jax.jit
  def run(key):
    params = learned.init(key, images)["params"]
    fixed = {name: x for name, x in params.items() if name != "pos_embed"}
    gradient = jax.grad(
      lambda p: (learned.apply({"params": p}, images, mask)[1]["layers"][-1] ** 3).sum()
    )(params)
    return (
      params,
      gradient["pos_embed"],
      [
        (
          learned.apply({"params": params}, images, m)[0],
          encoder.apply({"params": fixed}, images, m)[0],
        )
        for m in (None, mask)
      ],
    )

  params, gradient, pairs = run(jax.random.key(0))
  np.testing.assert_array_equal(
    params["pos_embed"][0], sincos_2d(16, (3, 5), cls_token=encoder is VIT)
  )
  for ours, constant in pairs:
    np.testing.assert_allclose(ours, constant, atol=1e-6)
  rows = set(np.flatnonzero(np.abs(gradient[0]).sum(1)))
  assert rows == (
    {0} | {1 + int(i) for i in mask.ids_keep[0]}
    if encoder is VIT
    else {int(i) for i in mask.ids_keep[0]}
  )


def test_params_at_another_grid():
  student = make_student(VIT.clone(learned_positions=True))
  moved = loaded_model.params_at(student, (6, 4))
  table = student.params["encoder"]["pos_embed"]
  np.testing.assert_array_equal(
    moved["encoder"]["pos_embed"], positions.resize(table, GRID, (6, 4), interpolation.BICUBIC)
  )
  np.testing.assert_array_equal(moved["encoder"]["pos_embed"][:, 0], table[:, 0])
  assert moved["decoder"]["mask_token"] is student.params["decoder"]["mask_token"]
  assert loaded_model.params_at(student, GRID)["encoder"] is student.params["encoder"]
