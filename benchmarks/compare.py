"""Compares two or more ways to do the same training step, in alternation in one run.

  python -m benchmarks.compare --pair=visible --config=convmae:base --config.batch_size=8

The outputs of the ways must agree first, or there is no ratio. --pair is one of
  visible       convolutional stages on the visible blocks, and dense
  views         four complementary masks for an image and one, per mask; the losses differ, because
                the masks do
  remat         all activations kept; norms and activations computed again; whole blocks computed
                again
  transformers  MAE here (--config=mae:base), and ViTMAEForPreTraining of transformers in PyTorch
                (needs torch)
  reference     ConvMAE here (--config=convmae:base), and the original code at
                --reference=/path/to/ConvMAE (needs torch), as it is and strengthened:
                channels-last, AdamW fused
  upernet       segmentation here (--config=segment:convmae_base), and benchmarks/torch_upernet.py
                (needs torch), with 150 classes; memory is what a step takes beside weights and
                moments
  mask_rcnn     detection here (--config=detect_demo, from random weights), and
                benchmarks/torch_mask_rcnn.py (needs torch and torchvision), as it is and
                strengthened: channels-last, AdamW fused. Both draw the same anchors and proposals
                in every step. With `data.max_boxes` objects an image has as many to train as
                `rcnn` allows; of fewer, torchvision's step is shorter, and ours, whose shapes are
                static, is not
Random images, AdamW on both sides; --compile adds PyTorch's strongest way by torch.compile. PyTorch
runs on the GPU where it finds one, in the same precision by autocast.
"""

import ctypes
import functools
import json
import math
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.command import make_parser, run_command
from mrmae_jax import detection, mrmae
from mrmae_jax.cli import bench
from mrmae_jax.cli.configs import load_config
from mrmae_jax.data.detection import crop_mask
from mrmae_jax.errors import UsageError
from mrmae_jax.models.mask_rcnn import make_mask_rcnn
from mrmae_jax.weights import detectron2, files, readers
from mrmae_jax.weights.table import export

# Of the first loss, relative: PyTorch and XLA sum in other orders.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
CLASSES = 150  # of ADE20K


class _Way(NamedTuple):
  """One way to do the step.

  Attributes:
    run: does so many steps and returns the loss of the last one.
    images: that count for its speed.
    memory: bytes that it takes; None if unknown.
  """

  run: Callable[[int], float]
  images: int
  memory: float | None = None


def _jax_way(step: bench.Step, images: int, memory: float | None = None) -> _Way:
  return _Way(lambda steps: float(step.run(steps)["loss"]), images, memory)


def _ours(config, key: str, values: dict[str, Any]) -> dict[str, _Way]:
  """Returns a way for each of `values`, {name of the way: value of a key of the configuration}."""
  section, name = key.split(".")
  if name not in config[section]:
    raise UsageError(f"config.{section} has no {name}: this pair is for another kind of model")
  ways = {}
  for title, value in values.items():
    config = config.copy_and_resolve_references()
    config[section][name] = value
    step, masks = bench.make_step(config), config.method.complementary_masks
    memory = step.program.memory_analysis()
    ways[title] = _jax_way(
      step,
      config.batch_size * masks,
      memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    )
  return ways


def _visible(options):
  return _ours(options.config, "encoder.sparse", {"visible blocks": True, "dense": False}), True


def _views(options):
  values = {"4 masks an image": 4, "1 mask an image": 1}
  return _ours(options.config, "method.complementary_masks", values), False


def _remat(options):
  values = {f"remat={value}": value for value in ("none", "dots", "full")}
  return _ours(options.config, "encoder.remat", values), True


