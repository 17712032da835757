"""mrmae: everything that can be done, as sub-commands. `mrmae COMMAND --help` tells the options of each.

  mrmae pretrain --config=configs/demo.py --workdir=/tmp/demo
  mrmae features --model=/tmp/demo --images=folder:/my/photos --out=features.npz

(`python -m mrmae_jax COMMAND` is the same.)"""

import difflib
import importlib
import sys
from pathlib import Path

TASKS = {  # command -> config.task
  "pretrain": "pretrain",
  "finetune": "finetune",
  "probe": "probe",
  "teacher": "self_distill",
}
COMMANDS = {
  "pretrain": (None, "pre-train: MR-MAE, ConvMAE or MAE (--config=configs/mrmae.py:base)"),
  "finetune": (None, "fine-tune a classifier (--config=configs/finetune.py:base)"),
  "probe": (None, "linear probe by the published protocol (--config=configs/probe.py)"),
  "doctor": (
    "doctor",
    "would this run start, how long would it take, and are its settings sound? Writes nothing",
  ),
  "features": ("features", "features of images to a file"),
  "knn": ("knn", "k-NN, few-shot and linear accuracy of such files"),
  "ensemble": ("ensemble", "accuracy of several fine-tuned models together"),
  "visualize": (
    "visualize",
    "reconstructions, attention, features of a model, as pictures and a page",
  ),
  "report": ("report", "one page about a run or several: curves, throughput, pictures"),
  "convert": ("convert", "weights in the names of ConvMAE, timm or Hugging Face"),
  "verify": ("verify", "decode every image of a data set, list those that cannot be read"),
  "pack": ("pack", "a data set in shards that are read faster"),
  "teacher": (None, "train a small teacher without labels (--config=configs/teacher.py)"),
  "show-teacher": ("show_teacher", "what a teacher has to teach"),
  "compile": ("compile", "compile a training step for devices that need not be there"),
  "bench": ("bench.__main__", "benchmarks of the step, the loader and others' code"),
  "sweep": (None, "run and compare the points of a sweep (--config=configs/sweeps/lr.py)"),
  "replay": ("replay", "do a step again whose loss was not finite"),
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code of the sub-command, see there."""
  argv = sys.argv if argv is None else argv
  if not {"", str(Path.cwd())}.intersection(
    sys.path
  ):  # as python -m has it: configurations import their neighbours
    sys.path.insert(0, str(Path.cwd()))
  name = argv[1] if len(argv) > 1 else "--help"
  if name in ("-h", "--help", "--helpfull", "help"):
    print(
      __doc__, *(f"  {command:<13} {what}" for command, (_, what) in COMMANDS.items()), sep="\n"
    )
    return 0
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    print(
      f"error: {name!r} is no command; {f'did you mean {near[0]}?' if near else 'mrmae --help lists them'}",
      file=sys.stderr,
    )
    return 2
  rest = [f"{argv[0]} {name}", *argv[2:]]
  if name in TASKS:
    from mrmae_jax.cli import train as training  # each command loads what it needs

    return training.command(rest, TASKS[name])
  if name == "sweep":
    launch = Path(__file__).parent.parent / "launch" / "sweep.py"
    if not launch.is_file():
      print(
        "error: the launch scripts are not part of the installed package; run mrmae sweep in a checkout of the repository, "
        "installed with pip install -e .",
        file=sys.stderr,
      )
      return 2
    sys.path.insert(0, str(launch.parent.parent))
    return importlib.import_module("launch.sweep").main(rest)
  return importlib.import_module(f"mrmae_jax.cli.{COMMANDS[name][0]}").main(rest)


if __name__ == "__main__":
  sys.exit(main())
