"""A checkpoint -> a captioner that programs call with images."""

import dataclasses
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax

from caprl_jax import sharding
from caprl_jax.api.images import image_rows, is_one
from caprl_jax.api.results import Results
from caprl_jax.config.schema import did_you_mean
from caprl_jax.harness.sections import PolicySection
from caprl_jax.hub.int8 import Int8
from caprl_jax.hub.load import Loaded
from caprl_jax.inference import captioner as host
from caprl_jax.modes.caption.section import STYLES, instruction_of

# what `from_pretrained` and `with_settings` take besides the prompt
SETTINGS = tuple(
  field.name for field in dataclasses.fields(host.CaptionerConfig) if field.name != "instruction"
)


@dataclasses.dataclass(frozen=True)
class Caption:
  """A caption of an image.

  text: without the end token. tokens: the ids that were written, the end token among them.
  finish: "end" where it ended by itself, "length" where it was cut at `max_tokens`.
  image: the image's path, or its place among the images.
  error: why there is no caption; then the other fields are empty.
  """

  text: str
  finish: str
  tokens: list[int] = dataclasses.field(repr=False)
  image: str = ""
  error: str | None = None


class Captioner:
  """Writes captions of images; made by `from_pretrained`.

  Greedy captions are those that transformers' `generate` writes with the same checkpoint, prompt
  and images. Programs are compiled at the first call, and again for images of a shape that was not
  seen before.
  """

  def __init__(
    self, loaded: Loaded, prompt: str, *, mesh: jax.sharding.Mesh, seed: int = 0, **settings: Any
  ):
    """Of a model that is loaded already; arguments as of `from_pretrained`."""
    _check_settings(settings)
    self.loaded, self.mesh, self.seed = loaded, mesh, seed
    self.prompt, self.settings = prompt, settings
    cfg = host.CaptionerConfig(instruction_of(prompt, STYLES["detailed"]), **settings)
    sharding.check_batch_size(cfg.batch_size, mesh, "batch_size")
    self._captions_per_image = cfg.captions
    self._lock, self._next = threading.Lock(), 0
    with jax.set_mesh(mesh):
      self._captioner = host.Captioner(loaded, cfg, mesh=mesh, seed=seed)

  @classmethod
  def from_pretrained(
    cls,
    checkpoint: str,
    prompt: str = "detailed",
    *,
    dtype: str = "float32",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    int8: Int8 = "none",
    mesh: sharding.MeshConfig | None = None,
    seed: int = 0,
    **settings: Any,
  ) -> "Captioner":
    """Loads a captioner.

    Args:
      checkpoint: a folder (a run's workdir, or one of transformers') or a name on the hub.
      prompt: a style ("detailed", "medium", "short", "document") or any other text.
      dtype: of parameters and activations; "bfloat16" on accelerators.
      min_pixels, max_pixels: in place of the checkpoint's own limits on image size.
      int8: what is rounded, as `policy.int8` of a config: "weights", "cache" or "both".
      mesh: devices along each axis; None: all devices share the images.
      seed: of sampled captions.
      settings: captions (per image), max_tokens, temperature (0 is greedy), top_p, top_k,
        repetition_penalty, batch_size, system (a turn before the prompt); defaults as in
        `inference.captioner.CaptionerConfig`.

    Raises:
      ValueError: a checkpoint that cannot be loaded, or a setting that is none.
    """
    _check_settings(settings)  # before weights are read
    section = PolicySection(
      str(checkpoint),
      dtype=dtype,
      param_dtype=dtype,
      min_pixels=min_pixels,
      max_pixels=max_pixels,
      int8=int8,
    )
    made = sharding.make_mesh(mesh or sharding.MeshConfig(), jax.local_devices())
    with jax.set_mesh(made):
      loaded = section.load(made)
    return cls(loaded, prompt, mesh=made, seed=seed, **settings)

  def with_settings(self, prompt: str | None = None, **settings: Any) -> "Captioner":
    """The same model with another prompt or other settings; the weights are shared."""
    return Captioner(
      self.loaded,
      self.prompt if prompt is None else prompt,
      mesh=self.mesh,
      seed=settings.pop("seed", self.seed),
      **self.settings | settings,
    )

  def __call__(self, images: Any, *, on_error: Literal["raise", "keep"] = "raise") -> Any:
    """Captions images.

    Args:
      images: a path, a Pillow image, an encoded file's bytes or a uint8 array [height, width,
        channels]; or several of them.
      on_error: "keep" returns a Caption with `error` for an image that cannot be captioned.

    Returns:
      The Caption of one image; of several, Results of them in their order. With the setting
      `captions` above 1, Results of each image's captions in the place of each Caption.

    Raises:
      ValueError: what is no image, or, with `on_error` "raise", an image that cannot be captioned.
    """
    if on_error not in ("raise", "keep"):
      raise ValueError(f"on_error = {on_error!r} must be 'raise' or 'keep'")
    if is_one(images):
      (found,) = self._all([images], on_error)
      return found
    if not isinstance(images, Iterable):
      raise ValueError(
        f"images is of type {type(images).__name__}; give a path, a Pillow image, an array or a "
        "list of such"
      )
    return Results(self._all(list(images), on_error))

  def stream(self, image: Any) -> Iterator[str]:
    """Captions one image, and gives the text while it is written.

    Between two pieces the captioner is free: it can be called, and a stream that nobody goes on
    with holds up nothing. With the setting `batch_size` = 1 the pieces come soonest.

    Args:
      image: as of `__call__`, one of them.

    Returns:
      Pieces of some tokens each, of whole characters; joined they are the caption's text.

    Raises:
      ValueError: at once for what is no image and for several captions per image; with the first
        piece for an image that cannot be captioned.
    """
    if self._captions_per_image > 1:
      raise ValueError(
        f"captions = {self._captions_per_image}: one caption is streamed; use "
        "with_settings(captions=1)"
      )
    if not is_one(image):
      raise ValueError(
        f"image is of type {type(image).__name__}; give one path, Pillow image or array to stream"
      )
    (row,) = image_rows([image])
    with self._lock:
      number, self._next = self._next, self._next + 1
    return self._pieces(self._captioner.stream((number, row)))

  def _pieces(self, outputs: Iterator[host.CaptionerOutput]) -> Iterator[str]:
    given = 0
    while True:
      with self._lock, jax.set_mesh(self.mesh):
        output = next(outputs, None)
      if output is None:
        return
      if output.error is not None:
        raise output.error
      text = output.captions[0].text
      if len(text) > given:
        yield text[given:]
        given = len(text)

  def _all(self, images: list[Any], on_error: str) -> list[Any]:
    rows = image_rows(images)
    found: list[Any] = [None] * len(rows)
    with self._lock, jax.set_mesh(self.mesh):
      first, self._next = self._next, self._next + len(rows)
      for outputs in self._captioner((first + i, row) for i, row in enumerate(rows)):
        for output in outputs:
          if output.error is not None and on_error == "raise":
            raise output.error
          found[output.number - first] = self._captions(output)
    return found

  def _captions(self, output: host.CaptionerOutput) -> Any:
    image = output.row.name
    if output.error is not None:
      captions = [Caption("", "", [], image, str(output.error))]
    else:
      captions = [Caption(one.text, one.finish, one.tokens, image) for one in output.captions]
    return Results(captions) if self._captions_per_image > 1 else captions[0]

  def close(self) -> None:
    """Ends the threads that read images. A closed captioner cannot be called."""
    self._captioner.__exit__()

  def __enter__(self) -> "Captioner":
    return self

  def __exit__(self, *failure) -> None:
    self.close()


def _check_settings(settings: dict[str, Any]) -> None:
  for name in settings:
    if name not in SETTINGS:
      raise ValueError(
        f"{name!r} is no setting of a captioner{did_you_mean(name, SETTINGS)} (settings: prompt, "
        f"seed, {', '.join(SETTINGS)})"
      )
