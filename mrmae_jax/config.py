"""Declares every key of a configuration on one line, and derives the rest from these lines.

A `Key` holds a default, its meaning, what a value must be, and whether a run that resumes may
change it. Help, checks, departures from the recipe and the identity of a run follow from the keys.
A new task needs an entry of `TASKS`, its evaluators one of `EVALS`, a function below with its name,
a module in `tasks/` and, as a command, entries of the tables of `cli/parser.py`; `checks.py`
compares keys with each other. Files in `configs/` start from
`pretrain()`, `finetune()`, `probe()`, `segment()`, `detect()` or `self_distill()`. Nothing here
imports jax.
"""

import json
import math
from pathlib import Path
from typing import Any, Callable, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mrmae_jax.constants import BEIT, CONVVIT, IMAGENET_MEAN, IMAGENET_STD, VIT
from mrmae_jax.errors import ConfigError

LARGEST = 1e20  # a larger number is a slip

# --- The schema ---


class Rule(NamedTuple):
  """What a number must be: a test, which NaN and infinity do not pass, and the words for it."""

  test: Callable[[float], bool]
  words: str


class Key(NamedTuple):
  """One key of a configuration.

  Attributes:
    default: its value; None for one that is not set yet.
    help: its meaning, for --help.
    allowed: the rule of a number, or of each number of a tuple; or the texts to choose from.
    resume: "same" for a value that a run keeps when it resumes; "free" for one that may change;
      "local" for one that may differ among hosts too, because it says where things lie.
    many: the type of the elements of a tuple that may have any length.
    unset: the type of a value that is not set yet.
  """

  default: Any
  help: str
  allowed: Rule | tuple[str, ...] | None = None
  resume: str = "same"
  many: type | None = None
  unset: type = str


def between(smallest: int, largest: int) -> Rule:
  """Returns the rule of a number in a closed range."""
  return Rule(lambda x: smallest <= x <= largest, f"be from {smallest} to {largest}")


ANY = Rule(lambda x: abs(x) <= LARGEST, f"be a finite number, at most {LARGEST:g}")
POSITIVE = Rule(lambda x: 0 < x <= LARGEST, f"be a finite number > 0, at most {LARGEST:g}")
NOT_NEGATIVE = Rule(lambda x: 0 <= x <= LARGEST, f"be a finite number >= 0, at most {LARGEST:g}")
SHARE = Rule(lambda x: 0 <= x <= 1, "lie in [0, 1]")
BELOW_1 = Rule(lambda x: 0 <= x < 1, "lie in [0, 1)")
PART = Rule(lambda x: 0 < x <= 1, "satisfy 0 < x <= 1")
WIDTH = between(1, 2**17)
BLOCKS = between(1, 1000)
HOLDOUT = Rule(
  lambda x: x == 0 or 2 <= x <= 10**9, "be 0 for none, or 2 and more; 1 would hold out every image"
)

# Texts to choose from; the first is the default
DTYPES = ("bfloat16", "float32")
REMAT = ("none", "dots", "full")
RESIZE = ("pillow", "cv2")
EXIF = ("ignore", "apply")
ON_ERROR = ("raise", "skip")
MASKING = ("random", "focused")
LAYERS = ("raw", "normed", "proj")
INPUT_NORMS = ("teacher", "student")
TOKENS = ("visible", "visible+cls", "masked")
SOURCES = ("fused", "last_block")
HEADS = ("linear", "norm_linear", "mlp")
TARGET_NORMS = ("layer_norm", "batch", "l2", "none")
LOSSES = ("mse", "smooth_l1", "cosine", "l1")
POOLS = ("mean", "cls")
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh", "silu")
OBJECTIVES = ("dino", "contrast")
TABLES = ("table", "none")
SCHEDULES = ("cosine", "poly", "steps", "whole_cosine")
DECAYED = ("matrices", "not_norms", "not_encoder_norms", "all")
HEAD_STARTS = ("same", "new")
DENOMINATORS = ("all", "labeled")
DISTANCES = ("decomposed", "shared", "none")
PYRAMIDS = ("simple", "fpn")
NORMS = ("ln", "bn")
MODES = ("slide", "whole")

