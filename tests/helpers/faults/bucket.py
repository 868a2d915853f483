"""A bucket in memory that answers to gs://, below etils.epath."""

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
  """As gcsfs: paths that it gives have no scheme and no leading slash. `writes` are the names of
  what was written, in order; `broken`, if set, is raised by whatever opens a file."""

  cachable = False  # each is another

  def __init__(self):
    super().__init__(global_store=False)
    self.writes, self.broken = [], None

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix("gs://"))

  def glob(self, path, **more):
    return [found.lstrip("/") for found in super().glob(path, **more)]

  def rename(self, *_, **__):
    raise AssertionError("a bucket has no renames")

  mv = rename

  def _open(self, path, mode="rb", **more):
    if self.broken:
      raise self.broken
    if mode != "rb":
      self.writes.append(path.lstrip("/"))
    return super()._open(path, mode, **more)


def install(monkeypatch) -> Bucket:
  """gs:// is this bucket until the test ends."""
  from etils.epath import backend

  bucket = Bucket()
  monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: bucket, raising=True)
  return bucket
