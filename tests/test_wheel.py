"""The wheel: it carries every module, every configuration and the demo's teacher, and it works.

An installed wheel runs every command outside a checkout.
"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel of a copy of the sources, so that the checkout stays free of build/."""
  source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in ("mrmae_jax", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    subprocess.run(["cp", "-R", "-P", str(ROOT / name), str(source)], check=True)
  code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
  subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
  (path,) = out.glob("*.whl")
  return path


def expected_files(root: Path) -> set[str]:
  """The files of the package, configs/ among them under its name there."""
  files = {path.relative_to(root).as_posix() for path in (root / "mrmae_jax").rglob("*.py")}
  configs = [*(root / "configs").rglob("*.py"), *(root / "configs" / "demo_teacher").iterdir()]
  return files | {f"mrmae_jax/{path.relative_to(root).as_posix()}" for path in configs}


def test_the_wheel_has_every_module_and_configuration_and_nothing_else(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  files = {name for name in names if ".dist-info/" not in name}
  assert files == expected_files(ROOT)


@pytest.mark.slow
def test_an_installed_wheel_works_outside_a_checkout(wheel, tmp_path):
  """In an environment of its own, with the other packages of this one, in an empty folder."""
  venv, folder = tmp_path / "venv", tmp_path / "empty"
  folder.mkdir()
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
  (site_packages,) = venv.glob("lib/python*/site-packages")
  zipfile.ZipFile(wheel).extractall(site_packages)
  # As a plain path: .pth files of that folder, such as that of an editable install, do not count.
  (site_packages / "others.pth").write_text(sysconfig.get_path("purelib"))
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

  def run(*words):
    command = [str(venv / "bin" / "python"), *words]
    done = subprocess.run(
      command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

  path = run("-c", "import mrmae_jax; print(mrmae_jax.__file__)")
  assert path.startswith(str(site_packages))
  mrmae = lambda *words: run("-m", "mrmae_jax", *words)
  assert "pretrain" in mrmae("--help")
  short = ("--config.epochs=0.1", "--config.optim.warmup_epochs=0.02")
  mrmae("pretrain", "--config=demo", "--workdir=run", *short)
  assert (folder / "run" / "checkpoints").is_dir()
  sweep = mrmae("sweep", "--config=sweeps/mimic_weight:demo", "--workdir=sweep", "--do=print")
  assert sweep.count("mrmae pretrain --config=sweeps/mimic_weight:demo") == 6
  step = ("bench", "step", "--config=demo", "--rounds=1", "--batch_sizes=8")
  assert "images/s" in mrmae(*step)
  assert "memory a device" in mrmae("compile", "--config=demo")
