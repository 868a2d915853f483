"""Flags -> jax.distributed -> the run of each mode."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator

import ml_collections
from absl import flags

import caprl_jax
from caprl_jax.config import loading, registry, schema
from caprl_jax.errors import BAD_INPUT, FAILED, INTERRUPTED, MEMORY_FULL, OK, RUN_AGAIN, code_of
from caprl_jax.harness.buckets import shared
from caprl_jax.harness.buckets.addresses import localise
from caprl_jax.harness.buckets.mirror import Mirror, mirrored, push_all
from caprl_jax.harness.process import peers, preemption, signals
from caprl_jax.harness.process.device_memory import what_is_full
from caprl_jax.harness.process.log_files import logging_to
from caprl_jax.json_files import cut, shown

# Named in full, because this module is `__main__` when it is run.
log = logging.getLogger("caprl_jax.main")


def main(argv: list[str]) -> int:
  """Runs the modes that the command line asks for and returns the exit code.

  Args:
    argv: the program's name, then its arguments.
  """
  options = _define_flags()
  show_traceback = "--traceback" in argv  # known before the flags are, for errors in the flags
  try:
    if any(arg in ("-h", "--help", "-help", "--helpfull", "--helpshort") for arg in argv[1:]):
      _print_help(options)
      return OK
    config, workdir, mirrors = _parse(options, argv)
    modes = registry.modes_of(config)
    process = _start_distributed(options.distributed)
    if peers.current():
      mirrors = shared.of_several(mirrors, [*modes], process)
    if options.compilation_cache:
      _set_compilation_cache()
    with mirrored(mirrors), logging_to(workdir, process):
      return _run(modes, config, workdir, show_traceback, mirrors)
  except ValueError as error:
    _complain(error, show_traceback)
    return BAD_INPUT
  except KeyboardInterrupt:
    print("interrupted before the run began", file=sys.stderr)
    return INTERRUPTED


def console() -> int:
  """`caprl_jax`, the command that the package installs: `main` with the command line."""
  return main(sys.argv)


def _print_help(options: flags.FlagValues) -> None:
  try:
    print(_help_page(options), flush=True)
  except BrokenPipeError:  # `| head` has read enough
    # or Python complains once more, when it flushes at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(
  modes: dict[str, registry.Mode],
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  trace: bool,
  mirrors: list[Mirror],
) -> int:
  """Runs the modes in a row. What ends one of them early is put into words here, once."""
  group = peers.current()
  for mirror in mirrors:
    if mirror.shared:
      shared.use(mirror, copies=True)
  try:
    log.debug("config: %s", schema.to_plain(config))
    # All of them first, so that what the last mode lacks shows before the first has run.
    modules = {name: importlib.import_module(mode.module) for name, mode in modes.items()}
    instead = group.told_exception if group else None
    with _whole_tracebacks(), signals.notices(instead=instead), preemption.watched():
      for i, (name, module) in enumerate(modules.items()):
        which = f" ({i + 1} of {len(modules)})" if len(modules) > 1 else ""
        log.info("caprl_jax %s, mode %s%s, in %s", caprl_jax.__version__, name, which, workdir)
        module.run(config, workdir)
      if group:
        for mirror in mirrors:
          mirror.push()  # while the others wait, who at their end would not for long
        group.finish()
  except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001  all of them are said
    error = group.cause_of(raised) if group else raised
    code = _say(error, workdir / "log.txt", trace)
    if group:
      push_all(mirrors)
      group.leave(group.stop_of(error))
    return code
  return OK


def _say(error: BaseException, log_file: pathlib.Path, trace: bool) -> int:
  """Puts into words what ended a run, after the mode has unwound, which is when it has written what
  it wants to keep. Returns the exit code."""
  code, note = code_of(error), f"(the traceback is in {log_file})"
  if code == RUN_AGAIN:
    said = f"stopped by {error}" if isinstance(error, signals.Preempted) else str(error)
    log.warning("%s; run the same command again, it goes on", said)
  elif code == INTERRUPTED:
    said = f": {error}" if error.args else ""  # of another process
    log.warning("interrupted%s; the last checkpoint is usable, run the same command to go on", said)
  elif code == FAILED and not isinstance(error, peers.PeerStopped):
    # not the user's doing: all of it, on the terminal and in the file
    message = "caprl_jax failed; this looks like a fault in it or in its installation"
    log.error(message, exc_info=error)
  else:
    log.debug("error: %s", error, exc_info=error)  # DEBUG goes to the file and not to the terminal
    if code == MEMORY_FULL and not isinstance(error, MemoryError):  # XLA's, at compile or run time
      error = MemoryError(what_is_full(error))
    _complain(error, trace, note=note)
  return code


@contextlib.contextmanager
def _whole_tracebacks() -> Iterator[None]:
  """jax leaves its own frames in tracebacks: whose fault an error is shows by where it was
  raised."""
  import jax  # here and below: --help and a mistyped flag need not wait for it

  before = getattr(jax.config, "jax_traceback_filtering")  # noqa: B009  not known to type checkers
  jax.config.update("jax_traceback_filtering", "off")
  try:
    yield
  finally:
    jax.config.update("jax_traceback_filtering", before)


def _complain(error: BaseException, trace: bool, note: str = "(--traceback shows where)") -> None:
  """Says on stderr what went wrong: its traceback where `trace` asks for it, else a note."""
  if trace:
    traceback.print_exception(error)
  message = str(error)
  if isinstance(error, OSError) and error.strerror:  # without its number
    place = f"{error.filename}: " if error.filename is not None else ""
    message = f"{place}{error.strerror}"
  elif isinstance(error, MemoryError) and not message.startswith("an accelerator's"):
    message = f"this machine's memory is full ({message or 'no more could be had'})"
  print(f"error: {message}", file=sys.stderr)
  if not trace:
    print(note, file=sys.stderr)


# ---- the command line ----


def _define_flags() -> flags.FlagValues:
  """The flags beside those of the config.

  Not absl's global ones: those bring a page of logging flags that mean nothing here, and could be
  parsed only once in a process.
  """
  options = flags.FlagValues()
  flags.DEFINE_string(
    "config",
    None,
    "Config file, e.g. configs/quickstart.py: Python with a get_config(); or caprl_jax:quickstart, "
    "one that comes with the package.",
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
  """What --help prints: every mode with an example, and the flags. Where no configs/ is at hand,
  the examples take the configs that come with the package."""
  cloned = pathlib.Path("configs/quickstart.py").is_file()
  command = "python -m caprl_jax.main" if cloned else "caprl_jax"
  lines = [
    "caprl_jax trains an image captioner by reinforcement: a language model that cannot see the",
    "image answers questions from the caption alone, and a caption earns what it gets right.",
    "",
    f"  {command} --config=FILE --workdir=DIR [--config.section.key=value ...]",
    "  (where the package is installed, the command caprl_jax is the same)"
    if cloned
    else "  (caprl_jax:NAME is a config that comes with the package; your own is a FILE.py)",
    "",
    "Modes (config.mode; several joined by commas run in a row, e.g. --config.mode=sft,train):",
  ]
  lines.append("")
  for name, mode in registry.MODES.items():
    example = mode.example
    if not cloned:
      example = re.sub(r"configs/(\w+)\.py", r"caprl_jax:\1", example)
    lines += [f"  {name:<10}{mode.line}", f"  {'':<10}{command} {example}"]
  table = {
    "--config.section.key=...": "Change one value of the config, in the file or at its default; "
    "None empties it."
  }
  for name in sorted(options):
    table[f"--[no]{name}" if options[name].boolean else f"--{name}=..."] = options[name].help
  lines += ["", "Flags:", ""]
  for flag in sorted(table, key=lambda flag: (flag.startswith("--[no]"), flag)):
    first, *others = textwrap.wrap(table[flag], 70)
    lines += [f"  {flag:<26}{first}", *(f"  {'':<26}{line}" for line in others)]
  return "\n".join(lines)


def _parse(
  options: flags.FlagValues, argv: list[str]
) -> tuple[ml_collections.ConfigDict, pathlib.Path, list[Mirror]]:
  """Parses the flags, applies the overrides, checks modes and sections, and makes the workdir; what
  lies in buckets has folders here.

  Raises ValueError for what cannot run, with the remedy.
  """
  options.set_gnu_getopt(True)  # flags may stand in any order
  try:
    rest = options(argv, known_only=True)[1:]
  except (flags.Error, ValueError) as error:
    raise ValueError(f"{cut(error, 300)} (--help lists the flags)") from error
  overrides = []
  for arg in rest:
    match = loading.OVERRIDE.fullmatch(arg)
    if match:
      overrides.append(match)
    elif arg.startswith("-"):
      name = arg.lstrip("-").partition("=")[0]
      hint = schema.did_you_mean(name, options)
      raise ValueError(
        f"unknown flag {cut(arg)}{hint} (flags: {', '.join(sorted(options))}; "
        "values of the config: --config.section.key=value)"
      )
    else:
      raise ValueError(
        f"unexpected argument {shown(arg)}; write --config=FILE --workdir=DIR and, for values of "
        "the config, --config.section.key=value with the equals sign"
      )
  if not options.config:
    raise ValueError(
      "--config is missing, e.g. --config=configs/quickstart.py (--help shows examples)"
    )
  config = loading.load_config(options.config)
  loading.apply_overrides(config, overrides, options.config)
  modes = registry.modes_of(config)
  registry.check_top_level(config)
  local = localise(config, options.workdir)
  workdir = local.workdir or next(iter(modes.values())).workdir
  if not workdir:
    raise ValueError("--workdir is missing, e.g. --workdir=runs/quickstart (--help shows examples)")
  return config, _make_workdir(workdir), local.mirrors


# ---- the process ----


def _make_workdir(path: str) -> pathlib.Path:
  try:
    workdir = pathlib.Path(path).expanduser()
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "log.txt", "a", encoding="utf-8"):
      pass  # a folder that exists may still not be ours to write in
  except (OSError, RuntimeError, ValueError) as error:  # ~nobody; a name with a null character
    reason = (
      f"{error.strerror} ({cut(error.filename, 300)})" if isinstance(error, OSError) else error
    )
    raise ValueError(
      f"workdir {cut(path, 300)} cannot be written: {reason}; choose another folder with --workdir"
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
  known = {}  # jax reads the address from the environment, but not these two
  for argument in ("num_processes", "process_id"):
    value = os.environ.get(f"JAX_{argument.upper()}")
    if value is not None:
      if not value.isdecimal():
        raise ValueError(f"JAX_{argument.upper()}={value!r} must be a whole number")
      known[argument] = int(value)
  try:
    return peers.join(known)
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"could not join the other hosts: {error} Off TPU slices, Slurm and MPI set "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; on one host leave out "
      "--distributed"
    ) from error


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

  if (getattr(jax.config, "jax_platforms", None) or "").startswith(
    "cpu"
  ) or jax.default_backend() == "cpu":
    return
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  jax.config.update("jax_compilation_cache_dir", str(cache / "caprl_jax" / "compiled"))


if __name__ == "__main__":
  sys.exit(console())
