"""Mode `curate`: nothing is lost between images and questions, the rules as published, resume, new
thresholds, endpoints."""

import contextlib
import http.server
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.captioner_directory import write_checkpoint
from PIL import Image

from caprl_jax import main, sharding
from caprl_jax.data.readers import jsonl
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow, Question
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.hub.load import load_policy
from caprl_jax.inference import vqa as answering
from caprl_jax.modes.curate import generated, prompts
from caprl_jax.modes.curate import run as curation
from caprl_jax.modes.curate.section import CurateConfig
from caprl_jax.modes.curate.selection import select

COLOR = Question("What color is the shape", ("red", "green", "blue", "teal"), 2)
SHAPE = Question("What shape is present?", ("circle", "image"), 0)
KINDS = Question("Which one of these", ("a", "b", "c"), 1)


def picture(seed: int, size=(64, 64)) -> Image.Image:
  """Fields of colour that no other seed has."""
  fields = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
  return (
    Image.fromarray(fields)
    .resize((64, 64), Image.Resampling.BICUBIC)
    .resize(size, Image.Resampling.BICUBIC)
  )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("curation") / "qwen"
  write_checkpoint(path, "qwen2_5_vl")
  return path


@pytest.fixture
def images(tmp_path):
  """Six images to keep; a copy of the first, one too small, one that a benchmark has, one that is
  none.
  """
  folder, benchmark = tmp_path / "images", tmp_path / "benchmark"
  folder.mkdir(), benchmark.mkdir()
  for i in range(6):
    picture(i).save(folder / f"{i}.png")
  picture(0, (48, 48)).save(folder / "copy.png")
  picture(7, (20, 20)).save(folder / "small.png")
  picture(8).save(folder / "famous.jpg", quality=80)
  picture(8, (128, 128)).save(benchmark / "known.png")
  (folder / "torn.png").write_bytes(b"no image")
  return folder


def run(tmp_path, checkpoint, source, *more):
  return main.main(
    [
      "main",
      "--config=configs/curate.py",
      f"--workdir={tmp_path / 'work'}",
      f"--config.curate.input={source}",
      f"--config.curate.output={tmp_path / 'out.jsonl'}",
      f"--config.answerer.checkpoint={checkpoint}",
      "--config.answerer.dtype=float32",
      "--config.answerer.param_dtype=float32",
      "--config.answerer.max_pixels=None",
      "--config.curate.answers.batch_size=2",
      "--config.curate.shard_rows=4",
      *more,
    ]
  )


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def left_out(tmp_path):
  return read_lines(tmp_path / "work" / "left_out.jsonl")


@pytest.fixture
def given(tmp_path, images):
  rows = [
    QARow(images / f"{i}.png", (COLOR, SHAPE, KINDS)[: 1 + i % 3], f"row {i}", {"n": str(i)})
    for i in range(6)
  ]
  jsonl.write_jsonl(tmp_path / "given.jsonl", rows)
  return tmp_path / "given.jsonl"


GIVEN = (
  "--config.curate.questions=given",
  "--config.curate.min_visual=0.1",
  "--config.curate.max_blind=0.9",
)


