"""Hostile and mistaken input (F33, F34, F35) is refused in one clear line, before any computing.

Nothing of it is executed.
"""

import copy
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from mrmae_jax import config as config_lib
from mrmae_jax import preflight, teachers, train
from mrmae_jax.cli import knn, replay
from mrmae_jax.config import flatten
from mrmae_jax.data import augment, open_source
from mrmae_jax.data.pack import write_packed
from mrmae_jax.data.randaugment import parse as parse_randaug
from mrmae_jax.data.sources import packed
from mrmae_jax.errors import ConfigError, DataError, UsageError, WeightsError
from mrmae_jax.weights import files, model_sources, readers
from tests import tiny
from tests.faults import fuzz
from tests.helpers.cli import run_command
from tests.helpers.specs import read_spec

GOLDENS = Path(__file__).parent.parent / "goldens"
DINO, CLIP = GOLDENS / "teachers" / "hf_dino", GOLDENS / "teachers" / "hf_clip_full"


# F33: command lines and configurations.


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
  """Runs a command line in this process without training: (exit code, stderr)."""
  monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("training began"))

  def run(*arguments):
    monkeypatch.setattr(sys, "argv", ["mrmae"])
    code = run_command(
      ["pretrain", "--config=tests/tiny.py", f"--workdir={tmp_path}/run", *arguments]
    )
    assert not (tmp_path / "run").exists()
    return code, capsys.readouterr().err

  return run


BAD = [  # of 8 devices
  ("--config.optim.blr=nan", "config.optim.blr=nan must be a finite number > 0"),
  ("--config.optim.blr=-1e-4", "config.optim.blr=-0.0001 must be"),
  ("--config.optim.blr=inf", "config.optim.blr=inf must be"),
  ("--config.optim.blr=1e30", "config.optim.blr=1e+30 must be"),
  ("--config.optim.min_lr=nan", "config.optim.min_lr=nan must be"),
  ("--config.epochs=0", "config.epochs=0.0 must be"),
  ("--config.epochs=-3", "config.epochs=-3.0 must be"),
  ("--config.epochs=1e30", "config.epochs=1e+30 must be"),
  ("--config.epochs=ten", "--config.epochs=ten given; expected a number"),
  (
    "--config.image_size=(36, 48)",
    "config.image_size=(36, 48) is not a multiple of the token size 8; nearest: (32, 48)",
  ),
  (
    "--config.image_size=(1000000000, 1000000000)",
    "config.image_size=(1000000000, 1000000000) must be from 1 to 16384",
  ),
  ("--config.image_size=(16384, 16384)", "makes 4194304 tokens of 8 pixels, at most 65536"),
  ("--config.image_size=32", "config.image_size=(32,) must hold two numbers, e.g. (224, 224)"),
  (
    "--config.batch_size=20",
    "config.batch_size=20 is not divisible by 8 devices x 1 accumulation steps; nearest: 16 or 24",
  ),
  ("--config.batch_size=0", "config.batch_size=0 must be"),
  ("--config.mesh.fsdp=3", "fsdp=3 does not fit 8 devices"),
  ("--config.mesh.data=0", "config.mesh data=0 x fsdp=1 does not fit"),
  ("--config.seed=-1", "config.seed=-1 must be from 0 to"),
  ("--config.seed=4294967296", "config.seed=4294967296 must be"),
  ("--config.log_every=nan", "--config.log_every=nan given; expected a whole number"),
  ("--config.log_every=0", "config.log_every=0 must be"),
  ("--config.eval_every=-1", "config.eval_every=-1.0 must be"),
  ("--config.checkpoint_every=nan", "config.checkpoint_every=nan must be"),
  ("--config.keep_checkpoints=0", "keep_checkpoints=0 must"),
  ("--config.method.mask_ratio=0", "config.method.mask_ratio=0.0 leaves 0 of 24 tokens visible"),
  ("--config.method.mask_ratio=1", "config.method.mask_ratio=1.0 leaves 0"),
  ("--config.method.mask_ratio=nan", "must lie in [0, 1]"),
  (
    "--config.data.crop_scale=(0.9, 0.1)",
    "config.data.crop_scale=(0.9, 0.1) must satisfy 0 < low <= high <= 1",
  ),
  (
    "--config.data.crop_scale=(nan, 1)",
    "config.data.crop_scale=('(nan, 1)',) must hold two numbers",
  ),
  (
    "--config.data.mean=(123.7, 116.3, 103.5)",
    "config.data.mean=(123.7, 116.3, 103.5) must lie in [0, 1]",
  ),
  ("--config.data.std=(0.2, 0.0, 0.2)", "config.data.std=(0.2, 0.0, 0.2) must"),
  ("--config.data.randaug=rand-m9", "config.data.randaug='rand-m9' is not understood"),
  ("--config.data.workers=-1", "config.data.workers=-1 must be"),
  ("--config.data.flip=perhaps", "--config.data.flip=perhaps"),
  ("--config.data.source=", "config.data.source is not set; use digits, folder:"),
  ("--config.data.source=folder:", "dataset 'folder:' given; expected"),
  ("--config.evals.knn.temperature=nan", "config.evals.knn.temperature=nan must"),
  ("--config.evals.knn.k=0", "config.evals.knn.k=0"),
  ("--config.evals.reconstruct.images=-1", "config.evals.reconstruct.images=-1 must"),
  (
    "--config.teacher.path=~no_such_user/teacher",
    "config.teacher: ~no_such_user/teacher: no such file or folder",
  ),
  ("--config.teacher.path=" + "x" * 5000, "no such file or folder"),
  ("--config.teacher.weight=nan", "config.teacher.weight=nan must"),
  ("--config.encoder.name=vit", "a vit takes ['activation', '"),
  ("--config.encoder.patch_sizes=(2, 2, 0)", "config.encoder.patch_sizes=(2, 2, 0) must"),
  ("--config.encoder.num_heads=0", "config.encoder.num_heads=0 must"),
  (
    "--config.task=pretraining",
    "config.task='pretraining' is not one of pretrain, finetune, probe",
  ),
  ("--epochs=3", "'--epochs=3' is not an option; did you mean --config.epochs=VALUE?"),
  ("blr=3", "'blr=3' is not an option; did you mean --config.optim.blr=VALUE?"),
  ("optim.blr=3", "'optim.blr=3' is not an option; did you mean --config.optim.blr=VALUE?"),
  ("train", "'train' is not an option"),
  ("--check=maybe", "--check=maybe given; it takes no value"),
  ("--num_processes=2", "--num_processes says where other processes are: add --multihost"),
  ("--num_processes=0", "num_processes"),
  ("--workdir=", "--workdir is missing"),
  ("--workdir=~no_such_user/run", "~no_such_user/run: "),
  ("--config=", "--config is missing"),
  ("--config.optim=3", "--config.optim=3"),
  ("--flagfile=/none", "/none"),
  ("---config.epochs=3", "is not an option; did you mean --config.epochs=3?"),
  ("--config.epochs", "Missing value for flag --config.epochs"),
]


