"""Tiny models with random parameters, and losses of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax import mrmae
from mrmae_jax.detection import Rules
from mrmae_jax.models.convvit import ConvViT
from mrmae_jax.models.decoder import Decoder, MimicHead
from mrmae_jax.models.mask_rcnn import MaskRCNN
from mrmae_jax.models.upernet import Segmenter
from mrmae_jax.models.vit import ViT
from mrmae_jax.tasks import pretrain
from mrmae_jax.weights import detectron2, loaded_model

HEIGHT, WIDTH, TEACHER_DIM = 48, 64, 20
OPTIONS = dict(mask_ratio=0.75, norm_pix=True, pixel_weight=0.7)
CONVVIT = ConvViT((2, 2, 2), (8, 12, 16), (1, 2, 2), 2, (2.0, 3.0, 2.5))
VIT = ViT(8, 16, 2, 2, 36)
DECODER = Decoder(192, 12, 2, 3, 2)
GRID = (3, 5)  # not square: rows and columns cannot be confused, and it must be noted somewhere


def make_model(encoder, dtype=jnp.float32, mimic=None, **fields):
  if encoder == "vit":
    encoder = ViT(
      **(dict(patch_size=8, dim=24, depth=2, num_heads=3, mlp_dim=40) | fields), dtype=dtype
    )
  else:
    fields = (
      dict(
        patch_sizes=(2, 2, 2),
        embed_dims=(8, 12, 24),
        depths=(1, 1, 2),
        num_heads=3,
        mlp_ratios=(2, 3, 2),
      )
      | fields
    )
    encoder = ConvViT(**fields, sparse=encoder == "sparse", dtype=dtype)
  return mrmae.Model(
    encoder,
    Decoder(encoder.patch_size**2 * 3, 16, 1, 2, dtype=dtype),
    (mrmae.Mimic("mimic", MimicHead(TEACHER_DIM, dtype=dtype), 1.3, **(mimic or {})),),
    (0.4, 0.5, 0.6),
    (0.2, 0.3, 0.25),
  )


def random_params(model, size, seed=0, mask_ratio=0.75):
  """Returns parameters with every bias and gain random; `seed`: a number or a generator.

  By hand: an initialization takes longer to compile than a test.
  """
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    values = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key == "scale":
      return jnp.asarray(1 + 0.1 * values)
    return jnp.asarray(
      0.1 * values if len(leaf.shape) == 1 else values * np.prod(leaf.shape[:-1]) ** -0.5
    )

  return jax.tree_util.tree_map_with_path(fill, param_shapes(model, size, mask_ratio))


@functools.cache
def param_shapes(model, size, mask_ratio):
  """Returns the shapes of a model's parameters; many tests ask for those of the same few models."""
  init = functools.partial(pretrain.init_params, model, size, mask_ratio)
  return jax.eval_shape(init, jax.random.key(0))


def setup(encoder, seed=0, batch=3, size=(HEIGHT, WIDTH), mask_ratio=0.75, **kwargs):
  """Model, parameters with every bias and gain randomised, images, noise, teacher features."""
  model = make_model(encoder, **kwargs)
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.integers(0, 256, (batch, *size, 3), np.uint8))
  grid = tuple(s // model.encoder.patch_size for s in size)
  noise = jnp.asarray(rng.random((batch, grid[0] * grid[1]), np.float32))

  params = random_params(model, size, rng, mask_ratio)
  features = jnp.asarray(
    rng.standard_normal((batch, noise.shape[1], TEACHER_DIM), np.float32) * 3 + 1
  )
  return model, params, images, noise, features


def seen(features):
  """A teacher's output with these features; CLS and attention follow from them."""
  return mrmae.TeacherOutput(features, features.mean(1) * 2, jax.nn.softmax(features[..., 0]))


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("mask_ratio", "masking", "complementary_masks", "pixel_weight"),
)
def loss_of(model, params, images, noise, features, **options):
  return mrmae.pretrain_loss(
    params, images, noise, model, {"mimic": lambda *_: seen(features)}, **(OPTIONS | options)
  )


