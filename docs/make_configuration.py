"""Writes docs/reference/configuration.md from the schema in mrmae_jax/config.py.

  python docs/make_configuration.py

Run it after a change to the schema: a test compares the page with what this would write.
"""

import textwrap
from pathlib import Path

from mrmae_jax import config
from mrmae_jax.cli import parser

PAGE = Path(__file__).parent / "reference" / "configuration.md"
COMMANDS = {task: command for command, task in parser.TASKS.items()}
INTRODUCTION = f"""\
<!-- Written by docs/make_configuration.py from mrmae_jax/config.py. -->

# Configuration

Every key of the training commands, with its default and meaning. Set a key on the command line,
`--config.optim.blr=1e-3`, or in a configuration file of your own. A mistyped key or a value that
does not fit is refused before anything is compiled.

`mrmae pretrain --config=NAME --help` prints the keys with the values of one configuration, and
`mrmae doctor --config=NAME` those that differ from the defaults below.

| column | meaning |
|---|---|
| default | of `pretrain` if it has the key; another command's default stands behind its name |
| values | numbers are finite, at most {config.LARGEST:g} in size; quote tuples: `"(96, 128)"` |
| resume | `same`: a run that resumes must keep the value |
| | `free`: a run that resumes may have another value |
| | `local`: the hosts of one run may differ too; the key says where or how to read |
"""
NOTES = {  # introductions of sections
  "evals": "An evaluator runs if its section is there: `reconstruct` and `knn` in `pretrain`, "
  "`knn` in `teacher`, `accuracy` in `finetune` and `probe`, `miou` in `segment`. A configuration "
  "file can add `evals.knn` to the other commands; it needs images with classes.",
  "teacher": "A configuration file can add teachers: `extra_teachers.NAME`, made by "
  "`teacher_section()` of `mrmae_jax.config`, has the same keys. Its loss is `mimic_NAME`.",
}
TYPES = {int: "whole number", float: "number", str: "text"}


def make_page() -> str:
  """Returns the text of the page."""
  everywhere, groups = tuple(parser.TASKS), {}  # {commands: {section: {key: (Key, defaults)}}}
  encoders = {f"encoder ({kind})": _encoder_keys(kind) for kind in config.ENCODERS}
  groups[everywhere] = {"": {}} | encoders
  for name, (key, values) in _all_keys().items():
    section = name.rpartition(".")[0].split(".")[0]
    commands = everywhere if section == "evals" else tuple(values)
    groups.setdefault(commands, {}).setdefault(section, {})[name] = key, values
  text = [INTRODUCTION]
  for commands, sections in groups.items():
    title = "Every command" if commands == everywhere else f"Only {' and '.join(commands)}"
    text.append(f"## {title}\n")
    for section, keys in sections.items():
      text += [f"### {section}\n"] if section else []
      text += [f"{textwrap.fill(NOTES[section], 100)}\n"] if section in NOTES else []
      text += ["| key | default | meaning | values | resume |", "|---|---|---|---|---|"]
      text += [*(_row(name, *key) for name, key in keys.items()), ""]
  return "\n".join(text)


def _all_keys() -> dict:
  """Returns {key: (Key, {command: default})} of every command, but those of encoders."""
  rows = {}
  for command, task in parser.TASKS.items():
    defaults = config.defaults(task)
    values = config.flatten(defaults)
    for name, key in config.find_keys(defaults).items():
      if not name.startswith("encoder."):
        rows.setdefault(name, (key, {}))[1][command] = values[name]
  return rows


def _encoder_keys(kind: str) -> dict:
  """Returns {key: (Key, {command: default})} of one kind of encoder, by default the base size."""
  rows = {f"encoder.{name}": (key, {}) for name, key in config.ENCODERS[kind].items()}
  for command, task in parser.TASKS.items():
    values = {"encoder": config.encoder(kind, "base")}
    if kind == "vit" or task != "self_distill":  # a teacher is a ViT
      for name, value in config.TASKS[task].recipe.get("encoder", {}).items():
        values["encoder"][name] = value
      for name, value in config.flatten(values).items():
        rows[name][1][command] = value
  return rows


def _row(name: str, key: config.Key, values: dict) -> str:
  (_, default), *others = values.items()
  cells = [_code(default), *(f"{c}: {_code(v)}" for c, v in others if v != default)]
  text = [f"`{name}`", "; ".join(cells), key.help, _allowed(key), key.resume]
  return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in text)} |"


def _code(value) -> str:
  """Returns a default as it is written on the command line."""
  if value is None:
    return "not set"
  return f"`{value}`" if value != "" else "empty"


def _allowed(key: config.Key) -> str:
  """Returns which values a key takes, in words."""
  if isinstance(key.default, bool):
    return "`True`, `False`"
  if type(key.allowed) is tuple:
    return ", ".join(f"`{choice}`" for choice in key.allowed)
  is_tuple = isinstance(key.default, tuple)
  kind = key.many or type(key.default[0] if is_tuple else key.default)
  words = TYPES.get(kind, "text")
  if is_tuple:
    words = f"{'any number of' if key.many else len(key.default)} {words}s"
  if key.allowed is None:
    return words
  rule = key.allowed.words.removesuffix(f", at most {config.LARGEST:g}")
  for start in ("be a finite number", "be ", "lie ", "satisfy "):
    rule = rule.removeprefix(start)
  comma = "," if rule[:1].isdigit() else ""
  return f"{words}{comma} {rule.strip()}".strip()


if __name__ == "__main__":
  PAGE.write_text(make_page())
  print(f"wrote {PAGE}")
