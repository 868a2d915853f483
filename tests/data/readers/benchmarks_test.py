"""Evaluation files, by their description: no released file lies here."""

import base64
import dataclasses
import json
import pathlib
import pickle
import string
import zipfile
import zlib

import pytest
from PIL import Image

from caprl_jax.data import rows
from caprl_jax.data.readers.benchmarks.files import benchmark_of, from_qa_rows, read_benchmark
from caprl_jax.data.readers.benchmarks.images import StoredZipImage
from caprl_jax.data.readers.benchmarks.prompts import (
  parse_options,
  split_options,
  split_prompt,
  stage2_prompt,
  user_text,
)
from caprl_jax.data.readers.benchmarks.row import BenchmarkRow
from caprl_jax.data.rows import BadRow, PixelLimits, QARow, Question

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = (
  "<|im_start|>system\nThink in <think> </think>, answer in <answer> \\boxed{} </answer>."
  "<|im_end|>\n"
)
END = "<|im_end|>\n<|im_start|>assistant\n"
ASKED = "What colour is the dog?\nA. red\nB. light blue\nAnswer with the letter."


def prompt(text=ASKED, image=IMAGE):
  return f"{SYSTEM}<|im_start|>user\n{image}{text}{END}"


def item(**changes):
  return {"image": "charts/a.png", "prompt": prompt(), "answer": "B"} | changes


def write(folder, items, name="lmm_eval_MMStar.json"):
  path = folder / name
  path.write_text(json.dumps(items))
  return path


@pytest.fixture
def images(tmp_path):
  folder = tmp_path / "bench_image_folder"
  (folder / "charts").mkdir(parents=True)
  Image.new("RGB", (2, 3), "red").save(folder / "charts" / "a.png")
  return folder


def test_a_row(tmp_path, images):
  assert list(read_benchmark(write(tmp_path, [item()]), images)) == [
    BenchmarkRow(
      images / "charts/a.png",
      prompt(),
      "B",
      ("red", "light blue"),
      "MMStar",
      "MMStar/0",
      stem="What colour is the dog?\nAnswer with the letter.",
    )
  ]


def test_images_that_stand_in_the_row(tmp_path, images):
  data = (images / "charts/a.png").read_bytes()
  text = base64.b64encode(data).decode()
  uri = f"data:image/png;base64,{text}"
  spelled = [uri, [uri], {"bytes": text, "path": "x.png"}, {"path": "charts/a.png", "bytes": None}]
  path = write(tmp_path, [item(image=image) for image in spelled])
  first, second, third, by_path = read_benchmark(path, images)
  assert first.image == second.image == third.image == data
  assert by_path.image.resolve() == images / "charts/a.png"
  path = write(tmp_path, [item(image="data:image/png;base64,$"), item(image="https://x.org/a.png")])
  for row, message in zip(read_benchmark(path, images), ("no base64", "download it"), strict=True):
    assert isinstance(row, BadRow) and message in row.message and len(row.message) < 400


@pytest.mark.parametrize(
  "answer, gold",
  [
    ("two words", "two words"),
    (3, "3"),
    (2.50, "2.5"),
    (["a", 2], ("a", "2")),
    (" B ", " B "),
    (0, "0"),
  ],
)
def test_golds(tmp_path, images, answer, gold):
  (row,) = read_benchmark(write(tmp_path, [item(answer=answer)]), images)
  assert row.gold == gold


