"""The configuration of a run: every key with its default and meaning, and one pass that reports every mistake.

Files in `configs/` start from `pretrain()` and override. Reading and changing a configuration does not import jax.
"""

import difflib
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Callable, NamedTuple

import ml_collections
from ml_collections.config_dict import placeholder

from mrmae_jax.errors import ConfigError, DataError, WeightsError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CONVVIT = {  # fields of models.convvit.ConvViT. B: Alpha-VL/ConvMAE; L: mx-mark/DMJD; S, H: public forks only
  "small": dict(
    embed_dims=(128, 256, 384), depths=(2, 2, 11), num_heads=6, mlp_ratios=(4.0, 4.0, 4.0)
  ),
  "base": dict(
    embed_dims=(256, 384, 768), depths=(2, 2, 11), num_heads=12, mlp_ratios=(4.0, 4.0, 4.0)
  ),
  "large": dict(
    embed_dims=(384, 768, 1024), depths=(2, 2, 23), num_heads=16, mlp_ratios=(8.0, 8.0, 4.0)
  ),
  "huge": dict(
    embed_dims=(768, 1024, 1280), depths=(2, 2, 31), num_heads=16, mlp_ratios=(8.0, 8.0, 4.0)
  ),
}
VIT = {  # fields of models.vit.ViT (Dosovitskiy et al. 2021; S as in DeiT; H/14 as in MAE)
  "small": dict(patch_size=16, dim=384, depth=12, num_heads=6, mlp_dim=1536),
  "base": dict(patch_size=16, dim=768, depth=12, num_heads=12, mlp_dim=3072),
  "large": dict(patch_size=16, dim=1024, depth=24, num_heads=16, mlp_dim=4096),
  "huge": dict(patch_size=14, dim=1280, depth=32, num_heads=16, mlp_dim=5120),
}

DIMENSIONS = {  # what these fields are
  "name": "kind: convvit or vit",
  "embed_dims": "widths of the three stages",
  "depths": "blocks of each stage",
  "num_heads": "attention heads, which divide the width",
  "mlp_ratios": "hidden width of each stage's MLPs, relative to its width",
  "patch_size": "side of a token in pixels",
  "dim": "width",
  "depth": "blocks",
  "mlp_dim": "hidden width of the MLPs",
}

CHOICES = {  # options that take one of a few words; the first is the default
  "encoder.remat": ("none", "dots", "full"),
  "data.resize": ("pillow", "cv2"),
  "data.on_error": ("raise", "skip"),
  "method.masking": ("random", "focused"),
  "teacher.layer": ("raw", "normed", "proj"),
  "teacher.input_norm": ("teacher", "student"),
  "teacher.tokens": ("visible", "visible+cls", "masked"),
  "teacher.source": ("fused", "last_block"),
  "teacher.head": ("linear", "norm_linear", "mlp"),
  "teacher.target_norm": ("layer_norm", "batch", "l2", "none"),
  "teacher.loss": ("mse", "smooth_l1", "cosine", "l1"),
  "teacher.dtype": ("bfloat16", "float32"),
}


class Rule(NamedTuple):
  """What a number must be: a test, which NaN and infinity do not pass, and the words for it."""

  test: Callable[[float], bool]
  words: str


LARGEST = 1e20  # any number above is a slip
_POSITIVE = Rule(lambda x: 0 < x <= LARGEST, f"be a finite number > 0, at most {LARGEST:g}")
_NOT_NEGATIVE = Rule(lambda x: 0 <= x <= LARGEST, f"be a finite number >= 0, at most {LARGEST:g}")
_SHARE = Rule(lambda x: 0 <= x <= 1, "lie in [0, 1]")
_BELOW_1 = Rule(lambda x: 0 <= x < 1, "lie in [0, 1)")
_PART = Rule(lambda x: 0 < x <= 1, "satisfy 0 < x <= 1")
_ANY = Rule(lambda x: abs(x) <= LARGEST, f"be a finite number, at most {LARGEST:g}")


def _between(smallest: int, largest: int) -> Rule:
  return Rule(lambda x: smallest <= x <= largest, f"be from {smallest} to {largest}")


