"""Trains a small teacher without labels, in the manner of DINO (Caron et al. 2021, arXiv 2104.14294) or by contrast.

  mrmae teacher --source=digits --out=configs/demo_teacher

is the command behind the bundled teacher; every other default is the one it was trained with. It takes about 6 minutes
on 2 CPU cores. For photographs, on an accelerator, start from
`--source=folder:/my/images --image_size=224 --patch_size=16 --width=384 --depth=12 --heads=6 --flip --scale_min=0.25
--prototypes=8192 --batch_size=256 --lr=5e-4 --momentum=0.996 --epochs=100` (near the paper's values; not tuned here).

A student and its moving average, the teacher, see two random views of an image. The student learns to predict the
teacher's output for the other view: with --objective=dino a distribution over prototypes; with --objective=contrast which image
of the batch it was (MoCo v3, Chen et al. 2021, arXiv 2104.02057, without its predictor). On CIFAR-10 an hour of one CPU core is
far too short for the first: k-NN after one epoch 0.36, after four 0.41; by contrast 0.42 after one. Departures from the paper, for minutes of training instead of days: the student sees
half of the patches of its view instead of extra small crops, the head sees the mean patch beside CLS and is normalised over
the batch, positions start from the sine-cosine table. At the end the tokens are centred: what all of them share, most of
their length and no information, is taken out of the last bias. What the teacher has learnt is written as a Hugging Face ViT
folder, which `mrmae_jax.teachers` and transformers' `ViTModel` read. Labels, where there are any, only serve to print the
held-out k-NN accuracy. The same seed gives the same weights on the same machine.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from mrmae_jax import data, optim, teachers
from mrmae_jax.cli import command_line
from mrmae_jax.data import augment
from mrmae_jax.errors import DataError, UsageError
from mrmae_jax.evals.knn import knn_classify
from mrmae_jax.models.layers import gelu, sincos_2d
from mrmae_jax.models.vit import ViT
from mrmae_jax.mrmae import normalize, sample_mask
from mrmae_jax.weights import families, files, table

MEAN = STD = (0.5, 0.5, 0.5)
YIQ = (
  (0.299, 0.587, 0.114),
  (0.5959, -0.2746, -0.3213),
  (0.2115, -0.5227, 0.3112),
)  # brightness and two axes of colour (NTSC)


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones: tests and other tools may live in the same process."""
  own = flags.FlagValues()
  text, whole, real = (
    lambda *args, define=define: define(*args, flag_values=own)
    for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
  )
  text(
    "source",
    "digits",
    "Images: digits, folder:/path or tfds:name; only the training split is trained on.",
  )
  text("data_dir", "", "Where tfds looks for prepared data sets.")
  whole(
    "holdout_every",
    5,
    "Without an evaluation split, every k-th image is held out of training; 0: none.",
  )
  text(
    "out", None, "Folder that receives config.json, preprocessor_config.json and model.safetensors."
  )
  whole("image_size", 32, "Side of the views in pixels.")
  whole("patch_size", 4, "Side of a patch in pixels.")
  whole("width", 64, "Width of the ViT.")
  whole("depth", 6, "Blocks of the ViT.")
  whole("heads", 4, "Attention heads of the ViT.")
  whole("prototypes", 512, "Outputs of the projection head, K in the paper.")
  real("epochs", 40, "Passes over the training split.")
  whole("batch_size", 64, "Images per step; each is seen twice.")
  real("lr", 2e-3, "Peak learning rate; warmed up over the first tenth, then a cosine to zero.")
  real("weight_decay", 0.04, "Of the matrices.")
  real("momentum", 0.98, "Of the teacher at the start; a cosine to 1.")
  real("teacher_temp", 0.04, "Temperature of the teacher; the student's is 0.1.")
  real(
    "visible",
    0.5,
    "Share of the patches that the student sees, a random choice; the teacher sees all.",
  )
  real("scale_min", 0.4, "Least area of a view relative to the image; the largest is 1.")
  flags.DEFINE_enum(
    "objective",
    "dino",
    ["dino", "contrast"],
    "What the student learns; see above.",
    flag_values=own,
  )
  real("contrast_temp", 0.2, "Temperature of the contrast.")
  real("jitter", 0.4, "Strength of the random brightness and contrast.")
  real(
    "colour",
    0.0,
    "Strength of the random saturation and hue; else views can be matched by their palette alone.",
  )
  flags.DEFINE_bool("flip", False, "Mirror half of the views.", flag_values=own)
  whole("seed", 0, "Of the weights, the order and the views.")
  whole("eval_every", 10, "Epochs between two k-NN evaluations.")
  return own


