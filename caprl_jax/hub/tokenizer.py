"""Text <-> token ids, and how two vocabularies relate."""

import dataclasses
import difflib
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from caprl_jax.hub import gguf, hub_files
from caprl_jax.hub.folders.added_tokens import listed_tokens
from caprl_jax.hub.folders.kinds import ADAPTER_CONFIG
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.text_files import read_bytes, read_json
from caprl_jax.json_files import cut, shown

CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A vocabulary of text tokens and special tokens.

  Special is here every token that was added to the BPE vocabulary, flagged as special in the file
  or not: Qwen's `<tool_call>` and `<|fim_prefix|>` are not flagged, yet are markers and not text.
  """

  backend: tokenizers.Tokenizer
  eos_ids: tuple[int, ...] = ()  # what the model's config and generation config call its end

  def encode(self, text: str) -> list[int]:
    """Ids of a text that we wrote: special tokens spelt in it become their ids, none is added."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_plain(self, text: str) -> list[int]:
    """Ids of a text that others wrote: "<|im_end|>" is ten characters, never a special id."""
    return self._plain.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """The text of some ids; those beyond the vocabulary (an embedding's padding) are skipped."""
    ids = [int(token_id) for token_id in ids]
    if skip_special:
      ids = [token_id for token_id in ids if token_id not in self.special_ids]
    return self.backend.decode(ids, skip_special_tokens=False)

  def decode_written(self, ids: Iterable[int]) -> str:
    """The text of ids that a model wrote, as `skip_special_tokens` of transformers and vLLM gives
    it.

    Only tokens that the file flags as special are left out. Qwen3's `<think>` is not: who reads a
    reply looks for it.
    """
    return self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

  def id_of(self, token: str) -> int:
    """The id of a token by its byte-level spelling (`Ġthe`); ValueError if absent."""
    token_id = self.backend.token_to_id(token)
    if token_id is None:
      near = difflib.get_close_matches(token, self.backend.get_vocab(), n=5)
      raise ValueError(
        f"token {token!r} is not in the vocabulary of {self.vocab_size} tokens. "
        f"Nearest: {near or 'none'}. Use one of these or another tokenizer."
      )
    return token_id

  @functools.cached_property
  def vocab_size(self) -> int:
    """The highest id plus one, special tokens included: the rows that an embedding needs."""
    return max(self.backend.get_vocab().values()) + 1

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    return frozenset(self.backend.get_added_tokens_decoder())

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """Ids that end a text: the model's own first, then the chat format's, without repeats."""
    chat = (self.backend.token_to_id(token) for token in CHAT_ENDS)
    return tuple(dict.fromkeys([*self.eos_ids, *(end for end in chat if end is not None)]))

  def to_json(self) -> str:
    """The contents of `tokenizer.json`."""
    return self.backend.to_str()

  def texts(self, rows: int) -> list[bytes]:
    """The bytes that each id below `rows` stands for; none for special tokens and for ids without a
    token.
    """
    # Byte-level BPE spells printable bytes as themselves, and the others, in order, as the
    # characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    texts = [b""] * rows
    for token, token_id in self.backend.get_vocab().items():
      if token_id not in self.special_ids:
        if not byte_of.keys() >= set(token):
          raise ValueError(
            f"tokenizer.json: the token {shown(token)} spells no bytes: it is not a byte-level "
            "tokenizer, as those of Qwen and Llama 3 are"
          )
        texts[token_id] = bytes(byte_of[character] for character in token)
    return texts

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    # The flag `encode_special_tokens` would spare only tokens that are flagged as special.
    spec = json.loads(self.to_json())
    try:
      return tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(
        f"tokenizer.json: without its added tokens it is no tokenizer: {cut(error, 300)}. Download "
        "it again."
      ) from error


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Loads the tokenizer of a model that `hub_files.resolve_model` found.

  Args:
    path: a `.gguf` file, or a directory with `tokenizer.json`, or with `vocab.json` and
      `merges.txt` (then of Qwen2's kind, with the added tokens that `tokenizer_config.json` lists).

  Raises:
    ValueError: says which file is missing or broken.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    config, _ = gguf.read_gguf(path)
    return Tokenizer(gguf.gguf_tokenizer(path), _eos_ids([config], path))
  places = hub_files.files_of(path)
  if "tokenizer.json" in places:
    file = places["tokenizer.json"]
    text = read_bytes(file).decode("utf-8", "replace")
    try:
      backend = tokenizers.Tokenizer.from_str(text)
    # The library raises nothing narrower, and where its Rust panics no Exception at all.
    except BaseException as error:
      if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise
      raise ValueError(
        f"{file} ({file.stat().st_size:,} bytes) is not a tokenizer: {cut(error, 300)}. "
        "Download it again or update tokenizers."
      ) from error
    _compare_vocabulary(backend, places)
    _add_the_lacking(backend, places)
  else:
    backend = _from_vocab_and_merges(path, places)
  # Some files ask for a length; ours is the caller's business.
  backend.no_truncation()
  backend.no_padding()
  has_config = (path / "config.json").exists() or (path / ADAPTER_CONFIG).exists()
  configs = [hub_files.read_config(path)] if has_config else []
  if "generation_config.json" in places:
    configs.append(read_json(places["generation_config.json"]))
  return Tokenizer(backend, _eos_ids(configs, path))


def _compare_vocabulary(backend: tokenizers.Tokenizer, places: Mapping[str, pathlib.Path]) -> None:
  """Warns where the older vocab.json lies beside tokenizer.json and says something else."""
  if "vocab.json" not in places:
    return
  ours = backend.get_vocab()
  other = next((t for t, i in read_json(places["vocab.json"]).items() if ours.get(t) != i), None)
  if other is not None:
    file = places["tokenizer.json"]
    warn_once(
      f"{file.parent}: tokenizer.json is read, as transformers does; vocab.json beside it gives "
      f"{shown(other)} another id. Remove what is old"
    )


def _add_the_lacking(backend: tokenizers.Tokenizer, places: Mapping[str, pathlib.Path]) -> None:
  """Adds what tokenizer_config.json lists and tokenizer.json lacks, as transformers does."""
  listed = listed_tokens(places)
  lacking = {t["content"]: t for _, t in listed if backend.token_to_id(t["content"]) is None}
  if lacking:
    backend.add_tokens([tokenizers.AddedToken(**token) for token in lacking.values()])
    warn_once(
      f"{places['tokenizer.json'].parent}: tokenizer_config.json or added_tokens.json lists "
      f"{shown([*lacking])}, which tokenizer.json lacks; added at its end, as transformers does"
    )


def _eos_ids(configs: Iterable[dict[str, Any]], path: pathlib.Path) -> tuple[int, ...]:
  ids: list[int] = []
  for config in configs:
    # Vision-language models may keep the language model's settings one level down.
    for section in (config, config.get("text_config")):
      ids += said_ends(section, path)
  return tuple(dict.fromkeys(ids))


def said_ends(section: Any, where: str | pathlib.Path = "the checkpoint") -> tuple[int, ...]:
  """The ids of `eos_token_id` in a config; none where it says none. Raises ValueError for what is
  no id."""
  end = section.get("eos_token_id") if isinstance(section, dict) else None
  ends = end if isinstance(end, list) else [] if end is None else [end]
  if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ends):
    raise ValueError(
      f"{where}: eos_token_id = {shown(end)} in config.json or generation_config.json must be "
      "the id of a token, or a list of such"
    )
  return tuple(ends)


