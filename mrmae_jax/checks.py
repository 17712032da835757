"""Checks a configuration without devices, data or teachers: each value, then keys with each other.

`preflight.check` adds what has to be opened. A check of a task is a function in `CHECKS`, with the
keys that it computes with: it runs if the values of these are right. Nothing here imports jax.
"""

import difflib
import math
from typing import Callable

from ml_collections import ConfigDict

from mrmae_jax.config import (
  TOWER,
  find_keys,
  find_mistake,
  flatten,
  require_sections,
  teacher_sections,
  token_size,
)
from mrmae_jax.errors import ConfigError

MAX_TOKENS = 2**16  # of an image
MAX_SCALE = 8  # of an image at which segmentation looks


class Mistakes:
  """Collects the mistakes of a configuration, so that all of them are reported at once."""

  def __init__(self):
    self._messages, self._unusable = [], []

  def need(self, is_right, message: str, *keys: str) -> bool:
    """Notes `message`, and that the values of `keys` cannot be used, unless `is_right`."""
    if not is_right:
      if message not in self._messages:  # both splits of a data set have the same one
        self._messages.append(message)
      self._unusable += keys
    return bool(is_right)

  def usable(self, *names: str) -> bool:
    """Returns whether the values of these keys and sections can be used."""
    inside = lambda key, name: f"{key}.".startswith(f"{name}.")
    return not any(inside(key, name) for key in self._unusable for name in names)

  def report(self) -> None:
    """Raises a ConfigError with all messages, one per line, if there are any."""
    if self._messages:
      raise ConfigError(*self._messages)


def find_mistakes(config: ConfigDict) -> Mistakes:
  """Returns the mistakes of a configuration.

  Raises:
    ConfigError: the configuration lacks whole sections, so that the rest cannot be checked.
  """
  require_sections(config)
  mistakes = Mistakes()
  _check_values(config, mistakes.need)
  for function, keys in (CHECKS[""] | CHECKS.get(config.task, {})).items():
    if mistakes.usable(*keys):
      function(config, mistakes.need)
  return mistakes


def _check_values(config, need) -> None:
  """Checks each value for itself; a configuration file can write anything anywhere."""
  keys, values = find_keys(config), flatten(config)
  for name in sorted(values.keys() - keys.keys()):
    near = difflib.get_close_matches(name, keys, 1)
    hint = f"; did you mean config.{near[0]}?" if near else ""
    need(False, f"config.{name} is not a key of the task {config.task!r}{hint}")
  missing = [name for name in keys if name not in values]
  need(
    not missing,
    f"not in the configuration: config.{', config.'.join(missing[:5])}"
    f"{', ...' if missing[5:] else ''}; start from {config.task}() of mrmae_jax.config",
    *missing,
  )
  for name, key in keys.items():
    if name in values and (mistake := find_mistake(values[name], key)):
      text = repr(values[name])
      text = text if len(text) < 100 else f"{text[:80]}..."
      need(False, f"config.{name}={text} {mistake}", name)


def _check_warmup(config, need) -> None:
  warmup, epochs = config.optim.warmup_epochs, config.epochs
  need(
    warmup <= epochs,
    f"config.optim.warmup_epochs={warmup} is longer than config.epochs={epochs}",
  )


def _check_ranges(config, need) -> None:
  for key, limits in (("crop_scale", "0 < low <= high <= 1"), ("scale", "0 < low <= high")):
    if key in config.data:
      low, high = config.data[key]
      need(low <= high, f"config.data.{key}={(low, high)} must satisfy {limits}")


def _check_keep_best(config, need) -> None:
  need(
    not config.keep_best or config.keep_best.split("/")[0] in config.evals,
    f"config.keep_best={config.keep_best!r} is not a result of an evaluation, e.g. knn/accuracy; "
    f"config.evals has {', '.join(config.evals) or 'none'}",
  )


def _check_channels(config, need) -> None:
  data = config.data
  need(
    len(data.mean) == len(data.std) > 0,
    f"config.data.mean={data.mean} and std={data.std} must hold a number each for every channel "
    "of the images, std > 0",
    "data.mean",
  )
  if len(data.mean) == 3:
    return
  need(
    not data.get("randaug"),
    f"config.data.randaug={data.get('randaug')!r} is for RGB; leave it empty for images of "
    f"{len(data.mean)} channels (config.data.mean): --config.data.randaug=",
  )
  need(
    not data.get("photometric"),
    f"config.data.photometric=True is for RGB; images of {len(data.mean)} channels "
    "(config.data.mean) need --config.data.photometric=False",
  )


