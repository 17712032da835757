"""Errors that a user can cause or must know of: one clear text each, and an exit code.

Only the command line catches them. The text says what was given, what was expected, and what to do.
"""

import re

# What a terminal or a page would obey: control characters, other ends of lines, the direction of
# text. Names of files may hold any of them.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, keep: str = "") -> str:
  """Returns a text with its control characters as escapes: a newline becomes `\\n`.

  Args:
    text: a name, or a message with names in it.
    keep: characters that stay as they are.
  """
  escape = lambda match: match[0].encode("unicode_escape").decode()
  return CONTROL.sub(lambda match: match[0] if match[0] in keep else escape(match), text)


class UserError(Exception):
  """An error whose text is for the user; the command line prints it and exits with `exit_code`.

  The text is one line, whatever names it holds.
  """

  exit_code = 2

  def __str__(self) -> str:
    return printable(super().__str__())


class UsageError(UserError):
  """A command line that cannot be understood, or options that do not fit together."""


class ConfigError(UserError):
  """Mistakes in a configuration, its arguments: each becomes a line."""

  def __str__(self) -> str:
    return "\n".join(map(printable, map(str, self.args)))


class WeightsError(UserError):
  """A weight file that cannot be used: damaged, incomplete, or of another architecture."""


class WorkdirError(UserError):
  """A working directory that belongs to a different run, or cannot be used."""


class OutOfMemoryError(UserError):
  """A device whose memory does not suffice for the step."""


class DistributedError(UserError):
  """Processes that do not fit together."""


class LostError(DistributedError):
  """Processes that did not come, or are gone. The launcher may try again."""

  exit_code = 1


class DataError(UserError):
  """A data set or an image that cannot be used."""

  exit_code = 3


class MissingSplitError(DataError):
  """A data set without the split that is asked for."""


class NonFiniteError(UserError):
  """Too many losses or gradients in a row that are not finite."""

  exit_code = 4


class StorageError(UserError):
  """A checkpoint that could not be saved, or another file that the run cannot do without."""

  exit_code = 5


class Interrupted(UserError):
  """A signal asked the process to stop. What it has done is saved, or can be done again."""

  exit_code = 75  # "try again" in sysexits.h


def one_line(error: BaseException, limit: int = 200) -> str:
  """Returns the text of an error in one line of at most `limit` characters, or else its type."""
  return (printable(" ".join(str(error).split())) or type(error).__name__)[:limit]
