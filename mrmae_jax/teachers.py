"""Frozen teachers: published vision towers or encoders of earlier runs, and their forward pass.

A teacher is loaded once and kept out of the train state and of every checkpoint. It sees the whole
image, normalized as in its own training. Loading is strict: a teacher with a missing, unknown or
misshapen tensor is refused. `read_spec` checks everything that does not depend on the values of
weights; `load` reads them.
"""

import functools
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mrmae_jax.config import LAYERS
from mrmae_jax.config import token_size as student_token_size
from mrmae_jax.errors import WeightsError
from mrmae_jax.models.layers import ACTIVATIONS
from mrmae_jax.models.vit import ViT
from mrmae_jax.mrmae import TeacherOutput, normalize, normalize_features
from mrmae_jax.weights import hub, tower_params, towers

# Of `TeacherOutput.spread`. Below it the features of all images are the same to three digits.
MIN_SPREAD = 1e-6
NO_SPREAD = (
  "the teacher gives all images the same features: there is nothing to mimic. Its weights may be "
  "zero or have collapsed, or the images are all alike (mrmae show-teacher draws both); give "
  "another teacher or other images"
)


class TeacherOptions(NamedTuple):
  """A choice of a teacher and of its features.

  Attributes:
    name: a key of `weights.hub.PRESETS`. Without a path it is fetched from the Hugging Face hub, or
      read from its cache; with one, the path must hold that model.
    path: Hugging Face folder, or file of weights in timm's, DINO's or OpenAI's names;
      "checkpoint:WORKDIR", the encoder that a run of this project has trained; or "random", the
      tower of `name` with random weights, a baseline and a stand-in for benchmarks.
    layer: "raw", the residual stream after the last block; "normed", after the last norm; or
      "proj", the projection of all normed tokens, where the model has one.
    last_k: with "raw", the mean over this number of last blocks, each normalized token by token as
      their scales differ (data2vec, Baevski et al. 2022, arXiv 2202.03555).
    bands: the channels of the student's images that the teacher sees, in its order; () takes all if
      it has as many, and repeats the single channel of gray images.
    resolution: height of the teacher's input in pixels, the width in proportion. 0: the student's
      images as they are if the teacher's patches divide the student's tokens, else resized to one
      patch per token.
    num_heads, activation: for files that do not tell (`models.layers.ACTIVATIONS`); they overrule
      files that do.
    dtype: of the computation.
  """

  name: str = ""
  path: str | Path = ""
  layer: str = "raw"
  last_k: int = 1
  bands: tuple[int, ...] = ()
  resolution: int = 0
  num_heads: int = 0
  activation: str = ""
  dtype: str = "bfloat16"


class StudentImages(NamedTuple):
  """The images that a student is trained on.

  Attributes:
    size: (height, width) in pixels.
    token_size: side of a student's token in pixels.
    channels: number of channels.
    mean, std: per channel, used for the teacher's input too; None: those of the teacher's
      preprocessor_config.json, else those of its family.
  """

  size: tuple[int, int]
  token_size: int
  channels: int = 3
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None


