"""Draws what a teacher sees, and measures how much its features have to teach."""

import jax
import numpy as np
from ml_collections import ConfigDict

from mrmae_jax import data, mrmae, teachers
from mrmae_jax.config import token_size
from mrmae_jax.errors import UsageError
from mrmae_jax.viz.grid import (
  bands_shown,
  enlarge,
  overlay,
  perplexity,
  principal_colors,
  write_picture,
)
from mrmae_jax.viz.panels import draw_columns

BATCH_SIZE = 32


def run_teacher(config: ConfigDict, images: np.ndarray, options: ConfigDict | None = None):
  """Loads a teacher and runs it on images uint8 [B, H, W, C].

  Args:
    config: of a run.
    images: see above.
    options: one of its teachers, see config.teacher; None for the first.

  Returns:
    A one-line description, and a TeacherOutput of numpy arrays.
  """
  spec = teachers.configured_spec(options or config.teacher, config)
  teacher = teachers.load(spec)
  forward = jax.jit(lambda *x: teacher.forward(*x)._replace(spread=None))
  batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
  outputs = [jax.device_get(forward(teacher.params, batch)) for batch in batches]
  return spec.description, jax.tree.map(lambda *arrays: np.concatenate(arrays), *outputs)


def constant_share(features: np.ndarray, norm: str) -> float:
  """Returns the share, in [0, 1], of the targets' mean square that their mean vector makes up.

  Args:
    features: of a teacher, [B, N, D]. If they make targets of zeros, the share is 1.
    norm: see config.teacher.target_norm.
  """
  targets = np.asarray(mrmae.normalize_features(features, norm), np.float64)
  mean_square = np.square(targets).sum(-1).mean()
  return float(np.square(targets.mean((0, 1))).sum() / mean_square) if mean_square else 1.0


def attention_columns(images: np.ndarray, teacher_out, config: ConfigDict) -> dict[str, np.ndarray]:
  """Draws a teacher's CLS attention, and the tokens that focused and random masking would show.

  Args:
    images: uint8 [B, H, W, 3].
    teacher_out: TeacherOutput of these.
    config: its `method` and `seed` decide on the masks, its `encoder` on the token size.

  Returns:
    {title: float [B, H, W, 3]}. Without attention there is random masking alone.
  """
  size = token_size(config)
  pixels = images / np.float32(255)
  grid = images.shape[1] // size, images.shape[2] // size
  noise = jax.random.uniform(jax.random.key(config.seed), teacher_out.features.shape[:2])
  method = config.method
  columns = {"image": pixels}
  masks = {}
  if teacher_out.attention is not None:
    columns["CLS attention"] = overlay(pixels, teacher_out.attention, grid)
    masks["focused"] = mrmae.sample_mask(
      noise,
      method.mask_ratio,
      1,
      teacher_out.attention,
      method.attention_temperature,
      method.attention_mix,
    )
  masks["random"] = mrmae.sample_mask(noise, method.mask_ratio)
  for name, mask in masks.items():
    columns[f"{name}: visible"] = np.where(enlarge(mask.removed, grid, size), 0.5, pixels)
  return columns


def draw_teacher(images: np.ndarray, teacher_out, config: ConfigDict) -> np.ndarray:
  """Draws images uint8 [B, H, W, C] and the teacher's output; returns uint8 [height, width, 3]."""
  bands, caption = bands_shown(config)
  size = token_size(config)
  grid = images.shape[1] // size, images.shape[2] // size
  colors = principal_colors(mrmae.normalize_features(teacher_out.features, "layer_norm"))
  columns = attention_columns(images[..., bands], teacher_out, config)
  columns["features (PCA)"] = enlarge(colors, grid, size)
  note = "attention relative to each image's largest; PCA over all images shown"
  return draw_columns(columns, f"{caption}; {note}" if caption else note)


def run(options) -> str:
  """Carries out `mrmae show-teacher`."""
  if not options.out.endswith(".png"):
    raise UsageError(f"--out={options.out} must end in .png")
  config = options.config
  config.data.source = options.images or config.data.source
  config.data.holdout_every = 0
  count = max(options.count, options.statistics)
  batches = data.eval_batches(
    data.open_split(config.data, "train"),
    data.center_view(
      config.image_size, config.data.eval_crop, len(config.data.mean), config.data.exif
    ),
    batch_size=count,
    limit=count,
    options=data.loader_options(config.data),
  )
  batch = next(batches)
  batches.close()
  images = batch["image"][batch["valid"]]
  description, teacher_out = run_teacher(config, images)
  print(f"{description}; {len(images)} images")
  norms = ("layer_norm", "batch", "none")
  shares = [f"{norm} {constant_share(teacher_out.features, norm):.0%}" for norm in norms]
  print(f"constant share of the targets: {', '.join(shares)}")
  if teacher_out.attention is not None:
    spread = perplexity(teacher_out.attention).mean()
    num_tokens = teacher_out.attention.shape[1]
    print(f"CLS attention spreads over {spread:.0f} of {num_tokens} tokens (perplexity)")
  first_rows = jax.tree.map(lambda x: x[: options.count], teacher_out)
  picture = draw_teacher(images[: options.count], first_rows, config)
  write_picture(options.out, picture)
  return f"wrote {options.out}"
