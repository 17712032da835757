"""Trained models in use: `mrmae_jax.load(path).encode(images)`.

# A file as here, a ViTMAE folder, the workdir of a run, or a file of `mrmae convert`.
model = mrmae_jax.load("mae_pretrain_vit_base.pth")
print(model.report)                        # what was loaded, and what was not
features = model.encode(images)["pooled"]  # uint8 [B, H, W, 3] of any size -> float32 [B, D]
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from mrmae_jax import detection, mrmae, segmentation, target
from mrmae_jax.checks import MAX_SCALE
from mrmae_jax.config import MODES
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import encode, head_attention
from mrmae_jax.models.layers import LayerNorm
from mrmae_jax.reconstruction import reconstruct
from mrmae_jax.weights import detectron2, loaded_model, readers

PLATFORMS = ("cpu", "cuda", "tpu")  # that an exported model runs on


def load(
  path: str | Path,
  *,
  decoder: bool = True,
  mimic_heads: bool = False,
  learned_positions: bool = False,
  dtype: str = "float32",
  **hints,
) -> "PretrainedModel":
  """Loads a trained model.

  Args:
    path: the workdir of a run, on disk or in a bucket (gs://BUCKET/RUN); a file of weights in
      ConvMAE's or MAE's names (.safetensors, or .pth with torch installed), as `mrmae convert`
      writes it; a segmentation model in mmsegmentation's names; a detector in detectron2's names; a
      ViTMAE folder of transformers; or a vision tower of BEiT, DINO, DINOv2 or CLIP.
    decoder: load the decoder too, if there is one; `reconstruct` needs it.
    mimic_heads: load the mimic heads of a run too.
    learned_positions: keep the position table as a parameter even if it is the sine-cosine one.
    dtype: of the computation, "float32" or "bfloat16". Parameters and results are float32.
    **hints: facts for files that do not tell: num_heads, decoder_heads, grid (rows, columns of
      tokens in training), mean and std of the input (one number per channel, of pixels in [0, 1]);
      weights, the one to take of several networks in a file, e.g. "ema"; levels, the four blocks
      of a ViT, from 0, that segmentation reads.

  Returns:
    The model, ready to use. Its `report` lists what was loaded and what was not.

  Raises:
    WeightsError: there is nothing, it is another kind of model, or it is damaged or incomplete.
  """
  return PretrainedModel(
    readers.read_model(
      path,
      decoder=decoder,
      mimic_heads=mimic_heads,
      learned_positions=learned_positions,
      dtype=dtype,
      **hints,
    )
  )


def as_array(images, channels: int):
  """Returns a batch of images as an array of numpy or jax; shape, type and range are not checked.

  Args:
    images: an array of numpy, jax or torch; or a list of such arrays or of Pillow's images, all of
      one size.
    channels: number of channels that Pillow's images are converted to.

  Raises:
    ValueError: it is something else, or of several sizes.
  """
  if isinstance(images, (np.ndarray, jax.Array)):
    return images
  if isinstance(images, Image.Image):
    raise ValueError("one Pillow image given; expected a batch: put it into a list, [image]")
  if hasattr(images, "detach"):  # torch
    images = images.detach().cpu()
  elif isinstance(images, (list, tuple)):
    images = [_list_element(image, channels) for image in images]
    if len(shapes := dict.fromkeys(np.shape(image) for image in images)) > 1:
      sizes = ", ".join(map(str, list(shapes)[:3]))
      raise ValueError(f"images of several shapes given: {sizes}; resize them to one size")
  try:
    array = np.asarray(images)
  except (TypeError, ValueError, RuntimeError) as error:
    raise ValueError(
      f"{type(images).__name__} given; expected images as an array ({error})"
    ) from None
  if array.dtype.kind in "OSU":
    raise ValueError(
      f"{type(images).__name__} given; expected an array [B, H, W, C] or a list of images: open "
      "files with PIL.Image.open and resize them, or use mrmae features, which reads files"
    )
  return array


def _list_element(image, channels: int):
  """Returns an image of a list as an array; what is not an image stays as it is."""
  if not isinstance(image, Image.Image):
    return as_array(image, channels) if hasattr(image, "shape") else image
  mode = {1: "L", 3: "RGB"}.get(channels)
  if mode is None:
    raise ValueError(f"a Pillow image given; the model takes {channels} channels: give arrays")
  if image.mode[0] in "IF":
    raise ValueError(
      f"a Pillow image of mode {image.mode!r} given, which has no defined range: give an array"
    )
  array = np.asarray(image.convert(mode))
  return array.reshape(*array.shape[:2], channels)


def _check_shape(shape: tuple[int, ...], patch: int, channels: int) -> None:
  """Raises ValueError unless a shape is that of a batch of images."""
  if len(shape) == 4 and shape[3] == channels and all(shape):
    if not any(side % patch for side in shape[1:3]):
      return
  hint = ""
  if len(shape) == 3:
    hint = "; of one image make a batch: images[None]"
  elif len(shape) == 4 and shape[1] == channels != shape[3]:
    hint = "; put the channels last: images.transpose(0, 2, 3, 1), in torch permute"
  raise ValueError(
    f"images of shape {tuple(shape)} given; expected [B, H, W, {channels}] with B > 0, H and W "
    f"multiples of the token size {patch}{hint}"
  )


def _check_values(images) -> None:
  """Raises ValueError unless images are uint8, or float in [0, 1]."""
  if images.dtype == np.uint8:
    return
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images of type {images.dtype} given; expected uint8, or float in [0, 1]")
  if isinstance(images, jax.core.Tracer):  # inside of a user's jit there are no values
    return
  low, high = float(images.min()), float(images.max())
  if -1e-3 <= low <= high <= 1.001:
    return
  hint = "divide by 255 first" if low >= 0 else "give them as they were before normalization"
  if math.isnan(low + high):
    hint = "some values are not numbers"
  raise ValueError(
    f"float images from {low:g} to {high:g} given; expected [0, 1]: {hint}, the model normalizes "
    "them itself"
  )


def _one_image(image, channels: int) -> np.ndarray:
  """Returns one image of any size as uint8 [H, W, C]; ValueError if it is none."""
  array = np.asarray(as_array(_list_element(image, channels), channels))
  if array.ndim != 3 or array.shape[2] != channels or not array.size:
    raise ValueError(
      f"an image of shape {array.shape} given; expected [H, W, {channels}], and images as an array "
      f"[B, H, W, {channels}] or a list"
    )
  _check_values(array)
  return array if array.dtype == np.uint8 else np.rint(255 * np.clip(array, 0, 1)).astype(np.uint8)


def _check_rule(mode: str, stride, window: tuple[int, int], scales) -> None:
  """Raises ValueError unless images can be looked at in this way."""
  if mode not in MODES:
    raise ValueError(f"mode={mode!r} given; expected {' or '.join(MODES)}")
  if len(stride) != 2 or not all(1 <= step <= side for step, side in zip(stride, window)):
    raise ValueError(
      f"stride={stride} given; expected (rows, columns), each at least 1 and at most the window's "
      f"{window}"
    )
  if not scales or not all(0 < scale <= MAX_SCALE for scale in scales):
    raise ValueError(f"scales={scales} given; expected numbers above 0, at most {MAX_SCALE}")


class PretrainedModel:
  """A trained model that takes images and normalizes them itself.

  Images are arrays [B, H, W, C] of numpy, jax or torch, or a list of images of one size, Pillow's
  too: uint8 in [0, 255] or float in [0, 1]. C is the number of channels
  in training (3: RGB); H and W are multiples of the token size, `encoder.patch_size`. Learned
  position tables are interpolated for images of another grid than that of training. Every shape is
  compiled once.

  Attributes:
    network: modules and parameters (`weights.loaded_model.LoadedModel`).
    report: str() of it lists what was loaded, what is new and what was dropped, both by design.
    class_names: of a fine-tuned model, a segmentation model or a detector, in the order of its
      logits; () where its source does not tell.
  """

  def __init__(self, network: loaded_model.LoadedModel):
    self.network, self.report, self.class_names = network, network.report, network.classes
    self._model = mrmae.Model(network.encoder, network.decoder, (), network.mean, network.std)
    self._params = {}  # grid -> parameters on the device
    self._encode = jax.jit(self._features)
    self._slide = jax.jit(self._window_means, static_argnames="crop")
    self._detect = jax.jit(self._detections, static_argnames="rules")
    self._classify = jax.jit(self._logits)
    self._attend = jax.jit(self._head_attention)
    self._reconstruct = jax.jit(self._reconstructions, static_argnums=(3, 4))

  @property
  def config(self) -> dict[str, Any]:
    """Returns sizes and input statistics of the model.

    Returns:
      A dictionary.

      - "encoder", "decoder": fields of the modules; None without a decoder.
      - "grid": (rows, columns) of tokens in training.
      - "image_size": (height, width) in training.
      - "mean", "std": of the input, one number per channel.
      - "classes": number of classes, of images, pixels or objects; 0 for other models.
    """
    network, classifier = self.network, self.network.params.get("classifier")
    classes = len(classifier["head"]["bias"]) if classifier else 0
    for module in (network.segmenter, network.detector):
      if module is not None:
        classes = module.num_classes
    return {
      "encoder": loaded_model.module_fields(network.encoder),
      "decoder": network.decoder and loaded_model.module_fields(network.decoder),
      "grid": network.grid,
      "image_size": tuple(side * network.encoder.patch_size for side in network.grid),
      "mean": network.mean,
      "std": network.std,
      "classes": classes,
    }

  def encode(self, images) -> dict[str, jax.Array]:
    """Returns features of images, with nothing masked; float32.

    Args:
      images: [B, H, W, C], uint8 or float in [0, 1].

    Returns:
      A dictionary.

      - "tokens" [B, N, D], row by row, N = (H / patch_size) * (W / patch_size). A ConvViT gives its
        last block's output, before fusion and the last norm, which fine-tuning drops too. A ViT
        gives its output after the norm, or after the last block if it was fine-tuned without the
        norm.
      - "pooled" [B, D], the mean of the tokens.
      - "cls" [B, D], if the model has a CLS token.
      - "stage1" [B, H/4, W/4, D1], "stage2" [B, H/8, W/8, D2], the feature maps of a ConvViT.

    Raises:
      ValueError: the images have another shape, type or range.
    """
    return self._encode(*self._prepare(images))

  def attention(self, images) -> jax.Array:
    """Returns the attention of every token in each head of the last block, with nothing masked.

    Args:
      images: [B, H, W, C], uint8 or float in [0, 1].

    Returns:
      float32 [B, heads, T, T]. Rows (queries) sum to 1. T counts the N tokens row by row, after CLS
      where there is one.

    Raises:
      ValueError: the images have another shape, type or range.
    """
    return self._attend(*self._prepare(images))

  def classify(self, images) -> jax.Array:
    """Returns the logits of a fine-tuned model, float32 [B, classes], as `class_names` orders them.

    Args:
      images: [B, H, W, C], uint8 or float in [0, 1].

    Raises:
      WeightsError: the model has no classifier.
      ValueError: the images have another shape, type or range.
    """
    if "classifier" not in self.network.params:
      raise WeightsError(
        f"{self.report.source} holds no classifier (head.weight); give a fine-tuned model, or use "
        "encode"
      )
    return self._classify(*self._prepare(images))

  def segment(
    self,
    images,
    *,
    mode: str = "slide",
    stride: tuple[int, int] | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
  ) -> list[np.ndarray]:
    """Returns the class of every pixel of images, as `class_names` counts them from 0.

    Images have any size. Each one is resized, its aspect kept, until its shorter side is that of
    training, or its longer side four times as long. The averaged logits are resized back. "slide"
    compiles one program for several sizes, "whole" one for each.

    Args:
      images: uint8 or float in [0, 1]: an array [B, H, W, C], or a list of arrays [H, W, C] and
        Pillow's images, each of its own size.
      mode: "slide" looks through windows of the size of training, as published results do; "whole"
        at the whole image at once, with interpolated positions.
      stride: (rows, columns) between windows, in pixels; None: two thirds of a window.
      scales: sizes at which the image is looked at, relative to that of training; probabilities are
        averaged.
      flip: look at mirrored images too.

    Returns:
      uint8 [H, W] for each image, uint16 if there are more than 256 classes.

    Raises:
      WeightsError: the model does not segment.
      ValueError: an image has another shape, type or range, or an argument is not possible.
    """
    if self.network.segmenter is None:
      raise WeightsError(self._problem("holds no decode_head", "segment", "mmsegmentation's"))
    window = self.config["image_size"]
    token = self.network.encoder.patch_size
    rule = segmentation.make_rule(window, token, mode=mode, stride=stride, scales=scales, flip=flip)
    _check_rule(mode, rule.stride, window, scales)
    channels, labels = len(self.network.mean), []
    for image in [images] if isinstance(images, Image.Image) else images:
      image = _one_image(image, channels)
      labels.append(self._segment_image(image, rule))
    return labels

  def detect(self, images, *, min_score: float | None = None) -> list[dict[str, np.ndarray]]:
    """Returns the objects that images show, by descending score.

    Images have any size. Each one is resized, its aspect kept, to fit into the size of training;
    one program serves all of them.

    Args:
      images: uint8 or float in [0, 1]: an array [B, H, W, C], or a list of arrays [H, W, C] and
        Pillow's images, each of its own size.
      min_score: objects have more; None: as the model was trained, usually 0.05.

    Returns:
      A dictionary for each image, in its original pixels.

      - "boxes" float32 [N, 4], (x1, y1, x2, y2).
      - "scores" float32 [N] in [0, 1].
      - "classes" int32 [N], as `class_names` counts them from 0.
      - "masks" bool [N, H, W], unless the model detects boxes alone.

    Raises:
      WeightsError: the model does not detect.
      ValueError: an image has another shape, type or range, or the score is not in [0, 1].
    """
    if self.network.detector is None:
      raise WeightsError(self._problem("holds no roi_heads", "detect", "detectron2's"))
    rules = self.network.rules
    if min_score is not None:
      if not 0 <= min_score <= 1:
        raise ValueError(f"min_score={min_score} given; expected a number from 0 to 1")
      rules = rules._replace(min_score=float(min_score))
    channels = len(self.network.mean)
    return [
      self._detect_in(_one_image(image, channels), rules)
      for image in ([images] if isinstance(images, Image.Image) else images)
    ]

  def reconstruct(
    self, images, mask_ratio: float | None = None, norm_pix: bool | None = None, seed: int = 0
  ) -> dict[str, jax.Array]:
    """Masks patches of images at random and returns their reconstructions.

    Args:
      images: [B, H, W, C], uint8 or float in [0, 1].
      mask_ratio: share of hidden patches, in (0, 1); None: that of pre-training, else MAE's 0.75.
      norm_pix: the decoder predicts pixels normalized per patch; None: as in pre-training, else
        True. The weights behind MAE's own pictures, mae_visualize_*.pth, predict plain pixels and
        do not tell: they need norm_pix=False.
      seed: of the mask. Patches that are visible at a high ratio are visible at a lower one too.

    Returns:
      A dictionary of images, float32 [B, H, W, C] in [0, 1].

      - "original": the images.
      - "masked": hidden patches are gray.
      - "reconstruction": every patch as predicted.
      - "pasted": predictions in the hidden places, the original elsewhere.
      - "reconstruction_blind", "pasted_blind": brightness and contrast of predictions are guessed
        from the visible patches instead of taken from the hidden ones.

    Raises:
      WeightsError: the model has no decoder.
      ValueError: the images have another shape, type or range, or the ratio hides all patches or
        none.
    """
    if self.network.decoder is None:
      raise WeightsError(
        f"{self.report.source} was loaded without a decoder and cannot reconstruct; most published "
        "files hold the encoder alone: give a run's workdir, or a full pre-training checkpoint, as "
        "of MAE the folders facebook/vit-mae-* or the files mae_pretrain_*_full.pth and "
        "mae_visualize_*.pth"
      )
    method = self.network.method
    mask_ratio = method["mask_ratio"] if mask_ratio is None else mask_ratio
    norm_pix = method["norm_pix"] if norm_pix is None else norm_pix
    params, images = self._prepare(images)
    tokens = math.prod(side // self.network.encoder.patch_size for side in images.shape[1:3])
    if not 0 < mask_ratio < 1 or not 0 < int(tokens * (1 - mask_ratio)) < tokens:
      raise ValueError(
        f"mask_ratio={mask_ratio} given; expected a share in (0, 1) that hides some of the "
        f"{tokens} patches, not all"
      )
    return self._reconstruct(params, images, jax.random.key(seed), mask_ratio, norm_pix)

  def export(self, image_size: tuple[int, int], logits: bool) -> jax.export.Exported:
    """Returns `classify` or `encode` as StableHLO, for CPUs, GPUs and TPUs and any batch size.

    Args:
      image_size: (height, width) in pixels, multiples of the token size.
      logits: `classify`, as {"logits": float32 [B, classes]}; False: `encode`.

    Returns:
      (params, images uint8 [B, H, W, C]) -> the dictionary. `params` are those that `export_params`
      gives for this size.
    """
    function = (lambda *args: {"logits": self._logits(*args)}) if logits else self._features
    nested = lambda params, images: function(unflatten_dict(params, sep="/"), images)
    shapes = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for name, x in self.export_params(image_size).items()
    }
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_size, len(self.network.mean)), np.uint8)
    with target.tracing_for(target.PORTABLE):
      return jax.export.export(jax.jit(nested), platforms=PLATFORMS)(shapes, images)

  def export_params(self, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns the parameters for images of (height, width), {path joined by "/": array}."""
    grid = tuple(side // self.network.encoder.patch_size for side in image_size)
    params = loaded_model.params_at(self.network, grid)
    unused = ("segmenter", "detector", "batch_stats")
    return flatten_dict({name: x for name, x in params.items() if name not in unused}, sep="/")

  def _prepare(self, images):
    """Checks images; returns the parameters for their grid, and the images."""
    patch, channels = self.network.encoder.patch_size, len(self.network.mean)
    images = as_array(images, channels)
    _check_shape(images.shape, patch, channels)
    _check_values(images)
    return self._params_at((images.shape[1] // patch, images.shape[2] // patch)), images

  def _params_at(self, grid: tuple[int, int]):
    """Returns the parameters for a grid on the device, where grids share what is not a table."""
    own = self.network.params
    with jax.ensure_compile_time_eval():  # inside of a user's jit too these are arrays
      if not self._params:
        self._params[self.network.grid] = jax.device_put(own)
      if grid not in self._params:
        placed = self._params[self.network.grid]
        resized = loaded_model.params_at(self.network, grid)
        place = lambda new, old, there: there if new is old else jax.device_put(new)
        self._params[grid] = jax.tree.map(place, resized, own, placed)
    return self._params[grid]

  def _problem(self, lack: str, command: str, owner: str) -> str:
    """Returns why the model cannot do what another kind of model can.

    Args:
      lack: what is missing, as a message for people.
      command: that trains the other kind.
      owner: of the names in which it is read.
    """
    source, advice = self.report.source, f"a run of mrmae {command}"
    if "classifier" not in self.network.params:
      return f"{source} {lack}; give {advice}, or a file in {owner} names"
    kernel = self.network.params["classifier"]["head"]["kernel"]
    return (
      f"{source} holds a classifier (head {list(kernel.shape[::-1])}) and "
      f"{lack.removeprefix('holds ')}; give {advice}, a file in {owner} names, or use classify"
    )

  def _segment_image(self, image, rule: segmentation.Rule) -> np.ndarray:
    """Returns the class of every pixel of an image uint8 [H, W, C]."""
    patch = self.network.encoder.patch_size

    def network(view):
      window = rule.window(view.size)
      params = self._params_at(tuple(side // patch for side in window))
      return self._slide(params, view.pixels, view.starts, view.count, crop=window)

    views = segmentation.make_views(image, self.network.mean, rule)
    return segmentation.predict(network, views, image.shape[:2])

  def _window_means(self, params, pixels, starts, count, crop):
    variables = {
      "params": {"encoder": params["encoder"], **params["segmenter"]},
      "batch_stats": params["batch_stats"],
    }

    def network(windows):
      return self.network.segmenter.apply(variables, self._normalize(windows))[0]

    return segmentation.slide(network, pixels, starts, count, crop)

  def _detect_in(self, image: np.ndarray, rules: detection.Rules) -> dict[str, np.ndarray]:
    """Returns the objects in an image uint8 [H, W, C]."""
    from mrmae_jax.data.detection import fit, pad_image  # brings grain, which no other model needs

    window, size = self.config["image_size"], image.shape[:2]
    row = pad_image(fit(size, window).image(image), window)
    params, args = self._params_at(self.network.grid), (row["image"], row["size"], self._anchors)
    detections, masks = self._detect(params, *args, rules=rules)
    predicted = jax.device_get(detections._asdict() | ({} if masks is None else {"masks": masks}))
    found = detection.in_original(
      jax.tree.map(lambda x: x[0], predicted), tuple(map(int, row["size"])), size
    )
    if "masks" in found:
      masks = np.zeros((len(found["boxes"]), *size), bool)
      for mask, pixels in zip(masks, detection.paste_masks(found, size)):
        mask[:] = pixels
      found["masks"] = masks
    return found | {"boxes": found["boxes"].astype(np.float32)}

  @functools.cached_property
  def _anchors(self) -> list[jax.Array]:
    """The anchors of a detector, on the device: 261,888 for 1024 x 1024 pixels."""
    window = self.config["image_size"]
    return jax.device_put(detection.make_anchors(self.network.detector, window, self.network.rules))

  def _detections(self, params, image, size, anchors, rules):
    pixels = detection.hide_padding(self._normalize(image[None]), size[None])
    args = (pixels, size[None], anchors, rules)
    variables = detectron2.join_variables(params)
    return self.network.detector.apply(variables, *args, method=detection.detect_objects)

  def _normalize(self, images):
    return mrmae.normalize(images, self.network.mean, self.network.std)

  def _features(self, params, images):
    normed = None if self.network.has_norm else False
    return encode(self.network.encoder, params["encoder"], self._normalize(images), normed)

  def _head_attention(self, params, images):
    return head_attention(self.network.encoder, params["encoder"], self._normalize(images))

  def _logits(self, params, images):
    pixels, classifier = self._normalize(images), params["classifier"]
    encoder = self.network.encoder
    if "fc_norm" in classifier:  # MAE's and ConvMAE's --global_pool
      x = encode(encoder, params["encoder"], pixels, normed=False)["pooled"]
      x = LayerNorm(encoder.eps, jnp.float32).apply({"params": classifier["fc_norm"]}, x)
    else:  # CLS; in a ConvViT without one, the first patch, as in the reference
      x, _ = encoder.apply({"params": params["encoder"]}, pixels)
      x = x[:, 0].astype(jnp.float32)
    return x @ classifier["head"]["kernel"] + classifier["head"]["bias"]

  def _reconstructions(self, params, images, key, mask_ratio, norm_pix):
    rows, columns = (side // self.network.encoder.patch_size for side in images.shape[1:3])
    noise = jax.random.uniform(key, (len(images), rows * columns))
    mask = mrmae.sample_mask(noise, mask_ratio)
    return reconstruct(self._model, params, images, mask, norm_pix)
