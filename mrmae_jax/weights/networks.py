"""Finds the networks in a weight file, and takes off what trainers put around their names.

A training checkpoint holds more than a network: a wrapper's word before each name ("module.",
"_orig_mod."), the trainer's name of the network ("model.", "student.backbone."), a second network
that is the average of the first, an optimizer. A network is known by the markers of its family,
whatever stands before them.
"""

import re
from pathlib import Path
from typing import NamedTuple

from mrmae_jax.errors import WeightsError
from mrmae_jax.weights import beit, convmae, detectron2, files, mae, mmseg
from mrmae_jax.weights.families import FAMILIES
from mrmae_jax.weights.tensor import Tensor

# Words that DistributedDataParallel, DeepSpeed, torch.compile, FSDP, activation checkpointing and
# Lightning put into names, at any place.
_WRAPPERS = (
  "module",
  "_orig_mod",
  "_fsdp_wrapped_module",
  "_checkpoint_wrapped_module",
  "_forward_module",
)
_AVERAGES = {"ema", "avg", "averaged", "swa", "momentum", "target"}
_FAMILIES = [(("",), convmae.MARKERS), (("",), mae.MARKERS)] + [
  (family.prefixes, family.markers) for family in FAMILIES
]


class Network(NamedTuple):
  """One network of a file.

  Attributes:
    tensors: by their names without wrappers.
    wrapper: what stands before the names in the file; "" for nothing.
    left_out: one line about each other part of the file.
    heads: where the network is the backbone of mmsegmentation, the tensors of the heads beside it.
    is_detector: the tensors are those of a whole detector in detectron2's names.
  """

  tensors: dict[str, Tensor]
  wrapper: str = ""
  left_out: tuple[str, ...] = ()
  heads: dict[str, Tensor] = {}
  is_detector: bool = False


def open_network(path: Path, weights: str = "") -> Network:
  """Returns a network of a file or folder, or all of its tensors if none is known in it.

  Of several networks a teacher comes first, as DINO publishes it, and an average last.

  Args:
    path: file or folder of weights.
    weights: which of several networks, by its name in the file or a word of that; "" leaves the
      choice to the rule above.

  Raises:
    WeightsError: see `files.open_weights`; also if the choice is not clear, or the tensors cannot
      be weights.
  """
  stored, names = files.open_weights(path), {}
  for name in stored:
    clean = _clean(name)
    if clean in names:
      raise WeightsError(
        f"{path} holds two tensors for {clean}: {names[clean]} and {name}; save its state_dict() "
        "again"
      )
    names[clean] = name
  if marker := next((name for name in names if f".{name}".endswith(f".{detectron2.MARKER}")), ""):
    return _open_detector(path, stored, names, marker.removesuffix(detectron2.MARKER))
  prefixes = _find_prefixes(names)
  if not prefixes:
    if weights:
      raise WeightsError(f"--weights={weights}: {path} holds no network that is known here")
    return Network(beit.arrange(files.check_tensors(stored, path), str(path)))
  prefix = _choose(prefixes, weights, path)
  inner = tuple(x for x in prefixes if len(x) > len(prefix) and x.startswith(prefix))
  # Beside DeepSpeed's "module" lie the optimizer and others.
  is_part = lambda name, original: (
    name.startswith(prefix)
    and not (inner and name.startswith(inner))
    and (prefix or original.startswith(prefixes[prefix]))
  )
  taken = {
    name.removeprefix(prefix): stored[original]
    for name, original in names.items()
    if is_part(name, original)
  }
  around = prefix.removesuffix(mmseg.BACKBONE)
  heads = {
    name.removeprefix(around): stored[original]
    for name, original in names.items()
    if around != prefix and name.startswith(tuple(around + head for head in mmseg.HEADS))
  }
  others = [
    name
    for name, original in names.items()
    if not is_part(name, original) and name.removeprefix(around) not in heads
  ]
  left_out = _describe_parts(others, [x for x in prefixes if x != prefix])
  tensors = beit.arrange(files.check_tensors(taken, path), str(path))
  return Network(tensors, prefixes[prefix], left_out, files.check_tensors(heads, path))


def _open_detector(path: Path, stored, names: dict[str, str], prefix: str) -> Network:
  """Returns the detector whose names start with `prefix`."""
  taken = {
    name.removeprefix(prefix): stored[original]
    for name, original in names.items()
    if name.startswith(prefix)
  }
  left_out = _describe_parts([name for name in names if not name.startswith(prefix)], [])
  return Network(files.check_tensors(taken, path), prefix, left_out, is_detector=True)


def _clean(name: str) -> str:
  """Returns a name without the words of wrappers, and with DINOv2's chunks of blocks joined."""
  name = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
  return re.sub(r"\bblocks\.[0-9]+\.([0-9]+)\.", r"blocks.\1.", name)


def _find_prefixes(names: dict[str, str]) -> dict[str, str]:
  """Returns what stands before the names of each network: {cleaned: as in the file}."""
  found, known = {}, set()  # a family that comes later does not take another prefix off
  for family_prefixes, markers in _FAMILIES:
    for name in names:
      if name in known or not f".{name}".endswith(f".{markers[0]}"):
        continue
      core = name.removesuffix(markers[0])
      if not all(core + marker in names for marker in markers):
        continue
      known.add(name)
      inner = next(x for x in family_prefixes if f".{core}".endswith(f".{x}"))
      outer = core.removesuffix(inner)
      if names[name].endswith(inner + markers[0]):
        found[outer] = names[name].removesuffix(inner + markers[0])
      else:
        found.setdefault(outer, outer)
  return found


def _choose(prefixes: dict[str, str], weights: str, path: Path) -> str:
  """Returns the prefix that `weights` names; without it, that of the usual choice."""
  words = {prefix: set(re.split(r"[._]", prefix)) for prefix in prefixes}
  if weights:
    candidates = [x for x in prefixes if weights.strip(".") in (x.strip("."), *x.split("."))]
    candidates = candidates or [x for x in prefixes if weights in words[x]]
  else:
    rank = lambda x: 0 if "teacher" in words[x] else 2 if words[x] & _AVERAGES else 1
    best = min(map(rank, prefixes))
    candidates = [x for x in prefixes if rank(x) == best]
  if len(candidates) == 1:
    return candidates[0]
  kinds = ", ".join(x.strip(".") or "one without a name" for x in sorted(prefixes))
  problem = f"--weights={weights} fits {len(candidates)} of them" if weights else "none is usual"
  raise WeightsError(
    f"{path} holds {len(prefixes)} network{'s' if len(prefixes) > 1 else ''} ({kinds}), and "
    f"{problem}; take one with mrmae convert --weights=NAME, NAME being one of these"
  )


def _describe_parts(names: list[str], networks: list[str]) -> tuple[str, ...]:
  """Returns one line about each part of a file, network or not, to which `names` belong."""
  counts = {}
  for name in names:
    network = max((x for x in networks if name.startswith(x)), key=len, default=None)
    part = (network or name.split(".")[0]).strip(".")
    counts[part, network is not None] = counts.get((part, network is not None), 0) + 1
  return tuple(
    f"{part} ({count} tensor{'s' if count > 1 else ''}"
    f"{f'; another network, --weights={part} takes it' if is_network else ''})"
    for (part, is_network), count in counts.items()
  )
