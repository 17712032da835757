"""Frozen teachers: published vision towers by name or path, what they see, and what of them is mimicked.

A teacher is loaded once, kept out of the train state and out of every checkpoint, and sees the whole image with its own
input normalisation. Loading is strict: a teacher with a missing, unknown or misshapen tensor trains no student.
`read_spec` checks all that can be checked without weights' values; `load` reads them.
"""

import functools
import hashlib
import math
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mrmae_jax.config import token_size as student_token_size
from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.errors import StorageError, WeightsError, WorkdirError
from mrmae_jax.models import make_encoder
from mrmae_jax.models.layers import ACTIVATIONS
from mrmae_jax.models.vit import ViT
from mrmae_jax.mrmae import TeacherOutput, normalize, normalize_features
from mrmae_jax.runs import checkpoint
from mrmae_jax.weights import files, positions, towers
from mrmae_jax.weights.table import check_fields, convert

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = ((0.5,) * 3, (0.5,) * 3)
_NORMALISATION = {
  "CLIP": (CLIP_MEAN, CLIP_STD),
  "SigLIP": _HALF,
  "SigLIP 2 NaFlex": _HALF,
}  # the others have ImageNet's
LAYERS = ("raw", "normed", "proj")


class Preset(NamedTuple):
  """A published teacher: where it lies on the Hugging Face hub, and what it must turn out to be."""

  repo: str
  revision: str
  family: str
  dim: int
  depth: int
  patch: int
  side: int  # of the images of its position table, in pixels


# Revisions are commits of the hub. "main" where no commit could be verified; refs/pr/N where only that proposal of the hub's
# conversion robot holds safetensors: both may move, the digest in a run's log says what was loaded.
PRESETS = {
  "clip_vit_b32": Preset(
    "openai/clip-vit-base-patch32",
    "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "CLIP",
    768,
    12,
    32,
    224,
  ),
  "clip_vit_b16": Preset(
    "openai/clip-vit-base-patch16",
    "57c216476eefef5ab752ec549e440a49ae4ae5f3",
    "CLIP",
    768,
    12,
    16,
    224,
  ),
  "clip_vit_l14": Preset(
    "openai/clip-vit-large-patch14",
    "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "CLIP",
    1024,
    24,
    14,
    224,
  ),
  "clip_vit_l14_336": Preset(
    "openai/clip-vit-large-patch14-336",
    "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "CLIP",
    1024,
    24,
    14,
    336,
  ),
  "dino_vit_s16": Preset("facebook/dino-vits16", "refs/pr/1", "DINO", 384, 12, 16, 224),
  "dino_vit_s8": Preset("facebook/dino-vits8", "main", "DINO", 384, 12, 8, 224),
  "dino_vit_b16": Preset("facebook/dino-vitb16", "refs/pr/7", "DINO", 768, 12, 16, 224),
  "dino_vit_b8": Preset("facebook/dino-vitb8", "main", "DINO", 768, 12, 8, 224),
  "dinov2_vit_s14": Preset(
    "facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056", "DINOv2", 384, 12, 14, 518
  ),
  "dinov2_vit_b14": Preset(
    "facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415", "DINOv2", 768, 12, 14, 518
  ),
  "dinov2_vit_l14": Preset(
    "facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c", "DINOv2", 1024, 24, 14, 518
  ),
  "dinov2_vit_g14": Preset(
    "facebook/dinov2-giant", "611a9d42f2335e0f921f1e313ad3c1b7178d206d", "DINOv2", 1536, 40, 14, 518
  ),
  "dinov2_vit_s14_reg": Preset(
    "facebook/dinov2-with-registers-small", "main", "DINOv2 with registers", 384, 12, 14, 518
  ),
  "dinov2_vit_b14_reg": Preset(
    "facebook/dinov2-with-registers-base", "main", "DINOv2 with registers", 768, 12, 14, 518
  ),
  "dinov2_vit_l14_reg": Preset(
    "facebook/dinov2-with-registers-large",
    "e4c89a4e05589de9b3e188688a303d0f3c04d0f3",
    "DINOv2 with registers",
    1024,
    24,
    14,
    518,
  ),
  "dinov2_vit_g14_reg": Preset(
    "facebook/dinov2-with-registers-giant",
    "8d0d49f77fb8b5dd78842496ff14afe7dd4d85cb",
    "DINOv2 with registers",
    1536,
    40,
    14,
    518,
  ),
  "dinov3_vit_s16": Preset(
    "facebook/dinov3-vits16-pretrain-lvd1689m",
    "114c1379950215c8b35dfcd4e90a5c251dde0d32",
    "DINOv3",
    384,
    12,
    16,
    0,
  ),
  "dinov3_vit_b16": Preset(
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "5931719e67bbdb9737e363e781fb0c67687896bc",
    "DINOv3",
    768,
    12,
    16,
    0,
  ),
  "dinov3_vit_l16": Preset(
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "ea8dc2863c51be0a264bab82070e3e8836b02d51",
    "DINOv3",
    1024,
    24,
    16,
    0,
  ),
  "siglip_vit_b16": Preset(
    "google/siglip-base-patch16-224",
    "7fd15f0689c79d79e38b1c2e2e2370a7bf2761ed",
    "SigLIP",
    768,
    12,
    16,
    224,
  ),
  "siglip2_vit_b16": Preset(
    "google/siglip2-base-patch16-224",
    "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2",
    "SigLIP",
    768,
    12,
    16,
    224,
  ),
}
_CONFIG_FILES = ("config.json", "preprocessor_config.json")
# In this order: the last one needs torch.
_WEIGHT_FILES = (
  ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
  ("flax_model.msgpack",),
  ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)


