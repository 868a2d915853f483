"""model_type of a config.json -> its family. A new family is one more file and one more line
here.
"""

from caprl_jax.json_files import shown
from caprl_jax.models import internvl, qwen3_vl, qwen25_vl
from caprl_jax.models.family import Family

FAMILIES = (qwen25_vl.FAMILY, qwen3_vl.FAMILY, internvl.FAMILY)


def is_vision_language(config: dict) -> bool:
  """Whether a config.json is a captioner's."""
  return any(config.get("model_type") in (f.model_type, *f.aliases) for f in FAMILIES)


def family_of(config: dict) -> Family:
  """Raises ValueError for a model_type that no family has."""
  kind = config.get("model_type")
  for family in FAMILIES:
    if kind in (family.model_type, *family.aliases):
      return family
  known = ", ".join(f.model_type for f in FAMILIES)
  raise ValueError(f"policy model_type {shown(kind)} is not supported; supported: {known}")
