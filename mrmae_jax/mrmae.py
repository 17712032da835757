"""Mimic before Reconstruct, on one page (arXiv 2303.05475).

An encoder sees a quarter of the image. On these *visible* tokens its output mimics the features
that a frozen teacher (CLIP or DINO) computes from the whole image; on the *masked* tokens a small
decoder reconstructs the pixels, as in MAE. The two losses act on different tokens and at different
depths, so they do not compete. Without a teacher this is ConvMAE (convolutional-stage encoder) or
MAE (plain ViT encoder). *Focused mimicking* shows the encoder the tokens that the teacher's CLS
token attends to; *complementary masks* show it several disjoint parts of the same image at once.

Shapes: B images of H x W pixels and C channels; N = (H/p) * (W/p) tokens of p x p pixels, V of them
visible in each of k masks; D, Dt widths of student and teacher. All losses are float32.
"""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import Mask, patchify, take_visible


class Mimic(NamedTuple):
  """How one teacher is mimicked.

  The paper's choices are not published; the defaults are those of its closest relative,
  OpenDriveLab/maskalign, where that has one.

  Attributes:
    name: name of the loss term.
    head: module, student tokens -> [..., Dt].
    weight: factor of the loss term.
    tokens: "visible", "visible+cls", or "masked": the decoder predicts features of masked tokens.
    source: "fused", or "last_block": before fusion and the last norm.
    target_norm: see `normalize_features`.
    loss: a key of DISTANCES.
    salient_share: share of the visible tokens, by the teacher's attention, that counts.
  """

  name: str
  head: Any
  weight: float = 1.0
  tokens: str = "visible"
  source: str = "fused"
  target_norm: str = "layer_norm"
  loss: str = "mse"
  salient_share: float = 1.0


class Model(NamedTuple):
  """The student: its modules, and the normalization of its input.

  `params` holds one entry per module, by field name.
  """

  encoder: Any
  decoder: Any
  mimics: tuple[Mimic, ...]  # one for each teacher; () without
  mean: tuple[float, ...]
  std: tuple[float, ...]


class TeacherOutput(NamedTuple):
  """Features of whole images from a frozen teacher, on the student's grid of N tokens; float32.

  Attributes:
    features: [B, N, Dt], or with `mask` [B, V, Dt].
    cls: [B, Dt], of the CLS token; None for a teacher without one.
    attention: [B, N], from CLS to the patches in the last block, mean over the heads; or None.
    mask: if given, `features` are those of its visible tokens alone, one mask for each image.
    spread: how much the features of images differ, from 0, where they are the same; or None.
  """

  features: jax.Array
  cls: jax.Array | None
  attention: jax.Array | None
  mask: Mask | None = None
  spread: jax.Array | None = None


def pretrain_loss(
  params,
  images,
  noise,
  model: Model,
  teachers: dict[str, Callable[..., TeacherOutput]],
  *,
  mask_ratio: float,
  masking: str = "random",
  attention_temperature: float = 1.0,
  attention_mix: float = 0.0,
  complementary_masks: int = 1,
  norm_pix: bool = True,
  pixel_weight: float = 1.0,
):
  """Computes the training loss and its terms.

  Args:
    params: {"encoder": ..., "decoder": ..., "mimic_heads": {name: ...} with teachers}.
    images: [B, H, W, C], uint8 or float in [0, 1].
    noise: [B, N] float32, uniform in [0, 1): decides which tokens are visible.
    model: the student.
    teachers: for each of `model.mimics`, by name, (images, draw) -> TeacherOutput of the intact
      image. Where it suffices, a teacher computes the features of the visible tokens alone, which
      draw(attention) decides.
    mask_ratio: share of the tokens that is hidden from the encoder.
    masking: "random", or "focused": the visible tokens are drawn by the attention of the first
      teacher's CLS token.
    attention_temperature, attention_mix: of focused masking, see `sample_mask`.
    complementary_masks: disjoint visible sets for each image; the losses are means over them.
    norm_pix: reconstruct pixels normalized per patch.
    pixel_weight: of the reconstruction loss; 0 leaves it out, and the decoder's work with it.

  Returns:
    The loss, and its unweighted terms by their names, "pixel" and those of the mimics, with the
    spread of each teacher, "mimic spread"; float32 scalars.
  """
  pixels = normalize(images, model.mean, model.std)
  mask, teacher_out = None, {}

  def draw(attention):
    if mask is not None:
      return mask
    attention = attention if masking == "focused" else None
    return sample_mask(
      noise, mask_ratio, complementary_masks, attention, attention_temperature, attention_mix
    )

  # Teachers see the whole image. The first one's attention decides what the encoder sees.
  for mimic in model.mimics:
    out = jax.lax.stop_gradient(teachers[mimic.name](images, draw))
    mask, teacher_out[mimic.name] = out.mask or draw(out.attention), out
  mask = draw(None)  # where there is no teacher
  streams, prediction = encode_decode(params, pixels, mask, model, everywhere=False)

  loss, terms = 0.0, {}
  for mimic in model.mimics:
    head = params["mimic_heads"][mimic.name]
    terms[mimic.name] = mimic_loss(head, streams, teacher_out[mimic.name], mask, mimic)
    loss += mimic.weight * terms[mimic.name]
    if teacher_out[mimic.name].spread is not None:
      terms[f"{mimic.name} spread"] = teacher_out[mimic.name].spread
  if pixel_weight:
    terms["pixel"] = pixel_loss(prediction, pixels, mask, model.encoder.patch_size, norm_pix)
    loss += pixel_weight * terms["pixel"]
  return loss, terms


