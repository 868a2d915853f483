"""Requests (text, an image) -> replies of an OpenAI-compatible chat endpoint: vLLM, SGLang, OpenAI,
many at a time.

The package `openai` is optional and imported where an endpoint is opened.
"""

import asyncio
import base64
import concurrent.futures
import dataclasses
import datetime
import difflib
import email.utils
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import threading
import urllib.parse
from collections.abc import Coroutine, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from PIL import Image

from caprl_jax.image_files import open_image

log = logging.getLogger("caprl_jax.inference.endpoint")

Key = TypeVar("Key", bound=Hashable)
# key, system text ("": none), user text, an encoded image
Request = tuple[Key, str, str, bytes | None]

_FIRST_WAIT_SECS = 1.0  # before the first retry; doubled with each
_LONGEST_WAIT_SECS = 120.0  # also where the server asks for longer
_CHECK_SECS = 30.0
_REASON_CHARS = 500
_SHOWN_MODELS = 20


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
  """A server with an OpenAI-compatible API.

  url: with its path, as in http://localhost:8000/v1.
  model: the name that it is served under.
  api_key_env: name of the environment variable with the key, which is sent to `url` and never
    written anywhere; where it is not set, or for "", the key is EMPTY, as servers without keys
    want.
  concurrency: requests at a time.
  timeout_secs: of one attempt, from its start to its end.
  max_retries: attempts after the first, on connection errors, timeouts, unreadable replies, 429
    and 5xx.
  temperature: of what the server writes; CapRL's own by default.
  max_tokens: longest reply.
  repetition_penalty: no part of OpenAI's own protocol; sent unless None or 1. CapRL generated its
    questions with 1.05.
  max_failures: so many failing requests in a row stop the run.
  """

  url: str
  model: str
  api_key_env: str = "OPENAI_API_KEY"
  concurrency: int = 32
  timeout_secs: float = 120.0
  max_retries: int = 4
  temperature: float = 0.1
  max_tokens: int = 2048
  repetition_penalty: float | None = 1.05
  max_failures: int = 20

  def __post_init__(self):
    parts = urllib.parse.urlsplit(self.url)
    if parts.username or parts.password:
      raise ValueError(
        "endpoint.url holds a user name or password; put a key into an environment "
        "variable and name that in endpoint.api_key_env"
      )
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise ValueError(
        f"endpoint.url = {self.url!r} is no address; write it as http://localhost:8000/v1"
      )
    if not self.model:
      raise ValueError("endpoint.model is empty; give the name that the model is served under")
    if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
      # It may be the key itself: not to be shown.
      raise ValueError(
        "endpoint.api_key_env is no name of an environment variable; put the key "
        "into a variable and give its name here, such as 'OPENAI_API_KEY'"
      )
    for name, least in (
      ("concurrency", 1),
      ("max_retries", 0),
      ("max_tokens", 1),
      ("max_failures", 1),
    ):
      if getattr(self, name) < least:
        raise ValueError(f"endpoint.{name} = {getattr(self, name)}: it must be at least {least}")
    if not self.timeout_secs > 0 or not self.temperature >= 0:
      raise ValueError(
        f"endpoint.timeout_secs = {self.timeout_secs} must be above 0, and "
        f"temperature = {self.temperature} at least 0"
      )
    if self.repetition_penalty is not None and not self.repetition_penalty > 0:
      raise ValueError(
        f"endpoint.repetition_penalty = {self.repetition_penalty}: it must be above "
        "0; None leaves it out"
      )


@dataclasses.dataclass(frozen=True)
class JudgeEndpoint(EndpointConfig):
  """A judge behind a server with an OpenAI-compatible API, which answers in words. Its temperature
  and longest answer are these, not `judge.temperature` and `judge.max_tokens`. A request that fails
  after its retries leaves its caption out.

  temperature: 0 answers the same question in the same way, as far as the server does.
  max_tokens: longest reply; one that is cut before it says an answer has failed.
  """

  temperature: float = 0.0
  max_tokens: int = 512
  repetition_penalty: float | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
  """What became of a request: `text`, or `error` with the reason.

  `finish` is the server's own word ("stop"; "length": cut off at max_tokens), "" where there was no
  reply.
  """

  text: str | None
  finish: str
  error: str | None
  attempts: int


