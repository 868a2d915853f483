"""Mode `gallery`: files matched, figures, what the judge got right, the page in a browser."""

import base64
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from helpers import tiny
from helpers.pages.browser import browse, needs_browser, on_a_phone, read_probe, with_probe
from helpers.paths import ROOT
from helpers.servers.chat import judging, serving, shown
from PIL import Image

from caprl_jax.config import loading as config_file
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.jsonl import write_jsonl
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.inference.judge import HostJudge
from caprl_jax.modes.gallery import run as gallery
from caprl_jax.modes.gallery.captions import Pictures, match_names
from caprl_jax.modes.gallery.figures import difference, pick
from caprl_jax.modes.gallery.page import NOBODY, ComparedImage, GivenCaption

EVIL = '<script>alert(1)</script> & "a" \ud800'


def write(path: pathlib.Path, rows) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def said(name: str, caption: str, **more) -> dict:
  return {
    "image": name,
    "caption": caption,
    "tokens": [1] * (len(caption.split()) + 1),
    "finish": "end",
  } | more


@pytest.fixture
def folder(tmp_path):
  """Twelve drawn images with questions, and two files of captions."""
  tiny.write_data(tmp_path)
  names = [f"images/{i}.png" for i in range(12)]
  facts = [(tiny.COLORS[i % 3], tiny.SHAPES[i % 2]) for i in range(12)]
  write(tmp_path / "vague.jsonl", [said(name, "The image shows a shape.") for name in names])
  rows = [
    said(str(tmp_path / name), f"The image shows a {c} {s}.") for name, (c, s) in zip(names, facts)
  ]
  rows[3] |= {"finish": "length"}
  rows[5] = {"image": rows[5]["image"], "error": "row '5.png': cannot be read"}
  write(tmp_path / "clear.jsonl", rows[::-1])
  return tmp_path


def run(folder, workdir=None, **keys) -> tuple[str, dict]:
  """The page and the figures."""
  config = config_file.load_config(str(ROOT / "configs" / "gallery.py"))
  judge = keys.pop("judge", None)
  with config.unlocked():
    if judge:
      config.judge.source = judge
    named = {"captions": f"vague={folder}/vague.jsonl,clear={folder}/clear.jsonl"}
    config.gallery = {**config.gallery.to_dict(), **named, **keys}
  workdir = workdir or folder
  gallery.run(config, workdir)
  return (workdir / "gallery.html").read_text(), json.loads((workdir / "gallery.json").read_text())


def words(page: str) -> str:
  page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
  return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_captions_of_the_same_images_stand_side_by_side(folder):
  page, figures = run(folder)
  assert (
    figures["images"] == 12
    and "judged" not in page
    and "accuracy" not in figures["captioners"]["vague"]
  )
  assert figures["captioners"]["vague"] == {
    "images": 12,
    "failed": 0,
    "tokens": 6.0,
    "words": 5.0,
    "cut_share": 0.0,
  }
  clear = figures["captioners"]["clear"]
  assert (clear["failed"], clear["words"], clear["tokens"]) == (1, 6.0, 7.0)
  assert clear["cut_share"] == pytest.approx(1 / 11)
  assert (
    page.count("<article class=sample>") == 12
    and page.count("data:image/png") == 12
    and "no picture" not in page
  )
  text = words(page)
  assert "clear 12 1 6.0 7.0 9.1%" in text and "cannot be read" in text
  # named by the first file
  page, _ = run(folder, captions=f"clear={folder}/clear.jsonl,vague={folder}/vague.jsonl")
  assert "11.png" in page and str(folder) not in page, "a path of this machine is on the page"


def test_a_word_is_marked_where_one_captioner_alone_has_it(folder):
  page, _ = run(folder)
  assert set(re.findall(r'<mark class="only">(\w+)</mark>', page)) == {
    "marked",
    "shape",
    *tiny.COLORS,
    *tiny.SHAPES,
  }
  page, _ = run(folder, captions={"one": f"{folder}/vague.jsonl"})
  assert "<mark" not in page and "differ most" not in page


