"""Results -> a list that is a table, too."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def frame_of(rows: Sequence[Mapping[str, Any]]) -> Any:
  """A pandas frame of rows by column. Raises ValueError where pandas is not installed."""
  try:
    import pandas
  except ImportError as error:
    raise ValueError(
      f"a frame is made by pandas, which cannot be imported ({error}); run `pip install pandas`, "
      "or read the list itself"
    ) from error
  return pandas.DataFrame(list(rows))


class Results(list[Item]):
  """A list of dataclasses; `to_pandas` shows it as a table."""

  def __init__(self, items: Iterable[Item] = ()):
    super().__init__(items)

  def to_pandas(self) -> Any:
    """A pandas frame with a row per result and a column per field. Raises ValueError without
    pandas."""
    return frame_of([dataclasses.asdict(item) for item in self])  # type: ignore[call-overload]
