"""Markup of the report: the page around it, tables, numbers as a reader wants them."""

import base64
import html
import io
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from caprl_jax.image_files import load_image
from caprl_jax.pages import curves

MAX_IMAGE_PIXELS = 448  # a side; larger pictures are embedded smaller, or the page grows too heavy
SHOWN_IMAGE_PIXELS = 192


def page(name: str, sections: Iterable[str]) -> str:
  """The whole document. It needs no network and runs no script."""
  # The policy in the head makes the browser refuse what escaping might have let through.
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "img-src data:; style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{text(name)} · caprl_jax</title><style>{_CSS}</style></head>\n<body><main>"
    f"<header><p class=eyebrow>caprl_jax</p><h1>{text(name)}</h1></header>"
    + "\n".join(section for section in sections if section)
    + "</main></body></html>\n"
  )


def card(label: str, value: str, note: str, kind: str = "") -> str:
  """One number of the headline; `value` and `note` are markup, `kind` is "" or "wide"."""
  return (
    f'<div class="card {kind}"><div class=label>{label}</div><div class=value>{value}</div>'
    f"<div class=soft>{note}</div></div>"
  )


def text(value: Any) -> str:
  """Anything -> markup that shows it. Captions are model output: nothing goes around this."""
  return html.escape(str(value), quote=True)


def number(value: Any) -> bool:
  """Whether `value` is a finite number."""
  return isinstance(value, (int, float)) and math.isfinite(value)


def percent(value: float) -> str:
  return f"{100 * value:.1f}%"


def show(value: Any, how: str = "number") -> str:
  """A number as markup; `how` is "number", "tenths" or "percent". None and NaN are a dash."""
  if not number(value):
    return "–" if value is None or isinstance(value, float) else text(value)
  if how == "percent":
    return percent(value)
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:,.1f}" if how == "tenths" else f"{value:,.2f}"


def arrow(before: Any, after: Any, how: str) -> str:
  """before → after, as markup."""
  shown = [
    show(value, how) if number(value) else "<span class=soft>not yet</span>"
    for value in (before, after)
  ]
  return ' <span class=soft aria-label="to">→</span> '.join(shown)


def delta(before: Any, after: Any, how: str) -> str:
  """The signed change; empty where one side is missing."""
  if not (number(before) and number(after)):
    return ""
  change = after - before
  if how == "percent":
    return f"{100 * change:+z.1f} points"
  # z: a fall that rounds to none is no -0.00
  return f"{change:+,}" if isinstance(change, int) else f"{change:+z,.2f}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
  """Heads and rows, all markup; the first column names the row."""
  body = "".join(
    f"<tr><th scope=row>{row[0]}</th>" + "".join(f"<td>{x}</td>" for x in row[1:]) + "</tr>"
    for row in rows
  )
  heads = "".join(f"<th scope=col>{name}</th>" for name in head)
  return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def picture(path: pathlib.Path, name: str) -> str:
  """A PNG file as an element that carries its data, small ones upscaled to hard pixels; a note
  where it is not there or damaged."""
  if not path.is_file():
    return '<div class="absent soft">image not there yet</div>'
  try:
    return embedded(path.read_bytes(), name)
  except (OSError, ValueError, SyntaxError):  # what Pillow raises of a damaged PNG
    return '<div class="absent soft">image cannot be read</div>'


def embedded(data: bytes, name: str) -> str:
  """An encoded image as an element that carries it, as `picture` does."""
  with load_image(data) as image:
    width, side, mime = image.width, max(image.size), f"image/{(image.format or '').lower()}"
    if side > MAX_IMAGE_PIXELS or mime not in ("image/png", "image/jpeg"):
      small, buffer = image.convert("RGB"), io.BytesIO()
      small.thumbnail((MAX_IMAGE_PIXELS, MAX_IMAGE_PIXELS))
      small.save(buffer, "JPEG", quality=85)
      data, mime = buffer.getvalue(), "image/jpeg"
  # Whole multiples keep the pixels of a small picture square.
  scale = SHOWN_IMAGE_PIXELS // side if side <= SHOWN_IMAGE_PIXELS else SHOWN_IMAGE_PIXELS / side
  pixelated = " class=pixelated" if scale > 1 else ""
  return (
    f'<img{pixelated} width={round(width * scale)} alt="{text(name)}" '
    f'src="data:{mime};base64,{base64.b64encode(data).decode()}">'
  )


LEGEND = (
  'An outlined option is the right one. <span class="answer right"><b>✓</b> right</span> '
  '<span class="answer wrong"><b>✗</b> wrong</span> '
  '<span class="answer none"><b>–</b> none</span>'
)

