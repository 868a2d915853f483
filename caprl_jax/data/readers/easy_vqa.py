"""The PyPI package easy-vqa -> rows: its images, its questions made multiple choice.

Every image shows one shape in one colour. The package asks for short answers; here a colour is
chosen from 4 options, a shape from 3, and yes or no from both.
"""

import hashlib
import importlib.util
import pathlib

import numpy as np

from caprl_jax.data import rows
from caprl_jax.json_files import read_json, shown

SPLITS = ("train", "test")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")

_ANSWERS = {"color": COLORS, "shape": SHAPES, "yes/no": YES_NO}  # by kind of question
_KIND = {answer: kind for kind, answers in _ANSWERS.items() for answer in answers}
_MAX_OPTIONS = 4


def easy_vqa_root() -> pathlib.Path:
  """The package's data folder: `train/` and `test/`, each with questions.json and images/.

  Raises ValueError when the package is not installed.
  """
  # Found, not imported: the import alone would read every question.
  spec = importlib.util.find_spec("easy_vqa")
  for package in (spec.submodule_search_locations or ()) if spec else ():
    root = pathlib.Path(package) / "data"
    if all((root / split / "questions.json").is_file() for split in SPLITS):
      return root
  raise ValueError("the easy-VQA dataset is not installed; run `pip install easy-vqa`")


def read_easy_vqa(split: str, seed: int) -> list[rows.QARow]:
  """One row per image, in the order of the images' numbers, with all its distinct questions.

  A question's options depend on `seed`, the split, the image and the stem only, never on what else
  is read. `facts` hold "color" and "shape" where the image's questions give them away.

  Raises:
    ValueError: an unknown split, a package that is not installed, or one whose data are not those
      of easy-VQA.
  """
  if split not in SPLITS:
    raise ValueError(f"easy-VQA has no split {split!r}; use one of {', '.join(SPLITS)}")
  folder = easy_vqa_root() / split
  asked: dict[int, dict[str, str]] = {}  # answers by image and stem
  for stem, answer, image in read_json(folder / "questions.json"):
    if asked.setdefault(image, {}).setdefault(stem, answer) != answer:
      raise ValueError(
        f"{folder}: image {image} has two answers to {shown(stem)}; reinstall with `pip install "
        "--force-reinstall easy-vqa`"
      )
  result = []
  for image, answers in sorted(asked.items()):
    name = f"{split}/images/{image}.png"
    questions = tuple(
      _question(stem, answer, f"{seed}/{name}/{stem}") for stem, answer in answers.items()
    )
    file = folder / "images" / f"{image}.png"
    result.append(rows.QARow(file, questions, name, _facts(answers, name)))
  rows.check_rows(result, str(folder))
  return result


def _question(stem: str, answer: str, identity: str) -> rows.Question:
  """Makes a question multiple choice; `identity` seeds the draw and the order of its options."""
  if answer not in _KIND:
    raise ValueError(
      f"easy-VQA question {identity!r} has the answer {answer!r}, which is none of "
      f"{', '.join(_KIND)}"
    )
  kind = _KIND[answer]
  # Not hash(): it differs from process to process.
  digest = hashlib.sha256(identity.encode()).digest()
  generator = np.random.default_rng(int.from_bytes(digest, "big"))
  others = [other for other in _ANSWERS[kind] if other != answer]
  drawn = [answer] + [others[i] for i in generator.permutation(len(others))[: _MAX_OPTIONS - 1]]
  options = tuple(drawn[i] for i in generator.permutation(len(drawn)))
  return rows.Question(stem, options, options.index(answer), kind)


def _facts(answers: dict[str, str], name: str) -> dict[str, str]:
  """The image's colour and shape, as far as its questions and answers (by stem) tell.

  They tell by an answer ("what color is the shape?" red), in a stem ("what is the red shape?"), by
  yes or no ("is no circle present?" no), or by ruling out all other values.
  """
  present, absent = set(), set()
  for stem, answer in answers.items():
    words = set(stem.rstrip("?").split())
    negated = bool(words & {"no", "not"})
    shown = answer not in YES_NO or (answer == "yes") != negated
    (present if shown else absent).update(words | {answer})
  facts = {}
  for attribute, values in (("color", COLORS), ("shape", SHAPES)):
    possible = [value for value in values if value not in absent]
    found = [value for value in values if value in present] or possible
    if not set(found) <= set(possible) or not found or len(present & set(values)) > 1:
      raise ValueError(f"easy-VQA image {name} has questions that contradict each other: {answers}")
    if len(found) == 1:
      facts[attribute] = found[0]
  return facts
