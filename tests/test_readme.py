"""What a newcomer types: the notebook runs, the options of every command of the README exist, and
(slow) every command runs.

The README's code blocks are shell scripts; so are its tables of commands. They run here in order,
in a folder that looks like a checkout. Places that the README leaves open (/path/to/photos, DIR,
RUN) are filled in. A stand-in of `mrmae`, first on PATH, adds options to what would take hours or
has no network, and checks the exit code; SHORTER below has them all. What is not for this machine
(clouds, containers, installations) is answered by stand-ins that do nothing; tests/test_launch.py
plays their part properly.

  python -m pytest -m slow tests/test_readme.py
"""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrmae_jax import __main__ as entry
from mrmae_jax import config
from mrmae_jax.cli import parser
from tests.helpers.programs import run_program

ROOT = Path(__file__).parent.parent
TEACHER = (
  "--config.teacher.name= --config.teacher.path=tests/goldens/teachers/hf_clip_full "
  "--config.teacher.dtype=float32"
)
RUN = (
  "--config.batch_size=8 --config.epochs=0.5 --config.optim.warmup_epochs=0.2 "
  "--config.dtype=float32"
)
DIGITS = (
  "--config.data.source=digits --config.data.holdout_every=5 --config.epochs=0.05 "
  "--config.optim.warmup_epochs=0.02"
)
CONVVIT = (
  "--config.image_size=(32,32) --config.encoder.patch_sizes=(2,2,2) "
  "--config.encoder.embed_dims=(8,12,24) "
  "--config.encoder.depths=(1,1,4) --config.encoder.num_heads=2"
)
VIT = (
  "--config.image_size=(32,32) --config.encoder.patch_size=8 --config.encoder.dim=24 "
  "--config.encoder.depth=4 "
  "--config.encoder.num_heads=2 --config.encoder.mlp_dim=48"
)
DECODER = "--config.decoder.dim=16 --config.decoder.depth=1 --config.decoder.num_heads=2"
NARROW = (
  "--config.encoder.embed_dims=(8,12,24) --config.encoder.depths=(1,1,2) "
  "--config.encoder.num_heads=2"
)
FUSED = "--config.encoder.fuse_layers=(1,2)"
# (commands that contain this, options in addition, exit code); all that match count, the last code.
SHORTER = [
  (r"configs/demo\.py", "--config.epochs=0.2 --config.optim.warmup_epochs=0.1", 0),
  (r"configs/demo_finetune\.py", "--config.epochs=0.2 --config.optim.warmup_epochs=0.1", 0),
  (r"configs/photos\.py", f"{RUN} {NARROW} {DECODER} --config.teacher.dtype=float32", 0),
  (r"^mrmae pretrain --config=configs/photos\.py.*clip_vit_b16", TEACHER, 0),
  (r"configs/(mrmae|convmae|mae)\.py", f"{RUN} {DECODER} {DIGITS}", 0),
  (r"configs/(mrmae|convmae)\.py:base( |$)", CONVVIT, 0),
  (r"configs/mae\.py|encoder=vit", VIT, 0),
  (r"configs/mrmae\.py", f"{FUSED} {TEACHER}", 0),
  (r"configs/(finetune|probe)\.py:base", f"{CONVVIT} {DIGITS}", 0),
  (r"^mrmae (finetune|probe) --config=configs/(finetune|probe)\.py", RUN, 0),
  (r"^mrmae finetune --config=configs/finetune\.py", "--config.mix.groups=1", 0),
  (r"^mrmae ensemble", "--images=digits --holdout_every=5", 0),
  (r"^mrmae sweep .*mimic_weight", "--config.epochs=0.2 --config.optim.warmup_epochs=0.1", 0),
  (r"^mrmae sweep --config=configs/sweeps/lr\.py --workdir=\S*$", "--do=print", 0),
  (
    r"^mrmae teacher",
    "--config.epochs=1 --config.batch_size=8 --config.optim.warmup_epochs=0.1",
    0,
  ),
  (r"configs/teacher\.py:photos", f"{VIT} --config.dtype=float32", 0),
  (r"^mrmae visualize .*clip_vit_b16", "--teacher=tests/goldens/teachers/hf_clip_full", 0),
  (r"^mrmae knn --train=train", "--batch_size=16", 0),
  (r"^mrmae bench (step|both)", "--steps=2", 0),
  (r"^python -m benchmarks", "--rounds=1", 0),
  (r"^mrmae bench loader", "--rounds=1 --images=32 --batch_size=8 --workers=0", 0),
  (r"memory_batches=1000", "--memory_batches=20", 0),
  (r"^mrmae pack .*--short_side=256", "--short_side=64", 0),
  (r"^mrmae verify .*quarantine", "", 3),  # one image is broken by then
  (
    r"^mrmae pretrain .*photos_whole",
    "--config.epochs=2 --config.optim.blr=1e20 --config.optim.max_skips=2",
    4,
  ),  # for replay
  (r"^mrmae compile .*--topology", "", 0 if importlib.util.find_spec("libtpu") else 2),
  (r"--multihost$", "", 2),  # no cluster here
  (r"^mrmae doctor .*teacher.name=clip_vit_b16$", "", 2),  # no network here
  (r"^mrmae doctor .*teacher.path=dino.pth", "", 2),  # no such file
]
STAND_IN = f"""#!{sys.executable}
import json, os, re, subprocess, sys
module = os.environ.get("MODULE", "mrmae_jax")
program = "mrmae" if module == "mrmae_jax" else "python -m " + module
line, code = program + " " + " ".join(sys.argv[1:]), 0
words = sys.argv[1:]
for pattern, options, then in json.load(open(os.environ["PLACE"] + "/shorter.json")):
  if re.search(pattern, line):
    words, code = words + options.split(), then
command = [sys.executable, "-m", module, *words]
other = [word.replace("--process_id=0", "--process_id=1") for word in command]
others = [subprocess.Popen(other)] if other != command else []
got = [subprocess.run(command).returncode, *(other.wait() for other in others)]
if set(got) != {{code}}:
  sys.exit(f"exit codes {{got}}, expected {{code}}: {{line}}")
"""
PYTHON = f"""#!/bin/sh
case "$*" in
  "-m benchmarks."*) module=$2; shift 2; MODULE=$module exec mrmae "$@" ;;
  "-m pytest"*|*"import tensorflow_datasets"*) ;;  # the tests; the download of ImageNet
  *) exec {sys.executable} "$@" ;;
esac
"""
DRY_BASH = """#!/bin/sh
case "$1" in launch/*) exec /bin/bash "$@" --dry-run ;; *) exec /bin/bash "$@" ;; esac
"""
OTHER = "#!/bin/sh\n"


