"""The workdir of a run of several processes, in a bucket: what the first one copies there, and what
all of them write and read there themselves.

What one process writes (metrics, samples, summary, models) the first process has on its disk, from
where it is copied (`mirror.py`). Checkpoints have a part of each process: Orbax writes them to the
bucket itself, in which one counts from the moment that its last file, `commit_success.txt`, is
there.
"""

import logging
import pathlib
from collections.abc import Collection

from etils import epath

from caprl_jax.errors import UserError
from caprl_jax.harness.buckets.mirror import Mirror, copy_file, listed
from caprl_jax.harness.process.leftovers import CHECKPOINTS

log = logging.getLogger("caprl_jax.harness.buckets.shared")

COMMITTED = "commit_success.txt"  # Orbax's
# Modes of which no process needs a file that another one has written, but checkpoints. The others
# share shards, stages or results in a folder.
MODES = ("train", "sft", "evaluate", "calibrate", "export")

# Of workdirs here: the folders in whose place they stand, and that have the checkpoints.
_shared: dict[pathlib.Path, Mirror] = {}
_copying: set[pathlib.Path] = set()  # those that this process copies


def of_several(mirrors: list[Mirror], modes: Collection[str], process: int) -> list[Mirror]:
  """What this process of several copies; from now on its checkpoints lie in the bucket.

  Raises:
    UserError: the modes need a folder that all processes see, or the bucket is none of Google's,
      the only ones that Orbax can write to in this way.
  """
  for mirror in mirrors:
    others = [mode for mode in modes if mode not in MODES]
    if others or not str(mirror.there).startswith("gs://"):
      of = f"of mode {', '.join(others)} " if others else "with another bucket than one in gs:// "
      raise UserError(
        f"{mirror.there}: several processes {of}need a folder that all of them see: mount the "
        "bucket (gcsfuse; launch/tpu_vm.sh does) and name a folder in it"
      )
    if not mirror.only:
      mirror.shared = True
      use(mirror, copies=process == 0)
  return mirrors if process == 0 else []


def use(mirror: Mirror, *, copies: bool) -> None:
  """Checkpoints below the mirror's folder lie in its bucket from now on. copies: this process
  copies the others of its files."""
  here = mirror.here.absolute()
  _shared[here] = mirror
  if copies:
    _copying.add(here)


def copy_now(workdir: pathlib.Path) -> None:
  """Copies what belongs before a checkpoint: the metrics of its steps. Does nothing where
  checkpoints are copied, too."""
  for here in _copying:
    if workdir.absolute().is_relative_to(here):
      try:
        _shared[here].push()
      except UserError as error:
        log.warning("%s", error)


def checkpoints_of(workdir: pathlib.Path) -> epath.Path:
  """Where the checkpoints of a run, or of a phase in its workdir, lie."""
  workdir = workdir.absolute()
  for here, mirror in _shared.items():
    if workdir.is_relative_to(here):
      return mirror.there / workdir.relative_to(here) / CHECKPOINTS
  return epath.Path(workdir / CHECKPOINTS)


def in_bucket(place: epath.Path) -> bool:
  """Whether that is no folder of this machine."""
  return "://" in str(place)


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the checkpoints of `workdir`, of which none is opened."""
  place = checkpoints_of(workdir)
  if not place.exists():
    return []
  steps = [path for path in place.iterdir() if path.name.isdecimal()]
  if in_bucket(place):  # where one counts when it is finished
    steps = [path for path in steps if (path / COMMITTED).exists()]
  return sorted(int(path.name) for path in steps)


def move(source: epath.Path, target: epath.Path) -> None:
  """Moves a folder within a bucket, which has no renames: file by file."""
  for name in listed(source):
    copy_file(source / name, target / name)
  source.rmtree()