@pytest.mark.parametrize(
  "image",
  [
    "file://charts/a.png",
    ["charts/a.png"],
    "./charts/a.png",
    "bench_image_folder/charts/a.png",
    "/elsewhere/bench_image_folder/charts/a.png",
    "..\\data\\bench_image_folder\\charts\\a.png",
    [
      {
        "role": "user",
        "content": [{"type": "image", "image": "charts/a.png"}, {"type": "text", "text": "What?"}],
      }
    ],
    [
      {"role": "system", "content": "Be good."},
      {"role": "user", "content": [{"image": "charts/a.png"}]},
    ],
  ],
)
def test_ways_to_name_an_image(tmp_path, images, image):
  path = write(tmp_path, [item(image=image)])
  (row,) = read_benchmark(path, images)
  assert row.image.resolve() == images / "charts/a.png"
  with zipfile.ZipFile(tmp_path / "bench_image_folder.zip", "w") as file:
    file.write(images / "charts/a.png", "bench_image_folder/charts/a.png")
  (row,) = read_benchmark(path, tmp_path / "bench_image_folder.zip")
  assert row.image.member == "bench_image_folder/charts/a.png"


@pytest.mark.parametrize(
  "bad, message",
  [
    ("text", "is 'text', but it must be an object"),
    ({"image": "charts/a.png", "prompt": prompt()}, "no answer; it has"),
    ({"answer": "B"}, "no image and no prompt; it has"),
    (item(prompt=["x"]), "the prompt is .* must be a text in ChatML"),
    (item(prompt=prompt(image="")), "the prompt has 0 image placeholders"),
    (item(prompt=prompt(image=IMAGE + IMAGE)), "the prompt has 2 image placeholders"),
    (item(prompt=prompt(image=IMAGE + "<image>")), "the prompt has 2 image placeholders"),
    (item(prompt=prompt(image="<|image_pad|>")), "the prompt has 0 image placeholders"),
    (item(answer=None), "the answer is None"),
    (item(answer=True), "the answer is True"),
    (item(answer=" "), "the answer is ' '"),
    (item(answer=[]), "the list of answers is empty"),
    (item(answer=["a", ""]), "the answer is .'a', ''."),
    (item(image=None), "image is None, with 0 image paths"),
    (item(image=""), "image is '', with 1 image paths"),
    (item(image=["charts/a.png", "charts/a.png"]), "with 2 image paths"),
    (
      item(image="charts/b.png"),
      "image 'charts/b.png' is not in .*bench_image_folder; correct it, or pass",
    ),
    (item(image="charts"), "image 'charts' is not in"),
    (item(max_pixels="many"), "max_pixels is 'many', but it must be a positive integer"),
    (item(min_pixels=0), "min_pixels is 0, but"),
    (item(min_pixels=9, max_pixels=4), "min_pixels 9 is more than max_pixels 4"),
  ],
)
def test_bad_rows_stand_in_their_places(tmp_path, images, bad, message):
  path = write(tmp_path, [item(), bad, item(answer="A")])
  first, found, last = read_benchmark(path, images)
  assert (first.name, last.name) == ("MMStar/0", "MMStar/2") and isinstance(found, BadRow)
  assert found.where == f"{path}, item 1" and found.message.startswith(found.where)
  with pytest.raises(ValueError, match=message):
    rows.good_rows([found])


@pytest.mark.parametrize(
  "columns, years",
  [
    ({}, None),
    ({"Year": []}, None),
    ({"Year": ["YES"]}, (True,)),
    ({"Year": ["NO", "yes"], "Question Type": "Factoid"}, (False, True)),
    ({"Year": ["NO", "YES"], "Question Type": "Conversational"}, (True,)),
    ({"year": "NO"}, (False,)),
    ({"Year": 3}, None),
  ],
)
def test_which_answers_are_years(tmp_path, images, columns, years):
  [row] = read_benchmark(write(tmp_path, [item(**columns)], "lmm_eval_ChartQA_Pro.json"), images)
  assert isinstance(row, BenchmarkRow) and row.years == years


MESSAGE = {"role": "user", "content": [{"image": "charts/a.png", "max_pixels": 900}]}


