"""Reconstructions of a student as images that people can look at."""

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import mrmae
from mrmae_jax.models.layers import from_blocks


def reconstruct(
  model: mrmae.Model, params, images: jax.Array, mask, norm_pix: bool
) -> dict[str, jax.Array]:
  """Returns reconstructions as images in [0, 1], float32 [B, H, W, C].

  A prediction of normalized pixels has no brightness or contrast of its own. It is shown with those
  of the true patch, which nobody who sees the visible patches alone can know. Under names with
  "_blind" it is shown with those that the visible patches around it suggest, so that nothing of
  what is hidden gets into the picture.

  Returns:
    "original"; "masked": masked patches grey; "reconstruction", "reconstruction_blind": every patch
    as predicted; "pasted", "pasted_blind": predictions in the masked places, the original
    elsewhere.
  """
  size = model.encoder.patch_size
  mean, std = jnp.asarray(model.mean), jnp.asarray(model.std)
  pixels = mrmae.normalize(images, model.mean, model.std)
  grid = tuple(side // size for side in pixels.shape[1:3])

  def to_images(patches):
    blocks = patches.reshape(*patches.shape[:2], size, size, -1)
    return jnp.clip(from_blocks(blocks, grid) * std + mean, 0, 1)

  _, prediction = mrmae.encode_decode(params, pixels, mask, model)
  _, offset, scale = mrmae.pixel_targets(pixels, size, norm_pix)
  original, _, _ = mrmae.pixel_targets(pixels, size, norm_pix=False)
  removed = mask.removed[..., None]
  grey = jnp.tile((0.5 - mean) / std, size * size)
  pictures = {"original": original, "masked": jnp.where(removed, grey, original)}
  blind = (spread_visible(offset, mask, grid), spread_visible(scale, mask, grid))
  for suffix, (patch_mean, patch_scale) in {"": (offset, scale), "_blind": blind}.items():
    patches = prediction * patch_scale + patch_mean
    pictures[f"reconstruction{suffix}"] = patches
    pictures[f"pasted{suffix}"] = jnp.where(removed, patches, original)
  return {name: to_images(patches) for name, patches in pictures.items()}


def spread_visible(x: jax.Array, mask, grid: tuple[int, int]) -> jax.Array:
  """Replaces the values of masked tokens in [B, N, 1] by a weighted mean over the visible ones.

  The weights are 1 / distance^3. Of the powers from 1 to 6 this is about the best guess at mean and
  contrast of the hidden patches of photographs: with 75 % hidden, the mean is off by 0.51
  deviations (root mean square), with equal weights by 0.80.
  """
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
  distance = np.maximum(np.linalg.norm(places[:, None] - places, axis=-1), 1)
  weights = jnp.where(mask.removed[:, None], 0, distance.astype(np.float32) ** -3)
  spread = weights @ x / weights.sum(-1, keepdims=True)
  return jnp.where(mask.removed[..., None], spread, x)
