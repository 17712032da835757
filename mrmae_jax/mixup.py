"""Mixup (Zhang et al. 2018), cutmix (Yun et al. 2019) and label smoothing, on the device, as timm's
`Mixup` in batch mode.

Law and constants are those of timm 0.3.2, data/mixup.py, which MAE and ConvMAE fine-tune with.
"""

import jax
import jax.numpy as jnp
import optax


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
  """Returns targets float32 [B, num_classes], rows of sum 1, of labels [B] in [0, num_classes).

  Each class has smoothing / num_classes; the rest is on the label.
  """
  return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean over the batch of -sum(targets * log softmax(logits)), float32; both [B, num_classes]."""
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def mix(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  num_classes: int,
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  smoothing: float = 0.0,
  groups: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image and its target with its mirror place in the batch: i with B - 1 - i.

  The batch as a whole is either blended (mixup: lambda x + (1 - lambda) partner) or given a
  rectangle of the partner (cutmix: the share 1 - lambda of each area, cut at the border), with one
  lambda ~ Beta(alpha, alpha). Targets are mixed by the same lambda, in cutmix by the area that was
  really pasted.

  The reference draws once for each GPU's batch (32 or 128 images of 1024), so that a large batch
  holds many lambdas and both kinds. `groups` does the same without depending on the devices: it
  cuts the batch into equal, consecutive parts and mixes each within itself.

  Args:
    key: decides everything.
    images: [B, H, W, C], uint8 or float, normalized or not: normalizing is affine and commutes with
      mixing.
    labels: int [B], in [0, num_classes).
    num_classes: of the targets.
    mixup_alpha, cutmix_alpha: of the Beta law; 0 switches that kind off, two zeros switch mixing
      off.
    smoothing: label smoothing inside the targets.
    groups: must divide B; static.

  Returns:
    Images of the same shape and float type (float32 for uint8), and targets float32 [B,
    num_classes], rows of sum 1.

  Raises:
    ValueError: B is not divisible by `groups`.
  """
  if len(images) % groups:
    raise ValueError(f"{len(images)} images cannot be mixed in {groups} equal groups")
  dtype = images.dtype if jnp.issubdtype(images.dtype, jnp.floating) else jnp.float32
  targets = smooth_one_hot(labels, num_classes, smoothing)
  if not (mixup_alpha or cutmix_alpha):
    return images.astype(dtype), targets

  def mix_group(key, x, y):
    kept, lam = _kept_share(key, *x.shape[1:3], mixup_alpha, cutmix_alpha)
    x = x.astype(jnp.float32)
    return (x * kept + x[::-1] * (1 - kept)).astype(dtype), y * lam + y[::-1] * (1 - lam)

  split = lambda x: x.reshape(groups, -1, *x.shape[1:])
  mixed = jax.vmap(mix_group)(jax.random.split(key, groups), split(images), split(targets))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mixed)


def _kept_share(key, height, width, mixup_alpha, cutmix_alpha):
  """Returns how much of itself an image keeps: at each pixel [H, W, 1], and in all, a scalar.

  A pixel keeps 0 or 1 in cutmix, lambda in mixup.
  """
  kind_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
  if mixup_alpha and cutmix_alpha:
    is_cutmix = jax.random.bernoulli(kind_key)
  else:
    is_cutmix = bool(cutmix_alpha)
  draw = lambda key, alpha: jax.random.beta(key, alpha, alpha) if alpha else 1.0
  blend, cut = draw(mixup_key, mixup_alpha), draw(cutmix_key, cutmix_alpha)
  outside = 1.0 - _box(box_key, height, width, cut)
  share = jnp.where(is_cutmix, outside.mean(), blend)
  return jnp.where(is_cutmix, outside, blend)[..., None], share


def _box(key, height, width, lam):
  """Returns float32 [H, W], 1 in a box around a uniform pixel, cut at the border.

  The box has the image's aspect; its sides are even numbers.
  """

  def side(key, length):
    half = jnp.floor(length * jnp.sqrt(1 - lam)).astype(int) // 2
    center = jax.random.randint(key, (), 0, length)
    place = jnp.arange(length)
    return ((center - half <= place) & (place < center + half)).astype(jnp.float32)

  rows, columns = jax.random.split(key)
  return side(rows, height)[:, None] * side(columns, width)
