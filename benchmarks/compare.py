"""Two or more ways to do the same training step, in alternation in one run; outputs first have to agree, or there is no ratio.

  mrmae bench compare --pair=visible --config=configs/convmae.py:base --config.batch_size=8

--pair is one of
  visible       convolutional stages on the visible blocks, and dense.
  views         four complementary masks for an image and one, per mask. (Losses differ: these are other masks.)
  remat         all activations kept; norms and activations computed again; whole blocks computed again.
  transformers  MAE here (--config=configs/mae.py:base), and ViTMAEForPreTraining of transformers in PyTorch (needs torch).
  reference     ConvMAE here (--config=configs/convmae.py:base), and the original code at --reference=/path/to/ConvMAE (needs
                torch), as it is and strengthened: channels-last, AdamW fused.
Random images, AdamW on both sides; --compile adds torch.compile to PyTorch's. PyTorch runs on the GPU where it sees one, in the
same precision by autocast.
"""

import json
import math
import statistics
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from mrmae_jax.cli import bench
from mrmae_jax.errors import UsageError

PAIRS = ("visible", "views", "remat", "transformers", "reference")
TOLERANCE = {
  "float32": 1e-4,
  "bfloat16": 2e-2,
}  # of the first loss, relative; PyTorch's and XLA's sums have other orders


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_enum("pair", None, PAIRS, "What is compared.", flag_values=own)
  config_flags.DEFINE_config_file(
    "config", "configs/convmae.py", "Configuration file.", flag_values=own
  )
  flags.DEFINE_integer("rounds", 7, "How often each is timed.", lower_bound=1, flag_values=own)
  flags.DEFINE_string("reference", "", "A checkout of Alpha-VL/ConvMAE.", flag_values=own)
  flags.DEFINE_bool("compile", False, "PyTorch's side with torch.compile.", flag_values=own)
  flags.DEFINE_string("json", "", "A .json file for the figures.", flag_values=own)
  return own


class _Way:
  """One way to do the step: `run` does one and returns its loss; `images` count for its speed; what memory it takes, if known."""

  def __init__(self, run, images: int, memory: float | None = None):
    self.run, self.images, self.memory = run, images, memory


def _ours(config, key: str, values: dict[str, Any]) -> dict[str, _Way]:
  """A way for each value, by name, of one key of the configuration."""
  section, name = key.split(".")
  if name not in config[section]:
    raise UsageError(f"config.{section} has no {name}: this pair is about another kind of model")
  ways = {}
  for title, value in values.items():
    config = config.copy_and_resolve_references()
    config[section][name] = value
    step, masks = bench.make_step(config), config.method.complementary_masks
    memory = step.program.memory_analysis()
    ways[title] = _Way(
      lambda step=step: float(step.run()["loss"]),
      config.batch_size * masks,
      memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    )
  return ways


def _visible(options):
  return _ours(options.config, "encoder.sparse", {"visible blocks": True, "dense": False}), True


def _views(options):
  return _ours(
    options.config, "method.complementary_masks", {"4 masks an image": 4, "1 mask an image": 1}
  ), False


def _remat(options):
  return _ours(
    options.config, "encoder.remat", {f"remat={kept}": kept for kept in ("none", "dots", "full")}
  ), True


def _torch_way(model, call, fused: bool, options) -> _Way:
  """A step of a torch model: `call(model)` gives its loss; AdamW may be fused."""
  import torch  # the peers alone need it

  device = "cuda" if torch.cuda.is_available() else "cpu"
  # The rate of ours in its first steps is of no consequence for time; a small one keeps both trajectories alike.
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, fused=fused
  )
  forward = torch.compile(model) if options.compile else model

  def run():
    with torch.autocast(device, torch.bfloat16, enabled=options.config.dtype == "bfloat16"):
      loss = call(forward)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return _Way(run, options.config.batch_size)