def test_what_a_captioner_wrote_cannot_become_markup(folder):
  write(folder / "vague.jsonl", [said(f"images/{i}.png", EVIL) for i in range(12)])
  page, _ = run(folder, captions={"<i>": f"{folder}/vague.jsonl", "b": f"{folder}/clear.jsonl"})
  assert "<script" not in page and "<i>" not in page and "default-src 'none'" in page
  assert "&lt;i&gt;" in page and "&amp;" in page and "&#55296;" in page


def test_the_judge_s_answers_are_its_own(folder, monkeypatch):
  """With a judge that reads words: right where the caption says the answer, none where it does
  not.
  """

  def choices(self, asks, what="judging"):
    found = [[i for i, option in enumerate(q.options) if option in caption] for caption, q in asks]
    return np.array([options[0] if options else -1 for options in found])

  monkeypatch.setattr(HostJudge, "choices", choices)
  judge = str(tiny.write_judge(folder / "judge"))
  page, figures = run(folder, judge=judge, questions=str(folder / "rows.jsonl"))
  rows = figures["captioners"]
  assert (figures["judged_images"], figures["questions"]) == (12, 24)
  assert figures["questions_by_kind"] == {"color": 12, "shape": 12}
  assert (
    rows["vague"]["accuracy"] == 0.0 == rows[NOBODY]["accuracy"] and rows["vague"]["misled"] == 0.0
  )
  # The failed one counts as not answered.
  assert rows["clear"]["accuracy"] == pytest.approx(11 / 12) and rows["clear"]["misled"] == 0.0
  assert rows["clear"]["accuracy_by_kind"] == pytest.approx({"color": 11 / 12, "shape": 11 / 12})
  assert page.count('<span class="answer right" title') == 22 and "<b>✓</b> red" in page
  # all of `vague`; the failed one has no chips
  assert page.count('<span class="answer none" title') == 24
  assert "Where the captioners differ most" in page
  _, figures = run(
    folder,
    judge=judge,
    questions=str(folder / "rows.jsonl"),
    judged=5,
    per_image=1,
    kinds=("shape",),
  )
  assert figures["questions"] == 5 and list(figures["questions_by_kind"]) == ["shape"]


def test_a_real_judge_answers(folder):
  judge, questions = str(tiny.write_judge(folder / "judge")), str(folder / "rows.jsonl")
  page, figures = run(folder, judge=judge, questions=questions, judged=3)
  assert figures["questions"] == 6 and 0 <= figures["captioners"]["clear"]["accuracy"] <= 1
  assert "no caption" in words(page) and page.count("<article class=sample>") == 3


def test_what_a_server_does_not_answer_is_left_out_for_all(folder, monkeypatch):
  pytest.importorskip("openai")

  def behave(handler, name, attempt):
    if handler.command == "POST" and "green" in shown(name)[0]:
      return handler.say(400, {"error": "refused"})
    return judging()(handler, name, attempt)

  with serving(behave) as server:
    endpoint = dict(url=server.url, model="m", max_retries=0, max_failures=99)
    load = config_file.load_config

    def served(path):
      config = load(path)
      with config.unlocked():
        config.judge = dict(reading="generate", abstain="last", endpoint=endpoint)
      return config

    monkeypatch.setattr(config_file, "load_config", served)
    _, figures = run(folder, questions=str(folder / "rows.jsonl"))
  # four of twelve images are green
  assert (figures["judged_images"], figures["questions"]) == (8, 16)
  assert figures["questions_left_out"] == 8
  rows = figures["captioners"]
  assert rows["vague"]["accuracy"] == rows[NOBODY]["accuracy"] == 0.0
  assert rows["clear"]["misled"] == 0.0 and rows["clear"]["accuracy"] == pytest.approx(7 / 8)


