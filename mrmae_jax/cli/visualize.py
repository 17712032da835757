"""Pictures of what a model does with images: PNG files, and one HTML page with all of them that needs nothing else.

  mrmae visualize --model=/tmp/run --out=/tmp/look                               # the run's held-out images
  mrmae visualize --model=vit-mae-base --images=/my/photos --teacher=clip_vit_b16 --out=/tmp/look

--model is all that `mrmae_jax.load` opens: a run's workdir, a file of weights, a ViTMAE folder. --images is one image, a folder, or
digits, tfds:NAME, packed:PATH; a run knows its own. Each image is scaled until it covers the size, and its middle is cut out. The
size is that of training, or any --image_size in multiples of the token size.

Panels (--panels; all that can be drawn, and the page says why others cannot):
  reconstruction  what the encoder sees, what the decoder makes of it
  ratios          the same with 50 to 95 % of the patches hidden
  focused         a teacher's attention, and the patches that focused and random masking show
  attention       what the model attends to, in each head of its last block: CLS where there is one, else the mean over all
                  patches as queries, or the patch of --query=ROW,COLUMN (from 0)
  pca             patch features as colours, beside the teacher's
  cosine          where a run's features, through its mimic head, are the teacher's and where not
  neighbours      the most similar images of the source, by the mean of the patch features

The teacher is the run's own, with its options, or --teacher: a preset's name (fetched like config.teacher.name) or a path like
config.teacher.path, with the options of the run if it had a teacher. Of several teachers the first is shown.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from PIL import Image

from mrmae_jax import config as config_lib
from mrmae_jax import data, mrmae, pretrained
from mrmae_jax.cli import show_teacher
from mrmae_jax.data import open_source, open_split
from mrmae_jax.data.sources.folder import FolderSource
from mrmae_jax.errors import UsageError, WeightsError, WorkdirError
from mrmae_jax.evals import knn
from mrmae_jax.evals.reconstruct import bands_shown
from mrmae_jax.models.decoder import MimicHead
from mrmae_jax.mrmae import normalize_features
from mrmae_jax.runs import checkpoint, supervision
from mrmae_jax.runs.paths import atomic_write
from mrmae_jax.viz import page
from mrmae_jax.viz.grid import draw_grid, enlarge, interleave, overlay, principal_colours, shades
from mrmae_jax.weights import hub, model_files

RATIOS = (0.5, 0.75, 0.85, 0.9, 0.95)
HEADS_A_ROW = 6
BATCH = 64  # images of the bank at a time


class LeftOut(Exception):
  """Why a panel cannot be drawn."""


class Panel(NamedTuple):
  """A picture uint8 [H, W, 3], what there is to see in it, what to know about it, and numbers: (header, rows) or nothing."""

  picture: np.ndarray
  alt: str
  caption: str
  table: tuple[list, list] | None = None


class Subject(NamedTuple):
  """What is looked at.

  Attributes:
    model: `pretrained.PretrainedModel`, with the mimic heads of a run that has some.
    images: uint8 [B, H, W, C], those of the source at `places`.
    source, places: where they come from.
    config: image size, encoder, masking and teacher, in the shape of `config.pretrain()`.
    seen: the teacher's TeacherOutput of the images; None without one.
    teacher: a line about it, or why there is none.
    options: of the command.
  """

  model: Any
  images: np.ndarray
  source: Any
  places: list[int]
  config: Any
  seen: Any
  teacher: str
  options: Any

  @property
  def size(self) -> int:
    """Side of a token in pixels."""
    return self.model.network.encoder.patch_size

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of tokens."""
    return self.images.shape[1] // self.size, self.images.shape[2] // self.size

  @property
  def tokens(self) -> int:
    """How many there are in an image."""
    return self.grid[0] * self.grid[1]

  @property
  def bands(self) -> list[int]:
    """The channels that are shown as red, green and blue."""

    return bands_shown(self.config)[0]

  @property
  def pixels(self) -> np.ndarray:
    """The images as they are shown, float32 [B, H, W, 3] in [0, 1]."""
    return self.images[..., self.bands] / np.float32(255)

  @property
  def norm_pix(self) -> bool:
    """Whether the decoder predicts normalised patches."""
    return (
      self.model.network.method["norm_pix"]
      if self.options.norm_pix is None
      else self.options.norm_pix
    )


