"""The command line of `mrmae`: every command, its options and their help. Imports nothing heavy.

A command COMMAND is carried out by `run(options)` of the module `mrmae_jax.cli.COMMAND`, with
underscores for dashes; all trainings, the commands of `TASKS`, by that of `mrmae_jax.cli.train`.
"""

import argparse
import difflib
import re
from typing import Callable, NoReturn

from mrmae_jax.errors import UsageError

IMAGES = (
  "folder:/path (or a .zip or .tar), digits, tfds:NAME, hf:NAME, wds:PATTERN, packed:/path, "
  "scenes:/path, coco:/path"
)
PANELS = ("reconstruction", "ratios", "focused", "attention", "pca", "cosine", "neighbors")
# The training commands, and the tasks that they train.
TASKS = {
  "pretrain": "pretrain",
  "finetune": "finetune",
  "segment": "segment",
  "detect": "detect",
  "probe": "probe",
  "teacher": "self_distill",
}
COMMANDS = {
  "pretrain": "pre-train: MR-MAE, ConvMAE or MAE (--config=mrmae:base)",
  "finetune": "fine-tune a classifier (--config=finetune:base)",
  "segment": "train a class for every pixel (--config=segment:convmae_base)",
  "detect": "train boxes, classes and masks of objects (--config=detect:convmae_base)",
  "probe": "linear probe by the published protocol (--config=probe)",
  "teacher": "train a small teacher on your own images, without labels (--config=teacher)",
  "doctor": "would this run start, how long would it take, and are its settings sound?",
  "features": "features of images to a file",
  "knn": "k-NN, few-shot and linear accuracy of such files",
  "evaluate": "accuracy of a fine-tuned model, or of several as one, in all and per class",
  "predict": "the class of each image, by one model or several; of each pixel; or the objects",
  "visualize": "reconstructions, attention, features of a model, as pictures and a page",
  "report": "one page about a run or several: curves, throughput, pictures",
  "convert": "weights in the names of ConvMAE, timm or Hugging Face",
  "export": "a model as StableHLO, to be called without this project",
  "verify": "decode every image of a data set, list those that cannot be read",
  "pack": "a data set in shards that are read faster",
  "show-teacher": "what a teacher has to teach",
  "compile": "compile a training step for devices that need not be there",
  "bench": "speed of the step, of the loader, and of both together",
  "sweep": "run and compare the points of a sweep (--config=sweeps/lr)",
  "replay": "do a step again whose loss was not finite",
}


class Parser(argparse.ArgumentParser):
  """An argparse parser whose mistakes are `UsageError`s."""

  def __init__(self, **kwargs):
    # Without "=" a prefix of an option would count as the option.
    super().__init__(
      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )

  def error(self, message: str) -> NoReturn:
    command = self.prog.removeprefix("mrmae").strip()
    if message.startswith("the following arguments are required: "):
      missing = message.split(": ", 1)[1]
      verb = "are" if "," in missing else "is"
      message = f"{missing} {verb} missing"
    if match := re.match(r"argument (--\S+): ignored explicit argument '(.*)'", message):
      name, value = match.groups()
      switch = " or ".join(name.split("/")) + (" or leave it out" if "/" not in name else "")
      message = f"{name.split('/')[0]}={value} given; it takes no value: give {switch}"
    raise UsageError(f"{message}; see mrmae {command} --help".replace("  ", " "))


class UnknownWord(UsageError):
  """A word of a command line that is not an option of its command."""

  def __init__(self, word: str, command: str, names):
    """Suggests the nearest of the `names` of options."""
    self.name, equals, value = word.lstrip("-").partition("=")
    nearest = [self.name] if self.name in names else difflib.get_close_matches(self.name, names, 1)
    hint = f"see mrmae {command} --help"
    if self.name in names or self.name.startswith("config."):  # it lacks dashes
      nearest = [f"{self.name}{equals}{value}"]
    if nearest:
      hint = f"did you mean --{nearest[0]}?"
    super().__init__(f"{word!r} is not an option; {hint}")


# Types of options.


def integer(low: int, high: float = float("inf")) -> Callable[[str], int]:
  """Returns the type of a whole number from `low` to `high`."""

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = None
    if value is None or not low <= value <= high:
      limits = f"of {low} or more" if high == float("inf") else f"from {low} to {high}"
      raise argparse.ArgumentTypeError(f"{text!r} given; expected a whole number {limits}")
    return value

  return parse


