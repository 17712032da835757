"""Writes a trained student for others to read, or theirs in another form; `mrmae_jax.load` reads all of them.

  mrmae convert --model=/tmp/run --out=encoder.safetensors --format=convmae --parts=encoder

--model is a run's workdir, a file of weights (ConvMAE, MAE; .safetensors, .pth) or a ViTMAE folder. Formats: convmae, a ConvViT
in the names of Alpha-VL/ConvMAE; timm, a ViT in those of timm and facebookresearch/mae; hf, a ViT as a folder of transformers'
ViTMAE. Nothing is lost on the way and back: the parameters are the same bit for bit. What is left out by design (mimic heads)
is printed. Files that do not tell the number of heads need --num_heads and --decoder_heads unless they have a published size.
"""

import sys

from absl import flags

from mrmae_jax.cli import command_line
from mrmae_jax.errors import UsageError


def define_flags() -> flags.FlagValues:
  """The options, apart from absl's global ones."""
  own = flags.FlagValues()
  flags.DEFINE_string("model", None, "Workdir, weight file or ViTMAE folder.", flag_values=own)
  flags.DEFINE_string(
    "out", None, "The .safetensors file; with --format=hf the folder.", flag_values=own
  )
  flags.DEFINE_enum(
    "format", "convmae", ["convmae", "timm", "hf"], "Names of the tensors.", flag_values=own
  )
  flags.DEFINE_enum(
    "parts",
    "all",
    ["all", "encoder"],
    "The whole model, or without decoder and classifier.",
    flag_values=own,
  )
  flags.DEFINE_integer(
    "num_heads", 0, "Attention heads of the encoder, for files that do not tell.", flag_values=own
  )
  flags.DEFINE_integer("decoder_heads", 0, "Likewise of the decoder.", flag_values=own)
  return own


def convert(options) -> str:
  """Reads and writes; returns what to say of it."""
  for name in ("model", "out"):
    if not options[name].value:
      raise UsageError(f"--{name} is missing: {options[name].help} See --help")
  from mrmae_jax.weights import model_files  # --help is answered without jax

  whole = options.parts == "all"
  student = model_files.read_model(
    options.model, num_heads=options.num_heads, decoder_heads=options.decoder_heads, decoder=whole
  )
  print(student.report)
  model_files.write_model(
    student if whole else model_files.encoder_only(student), options.out, options.format
  )
  return f"wrote {options.out}"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line (default: sys.argv); returns the exit code: 0 done, 2 usage, 3 data."""
  return command_line(__doc__, define_flags(), convert, argv)


if __name__ == "__main__":
  sys.exit(main())
