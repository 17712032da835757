"""Measures operations that can be written in several ways, each forwards and backwards, alone.

  python -m benchmarks.forms --operation=depthwise                       # timed here
  python -m benchmarks.forms --operation=depthwise --topology=v5e:2x2    # for an absent TPU
  python -m benchmarks.forms --operation=attention --topology=h100       # for an absent GPU

Operations, at the shapes of the base size at 224 px, 49 of 196 tokens visible:
  depthwise   the 5x5 convolution of stage 1 and stage 2 on the visible blocks, as the model does it
              on this platform; on a map into which the blocks are put, from which they are taken
              out again; by `lax.conv` on that map; on windows of (s + 4)^2 positions around each
              block, by products of matrices
  attention   49 tokens in 12 heads of 64 channels (encoder), 196 in 16 of 32 (decoder), 197 in 12
              of 64 (teacher), from packed queries, keys and values: explicit, and where they can be
              used the fused kernel of cuDNN and the kernels of models/short_attention.py
  biased      attention of 1,024 tokens in 12 heads of 64 whose logits get biases, those of all
              images together (segmentation) or of each query (ViTDet): explicit, as the model does
              it, and JAX's, which is cuDNN's where that can be used
All forms must agree with the model's before anything is printed. FLOPs, bytes and temporaries are
those of one image: XLA's, for an absent GPU those of the kernels (mrmae_jax/program.py).
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp

from benchmarks.command import make_parser, run_command
from mrmae_jax import mrmae, sharding, target
from mrmae_jax.cli import bench
from mrmae_jax.cli.compile import find_devices
from mrmae_jax.cli.parser import integer
from mrmae_jax.errors import UsageError
from mrmae_jax.models import attention, depthwise, layers
from mrmae_jax.program import cost

# Of the largest value: kernel gradients sum over thousands of positions.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
# {stage: (side of a token's block in positions, channels)}
STAGES = {"stage 1": (4, 256), "stage 2": (2, 384)}
# {model: (tokens, heads, channels of a head)}
ATTENTION = {"encoder": (49, 12, 64), "decoder": (196, 16, 32), "teacher": (197, 12, 64)}
GRID = (14, 14)
BIASED = (12, 1024, 64)  # heads, tokens, channels of a head


# Forms: (x [B, V, s, s, C], kernel [5, 5, C], mask) -> the same shape as x.


def _depthwise_forms():
  """Returns {name: form} of the convolution of visible blocks."""
  return {
    "the model's": lambda x, kernel, mask: depthwise.blockwise_conv(x, kernel, mask, GRID),
    "map": _map_form(depthwise.depthwise_conv),
    "map, lax.conv": _map_form(_lax_conv),
    "windows": _windows_form(),
  }


def _map_form(convolve):
  """Returns the form that puts the blocks into a map, convolves the map and takes them out."""

  def form(x, kernel, mask):
    image = convolve(layers.from_blocks(layers.put_visible(x, mask), GRID), kernel)
    return layers.take_visible(layers.to_blocks(image, x.shape[2]), mask)

  return form


def _lax_conv(x, kernel):
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None].astype(x.dtype),
    (1, 1),
    "SAME",
    feature_group_count=x.shape[-1],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _windows_form():
  """Returns the form of NVIDIA GPUs, for every platform."""
  form = jax.custom_vjp(functools.partial(depthwise._on_windows, grid=GRID))
  form.defvjp(
    lambda x, kernel, mask: (form(x, kernel, mask), (x, kernel, mask)),
    lambda residuals, dy: (
      *depthwise._on_windows_bwd(residuals[0], residuals[1], dy, residuals[2], GRID),
      None,
    ),
  )
  return form


def _attention_forms(tokens, heads, width, dtype, device):
  """Returns {name: (qkv [B, T, 3 D], bias [3 D]) -> [B, T, D]} for a device; None: that here."""
  forms = {"explicit": cut_apart(attention.explicit_attention, heads)}
  with target.tracing_for(device):
    if attention.has_fused_attention(dtype, width):
      forms["cuDNN"] = cut_apart(attention.attend, heads)
    if attention.has_short_attention(dtype, tokens, width):
      forms["our kernels"] = lambda qkv, bias: attention.short_attention((qkv,), bias, heads)
  return forms


def _biased_forms(dtype, device):
  """Returns {name: (q, k, v [B, H, T, d], bias [H, T, T] or [B, H, T, T]) -> [B, H, T, d]}."""
  with target.tracing_for(device):
    is_fused = attention.has_fused_attention(dtype, BIASED[-1])

  def of_jax(q, k, v, bias):
    bias = bias.reshape((1, *bias.shape)[-4:]).astype(q.dtype)
    return attention._fused_attention(q, k, v, "cudnn" if is_fused else "xla", bias=bias)

  return {"explicit": attention.explicit_attention, "cuDNN" if is_fused else "JAX": of_jax}


def cut_apart(form, heads):
  """Returns a form of packed arrays, which it cuts apart for `form`: q, k, v -> output.

  It takes qkv [B, T, 3 D] and a bias [3 D], and returns [B, T, D].
  """

  def packed(qkv, bias):
    parts = jnp.split(qkv + bias.astype(qkv.dtype), 3, axis=-1)
    y = form(*(x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in parts)).swapaxes(1, 2)
    return y.reshape(*y.shape[:2], -1)

  return packed


def _cases(options, device):
  """Yields (title, {form: function}, arrays with a gradient, other arrays) of the operation.

  The arrays are shapes where nothing is run.
  """
  b, dtype = options.batch_size, jnp.dtype(options.dtype)
  keys = jax.random.split(jax.random.key(0), 5)
  make = lambda function: jax.eval_shape(function) if options.topology else function()
  if options.operation == "attention":
    for name, (tokens, heads, width) in ATTENTION.items():
      draw = lambda tokens=tokens, size=3 * heads * width: (
        jax.random.normal(keys[0], (b, tokens, size), dtype),
        jax.random.normal(keys[1], (size,)),
      )
      title = f"{name}: {tokens} tokens, {heads} heads of {width}"
      yield title, _attention_forms(tokens, heads, width, dtype, device), make(draw), ()
    return
  if options.operation == "biased":
    heads, tokens, _ = BIASED
    for name, images in (("of all images", ()), ("of each query", (b,))):
      draw = lambda images=images: (
        *(jax.random.normal(key, (b, *BIASED), dtype) for key in keys[:3]),
        jax.random.normal(keys[3], (*images, heads, tokens, tokens)),
      )
      yield f"biases {name}", _biased_forms(dtype, device), make(draw), ()
    return
  mask = make(lambda: mrmae.sample_mask(jax.random.uniform(keys[2], (b, 196)), 0.75))
  for name, (side, channels) in STAGES.items():
    draw = lambda shape=(b, 49, side, side, channels): (
      jax.random.normal(keys[0], shape, dtype),
      jax.random.normal(keys[1], (5, 5, shape[-1])),
    )
    title = f"{name}: {side} x {side} positions of {channels} channels"
    yield title, _depthwise_forms(), make(draw), (mask,)


def run(options) -> str:
  """Measures the forms of an operation, and returns the tables.

  Raises:
    UsageError: an unknown topology, or forms that do not agree.
  """
  devices = find_devices(options.topology)
  machine = bench.describe_machine()
  if options.topology:
    machine["device"] = devices[0].device_kind
  print(json.dumps(machine), flush=True)
  tables, results = [], []
  device = devices[0] if options.topology else None
  for title, forms, inputs, others in _cases(options, device):
    programs = {name: _compile(form, inputs, others, device) for name, form in forms.items()}
    seconds = {}
    if not options.topology:
      _check_agreement(title, programs, (inputs, others), TOLERANCE[options.dtype])
      calls = {name: functools.partial(_repeat, p, inputs, others) for name, p in programs.items()}
      seconds = bench.alternate(calls, options.rounds)
    rows = [_measure(title, name, p, seconds, options.batch_size) for name, p in programs.items()]
    results += rows
    tables.append(_describe(title, rows, options.batch_size))
  result = {"machine": machine, "batch_size": options.batch_size, "dtype": options.dtype}
  bench.write_json(options.json, result | {"results": results})
  return "\n\n".join(tables)


def _compile(form, inputs, others, device):
  """Compiles a form forwards and backwards; for `device`, which need not be there, if given."""

  def both_ways(inputs, others):
    y, pull = jax.vjp(lambda *x: form(*x, *others), *inputs)
    return y, pull(y)

  if device is None:
    return jax.jit(both_ways).lower(inputs, others).compile()
  mesh = sharding.make_mesh(devices=[device])
  place = sharding.replicated(mesh)
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  with target.tracing_for(device, mesh):
    return jax.jit(both_ways).lower(*jax.tree.map(struct, (inputs, others))).compile()


def _repeat(program, inputs, others, times: int) -> None:
  for _ in range(times):
    output = program(inputs, others)
  jax.block_until_ready(output)


def _check_agreement(title: str, programs, arguments, tolerance: float) -> None:
  """Raises UsageError unless all programs give the numbers of the first."""
  expected = None
  for name, program in programs.items():
    output = [x.astype(jnp.float32) for x in jax.tree.leaves(program(*arguments))]
    expected = expected or output
    for x, y in zip(output, expected):
      if not float(jnp.abs(x - y).max()) <= tolerance * float(jnp.abs(y).max()):
        raise UsageError(
          f"{title}: {name} does not give the numbers of the first form: nothing is compared"
        )


def _measure(title: str, name: str, program, seconds: dict, batch_size: int) -> dict:
  """Returns what a program costs, of one image."""
  (flops, moved), memory = cost(program), program.memory_analysis()
  return {
    "operation": title,
    "form": name,
    "seconds": seconds.get(name),
    "temporaries": memory.temp_size_in_bytes / batch_size,
    "flops": flops / batch_size,
    "bytes": moved / batch_size,
  }


def _describe(title: str, results: list[dict], batch_size: int) -> str:
  """Returns the table of an operation."""
  has_times = results[0]["seconds"] is not None
  rows = [[title, "MFLOP", "MB", "temporaries MB"] + ["us"] * has_times]
  for result in results:
    numbers = (f"{result[key] / 1e6:,.2f}" for key in ("bytes", "temporaries"))
    row = [result["form"], f"{result['flops'] / 1e6:,.1f}", *numbers]
    if has_times:
      row.append(bench.format_spread([1e6 * s / batch_size for s in result["seconds"]], 1))
    rows.append(row)
  return bench.format_table(rows)


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code."""
  parser = make_parser("forms", __doc__)
  parser.add_argument(
    "--operation",
    choices=("depthwise", "attention", "biased"),
    default="depthwise",
    help="what is measured",
  )
  parser.add_argument(
    "--topology", default="", help="chips to compile for instead of running, e.g. v5e:2x2 or h100"
  )
  parser.add_argument("--batch_size", type=integer(1), default=64, help="images")
  parser.add_argument(
    "--dtype", choices=tuple(TOLERANCE), default="bfloat16", help="of the computation"
  )
  return run_command(parser, run, argv)


if __name__ == "__main__":
  sys.exit(main())
