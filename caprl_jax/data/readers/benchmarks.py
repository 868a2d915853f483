"""CapRL's evaluation files -> benchmark questions, each with the place where a caption stands for
its image.

The files are internlm/CapRL-Evaluation-Files: json_file/lmm_eval_*.json, with the images in
bench_image_folder.zip. We have their description and the released code that reads them, not the
files. Known: a list of rows {image, prompt, answer}; `prompt` is a full ChatML text, in whose user
turn an image placeholder stands first; stage 2 puts a sentence with the caption in its place.
Assumed, and refused with a message where it does not hold: `image` is a path or a list of messages
with one image (the code hands it to qwen_vl_utils, which takes messages, and resizes the image
within the `min_pixels` and `max_pixels` that stand beside it); `answer` is a text, a number or a
list of such.
"""

import dataclasses
import math
import pathlib
import re
import string
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from caprl_jax.data.json_rows import read_items
from caprl_jax.data.readers.caprl_json import choices_of
from caprl_jax.data.readers.image_spellings import MAX_IMAGE_BYTES, find_image, spelled_image
from caprl_jax.data.rows import BadRow, ImageSource, PixelLimits, QARow
from caprl_jax.json_files import shown

# What a file holds, by its name without the suffix: the name that its figures are published under.
BENCHMARKS = {
  "lmm_eval_chartqa": "ChartQA",
  "lmm_eval_infovqa": "InfoVQA",
  "lmm_eval_MMStar": "MMStar",
  "lmm_eval_mmmu": "MMMU",
  "lmm_eval_CharXiv": "CharXiv",
  "lmm_eval_ChartQA_Pro": "ChartQAPro",
  "lmm_eval_MMMU_Pro": "MMMU-Pro",
  "lmm_eval_seed2k": "SEED",
  "lmm_eval_MathVerse_MINIVInt": "MathVerse",
  "lmm_eval_MathVision": "MathVision",
  "lmm_eval_WeMath": "WeMath",
  "lmm_eval_Visu": "VisuLogic",
}
QUESTIONS = "questions"  # the benchmark of rows that `from_qa_rows` makes