class TeacherSpec(NamedTuple):
  """A teacher before its weights are read, for images of one size.

  Attributes:
    options, images: the arguments of `read_spec`.
    tower: its network, and the place of its weights.
    grid: (rows, columns) of the student's tokens.
    input_size: (height, width) of the teacher's input in pixels.
    tokens: (rows, columns) of the teacher's patches.
    bands: the student's channels that the teacher sees, in its order.
    mean, std: of the teacher's input, one number for each of `bands`.
    dim: width of the features.
    has_cls: the teacher has a CLS token.
    has_attention: it has a CLS token or a pooling head, whose attention ranks the patches.
    description: one line for people.
  """

  options: TeacherOptions
  images: StudentImages
  tower: towers.Tower
  grid: tuple[int, int]
  input_size: tuple[int, int]
  tokens: tuple[int, int]
  bands: tuple[int, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  dim: int
  has_cls: bool
  has_attention: bool
  description: str

  @property
  def module(self) -> Any:
    return self.tower.module


class Teacher(NamedTuple):
  """A frozen teacher.

  Attributes:
    forward: (params, images, draw=None) -> TeacherOutput on the student's grid. The images are the
      student's, [B, H, W, C], uint8 or float in [0, 1]. With draw, attention [B, N] -> one mask for
      each image, a tower whose last block can do so computes the visible tokens alone.
    params: kernels in the compute dtype, the rest float32; numpy arrays until the caller places
      them.
    dim: width of the features.
    digest: sha256 of the weights, which identifies a teacher wherever its files lie.
  """

  forward: Callable[..., TeacherOutput]
  params: Any
  dim: int
  digest: str


def read_spec(options: TeacherOptions, images: StudentImages) -> TeacherSpec:
  """Locates a teacher and checks that it fits the student's images; reads no values of weights.

  Raises:
    WeightsError: there is nothing, it is not a supported teacher, or it does not fit.
  """
  tower = _open_tower(options)
  module, source = tower.module, tower.source
  # A run's ConvViT has neither projection nor pooling head.
  proj_dim, has_pool = (getattr(module, field, 0) for field in ("proj_dim", "attention_pool"))
  if module.dim % module.num_heads:
    raise WeightsError(
      f"{source}: width {module.dim} does not divide into {module.num_heads} heads; check num_heads"
    )
  if module.dim % 4:
    raise WeightsError(f"{source}: width {module.dim} is not divisible by 4")
  if options.layer == "proj" and not proj_dim:
    raise WeightsError(f"no projection in {source}; choose layer raw or normed")
  if options.layer == "normed" and not tower.has_norm:
    raise WeightsError(
      f"{source} has no last norm, which fine-tuning replaces by fc_norm; choose layer raw, or a "
      "file of pre-training"
    )
  last_k = options.last_k
  if last_k != 1 and (options.layer != "raw" or not 1 <= last_k <= module.depth):
    raise WeightsError(
      f"last_k={last_k} needs layer 'raw' (not {options.layer!r}) and 1 to {module.depth} "
      f"blocks of {source}"
    )
  bands = _select_bands(tuple(options.bands), images.channels, len(tower.mean), source)
  pick = lambda values, default: tuple(values[band] for band in bands) if values else default
  grid, input_size = _input_size(images, module.patch_size, options.resolution)
  spec = TeacherSpec(
    options=options,
    images=images,
    tower=tower,
    grid=grid,
    input_size=input_size,
    tokens=tuple(side // module.patch_size for side in input_size),
    bands=bands,
    mean=pick(images.mean, tower.mean),
    std=pick(images.std, tower.std),
    dim=proj_dim if options.layer == "proj" else module.dim,
    has_cls=bool(module.cls_token),
    has_attention=bool(module.cls_token or has_pool),
    description="",
  )
  return spec._replace(description=_describe(spec))


def configured_spec(options, config) -> TeacherSpec:
  """Returns the spec of a teacher's section of a configuration, for the configuration's student.

  Args:
    options: the section, e.g. `config.teacher`.
    config: the whole configuration.
  """
  is_own_norm = options.input_norm == "teacher"
  fields = ("layer", "last_k", "resolution", "num_heads", "activation", "dtype")
  return read_spec(
    TeacherOptions(
      name=options.name or "",
      path=options.path or "",
      bands=tuple(options.bands),
      **{field: options[field] for field in fields},
    ),
    StudentImages(
      size=tuple(config.image_size),
      token_size=student_token_size(config),
      channels=len(config.data.mean),
      mean=None if is_own_norm else tuple(config.data.mean),
      std=None if is_own_norm else tuple(config.data.std),
    ),
  )


def load(spec: TeacherSpec) -> Teacher:
  """Reads a teacher's weights; every tensor is used exactly once, or belongs to another part.

  Raises:
    WeightsError: files are missing or damaged, or tensors are missing, unknown, misshapen or not
      finite.
  """
  options = spec.options
  if spec.tower.path is None and options.path != "random":  # only config.json is on disk yet
    folder = hub.fetch(options.name, *hub.WEIGHT_FILES)
    spec = read_spec(options._replace(path=folder), spec.images)
  logging.info("teacher %s: %s", spec.tower.source, spec.description)
  params, digest = tower_params.read_params(spec.tower, spec.tokens)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(spec.module.dtype) if path[-1].key == "kernel" else x, params
  )
  return Teacher(functools.partial(_forward, spec), params, spec.dim, digest)


def _forward(spec: TeacherSpec, params, images: jax.Array, draw=None) -> TeacherOutput:
  """Runs the tower on the student's images, see `Teacher.forward`."""
  options = spec.options
  is_cut = draw is not None and _can_select(spec)
  with jax.named_scope("teacher"):  # profiles and `program.flops` know a teacher by this name
    if spec.bands != tuple(range(images.shape[-1])):
      images = images[..., np.array(spec.bands)]
    if images.dtype == jnp.uint8:
      images = images.astype(jnp.float32) / 255
    if images.shape[1:3] != spec.input_size:
      shape = (len(images), *spec.input_size, images.shape[-1])
      images = jax.image.resize(images, shape, "cubic").clip(0, 1)
    look = functools.partial(
      spec.module.apply, {"params": params}, normalize(images, spec.mean, spec.std)
    )
    x, out = look(select=draw) if is_cut else look()
    if options.last_k > 1:
      layers = out["layers"][-options.last_k :]
      x = sum(normalize_features(layer, "layer_norm") for layer in layers) / options.last_k
    elif options.layer == "raw":
      x = out["layers"][-1]
    elif options.layer == "proj":
      x = out["proj"]
    x = x.astype(jnp.float32)
    cls, patches = (x[:, 0], x[:, 1:]) if spec.has_cls else (None, x)
    attention = None
    if spec.has_attention:
      attention = _to_grid(out["attention"][..., None], spec.tokens, spec.grid)[..., 0]
    if not is_cut:
      features = _to_grid(patches, spec.tokens, spec.grid)
      return TeacherOutput(features, cls, attention, None, spread(features))
    # What is left of each image lies at other places; before the last block all tokens are there.
    before, after = out["layers"][-2][:, 1:], patches.reshape(1, -1, spec.dim)
    least = jnp.minimum(spread(before), spread(after))
    return TeacherOutput(patches, cls, attention, out["mask"], least)


def _can_select(spec: TeacherSpec) -> bool:
  """Returns whether features of some tokens are computed without those of the others."""
  is_vit = isinstance(spec.module, ViT) and spec.module.can_select and spec.module.depth > 1
  return is_vit and spec.tokens == spec.grid and spec.options.last_k == 1


def spread(features: jax.Array) -> jax.Array:
  """Returns how much features [B, N, D] differ between images, as a share of their mean square.

  Each token is compared with those at its place in other images; a single image's tokens with each
  other. 0 if all are equal. Trained and random towers have 0.1 to 0.6.
  """
  features = features.astype(jnp.float32)
  variance = features.var(0 if len(features) > 1 else 1).mean()
  return variance / jnp.maximum(jnp.square(features).mean(), jnp.finfo(jnp.float32).tiny)


def _to_grid(x: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
  """Brings tokens [B, N, C] of the grid `old` to the grid `new`.

  Where old tokens fill a new one exactly, it is their mean; otherwise tokens are interpolated.
  """
  b, _, c = x.shape
  if all(o % n == 0 for o, n in zip(old, new)):
    x = x.reshape(b, new[0], old[0] // new[0], new[1], old[1] // new[1], c)
    return x.mean((2, 4)).reshape(b, -1, c)
  return jax.image.resize(x.reshape(b, *old, c), (b, *new, c), "linear").reshape(b, -1, c)


def _open_tower(options: TeacherOptions) -> towers.Tower:
  """Checks the options, and determines the network that they name."""
  name, path = options.name, str(options.path)
  if not name and not path:
    raise WeightsError(
      f"no teacher: give a name ({', '.join(hub.PRESETS)}) or the path of a Hugging Face folder or "
      "weight file"
    )
  if name:
    hub.find_preset(name)
  if options.layer not in LAYERS:
    raise WeightsError(f"layer {options.layer!r} is not one of {', '.join(LAYERS)}")
  if options.activation and options.activation not in ACTIVATIONS:
    raise WeightsError(f"activation {options.activation!r} is not one of {', '.join(ACTIVATIONS)}")
  overrides = towers.Overrides(options.num_heads, options.activation)
  if path.startswith("checkpoint:"):
    if name or any(overrides):
      raise WeightsError(
        f"teacher.path={path} says all by itself; leave teacher.name, num_heads and activation "
        "empty"
      )
    return towers.trained_encoder(path.removeprefix("checkpoint:"), options.dtype)
  if path == "random":
    return towers.random_tower(name, overrides, options.dtype)
  return towers.open_tower(path, name, overrides, options.dtype)


def _describe(spec: TeacherSpec) -> str:
  """Returns one line about a teacher for people."""
  by = "{0[0]}x{0[1]}".format
  tower, module, options = spec.tower, spec.module, spec.options
  text = f"{tower.description} (width {module.dim}, depth {module.depth}), layer {options.layer}"
  if options.last_k > 1:
    text += f" of the last {options.last_k} blocks"
  text += f", input {by(spec.input_size)}, grid {by(spec.tokens)}"
  if spec.tokens != spec.grid:
    text += f" brought to {by(spec.grid)}"
  if tower.table_grid not in (None, spec.tokens):
    rule = tower.family.rule.description
    text += f", position table {by(tower.table_grid)} resized ({rule})"
  if spec.bands != tuple(range(spec.images.channels)):
    text += f", of channels {', '.join(map(str, spec.bands))}"
  return text


def _select_bands(
  bands: tuple[int, ...], channels: int, num_bands: int, source: str
) -> tuple[int, ...]:
  """Returns the student's channels that a teacher of `num_bands` channels sees.

  Without `bands` only two cases are clear: as many channels as the teacher has, or gray images.
  """
  if not bands and channels in (1, num_bands):
    return tuple(range(channels)) if channels == num_bands else (0,) * num_bands
  if len(bands) != num_bands or not all(band in range(channels) for band in bands):
    rgb = ", those of red, green and blue, e.g. bands=(2, 1, 0)" if num_bands == 3 else ""
    raise WeightsError(
      f"bands={bands} given; images have {channels} channels (config.data.mean), {source} sees "
      f"{num_bands}: give the {num_bands} that it sees, from 0 to {channels - 1}{rgb}"
    )
  return tuple(map(int, bands))


def _input_size(images: StudentImages, patch: int, resolution: int):
  """Returns the student's grid, and (height, width) of the teacher's input."""
  (height, width), token_size = images.size, images.token_size
  if height % token_size or width % token_size:
    raise WeightsError(
      f"image size {height}x{width} is not a multiple of the token size {token_size}"
    )
  grid = (height // token_size, width // token_size)
  if resolution:
    size = (resolution, resolution * width // height)
    if resolution % patch or resolution * width % height or size[1] % patch:
      raise WeightsError(
        f"resolution={resolution} makes the image size "
        f"{resolution}x{resolution * width / height:g}, which is not a multiple of patch {patch}; "
        f"one patch per token would be {grid[0] * patch}"
      )
    return grid, size
  if token_size % patch == 0:
    return grid, (height, width)
  return grid, (grid[0] * patch, grid[1] * patch)
