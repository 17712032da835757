"""Ports that are taken, names that do not resolve, and few open files: the cause in one line."""

import resource
import socket

import pytest

from mrmae_jax import __main__ as entry
from mrmae_jax.errors import DistributedError, LostError
from mrmae_jax.runs import distributed
from tests.helpers.programs import Program, finish

OPEN = """
import resource
from mrmae_jax.data import loader
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
try:
  loader._allow_open_files(4)
except loader.UserError as error:
  print("error:", error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_a_port_that_is_in_use():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(LostError, match=rf"listen at localhost:{port} \(Address already in use\)"):
      distributed.start(f"localhost:{port}", 2, 0, 20)


def test_a_name_that_does_not_resolve():
  assert "the name a..b is not known here" in distributed._reach("a..b:80")
  assert "the name no.such.invalid is not known" in distributed._reach("no.such.invalid:80")
  with socket.create_server(("localhost", 0)) as server:
    assert distributed._reach(f"localhost:{server.getsockname()[1]}") == ""
  for address in (":80", "localhost:0", "localhost:99999", "localhost:-1", "localhost:²"):
    with pytest.raises(DistributedError, match="must be HOST:PORT of process 0"):
      distributed.start(address, 2, 1, 1)


@pytest.mark.parametrize(
  "limits, printed",
  [
    ((64, 64), "may open 64 files (ulimit -n), and 4 workers need 120: raise"),
    ((64, 500), "500"),
  ],
)
def test_few_open_files(tmp_path, limits, printed):
  assert finish([Program(["-c", OPEN.format(limits=limits)], tmp_path / "log")], 60) == [0]
  text = (tmp_path / "log").read_text()
  assert printed in text and ("set data.workers=1\n64" in text) == (limits[1] == 64)


def test_a_file_too_many_says_what_to_do(monkeypatch, capsys, tmp_path):
  """The limit comes down to what is open, so that the next file is one too many."""
  before = resource.getrlimit(resource.RLIMIT_NOFILE)

  def run(options):
    try:
      resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
      open(tmp_path / "file", "wb")
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, before)

  monkeypatch.setattr(entry, "_module", lambda name: type("Module", (), {"run": run}))
  assert entry.main(["report", "--runs=x", "--out=y"]) == 2
  assert "Too many open files" in (printed := capsys.readouterr().err)
  assert printed.endswith(": raise the limit with ulimit -n\n")