class Endpoint:
  """An open endpoint; to be closed, or used in a `with`. Requests run in a thread of its own."""

  def __init__(self, cfg: EndpointConfig):
    """Opens no connection yet. Raises ValueError without the package `openai`, or for a key that
    cannot be sent.
    """
    try:
      import openai
    except ImportError as error:
      raise ValueError(
        f"an endpoint ({cfg.url}) is asked with the package openai, which cannot be "
        f"imported ({error}); run `pip install openai`"
      ) from error
    self.cfg = cfg
    self._openai = openai
    self._key = (os.environ.get(cfg.api_key_env, "").strip() if cfg.api_key_env else "") or "EMPTY"
    if not re.fullmatch(r"[!-~]+", self._key):  # the client's own error would show it
      raise ValueError(
        f"the environment variable {cfg.api_key_env} holds characters that no key has; set it anew"
      )
    self._failures = 0  # in a row
    self._busy = asyncio.Semaphore(cfg.concurrency)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
    self._thread.start()
    # A proxy that the environment names for the world outside must not stand before a server on
    # this machine.
    http = openai.DefaultAsyncHttpxClient(trust_env=False) if is_local(cfg.url) else None
    self._client = openai.AsyncOpenAI(
      base_url=cfg.url, api_key=self._key, timeout=cfg.timeout_secs, max_retries=0, http_client=http
    )

  def __enter__(self) -> "Endpoint":
    return self

  def __exit__(self, *failure) -> None:
    self.close()

  def close(self) -> None:
    """Drops what is under way. A closed endpoint cannot be asked again."""
    if self._loop.is_closed():
      return
    try:
      self._start(self._end()).result(timeout=5)
    except concurrent.futures.TimeoutError:
      log.warning("endpoint %s: its connections did not close in 5 s", self.cfg.url)
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(timeout=5)
    if not self._thread.is_alive():
      self._loop.close()

  def check(self) -> None:
    """Asks for the list of models. Raises ValueError with url, reason and remedy, also where
    `model` is not in it.
    """
    cfg = self.cfg
    where = f"endpoint {cfg.url}"
    try:
      page = self._start(asyncio.wait_for(self._client.models.list(), _CHECK_SECS)).result()
      served = [model.id for model in page.data]
    except Exception as error:
      status = getattr(error, "status_code", None)
      if status in (401, 403):
        variable = cfg.api_key_env or "that endpoint.api_key_env names"
        remedy = f"put the right key into the environment variable {variable}"
      elif (status or 0) >= 500 or isinstance(
        error, (self._openai.APIConnectionError, TimeoutError)
      ):
        remedy = (
          f"start the server (such as `vllm serve {cfg.model}`), wait until it is ready, "
          "or correct endpoint.url"
        )
      else:
        remedy = "is it the address of an OpenAI-compatible server? It mostly ends in /v1"
      raise ValueError(
        f"{where} does not list its models: {self._reason(error)}; {remedy}"
      ) from error
    if cfg.model not in served:
      near = difflib.get_close_matches(cfg.model, served, 1)
      more = f" and {len(served) - _SHOWN_MODELS} more" if len(served) > _SHOWN_MODELS else ""
      raise ValueError(
        f"{where} does not serve endpoint.model = {cfg.model!r}"
        + (f"; did you mean {near[0]!r}?" if near else ";")
        + f" It serves {', '.join(map(repr, served[:_SHOWN_MODELS])) or 'no model'}{more}"
      )

  def ask_all(self, requests: Iterable[Request]) -> Iterator[tuple[Key, Reply]]:
    """Sends all requests and yields each one's key and reply, in the order in which they finish.

    Reads at most 2 x concurrency requests ahead of what it has yielded. A request that fails, after
    its retries or for a reason that no retry mends (a bad image, too long a prompt), yields a reply
    with `error`. Left early, also by Ctrl-C, it cancels what is under way.

    Raises:
      ValueError: `max_failures` requests in a row failed, counted over all calls; with the last
      one's reason.
    """
    waiting = iter(requests)
    running: dict[concurrent.futures.Future[Reply], Key] = {}
    try:
      while True:
        for key, system, user, image in itertools.islice(
          waiting, 2 * self.cfg.concurrency - len(running)
        ):
          running[self._start(self._ask(system, user, image))] = key
        if not running:
          return
        done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
          key, reply = running.pop(future), future.result()
          self._failures = 0 if reply.error is None else self._failures + 1
          yield key, reply
          if self._failures >= self.cfg.max_failures:
            raise ValueError(
              f"endpoint {self.cfg.url}, model {self.cfg.model!r}: {self._failures} requests in "
              f"a row failed (endpoint.max_failures); the last one: {reply.error}. Mend that and "
              "start again"
            )
    finally:
      for future in running:
        future.cancel()

  def _start(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  async def _end(self) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await self._client.close()

  async def _ask(self, system: str, user: str, image: bytes | None) -> Reply:
    cfg = self.cfg
    async with self._busy:
      try:
        messages = _messages(system, user, image)
      except ValueError as error:
        return Reply(None, "", str(error), 0)
      penalty = (
        {}
        if cfg.repetition_penalty in (None, 1)
        else {"repetition_penalty": cfg.repetition_penalty}
      )
      for attempt in itertools.count(1):
        try:
          # the client's own timeout is for every single read
          async with asyncio.timeout(cfg.timeout_secs):
            completion = await self._client.chat.completions.create(
              model=cfg.model,
              messages=messages,
              temperature=cfg.temperature,
              max_tokens=cfg.max_tokens,
              extra_body=penalty,
            )
          choice = completion.choices[0]
          if choice.message.content is None:  # refused, filtered, or all tokens went into reasoning
            reason = f"the reply has no text (finish_reason {choice.finish_reason!r})"
            return Reply(None, choice.finish_reason or "", reason, attempt)
          return Reply(choice.message.content, choice.finish_reason or "", None, attempt)
        # Whatever else stands in the place of a reply (HTML, half of a JSON) makes the client raise
        # anything.
        except Exception as error:  # noqa: BLE001
          status = getattr(error, "status_code", None)
          lasting = status is not None and status not in (408, 429) and status < 500
          if lasting or attempt > cfg.max_retries:
            times = f" (attempt {attempt} of {cfg.max_retries + 1})" if not lasting else ""
            return Reply(None, "", self._reason(error) + times, attempt)
          await asyncio.sleep(wait_secs(attempt, error))
    raise AssertionError("unreachable")

  def _reason(self, error: Exception) -> str:
    """The error in words, without the key, which some servers repeat."""
    if isinstance(error, self._openai.APIStatusError):
      reason = f"HTTP {error.status_code}: {_server_message(error.response.text)}"
    elif isinstance(error, (TimeoutError, self._openai.APITimeoutError)):
      reason = f"no reply in time (endpoint.timeout_secs = {self.cfg.timeout_secs:g})"
    elif isinstance(error, self._openai.APIConnectionError):
      cause = error.__cause__ or error
      reason = f"no connection ({type(cause).__name__}: {cause})"
    else:
      reason = f"the reply is not an OpenAI-compatible server's ({type(error).__name__}: {error})"
    if "repetition_penalty" in reason:
      reason += "; set endpoint.repetition_penalty = None for this server"
    return reason if self._key == "EMPTY" else reason.replace(self._key, "<key>")


def _messages(system: str, user: str, image: bytes | None) -> list[dict[str, Any]]:
  """Raises ValueError for an image of an unknown format."""
  content: Any = user
  if image is not None:
    url = f"data:{mime_type(image)};base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": user}]
  system_turn = [{"role": "system", "content": system}] if system else []
  return [*system_turn, {"role": "user", "content": content}]