def _against_torch(options, model, names: dict[str, bool], write, call):
  """Ours with the weights of a torch model, and the model as it is and strengthened.

  Args:
    model: () -> the torch model, the same each time.
    names: of the ways to run it, each with whether it is strengthened.
    write: (model, folder) -> path that `model_files.read` understands.
    call: (model, images [B, 3, H, W] normalised, noise [B, N]) -> loss, both torch tensors.
  """
  import jax
  import jax.numpy as jnp
  import torch

  from mrmae_jax import mrmae, train
  from mrmae_jax.weights import model_files

  config, rng = options.config, np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    student = model_files.read_model(write(model(), Path(folder)), dtype=config.dtype)
  network = mrmae.Model(student.encoder, student.decoder, (), config.data.mean, config.data.std)
  images = rng.integers(
    0, 256, (config.batch_size, *config.image_size, len(config.data.mean)), np.uint8
  )
  tokens = math.prod(side // student.encoder.patch_size for side in config.image_size)
  noise = rng.random((config.batch_size, tokens), np.float32)

  def loss(params, frozen, batch, keys):  # the same masks in every step, on both sides
    del frozen, keys
    return mrmae.pretrain_loss(
      params, batch["image"], jnp.asarray(noise), network, {}, mask_ratio=config.method.mask_ratio
    )

  flat = {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      {name: student.params[name] for name in ("encoder", "decoder")}
    )
  }
  init = lambda key: jax.tree.map(
    jnp.asarray, {name: student.params[name] for name in ("encoder", "decoder")}
  )
  step = bench.make_step(config, train.Task(init, loss, None, {}, {}, (), flat), {"image": images})
  ways = {"ours": _Way(lambda: float(step.run()["loss"]), config.batch_size)}

  device = "cuda" if torch.cuda.is_available() else "cpu"
  pixels = (images.astype(np.float32) / 255 - np.float32(config.data.mean)) / np.float32(
    config.data.std
  )
  for name, strong in names.items():
    layout = torch.channels_last if strong else torch.contiguous_format
    inputs = (
      torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
      .to(device)
      .contiguous(memory_format=layout)
    )
    ways[name] = _torch_way(
      model().to(device).to(memory_format=layout).train(),
      lambda m, x=inputs: call(m, x, torch.from_numpy(noise).to(device)),
      strong,
      options,
    )
  return ways, True


def _transformers(options):
  try:
    import torch
    from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining
  except ImportError as error:
    raise UsageError(f"--pair=transformers: {error}; it needs torch and transformers") from None
  fields, decoder = options.config.encoder, options.config.decoder
  if fields.name != "vit" or len(set(options.config.image_size)) > 1:
    raise UsageError(
      "--pair=transformers is about MAE on square images: --config=configs/mae.py:base"
    )
  config = ViTMAEConfig(
    hidden_size=fields.dim,
    num_hidden_layers=fields.depth,
    num_attention_heads=fields.num_heads,
    intermediate_size=fields.mlp_dim,
    image_size=options.config.image_size[0],
    patch_size=fields.patch_size,
    decoder_hidden_size=decoder.dim,
    decoder_num_hidden_layers=decoder.depth,
    decoder_num_attention_heads=decoder.num_heads,
    decoder_intermediate_size=4 * decoder.dim,
    mask_ratio=options.config.method.mask_ratio,
    norm_pix_loss=True,
    layer_norm_eps=1e-6,
  )

  def model():
    torch.manual_seed(0)
    return ViTMAEForPreTraining(config)

  def write(model, folder):
    model.save_pretrained(folder)
    return folder

  name = "transformers, compiled" if options.compile else "transformers"
  return _against_torch(
    options, model, {name: True}, write, lambda m, images, noise: m(images, noise=noise).loss
  )