ENCODER = dict(  # the keys of every encoder
  learned_positions=Key(False, "train the position table, which starts as the sine-cosine one"),
  drop_path=Key(0.0, "stochastic depth of the last block, rising from 0; not in pretrain", BELOW_1),
  remat=Key("none", "recompute activations (dots) or blocks (full), for memory", REMAT, "free"),
  fuse_layers=Key((), "blocks, from 0, to fuse with the last one", between(0, 1000), many=int),
)
TOWER = dict(  # where the vision towers of others differ from MAE's ViT, whose values these are
  eps=Key(1e-6, "epsilon of the LayerNorms: 1e-12 in transformers' ViT, 1e-5 in CLIP", POSITIVE),
  activation=Key(
    "gelu", "of the MLPs: quick_gelu in OpenAI's CLIP, silu in gated ones", ACTIVATIONS
  ),
  patch_bias=Key(True, "the patch embedding has a bias; CLIP's has none"),
  norm_pre=Key(False, "a LayerNorm before the blocks, as in CLIP"),
  layer_scale=Key(False, "learned gains on both branches of a block, as in DINOv2 and BEiT"),
  gated=Key(False, "gated MLPs, as in DINOv2's largest size"),
  num_registers=Key(0, "tokens that no output shows, 4 in DINOv2 with registers", between(0, 1000)),
  positions=Key("table", "position table of the encoder; none: as in BEiT", TABLES),
  relative_positions=Key(False, "a table of distances in each block, as in BEiT"),
  key_bias=Key(True, "keys have a bias; BEiT's have none"),
)
ENCODERS = {
  "convvit": ENCODER
  | dict(
    name=Key("convvit", "kind of encoder: convvit or vit"),
    embed_dims=Key(CONVVIT["base"]["embed_dims"], "widths of the three stages", WIDTH),
    depths=Key(CONVVIT["base"]["depths"], "blocks of each stage", BLOCKS),
    num_heads=Key(CONVVIT["base"]["num_heads"], "attention heads, which divide the width", BLOCKS),
    mlp_ratios=Key(CONVVIT["base"]["mlp_ratios"], "MLPs' widths / stage's width", POSITIVE),
    patch_sizes=Key((4, 2, 2), "strides of the embeddings; their product is a token", BLOCKS),
    cls_token=Key(False, "prepend a CLS token to the transformer stage, as in ConvMAE v2"),
    fuse_stages=Key(True, "add the outputs of the convolutional stages to the last block's"),
    sparse=Key(True, "convolve the visible blocks only: same numbers, a quarter of the work"),
    **{name: TOWER[name] for name in ("eps", "layer_scale", "relative_positions")},
  ),
  "vit": ENCODER
  | dict(
    name=Key("vit", "kind of encoder: convvit or vit"),
    patch_size=Key(VIT["base"]["patch_size"], "side of a token in pixels", BLOCKS),
    dim=Key(VIT["base"]["dim"], "width", WIDTH),
    depth=Key(VIT["base"]["depth"], "blocks", BLOCKS),
    num_heads=Key(VIT["base"]["num_heads"], "attention heads, which divide the width", BLOCKS),
    mlp_dim=Key(VIT["base"]["mlp_dim"], "hidden width of the MLPs", WIDTH),
  )
  | TOWER,
}
DATA = dict(
  source=Key(
    None,
    "digits, folder:PATH (.zip, .tar), tfds:NAME, hf:NAME, wds:PATTERN, packed:PATH, scenes:PATH,"
    " coco:PATH",
    resume="local",
  ),
  train_split=Key("train", "split of tfds, or sub-folder, to train on; .: the whole folder"),
  eval_split=Key("validation", "split of tfds, or sub-folder, for the evaluators"),
  data_dir=Key("", "where tfds looks for prepared data sets; empty: tfds' default", resume="local"),
  holdout_every=Key(10, "without an eval split, hold out every k-th image; 0: none", HOLDOUT),
  labels=Key("", "table of a folder's labels, CSV or TSV: file, label", resume="local"),
  crop_scale=Key((0.2, 1.0), "area range of RandomResizedCrop, of the image's area", PART),
  resize=Key("pillow", "resizing as in the references; cv2: OpenCV's, faster, aliased", RESIZE),
  flip=Key(True, "horizontal flips"),
  randaug=Key("", "RandAugment of RGB images as timm writes it, e.g. rand-m9-mstd0.5-inc1"),
  erase_prob=Key(0.0, "probability of random erasing", SHARE),
  eval_crop=Key(0.875, "central share of the resized image that evaluators see", PART),
  exif=Key("ignore", "orientation in the EXIF of a photograph; apply: turn it upright", EXIF),
  mean=Key(IMAGENET_MEAN, "mean of each channel, of pixels in [0, 1]", SHARE, many=float),
  std=Key(IMAGENET_STD, "standard deviation of each channel", PART, many=float),
  workers=Key(0, "decoding processes per host; 0: threads", between(0, 1000), "local"),
  quarantine=Key("", "list of images to leave out, written by mrmae verify", resume="local"),
  on_error=Key("raise", "for unreadable images; skip: another takes its place", ON_ERROR, "free"),
  max_skipped=Key(0.01, "largest share of images that on_error=skip may skip", SHARE, "free"),
  timeout_s=Key(600.0, "longest wait for a batch in seconds; 0: no limit", NOT_NEGATIVE, "free"),
)
SCENES = {  # the data of segmentation: no crops to one size, no labels of whole images
  name: key
  for name, key in DATA.items()
  if name not in ("crop_scale", "randaug", "erase_prob", "eval_crop", "labels")
} | dict(
  scale=Key((0.5, 2.0), "range of the random scale of an image", POSITIVE),
  max_share=Key(0.75, "largest share of one class in a crop; 1: any", PART),
  photometric=Key(True, "random brightness, contrast, saturation and hue"),
  zero_is_unlabelled=Key(
    None,
    "label 0 means unlabelled, and k is class k - 1, as in ADE20K; needed for scenes:PATH",
    unset=bool,
  ),
)
OBJECTS = {  # the data of detection: boxes and masks of their own jitter
  name: key
  for name, key in DATA.items()
  if name not in ("crop_scale", "resize", "randaug", "erase_prob", "eval_crop", "labels")
} | dict(
  scale=Key((0.1, 2.0), "range of the random scale of an image, before it is cut", POSITIVE),
  max_boxes=Key(100, "objects of an image that are trained; the largest of more", WIDTH),
)
OPTIM = dict(
  blr=Key(1.5e-4, "base learning rate; the peak is blr * batch_size / 256", POSITIVE),
  schedule=Key(
    "cosine",
    "fall of the learning rate after the warm-up; poly: linear; steps: to a tenth, twice",
    SCHEDULES,
  ),
  min_lr=Key(0.0, "absolute learning rate at the end of the schedule", NOT_NEGATIVE),
  warmup_epochs=Key(40.0, "epochs in which the learning rate rises linearly from 0", NOT_NEGATIVE),
  warmup_steps=Key(0, "updates of the warm-up; 0: warmup_epochs", between(0, 10**9)),
  b1=Key(0.9, "decay of AdamW's first moment", BELOW_1),
  b2=Key(0.95, "decay of AdamW's second moment", BELOW_1),
  eps=Key(1e-8, "AdamW's epsilon", POSITIVE),
  weight_decay=Key(0.05, "weight decay of the parameters of decay_of", NOT_NEGATIVE),
  accum_steps=Key(1, "micro-batches per update, to save memory", between(1, 2**14), "free"),
  layer_decay=Key(1.0, "learning rate of a block / that of the next deeper block", PART),
  no_decay=Key((), "names of other parameters without weight decay", many=str),
  decay_of=Key("matrices", "parameters with weight decay; all: biases and norms too", DECAYED),
  full_rate=Key((), "names of parameters whose learning rate layer_decay leaves alone", many=str),
  clip_norm=Key(0.0, "largest global norm of the gradients; 0: no limit", NOT_NEGATIVE),
  ema_decay=Key(0.0, "decay of averaged parameters, for the evaluators; 0: none", BELOW_1),
  max_spike=Key(0.0, "largest gradient norm / its running mean; 0: no limit", NOT_NEGATIVE),
  max_skips=Key(10, "skipped updates in a row that end the run", between(1, 10**9), "free"),
)
LATER = ("schedule", "warmup_steps", "decay_of", "full_rate")  # older runs lack them
COMMON = dict(  # the keys of every task
  task=Key("", "module of mrmae_jax.tasks"),
  seed=Key(0, "seed of parameters, data order, augmentation and masks", between(0, 2**32 - 1)),
  image_size=Key((224, 224), "(height, width) in pixels: multiples of a token", between(1, 2**14)),
  batch_size=Key(1024, "images per update, over all devices", between(1, 2**24)),
  epochs=Key(400.0, "passes over the training images; may be a fraction", POSITIVE),
  dtype=Key("bfloat16", "type of the computation; parameters and losses are float32", DTYPES),
  encoder=ENCODERS["convvit"],
  data=DATA,
  optim=OPTIM,
  mesh=dict(
    data=Key(-1, "devices that split the batch alone; -1: all that are left", ANY, "free"),
    fsdp=Key(1, "devices that split batch and parameters; -1: all that are left", ANY, "free"),
  ),
  log_every=Key(50, "steps between two lines of the log", between(1, 10**9), "free"),
  eval_every=Key(20.0, "epochs between two evaluations", POSITIVE, "free"),
  checkpoint_every=Key(5.0, "epochs between two checkpoints", POSITIVE, "free"),
  keep_checkpoints=Key(2, "number of newest checkpoints to keep", between(1, 10**9), "free"),
  keep_best=Key("", "result, e.g. knn/accuracy, whose best checkpoint stays too", resume="free"),
  wandb=Key("", "project at Weights & Biases to log to as well; empty: none", resume="free"),
  hang_s=Key(1800.0, "seconds without progress that end the run; 0: never", NOT_NEGATIVE, "free"),
)
EVALS = {  # modules of mrmae_jax.evals
  "reconstruct": dict(images=Key(8, "number of held-out images to draw", BLOCKS, "free")),
  "knn": dict(  # of frozen features, as in Caron et al. 2021
    k=Key(20, "neighbors that vote", WIDTH, "free"),
    temperature=Key(0.07, "temperature of the votes", POSITIVE, "free"),
    batch_size=Key(256, "images per forward pass", WIDTH, "free"),
    bank=Key(50_000, "most training images to compare with; 0: all", between(0, 10**9), "free"),
  ),
  "accuracy": dict(batch_size=Key(256, "images per forward pass", WIDTH, "free")),
  "coco_ap": dict(
    batch_size=Key(16, "images per forward pass", WIDTH, "free"),
    images=Key(8, "number of images in the pictures; 0: no pictures", between(0, 1000), "free"),
  ),
  "miou": dict(  # see segmentation.Rule
    mode=Key(
      "slide", "through windows of image_size; whole: the whole image at once", MODES, "free"
    ),
    stride=Key((), "(rows, columns) between windows; (): two thirds of one", WIDTH, "free", int),
    scales=Key((1.0,), "sizes, relative to training, that are averaged", POSITIVE, "free", float),
    flip=Key(False, "average with the mirrored image", resume="free"),
    images=Key(8, "number of images in the pictures; 0: no pictures", between(0, 1000), "free"),
  ),
}
DECODER = dict(
  dim=Key(512, "width of the decoder", WIDTH),
  depth=Key(8, "blocks of the decoder", BLOCKS),
  num_heads=Key(16, "attention heads of the decoder", BLOCKS),
)
METHOD = dict(
  mask_ratio=Key(0.75, "share of the tokens hidden from the encoder", SHARE),
  masking=Key("random", "draw of visible tokens; focused: by the teacher's attention", MASKING),
  attention_temperature=Key(1.0, "focused masking: p ~ attention^(1/temperature)", POSITIVE),
  attention_mix=Key(0.0, "share of uniform sampling mixed into p", SHARE),
  complementary_masks=Key(1, "disjoint visible sets per image; raise blr by this factor", ANY),
  norm_pix=Key(True, "reconstruct pixels normalized per patch"),
  pixel_weight=Key(1.0, "weight of the reconstruction loss; 0: none", NOT_NEGATIVE),
)
TEACHER = dict(
  name=Key(None, "published tower, a key of weights.hub.PRESETS; empty: none", resume="local"),
  path=Key(None, "its folder or file, checkpoint:WORKDIR, or random", resume="local"),
  weight=Key(1.0, "weight of its loss; the paper's is not published", NOT_NEGATIVE),
  layer=Key("raw", "last block's output; normed: after the norm; proj: CLIP's space", LAYERS),
  last_k=Key(1, "with layer=raw: mean over the last k blocks", BLOCKS),
  input_norm=Key("teacher", "whose mean and std normalize the teacher's input", INPUT_NORMS),
  bands=Key((), "channels, from 0, that it sees as RGB; (): all", between(0, 1000), many=int),
  resolution=Key(0, "height of its input; 0: that of the student's grid", between(0, 2**14)),
  tokens=Key("visible", "tokens that mimic; masked: the decoder's, as a baseline", TOKENS),
  source=Key("fused", "encoder output that mimics; last_block: before fusion and norm", SOURCES),
  head=Key("linear", "map from the student's tokens to the teacher's width", HEADS),
  target_norm=Key("layer_norm", "of a token; batch: of a channel; l2: length 1", TARGET_NORMS),
  loss=Key("mse", "distance to its features", LOSSES),
  salient_share=Key(1.0, "share of visible tokens, by CLS attention, in the loss", PART),
  dtype=Key("bfloat16", "type of its computation and kernels", DTYPES),
  num_heads=Key(0, "heads, if its files do not say; 0: one per 64 channels", between(0, 1000)),
  activation=Key("", "if its files do not say: gelu, quick_gelu, gelu_tanh; empty: usual"),
)
MIX = dict(  # see mixup.mix
  mixup_alpha=Key(0.8, "parameter of mixup's Beta law; 0: none", NOT_NEGATIVE),
  cutmix_alpha=Key(1.0, "parameter of cutmix's Beta law; 0: none", NOT_NEGATIVE),
  smoothing=Key(0.1, "label smoothing", BELOW_1),
  groups=Key(1, "parts of the batch that are mixed by their own draw", between(1, 2**14)),
)
START = Key("", "workdir or file to train further; empty: random weights", resume="local")
TRANSFER = dict(  # the keys of tasks that start from a pre-trained encoder
  init_from=Key(None, "workdir or file to start from; empty: random weights", resume="local"),
  pool=Key("mean", "mean of the patch tokens; cls: the CLS token", POOLS),
)
UPERNET = dict(
  channels=Key(768, "width of the decode head; 1024 in large models", WIDTH),
  aux_channels=Key(256, "width of the auxiliary head; 0: none", between(0, 2**17)),
  aux_weight=Key(0.4, "weight of the auxiliary head's loss", NOT_NEGATIVE),
  pool_scales=Key((1, 2, 3, 6), "sides of the pooled maps of the decode head", BLOCKS, many=int),
  levels=Key(
    (),
    "four blocks of a ViT, from 0, that the heads read; (): after 1/3, 1/2, 2/3 and all",
    between(0, 1000),
    many=int,
  ),
  dropout=Key(0.1, "share of channels dropped before the classifiers", BELOW_1),
  mean_over=Key("all", "pixels in the loss's denominator; labeled: no others", DENOMINATORS),
)
RCNN = dict(  # see models.mask_rcnn and detection.Rules
  window=Key(14, "side of most blocks' windows in tokens; 0: no windows", between(0, 1000)),
  global_blocks=Key(
    (),
    "blocks, from 0, without windows; (): the last of each quarter",
    between(0, 1000),
    many=int,
  ),
  distances=Key("decomposed", "tables of distances: in each block; shared: two in all", DISTANCES),
  position_grid=Key(
    (14, 14), "(rows, columns) of the position table: those of pre-training", WIDTH
  ),
  conv_eps=Key(1e-6, "epsilon of a convvit's convolutional blocks; 1e-5 before", POSITIVE),
  pyramid=Key("simple", "levels from the last map; fpn: from a convvit's stages", PYRAMIDS),
  channels=Key(256, "width of the pyramid and all heads", WIDTH),
  norm=Key("ln", "norms of pyramid and heads; bn: over the batch", NORMS),
  rpn_convs=Key(2, "convolutions of the region proposal network", BLOCKS),
  box_convs=Key(4, "convolutions of a box head", between(0, 1000)),
  box_hidden=Key(1024, "width of the fully connected layer of a box head", WIDTH),
  stages=Key(1, "box heads, one after the other; 3: a cascade", between(1, 3)),
  masks=Key(True, "detect masks too"),
  mask_convs=Key(4, "convolutions of the mask head", BLOCKS),
  anchor_sizes=Key(
    (32.0, 64.0, 128.0, 256.0, 512.0), "sides of square anchors of the five levels", POSITIVE
  ),
  anchor_ratios=Key((0.5, 1.0, 2.0), "heights / widths of anchors", POSITIVE, many=float),
  anchor_iou=Key((0.3, 0.7), "below: background; from the second on: an object", SHARE),
  anchor_sample=Key(256, "anchors of an image that are trained", WIDTH),
  anchor_positive=Key(0.5, "largest share of them that show objects", SHARE),
  train_proposals=Key((2000, 1000), "of a level, and after suppression of all", WIDTH),
  test_proposals=Key((1000, 1000), "the same in evaluation", WIDTH),
  proposal_nms=Key(0.7, "largest IoU of two proposals of a level", SHARE),
  roi_iou=Key((0.5, 0.6, 0.7), "IoU from which on a proposal shows an object, by stage", SHARE),
  roi_sample=Key(512, "proposals of an image that are trained", WIDTH),
  roi_positive=Key(0.25, "largest share of them that show objects", SHARE),
  pool_samples=Key(2, "samples of a bin and axis; 0: as many as positions", between(0, 100)),
  canonical_size=Key(224.0, "side of boxes in pixels that are pooled from stride 16", POSITIVE),
  min_score=Key(0.05, "score of detections", SHARE, "free"),
  detection_nms=Key(0.5, "largest IoU of two detections of a class", SHARE, "free"),
  detections=Key(100, "largest number of detections in an image", WIDTH, "free"),
)
GRID = Key((0.1, 0.25, 0.5, 1.0, 2.0, 4.0), "factors of blr, a head for each", POSITIVE, many=float)
DISTILL = dict(
  objective=Key("dino", "match prototypes; contrast: find the image in the batch", OBJECTIVES),
  prototypes=Key(512, "outputs of the projection head, K in the DINO paper", WIDTH),
  momentum=Key(0.98, "momentum of the averaged teacher at the start; a cosine to 1", SHARE),
  teacher_temperature=Key(0.04, "temperature of the teacher's distribution", POSITIVE),
  student_temperature=Key(0.1, "temperature of the student's distribution", POSITIVE),
  contrast_temperature=Key(0.2, "temperature of objective=contrast", POSITIVE),
  visible=Key(0.5, "share of the patches that the student sees, at random", PART),
  jitter=Key(0.4, "strength of random brightness and contrast", SHARE),
  color=Key(0.0, "strength of random saturation and hue", SHARE),
)