def test_those_that_differ_most_come_by_their_words():
  images = [
    ComparedImage(
      str(i),
      {
        "a": GivenCaption("one two"),
        "b": GivenCaption("one two" if i else "three"),
      },
    )
    for i in range(30)
  ]
  for seed in range(4):
    drawn, most = pick(images, 8, np.random.default_rng(seed))
    assert len(drawn) == len(most) == 4 and len({shared.name for shared in [*drawn, *most]}) == 8
    assert "0" in {shared.name for shared in drawn} or most[0].name == "0"
  assert difference(images[0]) == 1.0 and difference(images[1]) == 0.0


def test_questions_of_several_rows_of_an_image_are_all_asked(folder):
  rows = read_qa_rows(str(folder / "rows.jsonl"), 0)
  write_jsonl(
    folder / "apart.jsonl",
    [dataclasses.replace(row, questions=(q,)) for row in rows for q in row.questions],
  )
  shared = [ComparedImage(row.name, {}) for row in rows]
  cfg = gallery.GalleryConfig("a=b")
  whole = gallery.with_questions(shared, str(folder / "rows.jsonl"), cfg, 0)
  apart = gallery.with_questions(shared, str(folder / "apart.jsonl"), cfg, 0)
  assert [one.questions for one in apart] == [one.questions for one in whole] and len(
    whole[0].questions
  ) == 2


def test_names_are_shown_without_this_machine_s_folders():
  def shown(*names):
    pictures = Pictures(None, names, [])
    return [pictures.short(ComparedImage(name, {})) for name in names]

  assert shown("/home/me/a/1.png", "/home/me/b/1.png") == ["a/1.png", "b/1.png"]
  assert shown("/home/me/1.png") == ["1.png"]
  assert shown("/home/me/1.png", "images/2.png") == ["1.png", "2.png"]
  assert shown("a/1.png", "b/1.png") == ["a/1.png", "b/1.png"]


def test_a_name_too_long_for_a_file_is_not_found(folder):
  for name in ("data:image/png;base64," + "A" * 5000, "x\0y"):
    pictures = Pictures(None, [name], [folder])
    assert pictures.read(ComparedImage(name, {})) is None and pictures.missing == 1


def test_a_picture_that_is_its_own_name_is_shown(folder):
  data = base64.b64encode((folder / "images" / "0.png").read_bytes()).decode()
  for name in (f"data:image/png;base64,{data}", f"file://{folder}/images/0.png"):
    pictures = Pictures(None, [name], [folder])
    shared = ComparedImage(name, {})
    assert pictures.read(shared) is not None and len(pictures.short(shared)) < 300


def test_names_match_by_whole_paths_only():
  match = match_names
  assert match(["a/1.png", "2.png"], ["2.png", "a/1.png", "3.png"]) == {
    "a/1.png": "a/1.png",
    "2.png": "2.png",
  }
  assert match(["/data/a/1.png"], ["a/1.png", "b/1.png"]) == {"/data/a/1.png": "a/1.png"}
  assert match(["1.png"], ["x/11.png", "x/1.png"]) == {"1.png": "x/1.png"}
  assert match(["1.png"], ["x/1.png", "y/1.png"]) == {}, "two would fit"
  assert match(["x/1.png", "y/1.png"], ["1.png"]) == {}, "two would take it"
  assert match(["train/images/0.png"], ["test/images/0.png"]) == {}


