"""Letters of options and answers: which are taken off, which are refused, which option is meant."""

import pytest

from caprl_jax.data.option_letters import gold_index, without_letters


@pytest.mark.parametrize(
  "options",
  [
    ["A) red", "B) blue"],
    ["(A) red", "(B) blue"],
    ["[A] red", "[B] blue"],
    ["A. red", "B. blue"],
    ["A: red", "B: blue"],
    ["a) red", "b) blue"],
    ["a. red", "b. blue"],
    ["A.red", "B.blue"],
    ["A)red", "B)blue"],
    ["A、red", "B、blue"],
    ["Ａ． red", "Ｂ． blue"],
    ["（A）red", "（B）blue"],
    ["- A) red", "- B) blue"],
    ["Option A: red", "option B: blue"],
    ["A) red", "B. blue "],
    ["A) A. red", "B) B. blue"],
    ["A - red", "B - blue"],
    ["**A.** red", "**B.** blue"],
    ["选项A：red", "选项B：blue"],
    ["A ) red", "B ) blue"],
    ["<A> red", "<B> blue"],
    ["Choice A: red", "Choice B: blue"],
    ["+ A) red", "+ B) blue"],
  ],
)
def test_letters_in_order_are_taken_off(options):
  assert without_letters(options, "x") == ("red", "blue")


@pytest.mark.parametrize(
  "options, texts",
  [
    (["A.5", "B.6"], ("5", "6")),
    (["A.50%", "B.5"], ("50%", "5")),
    (["A.$5", "B.-1"], ("$5", "-1")),
    (["A:1", "B:2"], ("1", "2")),
    (["A.是", "B.否"], ("是", "否")),
    (["A. Yes", "B.No", "C.?"], ("Yes", "No", "?")),
    (["(A) (a) and (b)", "(B) (b) and (c)"], ("(a) and (b)", "(b) and (c)")),
  ],
)
def test_letters_of_short_texts_are_taken_off_where_all_have_theirs(options, texts):
  assert without_letters(options, "x") == texts


@pytest.mark.parametrize(
  "options",
  [
    ["(a) and (b)", "(b) and (c)", "(c) and (a)"],
    ["(a) only", "(b) only", "(c) only"],
    ["a.txt", "b.txt"],
    ["A.1", "A.2"],
    ["A-1", "B-2"],
    ["E. coli", "S. aureus", "B. subtilis", "P. aeruginosa"],
    ["E. coli", "B. subtilis", "Yeast"],
    ["P. vivax", "P. falciparum"],
    ["(R)-2-butanol", "(S)-2-butanol"],
    ["x: 3, y: 2", "x: 2, y: 3"],
    ["red", "A) blue"],  # a letter at another place
    ["x", "y", "A) x"],
    ["(A)", "(B)"],  # nothing behind the letters
    ["A", "B"],
    ["a dog", "b cat"],
    ["A.D.", "B.C."],
    ["a.m.", "p.m."],
    ["E. coli", "x"],
    ["A. Lincoln", "George Washington"],  # initials
    ["A. Lincoln", "G. Washington"],
    ["J. Smith", "B. Jones"],
    ["A. Smith", "A. Jones"],
    [" red ", "blue"],
  ],
)
def test_what_is_text_stays(options):
  assert without_letters(options, "x") == tuple(options)


@pytest.mark.parametrize(
  "options, message",
  [
    (["a", "b", "c", "(D) d"], r"x: option 3, '\(D\) d', carries a letter and others carry none"),
    (["A) red", "blue", "green"], "option 0"),
    (["Red", "B. Blue", "Green"], "option 1"),
    (["A) red", "B) blue", "None of the above"], "option 0"),
    (["B) red", "A) blue"], "the letters B, A, which are not A, B, C ... in order"),
    (["B) red", "C) blue"], "the letters B, C"),
    (["A) a", "B) b", "C) c", "D) d", "F) Can not answer"], "the letters A, B, C, D, F"),
  ],
)
def test_letters_of_some_or_out_of_order_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    without_letters(options, "x")


@pytest.mark.parametrize(
  "gold, options, index",
  [
    ("b", ["red", "blue"], 1),
    ("(B)", ["red", "blue"], 1),
    ("[B]", ["red", "blue"], 1),
    ("B)", ["red", "blue"], 1),
    ("B.", ["red", "blue"], 1),
    ("Ｂ", ["red", "blue"], 1),
    ("option B", ["red", "blue"], 1),
    ("B. blue", ["red", "blue"], 1),
    ("(b) Blue", ["red", "blue"], 1),
    ("B: blue ", ["red", "blue"], 1),
    ("5 mW", ["5 MW", "5 mW", "5 kW"], 1),  # exactly, where several are the same but for capitals
    ("Aa ", ["AA", "Aa", "aa"], 1),
    ("【B】", ["red", "blue"], 1),
    ("**B**", ["red", "blue"], 1),
    ("B。", ["red", "blue"], 1),
    ("0", ["1. red", "2. blue"], 0),
    (1.0, ["red", "blue"], 1),
    ("1", ["red", "blue"], 1),
    (["blue"], ["red", "blue"], 1),
    ("1", ["1", "2", "3"], 0),  # digits that are an option's text
    (1, ["1", "2", "3"], 1),
    ("b", ["a", "c", "b"], 2),
    ("C", ["red", "c"], 1),
  ],
)
def test_spellings_of_the_right_option(gold, options, index):
  assert gold_index(gold, options, "x") == index


@pytest.mark.parametrize(
  "gold, options, message",
  [
    ("A", ["B", "A"], "gold 'A' fits 'B' and 'A' of the options"),
    ("(B)", ["(B)", "x"], "fits '.B.' and 'x'"),
    ("A. blue", ["red", "blue"], "fits none"),  # letter and text disagree
    ("C", ["red", "blue"], "fits none"),
    ("2", ["red", "blue"], "fits none"),
    ("", ["red", "blue"], "fits none"),
    ("1", ["1. red", "2. blue"], "may be an index from 0 or a number that the options"),
    ("1", ["1.0", "2.0"], "may be an index from 0 or a number"),
    ("②", ["red", "blue", "green"], "fits none"),
    (True, ["yes", "no"], "gold is True"),
    (0.5, ["yes", "no"], "gold is 0.5"),
    (None, ["yes", "no"], "gold is None"),
    (["yes", "no"], ["yes", "no"], "one option must be right"),
    ("x" * 999, ["y" * 999, "z" * 999], "fits none"),
  ],
)
def test_golds_that_fit_none_or_several(gold, options, message):
  with pytest.raises(ValueError, match=message) as failure:
    gold_index(gold, options, "x")
  assert str(failure.value).startswith("x: ") and len(str(failure.value)) < 350


def test_letters_of_options_in_another_order():
  assert gold_index("A", ["blue", "red"], "x", letters="BA") == 1
