"""Compiled programs that are kept for the next start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mrmae_jax.cli.program_cache import FOLDER, keep_programs

ROOT = Path(__file__).parent.parent


def kept_in(**environ):
  """The environment after `keep_programs`, and the folder that JAX is told."""
  keep_programs(environ)
  return environ, environ.get("JAX_COMPILATION_CACHE_DIR")


def test_the_folder_is_the_users_alone_and_bounded(tmp_path):
  environ, folder = kept_in(XDG_CACHE_HOME=str(tmp_path))
  assert Path(folder) == tmp_path / FOLDER and Path(folder).stat().st_mode & 0o777 == 0o700
  assert int(environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2 * 2**30
  os.chmod(folder, 0o770)  # others of the group could put programs there
  assert kept_in(XDG_CACHE_HOME=str(tmp_path))[1] is None


def test_what_the_user_has_set_stands(tmp_path):
  environ = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "gs://bucket/programs"}
  assert kept_in(**environ)[0] == environ and not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_kept(tmp_path):
  (tmp_path / "file").write_text("")
  assert kept_in(XDG_CACHE_HOME=str(tmp_path / "file"))[1] is None


def test_a_program_whose_writing_was_cut_short_goes(tmp_path):
  folder = tmp_path / FOLDER
  folder.mkdir(parents=True, mode=0o700)
  for name in ("whole-cache", "half-cache", "torn-cache", "torn-atime"):
    (folder / name).write_bytes(b"1234")
  for name in ("whole-atime", "empty-atime", "pipe-atime"):
    (folder / name).write_bytes(b"12345678")
  (folder / "empty-cache").write_bytes(b"")
  os.mkfifo(folder / "pipe-cache")
  kept_in(XDG_CACHE_HOME=str(tmp_path))
  assert {p.name for p in folder.iterdir()} - {".lockfile"} == {"whole-cache", "whole-atime"}


@pytest.mark.variant
def test_a_second_start_takes_the_program_and_gives_the_same_numbers(tmp_path):
  environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
  environ.pop("JAX_COMPILATION_CACHE_DIR")
  words = [sys.executable, "-m", "mrmae_jax", "pretrain", "--config=tests/faults/small.py"]

  def start(name):
    with open(tmp_path / f"{name}.log", "w") as log:
      command = [*words, f"--workdir={tmp_path / name}"]
      return subprocess.Popen(command, env=environ, cwd=ROOT, stdout=log, stderr=log)

  def result(name):
    log = (tmp_path / f"{name}.log").read_text()
    assert "Traceback" not in log and "cache entry" not in log, log
    records = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return log, [json.loads(line)["loss"] for line in records if "loss" in line]

  together = [start("first"), start("second")]  # both compile, or one takes what the other wrote
  assert [process.wait(300) for process in together] == [0, 0], result("first")
  assert start("third").wait(300) == 0
  (_, first), (_, second), (log, third) = map(result, ("first", "second", "third"))
  assert first == second == third and len(first) == 20
  cache = tmp_path / "home" / FOLDER
  assert re.search(rf"traced .* in [\d.]+ s, took it compiled from {cache} in [\d.]+ s", log)
