"""Prism's page and the gallery beside it, from an evaluation made by hand; both in a browser."""

import numpy as np
import pytest
from helpers.bad_images import encoded, noise
from helpers.pages.browser import browse, needs_browser, read_probe, with_probe

from caprl_jax.data.readers.benchmarks.files import from_qa_rows
from caprl_jax.data.rows import CaptionRow, QARow, Question
from caprl_jax.modes.prism.evaluation import BLIND, Evaluation
from caprl_jax.modes.prism.figures import summarise
from caprl_jax.modes.prism.gallery import write_gallery
from caprl_jax.modes.prism.page import write_page
from caprl_jax.modes.prism.section import PrismConfig
from caprl_jax.modes.prism.table import table_text

COLORS = ("red", "blue")


@pytest.fixture(scope="module")
def made():
  """Eight images, red and blue in turn, four captions each: the first captioner says the colour of
  half of the images and a wrong one of the others, the second one says nothing."""
  rows = [
    QARow(
      encoded(noise(seed=i)),
      (Question("what color is it?", COLORS, i % 2, "color"),),
      f"image {i}",
      {"color": COLORS[i % 2]},
    )
    for i in range(8)
  ]
  asked = from_qa_rows(rows)
  keys = [f"key {i}" for i in range(8)]
  said = lambda text: {"caption": text, "tokens": len(text.split()) + 1, "finish": "end"}
  bold = {
    key: [
      said(f"It is {COLORS[(i % 2 + i // 4) % 2]}{', and a thing' * (n % 2)}.") for n in range(4)
    ]
    for i, key in enumerate(keys)
  }
  shy = {key: [said("A thing.")] * 4 for key in keys}
  chosen = np.repeat([[(i % 2 + i // 4) % 2] for i in range(8)], 4, axis=1)
  answered = {"bold": chosen, "shy": np.full((8, 4), -1), BLIND: np.zeros((8, 1), int)}
  images = {key: CaptionRow(row.image, "", row.name) for key, row in zip(keys, rows)}
  evaluation = Evaluation(
    {"easy": asked},
    {"easy": keys},
    {"easy": keys},
    images,
    {"bold": bold, "shy": shy},
    {"easy": answered},
  )
  cfg = PrismConfig("bold=a,shy=b", "easy=c", captions=4, examples=2, gallery=4)
  return evaluation, summarise(evaluation, cfg, 0)


def test_figures_of_silence_and_falsehood(made):
  _, figures = made
  entry = figures["benchmarks"]["easy"]["captioners"]
  bold, shy = entry["bold"], entry["shy"]
  for key in ("judged", "facts"):
    assert (bold[key]["told"], bold[key]["false"]) == (0.5, 0.5)
    assert (shy[key]["told"], shy[key]["false"]) == (0, 0) and shy[key]["by_length"] == []
    assert [part["words"] for part in bold[key]["by_length"]] == [3, 6]
  assert (bold["length_words"], bold["length_tokens"], shy["length_words"]) == (4.5, 5.5, 2)
  # half of the questions is what is right without a caption, too
  assert bold["gain_per_100_words"]["value"] == pytest.approx(0)
  assert bold["accuracy_per_100_words"]["value"] == pytest.approx(100 * 0.5 / 4.5)
  assert shy["gain_per_100_words"]["value"] == pytest.approx(-100 * 0.5 / 2)
  low, high = bold["gain_per_100_words"]["interval"]
  assert low < 0 < high
  differences = shy["differences"]
  assert differences["misled"]["mean"] == differences["facts_false"]["mean"] == -0.5
  assert differences["facts_told"]["mean"] == -0.5 and differences["words"]["mean"] == -2.5
  assert "bold" in table_text(figures) and "tells 50.0% of the known facts" in table_text(figures)


def test_equal_captions_are_shown_once_with_their_number(made, tmp_path):
  evaluation, figures = made
  write_page(
    tmp_path / "prism.html", figures, evaluation, examples=8, seed=0, gallery="gallery.html"
  )
  page = (tmp_path / "prism.html").read_text()
  # of each question: two pairs of captions, one of four, none
  assert page.count("×2") == 8 * 2 and page.count("×4") == 8 and page.count("no caption") == 8
  assert page.count("A thing.</p>") == 8 and 'href="gallery.html"' in page
  assert page.count('role="img"') == 3  # accuracy, answers, facts
  write_gallery(tmp_path / "gallery.html", evaluation, 4, 0)
  gallery = (tmp_path / "gallery.html").read_text()
  assert gallery.count("<article") == 4 and "easy: image " in gallery and "8 images" in gallery


@needs_browser
def test_nothing_is_cut_at_1200_pixels(made, tmp_path):
  evaluation, figures = made
  write_page(tmp_path / "prism.html", figures, evaluation, examples=2, seed=0)
  probe = """<script>addEventListener("load", () => { document.body.dataset.probe = JSON.stringify({
    wide: document.documentElement.scrollWidth - innerWidth,
    cut: [...document.querySelectorAll("div")].filter(d => d.scrollWidth > d.clientWidth +
    1).length, tables: document.querySelectorAll("table").length
  })});</script>"""
  page = with_probe((tmp_path / "prism.html").read_text(), probe)
  (tmp_path / "probed.html").write_text(page)
  flags = "--window-size=1200,900", "--dump-dom", "--virtual-time-budget=5000"
  seen = read_probe(browse(tmp_path, tmp_path / "probed.html", *flags))
  assert seen["wide"] <= 0 and seen["cut"] == 0 and seen["tables"] >= 3
