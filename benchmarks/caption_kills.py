"""50,000 small images through mode `caption`, killed with SIGKILL again and again: what is lost,
what is doubled?

  python benchmarks/caption_kills.py [--variants 10] [--kills 8] [--workdir runs/caption_kills]

Easy-VQA's 5,000 images, each in several variants (turned, mirrored, shifted, in other colours,
cropped), lie in WebDataset tars; the quickstart's captioner describes them. The process is killed
when it has done a random number of images and a random moment has passed; the same command goes on
each time. Then: is every image there exactly once, in order, and are the captions of a random
subset those of a run that nobody killed?
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import numpy as np
from PIL import Image, ImageChops, ImageOps

from caprl_jax.data.readers.easy_vqa import easy_vqa_root

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUBSET = 2000
BATCH_SIZE, MAX_TOKENS, SHARD_ROWS = 128, 16, 5000


def variant(image: Image.Image, number: int) -> Image.Image:
  """The picture turned, shifted, recoloured or cropped, as `number` says."""
  image = (lambda x: x, ImageOps.mirror, ImageOps.flip, lambda x: x.rotate(90))[number % 4](image)
  image = ImageChops.offset(image, 3 * (number // 4), number // 4)
  red, green, blue = image.split()
  image = Image.merge("RGB", (green, blue, red) if number % 3 == 2 else (red, green, blue))
  return image.crop((0, 0, 64, 48)) if number % 5 == 4 else image


def write_tars(folder: pathlib.Path, variants: int) -> dict[str, bytes]:
  """A tar a variant, and by name in order what is in them."""
  folder.mkdir(parents=True, exist_ok=True)
  files = sorted(easy_vqa_root().glob("t*/images/*.png"))
  written = {}
  for number in range(variants):
    path = folder / f"{number:03d}.tar"
    with tarfile.open(path, "w") as tar:
      for i, file in enumerate(files):
        data = io.BytesIO()
        with Image.open(file) as image:
          variant(image.convert("RGB"), number).save(data, "PNG", compress_level=1)
        member = tarfile.TarInfo(f"{i:05d}.png")
        member.size = len(data.getvalue())
        tar.addfile(member, io.BytesIO(data.getvalue()))
        written[f"{path.name}/{member.name}"] = data.getvalue()
  return written


def start(source: pathlib.Path, output: pathlib.Path) -> subprocess.Popen:
  command = [
    sys.executable,
    "-m",
    "caprl_jax.main",
    f"--config={ROOT / 'configs' / 'caption.py'}",
    f"--config.policy.checkpoint={ROOT / 'configs' / 'quickstart_policy'}",
    f"--config.caption.input={source}",
    f"--config.caption.output={output}",
    f"--config.caption.max_tokens={MAX_TOKENS}",
    f"--config.caption.batch_size={BATCH_SIZE}",
    f"--config.caption.shard_rows={SHARD_ROWS}",
    f"--workdir={output.parent / 'work'}",
  ]
  with open(output.parent / "stderr.txt", "a", encoding="utf-8") as file:
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def finish(process: subprocess.Popen, output: pathlib.Path) -> None:
  if process.wait():
    sys.exit(f"mode caption ended with {process.returncode}; see {output.parent / 'stderr.txt'}")


def rows_kept(output: pathlib.Path) -> int:
  parts = output.with_name(output.name + ".parts")
  return sum(path.read_bytes().count(b"\n") for path in parts.glob("*.jsonl*"))


def run_with_kills(source: pathlib.Path, output: pathlib.Path, count: int, kills: int, rng) -> None:
  """Kills the job at random numbers of images, and once while it loads."""
  for limit in [0, *sorted(rng.integers(1, int(0.97 * count), kills - 1))]:
    process = start(source, output)
    while limit and rows_kept(output) < limit and process.poll() is None:
      time.sleep(0.25)
    time.sleep(rng.uniform(0, 2))
    process.kill()
    process.wait()
    print(f"killed with {rows_kept(output):,} of {count:,} images kept", flush=True)
    if output.exists():
      sys.exit("it had ended before it was killed; take fewer kills or more images")
  finish(start(source, output), output)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variants", type=int, default=10)
  parser.add_argument("--kills", type=int, default=8)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/caption_kills"))
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  folder = args.workdir.resolve()
  output, plain = folder / "captions.jsonl", folder / "plain.jsonl"
  if any(folder.glob("*.jsonl*")):
    sys.exit(f"{folder} holds an earlier run; delete it or name another --workdir")
  written = write_tars(folder / "shards", args.variants)
  names = list(written)
  distinct = len({hashlib.sha256(data).digest() for data in written.values()})
  print(
    f"{len(names):,} images ({distinct:,} different files) in {args.variants} tars, "
    f"{os.cpu_count()} cores",
    flush=True,
  )

  began = time.monotonic()
  run_with_kills(folder / "shards", output, len(names), args.kills, rng)
  secs = time.monotonic() - began

  rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
  found = [row["image"] for row in rows]
  lost, doubled = len(set(names) - set(found)), len(found) - len(set(found))
  failed = sum("error" in row for row in rows)
  print(
    f"{len(rows):,} rows after {args.kills} kills: {lost} lost, {doubled} doubled, {failed} "
    f"failed, {'in order' if found == names else 'NOT IN ORDER'}"
  )

  subset = sorted(rng.choice(len(names), min(SUBSET, len(names)), replace=False))
  with tarfile.open(folder / "subset.tar", "w") as tar:
    for i in subset:
      member = tarfile.TarInfo(names[i])
      member.size = len(written[names[i]])
      tar.addfile(member, io.BytesIO(written[names[i]]))
  finish(start(folder / "subset.tar", plain), plain)
  again = [json.loads(line) for line in plain.read_text("utf-8").splitlines()]
  differ = sum(rows[i]["tokens"] != row["tokens"] for i, row in zip(subset, again, strict=True))
  print(f"{differ} of {len(subset):,} captions differ from those of a run that nobody killed")
  figures = json.loads((folder / "captions.stats.json").read_text("utf-8"))
  print(
    f"{figures['images_per_sec']:.0f} images per second while captioning, "
    f"{len(names) / secs:.0f} over all {secs:.0f} s with {args.kills} kills, {args.kills + 1} "
    f"starts; {figures['distinct_captions']} distinct captions"
  )
  sys.exit(bool(lost or doubled or failed or differ or found != names))


if __name__ == "__main__":
  main()
