"""What a reader types works: README.md, every page of docs/, and the notebook.

Fast: every option of every command exists, every link leads somewhere, the notebook runs, and the
page of all configuration keys is the one that the schema gives.

Slow: every block of code runs, and so does every table of commands. The blocks of a page run in
order, in a folder that looks like a checkout and holds a finished demo. What a page leaves open
(/path/to/photos, DIR, RUN) is filled in. A stand-in of `mrmae`, first on PATH, adds options to what
would take hours or has no network, and checks the exit code; SHORTER below has them all. What is
not for this machine (clouds, containers, installations) is answered by stand-ins that do nothing;
tests/test_launch.py plays their part properly.

  python -m pytest -n 0 -m slow tests/test_docs.py
  python -m pytest -n 0 -m slow tests/test_docs.py -k data.md     # the blocks of one page
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from mrmae_jax import __main__ as entry
from mrmae_jax import config
from mrmae_jax.cli import parser
from mrmae_jax.weights import writers
from tests.helpers import coco
from tests.helpers.models import make_detector, make_segmenter
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
DOCTOR = "mrmae doctor --no-compile --config=photos --config.data.source=folder:/path/to/photos"
# (commands that contain this, options in addition, exit code); all that match count, the last code.
SHORTER = [
  (r"--config=demo( |$)", "--config.epochs=0.2 --config.optim.warmup_epochs=0.1", 0),
  (r"--config=demo_finetune", "--config.epochs=0.2 --config.optim.warmup_epochs=0.1", 0),
  # The configurations that start from the demo's run name it.
  (
    r"--config=(demo_finetune|segment_demo|detect_demo)(?!.*init_from)",
    "--config.init_from=/tmp/mrmae_demo",
    0,
  ),
  (r"--config=segment_demo", "--config.epochs=0.02 --config.optim.warmup_epochs=0.01", 0),
  (
    r"--config=segment:",
    f"{RUN} {CONVVIT} --config.upernet.channels=8",
    0,
  ),
  (
    r"--config=detect_demo",
    "--config.epochs=0.008 --config.optim.warmup_steps=1 --config.batch_size=8",
    0,
  ),
  (
    r"--config=detect:",
    f"{RUN} {CONVVIT.replace('(32,32)', '(64,64)', 1)} --config.rcnn.channels=8 "
    "--config.rcnn.position_grid=(4,4) --config.rcnn.window=3 --config.rcnn.box_hidden=16 "
    "--config.rcnn.train_proposals=(32,32) --config.rcnn.roi_sample=16",
    0,
  ),
  (r"--config=photos", f"{RUN} {NARROW} {DECODER} --config.teacher.dtype=float32", 0),
  (r"^mrmae pretrain --config=photos.*clip_vit_b16", TEACHER, 0),
  (r"--config=(mrmae|convmae|mae):", f"{RUN} {DECODER} {DIGITS}", 0),
  (r"--config=(mrmae|convmae):base( |$)", CONVVIT, 0),
  (r"--config=mae:|encoder=vit", VIT, 0),
  (r"--config=mrmae:", f"{FUSED} {TEACHER}", 0),
  (r"--config=(finetune|probe):base( |$)", f"{CONVVIT} {DIGITS}", 0),
  (r"encoder=beitv2", f"{VIT} {DIGITS} --config.init_from=", 0),
  (r"^mrmae (finetune|probe) --config=(finetune|probe):", RUN, 0),
  (r"^mrmae finetune --config=finetune:", "--config.mix.groups=1", 0),
  (r"^mrmae (evaluate|predict)", "--images=digits --holdout_every=5", 0),
  (r"source=hf:", "", 2),  # no network here
  (r"^mrmae sweep .*mimic_weight", "--config.epochs=0.2 --config.optim.warmup_epochs=0.1", 0),
  (
    r"^mrmae teacher",
    "--config.epochs=1 --config.batch_size=8 --config.optim.warmup_epochs=0.1",
    0,
  ),
  (r"--config=teacher:photos", f"{VIT} --config.dtype=float32", 0),
  (r"^mrmae visualize .*clip_vit_b16", "--teacher=tests/goldens/teachers/hf_clip_full", 0),
  (r"^mrmae knn", "--batch_size=16", 0),
  (r"^mrmae bench step", "--rounds=2", 0),
  (r"^mrmae bench both", "--steps=2", 0),
  (r"--batch_sizes=128", "--batch_sizes=4", 0),
  (r"^mrmae bench loader", "--rounds=1 --images=32 --batch_size=8 --workers=0", 0),
  (r"memory_batches=1000", "--memory_batches=20", 0),
  (r"^python -m benchmarks", "--rounds=1", 0),
  (r"^python -m benchmarks.forms", "--dtype=float32 --batch_size=1", 0),
  (r"^mrmae pack .*--short_side=256", "--short_side=64", 0),
  (r"^mrmae verify .*quarantine", "", 3),  # one image is broken then
  (
    r"^mrmae pretrain .*photos_spike",
    "--config.epochs=2 --config.optim.blr=1e20 --config.optim.max_skips=2",
    4,
  ),  # for replay
  (r"^mrmae compile .*--topology=v", "", 0 if importlib.util.find_spec("libtpu") else 2),
  (
    r"^mrmae compile .*--topology=[ah]",
    "--config.batch_size=8",
    0 if importlib.util.find_spec("jax_cuda13_plugin") else 2,
  ),
  (r"--multihost$", "", 2),  # no cluster here
  (r"^mrmae doctor .*teacher.name=clip_vit_b16$", "", 2),  # no network here
  (r"^mrmae doctor .*teacher.path=dino.pth", "", 2),  # no such file
]
# (blocks that contain this, what is typed before them)
BEFORE = [
  (r"quarantine=", "echo '<html>404</html>' > photos/class0/broken.png"),
  (r"/both_", "for split in train eval; do tee one_$split.npz < $split.npz > two_$split.npz; done"),
]
STAND_IN = f"""#!{sys.executable}
import json, os, re, subprocess, sys
module = os.environ.get("MODULE", "mrmae_jax")
program = "mrmae" if module == "mrmae_jax" else "python -m " + module
line, code = program + " " + " ".join(sys.argv[1:]), 0
words = sys.argv[1:]
for pattern, options, then in json.load(open(os.environ["PLACE"] + "/shorter.json")):
  if re.search(pattern, line):
    options = options.replace("/tmp/", os.environ["PLACE"] + "/")
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
  # need torch, a checkout of ConvMAE, torchvision
  *"--pair=transformers"*|*"--pair=reference"*|*"--pair=mask_rcnn"*) ;;
  "-m benchmarks."*) module=$2; shift 2; MODULE=$module exec mrmae "$@" ;;
  "-m pytest"*|*"import tensorflow_datasets"*) ;;  # the tests; the download of ImageNet
  *) exec {sys.executable} "$@" ;;
