"""Pre-training as a task: the configuration's student and teachers around `mrmae.pretrain_loss`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import mrmae, teachers
from mrmae_jax.config import teacher_options
from mrmae_jax.models import encode, make_decoder, make_encoder
from mrmae_jax.models.decoder import MimicHead
from mrmae_jax.models.layers import from_blocks
from mrmae_jax.train import Task


def make_model(config, teacher_dims: dict[str, int]) -> mrmae.Model:
  """The student of a configuration; `teacher_dims` are the widths of the features to mimic, by the names of the losses."""
  dtype = jnp.dtype(config.dtype)
  encoder = make_encoder(config.encoder, dtype)
  decoder = make_decoder(config.decoder, encoder, len(config.data.mean), dtype)
  mimics = tuple(
    mrmae.Mimic(
      name,
      MimicHead(teacher_dims[name], options.head, dtype),
      options.weight,
      options.tokens,
      options.source,
      options.target_norm,
      options.loss,
      options.salient_share,
    )
    for name, options in teacher_options(config).items()
  )
  return mrmae.Model(encoder, decoder, mimics, tuple(config.data.mean), tuple(config.data.std))


def init_params(model: mrmae.Model, image_size: tuple[int, int], mask_ratio: float, key: jax.Array):
  """Fresh parameters of a student for images of (height, width)."""
  pixels = jnp.zeros((1, *image_size, len(model.mean)))
  grid = tuple(side // model.encoder.patch_size for side in image_size)
  mask = mrmae.sample_mask(jnp.zeros((1, grid[0] * grid[1])), mask_ratio)
  keys = jax.random.split(key, 2 + len(model.mimics))
  (tokens, _), encoder = model.encoder.init_with_output(keys[0], pixels, mask)
  (_, decoded), decoder = model.decoder.init_with_output(keys[1], tokens, mask, grid)
  params = {"encoder": encoder["params"], "decoder": decoder["params"]}
  if model.mimics:
    params["mimic_heads"] = {
      mimic.name: mimic.head.init(k, decoded["tokens"] if mimic.tokens == "masked" else tokens)[
        "params"
      ]
      for k, mimic in zip(keys[2:], model.mimics)
    }
  return params


def make(config) -> Task:
  """The pre-training task of a validated configuration; reads the teachers' weights.

  Raises:
    WeightsError: a teacher's weights do not load.
  """
  specs = {
    name: teachers.configured_spec(options, config)
    for name, options in teacher_options(config).items()
  }
  loaded = {name: teachers.load(spec) for name, spec in specs.items()}
  model = make_model(config, {name: teacher.dim for name, teacher in loaded.items()})
  size, options = tuple(config.image_size), dict(config.method)
  tokens = size[0] // model.encoder.patch_size * (size[1] // model.encoder.patch_size)

  def noise(keys):
    return jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys)

  def loss(params, frozen, batch, keys):
    look = {
      name: functools.partial(teacher.forward, frozen[name]) for name, teacher in loaded.items()
    }
    return mrmae.pretrain_loss(params, batch["image"], noise(keys), model, look, **options)

  def predict(params, frozen, batch, keys):
    del frozen
    return {"features": features(model, params, batch["image"])} | reconstruct(
      model,
      params,
      batch["image"],
      mrmae.sample_mask(noise(keys), options["mask_ratio"]),
      options["norm_pix"],
    )

  return Task(
    functools.partial(init_params, model, size, options["mask_ratio"]),
    loss,
    predict,
    {name: teacher.params for name, teacher in loaded.items()},
    {f"teacher {name}": teacher.digest for name, teacher in loaded.items()},
    tuple(
      f"{name}: teacher {spec.description}, sha256 {loaded[name].digest[:12]}"
      for name, spec in specs.items()
    ),
  )


def features(model: mrmae.Model, params, images: jax.Array) -> jax.Array:
  """Image features of the encoder, nothing masked: the mean over the tokens that fine-tuning starts from, float32 [B, D]."""
  return encode(model.encoder, params["encoder"], mrmae.normalise(images, model.mean, model.std))[
    "pooled"
  ]


def reconstruct(
  model: mrmae.Model, params, images: jax.Array, mask, norm_pix: bool
) -> dict[str, jax.Array]:
  """Reconstructions as images in [0, 1], float32 [B, H, W, C].

  A prediction of normalised pixels has no brightness or contrast of its own. It is shown with those of the true patch, which
  nobody who sees the visible patches alone can know; or, under names with "_blind", with those that the visible patches around
  it suggest, so that nothing of what is hidden gets into the picture.

  Returns:
    "original"; "masked": masked patches grey; "reconstruction", "reconstruction_blind": every patch as predicted; "pasted",
    "pasted_blind": predictions in the masked places, the original elsewhere.
  """
  size, (mean, std) = model.encoder.patch_size, (jnp.asarray(model.mean), jnp.asarray(model.std))
  pixels = mrmae.normalise(images, model.mean, model.std)
  grid = tuple(side // size for side in pixels.shape[1:3])

  def to_images(patches):
    blocks = patches.reshape(*patches.shape[:2], size, size, -1)
    return jnp.clip(from_blocks(blocks, grid) * std + mean, 0, 1)

  _, prediction = mrmae.encode_decode(params, pixels, mask, model)
  _, offset, scale = mrmae.pixel_targets(pixels, size, norm_pix)
  original, _, _ = mrmae.pixel_targets(pixels, size, norm_pix=False)
  removed = mask.removed[..., None]
  grey = (0.5 - mean) / std
  pictures = {
    "original": original,
    "masked": jnp.where(removed, jnp.tile(grey, size * size), original),
  }
  blind = [spread_visible(x, mask, grid) for x in (offset, scale)]
  for suffix, (offset, scale) in {"": (offset, scale), "_blind": blind}.items():
    patches = prediction * scale + offset
    pictures |= {
      f"reconstruction{suffix}": patches,
      f"pasted{suffix}": jnp.where(removed, patches, original),
    }
  return {name: to_images(patches) for name, patches in pictures.items()}


def spread_visible(x: jax.Array, mask, grid: tuple[int, int]) -> jax.Array:
  """A value per token, [B, N, 1], in which those of masked tokens are replaced by a mean over the visible ones.

  The weights are 1 / distance^3, of the powers from 1 to 6 about the best guess at mean and contrast of the hidden patches of
  photographs: with 75 % hidden, the mean is off by 0.51 deviations (root mean square), with equal weights by 0.80.
  """
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
  near = np.maximum(np.linalg.norm(places[:, None] - places, axis=-1), 1).astype(np.float32) ** -3
  weights = jnp.where(mask.removed[:, None], 0, near)
  return jnp.where(mask.removed[..., None], weights @ x / weights.sum(-1, keepdims=True), x)
