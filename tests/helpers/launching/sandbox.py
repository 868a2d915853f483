"""A small repository with the launch scripts in it, and stand-ins for the tools that they call."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from helpers.paths import ROOT

# A worker's uv: its `uv venv` makes a python that notes its arguments and its secrets, runs a while
# and ends with 3.
UV = r"""#!/bin/bash
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
cat >.venv/bin/python <<'END'
#!/bin/bash
[ "${3:-}" != --help ] || exit 0
sleep 0.5
mkdir -p runs/a
printf '%s\0' "$@" >runs/a/arguments
printf %s "${HF_TOKEN-}" >runs/a/token
printf %s "${OTHER_SECRET-}" >runs/a/other
echo the last line of the log
/bin/sleep "${FAKE_SLEEP:-0}"
exit 3
END
chmod +x .venv/bin/python
"""

# Notes its arguments; ends with $FAKE_CODE.
TOOL = """#!/bin/bash
{ printf '%s' "${0##*/}"; printf ' %q' "$@"; echo; } >>"$FAKE_LOG"
[ "${0##*/}" = scontrol ] || exit "${FAKE_CODE:-0}"
"""


class Sandbox:
  """A small repository, and a PATH with stand-ins for gcloud, sleep, uv and gcsfuse."""

  def __init__(self, path: pathlib.Path):
    self.repository, self.worker = path / "repository", path / "worker"
    self.bin, self.log, self.answers_file = path / "bin", path / "log", path / "answers"
    for folder in (self.repository / "configs", self.worker, self.bin):
      folder.mkdir(parents=True)
    shutil.copytree(ROOT / "launch", self.repository / "launch")
    (self.repository / "configs" / "a.py").write_text("")
    gcloud = (ROOT / "tests" / "helpers" / "launching" / "fake_gcloud.py").read_text()
    self.script("gcloud", f"#!{sys.executable} -SE\n{gcloud}")
    # ours need no waiting
    self.script("sleep", '#!/bin/bash\n[ "$1" -ge 10 ] 2>/dev/null || exec /bin/sleep "$1"\n')
    self.script("uv", UV)
    self.script("gcsfuse", '#!/bin/bash\necho "$@" >~/mounted\n')
    self.script("mountpoint", "#!/bin/bash\nexit 1\n")
    self.answer()

  def script(self, name: str, text: str) -> None:
    (self.bin / name).write_text(text)
    (self.bin / name).chmod(0o755)

  def tools(self, *names: str) -> None:
    """Stand-ins that note how they are called."""
    for name in names:
      self.script(name, TOOL)

  def answer(self, **answers: list) -> None:
    """What gcloud answers from now on, by kind of call (fake_gcloud.py)."""
    self.answers_file.write_text(json.dumps(answers))

  def environment(self, **more: str) -> dict[str, str]:
    left_out = ("HF_TOKEN", "WANDB_API_KEY", "CAPRL_JAX_SECRETS")
    known = {
      key: value
      for key, value in os.environ.items()
      if key not in left_out and not key.startswith(("GIT_", "SLURM_"))
    }
    ours = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "FAKE_LOG": str(self.log),
      "FAKE_ANSWERS": str(self.answers_file),
    }
    return known | ours | more

  def git(self, *args: str) -> None:
    subprocess.run(
      ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
      cwd=self.repository,
      check=True,
      capture_output=True,
      env=self.environment(),
    )

  def run(
    self,
    *args: str,
    text: str | None = None,
    script: str = "tpu_vm.sh",
    folder: pathlib.Path | None = None,
    **more: str,
  ) -> subprocess.CompletedProcess:
    """A script of launch/ with these arguments, or a bash script of this text, from another
    folder."""
    command = ["-euo", "pipefail"]
    if text is None:
      command = [str(self.repository / "launch" / script), *args]
    return subprocess.run(
      ["bash", *command],
      input=text or "",
      cwd=folder or self.bin,
      env=self.environment(**more),
      capture_output=True,
      text=True,
      timeout=60,
    )

  def calls(self) -> list[list[str]]:
    """The arguments of each gcloud since the last time."""
    return [json.loads(line) for line in self.lines()]

  def lines(self) -> list[str]:
    """What the tools noted since the last time."""
    if not self.log.exists():
      return []
    lines = self.log.read_text().splitlines()
    self.log.unlink()
    return lines


def names(calls: list[list[str]]) -> list[str]:
  """Each call in a word or two: "create", "ssh all", "storage cp"."""
  short = []
  for call in calls:
    words = [arg for arg in call if not arg.startswith("--")]
    worker = [arg.partition("=")[2] for arg in call if arg.startswith("--worker=")]
    short.append(" ".join([*words[1 if words[0] == "storage" else 3 :][:1], *worker]))
  return short