def positive(text: str) -> float:
  """The type of a finite number > 0."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r} given; expected a finite number > 0")
  return value


def share(text: str) -> float:
  """The type of a number from 0 to 1."""
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text!r} given; expected a number from 0 to 1")
  return value


def comma_list(item: Callable = str, count: tuple[int, ...] = ()) -> Callable[[str], tuple]:
  """Returns the type of values separated by commas; "" is none. `count`: the lengths allowed."""

  def parse(text: str) -> tuple:
    try:
      values = tuple(item(part.strip()) for part in text.split(",") if part.strip())
    except argparse.ArgumentTypeError as error:
      raise argparse.ArgumentTypeError(f"{error}; commas separate values") from None
    if count and values and len(values) not in count:
      raise argparse.ArgumentTypeError(
        f"{text!r} given; expected {' or '.join(map(str, count))} values separated by commas"
      )
    return values

  return parse


# Options that several commands have.


def _splits(parser: Parser, of_run: bool = False) -> None:
  """Adds the options of how images are split; with `of_run` the model's run says by default."""
  default = {
    "data_dir": "",
    "train_split": "train",
    "eval_split": "validation",
    "holdout_every": 10,
    "labels": "",
  }
  default = dict.fromkeys(default) if of_run else default
  as_run = "; default: as the run" if of_run else ""
  parser.add_argument(
    "--data_dir", default=default["data_dir"], help="where tfds looks for prepared data sets"
  )
  parser.add_argument(
    "--train_split",
    default=default["train_split"],
    help=f"sub-folder or tfds split for training; .: all sub-folders are classes{as_run}",
  )
  parser.add_argument("--eval_split", default=default["eval_split"], help="the same for evaluation")
  parser.add_argument(
    "--holdout_every",
    type=integer(0),
    default=default["holdout_every"],
    help=f"images without splits: every k-th is for evaluation; 0: none{as_run}",
  )
  parser.add_argument(
    "--labels",
    default=default["labels"],
    metavar="FILE",
    help=f"table of the labels of a folder, CSV or TSV: file, label{as_run}",
  )


def _images(parser: Parser, prefix: str = "") -> None:
  """Adds the options of images that are those of the model's run by default."""
  parser.add_argument("--images", help=f"{prefix}{IMAGES}; default: those of the run")
  _splits(parser, of_run=True)


def _image_size(parser: Parser) -> None:
  parser.add_argument(
    "--image_size",
    type=comma_list(integer(1), (1, 2)),
    default=(),
    metavar="SIDE or HEIGHT,WIDTH",
    help="in pixels, multiples of the token size; default: as the model was trained",
  )


def _dtype(parser: Parser) -> None:
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the computation; results are float32",
  )


def _statistics(parser: Parser) -> None:
  for name, words in (("mean", "mean"), ("std", "standard deviation")):
    parser.add_argument(
      f"--{name}",
      type=comma_list(float),
      default=(),
      help=f"{words} of each channel, of pixels in [0, 1], for files that do not tell",
    )


def _exif(parser: Parser) -> None:
  parser.add_argument(
    "--exif",
    choices=("ignore", "apply"),
    help="orientation in the EXIF of a photograph; default: as the run, else ignore",
  )


def _crop(parser: Parser) -> None:
  parser.add_argument(
    "--crop",
    type=float,
    help="central share of the resized image that is encoded; default: as the run, else 0.875",
  )


def _bad_images(parser: Parser, max_skipped: float = 0.01, quarantine: str | None = None) -> None:
  parser.add_argument(
    "--quarantine",
    default=quarantine,
    help="list of images to leave out, written by mrmae verify"
    + ("; default: as the run" if quarantine is None else ""),
  )
  parser.add_argument(
    "--on_error",
    choices=("raise", "skip"),
    default="raise",
    help="for unreadable images; skip: they are named and left out",
  )
  parser.add_argument(
    "--max_skipped",
    type=float,
    default=max_skipped,
    help="largest share of the images that --on_error=skip may skip",
  )


def _heads(parser: Parser, decoder: bool = True) -> None:
  help_text = "attention heads{}, for files that do not tell"
  parser.add_argument("--num_heads", type=integer(0), default=0, help=help_text.format(""))
  if decoder:
    parser.add_argument(
      "--decoder_heads", type=integer(0), default=0, help=help_text.format(" of the decoder")
    )


def _weights(parser: Parser) -> None:
  parser.add_argument(
    "--weights",
    default="",
    help="of a file with several networks, the one to take, e.g. ema; default: the report tells",
  )


