"""Images with questions or captions: the schema of a row, its validation, its image."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from caprl_jax import image_files
from caprl_jax.data.option_letters import MAX_OPTIONS, check_letters, folded
from caprl_jax.json_files import listed, shown

log = logging.getLogger("caprl_jax.data")

BadRows = Literal["refuse", "drop"]


@dataclasses.dataclass(frozen=True)
class Question:
  """A multiple-choice question.

  `gold` is the right option's index, `kind` a group for metrics, `provenance` says who made the
  question and how it was filtered ("easy-vqa", "qwen-vl, visual 4/4, blind 0/4").
  """

  stem: str
  options: tuple[str, ...]
  gold: int
  kind: str = ""
  provenance: str = ""


class StoredImage(Protocol):
  """An encoded image inside a larger file (parquet, tar, ArrayRecord), read when it is needed."""

  where: str  # file and place in it, for messages

  def read(self) -> bytes:
    """The encoded image. Raises ValueError, with `where`, when it cannot be read."""


# a file, an encoded file's bytes, or one inside a larger file
ImageSource = pathlib.Path | bytes | StoredImage


@dataclasses.dataclass(frozen=True)
class QARow:
  """An image and its questions; none where nobody asks them.

  `name` stands for the row in every message. `facts` are true attributes of the image, such as
  {"color": "red"}, where the dataset knows them. `where` is the row's place, file and line, where
  there is one.
  """

  image: ImageSource
  questions: tuple[Question, ...]
  name: str
  facts: dict[str, str] | None = None
  where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class PixelLimits:
  """The least and most pixels that a row wants its image shown with; None: the processor's own."""

  min_pixels: int | None = None
  max_pixels: int | None = None


@dataclasses.dataclass(frozen=True)
class CaptionRow:
  """An image and a caption to imitate. `where` is that of `QARow`. `limits`: those of this image
  alone. `fields`: what else its row says, by name, as far as a reader was asked for it.
  """

  image: ImageSource
  caption: str
  name: str
  where: str = dataclasses.field(default="", compare=False)
  limits: PixelLimits | None = None
  fields: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class BadRow:
  """What stood in a row's place in a dataset and cannot be used. `message` starts with `where`,
  file and line. `reason`: the class that it is counted in.
  """

  where: str
  message: str
  reason: str = "malformed"


Row = TypeVar("Row", QARow, CaptionRow)


class RowKeeper(Protocol):
  """What takes note of bad rows and decides about them later (`bad_rows.BadRowList`)."""

  def keep(self, found: Iterable[Row | BadRow]) -> list[Row]:
    """The good rows."""


def good_rows(found: Iterable[Row | BadRow], bad_rows: BadRows | RowKeeper = "refuse") -> list[Row]:
  """The rows of a dataset, when its bad ones are to be refused or dropped.

  `drop` logs every bad row and how many there were. `refuse` raises ValueError with the first of
  them and their number. A `RowKeeper` only takes note of them.
  """
  if not isinstance(bad_rows, str):
    return bad_rows.keep(found)
  good: list[Row] = []
  bad: list[BadRow] = []
  for row in found:
    (bad if isinstance(row, BadRow) else good).append(row)
  if not bad:
    return good
  if bad_rows == "drop":
    for row in bad:
      log.warning("dropped: %s", row.message)
    log.warning("dropped %d bad rows of %d (bad_rows = 'drop')", len(bad), len(good) + len(bad))
    return good
  if len(bad) == 1:
    raise ValueError(bad[0].message)
  raise ValueError(
    f"{len(bad)} bad rows of {len(good) + len(bad)} (bad_rows = 'drop' leaves them out):"
    f"{listed([row.message for row in bad])}"
  )


def kinds(rows: Iterable[QARow]) -> list[str]:
  """The kinds of all questions, sorted, each once."""
  return sorted({question.kind for row in rows for question in row.questions})


def check_question(question: Question, where: str) -> None:
  """Raises ValueError, starting with `where`, for a question that no judge could answer fairly.

  That is: no text, fewer than two options or more than there are letters, an empty option, two
  options that differ at most in case and outer spaces, options with letters of their own
  (`option_letters.check_letters`), half a surrogate pair, which no file can hold, or a gold index
  that is no option's.
  """
  if not question.stem.strip():
    raise ValueError(f"{where}: the question has no text; write its stem or drop it")
  where = f"{where}: question {shown(question.stem)}"
  if len(question.options) < 2:
    raise ValueError(
      f"{where} has {len(question.options)} option(s) {shown(list(question.options))}; give it at "
      "least 2"
    )
  if len(question.options) > MAX_OPTIONS:
    raise ValueError(
      f"{where} has {len(question.options)} options; there are letters for {MAX_OPTIONS}, so leave "
      "some out or drop the question"
    )
  first: dict[str, str] = {}
  for i, option in enumerate(question.options):
    if not option.strip():
      raise ValueError(f"{where}: option {i} is empty; write its text or remove it")
    if folded(option) in first:
      raise ValueError(
        f"{where} has the options {shown(first[folded(option)])} and {shown(option)}, which differ "
        "at most in case and outer spaces; keep one of them"
      )
    first[folded(option)] = option
  check_letters(question.options, where)
  for text in (question.stem, *question.options, question.kind, question.provenance):
    check_unicode(text, where)
  gold = question.gold
  if isinstance(gold, bool) or not isinstance(gold, int):
    raise ValueError(f"{where} has gold {shown(gold)}; it must be the index of the right option")
  if not 0 <= gold < len(question.options):
    raise ValueError(
      f"{where} has gold {gold}, but its {len(question.options)} options are numbered from 0 to "
      f"{len(question.options) - 1}"
    )