@pytest.mark.parametrize("argument, message", BAD, ids=[argument[:50] for argument, _ in BAD])
def test_f33_command_lines(command, argument, message):
  code, err = command(argument)
  assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of images with classes, which is listed faster than the digits are read."""
  root = tmp_path_factory.mktemp("photos")
  for name in ("train/a", "train/b", "validation/a", "validation/b"):
    (root / name).mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(root / name / "0.png")
  return f"folder:{root}"


def valid(task, photos, encoder="convvit"):
  """Returns a small configuration of a task with every section that it can have."""
  c = tiny.get_config(encoder)
  if task == "pretrain":
    c.extra_teachers.dino = copy.deepcopy(c.teacher)
  else:
    other = config_lib.defaults(task)
    other.update(image_size=c.image_size, batch_size=16, epochs=20.0)
    if "init_from" in other:
      other.init_from = ""
    other.encoder, other.evals.knn = c.encoder, c.evals.knn
    other.encoder.learned_positions = task != "probe"
    c = other
  c.data.source = photos
  preflight.check(c, num_devices=8)
  return c


def put(config, name, value):
  *parents, leaf = name.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  with node.unlocked(), node.ignore_type():
    node[leaf] = value


# Values that are accepted although they look odd, and why they do no harm
HARMLESS = {("mesh.data", "-1"): "the default: all devices that are left"}


def test_f33_every_number_of_every_task(photos):
  """NaN, infinity, -1, huge values and other types, at every number of the configuration."""
  tried, accepted, numbers_of_schema = set(), set(), set()
  for task, encoder in (
    ("pretrain", "convvit"),
    ("pretrain", "vit"),
    ("finetune", "convvit"),
    ("probe", "vit"),
    ("self_distill", "vit"),
  ):
    config = valid(task, photos, encoder)
    keys = config_lib.find_keys(config)
    numbers_of_schema |= {n for n, k in keys.items() if isinstance(k.allowed, config_lib.Rule)}
    for name, value in flatten(config).items():
      several = isinstance(value, tuple)
      numbers = value if several else (value,)
      if (
        name in tried
        or name in ("optim.no_decay", "optim.full_rate")  # names
        or not all(type(x) in (int, float) for x in numbers)
      ):
        continue
      tried.add(name)
      for bad in (
        float("nan"),
        float("inf"),
        float("-inf"),
        -1,
        1e30,
        10**300,
        "3",
        None,
        [[1.0]],
        {},
      ):
        changed = copy.deepcopy(config)
        given = (bad, *(numbers[1:])) if several else bad
        put(changed, name, given)
        try:
          preflight.check(changed, num_devices=8)
          accepted.add((name, repr(bad)))
        except ConfigError as error:
          # The two axes of a mesh are judged together.
          key = (
            "config.mesh "
            if name.startswith("mesh.") and f"config.{name}" not in str(error)
            else f"config.{name}"
          )
          assert key in str(error) and "\n" not in str(error), (name, bad, error)
  assert accepted == set(HARMLESS) and tried == numbers_of_schema


def test_f33_every_number_has_a_range():
  """A key whose value is a number, or a tuple of numbers, has a rule; every key has a meaning."""
  for task in config_lib.TASKS:
    for kind in ("convvit", "vit"):
      c = config_lib.defaults(task)
      c.encoder = config_lib.encoder(kind, "base")
      for name, key in config_lib.find_keys(c).items():
        several = isinstance(key.default, tuple)
        element = key.many or type(key.default[0] if several else key.default)
        assert isinstance(key.allowed, config_lib.Rule) == (element in (int, float)), name
        assert key.help and key.resume in ("same", "free", "local"), name


def _no_section(c):
  put(c, "optim", 3)


def _no_key(c):
  with c.optim.unlocked():
    del c.optim["eps"]


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda c: put(c, "optim.lr", 3),
      "config.optim.lr is not a key of the task 'pretrain'; did you mean config.optim.blr?",
    ),
    (lambda c: put(c, "data.mean", "abc"), "config.data.mean='abc' must hold three numbers"),
    (lambda c: put(c, "data.flip", "no"), "config.data.flip='no' must be of type bool"),
    (lambda c: put(c, "teacher.path", 3), "config.teacher.path=3 must be a text"),
    (lambda c: put(c, "extra_teachers", {"dino": 3}), "config.extra_teachers"),
    (
      lambda c: put(c, "evals.knnn", ml_collections.ConfigDict({"k": 3})),
      "config.evals.knnn is not an evaluator of the task 'pretrain'",
    ),
    (lambda c: put(c, "task", ["pretrain"]), "config.task=['pretrain'] is not one of"),
    (_no_section, "config.optim must be a section"),
    (_no_key, "not in the configuration: config.optim.eps"),
  ],
)
def test_f33_what_a_configuration_file_can_do(photos, change, message):
  config = valid("pretrain", photos)
  change(config)
  with pytest.raises(ConfigError) as error:
    preflight.check(config, num_devices=8)
  assert message in str(error.value)


@pytest.mark.parametrize("config", [None, 3, {"task": "pretrain"}, ml_collections.ConfigDict()])
def test_f33_no_configuration_at_all(config):
  with pytest.raises(ConfigError, match="start from pretrain"):
    preflight.check(config, num_devices=1)


@pytest.mark.parametrize(
  "text", ["rand-inc1-n" + "9" * 400, "rand-inc1-n101", "rand-inc1-m" + "9" * 400]
)
def test_f33_randaug_is_bounded(text):
  with pytest.raises(DataError, match="is not understood"):
    parse_randaug(text)


# F34: weights.


def stored(header, values: bytes = bytes(24), length: int | None = None) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def entry(shape=(2, 3), offsets=(0, 24), dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


two = lambda *offsets: {name: entry((3,), place) for name, place in zip("ab", offsets)}
HEADERS = {  # what the file claims -> the answer
  "terabytes of header": (
    stored({"a": entry()}, length=2**42),
    "header too large",
  ),
  "all of 64 bits": (stored({"a": entry()}, length=2**64 - 1), "header too large"),
  "terabytes of values": (
    stored({"a": entry((2**20, 2**20), (0, 2**42))}),
    "file not fully covered",
  ),
  "a huge shape over little": (
    stored({"a": entry((2**31, 2**31))}),
    "overflow computing buffer size from shape",
  ),
  "an overflowing shape": (
    stored({"a": entry((2**32, 2**32, 0), (0, 0))}, b""),
    "overflow computing buffer size",
  ),
  "an empty tensor": (stored({"a": entry((0, 3), (0, 0))}, b""), "holds nothing"),
  "a negative side": (stored({"a": entry((-2, -3))}), "invalid value: integer `-2`"),
  "a fraction of a side": (stored({"a": entry((2.0, 3))}), "floating point `2.0`"),
  "a truth for a side": (stored({"a": entry((True, 6))}), "boolean `true`"),
  "values before the file": (
    stored({"a": entry((2, 3), (-24, 0))}),
    "invalid value: integer `-24`",
  ),
  "an end before the beginning": (
    stored({"a": entry((2, 3), (24, 0))}),
    "invalid offset for tensor `a`",
  ),
  "values beyond the file": (
    stored({"a": entry((2, 3), (0, 24)), "b": entry((2, 3), (24, 48))}),
    "file not fully covered",
  ),
  "overlapping tensors": (stored(two((0, 12), (8, 20))), "invalid offset for tensor `b`"),
  "the same bytes twice": (stored(two((0, 12), (0, 12))), "invalid offset for tensor `[ab]`"),
  "a hole": (stored(two((0, 12), (16, 28)), bytes(28)), "invalid offset for tensor `b`"),
  "hidden bytes at the end": (stored({"a": entry()}, bytes(99)), "file not fully covered"),
  "a name twice": (
    stored(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)),
    "'a' comes twice",
  ),
  "an unknown type": (stored({"a": entry(dtype="F4096")}), "unknown variant `F4096`"),
  "a list for a type": (stored({"a": entry(dtype=["F32"])}), "expected string"),
  "no offsets": (stored({"a": {"dtype": "F32", "shape": [2, 3]}}), "missing field `data_offsets`"),
  "a list": (stored(b"[" + b"1," * 9 + b"1]"), "not a weight file"),
  "a list inside": (stored({"a": [1, 2]}), "invalid JSON in header"),
  "a deep header": (stored(b'{"a":' + b"[" * 200_000), "recursion limit exceeded"),
  "cut JSON": (stored(b'{"a": {'), "invalid JSON in header: EOF"),
  "notes that are none": (stored({"__metadata__": [1], "a": entry()}), "invalid JSON in header"),
  "a name for a terminal": (stored({"\x1b[2Ja": entry()}), r"called '\\x1b\[2Ja'"),
  "a bad name for a terminal": (
    stored({"\x1b[2Ja": entry((2, 3), (24, 0))}),
    r"invalid offset for tensor `\\x1b\[2Ja`",
  ),
  "nothing": (stored({}, b""), "family|not a model"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_f34_safetensors_headers(tmp_path, case):
  content, message = HEADERS[case]
  path = tmp_path / "x.safetensors"
  path.write_bytes(content)
  for read in (
    lambda: read_spec(path=path, image_size=(32, 32), token_size=8),
    lambda: readers.read_model(path),
  ):
    tracemalloc.start()
    with pytest.raises(WeightsError, match=message) as error:
      read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(error.value).isprintable() and str(path) in str(error.value) and peak < 50e6


def test_f34_a_terabyte_that_is_there(tmp_path):
  """A sparse file makes good the claim of its size: it is not read all the same."""
  path = tmp_path / "x.safetensors"
  path.write_bytes((2**40).to_bytes(8, "little") + b"{")
  os.truncate(path, 8 + 2**40)
  with pytest.raises(WeightsError, match="header too large"):
    files.open_weights(path)


@pytest.mark.parametrize("number", ["999999999", "9" * 5000, "150"])
def test_f34_names_cannot_ask_for_a_billion_blocks(tmp_path, number):
  tensors = load_file(GOLDENS / "teachers" / "dino_backbone.safetensors")
  tensors[f"blocks.{number}.attn.qkv.weight"] = np.ones(3, np.float32)
  (tmp_path / "x.safetensors").write_bytes(save(tensors))
  for read in (
    lambda: read_spec(
      path=tmp_path / "x.safetensors", image_size=(32, 32), token_size=8, num_heads=4
    ),
    lambda: readers.read_model(tmp_path / "x.safetensors", num_heads=4),
  ):
    with pytest.raises(
      WeightsError, match=f"blocks are numbered up to {number[:20]}, but 4 are there"
    ):
      read()


@pytest.mark.parametrize(
  "notes",
  [
    {"encoder": {"name": "vit", "depth": 10**9}},
    {"encoder": {"name": "vit", "dim": 10**12}},
    {"grid": [10**9, 10**9]},
    {"grid": [-2, -2]},
    {"mean": [float("nan")] * 3},
    {"std": [0.0] * 3},
    {"method": {"mask_ratio": 2.0, "norm_pix": True}},
    {"method": 3},
    {"encoder": {"name": "vit", "remat": "x", "dim": 8, "patch_size": 8}},
    {"encoder": {"name": "vit", "activation": "x", "dim": 8, "patch_size": 8}},
    {"encoder": {"name": "vit", "positions": "x", "dim": 8, "patch_size": 8}},
    {"encoder": [[]]},
    {"decoder": "abc"},
    {"surplus": 1},
  ],
)
def test_f34_notes_of_a_model_are_checked(tmp_path, notes):
  path = tmp_path / "x.safetensors"
  tensors = load_file(GOLDENS / "teachers" / "dino_backbone.safetensors") | {
    "decoder_embed.weight": np.ones((8, 48), np.float32)
  }
  good = {
    "encoder": {
      "name": "vit",
      "dim": 48,
      "patch_size": 8,
      "depth": 3,
      "num_heads": 4,
      "mlp_dim": 72,
    },
    "decoder": None,
    "grid": [4, 4],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "method": {"mask_ratio": 0.75, "norm_pix": True},
  }
  files.write_safetensors(path, tensors, {model_sources.METADATA_KEY: json.dumps(good)})
  readers.read_model(path, decoder=False)  # without the change it is one
  files.write_safetensors(path, tensors, {model_sources.METADATA_KEY: json.dumps(good | notes)})
  with pytest.raises(
    WeightsError,
    match="is damaged: its notes about the model|holds a size that is none|"
    "must hold equally many numbers|does not fit",
  ) as error:
    readers.read_model(path, decoder=False)
  assert "\n" not in str(error.value)


def folder_with(tmp_path, source=DINO, **contents):
  folder = shutil.copytree(source, tmp_path / "teacher")
  for name, content in contents.items():
    (folder / f"{name}.json").write_text(
      content if isinstance(content, str) else json.dumps(content)
    )
  return folder


def refused(folder, message, **options):
  with pytest.raises(WeightsError, match=message) as error:
    teachers.load(read_spec(**dict(path=folder, image_size=(32, 32), token_size=8) | options))
  assert "\n" not in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize(
  "change",
  [
    {"hidden_size": 10**30},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 0},
    {"num_attention_heads": -4},
    {"patch_size": 0},
    {"patch_size": []},
    {"image_size": -32},
    {"image_size": [10**12, 10**12]},
    {"intermediate_size": "x" * 10_000},
    {"layer_norm_eps": float("nan")},
    {"layer_norm_eps": 0},
    {"hidden_size": [48]},
    {"hidden_act": ["gelu"]},
    {"hidden_act": "x" * 10_000},
    {"model_type": ["vit"]},
    {"hidden_size": None},
    {"num_attention_heads": 4.0},
    {"intermediate_size": {}},
  ],
)
def test_f34_numbers_of_config_json(tmp_path, change):
  config = json.loads((DINO / "config.json").read_text())
  refused(
    folder_with(tmp_path, config=config | change),
    "config.json.*(holds a size that is none|is not supported)",
  )


@pytest.mark.parametrize("name", ["config", "preprocessor_config"])
@pytest.mark.parametrize(
  "content",
  ["", "{", "[1, 2]", "3", '"text"', "[" * 200_000, '{"a":' * 200_000, "\0", "9" * 10_000],
  ids=["empty", "cut", "list", "number", "text", "deep", "deeper", "null", "digits"],
)
def test_f34_json_that_is_no_object(tmp_path, name, content):
  refused(folder_with(tmp_path, **{name: content}), f"{name}.json is not")


@pytest.mark.parametrize(
  "shard",
  [
    "../outside.safetensors",
    "/etc/passwd",
    "a/../../outside.safetensors",
    "..",
    ".",
    "",
    "sub/x.safetensors",
    "x\0y",
    3,
    None,
    ["model.safetensors"],
  ],
)
def test_f34_an_index_stays_in_its_folder(tmp_path, shard):
  folder = folder_with(tmp_path)
  (folder / "sub").mkdir()
  (folder / "model.safetensors").rename(
    tmp_path / "outside.safetensors"
  )  # what it points at would do
  shutil.copy(tmp_path / "outside.safetensors", folder / "sub" / "x.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
  refused(folder, "the index lists .*, expected names of files in its own folder|is not an index")


class Harm:
  """Unpickling it would create a file."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