def _config(parser: Parser, default: str | None = None) -> None:
  parser.add_argument(
    "--config",
    default=default,
    required=default is None,
    metavar="NAME",
    help="configuration: a file, or the name of one that comes with the package, e.g. "
    "mrmae:base; --config.KEY=VALUE changes a key",
  )
  parser.set_defaults(overrides=[])


def _training(parser: Parser) -> None:
  _config(parser)
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    help="folder, or gs://BUCKET/FOLDER, for checkpoints, metrics and pictures; holds one run",
  )
  parser.add_argument(
    "--check", action="store_true", help="open the data, compile, run one step, write nothing"
  )
  parser.add_argument(
    "--multihost",
    action="store_true",
    help="train with the processes of the other hosts (found out on TPU VMs, GKE, Slurm)",
  )
  parser.add_argument(
    "--coordinator_address",
    metavar="HOST:PORT",
    help="of process 0, or MRMAE_COORDINATOR_ADDRESS",
  )
  parser.add_argument(
    "--num_processes", type=integer(1), help="over all hosts, or MRMAE_NUM_PROCESSES"
  )
  parser.add_argument(
    "--process_id", type=integer(0), help="of this process, from 0, or MRMAE_PROCESS_ID"
  )
  parser.add_argument(
    "--init_timeout", type=integer(1), default=300, help="seconds to wait for the others"
  )


# The commands.


def _pretrain(parser: Parser) -> None:
  parser.epilog = """\
Run the same command again to resume an interrupted run.

Exit codes: 0 done; 1 other hosts did not come or are gone; 2 a mistake in the command or its files;
3 an image that cannot be read; 4 losses that are not finite; 5 storage; 6 a hang; 75 stopped by a
signal and saved."""
  _training(parser)


def _teacher(parser: Parser) -> None:
  parser.epilog = """\
  mrmae teacher --config=teacher --workdir=DIR

trains a ViT without labels, in the manner of DINO or by contrast (config.distill.objective), and
writes its folder, which config.teacher.path and transformers' ViTModel read. Labels serve the k-NN
evaluation alone. Run the same command again to resume, or to write the folder again. Exit codes are
those of mrmae pretrain."""
  _training(parser)
  parser.add_argument(
    "--out", metavar="DIR", help="folder for the teacher's files; default: WORKDIR/teacher"
  )


def _doctor(parser: Parser) -> None:
  parser.epilog = """\
Takes the command line of a training command and runs the cheap checks first: settings
that differ from the defaults, the learning rate, the images, the teacher, the workdir and its disk,
then the compiled step: FLOPs, memory and time. Writes nothing but the picture. Lines begin with
"ok", "warn" (the run would start, but this is rarely meant) or "stop". Exit code: 0 if the run
would start, else the one it would end with."""
  _training(parser)
  parser.add_argument(
    "--out", default="", metavar="PNG", help="a picture of the first images as training sees them"
  )
  parser.add_argument(
    "--compile",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="compile the step, and time three of them",
  )


def _features(parser: Parser) -> None:
  parser.epilog = """\
  mrmae features --model=RUN --images=folder:/my/photos --out=features.npz

Every image of the split is encoded exactly once, in order, nothing masked. The .npz holds features
float32 [N, D], names [N], labels int32 [N] (-1 for none), class_names, and about: a JSON text of
how they were made. Patch tokens are [N, T, D], row by row, maps [N, H, W, D]. The .parquet holds
the columns name, label, class_name, feature. The file
appears whole or not at all. `mrmae knn` measures what .npz files are worth."""
  parser.add_argument(
    "--model",
    required=True,
    help='workdir, weight file, ViTMAE folder, or "pixels" for the normalized pixels themselves',
  )
  parser.add_argument(
    "--untrained", action="store_true", help="fresh weights (seed 0) for the encoder: a baseline"
  )
  _images(parser)
  _bad_images(parser)
  parser.add_argument("--split", choices=("train", "eval"), default="train", help="which images")
  parser.add_argument("--out", required=True, help="the file, .npz or .parquet")
  parser.add_argument(
    "--feature",
    choices=("pooled", "cls", "tokens", "stage1", "stage2"),
    default="pooled",
    help="the mean over the tokens, the CLS token, all patch tokens, or the map of a convolutional "
    "stage",
  )
  _image_size(parser)
  _statistics(parser)
  _crop(parser)
  _exif(parser)
  parser.add_argument("--batch_size", type=integer(1), default=64, help="images at a time")
  _dtype(parser)
  _heads(parser, decoder=False)
  _weights(parser)