PLACEHOLDERS = ("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
# Stage 2's sentence in the placeholder's place, to the byte: nothing between it and the question's
# text.
BEFORE_CAPTION = "Here is a detailed caption of an image: "
AFTER_CAPTION = ". Please answer the question based on the caption."

_USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_OPTION_LINE = re.compile(r"\s*(?:[-*]\s*)?(?:\(([A-Z])\)|([A-Z])[).:])\s*(\S.*?)\s*$")
_OPTIONS_TITLE = re.compile(r"(?:^|\n)\s*(?:options|choices)\s*[:：]?\s*\Z", re.IGNORECASE)
_INLINE = re.compile(r"(?:options|choices)\s*[:：]\s*(.+)", re.IGNORECASE)
_INLINE_LABEL = re.compile(r"(?:^|[\s,;])\(?([A-Z])[).:]\s*")


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
  """A question of a benchmark about an image.

  `prompt` is the whole text that an answering model reads, with exactly one of PLACEHOLDERS where
  the caption goes. `gold` is the answer, or several that are all right, as the file writes it.
  `options` are the texts of lettered options that the prompt lists; () where it lists none, or none
  that the gold letter is of. `kind` is a group for metrics. `stem` is the question without these
  options, for who lists them anew. `years`: which of ChartQAPro's answers are years, where the row
  says so. `limits` are those of this image, where the row names any.
  """

  image: ImageSource
  prompt: str
  gold: str | tuple[str, ...]
  options: tuple[str, ...]
  benchmark: str
  name: str
  kind: str = ""
  stem: str = ""
  years: tuple[bool, ...] | None = None
  limits: PixelLimits | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StoredZipImage:
  """A member of a zip file: `packed` bytes, stored or deflated, behind the member's header at byte
  `offset`; `size` bytes when they are unpacked.
  """

  path: pathlib.Path
  member: str
  offset: int
  packed: int
  size: int
  deflated: bool
  crc: int

  @property
  def where(self) -> str:
    return f"{self.path}, member {self.member!r}"

  def read(self) -> bytes:
    """Raises ValueError, with `where`, for a file that is gone, damaged, or too large."""
    if max(self.size, self.packed) > MAX_IMAGE_BYTES:
      most = f"an image may have {MAX_IMAGE_BYTES >> 20}; pack a smaller one"
      raise ValueError(f"{self.where}: {self.size >> 20:,} MiB, and {most}")
    # Not by zipfile, which would read the list of all members again for every image, and in every
    # process.
    try:
      with open(self.path, "rb") as file:
        file.seek(self.offset)
        header = file.read(30)
        file.seek(
          int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1
        )
        data = file.read(self.packed)
    except OSError as error:
      raise ValueError(f"{self.where}: {error.strerror}; put the zip file back") from error
    try:
      # A megabyte may be packed zeros that fill the memory.
      data = zlib.decompressobj(-15).decompress(data, self.size + 1) if self.deflated else data
    except zlib.error as error:
      raise ValueError(f"{self.where}: damaged ({error}); fetch the zip file again") from error
    if len(data) != self.size or zlib.crc32(data) != self.crc:
      raise ValueError(f"{self.where}: damaged (its checksum differs); fetch the zip file again")
    return data


def benchmark_of(path: pathlib.Path) -> str:
  """The benchmark that a file holds, by its exact name. Raises ValueError, with the names there
  are, for another.
  """
  if path.stem not in BENCHMARKS or path.suffix not in (".json", ".jsonl"):
    raise ValueError(
      f"{path}: not the name of a benchmark's file; it must be one of "
      f"{', '.join(f'{stem}.json' for stem in BENCHMARKS)} (or the same as .jsonl)"
    )
  return BENCHMARKS[path.stem]


def read_benchmark(path: pathlib.Path, image_root: pathlib.Path) -> Iterator[BenchmarkRow | BadRow]:
  """The rows of an evaluation file, a JSON list or one row per line, in its order.

  `image_root` is the folder of images or a zip file of it. Image paths are relative to it; paths
  that begin with its name, or are absolute with its name somewhere in them, as another machine
  wrote them, are found too. A row that cannot be used is a BadRow with its place.

  Raises ValueError for a file of another name, one that cannot be read or has no rows, or an
  image_root that is not there.
  """
  benchmark = benchmark_of(path)
  find = _finder(image_root)
  number = -1
  for number, (where, item) in enumerate(read_items(path)):
    if isinstance(item, BadRow):
      yield item
      continue
    try:
      yield _row(item, find, benchmark, f"{benchmark}/{number}", where)
    except ValueError as error:
      yield BadRow(where, str(error))
  if number < 0:
    raise ValueError(f"{path}: no rows")


def from_qa_rows(rows: Iterable[QARow]) -> list[BenchmarkRow]:
  """Plain rows of questions as a benchmark: one row per question, options as lines "A) red", the
  gold's letter.

  The prompt is the placeholder, the stem and the options; the caller adds turns and how to answer.
  Raises ValueError for a question that spells a placeholder itself.
  """
  found = []
  for row in rows:
    for i, question in enumerate(row.questions):
      prompt = "\n".join([PLACEHOLDERS[1], question.stem, *choices_of(question)])
      name = row.name if len(row.questions) == 1 else f"{row.name}, question {i}"
      split_at_placeholder(prompt, f"row {shown(name)}")
      gold = string.ascii_uppercase[question.gold]
      found.append(
        BenchmarkRow(
          row.image, prompt, gold, question.options, QUESTIONS, name, question.kind, question.stem
        )
      )
  return found


def split_at_placeholder(prompt: str, where: str) -> tuple[str, str]:
  """What stands before and after the one image placeholder. Raises ValueError, from `where` on, for
  none or more.
  """
  count = sum(prompt.count(placeholder) for placeholder in PLACEHOLDERS)
  if count != 1:
    raise ValueError(
      f"{where}: the prompt has {count} image placeholders "
      f"({' or '.join(PLACEHOLDERS)}), but one caption; drop the row"
    )
  before, _, after = prompt.partition(next(one for one in PLACEHOLDERS if one in prompt))
  return before, after


def split_prompt(row: BenchmarkRow) -> tuple[str, str]:
  """Stage 2's prompt before and after the caption.

  Who tokenises the parts apart, with special tokens in these and without in the caption, lets no
  caption that spells `<|im_end|>` steer the answering model."""
  before, after = split_at_placeholder(row.prompt, f"row {shown(row.name)}")
  return before + BEFORE_CAPTION, AFTER_CAPTION + after


def stage2_prompt(row: BenchmarkRow, caption: str) -> str:
  """The answering model's prompt as the release makes it. The caption goes in as it is, chat tokens
  included.

  The release replaces only a `<|vision_start|>…` placeholder that begins the user's turn; for
  others it would show no caption at all, and this does."""
  before, after = split_prompt(row)
  return before + caption + after


def user_text(row: BenchmarkRow) -> str:
  """The benchmark's own question: the user's turn that holds the placeholder, without it and
  without chat tokens.
  """
  split_at_placeholder(row.prompt, f"row {shown(row.name)}")
  turns = [
    turn for turn in _USER_TURN.findall(row.prompt) if any(one in turn for one in PLACEHOLDERS)
  ] or [row.prompt]
  before, after = split_at_placeholder(turns[0], f"row {shown(row.name)}")
  return (before + after).strip()


def parse_options(text: str) -> tuple[str, ...]:
  """The texts of the last lettered options in a question, from A on without a gap; () for fewer
  than two.

  They stand a line each ("A) red", "(A) red", "A. red", "A: red", "- A. red"), or in one line
  behind "Options:" or "Choices:" ("Options: A: red, B: blue")."""
  return split_options(text)[1]


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
  """A question -> its text without its options and their title, and the options, as `parse_options`
  has them.
  """
  lines = text.splitlines()
  best: list[str] = []
  run: list[str] = []
  end = 0
  for number, match in enumerate(map(_OPTION_LINE.match, lines), 1):
    letter = (match.group(1) or match.group(2)) if match else None
    if letter == "A":
      run = [match.group(3)]
    elif letter and run and letter == chr(ord("A") + len(run)):
      run.append(match.group(3))
    else:
      run = []
    if len(run) >= 2:
      best, end = list(run), number
  if best:
    before = _OPTIONS_TITLE.sub("", "\n".join(lines[: end - len(best)]))
    return "\n".join([before, *lines[end:]]).strip(), tuple(best)
  for inline in reversed(list(_INLINE.finditer(text))):
    found = _inline_options(inline.group(1))
    if len(found) >= 2:
      return (text[: inline.start()].rstrip() + text[inline.end() :]).strip(), found
  return text, ()


def _inline_options(text: str) -> tuple[str, ...]:
  starts: list[re.Match[str]] = []
  for match in _INLINE_LABEL.finditer(text):
    # another letter is part of an option's text
    if match.group(1) == string.ascii_uppercase[len(starts) % 26]:
      starts.append(match)
  ends = [match.start() for match in starts[1:]] + [len(text)]
  found = tuple(
    text[match.end() : end].strip().rstrip(",;").strip() for match, end in zip(starts, ends)
  )
  return found if all(found) else ()


def _row(item: Any, find: "_Finder", benchmark: str, name: str, where: str) -> BenchmarkRow:
  if not isinstance(item, dict):
    raise ValueError(
      f"{where} is {shown(item)}, but it must be an object with image, prompt and answer"
    )
  missing = [key for key in ("image", "prompt", "answer") if key not in item]
  if missing:
    raise ValueError(f"{where}: no {' and no '.join(missing)}; it has {shown(sorted(item))}")
  prompt = item["prompt"]
  if not isinstance(prompt, str):
    raise ValueError(f"{where}: the prompt is {shown(prompt)}, but it must be a text in ChatML")
  split_at_placeholder(prompt, where)
  gold = _gold(item["answer"], where)
  parts = list(_image_parts(item["image"], item))
  image = _image(item["image"], parts, find, where)
  limits = _limits(parts[0][1], where)
  row = BenchmarkRow(image, prompt, gold, (), benchmark, name, limits=limits)
  whole = user_text(row)
  stem, options = split_options(whole)
  letters = [
    one.strip()
    for one in ((gold,) if isinstance(gold, str) else gold)
    if re.fullmatch(r"\s*[A-Z]\s*", one)
  ]
  if any(letter not in string.ascii_uppercase[: len(options)] for letter in letters):
    stem, options = whole, ()  # not read right; the letter is still a gold
  return dataclasses.replace(row, options=options, stem=stem, years=_years(item))


def _years(item: dict[str, Any]) -> tuple[bool, ...] | None:
  """ChartQAPro's column "Year", YES or NO for each answer; of a conversation, the last."""
  flags = item.get("Year", item.get("year"))
  flags = [flags] if isinstance(flags, (str, bool)) else flags
  if not isinstance(flags, list) or not flags:
    return None
  if item.get("Question Type") == "Conversational":
    flags = flags[-1:]
  return tuple(flag is True or str(flag).strip().casefold() == "yes" for flag in flags)


def _gold(answer: Any, where: str) -> str | tuple[str, ...]:
  golds = answer if isinstance(answer, list) else [answer]
  for gold in golds:
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)) or not str(gold).strip():
      raise ValueError(
        f"{where}: the answer is {shown(answer)}, but it must be a text, a number, or a list of "
        "them"
      )
  if not golds:
    raise ValueError(f"{where}: the list of answers is empty; give one or drop the row")
  return tuple(str(gold) for gold in golds) if isinstance(answer, list) else str(answer)