def _torch_ways(name: str, model, call, is_strengthened: bool, options) -> dict[str, _Way]:
  """Returns the step of a torch model, whose loss is `call(model)`.

  If it is strengthened, AdamW is fused, and the step is there a second time, compiled, where the
  options say so.
  """
  import torch  # an extra

  device = "cuda" if torch.cuda.is_available() else "cpu"
  # The rate does not change the time. This one leaves the weights as they are: steps are done
  # before the losses are compared, and 1e-6 has moved a loss at 512 pixels by 3e-4.
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-9, betas=(0.9, 0.95), weight_decay=0.05, fused=is_strengthened
  )

  def run(forward, steps):
    for _ in range(steps):
      with torch.autocast(device, torch.bfloat16, enabled=options.config.dtype == "bfloat16"):
        loss = call(forward)
      loss.backward()
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
    return loss.item()

  forwards = {name: model}
  if options.compile and is_strengthened:
    forwards[f"{name}, compiled"] = torch.compile(model)
  return {
    title: _Way(functools.partial(run, forward), options.config.batch_size)
    for title, forward in forwards.items()
  }


def _against_torch(options, model, names: dict[str, bool], write, call):
  """Returns our step with the weights of a torch model, and the model as it is and strengthened.

  Args:
    options: of the command line.
    model: () -> the torch model, the same each time.
    names: of the ways to run it, each with whether it is strengthened.
    write: (model, folder) -> path that `readers.read_model` understands.
    call: (model, images [B, 3, H, W] normalized, noise [B, N]) -> loss, both torch tensors.
  """
  import torch  # an extra

  config, rng = options.config, np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    student = readers.read_model(write(model(), Path(folder)), dtype=config.dtype)
  network = mrmae.Model(student.encoder, student.decoder, (), config.data.mean, config.data.std)
  channels = len(config.data.mean)
  images = rng.integers(0, 256, (config.batch_size, *config.image_size, channels), np.uint8)
  tokens = math.prod(side // student.encoder.patch_size for side in config.image_size)
  noise = rng.random((config.batch_size, tokens), np.float32)
  params = {name: student.params[name] for name in ("encoder", "decoder")}
  ways = {"ours": _our_way(config, network, params, images, noise)}

  device = "cuda" if torch.cuda.is_available() else "cpu"
  mean, std = np.float32(config.data.mean), np.float32(config.data.std)
  pixels = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
  for name, is_strengthened in names.items():
    layout = torch.channels_last if is_strengthened else torch.contiguous_format
    inputs = torch.from_numpy(pixels.copy()).to(device).contiguous(memory_format=layout)
    ways |= _torch_ways(
      name,
      model().to(device).to(memory_format=layout).train(),
      lambda m, x=inputs: call(m, x, torch.from_numpy(noise).to(device)),
      is_strengthened,
      options,
    )
  return ways, True


def _our_way(config, network: mrmae.Model, params, images, noise) -> _Way:
  """Returns our step from given weights, with the same images and masks in every step."""

  def loss(params, extra, frozen, batch, keys):
    del frozen, keys
    # A constant, whose order XLA would compute for seconds before the first step.
    draws = jax.lax.optimization_barrier(jnp.asarray(noise))
    value, terms = mrmae.pretrain_loss(
      params, batch["image"], draws, network, {}, mask_ratio=config.method.mask_ratio
    )
    return value, (terms, extra)

  task = bench.make_task(config)._replace(
    init=lambda key: (jax.tree.map(jnp.asarray, params), ()),
    loss=loss,
    frozen={},
    pretrained=flax.traverse_util.flatten_dict(params, sep="/"),
  )
  step = bench.make_step(config, task, {"image": images})
  return _jax_way(step, config.batch_size)


def _transformers(options):
  try:
    import torch  # an extra
    from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining
  except ImportError as error:
    raise UsageError(f"--pair=transformers: {error}; it needs torch and transformers") from None
  fields, decoder = options.config.encoder, options.config.decoder
  if fields.name != "vit" or len(set(options.config.image_size)) > 1:
    raise UsageError("--pair=transformers is for MAE on square images: --config=mae:base")
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

  call = lambda m, images, noise: m(images, noise=noise).loss
  return _against_torch(options, model, {"transformers": True}, write, call)


def _reference(options):
  root = Path(options.reference).expanduser()
  if not options.reference or not (root / "models_convmae.py").is_file():
    raise UsageError(
      f"--reference={options.reference} must be a checkout of Alpha-VL/ConvMAE, with "
      "models_convmae.py in it"
    )
  encoder, size = options.config.encoder, tuple(options.config.image_size)
  if encoder.name != "convvit" or size != (224, 224) or encoder.embed_dims[2] != 768:
    raise UsageError("--pair=reference: the original code has one size: --config=convmae:base")
  try:
    import torch  # an extra
  except ImportError:
    raise UsageError("--pair=reference needs torch") from None
  reference = _import_reference(root)
  draws = {}  # the noise that ours was given

  def model():
    torch.manual_seed(0)
    model = reference.convmae_convvit_base_patch16(norm_pix_loss=True)
    # torch.compile would trace the function below, and can not.
    model.random_masking = torch.compiler.disable(model.random_masking)
    return model

  def write(model, folder):
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    files.write_safetensors(folder / "reference.safetensors", tensors)
    return folder / "reference.safetensors"

  def call(model, images, noise):
    draws["noise"] = noise
    return model(images, 0.75)[0]

  # The original draws its masks itself; here it draws what ours was given.
  rand = torch.rand
  torch.rand = lambda *shape, **kwargs: (
    draws["noise"] if shape == tuple(draws["noise"].shape) else rand(*shape, **kwargs)
  )
  names = {"reference": False, "reference, strengthened": True}
  return _against_torch(options, model, names, write, call)


def _upernet(options):
  config, rng = options.config, np.random.default_rng(0)
  if config.task != "segment" or config.encoder.name != "convvit":
    raise UsageError("--pair=upernet is for UperNet on a ConvViT: --config=segment:convmae_base")
  try:
    import torch  # an extra

    from benchmarks.torch_upernet import Segmenter
  except ImportError:
    raise UsageError("--pair=upernet needs torch") from None
  config.encoder.drop_path = config.upernet.dropout = 0.0
  torch.manual_seed(0)
  model = Segmenter(config, CLASSES)
  shape = (config.batch_size, *config.image_size)
  # Of different brightness: BatchNorm divides pooled maps of one pixel by how images differ.
  images = rng.random((*shape, 3)) * np.linspace(64, 255, shape[0])[:, None, None, None]
  images = images.astype(np.uint8)
  labels = rng.integers(0, CLASSES, shape, np.uint8)
  with tempfile.TemporaryDirectory() as folder:
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    config.init_from = str(Path(folder) / "model.safetensors")
    files.write_safetensors(Path(config.init_from), tensors)
    config.data.source = f"scenes:{folder}"
    _write_scene(Path(folder))
    step = bench.make_step(config, batch={"image": images, "label": labels})
  pixels = (images / np.float32(255) - np.float32(config.data.mean)) / np.float32(config.data.std)
  inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).contiguous(
    memory_format=torch.channels_last
  )
  classes = torch.from_numpy(labels.astype(np.int64))
  ways = {"ours": _jax_way(step, config.batch_size)} | _torch_ways(
    "torch",
    model.to(memory_format=torch.channels_last).train(),
    lambda m: m(inputs, classes),
    True,
    options,
  )
  return {name: way._replace(memory=_step_memory(way.run)) for name, way in ways.items()}, True


