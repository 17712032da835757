"""mrmae compile: figures that belong to the program, the largest batch, a table that adds up;
chips that are not there only where their compiler is.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mrmae_jax import hardware, optim, sharding, target, train
from mrmae_jax import program as program_lib
from mrmae_jax.cli import compile as tool
from mrmae_jax.errors import UsageError
from mrmae_jax.tasks import pretrain
from tests import regression, tiny
from tests.helpers.cli import run_command
from tests.helpers.devices import gpu
from tests.helpers.programs import run_program

ROOT = Path(__file__).parent.parent
CONFIG = """
from tests import tiny
def get_config():
  c = tiny.get_config("vit")
  c.batch_size = 32
  return c
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "c.py"
  path.write_text(CONFIG)
  return path


@pytest.fixture(autouse=True)
def keep_compilation_cache():
  """`find_devices` switches it off, in a process that ends then."""
  value = jax.config.jax_enable_compilation_cache
  yield
  jax.config.update("jax_enable_compilation_cache", value)


def run(monkeypatch, *arguments):
  """The tool as a command."""
  del monkeypatch
  return run_command(["compile", *arguments])


def test_figures_of_the_devices_that_are_here(config_file, tmp_path, monkeypatch, capsys):
  assert (
    run(monkeypatch, f"--config={config_file}", f"--json={tmp_path}/x.json", "--config.mesh.fsdp=2")
    == 0
  )
  printed, found = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
  assert (
    found["devices"] == 8
    and found["mesh"] == {"data": 4, "fsdp": 2}
    and found["batch_per_device"] == 4
  )
  assert found["flops"] > 1e6 and found["bytes"] > 1e6 and found["peak"] >= found["temporaries"] > 0
  assert "bound_s" not in found and "roofline" not in printed  # nothing is known of a CPU
  assert (
    found["collectives"]["all-reduce"]["count"] > 0
    and "exchanged a device and step: all-reduce" in printed
  )
  assert "8 x cpu, mesh data=4 x fsdp=2, batch 32 (4 a device, 1 micro-batches), float32" in printed
  parts = {row["part"] for row in found["shards"]}
  assert parts == {
    "state/step",
    "state/params",
    "state/opt_state",
    "state/mean_grad_norm",
    "frozen/mimic",
  }


def test_memory_a_device_falls_as_the_rule_says():
  """Every array that the fsdp axis divides and that is large enough is divided; the rest is not."""
  config = tiny.changed(tiny.get_config(), teacher__path="")
  task = pretrain.make(config)
  shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
  for fsdp in (1, 2, 4, 8):
    mesh = sharding.make_mesh(fsdp=fsdp)
    placed = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharding.fsdp_shardings(shapes, mesh, min_size=256),
    )
    rows = sharding.table({"params": placed}, depth=1)
    divided = [
      x
      for x in jax.tree.leaves(shapes)
      if fsdp > 1 and x.size >= 256 and any(n % fsdp == 0 for n in x.shape)
    ]
    whole = sum(4 * x.size for x in jax.tree.leaves(shapes))
    assert sum(row["bytes"] for row in rows) == whole
    assert sum(row["arrays"] for row in rows if row["sharding"] == "sharded") == len(divided)
    assert (
      sum(row["bytes_per_device"] for row in rows)
      == whole - sum(4 * x.size for x in divided) * (fsdp - 1) // fsdp
    )


DIVIDED = """
import json, jax, sys
from mrmae_jax.tasks import pretrain
from mrmae_jax import program as program_lib
from mrmae_jax.cli import compile as tool
from mrmae_jax.errors import UsageError
from tests import tiny
found = []
for devices, fsdp, images in json.loads(sys.argv[1]):
  c = tiny.get_config("vit")
  c.teacher.path, c.image_size, c.batch_size, c.mesh.fsdp = "", (32, 32), devices * images, fsdp
  c.encoder.update(dim=64, depth=1, mlp_dim=256)
  c.decoder.update(dim=64)
  one = tool.measure(c, pretrain.make(c), jax.devices()[:devices], images=1000)
  found.append(one | {"fsdp": fsdp, "images": images})
print(json.dumps(found))
"""


