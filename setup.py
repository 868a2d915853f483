"""What setup.cfg cannot say: configs/ goes into the wheel too, as caprl_jax/_configs, so that
`--config=caprl_jax:quickstart` needs no clone."""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py

CONFIGS = pathlib.Path("configs")


class BuildWithConfigs(build_py):
  """Builds the package, and puts the configs in it; not for an editable install, which has them
  beside it."""

  def run(self) -> None:
    super().run()
    for path, target in self._configs():
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, target)

  def get_outputs(self, include_bytecode: bool = True) -> list[str]:
    return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._configs())]

  def _configs(self) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """(file, where it goes in the build), of configs and the models beside them."""
    if getattr(self, "editable_mode", False):
      return []
    folder = pathlib.Path(self.build_lib, "caprl_jax", "_configs")
    found = [*CONFIGS.rglob("*.py"), *CONFIGS.glob("quickstart_policy/*")]
    return [(path, folder / path.relative_to(CONFIGS)) for path in sorted(found)]


setuptools.setup(cmdclass={"build_py": BuildWithConfigs})
