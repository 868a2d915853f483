"""Cards of a page: nothing that was written by a model or a dataset becomes markup."""

from caprl_jax.pages import cards


def test_text_stays_text():
  bad = "<script>"
  shown = cards.image_card(
    "<img>",
    bad,
    cards.question_list([cards.question(bad, (bad, bad), 1, kind=bad)])
    + cards.answer("wrong", bad, 1)
    + cards.caption_text(bad),
  )
  assert "<script" not in shown and shown.count("&lt;script&gt;") == 7
  assert shown.startswith("<article class=sample><div class=picture><img>")


def test_a_question_outlines_its_right_option():
  shown = cards.question("what?", ("red", "blue"), 1, after="<small>more</small>")
  assert shown == (
    '<li><span class=stem>what?</span><div><span class="option">red</span> '
    '<span class="option gold">blue</span></div><small>more</small></li>'
  )
  assert cards.question_list([]) == ""
  assert cards.question_list([shown]) == f"<ol class=questions>{shown}</ol>"


def test_an_answer_says_how_it_counts():
  assert cards.answer("none", "no answer") == '<span class="answer none"><b>–</b> no answer</span> '
  assert cards.answer("right", "red", 2) == (
    '<span class="answer right" title="question 2: right"><small>2</small> <b>✓</b> red</span> '
  )
  assert cards.caption_text(" \n") == "<i class=soft>(empty)</i>"