@pytest.mark.parametrize(
  "meshes",  # devices, fsdp, images a device
  [
    [(1, 1, 2), (16, 16, 4)],
    pytest.param([(8, 8, 2), (64, 64, 4), (256, 256, 2), (256, 1, 4)], marks=pytest.mark.variant),
  ],
)
def test_what_1_to_256_devices_hold_and_exchange(meshes):
  """State falls as the rule says.

  What is exchanged are parameters, gradients and metrics, whatever the batch and the devices.
  """
  devices = max(devices for devices, *_ in meshes)
  done = run_program(["-c", DIVIDED, json.dumps(meshes)], devices=devices)
  assert done.returncode == 0, done.stderr[-3000:]
  for one in json.loads(done.stdout.splitlines()[-1]):
    rows, fsdp, exchanged = one["shards"], one["fsdp"], one["collectives"]
    moments, params = (
      {row["sharding"]: row for row in rows if row["part"] == f"state/{part}"}
      for part in ("opt_state", "params")
    )
    assert all(
      row["bytes_per_device"] * (fsdp if row["sharding"] == "sharded" else 1) == row["bytes"]
      for row in rows
    )
    assert (
      one["arguments"] == sum(row["bytes_per_device"] for row in rows) + one["images"] * 32 * 32 * 3
    )
    size = sum(row["bytes"] for row in params.values())
    if fsdp > 1:  # most of the parameters are divided, and their moments with them
      assert (
        params["sharded"]["bytes"] > 0.5 * size
        and moments["sharded"]["bytes"] == 2 * params["sharded"]["bytes"]
      )
      assert exchanged.pop("all-gather")["bytes"] == params["sharded"]["bytes"]
    if one["devices"] > 1:
      assert 0 <= exchanged.pop("all-reduce")["bytes"] - size < 200  # and the metrics
    assert not exchanged


def test_collectives_of_a_program():
  """A sum over devices and a gathering, with the bytes that they have to have."""
  mesh = sharding.make_mesh(fsdp=8)
  rows, all_of_it = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  x = jax.ShapeDtypeStruct((8, 50), jnp.float32, sharding=rows)
  program = lambda f: jax.jit(f, out_shardings=all_of_it).lower(x).compile().as_text()
  assert program_lib.collectives(program(lambda x: x.sum(0))) == {
    "all-reduce": {"count": 1, "bytes": 200}
  }
  assert program_lib.collectives(program(lambda x: x + 1)) == {
    "all-gather": {"count": 1, "bytes": 1600}
  }
  text = (
    "  %ag = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(f32[4,8]{1,0} %p), dimensions={0}\n"
    "  ROOT %ar = (bf16[10]{0}, f32[2,3]{1,0}) all-reduce(bf16[10]{0} %a, f32[2,3]{1,0} %b), "
    "to_apply=%add\n"
  )
  assert program_lib.collectives(text) == {
    "all-gather": {"count": 1, "bytes": 1024},
    "all-reduce": {"count": 1, "bytes": 44},
  }


def test_the_largest_batch():
  for limit in (0, 3, 8, 100, 1000):
    for start in (8, 64, 4096):
      tried = []
      found = tool.largest_batch(lambda n: tried.append(n) or n <= limit, start, 4)
      assert found % 4 == 0 and found <= limit and all(n % 4 == 0 for n in tried)
      assert found == 0 if limit < 4 else found > limit * 0.85 - 4
      assert len(tried) < 20


