"""What a model that writes questions is told: our words, or those of the released curation."""

import ast
import hashlib
import logging
import pathlib
from typing import NamedTuple

from caprl_jax.json_files import decode

log = logging.getLogger("caprl_jax.modes.curate.prompts")

# The released prompt asks for five questions in this layout, too; the words are ours.
GENERATION_SYSTEM = """\
You will be shown an image. Write exactly five challenging multiple-choice questions about its \
content.

- Every question must be answerable from the image alone, and must not be answerable without it: \
do not ask for common
  knowledge, and let neither the question nor the options give the answer away.
- Ask about different things: objects and their attributes, counts, positions and relations, text \
and numbers in the
  image, actions, and conclusions that need several details.
- Every question has exactly four options, A to D. One is correct; the other three are plausible \
and wrong.
- Put the correct options at different letters.

Use exactly this format. Two examples:

#### 1. **What is the woman in the red coat holding in her left hand?**
   - A) A closed umbrella
   - B) A paper bag
   - C) A dog's leash
   - D) A telephone
**Answer:** C) A dog's leash
------
#### 2. **According to the chart, in which year were sales of bicycles highest?**
   - A) 2016
   - B) 2018
   - C) 2019
   - D) 2021
**Answer:** B) 2018
------

Write all five questions, numbered 1 to 5, in this format, and no other text."""
GENERATION_USER = "Here is the image"

# Of SYS_PROMPT in InternLM/CapRL, QA_data_curation/1_generate_qa/gen_qa.py, in UTF-8.
RELEASED_SHA256 = "4e275e96ae0126609f8e7bfa1f03f56a2f015179ebd0c6c9d70dc598d1258fcf"


class GenerationPrompt(NamedTuple):
  """The system's turn, and the user's beside the image."""

  system: str
  user: str = GENERATION_USER


def read_prompt(source: str | None) -> GenerationPrompt:
  """The prompt that `curate.prompt` names.

  Args:
    source: None: ours. A .py file: the strings SYS_PROMPT and PROMPT that it assigns, as the
      released gen_qa.py does; it is parsed, not run. Any other file: the system's turn.

  Raises:
    ValueError: the file cannot be read, is empty, or assigns no SYS_PROMPT.
  """
  if source is None:
    return GenerationPrompt(GENERATION_SYSTEM)
  path = pathlib.Path(source).expanduser()
  try:
    text = decode(path.read_bytes())
  except (OSError, UnicodeError) as error:
    raise ValueError(
      f"curate.prompt = {source!r} cannot be read: {error}; check the path"
    ) from error
  if path.suffix != ".py":
    if not text.strip():
      raise ValueError(f"curate.prompt = {source!r} is empty")
    return GenerationPrompt(text)
  found = _strings(text, source)
  if "SYS_PROMPT" not in found:
    raise ValueError(
      f"curate.prompt = {source!r} assigns no string SYS_PROMPT; name CapRL's "
      "QA_data_curation/1_generate_qa/gen_qa.py, or a text file"
    )
  prompt = GenerationPrompt(found["SYS_PROMPT"], found.get("PROMPT", GENERATION_USER))
  if hashlib.sha256(prompt.system.encode()).hexdigest() == RELEASED_SHA256:
    log.info("curate.prompt: the released prompt, to the byte")
  else:
    log.warning("curate.prompt: SYS_PROMPT of %s is not the one that was released in 2025", path)
  return prompt


def _strings(code: str, source: str) -> dict[str, str]:
  """Names that a program's top level assigns string literals to."""
  try:
    tree = ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ValueError(f"curate.prompt = {source!r} is no Python: {error}") from error
  return {
    target.id: node.value.value
    for node in tree.body
    if isinstance(node, ast.Assign)
    and isinstance(node.value, ast.Constant)
    and isinstance(node.value.value, str)
    for target in node.targets
    if isinstance(target, ast.Name)
  }