def blocks():
  """The README's scripts in order: (heading, text). A table of jobs is a script of its commands."""
  found = []
  for section in re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.M)[1:]:
    heading = section.partition("\n")[0]
    for match in re.finditer(r"```bash\n(.*?)```|((?:^\|[^\n]*\|\n)+)", section, re.S | re.M):
      text, table = match.groups()
      if table:
        options = re.findall(r"`(--config=configs/[^`]*)`", table)
        text = "\n".join(
          [
            *re.findall(r"`(mrmae [^`]* --[^`]*)`", table),
            *(f"mrmae pretrain --workdir=DIR {option} --check" for option in options),
          ]
        )
      elif text.startswith("--config."):  # options alone
        text = "".join(
          "mrmae doctor --no-compile --config=configs/photos.py "
          f"--config.data.source=folder:/path/to/photos {line}\n"
          for line in text.splitlines()
        )
      if text.strip():
        found.append((heading, text))
  return found


BLOCKS = blocks()


def commands():
  """Every command of `mrmae` and of the benchmarks in the README, as words."""
  for _, text in BLOCKS:
    for line in text.replace("\\\n", " ").splitlines():
      if re.search(r"\bmrmae |python -m benchmarks", line):
        words = shlex.split(line, comments=True)
        words = words[
          next((i for i, word in enumerate(words) if "=" not in word), 0) :
        ]  # environment variables
        if words[:2] == ["python", "-m"]:
          yield ["benchmarks", words[2].removeprefix("benchmarks."), *words[3:]]
        elif words and words[0] == "mrmae":
          yield words


