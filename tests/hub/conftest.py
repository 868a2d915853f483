"""What the tests of checkpoints share."""

import shutil

import pytest
from helpers.paths import ROOT

from caprl_jax.hub.folders.notices import warn_once


@pytest.fixture(autouse=True)
def _every_warning_is_new():
  warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path):
  """A copy of the quickstart's captioner that a test may change."""
  shutil.copytree(ROOT / "configs" / "quickstart_policy", tmp_path / "model")
  return tmp_path / "model"
