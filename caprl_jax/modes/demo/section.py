"""The section `demo`, and what the page needs: a port, gradio, a password where others reach it."""

import dataclasses
import os
import socket
from typing import Any

from caprl_jax.errors import UserError
from caprl_jax.json_files import shown

USER, PASSWORD = "caprl", "CAPRL_JAX_DEMO_PASSWORD"  # the name to log in with; a variable


@dataclasses.dataclass(frozen=True)
class DemoConfig:
  """The section `demo`.

  port, host: the page's address; 127.0.0.1 can be reached from this machine only. Others need the
    environment variable CAPRL_JAX_DEMO_PASSWORD, which the page then asks for.
  share: the page can be reached through gradio's servers, by anyone who has the link and that
    password.
  examples: a source of questions (`qa_sources.py`) whose images can be clicked; None: none.
  max_examples: images of `examples` that can be clicked.
  max_tokens: longest caption.
  temperature: of captions; 0 is greedy.
  caption_tokens: tokens that the judge reads of a caption, which people may make longer than the
    captioner did.
  """

  port: int = 7860
  host: str = "127.0.0.1"
  share: bool = False
  examples: str | None = None
  max_examples: int = 8
  max_tokens: int = 256
  temperature: float = 0.0
  caption_tokens: int = 512

  def __post_init__(self):
    if self.max_tokens < 1 or self.caption_tokens < self.max_tokens:
      raise ValueError(
        f"max_tokens = {self.max_tokens} must be at least 1, and caption_tokens = "
        f"{self.caption_tokens} at least as many"
      )
    if self.temperature < 0 or self.max_examples < 0:
      raise ValueError(
        f"temperature = {self.temperature} and max_examples = {self.max_examples} "
        "must be at least 0"
      )
    if not 0 < self.port < 65536:
      raise ValueError(f"port = {self.port} must be from 1 to 65535")


def password_for(cfg: DemoConfig) -> str | None:
  """What the page asks for, from the environment: a config would show it in logs. Raises UserError
  where others can reach the page and there is none."""
  password = os.environ.get(PASSWORD) or None
  if cfg.host in ("127.0.0.1", "::1", "localhost") and not cfg.share or password:
    return password
  reached = "share = True" if cfg.share else f"host = {shown(cfg.host)}"
  raise UserError(
    f"demo.{reached} lets others use this machine's models: set the environment variable "
    f"{PASSWORD}, which the page then asks for, or keep host = '127.0.0.1' and share = False"
  )


def check_port(cfg: DemoConfig) -> None:
  """Raises UserError where the page cannot be served at its address."""
  with socket.socket(socket.AF_INET6 if ":" in cfg.host else socket.AF_INET) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind((cfg.host, cfg.port))
    except OSError as error:
      raise UserError(
        f"cannot listen at {cfg.host}:{cfg.port}: {error.strerror}; choose another "
        "--config.demo.port"
      ) from error


def import_gradio() -> Any:
  """gradio, told to stay at home. Raises UserError where it is not installed."""
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
  try:
    import gradio
  except ImportError as error:
    raise UserError(
      f"mode demo needs gradio, which cannot be imported ({error}); pip install -e "
      "'.[demo]', or gradio by itself"
    ) from error
  if int(gradio.__version__.partition(".")[0]) < 6:
    raise UserError(
      f"mode demo needs gradio 6 or newer, not {gradio.__version__}; pip install -U gradio"
    )
  return gradio