def archive(path, **parts):
  with zipfile.ZipFile(path, "w") as z:
    for name, content in parts.items():
      z.writestr(name, content)
  return path


def test_f34_torchscript_is_read_and_not_run(tmp_path):
  """Pickles inside are refused; torch is not asked."""
  for harm in (Harm(tmp_path / "executed"), {"visual": Harm(tmp_path / "executed")}):
    path = archive(
      tmp_path / "x.pt", **{"x/constants.pkl": b"", "x/data.pkl": pickle.dumps(harm, protocol=2)}
    )
    with pytest.raises(WeightsError, match="needs pickled class io.open; refusing"):
      files.open_weights(path)
  assert not (tmp_path / "executed").exists()


def test_f34_torchscript_gives_the_same_tensors():
  script, plain = (
    files.open_weights(GOLDENS / "teachers" / f"openai_clip{end}")
    for end in ("_jit.pt", ".safetensors")
  )
  common = plain.keys() & script.keys()
  assert len(common) > 30 and {name for name in script if script[name].dtype == "float32"} <= common
  for name in common:
    np.testing.assert_array_equal(np.asarray(script[name]), np.asarray(plain[name]), err_msg=name)


@pytest.mark.torch
def test_f34_code_of_torchscript_is_not_run(tmp_path):
  torch = pytest.importorskip("torch")
  target = tmp_path / "executed"

  class Module(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.weight = torch.nn.Parameter(torch.ones(3))
      self.path = str(target)

    def forward(self, x):
      return x + self.weight

    @torch.jit.export
    def __getstate__(self):
      return (self.weight, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
      self.weight, self.path, self.training = state[0], state[1], state[2]
      torch.save(state[0], state[1])

  torch.jit.script(Module()).save(str(tmp_path / "x.pt"))
  target.unlink(missing_ok=True)
  with pytest.raises(WeightsError):
    files.open_weights(tmp_path / "x.pt")
  assert not target.exists()
  torch.jit.load(str(tmp_path / "x.pt"))
  assert target.exists()  # what would have happened


def test_f34_archives_are_not_unpacked(tmp_path):
  """Only PyTorch's files are archives; they are read in memory, so that no name leads to a path."""
  inside = tmp_path / "inside"
  inside.mkdir()
  path = archive(
    inside / "x.pt",
    **{
      "x/constants.pkl": b"",
      "../outside": b"x",
      "/tmp/mrmae_jax_outside": b"x",
      "x/data.pkl": b"\x80\x02}.",
    },
  )
  with pytest.raises(WeightsError, match="not a PyTorch archive"):
    files.open_weights(path)
  assert (
    os.listdir(tmp_path) == ["inside"]
    and os.listdir(inside) == ["x.pt"]
    and not os.path.exists("/tmp/mrmae_jax_outside")
  )
  source = "".join(path.read_text() for path in Path(files.__file__).parent.rglob("*.py"))
  assert not any(
    word in source for word in ("extractall", ".extract(", "unpack_archive", "import tarfile")
  )


def test_f34_archives_do_not_swell(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as z:
    z.writestr("x/data.pkl", bytes(50_000_000))
  assert (tmp_path / "x.pth").stat().st_size < 100_000
  with pytest.raises(WeightsError, match="its parts would take 50000000 bytes unpacked"):
    files.open_weights(tmp_path / "x.pth")


@pytest.mark.torch
def test_f34_one_number_is_no_terabyte(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save({"cls_token": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "x.pth")
  with pytest.raises(
    WeightsError, match=r"cls_token \(1048576, 1048576\) is not stored value by value"
  ):
    files.open_weights(tmp_path / "x.pth")


# F34: images.


def test_f34_images_run_no_programs(monkeypatch):
  """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
  import subprocess

  monkeypatch.setattr(
    subprocess, "check_call", lambda *args, **kwargs: pytest.fail("a program was run")
  )
  monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was run"))
  data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
  assert Image.open(io.BytesIO(data)).format == "EPS"
  with pytest.raises(
    DataError,
    match="photo.jpg: cannot be decoded: not an image that is read, it begins b'%!PS-Adobe",
  ):
    augment.decode_image(data, "photo.jpg")


@pytest.mark.filterwarnings("ignore:Image size")
def test_f34_a_kilobyte_is_no_huge_image(monkeypatch):
  picture = io.BytesIO()
  Image.new("L", (8, 8)).save(picture, "PNG")
  data = bytearray(picture.getvalue())
  data[16:24] = struct.pack(">II", 12_000, 12_000)  # 144 million pixels: fewer than MAX_PIXELS
  data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
  monkeypatch.setattr(augment, "_decode_opened", lambda *args: pytest.fail("decoded"))
  with pytest.raises(
    DataError, match=r"claims 12000 x 12000 pixels, at most 6\d0,000 of 6\d bytes are decoded"
  ):
    augment.decode_image(bytes(data), "x.png")


def test_f34_solid_colours_are_decoded():
  for mode, form, options in (
    ("1", "PNG", dict(optimize=True)),
    ("L", "PNG", dict(optimize=True)),
    ("P", "GIF", {}),
    ("RGB", "JPEG", {}),
  ):
    picture = io.BytesIO()
    Image.new(mode, (4000, 4000)).save(picture, form, **options)
    assert augment.decode_image(picture.getvalue(), "x").shape == (4000, 4000, 3), form


def test_f34_packed_shards_lie_in_their_folder(tmp_path, photos):
  root = tmp_path / "packed"
  write_packed({"train": open_source(photos, "train")}, root, {"source": "photos"})
  index = json.loads((root / "index.json").read_text())
  shard = index["splits"]["train"][0]
  shutil.copy(root / shard["file"], tmp_path / "outside")
  assert len(packed.PackedSource(str(root), "train")) == 2
  for key, values in {
    "file": ("../outside", str(tmp_path / "outside"), "a/b", "..", "", "x[0:9]", 3, None),
    "images": (-1, 0, 10**15, 1.0, "2"),
    "bytes": (-1, "9", None),
    "sha256": ("", 3, "../x"),
  }.items():
    for value in values:
      changed = copy.deepcopy(index)
      changed["splits"]["train"][0][key] = value
      (root / "index.json").write_text(json.dumps(changed))
      for read in (
        lambda: packed.PackedSource(str(root), "train"),
        lambda: packed.verify_packed(root),
        lambda: packed.count_packed(root),
      ):
        with pytest.raises(DataError, match="not a packed folder"):
          read()
  for text in (
    "[" * 100_000,
    "[]",
    "{}",
    json.dumps(index | {"splits": {"train": 3}}),
    json.dumps(index | {"splits": {"train": []}}),
    json.dumps(index | {"class_names": [1]}),
    json.dumps(index | {"options": 3}),
  ):
    (root / "index.json").write_text(text)
    with pytest.raises(DataError, match="not a packed folder"):
      packed.PackedSource(str(root), "train")


@pytest.mark.parametrize(
  "about",
  [
    b"",
    b"3",
    b"[]",
    b"{}",
    b'{"name": "x", "label": "x"}',
    b'{"name": "x", "label": 0, "shape": [9, 9, 3]}',
    b'{"name": "x", "label": 0, "shape": [2, 6]}',
    b'{"name": "x", "label": 0, "shape": [-1, 0, 3]}',
    b'{"name": "x", "label": 0, "shape": [12, 1]}',
    b"[" * 100_000,
  ],
)
def test_f34_packed_records_are_checked(tmp_path, photos, about):
  write_packed({"train": open_source(photos, "train")}, tmp_path / "packed", {"source": "photos"})
  source = packed.PackedSource(str(tmp_path / "packed"), "train")
  source._records = [about + b"\n" + bytes(12)]
  with pytest.raises(DataError, match="image 0 of 'train' cannot be read"):
    source[0]


# F35: teachers.


def features_file(path, **members):
  """Writes an .npz of features, with these bytes in the place of arrays of these names."""
  arrays = dict(features=np.eye(4, dtype=np.float32), labels=np.array([0, 1, 0, 1]))
  arrays |= dict(names=np.array(list("abcd")), class_names=np.array(["x", "y"]))
  with zipfile.ZipFile(path, "w", members.pop("method", zipfile.ZIP_STORED)) as archive:
    for name, array in (arrays | {"about": np.array("{}")} | members).items():
      content = io.BytesIO()
      if isinstance(array, bytes):
        content.write(array)
      else:
        np.save(content, array)
      archive.writestr(f"{name}.npy", content.getvalue())


def array_header(shape, kind="<f4"):
  content = io.BytesIO()
  header = {"descr": kind, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(content, header)
  return content.getvalue()


@pytest.mark.parametrize(
  "members, message",
  [
    ({}, ""),
    (dict(features=array_header((10**12, 3))), "its header claims float32 of shape"),
    (dict(features=array_header((10**18, 10**18))), "its header claims"),
    (dict(features=array_header((4, 3), "|O")), "its header claims object"),
    (dict(features=b""), "EOF"),
    (dict(features=b"\x93NUMPY\x01\x00\xff\xff"), "EOF"),
    (dict(features=array_header((2, 2))[:-40] + b"(" * 40), "EOF"),
    (dict(method=zipfile.ZIP_DEFLATED), "is compressed, or claims more"),
    (dict(labels=b"a text that is no array"), "magic string"),
    (dict(labels=np.array([0, 1, 0, 7])), "a label is 7, of 2 classes"),
    (dict(labels=np.array([0.5, 1, 0, 1])), "its columns have the types ffUU"),
    (dict(labels=np.array([], int)), "its columns have the types"),
    (dict(names=np.array(["a", "b"])), "its columns have the types"),
    (dict(class_names=np.array(3)), "its columns have the types"),
    (dict(about=np.array("[" * 10**5)), "recursion"),
    (dict(about=np.array("3")), "not iterable"),
  ],
)
def test_f34_files_of_features_are_checked(tmp_path, members, message):
  features_file(tmp_path / "x.npz", **members)
  if not message:
    assert knn.read_features(tmp_path / "x.npz")["class_names"] == ("x", "y")
    return
  with pytest.raises(UsageError, match=f"x.npz cannot be read as features .*{message}"):
    knn.read_features(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"x" * 100])
def test_f34_files_of_features_are_archives(tmp_path, content):
  (tmp_path / "x.npz").write_bytes(content)
  with pytest.raises(UsageError, match="cannot be read as features .*not a zip file"):
    knn.read_features(tmp_path / "x.npz")


@pytest.mark.parametrize(
  "change",
  ["[1]", {"processes": 10**9}, {"processes": "x"}, {"metrics": 3}, {"metrics": {"loss": [1]}}],
)
def test_f34_bundles_are_checked(tmp_path, change):
  record = {"step": 1, "reason": "x", "processes": 1, "metrics": {}, "identity": {}}
  text = change if isinstance(change, str) else json.dumps(record | {"state": "saved"} | change)
  (tmp_path / "bundle.json").write_text(text)
  (tmp_path / "config.json").write_text("{}")
  np.savez(tmp_path / "batch_0.npz", image=np.zeros((2, 3)))
  with pytest.raises(UsageError, match="is not a bundle of a run"):
    replay.read_bundle(str(tmp_path))


@pytest.mark.parametrize(
  "statistics",
  [
    {"image_mean": [float("nan")] * 3},
    {"image_std": [float("nan")] * 3},
    {"image_std": [float("inf")] * 3},
    {"image_std": [0.0, 0.2, 0.2]},
    {"image_std": [-0.2, 0.2, 0.2]},
    {"image_mean": [123.7, 116.3, 103.5]},
    {"image_std": [58.4, 57.1, 57.4]},
    {"image_mean": None},
    {"image_mean": "abc"},
    {"image_mean": [0.5, 0.5]},
    {"image_mean": [True, 0, 0]},
    {"image_mean": 0.5},
    {"image_std": [[0.2]] * 3},
  ],
)
def test_f35_wrong_preprocessing(tmp_path, statistics):
  refused(
    folder_with(tmp_path, preprocessor_config=statistics),
    "preprocessor_config.json: image_mean .* must hold 3 numbers each",
  )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_f35_weights_that_are_no_numbers(tmp_path, value):
  folder = folder_with(tmp_path)
  tensors = load_file(folder / "model.safetensors")
  tensors["layernorm.weight"][3] = value
  (folder / "model.safetensors").write_bytes(save(tensors))
  refused(folder, "non-finite values in layernorm.weight")


def test_f35_files_of_two_models(tmp_path):
  """Swapped weights are named as what they are, with what was expected."""
  for weights, config, message in (
    (CLIP, DINO, "looks like CLIP .*its config.json says vit, which is DINO"),
    (DINO, CLIP, "looks like DINO .*its config.json says clip, which is CLIP"),
  ):
    folder = folder_with(tmp_path / weights.name, config)
    shutil.copy(weights / "model.safetensors", folder)
    refused(folder, message)


@pytest.mark.parametrize(
  "content",
  [
    "{",
    "[]",
    "{}",
    '{"encoder": 3, "data": 3}',
    '{"encoder": {"name": "swin"}, "data": {}}',
    "[" * 100_000,
  ],
)
def test_f35_a_run_that_is_none(tmp_path, content):
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  (tmp_path / "config.json").write_text(content)
  refused(
    f"checkpoint:{tmp_path}",
    "teacher.path=checkpoint:.*"
    "(config.json there is not that of a run|holds no run|cannot be read)",
  )


# Fuzzing.


def test_the_fuzzer_finds(tmp_path):
  """Each kind of finding has its message and its number, and its input is stored."""
  make, numbers = fuzz.itself(), {}
  for number in range(100, 1000):
    numbers.setdefault(fuzz.make_case(make, number).files["kind"].decode(), number)
  first = [
    number
    for number in range(1000, 3000)
    if fuzz.make_case(make, number).files["kind"] in (b"result", b"refused")
  ][: fuzz.WARM_UP]
  order = [*first, *(numbers[kind] for kind in ("raises", "two lines", "dies", "is slow", "hangs"))]
  outcome = fuzz.run("itself", order, tmp_path, hang_s=10)
  reasons = {
    kind: outcome.findings.pop(numbers[kind])
    for kind in ("raises", "two lines", "dies", "is slow", "hangs")
  }
  assert (
    not outcome.findings
    and outcome.results + outcome.refused == len(first)
    and min(outcome.results, outcome.refused) > 20
  )
  assert (
    "KeyError: 'raises'" in reasons["raises"]
    and "several lines" in reasons["two lines"]
    and "died with -6" in reasons["dies"]
  )
  assert "s of computing" in reasons["is slow"] and "no answer for 10 s" in reasons["hangs"]
  assert (tmp_path / f"itself-{numbers['dies']}" / "kind").read_bytes() == b"dies"
  outcome = fuzz.run("itself", [*first, numbers["takes memory"]], tmp_path)
  assert (
    "memory has grown by" in outcome.findings[numbers["takes memory"]]
    and len(outcome.findings) == 1
  )


def assert_nothing_found(target, inputs):
  outcome = fuzz.run(target, fuzz.numbers_of(target, inputs, seed=0))
  assert not outcome.findings, "\n".join(
    f"{target}:{number}: {what[-500:]}" for number, what in outcome.findings.items()
  )
  assert outcome.results >= int(inputs * fuzz.SHARES[target] / 40) > 0 and outcome.refused


@pytest.mark.parametrize("target", fuzz.SHARES)
def test_f34_damaged_inputs(target):
  inputs = {"images": 200, "weights": 250, "configs": 800}  # of few configurations comes a result
  assert_nothing_found(target, inputs.get(target, 400))


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.SHARES)
def test_f34_twenty_thousand_damaged_inputs(target):
  assert_nothing_found(target, 20_000)
