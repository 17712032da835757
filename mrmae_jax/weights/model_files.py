"""Trained students in and out: published ConvMAE and MAE weights, transformers' ViTMAE, runs and files of this project.

`read` takes any of them and is strict: every tensor is used exactly once, or stands on the report's list of what is left out
by design. Sizes come from what the source says of itself (config.json, a run's configuration, the notes in files written
here), else from the shapes of its tensors. `write` is the way back; read(write(x)) gives the parameters of x bit for bit.

The names are those of Alpha-VL/ConvMAE for a ConvViT, of facebookresearch/mae (timm) or transformers for a ViT. Fused layers,
which no published model has, stand under "fusion." beside them. Mimic heads stay behind unless asked for: they belong to one
teacher, and only a comparison with that needs them.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.errors import StorageError, WeightsError, WorkdirError
from mrmae_jax.models import ConvViT, Decoder, ViT, make_decoder, make_encoder
from mrmae_jax.models.layers import Mask, sincos_2d
from mrmae_jax.runs import checkpoint
from mrmae_jax.weights import convmae, files, mae, positions
from mrmae_jax.weights.table import (
  MAX_SIZE,
  Entry,
  check_fields,
  convert,
  dense,
  export,
  leaves,
  norm,
  same,
)

FORMATS = ("convmae", "timm", "hf")
NOTES = "mrmae_jax"  # key of a file's metadata under which `write` notes what tensors do not tell
SAME_TABLE = (
  1e-5  # largest difference at which a stored position table is taken for the sine-cosine one
)


class Report(NamedTuple):
  """What became of a source's tensors; str() gives it as text, one line per kind."""

  source: str
  model: str
  loaded: tuple[str, ...]
  new: tuple[str, ...]  # in the model, not in the source, by design
  dropped: tuple[str, ...]  # in the source, not in the model, by design

  def __str__(self) -> str:
    kinds = (
      ("loaded", self.loaded),
      ("new by design", self.new),
      ("dropped by design", self.dropped),
    )
    return "\n".join(
      [f"{self.source}: {self.model}"]
      + [f"  {kind}: {'; '.join(what)}" for kind, what in kinds if what]
    )


class Student(NamedTuple):
  """A trained student.

  Attributes:
    encoder: its module.
    decoder: its module; None if the source has none, or it was not asked for.
    params: {"encoder", "decoder" where there is one, "classifier" where it was fine-tuned, "mimic_heads" if asked for},
      float32 numpy arrays. A classifier is {"head"} on the normed first token, or {"fc_norm", "head"} on the mean token of the
      last block.
    grid: (rows, columns) of its position tables.
    mean, std: of its input, a number for each of its channels.
    method: {"mask_ratio", "norm_pix"} of its pre-training; MAE's where the source does not tell.
    has_norm: False where fine-tuning has put fc_norm in the place of the last norm; that of `params` is then a fresh one.
    report: what was loaded, and what was not.
    classes: names of the classifier's classes, in the order of the logits; () where the source does not tell.
  """

  encoder: ConvViT | ViT
  decoder: Decoder | None
  params: dict[str, Any]
  grid: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: dict[str, Any]
  has_norm: bool
  report: Report
  classes: tuple[str, ...] = ()


