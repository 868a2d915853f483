"""Mode `caption` against transformers' own generate, from a directory that transformers wrote;
kills, hosts, ends.
"""

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import transformers
from helpers import tiny
from helpers.captioner_directory import (
  PROMPT,
  generated_by_transformers,
  write_checkpoint,
  write_images_of_many_sizes,
)
from helpers.paths import ROOT
from PIL import Image

from caprl_jax import main
from caprl_jax.data.readers.easy_vqa import easy_vqa_root
from caprl_jax.harness import row_shards
from caprl_jax.modes.caption import run as caption
from caprl_jax.modes.caption.section import CaptionConfig, instruction_of


def command(checkpoint, source, output, *more):
  return main.main(
    [
      "main",
      "--config=configs/caption.py",
      f"--config.policy.checkpoint={checkpoint}",
      f"--config.caption.input={source}",
      f"--config.caption.output={output}",
      f"--config.caption.prompt={PROMPT}",
      "--config.caption.max_tokens=24",
      "--config.caption.batch_size=4",
      f"--workdir={output.parent / 'work'}",
      *more,
    ]
  )


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
  "case, penalty", [("qwen2_5_vl", 1.3), ("qwen3_vl-tied", None), ("internvl-qwen3", None)]
)
def test_captions_are_those_of_generate(case, penalty, tmp_path):
  checkpoint = tmp_path / "checkpoint"
  write_checkpoint(checkpoint, case, penalty=penalty)
  paths = write_images_of_many_sizes(tmp_path / "images")
  assert command(checkpoint, tmp_path / "images", tmp_path / "out.jsonl") == 0
  rows = read(tmp_path / "out.jsonl")
  assert [row["image"] for row in rows] == [str(p) for p in paths]
  ends = set(tiny.read_back(checkpoint / "generation_config.json")["eos_token_id"])
  tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
  for row, want in zip(rows, generated_by_transformers(checkpoint, paths, 24), strict=True):
    assert row["tokens"] == want
    assert row["finish"] == ("end" if want[-1] in ends else "length")
    assert row["caption"] == tokenizer.decode(want, skip_special_tokens=True)


