"""The judge's prompts as text: our own, and CapRL's to the byte."""

import dataclasses

_USER_TURN = "<|im_start|>user\n"
_ONE_LETTER = "\n\nAnswer with the letter of one option."


@dataclasses.dataclass(frozen=True)
class JudgeTemplate:
  """head, caption, stem; for the letter readings then label + option per slot, and tail, after
  which the letter stands.

  baseline: the caption that says nothing, for `option_pmi`.
  specials: chat tokens that the tokenizer must know.
  """

  name: str = "plain"
  head: str = "Caption:\n"
  stem: str = "\nQuestion: {question}\nAnswer:"
  option: str = " {option}"
  label: str = ""
  tail: str = ""
  letter: str = " {letter}"
  abstain: str = "Can not answer based on the caption"
  baseline: str = "An image."
  specials: tuple[str, ...] = ()

  def joined(self, caption: str, stem: str, options: list[str], letters: str = "ABCDEFGHI") -> str:
    """The whole prompt as one string, options in the order given."""
    lines = "".join(
      self.label.format(letter=letter) + self.option.format(option=option)
      for letter, option in zip(letters, options)
    )
    return self.head + caption + self.stem.format(question=stem) + lines + self.tail

  def message(self, caption: str, stem: str, options: list[str], letters: str) -> str:
    """The prompt as a user's message, for a server that writes the chat's own tokens around it and
    whose model begins its answer anew."""
    asked = dataclasses.replace(self, head=self.head.removeprefix(_USER_TURN), tail=_ONE_LETTER)
    return asked.joined(caption, stem, options, letters)


PMI = JudgeTemplate()
# Its caption ends at a line break, which Qwen's tokenizer, reading the joined text, would join to a
# full stop; here the two stay tokens of their own. The official prompt has no such place.
PLAIN = JudgeTemplate(
  head="Answer the multiple-choice question strictly based on the caption.\n\nCaption:\n",
  stem="\nQuestion: {question}",
  label="\n- {letter})",
  tail="\nThe answer is",
)

# What follows is the prompt of CapRL's reward server (arXiv 2509.22647, figure 15, and its released
# code), of which every byte counts: trailing spaces, no system turn, no space after "is". A test
# holds the bytes.
_RULES = """\
Your task is to answer the multiple-choice question **strictly based on the caption**, even if the \
answer may seem \
obvious from prior knowledge or question wording.

Ignore any external knowledge. Do not make assumptions beyond what the caption explicitly or \
implicitly states."""
_HEAD = """\
<|im_start|>user
{intro}{space}
{rules}

Example 1:
Caption: <Caption Start> {first} <Caption End>{space}
Question: {first_question}
- A) {first_a}{space}
- B) {first_b}{space}
- C) {first_c}{space}
- D) {first_d}
- E) Can not answer based on the caption

The answer is {first_gold}.

Example 2:
Caption: <Caption Start> {second} <Caption End>{space}
Question: {second_question}
- A) {second_a}{space}
- B) {second_b}{space}
- C) {second_c}{space}
- D) {second_d}
- E) Can not answer based on the caption

The answer is E.

Now, answer the question based on the following caption:

Caption: <Caption Start> """
_TURN = dict(
  stem=" <Caption End>  \nQuestion: {question}",
  label="\n   - {letter})",
  tail="  <|im_end|>\n<|im_start|>assistant\nThe answer is",
  specials=("<|im_start|>", "<|im_end|>"),
)

OFFICIAL = JudgeTemplate(
  name="official",
  head=_HEAD.format(
    space="  ",
    intro="You will be given an image caption describing the visual content.",
    rules=_RULES,
    first="A woman in a red coat is walking a black dog across a snowy park.",
    first_question="What color is the dog?",
    first_a="Brown",
    first_b="White",
    first_c="Black",
    first_d="Gray",
    first_gold="C",
    second="A child is waving a British flag during a parade.",
    second_question="What color is the flag?",
    second_a="Red",
    second_b="Blue",
    second_c="Red, white, and blue",
    second_d="White",
  ),
  **_TURN,
)

# CapRL++'s wording for videos. The released code indents its lines by eight spaces, inside the
# chat's markup too: a defect, not repeated here.
OFFICIAL_VIDEO = JudgeTemplate(
  name="official_video",
  head=_HEAD.format(
    space="  ",
    intro="You will be given a video caption describing visual content and events over time.",
    rules=_RULES + " Pay close attention to timestamps (e.g., [mm:ss]) and the sequence of events.",
    first="[00:00 - 00:05] A man in a blue shirt is running down a wet street. [00:06] He suddenly "
    "stops and [00:08] drops a brown leather wallet on the ground.",
    first_question="What happens immediately after the man stops running at [00:06]?",
    first_a="He takes off his blue shirt",
    first_b="He drops a brown leather wallet",
    first_c="He picks up an umbrella",
    first_d="He looks at his watch",
    first_gold="B",
    second="[00:15] A silver sedan runs a red light and [00:18] crashes into a fire hydrant. "
    "[00:20] Water sprays high into the air.",
    second_question="Why did the silver sedan run the red light?",
    second_a="The brakes failed",
    second_b="The driver was texting",
    second_c="The driver was speeding to a hospital",
    second_d="It was raining heavily",
  ),
  **_TURN,
)

TEMPLATES = {t.name: t for t in (PLAIN, OFFICIAL, OFFICIAL_VIDEO)}


def template_for(reading: str, prompt: str = "plain") -> JudgeTemplate:
  """The template of a reading and a prompt's name."""
  return PMI if reading == "option_pmi" else TEMPLATES[prompt]


_WORDS = (  # (what the caption is called, what is asked before it, the question, the answer)
  ("Description", "Read the description of an image and answer from it alone.", "Q: ", "A:"),
  ("Text", "This text is about a picture. What follows from it?", "It is asked: ", "Reply:"),
)


def paraphrases(template: JudgeTemplate) -> list[JudgeTemplate]:
  """The same request in other words, without examples: how far a judge's answers depend on ours."""
  found = []
  for number, (caption, head, question, answer) in enumerate(_WORDS, 1):
    begin = "<|im_start|>user\n" if template.specials else ""
    ask = f"\n{question}{{question}}"
    found.append(
      dataclasses.replace(
        template,
        name=f"{template.name}, reworded {number}",
        head=f"{begin}{head}\n\n{caption}:\n",
        stem=ask if template.label else f"{ask}\n{answer}",
        tail=template.tail if template.specials or not template.label else f"\n{answer}",
      )
    )
  return found
