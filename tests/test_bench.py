"""Benchmarks: work is counted right, compared ways agree, mistakes get one line.

No test asserts a time.
"""

import functools
import importlib
import itertools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare, guards, on_gpu
from configs import convmae, mae, mrmae
from mrmae_jax import program, sharding, target, train
from mrmae_jax.cli import bench, parser
from mrmae_jax.cli.bench import step as bench_step
from mrmae_jax.models.classifier import Classifier
from mrmae_jax.models.vit import ViT
from tests import tiny
from tests.helpers.cli import run_command
from tests.helpers.devices import gpu

SMALL = """
from tests import tiny
def get_config(encoder="convvit"):
  depth = {"encoder__depths": (1, 1, 1)} if encoder == "convvit" else {"encoder__depth": 1}
  return tiny.changed(tiny.get_config(encoder), **depth)
"""


@pytest.fixture
def run(capsys):
  """Runs `mrmae bench ...`, or a module of benchmarks/; returns (exit code, output, errors)."""

  def call(name="", *arguments):
    if name in ("compare", "forms", "guards", "on_gpu"):
      code = importlib.import_module(f"benchmarks.{name}").main(list(arguments))
    else:
      code = run_command(["bench", *[name] * bool(name), *arguments])
    return code, *capsys.readouterr()

  return call


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(SMALL)
  return path


def test_flops_of_a_product_a_loop_and_a_gradient():
  x, w = jnp.zeros((8, 4, 16)), jnp.zeros((16, 32))
  product = 2 * 8 * 4 * 16 * 32
  assert program.flops(lambda x, w: x @ w, x, w) == {"rest": product}
  assert program.flops(jax.jit(jax.grad(lambda x, w: (x @ w).sum(), (0, 1))), x, w) == {
    "rest": 2 * product
  }  # the forward one is dead
  scan = lambda x, w: jax.lax.scan(lambda total, row: (total + (row @ w).sum(), None), 0.0, x)[0]
  assert program.flops(scan, x, w) == {"rest": product}
  either = lambda x, w: jax.lax.cond(x[0, 0, 0] > 0, lambda: (x @ w).sum(), lambda: 0.0)
  assert program.flops(either, x, w) == {"rest": product}
  on_gpu = lambda x, w: x @ w @ w.T @ w if target.compute_capability() else x @ w
  with target.tracing_for(gpu()):
    for function in (on_gpu, jax.jit(on_gpu)):  # the second was traced for the GPU
      jax.eval_shape(function, x, w)
      assert program.flops(function, x, w) == {"rest": product}


