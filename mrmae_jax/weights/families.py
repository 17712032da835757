"""Families of vision towers: the names of their tensors in CLIP, DINO, DINOv2, DINOv3 and SigLIP.

A `Family` is one row of FAMILIES. `identify` finds the row by names that no other family has, and
`name_table` maps the tensors of that row to the parameters of a ViT.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from mrmae_jax import interpolation
from mrmae_jax.errors import WeightsError
from mrmae_jax.models.vit import ViT
from mrmae_jax.weights.table import (
  Entry,
  Layout,
  conv,
  dense,
  fusion,
  linear,
  norm,
  pack,
  qkv,
  same,
  tokens,
)


class Names(NamedTuple):
  """The names of a tower's tensors; "" where a family has no such tensor.

  Names of a block's tensors follow `block`, in which {} is the block's number.
  """

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
  q_bias: str = ""  # where keys have none
  v_bias: str = ""
  k_bias: str = ""  # zero, where there is one
  relative: str = ""  # table of relative positions
  shared: str = ""  # the same, one for all blocks
  fc_norm: str = ""  # norm before a classifier of the mean token
  classifier: str = ""  # with no prefix before it


class Family(NamedTuple):
  """A family of towers in one naming.

  Attributes:
    name: of the family; several namings share it.
    names: of its tensors.
    markers: tensors, after the prefix, that identify the family.
    prefixes: every name starts with one of them.
    ignore: regular expressions (full match) of tensors that are not a part of the vision tower.
    rule: interpolation of its position table.
    fields: fields of ViT that all its members share.
    model_types: of config.json, each with the values that transformers has for absent keys. {}:
      files in this naming come without config.json, and shapes give the sizes.
    gated_fc1, gated_fc2: names of the MLP's tensors where it is gated.
    key_bias: keys have a bias.
    cls_position: the position table has a row for CLS; without one it is zero.
    patch_rank: rank of the patch embedding's weight; 4: a convolution (D, 3, p, p), 2: a linear
      layer (D, p * p * 3).
  """

  name: str
  names: Names
  markers: tuple[str, ...]
  prefixes: tuple[str, ...]
  ignore: tuple[str, ...]
  rule: interpolation.Rule
  fields: dict[str, Any]
  model_types: dict[str, dict[str, Any]] = {}
  gated_fc1: tuple[str, ...] = ()
  gated_fc2: str = ""
  key_bias: bool = True
  cls_position: bool = True
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
  classifier="classifier",
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
  classifier="",  # of CLS and the mean token, side by side
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
_DINOV2_TIMM_NAMES = _TIMM_NAMES._replace(scale1="ls1.gamma", scale2="ls2.gamma")
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

_BEIT_NAMES = _TIMM_NAMES._replace(
  scale1="gamma_1",
  scale2="gamma_2",
  q_bias="attn.q_bias",
  v_bias="attn.v_bias",
  k_bias="attn.k_bias",
  relative="attn.relative_position_bias_table",
  shared="rel_pos_bias.relative_position_bias_table",
  fc_norm="fc_norm",
  classifier="head",
)
_BEIT_HF_NAMES = _VIT_NAMES._replace(
  scale1="lambda_1",
  scale2="lambda_2",
  q_bias="attention.attention.query.bias",
  v_bias="attention.attention.value.bias",
  k_bias="attention.attention.key.bias",
  relative="attention.attention.relative_position_bias.relative_position_bias_table",
  shared="encoder.relative_position_bias.relative_position_bias_table",
  fc_norm="pooler.layernorm",
)
_BEIT_HF5_NAMES = _VIT5_NAMES._replace(  # in the memory of transformers 5
  scale1="lambda_1",
  scale2="lambda_2",
  q_bias="attention.q_proj.bias",
  v_bias="attention.v_proj.bias",
  k_bias="attention.k_proj.bias",
  relative="relative_position_bias.relative_position_bias_table",
  shared="shared_position_bias.relative_position_bias_table",
  fc_norm="pooler.layernorm",
)

# Beside the tower: classifiers, pre-training, necks and heads of segmentation, tables of constants.
BEIT_IGNORE = (
  r"(beit\.)?pooler\.layernorm\..*",
  r"(fc_norm|head|classifier|lm_head|cls_pt_layers|fpn\d|decode_head|auxiliary_head)\..*",
  r"(.*\.)?(mask_token|relative_position_index|k_bias|key\.bias|k_proj\.bias)",
  "pos_embed",
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
HF_ACTIVATIONS = {  # words of config.json -> keys of layers.ACTIVATIONS
  "gelu": "gelu",
  "quick_gelu": "quick_gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "silu": "silu",
}
_DINOV2 = dict(gated_fc1=("mlp.weights_in",), gated_fc2="mlp.weights_out")
# In the names of its authors and of timm, which come without config.json.
_DINOV2_FILES = dict(
  prefixes=("",),
  ignore=(r"head\..*", "mask_token"),
  fields=_SCALED | dict(eps=1e-6, activation="gelu"),
)
_DINOV2_AUTHORS = _DINOV2_FILES | dict(gated_fc1=("mlp.w12",), gated_fc2="mlp.w3")
_DINOV2_TIMM = _DINOV2_FILES | dict(gated_fc1=("mlp.fc1",), gated_fc2="mlp.fc2")
_DINOV2_MARKERS = ("cls_token", "blocks.0.ls1.gamma")
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

_BEIT_BASE = _VIT_BASE | dict(
  use_relative_position_bias=False, use_shared_relative_position_bias=False
)
# In the names of its authors and timm, of Hugging Face's files, and of transformers 5.
BEIT = (
  Family(
    "BEiT",
    _BEIT_NAMES,
    ("cls_token",),
    ("",),
    BEIT_IGNORE,
    interpolation.BEIT,
    dict(eps=1e-6, activation="gelu"),
  ),
  *(
    Family(
      "BEiT",
      names,
      ("embeddings.cls_token",),
      ("beit.", ""),
      BEIT_IGNORE,
      interpolation.BEIT,
      {},
      {"beit": _BEIT_BASE},
    )
    for names in (_BEIT_HF5_NAMES, _BEIT_HF_NAMES)
  ),
)

# The first row that fits is the one.
FAMILIES = (
  *(  # BEiT first: its files have the markers of MAE and DINO, too
    family._replace(markers=(*family.markers, marker))
    for family in BEIT
    for marker in (
      family.names.shared,
      *(
        f"{family.names.block.format(0)}.{x}" for x in (family.names.relative, family.names.scale1)
      ),
      *(("blocks.0.attn.q_bias",) if not family.model_types else ()),  # a name of its own
    )
  ),
  Family(
    "CLIP",
    _CLIP_NAMES,
    ("embeddings.class_embedding", "pre_layrnorm.weight"),
    ("vision_model.", ""),
    _TEXT_IGNORE,
    interpolation.BICUBIC,
    _CLIP,
    {"clip": _CLIP_BASE, "clip_vision_model": _CLIP_BASE},
  ),
  Family(
    "SigLIP",
    _SIGLIP_NAMES,
    ("embeddings.patch_embedding.bias", "embeddings.position_embedding.weight"),
    ("vision_model.", ""),
    _TEXT_IGNORE,
    interpolation.BICUBIC,
    dict(cls_token=False),
    {"siglip": _SIGLIP_BASE, "siglip_vision_model": _SIGLIP_BASE},
  ),
  Family(
    "SigLIP 2 NaFlex",
    _SIGLIP_NAMES,
    ("embeddings.patch_embedding.bias", "embeddings.position_embedding.weight"),
    ("vision_model.", ""),
    _TEXT_IGNORE,
    interpolation.BILINEAR_ANTIALIAS,
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
    interpolation.BICUBIC_ANTIALIAS,
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
    interpolation.BICUBIC,
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
    interpolation.BICUBIC,
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
    interpolation.BICUBIC,
    {},
    {"vit": _VIT_BASE},
  ),
  Family(
    "DINO",
    _VIT_NAMES,
    ("embeddings.cls_token", "encoder.layer.0.layernorm_before.weight"),
    ("vit.", ""),
    _VIT_IGNORE,
    interpolation.BICUBIC,
    {},
    {"vit": _VIT_BASE},
  ),
  Family(
    "DINOv2 with registers",
    _DINOV2_TIMM_NAMES._replace(registers="register_tokens"),
    (*_DINOV2_MARKERS, "register_tokens"),
    rule=interpolation.BICUBIC_ANTIALIAS,
    **_DINOV2_AUTHORS,
  ),
  Family(
    "DINOv2 with registers",
    _DINOV2_TIMM_NAMES._replace(registers="reg_token"),
    (*_DINOV2_MARKERS, "reg_token"),
    rule=interpolation.BICUBIC_ANTIALIAS,
    cls_position=False,
    **_DINOV2_TIMM,
  ),
  Family(
    "DINOv2",
    _DINOV2_TIMM_NAMES,
    (*_DINOV2_MARKERS, "mask_token"),
    rule=interpolation.DINO,
    **_DINOV2_AUTHORS,
  ),
  Family(
    "DINOv2",
    _DINOV2_TIMM_NAMES,
    _DINOV2_MARKERS,
    rule=interpolation.BICUBIC_ANTIALIAS,
    **_DINOV2_TIMM,
  ),
  Family(
    "CLIP",
    _TIMM_NAMES._replace(norm_pre="norm_pre", proj="head.weight"),
    ("cls_token", "norm_pre.weight"),
    ("",),
    (r"head\.bias",),
    interpolation.BICUBIC,
    _CLIP | dict(eps=1e-5),
  ),
  Family(
    "DINO",
    _TIMM_NAMES,
    ("cls_token", "patch_embed.proj.bias", "blocks.0.attn.qkv.weight"),
    ("",),
    (r"head\..*",),
    interpolation.DINO,
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
    interpolation.BICUBIC,
    _CLIP | dict(eps=1e-5, activation="quick_gelu"),
  ),
)
# A type that two namings share gets the last one, that of files.
MODEL_TYPES = {kind: family for family in FAMILIES for kind in family.model_types}
SUPPORTED = (
  "CLIP, DINO, DINOv2, DINOv2 with registers, DINOv3, SigLIP, SigLIP 2 and BEiT from Hugging Face; "
  "DINO, DINOv2, CLIP and BEiT in timm's and their authors' names"
)

_UNSUPPORTED = (  # regular expression (full match) of one tensor -> its model
  (r"visual\.layer1\.0\.conv1\.weight", "a CLIP ResNet"),
  (r"patch_embed1\.proj\.weight", "ConvMAE"),
  (r"(decoder\.)?decoder_embed\.weight", "MAE"),
)
_TEXT = r"text_model\..*|(embeddings\.)?token_embedding\.weight|transformer\.resblocks\.0\..*"


def find_family(shapes: dict[str, tuple[int, ...]]) -> tuple[Family, str] | None:
  """Returns the first family that fits tensors, and the prefix of its names; None if none fits."""
  for family in FAMILIES:
    for prefix in family.prefixes:
      rank = len(shapes.get(f"{prefix}{family.names.patch_embed}.weight", ()))
      if rank in (0, family.patch_rank) and all(
        prefix + marker in shapes for marker in family.markers
      ):
        return family, prefix
  return None


def identify(shapes: dict[str, tuple[int, ...]], source: str) -> tuple[Family, str, str]:
  """Returns the family of a file, the prefix of its names, and its markers for messages.

  Raises:
    WeightsError: it is none of the supported families.
  """
  for pattern, model in _UNSUPPORTED:
    marker = next((name for name in shapes if re.fullmatch(pattern, name)), None)
    if marker:
      raise WeightsError(f"{source} looks like {model} (found {marker}); supported: {SUPPORTED}")
  if found := find_family(shapes):
    family, prefix = found
    return family, prefix, ", ".join(family.markers)
  if any(re.fullmatch(_TEXT, name) for name in shapes):
    raise WeightsError(f"{source} contains only a text tower; a teacher needs the vision tower")
  raise WeightsError(
    f"{source} is of an unknown family (found {', '.join(sorted(shapes)[:3])}); supported: "
    f"{SUPPORTED}"
  )


def projection_name(names: Names, prefix: str) -> str:
  """Returns the full name of the projection.

  OpenAI's is a part of the tower; the others' stands beside the tower, without its prefix.
  """
  return (prefix if names.proj == "proj" else "") + names.proj


def name_table(family: Family, prefix: str, tower: ViT, has_norm: bool = True) -> list[Entry]:
  """Returns the entries of every parameter of a tower; without the last norm if it has none."""
  names = family.names
  at = lambda name: prefix + name
  kernel, bias = dense(
    "patch_embed",
    at(names.patch_embed),
    linear if family.patch_rank == 2 else conv(tower.patch_size),
  )
  table = [kernel, *([bias] if tower.patch_bias else [])]
  table += norm("norm", at(names.norm)) if has_norm else []
  for ours, theirs in (
    ("cls_token", names.cls_token),
    ("pos_embed", names.pos_embed if tower.learned_positions else ""),
    ("registers", names.registers if tower.num_registers else ""),
  ):
    if theirs:
      has_cls_row = ours != "pos_embed" or family.cls_position
      table.append(Entry(ours, (at(theirs),), tokens if has_cls_row else _patch_positions))
  if names.norm_pre:
    table += norm("norm_pre", at(names.norm_pre))
  if tower.proj_dim:
    table.append(
      Entry(
        "proj/kernel", (projection_name(names, prefix),), same if names.proj == "proj" else linear
      )
    )
  for i in range(tower.depth):
    table += _block_table(family, tower, f"blocks_{i}", at(names.block.format(i)) + ".")
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
  return table + fusion(tower)


def _block_table(family: Family, tower: ViT, ours: str, theirs: str) -> list[Entry]:
  """Returns the entries of a block; `theirs` stands before the names of its tensors."""
  names = family.names
  fc1, fc2 = (family.gated_fc1, family.gated_fc2) if tower.gated else (names.fc1, names.fc2)
  table = norm(f"{ours}/norm1", theirs + names.norm1) + norm(f"{ours}/norm2", theirs + names.norm2)
  kernel, bias = _packed_qkv(family, f"{ours}/attn/qkv", theirs)
  own = {}
  if not tower.key_bias:
    own |= {"attn/q_bias": names.q_bias, "attn/v_bias": names.v_bias}
  if tower.relative_positions:
    own["attn/relative_positions"] = names.relative
  if tower.layer_scale:
    own |= {"scale1": names.scale1, "scale2": names.scale2}
  return [
    *table,
    kernel,
    *([bias] if tower.key_bias else []),
    *dense(f"{ours}/attn/proj", theirs + names.out),
    *dense(f"{ours}/fc2", theirs + fc2),
    Entry(f"{ours}/fc1/kernel", tuple(f"{theirs}{x}.weight" for x in fc1), linear),
    Entry(f"{ours}/fc1/bias", tuple(f"{theirs}{x}.bias" for x in fc1), pack),
    *(Entry(f"{ours}/{name}", (theirs + tensor,), same) for name, tensor in own.items()),
  ]


# A table without a row for CLS, whose row is then zero.
_patch_positions = Layout(
  lambda x: np.concatenate([np.zeros_like(x[:, :1]), x], axis=1), lambda x, parts: [x[:, 1:]]
)


def _packed_qkv(family: Family, ours: str, block: str) -> list[Entry]:
  """Returns the entries of query, key and value, packed into one Dense layer."""
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
