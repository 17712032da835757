"""The configuration of a run: every key with its default and meaning, and one pass that reports every mistake.

Files in `configs/` start from `pretrain()` and override. Reading and changing a configuration does not import jax.
"""

import math

import ml_collections
from ml_collections.config_dict import placeholder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CONVVIT = {  # fields of models.convvit.ConvViT. B: Alpha-VL/ConvMAE; L: mx-mark/DMJD; S, H: public forks only
    "small": dict(embed_dims=(128, 256, 384), depths=(2, 2, 11), num_heads=6, mlp_ratios=(4.0, 4.0, 4.0)),
    "base": dict(embed_dims=(256, 384, 768), depths=(2, 2, 11), num_heads=12, mlp_ratios=(4.0, 4.0, 4.0)),
    "large": dict(embed_dims=(384, 768, 1024), depths=(2, 2, 23), num_heads=16, mlp_ratios=(8.0, 8.0, 4.0)),
    "huge": dict(embed_dims=(768, 1024, 1280), depths=(2, 2, 31), num_heads=16, mlp_ratios=(8.0, 8.0, 4.0)),
}
VIT = {  # fields of models.vit.ViT (Dosovitskiy et al. 2021; S as in DeiT; H/14 as in MAE)
    "small": dict(patch_size=16, dim=384, depth=12, num_heads=6, mlp_dim=1536),
    "base": dict(patch_size=16, dim=768, depth=12, num_heads=12, mlp_dim=3072),
    "large": dict(patch_size=16, dim=1024, depth=24, num_heads=16, mlp_dim=4096),
    "huge": dict(patch_size=14, dim=1280, depth=32, num_heads=16, mlp_dim=5120),
}


def standard_size(sizes: dict[str, dict], name: str) -> dict:
  """The entry of CONVVIT or VIT; ValueError for a name that is not there."""
  if name not in sizes:
    raise ValueError(f"size {name!r} is not one of {', '.join(sizes)}")
  return sizes[name]


class ConfigError(ValueError):
  """Mistakes in a configuration, one per line."""


def pretrain() -> ml_collections.ConfigDict:
  """Pre-training with the published MAE/ConvMAE recipe at 224 px; ConvViT-B, no teacher chosen yet."""
  c = ml_collections.ConfigDict()
  c.task = "pretrain"
  c.seed = 0                            # of initialisation, data order, augmentation and masks
  c.image_size = (224, 224)             # (height, width) in pixels, multiples of the token size
  c.batch_size = 1024                   # images per update, over all devices
  c.epochs = 400.0                      # passes over the training images; fractions allowed
  c.dtype = "bfloat16"                  # of the student's computation; parameters, norms and losses stay float32

  c.encoder = ml_collections.ConfigDict(dict(
      name="convvit",                   # "convvit", or "vit" (then with the keys of VIT above)
      patch_sizes=(4, 2, 2),            # strides of the three embeddings; their product is the token size
      sparse=True,                      # convolutional stages on the visible blocks only: same numbers, a quarter of the work
      **CONVVIT["base"]))
  c.decoder = ml_collections.ConfigDict(dict(dim=512, depth=8, num_heads=16))

  c.method = ml_collections.ConfigDict()
  c.method.mask_ratio = 0.75            # share of the tokens hidden from the encoder
  c.method.norm_pix = True              # reconstruct pixels normalised per patch
  c.method.pixel_weight = 1.0           # of the reconstruction loss
  c.method.mimic_weight = 1.0           # of the mimic loss; the paper's value is not published, both terms start near 1

  c.teacher = ml_collections.ConfigDict()
  c.teacher.path = placeholder(str)     # Hugging Face folder of a CLIP or DINO tower; "" for none (ConvMAE, MAE)
  c.teacher.dtype = "bfloat16"          # of the teacher's computation

  c.data = ml_collections.ConfigDict()
  c.data.source = placeholder(str)      # "digits", "folder:/path/to/images" or "tfds:name"
  c.data.train_split = "train"          # tfds split, or sub-folder
  c.data.eval_split = "validation"      # for the evaluators; likewise
  c.data.data_dir = ""                  # where tfds looks for prepared data sets; "": its own default
  c.data.holdout_every = 10             # without an eval split, every k-th image is held out of training; 0: none
  c.data.crop_scale = (0.2, 1.0)        # area range of RandomResizedCrop
  c.data.flip = True                    # horizontal flips
  c.data.eval_crop = 0.875              # central share of the resized image that evaluators see
  c.data.mean = IMAGENET_MEAN           # normalisation of the student's input, per channel, for pixels in [0, 1]
  c.data.std = IMAGENET_STD
  c.data.workers = 0                    # decoding processes per host; 0: threads of the main process

  c.optim = ml_collections.ConfigDict()
  c.optim.blr = 1.5e-4                  # base learning rate; the peak is blr * batch_size / 256
  c.optim.min_lr = 0.0                  # absolute rate at the end of the cosine
  c.optim.warmup_epochs = 40.0          # linear from 0
  c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.95, 1e-8
  c.optim.weight_decay = 0.05           # on everything but biases and norms
  c.optim.accum_steps = 1               # micro-batches per update, for batches that do not fit

  c.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1))  # devices per axis; -1: all that are left

  c.log_every = 50                      # steps
  c.eval_every = 20.0                   # epochs; besides, before the first and after the last step
  c.checkpoint_every = 5.0              # epochs; besides, after the last step
  c.keep_checkpoints = 2                # newest ones that stay
  c.evals = ml_collections.ConfigDict(dict(
      # pictures of the first held-out images
      reconstruct=ml_collections.ConfigDict(dict(images=8)),
      # k nearest neighbours of frozen features (caron2021dino: k = 20, temperature 0.07); bank: most training images used
      knn=ml_collections.ConfigDict(dict(k=20, temperature=0.07, batch_size=256, bank=50_000))))
  return c