def check_rows(rows: Sequence[QARow], where: str, asked: bool = True) -> None:
  """Raises ValueError, starting with `where`, for no rows, a row without questions (where questions
  are `asked`) or with a bad one, and facts that are not texts.
  """
  if not rows:
    raise ValueError(f"{where}: no rows; check the path and any filter before it")
  for row in rows:
    at = f"{where}: row {shown(row.name)}"
    check_unicode(row.name, at)
    if asked and not row.questions:
      raise ValueError(f"{at} has no questions; add some or drop the row")
    for question in row.questions:
      check_question(question, at)
    for part in (part for fact in (row.facts or {}).items() for part in fact):
      if not isinstance(part, str):
        raise ValueError(
          f"{at}: facts are texts by name, but one has {shown(part)}; make it a text"
        )
      check_unicode(part, at)


def check_unicode(text: str, where: str) -> None:
  """Raises ValueError, starting with `where`, for half of a surrogate pair in a text."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{where}: {shown(text)} has half of a surrogate pair, {text[error.start]!r}; correct it"
    ) from None


def image_bytes(row: QARow | CaptionRow) -> bytes:
  """The row's image as it is encoded in its file. Raises ValueError as `read_image`."""
  if isinstance(row.image, bytes):
    return row.image
  try:
    if not isinstance(row.image, pathlib.Path):
      return row.image.read()
    image_files.check_regular(row.image)
    return row.image.read_bytes()
  except OSError as error:
    raise unreadable(row, what_failed(error)) from error


def image_place(row: QARow | CaptionRow) -> str:
  """Where the row's image stands, for messages."""
  if isinstance(row.image, bytes):
    return f"{len(row.image)} bytes in memory"
  return str(row.image) if isinstance(row.image, pathlib.Path) else row.image.where


def open_image(row: QARow | CaptionRow) -> Image.Image:
  """The row's image with only its header read, where it is a file. Raises whatever PIL stumbles
  over.
  """
  return image_files.open_image(_encoded(row))


def read_image(row: QARow | CaptionRow) -> Image.Image:
  """The row's image in RGB, upright as its EXIF orientation asks.

  Transparency is laid over white, as transformers' `convert_to_rgb` does, so that pixels equal
  those of the Hugging Face processors. One-channel images of more than 8 bits, which PIL would
  cut off at 255, are scaled to 8 bits.

  Raises:
    ValueError: an image that cannot be read in full, with the row, the file and the reason.
  """
  try:
    with image_files.load_image(_encoded(row)) as image:
      return to_rgb(_upright(image))
  # PIL's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, IndexError…
  except Exception as error:
    raise unreadable(row, what_failed(error)) from error


def decode(data: bytes) -> tuple[Image.Image, str]:
  """An encoded image's pixels as `read_image` gives them, and the name of its format. Raises
  whatever PIL stumbles over."""
  with image_files.load_image(data) as image:
    return to_rgb(_upright(image)), image.format or "unknown"


def what_failed(error: Exception) -> str:
  """An error of `decode` or of reading the file, in words that do not depend on where it lies."""
  said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  # ours say all by themselves
  return said if type(error) is ValueError else f"{type(error).__name__}: {said}"


def unreadable(row: QARow | CaptionRow, why: str) -> ValueError:
  """The error of a row whose image cannot be read. why: as `what_failed` has it."""
  place = image_place(row)
  return ValueError(
    f"row {shown(row.name)}: cannot read its image ({place}): {why.removeprefix(f'{place}: ')}; "
    "replace the image or drop the row"
  )


def _encoded(row: QARow | CaptionRow) -> pathlib.Path | bytes:
  return row.image if isinstance(row.image, pathlib.Path) else image_bytes(row)


def _upright(image: Image.Image) -> Image.Image:
  try:
    return ImageOps.exif_transpose(image)
  except Exception as error:  # noqa: BLE001  the pixels are there; broken is what stands beside them
    log.debug("EXIF that cannot be read: %s", error)
    return image


_REASONS = (
  (FileNotFoundError, "no such file"),
  (PermissionError, "no permission"),
  (UnidentifiedImageError, "not an image"),
  (Image.DecompressionBombError, "too many pixels"),
)


def failure_reason(error: BaseException) -> str:
  """The class that a failed image is counted in, from what first went wrong: of `read_image`, and
  of an image too narrow for the captioner.
  """
  while error.__cause__ is not None:
    error = error.__cause__
  if "one side is over" in str(error):
    return "too narrow"
  if "pixels rounds to" in str(error):
    return "too small"
  if "could not be fetched" in str(error):
    return "not fetched"
  # Decoders raise whatever they stumble over, ours raise ValueError.
  return next(
    (name for kind, name in _REASONS if isinstance(error, kind)),
    "other" if isinstance(error, ValueError) else "damaged image",
  )


def to_rgb(image: Image.Image) -> Image.Image:
  """An image of any mode as RGB: 16 bits and floats are scaled, what is transparent is white."""
  if image.mode in ("I", "F") or image.mode.startswith("I;16"):
    return Image.fromarray(_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
  """16-bit, 32-bit or float grey values as uint8.

  Only 16-bit modes say what white is. For the others it is the smallest usual white that holds
  every value; values that no usual white fits are stretched from their least to their greatest.
  """
  pixels = pixels.astype(np.float64)
  if not np.isfinite(pixels).all():
    raise ValueError("it has pixels that are not finite")
  low, high = pixels.min(), pixels.max()
  usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(mode, (65535,))
  fitting = [white for white in usual if low >= 0 and high <= white]
  low, white = (0.0, fitting[0]) if fitting else (low, high)
  return np.round((pixels - low) * (255 / max(white - low, 1e-30))).astype(np.uint8)