def _knn(parser: Parser) -> None:
  parser.epilog = """\
  mrmae features --model=RUN --images=folder:/my/photos --split=train --out=train.npz
  mrmae features --model=RUN --images=folder:/my/photos --split=eval --out=eval.npz
  mrmae knn --train=train.npz --eval=eval.npz --out=knn.json

k-NN: DINO's protocol. Few-shot: nearest class mean, several draws of the labelled images. Linear: a
layer behind BatchNorm without scale and shift, trained with SGD at a grid of learning rates. As is
usual in the field, the best rate is chosen on the images it is measured on; the file shows all. The
published protocol, with random crops and LARS, is `mrmae probe`."""
  parser.add_argument("--train", required=True, help=".npz of the training images, with labels")
  parser.add_argument("--eval", required=True, help=".npz of the images to measure on, with labels")
  parser.add_argument("--out", required=True, help="the result file, .json")
  parser.add_argument(
    "--k",
    type=comma_list(integer(1)),
    default=(10, 20, 100, 200),
    help="numbers of neighbors; empty: no k-NN",
  )
  parser.add_argument("--temperature", type=positive, default=0.07, help="of the neighbors' votes")
  parser.add_argument(
    "--shots",
    type=comma_list(integer(1)),
    default=(1, 5, 10),
    help="labelled images per class; empty: no few-shot",
  )
  parser.add_argument("--draws", type=integer(1), default=10, help="independent choices of these")
  parser.add_argument(
    "--blr",
    type=comma_list(positive),
    default=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    help="base learning rates of the linear probe, the peak is blr * batch_size / 256; empty: none",
  )
  parser.add_argument("--epochs", type=integer(1), default=90, help="of the linear probe")
  parser.add_argument("--batch_size", type=integer(1), default=256, help="of the linear probe")
  parser.add_argument(
    "--seed",
    type=integer(0),
    default=0,
    help="of the draws, and of the linear probe's weights and order",
  )


def _classifiers(parser: Parser, prefix: str) -> None:
  """Adds the options that `evaluate` and `predict` share; `prefix` says which images they take."""
  parser.add_argument(
    "--models",
    type=comma_list(),
    required=True,
    help="workdirs of fine-tuning or weight files, separated by commas: several count as one",
  )
  _images(parser, prefix)
  parser.add_argument(
    "--split", choices=("train", "eval"), default="eval", help="which, of images with splits"
  )
  _bad_images(parser)
  parser.add_argument(
    "--classes",
    default="",
    metavar="FILE",
    help="for weight files without names: the names of the classes, one per line in their order",
  )
  parser.add_argument(
    "--average",
    choices=("probabilities", "logits"),
    default="probabilities",
    help="of several models",
  )
  _crop(parser)
  _exif(parser)
  parser.add_argument("--batch_size", type=integer(1), default=64, help="images at a time")
  _heads(parser, decoder=False)


def _evaluate(parser: Parser) -> None:
  parser.epilog = """\
  mrmae evaluate --models=RUN                                       # the run's held-out images
  mrmae evaluate --models=RUN1,RUN2 --images=folder:/my/photos --out=DIR

Classes are compared by name, whatever their order: those of the images must be among those of the
model, and several models must have the same. Each model sees the images at its own size. Of images
that are not those of the runs and have no splits all are measured. DIR gets result.json,
classes.csv (of each class: images, accuracy, precision), confusion.csv and confusion.png (rows: the
true class); of several models these tables are the ensemble's."""
  _classifiers(parser, "images with labels: ")
  parser.add_argument("--out", default="", metavar="DIR", help="a folder for the tables")


def _predict(parser: Parser) -> None:
  parser.epilog = """\
  mrmae predict --models=RUN --images=folder:/my/photos --out=classes.csv
  mrmae predict --models=upernet.safetensors --images=folder:/my/photos --out=DIR
  mrmae predict --models=mask_rcnn.safetensors --images=folder:/my/photos --out=DIR

The file holds the columns name, class and probability, a row for each image in order. The images
need no labels. A segmentation model takes a folder: labels/ gets a PNG for each image, of its size,
whose values are the classes of the pixels; overlays/ the image under their colors; classes.csv the
value, name, color and share of each class. So does a detector: results.json gets boxes, classes,
scores and masks as COCO writes results, images.json the ids of images and classes, overlays/ the
image with its objects, classes.csv the number of these. File or folder appear whole or not at
all."""
  _classifiers(parser, "")
  parser.add_argument(
    "--out", required=True, help="the file, .csv or .parquet; for pixels and objects a new folder"
  )
  parser.add_argument(
    "--mode",
    choices=("slide", "whole"),
    default="slide",
    help="of segmentation: through windows of the size of training, or the whole image at once",
  )
  parser.add_argument(
    "--scales",
    type=comma_list(positive),
    default=(1.0,),
    help="of segmentation: sizes of the image, relative to training, whose results are averaged",
  )
  parser.add_argument(
    "--flip", action="store_true", help="of segmentation: average with the mirrored image"
  )
  parser.add_argument(
    "--min_score",
    type=share,
    help="of detection: score of the objects that are drawn and counted; default: 0.3",
  )


