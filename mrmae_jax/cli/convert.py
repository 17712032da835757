"""Writes a trained model for others to read, or theirs in another form."""

from mrmae_jax.weights import loaded_model, readers, writers


def run(options) -> str:
  """Carries out `mrmae convert`.

  Raises:
    UsageError, WeightsError: a model that does not load, or that has no such format.
  """
  keep_all = options.parts == "all"
  model = readers.read_model(
    options.model,
    num_heads=options.num_heads,
    weights=options.weights,
    decoder_heads=options.decoder_heads,
    decoder=keep_all,
  )
  print(model.report)
  model = model if keep_all else loaded_model.encoder_only(model)
  writers.write_model(model, options.out, options.format)
  return f"wrote {options.out}"