def read(
  path: str | Path,
  *,
  num_heads: int = 0,
  decoder_heads: int = 0,
  grid: tuple[int, int] | None = None,
  decoder: bool = True,
  mimic_heads: bool = False,
  learned_positions: bool = False,
  dtype: str = "float32",
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
) -> Student:
  """Reads a trained student.

  Args:
    path: the workdir of a run; a file of weights in ConvMAE's or MAE's names (.safetensors, .pth); a ViTMAE folder.
    num_heads, decoder_heads: for files that do not tell; 0: 64 channels an encoder head (16 heads at width 1280), 16 decoder
      heads at width 512, as all published models have them.
    grid: (rows, columns) of the position tables, for files that do not tell; None: square.
    decoder: whether the decoder is wanted, where there is one.
    mimic_heads: whether the heads of a run that mimics are wanted: {name of the loss: parameters}.
    learned_positions: keep the encoder's position table as a parameter, e.g. to train it, even if it is the sine-cosine one.
    dtype: of the modules' computation.
    mean, std: of the input, per channel, for files that do not tell; None: ImageNet's, of three channels.

  Raises:
    WeightsError: nothing there, another model, or tensors missing, unknown, misshapen or not finite.
  """
  if "://" in str(path):  # a bucket, which holds runs alone
    return _read_run(path, decoder, mimic_heads, learned_positions, dtype)
  path = Path(os.path.expanduser(path))
  if os.path.isdir(path / "checkpoints"):
    return _read_run(path, decoder, mimic_heads, learned_positions, dtype)
  return _read_files(
    path, num_heads, decoder_heads, grid, decoder, learned_positions, dtype, (mean, std)
  )


