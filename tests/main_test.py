"""The command line as a user meets it: its help, its refusals, its exit codes and its log."""

import logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import types

import pytest
from helpers.faults import bucket as buckets
from helpers.paths import ROOT

from caprl_jax import main as main_module
from caprl_jax.config import registry
from caprl_jax.harness.process import signals

CONFIG = """
from ml_collections import config_dict

def get_config(mode="fake"):
  config = config_dict.ConfigDict()
  config.mode = mode
  config.policy_update = config_dict.ConfigDict({
    "learning_rate": 1.0, "microbatches": 1, "donate": True, "kind": "grpo", "size": (1, 2),
    "buckets": [1], "reference": None, "limit": config_dict.placeholder(int),
  })
  return config
"""


@pytest.fixture(name="cli")
def _cli(tmp_path, monkeypatch, capsys):
  """Runs main() in this process with modes `fake` and `other`, and returns a function for it.

  The function takes what `fake.run` shall do and arguments after --config and --workdir, and
  returns (exit code, stdout, stderr). `cli.seen` is the list of (mode, config, workdir) that ran.
  """
  (tmp_path / "config.py").write_text(CONFIG)
  seen = []

  def cli(*arguments, run=lambda config, workdir: None, config=None, workdir=None):
    def module(name, body):
      made = types.ModuleType(f"fake_{name}")

      def run(config, workdir):
        seen.append((name, config, workdir))
        body(config, workdir)

      made.run = run
      monkeypatch.setitem(sys.modules, made.__name__, made)
      mode = registry.Mode(made.__name__, "line", "--x", {})
      monkeypatch.setitem(registry.MODES, name, mode)

    module("fake", run)
    module("other", lambda config, workdir: None)
    code = main_module.main(
      [
        "main",
        f"--config={config or tmp_path / 'config.py'}",
        f"--workdir={workdir or tmp_path / 'run'}",
        *arguments,
      ]
    )
    out, err = capsys.readouterr()
    return code, out, err

  cli.seen = seen
  return cli


def test_runs_the_mode_with_the_config_and_a_new_workdir(cli, tmp_path):
  code, out, err = cli()
  assert (code, out) == (0, "")
  [(name, config, workdir)] = cli.seen
  assert (name, workdir) == ("fake", tmp_path / "run") and workdir.is_dir()
  assert config.policy_update.learning_rate == 1.0 and config.is_locked
  assert re.fullmatch(r"\d\d:\d\d:\d\d caprl_jax \S+, mode fake, in \S+\n", err)


def test_modes_run_in_a_row(cli):
  code, _, err = cli("--config.mode=other, fake")
  assert code == 0 and [name for name, *_ in cli.seen] == ["other", "fake"]
  assert "mode other (1 of 2)" in err and "mode fake (2 of 2)" in err


def test_config_takes_an_argument(cli, tmp_path):
  code, _, _ = cli(config=f"{tmp_path / 'config.py'}:other")
  assert code == 0 and cli.seen[0][0] == "other"