def test_given_questions_are_filtered_by_the_models_answers(tmp_path, checkpoint, given, capsys):
  flat = f"--config.curate.answers_output={tmp_path / 'answers.jsonl'}"
  assert run(tmp_path, checkpoint, given, *GIVEN, flat) == 0
  rows = read_qa_rows(str(given), 0)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with (
    jax.set_mesh(mesh),
    answering.Answerer(
      load_policy(str(checkpoint), mesh), answering.AnswerConfig(batch_size=1), mesh, 0
    ) as one,
  ):
    verdicts = {r.number: r.answers for batch in one(enumerate(rows)) for r in batch}
  lines = read_lines(tmp_path / "answers.jsonl")
  for n, (row, (sample, visual, blind)) in enumerate(zip(rows, lines, strict=True)):
    found = verdicts[n]
    assert sample["image_path"] == str(row.image) and len(visual) == 4 * len(row.questions)
    assert np.reshape(visual, (-1, 4)).mean(1).tolist() == [v.visual for v in found]
    assert np.reshape(blind, (-1, 4)).mean(1).tolist() == [v.blind for v in found]
  want = {
    (row.name, q.stem)
    for n, row in enumerate(rows)
    for q, v in zip(row.questions, verdicts[n])
    if v.visual > 0.1 and v.blind < 0.9
  }
  got = read_qa_rows(str(tmp_path / "out.jsonl"), 0)
  assert want and {(row.name, q.stem) for row in got for q in row.questions} == want
  assert all(row.facts == {"n": row.name[-1]} for row in got)
  assert all(
    "visual" in q.provenance and "/4" in q.provenance for row in got for q in row.questions
  )
  dropped = left_out(tmp_path)
  assert len(dropped) == 12 - len(want) and all("verdict" in item for item in dropped)
  figures = json.loads((tmp_path / "work" / "funnel.json").read_text())
  assert (
    figures["questions"]["parsed"]
    == 12
    == figures["questions"]["kept"] + sum(figures["questions"]["dropped"].values())
  )
  assert sum(figures["visual/blind"].values()) == 12
  page = (tmp_path / "work" / "curation.html").read_text()
  assert page.count("<article") == 6 and "Funnel" in page
  assert f"{len(want)} kept, of" in capsys.readouterr().err


def test_other_thresholds_ask_no_model(tmp_path, checkpoint, given, monkeypatch):
  assert run(tmp_path, checkpoint, given, *GIVEN) == 0
  read = lambda: json.loads((tmp_path / "work" / "funnel.json").read_text())
  first = read()
  monkeypatch.setattr(curation, "letter_answerer", None)  # what would be called
  counts = set()
  for visual, blind in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.3), (0.9, 0.1), (None, None)):
    status = run(
      tmp_path,
      checkpoint,
      given,
      GIVEN[0],
      f"--config.curate.min_visual={visual}",
      f"--config.curate.max_blind={blind}",
    )
    figures = read()
    assert figures["visual/blind"] == first["visual/blind"]
    shares = [(*map(float, key.split("/")), n) for key, n in figures["visual/blind"].items()]
    kept = sum(n for v, b, n in shares if visual is None or (v > visual and b < blind))
    assert figures["questions"]["kept"] == kept and status == (0 if kept else 2)
    counts.add(kept)
  assert len(counts) > 1


def test_other_settings_of_a_stage_are_refused(tmp_path, checkpoint, given, capsys):
  assert run(tmp_path, checkpoint, given, *GIVEN) == 0
  assert run(tmp_path, checkpoint, given, *GIVEN, "--config.curate.answers.permutations=2") == 2
  assert "3_answers is left from a job with other settings: answers was" in capsys.readouterr().err


@pytest.mark.parametrize("trained", [True, False])
def test_an_answerer_trained_anew_or_run_otherwise_is_refused(
  tmp_path, checkpoint, given, trained, capsys
):
  shutil.copytree(checkpoint, tmp_path / "answerer")
  assert run(tmp_path, tmp_path / "answerer", given, *GIVEN) == 0
  if trained:
    tiny.train_anew(tmp_path / "answerer")
  more = () if trained else ("--config.answerer.max_pixels=4096",)
  assert run(tmp_path, tmp_path / "answerer", given, *GIVEN, *more) == 2
  what = "checkpoint_sha256 was" if trained else "max_pixels was None and is 4096"
  assert f"3_answers is left from a job with other settings: {what}" in capsys.readouterr().err


