"""Images in a folder, and what a captioner might make of them."""

import pathlib

import numpy as np
from PIL import Image

from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult


def write_images(folder: pathlib.Path) -> pathlib.Path:
  """Six images in a tree, which is returned."""
  rng = np.random.default_rng(0)
  for i in range(6):
    path = folder / ("deep" if i % 2 else "") / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (8, 9 + i, 3), dtype=np.uint8)).save(path)
  return folder


def outcome(rows: list[CaptionRow]) -> list[RowResult[CaptionRow]]:
  """A caption for each row but the fourth, which failed; the first is cut."""
  good = lambda i: {
    "caption": f'Ünï {i}\n"x"',
    "tokens": [i, 2, 3],
    "finish": "end" if i else "length",
  }
  return [
    RowResult(i, row, {"image": row.name} | ({"error": "no"} if i == 3 else good(i)), {})
    for i, row in enumerate(rows)
  ]