def _read_run(
  path: str | Path, with_decoder: bool, with_heads: bool, learned_positions: bool, dtype: str
) -> Student:
  """The newest checkpoint of a run."""
  try:
    config = checkpoint.read_config(path)
    if config["task"] == "probe":
      raise WeightsError(
        f"{path} probes {config['init_from'] or 'random weights'} and holds no encoder; load that instead"
      )
    if config["task"] == "self_distill":
      raise WeightsError(
        f"{path} is a run of mrmae teacher; its teacher is the folder {path}/teacher, or that of "
        "--out, for config.teacher.path and transformers' ViTModel"
      )
    wanted = (
      ("encoder", "fc_norm", "head") + ("decoder",) * with_decoder + ("mimic_heads",) * with_heads
    )
    params, others, step, identity = checkpoint.read_params(path, *wanted)
  except (StorageError, WorkdirError) as error:
    raise WeightsError(str(error)) from None
  classifier = {part: params.pop(part) for part in ("fc_norm", "head") if part in params}
  data, method = config["data"], config.get("method", {})
  encoder = make_encoder(config["encoder"], jnp.dtype(dtype))
  if classifier:  # fine-tuning leaves fusion out
    params["classifier"] = classifier
    encoder = encoder.clone(
      fuse_layers=(), **({"fuse_stages": False} if isinstance(encoder, ConvViT) else {})
    )
  grid = tuple(side // encoder.patch_size for side in config["image_size"])
  if learned_positions and not encoder.learned_positions:
    encoder = encoder.clone(learned_positions=True)
    params["encoder"]["pos_embed"] = constant_positions(encoder, grid, isinstance(encoder, ViT))
  decoder = (
    make_decoder(config["decoder"], encoder, len(data["mean"]), jnp.dtype(dtype))
    if "decoder" in params
    else None
  )
  dropped = tuple(
    "decoder (not asked for)" if part == "decoder" else part.replace("_", " ") for part in others
  )
  report = Report(f"{path} after {step} steps", describe(encoder), _counted(params), (), dropped)
  return Student(
    encoder,
    decoder,
    params,
    grid,
    tuple(data["mean"]),
    tuple(data["std"]),
    {"mask_ratio": method.get("mask_ratio", 0.75), "norm_pix": method.get("norm_pix", True)},
    "fc_norm" not in classifier,
    report,
    tuple(identity.get("classes", ())),
  )


class _Source(NamedTuple):
  """What a file or folder says of its model before any value is read; `encoder` and `decoder` are fields of the modules."""

  names: str
  rename: Callable[[Entry], Entry]
  encoder: dict[str, Any]
  decoder: dict[str, Any]
  grid: tuple[int, int] | None  # None: the position table is square
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  method: dict[str, Any] = {"mask_ratio": 0.75, "norm_pix": True}
  classes: tuple[str, ...] = ()


def _identify(path: Path, tensors: dict[str, files.Tensor]) -> _Source:
  """Family and sizes, from names no other family has, and from config.json, notes or shapes."""
  source, shapes = str(path), {name: tensor.shape for name, tensor in tensors.items()}
  if {"vit.embeddings.cls_token", "embeddings.cls_token"}.intersection(shapes):
    folder = path if path.is_dir() else path.parent
    fields, decoder, grid, method = mae.hf_fields(
      _read_config(folder / "config.json"), str(folder / "config.json")
    )
    statistics = files.image_statistics(folder / "preprocessor_config.json", channels=None)
    prefix = "vit." if "vit.embeddings.cls_token" in shapes else ""
    blocks = next(
      (b for b in mae.DECODER_BLOCKS if any(name.startswith(b) for name in shapes)),
      mae.DECODER_BLOCKS[0],
    )
    return _Source(
      "transformers' names",
      lambda entry: mae.to_hf(entry, prefix, blocks),
      fields,
      decoder,
      grid,
      *statistics,
      method,
    )
  for family, names in ((convmae, "ConvMAE's names"), (mae, "MAE's names")):
    if not shapes.keys() >= set(family.MARKERS):
      continue
    notes = files.metadata(path).get(NOTES)
    if not notes:
      return _Source(
        names,
        lambda entry: entry,
        family.fields(shapes, source),
        family.decoder_fields(shapes, source),
        None,
      )
    try:
      return _Source(names, lambda entry: entry, **json.loads(notes))
    except (ValueError, TypeError, RecursionError):
      raise WeightsError(
        f"{source} is damaged: what it notes of its model cannot be read; write it again"
      ) from None
  raise WeightsError(
    f"{source} is no student (found {', '.join(sorted(shapes)[:3])}); expected ConvMAE or MAE in their "
    "authors' names, a ViTMAE folder or a run's workdir; CLIP, DINO and the like load as teachers"
  )


def _check(found: _Source, num_tensors: int, source: str) -> None:
  """WeightsError if what a source says of itself is no network, or holds a number of the wrong kind."""
  kinds = {"convvit": ConvViT, "vit": ViT}
  try:
    fields = dict(found.encoder)
    check_fields(kinds[fields.pop("name")], fields, source)
    depth = sum(fields.get("depths", (fields.get("depth", 1),)))
    if found.decoder:
      check_fields(Decoder, dict(found.decoder), source)
      depth += found.decoder["depth"]
    if depth > num_tensors:  # shapes of so many blocks alone take minutes
      raise WeightsError(
        f"{source} does not fit the model: {depth} blocks, of which it holds {num_tensors} tensors"
      )
    if (found.mean, found.std) != (None, None):
      files.check_statistics(found.mean, found.std, source, channels=None)
    grid, ratio, norm_pix = (
      found.grid or (1, 1),
      found.method["mask_ratio"],
      found.method["norm_pix"],
    )
    ok = {"dim", "patch_size"} <= fields.keys() or {"embed_dims", "patch_sizes"} <= fields.keys()
    ok &= len(grid) == 2 and all(type(side) is int and 0 < side <= MAX_SIZE for side in grid)
    ok &= type(ratio) in (int, float) and 0 <= ratio <= 1 and type(norm_pix) is bool
    ok &= type(found.classes) in (tuple, list) and all(type(name) is str for name in found.classes)
  except WeightsError:
    raise
  except (ValueError, TypeError, KeyError):
    ok = False
  if not ok:
    raise WeightsError(
      f"{source} is damaged: what it notes of its model cannot be read; write it again"
    )


def _with_heads(
  fields: dict[str, Any], given: int, width: int, usual: int, option: str, source: str
) -> dict[str, Any]:
  """Fields of a module with a number of heads: the given one, else what the source tells, else the usual one (0: none is)."""
  heads = given or fields.get("num_heads") or usual
  if not heads:
    raise WeightsError(
      f"{source} does not tell the number of heads for width {width}, which no published model has; give "
      f"{option}"
    )
  if width % heads or width % 4:  # 4: of the sine-cosine table
    raise WeightsError(
      f"{source}: width {width} does not divide into {heads} heads"
      f"{'; check ' + option if width % heads else ', or not by 4'}"
    )
  return fields | {"num_heads": heads}


def _statistics(
  given, found: _Source, channels: int, source: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and deviation of the input of so many channels: the given ones, else what the source tells, else ImageNet's."""
  usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((), ())
  mean, std = (
    tuple(next(x for x in known if x is not None))
    for known in zip(given, (found.mean, found.std), usual)
  )
  if not len(mean) == len(std) == channels:
    raise WeightsError(
      f"{source} takes images of {channels} channels and tells of mean {mean} and std {std}; give both, a number "
      "for each channel: mrmae_jax.load(path, mean=(...), std=(...))"
    )
  return mean, std


def _read_files(
  path, num_heads, decoder_heads, grid, with_decoder, learned_positions, dtype, statistics
) -> Student:
  """Weights under foreign names. A tensor that is dropped leaves `tensors`; all that are left must be used."""
  source, tensors = str(path), dict(files.open_weights(path))
  found, loaded, new, dropped = _identify(path, tensors), [], [], []
  _check(found, len(tensors), source)
  theirs = lambda name: found.rename(Entry("", (name,), same)).theirs[0]

  def drop(names, what):
    for name in names:
      del tensors[name]
    dropped.append(what)

  width = found.encoder["dim"] if found.encoder["name"] == "vit" else found.encoder["embed_dims"][2]
  usual = 16 if width == 1280 else 0 if width % 64 or width > 1024 else width // 64
  encoder = make_encoder(
    _with_heads(found.encoder, num_heads, width, usual, "num_heads", source), jnp.dtype(dtype)
  )
  decoder, of_decoder = (
    None,
    [name for name in tensors if name.startswith(("decoder", "mask_token"))],
  )
  if theirs("decoder_embed.weight") not in tensors:
    new.append("no decoder (the source is encoder-only and cannot reconstruct)")
    if left := [
      theirs(name) for name in ("mask_token", "decoder_pos_embed") if theirs(name) in tensors
    ]:  # as in ConvMAE v2
      drop(left, f"{', '.join(left)} (of a decoder that is not there)")
  elif not with_decoder:
    drop(of_decoder, "decoder (not asked for)")
  else:
    if "dim" not in (found.decoder or {}):
      raise WeightsError(
        f"{source} is damaged: it holds a decoder, of which it notes nothing; write it again"
      )
    width = found.decoder["dim"]
    fields = _with_heads(
      found.decoder, decoder_heads, width, 16 if width == 512 else 0, "decoder_heads", source
    )
    decoder = Decoder(**fields, dtype=jnp.dtype(dtype))

  grid = _find_grid(tensors, theirs("pos_embed"), encoder, grid or found.grid, source)
  first = theirs(
    "patch_embed1.proj.weight" if isinstance(encoder, ConvViT) else "patch_embed.proj.weight"
  )
  channels = convmae.shape_of(
    {name: tensor.shape for name, tensor in tensors.items()}, first, 4, source
  )[1]
  mean, std = _statistics(statistics, found, channels, source)
  if isinstance(encoder, ConvViT) and encoder.cls_token and _fold_cls_row(tensors, grid):
    loaded.append("CLS's row of the position table (as a part of cls_token)")

  def settle(module, name, cls_token, keep):
    """The module with constant positions if the stored table is that constant, and `keep` does not say otherwise."""
    difference = _difference(tensors, name, module, grid, cls_token, source)
    learned = bool(keep or module.learned_positions or not difference <= SAME_TABLE)
    if learned:
      loaded.append(f"{name} ({grid[0]}x{grid[1]} tokens)")
    else:
      drop([name], f"{name} (the sine-cosine table{f' to {difference:.0e}' if difference else ''})")
    return module.clone(learned_positions=learned)

  encoder = settle(encoder, theirs("pos_embed"), isinstance(encoder, ViT), learned_positions)
  decoder = decoder and settle(decoder, theirs("decoder_pos_embed"), bool(encoder.cls_token), False)

  has_norm, classifier = "norm.weight" in tensors or "fc_norm.weight" not in tensors, ()
  if "head.weight" in tensors:
    classifier = ("fc_norm", "head") if "fc_norm.weight" in tensors else ("head",)
  elif not has_norm:
    drop(
      [name for name in tensors if name.startswith("fc_norm.")],
      "fc_norm (of a classifier that is not there)",
    )
  if isinstance(encoder, ConvViT) and not encoder.fuse_stages:
    new.append("no fusion of the convolutional stages (the source does not hold its layers)")
  num_classes = tensors["head.weight"].shape[0] if classifier else 0
  if found.classes and len(found.classes) != num_classes:
    raise WeightsError(
      f"{source} is damaged: it names {len(found.classes)} classes and holds {num_classes}; write it again"
    )
  expected = param_shapes(encoder, decoder, grid, classifier, num_classes, channels)
  fresh = {} if has_norm else {"norm": expected["encoder"].pop("norm")}
  table = [found.rename(entry) for entry in name_table(encoder, decoder, classifier, has_norm)]
  params = convert(tensors, table, expected, source=source)
  if fresh:
    params["encoder"]["norm"] = {
      "scale": np.ones(encoder.dim, np.float32),
      "bias": np.zeros(encoder.dim, np.float32),
    }
    new.append("norm (fine-tuning replaces the last norm by fc_norm)")
  report = Report(
    source,
    f"{describe(encoder)}, {found.names}",
    (*_counted(params), *loaded),
    tuple(new),
    tuple(dropped),
  )
  return Student(
    encoder, decoder, params, grid, mean, std, found.method, has_norm, report, tuple(found.classes)
  )


def _find_grid(tensors, name: str, encoder, given, source: str) -> tuple[int, int]:
  """(rows, columns) of the encoder's position table: the given ones if they fit, else those of a square."""
  shape = convmae.shape_of({key: tensor.shape for key, tensor in tensors.items()}, name, 3, source)
  # ConvMAE v2 has a CLS token; whether its published tables have a row for that is unknown.
  for cls_rows in (1,) if isinstance(encoder, ViT) else (0, 1) if encoder.cls_token else (0,):
    rows = shape[1] - cls_rows
    grid = tuple(given) if given else (math.isqrt(rows),) * 2
    if math.prod(grid) == rows:
      return grid
  wanted = f"grid of {given[0]}x{given[1]}" if given else "square"
  raise WeightsError(
    f"{source}: {name} has {shape[1]} rows, which is no {wanted}; give grid=(rows, columns) of tokens in "
    "the images that it was trained with"
  )


def _fold_cls_row(tensors, grid: tuple[int, int]) -> bool:
  """Our ConvViT has no position for CLS; a table with a row for it says the same with the row added to cls_token."""
  table = np.asarray(tensors["pos_embed"], np.float32)
  cls, tensors["pos_embed"] = np.split(table, [table.shape[1] - math.prod(grid)], axis=1)
  if cls.any():
    tensors["cls_token"] = np.asarray(tensors["cls_token"], np.float32) + cls
  return bool(cls.any())


def _difference(
  tensors, name: str, module, grid: tuple[int, int], cls_token: bool, source: str
) -> float:
  """Largest difference of a stored position table from the sine-cosine one; not a number if it holds such."""
  expected = (1, cls_token + math.prod(grid), module.dim)
  if name not in tensors or tensors[name].shape != expected:
    found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
    raise WeightsError(f"{source} does not fit the model: {name} {found}, expected {expected}")
  return float(
    np.abs(
      np.asarray(tensors[name], np.float32) - constant_positions(module, grid, cls_token)
    ).max()
  )


def param_shapes(
  encoder,
  decoder,
  grid: tuple[int, int],
  classifier: tuple[str, ...] = (),
  classes: int = 0,
  channels: int = 3,
) -> dict[str, Any]:
  """The shapes of all parameters of a student; `decoder` None for none, `classifier` names its parts."""
  tokens, key = math.prod(grid), jax.random.key(0)
  pixels = jax.ShapeDtypeStruct(
    (1, *(side * encoder.patch_size for side in grid), channels), jnp.float32
  )
  shapes = {"encoder": jax.eval_shape(encoder.init, key, pixels)["params"]}
  if decoder is not None:
    seen = jax.ShapeDtypeStruct((1, 1 + encoder.cls_token, encoder.dim), jnp.float32)
    mask = Mask(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, tokens), jnp.int32))
    shapes["decoder"] = jax.eval_shape(lambda x: decoder.init(key, x, mask, grid), seen)["params"]
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  parts = {
    "fc_norm": {"scale": leaf(encoder.dim), "bias": leaf(encoder.dim)},
    "head": {"kernel": leaf(encoder.dim, classes), "bias": leaf(classes)},
  }
  return shapes | ({"classifier": {name: parts[name] for name in classifier}} if classifier else {})


