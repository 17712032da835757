"""Runs and data in a bucket, against a server on the loopback.

gcsfs, orbax, tensorstore and array_record are the real ones.
"""

import importlib.util
import io
import json
import signal
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils.epath import backend
from PIL import Image

from mrmae_jax.data import open_source
from mrmae_jax.errors import DataError, WorkdirError
from mrmae_jax.runs import paths
from tests.helpers import fake_gcs, images
from tests.helpers.programs import finish, free_port, run_program
from tests.helpers.runs import run, start
from tests.helpers.tfds import prepare_tfds

needs_gcsfs = pytest.mark.skipif(
  importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs (the gcs extra)"
)
CONFIG = """
from tests import tiny
def get_config():
  c = tiny.get_config("vit")
  c.teacher.path = ""
  del c.evals.knn
  c.epochs = 0.2  # 18 steps, saved every 4 or 5
  c.keep_checkpoints = 9
  return c
"""


@pytest.fixture(scope="module")
def server():
  with fake_gcs.Server("bucket", "private") as server:
    yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "c.py"
  path.write_text(CONFIG)
  return path


def python(code, environment):
  """Returns what `code` prints in another process with these environment variables."""
  done = run_program(["-c", code], env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@needs_gcsfs
def test_a_run_in_a_bucket_is_killed_and_continues(server, config, tmp_path):
  """A run of 2 x 2 devices is killed in a save; 1 x 4 devices resume it from the save before."""
  port, workdir = free_port(), "--workdir=gs://bucket/run"
  cut = [
    start(
      i,
      2,
      2,
      tmp_path / f"cut_{i}.log",
      workdir,
      config=config,
      port=port,
      env=server.environment,
    )
    for i in range(2)
  ]
  end = time.monotonic() + 300
  while (
    "run/checkpoints/9/state/_METADATA" not in server.names("bucket") and time.monotonic() < end
  ):
    time.sleep(0.02)
  for process in cut:
    process.send_signal(signal.SIGKILL)
  finish(cut)
  assert "run/checkpoints/5/commit_success.txt" in server.names("bucket"), (
    tmp_path / "cut_0.log"
  ).read_text()[-3000:]
  assert "run/config.json" in server.names("bucket")
  for step in (9, 13, 17, 18):  # as if it had been killed a moment earlier
    server.objects.pop(("bucket", f"run/checkpoints/{step}/commit_success.txt"), None)

  log = tmp_path / "again.log"
  again = start(0, 1, 4, log, workdir, config=config, env=server.environment)
  assert finish([again]) == [0], log.read_text()[-3000:]
  assert (
    "resuming after step 5" in log.read_text()
    and "checkpoint: gs://bucket/run/checkpoints/18" in log.read_text()
  )
  whole, _ = run(tmp_path, "whole", 1, 4, config=config)
  rows = [
    json.loads(line) for line in server.objects["bucket", "run/metrics.jsonl"][1].splitlines()
  ]
  losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
  assert losses.keys() == set(range(6, 19)) | (
    losses.keys() & set(range(6))
  )  # the first ones were not uploaded yet, or were
  np.testing.assert_allclose(
    [losses[s] for s in range(6, 19)], [whole[s]["loss"] for s in range(6, 19)], rtol=1e-5
  )

  names = server.names("bucket")
  assert {
    "run/parameters.txt",
    "run/reconstructions/step_0000018.png",
    "run/checkpoints/18/commit_success.txt",
  } < set(names)
  assert any(name.startswith("run/tensorboard/events") for name in names) and not any(
    "write_test" in name for name in names
  )
  assert (
    Image.open(
      io.BytesIO(server.objects["bucket", "run/reconstructions/step_0000018.png"][1])
    ).size[0]
    > 100
  )
  printed = python(
    "import mrmae_jax; from mrmae_jax.runs import log; "
    "print(mrmae_jax.load('gs://bucket/run').report.source, log.summary('gs://bucket/run')[0])",
    server.environment,
  )
  assert "gs://bucket/run after 18 steps" in printed and "at step 18" in printed


@needs_gcsfs
def test_images_in_a_bucket(server, tmp_path):
  """A prepared dataset is the same from a bucket, also in workers; a missing one is named."""
  rows = [{"image": images.encode(images.photo(seed=i)), "label": i % 3} for i in range(11)]
  features = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
  }
  prepare_tfds("bucket_photos", tmp_path, features, {"train": rows[:8], "test": rows[8:]})
  for path in tmp_path.rglob("*"):
    if path.is_file():
      server.objects["bucket", f"tfds/{path.relative_to(tmp_path)}"] = (1, path.read_bytes())
  (tmp_path / "c.py").write_text(f"""
from mrmae_jax.data import open_source
from mrmae_jax.errors import DataError
from tests.helpers import images
if __name__ == "__main__":
  open_it = lambda where: open_source("tfds:bucket_photos", "train", data_dir=where)
  here = open_it("{tmp_path}")
  for where in ("gs://bucket/tfds", "gs://bucket/tfds/bucket_photos/1.0.0"):
    there = open_it(where)
    assert there.fingerprint == here.fingerprint
    assert [there[i] for i in range(8)] == [here[i] for i in range(8)]
  images.assert_same(images.train_steps(there, 2, workers=1), images.train_steps(here, 2))
  for where in ("gs://bucket/none", "gs://none/tfds", "gs://private/tfds", "s3://bucket/tfds"):
    try: open_it(where)
    except DataError as error: print(error)
""")
  lines = python(
    f"import runpy; runpy.run_path('{tmp_path}/c.py', run_name='__main__')", server.environment
  ).splitlines()
  assert (
    len(lines) == 4
    and "data_dir ('gs://bucket/none' now)" in lines[0]
    and "gs://none/tfds" in lines[1]
  )
  assert (
    "gs://private/tfds cannot be reached (Anonymous caller" in lines[2]
    and "gs:// buckets are supported" in lines[3]
  )


@needs_gcsfs
@pytest.mark.parametrize(
  "bucket, message",
  [
    (
      "private",
      "gs://private/run cannot be reached (Anonymous caller does not have storage.objects.get",
    ),
    ("none", "cannot write to gs://none/run ("),
  ],
)
def test_every_host_says_that_a_bucket_cannot_be_used(server, config, tmp_path, bucket, message):
  port, logs = free_port(), [tmp_path / f"{i}.log" for i in range(2)]
  hosts = [
    start(
      i,
      2,
      1,
      logs[i],
      f"--workdir=gs://{bucket}/run",
      config=config,
      port=port,
      env=server.environment,
    )
    for i in range(2)
  ]
  assert finish(hosts, 90) == [2, 2]
  for log in logs:
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert message in line and "Traceback" not in log.read_text()
  assert not [
    path
    for method, path in server.requests
    if method == "POST" and path.startswith("/storage/v1/b?")
  ]  # makes none


def test_a_bucket_that_does_not_answer(monkeypatch):
  monkeypatch.setattr(paths, "ANSWER_S", 0.1)
  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: time.sleep(1))
  with pytest.raises(
    WorkdirError, match=r"gs://bucket/x cannot be reached \(no answer within 0.1 s\)"
  ):
    paths.open_folder("gs://bucket/x")


def test_folders_of_images_are_not_read_from_a_bucket():
  with pytest.raises(DataError, match="folder:gs://bucket/x: a folder of images must be on a disk"):
    open_source("folder:gs://bucket/x", "train")
