"""The end of `mrmae teacher`: what the run has trained becomes a folder of Hugging Face's ViT.

`config.teacher.path` and transformers' `ViTModel` read the folder.
"""

import json
from pathlib import Path

import jax
import numpy as np

from mrmae_jax import mrmae, teachers, train
from mrmae_jax.errors import UsageError
from mrmae_jax.models import ViT, make_encoder
from mrmae_jax.runs.paths import atomic_folder
from mrmae_jax.tasks import self_distill
from mrmae_jax.weights import families, files, table, writers

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def run_teacher(config, task: train.Task, workdir: str | Path, out: str | None = None) -> str:
  """Trains a teacher, or resumes its training, and writes its folder.

  Args:
    config: validated configuration of the task "self_distill".
    task: its task.
    workdir: folder of the run.
    out: folder for the teacher; None: WORKDIR/teacher.

  Returns:
    What to say at the end.

  Raises:
    UsageError: the teacher cannot be written to `out`.
    Others: those of `train.fit`.
  """
  folder = find_folder(out, workdir)  # before hours of training
  state = train.fit(config, task, workdir)
  params = self_distill.center_tokens(config, task, state)
  if jax.process_index() == 0:
    write_folder(folder, make_encoder(config.encoder, np.float32), params, config)
  return f"teacher: {folder}"


def find_folder(out: str | None, workdir: str | Path) -> Path:
  """Returns the folder for a teacher.

  Raises:
    UsageError: it would be in a bucket, it is a file, or it holds files of something else.
  """
  if "://" in (out or str(workdir)):
    given = f"--out={out}" if out else f"--out is missing and --workdir={workdir}"
    raise UsageError(f"{given} is in a bucket; give --out=FOLDER, a folder on this machine")
  folder = Path(out or Path(workdir) / "teacher").expanduser().resolve()
  if folder.is_file():
    raise UsageError(f"--out={folder} is a file; give a folder")
  others = sorted({path.name for path in folder.glob("*")} - set(FILES))
  if others:
    raise UsageError(
      f"--out={folder} holds {', '.join(others[:3])}{', ...' if others[3:] else ''}, and would be "
      "replaced; give a new folder"
    )
  return folder


def write_folder(folder: Path, encoder: ViT, params, config) -> None:
  """Writes the folder of a teacher, whole or not at all, in the place of an earlier one.

  It reads the folder back before that: `teachers.load` is strict, and the features must be those
  of `params`.

  Args:
    folder: see `find_folder`.
    encoder: computes in float32.
    params: of the encoder, host arrays.
    config: of the run.
  """
  with atomic_folder(folder, replace=True) as tmp:
    for name, content in zip(FILES, describe(encoder, config)):
      (tmp / name).write_text(json.dumps(content, indent=2) + "\n")
    tensors = table.export(params, families.name_table(families.MODEL_TYPES["vit"], "", encoder))
    files.write_safetensors(tmp / FILES[2], tensors)
    verify_folder(tmp, encoder, params, config)


def describe(encoder: ViT, config) -> tuple[dict, dict]:
  """Returns the contents of config.json and preprocessor_config.json."""
  height, width = config.image_size
  model = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": encoder.dim,
    "num_hidden_layers": encoder.depth,
    "num_attention_heads": encoder.num_heads,
    "intermediate_size": encoder.mlp_dim,
    "hidden_act": encoder.activation,
    "layer_norm_eps": encoder.eps,
    "image_size": height if height == width else [height, width],
    "patch_size": encoder.patch_size,
    "num_channels": 3,
    "qkv_bias": True,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
  }
  preprocessor = writers.hf_preprocessor((height, width), config.data.mean, config.data.std)
  return model, preprocessor


def verify_folder(folder: Path, encoder: ViT, params, config) -> None:
  """Compares the features that `teachers` reads from a folder with those of `params`.

  Raises:
    AssertionError: they differ.
  """
  size = tuple(config.image_size)
  spec = teachers.read_spec(
    teachers.TeacherOptions(path=str(folder), dtype="float32"),
    teachers.StudentImages(size, encoder.patch_size),
  )
  teacher = teachers.load(spec)
  images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  pixels = mrmae.normalize(images, config.data.mean, config.data.std)
  _, out = encoder.apply({"params": params}, pixels)
  np.testing.assert_allclose(
    teacher.forward(teacher.params, images).features, out["layers"][-1][:, 1:], rtol=1e-5, atol=1e-5
  )
