"""Writes a model as StableHLO, and calls it in a process without this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from mrmae_jax import pretrained
from mrmae_jax.cli.images import find_size
from mrmae_jax.errors import StorageError
from mrmae_jax.runs.paths import atomic_folder

CHECKED_IMAGES = 3
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest value; programs differ in rounding
CALL = '''\
"""Calls the exported model: `python call.py IMAGES.npy OUT.npz`. Needs jax, numpy, flatbuffers."""

import pathlib
import sys

import jax.export
import numpy as np

folder = pathlib.Path(__file__).parent
model = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
params = dict(np.load(folder / "params.npz"))
images = np.load(sys.argv[1])  # uint8 [B, height, width, channels], any B
outputs = jax.jit(model.call)(params, images)  # a dictionary of float32 arrays
np.savez(sys.argv[2], **outputs)
'''
README = """\
# {model}

{report}

`model.stablehlo` is a function of parameters and images, written by `jax.export` (jax {version})
for {platforms}. Newer versions of jax read it for at least six months. It needs no other code:
`pip install jax flatbuffers`, then, as in `call.py`,

```python
import jax.export
import numpy as np

model = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
params = dict(np.load("params.npz"))
outputs = jax.jit(model.call)(params, images)
```

`images` is uint8 [B, {height}, {width}, {channels}] with any B, not normalized: resize and crop to
this size, and leave the pixels in 0 to 255.

| output | float32 | |
|---|---|---|
{outputs}
{classes}
`model.mlir_module()` is the StableHLO text.
"""
MEANINGS = {
  "logits": "of the classifier; their softmax are probabilities",
  "tokens": "features of the patches, row by row",
  "pooled": "mean of `tokens`",
  "cls": "CLS token",
  "stage1": "map of the first convolutional stage",
  "stage2": "map of the second convolutional stage",
}


def run(options) -> str:
  """Carries out `mrmae export`.

  Raises:
    UsageError, WeightsError: options or a model that do not fit.
    StorageError: the exported model does not give the same numbers.
  """
  model = pretrained.load(
    options.model,
    num_heads=options.num_heads,
    weights=options.weights,
    decoder=False,
    dtype=options.dtype,
  )
  print(model.report, flush=True)
  size = find_size(options, model)
  has_logits = options.parts == "all" and "classifier" in model.network.params
  exported = model.export(size, has_logits)
  with atomic_folder(Path(options.out).expanduser()) as folder:
    (folder / "model.stablehlo").write_bytes(exported.serialize())
    np.savez(folder / "params.npz", **model.export_params(size))
    (folder / "call.py").write_text(CALL)
    (folder / "README.md").write_text(describe(options.model, model, size, exported))
    difference = check(folder, model, size, has_logits, options.dtype)
  kind = "classifier" if has_logits else "encoder"
  return (
    f"wrote {options.out}: {kind} for images uint8 [B, {size[0]}, {size[1]}, "
    f"{len(model.network.mean)}]; called in a process without this project, largest difference "
    f"{difference:.1e}"
  )


def describe(name: str, model, size: tuple[int, int], exported) -> str:
  """Returns the README.md of an exported model."""
  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  dims = lambda x: ", ".join(["B", *map(str, x.shape[1:])])
  rows = [f"| `{key}` | [{dims(x)}] | {MEANINGS[key]} |" for key, x in outputs.items()]
  classes = ""
  if "logits" in outputs and model.class_names:
    names = json.dumps(model.class_names, ensure_ascii=False)
    classes = f"\nClasses in the order of the logits: `{names}`\n"
  return README.format(
    model=Path(name).name,
    report=f"```text\n{model.report}\n```",
    version=jax.__version__,
    platforms=", ".join(exported.platforms),
    height=size[0],
    width=size[1],
    channels=len(model.network.mean),
    outputs="\n".join(rows),
    classes=classes,
  )


def check(folder: Path, model, size: tuple[int, int], has_logits: bool, dtype: str) -> float:
  """Runs call.py in a process without this project, on the CPU.

  Returns:
    The largest difference to what `model` computes, relative to the largest value.

  Raises:
    StorageError: it fails, or gives other numbers.
  """
  shape = (CHECKED_IMAGES, *size, len(model.network.mean))
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  files = [folder / name for name in ("images.npy", "outputs.npz")]
  np.save(files[0], images)
  # An accelerator belongs to this process; -I leaves out the folder and variables of this one.
  done = subprocess.run(
    [sys.executable, "-I", folder / "call.py", *files],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise StorageError(f"the exported model cannot be called: {done.stderr.strip()[-300:]}")
  with jax.default_device(jax.devices("cpu")[0]):
    expected = {"logits": model.classify(images)} if has_logits else model.encode(images)
  with np.load(files[1]) as outputs:
    differences = [
      np.abs(outputs[name] - x).max() / max(np.abs(x).max(), 1) for name, x in expected.items()
    ]
  for file in files:
    file.unlink()
  if not max(differences) <= TOLERANCE[dtype]:  # also if it is not a number
    raise StorageError(
      f"the exported model gives other numbers: largest difference {max(differences):.1e}, "
      f"expected at most {TOLERANCE[dtype]:g}"
    )
  return float(max(differences))
