"""mrmae visualize: the content of its pictures and tables, and its self-contained page."""

import base64
import io
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mrmae_jax
from mrmae_jax import mrmae
from mrmae_jax.cli import show_teacher, visualize
from mrmae_jax.cli import subject as subjects
from mrmae_jax.models import ConvViT, ViT, encode, head_attention
from mrmae_jax.reconstruction import reconstruct
from mrmae_jax.runs.checkpoint import Checkpoints
from mrmae_jax.tasks import pretrain
from mrmae_jax.train import TrainState
from mrmae_jax.viz import grid, page, panels
from mrmae_jax.weights import loaded_model, writers
from tests import tiny
from tests.helpers.cli import parse_options, run_command
from tests.helpers.models import make_student, random_params

SIZE, GRID = (32, 48), (4, 6)  # of tiny's images, 8-pixel patches
PLAIN = ("--count=2", "--bank=9", "--neighbors=2")


def run_with_teacher(workdir, encoder="convvit", **values):
  """Writes the workdir of a run with a teacher; returns its configuration and parameters."""
  config = tiny.changed(tiny.get_config(encoder), **values)
  model = pretrain.make_model(config, {"mimic": 48})
  params = random_params(model, SIZE, seed=3)
  checkpoints = Checkpoints(workdir, {})
  checkpoints.save(7, TrainState(jnp.int32(7), params, (), (jnp.zeros(3),), jnp.float32(0)))
  checkpoints.close()
  (workdir / "config.json").write_text(config.to_json())
  return config, params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("a<b>&c")
  return workdir, *run_with_teacher(workdir, "vit")  # compiles sooner than a ConvViT


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Eight images; the fifth equals the second."""
  root = tmp_path_factory.mktemp("photos")
  for i in range(8):
    coarse = np.random.default_rng(1 if i == 4 else i).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(coarse).resize((60, 40), Image.Resampling.BICUBIC).save(root / f"{i}.png")
  return root


@pytest.fixture
def command(tmp_path, capsys):
  def call(*arguments):
    code = run_command(["visualize", f"--out={tmp_path}/look", *map(str, arguments)])
    return code, capsys.readouterr(), tmp_path / "look"

  return call


def subject_of(workdir, config, images=None, teacher_out=None, **options):
  """Returns a Subject without the command, with random images by default."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, *SIZE, 3), np.uint8) if images is None else images
  words = [f"--{name}={value}" for name, value in options.items()]
  flags = parse_options("visualize", f"--model={workdir}", "--out=unused", *words)
  return subjects.Subject(
    mrmae_jax.load(workdir, mimic_heads=True),
    images,
    None,
    [0, 1],
    config,
    teacher_out,
    "a teacher",
    flags,
  )


class Parsed(HTMLParser):
  """Collects tags and texts; fails on a page that is not well-formed."""

  VOID = {"meta", "link", "img"}

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self._open = [], [], []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open[-1:] != ["style"]:
      self.texts.append(data)

  def named(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def test_the_whole_page(run, command):
  workdir, _, _ = run
  code, printed, out = command(f"--model={workdir}", *PLAIN)
  assert code == 0, printed.err
  assert sorted(path.name for path in out.iterdir()) == sorted(
    [f"{name}.png" for name in visualize.PANELS] + ["index.html"]
  )
  text = (out / "index.html").read_text()
  parsed = Parsed(text)
  content = " ".join(" ".join(parsed.texts).split())
  assert not parsed.named("script") and "a<b>&c0 after 7 steps" in content and "<b>" not in text
  assert re.search("<title>a&lt;b&gt;&amp;c0 after 7 steps</title>", text)
  for attrs in (attrs for _, attrs in parsed.tags):
    for name in ("src", "href"):
      assert attrs.get(name, "data:").startswith(("data:", "#"))
  assert "url(" not in text and "@import" not in text
  images = parsed.named("img")
  assert len(images) == len(visualize.PANELS) and all(len(attrs["alt"]) > 30 for attrs in images)
  assert len([attrs for attrs in parsed.named("div") if attrs["tabindex"] == "0"]) >= len(images)
  targets = {attrs["id"] for attrs in parsed.named("h2")}
  assert {attrs["href"][1:] for attrs in parsed.named("a")} == targets and len(targets) == 1 + len(
    images
  )
  assert (
    "digits: 359 images" in content and "4 x 6 patches of 8 pixels" in content
  )  # the run's held-out ones
  assert (
    "6 of 24 patches are visible" in content
    and "CLIP ViT/8" in content
    and "prefers-color-scheme: dark" in text
  )
  stored = [
    np.asarray(Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1]))))
    for attrs in images
  ]
  for name, picture in zip(visualize.PANELS, stored):
    np.testing.assert_array_equal(picture, np.asarray(Image.open(out / f"{name}.png")))