# --- The tasks ---


class TaskSchema(NamedTuple):
  """What a configuration of a task holds.

  Attributes:
    sections: its keys and sections.
    recipe: values that differ from the defaults of the keys.
    evals: its evaluators.
    splits: the splits of the data that it cannot do without.
    takes_knn: the evaluator "knn" can be added; it needs classes of whole images.
  """

  sections: dict[str, Any]
  recipe: dict[str, Any]
  evals: tuple[str, ...]
  splits: tuple[str, ...] = ("train",)
  takes_knn: bool = True


TASKS = {  # modules of mrmae_jax.tasks
  "pretrain": TaskSchema(
    sections=COMMON
    | dict(init_from=START)
    | dict(decoder=DECODER, method=METHOD, teacher=TEACHER, extra_teachers={}),
    recipe={},
    evals=("reconstruct", "knn"),
  ),
  "finetune": TaskSchema(
    sections=COMMON | TRANSFER | dict(mix=MIX),
    recipe=dict(
      epochs=100.0,
      eval_every=1.0,
      encoder=dict(drop_path=0.1, learned_positions=True),
      data=dict(crop_scale=(0.08, 1.0), randaug="rand-m9-mstd0.5-inc1", erase_prob=0.25),
      optim=dict(
        blr=5e-4,
        min_lr=1e-6,
        warmup_epochs=5.0,
        b2=0.999,
        layer_decay=0.65,
        no_decay=("pos_embed", "cls_token"),
      ),
    ),
    evals=("accuracy",),
    splits=("train", "eval"),
  ),
  "probe": TaskSchema(
    sections=COMMON | TRANSFER | dict(optim=OPTIM | dict(grid=GRID)),
    recipe=dict(
      epochs=90.0,
      batch_size=16384,
      eval_every=10.0,
      data=dict(crop_scale=(0.08, 1.0)),
      optim=dict(blr=0.1, weight_decay=0.0, warmup_epochs=10.0),
    ),
    evals=("accuracy",),
    splits=("train", "eval"),
  ),
  "segment": TaskSchema(
    sections=COMMON
    | dict(
      init_from=TRANSFER["init_from"],
      head=Key("same", "heads of a segmentation model in init_from; new: fresh ones", HEAD_STARTS),
      data=SCENES,
      upernet=UPERNET,
    ),
    recipe=dict(
      image_size=(512, 512),
      batch_size=16,
      epochs=126.67,  # 160,000 steps with the 20,210 images of ADE20K
      eval_every=12.667,
      checkpoint_every=3.1667,
      encoder=dict(
        drop_path=0.2,
        learned_positions=True,
        relative_positions=True,
        layer_scale=True,
        eps=1e-5,
      ),
      optim=dict(
        blr=1e-4 * 256 / 16,
        schedule="poly",
        warmup_epochs=1.18753,  # 1,500 steps
        b2=0.999,
        layer_decay=0.75,
      ),
    ),
    evals=("miou",),
    splits=("train", "eval"),
    takes_knn=False,
  ),
  "detect": TaskSchema(
    sections=COMMON
    | dict(
      init_from=TRANSFER["init_from"],
      head=Key("same", "heads of a detector in init_from; new: fresh ones", HEAD_STARTS),
      data=OBJECTS,
      rcnn=RCNN,
    ),
    recipe=dict(
      image_size=(1024, 1024),
      batch_size=16,
      epochs=25.157,  # 184,375 steps with the 117,266 images of COCO that have objects
      eval_every=5.0,
      checkpoint_every=1.0,
      encoder=dict(drop_path=0.1, learned_positions=True),
      optim=dict(
        blr=1e-4 * 256 / 16,
        schedule="steps",
        warmup_epochs=0.0,
        warmup_steps=250,
        b2=0.999,
        weight_decay=0.1,
        layer_decay=0.8,
        no_decay=("pos_embed",),
        decay_of="not_encoder_norms",
        full_rate=("pos_embed",),
      ),
    ),
    evals=("coco_ap",),
    takes_knn=False,
  ),
  "self_distill": TaskSchema(
    sections=COMMON | dict(encoder=ENCODERS["vit"], distill=DISTILL),
    recipe=dict(
      image_size=(32, 32),
      batch_size=64,
      epochs=40.0,
      eval_every=10.0,
      dtype="float32",
      encoder=dict(patch_size=4, dim=64, depth=6, num_heads=4, mlp_dim=256, learned_positions=True),
      data=dict(
        source="digits",
        holdout_every=5,
        crop_scale=(0.4, 1.0),
        flip=False,
        eval_crop=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
      ),
      optim=dict(blr=8e-3, warmup_epochs=4.0, b2=0.999, weight_decay=0.04, clip_norm=3.0),
    ),
    evals=("knn",),
  ),
}


