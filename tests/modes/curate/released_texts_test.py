"""Released prompts from the release: downloaded once, known by their digests, never run."""

import dataclasses
import hashlib
import http.server
import logging
import threading

import pytest

from caprl_jax import released_texts
from caprl_jax.errors import UserError
from caprl_jax.modes.curate import prompts
from caprl_jax.released_texts import CURATION, IMAGE_JUDGE, Released

PROGRAM = """import does_not_exist
SYS_PROMPT='''Write five \\"questions\\".
#### 1. **Which?**\x20\x20\x20
'''
PROMPT='Here it is'
raise SystemExit
"""
WRITTEN = 'Write five "questions".\n#### 1. **Which?**   \n'


@dataclasses.dataclass
class Site:
  """What a server answers with, and what it was asked for."""

  body: bytes = PROGRAM.encode()
  status: int = 200
  length: int = 0  # that it says it has; 0: its own
  asked: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def site(monkeypatch, tmp_path):
  state = Site()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      state.asked.append(self.path)
      self.send_response(state.status)
      self.send_header("Content-Length", str(state.length or len(state.body)))
      self.end_headers()
      self.wfile.write(state.body)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  monkeypatch.setattr(released_texts, "REPOSITORY", f"http://127.0.0.1:{server.server_port}/repo")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  known = CURATION._replace(sha256=hashlib.sha256(WRITTEN.encode()).hexdigest())
  monkeypatch.setattr(released_texts, "CURATION", known)
  yield state
  server.shutdown()
  thread.join()
  server.server_close()


def test_the_released_prompts_are_known_by_their_digests():
  """Of the texts at these commits of github.com/InternLM/CapRL: 722 and 985 bytes."""
  assert CURATION == Released(
    "54954ff9f02afd88a9c45569a37cf331a5f35a08",
    "QA_data_curation/1_generate_qa/gen_qa.py",
    "SYS_PROMPT",
    "4e275e96ae0126609f8e7bfa1f03f56a2f015179ebd0c6c9d70dc598d1258fcf",
  )
  assert IMAGE_JUDGE.sha256 == "2d7f07b5accc9d7220afb0b573a0278318142b1616bdaebec66abc9ee273cf77"
  assert IMAGE_JUDGE.address == (
    "https://raw.githubusercontent.com/InternLM/CapRL/6be7f2897870f631ff6637ddaeeaa5eddd0ab881/"
    "CapRL%2B%2B/train/verl/recipe/video_captionrl/serve_rm.py"
  )


def test_official_is_downloaded_once(site, tmp_path):
  # of the program's strings only the one that is known by its digest is taken
  assert prompts.read_prompt("official") == (WRITTEN, "Here is the image")
  assert site.asked == [f"/repo/{CURATION.commit}/{CURATION.path}"]
  site.status = 500
  assert prompts.read_prompt("official").system == WRITTEN  # from the cache
  assert len(site.asked) == 1
  (kept,) = (tmp_path / "cache").rglob("*.py")
  kept.write_text("SYS_PROMPT = 'another'")
  site.status = 200
  assert prompts.read_prompt("official").system == WRITTEN  # mended
  assert len(site.asked) == 2 and kept.read_text() == PROGRAM


@pytest.mark.parametrize(
  "body, status, message",
  [
    (b"SYS_PROMPT = 'another'", 200, "does not hold the released SYS_PROMPT"),
    (b"<html>Log in to the network</html>", 200, "does not hold the released SYS_PROMPT"),
    (b"\xff\xfe\x00", 200, "does not hold the released SYS_PROMPT"),
    (b"", 404, "cannot be downloaded .*404"),
  ],
)
def test_what_is_not_the_release_is_refused_and_not_kept(site, tmp_path, body, status, message):
  site.body, site.status = body, status
  with pytest.raises(UserError, match=f"curate.prompt = 'official': http.*{message}") as error:
    prompts.read_prompt("official")
  assert "name it: --config.curate.prompt=FOLDER/gen_qa.py" in str(error.value)
  assert not [*(tmp_path / "cache").rglob("*.py")]


def test_a_cut_answer_is_told(site):
  site.length = len(site.body) + 7
  with pytest.raises(UserError, match="7 bytes of it did not come"):
    prompts.read_prompt("official")


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_a_text_that_cannot_be_kept_is_used(site, monkeypatch, tmp_path, place):
  if place == "a file":
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  else:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(released_texts.pathlib.Path, "expanduser", _no_home)
  assert prompts.read_prompt("official").system == WRITTEN


def _no_home(_):
  raise RuntimeError("Could not determine home directory.")


def test_without_a_network(site, monkeypatch):
  monkeypatch.setattr(released_texts, "REPOSITORY", "http://127.0.0.1:1/repo")
  with pytest.raises(UserError, match="cannot be downloaded"):
    prompts.read_prompt("official")


def test_a_copy_is_read_to_the_byte_and_not_run(site, tmp_path, caplog):
  (tmp_path / "gen_qa.py").write_text(PROGRAM)
  with caplog.at_level(logging.INFO):
    got = prompts.read_prompt(str(tmp_path / "gen_qa.py"))
  assert got == (WRITTEN, "Here it is")
  assert "the released text, to the byte" in caplog.text
  (tmp_path / "other.py").write_text("SYS_PROMPT = 'x'")
  assert prompts.read_prompt(str(tmp_path / "other.py")).system == "x"
  assert f"SYS_PROMPT of {tmp_path / 'other.py'} is not the released one" in caplog.text
  assert not site.asked


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("other.py", "SYSTEM = 'x'", "assigns no string SYS_PROMPT"),
    ("other.py", "SYS_PROMPT = f'{x}'", "assigns no string SYS_PROMPT"),
    ("broken.py", "SYS_PROMPT = '''", "is no Python"),
    ("none.py", None, "cannot be read"),
  ],
)
def test_programs_that_hold_no_prompt(name, text, message, tmp_path):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    prompts.read_prompt(str(tmp_path / name))