def test_page_escapes_and_takes_an_svg(tmp_path):
  document = page.Page("<script>alert(1)</script>", "a & b")
  document.section("One <i>", "first <p>\n\nsecond")
  svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
  document.figure(page.Figure(svg, 'a "quoted" <alt>', "<caption>"))
  document.table(["<h>", "n"], [["<td>", 1.5], ["\udcff", None]])  # a file name that is not text
  document.write(tmp_path / "page.html")
  parsed = Parsed((tmp_path / "page.html").read_text())
  assert not parsed.named("script") and not parsed.named("i") and len(parsed.named("p")) == 3
  (image,) = parsed.named("img")
  assert image["alt"] == 'a "quoted" <alt>' and image["src"].startswith(
    "data:image/svg+xml;base64,"
  )
  assert {
    "<script>alert(1)</script>",
    "a & b",
    "One <i>",
    "first <p>",
    "second",
    "<caption>",
    "<h>",
    "<td>",
    "1.5",
    "?",
  } <= set(parsed.texts)
  assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstructions_show_what_their_titles_say(monkeypatch, norm_pix):
  """The decoder's output is known: visible patches stay bit for bit.

  Hidden ones have the statistics of the visible ones around them.
  """
  config = tiny.changed(tiny.get_config(), teacher__path="")
  model, rng = pretrain.make_model(config, {}), np.random.default_rng(0)
  images, output = (
    rng.integers(0, 256, (2, *SIZE, 3), np.uint8),
    rng.standard_normal((2, 24, 192)).astype(np.float32),
  )
  mask = mrmae.sample_mask(jax.random.uniform(jax.random.key(0), (2, 24)), 0.75)
  monkeypatch.setattr(mrmae, "encode_decode", lambda *arguments: (None, jnp.asarray(output)))
  drawn = {
    name: np.asarray(x) for name, x in reconstruct(model, {}, images, mask, norm_pix).items()
  }
  blocks = lambda x: x.reshape(2, 4, 8, 6, 8, 3).swapaxes(2, 3).reshape(2, 24, 8, 8, 3)
  removed, mean, std = np.asarray(mask.removed), np.float32(model.mean), np.float32(model.std)
  for name in ("pasted", "pasted_blind", "masked"):
    bytes_ = np.round(blocks(drawn[name]) * 255).astype(np.uint8)
    np.testing.assert_array_equal(bytes_[~removed], blocks(images)[~removed])
  np.testing.assert_allclose(blocks(drawn["masked"])[removed], 0.5, atol=1e-6)

  pixels = ((blocks(images) / np.float32(255) - mean) / std).reshape(2, 24, 192).astype(np.float64)
  statistics = (
    np.stack([pixels.mean(-1), pixels.std(-1, ddof=1)], -1)
    if norm_pix
    else np.broadcast_to([0.0, 1], (2, 24, 2))
  )
  for suffix in ("", "_blind"):
    for b, i in np.argwhere(removed):
      offset, scale = statistics[b, i]
      if suffix:
        weights = {
          j: ((i // 6 - j // 6) ** 2 + (i % 6 - j % 6) ** 2) ** -1.5
          for j in np.flatnonzero(~removed[b])
        }
        offset, scale = sum(w * statistics[b, j] for j, w in weights.items()) / sum(
          weights.values()
        )
      expected = np.clip((output[b, i] * scale + offset).reshape(8, 8, 3) * std + mean, 0, 1)
      for name in ("reconstruction", "pasted"):
        np.testing.assert_allclose(blocks(drawn[name + suffix])[b, i], expected, atol=1e-4)


def test_nothing_hidden_gets_into_the_blind_picture(run):
  workdir, config, _ = run
  subject = subject_of(workdir, config)
  before = subject.model.reconstruct(subject.images)
  hidden = np.repeat(
    np.repeat(
      np.asarray((before["masked"] == 0.5).all(-1)).reshape(2, 4, 8, 6, 8).all((2, 4)), 8, 1
    ),
    8,
    2,
  )
  others = np.where(hidden[..., None], 255 - subject.images // 2, subject.images)
  after = subject.model.reconstruct(others)
  for name in ("pasted_blind", "reconstruction_blind"):
    np.testing.assert_array_equal(before[name], after[name])
  assert np.abs(np.asarray(before["pasted"]) - np.asarray(after["pasted"])).max() > 0.1


def test_the_picture_holds_the_visible_patches_as_they_are(run):
  """Through drawing too: 48-pixel images are drawn three times as large."""
  workdir, config, _ = run
  subject = subject_of(workdir, config)
  picture = visualize.reconstruction(subject).picture
  cell = lambda column, row: picture[
    20 + row * 100 : 20 + row * 100 + 96 : 3, 4 + column * 148 : 4 + column * 148 + 144 : 3
  ]
  for row in range(2):
    np.testing.assert_array_equal(cell(0, row), subject.images[row])
    visible = (cell(1, row) != 128).any(-1)
    assert visible.sum() == 6 * 64
    np.testing.assert_array_equal(cell(3, row)[visible], subject.images[row][visible])
    assert np.abs(cell(3, row)[~visible].astype(int) - subject.images[row][~visible]).mean() > 10


def test_ratios_hide_what_they_say(run):
  workdir, config, _ = run
  subject = subject_of(workdir, config)
  _, _, caption, (_, rows) = visualize.ratios(subject)
  assert [row[:2] for row in rows] == [
    ["50%", "12 of 24"],
    ["75%", "6 of 24"],
    ["85%", "3 of 24"],
    ["90%", "2 of 24"],
    ["95%", "1 of 24"],
  ]
  assert "trained at 75%" in caption
  previously_hidden = None
  for ratio, (_, visible, error) in zip(visualize.RATIOS, rows):
    drawn = {
      name: np.asarray(x, np.float64)
      for name, x in subject.model.reconstruct(subject.images, ratio).items()
    }
    hidden = np.repeat(
      np.repeat((drawn["masked"] == 0.5).all(-1).reshape(2, 4, 8, 6, 8).all((2, 4)), 8, 1), 8, 2
    )
    assert ((~hidden).sum((1, 2)) == 64 * int(visible.split()[0])).all()
    assert previously_hidden is None or not (previously_hidden & ~hidden).any()
    previously_hidden = hidden
    expected = 255 * np.sqrt(np.square(drawn["pasted_blind"] - drawn["original"])[hidden].mean())
    assert abs(float(error) - expected) < 0.06


@pytest.mark.parametrize(
  "encoder",
  [
    pytest.param(ConvViT((2, 2, 2), (8, 12, 24), (1, 1, 2), 3), marks=pytest.mark.variant),
    pytest.param(
      ConvViT((2, 2, 2), (8, 12, 24), (1, 1, 2), 3, cls_token=True, remat="full"),
      marks=pytest.mark.variant,
    ),
    ViT(8, 24, 2, 3, 48),
  ],
)
def test_attention_of_each_head(encoder):
  pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, *SIZE, 3)), jnp.float32)
  params = jax.jit(encoder.init)(jax.random.key(0), pixels)["params"]
  params = jax.tree.map(
    lambda x: x + 0.3 * np.random.default_rng(x.size).standard_normal(x.shape), params
  )  # biases too
  weights = np.asarray(jax.jit(lambda p, x: head_attention(encoder, p, x))(params, pixels))
  cls = int(encoder.cls_token)
  assert (
    weights.shape == (2, 3, 24 + cls, 24 + cls)
    and weights.min() >= 0
    and np.abs(weights[:, 0] - weights[:, 1]).max() > 1e-3
  )
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  _, out = jax.jit(encoder.apply)({"params": params}, pixels)
  if cls:
    np.testing.assert_allclose(weights[:, :, 0, 1:].mean(1), out["attention"], atol=1e-5)
  # The block's own values, weighted by it, give the block's output.
  name = f"{'blocks' if isinstance(encoder, ViT) else 'blocks3'}_1"
  block, x = params[name], out["layers"][0]
  norm = lambda x, p: (
    (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"]
    + p["bias"]
  )
  dense = lambda x, p: x @ p["kernel"] + p["bias"]
  v = dense(norm(x, block["norm1"]), block["attn"]["qkv"])[..., 48:].reshape(2, -1, 3, 8)
  x = x + dense(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape), block["attn"]["proj"])
  h = dense(norm(x, block["norm2"]), block["fc1"])
  x = x + dense(jax.nn.gelu(h, approximate=False), block["fc2"])
  np.testing.assert_allclose(x, out["layers"][-1], atol=2e-4)


