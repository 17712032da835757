"""Damaged and hostile input by the thousand: every one gives a result or the documented error.

  python -m tests.faults.fuzz --inputs=20000 --seed=0 --out=/tmp/fuzz

Five targets: image files for `decode_image`; weight files and folders for `teachers.load` and
  `readers.read_model` (PyTorch's where torch is installed); configurations and command lines for
  `preflight.check` and `cli.parser.parse`; workdirs for a run that resumes, `readers.read_model`
  and `mrmae report`; COCO's files for `open_source` and `to_mask`. Each target runs in a separate
  process, so that a crash belongs to an input. A finding is an exception of another kind, a message
  of several lines, more than 2 s of computing for one input, a crash, a hang, or memory that grows
  by more than 200 MB.

An input is a function of its target and its number alone: --only=images:17 repeats that input.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import tqdm
from PIL import Image, features

from mrmae_jax.errors import (
  ConfigError,
  DataError,
  StorageError,
  UsageError,
  WeightsError,
  WorkdirError,
)

SHARES = {  # of the inputs
  "images": 0.4,
  "weights": 0.2,
  "configs": 0.15,
  "workdirs": 0.1,
  "coco": 0.15,
}
KNOWN = {  # numbers that once were findings; always tried
  "images": (2001191,),  # half a gigabyte out of one kilobyte
  "weights": (13662, 19529, 1000384, 1000402, 1000608, 1000878, 2000556, 2001675, 3002705),
  "configs": (140, 388, 8965, 12711, 1000459),
  "workdirs": (361, 688, 9471),
  "coco": (),
}
CPU_S, HANG_S, GROWTH = 2.0, 60.0, 200e6
START_S = 600.0  # until a process has imported everything, on a busy machine
WARM_UP = 100  # inputs before memory is looked at
REPEAT = 10**6  # numbers of a seed
# Inputs of a process: TensorStore keeps 130 KB of each checkpoint that could not be read.
PER_PROCESS = 1000


class Case(NamedTuple):
  """One input.

  Attributes:
    files: {name: content} of what is read.
    run: (folder that holds the files) -> None; raises what is to be judged.
    refusals: exceptions that are an answer.
  """

  files: dict[str, bytes]
  run: Callable[[Path], None]
  refusals: tuple[type[Exception], ...]


# Mutations of bytes.


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
  """Damages bytes in one to three ways: flipped bits, cuts, zeros, splices of `other`, lengths."""
  data = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 3])):
    size = len(data)
    if not size:
      break
    at, end = sorted(int(x) for x in rng.integers(0, size + 1, 2))
    near = (
      int(min(size - 1, rng.exponential(64))) if rng.random() < 0.5 else int(rng.integers(size))
    )  # headers come first
    kind = rng.integers(7)
    if kind == 0:
      for place in rng.integers(0, size, rng.integers(1, 20)):
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
      del data[near if rng.random() < 0.3 else at :]
    elif kind == 2:
      data[at : min(end, at + 4096)] = bytes(min(end, at + 4096) - at)
    elif kind == 3:
      cut = int(rng.integers(len(other) + 1))
      data[at:] = other[cut:]
    elif kind == 4:
      width = int(rng.choice([1, 2, 4, 8]))
      value = int(
        rng.choice([0, 1, 2**31 - 1, 2**31, 2**62, int(rng.integers(2**16)), size, 2**40])
      ) % 2 ** (8 * width)
      data[near : near + width] = value.to_bytes(width, str(rng.choice(["little", "big"])))
    elif kind == 5:
      data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    else:
      del data[at : min(end, at + 256)]
  return bytes(data)


HOSTILE = (
  None,
  True,
  False,
  0,
  1,
  -1,
  3,
  7,
  2**31,
  2**63,
  10**30,
  -(10**30),
  0.5,
  -0.5,
  1.5,
  1e-300,
  1e30,
  float("nan"),
  float("inf"),
  float("-inf"),
  "",
  "x",
  "0",
  "../../etc/passwd",
  "/etc/passwd",
  "nan",
  "a\0b",
  "~nobody/x",
  "\x1b[2J",
  "é" * 300,
  "x" * 5000,
  [],
  [0],
  [1, 2],
  [1, 2, 3],
  [-1, -1],
  [float("nan")] * 3,
  ["x"] * 3,
  [[]],
  [10**9] * 4,
  {},
  {"x": 1},
  {"name": "vit"},
)


def hostile(rng: np.random.Generator):
  """A value that is hardly what was asked for."""
  return copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])


def mutate_json(content, rng: np.random.Generator):
  """One to three values of a JSON tree replaced, left out or copied from elsewhere in it."""
  content = copy.deepcopy(content)
  for _ in range(rng.choice([1, 1, 2, 3])):
    places = []

    def walk(node, places=places):
      for key in list(node.keys() if isinstance(node, dict) else range(len(node))):
        places.append((node, key))
        if isinstance(node[key], (dict, list)):
          walk(node[key])

    walk(content)
    if not places:
      break
    node, key = places[rng.integers(len(places))]
    kind = rng.integers(10)
    if kind == 0:
      del node[key]
    elif kind == 1:
      there, other = places[rng.integers(len(places))]
      node[key] = (
        copy.deepcopy(there[other])
        if other in (there if isinstance(there, dict) else range(len(there)))
        else None
      )
    elif kind == 2 and isinstance(node, dict):
      node[str(hostile(rng))] = node.pop(key)
    elif kind == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
      node[key] = node[key] * int(rng.choice([-1, 0, 2, 1000])) + int(rng.integers(-1, 2))
    elif kind == 4:
      for _ in range(int(rng.choice([3, 100, 3000]))):
        node[key] = [node[key]]
      break  # too deep for another walk
    else:
      node[key] = hostile(rng)
  return content


def json_bytes(content, rng: np.random.Generator) -> bytes:
  try:
    text = json.dumps(content)
  except RecursionError:  # nested too deep to be written this way
    text = "[" * 100_000
  return (text + " " * int(rng.integers(8))).encode(errors="surrogatepass")


# Images.


def image_files() -> list[bytes]:
  """Small pictures in every format and colour that is read."""
  rng = np.random.default_rng(0)
  pixels = np.clip(
    np.add.outer(np.arange(24), np.arange(40))[..., None] * [3, 4, 1]
    + rng.integers(0, 40, (24, 40, 3)),
    0,
    255,
  )
  picture = Image.fromarray(pixels.astype(np.uint8))
  second = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  deep = Image.fromarray((pixels[..., 0] * 257).astype(np.uint16))
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "a picture"
  forms = [
    (picture, "JPEG", dict(quality=90)),
    (picture, "JPEG", dict(progressive=True, exif=exif)),
    (picture.convert("L"), "JPEG", {}),
    (picture.convert("CMYK"), "JPEG", {}),
    (picture, "PNG", {}),
    (picture.convert("RGBA"), "PNG", {}),
    (picture.convert("P"), "PNG", dict(transparency=0)),
    (picture.convert("1"), "PNG", {}),
    (picture.convert("LA"), "PNG", {}),
    (deep, "PNG", {}),
    (picture, "PNG", dict(save_all=True, append_images=[second])),
    (picture, "WEBP", {}),
    (picture, "WEBP", dict(lossless=True)),
    (picture.convert("RGBA"), "WEBP", dict(save_all=True, append_images=[second])),
    (picture, "GIF", dict(save_all=True, append_images=[second])),
    (picture, "BMP", {}),
    (picture, "PPM", {}),
    (picture, "TIFF", {}),
    (picture, "TIFF", dict(compression="tiff_lzw")),
    (picture, "TIFF", dict(compression="jpeg")),
  ]
  forms += [(picture, "JPEG2000", {})] * features.check("jpg_2000") + [
    (picture, "AVIF", {})
  ] * features.check("avif")
  found = []
  for image, form, options in forms:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    found.append(buffer.getvalue())
  return found


def repaired_png(data: bytes) -> bytes:
  """A PNG with right checksums, so that damage reaches the decoder behind them."""
  parts, at = [data[:8]], 8
  while at + 12 <= len(data):
    length = int.from_bytes(data[at : at + 4], "big")
    body = data[at + 4 : at + 8 + length]
    parts.append(data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big"))
    at += 12 + length
  return b"".join(parts)


def images() -> Callable[[np.random.Generator], Case]:
  from mrmae_jax.data import augment

  bases = image_files()

  def decode(folder):
    pixels = augment.decode_image((folder / "image").read_bytes(), "image")
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size, (
      pixels.shape
    )
    augment.random_resized_crop(pixels, np.random.default_rng(0), (16, 16))

  def make(rng):
    base, other = (bases[rng.integers(len(bases))] for _ in range(2))
    data = mutate(base, other, rng)
    if base.startswith(b"\x89PNG") and rng.random() < 0.5:
      data = repaired_png(data)
    return Case({"image": data}, decode, (DataError,))

  return make


# Weights.


def safetensors(header, values: bytes, rng: np.random.Generator) -> bytes:
  text = json_bytes(header, rng)
  return len(text).to_bytes(8, "little") + text + values


def mutate_tensors(
  tensors: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """Returns a complete file of other tensors: other names, shapes, types, values; some doubled."""
  tensors = dict(tensors)
  for _ in range(rng.choice([1, 1, 2, 3])):
    name = sorted(tensors)[rng.integers(len(tensors))]
    x, kind = tensors[name], rng.integers(8)
    if kind == 0 and len(tensors) > 1:
      del tensors[name]
    elif kind == 1:
      shape = [max(1, side + int(rng.choice([-1, 0, 0, 1, 8]))) for side in x.shape]
      tensors[name] = np.resize(
        x, [*shape, *[1] * int(rng.random() < 0.2)][int(rng.random() < 0.2) :]
      )
    elif kind == 2:
      tensors[name] = x.astype(
        rng.choice(["float16", "float64", "int64", "bool", "int8", "uint8", "int32"])
      )
    elif kind == 3:
      tensors[name] = np.full_like(x, rng.choice([np.nan, np.inf, 0, 1e38]))
    elif kind == 4:
      number = str(rng.choice(["1", "7", "99", "9999999999", "00", "-1", "\u0661"]))
      tensors[name.replace("0", number) if "0" in name else f"{name}.{number}"] = x
    elif kind == 5:
      tensors[
        str(
          rng.choice(
            [
              "x",
              "cls_token",
              "pos_embed",
              "norm.weight",
              "head.weight",
              "fc_norm.weight",
              "mask_token",
              "a\nb",
              "",
            ]
          )
        )
      ] = x
    elif kind == 6:  # every tensor of that width
      side, other = (
        int(rng.choice(x.shape)) if x.ndim else 1,
        int(rng.choice([1, 2, 3, 5, 64, 1000])),
      )
      for key, value in tensors.items():
        shape = [other if n == side else n for n in value.shape]
        tensors[key] = np.resize(value, shape) if math.prod(shape) < 1e6 else value
    else:
      tensors[name] = x.reshape(-1)
  return tensors


def weights() -> Callable[[np.random.Generator], Case]:
  import jax
  import jax.numpy as jnp
  from flax import serialization
  from safetensors import SafetensorError
  from safetensors import numpy as numpy_format

  from mrmae_jax import teachers
  from mrmae_jax.models import ConvViT, Decoder, ViT
  from mrmae_jax.weights import families, files, loaded_model, readers, table, writers
  from tests.helpers.specs import read_spec

  rng = np.random.default_rng(0)
  noise = lambda shapes: jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
  )

  def tower(family, prefix, **options):
    learned = bool(family.names.pos_embed)
    module = ViT(8, 8, 1, 2, 12, learned_positions=learned, **family.fields | options)
    shapes = jax.eval_shape(
      module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    )["params"]
    return table.export(noise(shapes), families.name_table(family, prefix, module))

  def teacher(folder, **options):
    spec = read_spec(
      path=folder / "weights", image_size=(16, 24), token_size=8, dtype="float32", **options
    )
    jax.block_until_ready(jax.tree.leaves(teachers.load(spec).params))

  def student(folder):
    readers.read_model(folder / "weights", num_heads=2, decoder_heads=2)

  root = Path(tempfile.mkdtemp(prefix="mrmae_jax_fuzz"))
  bases = []  # (files, reader)
  try:
    config = dict(
      hidden_size=8,
      num_hidden_layers=1,
      num_attention_heads=2,
      intermediate_size=12,
      image_size=16,
      patch_size=8,
      hidden_act="gelu",
      layer_norm_eps=1e-6,
    )
    statistics = json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}).encode()
    by_type = {kind: family for family in families.FAMILIES for kind in family.model_types}
    for kind, form in (
      ("vit", "plain"),
      ("clip_vision_model", "sharded"),
      ("siglip_vision_model", "msgpack"),
      ("dinov2", "plain"),
      ("dinov3_vit", "plain"),
    ):
      family = by_type[kind]
      options = {
        "vit": {},
        "clip_vision_model": {},
        "siglip_vision_model": dict(attention_pool=False),
        "dinov2": {},
        "dinov3_vit": dict(num_registers=2),
      }[kind]
      stored = tower(family, family.prefixes[0], eps=1e-6, activation="gelu", **options)
      described = (
        config
        | dict(model_type=kind, vision_use_head=False)
        | (dict(num_register_tokens=2) if kind == "dinov3_vit" else {})
      )
      content = {
        "weights/config.json": json.dumps(described).encode(),
        "weights/preprocessor_config.json": statistics,
      }
      if form == "msgpack":
        tree = {}
        for name, x in stored.items():
          *parents, leaf = name.split(".")
          node = tree
          for parent in parents:
            node = node.setdefault(parent, {})
          node[leaf] = x
        content["weights/flax_model.msgpack"] = serialization.msgpack_serialize(tree)
      elif form == "sharded":
        names = sorted(stored)
        for i, part in enumerate((names[:4], names[4:])):
          files.write_safetensors(root / "x", {name: stored[name] for name in part})
          content[f"weights/model-{i}.safetensors"] = (root / "x").read_bytes()
        content["weights/model.safetensors.index.json"] = json.dumps(
          {
            "weight_map": {
              name: f"model-{int(name not in names[:4])}.safetensors" for name in names
            }
          }
        ).encode()
      else:
        files.write_safetensors(root / "x", stored)
        content["weights/model.safetensors"] = (root / "x").read_bytes()
      bases.append((content, teacher))
    for encoder, decoder in (
      (ConvViT((2, 2, 2), (4, 8, 8), (1, 1, 1), 2, (2.0, 2.0, 2.0)), Decoder(192, 8, 1, 2, 2)),
      (ViT(8, 8, 1, 2, 12), Decoder(192, 8, 1, 2, 2)),
    ):
      shapes = loaded_model.param_shapes(encoder, decoder, (2, 3))
      made = loaded_model.LoadedModel(
        encoder,
        decoder,
        noise(shapes),
        (2, 3),
        (0.5,) * 3,
        (0.5,) * 3,
        {"mask_ratio": 0.75, "norm_pix": True},
        True,
        None,
      )
      writers.write_model(
        made, root / "x.safetensors", "timm" if isinstance(encoder, ViT) else "convmae"
      )
      bases.append(({"weights": (root / "x.safetensors").read_bytes()}, student))
      plain = files.open_weights(root / "x.safetensors")
      files.write_safetensors(
        root / "x",
        {name: np.asarray(x) for name, x in plain.items() if "pos_embed" not in name}
        | {
          name: np.zeros((1, 4 + isinstance(encoder, ViT), 8), np.float32)
          for name in plain
          if "pos_embed" in name
        },
      )
      bases.append(({"weights": (root / "x").read_bytes()}, student))
    writers.write_model(made, root / "hf", "hf")
    bases.append(
      ({f"weights/{path.name}": path.read_bytes() for path in (root / "hf").iterdir()}, student)
    )
    bases += _torch_bases(root, teacher)
  finally:
    shutil.rmtree(root)

  def make(rng):
    content, reader = bases[rng.integers(len(bases))]
    content, names = dict(content), sorted(content)
    other = list(bases[rng.integers(len(bases))][0].values())[0]
    for _ in range(rng.integers(1, 3)):
      name = names[rng.integers(len(names))]
      data = content[name]
      if name.endswith(".json") and rng.random() < 0.85:
        try:
          content[name] = json_bytes(mutate_json(json.loads(data), rng), rng)
          continue
        except (ValueError, RecursionError, AttributeError):
          pass  # it was mutated before
      if data[8:9] == b"{" and rng.random() < 0.85:
        length = int.from_bytes(data[:8], "little")
        with contextlib.suppress(
          ValueError, KeyError, TypeError, RecursionError, AttributeError, SafetensorError
        ):
          if rng.random() < 0.4:
            notes = json.loads(data[8 : 8 + length]).get("__metadata__")
            content[name] = numpy_format.save(mutate_tensors(numpy_format.load(data), rng), notes)
            continue
          header = json.loads(data[8 : 8 + length])
          notes = header.get("__metadata__", {})
          if "mrmae_jax" in notes and rng.random() < 0.5:
            notes["mrmae_jax"] = json.dumps(mutate_json(json.loads(notes["mrmae_jax"]), rng))
          else:
            header = mutate_json(header, rng)
          content[name] = safetensors(header, data[8 + length :], rng)
          continue
      content[name] = mutate(data, other, rng)
    if rng.random() < 0.05:
      content.pop(names[rng.integers(len(names))])
    return Case(content, reader, (WeightsError,))

  return make


def _torch_bases(root: Path, teacher) -> list[tuple[dict[str, bytes], Callable[[Path], None]]]:
  """Returns PyTorch's files.

  Without torch all but TorchScript are refused. Their number is the same, so that an input's number
  means the same everywhere.
  """
  goldens = Path(__file__).parent.parent / "goldens" / "teachers"
  old = goldens / "dino_backbone.pth"
  found = [
    ({"weights": (goldens / name).read_bytes()}, functools.partial(teacher, num_heads=4))
    for name in ("dino_backbone.pth", "dino_full_checkpoint.pth", "openai_clip_jit.pt")
  ]
  with contextlib.suppress(ImportError):
    import torch

    torch.save(
      torch.load(old, weights_only=True), root / "old.pth", _use_new_zipfile_serialization=False
    )
    old = root / "old.pth"
  return found + [({"weights": old.read_bytes()}, functools.partial(teacher, num_heads=4))]


# Configurations.

TEXTS = (
  "",
  "0",
  "1",
  "-1",
  "3",
  "0.5",
  "1e30",
  "-1e30",
  "nan",
  "inf",
  "-inf",
  "True",
  "none",
  "None",
  "()",
  "(1,)",
  "(1, 2)",
  "(1, 2, 3)",
  "(nan, 1)",
  "(1e9, 1e9)",
  "1000000000",
  "99999999999999999999",
  "[1, 2]",
  "{}",
  "{'a': 1}",
  "x",
  "x,y",
  "'x'",
  '"',
  "(",
  "1 2",
  "=",
  "a=b",
  "--",
  "~nobody/x",
  "/",
  "../..",
  "digits",
  "folder:",
  "packed:/none",
  "checkpoint:/none",
  "random",
  "vit",
  "focused",
  "proj",
  "masked",
  "visible+cls",
  "rand-m9-inc1",
  "rand-n" + "9" * 400 + "-inc1",
  "x" * 300,
  "é",
  "float32",
  "__import__('os')",
  "1_000",
  "0x10",
)
FLAGS = (
  "config",
  "workdir",
  "check",
  "multihost",
  "coordinator_address",
  "num_processes",
  "process_id",
  "init_timeout",
  "flagfile",
  "confg",
  "nocheck",
  "v",
  "lr",
  "-",
  "help ",
  "undefok",
)


def configs() -> Callable[[np.random.Generator], Case]:
  import jax
  import ml_collections

  from mrmae_jax import preflight, sharding, teachers, train
  from mrmae_jax.config import defaults, flatten
  from mrmae_jax.tasks import pretrain
  from tests import tiny

  del teachers  # imported here, and not at the first input
  home = tempfile.TemporaryDirectory(prefix="mrmae_jax_fuzz")
  for name in ("train/a", "train/b", "validation/a", "validation/b"):
    (Path(home.name) / name).mkdir(parents=True)
    for i in range(4):
      Image.new("RGB", (48, 48), (60 * i, 9, 9)).save(Path(home.name) / name / f"{i}.png")

  def base(task):
    c = tiny.get_config("vit" if task == "self_distill" else "convvit")
    if task != "pretrain":
      other = defaults(task)
      other.update(
        image_size=c.image_size,
        batch_size=16,
        epochs=20.0,
        dtype="float32",
        encoder=c.encoder,
      )
      if "init_from" in other:
        other.init_from = ""
      other.encoder.learned_positions = task != "probe"
      c = other
    c.data.source = f"folder:{home.name}"
    return c

  def judge(config, deep: bool):
    preflight.check(config, num_devices=1)
    config.to_json()
    if (
      deep and config.task == "pretrain" and not (config.teacher.name or "").strip()
    ):  # what comes next, without computing
      train.make_plan(
        config, pretrain.make(config), sharding.make_mesh(devices=jax.devices()[:1]), 8
      )

  def structural(rng, text):
    """Returns a configuration as a file could make it."""
    config = base(str(rng.choice(["pretrain", "pretrain", "finetune", "probe", "self_distill"])))
    for _ in range(rng.choice([1, 1, 2, 3])):
      names = list(flatten(config)) * 3 + list(config)
      *parents, leaf = names[rng.integers(len(names))].split(".")
      node = config
      for parent in parents:
        node = node.get(parent) if isinstance(node, ml_collections.ConfigDict) else None
      if not isinstance(node, ml_collections.ConfigDict) or leaf not in node:
        continue
      value = hostile(rng)
      value = tuple(value) if isinstance(value, list) and rng.random() < 0.7 else value
      kind = rng.integers(12)
      with node.unlocked(), node.ignore_type():
        if kind == 0:
          del node[leaf]
        elif kind == 1:
          node[f"{leaf}s"] = value
        elif kind < 6 and type(node[leaf]) in (int, float):
          node[leaf] = type(node[leaf])(
            node[leaf] * rng.choice([-1, 0, 0.1, 2, 3, 1000]) + rng.choice([0, 1])
          )
        elif kind == 6:
          node[leaf] = str(rng.choice(TEXTS))
        else:
          node[leaf] = value
    text.append(repr(config))
    return config

  def command_line(rng):
    names = list(flatten(base("pretrain"))) + [
      "encoder",
      "data",
      "optim",
      "optim.lr",
      "evals",
      "x",
      "task",
      "extra_teachers.a",
      "",
    ]
    argv = [
      "pretrain",
      "--config=tests/tiny.py",
      f"--workdir={home.name}/run",
      f"--config.data.source=folder:{home.name}",
    ]
    for _ in range(rng.integers(1, 4)):
      dashes = str(rng.choice(["--", "--", "--", "--", "--", "-", "", "---", "--no"]))
      name = (
        f"config.{names[rng.integers(len(names))]}"
        if rng.random() < 0.85
        else str(rng.choice(FLAGS))
      )
      given = str(rng.choice(TEXTS))
      argv += (
        [f"{dashes}{name}={given}"]
        if rng.random() < 0.9
        else [f"{dashes}{name}", given]
        if rng.random() < 0.5
        else [dashes + name]
      )
    return argv

  from mrmae_jax.cli import configs, parser

  def parse(argv):
    options = parser.parse(argv)
    return configs.load_config(options.config, options.overrides)

  def make(rng):
    deep = rng.random() < 0.06
    if rng.random() < 0.5:
      argv = command_line(rng)
      return Case(
        {"input": repr(argv).encode()},
        lambda folder: judge(parse(argv), deep),
        (ConfigError, UsageError, WeightsError),
      )
    text = []
    config = structural(rng, text)
    return Case(
      {"input": text[0].encode(errors="replace")},
      lambda folder: judge(config, deep),
      (ConfigError, WeightsError),  # the latter of a file to start from
    )

  make.home = home  # which is there as long as what makes inputs
  return make


# Workdirs.


def workdirs() -> Callable[[np.random.Generator], Case]:
  import jax

  from mrmae_jax import config as config_lib
  from mrmae_jax import sharding, train
  from mrmae_jax.cli import report
  from mrmae_jax.models import make_decoder, make_encoder
  from mrmae_jax.runs.checkpoint import Checkpoints, record_digest
  from mrmae_jax.runs.log import Log
  from mrmae_jax.runs.workdir import lock_workdir
  from mrmae_jax.weights import loaded_model, readers
  from tests.faults import small

  config, step = small.get_config(), 4
  identity = config_lib.identity(config)
  encoder = make_encoder(config.encoder, np.float32)
  decoder = make_decoder(config.decoder, encoder, 3, np.float32)
  grid = tuple(side // encoder.patch_size for side in config.image_size)
  device = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jax.device_put(rng.standard_normal(x.shape).astype(x.dtype), device),
    loaded_model.param_shapes(encoder, decoder, grid),
  )
  number = lambda x: jax.device_put(x, device)
  state = train.TrainState(number(np.int32(step)), params, (), (), number(np.float32(1)))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)

  def write(folder):
    """Writes what a run of four steps leaves, killed while it was saving."""
    checkpoints = Checkpoints(folder, identity)
    problem = checkpoints.save(step, state, wait=True)
    checkpoints.close()
    assert not problem
    log = Log(folder, 20, settings={})
    log.text("config.json", config.to_json(indent=2))
    for i in range(1, 6):
      log.scalars(i, {"loss": 1 / i})
    log.close()
    shutil.rmtree(folder / "tensorboard")
    (folder / "reconstructions").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "reconstructions" / "step_0000004.png")
    (folder / "lock").write_text('{"host": "h", "pid": 1, "since": "2026-01-01"}')
    return {
      str(path.relative_to(folder)): path.read_bytes()
      for path in sorted(folder.rglob("*"))
      if path.is_file() and path.stat().st_size
    }

  with tempfile.TemporaryDirectory(prefix="mrmae_jax_fuzz") as root:
    base = write(Path(root))
  record = next(name for name in base if name.endswith("run/metadata"))
  arrays = [name for name in base if name.startswith("checkpoints")]
  others = [name for name in base if name not in arrays]

  def resume(folder, is_forged):
    with lock_workdir(folder):
      checkpoints = Checkpoints(folder, identity)
      try:
        restored = checkpoints.restore(shapes)
      finally:
        checkpoints.close()
      if restored is None or is_forged:
        return
      jax.tree.map(np.testing.assert_array_equal, restored.state, state)
      log = Log(folder, 20, restored.step, {})
      log.scalars(restored.step + 1, {"loss": 1.0})
      log.close()

  def read(folder, is_forged):
    loaded = readers.read_model(folder)
    if not is_forged:
      jax.tree.map(np.testing.assert_array_equal, loaded.params["encoder"], params["encoder"])

  def draw(folder, is_forged):
    del is_forged
    runs = report.find_runs([str(folder)])
    if runs[0].series.keys() != {"loss"}:  # drawing takes a second
      report.write_page(runs, f"{folder}/page.html")

  attempts = (  # the command line answers an OSError with exit code 5 and a line
    (resume, (WorkdirError, StorageError, OSError)),
    (read, (WeightsError,)),
    (draw, (UsageError, OSError)),
  )

  def forge(data, rng):
    """Returns another record with a right checksum, as a stranger could write it."""
    content = mutate_json(json.loads(data)["record"], rng)
    return json.dumps({"record": content, "sha256": record_digest(content)}).encode()

  def damage(name, content, rng):
    data = content[name]
    if name.endswith(".jsonl"):
      lines = data.splitlines(keepends=True)
      at = int(rng.integers(len(lines)))
      changed = json_bytes(mutate_json(json.loads(lines[at]), rng), rng)
      lines[at] = mutate(lines[at], data, rng) if rng.random() < 0.3 else changed + b"\n"
      return b"".join(lines)
    if data[:1] == b"{" and rng.random() < 0.8:
      return json_bytes(mutate_json(json.loads(data), rng), rng)
    return mutate(data, content[sorted(content)[rng.integers(len(content))]], rng)

  def make(rng):
    content, is_forged = dict(base), bool(rng.random() < 0.2)
    if is_forged:
      with contextlib.suppress(RecursionError):
        content[record] = forge(content[record], rng)
    for name in {
      str(rng.choice(others if rng.random() < 0.6 else arrays)) for _ in range(rng.integers(1, 3))
    }:
      kind = rng.random()
      if kind < 0.9:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
          content[name] = damage(name, content, rng)
      else:
        data = content.pop(name)
        if kind > 0.95:
          content[f"{name}/{name}"] = data  # a folder in the place of a file
    attempt, refusals = attempts[rng.integers(len(attempts))]
    files = {f"run/{name}": data for name, data in content.items()}
    return Case(files, lambda folder: attempt(folder / "run", is_forged), refusals)

  return make


# COCO's files.


def coco_files() -> Callable[[np.random.Generator], Case]:
  from mrmae_jax.data import open_source
  from mrmae_jax.data.sources.segmentations import encode_rle, to_mask
  from tests.helpers import coco

  def read(folder):
    for split in ("train", "eval"):
      source = open_source(f"coco:{folder}", split, max_dropped=0.5)
      for index in range(len(source)):
        assert source[index]["image"]
        objects = source.objects(index)
        assert np.isfinite(objects.boxes).all() and len(objects.boxes) == len(objects.classes)
        for segmentation in filter(None, objects.segmentations):
          assert to_mask(segmentation, objects.size).shape == objects.size

  document = coco.document()
  height, width = 40, 60
  corner = np.zeros((height, width), bool)
  corner[:9, :9] = True
  crowd = {"size": [height, width], "counts": [0, 9, height * width - 9]}
  document["annotations"] += [
    coco.annotation(90, 1, (0, 0, 9, 9), segmentation=encode_rle(corner)),
    coco.annotation(91, 2, (0, 0, 1, 9), segmentation=crowd, iscrowd=1),
  ]
  with tempfile.TemporaryDirectory(prefix="mrmae_jax_fuzz") as root:
    coco.write(Path(root), train=document)
    base = {
      str(path.relative_to(root)): path.read_bytes()
      for path in sorted(Path(root).rglob("*"))
      if path.is_file()
    }
    read(Path(root))  # is valid; the seconds of its imports belong to no input
  files = [name for name in base if name.endswith(".json")]

  def make(rng):
    content = dict(base)
    name = files[rng.integers(len(files))]
    if rng.random() < 0.8:
      content[name] = json_bytes(mutate_json(json.loads(content[name]), rng), rng)
    else:
      content[name] = mutate(content[name], content[files[0]], rng)
    if rng.random() < 0.1:
      content.pop(sorted(content)[rng.integers(len(content))])
    return Case(content, read, (DataError,))

  return make


# Running them.


def itself() -> Callable[[np.random.Generator], Case]:
  """Returns inputs of every kind of finding, for the test of this script."""

  def fail(folder):
    kind = (folder / "kind").read_bytes()
    if kind == b"refused":
      raise ValueError(kind.decode())
    if kind == b"raises":
      raise KeyError(kind.decode())
    if kind == b"two lines":
      raise ValueError("one\ntwo")
    if kind == b"dies":
      os.abort()
    if kind == b"hangs":
      time.sleep(3600)
    if kind == b"takes memory":
      np.ones(300_000_000, np.uint8).sum()
    if kind == b"is slow":
      end = time.process_time() + 1.1 * CPU_S
      while time.process_time() < end:
        pass

  kinds = ("result", "refused", "raises", "two lines", "dies", "hangs", "takes memory", "is slow")
  return lambda rng: Case({"kind": kinds[rng.integers(len(kinds))].encode()}, fail, (ValueError,))


TARGETS = {
  "images": images,
  "weights": weights,
  "configs": configs,
  "workdirs": workdirs,
  "coco": coco_files,
  "itself": itself,
}


def make_case(make: Callable[[np.random.Generator], Case], number: int) -> Case:
  return make(np.random.default_rng(number))


def attempt(case: Case) -> str:
  """Runs an input: "" for a result, "refused" for a documented error, else the finding."""
  with tempfile.TemporaryDirectory(prefix="mrmae_jax_fuzz") as folder:
    for name, content in case.files.items():
      path = Path(folder) / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
    began = time.process_time()
    try:
      case.run(Path(folder))
      outcome = ""
    except case.refusals as error:
      # A ConfigError has a line for each mistake
      multiline = type(error).__name__ != "ConfigError" and "\n" in str(error)
      outcome = (
        f"a message of several lines: {error}" if multiline or not str(error).strip() else "refused"
      )
    except BaseException:  # a finding
      outcome = traceback.format_exc()
    spent = time.process_time() - began
  return f"{spent:.1f} s of computing" if spent > CPU_S and outcome in ("", "refused") else outcome


def work(target: str, numbers: list[int]) -> None:
  """Runs inputs of a target; prints each start and each outcome as a line of JSON."""
  answers, sys.stdout = sys.stdout, sys.stderr  # what an input prints is no answer
  say = lambda **message: print(json.dumps(message), flush=True, file=answers)
  make = TARGETS[target]()
  for number in numbers:
    say(begin=number)
    outcome = attempt(make_case(make, number))
    status = Path("/proc/self/status").read_text()  # getrusage begins with the parent's peak
    say(end=number, outcome=outcome, peak=1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]))


class Outcome(NamedTuple):
  """Results of a target's inputs.

  Attributes:
    results, refused: number of inputs with a result, and with the documented error.
    findings: {number: reason}.
    grown: bytes by which the largest memory use was above that of the first hundred inputs.
    seconds: duration.
  """

  results: int
  refused: int
  findings: dict[int, str]
  grown: float
  seconds: float


def run(
  target: str,
  numbers: list[int],
  out: Path | None = None,
  done: Callable[[], Any] = lambda: None,
  hang_s: float = HANG_S,
) -> Outcome:
  """Tries inputs in processes that may die.

  Args:
    target: a key of TARGETS.
    numbers: of the inputs.
    out: where findings are written: the reason, and the input's bytes.
    done: called after each input.
    hang_s: seconds without an answer after which a process is killed.
  """
  began, left = time.monotonic(), list(numbers)
  counts, findings, grown = {"": 0, "refused": 0}, {}, 0.0
  while left:
    with tempfile.TemporaryFile() as errors:
      command = [sys.executable, "-m", "tests.faults.fuzz", f"--worker={target}"]
      process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
      )
      process.stdin.write(json.dumps(left[:PER_PROCESS]).encode())
      process.stdin.close()
      current, first, tried = None, 0, 0
      for line in _lines(process, hang_s):
        message = json.loads(line)
        current = message.get("begin")
        if "end" in message:
          left.remove(message["end"])
          done()
          tried += 1
          first = message["peak"] if tried <= WARM_UP else first
          if message["peak"] - first > max(grown, GROWTH):
            findings[message["end"]] = (
              f"memory has grown by {(message['peak'] - first) / 1e6:.0f} MB"
            )
          grown = max(grown, message["peak"] - first)
          if message["outcome"] in counts:
            counts[message["outcome"]] += 1
          else:
            findings[message["end"]] = message["outcome"]
      hung = process.poll() is None
      process.kill()
      code = process.wait()
      errors.seek(0, os.SEEK_END)
      errors.seek(max(0, errors.tell() - 3000))
      if current is not None:
        reason = f"no answer for {hang_s:g} s" if hung else f"the process died with {code}"
        findings[current] = f"{reason}\n{errors.read().decode(errors='replace')}"
        left.remove(current)
        done()
      elif not tried:  # the process did not begin
        raise RuntimeError(
          f"the process of {target} ended with {code}: {errors.read().decode(errors='replace')}"
        )
  if out and findings:
    make = TARGETS[target]()
    for number, reason in findings.items():
      folder = out / f"{target}-{number}"
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "reason.txt").write_text(
        f"python -m tests.faults.fuzz --only={target}:{number}\n{reason}\n"
      )
      for name, content in make_case(make, number).files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
  return Outcome(counts[""], counts["refused"], findings, grown, time.monotonic() - began)


def _lines(process: subprocess.Popen, patience: float):
  """Yields the lines of a process until it ends, or is silent for `patience` seconds.

  Its first line may take START_S: it imports before.
  """
  buffer, wait_s = b"", START_S
  while select.select([process.stdout], [], [], wait_s)[0]:
    wait_s = patience
    chunk = os.read(process.stdout.fileno(), 1 << 16)
    if not chunk:
      process.wait()
      return
    *lines, buffer = (buffer + chunk).split(b"\n")
    yield from lines


def numbers_of(target: str, inputs: int, seed: int) -> list[int]:
  """Returns the numbers of a target's share of the inputs: those of the seed, then KNOWN ones."""
  return [*range(seed * REPEAT, seed * REPEAT + round(inputs * SHARES[target])), *KNOWN[target]]


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns 1 if there are findings."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.faults.fuzz", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--inputs", type=int, default=20_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="folder for findings")
  parser.add_argument("--targets", default=",".join(SHARES))
  parser.add_argument("--only", help="TARGET:NUMBER, run in this process with its traceback")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.worker:
    # Output of libraries goes to stderr, not among the lines.
    lines, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    with contextlib.redirect_stdout(lines):
      work(options.worker, json.load(sys.stdin))
    return 0
  if options.only:
    target, number = options.only.split(":")
    outcome = attempt(make_case(TARGETS[target](), int(number)))
    print(outcome or "a result")
    return int(outcome not in ("", "refused"))
  asked = {
    target: numbers_of(target, options.inputs, options.seed)
    for target in options.targets.split(",")
  }
  with (
    tqdm.tqdm(total=sum(map(len, asked.values())), unit="input", smoothing=0.05) as bar,
    concurrent.futures.ThreadPoolExecutor(len(asked)) as pool,
  ):
    lock = threading.Lock()

    def done():
      with lock:
        bar.update()

    outcomes = dict(
      zip(asked, pool.map(lambda target: run(target, asked[target], options.out, done), asked))
    )
  for target, o in outcomes.items():
    print(
      f"{target}: {o.results + o.refused + len(o.findings)} inputs in {o.seconds:.0f} s: "
      f"{o.results} results, {o.refused} refused, {len(o.findings)} findings; "
      f"memory grew by {o.grown / 1e6:.0f} MB"
    )
    for number, reason in o.findings.items():
      print(f"  {target}:{number}: {reason.strip().splitlines()[-1]}")
  return int(any(o.findings for o in outcomes.values()))


if __name__ == "__main__":
  sys.exit(main())