class State(NamedTuple):
  """What a step changes: two networks {"vit", "head"}, the centre [K] of the teacher's outputs, the optimiser's moments."""

  student: Any
  teacher: Any
  centre: jax.Array
  moments: Any


def init_head(key, width: int, prototypes: int | None, hidden: int = 256, bottleneck: int = 64):
  """Projection head without biases, normal(0.02); in appendix C of the paper the hidden width is 2048, the bottleneck 256."""
  sizes = {"fc1": (width, hidden), "fc2": (hidden, hidden), "fc3": (hidden, bottleneck)}
  if prototypes:
    sizes["prototypes"] = (bottleneck, prototypes)
  return {
    name: 0.02 * jax.random.normal(jax.random.fold_in(key, i), size)
    for i, (name, size) in enumerate(sizes.items())
  }


def project(head, x):
  """Section 3.1, "Network architecture": MLP, unit length, prototypes of unit length. [B, D] -> [B, K] cosines.

  Without prototypes, for the contrast, [B, 64] of unit length.

  The hidden layers are normalised over the batch (use_bn_in_head in the authors' code, off by default there): without it,
  the first trials on the digits ended in one uniform distribution for all images.
  """
  unit = lambda x, axis: x * jax.lax.rsqrt(jnp.sum(x**2, axis, keepdims=True) + 1e-12)
  standard = lambda x: (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
  x = gelu(standard(x @ head["fc1"]))
  x = gelu(standard(x @ head["fc2"])) @ head["fc3"]
  return unit(x, 1) @ unit(head["prototypes"], 0) if "prototypes" in head else unit(x, 1)


def dino_loss(student, teacher, centre, teacher_temp, student_temp=0.1):
  """Equation 3 and algorithm 1: cross-entropy between the teacher's and the student's distribution of *different* views.

  Args:
    student, teacher: [2, B, K] outputs for the two views.
    centre: [K]; subtracting it keeps one prototype from winning everywhere, the low temperature keeps all from being equal.

  Returns:
    The loss, and the teacher's mean output [K].
  """
  target = jax.nn.softmax((jax.lax.stop_gradient(teacher) - centre) / teacher_temp)
  log_p = jax.nn.log_softmax(student / student_temp)
  return -jnp.sum(target[::-1] * log_p, -1).mean(), teacher.mean((0, 1))


def contrast_loss(student, teacher, temperature: float):
  """InfoNCE: each student's view must be closest to the teacher's *other* view of the same image, among all of the batch.

  Args:
    student, teacher: [2, B, D] outputs of unit length for the two views.

  Returns:
    The mean cross-entropy, log B for outputs that tell nothing.
  """
  similarity = (
    jnp.einsum("vbd,vcd->vbc", student, jax.lax.stop_gradient(teacher)[::-1]) / temperature
  )
  return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(similarity), axis1=1, axis2=2))


def photometric(key, images, jitter: float, colour: float):
  """Brightness, contrast, colours, grey in a fifth, Gaussian blur in half of the views (section 3.2, without solarisation).

  Hue turns by up to `colour` * 90 degrees in the YIQ plane, saturation changes by a factor from 1 - `colour` to 1 + `colour`.

  Args:
    images: uint8 [B, S, S, 3].

  Returns:
    float32 [B, S, S, 3] in [0, 1].
  """
  draw = lambda i, low, high: jax.random.uniform(
    jax.random.fold_in(key, i), (len(images), 1, 1, 1), minval=low, maxval=high
  )
  x = images.astype(jnp.float32) / 255
  x = jnp.clip(x * draw(0, 1 - jitter, 1 + jitter), 0, 1)
  mean = x.mean((1, 2, 3), keepdims=True)
  x = jnp.clip(mean + (x - mean) * draw(1, 1 - jitter, 1 + jitter), 0, 1)
  if colour:
    y, i, q = jnp.split(x @ jnp.asarray(YIQ).T, 3, axis=-1)
    angle, gain = draw(5, -colour, colour) * jnp.pi / 2, draw(6, 1 - colour, 1 + colour)
    i, q = (
      gain * (jnp.cos(angle) * i - jnp.sin(angle) * q),
      gain * (jnp.sin(angle) * i + jnp.cos(angle) * q),
    )
    x = jnp.clip(jnp.concatenate([y, i, q], -1) @ jnp.linalg.inv(jnp.asarray(YIQ)).T, 0, 1)
  x = jnp.where(draw(2, 0, 1) < 0.2, x.mean(-1, keepdims=True), x)
  # The paper's sigma is 0.1 to 2 pixels of 224. A blur of every row is a matrix, and so is one of every column.
  side = jnp.arange(x.shape[1], dtype=jnp.float32)
  sigma = draw(3, 0.1, 2.0)[..., 0] * x.shape[1] / 224
  blur = jax.nn.softmax(-(((side[:, None] - side) / sigma) ** 2) / 2, axis=-1)
  return jnp.where(draw(4, 0, 1) < 0.5, jnp.einsum("bij,bjkc,blk->bilc", blur, x, blur), x)


