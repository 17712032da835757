"""Names of Alpha-VL/ConvMAE (models_convmae.py), pre-training model."""

from mrmae_jax.weights.table import Entry, conv, dense, depthwise, norm, same, timm_block


def encoder(depths: tuple[int, int, int]) -> list[Entry]:
  """The encoder with its fusion layers; `depths` of the three stages. Position tables are constants of ours."""
  table = []
  for stage in (1, 2, 3):
    name = f"patch_embed{stage}"
    table += dense(f"{name}/proj", f"{name}.proj", conv) + norm(f"{name}/norm", f"{name}.norm")
  for stage in (1, 2):
    name = f"stage{stage}_output_decode"
    table += dense(name, name, conv)
    for i in range(depths[stage - 1]):
      ours, theirs = f"blocks{stage}_{i}", f"blocks{stage}.{i}"
      table += norm(f"{ours}/norm1", f"{theirs}.norm1") + norm(f"{ours}/norm2", f"{theirs}.norm2")
      table += [Entry(f"{ours}/depthwise_kernel", (f"{theirs}.attn.weight",), depthwise),
                Entry(f"{ours}/depthwise_bias", (f"{theirs}.attn.bias",), same)]
      for layer, name in (("conv1", "conv1"), ("conv2", "conv2"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
        table += dense(f"{ours}/{layer}", f"{theirs}.{name}", conv)
  for i in range(depths[2]):
    table += timm_block(f"blocks3_{i}", f"blocks3.{i}")
  return table + dense("patch_embed4", "patch_embed4") + norm("norm", "norm")


def decoder(depth: int) -> list[Entry]:
  """The decoder; MAE (facebookresearch/mae models_mae.py) uses the same names."""
  table = [Entry("mask_token", ("mask_token",), same)]
  table += dense("embed", "decoder_embed") + norm("norm", "decoder_norm") + dense("pred", "decoder_pred")
  for i in range(depth):
    table += timm_block(f"blocks_{i}", f"decoder_blocks.{i}")
  return table


IGNORE = ("pos_embed", "decoder_pos_embed")  # fixed tables, computed here
