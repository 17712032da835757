"""Frozen teachers: CLIP and DINO vision towers out of Hugging Face folders (config.json + safetensors).

A teacher is loaded once, kept out of the train state and out of every checkpoint, and sees the whole image with its own
input normalisation. Loading is strict: a teacher with a missing, unknown or misshapen tensor trains no student.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mrmae_jax.config import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.models.vit import ViT
from mrmae_jax.mrmae import normalise
from mrmae_jax.weights import hf
from mrmae_jax.weights.table import WeightsError, convert

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Family(NamedTuple):
  name: str
  table: Callable
  prefix: str                   # some files carry it, some do not
  ignore: tuple[str, ...]       # tensors of a file that are no part of the vision tower
  mean: tuple[float, ...]
  std: tuple[float, ...]


_CLIP = _Family("CLIP", hf.clip, "vision_model.",
                (r"text_model\..*", r"text_projection\.weight", "logit_scale", r".*\.position_ids"), CLIP_MEAN, CLIP_STD)
_DINO = _Family("ViT/DINO", hf.vit, "vit.", (r"(vit\.)?pooler\.dense\..*", r"classifier\..*", r".*mask_token"),
                IMAGENET_MEAN, IMAGENET_STD)
_FAMILIES = {"clip": _CLIP, "clip_vision_model": _CLIP, "vit": _DINO}


class TeacherSpec(NamedTuple):
  """What a teacher's config.json says, for images of one size; no weights read yet."""

  path: Path
  family: _Family
  module: ViT
  table_grid: tuple[int, int]   # of the stored position table
  grid: tuple[int, int]         # of the images it will see
  mean: tuple[float, ...]
  std: tuple[float, ...]


class Teacher(NamedTuple):
  """A frozen teacher.

  Attributes:
    features: (params, images [B, H, W, 3], uint8 or float in [0, 1]) -> float32 [B, N, dim], patch tokens of the last
      block's residual stream, before the last norm.
    params: kernels in the compute dtype, the rest float32; numpy until the caller places them.
    grid: (rows, columns) of tokens.
    dim: width of the features.
    digest: sha256 of the weights, to tell teachers apart wherever they lie.
  """

  features: Callable[[Any, jax.Array], jax.Array]
  params: Any
  grid: tuple[int, int]
  dim: int
  digest: str