def test_queries(run, monkeypatch):
  """--query selects the row of the attention that is drawn, and the patch with the frame."""
  workdir, config, _ = run
  rng = np.random.default_rng(0)
  weights = rng.random((2, 2, 24, 24)).astype(np.float32)
  drawn = []
  monkeypatch.setattr(panels, "overlay", lambda pixels, heat, grid: drawn.append(heat) or pixels)
  for query, expected in (("", weights.mean(2)), ("2,5", weights[:, :, 17])):
    subject = subject_of(workdir, config, query=query)
    monkeypatch.setattr(subject.model, "attention", lambda images: weights)
    drawn.clear()
    panel = visualize.attention(subject)
    np.testing.assert_allclose(drawn, [expected[:, 0], expected[:, 1], expected.mean(1)], rtol=1e-6)
    share = expected / expected.sum(-1, keepdims=True)
    spread = np.exp(-(share * np.log(share)).sum(-1)).mean(0)
    np.testing.assert_allclose([float(row[1]) for row in panel.table[1]], spread, atol=0.06)
    picture = panel.picture[20:116:3, 4:148:3]
    red = (picture == [255, 0, 0]).all(-1)
    assert red.sum() == (28 if query else 0) and (not query or (red[16:24, 40:].sum() == 28))
  vit = loaded_model.LoadedModel(*make_student(ViT(8, 16, 1, 2, 32), None))
  subject = subject._replace(
    model=mrmae_jax.pretrained.PretrainedModel(
      vit._replace(report=loaded_model.Report("x", "", (), (), ()))
    ),
    options=subject_of(workdir, config).options,
  )
  drawn.clear()
  assert "the CLS token" in visualize.attention(subject).caption
  np.testing.assert_allclose(
    drawn[0], np.asarray(subject.model.attention(subject.images))[:, 0, 0, 1:], rtol=1e-6
  )