esac
"""
DRY_BASH = """#!/bin/sh
case "$1" in launch/*) exec /bin/bash "$@" --dry-run ;; *) exec /bin/bash "$@" ;; esac
"""
OTHER = "#!/bin/sh\n"


class Block(NamedTuple):
  """A script of a page: a block of code, or the commands of a table."""

  page: str
  name: str
  text: str


def table_commands(table):
  """Returns the script of a table of commands, or "".

  Its first line names the columns: a "command" is typed as it is, a "configuration" is that of
  pre-training, and "options" choose a teacher.
  """
  head, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
  script = []
  for row in rows:
    for column, cell in zip(head, row):
      column, code = column.strip(), re.findall(r"`([^`]*)`", cell)
      if column == "command":
        script += [text for text in code if " -" in text]
      elif column == "configuration":
        script += [f"mrmae pretrain --workdir=DIR {text} --check" for text in code]
      elif column == "options":
        script += [f"{DOCTOR} {text}" for text in code]
  return "\n".join(script)


def read_blocks(page):
  """Returns the scripts of a page, in order."""
  blocks = []
  pattern = r"^( *)```(bash|python)\n(.*?)^\1```|((?:^\|[^\n]*\|\n)+)"
  for _, language, text, table in re.findall(pattern, (ROOT / page).read_text(), re.S | re.M):
    text = table_commands(table) if table else textwrap.dedent(text)
    if language == "python":
      text = f"python - <<'END'\n{text}END\n"
    if text:
      name = f"{page}-{len(blocks)}-{'-'.join(text.split()[:2])}"
      blocks.append(Block(page, name, text))
  return blocks


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def commands():
  """Returns every command of `mrmae` and of the benchmarks, as words: also those in sentences."""
  lines = [line for block in BLOCKS for line in block.text.replace("\\\n", " ").splitlines()]
  for page in PAGES:
    lines += re.findall(r"`((?:mrmae|python -m benchmarks)[. ][^`]*)`", (ROOT / page).read_text())
  found = {}
  for line in lines:
    if re.search(r"\bmrmae [a-z]|python -m benchmarks", line):
      words = shlex.split(line, comments=True)
      start = next((i for i, word in enumerate(words) if "=" not in word), 0)
      words = words[start:]  # without environment variables
      if words[:2] == ["python", "-m"]:
        words = ["benchmarks", words[2].removeprefix("benchmarks."), *words[3:]]
      if words and words[0] in ("mrmae", "benchmarks"):
        found[" ".join(words)] = words
  return list(found.values())


FOUND = commands()
KEYS = {row[0] for schema in map(config.defaults, config.TASKS) for row in config.describe(schema)}
KEYS |= {f"encoder.{name}" for keys in config.ENCODERS.values() for name in keys}


@functools.cache
def help_of(*words):
  """Returns the help of a command or of a benchmark."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    if words[0] == "benchmarks":
      with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{words[1]}").main(["--help"])
    else:
      assert entry.main([*words, "--help"]) == 0
  return text.getvalue()


def test_every_command_is_used_in_the_pages():
  assert len(FOUND) > 60
  assert {words[1] for words in FOUND if words[0] == "mrmae"} >= set(parser.COMMANDS)


@pytest.mark.parametrize("words", FOUND, ids=[" ".join(words)[:60] for words in FOUND])
def test_every_option_of_a_command_exists(words):
  """Keys of the configuration are looked up in the schema."""
  if words[0] == "mrmae":
    assert words[1] in parser.COMMANDS
  text = help_of(*words[: 3 if words[:2] == ["mrmae", "bench"] else 2])
  for option in (word for word in words if word.startswith("--") and word != "--help"):
    key = option[2:].split("=")[0]
    if key.startswith("config."):
      assert key.removeprefix("config.") in KEYS, option
    else:
      assert re.search(rf"--{key}\b", text), (option, text[:500])


# Links and form.


def without_code(text):
  """Returns Markdown without its blocks and spans of code."""
  text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)
  return re.sub(r"`[^`\n]*`", "`", text)


def anchors(page):
  """Returns the anchors of a page's headings, as repository pages and the site make them."""
  text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.S | re.M)
  headings = re.findall(r"^#+ (.*)$", text, re.M)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_something(name):
  page = ROOT / name
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
    if re.match(r"\w+:", target):
      continue  # another site
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists() and file.is_relative_to(ROOT), target
    assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_not_too_wide(name):
  """Rows of tables may be, and what a command has printed."""
  lines = re.sub(r"^```text.*?^```", "", (ROOT / name).read_text(), flags=re.S | re.M).splitlines()
  assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def test_the_readme_is_a_page():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@functools.cache
def program_text():
  """Returns the sources of package and launch scripts, texts over several lines joined."""
  files = [*ROOT.glob("mrmae_jax/**/*.py"), *ROOT.glob("launch/**/*.sh")]
  return re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in files))


