"""Pictures of held-out images as the decoder reconstructs them: WORKDIR/reconstructions/*.png."""

import jax

from mrmae_jax import evals, sharding
from mrmae_jax.data.sources.base import NothingHeldOut
from mrmae_jax.errors import DataError
from mrmae_jax.viz.grid import bands_shown, draw_grid

COLUMNS = {
  "original": "original",
  "masked": "encoder sees",
  "reconstruction": "decoder output*",
  "pasted": "visible + output*",
}
NOTE = "* drawn with the mean and contrast of each true patch, which normalized predictions lack"


class Evaluator:
  """Reconstructions of the first held-out images, always with the same masks.

  Without held-out images they are of training images.
  """

  def __init__(self, task, frozen, config, mesh, workdir, *, images: int):
    """Reads the images.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      images: number of rows.
    """
    self._frozen, self._folder, self._images = frozen, workdir / "reconstructions", images
    self._bands, bands_caption = bands_shown(config)
    norm_caption = NOTE if config.method.norm_pix else ""
    self._caption = "; ".join(filter(None, (bands_caption, norm_caption)))
    self.note = ""
    try:
      source = task.source("eval")
    except DataError as error:
      source = task.source("train")
      if config.data.holdout_every or not isinstance(error, NothingHeldOut):
        self.note = f"the reconstructions are of training images: {error}"
    count = evals.padded_batch_size(images, mesh)
    batches = evals.global_batches(source, task.views.eval, config, mesh, count, limit=images)
    self._batch = next(batches)
    batches.close()
    keys = jax.random.split(jax.random.key(0), count)

    def predict(params, extra, frozen, batch):
      out = task.predict(params, extra, frozen, batch, keys)
      return {name: out[name] for name in COLUMNS}

    self._predict = jax.jit(predict, out_shardings=sharding.replicated(mesh))

  def run(self, params, extra, step: int) -> dict:
    """Returns {"pictures": {path of the PNG: uint8 [H, W, 3]}}."""
    columns = jax.device_get(self._predict(params, extra, self._frozen, self._batch))
    images = [columns[name][: self._images, ..., self._bands] for name in COLUMNS]
    picture = draw_grid(images, list(COLUMNS.values()), self._caption)
    return {"pictures": {self._folder / f"step_{step:07d}.png": picture}}