def reconstruction(subject: Subject) -> Panel:
  """Original, what the encoder sees, decoder output, and this around the visible patches."""
  ratio = subject.model.network.method["mask_ratio"]
  drawn = _reconstruct(subject, ratio)
  columns = {
    "original": drawn["original"],
    "encoder sees": drawn["masked"],
    "decoder output": drawn["reconstruction_blind"],
    "visible + output": drawn["pasted_blind"],
  }
  caption = (
    f"{_visible(subject, ratio)} of {subject.tokens} patches are visible, chosen at random; grey ones are hidden. The decoder "
    "is trained on hidden patches alone: its output in visible places means nothing, so the fourth column shows the visible "
    "patches themselves, and its output elsewhere."
  )
  if subject.norm_pix:
    columns["true statistics"] = drawn["pasted"]
    caption += (
      " The weights predict patches without brightness and contrast (norm-pix). These come from the visible patches "
      "around each, weighted by 1 / distance^3, so nothing that is hidden gets into columns three and four. In the last "
      "column they are those of the true hidden patches: it looks better than what the model knows."
    )
  return Panel(
    draw_grid(list(columns.values()), list(columns)),
    f"{len(subject.images)} images, one a row: {', '.join(columns)}.",
    caption,
  )


def ratios(subject: Subject) -> Panel:
  """Reconstructions with more and more patches hidden."""
  columns, titles, rows = [subject.pixels.repeat(2, 0)], ["original"], []
  for ratio in RATIOS:
    if not (visible := _visible(subject, ratio)):
      continue
    drawn = _reconstruct(subject, ratio)
    columns.append(interleave([drawn["masked"], drawn["pasted_blind"]]))
    titles.append(f"{ratio:.0%}: {visible} of {subject.tokens}")
    error = (
      np.square(drawn["pasted_blind"] - drawn["original"]).mean()
      * subject.tokens
      / (subject.tokens - visible)
    )
    rows.append([f"{ratio:.0%}", f"{visible} of {subject.tokens}", f"{255 * error**0.5:.1f}"])
  caption = (
    "Above what the encoder sees, below the visible patches with the decoder's output in hidden places; the share that is "
    "hidden, and how many patches are visible. What is visible at one ratio is a part of what is visible at the one "
    f"before. The model was trained at {subject.model.network.method['mask_ratio']:.0%}. Error: root mean square over the "
    "hidden patches, in levels of 255."
  )
  if subject.norm_pix:
    caption += " Brightness and contrast of hidden patches come from visible ones, weighted by 1 / distance^3."
  return Panel(
    draw_grid(columns, titles),
    f"{len(subject.images)} images with {', '.join(titles[1:])} patches visible: above what the "
    "encoder sees, below the reconstruction.",
    caption,
    (["hidden", "visible patches", "error"], rows),
  )


def focused(subject: Subject) -> Panel:
  """The teacher's attention and what it would show the student."""
  _need_teacher(subject)
  if subject.seen.attention is None:
    raise LeftOut(f"{subject.teacher} has no CLS token, and so no attention to focus by")
  columns, method = (
    show_teacher.attention_columns(
      subject.images[..., subject.bands], subject.seen, subject.config
    ),
    subject.config.method,
  )
  share = subject.seen.attention / subject.seen.attention.sum(1, keepdims=True)
  spread = np.exp(-(share * np.log(share + 1e-12)).sum(1)).mean()
  return Panel(
    draw_grid(list(columns.values()), list(columns)),
    f"{len(subject.images)} images, one a row: the image, the teacher's CLS attention, visible patches under focused and "
    "under random masking.",
    f"Teacher: {subject.teacher}. Attention of its last block, mean over the heads, relative to each image's largest; it "
    f"spreads over {spread:.0f} of {subject.tokens} tokens (perplexity). Focused masking draws the visible patches by it "
    f"(temperature {method.attention_temperature:g}, {method.attention_mix:.0%} uniform). "
    + (
      f"The run was trained with {method.masking} masking."
      if "mimic_heads" in subject.model.network.params
      else ""
    ),
  )


