"""launch/tpu_vm.sh on slices that are waited for, refused and taken away: a gcloud that answers as
the real one does."""

import json
import stat
import subprocess
import sys

import pytest
from helpers.launching.sandbox import Sandbox, names

SLICE = ["--name=caprl", "--zone=us-west4-a", "--type=v5litepod-8"]
SPOT = [*SLICE, "--spot", "--queued"]
BUCKET = ["--config=configs/a.py", "--workdir=gs://b/runs/a"]
HERE = ["--config=configs/a.py", "--workdir=runs/a"]
FAST = {"CAPRL_JAX_POLL_SECS": "0"}

# As the services word them.
QUOTA = (
  'ERROR: (gcloud.compute.tpus.queued-resources.create) {"code": 8, "message": "Quota limit '
  "'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone "
  'us-west4-a."}'
)
CAPACITY = (
  'ERROR: (gcloud.compute.tpus.tpu-vm.create) {"code": 8, "message": "There is no more capacity in '
  'the zone \\"us-west4-a\\"; you can try in another zone where Cloud TPU Nodes are available"}'
)
EXISTS = "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource exists"
UNREACHABLE = [255, "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with code [255]"]
NOT_FOUND = [1, "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource"]


@pytest.fixture
def sandbox(tmp_path):
  made = Sandbox(tmp_path)
  made.git("init", "--quiet")
  return made


def made_and_deleted(calls: list[list[str]]) -> list[str]:
  return [name for name in names(calls) if name in ("create", "delete")]


# ---- preemption, by phase ----


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING", "FAILED"])
def test_a_spot_request_that_is_lost_while_it_waits_is_made_again(sandbox, state):
  sandbox.answer(
    describe=["WAITING_FOR_RESOURCES", "PROVISIONING", state, "WAITING_FOR_RESOURCES", "ACTIVE"],
    why=["the request has expired"],
  )
  done = sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST)
  assert done.returncode == 0, done.stderr
  calls = sandbox.calls()
  assert made_and_deleted(calls) == ["create", "delete", "create", "delete"]
  assert f"caprl is {state}" in done.stderr and "asking again" in done.stderr
  assert "storage cp" not in names(calls)[:-2] and names(calls)[-2] == "cp"


def test_a_slice_that_is_taken_away_while_it_runs_is_replaced_and_the_run_goes_on(sandbox):
  sandbox.answer(
    describe=["ACTIVE", "ACTIVE", "SUSPENDING", "PROVISIONING", "ACTIVE"],
    follow=[UNREACHABLE, UNREACHABLE, ""],
    state=[UNREACHABLE, UNREACHABLE, "0"],
  )
  done = sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST)
  assert done.returncode == 0, done.stderr
  calls = sandbox.calls()
  assert made_and_deleted(calls) == ["create", "delete", "create", "delete"]
  starts = [call for call in calls if any("nohup setsid" in arg for arg in call)]
  assert len(starts) == 2 and starts[0] == starts[1]  # the same command, which goes on
  assert "the run goes on from its last checkpoint" in done.stderr


def test_a_slice_that_is_taken_away_while_it_is_installed_is_replaced(sandbox):
  sandbox.answer(install=[UNREACHABLE, ""], describe=["ACTIVE", "SUSPENDED", "ACTIVE"])
  done = sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST)
  assert done.returncode == 0, done.stderr
  assert made_and_deleted(sandbox.calls()) == ["create", "delete", "create", "delete"]


def test_without_a_queue_a_preempted_slice_is_replaced_too(sandbox):
  sandbox.answer(state=[UNREACHABLE, "75", "0"], describe=["PREEMPTED", "READY"])
  done = sandbox.run("all", *SLICE, "--spot", *BUCKET, "--delete", **FAST)
  assert done.returncode == 0, done.stderr
  assert made_and_deleted(sandbox.calls()) == ["create", "delete", "create", "delete"]


def test_a_slice_that_somebody_deleted_is_replaced(sandbox):
  sandbox.answer(state=[UNREACHABLE, "0"], describe=["ACTIVE", NOT_FOUND, "ACTIVE"])
  assert sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST).returncode == 0


def test_what_is_being_suspended_is_deleted_as_soon_as_that_is_allowed(sandbox):
  refused = [1, "ERROR: FAILED_PRECONDITION: the queued resource is SUSPENDING"]
  sandbox.answer(delete=[refused, refused, ""], describe=["SUSPENDING"])
  done = sandbox.run("delete", *SPOT, **FAST)
  assert done.returncode == 0 and done.stderr.count("cannot be deleted yet") == 2
  sandbox.answer(delete=[[1, "ERROR: NOT_FOUND"]], describe=[NOT_FOUND])
  assert sandbox.run("delete", *SPOT, **FAST).returncode == 0  # it is gone already
  sandbox.answer(delete=[[1, "ERROR: PERMISSION_DENIED"]])
  done = sandbox.run("delete", *SPOT, **FAST)
  assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr


