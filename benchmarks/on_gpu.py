"""Runs what the first half hour with a GPU should answer, in slices that end within nine minutes.

  python -m benchmarks.on_gpu --slice=step --out=/tmp/gpu
  python -m benchmarks.on_gpu --slice=step --out=/tmp/gpu --tiny    # a rehearsal without a GPU

Slices:
  smoke    one step of each task on images of its own: does everything run?
  step     the speed of MR-MAE-B by batch size, with a profile of the largest
  kernels  the kernels of the tuned program; beside `mrmae compile --topology=h200` they say what
           tuning changes
  forms    attention and depthwise convolution, in the ways that they can be written
  peers    MAE and ConvMAE beside PyTorch's, eager and compiled; ConvMAE needs --reference, a
           checkout of the original code
  loader   the input pipeline with all cores; needs --source
  ladder   MAE, ConvMAE and MR-MAE on CIFAR-10 or the like for --epochs; needs --source and
           --teacher, see docs/cifar10.md
Each command of a slice is a process of its own and has what is left of the time. It prints to
OUT/NAME.log, its figures go to OUT/NAME.json. OUT/SLICE.json says what was run, for how long, and
with which exit code; null is for what the time was too short for.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.command import run_command
from mrmae_jax.cli.parser import Parser, integer
from mrmae_jax.errors import UsageError
from mrmae_jax.runs.paths import atomic_write

CHECK = "--check --workdir={out}/unused"
LADDER = "--config.data.source={source} --workdir={out}"
# {slice: {name: what follows `python -m`}}; words in braces are options, or stand in SIZES.
SLICES = {
  "smoke": {
    "smoke_pretrain": f"mrmae_jax pretrain --config=demo {CHECK}",
    "smoke_finetune": f"mrmae_jax finetune --config=demo_finetune --config.init_from= {CHECK}",
    "smoke_segment": f"mrmae_jax segment --config=segment_demo --config.init_from= {CHECK}",
    "smoke_detect": f"mrmae_jax detect --config=detect_demo --config.init_from= {CHECK}",
    "smoke_teacher": "mrmae_jax teacher --config=teacher --config.data.source=digits "
    f"--out={{out}}/unused_teacher {CHECK}",
  },
  "step": {
    "step": "mrmae_jax bench step {base} --batch_sizes={sizes} --profile={out}/trace {json}",
  },
  "kernels": {"kernels": "mrmae_jax compile {base} --config.batch_size={batch} {json}"},
  "forms": {
    "attention": "benchmarks.forms --operation=attention {forms} {json}",
    "depthwise": "benchmarks.forms --operation=depthwise {forms} {json}",
    "biased": "benchmarks.forms --operation=biased {biased} {json}",
  },
  "peers": {
    "transformers": "benchmarks.compare --pair=transformers --compile {mae} {json}",
    "reference": "benchmarks.compare --pair=reference --reference={reference} --compile {convmae} "
    "{json}",
  },
  "loader": {"loader": "mrmae_jax bench loader --source={source} {loader} {json}"},
  "ladder": {
    "mae": f"mrmae_jax pretrain --config=cifar10:mae,epochs={{epochs}} {LADDER}/mae",
    "convmae": f"mrmae_jax pretrain --config=cifar10:convmae,epochs={{epochs}} {LADDER}/convmae",
    "mrmae": f"mrmae_jax pretrain --config=cifar10:mrmae,epochs={{epochs}} {LADDER}/mrmae "
    "--config.teacher.path={teacher}",
  },
}
SIZES = {
  "base": "--config=mrmae:base --config.teacher.path=random",
  "sizes": "128,256,512,1024 --rounds=5",
  "batch": "256",
  "forms": "--batch_size=256",
  "biased": "--batch_size=8",
  "mae": "--config=mae:base --config.batch_size=128",
  "convmae": "--config=convmae:base --config.batch_size=128",
  "loader": f"--workers={os.cpu_count()}",
}
# On a CPU the demo's network takes the place of the base size, and every count is small.
TINY = {
  "base": "--config=demo",
  "sizes": "8 --rounds=2",
  "batch": "8",
  "forms": "--batch_size=1 --rounds=1 --dtype=float32",
  "biased": "--batch_size=1 --rounds=1 --dtype=float32",
  "mae": "--config=cifar10:mae --config.batch_size=4 --rounds=1",
  "convmae": "--config=cifar10:convmae --config.batch_size=4 --rounds=1",
  "loader": "--workers=0 --images=32 --batch_size=8 --rounds=1",
}
# {slice: options that it needs}
NEEDS = {"loader": ("source",), "ladder": ("source", "teacher")}


def run(options) -> str:
  """Runs a slice, and returns a line for each command.

  Raises:
    UsageError: an option that the slice needs is missing, or a command failed.
  """
  for name in NEEDS.get(options.slice, ()):
    if not getattr(options, name):
      raise UsageError(f"--slice={options.slice} needs --{name}")
  out = Path(options.out).expanduser().resolve()
  out.mkdir(parents=True, exist_ok=True)
  end, results = time.monotonic() + options.seconds, []
  for name, line in SLICES[options.slice].items():
    if name.startswith("reference") and not options.reference:
      continue
    words = vars(options) | (TINY if options.tiny else SIZES)
    line = line.format(**words | {"out": out, "json": f"--json={out}/{name}.json"})
    results.append({"name": name, "command": line} | _run_command(name, line, out, end))
    with atomic_write(out / f"{options.slice}.json") as tmp:
      tmp.write_text(json.dumps(results, indent=2) + "\n")
  lines = [f"{row['name']}: exit code {row['code']}, {row['seconds']:.0f} s" for row in results]
  if failed := [row["name"] for row in results if row["code"]]:
    raise UsageError("\n".join([*lines, f"failed: {', '.join(failed)}; see {out}/NAME.log"]))
  return "\n".join(lines)


def _run_command(name: str, line: str, out: Path, end: float) -> dict:
  """Runs `python -m LINE` until it or the time ends; returns its exit code and seconds."""
  start = time.monotonic()
  code = None
  if start < end:
    with (out / f"{name}.log").open("w") as log:
      command = [sys.executable, "-m", *shlex.split(line)]
      process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
      try:
        code = process.wait(end - start)
      except subprocess.TimeoutExpired:
        process.terminate()  # a training saves
        try:
          process.wait(20)
        except subprocess.TimeoutExpired:
          process.kill()
          process.wait()
  return {"code": code, "seconds": time.monotonic() - start}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code."""
  parser = Parser(prog="python -m benchmarks.on_gpu", description=__doc__)
  parser.add_argument("--slice", choices=tuple(SLICES), required=True, help="what is run")
  parser.add_argument("--out", required=True, help="a folder for logs and figures")
  parser.add_argument("--seconds", type=integer(1), default=500, help="time of the slice")
  parser.add_argument("--tiny", action="store_true", help="a rehearsal: small networks and counts")
  parser.add_argument("--source", default="", help="images of loader and ladder")
  parser.add_argument("--teacher", default="", help="of the ladder, made by `mrmae teacher`")
  parser.add_argument("--epochs", default="2", help="of the ladder, see configs/cifar10.py")
  parser.add_argument("--reference", default="", help="a checkout of the original ConvMAE code")
  parser.add_argument("--debug", action="store_true", help="show where an error came from")
  return run_command(parser, run, argv)


if __name__ == "__main__":
  sys.exit(main())
