"""Workdir -> report.html, one self-contained page."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from caprl_jax.atomic_files import write_bytes
from caprl_jax.harness import metrics as metrics_lib
from caprl_jax.harness.training.summary import read_summary, summary_path
from caprl_jax.json_files import read_json, shown
from caprl_jax.pages import cards, curves
from caprl_jax.pages import markup as markup

MAX_STEP_FILES = 6  # of training samples, evenly spaced, with the first and the last


@dataclasses.dataclass
class _Run:
  """What a workdir holds; None and empty where the run has not come so far."""

  name: str
  samples_dir: pathlib.Path
  metrics: list[dict[str, Any]]
  summary: dict[str, Any]
  before: dict[str, Any] | None  # samples/before.json
  after: dict[str, Any] | None
  steps: list[dict[str, Any]]  # samples/step_*.json, some of them
  step_files: int  # how many there are
  missing: list[str]


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `workdir/report.html` from metrics.jsonl, summary.json and samples/, and returns it.

  The page needs no network and runs no script. A run in progress gives a page that says what is
  not there yet. The file appears as a whole or not at all.

  Raises:
    ValueError: the workdir is no folder, or one of its files cannot be read as what it should be.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ValueError(f"workdir {str(workdir)!r} is not a folder; give the folder that a run wrote")
  page = _page(_read_run(workdir))
  path = workdir / "report.html"
  # A caption may hold a lone surrogate, which no UTF-8 can: it becomes a reference.
  write_bytes(path, page.encode("utf-8", errors="xmlcharrefreplace"))
  return path


def _read_run(workdir: pathlib.Path) -> _Run:
  samples = workdir / "samples"
  step_paths = sorted(samples.glob("step_*.json"))
  count = min(len(step_paths), MAX_STEP_FILES)
  picked = [step_paths[round(i * (len(step_paths) - 1) / max(1, count - 1))] for i in range(count)]
  metrics_path = workdir / metrics_lib.FILE_NAME
  run = _Run(
    name=workdir.resolve().name,
    samples_dir=samples,
    metrics=metrics_lib.read_metrics(metrics_path) if metrics_path.exists() else [],
    summary=read_summary(path) if (path := summary_path(workdir)).exists() else {},
    before=_read_samples(samples / "before.json"),
    after=_read_samples(samples / "after.json"),
    steps=[samples for samples in map(_read_samples, picked) if samples],
    step_files=len(step_paths),
    missing=[],
  )
  there = {
    "the gate": "gate" in run.summary,  # which may have been skipped
    "the evaluation before training": run.summary.get("before"),
    "the captions before training": run.before,
    "the first training step": run.metrics,
    "the evaluation after training": run.summary.get("after"),
    "the captions after training": run.after,
  }
  run.missing = [what for what, found in there.items() if not found]
  return run


def _read_samples(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads and checks one file of samples, so that below here every key, type and index is right.

  Raises ValueError, with the path, for another file.
  """
  if not path.exists():
    return None
  samples = read_json(path, halves=True)  # captions and names may hold such
  try:
    _check(samples, {"step": int, "rows": list}, "the file")
    for i, row in enumerate(samples["rows"]):
      _check_row(row, f"rows[{i}]")
  except ValueError as error:
    raise ValueError(
      f"{path}: not samples as a run writes them ({error}); write the file again or delete it"
    ) from error
  return samples


_NUMBER = int | float | None
_ROW = {"name": str, "image": str, "row": int, "questions": list, "captions": list}
_QUESTION = {"stem": str, "options": list, "gold": int}
_CAPTION = {"text": str, "reward": _NUMBER, "answers": list}
_ANSWER = {"question": int, "choice": int, "valid": bool, "correct": bool}


def _check_row(row: Any, where: str) -> None:
  _check(row, _ROW, where)
  for i, question in enumerate(row["questions"]):
    _check(question, _QUESTION, f"{where}.questions[{i}]")
  for i, caption in enumerate(row["captions"]):
    _check(caption, _CAPTION, f"{where}.captions[{i}]")
    for j, answer in enumerate(caption["answers"]):
      at = f"{where}.captions[{i}].answers[{j}]"
      _check(answer, _ANSWER, at)
      if not 0 <= answer["question"] < len(row["questions"]):
        raise ValueError(f"{at}: question {answer['question']} of {len(row['questions'])}")
      options = row["questions"][answer["question"]]["options"]
      if not -1 <= answer["choice"] < len(options):
        raise ValueError(f"{at}: choice {answer['choice']} of {len(options)} options")