def make_step(options, vit: ViT, total_steps: int):
  """The optimiser and step: (state, images uint8 [2, B, S, S, 3], step) -> (state, loss)."""
  schedule = optim.warmup_cosine(options.lr, 0.0, total_steps / 10, total_steps)
  optimiser = optax.chain(
    optax.clip_by_global_norm(3.0),
    optax.adamw(schedule, weight_decay=options.weight_decay, mask=optim.decay_mask),
  )

  def outputs(params, x, mask):
    x, _ = vit.apply(
      {"params": params["vit"]}, x, mask
    )  # the paper projects CLS alone; students here mimic the patches
    x = jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=1)
    return project(params["head"], x).reshape(2, len(x) // 2, -1)

  @jax.jit
  def train_step(state, images, step):
    view_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), step))
    x = normalize(
      photometric(view_key, images.reshape(-1, *images.shape[2:]), options.jitter, options.colour),
      MEAN,
      STD,
    )
    mask = None
    if (
      options.visible < 1
    ):  # a cheap local view, as in masked siamese networks (Assran et al. 2022, arXiv 2204.07141)
      patches = (options.image_size // options.patch_size) ** 2
      mask = sample_mask(jax.random.uniform(mask_key, (len(x), patches)), 1 - options.visible)
    target = outputs(state.teacher, x, None)

    def loss_of(student):
      if options.objective == "contrast":
        return contrast_loss(outputs(student, x, mask), target, options.contrast_temp), state.centre
      return dino_loss(outputs(student, x, mask), target, state.centre, options.teacher_temp)

    (loss, mean), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.student)
    # The last layer keeps still during the first epoch (facebookresearch/dino main_dino.py, freeze_last_layer).
    if "prototypes" in gradient["head"]:
      gradient["head"]["prototypes"] *= step >= total_steps / options.epochs
    update, moments = optimiser.update(gradient, state.moments, state.student)
    student = optax.apply_updates(state.student, update)
    momentum = 1 - (1 - options.momentum) * 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps))
    teacher = jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, state.teacher, student)
    return State(student, teacher, 0.9 * state.centre + 0.1 * mean, moments), loss  # equation 4

  return optimiser, train_step


def view_batches(source, options, steps_per_epoch: int, total_steps: int):
  """Yields uint8 [2, B, S, S, 3], two random crops of each image; the batch of a step depends on (seed, step) alone."""
  size, scale = (options.image_size,) * 2, (options.scale_min, 1.0)

  def views(index, step, row):
    image = augment.pixels(source[index], 3)
    rng = np.random.default_rng((options.seed, 1, step, row))
    crops = [augment.random_resized_crop(image, rng, size, scale) for _ in range(2)]
    return [augment.random_flip(crop, rng) if options.flip else crop for crop in crops]

  with ThreadPoolExecutor() as pool:
    for step in range(total_steps):
      epoch, i = divmod(step, steps_per_epoch)
      order = np.random.default_rng((options.seed, 0, epoch)).permutation(len(source))
      rows = order[i * options.batch_size : (i + 1) * options.batch_size].tolist()
      pairs = pool.map(views, rows, [step] * len(rows), range(len(rows)))
      yield np.stack(list(pairs), axis=1)