RULES = {
  name: rule
  for rule, names in (  # of each number; of each one in a tuple
    (
      _POSITIVE,
      "epochs eval_every checkpoint_every optim.blr optim.eps optim.grid encoder.mlp_ratios "
      "method.attention_temperature evals.knn.temperature",
    ),
    (
      _NOT_NEGATIVE,
      "optim.min_lr optim.warmup_epochs optim.weight_decay optim.clip_norm optim.max_spike method.pixel_weight "
      "mix.mixup_alpha mix.cutmix_alpha teacher.weight data.timeout_s hang_s",
    ),
    (
      _SHARE,
      "data.max_skipped data.erase_prob data.mean method.mask_ratio method.attention_mix mix.prob mix.switch_prob",
    ),
    (_BELOW_1, "optim.b1 optim.b2 optim.ema_decay encoder.drop_path mix.smoothing"),
    (_PART, "data.crop_scale data.eval_crop data.std optim.layer_decay teacher.salient_share"),
    (_between(1, 10**9), "log_every keep_checkpoints optim.max_skips"),
    (_between(0, 10**9), "data.holdout_every evals.knn.bank"),
    (_between(1, 2**24), "batch_size"),
    (
      _between(1, 2**17),
      "encoder.embed_dims encoder.dim encoder.mlp_dim decoder.dim evals.knn.batch_size evals.knn.k "
      "evals.accuracy.batch_size",
    ),
    (_between(1, 2**14), "image_size optim.accum_steps mix.groups"),
    (_between(0, 2**14), "teacher.resolution"),
    (
      _between(1, 1000),
      "encoder.depths encoder.depth encoder.num_heads encoder.patch_sizes encoder.patch_size decoder.depth "
      "decoder.num_heads teacher.last_k evals.reconstruct.images",
    ),
    (_between(0, 1000), "encoder.fuse_layers teacher.num_heads teacher.bands data.workers"),
    (_between(0, 2**32 - 1), "seed"),
    (_ANY, "mesh.data mesh.fsdp method.complementary_masks"),  # depend on others, see `validate`
  )
  for name in names.split()
}
MAX_TOKENS = 2**16  # of an image


def arguments(text: str, **defaults) -> ml_collections.ConfigDict:
  """The argument of a configuration file, `configs/x.py:large,masking=random`: values of `defaults`, by name or in order.

  Raises:
    ConfigError: a name that is not among them, or a value of another type.
  """
  values, names = ml_collections.ConfigDict(defaults), list(defaults)
  for i, part in enumerate(filter(None, text.split(","))):
    name, value = part.split("=", 1) if "=" in part else (names[i] if i < len(names) else "", part)
    if name not in defaults:
      raise ConfigError(
        f"the argument {part!r} is not one of {', '.join(f'{k}={v}' for k, v in defaults.items())}"
      )
    try:
      values[name] = type(defaults[name])(value)
    except ValueError:
      raise ConfigError(
        f"the argument {part!r}: expected a value like {defaults[name]!r}"
      ) from None
  return values


def encoder(name: str, size: str) -> ml_collections.ConfigDict:
  """The `encoder` section of a "convvit" or "vit" of a standard size; ConfigError for others."""
  sizes = {"convvit": CONVVIT, "vit": VIT}
  for given, known, what in ((name, sizes, "encoder"), (size, CONVVIT, "size")):
    if given not in known:
      raise ConfigError(f"{what} {given!r} is not one of {', '.join(known)}")
  c = ml_collections.ConfigDict(dict(name=name, **sizes[name][size]))
  c.learned_positions = False  # train the position table; it starts as the fixed sine-cosine one
  c.drop_path = (
    0.0  # of the last block, rising linearly from 0 (stochastic depth); in fine-tuning alone
  )
  c.remat = (
    "none"  # what the backward pass computes again to save memory: norms and activations ("dots"),
  )
  # or all but the inputs of the blocks ("full"); of the decoder too
  c.fuse_layers = ()  # blocks (from 0) fused with the last one's output, with learned weights; () for none
  if name == "convvit":
    c.patch_sizes = (4, 2, 2)  # strides of the three embeddings; their product is the token size
    c.cls_token = False  # prepend a CLS token to the transformer stage, as in ConvMAE v2
    c.fuse_stages = True  # add the outputs of the convolutional stages to the last block's
    c.sparse = (
      True  # convolutional stages on the visible blocks only: same numbers, a quarter of the work
    )
  return c


def teacher() -> ml_collections.ConfigDict:
  """One teacher, and how it is mimicked."""
  c = ml_collections.ConfigDict()
  c.name = placeholder(
    str
  )  # a published tower, fetched from the Hugging Face hub (weights.hub.PRESETS); "" for none
  c.path = placeholder(
    str
  )  # its folder or file; "checkpoint:WORKDIR", an encoder that was trained here; "random"
  c.weight = 1.0  # of its loss; the paper's is not published: both terms start near 1
  c.layer = (
    "raw"  # stream after the last block; "normed": after the last norm; "proj": CLIP's space
  )
  c.last_k = 1  # with "raw": mean over so many last blocks
  c.input_norm = (
    "teacher"  # whose mean and deviation normalise its input; "student": those of config.data
  )
  c.bands = ()  # which channels (from 0) it sees as red, green, blue; (): all of RGB, or the one of grey
  c.resolution = 0  # height of its input in pixels; 0: the one that gives the student's grid
  c.tokens = (
    "visible"  # that mimic; "visible+cls"; "masked": the decoder's, what the paper argues against
  )
  c.source = (
    "fused"  # the encoder's output that the decoder reads; "last_block": before fusion and norm
  )
  c.head = "linear"  # or "norm_linear", "mlp"
  c.target_norm = "layer_norm"  # each token; "batch": each channel; "l2": unit length; "none"
  c.loss = "mse"  # or "smooth_l1", "cosine", "l1"
  c.salient_share = (
    1.0  # share of the visible tokens, by the teacher's CLS attention, whose loss counts
  )
  c.dtype = "bfloat16"  # of its computation and kernels
  c.num_heads = 0  # of files that do not say (no config.json); 0: one per 64 channels
  c.activation = (
    ""  # likewise: "gelu", "quick_gelu", "gelu_tanh"; "": what the family is known to use
  )
  return c


