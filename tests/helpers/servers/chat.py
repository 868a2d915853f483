"""A server with OpenAI's API for chats, in this process, that does what a test says."""

import contextlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator

from helpers.servers.background import in_background


class Server(http.server.ThreadingHTTPServer):
  """Answers the n-th attempt (from 1) of the request with user text `name` by `behave(handler,
  name, n)`.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, behave):
    super().__init__(("127.0.0.1", 0), Handler)
    self.behave, self.attempts, self.bodies, self.times, self.keys = behave, {}, {}, {}, []
    self.lock, self.now, self.most = threading.Lock(), 0, 0

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/v1"

  def handle_error(self, *_):
    pass  # clients that hang up


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.server.behave(self, self.path, 1)

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    content = body["messages"][-1]["content"]
    name = content if isinstance(content, str) else content[-1]["text"]
    with self.server.lock:
      self.server.attempts[name] = attempt = self.server.attempts.get(name, 0) + 1
      self.server.bodies[name] = body
      self.server.times.setdefault(name, []).append(time.monotonic())
      self.server.keys.append(self.headers["authorization"])
      self.server.now += 1
      self.server.most = max(self.server.most, self.server.now)
    try:
      self.server.behave(self, name, attempt)
    finally:
      with self.server.lock:
        self.server.now -= 1

  def say(self, status: int, body, **headers) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in ({"content-type": "application/json"} | headers).items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("content-length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def answer(self, text, finish="stop") -> None:
    self.say(
      200,
      {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
          {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        ],
      },
    )


@contextlib.contextmanager
def serving(behave) -> Iterator[Server]:
  """A server that answers by `behave` while it is entered."""
  server = Server(behave)
  with in_background(server):
    yield server


LINE = re.compile(r"^ *- ([A-Z])\) (.*?) *$", re.MULTILINE)


def shown(message: str) -> tuple[str, str, dict[str, str]]:
  """What a judge was shown in the prompt `plain`: caption, question, and option by letter."""
  caption, _, rest = message.partition("Caption:\n")[2].rpartition("\nQuestion: ")
  return caption, rest.partition("\n")[0], dict(LINE.findall(rest))


def honest(message: str) -> str:
  """The letter of the option whose text is in the caption, or that of "can not answer"."""
  caption, _, options = shown(message)
  for letter, option in options.items():
    if option in caption:
      return letter
  return next((k for k, option in options.items() if option.startswith("Can not")), "Z")


def judging(answer: Callable[[str], str] = honest):
  """What a server does that serves the model `m` as a judge: `answer` of each message."""

  def behave(handler: Handler, name: str, attempt: int) -> None:
    if handler.command == "GET":
      handler.say(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})
    else:
      handler.answer(answer(name))

  return behave