def _image(image: Any, parts: list[tuple[Any, dict]], find: "_Finder", where: str) -> ImageSource:
  """The one image in `image`: a text or an object as `image_spellings` reads them, {"image": such},
  or a list of such or of messages whose content has one. parts: as `_image_parts`.
  """
  if len(parts) != 1 or not parts[0][0]:
    raise ValueError(
      f"{where}: image is {shown(image)}, with {len(parts)} image paths, but it must have one"
    )
  [(said, _)] = parts
  if isinstance(said, str) and said.startswith("file://") and not said.startswith("file:///"):
    said = said.removeprefix("file://")  # a relative path, as some tools write it
  spelled = spelled_image(said, pathlib.Path(), where)
  if isinstance(spelled.image, bytes):
    return find_image(spelled.image, [pathlib.Path()], where).image  # which opens it
  return find(str(spelled.image), where)


def _image_parts(image: Any, around: dict[str, Any]) -> Iterator[tuple[str | dict, dict[str, Any]]]:
  """Every image in `image`, and what is said of it: by its own object and by those around it."""
  if isinstance(image, str):
    yield image, around
  elif isinstance(image, dict):
    if image.get("bytes") or image.get("path"):
      yield image, around | image
    elif "image" in image:
      yield from _image_parts(image["image"], around | image)
    # a content that is a text is a turn without an image
    elif isinstance(image.get("content"), (list, dict)):
      yield from _image_parts(image["content"], around | image)
  elif isinstance(image, list):
    for part in image:
      yield from _image_parts(part, around)


