"""The nouns of the program: what flows between the stages, with its shapes.

Letters used in names all over the package (`reward_BG`, `tokens_NT`):

  B  images in the batch             G  captions per image (a group)  N  = B * G captions
  P  prompt tokens, image included   T  caption tokens                L  any sequence
  K  questions per image             Q  question tokens               A  options per question
  O  option tokens                   S  patch slots of an image       U  = S / 4, its merge units
  I  image tokens in the prompt      D  model width                   H  heads
  V  vocabulary                      E  numbers in a patch            W  its attention windows

A caption keeps its group axis (`tokens_BGT`); only a model call flattens it to N.
"""

from typing import Any

import flax.struct
import jax

Array = jax.Array
Params = Any  # a plain pytree of arrays


@flax.struct.dataclass
class Images:
  """Patches of a batch of images in window-major order, every image padded to the same number of
  slots.

  Slot order: windows in raster order, merge units in raster order inside a window, the 2x2 patches
  of a unit last. A window always takes the same number of slots, so windowed attention is a reshape
  (`models/image_processor.py`).
  """

  patches_BSE: Array  # uint8 pixels (channel, row, column), normalised on the device
  position_BS2: Array  # int32 row and column of the patch in its image's grid
  valid_BS: Array  # bool, False for padding
  # int32 merge unit that holds the i-th image token (raster order); padding repeats 0
  unit_BI: Array


@flax.struct.dataclass
class SeenImages:
  """A batch of images as the tower has made them (`Policy.see`), U merge units each."""

  main_BUD: Array  # takes the place of the image tokens' embeddings
  deep_BXUD: Array | None  # added to the output of the decoder's first X layers (DeepStack)
  unit_BI: Array  # as of `Images`


@flax.struct.dataclass
class Prompts:
  """The text part of what the policy reads, image pad tokens included. Padding is on the right."""

  tokens_BP: Array  # int32, policy vocabulary
  valid_BP: Array  # bool
  position_B3P: Array  # int32 M-RoPE positions (time, height, width)
  next_position_B: Array  # int32 position of the first caption token


@flax.struct.dataclass
class Questions:
  """Multiple-choice questions as the judge's token ids. Padding is on the right of each piece."""

  stem_BKQ: Array  # int32, judge vocabulary
  stem_valid_BKQ: Array  # bool
  option_BKAO: Array  # int32, judge vocabulary
  option_valid_BKAO: Array  # bool; an absent option has no valid token
  gold_BK: Array  # int32 index of the right option
  valid_BK: Array  # bool, False where the image has fewer than K questions
  kind_BK: Array  # int32 index into the dataset's list of kinds, for metrics
  # float32 mean log-probability of each option's tokens after the baseline caption
  prior_BKA: Array


@flax.struct.dataclass
class Sight:
  """What a judge that sees the image reads before a caption: the image, and its own prompt."""

  images: Images
  prompts: Prompts


@flax.struct.dataclass
class Batch:
  """One batch as the step sees it. `row_B` and `question_BK` are for samples and errors."""

  images: Images | SeenImages
  prompts: Prompts
  questions: Questions
  row_B: Array  # int32 the dataset row
  question_BK: Array | None = None  # int32 which of the row's questions it is; -1 for none
  sight: Sight | None = None  # where the judge sees the images


@flax.struct.dataclass
class Captions:
  """What the rollout wrote. A caption's end token is part of it: it was sampled, so it counts in
  the loss.
  """

  tokens_BGT: Array  # int32, policy vocabulary; pad after the end token
  logp_BGT: Array  # float32 log-probability under the distribution sampled from; 0 after the end
  valid_BGT: Array  # bool, True up to and including the end token
  ended_BG: Array  # bool, False where the caption was cut at T


@flax.struct.dataclass
class Answers:
  """What the judge answered from each caption. K counts presentations: an image's questions, or
  draws from them.
  """

  choice_BGK: Array  # int32 index of the chosen option in dataset order; -1: it abstained
  correct_BGK: Array  # bool
  credit_BGK: Array  # float32 what the reward counts: 0 or 1, or the gold option's probability
  # float32 a wrong option was chosen: 0 or 1, or the probability of it. Abstaining is not misled
  misled_BGK: Array
  asked_BGK: Array  # bool, the presentation exists
  valid_BGK: Array  # bool, it exists and the judge was finite
  # int32 which of the image's questions (an index into `Questions`) was presented
  question_BGK: Array
  # float32 the numbers compared, absent options at -inf; abstaining comes last where it is an
  # option
  score_BGKA: Array
  # what an empty caption got (G = 1), where `JudgeConfig.blind` asks for it
  blind: "Answers | None" = None

  @property
  def judged(self) -> bool:
    """Whether there is a judge: without one, K is 0."""
    return self.asked_BGK.shape[-1] > 0

  def without_blind(self) -> "Answers":
    """Where the last caption of each group is the empty one: it apart, as `blind`."""
    of_part = lambda part: jax.tree.map(lambda x: x[:, part], self)
    return of_part(slice(None, -1)).replace(blind=of_part(slice(-1, None)))