def _check(value: Any, kinds: dict[str, Any], where: str) -> None:
  """Raises ValueError unless `value` is an object with these keys, of these types."""
  if not isinstance(value, dict):
    raise ValueError(f"{where} is {shown(value)}, not an object")
  for key, kind in kinds.items():
    if key not in value:
      raise ValueError(f"{where}: {key} is missing")
    if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
      raise ValueError(f"{where}: {key} is {shown(value[key])}")


# ---- the page, from top to bottom


def _page(run: _Run) -> str:
  return markup.page(
    run.name,
    [
      _missing(run),
      _headline(run),
      _evaluation(run),
      _before_after(run),
      _curves(run),
      _groups(run),
      _funnel(run),
      _wall(run),
      _details(run),
    ],
  )


def _missing(run: _Run) -> str:
  if not run.missing:
    return ""
  return (
    f'<p class="note missing"><b>This run is not complete.</b> Not there yet: '
    f"{markup.text(', '.join(run.missing))}.</p>"
  )


def _headline(run: _Run) -> str:
  before, after = run.summary.get("before") or {}, run.summary.get("after") or {}
  secs = run.summary.get("wall_secs") or {}
  numbers = []
  if before or after:
    length = before.get("length_tokens"), after.get("length_tokens")
    judged = "accuracy" in {**before, **after}
    name, how = ("accuracy", "percent") if judged else ("reward", "number")
    title = "Questions answered from the caption alone" if judged else "Reward of held-out captions"
    pair = before.get(name), after.get(name)
    numbers.append(markup.card(title, markup.arrow(*pair, how), markup.delta(*pair, how), "wide"))
    numbers.append(markup.card("Caption length", markup.arrow(*length, "tenths"), "tokens"))
  if run.metrics:
    numbers.append(markup.card("Steps", f"{run.metrics[-1]['step']:,}", "last one written"))
  total = sum(secs.values())
  if "train" not in secs:
    total += sum(row.get("time/step_secs") or 0 for row in run.metrics)
  if total:
    note = "minutes so far" if run.missing else "minutes in all"
    numbers.append(markup.card("Wall time", f"{total / 60:,.1f}", note))
  return (
    f"<section class=headline><div class=cards>{''.join(numbers)}</div>{_ladder(run)}</section>"
    if numbers or run.summary
    else ""
  )


def _ladder(run: _Run) -> str:
  """The accuracies as bars between a caption that says nothing and an ideal one."""
  gate = run.summary.get("gate") or {}
  bars = [
    ("Empty caption", gate.get("empty"), "ref"),
    ("Generic caption", gate.get("generic"), "ref"),
    ("Before training", (run.summary.get("before") or {}).get("accuracy"), "before"),
    ("After training", (run.summary.get("after") or {}).get("accuracy"), "after"),
    ("Ideal caption", gate.get("ideal"), "ref"),
  ]
  rows = "".join(
    f'<li class={kind}><span>{label}</span><span class=track><i style="width:{100 * value:.1f}%">'
    f"</i></span><b>{markup.percent(value)}</b></li>"
    for label, value, kind in bars
    if markup.number(value)
  )
  if not rows:
    return ""
  about = ""
  if gate:
    about = "Grey: the gate, what captions that say nothing and ideal ones score with this judge"
    if markup.number(gate.get("questions")):
      about += f", on {gate['questions']:,} questions"
  return f"<figure class=ladder><ul>{rows}</ul><figcaption>{about}</figcaption></figure>"


