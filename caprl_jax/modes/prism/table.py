"""Prism's figures -> text, as the log has them."""

from collections.abc import Callable, Mapping
from typing import Any

from caprl_jax.modes.prism.evaluation import BLIND


def difference_text(versus: Mapping[str, float]) -> str:
  """A paired difference with its interval, in percent, and how likely chance makes one as large."""
  p = f"p = {versus['p']:.3f}" if versus["p"] >= 0.001 else "p < 0.001"
  return (
    f"{100 * versus['mean']:+.1f} [{100 * versus['low']:+.1f}, {100 * versus['high']:+.1f}], {p}"
  )


def official_text(one: Mapping[str, Any], share: Callable[[float | None], str]) -> str:
  """The released scorer's mean and best."""
  return (
    f"{share(one['official']['mean'])} / {share(one['official']['best'])}"
    if "official" in one
    else share(None)
  )


def table_text(figures: Mapping[str, Any]) -> str:
  """The figures, in percent but for words, tokens and what 100 words gain."""
  lines = [
    f"{'benchmark':<14}{'captioner':<18}{'mean':>6}  "
    f"{'interval':<13}{'best':>6}{'official':>13}{'blind':>7}"
    f"{'misled':>8}{'CaptionQA':>11}{'words':>7}{'tokens':>8}{'per 100 words':>15}"
    "   against the first"
  ]
  share = lambda value: "-" if value is None else f"{100 * value:.1f}"
  for benchmark, entry in figures["benchmarks"].items():
    for who, one in entry["captioners"].items():
      low, high = one["interval"]
      versus = one.get("difference")
      difference = f"   {difference_text(versus)}" if versus else ""
      lines.append(
        f"{benchmark[:13]:<14}{who[:17]:<18}{share(one['mean']):>6}  "
        f"{f'[{share(low)}, {share(high)}]':<13}"
        f"{share(one['best']):>6}{official_text(one, share):>13}"
        f"{share(entry.get(BLIND, {}).get('ours')):>7}{share(one['misled']):>8}"
        f"{share(one.get('captionqa')):>11}{one['length_words']:>7.1f}{one['length_tokens']:>8.1f}"
        f"{share(per_100_words(one).get('value')):>15}{difference}"
      )
  if len(figures["benchmarks"]) > 1:
    lines += [
      f"{'average':<14}{who[:17]:<18}{share(one['mean']):>6}  "
      f"{'':<13}{share(one['best']):>6}"
      f"{official_text(one, share):>13}{'':>26}{one['length_words']:>7.1f}"
      f"{one['length_tokens']:>8.1f}"
      for who, one in figures["average"].items()
    ]
  lines += _told_lines(figures, share)
  lines += [left_out_text(name, entry) for name, entry in figures["benchmarks"].items()]
  return "\n".join(filter(None, lines))


def per_100_words(one: Mapping[str, Any]) -> Mapping[str, Any]:
  """What 100 words of a captioner gain over no caption, in shares of questions; where no caption
  was not asked about, all that is answered right. Empty for captions without words."""
  return one.get("gain_per_100_words") or one.get("accuracy_per_100_words") or {}


def _told_lines(figures: Mapping[str, Any], share: Callable[[float | None], str]) -> list[str]:
  """Facts told and false statements, where facts are known."""
  return [
    f"{benchmark[:13]:<14}{who[:17]:<18}tells {share(one['facts']['told'])}% of the known facts, "
    f"says something false in {share(one['facts']['false'])}% of its captions"
    for benchmark, entry in figures["benchmarks"].items()
    for who, one in entry["captioners"].items()
    if "facts" in one
  ]


def left_out_text(benchmark: str, entry: Mapping[str, Any]) -> str:
  """How many questions a benchmark's figures leave out; empty for none."""
  left_out, failed = entry.get("left_out", 0), entry.get("failed", 0)
  of = f"of {entry['questions'] + left_out + failed} questions"
  said = [f"{left_out} {of} cannot be used and are left out"] if left_out else []
  said += [f"an answer to {failed} {of} failed, which are left out for all"] if failed else []
  return f"{benchmark}: {'; '.join(said)}" if said else ""