def test_a_slice_that_is_taken_away_takes_its_disk_along(sandbox):
  sandbox.answer(state=[UNREACHABLE], describe=["ACTIVE", "SUSPENDED"])
  done = sandbox.run("all", *SPOT, *HERE, **FAST)
  assert done.returncode == 75 and "Its disk is gone" in done.stderr
  assert "--workdir=gs://BUCKET/FOLDER" in done.stderr and "costs money" not in done.stderr
  assert made_and_deleted(sandbox.calls()) == ["create", "delete"]


def test_preemption_while_the_result_is_copied(sandbox):
  # from the slice's disk, which is lost
  sandbox.answer(fetch=[UNREACHABLE], describe=["ACTIVE", "SUSPENDED"])
  done = sandbox.run("all", *SPOT, *HERE, **FAST)
  assert done.returncode == 75 and "before runs/a was copied" in done.stderr
  assert made_and_deleted(sandbox.calls()) == ["create", "delete"]
  # from the bucket, which is not
  sandbox.answer(cp=[[1, "ERROR: connection reset"]], describe=["ACTIVE", "SUSPENDED"])
  done = sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST)
  assert done.returncode == 1 and "delete" not in names(sandbox.calls())


# ---- run me again ----


def test_exit_code_75_starts_the_run_again_on_the_same_slice(sandbox):
  sandbox.answer(state=["75", "lost", "75", "3"])
  done = sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST)
  assert done.returncode == 3, done.stderr
  calls = sandbox.calls()
  assert made_and_deleted(calls) == ["create", "delete"]
  assert len([call for call in calls if any("nohup setsid" in arg for arg in call)]) == 4
  assert len([call for call in calls if any("uv venv" in arg for arg in call)]) == 1


def test_a_run_that_only_asks_to_be_run_again_is_given_up(sandbox):
  sandbox.answer(state=["75"])
  done = sandbox.run("all", *SPOT, *BUCKET, **FAST)
  assert done.returncode == 75 and "five times within ten minutes" in done.stderr


@pytest.mark.parametrize("code", ["1", "2", "3", "71", "130"])
def test_other_exit_codes_end_it(sandbox, code):
  sandbox.answer(state=[code])
  done = sandbox.run("all", *SPOT, *BUCKET, **FAST)
  assert done.returncode == int(code)
  assert made_and_deleted(sandbox.calls()) == ["create"]


# ---- quota, capacity ----


def test_no_quota_ends_it_with_the_place_to_ask(sandbox):
  sandbox.answer(create=[[1, QUOTA]])
  done = sandbox.run("all", *SPOT, *BUCKET, **FAST)
  assert done.returncode == 2 and "Quota limit 'TPUV5s" in done.stderr
  assert "error: no quota for v5litepod-8 (spot) in us-west4-a: ask for more" in done.stderr
  assert names(sandbox.calls()) == ["create"] and "costs money" not in done.stderr
  # found out later, by the service
  sandbox.answer(describe=["ACCEPTED", "FAILED"], why=["Quota limit 'TPUS' has been exceeded."])
  done = sandbox.run("all", *SPOT, *BUCKET, **FAST)
  assert done.returncode == 2 and "caprl is FAILED: Quota limit 'TPUS'" in done.stderr
  assert made_and_deleted(sandbox.calls()) == ["create", "delete"]


def test_no_capacity(sandbox):
  sandbox.answer(create=[[1, CAPACITY], [1, CAPACITY], ""])
  done = sandbox.run("create", *SLICE, "--spot", **FAST)
  assert done.returncode == 0 and names(sandbox.calls()) == ["create"] * 3
  sandbox.answer(create=[[1, CAPACITY]])
  done = sandbox.run("create", *SLICE, **FAST)
  assert done.returncode == 2 and "--queued waits for one" in done.stderr
  assert names(sandbox.calls()) == ["create"] and "costs money" not in done.stderr


def test_another_error_of_gcloud_s_is_shown_and_ends_it(sandbox):
  sandbox.answer(create=[[1, "ERROR: INVALID_ARGUMENT: no such accelerator type"]])
  done = sandbox.run("all", *SPOT, *BUCKET, **FAST)
  assert done.returncode == 1 and "INVALID_ARGUMENT" in done.stderr


def test_the_same_line_takes_a_slice_that_is_there(sandbox):
  sandbox.answer(create=[[1, EXISTS]], describe=["PROVISIONING", "ACTIVE"])
  done = sandbox.run("all", *SPOT, *BUCKET, "--delete", **FAST)
  assert done.returncode == 0 and "caprl exists already" in done.stderr


# ---- the budget ----


def test_a_spent_budget_saves_ends_and_deletes(sandbox):
  sandbox.answer(state=["running"])
  done = sandbox.run("all", *SPOT, *BUCKET, "--budget=0.0002", **FAST)  # not a second
  assert done.returncode == 75, done.stderr
  calls = sandbox.calls()
  order = names(calls)
  stop = next(i for i, call in enumerate(calls) if any("kill -TERM" in arg for arg in call[-4:]))
  assert made_and_deleted(calls) == ["create", "delete"] and order[-2:] == ["cp", "delete"]
  assert stop < len(order) - 2
  assert "The budget of 0.0002 hours is spent, and caprl is deleted." in done.stderr
  assert "costs money" not in done.stderr