def _check_encoder(config, need) -> None:
  """Checks the encoder, and that images divide into its tokens."""
  fields = config.encoder
  is_vit = fields.name == "vit"
  _check_width("encoder", fields.dim if is_vit else fields.embed_dims[2], fields.num_heads, need)
  depth, fused = fields.depth if is_vit else fields.depths[2], tuple(fields.fuse_layers)
  need(
    len(set(fused)) == len(fused) and all(0 <= i < depth - 1 for i in fused),
    f"config.encoder.fuse_layers={fused} must be different blocks from 0 to {depth - 2}; "
    f"the last, {depth - 1}, always counts",
  )
  if is_vit:
    need(
      fields.positions == "table" or not fields.learned_positions,
      f"config.encoder.positions={fields.positions!r} leaves no position table to train; add "
      "--config.encoder.learned_positions=False",
    )
    need(
      not fields.relative_positions or not fields.num_registers,
      f"config.encoder.num_registers={fields.num_registers}: registers have no place in a table of "
      "relative_positions; leave them at 0",
    )
  patch, (height, width) = token_size(config), config.image_size
  tokens = height // patch * (width // patch)
  nearest = tuple(max(1, round(side / patch)) * patch for side in (height, width))
  need(
    tokens <= MAX_TOKENS,
    f"config.image_size=({height}, {width}) makes {tokens} tokens of {patch} pixels, at most "
    f"{MAX_TOKENS} are possible",
    "image_size",
  ) and need(
    height % patch == 0 and width % patch == 0,
    f"config.image_size=({height}, {width}) is not a multiple of the token size {patch}; nearest: "
    f"{nearest}",
    "image_size",
  )


def _check_width(section: str, width: int, heads: int, need) -> None:
  need(
    width % 4 == 0 and width % heads == 0,
    f"config.{section}: width {width} must be a multiple of 4 and of num_heads={heads}",
  )


def _check_no_drop_path(config, need) -> None:
  need(
    not config.encoder.drop_path,
    f"config.encoder.drop_path={config.encoder.drop_path} is for fine-tuning; pre-training drops "
    "nothing, as in the published recipes: leave it at 0",
  )


