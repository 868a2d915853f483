"""docs/your_images.md from a folder of twelve drawn images to the gallery and the captions: its
commands as they are written, on tiny models of the names in them."""

import json
import re
import shlex

import pytest
from docs_test import MARK, blocks_of, commands_of
from helpers import scripted, tiny
from helpers.paths import ROOT
from PIL import Image, ImageDraw

from caprl_jax import main
from caprl_jax.data.readers.qa_sources import read_qa_rows

PAGE = ROOT / "docs" / "your_images.md"


def draw(path, number: int) -> None:
  """A shape on a background, unlike those of other numbers."""
  image = Image.new("RGB", (160, 120 + 10 * (number % 3)), ("white", "ivory", "azure")[number % 3])
  pen, x, y = ImageDraw.Draw(image), 10 + 23 * (number % 4), 8 + 20 * (number // 4)
  shape = pen.rectangle if number % 2 else pen.ellipse
  shape((x, y, x + 40 + 6 * (number % 5), y + 30 + 7 * (number % 4)), fill=tiny.COLORS[number % 3])
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path)


def lines_of(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_page_leads_from_a_folder_to_a_gallery(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  scripted.write_captioner(tmp_path / "Qwen" / "Qwen3-VL-2B-Instruct")
  scripted.write_judge(tmp_path / "Qwen" / "Qwen3-1.7B", tmp_path / "Qwen" / "Qwen3-VL-2B-Instruct")
  for number in range(12):
    part = "train" if number < 8 else "held_out"
    draw(tmp_path / "my_images" / part / f"{number}.png", number)

  for block in blocks_of(PAGE, PAGE.read_text()):
    mark = MARK.fullmatch(block.before)
    assert mark and mark["kind"] == "run in order", block.place
    for command in commands_of(block):
      assert main.main(["main", *command[3:], *shlex.split(mark["text"])]) == 0, command

  mine = tmp_path / "runs" / "mine"
  for part, count in (("train", 8), ("held_out", 4)):
    rows = read_qa_rows(str(mine / f"{part}.jsonl"), 0)
    assert len(rows) == count and all(len(row.questions) == 1 for row in rows)
    page = (mine / f"questions_{part}" / "curation.html").read_text()
    assert page.count("<article") == count and rows[0].questions[0].stem in page
  summary = tiny.read_back(mine / "train" / "summary.json")
  assert summary["before"]["questions"] == summary["after"]["questions"] == 4
  assert (mine / "train" / "report.html").is_file()
  # Written questions have no kinds that could be told apart.
  assert " on 4 questions, " in (mine / "train" / "log.txt").read_text()
  written = {name: lines_of(mine / f"{name}.jsonl") for name in ("before", "after")}
  for captions in written.values():
    assert len(captions) == 4
    assert all(re.match("The image shows a (red|green|blue) ", row["caption"]) for row in captions)
  gallery = (mine / "gallery" / "gallery.html").read_text()
  for captions in written.values():
    assert captions[0]["caption"].split()[-1] in gallery
  assert tiny.read_back(mine / "gallery" / "gallery.json")["questions"] == 4
  assert "no kind" not in gallery  # such a column would say what "right" says
  assert len(lines_of(tmp_path / "captions.jsonl")) == 12
  assert (tmp_path / "my_captioner" / "model.safetensors").is_file()
