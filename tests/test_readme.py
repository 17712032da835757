"""What a newcomer types: the notebook runs, and every command of the README is one that is understood."""

import json
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys

import pytest

from mrmae_jax import __main__ as entry

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs_as_it_stands(tmp_path):
  """Its cells, one after another, in a fresh process; with fewer epochs, as its first cell offers."""
  cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
  code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
  assert not any(cell.get("outputs") for cell in cells)
  shortened = code.replace("EPOCHS = 16", "EPOCHS = 2").replace("/tmp/mrmae_quickstart", f"{tmp_path}/run")
  assert shortened.count(f"{tmp_path}/run") == 1 and "EPOCHS = 2" in shortened
  done = subprocess.run([sys.executable, "-c", shortened], cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True,
                        text=True, timeout=900, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert re.search(r"mimic \(1, [\d.]+\) -> \(\d+, [\d.]+\)", done.stdout) and "held-out digits have a nearest neighbour" in done.stdout


def commands():
  """Every `mrmae` command of the README's code blocks, as words."""
  for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
    for line in block.replace("\\\n", " ").splitlines():
      if not re.search(r"\bmrmae ", line):
        continue
      words = shlex.split(line, comments=True)
      words = words[next((i for i, word in enumerate(words) if "=" not in word), 0):]  # environment variables
      if words and words[0] == "mrmae":
        yield words


FOUND = list(commands())


def test_there_are_commands_in_the_readme():
  assert len(FOUND) > 30 and {words[1] for words in FOUND} >= set(entry.COMMANDS) - {"data", "doctor", "report", "visualise", "replay"}


@pytest.mark.parametrize("words", FOUND, ids=[" ".join(words[1:3])[:60] for words in FOUND])
def test_every_option_of_a_command_exists(words, capsys):
  """The sub-command and its options are known; keys of the configuration are looked up in the schema."""
  name, options = words[1], [word for word in words[2:] if word.startswith("--")]
  assert name in entry.COMMANDS
  extra = [words[2]] if name == "bench" else []
  assert entry.main(["mrmae", name, *extra, "--help"]) == 0
  text = capsys.readouterr().out
  for option in options:
    key = option[2:].split("=")[0]
    if not key.startswith("config."):
      assert re.search(rf"--(\[no\])?{key.removeprefix('no')}\b", text), (option, text[:500])
    else:
      from mrmae_jax import config
      schemas = [config.pretrain(), config.finetune(), config.probe()]
      known = {row[0] for schema in schemas for row in config.describe(schema)} | {"encoder.dim", "encoder.mlp_dim", "encoder.depth"}
      assert key.removeprefix("config.") in known, option
