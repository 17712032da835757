"""Pre-training as a task: the configuration's student and teacher around `mrmae.pretrain_loss`."""

import functools

import jax
import jax.numpy as jnp

from mrmae_jax import mrmae, teachers
from mrmae_jax.config import token_size
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder, MimicHead
from mrmae_jax.models.layers import from_blocks
from mrmae_jax.models.vit import ViT
from mrmae_jax.train import Task


def make_model(config, teacher_dim: int | None) -> mrmae.Model:
  """The student of a configuration; `teacher_dim` is the width of the features to mimic, None without a teacher."""
  dtype = jnp.dtype(config.dtype)
  fields = {key: value for key, value in config.encoder.items() if key != "name"}
  encoder = {"convvit": ConvViT, "vit": ViT}[config.encoder.name](dtype=dtype, **fields)
  # As in ConvMAE, the decoder's MLP ratio is that of the encoder's first stage; MAE's encoder has the same ratio throughout.
  ratio = fields["mlp_ratios"][0] if "mlp_ratios" in fields else 4
  decoder = Decoder(token_size(config) ** 2 * len(config.data.mean), mlp_ratio=ratio, dtype=dtype, **config.decoder)
  head = None if teacher_dim is None else MimicHead(teacher_dim, dtype)
  return mrmae.Model(encoder, decoder, head, tuple(config.data.mean), tuple(config.data.std))


def make(config) -> Task:
  """The pre-training task of a validated configuration; reads the teacher's weights.

  Raises:
    WeightsError: the teacher's weights do not load.
  """
  teacher = None
  if config.teacher.path:
    teacher = teachers.load(teachers.read_spec(config.teacher.path, tuple(config.image_size), config.teacher.dtype))
  model = make_model(config, teacher.dim if teacher else None)
  size = tuple(config.image_size)
  grid = tuple(side // model.encoder.patch_size for side in size)
  options = dict(config.method)

  def noise(keys):
    return jax.vmap(lambda key: jax.random.uniform(key, (grid[0] * grid[1],)))(keys)

  def init(key):
    pixels = jnp.zeros((1, *size, len(model.mean)))
    mask = mrmae.sample_mask(noise(key[None]), options["mask_ratio"])
    keys = jax.random.split(key, 3)
    tokens, encoder = model.encoder.init_with_output(keys[0], pixels, mask)
    params = {"encoder": encoder["params"], "decoder": model.decoder.init(keys[1], tokens[0], mask, grid)["params"]}
    if teacher:
      params["mimic_head"] = model.mimic_head.init(keys[2], tokens[0])["params"]
    return params

  def loss(params, frozen, batch, keys):
    look = functools.partial(teacher.features, frozen) if teacher else None
    return mrmae.pretrain_loss(params, batch["image"], noise(keys), model, look, **options)

  def predict(params, frozen, batch, keys):
    del frozen
    return {"features": features(model, params, batch["image"])} | reconstruct(
        model, params, batch["image"], mrmae.sample_mask(noise(keys), options["mask_ratio"]), options["norm_pix"])

  return Task(init, loss, predict, teacher.params if teacher else {}, {"teacher": teacher.digest if teacher else None})


def features(model: mrmae.Model, params, images: jax.Array) -> jax.Array:
  """Image features of the encoder, nothing masked: the mean over the tokens that fine-tuning starts from, float32 [B, D]."""
  x, out = model.encoder.apply({"params": params["encoder"]}, mrmae.normalise(images, model.mean, model.std))
  tokens = out["stage3"] if "stage3" in out else x[:, 1:]
  return tokens.astype(jnp.float32).mean(1)


def reconstruct(model: mrmae.Model, params, images: jax.Array, mask, norm_pix: bool) -> dict[str, jax.Array]:
  """Reconstructions as images in [0, 1], float32 [B, H, W, C].

  A prediction of normalised pixels has no brightness or contrast of its own; it is shown with those of the true patch.

  Returns:
    "original"; "masked": masked patches grey; "reconstruction": every patch as predicted; "pasted": predictions in the
    masked places, the original elsewhere.
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
  prediction = prediction * scale + offset
  removed = mask.removed[..., None]
  grey = (0.5 - mean) / std
  hidden = jnp.where(removed, jnp.tile(grey, size * size), original)
  pictures = {"original": original, "masked": hidden, "reconstruction": prediction,
              "pasted": jnp.where(removed, prediction, original)}
  return {name: to_images(patches) for name, patches in pictures.items()}