def test_a_roofline():
  device = SimpleNamespace(device_kind="TPU v5 lite")
  assert (
    hardware.find_chip(device).name == "TPU v5e"
    and hardware.find_chip(SimpleNamespace(device_kind="TPU v5")).name == "TPU v5p"
  )
  assert hardware.find_chip(jax.devices()[0]) is None


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--topology=v9:2x2"], "--topology=v9:2x2 is not KIND:AxB"),
    (["--topology=v5e"], "is not KIND:AxB"),
    (["--topology=h100:2x2"], "nor KIND or KIND:N with KIND one of a100, h100, h200 and N from 1"),
    (["--topology=h100:"], "nor KIND or KIND:N"),
    (["--topology=h100:0"], "nor KIND or KIND:N"),
    (["--topology=h100:12"], "nor KIND or KIND:N"),
    (["--topology=b200"], "nor KIND or KIND:N"),
    (["--sweep_batch"], "the memory of cpu is not known; give a --topology"),
    (["--config.batch_size=12"], "nearest: 8 or 16"),
    (["--what=1"], "what"),
  ],
)
def test_mistakes(config_file, arguments, message, monkeypatch, capsys):
  assert run(monkeypatch, f"--config={config_file}", *arguments) == 2
  error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert len(error) == 1 and message in error[0], error


def test_slices_and_hosts_are_kept_together():
  """Rows of a batch go host by host; an fsdp group stays inside a slice."""

  @dataclasses.dataclass(frozen=True)
  class Device:
    id: int
    process_index: int
    slice_index: int

  devices = [
    Device(int(i), int(i) // 2, int(i) // 4) for i in np.random.default_rng(0).permutation(8)
  ]
  mesh = sharding.make_mesh(fsdp=2, devices=devices)
  assert [[d.id for d in row] for row in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  with pytest.raises(ValueError, match="fsdp=8 does not divide the 4 devices of each of 2 slices"):
    sharding.make_mesh(fsdp=8, devices=devices)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)"
)
def test_chips_that_are_not_here(config_file, tmp_path, monkeypatch, capsys):
  assert (
    run(monkeypatch, f"--config={config_file}", "--topology=v5e:2x2", f"--json={tmp_path}/x.json")
    == 0
  )
  found = json.loads((tmp_path / "x.json").read_text())
  assert found["devices"] == 4 and found["chip"] == "TPU v5e" and found["images_per_s"] > 0
  assert (
    found["collectives"]["all-reduce"]["bytes"] > 0.9 * 4 * 0.03e6
    and "roofline" in capsys.readouterr().out
  )


def test_gpus_without_their_compiler_are_one_line(monkeypatch):
  monkeypatch.setattr(tool, "GPU_PACKAGES", ("jax", "no-such-package"))
  with pytest.raises(UsageError, match=r"=h100:8 needs no-such-package, .*\[gpu-compile\]'$"):
    tool.find_devices("h100:8")


