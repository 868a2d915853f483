"""What a captioner says of a caption that is being written."""

import types

from helpers import tiny

from caprl_jax.inference.captioner import Captioner
from caprl_jax.inference.engine.slots import Written


def test_what_is_being_written_has_whole_characters():
  """Token by token, of which a character may take several."""
  tokenizer = tiny.tokenizer(True)
  text = "Café 😀 \ufffd naïve."
  ids = tokenizer.encode_plain(text)
  assert len(ids) > len(text) + 4  # the test could tell
  stand_in = types.SimpleNamespace(
    loaded=types.SimpleNamespace(tokenizer=tokenizer),
    vocabulary=types.SimpleNamespace(end_ids=(ids[-1],)),
  )
  written = lambda n: Captioner._written(stand_in, Written(None, 0, ids[:n], live=n < len(ids)))
  found = [written(n) for n in range(1, len(ids) + 1)]
  assert found[-1].text == text and found[-1].finish == "end"
  for before, after in zip(found, found[1:]):
    assert before.finish == "" and after.text.startswith(before.text)
    assert not before.text.endswith("\ufffd")
  assert {"Caf", "Café", "Café ", "Café 😀 "} <= {one.text for one in found}
