"""Writes a trained model for others to read, or theirs in another form."""

from mrmae_jax.weights import model_files


def run(options) -> str:
  """Carries out `mrmae convert`.

  Raises:
    UsageError, WeightsError: a model that does not load, or that has no such format.
  """
  keep_all = options.parts == "all"
  model = model_files.read_model(
    options.model,
    num_heads=options.num_heads,
    weights=options.weights,
    decoder_heads=options.decoder_heads,
    decoder=keep_all,
  )
  print(model.report)
  model = model if keep_all else model_files.encoder_only(model)
  model_files.write_model(model, options.out, options.format)
  return f"wrote {options.out}"
