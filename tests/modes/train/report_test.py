"""Tests of report.html: its words, its escaping, and what a real browser makes of it."""

import json
import math
import re

import numpy as np
import pytest
from helpers.pages.browser import browse, needs_browser, on_a_phone, read_probe, with_probe
from PIL import Image, ImageDraw

from caprl_jax.harness import metrics
from caprl_jax.modes.train import report
from caprl_jax.pages import curves, markup

QUESTION = {
  "stem": "what is the red shape?",
  "options": ["circle", "triangle", "rectangle"],
  "gold": 0,
  "kind": "shape",
}
RIGHT = {"question": 0, "choice": 0, "correct": True, "valid": True}
WRONG = {"question": 0, "choice": 2, "correct": False, "valid": True}
NONE = {"question": 0, "choice": -1, "correct": False, "valid": True}
ABSENT = {"question": 0, "choice": -1, "correct": False, "valid": False}


def caption(text, answer, reward, **more):
  return {"text": text, "length_tokens": 5, "reward": reward, "answers": [answer]} | more


def write_samples(workdir, name, captions_of_rows, step=0):
  """Writes samples/<name>.json with one question and one drawn image a row."""
  images = workdir / "samples/images"
  images.mkdir(parents=True, exist_ok=True)
  rows = []
  for i, captions in enumerate(captions_of_rows):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill="red")
    image.save(images / f"test_{i}.png")
    rows.append(
      {
        "row": i,
        "name": f"test/images/{i}.png",
        "image": f"images/test_{i}.png",
        "questions": [QUESTION],
        "captions": captions,
      }
    )
  samples = {"stage": name, "step": step, "rows": rows}
  (workdir / f"samples/{name}.json").write_text(json.dumps(samples))


def write_metrics(workdir, steps):
  with metrics.MetricsWriter(workdir) as writer:
    for step in range(1, steps + 1):
      writer.write(
        step,
        {
          "reward/mean": 0.4 + step / 100,
          "judge/accuracy": 0.5,
          "judge/accuracy/shape": 0.4,
          "eval/accuracy": 0.5,
          "eval/reward": 0.5,
          "judge/abstained": 0.1,
          "judge/misled": 0.4,
          "reward/accuracy": 0.5,
          "update/logp_difference": 1e-6,
          "rollout/length": 5 + step / 10,
          "update/entropy": 1.2,
          "advantage/flat_groups": 0.1,
          "update/grad_norm": 500 if step == 20 else 1,
          "update/kl": math.nan if step == 2 else 0.01,
          "time/step_secs": 3.0,
        },
      )


@pytest.fixture
def workdir(tmp_path):
  """A complete run."""
  path = tmp_path / "toy-run"
  write_samples(path, "before", [[caption("A shape.", NONE, 0.0)], [caption("A box.", WRONG, 0.0)]])
  write_samples(
    path,
    "after",
    [[caption("A red circle.", RIGHT, 1.0)], [caption("A red rectangle.", WRONG, 0.0)]],
  )
  write_samples(
    path,
    "step_000020",
    [
      [
        caption("low sibling", WRONG, 0.0, advantage=-0.7),
        caption("lost sibling", ABSENT, None),
        caption("high sibling", RIGHT, 1.0, advantage=0.7),
      ]
    ],
    step=20,
  )
  write_metrics(path, 30)
  (path / "summary.json").write_text(
    json.dumps(
      {
        "gate": {"ideal": 1.0, "generic": 0.26, "empty": 0.25, "questions": 400},
        "before": {"accuracy": 0.402, "accuracy/shape": 0.4, "length_tokens": 4.2, "unscored": 0},
        "after": {"accuracy": 0.823, "accuracy/shape": 0.8, "length_tokens": 10.6, "unscored": 3},
        "counts": {"train_rows": 3200, "kept/color": 30, "dropped/color": 10, "dropped/yes-no": 7},
        "wall_secs": {"gate": 30.0, "train": 570.0},
        "versions": {"jax": "0.10.0"},
        "config": {"rollout": {"temperature": 0.75}},
      }
    )
  )
  return path


def words(page):
  """The text of a page, without style and tags."""
  page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
  return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_a_complete_run_says_what_it_did(workdir):
  path = report.write_report(workdir)
  text = words(path.read_text())

  assert path == workdir / "report.html"
  assert "40.2% → 82.3% +42.1 points" in text
  assert "4.2 → 10.6 tokens" in text and "10.0 minutes in all" in text
  assert "Generic caption 26.0%" in text and "on 400 questions" in text
  assert "color 30 10 75.0%" in text and "yes-no 0 7 0.0%" in text and "train rows 3,200" in text
  assert "gate 30.0 5.0%" in text and "unscored 0 3 +3" in text
  assert "temperature&quot;: 0.75" in text and "jax&quot;: &quot;0.10.0" in text
  assert "Of 2 images shown: 1 better, 1 the same." in text
  assert "1 of 30 steps have no finite number" in text
  assert "not complete" not in text
  assert not list(workdir.glob("*.tmp"))


