"""Specs of teachers from plain keywords."""

from mrmae_jax import teachers


def read_spec(**keywords) -> teachers.TeacherSpec:
  """Returns `teachers.read_spec` for fields of TeacherOptions and the student's images.

  Args:
    **keywords: fields of TeacherOptions; image_size, token_size, channels, mean and std of the
      student's images, 32 x 32 pixels and tokens of 8 without them.
  """
  images = {
    field: keywords.pop(key)
    for key, field in (
      ("image_size", "size"),
      ("token_size", "token_size"),
      ("channels", "channels"),
      ("mean", "mean"),
      ("std", "std"),
    )
    if key in keywords
  }
  images = {"size": (32, 32), "token_size": 8} | images
  return teachers.read_spec(teachers.TeacherOptions(**keywords), teachers.StudentImages(**images))
