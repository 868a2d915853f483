"""What people who caption in bulk ask of mode `caption`: a stand-in writes the captions, so that
what is tested is what becomes of them.
"""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import logging
import tarfile
from concurrent import futures

import ml_collections
import pyarrow.parquet as pq
import pytest
from helpers import tiny
from helpers.captioned_rows import write_images

from caprl_jax.data.batches import ImageShape
from caprl_jax.errors import DISK_FULL, code_of
from caprl_jax.harness import row_shards
from caprl_jax.inference.captioner import CaptionerOutput, WrittenCaption
from caprl_jax.modes.caption import run as caption


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny.write_policy(tmp_path_factory.mktemp("tiny") / "policy")


class Writer:
  """Stands in for the captioner. A caption says what was asked of which image, and how often
  anything was; `stop_after` so many images it is interrupted; `broken` images fail.
  """

  def __init__(self):
    self.asked, self.stop_after, self.broken = [], None, ("3.png",)

  @contextlib.contextmanager
  def open(self, load, cfg, *, mesh, seed):
    def write(rows):
      for number, row in rows:
        if len(self.asked) == self.stop_after:
          raise KeyboardInterrupt
        self.asked.append((cfg.instruction, row.name.rpartition("/")[2]))
        if row.name.endswith(self.broken):
          yield [CaptionerOutput(number, row, error=ValueError(f"row {row.name} is broken"))]
          continue
        text = f"{cfg.instruction} {row.name.rpartition('/')[2]}. More."
        captions = tuple(
          WrittenCaption(text if not i else f"{text}{i}", [7, 2 + i], "end")
          for i in range(cfg.captions)
        )
        yield [CaptionerOutput(number, row, captions, shape=ImageShape(4, 4), secs=0.1)]

    yield write

  def names(self):
    found, self.asked = [name for _, name in self.asked], []
    return found


@pytest.fixture
def writer(monkeypatch):
  stand_in = Writer()
  monkeypatch.setattr(caption, "open_captioner", stand_in.open)
  return stand_in


@pytest.fixture
def job(checkpoint, tmp_path, writer):
  """Runs the mode with keys of the section: job(output, key=value)."""

  def run(output, source=tmp_path / "images", int8="none", **section):
    section = {"prompt": "See", "batch_size": 2, "max_tokens": 4} | section
    section |= {"input": str(source), "output": str(tmp_path / output)}
    policy = dict(checkpoint=str(checkpoint), int8=int8)
    config = dict(mode="caption", seed=0, policy=policy, caption=section)
    caption.run(ml_collections.ConfigDict(config), tmp_path)

  write_images(tmp_path / "images")
  return run