@pytest.mark.parametrize(
  "override, key, value",
  [
    ("--config.policy_update.learning_rate=1e-4", "learning_rate", 1e-4),
    ("--config.policy_update.learning_rate=2", "learning_rate", 2.0),
    ("--config.policy_update.microbatches=8", "microbatches", 8),
    ("--config.policy_update.donate=false", "donate", False),
    ("--noconfig.policy_update.donate", "donate", False),
    ("--config.policy_update.donate", "donate", True),
    ("--config.policy_update.kind=a=b.c", "kind", "a=b.c"),
    ("--config.policy_update.kind=8", "kind", "8"),
    ("--config.policy_update.size=(3, 4)", "size", (3, 4)),
    ("--config.policy_update.buckets=[3,4]", "buckets", [3, 4]),
    ("--config.policy_update.buckets=7", "buckets", [7]),
    ("--config.policy_update.reference=0.5", "reference", 0.5),
    ("--config.policy_update.reference=hf://a/b", "reference", "hf://a/b"),
    ("--config.policy_update.limit=3", "limit", 3),
    ("--config.policy_update.learning_rate=None", "learning_rate", None),
  ],
)
def test_overrides_take_the_type_of_the_value_in_the_file(cli, override, key, value):
  code, _, err = cli(override)
  assert code == 0, err
  got = cli.seen[0][1].policy_update[key]
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
  "argument, message",
  [
    (
      "--config.policy_update.learning_rat=1",
      r"--config\.policy_update\.learning_rat is not a key of \S+config\.py; did you mean "
      r"--config\.policy_update\.learning_rate\?.*"
      r"\(keys of policy_update: policy_update\.buckets, ",
    ),
    ("--config.donate=1", r"did you mean --config\.policy_update\.donate\?"),
    (
      "--config.policy_update.learning_rate.x=1",
      r"\.x is not a key .*--config\.policy_update\.learning_rate",
    ),
    (
      "--config.policy_update=1",
      r"--config\.policy_update is a section; .*--config\.policy_update\.microbatches",
    ),
    ("--config.policy_update.microbatches=two", "microbatches=two: not a value of type int"),
    ("--config.policy_update.microbatches=1.5", "microbatches=1.5: not a value of type int"),
    ("--config.policy_update.donate=maybe", "donate=maybe: not a value of type bool"),
    ("--config.policy_update.limit=x", "limit=x: not a value of type int"),
    (
      "--config.policy_update.microbatches",
      r"write --config\.policy_update\.microbatches=VALUE \(int in ",
    ),
    ("--noconfig.policy_update.donate=1", r"write --config\.policy_update\.donate=VALUE"),
    ("--workdri=x", r"unknown flag --workdri=x; did you mean 'workdir'\? \(flags: compilation_c"),
    ("--traceback=perhaps", r"--traceback=perhaps.*\(--help lists the flags\)"),
    ("train", r"unexpected argument 'train'; write --config=FILE"),
    ("--workdir=", r"--workdir is missing, e\.g\. --workdir=runs/quickstart"),
    ("--config=", r"--config is missing, e\.g\. --config=configs/quickstart.py"),
    ("--config.mode=tarin", r"config\.mode 'tarin' is not a mode; did you mean 'train'\? "),
    ("--config.mode=", r"config\.mode is ''; set it to one of train, sft, pretrain, evaluate"),
    ("--config.mode=fake,fake", "names a mode twice"),
    (
      "--workdir=~nosuchuser/x",
      r"~nosuchuser/x cannot be written: Could not determine home",
    ),
    ("--workdir=a\0b", r"workdir a.b cannot be written: embedded null byte; choose"),
    ("--" + "x" * 9000, r"unknown flag --x+ \.\.\. x+ \(flags: "),
    (
      "--config.policy_update.microbatches=" + "9" * 9000,
      r"microbatches=9+ \.\.\. 9+: not a value",
    ),
    ("--config.preset=[[]]", r"config\.preset = '?\[\[\]\]'? is none of"),
    ("--config.seed=-1", r"config\.seed is -1, but it must be an integer from 0 on"),
    ("--config=nowhere.py", r"config file 'nowhere.py' does not exist in /"),
  ],
)
def test_a_bad_command_line_is_one_message_and_code_2(cli, tmp_path, argument, message):
  code, out, err = cli(argument)
  assert (code, out, cli.seen) == (2, "", [])
  first, *others = err.splitlines()
  assert re.match(rf"error: .*{message}", first), err
  assert others == ["(--traceback shows where)"]
  assert not (tmp_path / "run" / "log.txt").exists() or "mode" in argument


def _made(line: str) -> str:
  head = "from ml_collections import config_dict\n\ndef get_config():\n"
  return f"{head}  config = config_dict.ConfigDict()\n  {line}\n  return config"