def teacher_options(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """The teachers of a configuration by the names of their losses: "mimic", then "mimic_NAME" for each of extra_teachers."""
  named = {"mimic": config.teacher} | {
    f"mimic_{name}": extra for name, extra in config.extra_teachers.items()
  }
  return {name: options for name, options in named.items() if options.name or options.path}


def _common() -> ml_collections.ConfigDict:
  """What every task has."""
  c = ml_collections.ConfigDict()
  c.task = ""  # module of mrmae_jax.tasks
  c.seed = 0  # of initialisation, data order, augmentation and masks
  c.image_size = (224, 224)  # (height, width) in pixels, multiples of the token size
  c.batch_size = 1024  # images per update, over all devices
  c.epochs = 400.0  # passes over the training images; fractions allowed
  c.dtype = "bfloat16"  # of the student's computation; parameters, norms and losses stay float32
  c.encoder = encoder("convvit", "base")  # or encoder("vit", ...): the keys of that function

  c.data = ml_collections.ConfigDict()
  c.data.source = placeholder(
    str
  )  # "digits", "folder:/path/to/images", "tfds:name" or "packed:/path"
  c.data.train_split = "train"  # tfds split, or sub-folder
  c.data.eval_split = "validation"  # for the evaluators; likewise
  c.data.data_dir = ""  # where tfds looks for prepared data sets; "": its own default
  c.data.holdout_every = (
    10  # without an eval split, every k-th image is held out of training; 0: none
  )
  c.data.crop_scale = (0.2, 1.0)  # area range of RandomResizedCrop
  c.data.single_try = (
    False  # crop by the rule of MAE's linear probe: one draw, squeezed into the image
  )
  c.data.resize = (
    "pillow"  # of training crops, pixel for pixel the references' bicubic; "cv2": faster, aliased
  )
  c.data.flip = True  # horizontal flips
  c.data.randaug = (
    ""  # RandAugment in timm's words, e.g. "rand-m9-mstd0.5-inc1", of RGB alone; "": none
  )
  c.data.erase_prob = 0.0  # probability of random erasing
  c.data.eval_crop = 0.875  # central share of the resized image that evaluators see
  c.data.mean = IMAGENET_MEAN  # normalisation of the student's input, for pixels in [0, 1]: a number for each channel of
  # the images, which decides how many they have
  c.data.std = IMAGENET_STD  # likewise
  c.data.workers = 0  # decoding processes per host; 0: threads of the main process
  c.data.quarantine = (
    ""  # a list of images to leave out, written by `mrmae verify --quarantine=FILE`; "": none
  )
  c.data.on_error = "raise"  # an image that cannot be read ends the run; "skip": another takes its place (in evaluations
  # it is not counted), by a rule that depends on neither hosts nor workers, with a warning
  c.data.max_skipped = (
    0.01  # share of the images that "skip" may skip before the run ends all the same
  )
  c.data.timeout_s = (
    600.0  # longest wait for a batch before the run ends and names its images; 0: no limit
  )

  c.optim = ml_collections.ConfigDict()
  c.optim.blr = 1.5e-4  # base learning rate; the peak is blr * batch_size / 256
  c.optim.min_lr = 0.0  # absolute rate at the end of the cosine
  c.optim.warmup_epochs = 40.0  # linear from 0
  c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.95, 1e-8  # of AdamW
  c.optim.weight_decay = 0.05  # on everything but biases and norms
  c.optim.accum_steps = 1  # micro-batches per update, for batches that do not fit
  c.optim.layer_decay = 1.0  # learning rate of each block relative to the next deeper one's
  c.optim.no_decay = ()  # names of parameters that are not decayed either
  c.optim.clip_norm = 0.0  # global norm that gradients are cut to; 0: none
  c.optim.ema_decay = (
    0.0  # of a moving average of the parameters, which evaluators then use; 0: none
  )
  c.optim.max_spike = (
    0.0  # leave out updates whose gradient norm is so many times its running mean; 0: only nan, inf
  )
  c.optim.max_skips = 10  # updates left out in a row that end the run

  c.mesh = ml_collections.ConfigDict(
    dict(data=-1, fsdp=1)
  )  # devices per axis; -1: all that are left

  c.log_every = 50  # steps
  c.eval_every = 20.0  # epochs; besides, before the first and after the last step
  c.checkpoint_every = 5.0  # epochs; besides, after the last step
  c.keep_checkpoints = 2  # newest ones that stay
  c.keep_best = (
    ""  # evaluation, e.g. "knn/accuracy", of which the checkpoint with the largest stays too
  )
  c.wandb = ""  # project at Weights & Biases to log to as well (needs the wandb extra); "": none
  c.hang_s = (
    1800.0  # seconds without a sign of life after which a process ends (exit code 6); 0: never
  )
  c.evals = ml_collections.ConfigDict()  # options of each evaluator of mrmae_jax.evals
  return c


def pretrain() -> ml_collections.ConfigDict:
  """Pre-training with the published MAE/ConvMAE recipe at 224 px; ConvViT-B, no teacher chosen yet."""
  c = _common()
  c.task = "pretrain"
  # the transformer of the decoder
  c.decoder = ml_collections.ConfigDict(dict(dim=512, depth=8, num_heads=16))

  c.method = ml_collections.ConfigDict()
  c.method.mask_ratio = 0.75  # share of the tokens hidden from the encoder
  c.method.masking = (
    "random"  # or "focused": visible tokens drawn by the CLS attention of config.teacher
  )
  c.method.attention_temperature = (
    1.0  # of focused masking: p ~ attention^(1/temperature); towards 0: the most attended tokens
  )
  c.method.attention_mix = 0.0  # share of uniform sampling mixed into p
  c.method.complementary_masks = (
    1  # disjoint visible sets for each image, for one teacher pass; multiply blr alike
  )
  c.method.norm_pix = True  # reconstruct pixels normalised per patch
  c.method.pixel_weight = 1.0  # of the reconstruction loss; 0 leaves it out

  c.teacher = teacher()  # the keys of that function
  c.extra_teachers = (
    ml_collections.ConfigDict()
  )  # name -> another `teacher()`, with a head and a loss "mimic_name" of its own

  # pictures of the first held-out images
  c.evals.reconstruct = ml_collections.ConfigDict(dict(images=8))
  # k nearest neighbours of frozen features (caron2021dino: k = 20, temperature 0.07); bank: most training images used
  c.evals.knn = ml_collections.ConfigDict(dict(k=20, temperature=0.07, batch_size=256, bank=50_000))
  return c


def finetune() -> ml_collections.ConfigDict:
  """Fine-tuning with the published MAE/ConvMAE recipe for the base size at 224 px (Alpha-VL/ConvMAE FINETUNE.md)."""
  c = _common()
  c.task = "finetune"
  c.epochs = 100.0
  c.encoder.update(drop_path=0.1, learned_positions=True)
  c.init_from = placeholder(
    str
  )  # workdir, exported file or published checkpoint to start from; "" for a random start
  c.pool = (
    "mean"  # of the patch tokens, with a fresh norm; "cls": the CLS token after the encoder's norm
  )
  # mixup and cutmix inside the step, see mixup.mix; smoothing: of the labels
  c.mix = ml_collections.ConfigDict(
    dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, smoothing=0.1, groups=1)
  )  # parts of the batch that are mixed by a draw of their own
  c.data.crop_scale = (0.08, 1.0)
  c.data.randaug = "rand-m9-mstd0.5-inc1"
  c.data.erase_prob = 0.25
  c.optim.update(
    blr=5e-4,
    min_lr=1e-6,
    warmup_epochs=5.0,
    b2=0.999,
    layer_decay=0.65,
    no_decay=("pos_embed", "cls_token"),
  )
  c.eval_every = 1.0
  # top-1 and top-5 accuracy; batch_size: images per forward pass
  c.evals.accuracy = ml_collections.ConfigDict(dict(batch_size=256))
  return c


