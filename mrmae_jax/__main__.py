"""`mrmae COMMAND ...`: parses, runs, and turns errors into exit codes.

`python -m mrmae_jax COMMAND ...` is the same.
"""

import argparse
import errno
import importlib
import os
import sys
import traceback
from pathlib import Path

import mrmae_jax
from mrmae_jax.cli import parser
from mrmae_jax.cli.console import open_missing_streams, show_warnings, steady_console
from mrmae_jax.cli.program_cache import keep_programs
from mrmae_jax.errors import (
  DataError,
  Interrupted,
  StorageError,
  UsageError,
  UserError,
  one_line,
  printable,
)

HELP = {"-h", "--help", "--helpfull"}
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line and returns the exit code, see errors.py.

  Args:
    argv: its words, with or without `mrmae` before them; default: sys.argv.

  Prints the text that the command returns, or one line per mistake that begins with "error: ".
  """
  if argv is None:
    argv = sys.argv[1:]
  elif argv[:1] == ["mrmae"]:
    argv = argv[1:]
  _add_cwd_to_path()
  with steady_console() as console:
    code = _answer(argv)
    console.flush()
    if console.problem and not code and set(argv).isdisjoint(parser.TASKS):  # they have a log
      report_error(StorageError(f"a part of the output is lost: {console.problem}"), debug=False)
      return StorageError.exit_code
  return code


def _answer(argv: list[str]) -> int:
  """Does what the words of a command line ask for; returns the exit code."""
  debug = "--debug" in argv
  try:
    if argv == ["--version"]:
      print(f"mrmae_jax {mrmae_jax.__version__}")
      return 0
    if not argv or HELP.intersection(argv):
      print(_help(argv))
      return 0
    options = _parse(argv)
    trains = options.command in parser.TASKS
    return _run("train" if trains else options.command.replace("-", "_"), options, debug)
  except UsageError as error:
    return report_error(error, debug)
  except KeyboardInterrupt:  # of a command that need not finish a step
    return report_error(Interrupted("stopped by Ctrl-C"), debug)


def _run(name: str, options: argparse.Namespace, debug: bool) -> int:
  """Runs a command, and returns its exit code."""
  try:
    result = _module(name).run(options)
  except Interrupted as error:
    print("error: stopped by a signal; nothing was written", file=sys.stderr, flush=True)
    return error.exit_code
  except UserError as error:
    return report_error(error, debug)
  except OSError as error:
    kind = StorageError if name == "train" or error.errno in STORAGE_ERRORS else UsageError
    hint = ": raise the limit with ulimit -n" if error.errno == errno.EMFILE else ""
    return report_error(kind(f"{one_line(error, 1000)}{hint}"), debug)
  if isinstance(result, str):
    print(printable(result, keep="\n"), flush=True)
    return 0
  return result


def report_error(error: UserError, debug: bool) -> int:
  """Prints an error, each of its lines as one; returns its exit code."""
  if debug:
    traceback.print_exc()
  for line in str(error).splitlines():
    print(f"error: {line}", file=sys.stderr, flush=True)
  return error.exit_code


def _module(name: str):
  """Imports a module of the command line: each command loads only what it needs."""
  return importlib.import_module(f"mrmae_jax.cli.{name}")


def _parse(argv: list[str]) -> argparse.Namespace:
  """Parses a command line and loads its configuration: mistakes are answered before jax loads."""
  try:
    options = parser.parse(argv)
  except parser.UnknownWord as error:
    if argv[0] in (*parser.TASKS, "doctor", "show-teacher", "compile"):
      _module("configs").suggest_key(error.name, argv, str(error))
    raise
  if hasattr(options, "overrides") and options.command != "sweep":
    options.config = _module("configs").load_config(options.config, options.overrides)
  return options


def _help(argv: list[str]) -> str:
  text = parser.help_text([word for word in argv if word not in HELP])
  if not {*parser.TASKS, "doctor"}.intersection(argv[:1]):
    return text
  return f"{text}\n{_module('configs').describe_keys(argv)}"


def _add_cwd_to_path() -> None:
  """Puts the current folder on the path of imports, as `python -m` does."""
  if not {"", str(Path.cwd())}.intersection(sys.path):
    sys.path.insert(0, str(Path.cwd()))


def run_process() -> None:
  """The whole process: `main`, and its end."""
  open_missing_streams()
  show_warnings()
  sys.stdout.reconfigure(errors="backslashreplace")  # file names may be of any bytes
  # Before a configuration imports jax. A host that finds its program would leave alone those that
  # compile theirs together.
  if "--multihost" not in sys.argv:
    keep_programs()
  code = main()
  if code == DataError.exit_code:  # a loader's thread may wait for ever for its image
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


if __name__ == "__main__":
  run_process()