def validate(config: ml_collections.ConfigDict, num_devices: int) -> None:
  """Checks a configuration before anything is loaded or compiled.

  Args:
    config: in the shape of `pretrain()`.
    num_devices: that the run will use, over all hosts.

  Raises:
    ConfigError: all problems, one per line: what was given, what was expected, what to do.
  """
  problems = []

  def need(ok, message):
    if not ok:
      problems.append(message)
    return bool(ok)

  def positive(*names, zero=False):
    for name in names:
      value = config
      for part in name.split("."):
        value = value[part]
      ok = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (zero and value == 0))
      need(ok, f"config.{name}={value} must be a finite number {'>= 0' if zero else '> 0'}")

  pairs = [need(len(value) == 2, f"config.{name}={tuple(value)} must hold two numbers, e.g. {example}") for name, value, example in
           (("image_size", config.image_size, "(224, 224)"), ("data.crop_scale", config.data.crop_scale, "(0.2, 1.0)"))]
  if not all(pairs):
    raise ConfigError("\n".join(problems))  # nothing below can be computed
  positive("batch_size", "epochs", "optim.blr", "optim.eps", "optim.accum_steps", "log_every", "eval_every",
           "checkpoint_every", "keep_checkpoints", "data.eval_crop")
  positive("optim.min_lr", "optim.warmup_epochs", "optim.weight_decay", "data.holdout_every", "data.workers",
           "method.pixel_weight", "method.mimic_weight", zero=True)
  for name in ("b1", "b2"):
    need(0 <= config.optim[name] < 1, f"config.optim.{name}={config.optim[name]} must lie in [0, 1)")
  need(config.optim.warmup_epochs <= config.epochs,
       f"config.optim.warmup_epochs={config.optim.warmup_epochs} is longer than config.epochs={config.epochs}")
  need(config.data.holdout_every != 1, "config.data.holdout_every=1 would hold out every image; use 0 for none, or 2 and more")
  for name in ("dtype", "teacher.dtype"):
    value = config.dtype if name == "dtype" else config.teacher.dtype
    need(value in ("float32", "bfloat16"), f"config.{name}={value!r} must be 'float32' or 'bfloat16'")
  low, high = config.data.crop_scale
  need(0 < low <= high <= 1, f"config.data.crop_scale={config.data.crop_scale} must satisfy 0 < low <= high <= 1")
  need(config.data.eval_crop <= 1, f"config.data.eval_crop={config.data.eval_crop} must be at most 1")
  need(len(config.data.mean) == 3 == len(config.data.std) and min(config.data.std) > 0,
       f"config.data.mean={config.data.mean} and std={config.data.std} must hold 3 numbers each, std > 0")

  _validate_model(config, need)
  _validate_devices(config, num_devices, need)
  _validate_inputs(config, need)
  if problems:
    raise ConfigError("\n".join(problems))


