"""A checkpoint's folder -> what a bad disk, or a kill, makes of it."""

import pathlib
import shutil


def _files(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in step.rglob("*") if path.is_file())


def _truncate(step: pathlib.Path) -> None:
  big = max(_files(step / "state"), key=lambda path: path.stat().st_size)
  big.write_bytes(big.read_bytes()[: big.stat().st_size // 2])


def _spoil(step: pathlib.Path) -> None:
  for path in _files(step / "state" / "d"):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


DAMAGES = {
  "everything but the folder is gone": lambda step: [path.unlink() for path in _files(step)],
  "the state is gone": lambda step: shutil.rmtree(step / "state"),
  "the position is gone": lambda step: shutil.rmtree(step / "data"),
  "the state's data are gone": lambda step: shutil.rmtree(step / "state" / "d"),
  "a file is cut": _truncate,
  "bytes are turned": _spoil,
  "the position is no JSON": lambda step: [path.write_text("{") for path in _files(step / "data")],
  "the metadata are cut": lambda step: [
    path.write_bytes(path.read_bytes()[:20]) for path in step.rglob("_METADATA")
  ],
  "a half-renamed folder": lambda step: [
    shutil.rmtree(step),
    (step / "state").mkdir(parents=True),
  ],
}
