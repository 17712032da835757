"""Pictures of what the decoder makes of held-out images: a PNG per evaluation in WORKDIR/reconstructions."""

import io

import jax
from PIL import Image

from mrmae_jax import data, sharding
from mrmae_jax.viz.grid import draw_grid

COLUMNS = {
  "original": "original",
  "masked": "encoder sees",
  "reconstruction": "decoder output*",
  "pasted": "visible + output*",
}
NOTE = "* drawn with the mean and contrast of each true patch, which normalised predictions lack"


class Evaluator:
  """Reconstructions of the first held-out images, always with the same masks."""

  def __init__(self, task, frozen, config, mesh, workdir, *, images: int):
    """Reads the images.

    Args:
      task, frozen, config, mesh, workdir: of the run.
      images: number of rows.
    """
    self.note = ""  # always has something to show
    self._frozen, self._folder = frozen, workdir / "reconstructions"
    self._images, (self._bands, caption) = images, bands_shown(config)
    self._note = "; ".join(filter(None, (caption, NOTE if config.method.norm_pix else "")))
    source = data.open_split(config.data, "eval" if config.data.holdout_every else "train")
    count = -(-images // mesh.size) * mesh.size
    batches = data.eval_batches(
      source,
      data.image_views(config).eval,
      batch_size=count,
      shard=jax.process_index(),
      num_shards=jax.process_count(),
      limit=images,
      options=data.loader_options(config.data)._replace(workers=0),
    )
    self._batch = sharding.global_batch(next(batches), mesh)
    batches.close()
    keys = jax.random.split(jax.random.key(0), count)

    def predict(params, frozen, batch):
      out = task.predict(params, frozen, batch, keys)
      return {name: out[name] for name in COLUMNS}

    self._predict = jax.jit(predict, out_shardings=sharding.replicated(mesh))

  def run(self, params, step: int) -> dict:
    """{"pictures": {path of the PNG: uint8 [H, W, 3]}}; host 0 writes it."""
    columns = jax.device_get(self._predict(params, self._frozen, self._batch))
    picture = draw_grid(
      [columns[name][: self._images, ..., self._bands] for name in COLUMNS],
      list(COLUMNS.values()),
      self._note,
    )
    path = self._folder / f"step_{step:07d}.png"
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      encoded = io.BytesIO()
      Image.fromarray(picture).save(encoded, "PNG")
      path.write_bytes(encoded.getvalue())
    return {"pictures": {path: picture}}


def bands_shown(config) -> tuple[list[int], str]:
  """The three channels that pictures of a run show as red, green and blue, and a caption that says so.

  RGB and grey are shown as they are, without a caption; of other images the channels that the teacher sees, else the first ones.
  """
  channels, teacher = len(config.data.mean), config.get("teacher")
  seen = list(teacher.bands) if teacher and channels != 3 else []
  bands = seen if len(seen) == 3 else [min(i, channels - 1) for i in range(3)]
  return bands, "" if channels in (1, 3) else f"channels {', '.join(map(str, bands))} as RGB"