def _evaluation(run: _Run) -> str:
  before, after = run.summary.get("before") or {}, run.summary.get("after") or {}
  names = list(dict.fromkeys([*before, *after]))
  if not names:
    return ""
  rows = []
  for name in names:
    how = "percent" if name.startswith(("accuracy", "flat_groups")) else "number"
    label = name.replace("accuracy/", "accuracy · ").replace("_", " ")
    cells = [markup.show(values.get(name), how) for values in (before, after)]
    cells.append(markup.delta(before.get(name), after.get(name), how))
    rows.append([markup.text(label), *cells])
  return (
    "<section><h2>Evaluation, before and after</h2>"
    + markup.table(["", "before", "after", "change"], rows)
    + "</section>"
  )


def _before_after(run: _Run) -> str:
  """The heart: what the captions of the same images became."""
  if not (run.before or run.after):
    return ""
  stages = {"before": run.before, "after": run.after}
  images = {}  # (row, name) -> [(stage, row of samples)]
  for stage, samples in stages.items():
    for row in samples["rows"] if samples else ():
      images.setdefault((row["row"], row["name"]), []).append((stage, row))
  signs = [_change(rows) for rows in images.values()]
  tally = ", ".join(
    f"{signs.count(sign)} {word}"
    for word, sign in (("better", 1), ("the same", 0), ("worse", -1))
    if signs.count(sign)
  )
  tally = f"Of {len(images)} images shown: {tally}. " if run.before and run.after else ""
  shown = "".join(
    _image_card(run, [(stage, caption, row) for stage, row in rows for caption in row["captions"]])
    for rows in images.values()
  )
  judged = any(row["questions"] for rows in images.values() for _, row in rows)
  about = f"The judge sees only the caption. {markup.LEGEND}" if judged else ""
  return (
    f"<section><h2>Captions, before and after</h2><p class=soft>{tally}{about}</p>"
    f"<div class=samples>{shown}</div></section>"
  )


def _change(rows: list[tuple[str, dict[str, Any]]]) -> int | None:
  """1, 0, -1 as the mean reward rose, stayed or fell; None where a stage has none."""
  means = {}
  for stage, row in rows:
    rewards = [c["reward"] for c in row["captions"] if markup.number(c["reward"])]
    if rewards:
      means[stage] = sum(rewards) / len(rewards)
  if len(means) < 2:
    return None
  return (means["after"] > means["before"]) - (means["after"] < means["before"])


def _groups(run: _Run) -> str:
  """Training samples: the siblings of an image, best first."""
  if not run.steps:
    return ""
  parts = []
  for samples in run.steps:
    shown = []
    for row in samples["rows"]:
      ranked = sorted(row["captions"], key=_rank, reverse=True)
      shown.append(_image_card(run, [(f"{i}.", c, row) for i, c in enumerate(ranked, 1)]))
    opened = " open" if samples is run.steps[-1] else ""
    parts.append(
      f"<details{opened}><summary>Step {samples['step']:,}</summary>"
      f"<div class=samples>{''.join(shown)}</div></details>"
    )
  note = (
    f" Shown are {len(run.steps)} of {run.step_files} files of samples."
    if len(run.steps) < run.step_files
    else ""
  )
  return (
    "<section><h2>Groups seen in training</h2><p class=soft>The captions of an image "
    "compete: above their mean reward reinforced (▲), below it discouraged (▼). "
    f"{markup.LEGEND}{note}</p>{''.join(parts)}</section>"
  )


def _rank(caption: dict[str, Any]) -> float:
  return caption["reward"] if markup.number(caption["reward"]) else -math.inf