@pytest.mark.parametrize(
  "source, head, norm",
  [
    ("fused", "linear", "layer_norm"),
    pytest.param("last_block", "mlp", "l2", marks=pytest.mark.variant),
  ],
)
def test_cosine_map(tmp_path, source, head, norm):
  config, params = run_with_teacher(
    tmp_path, "vit", teacher__source=source, teacher__head=head, teacher__target_norm=norm
  )
  images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
  _, teacher_out = show_teacher.run_teacher(config, images)
  panel = visualize.cosine(subject_of(tmp_path, config, images, teacher_out))
  student = mrmae_jax.load(tmp_path).network
  x, out = jax.jit(student.encoder.apply)(
    {"params": student.params["encoder"]}, mrmae.normalize(images, student.mean, student.std)
  )
  tokens, head_params = (
    np.asarray(x if source == "fused" else out["layers"][-1])[:, 1:],  # without CLS
    jax.device_get(params["mimic_heads"]["mimic"]),
  )
  dense = lambda x, p: x @ p["kernel"] + p["bias"]
  if head == "mlp":
    tokens = np.asarray(jax.nn.gelu(dense(tokens, head_params["hidden"]), approximate=False))
  predicted = dense(tokens, head_params["linear"])
  targets = (
    teacher_out.features - teacher_out.features.mean(-1, keepdims=True)
    if norm == "layer_norm"
    else teacher_out.features
  )
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  expected = (unit(predicted) * unit(targets)).sum(-1)
  numbers = np.array(panel.table[1], float)
  np.testing.assert_allclose(
    numbers[:, 1:], np.stack([expected.mean(1), expected.min(1), expected.max(1)], 1), atol=6e-4
  )
  assert f"Mean cosine {expected.mean():.3f}" in panel.caption
  low, high = np.percentile(expected, [2, 98])
  shades = np.round(grid.color_scale(np.clip((expected - low) / (high - low), 0, 1)) * 255).reshape(
    2, *GRID, 3
  )
  np.testing.assert_allclose(
    panel.picture[20 + 12 : 20 + 96 : 24, 152 + 12 : 152 + 144 : 24], shades[0], atol=1
  )  # centres of the patches


