"""Determines what a file or folder of weights states about its model, before any value is read."""

import json
from pathlib import Path
from typing import Any, Callable, NamedTuple

from mrmae_jax.constants import IMAGENET_MEAN, IMAGENET_STD
from mrmae_jax.errors import WeightsError
from mrmae_jax.models import ENCODERS, ConvViT, Decoder, ViT, make_encoder
from mrmae_jax.weights import convmae, detectron2, files, mae
from mrmae_jax.weights.table import MAX_SIZE, Entry, check_fields, decoder_fields, same

METHOD = {"mask_ratio": 0.75, "norm_pix": True}  # MAE's, where a source does not tell
METADATA_KEY = "mrmae_jax"  # of a safetensors file's metadata, as `write_model` writes it


class Hints(NamedTuple):
  """What a user states about a file that does not tell by itself.

  Attributes:
    num_heads: heads of the encoder. 0: 64 channels a head, or 16 heads at width 1280, as in all
      published models.
    decoder_heads: heads of the decoder. 0: 16 heads at width 512, as in all published models.
    grid: (rows, columns) of the position tables; None: square.
    mean, std: of the input, one number per channel; None: ImageNet's, for three channels.
    weights: which of several networks in a file, see `networks.open_network`.
    levels: blocks of a ViT that give UperNet's levels; (): the usual ones.
  """

  num_heads: int = 0
  decoder_heads: int = 0
  grid: tuple[int, int] | None = None
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  weights: str = ""
  levels: tuple[int, ...] = ()


class Description(NamedTuple):
  """What a file or folder states about its model, before any value is read.

  Attributes:
    naming: whose names its tensors have, for people.
    rename: from an entry in ConvMAE's or MAE's names to these names.
    encoder, decoder: fields of the modules; "name" of the encoder is a key of `models.ENCODERS`.
    grid: (rows, columns) of the position tables; None: square.
    mean, std, method, classes: see `LoadedModel`.
    segmenter: "levels" and "pool_scales" of `models.upernet.Segmenter`, which shapes do not tell;
      {} for other models and files.
    detector: see `detectron2.notes`; {} for other models and files.
    has_norm: the encoder has its last norm, where no classifier tells.
  """

  naming: str
  rename: Callable[[Entry], Entry]
  encoder: dict[str, Any]
  decoder: dict[str, Any]
  grid: tuple[int, int] | None
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  method: dict[str, Any] = METHOD
  classes: tuple[str, ...] = ()
  segmenter: dict[str, Any] = {}
  detector: dict[str, Any] = {}
  has_norm: bool = True

  def their_name(self, name: str) -> str:
    """Returns this source's name of the tensor that ConvMAE or MAE calls `name`."""
    return self.rename(Entry("", (name,), same)).theirs[0]


def describe_source(path: Path, tensors: dict[str, files.Tensor]) -> Description:
  """Determines family and sizes of a source.

  Names that no other family has tell the family; config.json, metadata or shapes tell the sizes.
  """
  source, shapes = str(path), {name: tensor.shape for name, tensor in tensors.items()}
  if {"vit.embeddings.cls_token", "embeddings.cls_token"}.intersection(shapes):
    return _describe_hf(path if path.is_dir() else path.parent, shapes)
  for family, naming in ((convmae, "ConvMAE's names"), (mae, "MAE's names")):
    if not shapes.keys() >= set(family.MARKERS):
      continue
    if description := read_notes(path, naming):
      return description
    encoder = family.encoder_fields(shapes, source)
    return Description(naming, same_names, encoder, decoder_fields(shapes, source), None)
  raise WeightsError(
    f"{source} is not a model of this kind (found {', '.join(sorted(shapes)[:3])}); expected "
    "ConvMAE or MAE in their authors' names, a ViTMAE folder, BEiT, a tower of DINO, DINOv2 or "
    "CLIP, or a run's workdir; SigLIP, DINOv3 and timm's CLIP load as teachers"
  )


def read_notes(path: Path, naming: str) -> Description | None:
  """Returns what a file that was written here notes about its model; None for other files.

  Raises:
    WeightsError: the notes are damaged. `check_description` looks at their values.
  """
  notes = files.read_metadata(path).get(METADATA_KEY)
  if not notes:
    return None
  try:
    return Description(naming, same_names, **json.loads(notes))
  except (ValueError, TypeError, RecursionError):
    raise _bad_metadata(str(path)) from None


def same_names(entry: Entry) -> Entry:
  """Returns an entry as it is: a `rename` for files in our tables' own names."""
  return entry