def _image_card(run: _Run, captions: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
  """One image with its questions and captions: (label, caption, the row it stands in)."""
  if not captions:
    return ""
  row = captions[0][2]
  questions = []  # of all stages: normally the same ones
  for _, _, its_row in captions:
    questions.extend(q for q in its_row["questions"] if q not in questions)
  listed = cards.question_list(
    [cards.question(q["stem"], q["options"], q["gold"], kind=q.get("kind", "")) for q in questions]
  )
  written = "".join(
    _caption(label, caption, its_row, questions) for label, caption, its_row in captions
  )
  picture = markup.picture(run.samples_dir / row["image"], row["name"])
  return cards.image_card(picture, row["name"], f"{listed}<ul class=captions>{written}</ul>")


def _caption(label: str, caption: dict[str, Any], row: dict[str, Any], questions: list) -> str:
  reward, advantage = caption["reward"], caption.get("advantage")
  pill = f"reward {reward:.2f}" if markup.number(reward) else "unscored"
  if markup.number(advantage):
    pill += f" <span class=advantage>{'▲' if advantage > 0 else '▼' if advantage < 0 else '='} "
    pill += f"{advantage:+.2f}</span>"
  if markup.number(caption.get("length_tokens")):
    pill += f" · {caption['length_tokens']} tokens"
  text = cards.caption_text(caption["text"])
  asked = [row["questions"][answer["question"]] for answer in caption["answers"]]
  answers = "".join(
    _answer(questions.index(question) + 1, question, answer)
    for question, answer in zip(asked, caption["answers"])
  )
  return (
    f"<li><span class=who>{label}</span><div><p class=text>{text}</p>"
    f"<p class=marks>{answers}<span class=soft>{pill}</span></p></div></li>"
  )


def _answer(number: int, question: dict[str, Any], answer: dict[str, Any]) -> str:
  if not answer["valid"] or answer["choice"] < 0:
    return cards.answer("none", "no answer" if answer["valid"] else "not scored", number)
  word = question["options"][answer["choice"]]
  return cards.answer("right" if answer["correct"] else "wrong", word, number)


def _curves(run: _Run) -> str:
  drawn = curves.draw_curves(run.metrics)
  if not drawn:
    return ""
  figures = []
  for curve in drawn:
    legend = "".join(f"<span>{key} {markup.text(label)}</span>" for label, key in curve.legend)
    legend = f"<p class=legend>{legend}</p>" if legend else ""
    gaps = f" {curve.gaps} of {len(run.metrics)} steps have no finite number." if curve.gaps else ""
    figures.append(
      f"<figure><h3>{curve.panel.title}</h3>{curve.svg}{legend}"
      f"<figcaption>{curve.panel.about}{gaps}</figcaption></figure>"
    )
  return (
    "<section><h2>Training curves</h2><p class=soft>Faint: every step. Strong: smoothed.</p>"
    f"<div class=curves>{''.join(figures)}</div></section>"
  )


def _funnel(run: _Run) -> str:
  counts = run.summary.get("counts") or {}
  if not counts:
    return ""
  kinds = list(
    dict.fromkeys(
      name.split("/", 1)[1] for name in counts if name.startswith(("kept/", "dropped/"))
    )
  )
  rows = []
  for kind in kinds:
    kept, dropped = counts.get(f"kept/{kind}", 0), counts.get(f"dropped/{kind}", 0)
    share = kept / (kept + dropped) if kept + dropped else None
    rows.append(
      [markup.text(kind), markup.show(kept), markup.show(dropped), markup.show(share, "percent")]
    )
  others = [
    [markup.text(name.replace("_", " ")), markup.show(value)]
    for name, value in counts.items()
    if not name.startswith(("kept/", "dropped/"))
  ]
  return (
    "<section><h2>Questions kept and dropped</h2><div class=side>"
    + (markup.table(["kind", "kept", "dropped", "kept share"], rows) if rows else "")
    + (markup.table(["", "count"], others) if others else "")
    + "</div></section>"
  )


def _wall(run: _Run) -> str:
  secs = run.summary.get("wall_secs") or {}
  total = sum(secs.values())
  if not total:
    return ""
  rows = [
    [markup.text(stage), f"{value:,.1f}", markup.percent(value / total)]
    for stage, value in secs.items()
  ]
  rows.append(["all", f"{total:,.1f}", ""])
  return (
    "<section><h2>Wall time</h2>" + markup.table(["stage", "seconds", "share"], rows) + "</section>"
  )


def _details(run: _Run) -> str:
  parts = []
  for title, key in (("Config", "config"), ("Versions", "versions")):
    if key in run.summary:
      shown = markup.text(json.dumps(run.summary[key], indent=2, ensure_ascii=False))
      parts.append(f"<details><summary>{title}</summary><pre>{shown}</pre></details>")
  return f"<section><h2>How to repeat it</h2>{''.join(parts)}</section>" if parts else ""