def probe() -> ml_collections.ConfigDict:
  """Linear probing with the published MAE recipe for the base size at 224 px (facebookresearch/mae main_linprobe.py)."""
  c = _common()
  c.task = "probe"
  c.epochs = 90.0
  c.batch_size = 16384
  c.init_from = placeholder(str)  # as in fine-tuning; "" probes random weights
  c.pool = "mean"  # of the patch tokens; "cls": the CLS token after the encoder's norm
  c.data.crop_scale = (0.08, 1.0)
  c.data.single_try = True
  c.optim.update(blr=0.1, weight_decay=0.0, warmup_epochs=10.0)
  c.optim.grid = (
    0.1,
    0.25,
    0.5,
    1.0,
    2.0,
    4.0,
  )  # factors of blr; a head is trained at each, all at once, with LARS
  c.eval_every = 10.0
  c.evals.accuracy = ml_collections.ConfigDict(dict(batch_size=256))
  return c


def like(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Makes `config` (of `finetune` or `probe`) start from the run in `workdir`: its encoder, images and precision.

  Raises:
    ConfigError: there is no run.
  """
  path = Path(os.path.expanduser(workdir)) / "config.json"
  try:
    stored = json.loads(
      path.read_text(),
      object_hook=lambda node: {
        key: tuple(value) if isinstance(value, list) else value for key, value in node.items()
      },
    )
    own = {
      "drop_path": config.encoder.drop_path,
      "learned_positions": config.encoder.learned_positions,
    }
    config.encoder = ml_collections.ConfigDict(stored["encoder"] | own)
    config.update({key: stored[key] for key in ("image_size", "dtype")})
    config.data.update(
      {
        key: stored["data"][key]
        for key in (
          "source",
          "train_split",
          "eval_split",
          "data_dir",
          "holdout_every",
          "flip",
          "eval_crop",
          "mean",
          "std",
        )
      }
    )
    config.data.quarantine = stored["data"].get(
      "quarantine", ""
    )  # not there before it was an option
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(f"{workdir} is neither a size nor the workdir of a run: {error}") from None
  config.init_from = str(workdir)


def describe(config: ml_collections.ConfigDict) -> list[tuple[str, Any, str]]:
  """(key, value, meaning) of every key of a configuration; the meanings are the comments of this file."""
  meanings, prefix, above = (
    {
      f"{part}.{name}": what for part in ("encoder", "decoder") for name, what in DIMENSIONS.items()
    },
    "",
    "",
  )
  names = []
  for line in Path(__file__).read_text(encoding="utf-8").splitlines():
    if line.startswith("def "):
      prefix = {"encoder": "encoder.", "teacher": "teacher."}.get(line[4 : line.index("(")], "")
    elif found := re.fullmatch(r"\s+(c\.[\w.]+(?:, c\.[\w.]+)*) = .*?(?:\s+#\s*(.*))?", line):
      names = [prefix + name for name in found[1].replace("c.", "").split(", ")]
      for name in names:
        meanings.setdefault(name, found[2] or above)
    elif found := re.fullmatch(r"\s{30,}# (.*)", line):  # goes on
      for name in names:
        meanings[name] += f" {found[1]}"
    above = line.strip()[2:] if line.strip().startswith("# ") else ""

  def rows(node, prefix):
    for key, value in node.items():
      name = f"{prefix}{key}"
      if hasattr(value, "items") and len(value):
        yield from rows(value, f"{name}.")
        continue
      part = re.sub(r"^extra_teachers\.\w+", "teacher", name)
      while part and not meanings.get(part):
        part = part.rpartition(".")[0]
      yield name, value.to_dict() if hasattr(value, "to_dict") else value, meanings.get(part, "")

  return list(rows(config, ""))


TASKS = {
  "pretrain": pretrain,
  "finetune": finetune,
  "probe": probe,
}  # modules of mrmae_jax.tasks, and their defaults


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

  wrong = _validate_values(config, need)
  fine = lambda *names: (
    not any(f"{key}.".startswith(f"{name}.") for key in wrong for name in names)
  )  # to be computed with
  if fine("optim.warmup_epochs", "epochs"):
    need(
      config.optim.warmup_epochs <= config.epochs,
      f"config.optim.warmup_epochs={config.optim.warmup_epochs} is longer than config.epochs={config.epochs}",
    )
  need(
    config.data.get("holdout_every") != 1,
    "config.data.holdout_every=1 would hold out every image; use 0 for none, or 2 and more",
  )
  if fine("dtype"):
    need(
      config.dtype in ("float32", "bfloat16"),
      f"config.dtype={config.dtype!r} must be 'float32' or 'bfloat16'",
    )
  if fine("data.crop_scale"):
    low, high = config.data.crop_scale
    need(
      low <= high,
      f"config.data.crop_scale={config.data.crop_scale} must satisfy 0 < low <= high <= 1",
    )
  if fine("wandb"):
    need(
      not config.wandb or importlib.util.find_spec("wandb"),
      f"config.wandb={config.wandb!r} needs the wandb extra: pip install 'mrmae_jax[wandb]', or leave it empty",
    )
  if fine("keep_best", "evals"):
    need(
      not config.keep_best or config.keep_best.split("/")[0] in config.evals,
      f"config.keep_best={config.keep_best!r} is no result of an evaluation; config.evals has {', '.join(config.evals) or 'none'}: "
      "knn/accuracy, say",
    )
  encoder_fits = fine("encoder", "image_size") and _validate_encoder(config, need)
  if fine("mesh", "batch_size", "optim.accum_steps"):
    _validate_devices(config, num_devices, need)
  if fine("data.mean", "data.std", "data.randaug"):
    mean, std = config.data.mean, config.data.std
    need(
      len(mean) == len(std) > 0,
      f"config.data.mean={mean} and std={std} must hold a number each for every channel of the images, std > 0",
    )
    need(
      not config.data.randaug or len(mean) == 3,
      f"config.data.randaug={config.data.randaug!r} is for RGB; leave it empty for "
      f"images of {len(mean)} channels (config.data.mean): --config.data.randaug=",
    )
  if fine("data"):
    _validate_data(config, need)
  if config.task == "pretrain":
    if encoder_fits and fine("method", "decoder"):
      _validate_method(config, need)
    if fine("teacher", "extra_teachers", "method", "data.mean", "data.std"):
      _validate_teachers(config, encoder_fits, need)
  elif fine("pool", "init_from", "encoder", "mix", "optim", "batch_size"):
    _validate_pool(config, need)
    {"finetune": _validate_mix, "probe": _validate_grid}[config.task](config, need)
  if problems:
    raise ConfigError("\n".join(problems))


def flatten(node: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
  """The values of a configuration by their full names, {"optim.blr": 1.5e-4, ...}."""
  flat = {}
  for key, value in node.items():
    flat |= (
      flatten(value, f"{prefix}{key}.")
      if isinstance(value, ml_collections.ConfigDict)
      else {f"{prefix}{key}": value}
    )
  return flat


def schema(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The defaults of a configuration's task, with the sections that the configuration has: encoder, teachers, evaluators.

  Raises:
    ConfigError: those cannot be found out.
  """
  if not isinstance(config, ml_collections.ConfigDict) or config.get("task") not in tuple(TASKS):
    found = getattr(config, "task", None)
    raise ConfigError(
      f"config.task={found!r} is not one of {', '.join(TASKS)}; start from pretrain(), finetune() or probe() of "
      "mrmae_jax.config"
    )
  c = TASKS[config.task]()
  for key in c:
    if isinstance(c[key], ml_collections.ConfigDict) and not isinstance(
      config.get(key), ml_collections.ConfigDict
    ):
      raise ConfigError(
        f"config.{key} must be a section with keys; start from {TASKS[config.task].__name__}() of mrmae_jax.config"
      )
  if config.encoder.get("name") not in ("convvit", "vit"):
    raise ConfigError(
      f"config.encoder.name={config.encoder.get('name')!r} must be 'convvit' or 'vit'"
    )
  c.encoder = encoder(config.encoder.name, "base")
  if set(config.encoder) != set(c.encoder):
    raise ConfigError(
      f"config.encoder has keys {sorted(config.encoder)}; a {config.encoder.name} takes {sorted(c.encoder)}: "
      "make it with encoder() of mrmae_jax.config"
    )
  if "extra_teachers" in c:
    c.extra_teachers = {name: teacher() for name in config.extra_teachers}
  else:
    c.evals.knn = pretrain().evals.knn  # looks at the features of any task
  for name in config.evals:
    if name not in c.evals:
      raise ConfigError(
        f"config.evals.{name} is no evaluator of the task {config.task!r}; it has {', '.join(c.evals)}"
      )
  c.evals = {name: c.evals[name] for name in config.evals}
  return c


def _validate_values(config, need) -> list[str]:
  """Each value for itself: known keys, types, ranges; a configuration file can write anything anywhere.

  Returns:
    The names of keys that are missing, or whose values are of no use.
  """
  defaults, values, wrong = flatten(schema(config)), flatten(config), []
  for name in sorted(values.keys() - defaults.keys()):
    near = difflib.get_close_matches(name, defaults, 1)
    need(
      False,
      f"config.{name} is no key of the task {config.task!r}{f'; did you mean config.{near[0]}?' if near else ''}",
    )
  missing = [name for name in defaults if name not in values]
  need(
    not missing,
    f"not in the configuration: config.{', config.'.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; start "
    f"from {TASKS[config.task].__name__}() of mrmae_jax.config",
  )
  wrong += missing
  for name, default in defaults.items():
    if name in values and (mistake := _mistake(name, values[name], default)):
      shown = repr(values[name])
      need(
        False, f"config.{name}={shown if len(shown) < 100 else f'{shown[:80]}...'} must {mistake}"
      )
      wrong.append(name)
  return wrong


def _mistake(name: str, value, default) -> str:
  """What the value of a key must be and is not; "" if all is well."""
  if default is None:
    return "" if value is None or isinstance(value, str) else "be a text"
  if not isinstance(default, tuple):
    value, element = (value,), default
  else:
    free = name in (
      "encoder.fuse_layers",
      "optim.no_decay",
      "optim.grid",
      "data.mean",
      "data.std",
    ) or name.endswith(".bands")
    if not isinstance(value, (tuple, list)) or not (free or len(value) == len(default)):
      return f"hold {({2: 'two numbers', 3: 'three numbers'}).get(len(default), 'several values')}, e.g. {default}"
    element = "" if name == "optim.no_decay" else default[0] if default else 0
  kind = type(element)
  for x in value:
    if not isinstance(x, (int, float) if kind is float else kind) or (
      isinstance(x, bool) and kind is not bool
    ):
      return f"be {'made ' if isinstance(default, tuple) else ''}of type {kind.__name__}, like {default!r}"
    if kind in (int, float):
      section, key = name.split(".", 1)[0], name.rsplit(".", 1)[-1]
      rule = RULES.get(f"teacher.{key}" if section == "extra_teachers" else name, _ANY)
      if not rule.test(x):
        return rule.words
  return ""


def token_size(config: ml_collections.ConfigDict) -> int:
  """Side of a token in pixels."""
  return (
    config.encoder.patch_size
    if config.encoder.name == "vit"
    else math.prod(config.encoder.patch_sizes)
  )


def _validate_encoder(config, need) -> bool:
  """The encoder; returns whether images divide into its tokens."""
  fields = config.encoder
  need(
    fields.remat in CHOICES["encoder.remat"],
    f"config.encoder.remat={fields.remat!r} is not one of {', '.join(CHOICES['encoder.remat'])}",
  )
  vit = fields.name == "vit"
  _validate_width(
    config, "encoder", fields.dim if vit else fields.embed_dims[2], fields.num_heads, need
  )
  depth, fused = fields.depth if vit else fields.depths[2], tuple(fields.fuse_layers)
  need(
    len(set(fused)) == len(fused) and all(0 <= i < depth - 1 for i in fused),
    f"config.encoder.fuse_layers={fused} must be different blocks from 0 to {depth - 2}; the last, {depth - 1}, always counts",
  )
  patch, (height, width) = token_size(config), config.image_size
  return need(
    height // patch * (width // patch) <= MAX_TOKENS,
    f"config.image_size=({height}, {width}) makes "
    f"{height // patch * (width // patch)} tokens of {patch} pixels, at most {MAX_TOKENS} are possible",
  ) and need(
    height % patch == 0 and width % patch == 0,
    f"config.image_size=({height}, {width}) is not a multiple of the token size {patch}; nearest: "
    f"({max(1, round(height / patch)) * patch}, {max(1, round(width / patch)) * patch})",
  )


def _validate_width(config, name, dim, heads, need):
  need(
    dim % 4 == 0 and dim % heads == 0,
    f"config.{name}: width {dim} must be a multiple of 4 and of num_heads={heads}",
  )


def _validate_method(config, need):
  """Masks and decoder of pre-training."""
  method, decoder = config.method, config.decoder
  tokens = math.prod(side // token_size(config) for side in config.image_size)
  visible = int(tokens * (1 - method.mask_ratio)) if 0 < method.mask_ratio < 1 else 0
  if need(
    0 < visible < tokens,
    f"config.method.mask_ratio={method.mask_ratio} leaves {visible} of {tokens} tokens visible; "
    "it must lie between 0 and 1 and leave some tokens on both sides",
  ):
    need(
      1 <= method.complementary_masks <= tokens // visible,
      f"config.method.complementary_masks={method.complementary_masks} sets of {visible} visible tokens do not fit {tokens}; it "
      f"must be a whole number from 1 to {tokens // visible}",
    )
  need(
    method.masking in CHOICES["method.masking"],
    f"config.method.masking={method.masking!r} is not one of {', '.join(CHOICES['method.masking'])}",
  )
  need(
    not config.encoder.drop_path,
    f"config.encoder.drop_path={config.encoder.drop_path} is for fine-tuning; pre-training drops "
    "nothing, as in the published recipes: leave it at 0",
  )
  _validate_width(config, "decoder", decoder.dim, decoder.num_heads, need)


def _validate_pool(config, need):
  need(
    config.init_from is not None,
    "config.init_from is not set; give a workdir or a file of weights, or config.init_from= "
    "(empty) to start from random weights",
  )
  need(config.pool in ("mean", "cls"), f"config.pool={config.pool!r} is not one of mean, cls")
  has_cls = config.encoder.name == "vit" or getattr(config.encoder, "cls_token", False)
  need(
    config.pool != "cls" or has_cls,
    "config.pool='cls' needs an encoder with a CLS token: config.encoder.cls_token=True",
  )


def _validate_grid(config, need):
  optim = config.optim
  need(len(optim.grid), f"config.optim.grid={tuple(optim.grid)} must hold one or more factors > 0")
  for key, off in (("layer_decay", 1.0), ("clip_norm", 0.0), ("ema_decay", 0.0)):
    need(
      optim[key] == off,
      f"config.optim.{key}={optim[key]} has no meaning for a probe; leave it at {off:g}",
    )


def _validate_mix(config, need):
  mix = config.mix
  per_step = config.batch_size // config.optim.accum_steps
  need(
    per_step % mix.groups == 0,
    f"config.mix.groups={mix.groups} does not divide the {per_step} images of a micro-batch",
  )


def _validate_devices(config, num_devices, need):
  mesh, batch, accum = config.mesh, config.batch_size, config.optim.accum_steps
  sizes = [mesh.data, mesh.fsdp]
  if -1 in sizes:
    rest = -math.prod(sizes)
    ok = sizes.count(-1) == 1 and rest > 0 and num_devices % rest == 0
  else:
    ok = min(sizes) > 0 and math.prod(sizes) == num_devices
  need(
    ok,
    f"config.mesh data={mesh.data} x fsdp={mesh.fsdp} does not fit {num_devices} devices; -1 on one axis takes the rest",
  )
  unit = num_devices * accum
  below = batch // unit * unit
  need(
    batch % unit == 0,
    f"config.batch_size={batch} is not divisible by {num_devices} devices x {accum} accumulation "
    f"steps; nearest: {f'{below} or ' if below else ''}{below + unit}",
  )


def _validate_data(config, need):
  """A cheap check of the data source; images are read later."""
  from mrmae_jax import data  # keeps the schema free of jax
  from mrmae_jax.data import randaugment

  if need(
    config.data.source,
    "config.data.source is not set; use digits, folder:/path/to/images, tfds:name or packed:/path",
  ):
    for split in (
      ("train",) if config.task == "pretrain" else ("train", "eval")
    ):  # k-NN does without the second
      try:
        data.open_split(config.data, split)
      except DataError as error:
        need(False, f"config.data: {error}")
  need(
    config.data.on_error in CHOICES["data.on_error"],
    f"config.data.on_error={config.data.on_error!r} is not one of {', '.join(CHOICES['data.on_error'])}",
  )
  try:
    randaugment.parse(config.data.randaug)
  except DataError as error:
    need(False, f"config.data.{error}")
  if need(
    config.data.resize in CHOICES["data.resize"],
    f"config.data.resize={config.data.resize!r} is not one of {', '.join(CHOICES['data.resize'])}",
  ):
    try:
      data.resizer(config.data.resize)
    except DataError as error:
      need(False, f"config.data.{error}")


def _validate_teachers(config, encoder_fits, need):
  """The options of each teacher and, if the student's sizes fit, what the teacher's files say; weights are read later."""
  from mrmae_jax import teachers

  main, method = config.teacher, config.method
  need(
    main.name is not None or main.path is not None,
    "config.teacher is not set; give config.teacher.name=clip_vit_b16 (or "
    "another of weights.hub.PRESETS), config.teacher.path=FOLDER, or config.teacher.path= (empty) to train without a teacher",
  )
  named = {"teacher": main} | {
    f"extra_teachers.{name}": extra for name, extra in config.extra_teachers.items()
  }
  named = {where: options for where, options in named.items() if options.name or options.path}
  need(
    named or method.pixel_weight,
    "config.method.pixel_weight=0 without a teacher leaves nothing to learn",
  )
  need(
    "teacher" in named or not named,
    "config.extra_teachers come after config.teacher, which is not set",
  )
  focused = method.masking == "focused"
  need(
    "teacher" in named or not focused,
    "config.method.masking='focused' needs config.teacher, by whose attention the visible "
    "tokens are drawn; use 'random'",
  )
  has_cls = config.encoder.name == "vit" or getattr(config.encoder, "cls_token", False)
  for where, options in named.items():
    masked, cls, share = (
      options.tokens == "masked",
      options.tokens == "visible+cls",
      options.salient_share,
    )
    checks = [
      need(
        options[key] in CHOICES[f"teacher.{key}"],
        f"config.{where}.{key}={options[key]!r} is not one of {', '.join(CHOICES[f'teacher.{key}'])}",
      )
      for key in ("layer", "input_norm", "tokens", "source", "head", "target_norm", "loss", "dtype")
    ]
    checks += [
      need(
        share == 1 or not masked,
        f"config.{where}.salient_share={share} concerns visible tokens; leave it at 1 with "
        "tokens='masked'",
      ),
      need(
        has_cls or not cls,
        f"config.{where}.tokens='visible+cls' needs a student with a CLS token: "
        "config.encoder.cls_token=True",
      ),
    ]
    if not (encoder_fits and all(checks)):
      continue
    try:
      spec = teachers.configured_spec(options, config)
    except WeightsError as error:
      need(False, f"config.{where}: {error}")
      continue
    need(
      spec.has_cls or not cls,
      f"config.{where}.tokens='visible+cls': {spec.description} has no CLS token",
    )
    need(
      spec.has_attention or not (focused and where == "teacher"),
      f"config.method.masking='focused' needs the attention of a CLS token, which {spec.description} lacks; use 'random'",
    )
    need(
      spec.has_attention or share == 1,
      f"config.{where}.salient_share={share} needs the attention of a CLS token, which {spec.description} lacks; use 1",
    )