OTHERS = ("Missing value for flag", "must hold two numbers")  # absl's; a number in words


@pytest.mark.parametrize("name", PAGES)
def test_messages_are_those_of_the_program(name):
  """Three words in a row of each message in a table of causes, as numbers and names vary."""
  for table in re.findall(r"((?:^\|[^\n]*\|\n)+)", (ROOT / name).read_text(), re.M):
    head, _, *rows = [re.split(r"(?<!\\)\|", line)[1:] for line in table.splitlines()]
    if head[0].strip() not in ("message", "what you see", "symptom"):
      continue
    for message in (text for row in rows for text in re.findall(r"`([^`]*)`", row[0])):
      parts = [part.split() for part in re.split(r"\.\.\.|\d\S*|'[^']*'", message)]
      runs = [part[i : i + 3] for part in parts for i in range(max(1, len(part) - 2))]
      texts = [" ".join(run) for run in runs if len(run) > 1 or len(runs) == 1]
      known = any(text in program_text() for text in texts)
      assert known or message.startswith(OTHERS), message


def test_the_page_of_all_keys_is_up_to_date():
  """If this fails: python docs/make_configuration.py."""
  script = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
  assert script["PAGE"].read_text() == script["make_page"]()


# What runs.


SMALL = [
  "--config.encoder.embed_dims=(8, 12, 24)",
  "--config.encoder.depths=(1, 1, 2)",
  "--config.encoder.num_heads=2",
  "--config.decoder.dim=16",
  "--config.decoder.num_heads=2",
  "--config.evals.knn.bank=64",
]


