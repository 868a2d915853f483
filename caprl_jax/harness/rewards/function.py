"""`reward.custom`, "FILE.py:FUNCTION", or a function of the program -> a reward function of arrays
or of texts.

Its parameters' names say which it is: one of texts has `completions`, as TRL's reward functions
have; one of arrays has names of `rl.reward.RewardArrays`.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from caprl_jax.config.schema import did_you_mean
from caprl_jax.errors import UserError
from caprl_jax.json_files import cut, shown
from caprl_jax.rl.reward import UNJUDGED, RewardArrays
from caprl_jax.types import OwnReward

ARRAYS = tuple(field.name for field in dataclasses.fields(RewardArrays))
TEXTS = "completions"
_HOW = (
  f"a function of texts has a parameter `{TEXTS}`, and one of arrays has parameters among "
  f"{', '.join(ARRAYS)}"
)


@dataclasses.dataclass(frozen=True)
class CustomReward:
  """A reward function of the user's.

  spec: as `reward.custom` has it. path: the file that it stands in. names: of its parameters that
  are given something; `takes_all`: it has **kwargs. sha256: of the file and the function's name, or
  of the source of a function of the program.
  """

  spec: str
  path: pathlib.Path
  function: Callable[..., Any]
  names: tuple[str, ...]
  takes_all: bool
  sha256: str

  @property
  def of_texts(self) -> bool:
    """Whether it takes texts, on the host; else arrays, on the device."""
    return TEXTS in self.names

  def array_reward(self, arrays: RewardArrays) -> OwnReward:
    """What the function makes of arrays, inside the step's program. Raises UserError for another
    shape than [B, G], and for whatever it raises itself."""
    try:
      found = self.function(**{name: getattr(arrays, name) for name in self.names})
    except Exception as error:  # noqa: BLE001  a function of the user's raises anything
      self.fail(error, "; a function of arrays is made of jax.numpy and has no `if` on a value")
    reward_BG, valid_BG = found if isinstance(found, tuple) and len(found) == 2 else (found, True)
    shape = arrays.ended_BG.shape
    for what, value in (("reward", reward_BG), ("mask", valid_BG)):
      if not isinstance(value, bool) and getattr(value, "shape", None) != shape:
        had = getattr(value, "shape", None)
        raise UserError(
          f"reward.custom = {self.spec}: its {what} is "
          f"{shown(value) if had is None else f'of shape {had}'}, and must be an array of "
          f"[images, captions] = {shape}; return the reward, or (reward, mask)"
        )
    return OwnReward(
      jnp.asarray(reward_BG, jnp.float32),
      jnp.broadcast_to(jnp.asarray(valid_BG, bool), shape),
    )

  def check_unjudged(self) -> None:
    """Raises UserError for a function of arrays that wants what only a judge gives."""
    if absent := [name for name in self.names if name not in UNJUDGED]:
      raise UserError(
        f"reward.custom = {self.spec} wants {', '.join(absent)}, which only a judge gives, and "
        f"none is named: set judge.source, or use {', '.join(UNJUDGED)} alone"
      )

  def check_shapes(self, *, images: int, captions: int, tokens: int, questions: int) -> None:
    """Runs a function of arrays on shapes alone, as a step has them. Raises UserError as
    `array_reward`."""
    B, G, T, K = images, captions, tokens, questions
    sizes = {"BG": (B, G), "BGT": (B, G, T), "BGK": (B, G, K)}
    booleans = ("valid_BGT", "ended_BG", "correct_BGK", "asked_BGK", "answered_BGK")
    floats = ("accuracy_BG", "misled_BG", "credit_BGK", "misled_BGK")
    kind = lambda name: bool if name in booleans else jnp.float32 if name in floats else jnp.int32
    shapes: dict[str, Any] = {
      name: jax.ShapeDtypeStruct(sizes[name.rpartition("_")[2]], kind(name)) for name in ARRAYS
    }
    jax.eval_shape(self.array_reward, RewardArrays(**shapes))

  def fail(self, error: Exception, remedy: str = "") -> NoReturn:
    """Raises UserError with the line of the user's file where it was raised."""
    lines, traceback = [], error.__traceback__
    while traceback:
      if traceback.tb_frame.f_code.co_filename == str(self.path):
        lines.append(traceback.tb_lineno)
      traceback = traceback.tb_next
    where = f" in line {lines[-1]}" if lines else ""
    said = cut((str(error).strip().splitlines() or ["no message"])[0], 300)  # jax writes pages
    raise UserError(
      f"reward.custom = {self.spec} raised {type(error).__name__}{where}: {said}{remedy}"
    ) from error


