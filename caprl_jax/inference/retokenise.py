"""Captions in the captioner's token ids -> the judge's, by way of their text: for vocabularies that
no table relates.

A host hop between two programs, where captioner and judge are not of one family.
"""

import numpy as np

from caprl_jax.hub.tokenizer import Tokenizer


class Translator:
  """Text of captions, tokenised anew. A caption may take up to twice its limit in the judge's
  tokens; of a longer one the judge sees as much as fits, and the share of those is a metric."""

  def __init__(self, policy: Tokenizer, judge: Tokenizer, max_tokens: int):
    self.policy, self.judge, self.slots = policy, judge, 2 * max_tokens

  def __call__(
    self, tokens_BGT: np.ndarray, valid_BGT: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Captions -> judge ids int32 [B, G, T], which of them count, and which captions were cut,
    bool [B, G].
    """
    B, G, _ = tokens_BGT.shape
    ids, keep = np.zeros((B, G, self.slots), np.int32), np.zeros((B, G, self.slots), bool)
    cut = np.zeros((B, G), bool)
    for place in np.ndindex(B, G):
      text = self.policy.decode(tokens_BGT[place][valid_BGT[place]])
      written = self.judge.encode_plain(text)
      cut[place] = len(written) > self.slots
      written = written[: self.slots]
      ids[place][: len(written)], keep[place][: len(written)] = written, True
    return ids, keep, cut
