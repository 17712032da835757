"""What a user runs beside training: each a module with a command line of its own."""

import sys
import traceback
from typing import Callable

from absl import flags

from mrmae_jax.errors import Interrupted, UsageError, UserError


def command_line(
  doc: str,
  own: flags.FlagValues,
  run: Callable[[flags.FlagValues], str],
  argv: list[str] | None = None,
) -> int:
  """Reads a tool's command line and runs it; a mistake is answered with one line that begins with "error:".

  Args:
    doc: what --help prints before the options.
    own: the options.
    run: options -> the last line to print.
    argv: default sys.argv.

  Returns:
    The exit code: 0 done, 2 usage, 3 data, 75 stopped by a signal with nothing written.
  """
  argv = sys.argv if argv is None else argv
  debug, argv = "--debug" in argv, [arg for arg in argv if arg != "--debug"]
  if {"--help", "-h", "--helpfull"}.intersection(argv[1:]):
    print(f"{doc}\n{own.get_help()}\n\n--debug: show where in the code an error came from.")
    return 0
  try:
    if rest := own(argv)[1:]:
      raise UsageError(f"{rest[0]!r} is not an option; see --help")
    print(run(own), flush=True)
  except Interrupted as error:
    print("error: stopped by a signal; nothing was written", file=sys.stderr, flush=True)
    return error.exit_code
  except (flags.Error, UserError, OSError) as error:
    if debug:
      traceback.print_exc()
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, UserError) else UsageError.exit_code
  return 0
