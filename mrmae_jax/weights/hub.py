"""Published teachers: their repositories on the Hugging Face hub, and fetching their files."""

from pathlib import Path
from typing import Any, NamedTuple

from mrmae_jax.errors import WeightsError

CONFIG_FILES = ("config.json", "preprocessor_config.json")
WEIGHT_FILES = (  # in this order: the last one needs torch
  ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
  ("flax_model.msgpack",),
  ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)


class Preset(NamedTuple):
  """A published teacher: its repository on the Hugging Face hub, and the sizes it must have."""

  repo: str
  revision: str
  family: str
  dim: int
  depth: int
  patch: int
  side: int  # of the images of its position table, in pixels; 0 without one


S, B, L, G = (384, 12), (768, 12), (1024, 24), (1536, 40)  # width and depth

# Revisions are commits of the hub. Two kinds may move: "main", where no commit could be verified,
# and refs/pr/N, where only that proposal of the hub's conversion robot holds safetensors. The
# digest in a run's log says what was loaded.
PRESETS = {
  "clip_vit_b32": Preset(
    "openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", "CLIP", *B, 32, 224
  ),
  "clip_vit_b16": Preset(
    "openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3", "CLIP", *B, 16, 224
  ),
  "clip_vit_l14": Preset(
    "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "CLIP", *L, 14, 224
  ),
  "clip_vit_l14_336": Preset(
    "openai/clip-vit-large-patch14-336",
    "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "CLIP",
    *L,
    14,
    336,
  ),
  "dino_vit_s16": Preset("facebook/dino-vits16", "refs/pr/1", "DINO", *S, 16, 224),
  "dino_vit_s8": Preset("facebook/dino-vits8", "main", "DINO", *S, 8, 224),
  "dino_vit_b16": Preset("facebook/dino-vitb16", "refs/pr/7", "DINO", *B, 16, 224),
  "dino_vit_b8": Preset("facebook/dino-vitb8", "main", "DINO", *B, 8, 224),
  "dinov2_vit_s14": Preset(
    "facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056", "DINOv2", *S, 14, 518
  ),
  "dinov2_vit_b14": Preset(
    "facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415", "DINOv2", *B, 14, 518
  ),
  "dinov2_vit_l14": Preset(
    "facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c", "DINOv2", *L, 14, 518
  ),
  "dinov2_vit_g14": Preset(
    "facebook/dinov2-giant", "611a9d42f2335e0f921f1e313ad3c1b7178d206d", "DINOv2", *G, 14, 518
  ),
  "dinov2_vit_s14_reg": Preset(
    "facebook/dinov2-with-registers-small", "main", "DINOv2 with registers", *S, 14, 518
  ),
  "dinov2_vit_b14_reg": Preset(
    "facebook/dinov2-with-registers-base", "main", "DINOv2 with registers", *B, 14, 518
  ),
  "dinov2_vit_l14_reg": Preset(
    "facebook/dinov2-with-registers-large",
    "e4c89a4e05589de9b3e188688a303d0f3c04d0f3",
    "DINOv2 with registers",
    *L,
    14,
    518,
  ),
  "dinov2_vit_g14_reg": Preset(
    "facebook/dinov2-with-registers-giant",
    "8d0d49f77fb8b5dd78842496ff14afe7dd4d85cb",
    "DINOv2 with registers",
    *G,
    14,
    518,
  ),
  "dinov3_vit_s16": Preset(
    "facebook/dinov3-vits16-pretrain-lvd1689m",
    "114c1379950215c8b35dfcd4e90a5c251dde0d32",
    "DINOv3",
    *S,
    16,
    0,
  ),
  "dinov3_vit_b16": Preset(
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "5931719e67bbdb9737e363e781fb0c67687896bc",
    "DINOv3",
    *B,
    16,
    0,
  ),
  "dinov3_vit_l16": Preset(
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "ea8dc2863c51be0a264bab82070e3e8836b02d51",
    "DINOv3",
    *L,
    16,
    0,
  ),
  "siglip_vit_b16": Preset(
    "google/siglip-base-patch16-224",
    "7fd15f0689c79d79e38b1c2e2e2370a7bf2761ed",
    "SigLIP",
    *B,
    16,
    224,
  ),
  "siglip2_vit_b16": Preset(
    "google/siglip2-base-patch16-224",
    "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2",
    "SigLIP",
    *B,
    16,
    224,
  ),
}


def find_preset(name: str) -> Preset:
  """Returns the preset of that name.

  Raises:
    WeightsError: there is none.
  """
  if name not in PRESETS:
    raise WeightsError(
      f"teacher.name={name!r} is unknown; choose one of {', '.join(PRESETS)}, or give a path alone"
    )
  return PRESETS[name]


def preset_config(name: str, model_type: str) -> dict[str, Any]:
  """Returns what config.json says of a preset's sizes, without fetching it.

  Args:
    name: a key of PRESETS.
    model_type: of its family in transformers.
  """
  preset = PRESETS[name]
  config = dict(
    model_type=model_type,
    hidden_size=preset.dim,
    num_hidden_layers=preset.depth,
    num_attention_heads=preset.dim // 64,
    intermediate_size=4 * preset.dim,
    patch_size=preset.patch,
    image_size=preset.side or 224,
  )
  if model_type == "dinov2":
    config["use_swiglu_ffn"] = preset.dim == 1536
  if model_type == "dinov3_vit":
    config["num_register_tokens"] = 4
  return config


def fetch(name: str, *choices: tuple[str, ...]) -> Path:
  """Returns the folder in Hugging Face's cache that holds files of a preset, downloading them if
  needed.

  HF_HUB_OFFLINE=1 keeps it from the network.

  Args:
    name: a key of PRESETS.
    choices: patterns of file names; the first choice that matches a file is fetched.

  Raises:
    WeightsError: the files do not exist, are not allowed, or there is no network.
  """
  import huggingface_hub  # heavy, and needed for teachers by name alone
  from huggingface_hub import errors

  preset = PRESETS[name]
  where = f"teacher.name={name} ({preset.repo} at {preset.revision})"
  hint = (
    f"`hf download {preset.repo} --revision {preset.revision}` where there is a network, or give "
    "teacher.path"
  )
  try:
    for patterns in choices:
      folder = Path(
        huggingface_hub.snapshot_download(
          preset.repo, revision=preset.revision, allow_patterns=list(patterns)
        )
      )
      if any(next(folder.glob(pattern), None) for pattern in patterns):
        return folder
  except errors.GatedRepoError:
    raise WeightsError(
      f"{where} is gated: accept its license on https://huggingface.co/{preset.repo}, then "
      "`hf auth login`"
    ) from None
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
    raise WeightsError(
      f"{where} is not on the hub (or private: `hf auth login`); give teacher.path"
    ) from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
    raise WeightsError(
      f"{where} is not in the cache, and the hub cannot be reached; {hint}"
    ) from None
  except Exception as error:  # network libraries have many more
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise WeightsError(f"{where} could not be fetched ({reason}); {hint}") from None
  names = ", ".join(pattern for patterns in choices for pattern in patterns)
  raise WeightsError(f"{where}: none of {names} there; {hint}")
