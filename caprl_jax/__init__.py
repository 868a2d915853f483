"""CapRL in JAX: reinforcement learning of captions that a blind language model can answer questions
from.

For notebooks and other programs (docs/python.md): `Captioner`, `Judge`, `Question`, `load_config`,
`train`, `evaluate`. They are imported when they are first named, so that importing the package
takes no time.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# A name of the package -> the module below caprl_jax that has it. `__init__.pyi` says the same to
# editors.
_NAMES = {
  "Answer": "api.judge",
  "Caption": "api.captioner",
  "Captioner": "api.captioner",
  "Judge": "api.judge",
  "Question": "data.rows",
  "Results": "api.results",
  "TrainingResult": "api.training",
  "evaluate": "api.training",
  "load_config": "api.training",
  "train": "api.training",
}


def __getattr__(name: str) -> Any:
  if name not in _NAMES:
    raise AttributeError(f"module 'caprl_jax' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"caprl_jax.{_NAMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *_NAMES])
