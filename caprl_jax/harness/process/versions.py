"""This process -> the versions that a run's numbers depend on."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

import jax
import optax
import orbax.checkpoint

from caprl_jax import __version__


def versions() -> dict[str, str]:
  """What the run runs on. All processes may call it."""
  device = jax.devices()[0]
  return {
    "caprl_jax": __version__,
    "revision": revision(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": importlib.metadata.version("jaxlib"),
    "optax": optax.__version__,
    "orbax": orbax.checkpoint.__version__,
    "device": f"{len(jax.devices())} x {device.device_kind}",
  }


@functools.cache
def revision() -> str:
  """The git revision of the package's own files, with "-dirty" where they were changed since; empty
  where they are no checkout, or there is no git."""
  root = pathlib.Path(__file__).resolve().parents[3]
  if not (root / ".git").exists():
    return ""
  command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return found.stdout.strip() if found.returncode == 0 else ""