def normalize(images: jax.Array, mean, std) -> jax.Array:
  """Normalizes uint8, or float in [0, 1], to zero mean and unit variance per channel, float32."""
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255
  return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def sample_mask(
  noise: jax.Array,
  mask_ratio: float,
  complementary_masks: int = 1,
  attention: jax.Array | None = None,
  temperature: float = 1.0,
  mix: float = 0.0,
) -> Mask:
  """Draws the V = int(N * (1 - mask_ratio)) visible tokens, for each of k masks.

  Random masking (MAE, models_mae.py) keeps the tokens of least noise: the same ones on any devices.
  Focused masking does so up to the rounding of the attention that it follows. It draws
  tokens without replacement, with probability p proportional to the attention (zejiangh/MILAN).
  Each token gets the exponential waiting time -log(1 - noise) / p, and the V earliest are visible.
  This is Gumbel-top-k; under uniform attention it equals random masking with the same noise.
  Complementary masks take the first V tokens of one shuffle, the next V, and so on
  (Alpha-VL/FastConvMAE).

  Args:
    noise: float32 [B, N], uniform in [0, 1).
    mask_ratio: share of hidden tokens.
    complementary_masks: k, with k * V <= N.
    attention: non-negative [B, N]; None for random masking.
    temperature: > 0, p ~ attention^(1/temperature): below 1 nearer to the V most attended tokens,
      above 1 nearer to random masking.
    mix: in [0, 1], share of the uniform distribution mixed into p.

  Returns:
    Masks [B * k, ...], those of one image side by side.
  """
  (batch, tokens), k = noise.shape, complementary_masks
  visible = int(tokens * (1 - mask_ratio))
  order = noise
  if attention is not None:
    log_p = jax.nn.log_softmax(jnp.log(attention.astype(jnp.float32) + 1e-12) / temperature, axis=1)
    log_p = jnp.logaddexp(jnp.log1p(-mix) + log_p, jnp.log(mix / tokens))
    order = jnp.log(-jnp.log1p(-noise)) - log_p
  ids_shuffle = jnp.argsort(order, axis=1)
  ids_restore = jnp.argsort(ids_shuffle, axis=1)
  ids_keep = ids_shuffle[:, : k * visible].reshape(batch * k, visible)
  # Mask i starts i * V places further on.
  ids_restore = (ids_restore[:, None] - visible * jnp.arange(k)[:, None]) % tokens
  return Mask(ids_keep, ids_restore.reshape(batch * k, tokens))


