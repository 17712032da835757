"""The page about runs, and what a run writes for it."""

import html.parser
import json
import re
import sys
import types
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from mrmae_jax.cli import report
from mrmae_jax.runs import log


def workdir_with_a_run(folder, name, scale=1.0, blr=1e-4):
  """A workdir as a run leaves it, without the run."""
  place = folder / name
  writer = log.Log(place_made(place), 40, settings={"optim.blr": blr})
  for step in range(1, 41):
    writer.scalars(
      step, {"loss": scale / step, "pixel": 0.6 / step, "lr": blr, "images_per_s": 100.0}
    )
    if step % 10 == 0:
      writer.scalars(step, {"knn/accuracy": 0.5 + step / 100, "evaluation_s": 1.0})
  writer.close()
  (place / "config.json").write_text(
    json.dumps({"task": "pretrain", "optim": {"blr": blr, "b1": 0.9}, "evals": {}})
  )
  (place / "reconstructions").mkdir()
  for step in range(0, 90, 10):
    Image.fromarray(np.full((20, 30, 3), step * 2, np.uint8)).save(
      place / "reconstructions" / f"step_{step:07d}.png"
    )
  return place


def place_made(place):
  place.mkdir(parents=True)
  return report_path(place)


def report_path(place):
  from mrmae_jax.runs.workdir import open_workdir

  return open_workdir(place)


class Reader(html.parser.HTMLParser):
  """Collects what matters of a page; fails on tags that are not closed in order."""

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


def test_a_page_about_two_runs(tmp_path, capsys):
  workdir_with_a_run(tmp_path / "sweep", "a<b>", 1.0, 1e-4)
  workdir_with_a_run(tmp_path / "sweep", "b", 2.0, 3e-4)
  (tmp_path / "sweep" / "notes").mkdir()
  out = tmp_path / "page.html"
  assert report.main(["report", f"--runs={tmp_path}/sweep", f"--out={out}"]) == 0
  assert "2 runs" in capsys.readouterr().out
  text = out.read_text()
  page, words = Reader(text), " ".join(Reader(text).words)
  assert (
    all(link.startswith(("data:", "#")) for link in page.links) and "<script" not in text
  )  # nothing leaves the page
  assert all(image["alt"] for image in page.images) and "a<b>" in words and "<b>" not in text
  assert "1 → 0.025" in words and "2 → 0.05" in words and "0.6 → 0.9" in words  # loss of both, k-NN
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
    and "python -m mrmae_jax.cli.train" in words
    and f"jax {log.jax.__version__}" in words
  )
  svgs = [image for image in page.images if image["src"].startswith("data:image/svg")]
  assert len(svgs) == 6 and svgs[0]["alt"].startswith(
    "loss over the steps. Last values: a<b>: 0.025; b: 0.05."
  )


def test_the_curve_is_where_the_numbers_are():
  svg = report.plot({"x & y": [(0, 0.0), (50, 5.0), (100, 10.0)]}, "t<", {"x & y": "#123456"})
  root = ET.fromstring(svg)  # well-formed, whatever the names
  line = next(e for e in root.iter() if e.tag.endswith("polyline"))
  points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
  (x0, y0), (x1, y1), (x2, y2) = points
  assert (
    x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    and y2 < y0
  )
  labels = [e.text for e in root.iter() if e.tag.endswith("text")]
  assert "t<" in labels and "100" in labels and "10" in labels


@pytest.mark.parametrize(
  "low, high", [(0, 1), (0.013, 0.019), (-3, 1e6), (5, 5), (0, 0), (1e-9, 2e-9)]
)
def test_ticks_span_the_values_in_round_steps(low, high):
  found = report.ticks(low, high)
  assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
  steps = np.diff(found)
  assert np.allclose(steps, steps[0]) and re.fullmatch(
    r"(1|2|2\.5|5)(\.0)?e[+-]\d+", f"{steps[0]:.1e}".replace("2.5e", "2.5e")
  )


def test_mistakes(tmp_path, capsys):
  for arguments, said in (
    ([], "--runs is missing"),
    ([f"--runs={tmp_path}"], "holds no run"),
    ([f"--runs={tmp_path}", "--out=x.pdf"], "must end in .html"),
  ):
    assert report.main(["report", *arguments]) == 2 and said in capsys.readouterr().err


def test_every_start_is_noted(tmp_path):
  place = place_made(tmp_path / "run")
  for first in (0, 7):
    log.Log(place, 40, first).close()
  starts = log.read(place, "starts.jsonl")
  assert [start["first_step"] for start in starts] == [0, 7]
  assert all(
    "cpu" in start["devices"] and start["time"][:2] == "20" and "flax" in start["versions"]
    for start in starts
  )


def test_hyperparameters_reach_tensorboard(tmp_path):
  place = workdir_with_a_run(tmp_path, "run")
  events = b"".join(p.read_bytes() for p in (place / "tensorboard").rglob("*events*"))
  assert b"_hparams_/session_start_info" in events and b"optim.blr" in events


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
  seen = []

  class Run:
    def log(self, values, step):
      seen.append((step, values))
      if step == 3:
        raise RuntimeError("no network")

    def finish(self):
      seen.append("finish")

  fake = types.ModuleType("wandb")
  fake.init = lambda **options: seen.append(options) or Run()
  fake.Image = lambda picture: ("image", picture.shape)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  place = place_made(tmp_path / "run")
  writer = log.Log(place, 4, settings={"seed": 1}, wandb="project")
  writer.scalars(1, {"loss": 0.5})
  writer.image(1, "reconstruct/x", np.zeros((4, 5, 3), np.uint8))
  for step in (2, 3, 4):
    writer.scalars(step, {"loss": 0.25})
  writer.close()
  options, *rest = seen
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
  assert [r["step"] for r in log.read(place)] == [
    1,
    2,
    3,
    4,
  ]  # what broke there did not matter here