def test_a_budget_holds_while_this_machine_is_off(sandbox):
  done = sandbox.run("all", *SPOT, *BUCKET, "--budget=2", **FAST)
  assert done.returncode == 0
  [script] = [arg for call in sandbox.calls() for arg in call if ">deadline.txt" in arg]
  secs = int(script.partition("secs=")[2].partition("\n")[0])
  assert 7000 < secs <= 7200
  assert (
    "set -- gcloud compute tpus queued-resources delete caprl --force --zone=us-west4-a --quiet"
    in script
  )


@pytest.mark.skipif(sys.platform != "linux", reason="the workers are Linux: setsid, tail --pid")
def test_the_deadline_ends_the_run_and_then_the_slice(sandbox):
  home = {"FAKE_WORKER": str(sandbox.worker), "FAKE_SLEEP": "30"}
  sandbox.run("install", *SLICE, **home)
  sandbox.script("sleep", "#!/bin/bash\nexec /bin/sleep 0.2\n")  # the worker's, too
  sandbox.lines()
  done = sandbox.run("run", *SLICE, *HERE, "--budget=1", **home)
  assert done.returncode == 0, done.stderr
  deadline = sandbox.worker / "caprl_jax_run" / "deadline"
  subprocess.run(["tail", f"--pid={deadline.read_text().strip()}", "-f", "/dev/null"], timeout=20)
  calls = sandbox.calls()
  assert names(calls)[-1] == "delete", calls
  assert (sandbox.worker / "caprl_jax_run" / "exit_code").read_text() == "143\n"  # SIGTERM's


def test_a_dry_run_says_what_may_come(sandbox):
  done = sandbox.run("all", *SPOT, *BUCKET, "--budget=2", "--dry-run")
  assert (
    "# When the slice is taken away: gcloud compute tpus queued-resources delete" in done.stdout
  )
  assert "# When 2 hours are spent: the run gets SIGTERM" in done.stdout and not done.stderr


# ---- secrets, status ----


@pytest.mark.skipif(sys.platform != "linux", reason="the workers are Linux: setsid, tail --pid")
def test_secrets_reach_the_run_and_nothing_else(sandbox):
  secrets = sandbox.repository / "secrets.txt"
  secrets.write_text("# mine\nOTHER_SECRET=two words = $HOME\n\n")
  secrets.chmod(0o644)
  flags = [*SLICE, *HERE, "--secrets=secrets.txt"]
  refused = sandbox.run("run", *flags)
  assert refused.returncode == 2 and "chmod 600 secrets.txt" in refused.stderr
  secrets.chmod(0o600)
  secrets.write_text(secrets.read_text() + "hf_oops\n")
  refused = sandbox.run("run", *flags)
  assert refused.returncode == 2 and "line 4 is not NAME=VALUE" in refused.stderr
  assert "hf_oops" not in refused.stderr
  secrets.write_text("# mine\nOTHER_SECRET=two words = $HOME\n")
  home = {"FAKE_WORKER": str(sandbox.worker), "HF_TOKEN": "hf_secret"}
  (sandbox.repository / ".gitignore").write_text("secrets.txt\n")
  sandbox.run("install", *SLICE, **home)
  # what scp was given: copied as it stands, before it is removed
  sandbox.script(
    "rm",
    "#!/bin/bash\nfile=build/tpu_vm/secrets\n"
    '[ ! -f "$file" ] || stat -c %a "$file" >>"$FAKE_LOG.mode"\nexec /bin/rm "$@"\n',
  )
  done = sandbox.run("run", *flags, **home)
  assert done.returncode == 0, done.stderr
  assert sandbox.run("logs", *SLICE, **home).returncode == 3
  runs = sandbox.worker / "caprl_jax" / "runs" / "a"
  assert (runs / "token").read_text() == "hf_secret"
  assert (runs / "other").read_text() == "two words = $HOME"
  assert "600" in sandbox.log.with_name("log.mode").read_text().split()
  assert not list(sandbox.worker.rglob("secrets")) and not list(
    sandbox.repository.rglob("tpu_vm/secrets")
  )
  said = json.dumps(sandbox.calls()) + done.stdout + done.stderr
  assert "hf_secret" not in said and "two words" not in said
  kept = sandbox.worker / "caprl_jax_run"
  assert stat.S_IMODE(kept.stat().st_mode) == 0o700


@pytest.mark.parametrize(
  "describe, state, line",
  [
    ("WAITING_FOR_RESOURCES", "none", "caprl: WAITING_FOR_RESOURCES"),
    ("ACTIVE", "none", "caprl: ACTIVE, run: none"),
    ("ACTIVE", "75", "caprl: ACTIVE, run: ended with exit code 75"),
    ("SUSPENDED", "none", "caprl: SUSPENDED"),
    (NOT_FOUND, "none", "caprl: NONE"),
  ],
)
def test_status_says_what_slice_and_run_are(sandbox, describe, state, line):
  sandbox.answer(describe=[describe], state=[state])
  done = sandbox.run("status", *SPOT, **FAST)
  assert done.returncode == 0 and done.stdout == f"{line}\n"
