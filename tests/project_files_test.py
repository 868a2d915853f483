"""The files beside the code that other tools read: they parse, and say what setup.cfg says."""

import configparser
import re

import pytest
import yaml
from helpers.paths import ROOT

import caprl_jax


def read_yaml(path: str):
  return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
  parser = configparser.ConfigParser(interpolation=None)
  parser.read(ROOT / "setup.cfg")
  return parser


def test_pre_commit_runs_the_ruff_of_the_tests(setup):
  [pinned] = re.findall(r"^ruff==.*$", setup["options.extras_require"]["test"], re.MULTILINE)
  [repo] = read_yaml(".pre-commit-config.yaml")["repos"]
  assert repo["repo"] == "local"
  assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]
  for hook in repo["hooks"]:
    assert hook["additional_dependencies"] == [pinned]
    assert hook["entry"].split()[:2] == hook["name"].split()


def test_the_oracle_is_pinned_to_the_version_that_the_tests_hold_for(setup):
  oracle = pytest.importorskip("helpers.oracle")  # it needs torch
  test, needed = setup["options.extras_require"]["test"], setup["options"]["install_requires"]
  assert re.findall(r"^transformers==(.*)$", test, re.MULTILINE) == [oracle.TRANSFORMERS]
  assert f"transformers {oracle.TRANSFORMERS}" in (ROOT / "docs" / "models.md").read_text()
  [least] = re.findall(r"^transformers>=(.*)$", needed, re.MULTILINE)
  numbers = lambda version: [int(part) for part in version.split(".")]
  assert numbers(least) <= numbers(oracle.TRANSFORMERS)
  with pytest.raises(RuntimeError, match=f"hold for transformers {oracle.TRANSFORMERS}, and 5.3.0"):
    oracle.check_version("5.3.0")


def test_the_workflow_runs_everything_on_the_oldest_and_the_newest(setup):
  job = read_yaml(".github/workflows/tests.yml")["jobs"]["tests"]
  oldest, newest = job["strategy"]["matrix"]["include"]
  [least] = re.findall(r">=(.*)", setup["options"]["python_requires"])
  assert oldest["python"] == least
  [jax] = re.findall(r"^jax>=(.*)$", setup["options"]["install_requires"], re.MULTILINE)
  assert oldest["constraint"] == f"jax=={jax}.*" and newest["constraint"] == f"jax>={jax}"
  # The newest Python that launch/quickstart.sh looks for.
  script = (ROOT / "launch" / "quickstart.sh").read_text()
  assert newest["python"] == max(re.findall(r"python(3\.\d+)", script), key=lambda v: int(v[2:]))
  assert any(step.get("run") == "bash .ci/run" for step in job["steps"])


def test_the_citation_is_of_this_version(setup):
  citation = read_yaml("CITATION.cff")
  assert citation["cff-version"] == "1.2.0"
  assert {"title", "message", "authors"} <= set(citation)
  assert citation["title"] == setup["metadata"]["name"]
  assert citation["version"] == caprl_jax.__version__
  assert citation["license"] == setup["metadata"]["license_expression"]
  [paper] = citation["references"]
  assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in (ROOT / "README.md").read_text()


def test_the_issue_form_asks_for_config_versions_and_log():
  form = read_yaml(".github/ISSUE_TEMPLATE/bug.yml")
  assert {"name", "description", "body"} <= set(form)
  asked = {field["id"]: field for field in form["body"]}
  assert {"command", "log", "versions"} <= set(asked)
  for field in asked.values():
    assert field["type"] == "textarea" and field["attributes"]["label"]
    assert field["validations"]["required"] is True
  assert "configs/quickstart.py" in asked["command"]["attributes"]["placeholder"]
  read_yaml(".github/ISSUE_TEMPLATE/config.yml")