def test_it_goes_on_where_it_was_stopped(tmp_path, checkpoint, given, monkeypatch):
  assert run(tmp_path / "whole", checkpoint, given, *GIVEN) == 0
  dispatch, asked = answering.Answerer._dispatch, []

  def interrupted(self, batch):
    asked.append([ask.number for ask in batch.items])
    if len(asked) == 3:  # one batch is ahead: what the first one gave is kept by now
      raise KeyboardInterrupt
    return dispatch(self, batch)

  monkeypatch.setattr(answering.Answerer, "_dispatch", interrupted)
  assert (
    run(tmp_path / "cut", checkpoint, given, *GIVEN) == 130
    and not (tmp_path / "cut" / "out.jsonl").exists()
  )
  assert run(tmp_path / "cut", checkpoint, given, *GIVEN) == 0
  assert not set(asked[0]) & {number for members in asked[3:] for number in members}
  read = lambda name: [
    (row.name, row.questions) for row in read_qa_rows(str(tmp_path / name / "out.jsonl"), 0)
  ]
  assert read("cut") == read("whole")


def test_the_published_rule():
  row = QARow(b"", (), "image")
  questions = [
    Question(f"Question number {n} {'abcdefgh'[n] * 4}", ("x", "y"), 0) for n in range(5)
  ]
  verdict = lambda visual, blind, error="": dict(
    visual=visual, blind=blind, visual_prob=0, blind_prob=0, error=error
  )
  verdicts = [
    verdict(1.0, 0.0),
    verdict(0.75, 0.0),
    verdict(1.0, 0.25),
    verdict(1.0, 0.0, "too long"),
    verdict(1.0, 0.0),
  ]
  item = RowResult(
    0,
    row,
    {
      "image": "image",
      "questions": jsonl.plain_questions(QARow(b"", tuple(questions), "")),
      "verdicts": verdicts,
      "failures": [],
      "error": "",
    },
    {},
  )
  got = select(item, CurateConfig("", "a.jsonl"))
  assert [q.stem for q, _ in got.kept] == [questions[0].stem, questions[4].stem]
  assert [(q.stem, why) for q, _, why in got.dropped] == [
    (questions[1].stem, "not answered with the image"),
    (questions[2].stem, "answered without the image"),
    (questions[3].stem, "not asked"),
  ]
  assert got.row.questions[0].provenance == "visual 4/4, blind 0/4"


REPLY = (
  generated.format_questions([COLOR, KINDS]) + "\n#### 3. **Unfinished business?**\n   - A) yes"
)


class Handler(http.server.BaseHTTPRequestHandler):
  """An OpenAI-compatible server of one model, which always says the same."""

  def log_message(self, *_):
    pass

  def _send(self, value):
    body = json.dumps(value).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def do_GET(self):
    self._send(
      {
        "object": "list",
        "data": [{"id": "writer", "object": "model", "created": 0, "owned_by": "x"}],
      }
    )

  def do_POST(self):
    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    if self.server.dead:
      self.send_error(400)
      return
    self.server.asked.append(request)
    self._send(
      {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "writer",
        "choices": [
          {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": self.server.reply},
          }
        ],
      }
    )


@contextlib.contextmanager
def serving(dead: bool = False):
  """A server with the list of what it was `asked`; a dead one lists its model and refuses all."""
  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  made.asked, made.dead, made.reply = [], dead, REPLY
  threading.Thread(target=made.serve_forever, daemon=True).start()
  yield made
  made.shutdown()
  made.server_close()


@pytest.fixture
def server():
  with serving() as made:
    yield made