def lines(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def texts(folder):
  return {
    str(path.relative_to(folder)): path.read_text("utf-8") for path in sorted(folder.rglob("*.txt"))
  }


ALL = ["0.png", "2.png", "4.png", "1.png", "3.png", "5.png"]


def test_what_becomes_of_texts_that_are_there(job, tmp_path, writer):
  images = tmp_path / "images"
  (images / "0.txt").write_bytes("mine é\r\n".encode("utf-16"))
  (images / "2.txt").write_bytes("mïne".encode("latin-1"))
  txt = {"format": "txt"}
  for existing in (None, "refuse"):
    with pytest.raises(ValueError, match="2 of the texts to write are there already.*existing"):
      job("images", **txt, existing=existing)
  for existing in ("append", "prepend"):
    with pytest.raises(
      ValueError, match=r"1 of 2 texts that are there are neither UTF-8(.|\n)*2.t"
    ):
      job("images", **txt, existing=existing)
  assert not writer.asked and not (tmp_path / "images.parts").exists()
  job("images", **txt, existing="skip")
  assert writer.names() == ["4.png", "1.png", "3.png", "5.png"]
  assert (images / "2.txt").read_bytes() == "mïne".encode("latin-1")
  assert (images / "4.txt").read_text() == "See 4.png. More.\n"
  figures = tiny.read_back(tmp_path / "images.stats.json")
  assert (figures["captioned"], figures["existing"], figures["failed"]) == (3, 2, 1)
  # Again: nothing. With a text lost, that one; with an image more, that one.
  job("images", **txt, existing="skip")
  assert writer.names() == []
  (images / "4.txt").unlink()
  job("images", **txt, existing="skip")
  assert writer.names() == ["4.png"]
  (images / "6.png").write_bytes((images / "0.png").read_bytes())
  job("images", **txt, existing="skip")
  assert writer.names() == ["6.png", "3.png"]
  (images / "6.png").unlink(), (images / "6.txt").unlink(), (images / "2.txt").unlink()

  # Interrupted within the writing of texts, nothing is joined twice.
  write = caption.Output.write
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(caption.Output, "write", lambda *args: (write(*args), 1 / 0))
    with pytest.raises(ZeroDivisionError):
      job("images", **txt, existing="append", text=dict(separator=" | "))
  job("images", **txt, existing="append", text=dict(separator=" | "))
  assert (images / "0.txt").read_text("utf-8") == "mine é | See 0.png. More.\n"
  assert (images / "2.txt").read_text("utf-8") == "See 2.png. More.\n"
  job("images", **txt, existing="append", text=dict(separator=" | "))
  assert (images / "0.txt").read_text("utf-8") == "mine é | See 0.png. More.\n"
  job("images", **txt, existing="overwrite")
  assert set(texts(images).values()) == {f"See {i}.png. More.\n" for i in (0, 1, 2, 4, 5)}
  job("images", **txt, existing="prepend", prompt="Now")
  assert (images / "0.txt").read_text() == "Now 0.png. More. See 0.png. More.\n"


def test_rows_that_have_a_caption(job, tmp_path):
  source = tmp_path / "rows.jsonl"
  rows = [
    {"image": "images/0.png", "caption": "old", "tags": ["a", "b"]},
    {"image": "images/2.png"},
  ]
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = {}
  for existing in ("skip", "append", "prepend", "overwrite", None):
    job(f"{existing}.jsonl", source, existing=existing)
    found[existing] = [row["caption"] for row in lines(tmp_path / f"{existing}.jsonl")]
  new = ["See 0.png. More.", "See 2.png. More."]
  assert found == {
    "skip": ["old", new[1]],
    "append": [f"old {new[0]}", new[1]],
    "prepend": [f"{new[0]} old", new[1]],
    "overwrite": new,
    None: new,
  }
  assert lines(tmp_path / "skip.jsonl")[0]["finish"] == "existing"
  with pytest.raises(ValueError, match="1 of 2 rows have a caption already"):
    job("refuse.jsonl", source, existing="refuse")
  job("tags.jsonl", source, text=dict(before="{tags}: ", max_words=2))
  good, bad = lines(tmp_path / "tags.jsonl")
  assert good["caption"] == "a, b: See 0.png." and good["finish"] == "shortened"
  assert "has no {tags}" in bad["error"]
  for key, section in (
    ("caption.text.before", dict(text=dict(before="{tag}: "))),
    ("caption.prompt", dict(prompt="A {tag}?")),
  ):
    with pytest.raises(
      ValueError, match=rf"{key} = .*\{{tag\}}.*fields there are: .*caption, tags"
    ):
      job("x.jsonl", source, **section)


def test_the_fields_of_webdataset_samples(job, tmp_path):
  images = tmp_path / "images"
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    for name, data in (
      ("0.json", b'{"artist": "Ann"}'),
      ("0.png", (images / "0.png").read_bytes()),
      ("0.txt", "alt é".encode()),
      ("2.png", (images / "2.png").read_bytes()),
      ("2.json", b'{"artist": "Bob"}'),
    ):
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  job(
    "out",
    tmp_path / "a.tar",
    format="webdataset",
    existing="append",
    text=dict(after=" by {artist}"),
  )
  with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
    found = {member.name: tar.extractfile(member).read() for member in tar}
  assert list(found) == [f"{n:09d}{s}" for n in (0, 1) for s in (".png", ".txt", ".json")]
  assert found["000000000.png"] == (images / "0.png").read_bytes()
  assert found["000000000.txt"].decode() == "alt é See 0.png. More. by Ann"
  assert json.loads(found["000000001.json"])["caption"] == "See 2.png. More. by Bob"
  assert tiny.read_back(tmp_path / "out" / "caption_manifest.json")["captioned"] == 2
  with pytest.raises(ValueError, match=r"fields there are: name, folder, txt, artist"):
    job("x.jsonl", tmp_path / "a.tar", text=dict(after="{author}"))


def test_several_prompts_and_captions_in_every_format(job, tmp_path, writer):
  several = dict(prompts=dict(caption="See", style="In {folder}"), captions=2, temperature=1.0)
  writer.stop_after = 7
  with pytest.raises(KeyboardInterrupt):
    job("out.jsonl", **several)
  writer.stop_after = None
  job("out.jsonl", **several)
  assert len(writer.asked) == 12 and len(set(writer.asked)) == 12  # none twice
  rows = lines(tmp_path / "out.jsonl")
  assert [row["image"].rpartition("/")[2] for row in rows] == ALL
  assert rows[3] == {
    "image": str(tmp_path / "images" / "deep" / "1.png"),
    "caption": ["See 1.png. More.", "See 1.png. More.1"],
    "tokens": [[7, 2], [7, 3]],
    "finish": ["end", "end"],
    "style": ["In deep 1.png. More.", "In deep 1.png. More.1"],
    "style_tokens": [[7, 2], [7, 3]],
    "style_finish": ["end", "end"],
  }
  figures = tiny.read_back(tmp_path / "out.stats.json")
  assert (figures["captioned"], figures["captions"], figures["failed"]) == (5, 20, 1)
  assert (tmp_path / "out.html").read_text().count("In deep 1.png") == 2
  job("p.parquet", **several, format="parquet")
  table = pq.read_table(tmp_path / "p.parquet").to_pylist()
  assert [{k: v for k, v in row.items() if v is not None} for row in table] == rows
  job("set", **several, format="hf", embed_images=False)
  card = (tmp_path / "set" / "README.md").read_text()
  assert "name: style_tokens\n    list:\n      list: int32" in card
  [file] = (tmp_path / "set" / "data").iterdir()
  good = [row for row in rows if "error" not in row]
  assert pq.read_table(file).to_pylist() == good
  job("texts", **several, format="txt")
  assert texts(tmp_path / "texts")["deep/1.txt"] == "See 1.png. More.\nSee 1.png. More.1\n"
  assert len(texts(tmp_path / "texts")) == 10
  with pytest.raises(ValueError, match="caprl_2m has one caption per image"):
    job("x.json", **several, format="caprl_2m")
  for section, message in (
    (dict(prompts={"a b": "x"}), r"caption.prompts.a b: a column's name"),
    (dict(prompts={"tokens": "x"}), "caption.prompts.tokens: a column's name"),
    (dict(captions=2), "would all be the same"),
    (dict(prompt="{name}"), None),
  ):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
      job("y.jsonl", **section)


def test_a_filter_by_names_lists_and_other_jobs(job, tmp_path, writer, caplog):
  job("first.jsonl", filter=dict(names=r"/[0-3]\.png", leave_out=r"/2\.png"))
  assert writer.names() == ["0.png", "1.png", "3.png"]
  (tmp_path / "list.txt").write_text("deep/1.png\n4.png\nabsent.png\n")
  job("listed.jsonl", filter=dict(files=str(tmp_path / "list.txt")))
  assert writer.names() == ["4.png", "1.png"]
  assert "1 of 3 lines name no image, such as 'absent.png'" in caplog.text
  rest = ["2.png", "4.png", "3.png", "5.png"]  # what failed is not in it
  for kind, other in (
    ("jsonl", "first.jsonl"),
    ("hf", "o_hf"),
    ("txt", "o_txt"),
    ("webdataset", "o_w"),
  ):
    if kind != "jsonl":
      job(other, filter=dict(names=r"/[01]\.png"), format=kind)
      writer.names()
    job(f"rest_{kind}.jsonl", filter=dict(not_in=str(tmp_path / other)))
    assert writer.names() == rest, kind
  for section, message in (
    (dict(names="("), "is no regular expression"),
    (dict(names="^x"), "leaves no image: 6 images, 0 after caption.filter.names"),
    (dict(files="absent"), "No such file"),
    (dict(not_in="absent"), "no such file or folder"),
  ):
    with pytest.raises(ValueError, match=message):
      job("x.jsonl", filter=section)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf", "webdataset", "tfds", "txt"])
def test_exactly_what_is_missing_is_made_again(kind, job, tmp_path, writer):
  section = dict(format=kind, shard_rows=2)
  job("out.x", **section)
  assert writer.names() == ALL
  job("out.x", **section, repair=True)
  assert writer.names() == []  # nothing is missing; what failed is not
  out = tmp_path / "out.x"
  if kind == "jsonl":
    before = out.read_bytes()
    kept = before.splitlines(True)
    out.write_bytes(kept[0] + kept[1][:40] + b"\n" + b"".join(kept[3:]))
    lost = ["2.png", "4.png"]
  elif kind == "txt":
    before = texts(out)
    (out / "2.txt").unlink(), (out / "deep" / "5.txt").unlink()
    lost = ["2.png", "5.png"]
  else:
    pattern = {"hf": "*.parquet", "webdataset": "*.tar", "tfds": "*array_record*"}
    [path] = [out] if kind == "parquet" else out.rglob(pattern[kind])
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    lost = None
  job("out.x", **section, repair=True)
  names = writer.names()
  if lost is not None:
    assert names == lost and (texts(out) if kind == "txt" else out.read_bytes()) == before
  else:
    assert names and set(names) <= set(ALL) and path.read_bytes() == before
  writer.broken = ()
  job("out.x", **section, retry_failed=True)
  assert writer.names() == ["3.png"]
  assert (
    not (tmp_path / "out.failed.jsonl").exists() and not (tmp_path / "out.x.failed.jsonl").exists()
  )
  job("out.x", **section, retry_failed=True)
  assert writer.names() == []


def test_shards_of_a_job_in_work_are_mended(job, tmp_path, writer):
  section = dict(shard_rows=2)
  writer.stop_after = 5
  with pytest.raises(KeyboardInterrupt):
    job("out.jsonl", **section)
  parts = tmp_path / "out.jsonl.parts"
  assert sorted(path.name[:5] for path in parts.glob("*-of-*")) == ["00000", "00001", "00002"]
  first = parts / "00000-of-00003.jsonl"
  first.write_bytes(b"\0\0{torn\n" + first.read_bytes().splitlines(True)[1])
  writer.stop_after, writer.broken = None, ()
  writer.names()
  with pytest.raises(ValueError, match="has 1 rows, not the 2 .*caption.repair"):
    job("out.jsonl", **section)
  writer.names()
  job("out.jsonl", **section, repair=True)
  assert writer.names() == ["0.png"]
  rows = lines(tmp_path / "out.jsonl")
  assert [row["image"].rpartition("/")[2] for row in rows] == ALL and "error" in rows[4]


def test_a_host_waits_until_another_has_mended_its_shards(job, tmp_path, writer, monkeypatch):
  """Damaged rows, and images that failed, of a host that has not been started again yet."""
  monkeypatch.setattr(row_shards, "POLL_SECS", 0.01)
  of = lambda host: dict(shard_rows=2, hosts=2, host=host)
  writer.broken = ("1.png",)
  job("out.jsonl", **of(1))  # the second one of three shards
  assert writer.names() == ["4.png", "1.png"]
  shard = tmp_path / "out.jsonl.parts" / "00001-of-00003.jsonl"
  shard.write_bytes(shard.read_bytes().replace(b"See 4", b"\xff"))
  writer.broken = ()
  again = dict(repair=True, retry_failed=True)
  with futures.ThreadPoolExecutor() as pool:
    first = pool.submit(job, "out.jsonl", **of(0), **again)
    with pytest.raises(futures.TimeoutError):
      first.result(0.3)
    assert writer.names() == ["0.png", "2.png", "3.png", "5.png"]
    job("out.jsonl", **of(1), **again)
    first.result(30)
  assert writer.names() == ["4.png", "1.png"]
  assert [row["caption"] for row in lines(tmp_path / "out.jsonl")] == [
    f"See {name}. More." for name in ALL
  ]


def test_a_full_disk_is_said_and_the_job_goes_on(job, tmp_path, writer, monkeypatch):
  real = builtins.open

  def full_at(count):
    """Opens files of which the shards' are full after so many writes."""

    def opened(path, mode="r", *args, **kwargs):
      file = real(path, mode, *args, **kwargs)
      if "partial" in str(path) or str(path).endswith("out.jsonl.tmp"):
        return Full(file, count)
      return file

    return opened

  class Full:
    def __init__(self, file, left):
      self.file, self.left = file, left

    def __getattr__(self, name):
      return getattr(self.file, name)

    def __iter__(self):
      return iter(self.file)

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self.file.close()

    def write(self, data):
      self.left -= 1
      if self.left < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
      return self.file.write(data)

    def writelines(self, rows):
      for row in rows:
        self.write(row)

  for count in (2, 4):  # among the captions, then while the output is written
    monkeypatch.setattr(builtins, "open", full_at(count))
    with pytest.raises(
      ValueError, match=r"No space left on device \([\d,]+ MiB are free\); no fi"
    ) as e:
      job("out.jsonl")
    monkeypatch.undo()
    assert code_of(e.value) == DISK_FULL and not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(caption, "open_captioner", writer.open)
  job("out.jsonl")
  assert writer.names()[:6] == ["0.png", "2.png", "4.png", "4.png", "1.png", "3.png"]
  assert [row["image"].rpartition("/")[2] for row in lines(tmp_path / "out.jsonl")] == ALL
  assert not list(tmp_path.glob(".*.tmp"))


def test_addresses_are_fetched_only_where_it_is_allowed(job, tmp_path, caplog):
  (tmp_path / "list.csv").write_text("url\nhttp://127.0.0.1:9/a.png\n")
  with pytest.raises(ValueError, match="all 1 images are addresses on the web.*allow_urls=True"):
    job("out.jsonl", tmp_path / "list.csv", column="url")
  with pytest.raises(ValueError, match=r"no column image.*\['url'\].*caption.column"):
    job("out.jsonl", tmp_path / "list.csv", allow_urls=True)
  job("out.jsonl", tmp_path / "list.csv", column="url", allow_urls=True, retry_failed=True)


def test_a_dry_run_writes_nothing(job, tmp_path, writer, caplog):
  (tmp_path / "images" / "0.txt").write_text("there")
  before = sorted(tmp_path.rglob("*"))
  with caplog.at_level(logging.INFO, "caprl_jax"):
    job("images", format="txt", existing="skip", dry_run=True)
  assert sorted(tmp_path.rglob("*")) == before
  for said in (
    "dry run: 6 images; 5 captions to write",
    "1 have a caption already (caption.existing = skip)",
    "in patches x image tokens: ",
    "images captioned now, after ",
    "MiB of disk with the shards that are kept meanwhile",
  ):
    assert said in caplog.text, said
  job("done.jsonl")
  caplog.clear()
  writer.names()
  with caplog.at_level(logging.INFO, "caprl_jax"):
    job("more.jsonl", dry_run=True)
  assert "(by done.stats.json, of 5 images)" in caplog.text and not writer.asked


def test_what_int8_changes_is_said(job, tmp_path, writer, monkeypatch, caplog):
  """The first images are captioned by the captioner as it is, then by the rounded one."""
  opened = []

  @contextlib.contextmanager
  def open_captioner(load, cfg, *, mesh, seed):
    opened.append(cfg)
    rounded = len(opened) % 3 == 2

    def write(rows):
      with writer.open(load, cfg, mesh=mesh, seed=seed) as ours:
        for (output,) in ours(rows):
          ids = [7, 9, 9] if rounded and output.row.name.endswith("2.png") else [7, 2, 3]
          captions = (WrittenCaption("A.", ids, "end"),) * len(output.captions)
          yield [dataclasses.replace(output, captions=captions)]

    yield write

  monkeypatch.setattr(caption, "open_captioner", open_captioner)
  want = dict(rounded="cache", images=4, changed_captions=0.25, tokens=11, changed_tokens=1 / 11)
  sampled = dict(int8="cache", int8_images=5, captions=2, temperature=0.7, top_p=0.5)
  with caplog.at_level(logging.INFO, "caprl_jax"):
    job("out.jsonl", **sampled)
  told = json.loads((tmp_path / "out.stats.json").read_text())
  assert told["int8"] == want and told["job"]["int8"] == "cache"
  assert "policy.int8 = cache changes 9.09% of 11 greedy tokens that follow the same" in caplog.text
  assert [(cfg.captions, cfg.temperature, cfg.top_p) for cfg in opened] == [
    *[(1, 0.0, 1.0)] * 2,
    (2, 0.7, 0.5),
  ]
  opened.clear()
  caplog.clear()
  with caplog.at_level(logging.INFO, "caprl_jax"):
    job("dry.jsonl", **sampled, dry_run=True)
  assert "dry run: 6 images" in caplog.text and "changes 9.09% of 11" in caplog.text
  with pytest.raises(ValueError, match="caption.int8_images = 5: .* policy.int8, which is 'none'"):
    job("out.jsonl", int8_images=5)
  with pytest.raises(ValueError, match="job with other settings.*int8 was 'cache' and is None"):
    job("out.jsonl", captions=2, temperature=0.7, top_p=0.5)
