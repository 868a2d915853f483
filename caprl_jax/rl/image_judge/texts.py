"""Images, captions -> what a judge that sees the image writes about each caption."""

import jax

from caprl_jax.models.attention import Prefix
from caprl_jax.rl.image_judge.branches import ImageJudge, read_captions, row_keys
from caprl_jax.rl.judge import JudgeIds
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.rl.sampling import SamplingConfig, decode
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import Array, Sight


def write_about_captions(
  judge: ImageJudge, captions: JudgeIds, sight: Sight, key: Array, cfg: JudgeConfig
) -> tuple[Array, Array]:
  """The judge's tokens, int32, and which of them it wrote, bool: [B, G, `cfg.max_tokens`] each. In
  `cfg.microbatches` pieces of the batch. With `cfg.blind` G counts an empty caption, the last.

  Args:
    sight: each image with the judge's prompt, up to the caption.
    key: consumed.
  """
  if cfg.blind:
    captions = captions.with_empty()

  def of_piece(piece: tuple[Array, JudgeIds, Sight]) -> tuple[Array, Array]:
    return _write(judge, *piece, cfg)

  batch = (row_keys(key, captions), captions, sight)
  if cfg.microbatches == 1:
    return of_piece(batch)
  return join_microbatches(jax.lax.map(of_piece, microbatches(batch, cfg.microbatches)))


def _write(
  judge: ImageJudge, key_BG: Array, captions: JudgeIds, sight: Sight, cfg: JudgeConfig
) -> tuple[Array, Array]:
  read = read_captions(judge, captions, sight)
  assert judge.prompt.words is not None, "made for another reading"

  def extend(
    tokens_NL: Array, position_NL: Array, valid_NL: Array, prefixes: tuple[Prefix, ...]
  ) -> tuple[Array, Prefix]:
    out: tuple[Array, Prefix] = judge.run("extend", tokens_NL, position_NL, valid_NL, prefixes)
    return out

  end = decode(
    extend,
    judge.head_VD,
    read.hidden_ND,
    read.next_position_N,
    prefixes=read.prefixes,
    vocabulary=judge.prompt.words,
    key=key_BG.reshape(-1),
    cfg=SamplingConfig(cfg.max_tokens, temperature=cfg.temperature),
  )
  B, G, _ = captions.tokens_BGT.shape
  return end.tokens_NT.reshape(B, G, -1), end.valid_NT.reshape(B, G, -1)
