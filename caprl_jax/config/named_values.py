"""Values with names in one text, as a command line can give them: "name=value,name=value"."""


def parse_named(text: str, *, key: str, example: str) -> dict[str, str]:
  """Name -> value, in the order given; spaces around both are dropped, and so are empty parts.

  Args:
    text: "name=value", several joined by commas; a value may hold "=".
    key: of the config, for messages.
    example: what could stand there.

  Raises:
    ValueError: a part without a name or value, or a name that was there before.
  """
  found: dict[str, str] = {}
  for part in filter(None, map(str.strip, text.split(","))):
    name, _, value = (piece.strip() for piece in part.partition("="))
    if not name or not value:
      raise ValueError(f"{key}: {part!r} must be name=value, as in {example}")
    if name in found:
      raise ValueError(f"{key}: the name {name!r} is given twice")
    found[name] = value
  return found