def name_table(encoder, decoder, classifier: tuple[str, ...], has_norm: bool) -> list[Entry]:
  """Every parameter of a student in ConvMAE's or MAE's names."""
  family = convmae if isinstance(encoder, ConvViT) else mae
  parts = {
    "encoder": [e for e in family.encoder(encoder) if has_norm or not e.ours.startswith("norm/")],
    "decoder": family.decoder(decoder) if decoder is not None else [],
    "classifier": [
      e for name in classifier for e in {"fc_norm": norm, "head": dense}[name](name, name)
    ],
  }
  return [e._replace(ours=f"{part}/{e.ours}") for part, entries in parts.items() for e in entries]


def constant_positions(module, grid: tuple[int, int], cls_token: bool) -> np.ndarray:
  """The sine-cosine table float32 [1, T, D] of an encoder or decoder."""
  return sincos_2d(module.dim, grid, cls_token)[None]


def params_at(student: Student, grid: tuple[int, int]) -> dict[str, Any]:
  """`student.params` for images of another grid: learned position tables are interpolated bicubically, as in MAE and DeiT."""

  def move(part):
    if grid == student.grid or "pos_embed" not in part:
      return part
    return part | {
      "pos_embed": positions.resize(part["pos_embed"], student.grid, grid, positions.BICUBIC)
    }

  return {name: move(part) for name, part in student.params.items()}


