"""Rows of questions whose images lie in memory."""

import io

from PIL import Image

from caprl_jax.data.rows import QARow, Question


def png(color, size=(5, 4)) -> bytes:
  """The file of an image of one colour; size: width, height."""
  file = io.BytesIO()
  Image.new("RGB", size, color).save(file, "PNG")
  return file.getvalue()


ROWS = [
  QARow(
    png((i, 0, 0)),
    (
      Question(f"第{i}?", ("北京市", "上海市", "A) x"), i % 3, "city", "qwen-vl"),
      Question("Q?", ("a", "b"), 1),
    ),
    f"row {i}",
    {"color": str(i)} if i % 2 else None,
  )
  for i in range(7)
]


def plain(row: QARow):
  """All that a row holds, with its image's bytes, to be compared."""
  return (
    row.questions,
    row.name,
    row.facts,
    row.image if isinstance(row.image, bytes) else row.image.read(),
  )
