"""The page of a captioned set's samples."""

from helpers.captioned_rows import outcome, write_images

from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.modes.caption.page import samples_page
from caprl_jax.modes.caption.statistics import Statistics


def test_the_page_shows_each_row_once_and_escapes(tmp_path):
  rows = find_images(str(write_images(tmp_path / "images")))
  found = Statistics(1, 100, 48, 0)
  for item in outcome(rows):
    number, row = item.number, item.row
    row = row | ({"caption": f"<script>{number}"} if "caption" in row else {"error": "<b>why"})
    found.add(
      RowResult(
        number,
        item.source,
        row,
        {"bucket": "4x1", "secs": 0.1} if "caption" in row else {"reason": "other"},
      )
    )
  page = samples_page("out", found, {"max_tokens": 3, "prompt": "<i>?"})
  assert page.count("<article") == 6 and page.count("data:image/png;base64") == 6
  assert (
    "<script>" not in page
    and "&lt;script&gt;5" in page
    and "&lt;b&gt;why" in page
    and "&lt;i&gt;?" in page
  )
  for title in ("Longest", "Failed", "Cut"):
    assert page.count(f"<h2>{title}</h2>") == 1