class Same:
  """A head that changes nothing, so that losses can be computed by hand."""

  def apply(self, variables, x):
    del variables
    return x


def mimic_alone(student, output, mask, **options):
  return mrmae.mimic_loss(
    {},
    {"fused": student, "last_block": -student, "decoder": student},
    output,
    mask,
    mrmae.Mimic("mimic", Same(), **options),
  )


def make_student(encoder, decoder=DECODER, classes=0, fc_norm=True, has_norm=True, seed=0):
  """A student with no parameter at its start: swapped norms and lost biases show."""
  rng = np.random.default_rng(seed)
  classifier = (("fc_norm", "head") if fc_norm else ("head",)) if classes else ()
  shapes = student_shapes(encoder, decoder, classifier, classes)
  params = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.3 + 0.1, shapes
  )
  return loaded_model.LoadedModel(
    encoder,
    decoder,
    params,
    GRID,
    (0.1, 0.2, 0.3),
    (0.4, 0.5, 0.6),
    {"mask_ratio": 0.6, "norm_pix": False},
    has_norm,
    None,
    tuple("zyxwvut"[:classes]),
  )


@functools.cache
def student_shapes(encoder, decoder, classifier, classes):
  return loaded_model.param_shapes(encoder, decoder, GRID, classifier, classes)


def make_segmenter(seed=0, classes=4, **fields):
  """A small segmentation model with random weights and statistics, and no golden."""
  encoder = ViT(8, 24, 4, 2, 48, learned_positions=True, relative_positions=True, **fields)
  segmenter = Segmenter(encoder, classes, 8, 8, levels=(0, 1, 2, 3))
  shapes = jax.eval_shape(segmenter.init, jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes["params"])
  stats = jax.tree.map(lambda x: np.abs(draw(x)) + 1, shapes["batch_stats"])
  encoder_params = params.pop("encoder")
  encoder_params["norm"] = {"scale": np.ones(24, np.float32), "bias": np.zeros(24, np.float32)}
  return loaded_model.LoadedModel(
    encoder=encoder,
    decoder=None,
    params={"encoder": encoder_params, "segmenter": params, "batch_stats": stats},
    grid=(4, 4),
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    method={"mask_ratio": 0.75, "norm_pix": True},
    has_norm=False,
    report=None,
    classes=("sky", "sea", "land", "other")[:classes],
    segmenter=segmenter,
  )


def make_detector(seed=0, classes=("cat", "dog", "cow"), **fields):
  """A small detector with random weights, for images of 64 x 64 pixels, and no golden."""
  backbone = dict(window=4, global_blocks=(1,), distances="decomposed", position_grid=(8, 8))
  backbone |= dict(cls_token=False)
  encoder = ViT(8, 24, 2, 2, 48, learned_positions=True, **backbone)
  heads = dict(rpn_convs=1, box_convs=1, box_hidden=16, mask_convs=1) | fields
  detector = MaskRCNN(encoder, len(classes), "simple", 8, num_anchors=1, **heads)
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32)
  params = jax.tree.map(draw, detectron2.detector_shapes(detector, (64, 64)))
  params["encoder"]["norm"] = {"scale": np.ones(24, np.float32), "bias": np.zeros(24, np.float32)}
  rules = Rules(
    anchor_sizes=(8, 16, 24, 32, 48),
    anchor_ratios=(1.0,),
    test_proposals=(16, 16),
    canonical_size=32,
    detections=6,
  )
  return loaded_model.LoadedModel(
    encoder=encoder,
    decoder=None,
    params=params,
    grid=(8, 8),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    method={"mask_ratio": 0.75, "norm_pix": True},
    has_norm=False,
    report=None,
    classes=classes,
    detector=detector,
    rules=rules,
  )