def describe(encoder) -> str:
  """One line about an encoder for people."""
  if isinstance(encoder, ViT):
    return f"ViT/{encoder.patch_size}, width {encoder.dim}, depth {encoder.depth}, {encoder.num_heads} heads"
  by = lambda values: "/".join(f"{value:g}" for value in values)
  return (
    f"ConvViT/{encoder.patch_size}, widths {by(encoder.embed_dims)}, depths {by(encoder.depths)}, "
    f"{encoder.num_heads} heads, MLP ratios {by(encoder.mlp_ratios)}{', CLS token' if encoder.cls_token else ''}"
  )


def module_fields(module) -> dict[str, Any]:
  """The fields of an encoder or decoder as JSON values, as `make_encoder` and Decoder take them; without the dtype."""
  own = {
    f.name: getattr(module, f.name)
    for f in dataclasses.fields(module)
    if f.name not in ("parent", "name", "dtype")
  }
  return (
    own
    if isinstance(module, Decoder)
    else {"name": "vit" if isinstance(module, ViT) else "convvit"} | own
  )


def _counted(params) -> tuple[str, ...]:
  return tuple(
    f"{name} ({len(part)} tensors, {sum(x.size for x in part.values()):,} parameters)"
    for name, part in ((name, leaves(part)) for name, part in params.items())
  )


