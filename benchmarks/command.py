"""The command line of a comparison."""

import argparse
from typing import Callable

from mrmae_jax.__main__ import report_error
from mrmae_jax.cli.parser import Parser, integer
from mrmae_jax.errors import UsageError, UserError


def make_parser(name: str, doc: str, config: str | None = None) -> Parser:
  """Returns a parser with the options that all comparisons have.

  Args:
    name: of the module in benchmarks/.
    doc: its docstring, for --help.
    config: default of --config; None: the comparison has no configuration.
  """
  parser = Parser(prog=f"python -m benchmarks.{name}", description=doc)
  if config:
    parser.add_argument(
      "--config", default=config, help="configuration; --config.KEY=VALUE changes a key"
    )
  parser.add_argument("--rounds", type=integer(1), default=7, help="how often each is timed")
  parser.add_argument("--json", default="", help="a .json file for the figures")
  parser.add_argument("--debug", action="store_true", help="show where an error came from")
  return parser


def run_command(
  parser: Parser, run: Callable[[argparse.Namespace], str], argv: list[str] | None = None
) -> int:
  """Parses a command line (default: sys.argv), runs it and prints its text; returns the exit code.

  Words --config.KEY=VALUE are left as they are in `options.overrides`.
  """
  debug = False
  try:
    options, words = parser.parse_known_args(argv)
    debug = options.debug
    is_override = lambda word: "config" in options and word.startswith("--config.")
    options.overrides = [word for word in words if is_override(word)]
    if unknown := [word for word in words if not is_override(word)]:
      raise UsageError(f"{unknown[0]!r} is not an option; see {parser.prog} --help")
    print(run(options), flush=True)
  except UserError as error:
    return report_error(error, debug)
  return 0