@pytest.mark.parametrize(
  "change, limits",
  [
    ({}, None),
    ({"max_pixels": None}, None),
    ({"min_pixels": 4, "max_pixels": 9}, PixelLimits(4, 9)),
    ({"image": {"image": "charts/a.png", "min_pixels": 784}}, PixelLimits(784, None)),
    ({"image": {"path": "charts/a.png", "max_pixels": 5}}, PixelLimits(None, 5)),
    ({"image": [MESSAGE], "max_pixels": 4, "min_pixels": 3}, PixelLimits(3, 900)),
  ],
)
def test_limits_of_pixels(tmp_path, images, change, limits):
  [row] = read_benchmark(write(tmp_path, [item(**change)]), images)
  assert isinstance(row, BenchmarkRow) and row.limits == limits


def test_lines(tmp_path, images):
  path = tmp_path / "lmm_eval_Visu.jsonl"
  path.write_text(json.dumps(item()) + "\nnot JSON\n" + json.dumps(item()) + "\n")
  first, bad, last = read_benchmark(path, images)
  assert isinstance(bad, BadRow) and f"{path}:2: not JSON" in bad.message
  assert (first.benchmark, last.name) == ("VisuLogic", "VisuLogic/2")


@pytest.mark.parametrize(
  "name, benchmark",
  [
    ("lmm_eval_chartqa.json", "ChartQA"),
    ("lmm_eval_ChartQA_Pro.json", "ChartQAPro"),
    ("lmm_eval_seed2k.json", "SEED"),
    ("lmm_eval_MMMU_Pro.json", "MMMU-Pro"),
    ("lmm_eval_mmmu.json", "MMMU"),
    ("lmm_eval_infovqa.json", "InfoVQA"),
    ("lmm_eval_MMStar.json", "MMStar"),
    ("lmm_eval_CharXiv.json", "CharXiv"),
    ("lmm_eval_MathVision.json", "MathVision"),
    ("lmm_eval_MathVerse_MINIVInt.json", "MathVerse"),
    ("lmm_eval_WeMath.json", "WeMath"),
    ("lmm_eval_Visu.json", "VisuLogic"),
  ],
)
def test_the_files_name_says_the_benchmark(tmp_path, name, benchmark):
  assert benchmark_of(tmp_path / "chart" / "info" / name) == benchmark


@pytest.mark.parametrize(
  "name",
  ["lmm_eval_chart.json", "my_lmm_eval_chartqa.json", "lmm_eval_CHARTQA.json", "lmm_eval_mmmu.txt"],
)
def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, images, name):
  with pytest.raises(
    ValueError, match="must be one of lmm_eval_chartqa.json, .*lmm_eval_Visu.json"
  ):
    list(read_benchmark(write(tmp_path, [item()], name), images))


@pytest.mark.parametrize(
  "text, message",
  [
    ("[]", "no rows"),
    ("{}", "holds dict, but it must be a list"),
    ("[", "not JSON"),
    (None, "cannot be read"),
  ],
)
def test_files_that_are_none(tmp_path, images, text, message):
  path = tmp_path / "lmm_eval_mmmu.json"
  if text is not None:
    path.write_text(text)
  with pytest.raises(ValueError, match=message):
    list(read_benchmark(path, images))


def test_image_roots_that_are_none(tmp_path, images):
  path = write(tmp_path, [item()])
  for root, message in [
    (tmp_path / "none", "no such folder or zip file"),
    (path, "not a zip file that can be read"),
  ]:
    with pytest.raises(ValueError, match=message):
      list(read_benchmark(path, root))


# Images in a zip file.


@pytest.fixture
def packed(tmp_path, images):
  path = tmp_path / "bench_image_folder.zip"
  with zipfile.ZipFile(path, "w") as file:
    file.write(images / "charts/a.png", "charts/a.png", zipfile.ZIP_STORED)
    file.writestr("charts/b.png", b"0" * 5000, zipfile.ZIP_DEFLATED)
    file.writestr("charts/c.png", b"x", zipfile.ZIP_BZIP2)
    file.mkdir("empty")
  return path


def read(tmp_path, root, name):
  (row,) = read_benchmark(write(tmp_path, [item(image=name)]), root)
  return row


