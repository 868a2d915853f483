"""Runs of several processes on loopback."""

import os
import socket
import subprocess
import sys

from helpers.paths import ROOT

CONFIG = """
import json, ml_collections
def get_config():
  return ml_collections.ConfigDict(json.loads({text!r}))
"""


def start(
  folder, workdir, processes, devices, *flags, program=("-m", "caprl_jax.main"), **variables
):
  """`main` with `folder`'s config.py, once a process, on loopback."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
    # Threads of XLA's pool. A device that waits for another in a collective holds one; with as many
    # as cores, two devices may wait in different collectives, and nobody is left to serve either.
    "NPROC": "8",
  }
  environment |= variables
  command = [
    sys.executable,
    *program,
    f"--config={folder / 'config.py'}",
    f"--workdir={workdir}",
    *flags,
  ]
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{probe.getsockname()[1]}"
    environment["JAX_NUM_PROCESSES"] = str(processes)
    command.append("--distributed")
  workdir.mkdir(exist_ok=True)
  started = []
  for number in range(processes):
    with open(workdir.with_name(f"{workdir.name}_stderr_{number}.txt"), "w") as file:
      started.append(
        subprocess.Popen(
          command,
          cwd=ROOT,
          env=environment | {"JAX_PROCESS_ID": str(number)},
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=file,
        )
      )
  return started


def wait(started, workdir, *codes, secs=240):
  """Waits for the ends, asserts their exit codes (0; one for all, or one each) and returns what
  each process said."""
  wanted = list(codes or (0,))
  wanted = wanted * len(started) if len(wanted) == 1 else wanted
  try:
    found = [process.wait(timeout=secs) for process in started]
  finally:
    for process in started:
      process.kill()
  said = [
    path.read_text()[-3000:] for path in sorted(workdir.parent.glob(f"{workdir.name}_stderr_*"))
  ]
  assert found == wanted, "\n\n".join([str(found), *said])
  return said