def test_pictures_are_found_where_they_are_said_to_lie(folder, tmp_path_factory):
  away = tmp_path_factory.mktemp("away")
  for name in ("vague", "clear"):
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    write(
      away / f"{name}.jsonl",
      [row | {"image": "images/" + row["image"].rpartition("/")[2]} for row in rows],
    )
  page, _ = run(away)
  assert page.count("no picture found") == 12
  page, _ = run(away, pictures=str(folder / "images"))
  assert "no picture found" not in page
  with pytest.raises(ValueError, match="none of its 2 images, such as .*is one of those captioned"):
    other = away / "other"
    other.mkdir()
    for i in range(2):
      Image.new("RGB", (8, 8)).save(other / f"x{i}.png")
    run(away, pictures=str(other))


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", r"clear\.jsonl:2: not a row of mode caption \(.*JSON|clear\.jsonl:2"),
    ("[]", r"clear\.jsonl:2: .*a list, not an object"),
    ('{"caption": "x"}', r"clear\.jsonl:2: .*'image' is missing"),
    ('{"image": "a.png"}', r"clear\.jsonl:2: .*neither 'caption' nor 'error'"),
    ('{"image": "a.png", "caption": 3}', r"clear\.jsonl:2: .*caption is 3, not a str"),
    ('{"image": "0.png", "caption": "x"}', r"clear\.jsonl:2: image '0\.png' stands in line 1 too"),
  ],
)
def test_a_bad_line_is_named(folder, line, message):
  (folder / "clear.jsonl").write_text('{"image": "0.png", "caption": "x"}\n' + line + "\n")
  with pytest.raises(ValueError, match=message):
    run(folder)


def test_files_that_do_not_fit_are_refused(folder):
  with pytest.raises(ValueError, match=r"absent\.jsonl: No such file"):
    run(folder, captions=f"a={folder}/absent.jsonl")
  (folder / "empty.jsonl").write_text("\n")
  with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
    run(folder, captions=f"a={folder}/empty.jsonl")
  write(folder / "other.jsonl", [said("x.png", "x"), said("y.png", "x")])
  with pytest.raises(
    ValueError, match=r"no image in common: .*vague\.jsonl has 12, such as 'images/0\.png'; .* 2, "
  ):
    run(folder, captions=f"a={folder}/vague.jsonl,b={folder}/other.jsonl")
  with pytest.raises(ValueError, match="none of its 12 images.*'x.png'"):
    run(folder, captions=f"b={folder}/other.jsonl", questions=str(folder / "rows.jsonl"))
  with pytest.raises(
    ValueError, match=r"kinds = \('size',\) leaves no question; .* has \['color', 'shape'\]"
  ):
    run(folder, questions=str(folder / "rows.jsonl"), kinds=("size",))


@pytest.mark.parametrize(
  "captions, message",
  [
    ("", "names no file"),
    ("a.jsonl", "'a.jsonl' must be name=value"),
    ("a=x,a=y", "the name 'a' is given twice"),
  ],
)
def test_captions_that_are_no_names_and_files_are_refused(captions, message):
  with pytest.raises(ValueError, match=message):
    configuration.load_section(
      {"gallery": {"captions": captions}}, "gallery", gallery.GalleryConfig
    )


@needs_browser
@pytest.mark.parametrize(
  "scheme, ink", [("light", "rgb(28, 29, 33)"), ("dark", "rgb(236, 238, 242)")]
)
def test_a_phone_shows_the_page_light_and_dark(folder, tmp_path, scheme, ink):
  write(folder / "vague.jsonl", [said(f"images/{i}.png", "endless" * 80) for i in range(12)])
  page, _ = run(folder)
  probe = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
    wide: document.documentElement.scrollWidth - innerWidth,
    ink: getComputedStyle(document.body).color,
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    images: document.images.length,
    stacked: new Set(
      [...document.querySelector(".gallery").children].map(x => x.getBoundingClientRect().x)
    ).size
  }), "*"));
  </script>"""
  (tmp_path / "probed.html").write_text(with_probe(page, probe))
  (tmp_path / "phone.html").write_text(on_a_phone("probed.html", scheme))
  flags = "--dump-dom", "--virtual-time-budget=5000"
  seen = read_probe(browse(tmp_path, tmp_path / "phone.html", *flags))
  assert seen["wide"] <= 0 and seen["broken"] == 0 and seen["images"] == 12
  assert seen["stacked"] == 1, "captions stand beside each other on a phone"
  assert seen["ink"] == ink
