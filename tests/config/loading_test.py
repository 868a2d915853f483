"""--config.section.key=value: keys below a name that the user gives."""

from caprl_jax.config import loading


def test_a_stage_may_be_named_as_a_method_of_configdict(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(
    "import ml_collections\n"
    "def get_config():\n"
    "  config = ml_collections.ConfigDict()\n"
    "  config.pretrain = dict(stages=dict(update=dict(steps=1)))\n"
    "  return config\n"
  )
  config = loading.load_config(str(path))
  arguments = (
    "--config.pretrain.stages.update.steps=3",
    "--config.pretrain.stages.update.context_text=a",
  )
  loading.apply_overrides(config, [loading.OVERRIDE.fullmatch(a) for a in arguments], str(path))
  assert config.pretrain.stages["update"].to_dict() == {"steps": 3, "context_text": "a"}
