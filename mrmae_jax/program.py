"""Reads off a program what a training step does: FLOPs and bytes by component, traffic.

FLOPs are those of the matrix products and convolutions, counted in JAX's own trace: exact for any
configuration, loops included, whatever the compiler makes of it (the rest, element-wise work, is
about 1 % of them). Bytes are read off the compiled program: what each of its kernels reads and
writes, so they are those of the backend that it was compiled for.
"""

import collections
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from mrmae_jax import target

COMPONENTS = {  # by the names of modules; the first that fits
  "teacher": r"\bteacher\b",
  "decoder": r"Decoder",
  "mimic head": r"MimicHead",
  "stage 1": r"/(patch_embed1|blocks1_)",
  "stage 2": r"/(patch_embed2|blocks2_)",
  "embed 3 and 4, stage fusion": r"/(patch_embed[34]|stage\d_output_decode)",
  "transformer": r"ConvViT|ViT|(Classifier|Segmenter|MaskRCNN\.features)\)*/encoder",
  "classifier": r"Classifier",
  "neck, pyramid": r"/(neck|pyramid)/",
  "decode head": r"/decode_head/",
  "auxiliary head": r"/auxiliary_head/",
  "proposals": r"\brpn_head\b",
  "box heads": r"\bbox_heads_",
  "mask head": r"\bmask_head\b",
  "rest": r"",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "f16": 2,
  "bf16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
VIEWS = {  # instructions that move nothing
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
  *("while", "conditional", "call", "after-all"),
}

OWN_KERNEL = "__gpu$xla.gpu.triton"  # a custom call: those of models/*.py


def component(name: str) -> str:
  """Returns the part of the model that an operation belongs to, by its path of modules."""
  return next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name))


def _taps(
  read: int, written: int, size: int, stride: int, padding: int, spread: int, dilation: int
) -> int:
  """Counts what a convolution multiplies along one axis: pairs of an output and a tap of the kernel
  that reads an input, not padding and not the zeros between inputs.

  Args:
    read, written: lengths of input and output.
    size: of the kernel.
    stride: of the kernel, in inputs.
    padding: before the first input.
    spread: distance of two inputs, 1 without zeros between them.
    dilation: distance of two taps.
  """
  places = stride * np.arange(written)[:, None] + dilation * np.arange(size) - padding
  is_input = (places >= 0) & (places <= (read - 1) * spread) & (places % spread == 0)
  return int(is_input.sum())


def _equation_flops(equation) -> float:
  """Returns the FLOPs of a product of matrices or a convolution in a jaxpr; 0 of anything else."""
  params, results = equation.params, [x.aval.shape for x in equation.outvars]
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(results[0]) * math.prod(left[i] for i in contracted)
  if equation.primitive.name != "conv_general_dilated":
    return 0.0
  spec, (left, right) = params["dimension_numbers"], (x.aval.shape for x in equation.invars)
  batch, features, *axes = spec.out_spec
  taps = [
    _taps(left[x], results[0][y], right[k], stride, padding, spread, dilation)
    for x, y, k, stride, (padding, _), spread, dilation in zip(
      spec.lhs_spec[2:],
      axes,
      spec.rhs_spec[2:],
      params["window_strides"],
      params["padding"],
      params["lhs_dilation"],
      params["rhs_dilation"],
    )
  ]
  return 2.0 * results[0][batch] * results[0][features] * right[spec.rhs_spec[1]] * math.prod(taps)


def flops(function, *args) -> dict[str, float]:
  """Counts the FLOPs of the matrix products and convolutions of `function(*args)`, by component.

  The arguments may be ShapeDtypeStructs.

  A multiplication and an addition are two. A loop counts as often as it runs, of branches the
  dearest. Operations are counted in their portable form, which is what the method needs.
  """
  totals = dict.fromkeys(COMPONENTS, 0.0)

  def walk(jaxpr, path, times, totals):
    for equation in jaxpr.eqns:
      name = f"{path}/{equation.source_info.name_stack}"
      totals[component(name)] += times * _equation_flops(equation)
      if equation.primitive.name == "cond":
        branches = []
        for branch in equation.params["branches"]:
          branches.append(dict.fromkeys(COMPONENTS, 0.0))
          walk(branch.jaxpr, name, times, branches[-1])
        for part, number in max(branches, key=lambda branch: sum(branch.values())).items():
          totals[part] += number
      else:
        for jaxpr in jaxprs_in_params(equation.params):
          walk(jaxpr, name, times * equation.params.get("length", 1), totals)

  with target.tracing_for(target.PORTABLE):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  used, _ = dce_jaxpr(
    jaxpr, [True] * len(jaxpr.outvars)
  )  # what has no effect on the result the compiler drops too
  walk(used, "", 1, totals)
  return {part: number for part, number in totals.items() if number}