def mime_type(image: bytes) -> str:
  """Of an encoded image, by its header. Raises ValueError for an unknown format."""
  try:
    with open_image(image) as opened:  # reads the header only
      kind = opened.format
  except Exception as error:
    raise ValueError(
      f"the image ({len(image)} bytes) is in no known format ({error}); it was not sent"
    ) from error
  kind = "JPEG" if kind == "MPO" else kind  # several JPEGs in one file, as phones write them
  if kind not in Image.MIME:
    raise ValueError(
      f"the image is in the format {kind}, which has no MIME type; save it as PNG or JPEG"
    )
  return Image.MIME[kind]


def wait_secs(attempt: int, error: Exception) -> float:
  """Seconds to wait after attempt number `attempt` (from 1): as the server asks, else doubled each
  time; never the same for all requests.
  """
  asked = retry_after_secs(getattr(getattr(error, "response", None), "headers", {}))
  if asked is not None:
    return min(asked, _LONGEST_WAIT_SECS) + random.random() * _FIRST_WAIT_SECS
  return min(_FIRST_WAIT_SECS * 2.0 ** (attempt - 1), _LONGEST_WAIT_SECS) * (0.5 + random.random())


def retry_after_secs(headers: Mapping[str, str]) -> float | None:
  """The header Retry-After, which holds seconds or a date; None where it holds neither."""
  said = headers.get("retry-after", "")
  try:
    secs = float(said)
  except ValueError:
    try:
      secs = (
        email.utils.parsedate_to_datetime(said) - datetime.datetime.now(datetime.UTC)
      ).total_seconds()
    except (ValueError, TypeError):
      return None
  return max(secs, 0.0) if secs == secs else None


def _server_message(body: str) -> str:
  """The message inside the JSON of an error, as OpenAI, vLLM and FastAPI write it; else the body's
  beginning.
  """
  try:
    found: Any = json.loads(body)
  except ValueError:  # as a proxy in between answers: the body is the message
    found = body
  for name in ("error", "message", "detail"):
    if isinstance(found, dict) and found.get(name):
      found = found[name]
  message = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
  return message.strip()[:_REASON_CHARS] or "no reason given"


def is_local(url: str) -> bool:
  """Whether an address is one of this machine."""
  host = urllib.parse.urlsplit(url).hostname or ""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost" or host.endswith(".localhost")