def test_images_to_questions_through_an_endpoint(tmp_path, checkpoint, images, server):
  more = (
    "--config.curate.questions=endpoint",
    f"--config.endpoint.url=http://127.0.0.1:{server.server_port}/v1",
    "--config.endpoint.model=writer",
    f"--config.curate.benchmarks=('{images.parent / 'benchmark'}',)",
    "--config.curate.min_visual=0.0",
    "--config.curate.max_blind=1.0",
  )
  assert run(tmp_path, checkpoint, images, *more) == 0
  assert len(server.asked) == 6  # once an image that is left
  system, user = server.asked[0]["messages"]
  assert system["content"] == prompts.GENERATION_SYSTEM and server.asked[0]["temperature"] == 0.1
  figures = json.loads((tmp_path / "work" / "funnel.json").read_text())
  assert (
    figures["images"]["found"] == 10
    and figures["images"]["kept"] == figures["images"]["with a reply"] == 6
  )
  assert figures["images"]["left out"] == {
    "unreadable": 1,
    "too small": 1,
    "repeated": 1,
    "like a benchmark's": 1,
  }
  assert (
    figures["questions"]["parsed"] == 12 and sum(figures["questions"]["not parsed"].values()) == 6
  )
  assert "cut at max_tokens" in figures["questions"]["not parsed"]
  out = left_out(tmp_path)
  why = {
    item["image"].rpartition("/")[2]: (item["reason"], item["why"]) for item in out if "why" in item
  }
  assert (
    why["copy.png"][0] == "repeated"
    and why["copy.png"][1].endswith("0.png")
    and why["small.png"] == ("too small", "20x20 pixels")
  )
  assert (
    why["famous.jpg"][0] == "like a benchmark's" and "cannot read its image" in why["torn.png"][1]
  )
  assert sum("Unfinished" in item.get("text", "") for item in out) == 6
  rows = read_qa_rows(str(tmp_path / "out.jsonl"), 0)
  kept = sum(len(row.questions) for row in rows)
  assert kept == figures["questions"]["kept"] > 0 and rows[0].questions[0].provenance.startswith(
    "writer; visual "
  )
  # nothing is asked twice
  assert run(tmp_path, checkpoint, images, *more) == 0 and len(server.asked) == 6


ALIKE = [
  Question("Is the dog left of the cat?", ("yes", "no", "perhaps", "never"), 0),
  Question("Is the cat left of the dog?", ("yes", "no", "perhaps", "never"), 1),
]


def test_the_released_curation_has_none_of_our_filters(tmp_path, checkpoint, images, server):
  """configs/curate_official.py, all of its settings in force: images that are alike or small,
  questions that are alike or repeated. Its prompt is what the model is told, and its answers are in
  the form of the release."""
  server.reply = generated.format_questions([*ALIKE, ALIKE[0]])
  (tmp_path / "gen_qa.py").write_text("SYS_PROMPT = 'As released.'\nPROMPT = 'Look'\n")
  status = main.main(
    [
      "main",
      "--config=configs/curate_official.py",
      f"--workdir={tmp_path / 'work'}",
      f"--config.curate.input={images}",
      f"--config.curate.output={tmp_path / 'out.jsonl'}",
      f"--config.curate.answers_output={tmp_path / 'answers.jsonl'}",
      f"--config.curate.prompt={tmp_path / 'gen_qa.py'}",
      f"--config.answerer.checkpoint={checkpoint}",
      "--config.answerer.dtype=float32",
      "--config.answerer.param_dtype=float32",
      "--config.curate.questions=endpoint",
      f"--config.endpoint.url=http://127.0.0.1:{server.server_port}/v1",
      "--config.endpoint.model=writer",
      "--config.curate.min_visual=None",  # a random model answers nothing
      "--config.curate.max_blind=None",
    ]
  )
  assert status == 0
  (system, user), request = server.asked[0]["messages"], server.asked[0]
  assert system["content"] == "As released." and user["content"][-1]["text"] == "Look"
  assert (request["temperature"], request["max_tokens"], request["repetition_penalty"]) == (
    0.1,
    2048,
    1.05,
  )
  figures = json.loads((tmp_path / "work" / "funnel.json").read_text())
  assert figures["images"]["left out"] == {"unreadable": 1} and figures["images"]["kept"] == 9
  assert figures["questions"]["parsed"] == figures["questions"]["kept"] == 27
  lines = read_lines(tmp_path / "answers.jsonl")
  assert len(lines) == 9
  for sample, visual, blind in lines:
    assert len(sample["qa_list"]) == 3 and {*visual, *blind} <= {0, 1}
    assert len(visual) == len(blind) == 12  # four times each
    assert sample["qa_list"][0]["question"].endswith(
      "\n   - E) Can not answer based on the caption"
    )