def _visualize(parser: Parser) -> None:
  parser.epilog = """\
  mrmae visualize --model=RUN --out=DIR                          # the run's held-out images
  mrmae visualize --model=vit-mae-base --images=/my/photos --teacher=clip_vit_b16 --out=DIR

Panels (all that can be drawn; the page says why others cannot):
  reconstruction  what the encoder sees, what the decoder makes of it
  ratios          the same with 50 to 95 % of the patches hidden
  focused         a teacher's attention, and the patches that focused and random masking show
  attention       what the model attends to, in each head of its last block
  pca             patch features as colors, beside the teacher's
  cosine          where a run's features, through its mimic head, are the teacher's and where not
  neighbors      the most similar images of the source, by the mean of the patch features"""
  parser.add_argument("--model", required=True, help="workdir, weight file or ViTMAE folder")
  _images(parser, "an image, a folder, or ")
  parser.add_argument(
    "--split",
    choices=("train", "eval"),
    help="which images; default: the held-out ones of a run, else train",
  )
  _bad_images(parser, max_skipped=1.0)  # a few images are shown
  _exif(parser)
  parser.add_argument(
    "--out", required=True, metavar="DIR", help="folder for index.html and a PNG per panel"
  )
  parser.add_argument(
    "--panels",
    type=comma_list(),
    default=(),
    help=f"some of {', '.join(PANELS)}; default: all that can be drawn",
  )
  parser.add_argument("--count", type=integer(1), default=6, help="images shown, evenly spaced")
  _image_size(parser)
  parser.add_argument("--teacher", help="preset or path; default: the run's own, with its options")
  parser.add_argument(
    "--query",
    type=comma_list(integer(0), (2,)),
    default=(),
    metavar="ROW,COLUMN",
    help="of the patch, from 0, whose attention is drawn; default: CLS, else the mean",
  )
  parser.add_argument("--neighbors", type=integer(1), default=5, help="neighbors of each image")
  parser.add_argument(
    "--bank",
    type=integer(0),
    default=1000,
    help="images among which they are sought, evenly spaced; 0: all",
  )
  parser.add_argument(
    "--norm_pix",
    action=argparse.BooleanOptionalAction,
    help="whether the decoder predicts normalized patches; default: as the weights tell, else yes. "
    "No for mae_visualize_*.pth of MAE",
  )
  parser.add_argument("--seed", type=integer(0), default=0, help="of the masks")
  _heads(parser)
  _weights(parser)


def _report(parser: Parser) -> None:
  parser.epilog = """\
  mrmae report --runs=RUN1,RUN2 --out=report.html

A folder of runs, such as that of a sweep, counts as all of them. The page is one file that opens
anywhere, offline too."""
  parser.add_argument(
    "--runs",
    type=comma_list(),
    required=True,
    help="workdirs, or folders of workdirs, separated by commas",
  )
  parser.add_argument("--out", default="report.html", help="the page")


def _convert(parser: Parser) -> None:
  parser.epilog = """\
  mrmae convert --model=RUN --out=encoder.safetensors --format=convmae --parts=encoder

Formats: convmae, a ConvViT in the names of Alpha-VL/ConvMAE; timm, a ViT in those of timm and
facebookresearch/mae; hf, a ViT as a folder of transformers' ViTMAE; mmseg, a segmentation model in
mmsegmentation's names; detectron2, a detector in detectron2's. The parameters are the same bit for
bit, on the way and back. What is left out by design (mimic heads) is printed."""
  parser.add_argument("--model", required=True, help="workdir, weight file or ViTMAE folder")
  parser.add_argument(
    "--out", required=True, help="the .safetensors file; with --format=hf the folder"
  )
  parser.add_argument(
    "--format",
    choices=("convmae", "timm", "hf", "mmseg", "detectron2"),
    default="convmae",
    help="names of the tensors",
  )
  parser.add_argument(
    "--parts",
    choices=("all", "encoder"),
    default="all",
    help="the whole model, or without decoder and classifier",
  )
  _heads(parser)
  _weights(parser)


