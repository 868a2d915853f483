"""name=value,name=value."""

import pytest

from caprl_jax.config.named_values import parse_named


def test_names_keep_their_order_and_values_their_equals_signs():
  found = parse_named(" b = runs/b , a=x=y,", key="k", example="")
  assert list(found.items()) == [("b", "runs/b"), ("a", "x=y")]
  assert parse_named(" , ", key="k", example="") == {}


@pytest.mark.parametrize(
  "text, message",
  [
    ("runs/policy", "prism.captioners: 'runs/policy' must be name=value, as in a=b"),
    ("a=x,=y", "prism.captioners: '=y' must be name=value, as in a=b"),
    ("a=", "prism.captioners: 'a=' must be name=value, as in a=b"),
    ("a=x, a =y", "prism.captioners: the name 'a' is given twice"),
  ],
)
def test_what_has_no_name_or_anothers_is_refused(text, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    parse_named(text, key="prism.captioners", example="a=b")