def token_size(config: ml_collections.ConfigDict) -> int:
  """Side of a token in pixels."""
  return config.encoder.patch_size if config.encoder.name == "vit" else math.prod(config.encoder.patch_sizes)


def _validate_model(config, need):
  encoder = config.encoder
  if not need(encoder.name in ("convvit", "vit"), f"config.encoder.name={encoder.name!r} must be 'convvit' or 'vit'"):
    return
  wanted = {"name", *VIT["base"]} if encoder.name == "vit" else {"name", "patch_sizes", "sparse", *CONVVIT["base"]}
  if not need(set(encoder) == wanted, f"config.encoder has keys {sorted(encoder)}; a {encoder.name} takes {sorted(wanted)}"):
    return
  patch, (height, width) = token_size(config), config.image_size
  if need(height > 0 and width > 0 and height % patch == 0 and width % patch == 0,
          f"config.image_size=({height}, {width}) is not a multiple of the token size {patch}; nearest: "
          f"({max(1, round(height / patch)) * patch}, {max(1, round(width / patch)) * patch})"):
    tokens = (height // patch) * (width // patch)
    visible = int(tokens * (1 - config.method.mask_ratio)) if 0 < config.method.mask_ratio < 1 else 0
    need(0 < visible < tokens, f"config.method.mask_ratio={config.method.mask_ratio} leaves {visible} of {tokens} tokens "
         "visible; it must lie between 0 and 1 and leave some tokens on both sides")
  for name, dim, heads in (("encoder", encoder.dim if encoder.name == "vit" else encoder.embed_dims[2], encoder.num_heads),
                           ("decoder", config.decoder.dim, config.decoder.num_heads)):
    need(dim % 4 == 0 and dim % heads == 0,
         f"config.{name}: width {dim} must be a multiple of 4 and of num_heads={heads}")


def _validate_devices(config, num_devices, need):
  mesh, batch, accum = config.mesh, config.batch_size, config.optim.accum_steps
  sizes = [mesh.data, mesh.fsdp]
  if -1 in sizes:
    rest = -math.prod(sizes)
    ok = sizes.count(-1) == 1 and rest > 0 and num_devices % rest == 0
  else:
    ok = min(sizes) > 0 and math.prod(sizes) == num_devices
  need(ok, f"config.mesh data={mesh.data} x fsdp={mesh.fsdp} does not fit {num_devices} devices; -1 on one axis takes the rest")
  unit = num_devices * accum
  if batch > 0 and accum > 0:
    below = batch // unit * unit
    need(batch % unit == 0, f"config.batch_size={batch} is not divisible by {num_devices} devices x {accum} accumulation "
         f"steps; nearest: {f'{below} or ' if below else ''}{below + unit}")


def _validate_inputs(config, need):
  """Paths: cheap checks of the data source and the teacher's config.json (weights and images are read later)."""
  from mrmae_jax import data, teachers  # pylint: disable=g-import-not-at-top; keeps the schema free of jax
  if need(config.data.source, "config.data.source is not set; use digits, folder:/path/to/images or tfds:name"):
    try:
      data.open_split(config.data, "train")
    except data.DataError as error:
      need(False, f"config.data: {error}")
  path = config.teacher.path
  if not need(path is not None, "config.teacher.path is not set; give a Hugging Face folder of a CLIP or DINO tower (`hf download "
              "openai/clip-vit-base-patch16 --local-dir DIR`), or \"\" to train without a teacher"):
    return
  if path and config.encoder.name in ("convvit", "vit"):
    try:
      spec = teachers.read_spec(path, tuple(config.image_size), config.teacher.dtype)
    except teachers.WeightsError as error:
      need(False, f"config.teacher.path: {error}")
      return
    grid = tuple(side // token_size(config) for side in config.image_size)
    need(spec.grid == grid, f"config.teacher.path: the teacher's grid of {spec.grid[0]}x{spec.grid[1]} tokens "
         f"({spec.module.patch_size}-pixel patches) does not fit the student's {grid[0]}x{grid[1]} ({token_size(config)}-pixel "
         f"tokens) on {config.image_size[0]}x{config.image_size[1]} images; choose a teacher with {token_size(config)}-pixel patches")
