"""Conversation -> token ids, and which of them the assistant wrote, by a checkpoint's own chat
template.

The template is rendered once a layout of turns, with a mark in each text's place. So its special
tokens are known by where they stand: what a text spells is never one of them, and the assistant's
tokens need not be searched for.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from caprl_jax.data.readers.conversations import Conversation, Turn
from caprl_jax.hub.chat_template import render
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.json_files import shown
from caprl_jax.models.family import Family

_MARK = "\ue000{}\ue001"  # private characters: no template tests for them or trims them
_MARKS = re.compile("\ue000(\\d+)\ue001")
# of each turn: the role, and "text" or "image" of each part
Shape = tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Rendered:
  """tokens_L: int32, without the image's; wanted_L: bool, what the assistant wrote, ends of its
    turns included.
  image_at: the image's tokens go before this one; -1 for none.
  """

  tokens_L: np.ndarray
  wanted_L: np.ndarray
  image_at: int = -1


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Part of a layout. kind: "special", a token `token`; "image"; "text", what the user's side or
  the template says; or "answer". texts: strings of the template and numbers of the conversation's
  texts."""

  kind: str
  token: int = -1
  texts: tuple[str | int, ...] = ()
  wanted: bool = False


class ChatRenderer:
  """What `Conversation`s are to a model. An answer is tokenised by itself, as it would be sampled
  after its prompt; everything else just as the tokenizer does with the whole text.

  Raises ValueError for a template or tokenizer with which that cannot be done.
  """

  def __init__(
    self,
    template: str,
    family: Family,
    tokenizer: Tokenizer,
    special: Mapping[str, str] | None = None,
  ):
    self.template, self.family, self.tokenizer, self.special = (
      template,
      family,
      tokenizer,
      dict(special or {}),
    )
    self.added = {tokenizer.backend.id_to_token(i): i for i in tokenizer.special_ids}
    longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
    self.split = re.compile(f"({'|'.join(longest_first)})" if longest_first else r"(?!)")
    self.image = family.marker.removeprefix(family.open).removesuffix(family.close)
    self.layouts: dict[Shape, list[_Piece]] = {}
    self.known: dict[str, list[int]] = {}  # ids of the template's own texts
    self.strip = False
    self._probe()

  def __call__(self, conversation: Conversation) -> Rendered:
    """Raises ValueError where the template fails on such turns."""
    shape, texts = _shape(conversation)
    if shape not in self.layouts:
      self.layouts[shape] = self._layout(shape)
    texts = [text.strip() for text in texts] if self.strip else texts
    ids: list[int] = []
    wanted: list[bool] = []
    at = -1
    for piece in self.layouts[shape]:
      if piece.kind == "image":
        at = len(ids)
        continue
      new = [piece.token] if piece.kind == "special" else self._encode(piece, texts)
      ids += new
      wanted += [piece.wanted] * len(new)
    if not conversation.ended:
      wanted[-1] = False
    return Rendered(np.array(ids, np.int32), np.array(wanted, bool), at)

  def _encode(self, piece: _Piece, texts: Sequence[str]) -> list[int]:
    if not any(isinstance(text, int) for text in piece.texts):
      text = "".join(piece.texts)
      if text not in self.known:
        self.known[text] = self.tokenizer.encode_plain(text)
      return self.known[text]
    return self.tokenizer.encode_plain(
      "".join(texts[t] if isinstance(t, int) else t for t in piece.texts)
    )

  def _layout(self, shape: Shape) -> list[_Piece]:
    """Renders the template around marks and cuts it at marks, image and special tokens."""
    numbers = iter(range(sum(kind == "text" for _, kinds in shape for kind in kinds)))
    mark = lambda kind: _MARK.format(next(numbers)) if kind == "text" else None
    marked = [(role, [mark(kind) for kind in kinds]) for role, kinds in shape]
    answers = {int(_MARKS.fullmatch(parts[0])[1]) for role, parts in marked if role == "assistant"}
    text = self._render(marked)
    cut = _MARKS.split(text)
    if cut[1::2] != [
      str(i) for i in range(sum(kind == "text" for _, kinds in shape for kind in kinds))
    ]:
      raise ValueError(
        f"the checkpoint's chat template writes {shown(text, 200)} for turns of "
        f"{[role for role, _ in shape]}: not every text once and in order"
      )
    pieces: list[_Piece] = []
    for number, part in enumerate(cut):
      if number % 2:
        self._add_text(pieces, int(part), int(part) in answers)
      else:
        self._add_template(pieces, part)
    images = sum(piece.kind == "image" for piece in pieces)
    if images != sum(kind == "image" for _, kinds in shape for kind in kinds):
      raise ValueError(
        f"the checkpoint's chat template writes {shown(text, 200)}: {images} times "
        f"{self.family.marker!r}. Is it of the text-only model?"
      )
    return self._mark_ends(pieces)

  def _mark_ends(self, pieces: list[_Piece]) -> list[_Piece]:
    """The end token after each answer is wanted too; what comes after the last one is of no use."""
    last = 0
    for i, piece in enumerate(pieces):
      if piece.kind == "answer":
        end = pieces[i + 1] if i + 1 < len(pieces) else None
        if end is None or end.kind != "special" or end.token not in self.tokenizer.end_ids:
          raise ValueError(
            "the checkpoint's chat template does not end the assistant's turn with one of the "
            "model's end tokens "
            f"{[self.tokenizer.backend.id_to_token(i) for i in self.tokenizer.end_ids]}"
          )
        pieces[i + 1], last = dataclasses.replace(end, wanted=True), i + 1
    return pieces[: last + 1]

  def _add_text(self, pieces: list[_Piece], part: str | int, is_answer: bool = False) -> None:
    """What stands next to each other is tokenised together, but for answers."""
    if is_answer:
      pieces.append(_Piece("answer", texts=(part,), wanted=True))
    elif pieces and pieces[-1].kind == "text":
      pieces[-1] = dataclasses.replace(pieces[-1], texts=(*pieces[-1].texts, part))
    else:
      pieces.append(_Piece("text", texts=(part,)))

  def _add_template(self, pieces: list[_Piece], text: str) -> None:
    """A string of the template: special tokens, text between them, and the image with what is put
    around it.
    """
    before, found, after = text.partition(self.family.marker)
    if found:
      self._add_template(pieces, before + self.family.open)
      pieces.append(_Piece("image"))
      self._add_template(pieces, self.family.close + after)
      return
    for chunk in self.split.split(text):
      if chunk in self.added:
        pieces.append(_Piece("special", self.added[chunk]))
      elif chunk:
        self._add_text(pieces, chunk)

  def _render(self, turns: Sequence[tuple[str, list[str | None]]]) -> str:
    """turns: (role, texts, None for the image)."""
    part_of = lambda text: {"type": "image"} if text is None else {"type": "text", "text": text}
    listed = [{"role": role, "content": [part_of(text) for text in parts]} for role, parts in turns]
    plain = [
      {"role": role, "content": "".join(parts) if None not in parts else content["content"]}
      for (role, parts), content in zip(turns, listed)
    ]
    failure: ValueError | None = None
    for messages in (listed, plain):  # some templates take lists of parts, some texts only
      try:
        text = render(self.template, messages, self.special)
      except ValueError as error:
        failure = error
        continue
      # A template for texts only may print the list itself.
      if "{'type':" not in text and all(
        part is None or part.strip() in text for _, parts in turns for part in parts
      ):
        return text
    if failure:
      raise failure
    raise ValueError(
      "the checkpoint's chat template does not write what is said, of turns of "
      f"{[role for role, _ in turns]}; mend chat_template.jinja"
    )

  def _probe(self) -> None:
    """Compares with the template and tokenizer on whole texts; learns whether the template
    trims.
    """
    texts = [" one two ", " three ", "four", "five"]
    turns = tuple(Turn(role, text) for role, text in zip(("user", "assistant") * 2, texts))
    whole = self._render([(turn.role, [turn.text]) for turn in turns])
    for self.strip in (False, True):
      layout = self._layout(_shape(Conversation(None, turns, ""))[0])
      said = [text.strip() for text in texts] if self.strip else texts
      ours = "".join(
        self.tokenizer.backend.id_to_token(p.token)
        if p.kind == "special"
        else "".join(said[t] if isinstance(t, int) else t for t in p.texts)
        for p in layout
      )
      if whole.startswith(ours):
        break
    else:
      raise ValueError(
        "the checkpoint's chat template changes what is said: it makes "
        f"{shown(whole, 300)} of {texts}"
      )
    ids = self(Conversation(None, turns[2:], "")).tokens_L.tolist()
    want = self.tokenizer.encode(self._render([(turn.role, [turn.text]) for turn in turns[2:]]))[
      : len(ids)
    ]
    if ids != want:
      raise ValueError(
        f"the tokenizer makes {want} of a conversation as a whole, but {ids} of its parts: it "
        "does more than byte-level BPE, which this package does not support"
      )


def _shape(conversation: Conversation) -> tuple[Shape, list[str]]:
  """The layout that a conversation has, and its texts in order."""
  shape, texts = [], []
  for turn in conversation.turns:
    parts: list[str | None] = [turn.text]
    if turn.image_at is not None:
      parts = [
        part
        for part in (turn.text[: turn.image_at], None, turn.text[turn.image_at :])
        if part != ""
      ]
    texts += [part for part in parts if part is not None]
    shape.append((turn.role, tuple("image" if part is None else "text" for part in parts)))
  return tuple(shape), texts