class Array(NamedTuple):
  """The type of an array in HLO, such as bf16[8,2]."""

  kind: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of its elements."""
    return self.size * BYTES.get(self.kind, 4)


class Kernel(NamedTuple):
  """One kernel of a compiled program.

  Attributes:
    kind: its instruction, e.g. "fusion" or "copy"; of a library's call the target, e.g.
      "__cudnn$fmhaSoftmax".
    component: the part of the model.
    operands: the arrays that it may read.
    results: the arrays that it writes.
    bytes: what it reads and writes.
    flops: of the matrix products and convolutions in it.
    epilogue: what the product does besides: "bias", "addition" to an array, both, or "".
  """

  kind: str
  component: str
  operands: list[Array]
  results: list[Array]
  bytes: int
  flops: float
  epilogue: str


def _arrays(text: str) -> list[Array]:
  """Returns the arrays in an HLO type such as "(f32[8,2]{1,0}, u32[])"."""
  return [
    Array(kind, tuple(map(int, filter(None, dims.split(",")))))
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
  ]


def _operands(text: str, arrays: dict[str, list[Array]]) -> list[Array]:
  """Returns the arrays of the operands, one that is named twice once.

  `name#1` is one result of an instruction with several.
  """
  names = dict.fromkeys(re.findall(r"%?([\w.\-]+)(?:#(\d+))?", text))
  found = []
  for name, index in names:
    results = arrays.get(name, [])
    found += [results[int(index)]] if index and results else results
  return found


def _product_flops(kind: str, rest: str, operands: list[Array], results: list[Array]) -> float:
  """Returns the FLOPs of an instruction: a product of matrices, a convolution of cuDNN, or an
  attention, cuDNN's or our own.
  """
  if kind == OWN_KERNEL:
    if 'name = "attention_' not in rest:
      return 0.0
    # Queries, keys and values in one array, or queries, then keys and values; then their biases.
    width = next(array.size for array in operands if len(array.dims) == 1) // 3
    images, queries, _ = operands[0].dims
    keys = operands[operands[0].dims[2] == width].dims[1]
    products = 5 if 'name = "attention_gradient' in rest else 2
    return 2.0 * products * images * queries * keys * width
  if kind.startswith("__cudnn$fmha"):
    batch, heads, _, width = results[0].dims
    keys = operands[1].size // (batch * heads * width)
    products = 5 if kind.endswith("Backward") else 2  # the backward pass computes the weights anew
    return 2.0 * products * results[0].size * keys
  if kind.startswith("__cudnn$conv"):
    return _convolution_flops(kind, rest, operands, results)
  contracted = re.search(r'lhs_contracting_dim(?:s={|ensions":\[)([\d,"]*)', rest)
  if not contracted or not (kind == "dot" or kind.startswith("__cublas")):
    return 0.0
  left = operands[0].dims
  return 2.0 * results[0].size * math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))


def _convolution_flops(kind: str, rest: str, operands: list[Array], results: list[Array]) -> float:
  """Returns the FLOPs of a convolution of cuDNN, or of one of its gradients, which take as many.

  Labels and window of a gradient are those of the convolution.
  """
  arrays = [operands[0], operands[1], results[0]]
  if kind.endswith("BackwardInput"):
    arrays = [results[0], operands[1], operands[0]]
  elif kind.endswith("BackwardFilter"):
    arrays = [operands[0], results[0], operands[1]]
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
  image, kernel, out = (dict(zip(names, array.dims)) for names, array in zip(labels, arrays))
  window = dict(re.findall(r"(\w+)=([\w-]+)", re.search(r"window={(.*?)}", rest)[1]))
  usual, taps = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}, 1
  for i in range(len(image) - 2):  # of window={size=3x3 pad=1_1x1_1}
    numbers = [
      int(window[name].split("x")[i].split("_")[0]) if name in window else number
      for name, number in usual.items()
    ]
    taps *= _taps(image[f"{i}"], out[f"{i}"], kernel[f"{i}"], *numbers)
  return 2.0 * out["b"] * out["f"] * kernel["i"] * taps


def _epilogue(kind: str, rest: str) -> str:
  """Returns what a product of cuBLAS does besides, see `Kernel`."""
  if not kind.startswith("__cublas"):
    return ""
  fused = re.search(r'"epilogue":"(\w+)"', rest)
  words = fused[1].lower().split("_") if fused and fused[1] != "DEFAULT" else []
  if re.search(r'"beta":"?(?!0[,"}])[\d.]', rest):
    words.append("addition")
  return " and ".join(words)


def _kernel(kind, rest, operands, results, flops_of) -> Kernel:
  """Returns the kernel of an instruction, whose operands and attributes are the text `rest`."""
  if called := re.search(r'custom_call_target="([^"]*)"', rest):
    kind = called[1]
  if kind.startswith(("__cublas", "__cudnn")):
    results = [array for array in results if array.kind not in ("s8", "u8")]  # space to work in
  called = re.search(r"\bcalls=%?([\w.\-]+)", rest)
  flops = flops_of[called[1]] if called else _product_flops(kind, rest, operands, results)
  written = sum(array.bytes for array in results)
  read = sum(array.bytes for array in operands)
  if kind in ("dynamic-slice", "slice", "gather"):
    read = written
  path = re.search(r'op_name="([^"]*)"', rest)
  part = component(path[1] if path else "")
  return Kernel(kind, part, operands, results, written + read, flops, _epilogue(kind, rest))


def kernels(text: str) -> list[Kernel]:
  """Reads the kernels off a compiled program, in the order of its HLO `text`.

  Each instruction of the entry computation and of the bodies of loops is a kernel, whose operands
  and results pass through memory; instructions inside a fusion do not. Views cost nothing, and of
  what is sliced only the slice is read. The body of a loop counts once. The memory that a library
  asks for to work in is no traffic.
  """
  inside_fusion = set(re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", text))
  found, current, arrays, flops_of = [], "", {}, collections.Counter()
  for line in text.splitlines():
    if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
      current, arrays = match[1], {}
      continue
    if not (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)", line)):
      continue
    name, shape, kind, rest = match.groups()
    results = arrays[name] = _arrays(shape)
    moves = kind not in VIEWS and not kind.endswith("-done")  # counted where it starts
    if kind == "dot" or (moves and current not in inside_fusion):
      operands = _operands(rest.split("), ")[0], arrays)
      kernel = _kernel(kind, rest, operands, results, flops_of)
      flops_of[current] += kernel.flops
      if current not in inside_fusion:
        found.append(kernel)
  return found


def traffic(text: str) -> dict[str, float]:
  """Counts the bytes that the kernels of a compiled program read and write, by component.

  `text` is the program's HLO; see `kernels`.
  """
  totals = collections.Counter()
  for kernel in kernels(text):
    totals[kernel.component] += kernel.bytes
  return {part: float(number) for part, number in totals.items() if number}


def cost(compiled) -> tuple[float, float]:
  """Returns FLOPs and bytes of a compiled program: XLA's, or where it has none those of `kernels`.

  XLA has none for a GPU that is not there.
  """
  if counted := compiled.cost_analysis():
    return counted.get("flops", 0.0), counted.get("bytes accessed", 0.0)
  found = kernels(compiled.as_text())
  return sum(kernel.flops for kernel in found), float(sum(kernel.bytes for kernel in found))


def collectives(text: str) -> dict[str, dict[str, int]]:
  """Returns {kind: {"count", "bytes"}} of the exchanges in a compiled program's HLO.

  The bytes are those that one chip receives. The body of a loop counts once.
  """
  exchanges = {}
  for line in text.splitlines():
    match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
    if not match:
      continue
    sizes = [array.bytes for array in _arrays(match[1])]
    exchange = exchanges.setdefault(match[2], {"count": 0, "bytes": 0})
    exchange["count"] += 1
    # The result of an asynchronous start holds operand and output.
    exchange["bytes"] += max(sizes) if match[3] and match[2] != "all-reduce" else sum(sizes)
  return exchanges