@pytest.mark.variant
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
  """A folder to type commands in."""

  def __init__(self, path):
    self.path, self.numbers = path, itertools.count()

  def furnish(self):
    """Makes the folder look like a checkout, with images, and with stand-ins first on PATH."""
    path = self.path
    for name in ("benchmarks", "configs", "launch", "tests", "mrmae_jax", "setup.cfg"):
      (path / name).symlink_to(ROOT / name)
    others = "pip docker gcloud ruff sbatch sky sphinx-build squeue".split()
    stand_ins = {"mrmae": STAND_IN, "python": PYTHON, "bash": DRY_BASH}
    (path / "bin").mkdir()
    for name, text in (stand_ins | dict.fromkeys(others, OTHER)).items():
      (path / "bin" / name).write_text(text)
      (path / "bin" / name).chmod(0o755)
    (path / ".venv" / "bin").mkdir(parents=True)
    (path / ".venv" / "bin" / "activate").touch()
    (path / "shorter.json").write_text(json.dumps(SHORTER))
    images(path / "photos", 40, (90, 70))
    writers.write_model(make_segmenter(), path / "upernet.safetensors", "mmseg")
    writers.write_model(make_detector(), path / "detector.safetensors", "detectron2")
    coco.write(path / "coco")
    for split in ("training", "validation"):
      images(path / "scenes/images" / split, 8, (64, 80), classes=1)
      for image in (path / "scenes/images" / split).rglob("*.png"):
        label = np.random.default_rng(0).integers(0, 4, Image.open(image).size[::-1], np.uint8)
        file = path / "scenes/annotations" / image.relative_to(path / "scenes/images")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(file)
    (path / "scenes/classes.txt").write_text("sky\nsea\nsand\n")
    (path / "shards").mkdir()
    with tarfile.open(path / "shards/train-0.tar", "w") as shard:
      for photo in (path / "photos").rglob("*.png"):
        shard.add(photo, photo.name)
    for split, count in (("train", 200), ("test", 40)):
      images(path / "cifar" / split, count, (32, 32), classes=10)
    for i in range(24):
      (folder := path / "multispectral" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
      np.save(
        folder / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (170, 230, 4), np.uint8)
      )

  def run(self, text):
    """Runs a script with its open places filled in."""
    tmp = str(self.path)
    names = {
      "RUN": "/tmp/cifar_run" if "CIFAR" in text else "/tmp/mrmae_demo",
      "PRETRAINED": "/tmp/pretrained",
      "TEACHER": "/tmp/cifar_teacher",
      "FEW": "/tmp/few",
      "CIFAR": "/tmp/cifar",
      "HOST0:8476": "localhost:28476",
      "FINETUNED": "/tmp/mrmae_demo_finetuned",
      "FINETUNED_1": "/tmp/mrmae_demo_finetuned",
      "FINETUNED_2": "/tmp/dir0",  # the first DIR of the page
      "/path/to/imagenet": "/tmp/photos",
      "/path/to/scenes": "/tmp/scenes",
      "/path/to/coco": "/tmp/coco",
      "/path/to/shards": "/tmp/shards",
      "/path/to/bands": "/tmp/multispectral",
      "/shared": "/tmp",
      "mae_pretrain_vit_base.pth": "mae_pretrain_vit_base.safetensors",
      "--model=convmae_upernet.pth --format=convmae": "--model=convmae_upernet.pth --format=timm",
      "convmae_upernet.pth": "upernet.safetensors",
      "mask_rcnn.safetensors": "detector.safetensors",
      "beitv2_base_patch16_224_pt1k_ft1k.pth": "tests/goldens/beitv2/timm_mean.safetensors",
      "/step_1200": "/step_4",  # the first step has no rate, the second spoils the weights
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
def furnished(tmp_path_factory):
  """A folder with what the pages take for granted: the demo, another run, and public files."""
  place = Place(tmp_path_factory.mktemp("furnished"))
  place.furnish()
  place.run("""
      mrmae pretrain --config=demo --workdir=/tmp/mrmae_demo
      mrmae pretrain --config=mrmae:base --workdir=/tmp/pretrained
      mrmae pretrain --config=tests/tiny.py:vit --workdir=/tmp/vit
      mrmae convert --model=/tmp/vit --format=hf --out=vit-mae-base
      mrmae convert --model=/tmp/vit --format=timm --out=mae_pretrain_vit_base.safetensors
      ln -s tests/goldens/teachers/hf_clip_full clip-b16
      """)
  return place.path


@pytest.fixture(scope="module")
def place_of(furnished, tmp_path_factory):
  """A function: page -> its folder, one for all of its blocks."""

  @functools.cache
  def make(page):
    path = tmp_path_factory.mktemp("page") / "folder"
    shutil.copytree(furnished, path, symlinks=True)
    return Place(path)

  return make


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_it_runs(place_of, block):
  place = place_of(block.page)
  for pattern, text in BEFORE:
    if re.search(pattern, block.text):
      place.run(text)
  place.run(block.text)
  (place.path / "photos" / "class0" / "broken.png").unlink(missing_ok=True)


def test_the_title_of_the_site_is_name_and_version(monkeypatch):
  monkeypatch.setattr(sys, "path", list(sys.path))
  conf = runpy.run_path(str(ROOT / "docs/conf.py"))
  assert re.fullmatch(r"mrmae_jax \d+\.\d+\.\d+", conf["html_title"])


def test_every_name_of_the_api_page_exists():
  module = "mrmae_jax"
  page = (ROOT / "docs/reference/api.md").read_text()
  for kind, name in re.findall(r"\.\. (currentmodule|auto\w+):: (\S+)", page):
    if kind in ("currentmodule", "automodule"):
      module = importlib.import_module(name).__name__
      continue
    place, _, leaf = (name if name.startswith("mrmae_jax.") else f"{module}.{name}").rpartition(".")
    assert hasattr(importlib.import_module(place), leaf), name
