"""Vision towers in the names of others: how each family of teachers calls its tensors, and what their shapes say.

A `Family` is one row of FAMILIES; `identify` finds the row by names that no other family has.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax.errors import WeightsError
from mrmae_jax.models.vit import ViT
from mrmae_jax.weights import positions
from mrmae_jax.weights.table import (
  MAX_SIZE,
  Entry,
  Layout,
  check_fields,
  conv,
  count_blocks,
  dense,
  linear,
  norm,
  pack,
  qkv,
  same,
  tokens,
)


class Names(NamedTuple):
  """The tensors of a tower; those of a block follow `block`, in which {} is its number. "": there is none."""

  patch_embed: str
  cls_token: str
  pos_embed: str
  norm: str
  block: str
  norm1: str
  qkv: tuple[str, ...]  # separate query, key, value; or one tensor for all
  out: str
  norm2: str
  fc1: tuple[str, ...]  # separate halves of a gated MLP; or one tensor
  fc2: str
  registers: str = ""
  norm_pre: str = ""
  scale1: str = ""
  scale2: str = ""
  head: str = ""  # attention pool
  proj: str = ""  # weight of the projection, with no prefix before it


class Family(NamedTuple):
  """A family of towers in one naming.

  Attributes:
    name: of the family; several namings share it.
    names: of its tensors.
    markers: tensors, after the prefix, by which the family is known.
    prefixes: one of them stands before every name.
    ignore: regular expressions (full match) of tensors that are no part of the vision tower.
    rule: how its position table is resized.
    tower: fields of ViT that all its members share.
    model_types: of config.json, each with what transformers fills in for keys that are left out; none: files of this naming
      come alone, and the sizes are read off the shapes.
    gated_fc1, gated_fc2: names of the MLP where it is gated.
    key_bias: keys have one.
    patch_rank: of the patch embedding's weight; 4: a convolution (D, 3, p, p), 2: a linear layer (D, p * p * 3).
  """

  name: str
  names: Names
  markers: tuple[str, ...]
  prefixes: tuple[str, ...]
  ignore: tuple[str, ...]
  rule: positions.Rule
  tower: dict[str, Any]
  model_types: dict[str, dict[str, Any]] = {}
  gated_fc1: tuple[str, ...] = ()
  gated_fc2: str = ""
  key_bias: bool = True
  patch_rank: int = 4


_CLIP_NAMES = Names(
  "embeddings.patch_embedding",
  "embeddings.class_embedding",
  "embeddings.position_embedding.weight",
  "post_layernorm",
  "encoder.layers.{}",
  "layer_norm1",
  ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "self_attn.out_proj",
  "layer_norm2",
  ("mlp.fc1",),
  "mlp.fc2",
  norm_pre="pre_layrnorm",
  proj="visual_projection.weight",
)  # "layrnorm" is theirs
_SIGLIP_NAMES = _CLIP_NAMES._replace(cls_token="", norm_pre="", proj="", head="head")
_VIT_NAMES = Names(
  "embeddings.patch_embeddings.projection",
  "embeddings.cls_token",
  "embeddings.position_embeddings",
  "layernorm",
  "encoder.layer.{}",
  "layernorm_before",
  tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
  "attention.output.dense",
  "layernorm_after",
  ("intermediate.dense",),
  "output.dense",
)
_VIT5_NAMES = (
  _VIT_NAMES._replace(  # in the memory of transformers 5; its files keep the names above
    block="layers.{}",
    qkv=tuple(f"attention.{x}_proj" for x in "qkv"),
    out="attention.o_proj",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
  )
)
_DINOV2_NAMES = _VIT_NAMES._replace(
  norm1="norm1",
  norm2="norm2",
  fc1=("mlp.fc1",),
  fc2="mlp.fc2",
  scale1="layer_scale1.lambda1",
  scale2="layer_scale2.lambda1",
)
_DINOV3_NAMES = Names(
  "embeddings.patch_embeddings",
  "embeddings.cls_token",
  "",
  "norm",
  "layer.{}",
  "norm1",
  tuple(f"attention.{x}_proj" for x in "qkv"),
  "attention.o_proj",
  "norm2",
  ("mlp.up_proj",),
  "mlp.down_proj",
  registers="embeddings.register_tokens",
  scale1="layer_scale1.lambda1",
  scale2="layer_scale2.lambda1",
)
_TIMM_NAMES = Names(
  "patch_embed.proj",
  "cls_token",
  "pos_embed",
  "norm",
  "blocks.{}",
  "norm1",
  ("attn.qkv",),
  "attn.proj",
  "norm2",
  ("mlp.fc1",),
  "mlp.fc2",
)
_OPENAI_NAMES = Names(
  "conv1",
  "class_embedding",
  "positional_embedding",
  "ln_post",
  "transformer.resblocks.{}",
  "ln_1",
  ("attn.in_proj_",),
  "attn.out_proj",
  "ln_2",
  ("mlp.c_fc",),
  "mlp.c_proj",
  norm_pre="ln_pre",
  proj="proj",
)

_CLIP = dict(norm_pre=True, patch_bias=False)
_SCALED = dict(layer_scale=True)
_VIT_IGNORE = (r"(.*\.)?pooler\.dense\..*", r"classifier\..*", r".*mask_token")
_TEXT_IGNORE = (
  r"text_model\..*",
  r"text_projection\.weight",
  "logit_scale",
  "logit_bias",
  r".*\.position_ids",
)
_BASE = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
  image_size=224,
  patch_size=16,
)
_CLIP_BASE = _BASE | dict(
  patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512
)
_VIT_BASE = _BASE | dict(hidden_act="gelu", layer_norm_eps=1e-12)
_DINOV2_BASE = _VIT_BASE | dict(
  intermediate_size=None, mlp_ratio=4, layer_norm_eps=1e-6, use_swiglu_ffn=False
)
_SIGLIP_BASE = _BASE | dict(
  hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True
)
_NAFLEX_BASE = _SIGLIP_BASE | dict(num_patches=256)
_ACTIVATIONS = {
  "gelu": "gelu",
  "quick_gelu": "quick_gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "silu": "silu",
}
_DINOV2 = dict(gated_fc1=("mlp.weights_in",), gated_fc2="mlp.weights_out")
_DINOV3_BASE = _BASE | dict(
  hidden_size=384,
  num_attention_heads=6,
  intermediate_size=1536,
  hidden_act="gelu",
  layer_norm_eps=1e-5,
  num_register_tokens=0,
  use_gated_mlp=False,
  rope_theta=100.0,
)

# The first row that fits is the one.
FAMILIES = (
  Family(
    "CLIP",
    _CLIP_NAMES,
    ("embeddings.class_embedding", "pre_layrnorm.weight"),
    ("vision_model.", ""),
    _TEXT_IGNORE,
    positions.BICUBIC,
    _CLIP,
    {"clip": _CLIP_BASE, "clip_vision_model": _CLIP_BASE},
  ),
  Family(
    "SigLIP",
    _SIGLIP_NAMES,
    ("embeddings.patch_embedding.bias", "embeddings.position_embedding.weight"),
    ("vision_model.", ""),
    _TEXT_IGNORE,
    positions.BICUBIC,
    dict(cls_token=False),
    {"siglip": _SIGLIP_BASE, "siglip_vision_model": _SIGLIP_BASE},
  ),
  Family(
    "SigLIP 2 NaFlex",
    _SIGLIP_NAMES,
    ("embeddings.patch_embedding.bias", "embeddings.position_embedding.weight"),
    ("vision_model.", ""),
    _TEXT_IGNORE,
    positions.BILINEAR_ANTIALIAS,
    dict(cls_token=False),
    {"siglip2": _NAFLEX_BASE, "siglip2_vision_model": _NAFLEX_BASE},
    patch_rank=2,
  ),
  Family(
    "DINOv2 with registers",
    _DINOV2_NAMES._replace(registers="embeddings.register_tokens"),
    ("embeddings.register_tokens", "encoder.layer.0.layer_scale1.lambda1"),
    ("dinov2_with_registers.", ""),
    _VIT_IGNORE,
    positions.BICUBIC_ANTIALIAS,
    _SCALED,
    {"dinov2_with_registers": _DINOV2_BASE | dict(num_register_tokens=4)},
    **_DINOV2,
  ),
  Family(
    "DINOv2",
    _DINOV2_NAMES,
    ("embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"),
    ("dinov2.", ""),
    _VIT_IGNORE,
    positions.BICUBIC,
    _SCALED,
    {"dinov2": _DINOV2_BASE | dict(patch_size=14)},
    **_DINOV2,
  ),
  Family(
    "DINOv3",
    _DINOV3_NAMES,
    ("embeddings.register_tokens", "layer.0.attention.q_proj.weight"),
    ("",),
    _VIT_IGNORE,
    positions.BICUBIC,
    _SCALED | dict(positions="rope"),
    {"dinov3_vit": _DINOV3_BASE},
    gated_fc1=("mlp.gate_proj", "mlp.up_proj"),
    gated_fc2="mlp.down_proj",
    key_bias=False,
  ),
  Family(
    "DINO",
    _VIT5_NAMES,
    ("embeddings.cls_token", "layers.0.layernorm_before.weight"),
    ("vit.", ""),
    _VIT_IGNORE,
    positions.BICUBIC,
    {},
    {"vit": _VIT_BASE},
  ),
  Family(
    "DINO",
    _VIT_NAMES,
    ("embeddings.cls_token", "encoder.layer.0.layernorm_before.weight"),
    ("vit.", ""),
    _VIT_IGNORE,
    positions.BICUBIC,
    {},
    {"vit": _VIT_BASE},
  ),
  Family(
    "CLIP",
    _TIMM_NAMES._replace(norm_pre="norm_pre", proj="head.weight"),
    ("cls_token", "norm_pre.weight"),
    ("",),
    (r"head\.bias",),
    positions.BICUBIC,
    _CLIP | dict(eps=1e-5),
  ),
  Family(
    "DINO",
    _TIMM_NAMES,
    ("cls_token", "patch_embed.proj.bias", "blocks.0.attn.qkv.weight"),
    ("",),
    (r"head\..*",),
    positions.DINO,
    dict(eps=1e-6, activation="gelu"),
  ),
  Family(
    "CLIP",
    _OPENAI_NAMES,
    ("class_embedding", "ln_pre.weight", "transformer.resblocks.0.attn.in_proj_weight"),
    ("visual.", ""),
    (
      r"transformer\..*",
      r"token_embedding\.weight",
      "positional_embedding",
      r"ln_final\..*",
      "text_projection",
      "logit_scale",
      "input_resolution",
      "context_length",
      "vocab_size",
    ),
    positions.BICUBIC,
    _CLIP | dict(eps=1e-5, activation="quick_gelu"),
  ),
)
MODEL_TYPES = {
  kind: family for family in FAMILIES for kind in family.model_types
}  # the last naming is that of files
SUPPORTED = (
  "CLIP, DINO, DINOv2, DINOv2 with registers, DINOv3, SigLIP and SigLIP 2 from Hugging Face; DINO and CLIP in "
  "timm's and their authors' names"
)

_UNSUPPORTED = (  # regular expression (full match) of one tensor -> what it is a part of
  (r"visual\.layer1\.0\.conv1\.weight", "a CLIP ResNet"),
  (r"patch_embed1\.proj\.weight", "ConvMAE"),
  (r"(decoder\.)?decoder_embed\.weight", "MAE"),
  (
    r"blocks\.(0\.)?0\.ls1\.gamma",
    "DINOv2 in its authors' names; take the Hugging Face folder, e.g. facebook/dinov2-base",
  ),
)
_TEXT = r"text_model\..*|(embeddings\.)?token_embedding\.weight|transformer\.resblocks\.0\..*"


def identify(shapes: dict[str, tuple[int, ...]], source: str) -> tuple[Family, str, str]:
  """The family of a file, the prefix of its names, and the markers found, for messages.

  Raises:
    WeightsError: none of the supported families.
  """
  for pattern, what in _UNSUPPORTED:
    found = next((name for name in shapes if re.fullmatch(pattern, name)), None)
    if found:
      raise WeightsError(f"{source} looks like {what} (found {found}); supported: {SUPPORTED}")
  for family in FAMILIES:
    for prefix in family.prefixes:
      rank = len(shapes.get(f"{prefix}{family.names.patch_embed}.weight", ()))
      if rank in (0, family.patch_rank) and all(
        prefix + marker in shapes for marker in family.markers
      ):
        return family, prefix, ", ".join(family.markers)
  if any(re.fullmatch(_TEXT, name) for name in shapes):
    raise WeightsError(f"{source} contains only a text tower; a teacher needs the vision tower")
  raise WeightsError(
    f"{source} is of an unknown family (found {', '.join(sorted(shapes)[:3])}); supported: {SUPPORTED}"
  )


def tower_shapes(
  family: Family, prefix: str, shapes: dict[str, tuple[int, ...]], source: str
) -> tuple[dict[str, Any], int]:
  """What the shapes of a file tell about the tower.

  Returns:
    Fields of ViT, and the number of grid positions in its table (0: no table).

  Raises:
    WeightsError: a tensor that would tell is missing.
  """
  names = family.names

  def shape(name, *ranks):
    if prefix + name not in shapes:
      raise WeightsError(
        f"{source} does not fit the model: missing: {prefix + name} (a part of a sharded file, or another "
        "model?)"
      )
    found = shapes[prefix + name]
    if len(found) not in ranks:
      raise WeightsError(
        f"{source} does not fit the model: misshapen: {prefix + name} {tuple(found)}"
      )
    return found

  block = names.block.format(0) + "."
  gated = bool(family.gated_fc1) and f"{prefix}{block}{family.gated_fc1[0]}.weight" in shapes
  width, mlp_dim = shape(f"{block}{family.gated_fc2 if gated else names.fc2}.weight", 2)
  patch_embed = shape(f"{names.patch_embed}.weight", family.patch_rank)
  patch = math.isqrt(patch_embed[1] // 3) if family.patch_rank == 2 else patch_embed[-1]
  registers = shape(names.registers, 3)[1] if names.registers else 0
  table = shape(names.pos_embed, 2, 3)[-2] - bool(names.cls_token) if names.pos_embed else 0
  projection = shapes.get(_projection(names, prefix), (0, 0))
  blocks = re.compile(
    re.escape(prefix) + names.block.replace(".", r"\.").format(r"([0-9]+)") + r"\..*"
  )
  depth = count_blocks(
    (found[1] for found in map(blocks.fullmatch, shapes) if found),
    names.block.format("N").rstrip(".N"),
    source,
  )
  return dict(
    patch_size=patch,
    dim=width,
    depth=depth,
    mlp_dim=mlp_dim,
    gated=gated,
    num_registers=registers,
    proj_dim=projection[1 if names.proj == "proj" else 0],
    learned_positions=bool(names.pos_embed),
    attention_pool=f"{prefix}{names.head}.probe" in shapes,
  ), table


def tower_config(
  config: dict[str, Any], source: str
) -> tuple[Family, dict[str, Any], tuple[int, int] | None]:
  """What Hugging Face's config.json tells about a tower; keys that are left out have transformers' values.

  Returns:
    The family (the first of its namings), fields of ViT, and the grid of the position table, None without one.

  Raises:
    WeightsError: an unsupported model, or values that make no sense.
  """
  try:
    kind = config["model_type"]
    if kind not in MODEL_TYPES:
      raise WeightsError(
        f"{source}: model_type {str(kind)[:40]!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
      )
    family = MODEL_TYPES[kind]
    proj = kind == "clip" or "CLIPVisionModelWithProjection" in config.get("architectures", ())
    proj_dim = config.get("projection_dim", 512) if proj else 0
    if kind in (
      "clip",
      "siglip",
      "siglip2",
    ):  # text and vision; in old CLIP files vision_config_dict, where it is, wins
      config = config.get("vision_config_dict") or config.get("vision_config") or {}
    c = family.model_types[kind] | config
    activation = _ACTIVATIONS.get(c["hidden_act"])
    if activation is None:
      raise WeightsError(
        f"{source}: hidden_act {str(c['hidden_act'])[:40]!r} is not supported; supported: "
        f"{', '.join(_ACTIVATIONS)}"
      )
    patch, side = (
      x if isinstance(x, (list, tuple)) else (x, x) for x in (c["patch_size"], c["image_size"])
    )
    if patch[0] != patch[1]:
      raise WeightsError(
        f"{source}: patches of {patch[0]}x{patch[1]} pixels are not supported; they must be square"
      )
    mlp_dim = c["intermediate_size"] or int(c["hidden_size"] * c["mlp_ratio"])
    gated = bool(c.get("use_gated_mlp") or c.get("use_swiglu_ffn"))
    if c.get(
      "use_swiglu_ffn"
    ):  # transformers' Dinov2SwiGLUFFN: two thirds of the width, rounded up, and always SiLU
      mlp_dim, activation = (int(mlp_dim * 2 / 3) + 7) // 8 * 8, "silu"
    fields = family.tower | dict(
      patch_size=patch[0],
      dim=c["hidden_size"],
      depth=c["num_hidden_layers"],
      num_heads=c["num_attention_heads"],
      mlp_dim=mlp_dim,
      eps=c["layer_norm_eps"],
      activation=activation,
      gated=gated,
      proj_dim=proj_dim,
      num_registers=c.get("num_register_tokens", 0),
      learned_positions=bool(family.names.pos_embed),
      attention_pool=bool(c.get("vision_use_head")),
    )
    if "rope_theta" in c:
      grid, fields["rope_theta"] = None, float(c["rope_theta"])
    else:
      grid = (
        (math.isqrt(c["num_patches"]),) * 2
        if "num_patches" in c
        else (side[0] // patch[0], side[1] // patch[0])
      )
  except WeightsError:
    raise
  except (TypeError, ValueError, ArithmeticError, LookupError) as error:
    raise WeightsError(f"{source} holds a size that is none: {error}") from None
  check_fields(ViT, fields, source)
  if grid and not all(type(side) is int and 0 < side <= MAX_SIZE for side in grid):
    raise WeightsError(f"{source} holds a size that is none: a grid of {str(grid)[:60]} patches")
  return family, fields, grid


def _projection(names: Names, prefix: str) -> str:
  """The full name of the projection: OpenAI's is a part of the tower, the others' stand beside it."""
  return (prefix if names.proj == "proj" else "") + names.proj


def name_table(family: Family, prefix: str, tower: ViT) -> list[Entry]:
  """The entries of every parameter of `tower`."""
  names = family.names
  at = lambda name: prefix + name
  kernel, bias = dense(
    "patch_embed",
    at(names.patch_embed),
    linear if family.patch_rank == 2 else conv(tower.patch_size),
  )
  table = [kernel, *([bias] if tower.patch_bias else []), *norm("norm", at(names.norm))]
  for ours, theirs in (
    ("cls_token", names.cls_token),
    ("pos_embed", names.pos_embed),
    ("registers", names.registers if tower.num_registers else ""),
  ):
    if theirs:
      table.append(Entry(ours, (at(theirs),), tokens))
  if names.norm_pre:
    table += norm("norm_pre", at(names.norm_pre))
  if tower.proj_dim:
    table.append(
      Entry("proj/kernel", (_projection(names, prefix),), same if names.proj == "proj" else linear)
    )
  fc1, fc2 = (family.gated_fc1, family.gated_fc2) if tower.gated else (names.fc1, names.fc2)
  for i in range(tower.depth):
    ours, theirs = f"blocks_{i}", at(names.block.format(i)) + "."
    table += norm(f"{ours}/norm1", theirs + names.norm1) + norm(
      f"{ours}/norm2", theirs + names.norm2
    )
    table += _packed_qkv(family, f"{ours}/attn/qkv", theirs)
    table += dense(f"{ours}/attn/proj", theirs + names.out) + dense(f"{ours}/fc2", theirs + fc2)
    table += [
      Entry(f"{ours}/fc1/kernel", tuple(f"{theirs}{x}.weight" for x in fc1), linear),
      Entry(f"{ours}/fc1/bias", tuple(f"{theirs}{x}.bias" for x in fc1), pack),
    ]
    if tower.layer_scale:
      table += [
        Entry(f"{ours}/scale{k}", (theirs + name,), same)
        for k, name in ((1, names.scale1), (2, names.scale2))
      ]
  if tower.attention_pool:
    theirs = at(names.head)
    table += [
      Entry("head/probe", (f"{theirs}.probe",), tokens),
      *norm("head/norm", f"{theirs}.layernorm"),
      Entry("head/qkv/kernel", (f"{theirs}.attention.in_proj_weight",), linear),
      Entry("head/qkv/bias", (f"{theirs}.attention.in_proj_bias",), same),
      *dense("head/proj", f"{theirs}.attention.out_proj"),
      *dense("head/fc1", f"{theirs}.mlp.fc1"),
      *dense("head/fc2", f"{theirs}.mlp.fc2"),
    ]
  return table


def _packed_qkv(family: Family, ours: str, block: str) -> list[Entry]:
  parts = [block + name for name in family.names.qkv]
  if len(parts) == 1:
    dot = "" if parts[0].endswith("_") else "."  # in_proj_weight is one word
    return [
      Entry(f"{ours}/kernel", (f"{parts[0]}{dot}weight",), linear),
      Entry(f"{ours}/bias", (f"{parts[0]}{dot}bias",), same),
    ]
  entries = qkv(ours, tuple(parts))
  if not family.key_bias:  # the softmax would not see it anyway
    entries[1] = Entry(
      f"{ours}/bias",
      (f"{parts[0]}.bias", f"{parts[2]}.bias"),
      Layout(
        lambda q, v: np.concatenate([q, np.zeros_like(q), v]), lambda x, parts: np.split(x, 3)[::2]
      ),
    )
  return entries
