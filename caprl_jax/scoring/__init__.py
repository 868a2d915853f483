"""Written answers and captions -> scores.

`from caprl_jax.scoring import extract_answer, score` serves programs that score answers of their
own; both are imported when they are first named.
"""

import importlib
from typing import Any

_NAMES = {"extract_answer": "extraction", "score": "answers"}


def __getattr__(name: str) -> Any:
  if name not in _NAMES:
    raise AttributeError(f"module 'caprl_jax.scoring' has no attribute {name!r}")
  return getattr(importlib.import_module(f"caprl_jax.scoring.{_NAMES[name]}"), name)
