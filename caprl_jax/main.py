"""Flags -> jax.distributed -> the run of each mode."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import sys
import textwrap
import traceback
import types
from typing import NamedTuple

import ml_collections
from absl import flags
from tqdm import auto as tqdm

import caprl_jax
from caprl_jax.config import loading as config_file
from caprl_jax.config import schema as configuration

# Named in full, because this module is `__main__` when it is run.
log = logging.getLogger("caprl_jax.main")


class Mode(NamedTuple):
  """What `config.mode` may name. The module has `run(config, workdir: pathlib.Path) -> None`."""

  module: str
  line: str
  example: str
  workdir: str | None = None  # where logs go when --workdir is not given; None: it must be


MODES = {
  "train": Mode(
    "caprl_jax.modes.train.run",
    "CapRL: the policy captions, the judge answers from the captions, the policy improves",
    "--config=configs/quickstart.py --workdir=runs/quickstart",
  ),
  "sft": Mode(
    "caprl_jax.modes.sft",
    "teach a policy to see and to speak from given captions, before CapRL",
    "--config=configs/quickstart_sft.py --workdir=runs/quickstart_sft",
  ),
  "pretrain": Mode(
    "caprl_jax.modes.pretrain.run",
    "what captions are worth: train a captioner in stages on captions and conversations, then ask "
    "it about images",
    "--config=configs/pretrain_language.py --workdir=runs/pretrain_language",
  ),
  "evaluate": Mode(
    "caprl_jax.modes.prism.run",
    "how much of an image captions carry: Prism on benchmarks, or a training config's own held-out "
    "rows",
    "--config=configs/prism_quickstart.py --workdir=runs/prism",
  ),
  "calibrate": Mode(
    "caprl_jax.modes.calibrate",
    "whether a judge can be trusted: accuracy by caption, position bias, agreement, the margin to "
    "abstain by",
    "--config=configs/quickstart.py --workdir=runs/calibrate --config.mode=calibrate",
  ),
  "curate": Mode(
    "caprl_jax.modes.curate.run",
    "images in, filtered questions out: a model writes them, another answers with the image and "
    "without",
    "--config=configs/curate.py --workdir=runs/curate "
    "--config.curate.input=IMAGES --config.curate.output=qa.parquet",
  ),
  "dataset": Mode(
    "caprl_jax.modes.dataset.run",
    "what is in a QA dataset and what is wrong with it; a copy in another format",
    "--config=configs/dataset.py --config.dataset.input=easy_vqa:test",
    workdir="runs/dataset",
  ),
  "caption": Mode(
    "caprl_jax.modes.caption.run",
    "caption images in folders, JSON lines, tar files, parquet or TFDS, on one host or many",
    "--config=configs/caption.py --config.policy.checkpoint=DIR --config.caption.input=FOLDER "
    "--config.caption.output=captions.jsonl",
    workdir="runs/caption",
  ),
  "gallery": Mode(
    "caprl_jax.modes.gallery.run",
    "a page that shows what several captioners wrote about the same images, side by side",
    "--config=configs/gallery.py --config.gallery.captions=before=a.jsonl,after=b.jsonl",
    workdir="runs/gallery",
  ),
  "demo": Mode(
    "caprl_jax.modes.demo",
    "a local page: drop an image in, read its caption, watch the judge answer from the words",
    "--config=configs/demo.py --config.policy.checkpoint=runs/quickstart/policy",
    workdir="runs/demo",
  ),
  "plan": Mode(
    "caprl_jax.modes.plan",
    "memory and largest arrays of a training config's step on a TPU topology, without a TPU",
    "--config=configs/caprl_3b.py --config.mode=plan --config.plan.topology=v5p:2x2x2",
    workdir="runs/plan",
  ),
  "export": Mode(
    "caprl_jax.modes.export",
    "a run's captioner (or any checkpoint) as a directory that transformers and vLLM load",
    "--config=configs/export.py --config.export.run=runs/quickstart --config.export.output=DIR",
    workdir="runs/export",
  ),
}

OK, FAILED, BAD_INPUT, NOT_FINITE, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes


def main(argv: list[str]) -> int:
  """Runs the modes that the command line asks for and returns the exit code.

  Args:
    argv: the program's name, then its arguments.
  """
  options = _define_flags()
  show_traceback = "--traceback" in argv  # known before the flags are, for errors in the flags
  try:
    if any(arg in ("-h", "--help", "-help", "--helpfull", "--helpshort") for arg in argv[1:]):
      print(_help_page(options))
      return OK
    config, workdir = _parse(options, argv)
    modes = _modes(config)
    process = _start_distributed(options.distributed)
    if options.compilation_cache:
      _set_compilation_cache()
    with _logging_to(workdir, process):
      return _run(modes, config, workdir, show_traceback)
  except ValueError as error:
    _complain(error, show_traceback)
    return BAD_INPUT
  except KeyboardInterrupt:
    print("interrupted before the run began", file=sys.stderr)
    return INTERRUPTED


def _run(
  modes: dict[str, Mode], config: ml_collections.ConfigDict, workdir: pathlib.Path, trace: bool
) -> int:
  """Runs the modes in a row. What ends one of them early is put into words here, once."""
  log_file = workdir / "log.txt"
  try:
    log.debug("config: %s", configuration.to_plain(config))
    # All of them first, so that what the last mode lacks shows before the first has run.
    modules = {name: importlib.import_module(mode.module) for name, mode in modes.items()}
    for i, (name, module) in enumerate(modules.items()):
      which = f" ({i + 1} of {len(modules)})" if len(modules) > 1 else ""
      log.info("caprl_jax %s, mode %s%s, in %s", caprl_jax.__version__, name, which, workdir)
      module.run(config, workdir)
  except (ValueError, FloatingPointError) as error:
    log.debug("error: %s", error, exc_info=True)  # DEBUG goes to the file and not to the terminal
    _complain(error, trace, note=f"(the traceback is in {log_file})")
    return NOT_FINITE if isinstance(error, FloatingPointError) else BAD_INPUT
  except KeyboardInterrupt:
    # Said after the mode has unwound, which is when it has written what it wants to keep.
    log.warning("interrupted; the last checkpoint is usable, run the same command to go on")
    return INTERRUPTED
  except Exception:  # not the user's doing: all of it, on the terminal and in the file
    log.exception("caprl_jax failed; this looks like a fault in it or in its installation")
    return FAILED
  return OK


def _complain(error: Exception, trace: bool, note: str = "(--traceback shows where)") -> None:
  if trace:
    traceback.print_exception(error)
  print(f"error: {error}", file=sys.stderr)
  if not trace:
    print(note, file=sys.stderr)


# ---- the command line ----


def _define_flags() -> flags.FlagValues:
  # Not absl's global flags: those bring a page of logging flags that mean nothing here, and could
  # be parsed only once in a process.
  options = flags.FlagValues()
  flags.DEFINE_string(
    "config",
    None,
    "Config file, e.g. configs/quickstart.py: Python with a get_config().",
    flag_values=options,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics, samples and the report. A run that is "
    "started again in its workdir goes on where it stopped.",
    flag_values=options,
  )
  flags.DEFINE_boolean(
    "distributed",
    None,
    "Join the other hosts before any device is used. Without the flag: on a "
    "TPU slice of several hosts, or where JAX_COORDINATOR_ADDRESS is set. Also reads "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    flag_values=options,
  )
  flags.DEFINE_boolean(
    "compilation_cache",
    True,
    "On accelerators, keep compiled programs in the user's cache "
    "folder, or in JAX_COMPILATION_CACHE_DIR if that is set.",
    flag_values=options,
  )
  flags.DEFINE_boolean(
    "traceback", False, "Show the Python traceback of an error too.", flag_values=options
  )
  return options


def _help_page(options: flags.FlagValues) -> str:
  command = "python -m caprl_jax.main"
  lines = [
    "caprl_jax trains an image captioner by reinforcement: a language model that cannot see the",
    "image answers questions from the caption alone, and a caption earns what it gets right.",
    "",
    f"  {command} --config=FILE --workdir=DIR [--config.section.key=value ...]",
    "",
    "Modes (config.mode; several joined by commas run in a row, e.g. --config.mode=sft,train):",
  ]
  lines.append("")
  for name, mode in MODES.items():
    lines += [f"  {name:<10}{mode.line}", f"  {'':<10}{command} {mode.example}"]
  table = {
    "--config.section.key=...": "Change one value of the config, in the file or at its default; "
    "None empties it."
  }
  for name in sorted(options):
    table[f"--[no]{name}" if options[name].boolean else f"--{name}=..."] = options[name].help
  lines += ["", "Flags:", ""]
  for shown in sorted(table, key=lambda shown: (shown.startswith("--[no]"), shown)):
    first, *others = textwrap.wrap(table[shown], 70)
    lines += [f"  {shown:<26}{first}", *(f"  {'':<26}{line}" for line in others)]
  return "\n".join(lines)


def _parse(
  options: flags.FlagValues, argv: list[str]
) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """Parses the flags and applies the overrides. Makes the workdir."""
  options.set_gnu_getopt(True)  # flags may stand in any order
  try:
    rest = options(argv, known_only=True)[1:]
  except flags.Error as error:
    raise ValueError(f"{error} (--help lists the flags)") from error
  overrides = []
  for arg in rest:
    match = config_file.OVERRIDE.fullmatch(arg)
    if match:
      overrides.append(match)
    elif arg.startswith("-"):
      name = arg.lstrip("-").partition("=")[0]
      hint = configuration.did_you_mean(name, options)
      raise ValueError(
        f"unknown flag {arg}{hint} (flags: {', '.join(sorted(options))}; "
        "values of the config: --config.section.key=value)"
      )
    else:
      raise ValueError(
        f"unexpected argument {arg!r}; write --config=FILE --workdir=DIR and, for values of the "
        "config, --config.section.key=value with the equals sign"
      )
  if not options.config:
    raise ValueError(
      "--config is missing, e.g. --config=configs/quickstart.py (--help shows examples)"
    )
  config = config_file.load_config(options.config)
  config_file.apply_overrides(config, overrides, options.config, _schema)
  workdir = options.workdir or [*_modes(config).values()][0].workdir
  if not workdir:
    raise ValueError("--workdir is missing, e.g. --workdir=runs/quickstart (--help shows examples)")
  return config, _make_workdir(workdir)


def _schema() -> types.ModuleType:
  """What is known of keys that a config file leaves out: it takes a second, and most runs need none
  of it.

  absl writes while orbax is imported and, where the root logger has no handler, gives it one, which
  would say all our lines again.
  """
  quiet = logging.NullHandler()
  logging.root.addHandler(quiet)
  try:
    return importlib.import_module("caprl_jax.modes.sections")
  finally:
    logging.root.removeHandler(quiet)


def _modes(config: ml_collections.ConfigDict) -> dict[str, Mode]:
  listed = ", ".join(MODES)
  mode = config.get("mode")
  if not isinstance(mode, str) or not mode:
    raise ValueError(
      f"config.mode is {mode!r}; set it to one of {listed}, or to several joined by commas"
    )
  names = [name.strip() for name in mode.split(",")]
  for name in names:
    if name not in MODES:
      hint = configuration.did_you_mean(name, MODES)
      raise ValueError(f"config.mode {name!r} is not a mode{hint} (modes: {listed})")
  if len(set(names)) < len(names):
    raise ValueError(f"config.mode {mode!r} names a mode twice; name each once")
  return {name: MODES[name] for name in names}


# ---- the process ----


def _make_workdir(path: str) -> pathlib.Path:
  workdir = pathlib.Path(path).expanduser()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "log.txt", "a", encoding="utf-8"):
      pass  # a folder that exists may still not be ours to write in
  except OSError as error:
    raise ValueError(
      f"workdir {workdir} cannot be written: {error.strerror} ({error.filename}); "
      "choose another folder with --workdir"
    ) from error
  return workdir


def _start_distributed(asked: bool | None) -> int:
  """Joins the other hosts, where there are any, and returns this process's number among them.

  Comes before anything that uses a device.
  """
  hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
  several = "," in hosts or any(
    name in os.environ for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
  )
  if not (several if asked is None else asked):
    return 0
  import jax  # here and below: --help and a mistyped flag need not wait for it

  known = {}  # jax reads the address from the environment, but not these two
  for argument in ("num_processes", "process_id"):
    value = os.environ.get(f"JAX_{argument.upper()}")
    if value is not None:
      if not value.isdecimal():
        raise ValueError(f"JAX_{argument.upper()}={value!r} must be a whole number")
      known[argument] = int(value)
  try:
    jax.distributed.initialize(**known)
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"could not join the other hosts: {error} Off TPU slices, Slurm and MPI set "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; on one host leave out "
      "--distributed"
    ) from error
  return jax.process_index()


def _set_compilation_cache() -> None:
  """Keeps compiled programs between runs, for accelerators only.

  On some CPUs jaxlib 0.10 refuses its own cached programs on the very machine that wrote them, with
  a page of errors about machine features (github.com/jax-ml/jax/issues/38445).
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return  # jax reads it
  plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
  if not any(importlib.util.find_spec(plugin) for plugin in plugins):
    return  # decided without waking the backend, whose number of CPU devices a mode may still set
  import jax

  if (jax.config.jax_platforms or "").startswith("cpu") or jax.default_backend() == "cpu":
    return
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  jax.config.update("jax_compilation_cache_dir", str(cache / "caprl_jax" / "compiled"))


class _Terminal(logging.Handler):
  """Writes lines to stderr above a progress bar instead of through it."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
  def format(self, record: logging.LogRecord) -> str:
    line = super().format(record)
    if record.levelno < logging.WARNING:
      return line
    time, _, rest = line.partition(" ")
    return f"{time} {record.levelname.lower()}: {rest}"


@contextlib.contextmanager
def _logging_to(workdir: pathlib.Path, process: int):
  """Our lines from INFO on and everybody's warnings go to stderr; to a file, our DEBUG too.

  Of several processes the first speaks; the others' stderr has warnings only.
  """
  name = "log.txt" if process == 0 else f"log.{process}.txt"
  terminal = _Terminal(logging.INFO if process == 0 else logging.WARNING)
  terminal.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  file = logging.FileHandler(workdir / name, encoding="utf-8")
  file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
  ours = logging.getLogger("caprl_jax")
  level = ours.level
  ours.setLevel(logging.DEBUG)
  for handler in (terminal, file):
    logging.root.addHandler(handler)
  try:
    yield
  finally:
    ours.setLevel(level)
    for handler in (terminal, file):
      logging.root.removeHandler(handler)
    file.close()


if __name__ == "__main__":
  sys.exit(main(sys.argv))
