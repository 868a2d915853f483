"""Chat templates are programs: what does not end, or fills the memory, is refused before it is
used."""

import pytest

from caprl_jax.hub import template_limits
from caprl_jax.hub.chat_template import DEFAULT_TEMPLATE, render

TALK = [{"role": "user", "content": [{"type": "text", "text": "Describe."}]}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
  "piece, message",
  [
    (NESTED, "does not end: it was stopped after 1 seconds"),
    ("{{ 10 ** (10 ** 10) }}", "(does not end|needs more than 1 GiB)"),
    ("{{ ('a' * 3 * 10**9) | length }}", "needs more than 1 GiB"),
    ("{{ 'a' * 2 * 10**6 }}", "writes more than a million characters"),
  ],
)
def test_what_takes_too_much_is_refused(piece, message, monkeypatch):
  monkeypatch.setattr(template_limits, "CPU_SECS", 1)
  with pytest.raises(ValueError, match=f"the checkpoint's chat template .*{message}.*; take chat_"):
    render(DEFAULT_TEMPLATE + piece, TALK)


@pytest.mark.parametrize(
  "piece, message",
  [
    ("{{ raise_exception('x' * 9999) }}", r"TemplateError: x+ \.\.\. x+; mend chat_template"),
    ("{{ messages.clear() }}", "SecurityError: "),
    ("{{ '\\ud800' }}", "UnicodeEncodeError: "),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    ("{% if", "TemplateSyntaxError: "),
  ],
)
def test_what_fails_says_why(piece, message):
  with pytest.raises(ValueError, match=message) as error:
    render(piece, TALK)
  assert len(str(error.value)) < 600


def test_a_template_is_tried_once_and_ours_never(monkeypatch):
  tried = []
  run = template_limits.subprocess.run
  monkeypatch.setattr(
    template_limits.subprocess, "run", lambda *a, **k: (tried.append(a), run(*a, **k))[1]
  )
  own = DEFAULT_TEMPLATE.replace("IMAGE", "<|image_pad|>")
  assert render(own, TALK).startswith("<|im_start|>user\nDescribe.") and not tried
  for _ in range(2):
    render(own + "{# once #}", TALK)
  assert len(tried) == 1
  with pytest.raises(ValueError, match="does not end|stopped|needs"):
    template_limits.check_limits(own.replace("<|image_pad|>", "{{ 10 ** (10 ** 10) }}"))


def test_tags_of_transformers_own_are_no_harm():
  template_limits.check_limits("{% generation %}x{% endgeneration %}{{ messages | tojson }}")