def test_images_in_a_zip_file(tmp_path, packed, images):
  row = read(tmp_path, packed, "charts/a.png")
  assert (
    isinstance(row.image, StoredZipImage) and row.image.where == f"{packed}, member 'charts/a.png'"
  )
  assert row.image.read() == (images / "charts/a.png").read_bytes()
  assert rows.read_image(row).size == (2, 3)
  assert pickle.loads(pickle.dumps(row)) == row  # loaders send rows to other processes
  deflated = read(tmp_path, packed, "charts/b.png").image
  assert deflated.packed < 5000 and deflated.read() == b"0" * 5000


def test_a_member_unpacks_to_no_more_than_its_zip_file_says_and_an_image_may_have(tmp_path, packed):
  """A few bytes can be zeros that fill the memory."""
  image = read(tmp_path, packed, "charts/b.png").image
  with pytest.raises(ValueError, match="member 'charts/b.png': damaged"):
    dataclasses.replace(image, size=4000, crc=zlib.crc32(b"0" * 4000)).read()
  with pytest.raises(ValueError, match="member 'charts/b.png': 1,024 MiB, and an image may have"):
    dataclasses.replace(image, size=1 << 30).read()


@pytest.mark.parametrize(
  "name, message",
  [
    ("charts/c.png", "packed in a way that is not read"),
    ("empty/", "is not in"),
    ("d.png", "is not in"),
  ],
)
def test_members_that_cannot_be_read_are_bad_rows(tmp_path, packed, name, message):
  with pytest.raises(ValueError, match=message):
    rows.good_rows([read(tmp_path, packed, name)])


