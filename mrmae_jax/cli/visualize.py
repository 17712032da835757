"""Draws what a model does with images: a PNG per panel, and one HTML page with all of them."""

from pathlib import Path

import jax
import numpy as np

from mrmae_jax import mrmae
from mrmae_jax.cli import show_teacher
from mrmae_jax.cli.images import skip_options
from mrmae_jax.cli.subject import (
  Subject,
  image_name,
  open_subject,
  read_all,
  read_images,
  spaced_indices,
)
from mrmae_jax.errors import UsageError, WeightsError
from mrmae_jax.evals import knn
from mrmae_jax.models.decoder import MimicHead
from mrmae_jax.runs import supervision
from mrmae_jax.runs.paths import atomic_write, require_writable
from mrmae_jax.viz import page, panels
from mrmae_jax.viz.grid import bands_shown, enlarge, perplexity, principal_colors
from mrmae_jax.viz.panels import Panel, draw_columns
from mrmae_jax.weights import loaded_model

RATIOS = (0.5, 0.75, 0.85, 0.9, 0.95)


class MissingPanelError(Exception):
  """A panel that cannot be drawn; the text says why."""


def reconstruction(subject: Subject) -> Panel:
  """Shows what the encoder sees, and what the decoder makes of it."""
  drawn = _reconstruct(subject, subject.mask_ratio)
  num_visible = subject.num_visible(subject.mask_ratio)
  return panels.reconstruction(drawn, num_visible, subject.num_tokens, subject.norm_pix)


def ratios(subject: Subject) -> Panel:
  """Shows reconstructions with more and more patches hidden."""
  num_visible = {ratio: subject.num_visible(ratio) for ratio in RATIOS}
  num_visible = {ratio: count for ratio, count in num_visible.items() if count}
  drawn_at = {ratio: _reconstruct(subject, ratio) for ratio in num_visible}
  return panels.ratios(
    drawn_at, num_visible, subject.num_tokens, subject.mask_ratio, subject.norm_pix
  )


def _reconstruct(subject: Subject, ratio: float) -> dict[str, np.ndarray]:
  try:
    drawn = subject.model.reconstruct(subject.images, ratio, subject.norm_pix, subject.options.seed)
  except WeightsError as error:
    raise MissingPanelError(str(error)) from None
  return {name: np.asarray(x)[..., subject.bands] for name, x in drawn.items()}


def focused(subject: Subject) -> Panel:
  """Shows the teacher's attention, and the patches that it would show the student."""
  _require_teacher(subject)
  heat, method = subject.teacher_out.attention, subject.config.method
  if heat is None:
    raise MissingPanelError(f"{subject.teacher} has no CLS token, and so no attention to focus by")
  columns = show_teacher.attention_columns(
    subject.images[..., subject.bands], subject.teacher_out, subject.config
  )
  caption = (
    f"Teacher: {subject.teacher}. Attention of its last block, mean over the heads, relative to "
    f"each image's largest; it spreads over {perplexity(heat).mean():.0f} of {subject.num_tokens} "
    "tokens (perplexity). Focused masking draws the visible patches by it (temperature "
    f"{method.attention_temperature:g}, {method.attention_mix:.0%} uniform)."
  )
  if "mimic_heads" in subject.model.network.params:
    caption += f" The run was trained with {method.masking} masking."
  alt = (
    f"{len(subject.images)} images, one a row: the image, the teacher's CLS attention, visible "
    "patches under focused and under random masking."
  )
  return Panel(draw_columns(columns), alt, caption)


def attention(subject: Subject) -> Panel:
  """Shows what each head of the model's last block attends to."""
  weights = np.asarray(subject.model.attention(subject.images))
  num_prefix = weights.shape[-1] - subject.num_tokens  # CLS
  rows, columns = subject.grid
  patch = None
  if subject.options.query:
    patch = row, column = tuple(subject.options.query)
    if not (row < rows and column < columns):
      raise UsageError(
        f"--query={row},{column} is none of the {rows} rows and {columns} columns of patches; "
        "they are counted from 0"
      )
    query = f"the patch in row {row}, column {column} (framed)"
    weights = weights[:, :, num_prefix + row * columns + column]
  elif num_prefix:
    query = "the CLS token"
    weights = weights[:, :, 0]
  else:
    query = "all patches, their mean (there is no CLS token; --query=ROW,COLUMN shows one patch)"
    weights = weights.mean(2)
  return panels.attention(subject.pixels, weights[:, :, num_prefix:], subject.grid, query, patch)