class TeacherSpec(NamedTuple):
  """All that is known of a teacher before its weights' values are read, for images of one size.

  Attributes:
    path: weight file or Hugging Face folder, or a run's workdir; None: a preset whose weights `load` will fetch.
    module: the tower, its position table that of `tokens`; or the encoder of a run.
    table_grid: of the stored position table; None: rotary or fixed positions.
    image_size, grid: (height, width) of the student's images in pixels, and in tokens.
    input_size, tokens: the same of what the teacher sees.
    bands: the student's channels that it sees, in its order.
    mean, std: of the teacher's input.
    layer, last_k: see `read_spec`.
    family, prefix: how its tensors are called; family None: the encoder of a run.
    request: the arguments of `read_spec`.
    dim: width of the features.
    has_cls: there is a CLS token.
    has_attention: there is a CLS token, or a probe, whose attention over the patches says where the salient ones are.
    description: one line for people.
  """

  path: Path | None
  module: Any
  table_grid: tuple[int, int] | None
  image_size: tuple[int, int]
  grid: tuple[int, int]
  input_size: tuple[int, int]
  tokens: tuple[int, int]
  bands: tuple[int, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  layer: str
  last_k: int
  family: towers.Family | None
  prefix: str
  request: dict[str, Any]
  dim: int
  has_cls: bool
  has_attention: bool
  description: str


class Teacher(NamedTuple):
  """A frozen teacher.

  Attributes:
    look: (params, the student's images [B, H, W, C], uint8 or float in [0, 1]) -> TeacherOutput on the student's grid.
    params: kernels in the compute dtype, the rest float32; numpy until the caller places them.
    grid: (rows, columns) of the student's tokens.
    dim: width of the features.
    digest: sha256 of the weights, to tell teachers apart wherever they lie.
  """

  look: Callable[[Any, jax.Array], TeacherOutput]
  params: Any
  grid: tuple[int, int]
  dim: int
  digest: str


def read_spec(
  *,
  name: str = "",
  path: str | Path = "",
  image_size: tuple[int, int],
  token_size: int,
  dtype: str = "bfloat16",
  layer: str = "raw",
  last_k: int = 1,
  channels: int = 3,
  bands: tuple[int, ...] = (),
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
  resolution: int = 0,
  num_heads: int = 0,
  activation: str = "",
) -> TeacherSpec:
  """Finds a teacher and checks that it fits, without reading weights.

  Args:
    name: a key of PRESETS. Without a path it is fetched from the Hugging Face hub, or found in its cache; with one, the
      path must hold that model.
    path: Hugging Face folder, or a file of weights in timm's, DINO's or OpenAI's names, or "checkpoint:WORKDIR": the encoder
      that a run of this project has trained, for distillation in stages; or "random": the tower of that name with random
      weights, a stand-in for benchmarks, and a baseline.
    image_size: (height, width) of the student's images in pixels.
    token_size: side of a student's token in pixels.
    dtype: of the computation.
    layer: "raw": residual stream after the last block; "normed": after the last norm; "proj": projection of all normed
      tokens, where the model has one.
    last_k: with "raw", the mean over so many last blocks, each normalised token by token as their scales differ
      (data2vec, Baevski et al. 2022, arXiv 2202.03555).
    channels: of the student's images.
    bands: those of them that the teacher sees, three for a published one; (): all if it has as many, and the one of grey images
      in the place of each of its own.
    mean, std: of the student's images, for each channel, to be used for the teacher's input too; None: what its
      preprocessor_config.json says, else the family's.
    resolution: height of the teacher's input in pixels, the width in proportion. 0: the student's images as they are if
      the teacher's patches divide its tokens, else resized to one patch per token.
    num_heads, activation: for files that do not tell (`models.tower.ACTIVATIONS`); they overrule those that do.

  Raises:
    WeightsError: nothing there, not a supported teacher, or one that does not fit.
  """
  request = dict(locals())
  if name and name not in PRESETS:
    raise WeightsError(
      f"teacher.name={name!r} is unknown; choose one of {', '.join(PRESETS)}, or give a path alone"
    )
  if not name and not path:
    raise WeightsError(
      f"no teacher: give a name ({', '.join(PRESETS)}) or the path of a Hugging Face folder or weight file"
    )
  if layer not in LAYERS:
    raise WeightsError(f"layer {layer!r} is not one of {', '.join(LAYERS)}")
  if activation and activation not in ACTIVATIONS:
    raise WeightsError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")

  if str(path).startswith("checkpoint:"):
    if name or num_heads or activation:
      raise WeightsError(
        f"teacher.path={path} says all by itself; leave teacher.name, num_heads and activation empty"
      )
    weights, family, prefix, table_grid = (
      Path(os.path.expanduser(str(path).removeprefix("checkpoint:"))),
      None,
      "",
      None,
    )
    module, stored = _trained_encoder(weights, dtype)
    source, proj_dim, probe, described = f"{weights}", 0, False, f"encoder of {weights}"
  elif str(path) == "random":
    weights, source = None, f"random {name}"
    (family, fields, table_grid), prefix = _preset_tower(name, num_heads, activation), ""
    module, stored = ViT(**fields, dtype=jnp.dtype(dtype)), _normalisation(None, family.name)
    proj_dim, probe, described = (
      module.proj_dim,
      module.attention_pool,
      f"{family.name} {_size(module)} with random weights",
    )
  else:
    weights = Path(os.path.expanduser(path)) if path else None
    if weights is not None:
      files.weight_files(weights)  # there is something
    folder = (
      _fetch(name, _CONFIG_FILES)
      if weights is None
      else weights
      if weights.is_dir()
      else weights.parent
    )
    family, prefix, fields, table_grid = _tower(weights, folder, name, num_heads, activation)
    check_fields(ViT, fields, str(weights or folder))
    module, source = ViT(**fields, dtype=jnp.dtype(dtype)), str(weights or folder)
    if name:
      _check_preset(name, module, table_grid, source)
    stored = _normalisation(
      folder / "preprocessor_config.json" if family.model_types else None, family.name
    )
    proj_dim, probe, described = (
      module.proj_dim,
      module.attention_pool,
      f"{family.name} {_size(module)}",
    )
  if module.dim % 4:
    raise WeightsError(f"{source}: width {module.dim} is not divisible by 4")
  if module.dim % module.num_heads:
    raise WeightsError(
      f"{source}: width {module.dim} does not divide into {module.num_heads} heads; check num_heads"
    )
  if layer == "proj" and not proj_dim:
    raise WeightsError(f"no projection in {source}; choose layer raw or normed")
  if last_k != 1 and (layer != "raw" or not 1 <= last_k <= module.depth):
    raise WeightsError(
      f"last_k={last_k} needs layer 'raw' (not {layer!r}) and 1 to {module.depth} blocks of {source}"
    )

  bands = _bands(tuple(bands), channels, len(stored[0]), source)
  mean, std = (
    tuple(given[band] for band in bands) if given else default
    for given, default in zip((mean, std), stored)
  )
  grid, input_size = _input_size(image_size, token_size, module.patch_size, resolution)
  tokens = tuple(side // module.patch_size for side in input_size)
  by = "{0[0]}x{0[1]}".format
  description = f"{described} (width {module.dim}, depth {module.depth}), layer {layer}"
  if last_k > 1:
    description += f" of the last {last_k} blocks"
  description += f", input {by(input_size)}, grid {by(tokens)}"
  if tokens != grid:
    description += f" brought to {by(grid)}"
  if table_grid not in (None, tokens):
    description += f", position table {by(table_grid)} resized ({family.rule.description})"
  if bands != tuple(range(channels)):
    description += f", of channels {', '.join(map(str, bands))}"
  return TeacherSpec(
    weights,
    module,
    table_grid,
    tuple(image_size),
    grid,
    input_size,
    tokens,
    bands,
    mean,
    std,
    layer,
    last_k,
    family,
    prefix,
    request,
    proj_dim if layer == "proj" else module.dim,
    module.cls_token,
    module.cls_token or probe,
    description,
  )


def configured_spec(options, config) -> TeacherSpec:
  """`read_spec` with a teacher's section of a configuration (`options`), for the student that the configuration describes."""
  own = options.input_norm == "teacher"
  fields = ("layer", "last_k", "resolution", "num_heads", "activation", "dtype")
  return read_spec(
    name=options.name or "",
    path=options.path or "",
    image_size=tuple(config.image_size),
    token_size=student_token_size(config),
    channels=len(config.data.mean),
    bands=tuple(options.bands),
    mean=None if own else tuple(config.data.mean),
    std=None if own else tuple(config.data.std),
    **{field: options[field] for field in fields},
  )


def load(spec: TeacherSpec) -> Teacher:
  """Reads a teacher's weights, every tensor used exactly once or known to be no part of the vision tower.

  Raises:
    WeightsError: files missing or damaged, tensors missing, unknown, misshapen or not finite.
  """
  if spec.path is None and spec.request["path"] != "random":
    spec = read_spec(**spec.request | dict(path=_fetch(spec.request["name"], *_WEIGHT_FILES)))
  if spec.path is None:
    params, digest = _random_tower(spec), f"random {spec.request['name']}"
  else:
    params, digest = _read_tower(spec) if spec.family else _read_encoder(spec.path)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(spec.module.dtype) if path[-1].key == "kernel" else x, params
  )
  return Teacher(functools.partial(_look, spec), params, spec.grid, spec.dim, digest)


def _random_tower(spec: TeacherSpec):
  """Parameters of a preset's shapes: norms at their start, the rest N(0, 0.02), as ViTs are initialised."""
  shapes = jax.eval_shape(
    spec.module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *spec.input_size, 3), jnp.float32)
  )
  rng = np.random.default_rng(0)
  draw = lambda path, x: (
    {"scale": np.ones, "bias": np.zeros}[path[-1].key](x.shape, np.float32)
    if path[-1].key in ("scale", "bias")
    else 0.02 * rng.standard_normal(x.shape, np.float32)
  )
  return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def _read_tower(spec: TeacherSpec) -> tuple[Any, str]:
  """Parameters of a published tower, and the digest of its files."""
  source, module = str(spec.path), spec.module
  tensors = files.open_weights(spec.path)
  # Any grid will do for a tower without a table.
  sides = (side * module.patch_size for side in spec.table_grid or (1, 1))
  expected = jax.eval_shape(
    module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *sides, 3), jnp.float32)
  )["params"]
  entries = towers.name_table(spec.family, spec.prefix, module)
  params = convert(tensors, entries, expected, ignore=spec.family.ignore, source=source)
  if (
    spec.family.names.proj == "head.weight"
    and "head.bias" in tensors
    and np.abs(tensors["head.bias"].read()).max() > 1e-6
  ):
    raise WeightsError(
      f"{source}: head.bias is not zero: a classifier, not CLIP's projection; remove head.* from the file"
    )
  if spec.table_grid:
    params["pos_embed"] = positions.resize(
      params["pos_embed"], spec.table_grid, spec.tokens, spec.family.rule
    )
  used = {name for entry in entries for name in entry.theirs}
  logging.info(
    "teacher %s: %s; %d tensors (%s) used, %d of other parts left out",
    source,
    spec.description,
    len(used),
    ", ".join(sorted({tensors[name].dtype for name in used})),
    len(tensors) - len(used),
  )
  return params, files.digest(spec.path)


