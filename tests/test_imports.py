"""Imports flow one way, heavy packages have one home, and training needs no torch."""

import ast
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import coco

ROOT = Path(__file__).parent.parent
MODULES = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
  for path in (ROOT / "mrmae_jax").rglob("*.py")
  if "configs" not in path.parts
)
HEAVY = ("torch", "tensorflow", "transformers", "keras")


# The rooms from the ground up. A module imports from its own room and from those below.
FLOORS = (
  ("errors", "constants", "target", "bilinear", "boxes", "interpolation"),
  ("hardware", "program", "sweep", "sharding", "optim", "mixup", "models", "config"),
  ("mrmae", "checks", "runs", "segmentation", "detection"),
  ("reconstruction", "data", "weights", "viz"),
  ("pretrained", "teachers", "train", "evals"),
  ("__init__", "preflight", "tasks"),
  ("cli",),
  ("__main__",),
)


def room_of(module):
  return (f"{module}.__init__").split(".")[1]


@functools.cache
def import_graph():
  """{module: the modules of the package that it imports, anywhere in its file}."""
  files = {module: ROOT / f"{module.replace('.', '/')}.py" for module in MODULES}
  files = {m: f if f.is_file() else f.with_suffix("") / "__init__.py" for m, f in files.items()}
  graph = {}
  for module, file in files.items():
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        full = {f"{node.module}.{alias.name}" for alias in node.names}
        names |= {name if name in files else node.module for name in full}
    graph[module] = names.intersection(files) - {module}
  return graph


def test_no_import_climbs():
  floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
  assert {room_of(module) for module in MODULES} == set(floor)
  climbs = [
    f"{module} imports {name}"
    for module, names in import_graph().items()
    for name in names
    if room_of(module) != room_of(name) and floor[room_of(name)] >= floor[room_of(module)]
  ]
  assert not climbs, climbs


def test_no_imports_in_a_circle():
  graph, done = import_graph(), set()

  def visit(module, path):
    assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
    if module not in done:
      for name in graph[module]:
        visit(name, [*path, module])
      done.add(module)

  for module in graph:
    visit(module, [])


def loaded(code):
  """Top-level packages in a clean process after `code`."""
  done = subprocess.run(
    [sys.executable, "-c", f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return set(done.stdout.split())


def test_no_module_imports_torch_tensorflow_or_transformers():
  modules = list(MODULES)
  if not importlib.util.find_spec("datasets"):  # an extra
    modules.remove("mrmae_jax.data.sources.hf")
  assert not loaded("\n".join(f"import {m}" for m in modules)).intersection(HEAVY)


@pytest.mark.parametrize(
  "path, options",
  [("hf_clip_vision_sharded", ""), ("timm_clip.safetensors", "num_heads=4, activation='gelu'")],
)
def test_loading_safetensors_imports_neither_torch_nor_transformers(path, options):
  packages = loaded(
    "from mrmae_jax import teachers\n"
    f"options = teachers.TeacherOptions(path='tests/goldens/teachers/{path}', {options})\n"
    "spec = teachers.read_spec(options, teachers.StudentImages((32, 32), 8))\n"
    "assert teachers.load(spec).dim == 48"
  )
  assert "jax" in packages and not packages.intersection((*HEAVY, "huggingface_hub"))


def test_the_package_is_light_until_a_student_is_loaded(tmp_path):
  from safetensors.numpy import load_file

  from mrmae_jax.weights import files

  weights = load_file(ROOT / "tests" / "goldens" / "mae_pretrain.safetensors")
  files.write_safetensors(
    tmp_path / "mae.safetensors",
    {name.removeprefix("param."): x for name, x in weights.items() if name.startswith("param.")},
  )
  assert not loaded("import mrmae_jax").intersection(("jax", "numpy", "flax", *HEAVY))
  packages = loaded(
    f"import mrmae_jax, numpy\nmodel = mrmae_jax.load('{tmp_path}/mae.safetensors', num_heads=3, "
    "decoder_heads=4)\n"
    "model.encode(numpy.zeros((1, 32, 32, 3), numpy.uint8))"
  )
  assert "jax" in packages and not packages.intersection(
    (*HEAVY, "huggingface_hub", "grain", "tensorflow_datasets")
  )


def test_pictures_of_others_import_no_digits(tmp_path):
  """scikit-learn takes seconds, in each process of a loader."""
  address = coco.write(tmp_path / "data")
  packages = loaded(
    "from mrmae_jax import data\nfrom mrmae_jax.data.sources import scenes\n"
    f"source = data.open_source('{address}', 'train', eval_split='val', max_dropped=0.0)\n"
    "assert len(source[0]['objects'].ids) == 2"
  )
  assert "grain" in packages and "sklearn" not in packages


def test_a_training_run_imports_neither_torch_nor_tensorflow(tmp_path):
  code = (
    "import sys; from mrmae_jax import __main__ as main\n"
    "sys.argv = ['mrmae', 'pretrain', '--config=tests/faults/small.py', '--config.epochs=0.03', "
    f"'--workdir={tmp_path}/run', "
    "'--config.optim.warmup_epochs=0.0']\nassert main.main() == 0"
  )
  packages = loaded(code)
  assert "jax" in packages and (tmp_path / "run" / "checkpoints").is_dir()
  assert not packages.intersection(HEAVY)


@pytest.mark.parametrize(
  "package, allowed",
  [
    ("flax.linen", ("models/",)),
    ("orbax", ("runs/checkpoint.py",)),
    ("grain", ("data/",)),
    ("tensorflow_datasets", ("data/",)),
    ("datasets", ("data/sources/hf.py",)),
    ("pycocotools", ("data/sources/segmentations.py", "evals/coco_ap.py")),
    ("matplotlib", ("viz/",)),
    ("tensorboardX", ("runs/tensorboard.py",)),
    ("torch", ("weights/torch_files.py", "cli/bench/")),
    ("huggingface_hub", ("weights/hub.py",)),
    ("tensorflow", ()),
    ("transformers", ()),
  ],
)
def test_each_heavy_package_has_one_home(package, allowed):
  package_dir = ROOT / "mrmae_jax"
  users = {
    str(path.relative_to(package_dir))
    for path in package_dir.rglob("*.py")
    for line in path.read_text().splitlines()
    if line.strip().startswith((f"import {package}", f"from {package}"))
    and f"{line.split()[1]}.".startswith(f"{package}.")
  }
  assert all(user.startswith(allowed) for user in users) if allowed else not users
  assert not allowed or users  # the rule is about something


def test_the_loop_knows_no_model_and_no_loss():
  text = (ROOT / "mrmae_jax" / "train.py").read_text()
  assert "mrmae_jax.models" not in text and "import mrmae" not in text and "teachers" not in text