def test_gpus_by_topology(monkeypatch):
  """XLA gets our flags, and keeps those of the user."""
  asked = []
  describe = lambda *arguments, **options: (
    asked.append((arguments, options)) or SimpleNamespace(devices=["gpu"])
  )
  monkeypatch.setattr(tool, "GPU_PACKAGES", ())
  monkeypatch.setattr(tool.topologies, "get_topology_desc", describe)
  for topology, shape, memory in (
    ("h100", "1x1x1", "80000000000"),
    ("h200:8", "1x1x8", "141000000000"),
    ("a100:16", "1x2x8", "80000000000"),
  ):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert tool.find_devices(topology) == ["gpu"] and not jax.config.jax_enable_compilation_cache
    assert os.environ["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {tool.GPU_FLAGS}"
    arguments, options = asked.pop()
    assert arguments == (topology, "cuda") and options["topology"] == shape
    assert f"device_memory_size: {memory}\n" in options["target_config"]


def test_the_description_of_a_gpu():
  h100, a100 = (hardware.target_config(hardware.CHIPS[name]) for name in ("H100", "A100"))
  for line in (
    "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }",
    "core_count: 132",
    "clock_rate_ghz: 1.98",
    "shared_memory_per_block_optin: 232448",
    "memory_bandwidth: 3350000000000",
    'device_description_str: "NVIDIA H100 80GB HBM3"',
  ):
    assert f"{line}\n" in h100, line
  assert h100.count("{") == h100.count("}")
  assert "major: 8 minor: 0" in a100 and "ACCELERATED_FEATURES" not in a100
  for name, chip in hardware.CHIPS.items():  # a device of the description is found in the table
    if chip.gpu:
      assert hardware.find_chip(SimpleNamespace(device_kind=chip.gpu.device_kind)).name == name


# A step of one layer with 4 images of 8 tokens as XLA writes it for a GPU, made up.
GPU_PROGRAM = """\
HloModule jit_train_step, is_scheduled=true

%fused_convert (p.1: f32[16,64]) -> bf16[16,64] {
  %p.1 = f32[16,64]{1,0} parameter(0)
  ROOT %convert.1 = bf16[16,64]{1,0} convert(%p.1)
}

%triton_product (p.2: bf16[32,64], p.3: bf16[64,16]) -> f32[32,16] {
  %p.2 = bf16[32,64]{1,0} parameter(0)
  %p.3 = bf16[64,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[32,16]{1,0} dot(%p.2, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.1 (w.1: f32[16,64], x.1: bf16[32,16], m.1: f32[16,64]) -> (f32[16,64], f32[32,16]) {
  %w.1 = f32[16,64]{1,0} parameter(0)
  %x.1 = bf16[32,16]{1,0} parameter(1)
  %m.1 = f32[16,64]{1,0} parameter(2)
  %kernel = bf16[16,64]{1,0} fusion(%w.1), kind=kLoop, calls=%fused_convert, \
metadata={op_name="jit(train_step)/jvp(Decoder)/convert_element_type"}
  %bitcast.1 = bf16[64]{0} bitcast(%x.1)
  %product = (bf16[32,64]{1,0}, s8[33554432]{0}) custom-call(%x.1, %kernel, %bitcast.1), \
custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(train_step)/jvp(Decoder)/fc1/dot_general"}, \
backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"epilogue":"BIAS"}}
  %get-tuple-element.1 = bf16[32,64]{1,0} get-tuple-element(%product), index=0
  %sum = (bf16[32,64]{1,0}, s8[33554432]{0}) custom-call(%x.1, %kernel, %product#0), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"epilogue":"DEFAULT"}}
  %attention = (bf16[4,2,8,32]{3,1,2,0}, u8[0]{0}) custom-call(%get-tuple-element.1, \
%product#0, /*index=2*/%sum#0), custom_call_target="__cudnn$fmhaSoftmax", \
metadata={op_name="jit(train_step)/jvp(teacher)/ViT/blocks_0/attn/dot_product_attention_fwd"}
  %packed = bf16[4,8,192]{2,1,0} bitcast(%w.1)
  %biases = f32[192]{0} bitcast(%m.1)
  %some = bf16[4,3,64]{2,1,0} bitcast(%w.1)
  %rest = bf16[4,8,128]{2,1,0} bitcast(%w.1)
  %own = (bf16[4,8,64]{2,1,0}, f32[4,2,8]{2,1,0}) custom-call(%packed, %packed, %packed, %biases, \
/*index=4*/%biases), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(train_step)/jvp(Decoder)/blocks_0/attn/custom_partitioning"}, \
backend_config={grid_x = 2 : i32, name = "attention_kernel", num_warps = 4 : i32}
  %own_gradient = bf16[4,8,3,64]{3,2,1,0} custom-call(%packed, %own#1, %biases), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "attention_gradient_kernel"}
  %own_of_some = bf16[4,3,64]{2,1,0} custom-call(%some, %rest, %rest, %biases, %biases), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "attention_kernel"}
  %norm = bf16[4,8,64]{2,1,0} custom-call(%own, %m.1), \
custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(train_step)/jvp(Decoder)/blocks_0/norm"}, \
backend_config={name = "norm_kernel"}
  %out = f32[32,16]{1,0} fusion(%get-tuple-element.1, %kernel), kind=kCustom, calls=%triton_product
  %copy.1 = f32[16,64]{1,0} copy(%w.1)
  ROOT %tuple.1 = (f32[16,64]{1,0}, f32[32,16]{1,0}) tuple(%copy.1, %out)
}
"""


def test_the_kernels_of_a_program_for_a_gpu():
  weights, x, y = 16 * 64, 32 * 16, 32 * 64  # elements
  found = program_lib.kernels(GPU_PROGRAM)
  product, attention = 2 * 32 * 16 * 64, 2 * 2 * (4 * 2) * 8 * 8 * 32
  assert [(kernel.kind, kernel.component, kernel.flops, kernel.epilogue) for kernel in found] == [
    ("fusion", "decoder", 0, ""),
    ("__cublas$lt$matmul", "decoder", product, "bias"),
    ("__cublas$lt$matmul", "rest", product, "addition"),
    ("__cudnn$fmhaSoftmax", "teacher", attention, ""),
    ("__gpu$xla.gpu.triton", "decoder", attention, ""),
    ("__gpu$xla.gpu.triton", "rest", 2.5 * attention, ""),
    ("__gpu$xla.gpu.triton", "rest", attention * 3 / 8, ""),
    ("__gpu$xla.gpu.triton", "decoder", 0, ""),
    ("fusion", "rest", product, ""),
    ("copy", "rest", 0, ""),
  ]
  assert [kernel.bytes for kernel in found] == [  # not the 32 MiB to work in
    6 * weights,
    2 * (x + weights + 64 + y),
    2 * (x + weights + 2 * y),
    2 * 4 * y,
    2 * 4 * y + 4 * 192 + 4 * 64,  # what is named twice is read once
    2 * 6 * y + 4 * 64 + 4 * 192,
    2 * (2 * 3 / 8 + 2) * y + 4 * 192,
    2 * 2 * y + 4 * 64 + 4 * weights,
    2 * (y + weights) + 4 * x,
    8 * weights,
  ]
  assert sum(program_lib.traffic(GPU_PROGRAM).values()) == sum(k.bytes for k in found)


def test_convolutions_of_cudnn_and_their_gradients():
  """They read 7 x 10 positions by a kernel of 3 x 2, with strides and padding."""
  text = """
ENTRY %main (x.1: bf16[2,7,10,4], w.1: bf16[6,3,2,4], ...) -> bf16[2,7,10,6] {
  %x.1 = bf16[2,7,10,4]{3,2,1,0} parameter(0)
  %w.1 = bf16[6,3,2,4]{3,2,1,0} parameter(1)
  %y.1 = bf16[2,3,4,6]{3,2,1,0} parameter(2)
  %small = bf16[6,1,1,4]{3,2,1,0} parameter(3)
  %conv = (bf16[2,3,4,6]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %w.1), WINDOW, \
custom_call_target="__cudnn$convForward"
  %to_input = (bf16[2,7,10,4]{3,2,1,0}, u8[0]{0}) custom-call(%y.1, %w.1), WINDOW, \
custom_call_target="__cudnn$convBackwardInput"
  %to_kernel = (bf16[6,3,2,4]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %y.1), WINDOW, \
custom_call_target="__cudnn$convBackwardFilter"
  ROOT %one = bf16[2,7,10,6]{3,2,1,0} custom-call(%x.1, %small), window={size=1x1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
}
""".replace("WINDOW", "window={size=3x2 stride=2x3 pad=1_0x2_1}, dim_labels=b01f_o01i->b01f")
  expected = program_lib.flops(
    lambda x, w: jax.lax.conv_general_dilated(
      x, w, (2, 3), ((1, 0), (2, 1)), dimension_numbers=("NHWC", "OHWI", "NHWC")
    ),
    jnp.zeros((2, 7, 10, 4)),
    jnp.zeros((6, 3, 2, 4)),
  )["rest"]
  found = [kernel.flops for kernel in program_lib.kernels(text)]
  assert found == [expected] * 3 + [2 * 2 * 7 * 10 * 6 * 4]


def test_what_is_read_off_the_kernels():
  replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated)
  state = {"w": struct(16, 64), "step": struct()}
  batch = {"batch_size": 8, "batch_per_device": 4.0, "accum_steps": 1}
  gpu = hardware.CHIPS["H100"].gpu
  kernels = program_lib.kernels(GPU_PROGRAM)
  result = batch | tool.measure_kernels(kernels, gpu, state, batch)
  assert result["kernels"] == 10
  assert result["copies"] == result["copies_of_state"] == {"count": 1, "bytes": 8 * 16 * 64}
  # The last product and the sums of attention, not the weights.
  assert result["float32_activations"] == 4 * (32 * 16 + 64)
  assert result["products"] == {
    "cuBLAS bf16 with bias": 1,
    "cuBLAS bf16 with addition": 1,
    "cuDNN bf16": 1,
    "Triton bf16": 3,
    "XLA bf16": 1,
  }
  assert result["kernels_s"] == pytest.approx(10 * tool.LAUNCH_S)
  lines = tool._describe_kernels(result)
  assert lines[0] == "kernels: 10; copies: 1, 0.00 GB, of arrays of the state 1, 0.00 GB"
  assert lines[-1].startswith("kernel by kernel: 0.0 ms a step, 400,000 images/s; of each the ")
  long = [kernel._replace(bytes=2.9e12) for kernel in kernels[:1]]
  assert tool.measure_kernels(long, gpu, state, batch)["kernels_s"] == pytest.approx(1)


