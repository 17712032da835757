"""The page about runs, and the files that a run writes for it."""

import base64
import html.parser
import io
import json
import os
import re
import struct
import sys
import types
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
from PIL import Image

from mrmae_jax.cli import report
from mrmae_jax.runs import log
from mrmae_jax.runs.metrics import read_json_lines, read_metrics
from mrmae_jax.runs.paths import open_folder
from mrmae_jax.viz.plot import COLORS, line_plot
from tests.helpers.cli import run_command


def new_folder(path):
  path.mkdir(parents=True)
  return open_folder(path)


def workdir_with_a_run(folder, name, scale=1.0, blr=1e-4):
  """Makes a workdir as a run leaves it, without the run."""
  workdir = folder / name
  writer = log.Log(new_folder(workdir), 40, settings={"optim.blr": blr})
  for step in range(1, 41):
    writer.scalars(
      step, {"loss": scale / step, "pixel": 0.6 / step, "lr": blr, "images_per_s": 100.0}
    )
    if step % 10 == 0:
      writer.scalars(step, {"knn/accuracy": 0.5 + step / 100, "evaluation_s": 1.0})
  writer.close()
  (workdir / "config.json").write_text(
    json.dumps({"task": "pretrain", "optim": {"blr": blr, "b1": 0.9}, "evals": {}})
  )
  (workdir / "reconstructions").mkdir()
  for step in range(0, 90, 10):
    picture = Image.fromarray(np.full((20, 30, 3), step * 2, np.uint8))
    picture.save(workdir / "reconstructions" / f"step_{step:07d}.png")
  return workdir