def attention(subject: Subject) -> Panel:
  """What each head of the model's last block attends to."""
  weights, lead = np.asarray(subject.model.attention(subject.images)), subject.pixels
  first = weights.shape[-1] - subject.tokens
  if subject.options.query:
    row, column = subject.options.query
    if not (row < subject.grid[0] and column < subject.grid[1]):
      raise UsageError(
        f"--query={row},{column} is none of the {subject.grid[0]} rows and {subject.grid[1]} columns of patches; "
        "they are counted from 0"
      )
    chosen, what = (
      weights[:, :, first + row * subject.grid[1] + column],
      f"the patch in row {row}, column {column} (framed)",
    )
    lead = _framed(lead, row * subject.size, column * subject.size, subject.size)
  elif first:
    chosen, what = weights[:, :, 0], "the CLS token"
  else:
    chosen, what = (
      weights.mean(2),
      "all patches, their mean (there is no CLS token; --query=ROW,COLUMN shows one patch)",
    )
  chosen = chosen[:, :, first:]
  heads = chosen.shape[1]
  names = [f"head {i + 1}" for i in range(heads)] + ["mean"]
  maps = [
    overlay(subject.pixels, x, subject.grid) for x in (*chosen.swapaxes(0, 1), chosen.mean(1))
  ]
  wide = -(-len(maps) // -(-len(maps) // (HEADS_A_ROW + 1)))
  rows = -(-len(maps) // wide)
  maps += [np.ones_like(lead)] * (rows * wide - len(maps))
  share = chosen / chosen.sum(-1, keepdims=True)
  spread = np.exp(-(share * np.log(share + 1e-12)).sum(-1)).mean(0)
  return Panel(
    draw_grid(
      [lead.repeat(rows, 0)] + [interleave(maps[i::wide]) for i in range(wide)],
      ["image"] + [", ".join(names[i::wide]) for i in range(wide)],
    ),
    f"{len(subject.images)} images, each with a map for each of {heads} heads, and their mean.",
    f"Query: {what}. Last block, nothing masked; each map relative to its own largest value. Spread: over how many of "
    f"the {subject.tokens} patches a head's attention is distributed (perplexity), mean over the images.",
    (["head", "spread"], [[i + 1, f"{x:.1f}"] for i, x in enumerate(spread)]),
  )


def pca(subject: Subject) -> Panel:
  """Patch features as colours."""

  colours = lambda x, basis=None: enlarge(principal_colours(x, basis), subject.grid, subject.size)
  normed = lambda x: np.asarray(normalize_features(x, "layer_norm"))
  columns = {
    "image": subject.pixels,
    "model": colours(normed(np.asarray(subject.model.encode(subject.images)["tokens"]))),
  }
  caption = (
    "The first three principal components of the patch features, each token normalised, over all images shown, as red, "
    "green and blue; nothing masked. Equal colours are similar features; which colour it is means nothing, and differs "
    "between the columns."
  )
  if subject.seen is None:
    return Panel(
      draw_grid(list(columns.values()), list(columns)),
      f"{len(subject.images)} images, and their patch features as colours.",
      f"{caption} Not beside a teacher: {subject.teacher}.",
    )
  caption += f" Teacher: {subject.teacher}."
  try:
    predicted, targets = _imitation(subject)
    columns |= {"teacher": colours(targets), "model as teacher": colours(predicted, targets)}
    caption += (
      " The last column is what the model makes of the teacher's features through its mimic head, in the same colours as "
      "these."
    )
  except LeftOut:  # the panel of the cosines says why
    columns["teacher"] = colours(normed(subject.seen.features))
  return Panel(
    draw_grid(list(columns.values()), list(columns)),
    f"{len(subject.images)} images, one a row: {', '.join(columns)}; patch features as colours.",
    caption,
  )


def cosine(subject: Subject) -> Panel:
  """Where the model's answer through the mimic head is like the teacher's features."""
  predicted, targets = _imitation(subject)
  found = cosines(predicted, targets)
  constant = cosines(np.broadcast_to(targets.mean((0, 1)), targets.shape), targets).mean()
  low, high = (float(x) for x in np.percentile(found, [2, 98]))
  maps = enlarge(shades((found - low) / max(high - low, 1e-6)), subject.grid, subject.size)
  return Panel(
    draw_grid(
      [subject.pixels, maps],
      ["image", "cosine"],
      f"dark: {low:.3f} or less; light: {high:.3f} or more",
    ),
    f"{len(subject.images)} images, and maps of how similar model and teacher are, patch by patch.",
    f"Mean cosine {found.mean():.3f} between the teacher's features (as the run's targets: "
    f"{subject.config.teacher.target_norm}) and what the run's mimic head makes of the model's; the mean feature alone, "
    f"without looking, has {constant:.3f}. Light patches are mimicked well, dark ones badly. Nothing is masked here; in "
    f"training the model saw {1 - subject.model.network.method['mask_ratio']:.0%} of each image. Teacher: {subject.teacher}.",
    (
      ["row", "mean cosine", "lowest", "highest"],
      [
        [i + 1, *(f"{x:.3f}" for x in (row.mean(), row.min(), row.max()))]
        for i, row in enumerate(found)
      ],
    ),
  )


def neighbours(subject: Subject) -> Panel:
  """The most similar images of the source."""

  options, source = subject.options, subject.source
  bank = _spaced(len(source), options.bank)
  if len(bank) < 2:
    raise LeftOut(f"the source has {len(source)} image; neighbours need more")
  features = np.concatenate(
    [
      np.asarray(subject.model.encode(batch)["pooled"])
      for batch in _batches(source, bank, subject.images)
    ]
  )
  queries = np.asarray(subject.model.encode(subject.images)["pooled"])
  count = min(options.neighbours, len(bank) - 1)
  similarity, index = knn.nearest(queries, features, count + 1)
  kept = [
    [j for j in range(count + 1) if bank[index[i, j]] != place][:count]
    for i, place in enumerate(subject.places)
  ]
  places = [[bank[index[i, j]] for j in row] for i, row in enumerate(kept)]
  wanted = sorted({place for row in places for place in row})
  shown = dict(zip(wanted, np.concatenate(list(_batches(source, wanted, subject.images)))))
  columns = [subject.pixels] + [
    np.stack([shown[row[j]] for row in places])[..., subject.bands] / np.float32(255)
    for j in range(count)
  ]
  return Panel(
    draw_grid(columns, ["image"] + [f"neighbour {j + 1}" for j in range(count)]),
    f"{len(subject.images)} images, each with the {count} that are most similar to it.",
    f"The {count} nearest of {len(bank)} images of the source by cosine of the mean patch feature, most similar first; "
    "the image itself is left out.",
    (
      ["image"] + [f"neighbour {j + 1}" for j in range(count)],
      [
        [_name(source, place)]
        + [f"{_name(source, p)} ({similarity[i, j]:.3f})" for p, j in zip(places[i], kept[i])]
        for i, place in enumerate(subject.places)
      ],
    ),
  )


PANELS = {
  "reconstruction": ("Reconstruction", reconstruction),
  "ratios": ("More and more hidden", ratios),
  "focused": ("Teacher: attention and focused mask", focused),
  "attention": ("Attention of each head", attention),
  "pca": ("Patch features as colours", pca),
  "cosine": ("Where the model mimics its teacher", cosine),
  "neighbours": ("Nearest neighbours", neighbours),
}


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Cosine similarity along the last axis: twice [..., D] -> [...]."""
  return (a * b).sum(-1) / np.maximum(
    np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12
  )


def _imitation(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
  """What the mimic head makes of whole images, and the teacher's features as its targets: both float32 [C, N, Dt]."""

  student, options = subject.model.network, subject.config.teacher
  head = student.params.get("mimic_heads", {}).get("mimic")
  if head is None:
    raise LeftOut(
      f"{subject.model.report.source} holds no mimic head; a run that was trained with a teacher does"
    )
  _need_teacher(subject)
  if options.tokens == "masked":
    raise LeftOut("the run mimics on masked tokens, through the decoder; a whole image has none")
  width = head["linear"]["kernel"].shape[-1]
  if width != subject.seen.features.shape[-1]:
    raise LeftOut(
      f"the run's mimic head gives {width} channels; {subject.teacher} has {subject.seen.features.shape[-1]}: give the "
      "run's own teacher"
    )

  @jax.jit
  def predict(params, images):
    x, out = student.encoder.apply(
      {"params": params["encoder"]}, mrmae.normalize(images, student.mean, student.std)
    )
    tokens = (x if options.source == "fused" else out["layers"][-1])[
      :, int(student.encoder.cls_token) :
    ]
    return MimicHead(width, options.head).apply({"params": params["mimic_heads"]["mimic"]}, tokens)

  targets = mrmae.normalize_features(subject.seen.features, options.target_norm)
  return np.asarray(
    predict(model_files.params_at(student, subject.grid), subject.images)
  ), np.asarray(targets)


def _reconstruct(subject: Subject, ratio: float) -> dict[str, np.ndarray]:
  try:
    drawn = subject.model.reconstruct(subject.images, ratio, subject.norm_pix, subject.options.seed)
  except WeightsError as error:
    raise LeftOut(str(error)) from None
  return {name: np.asarray(x)[..., subject.bands] for name, x in drawn.items()}


def _visible(subject: Subject, ratio: float) -> int:
  """How many patches `mrmae.sample_mask` leaves."""
  return int(subject.tokens * (1 - ratio))


def _need_teacher(subject: Subject) -> None:
  if subject.seen is None:
    raise LeftOut(subject.teacher)


def _framed(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
  """Images with a red frame, as thick as an eighth of the patch, around one."""
  inner, framed, thick = slice(top, top + size), pixels.copy(), max(1, size // 8)
  block = framed[:, inner, left : left + size]
  edge = np.ones((size, size), bool)
  edge[thick:-thick, thick:-thick] = False
  block[:, edge] = (1, 0, 0)
  return framed


class _Chosen:
  """Some images of a source, in the order of `places`."""

  def __init__(self, source, places: list[int]):
    self._source, self._places = source, places
    self.class_names, self.description, self.fingerprint = (
      source.class_names,
      source.description,
      "",
    )

  def __len__(self):
    return len(self._places)

  def __getitem__(self, index: int):
    return self._source[self._places[index]]


def _batches(source, places: list[int], like: np.ndarray):
  """uint8 [b, H, W, 3] of the images at `places`, of the size of `like`."""

  batches = data.eval_batches(
    _Chosen(source, places),
    data.center_view(like.shape[1:3], 1.0, like.shape[3]),
    batch_size=min(BATCH, len(places)),
  )
  try:
    for batch in batches:
      supervision.beat()
      yield batch["image"][batch["valid"]]
  finally:
    batches.close()


def _spaced(total: int, limit: int) -> list[int]:
  """Places of up to `limit` of `total` images, evenly spaced; 0: all."""
  count = min(limit, total) if limit else total
  return [i * total // count for i in range(count)]


def _name(source, place: int) -> str:
  """Of an image: its folder and file."""
  return "/".join(source[place]["name"].split("/")[-2:])


def _image_size(options, model) -> tuple[int, int]:
  """(height, width) that was asked for, or that of training."""
  if not options.image_size:
    return model.config["image_size"]
  size = options.image_size * (2 if len(options.image_size) == 1 else 1)
  patch = model.network.encoder.patch_size
  if any(side % patch for side in size):
    nearest = ",".join(str(max(1, round(side / patch)) * patch) for side in size)
    raise UsageError(
      f"--image_size={','.join(map(str, options.image_size))} is not a multiple of the model's token size {patch}; nearest: "
      f"{nearest}"
    )
  return size


def _source(options, stored: dict[str, Any]):
  """Where the images come from."""

  if not options.images:
    if "data" not in stored:
      raise UsageError(
        f"--images is missing: {options.model} is not a run, which would know its own images"
      )
    images = ml_collections.ConfigDict(stored["data"])
    return open_split(images, "eval" if images.holdout_every else "train")
  path = Path(options.images).expanduser()
  if path.is_file():
    return FolderSource(str(path.parent.absolute()), [path.name], (), f"{path}: one image")
  spec = f"folder:{path}" if path.is_dir() else options.images
  return open_source(spec, options.split, data_dir=options.data_dir, holdout_every=0)


def _configuration(options, model, size: tuple[int, int], stored: dict[str, Any]):
  """A configuration of pre-training with what is known of the model's, and the teacher that was asked for."""

  student, config = model.network, config_lib.pretrain()
  config.encoder = ml_collections.ConfigDict(model_files.module_fields(student.encoder))
  config.image_size, config.seed = size, options.seed
  config.data.update(mean=student.mean, std=student.std)
  config.method.update(student.method | stored.get("method", {}))
  config.teacher.update(stored.get("teacher", {}))
  config.teacher.dtype = "float32"
  if options.teacher:
    preset = options.teacher in hub.PRESETS
    config.teacher.update(
      name=options.teacher if preset else "", path="" if preset else options.teacher
    )
  return config


def _look(options, config, images: np.ndarray):
  """The teacher's output of the images, and a line about it; None, and why there is none."""
  if not (config.teacher.name or config.teacher.path):
    return None, "there is no teacher; give one with --teacher"
  try:
    description, output = show_teacher.look(config, images)
  except WeightsError as error:
    if options.teacher:
      raise
    return None, f"the run's teacher cannot be loaded ({error}); give it with --teacher"
  return output, description


def run(options) -> str:
  """Carries out `mrmae visualize`.

  Raises:
    UsageError, WeightsError, DataError: options, a model, a teacher or images that do not fit; a panel that was asked for by name
      and cannot be drawn.
  """
  if unknown := [name for name in options.panels if name not in PANELS]:
    raise UsageError(f"--panels: {unknown[0]!r} is not one of {', '.join(PANELS)}")

  with supervision.supervised(hang_s=0):
    model = pretrained.load(
      options.model,
      num_heads=options.num_heads,
      decoder_heads=options.decoder_heads,
      mimic_heads=True,
    )
    try:
      stored = checkpoint.read_config(options.model)
    except WorkdirError:  # not a run
      stored = {}
    size, source = _image_size(options, model), _source(options, stored)
    places = _spaced(len(source), options.count)
    images = np.concatenate(
      list(_batches(source, places, np.zeros((1, *size, len(model.network.mean)))))
    )
    config = _configuration(options, model, size, stored)
    print(f"{model.report}\n{source.description}", flush=True)
    wanted = options.panels or list(PANELS)
    seen, teacher = (
      _look(options, config, images)
      if {"focused", "pca", "cosine"}.intersection(wanted)
      else (None, "")
    )
    subject = Subject(model, images, source, places, config, seen, teacher, options)
    drawn, missing = {}, {}
    for name in wanted:
      supervision.beat()
      try:
        drawn[name] = PANELS[name][1](subject)
      except LeftOut as error:
        if options.panels:
          raise UsageError(f"--panels={name}: {error}") from None
        missing[name] = str(error)
        print(f"left out: {name}: {error}", flush=True)
  return _write(subject, drawn, missing)


def _write(subject: Subject, drawn: dict[str, Panel], missing: dict[str, str]) -> str:
  """The files; returns what to say of them."""

  out, report, (height, width) = (
    Path(subject.options.out).expanduser(),
    subject.model.report,
    subject.images.shape[1:3],
  )
  for name, panel in drawn.items():
    with atomic_write(out / f"{name}.png") as unfinished:
      Image.fromarray(panel.picture).save(unfinished, "PNG", optimize=True)
  found = page.Page(report.source.rstrip("/").rpartition("/")[2], report.model)
  found.section(
    "What is shown",
    f"{subject.source.description}.\n\nEach image is scaled until it covers {height} x {width} pixels, "
    f"and its middle is cut out: {subject.grid[0]} x {subject.grid[1]} patches of {subject.size} pixels. Masks: seed "
    f"{subject.options.seed}. {bands_shown(subject.config)[1]}\n\n"
    + str(report).replace("\n", "\n\n"),
  )
  found.table(
    ["row", "image"],
    [[i + 1, _name(subject.source, place)] for i, place in enumerate(subject.places)],
  )
  for name, panel in drawn.items():
    found.section(PANELS[name][0])
    found.figure(page.Figure(panel.picture, panel.alt, panel.caption))
    if panel.table:
      found.table(*panel.table)
  if missing:
    found.section("Left out")
    found.table(["panel", "why"], [[PANELS[name][0], why] for name, why in missing.items()])
  found.write(out / "index.html")
  return f"wrote {out / 'index.html'} and {', '.join(f'{name}.png' for name in drawn)}"
