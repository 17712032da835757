"""Reads off a program what a training step does: FLOPs and bytes by component, traffic.

FLOPs are those of the matrix products, counted in JAX's own trace: exact for any configuration,
loops included, whatever the compiler makes of it (the rest, element-wise work, is about 1 % of
them). Bytes are read off the compiled program: what each of its kernels reads and writes, so they
are those of the backend that it was compiled for.
"""

import math
import re

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

COMPONENTS = {  # by the names of modules; the first that fits
  "teacher": r"\bteacher\b",
  "decoder": r"Decoder",
  "mimic head": r"MimicHead",
  "stage 1": r"/(patch_embed1|blocks1_)",
  "stage 2": r"/(patch_embed2|blocks2_)",
  "embed 3 and 4, stage fusion": r"/(patch_embed[34]|stage\d_output_decode)",
  "transformer": r"ConvViT|ViT|Classifier\)*/encoder",
  "classifier": r"Classifier",
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


def component(name: str) -> str:
  """Returns the part of the model that an operation belongs to, by its path of modules."""
  return next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name))


def flops(function, *args) -> dict[str, float]:
  """Counts the FLOPs of the matrix products of `function(*args)`, by component.

  The arguments may be ShapeDtypeStructs.

  A multiplication and an addition are two. A loop counts as often as it runs; of branches the
  dearest counts.
  """
  totals = dict.fromkeys(COMPONENTS, 0.0)

  def walk(jaxpr, path, times, totals):
    for equation in jaxpr.eqns:
      name = f"{path}/{equation.source_info.name_stack}"
      if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        totals[component(name)] += (
          2
          * times
          * math.prod(equation.outvars[0].aval.shape)
          * math.prod(left[i] for i in contracted)
        )
      elif equation.primitive.name == "cond":
        branches = []
        for branch in equation.params["branches"]:
          branches.append(dict.fromkeys(COMPONENTS, 0.0))
          walk(branch.jaxpr, name, times, branches[-1])
        for part, number in max(branches, key=lambda branch: sum(branch.values())).items():
          totals[part] += number
      else:
        for jaxpr in jaxprs_in_params(equation.params):
          walk(jaxpr, name, times * equation.params.get("length", 1), totals)

  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  used, _ = dce_jaxpr(
    jaxpr, [True] * len(jaxpr.outvars)
  )  # what has no effect on the result the compiler drops too
  walk(used, "", 1, totals)
  return {part: number for part, number in totals.items() if number}


def _sizes(shape: str) -> list[int]:
  """Bytes of each array in an HLO type such as "(f32[8,2]{1,0}, u32[])"."""
  return [
    math.prod(map(int, filter(None, dims.split(",")))) * BYTES.get(kind, 4)
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  ]


def traffic(text: str) -> dict[str, float]:
  """Counts the bytes that the kernels of a compiled program read and write, by component.

  `text` is the program's HLO. The body of a loop counts once.

  Each instruction of the entry computation and of the bodies of loops is a kernel, whose operands
  and results pass through memory; instructions inside a fusion do not. Views cost nothing, and of
  what is sliced only the slice is read.
  """
  totals, inside_fusion = (
    dict.fromkeys(COMPONENTS, 0.0),
    set(re.findall(r"\bcalls=%?([\w.\-]+)", text)),
  )
  inside_fusion |= set(re.findall(r"\bto_apply=%?([\w.\-]+)", text))
  free = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "while",
    "conditional",
    "call",
    "after-all",
  }
  current, sizes = "", {}
  for line in text.splitlines():
    if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
      current, sizes = match[1], {}
      continue
    if not (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)", line)):
      continue
    name, shape, kind, rest = match.groups()
    sizes[name] = sum(_sizes(shape))
    if current in inside_fusion or kind in free:
      continue
    read = [
      sizes.get(operand, 0)
      for operand in re.findall(r"%?([\w.\-]+)", rest.split("), ")[0])
      if operand in sizes
    ]
    if kind in ("dynamic-slice", "slice", "gather"):
      read = [sizes[name]]
    where = re.search(r'op_name="([^"]*)"', rest)
    totals[component(where[1] if where else "")] += sizes[name] + sum(read)
  return {part: number for part, number in totals.items() if number}


def collectives(text: str) -> dict[str, dict[str, int]]:
  """Returns {kind: {"count", "bytes"}} of the exchanges in a compiled program's HLO.

  The bytes are those that one chip receives. The body of a loop counts once.
  """
  exchanges = {}
  for line in text.splitlines():
    match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
    if not match:
      continue
    sizes = _sizes(match[1])
    exchange = exchanges.setdefault(match[2], {"count": 0, "bytes": 0})
    exchange["count"] += 1
    # The result of an asynchronous start holds operand and output.
    exchange["bytes"] += max(sizes) if match[3] and match[2] != "all-reduce" else sum(sizes)
  return exchanges