def _export(parser: Parser) -> None:
  parser.epilog = """\
  mrmae export --model=RUN --out=DIR

Writes the encoder, or the classifier of a fine-tuned model, as StableHLO by jax.export, for CPUs,
GPUs and TPUs and for any number of images: model.stablehlo, params.npz, call.py and a README.md
that says how to call it. It takes uint8 images and normalizes them itself. Then call.py runs in a
process without this project, and its numbers are compared. The folder appears whole or not at
all."""
  parser.add_argument("--model", required=True, help="workdir, weight file or ViTMAE folder")
  parser.add_argument("--out", required=True, help="the folder to write; it may not exist")
  parser.add_argument(
    "--parts",
    choices=("all", "encoder"),
    default="all",
    help="logits where there is a classifier, or the features all the same",
  )
  _image_size(parser)
  _dtype(parser)
  _heads(parser, decoder=False)
  _weights(parser)


def _verify(parser: Parser) -> None:
  parser.epilog = """\
  mrmae verify --source=folder:/my/photos --json=report.json --quarantine=bad.json
  mrmae pretrain --config=photos --workdir=DIR --config.data.source=folder:/my/photos \\
      --config.data.quarantine=bad.json

Decodes every image and prints a report in JSON: how many images, which are bad and why, how large
they are (shorter side), how many are gray, CMYK, 16-bit, with alpha, animated, or turned by their
EXIF orientation (see config.data.exif), and mean and deviation of each channel, for
config.data.mean and std. An image is bad if training cannot read it, or if it is a JPEG whose
decoder notices damage. Not all damage can be seen: of random changes of one byte, all are found in
PNGs and one in six in JPEGs. Exit code: 0 all images are good, 3 some are bad.

Of scenes (scenes:/path) labels are decoded too: each has a class of classes.txt in every pixel and
the size of its image. The report holds the share of each class. Of COCO's data (coco:/path)
annotations are checked too, and that each image has the size that they say."""
  parser.add_argument("--source", required=True, help=f"images: {IMAGES}")
  parser.add_argument(
    "--zero_is_unlabelled",
    type=str.lower,
    choices=("true", "false"),
    default="",
    help="of scenes: true if 0 means unlabelled and 1 is the first class, as in ADE20K",
  )
  parser.add_argument(
    "--splits", type=comma_list(), default=(), help="train, eval or both; default: those there are"
  )
  _splits(parser)
  parser.add_argument(
    "--channels",
    type=integer(1),
    default=3,
    help="of the images: as many as the run's config.data.mean has numbers",
  )
  parser.add_argument(
    "--workers", type=integer(0), default=0, help="decoding processes; 0: one per core"
  )
  parser.add_argument("--json", default="", help="a file for the report, too")
  parser.add_argument(
    "--quarantine", default="", help="a file for the list of bad images, for config.data.quarantine"
  )


def _pack(parser: Parser) -> None:
  parser.epilog = """\
  mrmae pack --source=folder:/path/to/imagenet --out=/data/imagenet256 --short_side=256
  mrmae pack --verify=/data/imagenet256

The result is a source as well, --config.data.source=packed:/data/imagenet256, with the order,
names, labels and classes of the original. Without --short_side the bytes stay as they are, so every
batch is the same too. With it, larger images are resized as evaluation does it and encoded as JPEG
(4:2:0 chroma): loading is faster, but crops have less detail, which is another data set. Every
image is decoded once: one that cannot be is named, and nothing is written. Splits are fixed here; a
run's own are not asked then. Shards are ArrayRecord files, next to index.json with their sha256;
the folder appears whole or not at all."""
  parser.add_argument("--source", help=f"images: {IMAGES}")
  parser.add_argument("--out", help="the folder to write; it may not exist")
  parser.add_argument(
    "--verify", help="instead: a packed folder whose checksums are compared", metavar="DIR"
  )
  parser.add_argument(
    "--splits", type=comma_list(), default=(), help="train, eval or both; default: those there are"
  )
  _splits(parser)
  _bad_images(parser, quarantine="")
  parser.add_argument(
    "--short_side",
    type=integer(0),
    default=0,
    help="shrink images to this shorter side in pixels; 0: keep their bytes",
  )
  parser.add_argument(
    "--quality", type=integer(1, 100), default=95, help="of JPEGs written for --short_side"
  )
  parser.add_argument(
    "--shards", type=integer(0), default=0, help="files per split; 0: one per 10,000 images"
  )