def test_panels_that_cannot_be_drawn(run):
  workdir, config, _ = run
  subject = subject_of(workdir, config)
  teacher_out = mrmae.TeacherOutput(np.zeros((2, 24, 7), np.float32), None, None)
  masked = tiny.changed(config.copy_and_resolve_references(), teacher__tokens="masked")
  for changes, message in (
    ({}, "a teacher"),
    (dict(teacher_out=teacher_out), "gives 48 channels; a teacher has 7"),
    (dict(teacher_out=teacher_out, config=masked), "on masked tokens"),
  ):
    with pytest.raises(visualize.MissingPanelError, match=message):
      visualize.cosine(subject._replace(**changes))
  with pytest.raises(visualize.MissingPanelError, match="no CLS token"):
    visualize.focused(subject._replace(teacher_out=teacher_out))


def test_neighbors(photos, run, command):
  """Of two equal images each is the nearest of the other; no image is its own neighbor."""
  workdir, _, _ = run
  code, printed, out = command(
    f"--model={workdir}",
    f"--images={photos}",
    "--count=8",
    "--bank=0",
    "--neighbors=3",
    "--panels=neighbors",
  )
  assert code == 0, printed.err
  content = (out / "index.html").read_text()
  rows = re.findall(
    r"<tr><td>(\S+?)</td>" + 3 * r"<td>(\S+) \((\S+)\)</td>" + "</tr>",
    content,
  )
  files = [[int(name.split("/")[-1][0]) for name in (row[0], *row[1::2])] for row in rows]
  assert [row[0] for row in files] == list(range(8)) and all(len(set(row)) == 4 for row in files)
  assert files[1][1] == 4 and files[4][1] == 1 and float(rows[1][2]) == float(rows[4][2]) == 1
  model = mrmae_jax.load(workdir)
  images = np.stack(
    [
      np.asarray(Image.open(photos / f"{i}.png").resize((48, 32), Image.Resampling.BICUBIC))
      for i in range(8)
    ]
  )
  x = np.asarray(
    encode(
      model.network.encoder,
      model.network.params["encoder"],
      mrmae.normalize(images, model.network.mean, model.network.std),
    )["pooled"]
  )
  similarity = x @ x.T / np.linalg.norm(x, axis=1) / np.linalg.norm(x, axis=1)[:, None]
  np.fill_diagonal(similarity, -2)
  np.testing.assert_array_equal(
    [row[1:] for row in files], np.argsort(-similarity, axis=1, kind="stable")[:, :3]
  )
  picture = np.asarray(Image.open(out / "neighbors.png"))
  cell = lambda column, row: picture[
    20 + row * 100 : 20 + row * 100 + 96 : 3, 4 + column * 148 : 4 + column * 148 + 144 : 3
  ]
  np.testing.assert_array_equal(cell(1, 1), images[4])
  np.testing.assert_array_equal(cell(0, 1), images[1])


def test_colors_of_a_basis():
  rng = np.random.default_rng(0)
  basis = rng.standard_normal((2, 30, 8)) * [9, 5, 3, 1, 1, 1, 1, 1] + 4
  colors = grid.principal_colors(basis)
  np.testing.assert_allclose(grid.principal_colors(basis[:1, :7], basis), colors[:1, :7], atol=1e-9)
  for channel in range(3):  # in the order of their spread
    assert abs(np.corrcoef(colors[..., channel].ravel(), basis[..., channel].ravel())[0, 1]) > 0.9
  shades = grid.color_scale(np.linspace(0, 1, 50))
  assert (np.diff(shades @ [0.299, 0.587, 0.114]) > 0).all()