@pytest.mark.parametrize("name", ["charts/a.png", "charts/b.png"])
def test_damaged_zip_files(tmp_path, packed, name):
  image = read(tmp_path, packed, name).image
  data = bytearray(packed.read_bytes())
  data[image.offset + 30 + len(name) + image.packed // 2] ^= 255
  packed.write_bytes(data)
  with pytest.raises(ValueError, match=f"member '{name}': damaged"):
    image.read()
  packed.write_bytes(data[: image.offset + 35])
  with pytest.raises(ValueError, match=f"member '{name}': damaged"):
    image.read()
  packed.unlink()
  with pytest.raises(ValueError, match="No such file or directory; put the zip file back"):
    image.read()


# Stage 2's prompt.


def row_of(text):
  return BenchmarkRow(pathlib.Path("a.png"), text, "B", (), "MMStar", "MMStar/0")


def test_stage_2_to_the_byte():
  want = (
    SYSTEM + "<|im_start|>user\nHere is a detailed caption of an image: A dog.\n Red. Please "
    "answer the question based on the caption." + ASKED + END
  )
  assert stage2_prompt(row_of(prompt()), "A dog.\n Red") == want
  assert stage2_prompt(row_of(prompt(image="<image>")), "A dog.\n Red") == want


def test_a_caption_apart_from_its_prompt():
  before, after = split_prompt(row_of(prompt()))
  assert before.endswith("<|im_start|>user\nHere is a detailed caption of an image: ")
  assert after.startswith(". Please answer the question based on the caption.What colour")
  # nothing in a caption is a placeholder or a pattern
  for caption in ("", IMAGE, "<image>", "\\1 \\g<0>"):
    assert stage2_prompt(row_of(prompt()), caption) == before + caption + after


@pytest.mark.parametrize(
  "text",
  [
    prompt(),
    prompt(image="<image>\n"),
    "<image>" + ASKED,
    ASKED + IMAGE,
    "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n" + prompt(),
  ],
)
def test_the_questions_own_text(text):
  assert user_text(row_of(text)) == ASKED


@pytest.mark.parametrize("use", [split_prompt, user_text, lambda row: stage2_prompt(row, "x")])
def test_a_prompt_without_its_placeholder(use):
  with pytest.raises(ValueError, match="row 'MMStar/0': the prompt has 0 image placeholders"):
    use(row_of(ASKED))


# Options.


@pytest.mark.parametrize(
  "text, options",
  [
    (ASKED, ("red", "light blue")),
    ("Q?\n(A) red\n(B) blue\n(C) A. M.", ("red", "blue", "A. M.")),
    ("Q?\nChoices:\nA:3\nB:4", ("3", "4")),
    ("Q?\n - A) red  \n - B) blue\n", ("red", "blue")),
    ("A. Smith painted it.\nWho?\nA) x\nB) y\nAnswer.", ("x", "y")),
    ("A) old\nB) list\nQ?\nA) x\nB) y\nC) z", ("x", "y", "z")),
    ("Q?\nA) x\nC) y", ()),
    ("Q?\nB) x\nC) y", ()),
    ("Q?\nC) x\nB) y", ()),
    ("Q?\nA) x\nA) y\nB) z", ("y", "z")),
    ("Q?\nA) only", ()),
    ("What is A) or B)?", ()),
    ("Q?\nOptions: A: The cat, black, B: E.g. C: D, C: x.", ("The cat, black", "E.g.", "D, C: x.")),
    ("Q?\nOptions: (A) red (B) blue", ("red", "blue")),
    ("Q?\nOptions: A: , B: x", ()),
    ("Q?\nOptions: red, blue", ()),
  ],
)
def test_options_of_a_question(text, options):
  assert parse_options(text) == options


@pytest.mark.parametrize(
  "text, stem",
  [
    (ASKED, "What colour is the dog?\nAnswer with the letter."),
    ("Q?\nChoices:\nA:3\nB:4", "Q?"),
    ("Q?\n\nOptions:\n\n(A) red\n(B) blue", "Q?"),
    ("What are my options\nA) x\nB) y", "What are my options"),
    ("A) old\nB) list\nQ?\nA) x\nB) y", "A) old\nB) list\nQ?"),
    ("Q?\nOptions: A: red, B: blue", "Q?"),
    ("Q? Choices: (A) red (B) blue\nAnswer.", "Q?\nAnswer."),
    ("Q?\nA) only", "Q?\nA) only"),
    ("A) red\nB) blue", ""),
  ],
)
def test_a_question_without_its_options(text, stem):
  assert split_options(text) == (stem, parse_options(text))


def test_letters_end_at_z():
  text = "\n".join(f"{letter}) {letter}{letter}" for letter in string.ascii_uppercase) + "\nB) more"
  assert len(parse_options(text)) == 26


@pytest.mark.parametrize(
  "answer, options",
  [("B", ("red", "light blue")), ("blue", ("red", "light blue")), ("C", ()), (["A", "C"], ())],
)
def test_options_that_the_gold_is_not_of_are_not_believed(tmp_path, images, answer, options):
  (row,) = read_benchmark(write(tmp_path, [item(answer=answer)]), images)
  assert row.options == options and row.stem == (split_options(ASKED)[0] if options else ASKED)


# Plain rows of questions.


def test_plain_questions_as_a_benchmark():
  first, second = (
    Question("What colour?", ("red", "blue"), 1, "colour"),
    Question("How\nmany?", ("1", "2", "3"), 0),
  )
  found = from_qa_rows([QARow(b"x", (first, second), "dog"), QARow(b"y", (first,), "cat")])
  assert found[0] == BenchmarkRow(
    b"x",
    "<image>\nWhat colour?\nA) red\nB) blue",
    "B",
    ("red", "blue"),
    "questions",
    "dog, question 0",
    "colour",
    "What colour?",
  )
  assert [(row.name, row.gold, row.image) for row in found] == [
    ("dog, question 0", "B", b"x"),
    ("dog, question 1", "A", b"x"),
    ("cat", "B", b"y"),
  ]
  assert all(parse_options(user_text(row)) == row.options for row in found)


def test_a_question_that_spells_a_placeholder():
  with pytest.raises(ValueError, match="row 'dog': the prompt has 2 image placeholders"):
    from_qa_rows([QARow(b"x", (Question("What is <image>?", ("a tag", "no tag"), 0),), "dog")])