GIVEN = "python:"  # begins what `reward.custom` says of a function of the program
_given: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def given_reward(function: Callable[..., Any]) -> Iterator[str]:
  """A function of the program, which `load_custom_reward` finds while this is entered; what
  `reward.custom` has to say. Raises UserError for what cannot be called."""
  if not callable(function):
    raise UserError(f"reward = {shown(function)} is no function")
  spec = f"{GIVEN}{getattr(function, '__name__', type(function).__name__)}"
  before = _given.get(spec)
  _given[spec] = function
  try:
    yield spec
  finally:
    _given.pop(spec)
    if before is not None:
      _given[spec] = before


def _of_program(spec: str) -> CustomReward:
  if spec not in _given:
    raise UserError(
      f"reward.custom = {shown(spec)} is a function of the program that began this run: call "
      "caprl_jax.train with it (reward=FUNCTION), or write it into a file, as FILE.py:FUNCTION"
    )
  function = _given[spec]
  called = inspect.unwrap(function)
  code = getattr(called, "__code__", None) or getattr(type(called).__call__, "__code__", None)
  try:
    source = inspect.getsource(called if hasattr(called, "__code__") else type(called))
  except (OSError, TypeError):  # typed into an interpreter
    source = repr((code.co_code, code.co_names, code.co_consts)) if code else ""
  names, takes_all = _parameters(function, spec)
  path = pathlib.Path(code.co_filename if code else "")
  digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
  return CustomReward(spec, path, function, names, takes_all, digest)


def load_custom_reward(spec: str) -> CustomReward:
  """Imports the file and finds the function, or takes the one of `given_reward`. Raises UserError
  for a file or function that is not there, a file that cannot be imported, and parameters that say
  neither texts nor arrays."""
  if spec.startswith(GIVEN):
    return _of_program(spec)
  file, colon, name = spec.rpartition(":")
  if not colon or not file or not name.isidentifier():
    raise UserError(f"reward.custom = {shown(spec)} must be FILE.py:FUNCTION")
  path = pathlib.Path(file).expanduser().resolve()
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(
      f"reward.custom = {spec}: {cut(path, 300)} cannot be read: {error.strerror}"
    ) from error
  digest = hashlib.sha256(data + b"\0" + name.encode()).hexdigest()
  module = _imported(path, data, digest, spec)
  function = getattr(module, name, None)
  if not callable(function):
    own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    raise UserError(
      f"reward.custom = {spec}: {path.name} has no function {name!r}{did_you_mean(name, own)} "
      f"(functions: {', '.join(own) or 'none'})"
    )
  names, takes_all = _parameters(function, spec)
  return CustomReward(spec, path, function, names, takes_all, digest)


def _imported(path: pathlib.Path, data: bytes, digest: str, spec: str) -> types.ModuleType:
  """The file as a module, of the very bytes that the digest is of; while it is imported it may
  import files beside it."""
  title = f"caprl_jax_reward_{digest[:12]}"
  module = types.ModuleType(title)
  module.__file__ = str(path)
  sys.modules[title] = module  # dataclasses look their own up
  sys.path.insert(0, str(path.parent))
  try:
    exec(compile(data, str(path), "exec"), vars(module))
  except (Exception, SystemExit) as error:  # the user's program: it may raise anything
    del sys.modules[title]
    raise UserError(
      f"reward.custom = {spec}: {path.name} cannot be imported: {type(error).__name__}: "
      f"{cut(error, 300)}"
    ) from error
  finally:
    sys.path.remove(str(path.parent))
  return module


def _parameters(function: Callable[..., Any], spec: str) -> tuple[tuple[str, ...], bool]:
  """The names that the function is given, and whether it takes all that there is."""
  parameters = inspect.signature(function).parameters.values()
  takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
  named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
  names = tuple(one.name for one in named)
  if TEXTS in names:
    return names, takes_all
  known = tuple(name for name in names if name in ARRAYS)
  unknown = [one.name for one in named if one.name not in ARRAYS and one.default is one.empty]
  if unknown or not known:
    hint = did_you_mean(unknown[0], [TEXTS, *ARRAYS]) if unknown else ""
    raise UserError(f"reward.custom = {spec} has the parameters ({', '.join(names)}){hint}; {_HOW}")
  return known, takes_all
