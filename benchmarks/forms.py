"""The operations that can be written in several ways, each forwards and backwards, alone: which form suits a chip.

  mrmae bench forms --operation=depthwise                       # timed on the devices that are here
  mrmae bench forms --operation=depthwise --topology=v5e:2x2    # compiled for a TPU that is not: what it costs

Operations, at the shapes of the base size at 224 px, 49 of 196 tokens visible:
  depthwise   the masked 5x5 convolution of stage 1 and stage 2 on the visible blocks: the packed blocks put into a map of zeros,
              shift-and-add, taken out again (the model's form), by gathers or by products with one-hot matrices; `lax.conv` on that
              map; windows of (s + 4)^2 positions gathered around each block.
  attention   49 tokens in 12 heads of 64 channels (encoder), 196 in 16 of 32 (decoder), 197 in 12 of 64 (teacher): explicit, and
              the fused kernel of cuDNN where it can be used.
All forms must agree with the model's before anything is printed. FLOPs, bytes and temporaries are XLA's, of one image.
"""

import functools
import json

from absl import flags

from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError

TOLERANCE = {
  "float32": 1e-3,
  "bfloat16": 3e-2,
}  # of the largest value; kernel gradients sum over thousands of positions
STAGES = {
  "stage 1": (4, 256),
  "stage 2": (2, 384),
}  # side of a token's block in positions, channels
ATTENTION = {
  "encoder": (49, 12, 64),
  "decoder": (196, 16, 32),
  "teacher": (197, 12, 64),
}  # tokens, heads, channels of a head


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_enum(
    "operation", "depthwise", ["depthwise", "attention"], "What is measured.", flag_values=own
  )
  flags.DEFINE_string(
    "topology", "", "Compile for such chips instead of running, e.g. v5e:2x2.", flag_values=own
  )
  flags.DEFINE_integer("batch_size", 64, "Images.", lower_bound=1, flag_values=own)
  flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "Of the computation.", flag_values=own
  )
  flags.DEFINE_integer("rounds", 7, "How often each is timed.", lower_bound=1, flag_values=own)
  flags.DEFINE_string("json", "", "A .json file for the figures.", flag_values=own)
  return own