def _from_vocab_and_merges(
  path: pathlib.Path, places: Mapping[str, pathlib.Path]
) -> tokenizers.Tokenizer:
  absent = [name for name in ("vocab.json", "merges.txt") if name not in places]
  if absent:
    raise ValueError(
      f"{path}: no tokenizer.json, nor {' and '.join(absent)} to build one "
      "from. Copy the tokenizer's files there."
    )
  lines = read_bytes(places["merges.txt"]).decode("utf-8").split("\n")
  # A header line starts with "#version"; a merge may start with "#".
  merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  vocab = read_json(places["vocab.json"])
  ids = [token_id for token_id in vocab.values() if type(token_id) is int]
  if len(set(ids)) < len(vocab):
    raise ValueError(
      f"{places['vocab.json']}: must give each of its {len(vocab)} tokens an id of its own. "
      "Download it again."
    )
  try:
    backend = gguf.byte_level_bpe(vocab, merges, "qwen2")
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(
      f"{path}: vocab.json and merges.txt do not fit each other: {cut(error, 200)}. Download both "
      "again."
    ) from error
  for token_id, token in listed_tokens(places):
    backend.add_tokens([tokenizers.AddedToken(**token)])
    actual = backend.token_to_id(token["content"])
    if token_id is not None and actual != token_id:
      raise ValueError(
        f"{path}: tokenizer_config.json or added_tokens.json gives {shown(token['content'])} the "
        f"id {token_id}, but after vocab.json ({len(vocab)} tokens) it is {actual}. "
        "Use the model's tokenizer.json."
      )
  return backend


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, source: str | os.PathLike) -> None:
  """Raises a ValueError if the tokenizer has ids for which an embedding of `vocab_size` has no row.

  More rows than ids are fine: checkpoints pad them.
  """
  if not isinstance(vocab_size, int):
    raise ValueError(f"{source}: vocab_size = {shown(vocab_size)} in config.json is no number")
  if tokenizer.vocab_size > vocab_size:
    last = tokenizer.backend.id_to_token(tokenizer.vocab_size - 1)
    raise ValueError(
      f"{source}: the tokenizer has ids up to {tokenizer.vocab_size - 1} "
      f"({last!r}), but the embedding only {vocab_size} rows (vocab_size in "
      "config.json). Use the tokenizer and the weights of one model."
    )
  beyond = [token_id for token_id in tokenizer.end_ids if token_id >= vocab_size]
  if beyond:
    raise ValueError(
      f"{source}: eos_token_id in config.json or generation_config.json names {shown(beyond)}, but "
      f"the embedding has {vocab_size} rows. Use the files of one model."
    )