def test_answers_are_marked_by_symbol_and_colour(workdir):
  page = report.write_report(workdir).read_text()
  for kind, symbol, word in (
    ("right", "✓", "circle"),
    ("wrong", "✗", "rectangle"),
    ("none", "–", "no answer"),
    ("none", "–", "not scored"),
  ):
    assert re.search(rf'class="answer {kind}"[^>]*><small>1</small> <b>{symbol}</b> {word}<', page)
  assert '<span class="option gold">circle</span>' in page


def test_siblings_stand_best_first_and_unscored_last(workdir):
  page = report.write_report(workdir).read_text()
  assert page.index("high sibling") < page.index("low sibling") < page.index("lost sibling")
  text = words(page)
  assert "reward 1.00 ▲ +0.70" in text and "reward 0.00 ▼ -0.70" in text and "unscored" in text


def test_what_the_model_wrote_cannot_become_markup(workdir):
  evil = '<script>alert(1)</script><img src="http://x.example/a.png" onerror=alert(1)>"\'&amp;'
  write_samples(
    workdir, "after", [[caption(evil, RIGHT, 1.0)], [caption("\ud800 \x00", WRONG, 0.0)]]
  )
  page = report.write_report(workdir).read_text()
  assert "<script" not in page and '<img src="http' not in page
  assert "&lt;script&gt;alert(1)" in page and "&amp;amp;" in page
  assert "default-src 'none'" in page  # and the browser is told to refuse it anyway


def test_an_empty_workdir_says_that_nothing_is_there_yet(tmp_path):
  text = words(report.write_report(tmp_path).read_text())
  assert "not complete" in text
  for what in (
    "the gate",
    "the evaluation before training",
    "the first training step",
    "the captions after training",
  ):
    assert what in text


def test_a_run_in_progress_shows_what_it_has(workdir):
  (workdir / "samples/after.json").unlink()
  (workdir / "samples/images/test_1.png").unlink()
  (workdir / "summary.json").write_text(json.dumps({"before": {"accuracy": 0.402}}))
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 31, "rew')
  text = words(report.write_report(workdir).read_text())
  assert "40.2% → not yet" in text and "A box." in text and "image not there yet" in text
  assert "1.5 minutes so far" in text  # 30 steps of 3 s
  assert (
    "Not there yet: the gate, the evaluation after training, the captions after training" in text
  )


def test_many_files_of_samples_are_thinned_evenly(workdir):
  for step in range(30, 200, 10):
    write_samples(workdir, f"step_{step:06d}", [[caption("A shape.", NONE, 0.0)]], step=step)
  text = words(report.write_report(workdir).read_text())
  assert [int(x) for x in re.findall(r"Step (\d+)", text)] == [20, 50, 90, 120, 160, 190]
  assert "6 of 18 files of samples" in text


def test_large_images_are_embedded_smaller(workdir):
  noise = np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), np.uint8)
  Image.fromarray(noise).save(workdir / "samples/images/test_0.png")
  page = report.write_report(workdir).read_text()
  assert "data:image/jpeg" in page and len(page) < 1_500_000


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("summary.json", "{", "summary.json: not JSON"),
    ("summary.json", "[]", r"summary.json: holds \[\], not an object"),
    (
      "samples/after.json",
      '{"step": 0, "rows": [{}]}',
      r"after.json: not samples .*rows\[0\]: name is missing",
    ),
    ("metrics.jsonl", "no\n", r"metrics\.jsonl:1"),
  ],
)
def test_a_bad_file_is_named_and_the_old_report_stays(workdir, name, text, message):
  old = report.write_report(workdir).read_text()
  (workdir / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    report.write_report(workdir)
  assert (workdir / "report.html").read_text() == old


@pytest.mark.parametrize(
  "answers", [[RIGHT | {"question": 1}], [RIGHT | {"choice": 3}], [{"choice": 0}]]
)
def test_answers_that_do_not_fit_their_questions_are_refused(workdir, answers):
  write_samples(workdir, "after", [[caption("x", RIGHT, 1.0) | {"answers": answers}]])
  with pytest.raises(ValueError, match="after.json: not samples"):
    report.write_report(workdir)


def test_no_workdir_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="is not a folder"):
    report.write_report(tmp_path / "nowhere")