_CSS = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#1c1d21;--soft:#62656e;--line:#e3e1dc;--accent:#007a58;
--right:#0b6b3a;--right-bg:#dff3e6;--wrong:#a3242c;--wrong-bg:#fbe4e3;--none-bg:#eceae6;LIGHT}
@media(prefers-color-scheme:dark){:root{--paper:#131418;--card:#1c1e24;--ink:#eceef2;--soft:#a0a5b1;
--line:#343843;--accent:#3ecf9f;--right:#7fe0a8;--right-bg:#12382a;--wrong:#ff9d9a;
--wrong-bg:#45191c;--none-bg:#2b2e37;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
main{max-width:1120px;margin:auto;padding:28px 20px 80px}
h1{font-size:30px;line-height:1.15;margin:0 0 20px}h2{font-size:20px;margin:48px 0 6px}
h3{font-size:15px;margin:0}p{margin:0 0 12px}.soft,small{color:var(--soft)}small{font-size:12px}
.eyebrow{color:var(--accent);font-weight:600;margin:0}
.note{border-left:4px solid #d39200;background:var(--card);padding:10px 14px;border-radius:4px}
.headline{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:14px}
.card,.ladder,.curves figure,.sample{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:14px 16px;margin:0}
.wide{grid-column:1/-1}.label{color:var(--soft);font-size:13px}
.value{font-size:20px;font-weight:650;white-space:nowrap}
.wide .value{font-size:38px;line-height:1.2}
.wide>.soft{color:var(--accent);font-weight:600}
.ladder ul,.captions{list-style:none;margin:0;padding:0}figcaption{color:var(--soft);font-size:13px}
.ladder li{display:grid;grid-template-columns:auto 1fr 64px;gap:10px;align-items:center;
margin:7px 0}.ladder span:first-child{width:124px}
.ladder b{text-align:right;font-variant-numeric:tabular-nums}
.track{background:var(--none-bg);border-radius:4px;height:16px;overflow:hidden}
.track i{display:block;height:100%;background:var(--soft);opacity:.55}
.before i{background:var(--series-0);opacity:1}.after i{background:var(--accent);opacity:1}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin-top:8px}
th,td{text-align:right;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);font-weight:400}
th:first-child{text-align:left;min-width:110px}thead th{color:var(--soft);font-size:13px}
.side{display:flex;flex-wrap:wrap;gap:10px 60px;align-items:start}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:14px}
.curves svg{display:block;width:100%;margin:4px 0}.curves svg *{stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin:0 0 4px}
.curves .key{display:inline-block;width:28px;height:8px;fill:none;margin:0;vertical-align:middle}
.samples{display:grid;gap:14px;margin-top:10px}
.sample{display:grid;grid-template-columns:192px 1fr;gap:18px}
.picture img{display:block;max-width:100%;border-radius:4px;border:1px solid var(--line)}
.pixelated{image-rendering:pixelated}.file{font-size:12px;margin-top:4px}
.absent{border:1px dashed var(--line);border-radius:4px;padding:40px 10px;text-align:center}
.questions{margin:0 0 10px;padding-left:20px}.questions li{margin-bottom:5px}
.questions ::marker{color:var(--soft);font-size:12px}.stem{font-weight:600}
.option{display:inline-block;color:var(--soft);font-size:13px;padding:0 8px;margin:1px 0;
border:1.5px solid transparent;border-radius:20px}.gold{color:var(--ink);border-color:var(--ink)}
.captions li{display:grid;grid-template-columns:58px 1fr;gap:8px;border-top:1px solid var(--line);
padding:9px 0 4px}.who{color:var(--soft);font-size:13px;padding-top:2px}
.text{font:17px/1.4 Georgia,serif;margin:0 0 5px;white-space:pre-wrap;unicode-bidi:isolate}
.marks{font-size:13px;margin:0}.marks .soft{display:inline-block}
.answer{display:inline-block;border-radius:5px;padding:1px 8px;
margin:0 4px 4px 0;font-size:13px}.answer small{color:inherit}
.right{color:var(--right);background:var(--right-bg)}.wrong{color:var(--wrong);
background:var(--wrong-bg)}.none{color:var(--soft);background:var(--none-bg)}
summary{cursor:pointer;font-weight:600;padding:6px 0}
pre{white-space:pre-wrap;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:14px;font-size:13px;margin:4px 0}
@media(max-width:760px){.headline,.sample{grid-template-columns:1fr}main{padding:18px 14px 60px}
.cards{grid-template-columns:1fr 1fr}.card:nth-child(2){grid-column:1/-1}
.wide .value{font-size:30px}th,td{padding-right:9px}}
""".replace("LIGHT", curves.CSS_LIGHT).replace("DARK", curves.CSS_DARK)