def _mask_rcnn(options):
  config = options.config
  _check_mask_rcnn(config, options.compile)
  try:
    import torch  # an extra

    from benchmarks import torch_mask_rcnn
  except (ImportError, RuntimeError) as error:  # the second beside another version of torch
    raise UsageError(
      f"--pair=mask_rcnn: {error}; it needs torch==2.14.1 torchvision==0.29.1"
    ) from None
  grid = tuple(side // math.prod(config.encoder.patch_sizes) for side in config.image_size)
  config.init_from, config.rcnn.position_grid = "", grid
  config.encoder.update(drop_path=0.0, learned_positions=True)
  config.optim.blr = 1e-9  # as in `_torch_ways`
  task, rules = bench.make_task(config), detection.make_rules(config.rcnn)
  num_classes = len(task.source("train").class_names)
  batch, masks = _draw_objects(config, num_classes)
  keys = jax.random.split(jax.random.key(0), config.batch_size)
  noise = detection.draw_noise(keys, task.frozen, config.data.max_boxes, rules)
  # The best proposals are drawn first: rounding swaps the places of two that are equally good.
  noise = noise._replace(proposals=jnp.sort(noise.proposals))
  params = _perturb(task.init(jax.random.key(0))[0])
  with mock.patch.object(detection, "draw_noise", lambda *_: noise):
    step = bench.make_step(config, task._replace(init=lambda key: (params, {})), batch)
  ways = {"ours": _jax_way(step, config.batch_size)}

  network = make_mask_rcnn(config.encoder, config.rcnn, num_classes, jnp.float32)
  tensors = export(
    detectron2.split_variables({"params": params}), detectron2.detector_table(network)
  )
  mean, std = np.float32(config.data.mean), np.float32(config.data.std)
  pixels = (batch["image"] / np.float32(255) - mean) / std
  images, targets = torch_mask_rcnn.make_inputs(pixels, batch["boxes"], batch["classes"], masks)
  for name, is_strengthened in {"torchvision": False, "torchvision, strengthened": True}.items():
    model = torch_mask_rcnn.Detector(config, num_classes, noise)
    torch_mask_rcnn.load_weights(model, tensors)
    layout = torch.channels_last if is_strengthened else torch.contiguous_format
    ways |= _torch_ways(
      name,
      model.to(memory_format=layout).train(),
      lambda m, x=images.contiguous(memory_format=layout): m(x, targets),
      is_strengthened,
      options,
    )
  ours, theirs = (
    sum(math.prod(x.shape) for x in tree) for tree in (jax.tree.leaves(params), model.parameters())
  )
  print(f"parameters: {ours:,} here, {theirs:,} in torchvision", flush=True)
  return {name: way._replace(memory=_step_memory(way.run)) for name, way in ways.items()}, True


def _check_mask_rcnn(config, is_compiled: bool) -> None:
  """Raises UsageError unless benchmarks/torch_mask_rcnn.py has the network of a configuration."""
  heads = config.get("rcnn")
  plain = dict(window=0, distances="none", pyramid="simple", norm="ln", stages=1, masks=True)
  if (
    not heads
    or config.encoder.name != "convvit"
    or any(heads[name] != value for name, value in plain.items())
    or config.dtype != "float32"
    or is_compiled
  ):
    raise UsageError(
      "--pair=mask_rcnn is for Mask R-CNN on a ConvViT without windows and distances, in float32 "
      "and without --compile: --config=detect_demo"
    )


def _perturb(params):
  """Returns parameters with every bias and gain away from its start."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), params)


def _draw_objects(config, num_classes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns a batch of noise with ellipses as objects, and their masks, uint8 [B, M, H, W]."""
  rng, sides = np.random.default_rng(0), np.array(config.image_size[::-1])
  shape = (config.batch_size, config.data.max_boxes)
  image = (shape[0], *config.image_size, len(config.data.mean))
  size = rng.integers(sides // 10, sides // 2, (*shape, 2))
  corner = rng.integers(0, sides - size)
  boxes = np.concatenate([corner, corner + size], axis=-1).astype(np.float32)
  x, y = (
    (np.arange(side) + 0.5 - corner[..., axis, None]) / size[..., axis, None] * 2 - 1
    for axis, side in enumerate(sides)
  )
  masks = y[..., :, None] ** 2 + x[..., None, :] ** 2 <= 1
  crops = [[crop_mask(mask, box) for mask, box in zip(*pairs)] for pairs in zip(masks, boxes)]
  return {
    "image": rng.integers(0, 256, image, np.uint8),
    "size": np.full((shape[0], 2), config.image_size, np.int32),
    "boxes": boxes,
    "classes": rng.integers(0, num_classes, shape, np.int32),
    "masks": np.array(crops),
  }, masks.astype(np.uint8)


def _write_scene(folder: Path) -> None:
  """Writes a scene and the names of CLASSES classes: a task asks for them, the step does not."""
  (folder / "classes.txt").write_text("\n".join(map(str, range(CLASSES))))
  for kind, suffix in (("images", "jpg"), ("annotations", "png")):
    for split in ("training", "validation"):
      path = folder / kind / split / f"scene.{suffix}"
      path.parent.mkdir(parents=True)
      Image.fromarray(np.ones((8, 8), np.uint8)).save(path)


def _step_memory(run: Callable[[int], float]) -> float | None:
  """Returns by how many bytes the process grows during a second step; None outside Linux."""
  status = Path("/proc/self/status")
  if not status.is_file():
    return None
  kib = lambda name: next(
    int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)
  )
  run(1)
  ctypes.CDLL(None).malloc_trim(0)  # what the other way has left
  Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is in use
  before = kib("VmRSS")
  run(1)
  return 1024.0 * (kib("VmHWM") - before)


def _import_reference(root: Path):
  """Imports the original models_convmae.py.

  It imports timm 0.3.2 and an old numpy, and uses next to nothing of them: stand-ins suffice.
  """
  import torch  # an extra

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


PAIRS = {
  "visible": _visible,
  "views": _views,
  "remat": _remat,
  "transformers": _transformers,
  "reference": _reference,
  "upernet": _upernet,
  "mask_rcnn": _mask_rcnn,
}


def run(options) -> str:
  """Measures the ways of a pair, and returns the table.

  Raises:
    UsageError: options that do not fit, or ways whose losses do not agree.
  """
  options.config = load_config(options.config, options.overrides)
  config, machine = options.config, bench.describe_machine()
  print(json.dumps(machine), flush=True)
  ways, should_agree = PAIRS[options.pair](options)
  losses = {}
  for name, way in ways.items():
    start = time.perf_counter()
    losses[name] = way.run(1)
    print(f"{name}: first step after {time.perf_counter() - start:.0f} s", flush=True)
  first, *_ = losses.values()
  worst = float(np.max([abs(loss / first - 1) for loss in losses.values()]))  # nan if one is
  if should_agree and not worst <= TOLERANCE[config.dtype]:
    raise UsageError(
      f"the ways do not agree, so there is no ratio: losses of the first step {losses}"
    )
  seconds = bench.alternate({name: way.run for name, way in ways.items()}, options.rounds)
  result = {"machine": machine, "losses": losses, "seconds": seconds}
  bench.write_json(options.json, result | {"batch_size": config.batch_size, "dtype": config.dtype})
  agreement = (
    f"losses of the first step agree to {worst:.1e}"
    if should_agree
    else "losses belong to different masks"
  )
  return f"batch {config.batch_size}, {config.dtype}; {agreement}\n{_describe(ways, seconds)}"


def _describe(ways: dict[str, _Way], seconds: dict[str, list[float]]) -> str:
  """Returns the table; ratios are those of one round."""
  base, *_ = ways
  rows = [["", "images/s", "s a step", f"speed of {base} over it", "memory, GiB"]]
  for name, way in ways.items():
    ratios = [
      (other / way.images) / (ours / ways[base].images)
      for ours, other in zip(seconds[base], seconds[name])
    ]
    rows.append(
      [
        name,
        f"{way.images / statistics.median(seconds[name]):,.2f}",
        bench.format_spread(seconds[name], 3),
        "" if name == base else bench.format_spread(ratios),
        f"{way.memory / 2**30:.2f}" if way.memory else "-",
      ]
    )
  return bench.format_table(rows)


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code."""
  parser = make_parser("compare", __doc__, "convmae")
  parser.add_argument("--pair", required=True, choices=PAIRS, help="what is compared")
  parser.add_argument("--reference", default="", help="a checkout of Alpha-VL/ConvMAE")
  parser.add_argument(
    "--compile", action="store_true", help="PyTorch's strongest way by torch.compile too"
  )
  return run_command(parser, run, argv)


if __name__ == "__main__":
  sys.exit(main())