def _depthwise_forms(side: int):
  """{name: (x [B, 49, s, s, C], kernel [5, 5, C], mask) -> the same shape}."""
  import jax  # --help is answered without jax
  import jax.numpy as jnp

  from mrmae_jax.models import convvit, layers

  grid = (14, 14)

  def on_a_map(put, convolve, take):
    def form(x, kernel, mask):
      return take(
        layers.to_blocks(convolve(layers.from_blocks(put(x, mask), grid), kernel), side), mask
      )

    return form

  def hot(mask, dtype):  # [B, N, V]: token n is the v-th visible one
    return (mask.ids_keep[:, None] == jnp.arange(mask.ids_restore.shape[1])[:, None]).astype(dtype)

  def conv(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel[:, :, None].astype(x.dtype),
      (1, 1),
      "SAME",
      feature_group_count=x.shape[-1],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  def windows(x, mask):  # [B, V, s + 4, s + 4, C], zeros where nothing is visible
    b, v, _, _, c = x.shape
    reach = jnp.arange(-2, side + 2)
    row, column = (
      (mask.ids_keep // grid[1])[..., None] * side + reach,
      (mask.ids_keep % grid[1])[..., None] * side + reach,
    )
    inside = lambda at, n: (at >= 0) & (at < n * side)
    token = (
      jnp.clip(row, 0, grid[0] * side - 1)[..., :, None] // side * grid[1]
      + jnp.clip(column, 0, grid[1] * side - 1)[..., None, :] // side
    )
    rank = jnp.take_along_axis(mask.ids_restore, token.reshape(b, -1), axis=1).reshape(token.shape)
    place = rank * side**2 + (row % side)[..., :, None] * side + (column % side)[..., None, :]
    found = inside(row, grid[0])[..., :, None] & inside(column, grid[1])[..., None, :] & (rank < v)
    place = jnp.where(found, place, v * side**2).reshape(b, -1)
    flat = jnp.concatenate([x.reshape(b, -1, c), jnp.zeros((b, 1, c), x.dtype)], axis=1)
    return layers._gather(flat, place).reshape(b * v, side + 4, side + 4, c)

  def taps(x):
    return [
      x[:, i : i + side, j : j + side].astype(jnp.float32) for i in range(5) for j in range(5)
    ]

  def stencil(x, kernel, mask):
    weights = kernel.reshape(25, -1).astype(jnp.float32)
    return (
      sum(tap * w for tap, w in zip(taps(windows(x, mask)), weights))
      .astype(x.dtype)
      .reshape(x.shape)
    )

  halo = jax.custom_vjp(stencil)

  def halo_bwd(residuals, dy):
    x, kernel, mask = residuals
    dy32 = dy.reshape(-1, *dy.shape[2:]).astype(jnp.float32)
    dkernel = jnp.stack([jnp.sum(tap * dy32, (0, 1, 2)) for tap in taps(windows(x, mask))]).reshape(
      kernel.shape
    )
    return stencil(dy, kernel[::-1, ::-1], mask), dkernel.astype(kernel.dtype), None

  halo.defvjp(lambda x, kernel, mask: (stencil(x, kernel, mask), (x, kernel, mask)), halo_bwd)

  put_hot = lambda x, mask: jnp.einsum("bnv,bvijc->bnijc", hot(mask, x.dtype), x)
  take_hot = lambda x, mask: jnp.einsum("bnv,bnijc->bvijc", hot(mask, x.dtype), x)
  return {
    "map, gathers (the model's)": lambda x, kernel, mask: convvit.spatial_mix(
      x, kernel, mask, grid
    ),
    "map, one-hot products": on_a_map(put_hot, layers.depthwise_conv, take_hot),
    "map, lax.conv": on_a_map(layers.put_visible, conv, layers.take_visible),
    "windows": halo,
  }


def _attention_forms():
  import jax

  from mrmae_jax.models import layers

  forms = {"explicit": lambda q, k, v: layers.attention_weights(q, k).astype(v.dtype) @ v}
  if jax.default_backend() == "gpu":
    forms["cuDNN"] = layers.attend
  return forms


def _cases(options):
  """(title, {form: function of arrays}, arrays) of the operation; the arrays are shapes where nothing is to be run."""
  import jax
  import jax.numpy as jnp

  from mrmae_jax import mrmae

  b, dtype, keys = (
    options.batch_size,
    jnp.dtype(options.dtype),
    jax.random.split(jax.random.key(0), 5),
  )

  def arrays(make):
    return jax.eval_shape(make) if options.topology else make()

  if options.operation == "attention":
    for name, (tokens, heads, width) in ATTENTION.items():
      make = lambda shape=(b, heads, tokens, width): tuple(
        jax.random.normal(key, shape, dtype) for key in keys[:3]
      )
      yield (
        f"{name}: {tokens} tokens, {heads} heads of {width}",
        _attention_forms(),
        arrays(make),
        (),
      )
    return
  for name, (side, channels) in STAGES.items():
    make = lambda side=side, channels=channels: (
      jax.random.normal(keys[0], (b, 49, side, side, channels), dtype),
      jax.random.normal(keys[1], (5, 5, channels)),
    )
    mask = arrays(lambda: mrmae.sample_mask(jax.random.uniform(keys[2], (b, 196)), 0.75))
    yield (
      f"{name}: {side} x {side} positions of {channels} channels",
      _depthwise_forms(side),
      arrays(make),
      (mask,),
    )


def run(options) -> str:
  """The command with an attribute per flag; returns the tables.

  Raises:
    UsageError: an unknown topology, or forms that do not agree.
  """
  from mrmae_jax.cli import compile as pods

  devices = pods.find_devices(options.topology)
  import jax
  import jax.numpy as jnp

  about = bench.machine() | ({"device": devices[0].device_kind} if options.topology else {})
  print(json.dumps(about), flush=True)
  lines, found = [], []
  for title, forms, inputs, fixed in _cases(options):
    programs, outputs = {}, {}
    for name, form in forms.items():

      def both_ways(inputs, fixed, form=form):
        y, pull = jax.vjp(lambda *x: form(*x, *fixed), *inputs)
        return y, pull(y)

      if options.topology:
        place = lambda tree: jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0])
          ),
          tree,
        )
        programs[name] = jax.jit(both_ways).lower(place(inputs), place(fixed)).compile()
      else:
        programs[name] = jax.jit(both_ways).lower(inputs, fixed).compile()
        outputs[name] = programs[name](inputs, fixed)
    first, *_ = outputs.values() or [None]
    for name, output in outputs.items():
      for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(first)):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        if not float(jnp.abs(a - b).max()) <= TOLERANCE[options.dtype] * float(jnp.abs(b).max()):
          raise UsageError(
            f"{title}: {name} does not give the numbers of the first form, so nothing is compared"
          )
    seconds = (
      {}
      if options.topology
      else bench.alternate(
        {
          name: functools.partial(
            lambda program: jax.block_until_ready(program(inputs, fixed)), program
          )
          for name, program in programs.items()
        },
        options.rounds,
      )
    )
    rows = [[title, "MFLOP", "MB", "temporaries MB"] + ["us"] * bool(seconds)]
    for name, program in programs.items():
      cost, memory = program.cost_analysis() or {}, program.memory_analysis()
      one = {
        "operation": title,
        "form": name,
        "seconds": seconds.get(name),
        "temporaries": memory.temp_size_in_bytes / options.batch_size,
        "flops": cost.get("flops", 0) / options.batch_size,
        "bytes": cost.get("bytes accessed", 0) / options.batch_size,
      }
      found.append(one)
      rows.append(
        [
          name,
          f"{one['flops'] / 1e6:,.1f}",
          f"{one['bytes'] / 1e6:,.2f}",
          f"{one['temporaries'] / 1e6:,.2f}",
        ]
        + (
          [bench.spread([1e6 * s / options.batch_size for s in seconds[name]], 1)]
          if seconds
          else []
        )
      )
    lines += [bench.table(rows), ""]
  bench.write_json(
    options.json,
    {"machine": about, "batch_size": options.batch_size, "dtype": options.dtype, "results": found},
  )
  return "\n".join(lines[:-1])