def _read_config(path: Path) -> dict[str, Any]:
  try:
    return files.read_json(path)
  except WeightsError as error:
    raise WeightsError(
      f"{error}; transformers' names come with a config.json, which tells heads and eps: fetch it from the same "
      "place"
    ) from None


def write(student: Student, out: str | Path, form: str) -> None:
  """Writes a student so that others, and `read`, can read it; files appear whole or not at all.

  Args:
    student: as `read` gives it. Without its decoder and classifier (`encoder_only`), those are not written.
    out: a .safetensors file, or with "hf" a folder, which receives config.json, preprocessor_config.json, model.safetensors.
    form: "convmae": a ConvViT in ConvMAE's names; "timm": a ViT in those of timm and MAE; "hf": a ViT as transformers' ViTMAE.

  Raises:
    WeightsError: a form that this student cannot take.
  """
  out, vit = Path(out).expanduser(), isinstance(student.encoder, ViT)
  if form not in FORMATS:
    raise WeightsError(f"format {form!r} is not one of {', '.join(FORMATS)}")
  if vit == (form == "convmae"):
    raise WeightsError(
      f"a {describe(student.encoder)} cannot be written as {form!r}; use {'timm or hf' if vit else 'convmae'}"
    )
  if form != "hf" and (out.is_dir() or out.suffix != ".safetensors"):
    raise WeightsError(f"{out}: format {form} is one file; name it *.safetensors")
  if form == "hf" and out.is_file():
    raise WeightsError(f"{out} is a file; format hf is a folder")
  classifier, params = tuple(student.params.get("classifier", ())), student.params
  if form == "hf" and (classifier or student.encoder.fuse_layers or not student.has_norm):
    raise WeightsError(
      "ViTMAE has no place for a classifier, fused layers, or an encoder that fine-tuning has left without "
      "its last norm; use timm, or for a classifier the encoder alone"
    )
  entries = name_table(student.encoder, student.decoder, classifier, student.has_norm)
  rename = lambda entry: (
    mae.to_hf(entry, "" if student.decoder is None else "vit.") if form == "hf" else entry
  )
  if not student.has_norm:
    params = params | {
      "encoder": {name: x for name, x in params["encoder"].items() if name != "norm"}
    }
  tensors = export(params, [rename(entry) for entry in entries])
  for module, name, cls_token in (
    (student.encoder, "pos_embed", vit),
    (student.decoder, "decoder_pos_embed", bool(student.encoder.cls_token)),
  ):
    if (
      module is not None and not module.learned_positions
    ):  # a constant of ours, a tensor of theirs
      tensors[rename(Entry("", (name,), same)).theirs[0]] = constant_positions(
        module, student.grid, cls_token
      )
  if form == "hf":
    size = [side * student.encoder.patch_size for side in student.grid]
    preprocessor = {
      "image_processor_type": "ViTImageProcessor",
      "do_resize": True,
      "resample": 3,
      "size": {"height": size[0], "width": size[1]},
      "do_rescale": True,
      "rescale_factor": 1 / 255,
      "do_normalize": True,
      "image_mean": student.mean,
      "image_std": student.std,
    }
    config = mae.hf_config(
      student.encoder, student.decoder, student.grid, len(student.mean), student.method
    )
    for name, content in (("config", config), ("preprocessor_config", preprocessor)):
      with files.whole(out / f"{name}.json") as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
    files.write_safetensors(out / "model.safetensors", tensors)
  else:
    decoder = student.decoder and module_fields(student.decoder)
    notes = {
      "encoder": module_fields(student.encoder),
      "decoder": decoder,
      "grid": student.grid,
      "mean": student.mean,
      "std": student.std,
      "method": student.method,
      "classes": student.classes,
    }
    files.write_safetensors(out, tensors, {NOTES: json.dumps(notes)})


def untrained(student: Student, seed: int = 0) -> Student:
  """The encoder of a student with fresh weights, for comparison."""
  pixels = jnp.zeros(
    (1, *(side * student.encoder.patch_size for side in student.grid), len(student.mean))
  )
  fresh = jax.jit(student.encoder.init)(jax.random.key(seed), pixels)["params"]
  return student._replace(decoder=None, params={"encoder": fresh}, classes=())


def encoder_only(student: Student) -> Student:
  """A student without decoder and classifier."""
  return student._replace(decoder=None, params={"encoder": student.params["encoder"]}, classes=())