def _reference(options):
  root = Path(options.reference).expanduser()
  if not options.reference or not (root / "models_convmae.py").is_file():
    raise UsageError(
      f"--reference={options.reference} must be a checkout of Alpha-VL/ConvMAE, with models_convmae.py in it"
    )
  if (options.config.encoder.name, *options.config.image_size) != (
    "convvit",
    224,
    224,
  ) or options.config.encoder.embed_dims[2] != 768:
    raise UsageError(
      "--pair=reference: the original code has one size: --config=configs/convmae.py:base"
    )
  try:
    import torch
  except ImportError:
    raise UsageError("--pair=reference needs torch") from None
  from mrmae_jax.weights import files

  reference = _import_reference(root)
  drawn = {}

  def model():
    torch.manual_seed(0)
    return reference.convmae_convvit_base_patch16(norm_pix_loss=True)

  def write(model, folder):
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    files.write_safetensors(folder / "reference.safetensors", tensors)
    return folder / "reference.safetensors"

  def call(model, images, noise):
    drawn["noise"] = noise  # the original draws by itself; here it is given what the other side has
    return model(images, 0.75)[0]

  rand = torch.rand
  torch.rand = lambda *shape, **kwargs: (
    drawn["noise"] if shape == tuple(drawn["noise"].shape) else rand(*shape, **kwargs)
  )
  how = ", compiled" if options.compile else ""
  return _against_torch(
    options, model, {f"reference{how}": False, f"reference, strengthened{how}": True}, write, call
  )


def _import_reference(root: Path):
  """The original models_convmae.py. It asks for timm 0.3.2 and an old numpy, of which it uses next to nothing."""
  import torch

  stand_ins = {
    "timm": {},
    "timm.models": {},
    "timm.data": dict(IMAGENET_DEFAULT_MEAN=None, IMAGENET_DEFAULT_STD=None),
    "timm.models.helpers": dict(load_pretrained=None),
    "timm.models.registry": dict(register_model=lambda make: make),
    "timm.models.resnet": dict(resnet26d=None, resnet50d=None),
    "timm.models.layers": dict(
      DropPath=torch.nn.Identity,
      to_2tuple=lambda x: (x, x),
      trunc_normal_=torch.nn.init.trunc_normal_,
    ),
  }
  for name, content in stand_ins.items():
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules.setdefault(name, module)
  if not hasattr(np, "float"):
    np.float = float
  sys.path.insert(0, str(root))
  try:
    import models_convmae
  finally:
    sys.path.remove(str(root))
  return models_convmae


def run(options) -> str:
  """The command with an attribute per flag; returns the table.

  Raises:
    UsageError: options that do not fit, or ways whose losses do not agree.
  """
  if options.pair is None:
    raise UsageError(f"--pair is missing: {', '.join(PAIRS)}")
  about = bench.machine()
  print(json.dumps(about), flush=True)
  ways, comparable = {
    "visible": _visible,
    "views": _views,
    "remat": _remat,
    "transformers": _transformers,
    "reference": _reference,
  }[options.pair](options)
  losses = {name: way.run() for name, way in ways.items()}
  first, *_ = losses.values()
  worst = float(
    np.max([abs(loss / first - 1) for loss in losses.values()])
  )  # nan if one of them is
  config = options.config
  if comparable and not worst <= TOLERANCE[config.dtype]:
    raise UsageError(
      f"the ways do not agree, so there is no ratio: losses of the first step {losses}"
    )
  seconds = bench.alternate({name: way.run for name, way in ways.items()}, options.rounds)
  base = list(ways)[0]
  rows = [["", "images/s", "s a step", f"speed of {base} over it", "memory, GiB"]]
  for name, way in ways.items():
    ratios = [
      (theirs / way.images) / (ours / ways[base].images)
      for ours, theirs in zip(seconds[base], seconds[name])
    ]
    rows.append(
      [
        name,
        f"{way.images / statistics.median(seconds[name]):,.2f}",
        bench.spread(seconds[name], 3),
        "" if name == base else bench.spread(ratios),
        f"{way.memory / 2**30:.2f}" if way.memory else "-",
      ]
    )
  bench.write_json(
    options.json,
    {
      "machine": about,
      "losses": losses,
      "seconds": seconds,
      "batch_size": config.batch_size,
      "dtype": config.dtype,
    },
  )
  agreed = (
    f"losses of the first step agree to {worst:.1e}"
    if comparable
    else "losses belong to different masks"
  )
  return f"batch {config.batch_size}, {config.dtype}; {agreed}\n{bench.table(rows)}"
