"""Captions -> a folder of tar files as WebDataset reads them: image, .txt and .json per sample."""

import io
import json
import os
import pathlib
import shutil
import tarfile

from caprl_jax.data.readers.jsonl import image_suffix
from caprl_jax.data.rows import image_bytes
from caprl_jax.modes.caption.columns import texts_of
from caprl_jax.modes.caption.formats.place import Place, Results, captioned

FILE_BYTES = 500 << 20


def write_webdataset(place: Place, found: Results) -> None:
  """Writes the folder, which appears whole or not at all. A sample's key is its row's number; its
  .txt has the captions of the first column, one a line, its .json the whole row.
  """
  temporary = place.path.with_name(f".{place.path.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    shards = _Shards(temporary)
    for item in captioned(place, found):
      data = image_bytes(item.source)
      try:
        suffix = image_suffix(data, item.source.name)
      except ValueError:  # a format that is read by its name alone
        suffix = pathlib.PurePath(item.row["image"]).suffix.lower() or ".bin"
      texts = texts_of(item.row, place.columns[0])
      if len(texts) > 1:
        texts = [" ".join(text.split()) for text in texts]
      row = json.dumps(item.row, ensure_ascii=True).encode()
      text = "\n".join(texts).encode("utf-8", "replace")
      shards.put(f"{item.number:09d}", {suffix: data, ".txt": text, ".json": row})
    shards.close()
    shutil.rmtree(place.path, ignore_errors=True)  # `check` has seen that it is ours
    os.rename(temporary, place.path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


class _Shards:
  """Tar files of `FILE_BYTES` or a little more each; at least one."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.count, self.bytes = folder, 0, 0
    self._tar: tarfile.TarFile | None = None

  def put(self, key: str, members: dict[str, bytes]) -> None:
    """Adds a sample: bytes by suffix."""
    tar = self._tar or self._open()
    for suffix, data in members.items():
      member = tarfile.TarInfo(key + suffix)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
      self.bytes += len(data)
    if self.bytes >= FILE_BYTES:
      self.close()

  def close(self) -> None:
    """Ends the file that is open; makes an empty one where nothing came."""
    tar = self._tar or (None if self.count else self._open())
    if tar is not None:
      tar.close()
    self._tar, self.bytes = None, 0

  def _open(self) -> tarfile.TarFile:
    self._tar = tarfile.open(  # noqa: SIM115  closed in `close`
      self.folder / f"{self.count:05d}.tar", "w"
    )
    self.count += 1
    return self._tar
