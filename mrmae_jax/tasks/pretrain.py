"""Pre-training as a task: the configuration's student and teachers around `mrmae.pretrain_loss`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import data, mrmae, optim, teachers
from mrmae_jax.config import teacher_options
from mrmae_jax.models import encode, make_decoder, make_encoder
from mrmae_jax.models.decoder import MimicHead
from mrmae_jax.models.layers import from_blocks
from mrmae_jax.train import Task


def make(config) -> Task:
  """Returns the pre-training task of a validated configuration; reads the teachers' weights.

  Raises:
    DataError: there are no training images.
    WeightsError: a teacher's weights do not load.
  """
  specs = {
    name: teachers.configured_spec(options, config)
    for name, options in teacher_options(config).items()
  }
  loaded = {name: teachers.load(spec) for name, spec in specs.items()}
  model = make_model(config, {name: teacher.dim for name, teacher in loaded.items()})
  image_size, method = tuple(config.image_size), dict(config.method)
  height, width = (side // model.encoder.patch_size for side in image_size)

  def noise(keys):
    return jax.vmap(lambda key: jax.random.uniform(key, (height * width,)))(keys)

  def init(key):
    return init_params(model, image_size, method["mask_ratio"], key), ()

  def loss(params, extra, frozen, batch, keys):
    teacher_fns = {
      name: functools.partial(teacher.forward, frozen[name]) for name, teacher in loaded.items()
    }
    value, terms = mrmae.pretrain_loss(
      params, batch["image"], noise(keys), model, teacher_fns, **method
    )
    return value, (terms, extra)

  def predict(params, extra, frozen, batch, keys):
    del extra, frozen
    mask = mrmae.sample_mask(noise(keys), method["mask_ratio"])
    pictures = reconstruct(model, params, batch["image"], mask, method["norm_pix"])
    return {"features": features(model, params, batch["image"])} | pictures

  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.image_views(config),
    source=functools.cache(functools.partial(data.open_split, config.data)),
    optimizer=lambda _, steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    frozen={name: teacher.params for name, teacher in loaded.items()},
    identity={f"teacher {name}": teacher.digest for name, teacher in loaded.items()},
    notes=tuple(
      f"{name}: teacher {spec.description}, sha256 {loaded[name].digest[:12]}"
      for name, spec in specs.items()
    ),
  )


def make_model(config, teacher_dims: dict[str, int]) -> mrmae.Model:
  """Returns the student of a configuration.

  Args:
    config: validated configuration.
    teacher_dims: widths of the features to mimic, by the names of the losses.
  """
  dtype = jnp.dtype(config.dtype)
  encoder = make_encoder(config.encoder, dtype)
  decoder = make_decoder(config.decoder, encoder, len(config.data.mean), dtype)
  mimics = tuple(
    mrmae.Mimic(
      name=name,
      head=MimicHead(teacher_dims[name], options.head, dtype),
      weight=options.weight,
      tokens=options.tokens,
      source=options.source,
      target_norm=options.target_norm,
      loss=options.loss,
      salient_share=options.salient_share,
    )
    for name, options in teacher_options(config).items()
  )
  return mrmae.Model(encoder, decoder, mimics, tuple(config.data.mean), tuple(config.data.std))


def init_params(model: mrmae.Model, image_size: tuple[int, int], mask_ratio: float, key: jax.Array):
  """Returns fresh parameters of a student for images of (height, width)."""
  pixels = jnp.zeros((1, *image_size, len(model.mean)))
  grid = tuple(side // model.encoder.patch_size for side in image_size)
  mask = mrmae.sample_mask(jnp.zeros((1, grid[0] * grid[1])), mask_ratio)
  keys = jax.random.split(key, 2 + len(model.mimics))
  (tokens, _), encoder = model.encoder.init_with_output(keys[0], pixels, mask)
  (_, decoded), decoder = model.decoder.init_with_output(keys[1], tokens, mask, grid)
  params = {"encoder": encoder["params"], "decoder": decoder["params"]}
  if model.mimics:
    inputs = lambda mimic: decoded["tokens"] if mimic.tokens == "masked" else tokens
    params["mimic_heads"] = {
      mimic.name: mimic.head.init(key, inputs(mimic))["params"]
      for key, mimic in zip(keys[2:], model.mimics)
    }
  return params


def features(model: mrmae.Model, params, images: jax.Array) -> jax.Array:
  """Returns image features of the encoder, nothing masked, float32 [B, D].

  They are the mean over the tokens that fine-tuning starts from.
  """
  pixels = mrmae.normalize(images, model.mean, model.std)
  return encode(model.encoder, params["encoder"], pixels)["pooled"]


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