def test_markers_that_are_not_flagged_special_stay(checkpoint, tmp_path):
  """As in batch_decode with skip_special_tokens: `<think>` of Qwen3's tokenizers is such a
  token.
  """
  write_images_of_many_sizes(tmp_path / "images")
  assert command(checkpoint, tmp_path / "images", tmp_path / "plain.jsonl") == 0
  shutil.copytree(checkpoint, tmp_path / "marked")
  spec = tiny.read_back(tmp_path / "marked" / "tokenizer.json")
  written = {token for row in read(tmp_path / "plain.jsonl") for token in row["tokens"]}
  marked = [
    (token, i) for token, i in spec["model"]["vocab"].items() if i in written and token.isalpha()
  ][:3]
  spec["added_tokens"] += [
    {
      "id": i,
      "content": token,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": False,
    }
    for token, i in marked
  ]
  (tmp_path / "marked" / "tokenizer.json").write_text(json.dumps(spec))
  assert command(tmp_path / "marked", tmp_path / "images", tmp_path / "out.jsonl") == 0
  rows, tokenizer = (
    read(tmp_path / "out.jsonl"),
    transformers.AutoTokenizer.from_pretrained(tmp_path / "marked"),
  )
  assert any(i in row["tokens"] for row in rows for _, i in marked)
  assert [row["caption"] for row in rows] == [
    tokenizer.decode(row["tokens"], skip_special_tokens=True) for row in rows
  ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny.write_policy(tmp_path_factory.mktemp("tiny") / "policy")


def test_json_lines_bad_images_and_going_on(checkpoint, tmp_path, monkeypatch, caplog):
  paths = write_images_of_many_sizes(tmp_path / "images")
  (tmp_path / "images" / "broken.png").write_bytes(b"no image")
  names = [f"images/{p.name}" for p in paths] + ["images/broken.png", "images/absent.png"]
  source = tmp_path / "rows.jsonl"
  source.write_text("".join(json.dumps({"image": n, "id": i}) + "\n" for i, n in enumerate(names)))
  output = tmp_path / "out.jsonl"

  put, written = row_shards.Shard.put, []

  def put_and_stop(self, items):
    put(self, items)
    written.extend(items)
    if len(written) >= 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(row_shards.Shard, "put", put_and_stop)
  assert command(checkpoint, source, output) == 130
  monkeypatch.undo()
  assert not output.exists() and 4 <= len(written) < 8
  with open(tmp_path / "out.jsonl.parts" / "00000-of-00001.jsonl.partial", "a") as file:
    file.write("[7, {torn")
  with caplog.at_level(logging.INFO, "caprl_jax"):
    assert command(checkpoint, source, output) == 0
  assert (
    f"going on after {len(written)} of 8 images" in caplog.text and "2 images failed" in caplog.text
  )
  rows = read(output)
  assert [row["image"] for row in rows] == names and not output.with_name(
    "out.jsonl.parts"
  ).exists()
  assert all(row.keys() == {"image", "caption", "tokens", "finish"} for row in rows[:6])
  assert "broken.png" in rows[6]["error"] and "absent.png" in rows[7]["error"]
  figures = tiny.read_back(tmp_path / "out.stats.json")
  assert (
    figures["failed_by_reason"] == {"not an image": 1, "no such file": 1}
    and figures["captioned"] == 6
  )
  assert sum(figures["images_by_bucket"].values()) == 6 and figures["images_per_sec"] > 0
  assert "broken.png" in (tmp_path / "out.html").read_text()
  alone = tmp_path / "alone.jsonl"
  assert command(checkpoint, paths[2], alone) == 0
  assert read(alone)[0]["tokens"] == rows[2]["tokens"]


def test_what_cannot_be_captioned_is_said(checkpoint, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"picture": "a.png"}\n')
  broken = tmp_path / "broken.png"
  broken.write_bytes(b"no image")
  for source, what, more in (
    (tmp_path / "empty", "no image in this folder", ()),
    (tmp_path / "none", "no such file", ()),
    (bad, "bad.jsonl:1: not a JSON object with an 'image'", ()),
    (broken, "broken.png", ("--config.caption.skip_bad_images=False",)),
  ):
    assert command(checkpoint, source, tmp_path / "out.jsonl", *more) == 2
    assert what in capsys.readouterr().err


def test_nothing_but_bad_images(checkpoint, tmp_path):
  (tmp_path / "images").mkdir()
  for i in range(3):
    (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
  Image.new("RGB", (2000, 5)).save(tmp_path / "images" / "thin.png")
  for name in ("._0.png", "1.png.part", "notes.txt"):
    (tmp_path / "images" / name).write_bytes(b"x")
  assert command(checkpoint, tmp_path / "images", tmp_path / "out.jsonl") == 0
  assert ["error" in row for row in read(tmp_path / "out.jsonl")] == [True] * 4
  figures = tiny.read_back(tmp_path / "out.stats.json")
  assert (
    figures["failed_by_reason"] == {"not an image": 3, "too narrow": 1}
    and figures["images_per_sec"] is None
  )
  assert figures["passed_over"]["files"] == 3 and "hidden" in (tmp_path / "out.html").read_text()
  assert (
    command(checkpoint, tmp_path / "images", tmp_path / "dataset", "--config.caption.format=hf")
    == 0
  )
  assert (
    len(read(tmp_path / "dataset.failed.jsonl")) == 4 and (tmp_path / "dataset" / "data").is_dir()
  )
  assert all(row["image"] in row["error"] for row in read(tmp_path / "out.jsonl"))


def test_a_style_is_a_prompt():
  assert instruction_of("detailed", "x") == PROMPT and instruction_of(None, "x") == "x"
  assert "one sentence" in instruction_of("short", "x")
  assert instruction_of("Caption:", "x") == "Caption:"
  with pytest.raises(ValueError, match="did you mean 'detailed'"):
    instruction_of("detialed", "x")
  for section, message in (
    (dict(host=1), "set both or neither"),
    (dict(host=2, hosts=2), "from 0 to"),
    (dict(caption_key="image"), "must differ"),
    (dict(shard_rows=0), "at least 1"),
  ):
    with pytest.raises(ValueError, match=message):
      CaptionConfig("in", "out", **section)


def test_a_job_goes_on_only_with_its_settings_and_ends_once(
  checkpoint, tmp_path, monkeypatch, capsys, caplog
):
  paths, output = write_images_of_many_sizes(tmp_path / "images"), tmp_path / "out.jsonl"

  def killed(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(caption, "write_json", killed)  # the output is there, the statistics are not
  assert command(checkpoint, tmp_path / "images", output) == 130
  monkeypatch.undo()
  before = output.read_bytes()
  assert command(checkpoint, tmp_path / "images", output, "--config.caption.max_tokens=23") == 2
  assert "max_tokens was 24 and is 23" in capsys.readouterr().err
  paths[0].rename(paths[0].with_name("moved.png"))
  assert command(checkpoint, tmp_path / "images", output) == 2
  assert "names_sha256 was" in capsys.readouterr().err
  paths[0].with_name("moved.png").rename(paths[0])
  monkeypatch.setattr(caption, "open_captioner", killed)  # nothing is captioned again
  assert command(checkpoint, tmp_path / "images", output) == 0
  assert output.read_bytes() == before and not (tmp_path / "out.jsonl.parts").exists()
  when = output.stat().st_mtime_ns
  with caplog.at_level(logging.INFO, "caprl_jax"):
    assert command(checkpoint, tmp_path / "images", output) == 0
  assert "nothing to do" in caplog.text and output.stat().st_mtime_ns == when
  assert command(checkpoint, tmp_path / "images", output, "--config.caption.prompt=short") == 2
  assert "prompt was 'Please" in capsys.readouterr().err
  assert command(checkpoint, tmp_path / "images", tmp_path / "out.parquet") == 2
  assert "belongs to out.jsonl" in capsys.readouterr().err
  (tmp_path / "out.stats.json").unlink()
  assert command(checkpoint, tmp_path / "images", output) == 2
  assert "not from this job" in capsys.readouterr().err


def test_a_checkpoint_trained_anew_is_another_job(checkpoint, tmp_path, capsys):
  write_images_of_many_sizes(tmp_path / "images")
  shutil.copytree(checkpoint, tmp_path / "policy")
  assert command(tmp_path / "policy", tmp_path / "images", tmp_path / "out.jsonl") == 0
  tiny.train_anew(tmp_path / "policy")
  assert command(tmp_path / "policy", tmp_path / "images", tmp_path / "out.jsonl") == 2
  assert (
    "from a job with other settings" in (said := capsys.readouterr().err)
    and "checkpoint_sha256 was" in said
  )


# ---- many images, real processes

COUNT = 300


@pytest.fixture(scope="module")
def many(tmp_path_factory):
  """300 of easy-VQA's images in three tar files, one of them broken, and what an undisturbed run
  makes of them.
  """
  folder = tmp_path_factory.mktemp("many")
  (folder / "shards").mkdir()
  images = easy_vqa_root() / "train" / "images"
  for shard in range(3):
    with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
      for number in range(shard * COUNT // 3, (shard + 1) * COUNT // 3):
        data = (images / f"{number}.png").read_bytes() if number != 77 else b"no image"
        member = tarfile.TarInfo(f"{number:03d}.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  wait(start(folder, folder / "whole.jsonl"))
  return folder


def start(folder, output, *more, environment=()):
  """Mode `caption` in a process of its own; its stderr goes beside the output."""
  command = [
    sys.executable,
    "-m",
    "caprl_jax.main",
    "--config=configs/caption.py",
    "--config.policy.checkpoint=configs/quickstart_policy",
    f"--config.caption.input={folder / 'shards'}",
    f"--config.caption.output={output}",
    "--config.caption.max_tokens=12",
    "--config.caption.batch_size=8",
    "--config.caption.shard_rows=64",
    f"--workdir={output}.work",
    *more,
  ]
  with open(f"{output}.stderr", "a") as file:
    return subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | dict(environment),
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=file,
    )


def wait(*started):
  try:
    codes = [process.wait(timeout=240) for process in started]
  finally:
    for process in started:
      process.kill()
  assert codes == [0] * len(started)


def rows_in(parts):
  return (
    sum(path.read_bytes().count(b"\n") for path in parts.glob("*.jsonl*")) if parts.is_dir() else 0
  )


@pytest.mark.slow
def test_killed_at_random_times_nothing_is_lost_or_doubled(many):
  output, rng = many / "killed.jsonl", np.random.default_rng(0)
  parts = many / "killed.jsonl.parts"
  for kill in range(3):
    process, before = start(many, output), rows_in(parts)
    deadline = time.monotonic() + 120
    # the last kill is while it loads
    while process.poll() is None and rows_in(parts) <= before and kill < 2:
      assert time.monotonic() < deadline
      time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3) if kill < 2 else 1.0)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not output.exists()
    assert before <= rows_in(parts) < COUNT
  wait(start(many, output))
  assert output.read_bytes() == (many / "whole.jsonl").read_bytes() and not parts.exists()
  rows = read(output)
  assert [row["image"] for row in rows] == [f"{i // 100}.tar/{i:03d}.png" for i in range(COUNT)]
  assert [i for i, row in enumerate(rows) if "error" in row] == [77]
  assert len({row["caption"] for row in rows if "caption" in row}) > 5


def damaged_shard(many, output, shard):
  """A job of `output` in work, as it is where one shard was whole and has lost a row."""
  parts = output.with_name(output.name + ".parts")
  parts.mkdir()
  settings = tiny.read_back(many / "whole.stats.json")["job"]
  for name in ("output", "format"):
    del settings[name]
  (parts / "settings.json").write_text(json.dumps(settings))
  rows, size = read(many / "whole.jsonl"), settings["shard_rows"]
  numbers = range(shard * size, (shard + 1) * size)
  lines = [json.dumps([number, rows[number], {}]) for number in numbers]
  shards = -(-COUNT // size)
  lines[5] = lines[5][:20]
  (parts / f"{shard:05d}-of-{shards:05d}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_two_hosts_write_what_one_writes(many, distributed):
  """Under jax.distributed also where a row of the second one's shards is damaged."""
  output = many / f"two{distributed}.jsonl"
  flags = [(f"--config.caption.host={host}", "--config.caption.hosts=2") for host in range(2)]
  environment = [{}, {}]
  if distributed:
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      address = f"localhost:{probe.getsockname()[1]}"
    flags = [("--distributed", "--config.caption.repair=True")] * 2
    damaged_shard(many, output, shard=1)
    environment = [
      {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(host)}
      for host in range(2)
    ]
  wait(*(start(many, output, *flags[host], environment=environment[host]) for host in range(2)))
  assert output.read_bytes() == (many / "whole.jsonl").read_bytes()
  figures = tiny.read_back(many / f"two{distributed}.stats.json")
  assert figures["captioned"] == COUNT - 1
  if distributed:
    said = (output.with_name(output.name + ".work") / "log.1.txt").read_text()
    assert "1 captions are made again" in said
  else:
    assert figures["failed_by_reason"] == {"not an image": 1}
  if not distributed:  # more hosts than shards, and all is done: neither waits nor captions
    wait(start(many, output, "--config.caption.host=9", "--config.caption.hosts=10"))