def compact_tokenizer(
  tokenizer: Tokenizer, texts: Sequence[str], extra_special: Sequence[str], multiple_of: int = 8
) -> tuple[tokenizers.Tokenizer, list[int]]:
  """A smaller byte-level BPE vocabulary that encodes `texts` into the same token strings.

  It holds the byte symbols (those of the 256 that the original has), every token that the texts
  need with the tokens and merges on the way to it, the chat's special tokens that the original has,
  `extra_special`, and `<|unused_0|>`, `<|unused_1|>`, ... up to a multiple. BPE applies the
  lowest-ranked merge that fits, and every merge that the full vocabulary applies to these texts is
  kept, so the choices are the same.

  Returns:
    The tokenizer, and for each of its ids the original's id, or -1 for tokens that are new.

  Raises:
    ValueError: the tokenizer is not BPE, an extra special token is a text token already, or a text
      would be encoded differently, as one with a special token that is not kept.
  """
  spec = json.loads(tokenizer.to_json())
  if spec["model"]["type"] != "BPE":
    raise ValueError(
      f"the tokenizer's model is {spec['model']['type']}; only byte-level BPE can "
      "be made compact. Use the full vocabulary."
    )
  vocab = tokenizer.backend.get_vocab()
  merges = [tuple(merge) for merge in spec["model"]["merges"]]
  kept = _needed_tokens(tokenizer, texts, merges)
  text_tokens = sorted(kept, key=vocab.__getitem__)
  specials = [token for token in CHAT_SPECIALS if token in vocab]
  specials = list(dict.fromkeys([*specials, *extra_special]))
  if not kept.isdisjoint(specials):
    raise ValueError(
      f"extra_special holds text tokens: {sorted(kept.intersection(specials))}. "
      "Give special tokens a spelling that is no text, such as <|name|>."
    )
  padding = -(len(text_tokens) + len(specials)) % multiple_of
  specials += [f"<|unused_{number}|>" for number in range(padding)]

  spec["model"]["vocab"] = {token: token_id for token_id, token in enumerate(text_tokens)}
  spec["model"]["merges"] = [pair for pair in merges if kept.issuperset((*pair, "".join(pair)))]
  spec["added_tokens"] = []
  spec["post_processor"] = None  # it may name special tokens by their old ids
  compact = tokenizers.Tokenizer.from_str(json.dumps(spec))
  compact.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in specials]
  )

  _check_same_tokens(compact, tokenizer.backend, texts)
  return compact, [vocab.get(token, -1) for token in [*text_tokens, *specials]]


