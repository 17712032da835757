"""Command lines inside the process of a test."""

from mrmae_jax import __main__ as entry
from mrmae_jax.cli import parser


def run_command(argv) -> int:
  """Runs ["COMMAND", "--option=...", ...] as `mrmae` does; returns the exit code."""
  return entry.main(["mrmae", *map(str, argv)])


def parse_options(*argv):
  """The options of ["COMMAND", ...] as its `run` gets them."""
  return parser.parse([str(word) for word in argv])