def pretrain() -> ConfigDict:
  """Returns pre-training by the published MAE/ConvMAE recipe: ConvViT-B at 224 px, teacher open."""
  return defaults("pretrain")


def finetune() -> ConfigDict:
  """Returns fine-tuning by the published MAE/ConvMAE recipe of the base size at 224 px.

  Source: Alpha-VL/ConvMAE FINETUNE.md.
  """
  return defaults("finetune")


def probe() -> ConfigDict:
  """Returns linear probing by the published MAE recipe of the base size at 224 px.

  Source: facebookresearch/mae main_linprobe.py.
  """
  return defaults("probe")


def segment() -> ConfigDict:
  """Returns segmentation by the published recipe of ConvMAE-B at 512 px.

  Source: Alpha-VL/ConvMAE SEG/configs.
  """
  return defaults("segment")


def detect() -> ConfigDict:
  """Returns detection by the published recipe of ConvMAE-B in ViTDet's style at 1024 px.

  Source: OpenGVLab/Official-ConvMAE-Det, configs/COCO.
  """
  return defaults("detect")


def self_distill() -> ConfigDict:
  """Returns the training of a small teacher without labels: a ViT that teaches itself (DINO)."""
  return defaults("self_distill")


def defaults(task: str) -> ConfigDict:
  """Returns the default configuration of a task, a key of TASKS."""
  schema = TASKS[task]
  c = _make(schema.sections | {"evals": {name: EVALS[name] for name in schema.evals}})
  c.update(schema.recipe | {"task": task})
  return c


