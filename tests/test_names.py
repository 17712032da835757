"""Names of files and folders with control characters: escaped wherever they are printed."""

import csv
import sys

import pytest

from mrmae_jax import __main__ as entry
from mrmae_jax.cli import evaluate
from mrmae_jax.data import LoaderOptions, loader, open_source
from mrmae_jax.errors import ConfigError, DataError, WorkdirError, one_line, printable
from mrmae_jax.runs.log import Log
from mrmae_jax.viz.page import Page
from tests.helpers.cli import run_command
from tests.helpers.images import encode, photo

# A red "error" on a line of its own, a return to the start of the line, text from right to left
EVIL = "x\x1b[31m\nerror: all is lost\r\u202e"
SHOWN = r"x\x1b[31m\nerror: all is lost\r\u202e"


def is_clean(text):
  """Returns whether a text has no control characters but ends of lines."""
  return printable(text, keep="\n") == text


def test_printable_leaves_names_in_all_languages_alone():
  for name in (
    "a b.jpg",
    "läuft/ß",
    "写真\u3000１.png",
    "صورة",
    "a\u00a0b",
    "👩\u200d🔬",
    "C:\\new",
  ):
    assert printable(name) == name
  assert printable(EVIL) == SHOWN
  assert printable("a\nb\x7f\x9b", keep="\n") == "a\nb\\x7f\\x9b"


def test_errors_are_one_line_and_mistakes_one_each(capsys):
  assert str(DataError(f"{EVIL}: bad")) == f"{SHOWN}: bad"
  assert one_line(ValueError(EVIL)) == r"x\x1b[31m error: all is lost \u202e"
  entry.report_error(WorkdirError(EVIL), debug=False)
  entry.report_error(ConfigError(f"config.data: {EVIL}", "config.seed: -1"), debug=False)
  assert capsys.readouterr().err.splitlines() == [
    f"error: {SHOWN}",
    f"error: config.data: {SHOWN}",
    "error: config.seed: -1",
  ]


@pytest.fixture
def folder(tmp_path):
  for name in (EVIL, "b"):
    (tmp_path / name).mkdir()
    for i in range(3):
      (tmp_path / name / f"{i}{EVIL}.png").write_bytes(encode(photo(30, 40, i), "PNG"))
  (tmp_path / "b" / f"bad{EVIL}.png").write_bytes(b"no image")
  (tmp_path / "b" / f"other.{EVIL}").write_bytes(b"")
  return tmp_path


def test_sources_escape_their_descriptions_and_keep_their_names(folder, capsys):
  source = open_source(f"folder:{folder}", "train", holdout_every=0)
  assert is_clean(source.description) and "\n" not in source.description
  assert SHOWN in source.left_out and is_clean(source.left_out)
  assert source.class_names == ("b", EVIL)
  assert source.name(3).startswith("b/bad") and source.name(3).endswith(f"{EVIL}.png")
  reasons = {0: f"{source.name(3)}: bad"}
  loader.warn_of_skipped(reasons, 7, LoaderOptions(on_error="skip", max_skipped=1), "replaced")
  printed = capsys.readouterr().err
  assert is_clean(printed) and printed.count("\n") == 1 and SHOWN in printed


def test_verify_prints_one_line(folder, capsys):
  assert run_command(["verify", f"--source=folder:{folder}", "--workers=1"]) == 3
  printed = capsys.readouterr()
  errors = [line for line in printed.err.splitlines() if "error: " in line]
  assert len(errors) == 2 and errors[-1].count(f"bad{SHOWN}") == 1  # the other: the description
  assert is_clean(errors[-1]) and is_clean(printed.out)


def test_logs_pages_and_tables(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
  run_log = Log(tmp_path, 9)
  run_log.say(f"data: {EVIL}\nnext")
  run_log.close()
  assert is_clean(capsys.readouterr().out)
  page = Page(EVIL, EVIL)
  page.section(EVIL, EVIL)
  page.table([EVIL], [[EVIL]])
  page.write(tmp_path / "page.html")
  assert is_clean((tmp_path / "page.html").read_text())
  evaluate.write_csv(tmp_path / "table.csv", ["name", "n"], [[f"{EVIL}.png", 1]])
  assert len((tmp_path / "table.csv").read_text().splitlines()) == 2
  with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
    assert list(csv.reader(file)) == [["name", "n"], [f"{SHOWN}.png", "1"]]