def _describe_hf(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Description:
  """Describes a ViTMAE folder by its config.json."""
  path = folder / "config.json"
  try:
    config = files.read_json(path)
  except WeightsError as error:
    raise WeightsError(
      f"{error}; transformers' names come with a config.json, which tells heads and eps: fetch it "
      "from the same place"
    ) from None
  encoder, decoder, grid, method = mae.hf_fields(config, str(path))
  mean, std = files.image_statistics(folder / "preprocessor_config.json", channels=None)
  prefix = "vit." if "vit.embeddings.cls_token" in shapes else ""
  blocks = next(
    (b for b in mae.DECODER_BLOCKS if any(name.startswith(b) for name in shapes)),
    mae.DECODER_BLOCKS[0],
  )
  rename = lambda entry: mae.to_hf(entry, prefix, blocks)
  return Description("transformers' names", rename, encoder, decoder, grid, mean, std, method)


def _bad_metadata(source: str) -> WeightsError:
  return WeightsError(
    f"{source} is damaged: its notes about the model cannot be read; write it again"
  )


def check_description(description: Description, num_tensors: int, source: str) -> None:
  """WeightsError if a description does not fit a network, or holds a value of the wrong kind."""
  try:
    fields = dict(description.encoder)
    check_fields(ENCODERS[fields.pop("name")], fields, source)
    depth = sum(fields.get("depths", (fields.get("depth", 1),)))
    if description.decoder:
      check_fields(Decoder, dict(description.decoder), source)
      depth += description.decoder["depth"]
    if depth > num_tensors:  # the shapes of that many blocks alone take minutes
      raise WeightsError(
        f"{source} does not fit the model: {depth} blocks, of which it holds {num_tensors} tensors"
      )
    if (description.mean, description.std) != (None, None):
      files.check_statistics(description.mean, description.std, source, channels=None)
    grid = description.grid or (1, 1)
    ratio, norm_pix = description.method["mask_ratio"], description.method["norm_pix"]
    classes, segmenter = description.classes, dict(description.segmenter)
    detectron2.read_notes(description.detector)
    is_valid = (
      ({"dim", "patch_size"} <= fields.keys() or {"embed_dims", "patch_sizes"} <= fields.keys())
      and len(grid) == 2
      and all(type(side) is int and 0 < side <= MAX_SIZE for side in grid)
      and type(ratio) in (int, float)
      and 0 <= ratio <= 1
      and type(norm_pix) is bool
      and type(description.has_norm) is bool
      and type(classes) in (tuple, list)
      and all(type(name) is str for name in classes)
      and (not segmenter or segmenter.keys() == {"levels", "pool_scales"})
      and all(type(x) is int and 0 <= x <= MAX_SIZE for list_ in segmenter.values() for x in list_)
      and 0 not in segmenter.get("pool_scales", ())
    )
  except (ValueError, TypeError, KeyError, AttributeError):
    is_valid = False
  if not is_valid:
    raise _bad_metadata(source)


def with_heads(
  fields: dict[str, Any], width: int, num_heads: int, usual: int, option: str, source: str
) -> dict[str, Any]:
  """Completes a module's fields by its number of heads.

  Args:
    fields: of the module.
    width: of its tokens.
    num_heads: the user's number; 0: that of `fields`, else `usual`.
    usual: the number in published models of this width; 0: there are none.
    option: the option that sets it, for messages.
    source: file or folder, for messages.
  """
  heads = num_heads or fields.get("num_heads") or usual
  if not heads:
    raise WeightsError(
      f"{source} does not tell the number of heads for width {width}, which no published model "
      f"has; give {option}"
    )
  if width % heads or width % 4:  # 4: of the sine-cosine table
    advice = f"; check {option}" if width % heads else ", or not by 4"
    raise WeightsError(f"{source}: width {width} does not divide into {heads} heads{advice}")
  return fields | {"num_heads": heads}


def input_statistics(
  hints: Hints, description: Description, channels: int, source: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and deviation of the input: the user's, else the source's, else ImageNet's."""
  usual = Hints(mean=IMAGENET_MEAN, std=IMAGENET_STD) if channels == 3 else Hints(mean=(), std=())
  mean, std = (
    tuple(next(x for x in (getattr(y, key) for y in (hints, description, usual)) if x is not None))
    for key in ("mean", "std")
  )
  if not len(mean) == len(std) == channels:
    raise WeightsError(
      f"{source} takes images of {channels} channels and tells of mean {mean} and std {std}; give "
      "both, a number for each channel: mrmae_jax.load(path, mean=(...), std=(...))"
    )
  return mean, std


def file_encoder(description: Description, hints: Hints, dtype, source: str) -> ConvViT | ViT:
  """Returns the encoder that a file describes."""
  fields = description.encoder
  width = fields["dim"] if fields["name"] == "vit" else fields["embed_dims"][2]
  usual = 16 if width == 1280 else 0 if width % 64 or width > 1024 else width // 64
  fields = with_heads(fields, width, hints.num_heads, usual, "num_heads", source)
  return make_encoder(fields, dtype)