FOUND = list(commands())
KEYS = {row[0] for schema in map(config.defaults, config.TASKS) for row in config.describe(schema)}


def test_there_are_commands_in_the_readme():
  assert len(FOUND) > 60
  assert {words[1] for words in FOUND if words[0] == "mrmae"} >= set(parser.COMMANDS)


@pytest.mark.parametrize("words", FOUND, ids=[" ".join(words[1:3])[:60] for words in FOUND])
def test_every_option_of_a_command_exists(words, capsys):
  """The sub-command and its options are known.

  Keys of the configuration are looked up in the schema.
  """
  name, options = words[1], [word for word in words[2:] if word.startswith("--")]
  if words[0] == "benchmarks":
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  else:
    assert name in parser.COMMANDS
    extra = [words[2]] if name == "bench" else []
    assert entry.main(["mrmae", name, *extra, "--help"]) == 0
    text = capsys.readouterr().out
  for option in options:
    key = option[2:].split("=")[0]
    if key.startswith("config."):
      assert key.removeprefix("config.") in KEYS | {"encoder.dim", "encoder.mlp_dim"}, option
    else:
      assert re.search(rf"--{key}\b", text), (option, text[:500])


SMALL = [
  "--config.encoder.embed_dims=(8, 12, 24)",
  "--config.encoder.depths=(1, 1, 2)",
  "--config.encoder.num_heads=2",
  "--config.decoder.dim=16",
  "--config.decoder.num_heads=2",
  "--config.evals.knn.bank=64",
]


@pytest.mark.parametrize(
  "epochs, options", [(0.2, SMALL), pytest.param(2, [], marks=pytest.mark.slow)]
)
def test_the_notebook_runs(tmp_path, epochs, options):
  """Its cells, one after another, in a fresh process; only the slow form has the demo's model."""
  cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
  code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
  assert not any(cell.get("outputs") for cell in cells)
  for words, shorter in (
    ("EPOCHS = 16", f"EPOCHS = {epochs}"),
    ("/tmp/mrmae_quickstart", f"{tmp_path}/run"),
    ('"pretrain",', f'"pretrain", *{options},'),
  ):
    assert code.count(words) == 1
    code = code.replace(words, shorter)
  done = run_program(["-c", code], timeout=900)
  assert done.returncode == 0, done.stderr[-2000:]
  assert (
    re.search(r"mimic \(1, [\d.]+\) -> \(\d+, [\d.]+\)", done.stdout)
    and "held-out digits have a nearest neighbor" in done.stdout
  )


def images(folder, count, size, classes=2):
  """PNG pictures of smooth noise, in a folder for each class."""
  rng = np.random.default_rng(0)
  for i in range(count):
    path = folder / f"class{i % classes}" / f"{i:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    small.resize((size[1] + i, size[0]), Image.Resampling.BICUBIC).save(path)


