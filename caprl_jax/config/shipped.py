"""The name of a config that comes with the package -> its file."""

import pathlib

from caprl_jax.config import schema
from caprl_jax.json_files import shown

PREFIX = "caprl_jax"  # --config=caprl_jax:quickstart
_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
  """Where the configs are: inside an installed package, beside it in the repository."""
  installed = _PACKAGE / "_configs"
  return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
  """What may come after `caprl_jax:`: quickstart, ablations/judge_size, ..."""
  found = folder().rglob("*.py")
  return sorted(str(path.relative_to(folder()).with_suffix("").as_posix()) for path in found)


def find(name: str) -> pathlib.Path:
  """The file of a config. Raises ValueError where none has that name."""
  known = names()
  if name.removesuffix(".py") not in known:
    hint = schema.did_you_mean(name, known)
    listed = f"there are: {', '.join(known)}" if known else f"there are none in {folder()}"
    raise ValueError(f"no config {shown(name)} comes with caprl_jax{hint} ({listed})")
  return folder() / f"{name.removesuffix('.py')}.py"