def _show_teacher(parser: Parser) -> None:
  parser.epilog = """\
  mrmae show-teacher --config=mrmae --images=folder:/my/photos --out=teacher.png

takes the teacher, image size and masking of a configuration. Each row of the picture is one image:
what its CLS token attends to, the tokens that focused and random masking would show the student,
and the three main directions of the features as colors. The text says what share of the normalized
features is one constant vector, which a student learns without looking (near 0 is good; with most
of it constant choose another config.teacher.layer or target_norm), and over how many tokens the
attention spreads (few: raise config.method.attention_temperature or attention_mix)."""
  _config(parser, default="mrmae")
  parser.add_argument("--images", help=f"{IMAGES}; default: those of the configuration")
  parser.add_argument("--out", default="teacher.png", help="the picture")
  parser.add_argument("--count", type=integer(1), default=6, help="rows of the picture")
  parser.add_argument(
    "--statistics", type=integer(1), default=256, help="images behind the printed numbers"
  )


def _compile(parser: Parser) -> None:
  parser.epilog = """\
  mrmae compile --config=mrmae:base --config.teacher.path=random --topology=v5e:4x4
  mrmae compile --config=mrmae:base --config.teacher.path=random --topology=h100

The program is the one that training runs, compiled by XLA for every chip of the topology, on any
machine: for TPUs with the tpu extra, for GPUs with gpu-compile. TPUs are written as Google Cloud
does: v4:2x2x1, v5e:4x4, v5p:2x2x4, v6e:16x16; GPUs are a100, h100 or h200, or h100:8 for eight. Of
each chip: arguments, temporaries and peak against its memory, FLOPs, bytes, and what is exchanged
with the others. The time is a roofline, the larger of FLOPs over peak and bytes over bandwidth: a
bound that no run beats, not a forecast. Of GPUs also what the kernels are, by part of the model."""
  _config(parser, default="mrmae")
  parser.add_argument(
    "--topology",
    default="",
    help="chips to compile for, e.g. v5e:4x4 or h100:8; default: those that are present",
  )
  parser.add_argument(
    "--images",
    type=integer(1),
    default=1_281_167,
    help="training images, for the epochs per day",
  )
  parser.add_argument(
    "--sweep_batch", action="store_true", help="look for the largest batch size that fits"
  )
  parser.add_argument("--json", default="", help="a .json file for the figures")


def _bench(parser: Parser) -> None:
  commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", parser_class=Parser)
  commands.required = True
  step = commands.add_parser("step", help="the training step of a configuration on random images")
  _config(step, default="mrmae")
  step.add_argument(
    "--batch_sizes",
    type=comma_list(integer(1)),
    default=(),
    help="images per step, one or several; default: the configuration's",
  )
  step.add_argument(
    "--rounds",
    type=integer(1),
    default=10,
    help="how often each is timed: a step on a CPU, 30 in a row elsewhere",
  )
  step.add_argument("--profile", default="", help="a folder for a trace of the last batch size")
  both = commands.add_parser("both", help="the real loop: what the step waits for")
  _config(both, default="mrmae")
  both.add_argument("--steps", type=integer(1), default=20, help="steps that are timed")
  loader = commands.add_parser("loader", help="the input pipeline, beside a torch DataLoader")
  loader.add_argument("--source", required=True, help=f"images: {IMAGES}; all are used")
  loader.add_argument("--data_dir", default="", help="where tfds looks for prepared data sets")
  loader.add_argument(
    "--image_size", type=integer(1), default=224, help="side of the crops in pixels"
  )
  loader.add_argument("--batch_size", type=integer(1), default=64, help="images per batch")
  loader.add_argument(
    "--workers",
    type=integer(0),
    default=2,
    help="processes of each loader; 0: ours in threads, torch in the main process",
  )
  loader.add_argument(
    "--images",
    type=integer(1),
    default=960,
    help="timed images per loader and round, at least; each worker makes 4 batches or more",
  )
  loader.add_argument("--rounds", type=integer(1), default=5, help="how often each is timed")
  loader.add_argument(
    "--memory_batches",
    type=integer(0),
    default=0,
    help="instead: stream this many batches and print the memory",
  )
  for benchmark in (step, both, loader):
    benchmark.add_argument("--json", default="", help="a .json file for the figures")
    _debug(benchmark)


