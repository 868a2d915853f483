"""Captions, answers, rewards as arrays -> samples/*.json and pictures, for people and the
report.
"""

import hashlib
import io
import pathlib

from caprl_jax.atomic_files import write_bytes, write_json
from caprl_jax.data.batches import QABatcher
from caprl_jax.data.rows import QARow, read_image
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.types import Batch, Samples


def save_samples(
  path: pathlib.Path,
  stage: str,
  step: int,
  parts: list[tuple[Batch, Samples]],
  batcher: QABatcher,
  tokenizer: Tokenizer,
  limit: int,
) -> None:
  """Writes up to `limit` images with captions, per-question answers and rewards.

  Args:
    parts: batches and what was made of them, of numpy arrays; a batch may lack images and prompts.
    batcher: made the batch; says which row an image is.
  """
  rows = []
  for batch, samples in parts:
    assert batch.question_BK is not None  # `QABatcher` says which questions it took
    captions, answers = samples.captions, samples.answers
    for b in range(len(batch.row_B)):
      if len(rows) == limit:
        break
      index = int(batch.row_B[b])
      row = batcher.rows[index]
      asked = [
        k for k in range(batch.questions.valid_BK.shape[1]) if batch.questions.valid_BK[b, k]
      ]
      questions = [row.questions[batch.question_BK[b, k]] for k in asked]
      rows.append(
        {
          "row": index,
          "name": row.name,
          "image": _save_image(row, path.parent),
          "questions": [
            {"stem": q.stem, "options": list(q.options), "gold": q.gold, "kind": q.kind}
            for q in questions
          ],
          "captions": [
            {
              "text": tokenizer.decode(captions.tokens_BGT[b, g][captions.valid_BGT[b, g]]),
              "length_tokens": int(captions.valid_BGT[b, g].sum()),
              "reward": float(samples.reward_BG[b, g]) if samples.scored_BG[b, g] else None,
              **_advantage(samples, b, g),
              "answers": [
                {
                  "question": asked.index(int(answers.question_BGK[b, g, k])),
                  "choice": int(answers.choice_BGK[b, g, k]),
                  "correct": bool(answers.correct_BGK[b, g, k]),
                  "valid": bool(answers.valid_BGK[b, g, k]),
                }
                for k in range(answers.asked_BGK.shape[2])
                if answers.asked_BGK[b, g, k]
              ],
            }
            for g in range(captions.tokens_BGT.shape[1])
          ],
        }
      )
  write_json(path, {"stage": stage, "step": step, "rows": rows})


def _advantage(samples: Samples, b: int, g: int) -> dict[str, float]:
  if samples.advantage_BG is None:
    return {}
  return {"advantage": float(samples.advantage_BG[b, g])}


def _save_image(row: QARow, folder: pathlib.Path) -> str:
  """Writes a row's picture once and returns its path below `folder`. It is named by its pixels: a
  row's name may be no file name, or another picture's."""
  image = read_image(row)
  digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:20]
  name = f"images/{digest}.png"
  if not (folder / name).exists():
    png = io.BytesIO()
    image.save(png, "PNG")
    write_bytes(folder / name, png.getvalue())
  return name