def pca(subject: Subject) -> Panel:
  """Shows patch features as colors, beside the teacher's."""
  normalize = lambda x: np.asarray(mrmae.normalize_features(x, "layer_norm"))
  draw = lambda x, basis=None: enlarge(principal_colors(x, basis), subject.grid, subject.token_size)
  features = np.asarray(subject.model.encode(subject.images)["tokens"])
  columns = {"image": subject.pixels, "model": draw(normalize(features))}
  caption = (
    "The first three principal components of the patch features, each token normalized, over all "
    "images shown, as red, green and blue; nothing masked. Equal colors are similar features. "
    "Which color it is means nothing, and differs between the columns."
  )
  if subject.teacher_out is None:
    caption += f" Not beside a teacher: {subject.teacher}."
  else:
    caption += f" Teacher: {subject.teacher}."
    try:
      predicted, targets = _mimic(subject)
      columns |= {"teacher": draw(targets), "model as teacher": draw(predicted, targets)}
      caption += (
        " The last column shows the teacher's features as the model predicts them through its "
        "mimic head, in the same colors."
      )
    except MissingPanelError:  # the cosine panel gives the reason
      columns["teacher"] = draw(normalize(subject.teacher_out.features))
  alt = f"{len(subject.images)} images, one a row: {', '.join(columns)}; patch features as colors."
  return Panel(draw_columns(columns), alt, caption)


def cosine(subject: Subject) -> Panel:
  """Shows where a run's features, through its mimic head, are like the teacher's."""
  predicted, targets = _mimic(subject)
  cosines = cosine_similarity(predicted, targets)
  mean_feature = np.broadcast_to(targets.mean((0, 1)), targets.shape)
  constant = cosine_similarity(mean_feature, targets).mean()
  caption = (
    f"Mean cosine {cosines.mean():.3f} between the teacher's features (as the run's targets: "
    f"{subject.config.teacher.target_norm}) and what the run's mimic head makes of the model's. "
    f"The mean feature alone, without looking, has {constant:.3f}. Light patches are mimicked "
    "well, dark ones badly. Nothing is masked here; in training the model saw "
    f"{1 - subject.mask_ratio:.0%} of each image. Teacher: {subject.teacher}."
  )
  return panels.cosine(subject.pixels, cosines, subject.grid, caption)


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the cosine along the last axis: twice [..., D] -> [...]."""
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / np.maximum(norms, 1e-12)


def _mimic(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mimic head's features of whole images, and the teacher's as its targets.

  Both are float32 [B, N, Dt].
  """
  network, options = subject.model.network, subject.config.teacher
  head = network.params.get("mimic_heads", {}).get("mimic")
  if head is None:
    raise MissingPanelError(
      f"{subject.model.report.source} holds no mimic head; a run that was trained with a teacher "
      "does"
    )
  _require_teacher(subject)
  if options.tokens == "masked":
    raise MissingPanelError(
      "the run mimics on masked tokens, through the decoder; a whole image has none"
    )
  width, teacher_width = head["linear"]["kernel"].shape[-1], subject.teacher_out.features.shape[-1]
  if width != teacher_width:
    raise MissingPanelError(
      f"the run's mimic head gives {width} channels; {subject.teacher} has {teacher_width}: give "
      "the run's own teacher"
    )

  @jax.jit
  def predict(params, images):
    pixels = mrmae.normalize(images, network.mean, network.std)
    x, out = network.encoder.apply({"params": params["encoder"]}, pixels)
    tokens = x if options.source == "fused" else out["layers"][-1]
    tokens = tokens[:, int(network.encoder.cls_token) :]
    return MimicHead(width, options.head).apply({"params": params["mimic_heads"]["mimic"]}, tokens)

  predicted = predict(loaded_model.params_at(network, subject.grid), subject.images)
  targets = mrmae.normalize_features(subject.teacher_out.features, options.target_norm)
  return np.asarray(predicted), np.asarray(targets)


def _require_teacher(subject: Subject) -> None:
  if subject.teacher_out is None:
    raise MissingPanelError(subject.teacher)