class Reader(html.parser.HTMLParser):
  """Parses a page; fails on tags that are not closed in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.images, self.links, self.words = [], [], [], []
    self.feed(text)
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.links += [value for name, value in attrs.items() if name in ("src", "href")]
    if tag == "img":
      self.images.append(attrs)
    if tag not in ("img", "meta", "link", "br", "!doctype"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def test_a_page_about_two_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["mrmae", "pretrain", "--config=demo"])
  workdir_with_a_run(tmp_path / "sweep", "a<b>", 1.0, 1e-4)
  workdir_with_a_run(tmp_path / "sweep", "b", 2.0, 3e-4)
  (tmp_path / "sweep" / "notes").mkdir()
  out = tmp_path / "page.html"
  assert run_command(["report", f"--runs={tmp_path}/sweep", f"--out={out}"]) == 0
  assert "2 runs" in capsys.readouterr().out
  text = out.read_text()
  page, words = Reader(text), " ".join(Reader(text).words)
  assert (
    all(link.startswith(("data:", "#")) for link in page.links) and "<script" not in text
  )  # nothing leaves the page
  assert all(image["alt"] for image in page.images) and "a<b>" in words and "<b>" not in text
  assert "1 → 0.025" in words and "2 → 0.05" in words and "0.6 → 0.9" in words  # losses, k-NN
  differ = words[words.rindex("Settings that differ") : words.rindex("Settings that all share")]
  assert "optim.blr" in differ and "0.0003" in differ and "optim.b1" not in differ
  assert (
    words.count("Step 80") == 2 and words.count("Step 0") == 2
  )  # first, last and some between, of each run
  assert (
    sum("Reconstructions of held-out" in image["alt"] for image in page.images)
    == 2 * report.PICTURES
  )
  assert (
    "goodput" in words.lower()
    and "mrmae pretrain --config=demo" in words
    and f"jax {log.jax.__version__}" in words
  )
  svgs = [image for image in page.images if image["src"].startswith("data:image/svg")]
  assert len(svgs) == 6 and svgs[0]["alt"].startswith(
    "loss over the steps. Last values: a<b>: 0.025; b: 0.05."
  )


def svg_parts(content):
  """Returns the lines of an SVG as [[(x, y), ...], ...], with y downwards, and its texts."""
  root = ET.fromstring(content)  # well-formed, whatever the names
  tag = lambda element: element.tag.rpartition("}")[2]
  lines = []
  for group in root.iter():
    if re.fullmatch(r"line2d_\d+", group.get("id", "")):
      path = next((child for child in group if tag(child) == "path"), None)
      if path is not None and "stroke-width: 1.5" in path.get("style", ""):
        lines.append(
          [tuple(map(float, xy)) for xy in re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d"))]
        )
  return lines, [element.text for element in root.iter() if tag(element) == "text"]


def test_the_curve_is_where_the_numbers_are():
  svg = line_plot({"x & y": ([0, 50, 100], [0.0, 5.0, 10.0])}, title="t<", xlabel="step", ylabel="")
  [[(x0, y0), (x1, y1), (x2, y2)]], texts = svg_parts(svg)
  assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x2 > x0
  assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0
  assert {"t<", "step", "100", "10"} <= set(texts)


def test_several_runs_share_a_plot_and_keep_their_colors():
  """A run without points takes its color; names are not formulas; text follows dark mode."""
  series = {"a<b>": ([1, 2], [1.0, 2.0]), "none": ([], []), "_$c$": ([1, 2], [3.0, np.nan])}
  svg = line_plot(series, title="t", xlabel="step", ylabel="")
  _, texts = svg_parts(svg)
  assert "a<b>" in texts and "_$c$" in texts and "none" not in texts
  text = svg.decode()
  assert COLORS[0] in text and COLORS[1] not in text and COLORS[2] in text
  assert "currentColor" in text and "prefers-color-scheme:dark" in text
  assert svg == line_plot(series, title="t", xlabel="step", ylabel="")  # the same bytes


def test_a_plot_becomes_a_file(tmp_path):
  series = {"a": ([1, 2, 3], [0.0, 10.0, 100.0])}
  for suffix in ("png", "svg"):
    path = tmp_path / f"plot.{suffix}"
    content = line_plot(series, path, title="t", xlabel="x", ylabel="y", log_y=True)
    assert path.read_bytes() == content and list(tmp_path.glob(".*")) == []
  assert np.asarray(Image.open(tmp_path / "plot.png")).shape[:2] > (300, 500)
  with pytest.raises(ValueError, match="must end in .png or .svg"):
    line_plot(series, tmp_path / "plot.pdf", title="t", xlabel="x", ylabel="y")
  with pytest.raises(ValueError, match="not a point to draw"):
    line_plot({"a": ([1], [np.inf])}, title="t", xlabel="x", ylabel="y")


def test_mistakes(tmp_path, capsys):
  for arguments, message in (
    ([], "--runs is missing"),
    ([f"--runs={tmp_path}"], "holds no run"),
    ([f"--runs={tmp_path}", "--out=x.pdf"], "must end in .html"),
  ):
    assert run_command(["report", *arguments]) == 2 and message in capsys.readouterr().err


def test_a_key_that_one_run_alone_has_and_that_is_none(tmp_path):
  for name, config in (("a", {}), ("b", {"wandb": None})):
    workdir_with_a_run(tmp_path, name)
    (tmp_path / name / "config.json").write_text(json.dumps({"task": "pretrain"} | config))
  runs = f"--runs={tmp_path}/a,{tmp_path}/b"
  assert run_command(["report", runs, f"--out={tmp_path}/page.html"]) == 0


def test_every_start_is_noted(tmp_path):
  workdir = new_folder(tmp_path / "run")
  for first in (0, 7):
    log.Log(workdir, 40, first).close()
  starts = read_json_lines(workdir / "starts.jsonl")[0]
  assert [start["first_step"] for start in starts] == [0, 7]
  assert all(
    "cpu" in start["devices"] and start["time"][:2] == "20" and "flax" in start["versions"]
    for start in starts
  )


def test_hyperparameters_reach_tensorboard(tmp_path):
  workdir = workdir_with_a_run(tmp_path, "run")
  events = b"".join(p.read_bytes() for p in (workdir / "tensorboard").rglob("*events*"))
  assert b"_hparams_/session_start_info" in events and b"optim.blr" in events


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch, capsys):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))
      if step == 3:
        raise RuntimeError("no network")

    def finish(self):
      calls.append("finish")

  fake = types.ModuleType("wandb")
  fake.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))
  fake.login = lambda prompt: keys.pop()
  fake.init = lambda **options: calls.append(options) or Run()
  fake.Image = lambda picture: ("image", picture.shape)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  workdir = new_folder(tmp_path / "run")
  keys = [True, False]
  writer = log.Log(workdir, 4, wandb="project")
  writer.scalars(1, {"loss": 0.5})
  writer.close()
  assert calls == []
  [warning] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
  assert (
    "nothing is written to Weights & Biases (there is no API key); run `wandb login`" in warning
  )
  writer = log.Log(workdir, 4, settings={"seed": 1}, wandb="project")
  writer.scalars(1, {"loss": 0.5})
  writer.image(1, "reconstruct/x", np.zeros((4, 5, 3), np.uint8))
  for step in (2, 3, 4):
    writer.scalars(step, {"loss": 0.25})
  writer.close()
  options, *rest = calls
  assert (
    options["project"] == "project"
    and options["name"] == "run"
    and options["config"] == {"seed": 1}
    and options["resume"] == "allow"
  )
  assert rest == [
    (1, {"loss": 0.5}),
    (1, {"reconstruct/x": ("image", (4, 5, 3))}),
    (2, {"loss": 0.25}),
    (3, {"loss": 0.25}),
  ]
  assert [r["step"] for r in read_metrics(workdir)] == [
    1,
    2,
    3,
    4,
  ]  # the failure there has no effect here


def png_of(width, height):
  """Returns a PNG whose header claims a size."""
  content = io.BytesIO()
  Image.new("L", (1, 1)).save(content, "PNG")
  head = struct.pack(">II", width, height) + b"\x08\x00\x00\x00\x00"
  chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
  return content.getvalue()[:8] + chunk + content.getvalue()[33:]


HOLES = "holes"
ODD = [
  ("goodput.json", "[1, 2]", "goodput.json: "),
  ("goodput.json", '{"seconds": []}', "goodput.json: 'starts'"),
  ("goodput.json", json.dumps({"seconds": 3, "starts": 1, "replayed_steps": 0, "goodput": 1}), ""),
  (
    "goodput.json",
    json.dumps(
      dict.fromkeys(("starts", "steps", "replayed_steps", "reached", "goodput"), 1)
      | {"seconds": {"step": "x"}}
    ),
    "goodput.json: it holds what is no number",
  ),
  ("config.json", "[1]", "config.json: 'list' object"),
  ("config.json", "null", "config.json: "),
  ("config.json", "[" * 100_000, "config.json: maximum recursion"),
  ("config.json", '{"items": 1, "a.b": {"": [[]]}, "keys": {"x": null}}', None),
  ("config.json", None, "config.json is a pipe; expected"),
  ("starts.jsonl", '[1]\n"x"\n{"time": [1], "command": {}}\n', "starts.jsonl: 2 lines are no"),
  ("starts.jsonl", HOLES, "starts.jsonl has 64,424,509,440 bytes; at most"),
  ("metrics.jsonl", '{"step": 1, "loss": NaN}\n', "metrics.jsonl: 1 lines are no records"),
  ("metrics.jsonl", '{"step": "1", "loss": 1}\n', "metrics.jsonl: 1 lines are no records"),
  ("metrics.jsonl", f'{{"step": 1, "loss": {"9" * 4000}}}\n', "metrics.jsonl: 1 lines"),
  (
    "metrics.jsonl",
    '{"step": 1, "$_{\\u0000\\n^": 1e299, "y": -1e299}\n{"step": 2, "y": 3}\n',
    None,
  ),
  ("metrics.jsonl", '{"step": 1, "x": true, "y": {"a": 1}}\n', "metrics.jsonl: 1 lines are no"),
  ("reconstructions/step_0000010.png", None, "step_0000010.png is a pipe; expected"),
  ("reconstructions/step_0000010.png", png_of(40_000, 20_000), "it has 40000 x 20000 pixels|bomb"),
  ("reconstructions/step_0000010.png", png_of(10**9, 1), "step_0000010.png: "),
  ("reconstructions/step_0000010.png", b"", "step_0000010.png: cannot identify"),
  ("reconstructions/step_0000010.png", png_of(9, 9)[:-20], "step_0000010.png: "),
  ("reconstructions/step_x.png", b"", "step_x.png: its name is not step_NUMBER.png"),
  ("reconstructions", b"a file", None),
]


@pytest.mark.parametrize("name, content, problem", ODD)
def test_odd_workdirs_give_a_page_that_names_what_is_odd(
  tmp_path, monkeypatch, capsys, name, content, problem
):
  """`None` as content is a pipe, which must not be opened; HOLES is a file of 60 GiB of them."""
  monkeypatch.setattr(report, "line_plot", lambda *_, title, **__: title.encode())
  folder = tmp_path / "run"
  (folder / "reconstructions").mkdir(parents=True)
  (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.5}\n')
  target = folder / name
  if name == "reconstructions":
    target.rmdir()
  if content is None:
    os.mkfifo(target)
  elif content is HOLES:
    target.touch()
    os.truncate(target, 60 * 2**30)
  else:
    target.write_bytes(content if isinstance(content, bytes) else content.encode())
  assert run_command(["report", f"--runs={folder}", f"--out={tmp_path}/page.html"]) == 0
  printed = capsys.readouterr().out
  words = " ".join(Reader((tmp_path / "page.html").read_text()).words)
  assert ("What could not be read" in words) == (problem is not None)
  assert printed.count("warning: run: ") == (problem is not None)
  if problem:
    assert re.search(problem, printed) and name.rpartition("/")[2] in words


def test_odd_numbers_and_names_are_drawn(tmp_path):
  (tmp_path / "run").mkdir()
  lines = [{"step": i, "$_{\0\n^": 1e299 * (-1) ** i, "_y": 1e-300 * i} for i in (1, 2, 2**52)]
  (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  assert run_command(["report", f"--runs={tmp_path}/run", f"--out={tmp_path}/page.html"]) == 0
  page = Reader((tmp_path / "page.html").read_text())
  for image in page.images:
    svg = base64.b64decode(image["src"].partition("base64,")[2])
    ET.fromstring(svg)
  assert len(page.images) == 2