@pytest.mark.parametrize(
  "source, message",
  [
    ("def get_config(:", r"config file \S+: SyntaxError: "),
    ("import no_such_package", r"config file \S+: ModuleNotFoundError: No module named"),
    ("def get_config():\n  raise ValueError('odd')", r"config file \S+bad\.py: odd$"),
    ("raise SystemExit('stop')", r"config file \S+: SystemExit: stop$"),
    ("def get_config():\n  raise KeyError('x' * 9000)", r"KeyError: 'x{100,500} \.\.\. x+'$"),
    (_made("config[1] = 2"), r"config file \S+: a section has a key that is no text"),
    (_made("config.a = dict(b=1)\n  config.a.c = config"), r"the section c stands inside itself"),
    (_made("config.a = config_dict.required_placeholder(int)"), r"a is a required value that is"),
    ("x = 1", r"it has no get_config\(\)"),
    ("def get_config():\n  return {}", r"get_config\(\) returned dict; it must return an ml_coll"),
  ],
)
def test_a_bad_config_file_is_one_message(cli, tmp_path, source, message):
  (tmp_path / "bad.py").write_text(source)
  code, _, err = cli(config=tmp_path / "bad.py")
  assert code == 2 and re.search(message, err.splitlines()[0]), err


def test_a_workdir_that_cannot_be_made(cli, tmp_path):
  (tmp_path / "file").write_text("")
  code, _, err = cli(workdir=tmp_path / "file" / "run")
  assert code == 2
  message = r"error: workdir \S+/file/run cannot be written: Not a directory .*--workdir"
  assert re.match(message, err)


def _fail(error):
  def run(config, workdir):
    raise error

  return run


@pytest.mark.parametrize(
  "error, code",
  [(ValueError("group_size is 1; use 2"), 2), (FloatingPointError("loss is nan, step 7"), 3)],
)
def test_errors_of_a_run(cli, tmp_path, error, code):
  got, _, err = cli(run=_fail(error))
  assert got == code
  assert err.splitlines()[1:] == [
    f"error: {error}",
    f"(the traceback is in {tmp_path / 'run' / 'log.txt'})",
  ]
  log = (tmp_path / "run" / "log.txt").read_text()
  assert "Traceback" in log and str(error) in log
  got, _, err = cli("--traceback", run=_fail(error))
  assert got == code and "Traceback" in err and err.splitlines()[-1] == f"error: {error}"


@pytest.mark.parametrize(
  "error, code, message",
  [
    (PermissionError(13, "Permission denied", "/data/x.png"), 2, "/data/x.png: Permission denied"),
    (IsADirectoryError(21, "Is a directory", "a.jsonl"), 2, "a.jsonl: Is a directory"),
    (OSError(28, "No space left on device", "out/b"), 74, "out/b: No space left on device"),
    (OSError(28, "No space left on device"), 74, "No space left on device"),
    (OSError("a message of its own"), 2, "a message of its own"),
    (MemoryError(), 71, "this machine's memory is full (no more could be had)"),
  ],
)
def test_files_and_machines_are_no_fault_of_ours(cli, tmp_path, error, code, message):
  got, _, err = cli(run=_fail(error))
  assert got == code
  note = f"(the traceback is in {tmp_path / 'run' / 'log.txt'})"
  assert err.splitlines()[1:] == [f"error: {message}", note]


def test_a_program_that_does_not_fit_says_what_takes_less(cli):
  error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers: 1, 2, 3")
  code, _, err = cli(run=_fail(error))
  assert code == 71 and "Traceback" not in err and "Buffers" not in err
  assert "error: an accelerator's memory does not suffice (RESOURCE_EXHAUSTED: Out of" in err
  assert "policy_update.microbatches" in err and "--config.mode=plan" in err


