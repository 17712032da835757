"""Looks at a teacher before hundreds of hours depend on it: a picture, and how much its features have to teach.

  mrmae show-teacher --config=configs/mrmae.py --images=folder:/my/photos --out=teacher.png

takes the teacher, image size and masking of a configuration; any key can be overridden as in training
(--config.teacher.path=my_teacher --config.image_size="(224, 224)"). Each row of the picture is one image: what its CLS token
attends to, the tokens that focused and random masking would show the student, and the three main directions of the features as
colours. The text says what share of the normalised features is one constant vector, which a student learns without looking
(near 0 is good; with most of it constant choose another config.teacher.layer or target_norm), and over how many tokens the
attention spreads (few: raise config.method.attention_temperature or attention_mix).
"""

import jax
import numpy as np
from PIL import Image

from mrmae_jax import data, mrmae, teachers
from mrmae_jax.config import token_size
from mrmae_jax.evals.reconstruct import bands_shown
from mrmae_jax.mrmae import normalize_features
from mrmae_jax.viz.grid import draw_grid, enlarge, overlay, principal_colours


def look(config, images: np.ndarray, options=None):
  """A teacher on images uint8 [B, H, W, C]: its one-line description and TeacherOutput as numpy arrays.

  Args:
    config: of a run.
    images: see above.
    options: which of its teachers, see config.teacher; None: the first.
  """

  spec = teachers.configured_spec(options or config.teacher, config)
  teacher = teachers.load(spec)
  see = jax.jit(teacher.forward)
  outputs = [
    jax.device_get(see(teacher.params, images[i : i + 32])) for i in range(0, len(images), 32)
  ]
  return spec.description, jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def constant_share(features: np.ndarray, how: str) -> float:
  """Share, in [0, 1], of the mean square of the targets [B, N, D] that their mean vector makes up."""

  targets = np.asarray(normalize_features(features, how), np.float64)
  return float(np.square(targets.mean((0, 1))).sum() / np.square(targets).sum(-1).mean())


def attention_columns(images: np.ndarray, output, config) -> dict[str, np.ndarray]:
  """What a teacher's CLS token attends to, and the tokens that focused and random masking would show.

  Args:
    images: uint8 [B, H, W, 3].
    output: TeacherOutput of these.
    config: its `method` and `seed` decide on the masks; the token size is that of its `encoder`.

  Returns:
    {title: float [B, H, W, 3]}; a teacher without attention leaves random masking alone.
  """

  size, pixels = token_size(config), images / np.float32(255)
  grid = images.shape[1] // size, images.shape[2] // size
  noise = jax.random.uniform(jax.random.key(config.seed), output.features.shape[:2])
  method, masks, columns = config.method, {}, {"image": pixels}
  if output.attention is not None:
    columns["CLS attention"] = overlay(pixels, output.attention, grid)
    masks["focused"] = mrmae.sample_mask(
      noise,
      method.mask_ratio,
      1,
      output.attention,
      method.attention_temperature,
      method.attention_mix,
    )
  masks["random"] = mrmae.sample_mask(noise, method.mask_ratio)
  return columns | {
    f"{name}: visible": np.where(enlarge(mask.removed, grid, size), 0.5, pixels)
    for name, mask in masks.items()
  }


def draw(images: np.ndarray, output, config) -> np.ndarray:
  """The picture: uint8 [height, width, 3] of images uint8 [B, H, W, C] and what the teacher makes of them."""

  bands, caption = bands_shown(config)
  size, columns = token_size(config), attention_columns(images[..., bands], output, config)
  grid = images.shape[1] // size, images.shape[2] // size
  columns["features (PCA)"] = enlarge(
    principal_colours(normalize_features(output.features, "layer_norm")), grid, size
  )
  note = "attention relative to each image's largest; PCA over all images shown"
  return draw_grid(list(columns.values()), list(columns), f"{caption}; {note}" if caption else note)


def run(options) -> str:
  """Carries out `mrmae show-teacher`."""
  config, count = options.config, options.count
  config.data.source = options.images or config.data.source
  config.data.holdout_every = 0
  limit = max(count, options.statistics)
  batches = data.eval_batches(
    data.open_split(config.data, "train"),
    data.center_view(config.image_size, config.data.eval_crop, len(config.data.mean)),
    batch_size=limit,
    limit=limit,
  )
  batch = next(batches)
  batches.close()
  images = batch["image"][batch["valid"]]
  description, output = look(config, images)
  print(f"{description}; {len(images)} images")
  shares = {how: constant_share(output.features, how) for how in ("layer_norm", "batch", "none")}
  print(
    "constant share of the targets: "
    + ", ".join(f"{how} {share:.0%}" for how, share in shares.items())
  )
  if output.attention is not None:
    p = output.attention / output.attention.sum(1, keepdims=True)
    spread = np.exp(-(p * np.log(p + 1e-12)).sum(1)).mean()
    print(f"CLS attention spreads over {spread:.0f} of {p.shape[1]} tokens (perplexity)")
  first = type(output)(*(None if x is None else x[:count] for x in output))
  Image.fromarray(draw(images[:count], first, config)).save(options.out)
  return f"wrote {options.out}"
