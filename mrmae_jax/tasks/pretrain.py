"""Pre-training as a task: the configuration's student and teachers around `mrmae.pretrain_loss`."""

import functools

import jax
import jax.numpy as jnp

from mrmae_jax import data, mrmae, optim, teachers
from mrmae_jax.config import teacher_options
from mrmae_jax.models import encode, make_decoder, make_encoder
from mrmae_jax.models.decoder import MimicHead
from mrmae_jax.reconstruction import reconstruct
from mrmae_jax.train import Task
from mrmae_jax.weights import init_from


def make(config) -> Task:
  """Returns the pre-training task of a validated configuration; reads the teachers' weights.

  Raises:
    DataError: there are no training images.
    WeightsError: the weights of a teacher or of `config.init_from` do not load, or the latter is
      another architecture.
  """
  specs = {
    name: teachers.configured_spec(options, config)
    for name, options in teacher_options(config).items()
  }
  loaded = {name: teachers.load(spec) for name, spec in specs.items()}
  model = make_model(config, {name: teacher.dim for name, teacher in loaded.items()})
  image_size, method = tuple(config.image_size), dict(config.method)
  height, width = (side // model.encoder.patch_size for side in image_size)

  pretrained, start_notes = {}, ()
  if config.init_from:
    make_params = functools.partial(init_params, model, image_size, method["mask_ratio"])
    shapes = jax.eval_shape(make_params, jax.random.key(0))
    pretrained, start_notes = init_from.read_student(config, model, shapes)

  def noise(keys):
    return jax.vmap(lambda key: jax.random.uniform(key, (height * width,)))(keys)

  def init(key):
    return init_params(model, image_size, method["mask_ratio"], key), ()

  def mimics_visible_alone(mimic):  # statistics of a batch are those of all tokens
    is_visible = mimic.tokens != "masked" and mimic.target_norm != "batch"
    return is_visible and method["complementary_masks"] == 1

  def loss(params, extra, frozen, batch, keys):
    def look(mimic, images, draw):
      draw = draw if mimics_visible_alone(mimic) else None
      return loaded[mimic.name].forward(frozen[mimic.name], images, draw)

    looks = {mimic.name: functools.partial(look, mimic) for mimic in model.mimics}
    value, terms = mrmae.pretrain_loss(params, batch["image"], noise(keys), model, looks, **method)
    return value, (terms, extra)

  def predict(params, extra, frozen, batch, keys):
    del extra, frozen
    mask = mrmae.sample_mask(noise(keys), method["mask_ratio"])
    pictures = reconstruct(model, params, batch["image"], mask, method["norm_pix"])
    return {"features": features(model, params, batch["image"])} | pictures

  # Targets normalized over a micro-batch are other numbers with other micro-batches.
  has_batch_targets = any(mimic.target_norm == "batch" for mimic in model.mimics)
  return Task(
    init=init,
    loss=loss,
    predict=predict,
    views=data.image_views(config),
    source=functools.cache(functools.partial(data.open_split, config.data)),
    optimizer=lambda steps: optim.make_optimizer(config.optim, config.batch_size, steps),
    frozen={name: teacher.params for name, teacher in loaded.items()},
    identity={f"teacher {name}": teacher.digest for name, teacher in loaded.items()}
    | ({"start": init_from.digest(pretrained)} if pretrained else {})
    | ({"micro-batches": config.optim.accum_steps} if has_batch_targets else {}),
    notes=tuple(
      f"{name}: teacher {spec.description}, sha256 {loaded[name].digest[:12]}"
      for name, spec in specs.items()
    )
    + start_notes,
    pretrained=pretrained,
    alarms={
      f"{name} spread": (teachers.MIN_SPREAD, f"{name}: {teachers.NO_SPREAD}") for name in loaded
    },
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
