"""Names of Hugging Face's vision towers, as in the files of transformers 4 and 5."""

from mrmae_jax.weights.table import Entry, conv, dense, linear, norm, qkv, same


def clip(depth: int, bias: bool, proj: bool, prefix: str = "") -> list[Entry]:
  """CLIPVisionModel, CLIPVisionModelWithProjection and the vision half of CLIPModel ("pre_layrnorm" is their spelling).

  Args:
    depth: number of blocks.
    bias: the patch embedding has one (CLIP's has none).
    proj: `visual_projection` is there.
    prefix: "vision_model." or "".
  """
  table = [Entry("cls_token", (f"{prefix}embeddings.class_embedding",), lambda x: x[None, None]),
           Entry("pos_embed", (f"{prefix}embeddings.position_embedding.weight",), lambda x: x[None]),
           *_patch_embed(f"{prefix}embeddings.patch_embedding", bias),
           *norm("norm_pre", f"{prefix}pre_layrnorm"), *norm("norm", f"{prefix}post_layernorm")]
  if proj:
    table += [Entry("proj/kernel", ("visual_projection.weight",), linear)]
  for i in range(depth):
    ours, theirs = f"blocks_{i}", f"{prefix}encoder.layers.{i}"
    table += norm(f"{ours}/norm1", f"{theirs}.layer_norm1") + norm(f"{ours}/norm2", f"{theirs}.layer_norm2")
    table += qkv(f"{ours}/attn/qkv", tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv"))
    table += dense(f"{ours}/attn/proj", f"{theirs}.self_attn.out_proj")
    table += dense(f"{ours}/fc1", f"{theirs}.mlp.fc1") + dense(f"{ours}/fc2", f"{theirs}.mlp.fc2")
  return table


def vit(depth: int, bias: bool, proj: bool, prefix: str = "") -> list[Entry]:
  """ViTModel: facebook/dino-vit*. Arguments as in `clip`; a ViT has no projection."""
  del proj
  table = [Entry("cls_token", (f"{prefix}embeddings.cls_token",), same),
           Entry("pos_embed", (f"{prefix}embeddings.position_embeddings",), same),
           *_patch_embed(f"{prefix}embeddings.patch_embeddings.projection", bias),
           *norm("norm", f"{prefix}layernorm")]
  for i in range(depth):
    ours, theirs = f"blocks_{i}", f"{prefix}encoder.layer.{i}"
    table += norm(f"{ours}/norm1", f"{theirs}.layernorm_before") + norm(f"{ours}/norm2", f"{theirs}.layernorm_after")
    table += qkv(f"{ours}/attn/qkv", tuple(f"{theirs}.attention.attention.{x}" for x in ("query", "key", "value")))
    table += dense(f"{ours}/attn/proj", f"{theirs}.attention.output.dense")
    table += dense(f"{ours}/fc1", f"{theirs}.intermediate.dense") + dense(f"{ours}/fc2", f"{theirs}.output.dense")
  return table


def _patch_embed(theirs: str, bias: bool) -> list[Entry]:
  kernel, offset = dense("patch_embed", theirs, conv)
  return [kernel, offset] if bias else [kernel]