@flax.struct.dataclass
class OwnReward:
  """What a reward function of the user's gave (`RewardConfig.custom`)."""

  reward_BG: Array  # float32
  valid_BG: Array  # bool, False where it gave none: such a caption is not scored


@flax.struct.dataclass
class Scored:
  """What the captions earned. The reward is the weighted sum of the terms."""

  reward_BG: Array  # float32
  scored_BG: Array  # bool, False where a caption could not be scored: nobody may read its reward
  terms: dict[str, Array]  # float32 [B, G] each
  # the terms that the reward is made of; those with weight 0 are left out
  weights: tuple[tuple[str, float], ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Samples:
  """What a step or an evaluation made of its images, for people to read."""

  captions: Captions
  answers: Answers
  reward_BG: Array  # float32
  scored_BG: Array  # bool
  advantage_BG: Array | None = None  # float32; 0 for images that were not learned from


@flax.struct.dataclass
class TrainState:
  """Everything that training changes; a checkpoint is this plus the data iterator."""

  step: Array  # int32 scalar
  params: Params  # the policy's, those that are trained
  opt_state: Any
  key: Array  # typed PRNG key; never consumed, folded with the step


@flax.struct.dataclass
class Vocabulary:
  """What the stages need to know of the policy's vocabulary."""

  allowed_V: Array  # bool, what the sampler may emit: text and end tokens
  judge_id_V: Array  # int32 id of the same text in the judge's vocabulary; -1 for special tokens
  end_ids: tuple[int, ...] = flax.struct.field(pytree_node=False)
  pad_id: int = flax.struct.field(pytree_node=False)
  # `caption_form.stamp_table` of it, where the reward counts timestamps
  stamp_VX: Array | None = None


@flax.struct.dataclass
class JudgePrompt:
  """The judge's prompt around caption, question and options, as token ids cut at its seams.

  `option_pmi` needs only `head_L`; the other readings lay options out in slots, each a label and an
  option. One row of `label_AL` and `letter_A` more than options, and six at least, stand for "can
  not answer".
  """

  head_L: Array  # int32, before the caption
  label_AL: Array  # int32 [A, L], before the option of slot a ("- A)")
  label_valid_AL: Array
  tail_L: Array  # int32, after the options, up to where the answer's letter stands
  letter_A: Array  # int32, the answer's letters
  abstain_L: Array  # int32, "can not answer" as an option; empty where it is none
  # int32 id of a token's text after a space, or -1: the prompt puts a space before captions
  spaced_V: Array | None = None
  space: Array | None = None  # int32 id of that space
  # int32 the first of A to I in a token's text, 0 to 8, or -1; for `generate`
  letter_V: Array | None = None
  words: Vocabulary | None = None  # what the judge may write, for `generate`


@flax.struct.dataclass
class Frozen:
  """What the step reads and never changes.

  `reference` is None unless a KL term asks for it. `base` holds the policy's parameters that are
  not trained, where `TrainState.params` are but a part (`models/trainable.py`); None where all are
  trained. A judge behind an endpoint has neither parameters nor prompt here, and there may be none.
  """

  judge: Params
  prompt: JudgePrompt | None
  vocabulary: Vocabulary
  reference: Params | None = None
  base: Params | None = None


@flax.struct.dataclass
class Packed:
  """Rows as `Policy.packed` reads them, with M images per row kept apart: `images` has [B, M, S,
  ...], but `unit_BI`.
  """

  images: Images | None
  prompts: Prompts
  segment_BL: Array  # int32, 1 and on; 0 is padding
  wanted_BL: Array  # bool, tokens to be predicted
  dropped_B: Array  # int32, examples that were left out because their image cannot be read

  def flat_images(self) -> Images | None:
    """The images as `Policy.packed` takes them, B * M in a row."""
    join = lambda x: x.reshape(-1, *x.shape[2:])
    i = self.images
    return (
      None
      if i is None
      else Images(join(i.patches_BSE), join(i.position_BS2), join(i.valid_BS), i.unit_BI)
    )
