"""Live comparison with timm on random models.

timm needs a torch with torchvision: pip install torch==2.14.1 torchvision==0.29.1 timm.
"""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mrmae_jax.models.classifier import Classifier
from mrmae_jax.weights import beit, readers, writers
from mrmae_jax.weights.table import export


@pytest.mark.parametrize("pool, grid", [("avg", (3, 5)), ("token", (4, 4))])
def test_beit(tmp_path, pool, grid):
  """Logits and every gradient; timm's file and ours are one."""
  torch = pytest.importorskip("torch")
  Beit = pytest.importorskip("timm.models.beit").Beit
  save_file = importlib.import_module("safetensors.torch").save_file
  model = Beit(
    img_size=tuple(8 * side for side in grid),
    patch_size=8,
    embed_dim=36,
    depth=3,
    num_heads=3,
    mlp_ratio=2,
    num_classes=5,
    init_values=0.1,
    use_abs_pos_emb=False,
    use_rel_pos_bias=True,
    global_pool=pool,
  )
  with torch.no_grad():
    for parameter in model.parameters():  # every bias and gain away from its start
      parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
  weights = {name: x.contiguous() for name, x in model.state_dict().items()}
  save_file(weights, tmp_path / "theirs.safetensors")
  network = readers.read_model(tmp_path / "theirs.safetensors", grid=grid)
  assert network.grid == grid
  writers.write_model(network, tmp_path / "ours.safetensors", "timm")
  written = load_file(tmp_path / "ours.safetensors")
  assert written.keys() == weights.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(written[name], x.numpy(), err_msg=name)

  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(2, 8 * grid[0], 8 * grid[1], 3)).astype(np.float32)
  weight = rng.normal(size=(2, 5)).astype(np.float32)
  expected = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
  (expected * torch.from_numpy(weight)).sum().backward()
  classifier = Classifier(network.encoder, 5, "mean" if pool == "avg" else "cls")

  @jax.jit
  def logits_and_gradients(params):
    logits, back = jax.vjp(lambda p: classifier.apply({"params": p}, pixels)[0], params)
    return logits, back(weight)[0]

  params = {"encoder": network.params["encoder"], **network.params["classifier"]}
  logits, gradients = logits_and_gradients(params)
  np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5)
  if not network.has_norm:
    gradients["encoder"].pop("norm")
  names = tuple(network.params["classifier"])
  tree = {"encoder": gradients.pop("encoder"), "classifier": gradients}
  ours = export(tree, beit.write_table(network.encoder, "timm", names, network.has_norm))
  theirs = {name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None}
  assert ours.keys() == theirs.keys()
  largest = max(np.abs(x).max() for x in theirs.values())
  for name, x in theirs.items():
    np.testing.assert_allclose(ours[name], x, atol=1e-5 * largest, err_msg=name)
