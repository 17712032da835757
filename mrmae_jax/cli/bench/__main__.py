"""Benchmarks: `mrmae bench SUBCOMMAND`, each with a --help of its own."""

import importlib
import sys

from mrmae_jax.cli import command_line
from mrmae_jax.cli.bench import SUBCOMMANDS


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data."""
  argv = sys.argv if argv is None else argv
  name = argv[1] if len(argv) > 1 else ""
  if name not in SUBCOMMANDS:
    listing = "\n".join(f"  {name:<8} {what}" for name, what in SUBCOMMANDS.items())
    asked = {"-h", "--help", "--helpfull"}.intersection(argv[1:])
    print(
      f"{__doc__}\n\n{listing}"
      if asked
      else f"error: {name!r} is not one of {', '.join(SUBCOMMANDS)}; see --help",
      file=sys.stdout if asked else sys.stderr,
      flush=True,
    )
    return 0 if asked else 2
  command = importlib.import_module(f"mrmae_jax.cli.bench.{name}")
  return command_line(command.__doc__, command.define_flags(), command.run, argv[:1] + argv[2:])


if __name__ == "__main__":
  sys.exit(main())