def _trained_encoder(workdir: Path, dtype: str):
  """The encoder module of the run in a workdir, and the mean and deviation of its input."""
  try:
    config = checkpoint.read_config(workdir)
    if config.get("task") == "self_distill":
      raise WeightsError(
        f"teacher.path=checkpoint:{workdir} is a run of mrmae teacher; give the folder that it "
        f"wrote, --out or teacher.path={workdir}/teacher"
      )
    return make_encoder(config["encoder"], jnp.dtype(dtype)), (
      tuple(config["data"]["mean"]),
      tuple(config["data"]["std"]),
    )
  except (StorageError, WorkdirError) as error:
    raise WeightsError(f"teacher.path=checkpoint:{error}") from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise WeightsError(
      f"teacher.path=checkpoint:{workdir}: config.json there is not that of a run: {error!r}"
    ) from None


def _read_encoder(workdir: Path) -> tuple[Any, str]:
  """Parameters of the encoder of a run, and their digest."""
  try:
    stored = checkpoint.read_params(workdir, "encoder")
  except (StorageError, WorkdirError) as error:
    raise WeightsError(f"teacher.path=checkpoint:{error}") from None
  logging.info("teacher: encoder of %s after %d steps", workdir, stored.step)
  params, digest = stored.params["encoder"], hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(
      f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes()
    )
  return params, digest.hexdigest()


