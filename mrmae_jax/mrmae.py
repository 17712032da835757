"""Mimic before Reconstruct, on one page (arXiv 2303.05475).

An encoder sees a quarter of the image. On these *visible* tokens its output mimics the features that a frozen teacher
(CLIP or DINO) computes from the whole image; on the *masked* tokens a small decoder reconstructs the pixels, as in MAE.
The two losses act on different tokens and at different depths, so they do not compete. Without a teacher this is
ConvMAE (convolutional-stage encoder) or MAE (plain ViT encoder).

Shapes: B images of H x W pixels and C channels; N = (H/p) * (W/p) tokens of p x p pixels, V of them visible;
D, Dt widths of student and teacher. All losses are float32.
"""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import Mask, patchify, take_visible


class Model(NamedTuple):
  """The student: modules (`params` holds one entry per module, by field name) and its input normalisation."""

  encoder: Any
  decoder: Any
  mimic_head: Any  # None without a teacher
  mean: tuple[float, ...]
  std: tuple[float, ...]


def pretrain_loss(params, images, noise, model: Model, teacher: Callable[[jax.Array], jax.Array] | None, *,
                  mask_ratio: float, norm_pix: bool, pixel_weight: float, mimic_weight: float):
  """The training objective.

  Args:
    params: {"encoder": ..., "decoder": ..., "mimic_head": ... with a teacher}.
    images: [B, H, W, C], uint8 or float in [0, 1].
    noise: [B, N] float32, uniform in [0, 1): decides which tokens are visible.
    model: the student.
    teacher: images -> [B, N, Dt], features of the intact image; None: no mimic loss.
    mask_ratio: share of the tokens that is hidden from the encoder.
    norm_pix: reconstruct pixels normalised per patch.
    pixel_weight, mimic_weight: weights of the two terms.

  Returns:
    loss, and its unweighted terms {"pixel", "mimic"}: float32 scalars.
  """
  pixels = normalise(images, model.mean, model.std)
  mask = sample_mask(noise, mask_ratio)
  tokens, prediction = encode_decode(params, pixels, mask, model)

  pixel = pixel_loss(prediction, pixels, mask, model.encoder.patch_size, norm_pix)
  if teacher is None:
    return pixel_weight * pixel, {"pixel": pixel}

  features = jax.lax.stop_gradient(teacher(images))                     # of the whole image
  visible = tokens[:, tokens.shape[1] - mask.ids_keep.shape[1]:]        # without CLS
  mimicked = model.mimic_head.apply({"params": params["mimic_head"]}, visible)
  mimic = mimic_loss(mimicked, features, mask)
  return pixel_weight * pixel + mimic_weight * mimic, {"pixel": pixel, "mimic": mimic}


def normalise(images: jax.Array, mean, std) -> jax.Array:
  """uint8, or float in [0, 1] -> zero-mean, unit-variance float32, channel by channel."""
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255
  return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def sample_mask(noise: jax.Array, mask_ratio: float) -> Mask:
  """Random masking (MAE, models_mae.py): the int(N * (1 - mask_ratio)) tokens of least noise stay visible."""
  visible = int(noise.shape[1] * (1 - mask_ratio))
  ids_shuffle = jnp.argsort(noise, axis=1)
  return Mask(ids_keep=ids_shuffle[:, :visible], ids_restore=jnp.argsort(ids_shuffle, axis=1))


def encode_decode(params, pixels: jax.Array, mask: Mask, model: Model):
  """Encoder on the visible tokens, decoder on all: tokens [B, V (+1 with CLS), D], prediction [B, N, p*p*C]."""
  grid = tuple(side // model.encoder.patch_size for side in pixels.shape[1:3])
  tokens, _ = model.encoder.apply({"params": params["encoder"]}, pixels, mask)
  prediction, _ = model.decoder.apply({"params": params["decoder"]}, tokens, mask, grid)
  return tokens, prediction


def pixel_targets(pixels: jax.Array, patch_size: int, norm_pix: bool):
  """What the decoder has to predict, patch by patch in (row, column, channel) order.

  With norm_pix, (patch - mean) / sqrt(variance + 1e-6) with the unbiased variance of the patch (torch.var's default).

  Returns:
    targets [B, N, p*p*C], and the mean and scale [B, N, 1] that turn predictions back into normalised pixels.
  """
  patches = patchify(pixels, patch_size).reshape(pixels.shape[0], -1, patch_size ** 2 * pixels.shape[-1])
  if not norm_pix:
    return patches, jnp.zeros_like(patches[..., :1]), jnp.ones_like(patches[..., :1])
  mean = patches.mean(-1, keepdims=True)
  scale = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
  return (patches - mean) / scale, mean, scale


def pixel_loss(prediction: jax.Array, pixels: jax.Array, mask: Mask, patch_size: int, norm_pix: bool) -> jax.Array:
  """Mean squared error on the masked patches: prediction [B, N, p*p*C] against normalised images [B, H, W, C]."""
  targets, _, _ = pixel_targets(pixels, patch_size, norm_pix)
  error = jnp.square(prediction - targets).mean(-1)
  return jnp.sum(error * mask.removed) / mask.removed.sum()


def mimic_loss(mimicked: jax.Array, features: jax.Array, mask: Mask) -> jax.Array:
  """Mean squared error on the visible tokens: mimicked [B, V, Dt] against teacher features [B, N, Dt].

  The paper's exact form is not published. Targets are normalised token by token (LayerNorm without parameters), as in
  OpenDriveLab/maskalign: CLIP's residual stream has a few huge channels, which would otherwise be all of the error.
  """
  targets = take_visible(features.astype(jnp.float32), mask)
  mean, variance = targets.mean(-1, keepdims=True), targets.var(-1, keepdims=True)
  return jnp.square(mimicked - (targets - mean) * jax.lax.rsqrt(variance + 1e-5)).mean()
