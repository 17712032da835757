"""Self-distillation as a task: a ViT learns from a moving average of itself, without labels.

Student and teacher see two random views of each image. The student predicts what the teacher says
of the other view. With objective="dino" that is a distribution over prototypes (Caron et al. 2021,
arXiv 2104.14294). With objective="contrast" it is which image of the batch it was (MoCo v3, Chen et
al. 2021, arXiv 2104.02057, without its predictor). Sections and equations below are those of DINO.

Departures from the papers, for minutes of training instead of days: the student sees a random share
of the patches instead of extra small crops, as masked siamese networks do (Assran et al. 2022,
arXiv 2204.07141). The head sees the mean patch beside CLS and normalizes over the batch. Positions
start from the sine-cosine table, since small noise takes long to unlearn.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mrmae_jax import data, evals, mrmae, optim, sharding
from mrmae_jax.models import ViT, make_encoder
from mrmae_jax.models.layers import gelu
from mrmae_jax.train import Task

HIDDEN, BOTTLENECK = 256, 64  # widths of the head; 2048 and 256 in appendix C of the paper
CENTER_MOMENTUM = 0.9  # of equation 4
CENTER_IMAGES = 4096  # most images whose mean token `center_tokens` takes out
YIQ = (  # brightness and two axes of color (NTSC)
  (0.299, 0.587, 0.114),
  (0.5959, -0.2746, -0.3213),
  (0.2115, -0.5227, 0.3112),
)


def make(config) -> Task:
  """Returns the self-distillation task of a validated configuration.

  Raises:
    DataError: there are no training images.
  """
  distill = config.distill
  encoder = make_encoder(config.encoder, jnp.dtype(config.dtype))
  source = functools.cache(functools.partial(data.open_split, config.data))
  steps = optim.count_steps(config, len(source("train")))
  num_patches = math.prod(side // encoder.patch_size for side in config.image_size)
  normalize = functools.partial(mrmae.normalize, mean=config.data.mean, std=config.data.std)

  def init(key):
    encoder_key, head_key = jax.random.split(key)
    prototypes = distill.prototypes if distill.objective == "dino" else 0
    params = {
      "encoder": encoder.init(encoder_key, jnp.zeros((1, *config.image_size, 3)))["params"],
      "head": init_head(head_key, 2 * encoder.dim, prototypes),
    }
    extra = {
      "teacher": jax.tree.map(jnp.copy, params),  # buffers of its own, since the step donates them
      "center": jnp.zeros(distill.prototypes),
      "step": jnp.int32(0),
    }
    return params, extra

  def loss(params, extra, frozen, batch, keys):
    del frozen
    step, center = extra["step"], extra["center"]
    # Follows the update of the step before, so that the teacher is that of the paper.
    momentum = teacher_momentum(distill.momentum, step - 1, steps.total)
    follow = lambda t, s: momentum * t + (1 - momentum) * s
    teacher = jax.tree.map(follow, extra["teacher"], jax.lax.stop_gradient(params))
    student = params | {"head": freeze_prototypes(params["head"], step < steps.per_epoch)}

    pixels = normalize(augment_pairs(keys, batch["image"], distill))
    mask = sample_masks(keys, num_patches, distill.visible)
    target = jax.lax.stop_gradient(project_views(encoder, teacher, pixels))
    prediction = project_views(encoder, student, pixels, mask)
    if distill.objective == "contrast":
      value = contrast_loss(prediction, target, distill.contrast_temperature)
    else:
      temperatures = distill.teacher_temperature, distill.student_temperature
      value = dino_loss(prediction, target, center, *temperatures)
      center = CENTER_MOMENTUM * center + (1 - CENTER_MOMENTUM) * target.mean((0, 1))
    return value, ({}, {"teacher": teacher, "center": center, "step": step + 1})

  def predict(params, extra, frozen, batch, keys):
    del params, frozen, keys
    pixels = normalize(batch["image"])
    return {"features": mean_token(encoder, extra["teacher"]["encoder"], pixels)}

  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.pair_views(config),
    source=source,
    optimizer=lambda steps: optim.make_optimizer(config.optim, config.batch_size, steps),
  )


def project_views(encoder: ViT, params, pixels: jax.Array, mask=None) -> jax.Array:
  """Projects normalized views [B * 2, H, W, 3], those of an image side by side, to [2, B, K]."""
  x, _ = encoder.apply({"params": params["encoder"]}, pixels, mask)
  x = x.astype(jnp.float32)
  # The paper projects CLS alone; the students of this project mimic the patches.
  x = project(params["head"], jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=1))
  return x.reshape(-1, 2, x.shape[1]).swapaxes(0, 1)


def sample_masks(keys, num_patches: int, visible: float):
  """Draws the patches that the student sees of both views of each image; None if it sees all."""
  if visible == 1:
    return None
  noise = jax.vmap(lambda key: jax.random.uniform(key, (2, num_patches)))(fold(keys, 1))
  return mrmae.sample_mask(noise.reshape(-1, num_patches), 1 - visible)


def fold(keys, number: int):
  """Returns other keys [B], made of `keys` and a number."""
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def teacher_momentum(start: float, step, total_steps: int):
  """Returns the share of itself that the teacher keeps: a cosine from `start` to 1."""
  return 1 - (1 - start) * 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps))


def mean_token(encoder: ViT, params, pixels: jax.Array) -> jax.Array:
  """Returns the mean patch token of the last block's output, float32 [B, D].

  It is the residual stream that students mimic.
  """
  _, out = encoder.apply({"params": params}, pixels)
  return out["layers"][-1][:, 1:].astype(jnp.float32).mean(1)


def init_head(key, width: int, prototypes: int):
  """Returns the projection head, without biases, from normal(0.02); 0 prototypes leave them out."""
  sizes = {"fc1": (width, HIDDEN), "fc2": (HIDDEN, HIDDEN), "fc3": (HIDDEN, BOTTLENECK)}
  if prototypes:
    sizes["prototypes"] = (BOTTLENECK, prototypes)
  return {
    name: 0.02 * jax.random.normal(jax.random.fold_in(key, i), size)
    for i, (name, size) in enumerate(sizes.items())
  }


def freeze_prototypes(head, is_frozen):
  """Returns the head, its prototypes without a gradient where `is_frozen`, which may be traced.

  They keep still during the first epoch (facebookresearch/dino main_dino.py, freeze_last_layer).
  """
  if "prototypes" not in head:
    return head
  x = head["prototypes"]
  return head | {"prototypes": jnp.where(is_frozen, jax.lax.stop_gradient(x), x)}


def project(head, x: jax.Array) -> jax.Array:
  """Projects [B, D] to cosines with the prototypes [B, K], or to unit length [B, BOTTLENECK].

  Section 3.1, "Network architecture". The hidden layers are normalized over the batch, as
  use_bn_in_head of the authors' code does, which is off by default there. Without it, the first
  trials on the digits ended in one uniform distribution for all images.
  """
  unit = lambda x, axis: x * jax.lax.rsqrt(jnp.sum(x**2, axis, keepdims=True) + 1e-12)
  standardize = lambda x: (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
  x = gelu(standardize(x @ head["fc1"]))
  x = gelu(standardize(x @ head["fc2"])) @ head["fc3"]
  return unit(x, 1) @ unit(head["prototypes"], 0) if "prototypes" in head else unit(x, 1)


def dino_loss(student, teacher, center, teacher_temperature: float, student_temperature: float):
  """Returns the mean cross-entropy of the distributions of *different* views.

  Equation 3 and algorithm 1. Subtracting the center keeps one prototype from winning everywhere;
  the low temperature of the teacher keeps all of them from being equal.

  Args:
    student, teacher: [2, B, K], projections of the two views.
    center: [K], the running mean of the teacher's.
  """
  target = jax.nn.softmax((teacher - center) / teacher_temperature)
  log_p = jax.nn.log_softmax(student / student_temperature)
  return -jnp.sum(target[::-1] * log_p, -1).mean()


def contrast_loss(student, teacher, temperature: float):
  """Returns InfoNCE: each view must be closest to the teacher's *other* view of the same image.

  It is a mean cross-entropy over the images of the batch, log B for outputs that tell nothing.

  Args:
    student, teacher: [2, B, D], projections of unit length of the two views.
  """
  similarity = jnp.einsum("vbd,vcd->vbc", student, teacher[::-1]) / temperature
  return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(similarity), axis1=1, axis2=2))


def augment_pairs(keys, images: jax.Array, options) -> jax.Array:
  """Augments both views of each image: uint8 [B, 2, H, W, 3] -> float32 [B * 2, H, W, 3] in [0, 1].

  Args:
    keys: [B].
    images: the views.
    options: with `jitter` and `color`.
  """
  draw = functools.partial(augment_colors, jitter=options.jitter, color=options.color)
  view_keys = jax.vmap(jax.random.split)(fold(keys, 0))
  return jax.vmap(jax.vmap(draw))(view_keys, images).reshape(-1, *images.shape[2:])


def augment_colors(key, image: jax.Array, jitter: float, color: float) -> jax.Array:
  """Changes brightness, contrast and colors; makes a fifth of the views grey and blurs half.

  Section 3.2, without solarization. Hue turns by up to `color` * 90 degrees in the YIQ plane,
  saturation changes by a factor from 1 - `color` to 1 + `color`.

  Args:
    key: of this view.
    image: uint8 [H, W, 3].
    jitter: strength of brightness and contrast.
    color: strength of hue and saturation.

  Returns:
    float32 [H, W, 3] in [0, 1].
  """
  draw = lambda i, low, high: jax.random.uniform(
    jax.random.fold_in(key, i), minval=low, maxval=high
  )
  x = image.astype(jnp.float32) / 255
  x = jnp.clip(x * draw(0, 1 - jitter, 1 + jitter), 0, 1)
  x = jnp.clip(x.mean() + (x - x.mean()) * draw(1, 1 - jitter, 1 + jitter), 0, 1)
  if color:
    y, i, q = jnp.split(x @ jnp.asarray(YIQ).T, 3, axis=-1)
    angle, gain = draw(5, -color, color) * jnp.pi / 2, draw(6, 1 - color, 1 + color)
    sin, cos = gain * jnp.sin(angle), gain * jnp.cos(angle)
    yiq = jnp.concatenate([y, cos * i - sin * q, sin * i + cos * q], -1)
    x = jnp.clip(yiq @ jnp.linalg.inv(jnp.asarray(YIQ)).T, 0, 1)
  x = jnp.where(draw(2, 0, 1) < 0.2, x.mean(-1, keepdims=True), x)
  # The paper's sigma is 0.1 to 2 pixels of 224.
  sigma = draw(3, 0.1, 2.0) * x.shape[0] / 224
  return jnp.where(draw(4, 0, 1) < 0.5, blur(x, sigma), x)


def blur(x: jax.Array, sigma) -> jax.Array:
  """Blurs [H, W, C] by a Gaussian. A blur of all rows is a matrix, and so is one of all columns."""

  def matrix(size):
    places = jnp.arange(size, dtype=jnp.float32)
    return jax.nn.softmax(-(((places[:, None] - places) / sigma) ** 2) / 2, axis=-1)

  return jnp.einsum("ij,jkc,lk->ilc", matrix(x.shape[0]), x, matrix(x.shape[1]))


def center_tokens(config, task: Task, state):
  """Returns the teacher's encoder, host arrays, with the mean token moved to zero.

  What all tokens share is most of their length and holds no information. A student that mimics
  normalized tokens would otherwise learn this one vector and little else. It is taken out of the
  last bias. Every host of the run calls this.

  Args:
    config: of the run.
    task: of `make`.
    state: of `train.fit`.
  """
  mesh = sharding.make_mesh(**config.mesh)
  copy = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def add_up(extra, batch):
    features = task.predict((), extra, (), batch, None)["features"]
    return jnp.sum(features * batch["valid"][:, None], 0), jnp.sum(batch["valid"])

  batch_size = evals.padded_batch_size(64, mesh)
  batches = evals.global_batches(
    task.source("train"), task.views.eval, config, mesh, batch_size, CENTER_IMAGES
  )
  sums = [jax.device_get(add_up(state.extra, batch)) for batch in batches]
  mean = sum(total for total, _ in sums) / sum(count for _, count in sums)
  params = jax.device_get(copy(state.extra["teacher"]["encoder"]))
  block = f"blocks_{config.encoder.depth - 1}"
  fc2 = params[block]["fc2"]
  return params | {block: params[block] | {"fc2": fc2 | {"bias": fc2["bias"] - mean}}}
