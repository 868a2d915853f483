"""What a model that writes questions is told: our words, or those of the released curation."""

import pathlib
from typing import NamedTuple

from caprl_jax import released_texts
from caprl_jax.json_files import decode

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

OURS = "ours"


class GenerationPrompt(NamedTuple):
  """The system's turn, and the user's beside the image."""

  system: str
  user: str = GENERATION_USER


def read_prompt(source: str) -> GenerationPrompt:
  """The prompt that `curate.prompt` names.

  Args:
    source: `ours`; `official`: the released one, to the byte (`released_texts.py`), whose user
      says what ours says; a .py file: the strings SYS_PROMPT and PROMPT that it assigns, as the
      released gen_qa.py does; any other file: the system's turn.

  Raises:
    ValueError: the file cannot be read or is empty; as `released_texts.read_strings`.
  """
  if source == OURS:
    return GenerationPrompt(GENERATION_SYSTEM)
  if released_texts.names_program(source):
    found = released_texts.read_strings(released_texts.CURATION, source, "curate.prompt")
    system = found[released_texts.CURATION.variable]
    return GenerationPrompt(system, found.get("PROMPT", GENERATION_USER))
  path = pathlib.Path(source).expanduser()
  try:
    text = decode(path.read_bytes())
  except (OSError, UnicodeError) as error:
    raise ValueError(
      f"curate.prompt = {source!r} cannot be read: {error}; check the path"
    ) from error
  if not text.strip():
    raise ValueError(f"curate.prompt = {source!r} is empty")
  return GenerationPrompt(text)