def _sweep(parser: Parser) -> None:
  parser.epilog = """\
  mrmae sweep --config=sweeps/lr --workdir=DIR --parallel=2

A configuration with a function sweep(), a generator of overrides, is a sweep. Each point has a
folder named by what it changes. Run the same command again to resume: finished points are skipped.
sweep.csv, sweep.md and sweep.png in the workdir compare the last values and the curves."""
  _config(parser)
  parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the points")
  parser.add_argument(
    "--do",
    choices=("run", "print", "slurm", "tpu", "table"),
    default="run",
    help="run the points here, print their commands, write a Slurm or TPU script, or compare",
  )
  parser.add_argument("--parallel", type=integer(1), default=1, help="points at a time")
  parser.add_argument(
    "--metrics",
    type=comma_list(),
    default=(),
    help="of the table, e.g. loss,knn/accuracy; default: all losses and evaluations",
  )
  parser.add_argument("--plot", default="loss", help="the metric that is drawn")


def _replay(parser: Parser) -> None:
  parser.epilog = """\
Computes the step of a bundle that a run with too many non-finite steps has written, compares
every number with what the run reported (bit for bit, if the devices are of the same kind and
number), and names the parts of the parameters whose gradients are not finite."""
  parser.add_argument(
    "--bundle", required=True, metavar="DIR", help="WORKDIR/nonfinite/step_N, written by the run"
  )
  parser.add_argument(
    "--float32",
    action="store_true",
    help="compute in float32: if the numbers are good then, bfloat16 was the cause",
  )


def _debug(parser: Parser) -> None:
  parser.add_argument(
    "--debug", action="store_true", help="show where in the code an error came from"
  )


_ADD_OPTIONS = {
  "pretrain": _pretrain,
  "finetune": _pretrain,
  "segment": _pretrain,
  "detect": _pretrain,
  "probe": _pretrain,
  "teacher": _teacher,
  "doctor": _doctor,
  "features": _features,
  "knn": _knn,
  "evaluate": _evaluate,
  "predict": _predict,
  "visualize": _visualize,
  "report": _report,
  "convert": _convert,
  "export": _export,
  "verify": _verify,
  "pack": _pack,
  "show-teacher": _show_teacher,
  "compile": _compile,
  "bench": _bench,
  "sweep": _sweep,
  "replay": _replay,
}


def make_parser() -> Parser:
  """Returns the parser of the whole command line."""
  parser = Parser(
    prog="mrmae",
    description="MR-MAE in JAX: pre-training, and everything people do with such an encoder.",
    epilog="`mrmae COMMAND --help` lists the options of a command, `mrmae --version` the version.",
  )
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
  commands.required = True
  for name, description in COMMANDS.items():
    command = commands.add_parser(name, help=description, description=description)
    _ADD_OPTIONS[name](command)
    _debug(command)
  return parser


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses a command line without the program's name.

  Overrides of the configuration, --config.KEY=VALUE, are left as they are in `overrides`.

  Raises:
    UsageError: an unknown command or option, a missing option, or a value that does not fit.
    SystemExit: help was asked for, and printed.
  """
  if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
    nearest = difflib.get_close_matches(argv[0], [*COMMANDS, "--version"], 1)
    hint = f"did you mean {nearest[0]}?" if nearest else "mrmae --help lists them"
    raise UsageError(f"{argv[0]!r} is not a command; {hint}")
  _check_names(argv)
  options, rest = make_parser().parse_known_args(argv)
  for action in _find_parser(argv)._actions:  # --x= counts as missing
    if action.required and getattr(options, action.dest) == "":
      raise UsageError(f"--{action.dest} is missing; see mrmae {options.command} --help")
  if hasattr(options, "overrides"):
    options.overrides = [word for word in rest if word.startswith("--config.")]
    rest = [word for word in rest if not word.startswith("--config.")]
  if rest:
    raise UnknownWord(rest[0], options.command, vars(options))
  return options


def _check_names(argv: list[str]) -> None:
  """Raises UsageError for an option that the command has not, before one that it misses."""
  names = {
    name.lstrip("-") for action in _find_parser(argv)._actions for name in action.option_strings
  }
  for word in argv[1:]:
    name = word.split("=")[0]
    is_short = re.match("-[A-Za-z]", name) and name != "-h"
    is_unknown = name.startswith("--") and name[2:] not in names
    if is_short or is_unknown and not name.startswith("--config."):
      raise UnknownWord(word, argv[0], names)


def _find_parser(argv: list[str]) -> Parser:
  """Returns the parser of the command, and benchmark, that a command line names."""
  parser, names = make_parser(), [word for word in argv if not word.startswith("-")]
  for name in names[:2]:
    groups = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    if not groups or name not in groups[0].choices:
      break
    parser = groups[0].choices[name]
  return parser


def help_text(argv: list[str]) -> str:
  """Returns the help of the command that a command line names, or of all of them."""
  return _find_parser(argv).format_help()
