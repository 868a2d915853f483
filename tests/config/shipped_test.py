"""caprl_jax:NAME: the configs that come with the package, from any folder."""

import pytest
from helpers.paths import ROOT

from caprl_jax.config import loading, shipped


def test_every_config_has_a_name():
  assert shipped.folder() == ROOT / "configs"
  files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
  assert len(files) > 20 and set(shipped.names()) == {str(path.with_suffix("")) for path in files}
  assert "quickstart" in shipped.names() and "ablations/judge_size" in shipped.names()


@pytest.mark.parametrize("name", ["quickstart", "quickstart.py", "ablations/judge_size"])
def test_a_name_loads_its_file_from_any_folder(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = ROOT / "configs" / f"{name.removesuffix('.py')}.py"
  loaded = loading.load_config(f"caprl_jax:{name}")
  assert loaded.to_dict() == loading.load_config(str(path)).to_dict() and loaded.is_locked


@pytest.mark.parametrize(
  "name, message",
  [
    ("quickstrat", r"no config 'quickstrat' comes with caprl_jax; did you mean 'quickstart'"),
    ("../quickstart", r"no config '\.\./quickstart' comes with caprl_jax"),
    ("", r"there are: ablations/data_domain, .*caprl_3b, .*quickstart"),
  ],
)
def test_a_wrong_name_lists_the_names_there_are(name, message):
  with pytest.raises(ValueError, match=message):
    loading.load_config(f"caprl_jax:{name}")


def test_a_folder_without_configs_is_told_of_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"; --config=caprl_jax:quickstart is one that comes with"):
    loading.load_config("configs/quickstart.py")
  with pytest.raises(ValueError, match=r"; --config=caprl_jax:NAME is one that comes with"):
    loading.load_config("mine.py")


def test_what_comes_after_the_name_is_the_config_s_argument(tmp_path, monkeypatch):
  (tmp_path / "one.py").write_text(
    "import ml_collections\ndef get_config(x):\n  return ml_collections.ConfigDict(dict(mode=x))\n"
  )
  monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
  assert loading.load_config("caprl_jax:one:plan").mode == "plan"