def test_on_a_gpu_the_norms_sit_in_kernels_of_their_own():
  """The compiler may not add them up where it writes the state; elsewhere nothing is in its way."""
  config = regression.get_config()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for platform, capability, barriers in (("cpu", "", 0), ("tpu", "", 0), ("gpu", "9.0", 1)):
    plan = train.make_plan(config, regression.make(config), mesh)
    with target.tracing_for(SimpleNamespace(platform=platform, compute_capability=capability)):
      text = plan.step.lower(plan.state, plan.frozen, plan.batch).as_text()
    assert text.count("optimization_barrier") == barriers, platform
  many = [jnp.full((4, 6), 1.0 + i) for i in range(20)]
  for tree, sums in (
    (
      {"a": jnp.ones((5, 6)), "b": jnp.ones(3), "c": jnp.full((2, 3, 30), 2.0), "d": jnp.ones(40)},
      3 + 2,
    ),
    ({"b": jnp.ones(40)}, 1 + 1),
    ({"a": 3.0}, 1),
    # 16 and 4 of one shape, and two that differ from them
    ({"a": many, "b": jnp.ones((6, 4)), "c": jnp.ones((4, 6), jnp.bfloat16)}, 4 + 1),
  ):
    tree = jax.tree.map(jnp.asarray, tree)
    with target.tracing_for(gpu()):
      lowered = jax.jit(lambda tree: optim.global_norm(tree, small=20)).trace(tree).lower()
    assert lowered.as_text().count("stablehlo.reduce(") == sums
    np.testing.assert_allclose(lowered.compile()(tree), optax.global_norm(tree), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
  not all(map(tool._is_installed, tool.GPU_PACKAGES)), reason="needs the gpu-compile extra"
)
def test_a_gpu_that_is_not_here(tmp_path):
  """The step of a small model, compiled in a process of its own: its flags are XLA's for good."""
  words = [
    *("compile", "--config=mrmae:base", "--topology=h100", f"--json={tmp_path}/x.json"),
    *("--config.teacher.path=random", "--config.encoder.depths=(1, 1, 2)"),
    *("--config.encoder.fuse_layers=(0,)", "--config.decoder.depth=2", "--config.batch_size=64"),
  ]
  environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "mrmae_jax", *words],
    cwd=ROOT,
    env=environ,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "x.json").read_text())
  assert found["chip"] == "H100" and "kernel by kernel: " in done.stdout
  products = found["products"]
  assert not any(" f32" in name for name in products), products
  assert found["copies_of_state"]["count"] == 0
  assert found["copies"]["bytes"] < 100  # of numbers, such as the step's
  assert found["bytes"] / 64 < 290e6  # 284e6 when this was written
  assert found["float32_activations"] / 64 < 4e6  # 3.2e6; a LayerNorm as JAX derives it: 8.0e6
  count = lambda start: sum(n for name, n in products.items() if name.startswith(start))
  # Of encoder and decoder, forwards and backwards, and of the teacher.
  assert (count("Triton"), count("cuDNN")) == (2 * (2 + 2) + 12, 0)