def _needed_tokens(
  tokenizer: Tokenizer, texts: Sequence[str], merges: Sequence[tuple[str, ...]]
) -> set[str]:
  """The byte symbols, and what the texts need: their tokens and those on the way to them."""
  ranks = {merge: rank for rank, merge in enumerate(merges)}
  kept = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) & tokenizer.backend.get_vocab().keys()
  full = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
  for token_id in {token_id for encoding in full for token_id in encoding.ids}:
    if token_id not in tokenizer.special_ids:
      kept |= _merge_path(tokenizer.backend.id_to_token(token_id), ranks)
  return kept


def _check_same_tokens(
  compact: tokenizers.Tokenizer, full: tokenizers.Tokenizer, texts: Sequence[str]
) -> None:
  """Raises ValueError for a text that the compact vocabulary encodes differently."""
  both = (one.encode_batch(list(texts), add_special_tokens=False) for one in (compact, full))
  for text, ours, original in zip(texts, *both, strict=True):
    if ours.tokens != original.tokens:
      raise ValueError(
        f"the compact vocabulary encodes {text!r} as {ours.tokens}, the full one as "
        f"{original.tokens}. If special tokens differ, list those in extra_special "
        "that the original has, and leave out of the texts those it lacks."
      )


def _merge_path(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
  """The token and what BPE makes on the way from its characters to it."""
  parts = list(token)
  path = set(parts)
  while len(parts) > 1:
    rank, at = min(
      (ranks.get(pair, len(ranks)), at)
      for at, pair in enumerate(zip(parts, parts[1:], strict=False))
    )
    if rank == len(ranks):  # reached by no merge: a model that takes whole words (ignore_merges)
      path.add(token)
      break
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
    path.add(parts[at])
  return path


def id_table(policy: Tokenizer, judge: Tokenizer, require_all: bool = True) -> np.ndarray:
  """The judge's id of each text token of the policy, by the token's string.

  Args:
    policy: the vocabulary of captions.
    judge: the vocabulary that captions are read in.
    require_all: whether every text token of the policy has to be a text token of the judge.

  Returns:
    int32 [policy.vocab_size]; -1 for special tokens of either, ids without a token, and text tokens
    that the judge lacks.

  Raises:
    ValueError: `require_all` and the judge lacks some.
  """
  table = np.full(policy.vocab_size, -1, np.int32)
  theirs = judge.backend.get_vocab()
  absent = []
  for token, token_id in policy.backend.get_vocab().items():
    if token_id in policy.special_ids:
      continue
    judge_id = theirs.get(token)
    if judge_id is None or judge_id in judge.special_ids:
      absent.append(token)
    else:
      table[token_id] = judge_id
  if absent and require_all:
    raise ValueError(
      f"{len(absent)} of the policy's {policy.vocab_size} tokens are not text "
      f"tokens of the judge: {sorted(absent)[:8]}. Use a policy and a judge of one "
      "family (Qwen2.5-VL with Qwen2.5, Qwen3-VL with Qwen3), or a compact "
      "tokenizer made from the judge's."
    )
  return table
