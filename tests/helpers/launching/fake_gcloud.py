"""A gcloud that notes its arguments and answers as the real one does.

Run as a program. FAKE_LOG: a file to which each call adds its arguments as JSON. FAKE_ANSWERS: a
JSON file {kind of call: [answer, ...]}; each call of that kind takes the next answer, and the last
one is given again and again. An answer is what is printed, or [exit code, what is said on stderr].
FAKE_WORKER: the home of a worker, in which the commands of ssh then run, as if the connection
dropped when they end, and to and from which scp copies.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

# Kind of a call by ssh -> what its command holds.
SSH = {
  "state": "echo lost",
  "follow": "tail -n",
  "stop": "while [ ",
  "deadline": ">deadline.txt",
  "start": "nohup setsid",
  "install": "uv venv",
}
DEFAULTS = {"state": "0"}


def kind_of(argv: list[str], command: str) -> str:
  if "storage" in argv:
    return "cp"
  verb = argv[3]
  if verb == "describe":
    return "why" if any("failedData" in arg for arg in argv) else "describe"
  if verb == "ssh":
    return next((kind for kind, text in SSH.items() if text in command), "ssh")
  if verb == "scp":
    return "fetch" if "--recurse" in argv else "scp"
  return verb


def answer_to(kind: str, argv: list[str]) -> str | list:
  path = pathlib.Path(os.environ["FAKE_ANSWERS"])
  answers = json.loads(path.read_text())
  given = answers.get(kind)
  if given is None:
    return ("ACTIVE" if "queued-resources" in argv else "READY") if kind == "describe" else ""
  if len(given) > 1:
    path.write_text(json.dumps(answers | {kind: given[1:]}))
  return given[0]


def as_worker(home: str, command: str) -> int:
  """Runs a command as a worker's shell does, and hangs up at its end."""
  secret = ("HF_TOKEN", "WANDB_API_KEY")
  env = {key: value for key, value in os.environ.items() if key not in secret} | {"HOME": home}
  shell = subprocess.Popen(["bash", "-c", command], env=env, start_new_session=True)
  code = shell.wait()
  try:
    os.killpg(shell.pid, signal.SIGHUP)
  except ProcessLookupError:
    return code  # nothing was left
  return code


def copy(home: str, argv: list[str]) -> None:
  named = [arg for arg in argv[4:] if not arg.startswith("--")]
  source, target = (
    pathlib.Path(*([home, name.partition(":")[2]] if ":" in name else [name])) for name in named
  )
  if source.is_dir():
    shutil.copytree(source, target / source.name)
  else:
    shutil.copy(source, target)


def main(argv: list[str]) -> int:
  with open(os.environ["FAKE_LOG"], "a") as file:
    file.write(json.dumps(argv) + "\n")
  if os.environ.get("FAKE_FAILS") and os.environ["FAKE_FAILS"] in argv:
    return 1
  command = next((arg.partition("=")[2] for arg in argv if arg.startswith("--command=")), "")
  kind, home = kind_of(argv, command), os.environ.get("FAKE_WORKER")
  answer = answer_to(kind, argv)
  if isinstance(answer, list):
    print(answer[1], file=sys.stderr)
    return answer[0]
  if home and command:
    return as_worker(home, command)
  if home and "scp" in argv:
    copy(home, argv)
  elif answer or kind in DEFAULTS:
    print(answer or DEFAULTS[kind])
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