def _check_masks(config, need) -> None:
  """Checks the masks and the decoder of pre-training."""
  method = config.method
  tokens = math.prod(side // token_size(config) for side in config.image_size)
  visible = int(tokens * (1 - method.mask_ratio)) if 0 < method.mask_ratio < 1 else 0
  need(
    0 < visible < tokens,
    f"config.method.mask_ratio={method.mask_ratio} leaves {visible} of {tokens} tokens visible; "
    "it must lie between 0 and 1 and leave some tokens on both sides",
  ) and need(
    1 <= method.complementary_masks <= tokens // visible,
    f"config.method.complementary_masks={method.complementary_masks} sets of {visible} visible "
    f"tokens do not fit {tokens}; it must be a whole number from 1 to {tokens // visible}",
  )
  _check_width("decoder", config.decoder.dim, config.decoder.num_heads, need)


def _has_cls(config) -> bool:
  return config.encoder.name == "vit" or config.encoder.cls_token


def _check_teachers(config, need) -> None:
  """Checks which teachers there are, and how they are used; `preflight` reads their files."""
  sections, method = teacher_sections(config), config.method
  need(
    config.teacher.name is not None or config.teacher.path is not None,
    "config.teacher is not set; give config.teacher.name=clip_vit_b16 (or another of "
    "weights.hub.PRESETS), config.teacher.path=FOLDER, or config.teacher.path= (empty) to train "
    "without a teacher",
  )
  need(
    sections or method.pixel_weight,
    "config.method.pixel_weight=0 without a teacher leaves nothing to learn",
  )
  need(
    "teacher" in sections or not sections,
    "config.extra_teachers come after config.teacher, which is not set",
  )
  need(
    "teacher" in sections or method.masking != "focused",
    "config.method.masking='focused' needs config.teacher, by whose attention the visible tokens "
    "are drawn; use 'random'",
  )
  for key, options in sections.items():
    need(
      options.salient_share == 1 or options.tokens != "masked",
      f"config.{key}.salient_share={options.salient_share} concerns visible tokens; leave it at 1 "
      "with tokens='masked'",
      f"{key}.salient_share",
    )
    need(
      _has_cls(config) or options.tokens != "visible+cls",
      f"config.{key}.tokens='visible+cls' needs a student with a CLS token: "
      "config.encoder.cls_token=True",
      f"{key}.tokens",
    )


def _check_start(config, need) -> None:
  need(
    config.init_from is not None,
    "config.init_from is not set; give a workdir or a file of weights, or config.init_from= "
    "(empty) to start from random weights",
  )


def _check_pool(config, need) -> None:
  need(
    config.pool != "cls" or _has_cls(config),
    "config.pool='cls' needs an encoder with a CLS token: config.encoder.cls_token=True",
  )


def _check_mix(config, need) -> None:
  images, groups = config.batch_size // config.optim.accum_steps, config.mix.groups
  need(
    images % groups == 0,
    f"config.mix.groups={groups} does not divide the {images} images of a micro-batch",
  )


def _check_grid(config, need) -> None:
  optim = config.optim
  need(len(optim.grid), f"config.optim.grid={tuple(optim.grid)} must hold one or more factors > 0")
  for key, off in (("layer_decay", 1.0), ("clip_norm", 0.0), ("ema_decay", 0.0)):
    need(
      optim[key] == off,
      f"config.optim.{key}={optim[key]} has no meaning for a probe; leave it at {off:g}",
    )


def _check_heads(config, need) -> None:
  """Checks the heads of segmentation, and that BatchNorm has a batch."""
  heads, fields, levels = config.upernet, config.encoder, tuple(config.upernet.levels)
  need(
    len(heads.pool_scales), "config.upernet.pool_scales=() must hold one or more sides, e.g. (1, 2)"
  )
  if fields.name == "convvit":
    need(
      not levels,
      f"config.upernet.levels={levels} are blocks of a ViT; the levels of a convvit are its "
      "stages: leave it empty",
    )
  else:
    need(
      not levels or len(levels) == 4 and max(levels) < fields.depth,
      f"config.upernet.levels={levels} must be four of the blocks 0 to {fields.depth - 1}, or () "
      "for the usual ones",
    )
  micro = config.batch_size // config.optim.accum_steps
  need(
    micro >= 2,
    f"config.batch_size={config.batch_size} with optim.accum_steps={config.optim.accum_steps} "
    f"makes micro-batches of {micro}; BatchNorm needs 2 images or more in each",
  )
  least, grid = 3 if fields.name == "convvit" else 2, token_size(config)
  need(
    min(config.image_size) >= least * grid,
    f"config.image_size={tuple(config.image_size)} is smaller than {least} x {least} tokens of "
    f"{grid} pixels, which the deepest level of the head needs",
  )


def _check_detector(config, need) -> None:
  """Checks the backbone, the pyramid and the heads of detection."""
  rcnn, fields, patch = config.rcnn, config.encoder, token_size(config)
  is_vit = fields.name == "vit"
  depth, blocks = fields.depth if is_vit else fields.depths[2], tuple(rcnn.global_blocks)
  need(
    len(set(blocks)) == len(blocks) and all(0 <= i < depth for i in blocks),
    f"config.rcnn.global_blocks={blocks} must be different blocks from 0 to {depth - 1}, or () for "
    "the last of each quarter",
  )
  need(
    rcnn.window or not blocks,
    f"config.rcnn.global_blocks={blocks} without windows (config.rcnn.window=0): all blocks are "
    "global; leave it empty",
  )
  need(
    not fields.relative_positions and not (fields.num_registers if is_vit else fields.cls_token),
    "config.encoder: detection has tables of distances of its own (config.rcnn.distances), and "
    "neither relative_positions nor registers nor the CLS token of a convvit: set these to False "
    "and 0",
  )
  need(
    rcnn.pyramid == "simple" or not is_vit,
    "config.rcnn.pyramid='fpn' reads the stages of a convvit; a vit has config.rcnn.pyramid=simple",
  )
  need(patch % 4 == 0, f"a token of {patch} pixels has no level of a quarter; take a multiple of 4")
  unit = 2 * patch
  nearest = tuple(max(4, round(side / unit)) * unit if unit else 0 for side in config.image_size)
  need(
    all(side % unit == 0 and side >= 2 * unit for side in config.image_size),
    f"config.image_size={tuple(config.image_size)} must hold multiples of two tokens, {unit} "
    f"pixels, at least {2 * unit}; nearest: {nearest}",
    "image_size",
  )
  low, high = rcnn.anchor_iou
  need(low <= high, f"config.rcnn.anchor_iou={(low, high)} must satisfy low <= high")


def _check_miou(config, need) -> None:
  """Checks how the evaluator of segmentation looks at images."""
  if "miou" not in config.evals:
    return
  stride, window = tuple(config.evals.miou.stride), tuple(config.image_size)
  need(
    not stride or len(stride) == 2 and all(a <= b for a, b in zip(stride, window)),
    f"config.evals.miou.stride={stride} must be (rows, columns), each at most the window's "
    f"{window}, or () for two thirds of it",
  )
  scales = tuple(config.evals.miou.scales)
  need(
    scales and max(scales) <= MAX_SCALE,
    f"config.evals.miou.scales={scales} must hold numbers above 0 and at most {MAX_SCALE}",
  )


def _check_distill(config, need) -> None:
  """Checks the student and the views of self-distillation."""
  need(
    config.encoder.name == "vit",
    f"config.encoder.name={config.encoder.name!r}: a teacher is a plain ViT; make the section with "
    "encoder('vit', SIZE) of mrmae_jax.config",
  )
  need(
    len(config.data.mean) == 3,
    f"config.data.mean={config.data.mean}: self-distillation is for RGB, three channels",
  )
  need(config.batch_size >= 2, f"config.batch_size={config.batch_size} must be 2 or more")
  need(
    config.optim.accum_steps == 1,
    f"config.optim.accum_steps={config.optim.accum_steps} must be 1: the projection head "
    "normalizes over the batch",
  )
  fields = config.encoder
  need(
    fields.learned_positions and not fields.fuse_layers,
    f"config.encoder.learned_positions={fields.learned_positions} and "
    f"fuse_layers={tuple(fields.fuse_layers)} must be True and (), as in Hugging Face's ViT",
  )
  changed = [name for name, key in TOWER.items() if fields[name] != key.default]
  need(
    not changed,
    f"config.encoder.{', '.join(changed)}: leave these as they are, as in Hugging Face's ViT",
  )
  patches = math.prod(side // token_size(config) for side in config.image_size)
  need(
    int(patches * (1 - (1 - config.distill.visible))) >= 1,  # as `mrmae.sample_mask` rounds
    f"config.distill.visible={config.distill.visible} must leave one of {patches} patches",
  )


CHECKS: dict[str, dict[Callable, tuple[str, ...]]] = {
  "": {  # of every task
    _check_warmup: ("optim.warmup_epochs", "epochs"),
    _check_ranges: ("data.crop_scale", "data.scale"),
    _check_keep_best: ("keep_best",),
    _check_channels: ("data.mean", "data.std", "data.randaug", "data.photometric"),
    _check_encoder: ("encoder", "image_size"),
  },
  "pretrain": {
    _check_masks: ("encoder", "image_size", "method", "decoder"),
    _check_no_drop_path: ("encoder",),
    _check_teachers: ("teacher", "extra_teachers", "method", "encoder"),
  },
  "finetune": {
    _check_start: ("init_from",),
    _check_pool: ("pool", "encoder"),
    _check_mix: ("batch_size", "optim.accum_steps", "mix"),
  },
  "probe": {
    _check_start: ("init_from",),
    _check_pool: ("pool", "encoder"),
    _check_grid: ("optim",),
  },
  "segment": {
    _check_start: ("init_from",),
    _check_heads: ("encoder", "upernet", "batch_size", "optim.accum_steps", "image_size"),
    _check_miou: ("evals", "image_size"),
  },
  "detect": {
    _check_start: ("init_from",),
    _check_detector: ("encoder", "rcnn", "image_size"),
  },
  "self_distill": {
    _check_no_drop_path: ("encoder",),
    _check_distill: (
      "encoder",
      "image_size",
      "data.mean",
      "batch_size",
      "optim.accum_steps",
      "distill",
    ),
  },
}