def test_one_image_of_any_size_on_published_weights(tmp_path, photos, command):
  """A file without decoder, run and teacher, at a square size given by one number.

  The grid is not the file's.
  """
  writers.write_model(
    make_student(ViT(8, 16, 1, 2, 32), None), tmp_path / "vit.safetensors", "timm"
  )
  code, printed, out = command(
    f"--model={tmp_path}/vit.safetensors", f"--images={photos}/3.png", "--image_size=40"
  )
  assert code == 0, printed.err
  assert sorted(path.name for path in out.iterdir()) == ["attention.png", "index.html", "pca.png"]
  content = " ".join(Parsed((out / "index.html").read_text()).texts)
  for reason in (
    "40 x 40 pixels",
    "5 x 5 patches",
    "3.png: one image",
    "vit.safetensors",
    "without a decoder and cannot reconstruct",
    "facebook/vit-mae-",
    "there is no teacher; give one with --teacher",
    "the source has 1 image",
    "holds no mimic head",
  ):
    assert reason in content
  picture = np.asarray(Image.open(out / "attention.png"))[20 : 20 + 160 : 4, 4 : 4 + 160 : 4]
  wide = Image.open(photos / "3.png").resize((60, 40), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(picture, np.asarray(wide)[:, 10:50])  # its middle


def test_a_preset_by_name_and_a_teacher_that_has_gone(tmp_path, run, monkeypatch):
  workdir, config, _ = run
  flags = lambda *words: parse_options("visualize", "--model=x", "--out=unused", *words)
  model, stored = (
    mrmae_jax.load(workdir),
    {"teacher": config.teacher.to_dict() | {"last_k": 2}, "method": {"masking": "focused"}},
  )
  made_config = subjects._make_config(flags("--teacher=clip_vit_b16"), model, SIZE, stored)
  teacher = made_config.teacher
  assert (teacher.name, teacher.path, teacher.last_k, made_config.method.masking) == (
    "clip_vit_b16",
    "",
    2,
    "focused",
  )
  assert (
    subjects._make_config(flags("--teacher=clip/"), model, SIZE, stored).teacher.path == "clip/"
  )
  gone = tiny.changed(config.copy_and_resolve_references(), teacher__path=str(tmp_path / "gone"))
  teacher_out, reason = subjects._run_teacher(flags(), gone, np.zeros((1, *SIZE, 3), np.uint8))
  assert teacher_out is None
  assert "the run's teacher cannot be loaded" in reason and "gone" in reason
  none = subjects._make_config(flags(), model, SIZE, {})
  assert not none.teacher.path and "no teacher" in subjects._run_teacher(flags(), none, None)[1]


def test_refusals(tmp_path, run, photos, command):
  workdir, _, _ = run
  writers.write_model(
    make_student(ViT(8, 16, 1, 2, 32), None), tmp_path / "vit.safetensors", "timm"
  )
  model, vit = f"--model={workdir}", f"--model={tmp_path}/vit.safetensors"
  for arguments, code, message in (
    ([], 2, "--model is missing"),
    ([vit], 2, "--images is missing"),
    (
      [vit, f"--images={photos}", "--panels=reconstruction"],
      2,
      "--panels=reconstruction: .*without a decoder .*vit-mae-",
    ),
    (
      [vit, f"--images={photos}", "--panels=pca,focused"],
      2,
      "--panels=focused: there is no teacher; give one with --teacher",
    ),
    ([vit, f"--images={photos}", "--panels=cosine"], 2, "--panels=cosine: .*holds no mimic head"),
    ([vit, f"--images={photos}", "--teacher=/no/such"], 2, "/no/such"),
    (
      [model, "--image_size=32,50"],
      2,
      "--image_size=32,50 is not a multiple of the model's token size 8; nearest: 32,48",
    ),
    ([model, "--image_size=a"], 2, "argument --image_size: 'a' given; expected a whole number"),
    ([model, "--image_size=0"], 2, "expected a whole number of 1 or more"),
    ([model, "--image_size=8,8,8"], 2, "expected 1 or 2 values separated by commas"),
    (
      [model, "--panels=attention", "--query=4,0", *PLAIN],
      2,
      "--query=4,0 is none of the 4 rows and 6 columns",
    ),
    (
      [model, "--panels=attention", "--query=1", *PLAIN],
      2,
      "argument --query: '1' given; expected 2 values",
    ),
    ([model, "--panels=what"], 2, "'what' is not one of reconstruction"),
    ([model, "--count=0"], 2, "argument --count: '0' given; expected a whole number of 1 or more"),
    ([model, "--images=/no/such.jpg"], 3, "/no/such.jpg"),
    ([model, "--images=folder:/no/such"], 3, "/no/such: does not exist"),
    ([f"--model={tmp_path}/none", "--images=digits"], 2, "no such file or folder"),
  ):
    exit_code, printed, out = command(*arguments)
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert exit_code == code and len(errors) == 1 and re.search(message, errors[0]), (
      arguments,
      exit_code,
      printed.err,
    )
    assert not out.exists()
  (tmp_path / "broken.png").write_bytes(b"no image")
  exit_code, printed, out = command(model, f"--images={tmp_path}/broken.png")
  assert exit_code == 3 and "broken.png" in printed.err and not out.exists()