def read_spec(path: str, image_size: tuple[int, int], dtype: str = "bfloat16") -> TeacherSpec:
  """Reads a teacher's configuration.

  Args:
    path: folder in Hugging Face's format.
    image_size: (height, width) of the images.
    dtype: of the computation.

  Raises:
    WeightsError: no such folder, no config.json, an unsupported model, or images that do not divide into its patches.
  """
  folder = Path(path).expanduser()
  if not (folder / "config.json").is_file():
    found = f"it holds: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}" if folder.is_dir() else (
        "no such folder")
    raise WeightsError(f"teacher {folder}: expected a Hugging Face folder with config.json and model.safetensors, but {found}. "
                       "Download one with `hf download openai/clip-vit-base-patch16 --local-dir DIR`")
  try:
    config = json.loads((folder / "config.json").read_text())
  except (ValueError, UnicodeDecodeError) as error:
    raise WeightsError(f"teacher {folder}/config.json is not JSON: {error}") from None
  if not isinstance(config, dict):
    raise WeightsError(f"teacher {folder}/config.json is not a configuration: {str(config)[:60]}")
  kind = config.get("model_type")
  if kind not in _FAMILIES:
    raise WeightsError(f"teacher {folder}: model_type {kind!r} is not supported; supported: {', '.join(_FAMILIES)}")
  family = _FAMILIES[kind]
  if kind == "clip":
    config = config.get("vision_config", {})
  try:
    patch, side = config["patch_size"], config["image_size"]
    module = ViT(patch, config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
                 config["intermediate_size"], config["layer_norm_eps"], config["hidden_act"], learned_positions=True,
                 norm_pre=family is _CLIP, patch_bias=family is not _CLIP, dtype=jnp.dtype(dtype))
  except KeyError as error:
    raise WeightsError(f"teacher {folder}/config.json lacks {error}") from None
  if module.activation not in ("gelu", "quick_gelu"):
    raise WeightsError(f"teacher {folder}: hidden_act {module.activation!r} is not supported; supported: gelu, quick_gelu")
  if any(size % patch for size in image_size):
    raise WeightsError(f"teacher {folder} has {patch}-pixel patches; the image size {image_size[0]}x{image_size[1]} "
                       "is not a multiple of that")
  mean, std = family.mean, family.std
  if (folder / "preprocessor_config.json").is_file():
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = tuple(stored.get("image_mean", mean)), tuple(stored.get("image_std", std))
  return TeacherSpec(folder, family, module, (side // patch,) * 2, tuple(size // patch for size in image_size), mean, std)


def load(spec: TeacherSpec) -> Teacher:
  """Reads a teacher's weights, every tensor used exactly once or known to be no part of the vision tower.

  Raises:
    WeightsError: files missing or damaged, tensors missing, unknown, misshapen or not finite.
  """
  tensors, digest = _read_safetensors(spec.path)
  prefix = spec.family.prefix if any(name.startswith(spec.family.prefix) for name in tensors) else ""
  proj = "visual_projection.weight" in tensors and spec.family is _CLIP
  module = spec.module.clone(proj_dim=len(tensors["visual_projection.weight"]) if proj else 0)
  sides = (side * module.patch_size for side in spec.table_grid)
  expected = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *sides, 3), jnp.float32))["params"]
  table = spec.family.table(module.depth, module.patch_bias, proj, prefix)
  params = convert(tensors, table, expected, ignore=spec.family.ignore, source=f"teacher {spec.path}")
  params["pos_embed"] = resize_positions(params["pos_embed"], spec.table_grid, spec.grid)
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x.astype(module.dtype) if path[-1].key == "kernel" else x, params)

  def features(params, images):
    _, out = module.apply({"params": params}, normalise(images, spec.mean, spec.std))
    return out["raw"][:, 1:].astype(jnp.float32)

  return Teacher(features, params, spec.grid, module.dim, digest)


def _read_safetensors(folder: Path) -> tuple[dict[str, np.ndarray], str]:
  """All tensors of a folder with one safetensors file or an index of several, and the sha256 of the files."""
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
      raise WeightsError(f"teacher {folder}: the index lists {absent[0]}, which is absent "
                         f"({len(names) - len(absent)} of {len(names)} files are there)")
  elif (folder / "model.safetensors").is_file():
    names = ["model.safetensors"]
  else:
    raise WeightsError(f"teacher {folder}: no model.safetensors and no model.safetensors.index.json; "
                       f"it holds: {', '.join(sorted(p.name for p in folder.iterdir())[:8])}")
  tensors, digest = {}, hashlib.sha256()
  for name in names:
    try:
      tensors |= load_file(folder / name)
    except (SafetensorError, OSError) as error:
      raise WeightsError(f"teacher {folder}/{name} is damaged or no safetensors file: {error}") from None
    with open(folder / name, "rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return tensors, digest.hexdigest()


def resize_positions(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Interpolates a learned position table to another grid, as transformers does for CLIP and ViT.

  Bicubic with torch's a = -0.75, half-pixel centres, edges clamped, no antialiasing; the CLS row is kept.

  Args:
    table: float32 [1, 1 + old rows * old columns, D].
    old, new: (rows, columns).

  Returns:
    float32 [1, 1 + new rows * new columns, D].
  """
  if old == new:
    return table
  rows, columns = (_cubic_matrix(n_old, n_new) for n_old, n_new in zip(old, new))
  maps = table[:, 1:].reshape(1, *old, -1)
  maps = np.einsum("pr,qc,brcd->bpqd", rows, columns, maps, optimize=True).astype(np.float32)
  return np.concatenate([table[:, :1], maps.reshape(1, new[0] * new[1], -1)], axis=1)


def _cubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """[new, old] weights of cubic convolution interpolation (Keys 1981) at half-pixel centres."""
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    index = np.floor(centre).astype(int) + tap
    x = np.abs(centre - index)
    near = ((a + 2) * x - (a + 3)) * x ** 2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    np.add.at(weights, (np.arange(new), index.clip(0, old - 1)), np.where(x <= 1, near, far))
  return weights
