"""An encoder with a classification head, as ConvMAE and MAE fine-tune it.

The references are models_convvit.py and models_vit.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrmae_jax.models.layers import Dense, LayerNorm


class Classifier(nn.Module):
  """Encoder, pooling and a linear head.

  Attributes:
    encoder: ConvViT or ViT, without fusion layers. With pool="mean" its last norm is not used
      either and keeps its start.
    num_classes: length of the logits.
    pool: "mean", the mean of the last block's patch tokens through a LayerNorm of its own
      ("fc_norm"); or "cls", the CLS token after the encoder's last norm.
    head_std: standard deviation of the head's initial weights; MAE's fine-tuning takes 2e-5.
    dtype: of the head; parameters are float32.
  """

  encoder: Any
  num_classes: int
  pool: str = "mean"
  head_std: float = 2e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, images: jax.Array, keys: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classifies images.

    Args:
      images: normalized images [B, H, W, C].
      keys: [B], one key per image, which decide the dropped paths; None drops nothing.

    Returns:
      float32 logits [B, num_classes], and {"features": float32 [B, D]}, the input of the head.
    """
    x, out = self.encoder(images, keys=keys)
    if self.pool == "cls":
      features = x[:, 0]
    else:
      patches = out["layers"][-1][:, int(self.encoder.cls_token) :]
      features = LayerNorm(self.encoder.eps, self.dtype, name="fc_norm")(patches.mean(1))
    init = nn.initializers.truncated_normal(self.head_std)
    logits = Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(features)
    return logits.astype(jnp.float32), {"features": features.astype(jnp.float32)}