def knn_accuracy(
  features, params, train, held_out, size: int, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
  """Accuracy in [0, 1] on the held-out images of each of the features, (params, images) -> {name: [B, D]}."""

  def encode(source):
    batches = data.eval_batches(
      source, data.center_view((size, size), 1.0), batch_size=64, limit=50_000
    )
    rows = [
      {"label": b["label"], "valid": b["valid"], **features(params, b["image"])} for b in batches
    ]
    batches.close()
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    valid = columns.pop("valid")
    return {name: column[valid] for name, column in columns.items()}

  bank, queries = encode(train), encode(held_out)
  labels, expected = bank.pop("label"), queries.pop("label")
  classify = lambda name: knn_classify(
    queries[name], bank[name], labels, len(train.class_names), (k,), temperature
  )[k]
  return {name: float((classify(name) == expected).mean()) for name in bank}


def check(options) -> None:
  """Raises UsageError for what would fail later and less clearly."""
  o, size, patch = options, options.image_size, options.patch_size
  patches = (size // max(patch, 1)) ** 2
  positive = (
    "image_size",
    "patch_size",
    "width",
    "depth",
    "heads",
    "prototypes",
    "epochs",
    "lr",
    "teacher_temp",
    "contrast_temp",
    "eval_every",
  )
  for ok, message in (
    (o.out, "--out is missing; name the folder that receives the teacher, e.g. --out=/tmp/teacher"),
    (
      not o.out or not Path(o.out).expanduser().is_file(),
      f"--out={o.out} is a file; name a folder",
    ),
    *((getattr(o, name) > 0, f"--{name}={getattr(o, name)} must be positive") for name in positive),
    (size % max(patch, 1) == 0, f"--image_size={size} is not a multiple of --patch_size={patch}"),
    (
      o.width % max(o.heads, 1) == o.width % 4 == 0,
      f"--width={o.width} must be a multiple of 4 and of --heads={o.heads}",
    ),
    (o.batch_size >= 2, f"--batch_size={o.batch_size} must be at least 2"),
    (o.seed >= 0 and o.weight_decay >= 0, "--seed and --weight_decay must not be negative"),
    (0 < o.scale_min <= 1, f"--scale_min={o.scale_min} must lie in (0, 1]"),
    (
      all(0 <= x <= 1 for x in (o.jitter, o.colour, o.momentum)),
      "--jitter, --colour and --momentum must lie in [0, 1]",
    ),
    (
      1 <= patches * o.visible <= patches,
      f"--visible={o.visible} must lie in (0, 1] and leave one of {patches} patches",
    ),
  ):
    if not ok:
      raise UsageError(message)


def train(options):
  """Trains a teacher.

  Args:
    options: an attribute per flag.

  Returns:
    The module, its parameters, and the held-out k-NN accuracies {epoch: {"cls", "patch"}}.

  Raises:
    UsageError, DataError: options or images that do not fit, or a loss that is not finite.
  """
  check(options)
  splits = {"data_dir": options.data_dir, "holdout_every": options.holdout_every}
  source = data.open_source(options.source, "train", **splits)
  steps_per_epoch = len(source) // options.batch_size
  if not steps_per_epoch:
    raise UsageError(
      f"--batch_size={options.batch_size} is more than the {len(source)} training images"
    )
  total_steps = max(1, round(options.epochs * steps_per_epoch))

  vit = ViT(
    options.patch_size,
    options.width,
    options.depth,
    options.heads,
    4 * options.width,
    learned_positions=True,
  )
  vit_key, head_key = jax.random.split(jax.random.key(options.seed))
  params = vit.init(vit_key, jnp.zeros((1, options.image_size, options.image_size, 3)))["params"]
  grid = (options.image_size // options.patch_size,) * 2
  params["pos_embed"] = jnp.asarray(sincos_2d(options.width, grid, cls_token=True))[
    None
  ]  # small noise takes long to unlearn
  prototypes = options.prototypes if options.objective == "dino" else None
  network = {"vit": params, "head": init_head(head_key, 2 * options.width, prototypes)}
  optimiser, train_step = make_step(options, vit, total_steps)
  state = State(network, network, jnp.zeros(options.prototypes), optimiser.init(network))
  print(
    f"{source.description}; {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {total_steps} steps",
    flush=True,
  )

  held_out, history = None, {}
  try:
    held_out = data.open_source(options.source, "eval", **splits) if source.class_names else None
  except DataError as error:
    print(f"no k-NN accuracy: {error}", flush=True)

  @jax.jit
  def features(params, images):
    x, out = vit.apply({"params": params}, normalize(images, MEAN, STD))
    patches = out["layers"][-1][:, 1:]  # the residual stream of the patches is what students mimic
    return {"cls": x[:, 0], "patch": patches.mean(1)}

  def evaluate(epoch):
    if held_out:
      history[epoch] = knn_accuracy(
        features, state.teacher["vit"], source, held_out, options.image_size
      )
      tqdm.write(
        f"epoch {epoch:g}: held-out k-NN accuracy "
        + ", ".join(f"{k} {v:.1%}" for k, v in history[epoch].items())
      )

  evaluate(0)
  batches = view_batches(source, options, steps_per_epoch, total_steps)
  with tqdm(batches, total=total_steps, unit="step", mininterval=1) as progress:
    for step, images in enumerate(progress):
      state, loss = train_step(state, images, step)
      if step % 20 == 19 or step + 1 == total_steps:
        if not np.isfinite(loss):
          raise UsageError(f"the loss is {loss} at step {step}; try a lower --lr than {options.lr}")
        progress.set_postfix(loss=f"{loss:.3f}")
      if (step + 1) % (options.eval_every * steps_per_epoch) == 0 and step + 1 < total_steps:
        evaluate((step + 1) / steps_per_epoch)
  state = state._replace(
    teacher=state.teacher | {"vit": centred(vit, state.teacher["vit"], source, options.image_size)}
  )
  evaluate(options.epochs)
  return vit, state.teacher["vit"], history


def centred(vit: ViT, params, source, size: int):
  """`params` with the mean patch token of the last block's residual stream, over up to 4,096 images, moved to zero.

  A student that mimics tokens normalised one by one would otherwise learn this one vector and little else.
  """
  tokens = jax.jit(
    lambda images: vit.apply({"params": params}, normalize(images, MEAN, STD))[1]["layers"][-1][
      :, 1:
    ].mean(1)
  )
  batches = data.eval_batches(
    source, data.center_view((size, size), 1.0), batch_size=64, limit=4096
  )
  mean = np.concatenate([tokens(batch["image"])[batch["valid"]] for batch in batches]).mean(0)
  batches.close()
  last = f"blocks_{vit.depth - 1}"
  fc2 = params[last]["fc2"]
  return params | {last: params[last] | {"fc2": fc2 | {"bias": fc2["bias"] - mean}}}


def save(out: str, vit: ViT, params, image_size: int) -> None:
  """Writes the folder, and reads it back: `teachers.load` is strict, and its features must be those of `params`."""
  folder = Path(out).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  config = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": vit.dim,
    "num_hidden_layers": vit.depth,
    "num_attention_heads": vit.num_heads,
    "intermediate_size": vit.mlp_dim,
    "hidden_act": vit.activation,
    "layer_norm_eps": vit.eps,
    "image_size": image_size,
    "patch_size": vit.patch_size,
    "num_channels": 3,
    "qkv_bias": True,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
  }
  preprocessor = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,
    "size": {"height": image_size, "width": image_size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
  }
  for name, content in (("config", config), ("preprocessor_config", preprocessor)):
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
  tensors = table.export(params, families.name_table(families.MODEL_TYPES["vit"], "", vit))
  files.write_safetensors(folder / "model.safetensors", tensors)

  spec = teachers.read_spec(
    teachers.TeacherOptions(path=folder, dtype="float32"),
    teachers.StudentImages((image_size, image_size), vit.patch_size),
  )
  teacher = teachers.load(spec)
  images = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, 3), np.uint8)
  expected = vit.apply({"params": params}, normalize(images, MEAN, STD))[1]["layers"][-1][:, 1:]
  np.testing.assert_allclose(
    teacher.forward(teacher.params, images).features, expected, rtol=1e-5, atol=1e-5
  )


def make(options) -> str:
  """Trains and saves; returns what to say at the end."""
  options = SimpleNamespace(**options.flag_values_dict())
  vit, params, _ = train(options)
  save(options.out, vit, params, options.image_size)
  return f"wrote {options.out}: {(Path(options.out).expanduser() / 'model.safetensors').stat().st_size / 1e6:.2f} MB"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data."""
  return command_line(__doc__, define_flags(), make, argv)


if __name__ == "__main__":
  sys.exit(main())
