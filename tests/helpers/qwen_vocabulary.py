"""The real Qwen vocabulary, from the package dashscope, as the tokenizer files of three captioners;
their templates.

dashscope carries `qwen.tiktoken`: 151,643 byte strings and their ranks, which are the ids. The
repositories on the hub hold the same vocabulary as `tokenizer.json`: one merge a token of two bytes
or more, and the added tokens below.
"""

import base64
import functools
import importlib.util
import json
import pathlib
import tempfile

import pytest
import tokenizers

INSTALL = "pip install --no-deps dashscope"
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
  r"|\s+(?!\S)|\s+"
)  # of Qwen2's tokenizer.json

SPECIAL = (  # ids from 151643 on
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|object_ref_start|>",
  "<|object_ref_end|>",
  "<|box_start|>",
  "<|box_end|>",
  "<|quad_start|>",
  "<|quad_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
QWEN25 = (
  "<tool_call>",
  "</tool_call>",
  "<|fim_prefix|>",
  "<|fim_middle|>",
  "<|fim_suffix|>",
  "<|fim_pad|>",
  "<|repo_name|>",
  "<|file_sep|>",
)
QWEN3 = (*QWEN25, "<tool_response>", "</tool_response>", "<think>", "</think>")
INTERNVL = (
  "<img>",
  "</img>",
  "<IMG_CONTEXT>",
  "<quad>",
  "</quad>",
  "<ref>",
  "</ref>",
  "<box>",
  "</box>",
  "<video>",
)
# Family -> added tokens that the files do not flag as special, and those that they do flag, after
# `SPECIAL`.
ADDED = {"qwen2_5_vl": (QWEN25, ()), "qwen3_vl": (QWEN3, ()), "internvl": (QWEN3, INTERNVL)}

TEMPLATES = {
  "qwen2_5_vl": (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% "
    "for message in messages %}{% if loop.first and message['role'] != 'system' "
    "%}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ "
    "message['role'] }}\n{% if message['content'] is string %}{{ message['content'] "
    "}}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = "
    "image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif "
    "%}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or "
    "'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if "
    "add_vision_id %}Video {{ video_count.value }}: {% endif "
    "%}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ "
    "content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  ),
  "qwen3_vl": """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].content is string %}
        {{- messages[0].content }}
    {%- else %}
        {%- for content in messages[0].content %}
            {%- if 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif content.type == 'video' or 'video' in content %}
                    {%- set video_count.value = video_count.value + 1 %}
                    {%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content_item in message.content %}
                {%- if 'text' in content_item %}
                    {{- content_item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",  # without its branches for tools, which no caption uses
  "internvl": (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if "
    "message['content'] is string %}{{ message['content'] }}{% else %}{% for content in "
    "message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif "
    "content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}{{ "
    "content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}{% if "
    "add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
  ),
}


def read_ranks() -> dict[bytes, int]:
  """Every token's bytes and its id. Skips the test where dashscope is not installed; does not
  import it.
  """
  spec = importlib.util.find_spec("dashscope")
  file = (
    pathlib.Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    if spec
    else None
  )
  if file is None or not file.exists():
    pytest.skip(f"the real Qwen vocabulary is not installed: {INSTALL}")
  lines = (line.split() for line in file.read_bytes().splitlines() if line)
  return {base64.b64decode(token): int(rank) for token, rank in lines}


def bpe(text: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
  """tiktoken's own rule: join the neighbours that make the lowest-ranked token (below `below`),
  until none do.
  """
  parts = [text[i : i + 1] for i in range(len(text))]
  limit = len(ranks) if below is None else below
  while len(parts) > 1:
    rank, at = min(
      (ranks.get(a + b, limit), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
    )
    if rank >= limit:
      break
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
  return parts


def _letters() -> list[str]:
  """The letter that byte-level BPE writes for each byte (GPT-2)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
  """vocab.json and merges.txt: a token's merge is of the two parts that BPE makes of it without
  it.
  """
  ranks, letters = read_ranks(), _letters()
  spell = lambda token: "".join(letters[byte] for byte in token)
  merges = [(token, bpe(token, ranks, rank)) for token, rank in ranks.items() if len(token) > 1]
  assert all(len(parts) == 2 for _, parts in merges)
  return {spell(t): r for t, r in ranks.items()}, [(spell(a), spell(b)) for _, (a, b) in merges]


def added_tokens(family: str) -> list[tokenizers.AddedToken]:
  """In the order of their ids."""
  text, special = ADDED[family]
  return [
    tokenizers.AddedToken(token, special=token not in text, normalized=False)
    for token in (*SPECIAL, *text, *special)
  ]


@functools.cache
def tokenizer_json(family: str) -> str:
  """The contents of tokenizer.json."""
  vocab, merges = vocabulary()
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
  made.normalizer = tokenizers.normalizers.NFC()
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_tokens(added_tokens(family))
  return made.to_str()


def tokenizer_config(family: str) -> dict:
  """The contents of tokenizer_config.json, without the chat template."""
  added = {
    str(len(vocabulary()[0]) + i): dict(
      content=t.content,
      lstrip=False,
      normalized=False,
      rstrip=False,
      single_word=False,
      special=t.special,
    )
    for i, t in enumerate(added_tokens(family))
  }
  extra = (
    dict(
      start_image_token="<img>",
      end_image_token="</img>",
      context_image_token="<IMG_CONTEXT>",
      video_token="<video>",
    )
    if family == "internvl"
    else {}
  )
  return dict(
    tokenizer_class="Qwen2Tokenizer",
    added_tokens_decoder=added,
    bos_token=None,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    unk_token=None,
    errors="replace",
    split_special_tokens=False,
    add_prefix_space=False,
    clean_up_tokenization_spaces=False,
    model_max_length=131072,
    **(dict(extra_special_tokens=extra) if extra else {}),
  )


@functools.cache
def _session() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="qwen_vocabulary_")  # removed when the process ends


@functools.cache
def tokenizer_directory(family: str) -> pathlib.Path:
  """A directory with the family's tokenizer.json, tokenizer_config.json and chat_template.jinja;
  kept for the session."""
  path = pathlib.Path(_session().name) / family
  contents = tokenizer_json(family)
  path.mkdir()
  (path / "tokenizer.json").write_text(contents, encoding="utf-8")
  (path / "tokenizer_config.json").write_text(
    json.dumps(tokenizer_config(family), indent=2), encoding="utf-8"
  )
  (path / "chat_template.jinja").write_text(TEMPLATES[family], encoding="utf-8")
  return path