class Place:
  """A folder to type the README's commands in."""

  def __init__(self, path):
    self.path, self.numbers = path, itertools.count()
    for name in ("configs", "launch", "tests", "mrmae_jax", "setup.cfg"):
      (path / name).symlink_to(ROOT / name)
    stand_ins = {
      "mrmae": STAND_IN,
      "python": PYTHON,
      "bash": DRY_BASH,
      **dict.fromkeys(("pip", "docker", "sbatch", "squeue", "sky"), OTHER),
    }
    (path / "bin").mkdir()
    for name, text in stand_ins.items():
      (path / "bin" / name).write_text(text)
      (path / "bin" / name).chmod(0o755)
    (path / ".venv" / "bin").mkdir(parents=True)
    (path / ".venv" / "bin" / "activate").touch()
    (path / "shorter.json").write_text(json.dumps(SHORTER))
    images(path / "photos", 40, (90, 70))
    for split, count in (("train", 200), ("test", 40)):
      images(path / "cifar" / split, count, (32, 32), classes=10)
    for i in range(24):
      (folder := path / "multispectral" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
      np.save(
        folder / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (170, 230, 4), np.uint8)
      )

  def run(self, text):
    """Runs a script with its open places filled in."""
    tmp, names = (
      str(self.path),
      {"RUN": "/tmp/mrmae_demo", "PRETRAINED": "/tmp/pretrained", "TEACHER": "/tmp/cifar_teacher"},
    )
    if "CIFAR" in text:
      names["RUN"] = "/tmp/cifar_run"
    names |= {
      "RUN1": "/tmp/mrmae_demo",
      "RUN2": "/tmp/pretrained",
      "FEW": "/tmp/few",
      "CIFAR": "/tmp/cifar",
      "HOST0:8476": "localhost:28476",
      "FINETUNED_1": "/tmp/mrmae_demo_finetuned",
      "FINETUNED_2": "/tmp/finetuned",
      "/path/to/imagenet": "/tmp/photos",
      "/path/to/bands": "/tmp/multispectral",
      "/shared": "/tmp",
      "/tmp/run1": "/tmp/mrmae_demo",
      "mae_pretrain_vit_base.pth": "mae_pretrain_vit_base.safetensors",
    }
    text = re.sub(r"/path/to/(photos|images)", "/tmp/photos", text)
    for name, value in names.items():
      text = (
        re.sub(rf"(?<![\w/]){re.escape(name)}\b", value, text)
        if name[0] != "/"
        else text.replace(name, value)
      )
    text = re.sub(r"=DIR\b", lambda _: f"=/tmp/dir{next(self.numbers)}", text)
    text = text.replace("/tmp/", tmp + "/")
    environment = dict(
      os.environ,
      PLACE=tmp,
      PATH=f"{tmp}/bin:{os.environ['PATH']}",
      HF_HUB_OFFLINE="1",
      XLA_FLAGS="--xla_backend_optimization_level=0",
    )
    done = subprocess.run(
      ["/bin/bash", "-euo", "pipefail", "-c", text],
      cwd=self.path,
      env=environment,
      capture_output=True,
      text=True,
      timeout=1200,
      check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """The folder, with what the README takes for granted: the demo, another run, and public files."""
  place = Place(tmp_path_factory.mktemp("readme"))
  place.run(BLOCKS[0][1])
  place.run("""
      mrmae pretrain --config=configs/mrmae.py:base --workdir=/tmp/pretrained
      mrmae pretrain --config=tests/tiny.py:vit --workdir=/tmp/vit
      mrmae convert --model=/tmp/vit --format=hf --out=vit-mae-base
      mrmae convert --model=/tmp/vit --format=timm --out=mae_pretrain_vit_base.safetensors
      ln -s tests/goldens/teachers/hf_clip_full clip-b16
      """)
  return place


@pytest.mark.slow
@pytest.mark.parametrize(
  "number",
  range(len(BLOCKS)),
  ids=[f"{heading}-{text.split()[1][:20]}" for heading, text in BLOCKS],
)
def test_it_runs(place, number):
  heading, text = BLOCKS[number]
  if heading == "Fine-tuning":
    text = text.replace("=DIR", "=/tmp/finetuned", 1)
  elif heading == "Nothing lost":
    (place.path / "photos" / "class0" / "broken.png").write_bytes(b"<html>404</html>")
    text = text.replace(
      "step_1200", "step_4"
    )  # the first has no rate, the second spoils the weights
  place.run(text)