def test_smoothing_starts_unbiased_and_keeps_gaps():
  values = np.array([2.0, math.nan, 2.0, 2.0])
  np.testing.assert_allclose(curves.smooth(values, 5), values)
  rising = curves.smooth(np.arange(100.0), 9)
  assert 95 - 0.1 < rising[-1] < 95 + 0.1  # behind by (span - 1) / 2


def test_curves_without_data_are_left_out_and_kinds_are_found():
  drawn = curves.draw_curves(
    [
      {"step": 1, "reward/mean": None, "judge/accuracy": 0.5, "judge/accuracy/a<b $x_1$": 0.2},
      {"step": 2, "reward/mean": None, "judge/accuracy": 0.6},
    ]
  )
  assert [curve.panel.title for curve in drawn] == ["Accuracy of the judge"]
  assert [label for label, _ in drawn[0].legend] == ["overall", "a<b $x_1$"]
  assert "overall 0.5 at step 1, 0.6 at step 2" in drawn[0].svg
  assert "a<b" not in drawn[0].svg
  assert (
    drawn[0].svg
    == curves.draw_curves(
      [
        {"step": 1, "judge/accuracy": 0.5, "judge/accuracy/a<b $x_1$": 0.2},
        {"step": 2, "judge/accuracy": 0.6},
      ]
    )[0].svg
  )  # the same numbers, the same bytes


# ---- in a browser

PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images], root = document.documentElement;
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  root.dataset.probe = JSON.stringify({
    samples: document.querySelectorAll("article.sample").length,
    broken: images.filter(image => !image.complete || image.naturalWidth === 0).length,
    images: images.length, rendering: getComputedStyle(images[0]).imageRendering,
    svgs: [...document.querySelectorAll(".curves figure > svg")].filter(
      svg => svg.getBoundingClientRect().height > 80).length,
    ids: ids.length - new Set(ids).size,
    scripts: document.scripts.length, too_wide: root.scrollWidth - innerWidth,
    ink: getComputedStyle(document.body).color});
  parent.postMessage(root.dataset.probe, "*");
});</script>"""


def probed(tmp_path, workdir):
  page = report.write_report(workdir).read_text()
  path = tmp_path / "probed.html"
  path.write_text(with_probe(page, PROBE))
  return path


@needs_browser
def test_a_browser_shows_the_page(workdir, tmp_path):
  dom = browse(tmp_path, probed(tmp_path, workdir), "--window-size=1200,1600", "--dump-dom")
  seen = read_probe(dom)
  assert seen["samples"] == 3 and seen["images"] == 3 and seen["broken"] == 0
  assert seen["rendering"] == "pixelated"
  assert seen["svgs"] == len(curves.PANELS)
  assert seen["ids"] == 0, "two elements share an id"
  assert seen["scripts"] == 1, "more than the test's own script"
  assert seen["too_wide"] <= 0
  assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", dom)
  assert not re.search(r"url\((?!#)|@import", dom)


@needs_browser
@pytest.mark.parametrize(
  "scheme, ink", [("light", "rgb(28, 29, 33)"), ("dark", "rgb(236, 238, 242)")]
)
def test_a_phone_shows_the_page_light_and_dark(workdir, tmp_path, scheme, ink):
  write_samples(workdir, "after", [[caption("endless" * 80, RIGHT, 1.0)]])
  page = probed(tmp_path, workdir)
  frame = tmp_path / "phone.html"
  frame.write_text(on_a_phone(page.name, scheme))
  seen = read_probe(browse(tmp_path, frame, "--dump-dom", "--virtual-time-budget=5000"))
  assert seen["too_wide"] <= 0, f"{seen['too_wide']} pixels stick out"
  assert seen["ink"] == ink


@needs_browser
def test_the_picture_of_the_page_is_not_blank(workdir, tmp_path):
  shot = tmp_path / "shot.png"
  browse(tmp_path, report.write_report(workdir), "--window-size=1200,1600", f"--screenshot={shot}")
  with Image.open(shot) as image:
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
  assert len(np.unique(pixels, axis=0)) > 50
  red = (pixels[:, 0] > 240) & (pixels[:, 1:].max(1) < 20)
  assert red.sum() > 1000  # the embedded circles


def test_a_change_that_rounds_to_none_has_no_minus():
  assert markup.delta(0.002, 0.0, "share") == "+0.00" and markup.delta(0.2, 0.1, "share") == "-0.10"
  assert markup.delta(0.5001, 0.5, "percent") == "+0.0 points"
