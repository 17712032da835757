"""Loads the configuration that a command line names, and applies its overrides. Imports no jax."""

import difflib
import os
import runpy
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mrmae_jax import config as config_lib
from mrmae_jax.cli import parser
from mrmae_jax.errors import ConfigError, UsageError

# In a checkout configs/ lies beside the package; a wheel carries it inside.
_PACKAGE = Path(__file__).parents[1]
BOOLEANS = dict.fromkeys(("true", "t", "1", "false", "f", "0"))  # as absl reads them
KINDS = {  # types of keys: (what reads a value, the words for it)
  bool: (lambda text: BOOLEANS[text.lower()], "True or False"),
  int: (lambda text: int(text, 0), "a whole number"),
  float: (float, "a number"),
}
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def load_config(name: str, overrides: list[str] = ()) -> ConfigDict:
  """Returns the configuration of `--config=NAME --config.KEY=VALUE ...`, locked.

  Args:
    name: a file, or the name of a configuration that comes with the package; then ":ARGUMENT" for
      its get_config. Or the config.json of a run, or its workdir.
    overrides: words such as "--config.optim.blr=1e-3"; of one key the last counts.

  Raises:
    UsageError: no such file, a file that fails, a key it does not have (with the nearest one that
      it has), or a value of another type.
  """
  path, argument = find_config(name)
  argument = () if argument is None else (argument,)
  try:
    if path.suffix == ".json":
      config = config_lib.read_stored(path)
    else:
      config = runpy.run_path(str(path))["get_config"](*argument)
  except ConfigError as error:
    raise UsageError(f"--config={name}: {error}") from error
  except Exception as error:  # whatever a user's file may raise
    raise UsageError(f"--config={name}: {type(error).__name__}: {error}") from error
  # ml_collections would put tuples that are given twice one behind the other.
  last = {word.partition("=")[0]: word for word in overrides}.values()
  values, argv = flags.FlagValues(), ["mrmae", *(_check_override(w, config) for w in last)]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    text = str(error.args[0] if error.args else error)
    raise UsageError(" ".join(text.split())) from error
  return values.config


def find_config(name: str) -> tuple[Path, str | None]:
  """Returns the file that `name` means, and the text after its first ":".

  A path that exists wins. Otherwise "demo", "demo.py" and "configs/demo.py" mean the file that
  comes with the package.

  Raises:
    UsageError: there is no such file.
  """
  text, _, argument = name.partition(":")
  argument = argument if ":" in name else None
  for path in (text, os.path.join(name, "config.json")):
    if os.path.isfile(path):
      return Path(path), argument
  short = text.removeprefix("configs/").removesuffix(".py")
  for folder in FOLDERS:
    path = folder / f"{short}.py"
    if short and os.path.isfile(path):  # False for a name that is too long; Path's own raises
      return path, argument
  names = list_configs()
  nearest = difflib.get_close_matches(short, names, 1)
  hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
  raise UsageError(
    f"--config={name}: no such file, and no configuration of this name comes with the package; "
    f"{hint}"
  )


def list_configs() -> list[str]:
  """Returns the names of the configurations that come with the package."""
  folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
  files = sorted(folder.rglob("*.py")) if folder else []
  names = (file.relative_to(folder).with_suffix("").as_posix() for file in files)
  return [name for name in names if not name.endswith("__init__")]


def _check_override(word: str, config) -> str:
  """Returns an override "--config.KEY=VALUE" as ml_collections reads it; a text None is "".

  Raises:
    UsageError: the configuration has no such key, or the value is of another type.
  """
  name, equals, value = word.partition("=")
  *sections, key = name.split(".")[1:]
  node, place = config, "config"
  for section in (*sections, key):
    parent, node, place = node, _child(node, section, word, place), f"{place}.{section}"
  if not isinstance(parent, ConfigDict):
    return word
  kind = parent.get_type(key)
  if kind is str and value in ("None", "none", "null") and not _is_choice(config, place, value):
    return f"{name}="
  if kind in KINDS and equals:
    parse, words = KINDS[kind]
    try:
      parse(value)
    except (ValueError, KeyError):
      raise UsageError(f"{name}={value} given; expected {words}") from None
  return word


def _is_choice(config, place: str, value: str) -> bool:
  """Returns whether a text is among those that a key may have."""
  try:
    key = config_lib.find_keys(config).get(place.removeprefix("config."))
  except (AttributeError, KeyError):  # not a whole configuration, which the checks will say
    return False
  return key is not None and isinstance(key.allowed, tuple) and value in key.allowed


def _child(node, key: str, word: str, place: str):
  """Returns the value of a key of a section; raises UsageError if there is none."""
  known = list(node.keys()) if hasattr(node, "keys") else []
  if key not in known:
    nearest = difflib.get_close_matches(key, known, 1)
    hint = f"{place} has {', '.join(known) or 'no keys'}"
    if nearest:
      hint = f"did you mean {place}.{nearest[0]}?"
    raise UsageError(f"{word}: {place} has no key {key!r}; {hint}")
  return node[key]


def suggest_key(wanted: str, argv: list[str], message: str) -> None:
  """Raises a UsageError that suggests --config.KEY=VALUE, if `wanted` is the end of a key.

  Args:
    wanted: a word of the command line without dashes and value.
    argv: the command line, whose --config has the keys.
    message: what is wrong with the word.
  """
  names = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
  config = load_config(names[-1]) if names else config_lib.defaults(_task(argv[0]))
  keys = config_lib.flatten(config)
  matches = [key for key in keys if key == wanted or key.endswith(f".{wanted}")]
  if matches:
    text = message.split("; ")[0]
    raise UsageError(f"{text}; did you mean --config.{matches[0]}=VALUE?")


def _task(command: str) -> str:
  """Returns the task that a command trains, or looks at by default."""
  return parser.TASKS.get(command, "pretrain")


def describe_keys(argv: list[str]) -> str:
  """Returns the keys of the configuration with values and meaning, one a line.

  The values are those of `--config` if that is given and can be loaded, else the defaults of the
  command `argv[0]`.
  """
  title = "keys of the configuration (--config.KEY=VALUE), their defaults and meaning:"
  config = config_lib.defaults(_task(argv[0]))
  names = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
  overrides = [word for word in argv if word.startswith("--config.")]
  if names:
    try:
      config = load_config(names[-1], overrides)
      title = "keys of --config, with their values there and meaning:"
    except UsageError:
      pass
  lines = (
    f"  {name}={value!r}".ljust(46) + f"  {meaning}"
    for name, value, meaning in config_lib.describe(config)
  )
  return "\n".join([title, *lines])
