"""Finished checkpoints and files are on the disk and survive a loss of power.

The tests record in which order files are synced and renamed: a name may appear only after the
content, and "done" may be said only after the name is on the disk.
"""

import os

import jax.numpy as jnp
import pytest

from mrmae_jax import train
from mrmae_jax.cli import teacher
from mrmae_jax.runs import paths
from mrmae_jax.runs.checkpoint import Checkpoints
from tests.faults import small


@pytest.fixture
def events(monkeypatch):
  """Returns a growing list of ("sync", path) and ("rename", path)."""
  recorded = []
  fsync, rename, replace = os.fsync, os.rename, os.replace

  def recorded_fsync(descriptor):
    fsync(descriptor)
    recorded.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

  def recorded_rename(function):
    def renamed(source, target, **options):
      function(source, target, **options)
      recorded.append(("rename", str(target)))

    return renamed

  monkeypatch.setattr(os, "fsync", recorded_fsync)
  monkeypatch.setattr(os, "rename", recorded_rename(rename))
  monkeypatch.setattr(os, "replace", recorded_rename(replace))
  return recorded


def test_a_checkpoint_is_synced_before_the_one_before_it_goes(tmp_path, events, monkeypatch):
  checkpoints = Checkpoints(tmp_path, {"seed": 0}, keep=1)
  state = {"w": jnp.arange(8.0), "step": jnp.int32(4)}
  assert checkpoints.save(4, state, wait=True) == ""
  folder, stayed = tmp_path / "checkpoints", []
  recorded_fsync = os.fsync
  monkeypatch.setattr(
    os, "fsync", lambda fd: (stayed.append((folder / "4").is_dir()), recorded_fsync(fd))[1]
  )
  assert checkpoints.save(8, state, wait=True) == ""
  checkpoints.close()
  assert stayed and all(stayed) and not (folder / "4").exists()
  named = events.index(("rename", str(folder / "8")))
  before = {path for kind, path in events[:named] if kind == "sync"}
  after = [path for kind, path in events[named:] if kind == "sync"]
  assert after[-1] == str(folder)  # the name itself
  written = [folder / "8", *(folder / "8").rglob("*")]
  assert {str(path) for path in written} <= set(after)
  # Before it has its name, too: all but the two files that orbax writes last.
  unfinished = {path.replace("/8.orbax-checkpoint-tmp", "/8") for path in before}
  late = {str(path) for path in written} - unfinished
  assert late <= {str(folder / "8" / "commit_success.txt")}


def test_an_atomic_write_is_synced_and_so_is_its_name(tmp_path, events):
  paths.write_text(tmp_path / "a.json", "{}")
  kinds = [(kind, os.path.basename(path)) for kind, path in events]
  temporary = f".a.json.{os.getpid()}.tmp"
  assert kinds == [("sync", temporary), ("rename", "a.json"), ("sync", tmp_path.name)]
  events.clear()
  paths.write_text(tmp_path / "b.json", "{}", lasting=False)
  assert [kind for kind, _ in events] == ["rename"]
  events.clear()
  with paths.atomic_folder(tmp_path / "pack") as folder:
    (folder / "inner").mkdir()
    (folder / "inner" / "shard").write_text("x")
  names = [os.path.basename(path) for _, path in events]
  assert names == ["shard", "inner", f".pack.{os.getpid()}.tmp", "pack", tmp_path.name]


def test_the_folder_of_a_teacher_is_synced(tmp_path, events, monkeypatch):
  monkeypatch.setattr(teacher, "describe", lambda *_: ({}, {}))
  monkeypatch.setattr(teacher, "verify_folder", lambda *_: None)
  monkeypatch.setattr(teacher.table, "export", lambda *_: {})
  monkeypatch.setattr(teacher.families, "name_table", lambda *_: None)
  monkeypatch.setattr(teacher.files, "write_safetensors", lambda path, _: path.write_bytes(b"x"))
  teacher.write_folder(tmp_path / "out", None, None, None)
  named = events.index(("rename", str(tmp_path / "out")))
  synced = {os.path.basename(path) for kind, path in events[:named] if kind == "sync"}
  assert set(teacher.FILES) <= synced
  assert events[-1] == ("sync", str(tmp_path))


def test_records_are_on_the_disk_before_a_checkpoint_of_their_step(tmp_path, events):
  """Steps do not wait for the disk; a save does, once."""
  train.fit(small.get_config(), small.toy_task(), tmp_path)
  synced = ("sync", str(tmp_path / "metrics.jsonl"))
  saves = [str(tmp_path / "checkpoints" / str(step)) for step in (1, 4, 8, 12, 16, 20)]
  done = [events.index(("rename", path)) for path in saves if ("rename", path) in events]
  assert len(done) >= 3
  for i, renamed in enumerate(done):  # the sync of a save may come before the name of the last one
    assert events[:renamed].count(synced) > i
  assert events.count(synced) <= len(saves) + 1


def test_a_file_system_that_does_not_sync_is_no_obstacle(tmp_path, monkeypatch):
  def fsync(descriptor):
    raise OSError(22, os.strerror(22))

  monkeypatch.setattr(os, "fsync", fsync)
  paths.write_text(tmp_path / "a.json", "{}")
  assert (tmp_path / "a.json").read_text() == "{}"

  def broken(descriptor):
    raise OSError(5, os.strerror(5))

  monkeypatch.setattr(os, "fsync", broken)
  with pytest.raises(OSError, match="Input/output error"):
    paths.write_text(tmp_path / "a.json", "[]")
  assert (tmp_path / "a.json").read_text() == "{}"
  assert os.listdir(tmp_path) == ["a.json"]