def encode_decode(params, pixels: jax.Array, mask: Mask, model: Model, everywhere: bool = True):
  """Runs the encoder on the visible tokens and the decoder on all of them.

  The decoder predicts all tokens, or with everywhere=False the M = N - V masked ones alone.

  Returns:
    A pair (streams, prediction).

    - streams: tokens that can mimic. [B * k, V (+1 with CLS), D] "fused", the encoder's output,
      which the decoder reads, and "last_block", before fusion; [B * k, N or M, decoder width]
      "decoder".
    - prediction: [B * k, N or M, p*p*C], row by row, or in the order of `mask.masked`.
  """
  grid = tuple(side // model.encoder.patch_size for side in pixels.shape[1:3])
  tokens, encoded = model.encoder.apply({"params": params["encoder"]}, pixels, mask)
  prediction, decoded = model.decoder.apply(
    {"params": params["decoder"]}, tokens, mask, grid, everywhere
  )
  streams = {
    "fused": tokens,
    "last_block": encoded["layers"][-1],
    "decoder": decoded["tokens"],
  }
  return streams, prediction


def pixel_targets(pixels: jax.Array, patch_size: int, norm_pix: bool):
  """Returns the decoder's targets, patch by patch in (row, column, channel) order.

  With norm_pix, (patch - mean) / sqrt(variance + 1e-6) with the unbiased variance of the patch
  (torch.var's default).

  Returns:
    targets [B, N, p*p*C], and the mean and scale [B, N, 1] that turn predictions back into
    normalized pixels.
  """
  patches = patchify(pixels, patch_size).reshape(
    pixels.shape[0], -1, patch_size**2 * pixels.shape[-1]
  )
  if not norm_pix:
    return patches, jnp.zeros_like(patches[..., :1]), jnp.ones_like(patches[..., :1])
  mean = patches.mean(-1, keepdims=True)
  scale = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
  return (patches - mean) / scale, mean, scale


def pixel_loss(
  prediction: jax.Array, pixels: jax.Array, mask: Mask, patch_size: int, norm_pix: bool
) -> jax.Array:
  """Computes the mean squared error on the masked patches.

  Args:
    prediction: of the masked patches, [B * k, M, p*p*C].
    pixels: normalized images [B, H, W, C].
    mask: [B * k, ...].
    patch_size: side of a patch in pixels, p.
    norm_pix: see `pixel_targets`.
  """
  targets, _, _ = pixel_targets(pixels, patch_size, norm_pix)
  masked = take_visible(targets, mask.masked)  # visible in the complement
  return jnp.square(prediction - masked).mean()


def mimic_loss(
  head_params,
  streams: dict[str, jax.Array],
  teacher_out: TeacherOutput,
  mask: Mask,
  mimic: Mimic,
) -> jax.Array:
  """Computes the mean distance between a teacher's features and the tokens that mimic them.

  Args:
    head_params: parameters of `mimic.head`.
    streams: of `encode_decode`, its decoder tokens those of the masked places.
    teacher_out: of the B whole images.
    mask: [B * k, ...]; that of `teacher_out`, where it has one.
    mimic: which tokens count, and how they are compared.
  """
  targets, cls = (
    None if x is None else normalize_features(x, mimic.target_norm)
    for x in (teacher_out.features, teacher_out.cls)
  )
  rows, visible = mask.ids_keep.shape
  k = rows // len(targets)
  distance = DISTANCES[mimic.loss]
  head = lambda x: mimic.head.apply({"params": head_params}, x)
  if mimic.tokens == "masked":
    return distance(head(streams["decoder"]), take_visible(targets, mask.masked)).mean()

  targets = targets if teacher_out.mask else take_visible(targets, mask)
  counts = jnp.ones((rows, visible))
  if mimic.salient_share < 1:
    attention = take_visible(teacher_out.attention, mask)
    rank = jnp.argsort(jnp.argsort(-attention, axis=1), axis=1)
    counts = rank < max(1, round(visible * mimic.salient_share))
  if mimic.tokens == "visible+cls":
    targets = jnp.concatenate([cls.repeat(k, 0)[:, None], targets], axis=1)
    counts = jnp.pad(counts, ((0, 0), (1, 0)), constant_values=1)
  tokens = streams[mimic.source][:, -targets.shape[1] :]  # without CLS where it mimics nothing
  error = distance(head(tokens), targets)
  return jnp.sum(error * counts) / counts.sum()


def normalize_features(x: jax.Array, how: str) -> jax.Array:
  """Normalizes teacher features [B, ..., Dt] as targets, float32.

  "layer_norm": each token to zero mean and unit variance, without parameters
    (OpenDriveLab/maskalign): CLIP's residual stream has a few huge channels, which would otherwise
    be all of the error. "batch": each channel to zero mean and unit variance over the
    (micro-)batch. "l2": each token to unit length. "none": as they are.
  """
  x = x.astype(jnp.float32)
  if how == "none":
    return x
  if how == "l2":
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
  axes = -1 if how == "layer_norm" else tuple(range(x.ndim - 1))
  mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def _smooth_l1(d):
  # Twice torch's with beta 1, as in OpenDriveLab/maskalign: the squared error of small differences.
  return jnp.where(jnp.abs(d) < 1, jnp.square(d), 2 * jnp.abs(d) - 1)


def _cosine(a, b):
  unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
  return 1 - (unit(a) * unit(b)).sum(-1)


DISTANCES = {  # [..., Dt], [..., Dt] -> [...]
  "mse": lambda a, b: jnp.square(a - b).mean(-1),
  "smooth_l1": lambda a, b: _smooth_l1(a - b).mean(-1),
  "l1": lambda a, b: jnp.abs(a - b).mean(-1),
  "cosine": _cosine,
}