def neighbors(subject: Subject) -> Panel:
  """Shows the most similar images of the source, by the mean of the patch features."""
  source = subject.source
  bank = spaced_indices(len(source), subject.options.bank)
  if len(bank) < 2:
    raise MissingPanelError(f"the source has {len(source)} image; neighbors need more")
  encode = lambda images: np.asarray(subject.model.encode(images)["pooled"])
  loader = skip_options(subject.options)
  batches = read_images(source, bank, subject.images.shape, loader, subject.config.data.exif)
  parts, features = zip(*((indices, encode(images)) for indices, images in batches))
  bank, features = sum(parts, []), np.concatenate(features)
  count = min(subject.options.neighbors, len(bank) - 1)
  similarity, ranks = knn.nearest(encode(subject.images), features, count + 1)
  nearest = []  # for each image [(index in the source, similarity)], without the image itself
  for i, index in enumerate(subject.indices):
    pairs = [(bank[rank], value) for rank, value in zip(ranks[i], similarity[i])]
    nearest.append([pair for pair in pairs if pair[0] != index][:count])
  shown = sorted({index for pairs in nearest for index, _ in pairs})
  shown, images = read_all(source, shown, subject.images.shape, loader)
  images = dict(zip(shown, images[..., subject.bands] / np.float32(255)))
  header = ["image", *(f"neighbor {j + 1}" for j in range(count))]
  columns = [subject.pixels]
  columns += [np.stack([images[pairs[j][0]] for pairs in nearest]) for j in range(count)]
  rows = []
  for index, pairs in zip(subject.indices, nearest):
    names = [f"{image_name(source, other)} ({value:.3f})" for other, value in pairs]
    rows.append([image_name(source, index), *names])
  return Panel(
    draw_columns(dict(zip(header, columns))),
    f"{len(subject.images)} images, each with the {count} that are most similar to it.",
    f"The {count} nearest of {len(bank)} images of the source by cosine of the mean patch feature, "
    "most similar first, without the image itself.",
    (header, rows),
  )


PANELS = {
  "reconstruction": ("Reconstruction", reconstruction),
  "ratios": ("More and more hidden", ratios),
  "focused": ("Teacher: attention and focused mask", focused),
  "attention": ("Attention of each head", attention),
  "pca": ("Patch features as colors", pca),
  "cosine": ("Where the model mimics its teacher", cosine),
  "neighbors": ("Nearest neighbors", neighbors),
}
NEED_TEACHER = {"focused", "pca", "cosine"}


def run(options) -> str:
  """Carries out `mrmae visualize`.

  Raises:
    UsageError: options that do not fit, or a panel of --panels that cannot be drawn.
    WeightsError: a model or a teacher that cannot be used.
    DataError: images that cannot be read.
  """
  if unknown := [name for name in options.panels if name not in PANELS]:
    raise UsageError(f"--panels: {unknown[0]!r} is not one of {', '.join(PANELS)}")
  require_writable(options.out)
  with supervision.supervised(hang_s=0):
    names = options.panels or list(PANELS)
    subject = open_subject(options, needs_teacher=bool(NEED_TEACHER.intersection(names)))
    drawn, missing = {}, {}
    for name in names:
      supervision.beat()
      try:
        drawn[name] = PANELS[name][1](subject)
      except MissingPanelError as error:
        if options.panels:
          raise UsageError(f"--panels={name}: {error}") from None
        missing[name] = str(error)
        print(f"left out: {name}: {error}", flush=True)
  return _write_page(subject, drawn, missing)


def _write_page(subject: Subject, drawn: dict[str, Panel], missing: dict[str, str]) -> str:
  """Writes the PNGs and the page; returns a line for people."""
  out = Path(subject.options.out).expanduser()
  for name, panel in drawn.items():
    with atomic_write(out / f"{name}.png") as tmp:
      tmp.write_bytes(page.encode_png(panel.picture))
  report = subject.model.report
  document = page.Page(report.source.rstrip("/").rpartition("/")[2], report.model)
  height, width = subject.images.shape[1:3]
  rows, columns = subject.grid
  document.section(
    "What is shown",
    f"{subject.source.description}.\n\nEach image is scaled until it covers {height} x {width} "
    f"pixels, and its middle is cut out: {rows} x {columns} patches of {subject.token_size} pixels."
    f" Masks: seed {subject.options.seed}. {bands_shown(subject.config)[1]}\n\n"
    + str(report).replace("\n", "\n\n"),
  )
  names = [image_name(subject.source, index) for index in subject.indices]
  document.table(["row", "image"], [[i, name] for i, name in enumerate(names, 1)])
  for name, panel in drawn.items():
    document.section(PANELS[name][0])
    document.figure(page.Figure(panel.picture, panel.alt, panel.caption))
    if panel.table:
      document.table(*panel.table)
  if missing:
    document.section("Left out")
    document.table(
      ["panel", "why"], [[PANELS[name][0], reason] for name, reason in missing.items()]
    )
  document.write(out / "index.html")
  return f"wrote {out / 'index.html'} and {', '.join(f'{name}.png' for name in drawn)}"