def _limits(said: dict[str, Any], where: str) -> PixelLimits | None:
  """What a row, or the object that its image stands in, says of the image's size in pixels."""
  found = {key: said[key] for key in ("min_pixels", "max_pixels") if said.get(key) is not None}
  for key, pixels in found.items():
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
      raise ValueError(f"{where}: {key} is {shown(pixels)}, but it must be a positive integer")
  if found.get("min_pixels", 0) > found.get("max_pixels", math.inf):
    raise ValueError(
      f"{where}: min_pixels {found['min_pixels']} is more than max_pixels {found['max_pixels']}"
    )
  return PixelLimits(**found) if found else None


class _Finder:
  """An image's path in a file -> its source, in a folder or a zip file."""

  def __init__(self, root: pathlib.Path, members: dict[str, zipfile.ZipInfo] | None):
    self.root, self.members = root, members

  def __call__(self, image: str, where: str) -> ImageSource:
    for candidate in self._candidates(image.replace("\\", "/")):
      found = self._look(candidate)
      if found is not None:
        return found
    raise ValueError(
      f"{where}: image {shown(image)} is not in {self.root}; correct it, or pass the "
      "folder or zip file that the paths are relative to"
    )

  def _candidates(self, image: str) -> Sequence[str]:
    """The path itself, with the root's name before it, and what follows the root's name in it."""
    name = self.root.stem if self.members is not None else self.root.resolve().name
    parts = pathlib.PurePosixPath(image).parts
    tails = ["/".join(parts[i + 1 :]) for i, part in enumerate(parts[:-1]) if part == name]
    relative = image.lstrip("/").removeprefix("./")
    return [
      image,
      relative,
      f"{name}/{relative}",
      *(way for tail in tails for way in (tail, f"{name}/{tail}")),
    ]

  def _look(self, candidate: str) -> ImageSource | None:
    if self.members is None:
      file = self.root / candidate
      return file if file.is_file() else None
    info = self.members.get(candidate)
    if info is None:
      return None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise ValueError(
        f"{self.root}, member {candidate!r}: encrypted or packed in a way that is "
        "not read here; unpack the zip file and pass the folder"
      )
    return StoredZipImage(
      self.root,
      candidate,
      info.header_offset,
      info.compress_size,
      info.file_size,
      info.compress_type == zipfile.ZIP_DEFLATED,
      info.CRC,
    )


def _finder(root: pathlib.Path) -> _Finder:
  if root.is_dir():
    return _Finder(root, None)
  if not root.is_file():
    raise ValueError(
      f"image_root = {str(root)!r}: no such folder or zip file; pass "
      "bench_image_folder, unpacked or zipped"
    )
  try:
    with zipfile.ZipFile(root) as file:
      return _Finder(root, {info.filename: info for info in file.infolist() if not info.is_dir()})
  except (zipfile.BadZipFile, OSError) as error:
    raise ValueError(
      f"image_root = {str(root)!r}: not a zip file that can be read ({error}); fetch it again"
    ) from error