def encoder(name: str, size: str) -> ConfigDict:
  """Returns the section `encoder` of a "convvit", "vit" or "beitv2" (a vit) of a standard size.

  Raises:
    ConfigError: another name or size.
  """
  sizes = {"convvit": CONVVIT, "vit": VIT}
  sizes["beitv2"] = {size: VIT[size] | BEIT for size in ("base", "large")}
  for value, names, kind in ((name, sizes, "encoder"), (size, sizes.get(name), "size")):
    if value not in names:
      raise ConfigError(f"{kind} {value!r} is not one of {', '.join(names)}")
  c = _make(ENCODERS["convvit" if name == "convvit" else "vit"])
  c.update(sizes[name][size])
  return c


def teacher_section() -> ConfigDict:
  """Returns the section of a teacher: `teacher`, or one of `extra_teachers`.

  Each extra teacher has a head of its own, and a loss "mimic_NAME".
  """
  return _make(TEACHER)


def _make(section: dict[str, Any]) -> ConfigDict:
  """Returns a section with the defaults of its keys."""
  c = ConfigDict()
  for name, key in section.items():
    if isinstance(key, dict):
      c[name] = _make(key)
    else:
      c[name] = placeholder(key.unset) if key.default is None else key.default
  return c


def start_from(config: ConfigDict, workdir: str) -> None:
  """Makes `config` start from a run: its encoder, precision, mean and std of the images.

  For `finetune` and `probe` also the images and their size; `segment` and `detect` have images of
  their own. Detection keeps the grid of the position table.

  Raises:
    ConfigError: the workdir does not hold a run.
  """
  try:
    stored = _read_json(Path(workdir).expanduser() / "config.json")
    # What the task decides; the encoder that is probed is as the run left it.
    names = ("drop_path",) if config.task == "probe" else ("drop_path", "learned_positions")
    has_views = config.task not in ("segment", "detect")  # of whole images in one size
    if config.task == "segment":
      names += ("relative_positions", "layer_scale")
    kept = {key: config.encoder[key] for key in names}
    name = stored["encoder"]["name"]
    config.encoder = _make(ENCODERS[name])  # older runs lack keys
    config.encoder.update(stored["encoder"] | kept)
    if config.encoder.get("positions") == "none":
      config.encoder.learned_positions = False  # there is no table to learn
    config.dtype = stored["dtype"]
    config.data.update({key: stored["data"][key] for key in ("mean", "std")})
    if config.task == "detect":
      _start_detector(config, stored)
    if has_views:
      config.image_size = stored["image_size"]
      images = "source train_split eval_split data_dir holdout_every flip eval_crop"
      config.data.update({key: stored["data"][key] for key in images.split()})
      for key in ("labels", "quarantine", "exif"):  # older runs lack them
        config.data[key] = stored["data"].get(key, config.data[key])
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
    raise ConfigError(f"{workdir} is neither a size nor the workdir of a run: {error}") from None
  config.init_from = str(workdir)