def _look(spec: TeacherSpec, params, images: jax.Array) -> TeacherOutput:
  """The student's images [B, H, W, C] through the tower, and to the student's grid."""
  if spec.bands != tuple(range(images.shape[-1])):
    images = images[..., np.array(spec.bands)]
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255
  if images.shape[1:3] != spec.input_size:
    images = jax.image.resize(
      images, (len(images), *spec.input_size, images.shape[-1]), "cubic"
    ).clip(0, 1)
  x, out = spec.module.apply({"params": params}, normalize(images, spec.mean, spec.std))
  if spec.last_k > 1:
    x = (
      sum(normalize_features(layer, "layer_norm") for layer in out["layers"][-spec.last_k :])
      / spec.last_k
    )
  elif spec.layer != "normed":
    x = out["proj"] if spec.layer == "proj" else out["layers"][-1]
  x = x.astype(jnp.float32)
  cls, patches = (x[:, 0], x[:, 1:]) if spec.has_cls else (None, x)
  attention = (
    _to_grid(out["attention"][..., None], spec.tokens, spec.grid)[..., 0]
    if spec.has_attention
    else None
  )
  return TeacherOutput(_to_grid(patches, spec.tokens, spec.grid), cls, attention)


def _to_grid(x: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
  """[B, old rows * columns, C] -> [B, new rows * columns, C]: the mean of whole tokens where they fit, else interpolated."""
  b, _, c = x.shape
  if all(o % n == 0 for o, n in zip(old, new)):
    return (
      x.reshape(b, new[0], old[0] // new[0], new[1], old[1] // new[1], c)
      .mean((2, 4))
      .reshape(b, -1, c)
    )
  return jax.image.resize(x.reshape(b, *old, c), (b, *new, c), "linear").reshape(b, -1, c)


def _tower(weights: Path | None, folder: Path, name: str, num_heads: int, activation: str):
  """Family, prefix, fields of ViT and grid of the position table, from config.json and the shapes, where they are there."""
  source = str(weights or folder)
  config = files.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
  asked = PRESETS[name].family if name else None
  if "model_type" in config:
    family, fields, grid = towers.tower_config(config, str(folder / "config.json"))
  if weights is None:  # a preset of which only config.json is here yet
    if "model_type" not in config:
      raise WeightsError(
        f"{source}: no config.json in the hub's copy of {PRESETS[name].repo}; fetch it again"
      )
    return family, "", _overruled(fields, num_heads, activation), grid

  shapes = {key: tensor.shape for key, tensor in files.open_weights(weights).items()}
  found, prefix, markers = towers.identify(shapes, source)
  if asked not in (None, found.name):
    raise WeightsError(
      f"{source} looks like {found.name} (found {markers}); {name} asked, which is {asked}"
    )
  sizes, positions_held = towers.tower_shapes(found, prefix, shapes, source)
  if not found.model_types:
    side = math.isqrt(positions_held)
    if side**2 != positions_held:
      raise WeightsError(
        f"{source}: a position table of {positions_held} patches is no square; give a Hugging Face folder"
      )
    return found, prefix, _bare(found, sizes, source, name, num_heads, activation), (side, side)
  if "model_type" not in config:
    raise WeightsError(
      f"{source} has Hugging Face's names of {found.name}, but {folder} has no config.json, which tells "
      "heads, activation and eps; fetch it from the same place"
    )
  if family.name != found.name:
    raise WeightsError(
      f"{source} looks like {found.name} (found {markers}); its config.json says {config['model_type']}, "
      f"which is {family.name}"
    )
  for key, word in (
    ("dim", "width"),
    ("depth", "depth"),
    ("patch_size", "patch size"),
    ("mlp_dim", "MLP width"),
    ("num_registers", "number of registers"),
  ):
    if sizes[key] != fields[key]:
      raise WeightsError(
        f"{source} has {word} {sizes[key]}, its config.json says {fields[key]}; fetch both from one place"
      )
  if grid and math.prod(grid) != positions_held:
    side, plus = math.isqrt(positions_held), "+1" if found.names.cls_token else ""
    raise WeightsError(
      f"{source}: position table is {side}x{side}{plus} for patch {sizes['patch_size']}; its config.json's "
      f"image_size gives {grid[0]}x{grid[1]}; fetch both from the same place"
    )
  return found, prefix, _overruled(fields | sizes, num_heads, activation), grid


def _preset_tower(name: str, num_heads: int, activation: str):
  """Family, fields of ViT and grid of the position table of a preset, from what is known of it without its files."""
  if not name:
    raise WeightsError(f"teacher.path=random needs teacher.name, one of {', '.join(PRESETS)}")
  preset = PRESETS[name]
  *_, kind = next(
    family for family in towers.FAMILIES if family.name == preset.family and family.model_types
  ).model_types
  config = dict(
    model_type=kind,
    hidden_size=preset.dim,
    num_hidden_layers=preset.depth,
    num_attention_heads=preset.dim // 64,
    intermediate_size=4 * preset.dim,
    patch_size=preset.patch,
    image_size=preset.side or 224,
  )
  special = {
    "dinov2": dict(use_swiglu_ffn=preset.dim == 1536),
    "dinov3_vit": dict(num_register_tokens=4),
  }
  family, fields, grid = towers.tower_config(config | special.get(kind, {}), name)
  return family, _overruled(fields, num_heads, activation), grid


def _overruled(fields, num_heads, activation):
  return (
    fields
    | (dict(num_heads=num_heads) if num_heads else {})
    | (dict(activation=activation) if activation else {})
  )


def _bare(family, sizes, source, name, num_heads, activation):
  """Fields of ViT for a file without config.json: heads are 64 wide in all models that came so (wider ones need telling)."""
  width = sizes["dim"]
  if not num_heads and (width % 64 or width > 1024):
    raise WeightsError(
      f"{source} does not tell the number of heads, and width {width} is none of the usual ones with 64 "
      "channels a head; give num_heads"
    )
  known = family.tower.get("activation") or ("quick_gelu" if name else "")
  if not activation and not known:
    raise WeightsError(
      f"{source}: CLIP in timm's names does not tell its activation; give activation='quick_gelu' (OpenAI's "
      "weights) or 'gelu' (most others), or a name"
    )
  return (
    family.tower | sizes | dict(num_heads=num_heads or width // 64, activation=activation or known)
  )


def _size(module: ViT) -> str:
  letter = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}.get(module.dim)
  return f"ViT{f'-{letter}' if letter else ''}/{module.patch_size}"


def _check_preset(name: str, module: ViT, table_grid, source: str) -> None:
  preset = PRESETS[name]
  if (module.dim, module.depth, module.patch_size) != (preset.dim, preset.depth, preset.patch):
    raise WeightsError(
      f"{source} is {_size(module)} (width {module.dim}, depth {module.depth}); preset {name} needs "
      f"{preset.dim}/{preset.depth}/{preset.patch}"
    )
  side = preset.side // preset.patch
  if table_grid and table_grid != (side, side):
    raise WeightsError(
      f"{source} has a position table of {table_grid[0]}x{table_grid[1]}; preset {name} needs {side}x{side}"
    )


def _normalisation(path: Path | None, family: str):
  """Mean and deviation: the stored ones, where there are any, else the family's."""
  return files.image_statistics(path, *_NORMALISATION.get(family, (IMAGENET_MEAN, IMAGENET_STD)))


def _bands(bands: tuple[int, ...], channels: int, wanted: int, source: str) -> tuple[int, ...]:
  """The student's channels that a teacher of `wanted` channels sees: the given ones, else those that can only be meant."""
  if not bands and channels in (1, wanted):
    return tuple(range(channels)) if channels == wanted else (0,) * wanted
  if len(bands) != wanted or not all(band in range(channels) for band in bands):
    raise WeightsError(
      f"bands={bands} given; images have {channels} channels (config.data.mean), {source} sees {wanted}: give "
      f"the {wanted} that it sees, from 0 to {channels - 1}"
      + (", those of red, green and blue, e.g. bands=(2, 1, 0)" if wanted == 3 else "")
    )
  return tuple(map(int, bands))


def _input_size(image_size, token_size: int, patch: int, resolution: int):
  """The student's grid, and (height, width) of what the teacher sees."""
  height, width = image_size
  if height % token_size or width % token_size:
    raise WeightsError(
      f"image size {height}x{width} is not a multiple of the token size {token_size}"
    )
  grid = (height // token_size, width // token_size)
  if resolution:
    size = (resolution, resolution * width // height)
    if resolution % patch or resolution * width % height or size[1] % patch:
      raise WeightsError(
        f"resolution={resolution} makes the image size {resolution}x{resolution * width / height:g}, which is "
        f"not a multiple of patch {patch}; one patch per token would be {grid[0] * patch}"
      )
    return grid, size
  if token_size % patch == 0:
    return grid, (height, width)
  return grid, (grid[0] * patch, grid[1] * patch)


def _fetch(name: str, *choices: tuple[str, ...]) -> Path:
  """The folder in Hugging Face's cache with the files of a preset: the first choice of patterns that finds something.

  HF_HUB_OFFLINE=1 keeps it from the network.

  Raises:
    WeightsError: not there, not allowed, or no network.
  """
  import huggingface_hub  # only for teachers by name
  from huggingface_hub import errors

  preset = PRESETS[name]
  where = f"teacher.name={name} ({preset.repo} at {preset.revision})"
  hint = f"`hf download {preset.repo} --revision {preset.revision}` where there is a network, or give teacher.path"
  try:
    for patterns in choices:
      folder = Path(
        huggingface_hub.snapshot_download(
          preset.repo, revision=preset.revision, allow_patterns=list(patterns)
        )
      )
      if any(next(folder.glob(pattern), None) for pattern in patterns):
        return folder
  except errors.GatedRepoError:
    raise WeightsError(
      f"{where} is gated: accept its licence on https://huggingface.co/{preset.repo}, then "
      "`hf auth login`"
    ) from None
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
    raise WeightsError(
      f"{where} is not on the hub (or private: `hf auth login`); give teacher.path"
    ) from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
    raise WeightsError(
      f"{where} is not in the cache, and the hub cannot be reached; {hint}"
    ) from None
  except Exception as error:  # network libraries have many more
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise WeightsError(f"{where} could not be fetched ({why}); {hint}") from None
  raise WeightsError(
    f"{where}: none of {', '.join(p for patterns in choices for p in patterns)} there; {hint}"
  )