def test_a_server_that_dies_has_refused_no_image(tmp_path, checkpoint, images, server, capsys):
  more = (
    "--config.curate.questions=endpoint",
    "--config.endpoint.model=writer",
    "--config.curate.min_visual=0.0",
    "--config.curate.max_blind=1.0",
    "--config.endpoint.concurrency=1",
    "--config.endpoint.max_failures=2",
  )
  url = lambda which: f"--config.endpoint.url=http://127.0.0.1:{which.server_port}/v1"
  # The one that answers has an address of its own: a request that was still on its way when the
  # first run gave up never reaches it.
  with serving(dead=True) as gone:
    assert run(tmp_path, checkpoint, images, *more, url(gone)) == 2
  assert "2 requests in a row failed" in capsys.readouterr().err and not gone.asked
  assert run(tmp_path, checkpoint, images, *more, url(server)) == 0
  assert (
    len(server.asked) == 7
    and json.loads((tmp_path / "work" / "funnel.json").read_text())["images"]["with a reply"] == 7
  )


def test_a_model_of_ours_writes_and_its_text_is_kept(tmp_path, checkpoint, images):
  """A random model writes no question: every text is in left_out.jsonl, and the run says that
  nothing is left.
  """
  assert (
    run(
      tmp_path,
      checkpoint,
      images,
      f"--config.generator.checkpoint={checkpoint}",
      "--config.generator.dtype=float32",
      "--config.generator.param_dtype=float32",
      "--config.generator.max_pixels=None",
      "--config.curate.max_tokens=8",
      "--config.curate.batch_size=2",
    )
    == 2
  )
  figures = json.loads((tmp_path / "work" / "funnel.json").read_text())
  assert figures["images"]["with a reply"] == 7 and figures["questions"]["kept"] == 0
  assert sum("text" in item for item in left_out(tmp_path)) == 7


def test_settings_are_refused_before_anything_runs(tmp_path, checkpoint, images, capsys):
  assert run(tmp_path, checkpoint, images, "--config.curate.min_visual=75") == 2
  assert run(tmp_path, checkpoint, images, f"--config.curate.output={tmp_path / 'out.txt'}") == 2
  shown = capsys.readouterr().err
  assert (
    "min_visual = 75" in shown
    and "curate.output" in shown
    and not (tmp_path / "work" / "stages").exists()
  )


def test_images_that_cannot_be_used_are_refused_where_the_config_says_so(
  tmp_path, checkpoint, images, monkeypatch, capsys
):
  """All at once, before a model is loaded; and looked at again when they were mended."""
  picture(9, (6400, 30)).save(images / "narrow.png")
  more = [f"--config.generator.checkpoint={checkpoint}", "--config.curate.bad_rows=refuse"]
  reached = []

  def questions(stages, config, cfg, prompt, rows, *rest):
    reached.append(rows)
    raise ValueError("far enough")

  monkeypatch.setattr(curation, "_questions_stage", questions)
  assert run(tmp_path, checkpoint, images, *more) == 2
  said = capsys.readouterr().err
  assert "2 bad images of 11" in said and "torn.png" in said and "over 200 times" in said
  picture(11).save(images / "torn.png")
  assert run(tmp_path, checkpoint, images, *more) == 2 and not reached
  assert "torn.png" not in capsys.readouterr().err
  more[-1] = "--config.curate.bad_rows=drop"
  assert run(tmp_path, checkpoint, images, *more) == 2
  (rows,) = reached
  assert len(rows) == 7 and "dropped 2 of 11 images (" in capsys.readouterr().err
