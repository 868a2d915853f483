"""Mode `demo`: a local page: an image is captioned, and the judge answers questions from the words
that stand there.

All shapes are fixed sizes, so that after the first caption and the first question of a size nothing
is compiled.
"""

import logging
import pathlib

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow, Question, read_image
from caprl_jax.harness.process.first import one_process_only
from caprl_jax.harness.sections import PolicySection
from caprl_jax.inference.captioner import CaptionerConfig, open_captioner
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import JudgeSection, check_text_judge
from caprl_jax.modes.demo.page import CSS, Demo, build
from caprl_jax.modes.demo.section import (
  PASSWORD,
  USER,
  DemoConfig,
  check_port,
  import_gradio,
  password_for,
)
from caprl_jax.modes.demo.text_judge import ServedJudge, TextJudge

log = logging.getLogger("caprl_jax.modes.demo.run")

WARM_UP = Question("What color is the shape?", ("red", "green", "blue"), 0)


def make_examples(
  source: str, count: int, folder: pathlib.Path, seed: int
) -> list[tuple[str, str, str]]:
  """Some rows as `build` wants them: each with one of its questions of most options. Their images
  are written to `folder`, which is what the page may show of this machine's files."""
  rows = read_qa_rows(source, seed)
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  examples = []
  for number, i in enumerate(rng.permutation(len(rows))[:count].tolist()):
    row: QARow = rows[i]
    most = max(len(q.options) for q in row.questions)
    question = row.questions[
      rng.choice([k for k, q in enumerate(row.questions) if len(q.options) == most])
    ]
    path = folder / f"{number}.png"
    read_image(row).save(path)
    lines = [
      ("* " if k == question.gold else "") + " ".join(option.split())
      for k, option in enumerate(question.options)
    ]
    examples.append((str(path), question.stem, "\n".join(lines)))
  return examples


def _open_judge(
  section: JudgeSection, cfg: DemoConfig, mesh: jax.sharding.Mesh, seed: int
) -> TextJudge | ServedJudge:
  if section.endpoint is not None:
    return ServedJudge(EndpointJudge.open(section.endpoint, section.each_once(), seed), section)
  with jax.set_mesh(mesh):
    return TextJudge(section.load(mesh), section, mesh, cfg.caption_tokens, seed)


def run(config, workdir: pathlib.Path) -> None:
  """Serves the page until it is interrupted."""
  cfg = configuration.load_section(config, "demo", DemoConfig)
  policy_section = configuration.load_section(config, "policy", PolicySection)
  section = configuration.load_section(config, "judge", JudgeSection)
  seed = config.get("seed", 0)
  check_text_judge(section)
  one_process_only("demo")
  password = password_for(cfg)
  gr = import_gradio()
  check_port(cfg)  # before the models, which take their time
  examples = (
    make_examples(cfg.examples, cfg.max_examples, workdir / "examples", seed)
    if cfg.examples
    else []
  )
  # One image at a time: several devices are of use only to a model that is split over them.
  mesh = (
    sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
    if config.get("mesh")
    else sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
  )
  sharding.check_batch_size(1, mesh, "the demo's batch")
  captioner_cfg = CaptionerConfig(
    policy_section.instruction, max_tokens=cfg.max_tokens, temperature=cfg.temperature, batch_size=1
  )
  judge = _open_judge(section, cfg, mesh, seed)
  with open_captioner(policy_section.load, captioner_cfg, mesh=mesh, seed=seed) as captioner:
    demo = Demo(captioner, judge, cfg.max_tokens)
    log.info("compiling ...")
    if isinstance(judge, TextJudge):
      judge("A shape.", WARM_UP)
    if examples:
      list(demo.caption(examples[0][0]))
    page = build(demo, examples)
    fonts = [
      gr.themes.Font(name)
      for name in ("Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    ]
    page.launch(
      server_name=cfg.host,
      server_port=cfg.port,
      share=cfg.share,
      auth=(USER, password) if password else None,
      quiet=True,
      prevent_thread_lock=True,
      show_error=True,
      inbrowser=False,
      ssr_mode=False,
      mcp_server=False,
      enable_monitoring=False,
      footer_links=[],
      max_file_size="64mb",
      allowed_paths=[str(workdir / "examples")] if examples else [],
      css=CSS,
      theme=gr.themes.Default(font=fonts, font_mono=[gr.themes.Font("monospace")]),
    )
    login = f" as {USER!r}, with the password of {PASSWORD}" if password else ""
    log.info("open http://%s:%d%s   (Ctrl-C ends it)", cfg.host, cfg.port, login)
    page.block_thread()
    demo.close()