@pytest.mark.parametrize(
  "options",
  [
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 3), padding=((1, 0), (2, 1))),
    dict(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 1)),
    dict(window_strides=(1, 1), padding=((1, 1), (2, 2)), lhs_dilation=(2, 2)),
    dict(window_strides=(1, 2), padding="SAME", feature_group_count=2),
  ],
)
def test_flops_of_a_convolution_are_what_it_multiplies(options):
  """The sum of a convolution of ones counts its products; a gradient takes as many."""
  groups = options.get("feature_group_count", 1)
  x, w = jnp.ones((2, 7, 10, 4)), jnp.ones((3, 2, 4 // groups, 6))
  convolve = functools.partial(
    jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )
  expected = 2 * float(convolve(x, w).sum())
  assert program.flops(convolve, x, w) == {"rest": expected}
  gradients = jax.grad(lambda x, w: jnp.square(convolve(x, w)).sum(), (0, 1))
  assert program.flops(gradients, x, w) == {"rest": 3 * expected}


def work(config):
  config.batch_size, config.data.source = 8, "digits"
  return {part: flops / 1e9 for part, flops in bench_step.necessary_flops(config).items()}


def test_work_of_mae_to_the_last_product():
  """A product M N K is 2 M N K FLOPs, three times with its gradients.

  The embedding has no gradient of its input, and the decoder's visible tokens end in the last
  block.
  """
  block = lambda tokens, dim: 12 * dim**2 * tokens + 2 * tokens**2 * dim
  last = 512**2 * (147 + 2 * 197 + 147 + 8 * 147) + 2 * 147 * 197 * 512
  config = mae.get_config("base")
  config.encoder.depth, config.decoder.depth = 3, 2
  found = work(config)
  np.testing.assert_allclose(
    found["transformer"], (6 * 3 * block(50, 768) + 4 * 49 * 768**2) / 1e9, rtol=1e-6
  )
  np.testing.assert_allclose(
    found["decoder"],
    6 * (50 * 768 * 512 + 1 * block(197, 512) + last + 147 * 512 * 768) / 1e9,
    rtol=1e-6,
  )
  assert set(found) == {"transformer", "decoder"}


@pytest.mark.variant
def test_work_of_mr_mae():
  """GFLOP of an image, counted by hand.

  Visible tokens save 0.97 in the decoder's last block, those that are not mimicked 1.82 in the
  teacher's.
  """
  config = mrmae.get_config("base,fusion=stages,masking=random")
  config.teacher.path = "random"
  expected = {
    "stage 1": 6.20,
    "stage 2": 3.93,
    "embed 3 and 4, stage fusion": 1.79,
    "transformer": 23.13,
    "decoder": 32.06 - 0.97,
    "teacher": 35.12 - 1.82,
    "mimic head": 0.17,
  }
  found = work(config)
  for part, gflop in expected.items():
    np.testing.assert_allclose(found[part], gflop, rtol=0.005, atol=0.01, err_msg=part)
  assert set(found) == set(expected)


def test_dense_stages_cost_four_times_as_much_and_are_not_counted_as_necessary():
  config = convmae.get_config("small")
  config.batch_size, config.data.source = 8, "digits"
  config.encoder.update(sparse=False, depths=(1, 1, 1))
  config.decoder.depth = 1
  task = bench.make_task(config)
  plan = train.make_plan(config, task, sharding.make_mesh(), 100)
  dense, needed = (
    program.flops(plan.step, plan.state, plan.frozen, plan.batch),
    bench_step.necessary_flops(config),
  )
  assert abs(dense["stage 1"] / 8 / needed["stage 1"] / 4 - 1) < 0.01
  assert dense["decoder"] / 8 == needed["decoder"]


def test_work_of_fine_tuning():
  model = Classifier(ViT(8, 16, 2, 2, 32), 5)
  images = jnp.zeros((4, 32, 48, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  found = program.flops(
    lambda params: jax.grad(lambda p: model.apply(p, images)[0].sum())(params), params
  )
  assert (
    set(found) == {"transformer", "classifier"} and found["classifier"] == 2 * 2 * 4 * 16 * 5
  )  # its output is not needed


def test_bytes_that_kernels_move():
  x = jnp.zeros((256, 256))
  text = jax.jit(lambda x: (x @ x, x.T.sum(0))).lower(x).compile().as_text()
  size = x.size * 4
  assert (
    3 * size <= sum(program.traffic(text).values()) <= 5 * size + 10_000
  )  # product: two in, one out; sum: one in
  compiled = jax.jit(lambda x: jnp.tanh(x) * 2 + 1).lower(x).compile()
  assert (
    sum(program.traffic(compiled.as_text()).values())
    == compiled.cost_analysis()["bytes accessed"]
    == 2 * size
  )  # one fused kernel


def test_operations_belong_to_parts():
  for name, part in (
    ("jit(train_step)/transpose(jvp(ConvViT))/blocks1_0/fc1/dot_general", "stage 1"),
    ("jit(train_step)/jvp(ConvViT)/stage2_output_decode/add", "embed 3 and 4, stage fusion"),
    ("jit(f)/jvp(teacher)/ViT/blocks_3/attn/qkv/dot_general", "teacher"),
    ("jit(f)/jvp(ViT)/blocks_0/fc1", "transformer"),
    ("jit(f)/jvp(Classifier)/encoder/blocks1_0/fc1/dot_general", "stage 1"),
    ("jit(f)/jvp(Segmenter)/encoder/blocks3_0/attn/qkv/dot_general", "transformer"),
    ("jit(f)/transpose(jvp(Segmenter))/decode_head/bottleneck/conv", "decode head"),
    ("jit(f)/jvp(MaskRCNN.features)/encoder/blocks3_0/fc1/dot_general", "transformer"),
    ("jit(f)/jvp(MaskRCNN.features)/pyramid/p2_lateral/conv", "neck, pyramid"),
    ("jit(f)/transpose(jvp(box_heads_0))/fc/dot_general", "box heads"),
    ("jit(f)/adam/mul", "rest"),
  ):
    assert program.component(name) == part


def test_step(run, config_file, tmp_path):
  code, out, err = run(
    "step",
    f"--config={config_file}:vit",
    "--config.teacher.path=",
    "--batch_sizes=8",
    "--rounds=2",
    f"--json={tmp_path}/x.json",
    f"--profile={tmp_path}/trace",
  )
  found = json.loads((tmp_path / "x.json").read_text())
  assert code == 0 and not err.count("error"), err
  assert [r["batch_size"] for r in found["results"]] == [8] and "commit" in found["machine"]
  assert {"transformer", "decoder"} <= set(found["results"][0]["flops"])
  assert all(
    len(r["seconds"]) == 2 and r["images_per_s"] > 0 and "mfu" not in r for r in found["results"]
  )
  assert (
    "GFLOP" in out and "longest operations" in out and list(tmp_path.glob("trace/**/*.xplane.pb"))
  )
  assert found["results"][0]["profile"] and {"ms", "component", "operation"} == set(
    found["results"][0]["profile"][0]
  )


def test_kernels_of_a_gpu_are_named_by_their_operation():
  text = """
  %loop_add_fusion.12 = f32[8] fusion(x), metadata={op_name="jit(step)/jvp(ViT)/blocks_3/add"}
  %loop_add_fusion.7-x = f32[8] fusion(x), metadata={op_name="jit(step)/jvp(ViT)/blocks_4/add"}
  """
  event = lambda name, ms: SimpleNamespace(name=name, duration_ns=3e6 * ms)
  events = [event("loop_add_fusion_12", 2), event("loop_add_fusion_7_x", 3), event("sm90_gemm", 4)]
  plane = lambda name: SimpleNamespace(name=name, lines=[SimpleNamespace(events=events)])
  assert bench_step.longest_operations([plane("/device:GPU:0")], text) == [
    {"ms": 5, "component": "transformer", "operation": "jvp(ViT)/blocks_*/add"},
    {"ms": 4, "component": "library", "operation": "sm*_gemm"},
  ]
  # What runs on the host is no operation of the model.
  assert len(bench_step.longest_operations([plane("/host:CPU")], text)) == 1


@pytest.mark.variant
def test_both_is_the_real_loop(run, config_file, tmp_path):
  code, out, _ = run(
    "both", f"--config={config_file}:vit", "--steps=3", f"--json={tmp_path}/x.json"
  )
  found = json.loads((tmp_path / "x.json").read_text())
  assert (
    code == 0
    and len(found["seconds"]) == 3
    and 0 <= found["data_wait"] <= 1
    and "waiting for data" in out
  )


@pytest.mark.variant
def test_guards_measures_the_step_beside_one_without(run, config_file, tmp_path):
  code, out, err = run(
    "guards", f"--config={config_file}:vit", "--rounds=1", f"--json={tmp_path}/x.json"
  )
  assert code == 0, err
  assert set(json.loads((tmp_path / "x.json").read_text())["seconds"]) == {
    "bare",
    "step",
    "checksums",
    "watch",
  }
  assert "skipping what is not finite" in out and "% with a save in" in out
  steps = guards.compile_steps(tiny.get_config("vit"))
  guarded, bare = (steps[name].run(1) for name in ("guarded", "bare"))
  assert guarded.keys() - bare.keys() == {"skipped"}  # one skips updates, the other does not
  for name, value in bare.items():
    assert float(guarded[name]) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.variant
@pytest.mark.parametrize(
  "pair, encoder, ways",
  [
    ("visible", "convvit", ["visible blocks", "dense"]),
    ("views", "vit", ["4 masks an image", "1 mask an image"]),
  ],
)
def test_compared_are_ways_that_agree(run, config_file, tmp_path, pair, encoder, ways):
  code, out, err = run(
    "compare",
    f"--pair={pair}",
    f"--config={config_file}:{encoder}",
    "--config.teacher.path=",
    "--config.batch_size=8",
    "--rounds=1",
    f"--json={tmp_path}/x.json",
  )
  found = json.loads((tmp_path / "x.json").read_text())
  assert (
    code == 0 and list(found["seconds"]) == ways and ("agree to" in out) == (pair != "views")
  ), err


@pytest.mark.torch
def test_the_step_of_transformers(run, tmp_path):
  pytest.importorskip("torch")
  (tmp_path / "c.py").write_text(
    "from tests import tiny\ndef get_config():\n  return tiny.get_config('vit')\n"
  )
  code, _, err = run(
    "compare",
    "--pair=transformers",
    f"--config={tmp_path}/c.py",
    "--config.teacher.path=",
    "--config.batch_size=8",
    "--config.image_size=(48, 48)",
    "--rounds=1",
    f"--json={tmp_path}/x.json",
  )
  assert code == 0 and list(json.loads((tmp_path / "x.json").read_text())["seconds"]) == [
    "ours",
    "transformers",
  ], err


@pytest.mark.torch
def test_the_step_of_segmentation_in_torch(run, tmp_path):
  pytest.importorskip("torch")
  code, out, err = run(
    "compare",
    "--pair=upernet",
    "--config=segment:convmae_base",
    "--config.image_size=(96, 96)",
    "--config.batch_size=8",  # one image for each device
    "--config.dtype=float32",
    "--config.encoder.embed_dims=(8, 12, 24)",
    "--config.encoder.depths=(1, 1, 2)",
    "--config.encoder.num_heads=3",
    "--config.upernet.channels=16",
    "--config.upernet.aux_channels=8",
    "--rounds=1",
    f"--json={tmp_path}/x.json",
  )
  assert code == 0 and "agree to" in out, err
  assert list(json.loads((tmp_path / "x.json").read_text())["seconds"]) == ["ours", "torch"]


@pytest.mark.variant
def test_the_step_of_detection_in_torchvision(run, tmp_path):
  """torchvision belongs to another torch than the one of the marker `torch`."""
  pytest.importorskip("torchvision")
  code, out, err = run(
    "compare",
    "--pair=mask_rcnn",
    "--config=detect_demo",
    "--config.encoder.depths=(1, 1, 1)",
    "--config.rcnn.rpn_convs=2",  # other names than one
    "--config.rcnn.box_convs=1",
    "--config.data.max_boxes=12",  # all that can be trained
    "--rounds=1",
    f"--json={tmp_path}/x.json",
  )
  assert code == 0 and "agree to" in out, err
  names = ["ours", "torchvision", "torchvision, strengthened"]
  assert list(json.loads((tmp_path / "x.json").read_text())["seconds"]) == names


def test_the_step_of_detection_needs_torchvision_and_a_network_that_it_has(run, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  code, _, err = run("compare", "--pair=mask_rcnn", "--config=detect_demo")
  assert code == 2 and "torch==2.14.1 torchvision==0.29.1" in err and err.count("error:") == 1
  for option in ("rcnn.stages=3", "rcnn.pyramid=fpn", "rcnn.window=7", "dtype=bfloat16"):
    words = ("--pair=mask_rcnn", "--config=detect_demo", f"--config.{option}")
    code, _, err = run("compare", *words)
    assert code == 2 and "is for Mask R-CNN on a ConvViT" in err


@pytest.mark.parametrize("backend, before, updates", [("cpu", [1], 1), ("gpu", [], 30)])
def test_only_a_cpu_waits_for_each_update(monkeypatch, backend, before, updates):
  """After one that is not timed; elsewhere a round is 30 in a row, and counts as one."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(bench.time, "perf_counter", itertools.count().__next__)  # each call: 1 s
  calls = {"one": [], "other": []}
  seconds = bench.alternate({name: done.append for name, done in calls.items()}, 3)
  assert calls == dict.fromkeys(calls, [2, *[*before, updates] * 3])
  assert seconds == dict.fromkeys(calls, [1 / updates] * 3)


def test_ways_that_disagree_get_no_ratio(run, monkeypatch):
  ways = {"one": compare._Way(lambda n: 1.0, 1), "other": compare._Way(lambda n: 1.1, 1)}
  monkeypatch.setitem(compare.PAIRS, "remat", lambda options: (ways, True))
  code, out, err = run("compare", "--pair=remat")
  assert code == 2 and "do not agree" in err and "speed" not in out


@pytest.mark.parametrize(
  "operation, count",
  [pytest.param("depthwise", 8, marks=pytest.mark.variant), ("attention", 3), ("biased", 4)],
)
def test_forms_agree(run, tmp_path, operation, count):
  code, out, err = run(
    "forms",
    f"--operation={operation}",
    "--batch_size=1",
    "--dtype=float32",
    "--rounds=1",
    f"--json={tmp_path}/x.json",
  )
  found = json.loads((tmp_path / "x.json").read_text())["results"]
  assert code == 0, err
  assert len(found) == count and all(one["flops"] > 0 and one["seconds"] for one in found)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "BENCHMARK is missing"),
    (("fast",), "invalid choice: 'fast'"),
    (("compare",), "--pair is missing"),
    (("compare", "--pair=remat", "--config.encodr=x"), "has no key 'encodr'"),
    (("compare", "--pair=mask_rcnn"), "is for Mask R-CNN on a ConvViT"),
    (("compare", "--pair=remat", "--ronds=3"), "'--ronds=3' is not an option"),
    (
      ("compare", "--pair=reference", "--reference=/none"),
      "must be a checkout of Alpha-VL/ConvMAE",
    ),
    (("step", "--batch_sizes=many", "--config=tests/tiny.py"), "expected a whole number"),
    (("both", "--config=photos"), "--config.data.source is missing"),
    (("forms", "--topology=v9:1"), "is not KIND:AxB"),
    (("on_gpu", "--slice=loader", "--out=."), "--slice=loader needs --source"),
    (("on_gpu", "--slice=all", "--out=."), "invalid choice: 'all'"),
  ],
)
def test_mistakes(run, arguments, message):
  code, _, err = run(*arguments)
  assert code == 2 and message in err and err.count("error:") == 1


def test_help_is_answered(run, capsys):
  code, out, _ = run("--help")
  assert code == 0 and all(name in out for name in ("step", "both", "loader"))
  for name in ("step", "both", "loader"):
    code, out, _ = run(name, "--help")
    assert code == 0 and f"bench {name}" in out
  for name in ("compare", "forms", "guards", "on_gpu"):
    with pytest.raises(SystemExit) as end:
      run(name, "--help")
    assert end.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out


def test_a_slice_for_a_gpu_ends_in_time(run, tmp_path, monkeypatch):
  """Each command has ended well, failed, or found no time; a failure does not stop the others."""
  sleep = "timeit -n 1 -r 1 'import time; time.sleep(60)'"
  slices = {"peers": {"good": "json.tool --help", "bad": "json.tool {out}/none", "long": sleep}}
  slices["peers"] |= {"late": "json.tool --help", "reference": "json.tool --help"}
  monkeypatch.setattr(on_gpu, "SLICES", slices)
  code, _, err = run("on_gpu", "--slice=peers", f"--out={tmp_path}", "--seconds=2")
  assert code == 2 and "error: good: exit code 0" in err and "failed: bad; see" in err
  found = json.loads((tmp_path / "peers.json").read_text())
  # without --reference there is nothing to compare with
  names = {row["name"]: row["code"] for row in found}
  assert names == {"good": 0, "bad": 2, "long": None, "late": None}
  assert sum(row["seconds"] for row in found) < 20
  assert "usage" in (tmp_path / "good.log").read_text()


@pytest.mark.parametrize("sizes", [on_gpu.SIZES, on_gpu.TINY])
def test_the_slices_for_a_gpu_are_commands_that_exist(sizes):
  options = dict.fromkeys(("source", "teacher", "epochs", "reference", "out", "json"), "2")
  options |= {"json": "--json=x.json", "epochs": "2"}
  for commands in on_gpu.SLICES.values():
    for line in commands.values():
      module, *words = line.format(**options | sizes).split()
      if module == "mrmae_jax":
        parser.parse(words)
      else:
        assert module in ("benchmarks.forms", "benchmarks.compare")
