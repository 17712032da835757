"""Trained students in use: `mrmae_jax.load(path).encode(images)`.

model = mrmae_jax.load("mae_pretrain_vit_base.pth")  # or a ViTMAE folder, a run's workdir, a file of mrmae convert
print(model.report)                                  # what was loaded, and what was not
features = model.encode(images)["pooled"]            # uint8 [B, H, W, 3] of any size -> float32 [B, D]
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import mrmae
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import encode, head_attention
from mrmae_jax.models.layers import layer_norm
from mrmae_jax.weights import model_files


def load(path: str | Path, **options) -> "Pretrained":
  """Opens a trained student; see `weights.students.read` for what it may be, the options and the errors."""
  return Pretrained(model_files.read(path, **options))


class Pretrained:
  """A trained student that takes images.

  Images are [B, H, W, C], uint8 or float in [0, 1], with the channels of its training (3: RGB), both sides multiples of the
  token size; they are normalised here. Learned position tables are interpolated for images of another grid than theirs. Every
  shape is compiled once.

  Attributes:
    student: modules and parameters (`weights.students.Student`).
    report: str() of it lists what was loaded, what is new and what was dropped, both by design.
    class_names: of a fine-tuned model, in the order of its logits; () where its source does not tell.
  """

  def __init__(self, student: model_files.Student):
    self.student, self.report, self.class_names = student, student.report, student.classes
    self._model = mrmae.Model(student.encoder, student.decoder, (), student.mean, student.std)
    self._params = {}  # grid -> parameters on the device
    self._encode, self._classify = jax.jit(self._features), jax.jit(self._logits)
    self._attention = jax.jit(self._weights)
    self._reconstruct = jax.jit(self._pictures, static_argnums=(3, 4))

  @property
  def config(self) -> dict[str, Any]:
    """Dimensions of the networks, grid of the position tables, input normalisation, number of classes (0: no classifier)."""
    s, classifier = self.student, self.student.params.get("classifier")
    return {
      "encoder": model_files.module_fields(s.encoder),
      "decoder": s.decoder and model_files.module_fields(s.decoder),
      "grid": s.grid,
      "image_size": tuple(side * s.encoder.patch_size for side in s.grid),
      "mean": s.mean,
      "std": s.std,
      "classes": len(classifier["head"]["bias"]) if classifier else 0,
    }

  def encode(self, images) -> dict[str, jax.Array]:
    """Features of whole images, nothing masked; float32.

    Returns:
      "tokens" [B, N, D], row by row: of a ConvViT after the last block, before fusion and the last norm, which fine-tuning
      drops too; of a ViT after the norm (after the last block if it was fine-tuned without it). "pooled" [B, D]: their mean.
      "cls" [B, D] where there is a CLS token. Of a ConvViT "stage1" [B, H/4, W/4, D1], "stage2" [B, H/8, W/8, D2].
    """
    return self._encode(*self._ready(images))

  def attention(self, images) -> jax.Array:
    """What each token attends to in each head of the last block, nothing masked: see `models.head_attention`."""
    return self._attention(*self._ready(images))

  def classify(self, images) -> jax.Array:
    """Logits float32 [B, classes] of a fine-tuned model, in the order of `class_names`.

    Raises:
      WeightsError: it has no classifier.
    """
    if "classifier" not in self.student.params:
      raise WeightsError(
        f"{self.report.source} holds no classifier (head.weight); give a fine-tuned model, or use encode"
      )
    return self._classify(*self._ready(images))

  def reconstruct(
    self, images, mask_ratio: float | None = None, norm_pix: bool | None = None, seed: int = 0
  ):
    """Reconstructions from randomly masked images, as `tasks.pretrain.reconstruct` gives them: float32 in [0, 1].

    Args:
      images: see above.
      mask_ratio, norm_pix: of pre-training; None: what the source tells, else MAE's 0.75 and True. The weights behind MAE's
        own pictures, mae_visualize_*.pth, predict plain pixels and do not tell: they need norm_pix=False.
      seed: of the mask; visible at a high ratio is a part of what is visible at a lower one.

    Raises:
      WeightsError: the model has no decoder.
    """
    if self.student.decoder is None:
      raise WeightsError(
        f"{self.report.source} was loaded without a decoder and cannot reconstruct; most published files hold "
        "the encoder alone: give a run's workdir, or a full pre-training checkpoint, as of MAE the folders "
        "facebook/vit-mae-* or the files mae_pretrain_*_full.pth and mae_visualize_*.pth"
      )
    method = self.student.method
    ratio = method["mask_ratio"] if mask_ratio is None else mask_ratio
    params, images = self._ready(images)
    return self._reconstruct(
      params,
      images,
      jax.random.key(seed),
      ratio,
      method["norm_pix"] if norm_pix is None else norm_pix,
    )

  def _ready(self, images):
    """Parameters for the images' grid, and the images; ValueError for what is no batch of images."""
    patch, channels = self.student.encoder.patch_size, len(self.student.mean)
    if (
      images.ndim != 4
      or images.shape[3] != channels
      or not len(images)
      or any(n % patch or not n for n in images.shape[1:3])
    ):
      raise ValueError(
        f"images of shape {tuple(images.shape)} given; expected [B, H, W, {channels}] with B > 0, H and W multiples "
        f"of the token size {patch}"
      )
    if not (images.dtype == np.uint8 or jnp.issubdtype(images.dtype, jnp.floating)):
      raise ValueError(f"images of type {images.dtype} given; expected uint8, or float in [0, 1]")
    if (
      isinstance(images, np.ndarray)
      and images.dtype != np.uint8
      and not -1e-3 <= images.min() <= images.max() <= 1.001
    ):
      raise ValueError(
        f"float images from {images.min():g} to {images.max():g} given; expected [0, 1]: divide by 255 first, "
        "normalisation is done here"
      )
    grid = (images.shape[1] // patch, images.shape[2] // patch)
    if grid not in self._params:
      self._params[grid] = jax.device_put(model_files.params_at(self.student, grid))
    return self._params[grid], images

  def _features(self, params, images):
    pixels = mrmae.normalize(images, *self._model[-2:])
    return encode(
      self.student.encoder, params["encoder"], pixels, None if self.student.has_norm else False
    )

  def _weights(self, params, images):
    return head_attention(
      self.student.encoder, params["encoder"], mrmae.normalize(images, *self._model[-2:])
    )

  def _logits(self, params, images):
    pixels, classifier = mrmae.normalize(images, *self._model[-2:]), params["classifier"]
    if "fc_norm" in classifier:  # MAE's and ConvMAE's --global_pool
      x = encode(self.student.encoder, params["encoder"], pixels, normed=False)["pooled"]
      x = layer_norm(1e-6, jnp.float32).apply({"params": classifier["fc_norm"]}, x)
    else:  # CLS; in a ConvViT without one, the first patch, as in the reference
      x = self.student.encoder.apply({"params": params["encoder"]}, pixels)[0][:, 0].astype(
        jnp.float32
      )
    return x @ classifier["head"]["kernel"] + classifier["head"]["bias"]

  def _pictures(self, params, images, key, mask_ratio, norm_pix):
    from mrmae_jax.tasks import pretrain  # features need nothing of training

    grid = [side // self.student.encoder.patch_size for side in images.shape[1:3]]
    noise = jax.random.uniform(key, (len(images), grid[0] * grid[1]))
    return pretrain.reconstruct(
      self._model, params, images, mrmae.sample_mask(noise, mask_ratio), norm_pix
    )