def test_a_run_in_a_bucket_leaves_all_of_it_there(cli, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket = buckets.install(monkeypatch)
  bucket.pipe("gs://b/rows.jsonl", b"1")

  def run(config, workdir):
    (workdir / "found.txt").write_text(pathlib.Path(config.policy_update.reference).read_text())
    raise signals.Preempted("SIGTERM")

  code, _, err = cli(
    "--config.policy_update.reference=gs://b/rows.jsonl", run=run, workdir="gs://b/run"
  )
  assert code == 75, err
  assert bucket.cat("gs://b/run/found.txt") == b"1"
  assert b"stopped by SIGTERM" in bucket.cat("gs://b/run/log.txt")
  monkeypatch.setattr(main_module.peers, "current", lambda: object())
  code, _, err = cli(run=run, workdir="gs://b/run")
  assert code == 2 and "gs://b/run: several processes of mode fake need a folder that all" in err


def test_an_address_of_no_bucket_is_no_workdir(cli, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, _, err = cli(workdir="file:///tmp/x")
  assert code == 2 and not (tmp_path / "file:").exists() and cli.seen == []
  assert "error: --workdir=file:///tmp/x is an address, and none of a bucket" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_notice_of_preemption_asks_to_be_started_again(cli, name, request):
  # tests may be run under nohup, where SIGHUP is ignored
  inherited = signal.signal(signal.Signals[name], signal.SIG_DFL)
  request.addfinalizer(lambda: signal.signal(signal.Signals[name], inherited))
  saved = []

  def run(config, workdir):
    try:
      signal.raise_signal(signal.Signals[name])
    except KeyboardInterrupt:  # what saves on Ctrl-C saves now
      saved.append(workdir)
      raise

  code, _, err = cli(run=run)
  assert code == 75 and saved
  assert err.splitlines()[-1].endswith(f"stopped by {name}; run the same command again, it goes on")
  assert signal.getsignal(signal.Signals[name]) == signal.SIG_DFL


def test_a_name_that_is_no_utf_8_can_be_logged(cli, tmp_path):
  code, _, err = cli(run=_fail(ValueError("'\udcff.png' is no image")))
  assert code == 2 and "Logging error" not in err
  assert "\\udcff.png" in (tmp_path / "run" / "log.txt").read_text()


def test_a_fault_of_ours_shows_its_traceback(cli, tmp_path):
  code, _, err = cli(run=_fail(ZeroDivisionError("oops")))
  assert code == 1
  assert "error: caprl_jax failed" in err and "ZeroDivisionError: oops" in err
  assert "ZeroDivisionError: oops" in (tmp_path / "run" / "log.txt").read_text()


def test_what_jax_refuses_is_a_fault_and_no_bad_input(cli):
  import jax.numpy as jnp

  code, _, err = cli(run=lambda config, workdir: jnp.concatenate([]))
  assert code == 1 and "error: caprl_jax failed" in err and "Traceback" in err


def test_a_mode_that_cannot_be_imported_shows_before_the_first_runs(cli, monkeypatch):
  monkeypatch.setitem(registry.MODES, "gone", registry.Mode("fake_gone", "", "", {}))
  code, _, err = cli("--config.mode=fake,gone")
  assert code == 1 and "No module named 'fake_gone'" in err and cli.seen == []


def test_log_lines(cli, tmp_path):
  def run(config, workdir):
    logging.getLogger("caprl_jax.modes.train.run").info("step 1")
    logging.getLogger("caprl_jax.modes.train.run").debug("detail")
    logging.getLogger("absl").warning("careful")
    logging.getLogger("absl").info("chatter")

  handlers = list(logging.root.handlers)
  _, _, err = cli(run=run)
  clock = r"\d\d:\d\d:\d\d"
  assert re.fullmatch(rf"{clock} caprl.*\n{clock} step 1\n{clock} warning: careful\n", err)
  log = (tmp_path / "run" / "log.txt").read_text()
  assert re.search(rf"\d{{4}}-\d\d-\d\dT{clock} detail\n", log)
  assert "chatter" not in log and "'learning_rate': 1.0" in log
  assert logging.root.handlers == handlers


def test_the_cache_is_left_off_on_a_cpu(monkeypatch):
  import jax

  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  before = jax.config.jax_compilation_cache_dir
  main_module._set_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == before


def test_the_cache_is_the_user_s_on_an_accelerator(monkeypatch, tmp_path):
  set_to = {}
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  fake_jax = types.SimpleNamespace(
    config=types.SimpleNamespace(jax_platforms=None, update=set_to.__setitem__),
    default_backend=lambda: "tpu",
  )
  monkeypatch.setitem(sys.modules, "jax", fake_jax)
  monkeypatch.setattr(main_module.importlib.util, "find_spec", lambda name: name == "libtpu")
  main_module._set_compilation_cache()
  assert set_to == {"jax_compilation_cache_dir": str(tmp_path / "caprl_jax" / "compiled")}
  set_to.clear()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  main_module._set_compilation_cache()
  assert not set_to


def test_distributed_is_tried_only_where_there_are_hosts(monkeypatch):
  joined = []
  monkeypatch.setattr(main_module.peers, "join", lambda known: joined.append(known) or 1)
  for name in (
    "TPU_PROCESS_ADDRESSES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
  ):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  assert main_module._start_distributed(None) == 0 and joined == []
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
  assert main_module._start_distributed(False) == 0 and joined == []
  assert main_module._start_distributed(None) == 1 and joined == [{}]
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  assert main_module._start_distributed(None) == 1 and joined == [{}, {"process_id": 3}]
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two' must be a whole number"):
    main_module._start_distributed(True)


def _python(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=os.environ | environment,
    text=True,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def test_help_is_a_page_about_this_program_only():
  process = _python("-m", "caprl_jax.main", "--help")
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, "")
  assert out.startswith("caprl_jax trains an image captioner")
  for name, mode in registry.MODES.items():
    assert re.search(rf"^  {name} +{re.escape(mode.line)}$", out, re.MULTILINE)
    assert f"python -m caprl_jax.main {mode.example}" in out
  for flag in ("--config=", "--workdir=", "--[no]distributed", "--config.section.key="):
    assert flag in out
  assert "verbosity" not in out and len(out.splitlines()) < 50


def test_help_may_be_cut_off_by_who_reads_it():
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, "-m", "caprl_jax.main", "--help"]
  ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60)
  os.close(write)
  assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
  "sent, code, said",
  [
    (
      signal.SIGINT,
      130,
      "interrupted; the last checkpoint is usable, run the same command to go on",
    ),
    (signal.SIGTERM, 75, "stopped by SIGTERM; run the same command again, it goes on"),
  ],
)
def test_a_real_process_joins_itself_is_interrupted_and_says_what_to_do(
  tmp_path, interruptible, sent, code, said
):
  """Real signal, real jax.distributed with one process, and no device in use before it."""
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "fake_mode.py").write_text(
    textwrap.dedent("""
    import jax, time
    def run(config, workdir):
      assert jax.distributed.is_initialized() and jax.process_count() == 1
      try:
        print("running", flush=True)
        for _ in range(600):  # one long sleep would miss a signal that comes just before it
          time.sleep(0.1)
      finally:
        (workdir / "unwound").touch()
  """)
  )
  program = (
    "import sys; from caprl_jax import main; from caprl_jax.config import registry\n"
    "registry.MODES['fake'] = registry.Mode('fake_mode', '', '', {})\n"
    "sys.exit(main.main(sys.argv))"
  )
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  process = _python(
    "-c",
    program,
    f"--config={tmp_path / 'config.py'}",
    f"--workdir={tmp_path / 'run'}",
    "--distributed",
    PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
    JAX_NUM_PROCESSES="1",
    JAX_PROCESS_ID="0",
  )
  assert process.stdout.readline() == "running\n", process.communicate(timeout=60)
  process.send_signal(sent)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code, err
  assert "Traceback" not in err
  assert err.splitlines()[-1].endswith(f"warning: {said}"), err
  assert (tmp_path / "run" / "unwound").exists()