def _start_detector(config: ConfigDict, stored: dict[str, Any]) -> None:
  """Takes the backbone and the heads of a detector, or the position table of another run."""
  if stored["task"] == "detect":
    config.rcnn.update(stored["rcnn"])
    config.image_size = stored["image_size"]
    return
  encoder = config.encoder
  patch = encoder.patch_size if encoder.name == "vit" else math.prod(encoder.patch_sizes)
  config.rcnn.position_grid = tuple(side // patch for side in stored["image_size"])


def read_stored(path: Path) -> ConfigDict:
  """Returns the configuration in the config.json of a run; keys that it lacks have their defaults.

  Raises:
    ConfigError: the file is not that of a run.
  """
  try:
    stored = _read_json(path)
    config = defaults(stored["task"])
    config.encoder = encoder(stored["encoder"]["name"], "base")
    for name in stored.get("extra_teachers", ()):
      config.extra_teachers[name] = teacher_section()
    for name in config.evals.keys() - stored["evals"].keys():
      del config.evals[name]
    config.update(stored)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ConfigError(
      f"not the configuration of a run ({type(error).__name__}: {error}); expected the config.json "
      "that a run writes into its workdir"
    ) from None
  return config


def _read_json(path: Path) -> dict[str, Any]:
  tuples = lambda node: {k: tuple(v) if isinstance(v, list) else v for k, v in node.items()}
  return json.loads(path.read_text(), object_hook=tuples)


def parse_arguments(text: str, **defaults) -> ConfigDict:
  """Returns the arguments of a configuration file, `configs/x.py:large,masking=random`.

  Args:
    text: values by name, or in the order of `defaults`.
    **defaults: the names, and values of the type that is expected.

  Raises:
    ConfigError: a name that is not among them, or a value of another type.
  """
  values, names = ConfigDict(defaults), list(defaults)
  for i, word in enumerate(filter(None, text.split(","))):
    name, value = word.split("=", 1) if "=" in word else (names[i] if i < len(names) else "", word)
    if name not in defaults:
      known = ", ".join(f"{key}={default}" for key, default in defaults.items())
      raise ConfigError(f"the argument {word!r} is not one of {known}")
    try:
      values[name] = type(defaults[name])(value)
    except ValueError:
      message = f"the argument {word!r}: expected a value like {defaults[name]!r}"
      raise ConfigError(message) from None
  return values


def token_size(config: ConfigDict) -> int:
  """Returns the side of a token in pixels."""
  fields = config.encoder
  return fields.patch_size if fields.name == "vit" else math.prod(fields.patch_sizes)


def teacher_sections(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns the teachers that are set, by their keys: "teacher", "extra_teachers.NAME"."""
  sections = {"teacher": config.teacher}
  sections |= {f"extra_teachers.{name}": extra for name, extra in config.extra_teachers.items()}
  is_set = lambda c: isinstance(c, ConfigDict) and (c.get("name") or c.get("path"))
  return {key: options for key, options in sections.items() if is_set(options)}


def teacher_options(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns the teachers that are set, by the names of their losses: "mimic", "mimic_NAME"."""
  loss = lambda key: "_".join(["mimic", *key.split(".")[1:]])
  return {loss(key): options for key, options in teacher_sections(config).items()}


# --- What is derived from the schema ---


def flatten(section: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
  """Returns the values of a configuration by their full names, {"optim.blr": 1.5e-4, ...}."""
  flat = {}
  for name, value in section.items():
    is_section = isinstance(value, (ConfigDict, dict))
    flat |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
  return flat


def find_keys(config: ConfigDict) -> dict[str, Key]:
  """Returns the keys of a configuration by their full names.

  They follow from its task, the kind of its encoder, its extra teachers and its evaluators.
  """
  sections = dict(TASKS[config.task].sections)
  sections["encoder"] = ENCODERS[config.encoder.name]
  sections["evals"] = {name: EVALS.get(name, {}) for name in config.evals}
  if "extra_teachers" in sections:
    sections["extra_teachers"] = dict.fromkeys(config.extra_teachers, TEACHER)
  return flatten(sections)


def find_mistake(value, key: Key) -> str:
  """Returns what is wrong with the value of a key, or "" if it is right."""
  default = key.default
  if default is None:
    words = {str: "a text", bool: "True or False"}[key.unset]
    return "" if value is None or isinstance(value, key.unset) else f"must be {words}"
  if is_tuple := isinstance(default, tuple):
    if not isinstance(value, (tuple, list)) or not (key.many or len(value) == len(default)):
      count = {2: "two numbers", 3: "three numbers"}.get(len(default), "several values")
      return f"must hold {count}, e.g. {default}"
  kind = key.many or type(default[0] if is_tuple else default)
  for x in value if is_tuple else (value,):
    fits = isinstance(x, (int, float) if kind is float else kind)
    if not fits or (isinstance(x, bool) and kind is not bool):
      return f"must be {'made ' if is_tuple else ''}of type {kind.__name__}, like {default!r}"
    if isinstance(key.allowed, Rule) and not key.allowed.test(x):
      return f"must {key.allowed.words}"
    if type(key.allowed) is tuple and x not in key.allowed:
      return f"is not one of {', '.join(key.allowed)}"
  return ""


def describe(config: ConfigDict) -> list[tuple[str, Any, str]]:
  """Returns (name, value, meaning and choices) of every key of a configuration.

  Raises:
    ConfigError: the configuration lacks whole sections.
  """
  require_sections(config)
  keys, rows = find_keys(config), []
  for name, value in flatten(config).items():
    key = keys.get(name, Key(None, ""))
    choices = f" ({', '.join(key.allowed)})" if type(key.allowed) is tuple else ""
    rows.append((name, value, key.help + choices))
  return rows


def departures(config: ConfigDict) -> list[tuple[str, Any, Any]]:
  """Returns (name, value, default) of the keys that differ from the recipe; None if absent.

  Raises:
    ConfigError: the configuration lacks whole sections.
  """
  require_sections(config)
  recipe = defaults(config.task)
  if recipe.encoder.name != config.encoder.name:
    recipe.encoder = encoder(config.encoder.name, "base")
  values, standard = flatten(config), flatten(recipe)
  rows = [(n, values.get(n), standard.get(n)) for n in sorted(values.keys() | standard.keys())]
  return [row for row in rows if row[1] != row[2]]


def shared_values(config: ConfigDict) -> dict[str, Any]:
  """Returns what must be equal on all hosts: a flat configuration without locations, as JSON."""
  return _without(config, "local")


def identity(config: ConfigDict) -> dict[str, Any]:
  """Returns what must stay equal when a run resumes, flat, as JSON: all that changes its numbers.

  Teachers and pretrained weights count by their values, which the task names, not by their paths;
  images by their fingerprint, wherever they lie.
  """
  # Keys that came later count where they are set: older runs, which lack them, resume.
  usual = {f"encoder.{name}": key.default for name, key in TOWER.items()}
  usual |= {f"optim.{x}": OPTIM[x].default for x in LATER}
  usual |= {"data.exif": "ignore"}
  usual = {name: _as_json(x) for name, x in usual.items()}
  values = _without(config, "local", "free")
  return {name: x for name, x in values.items() if name not in usual or x != usual[name]}


def _as_json(value):
  return list(value) if isinstance(value, tuple) else value


def _without(config: ConfigDict, *kinds: str) -> dict[str, Any]:
  keys = find_keys(config)
  return {
    name: _as_json(value)
    for name, value in flatten(config).items()
    if name not in keys or keys[name].resume not in kinds
  }


def require_sections(config: ConfigDict) -> None:
  """Raises a ConfigError unless `find_keys` can tell the keys of a configuration."""
  task = getattr(config, "task", None)
  starts = "start from {}() of mrmae_jax.config"
  if not isinstance(config, ConfigDict) or not isinstance(task, str) or task not in TASKS:
    names = ", ".join(TASKS)
    hint = starts.format("(), ".join(TASKS))
    raise ConfigError(f"config.task={task!r} is not one of {names}; {hint}")
  schema = TASKS[task]
  for name in (*(n for n, key in schema.sections.items() if isinstance(key, dict)), "evals"):
    if not isinstance(config.get(name), ConfigDict):
      raise ConfigError(f"config.{name} must be a section with keys; {starts.format(task)}")
  kind = config.encoder.get("name")
  if kind not in ("convvit", "vit"):
    raise ConfigError(f"config.encoder.name={kind!r} must be 'convvit' or 'vit'")
  if set(config.encoder) != set(ENCODERS[kind]):
    raise ConfigError(
      f"config.encoder has keys {sorted(config.encoder)}; a {kind} takes {sorted(ENCODERS[kind])}: "
      "make it with encoder() of mrmae_jax.config"
    )
  for name in config.evals:
    if name not in (known := dict.fromkeys((*schema.evals, *("knn",) * schema.takes_knn))):
      raise ConfigError(
        f"config.evals.{name} is not an evaluator of the task {task!r}; it has {', '.join(known)}"
      )
