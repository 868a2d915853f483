"""Changes to what is a program: config files, flags, chat templates."""

import random
import re

LITERALS = (
  "None",
  "True",
  "-1",
  "0",
  "1",
  "0.5",
  "10**30",
  "1e400",
  "float('nan')",
  "float('-inf')",
  "''",
  "'x'",
  "'x' * 100_000",
  "'\\x00'",
  "'\\ud800'",
  "b'x'",
  "()",
  "(1, 'a')",
  "[]",
  "[[]]",
  "{}",
  "{'a': {'b': 1}}",
  "{1: 2}",
  "set()",
  "object()",
  "lambda: 0",
  "print",
  "range(3)",
  "(x for x in 'ab')",
  "__import__('numpy').ones(3)",
  "__import__('numpy').float32(0.5)",
  "__import__('pathlib').Path('x')",
  "__import__('ml_collections').FieldReference(3)",
  "__import__('ml_collections').config_dict.placeholder(int)",
  "__import__('ml_collections').config_dict.required_placeholder(str)",
  "__import__('ml_collections').ConfigDict()",
  "config",
  "...",
  "1j",
)
LINES = (
  "raise ValueError('odd')",
  "raise ValueError('x' * 100_000)",
  "raise KeyError('odd')",
  "raise SystemExit('stop')",
  "import sys; sys.exit(0)",
  "exit()",
  "import no_such_package",
  "from caprl_jax import no_such_name",
  "1 / 0",
  "assert False",
  "def f(): return f()\n  f()",
  "open('/no/such/file')",
  "config.nosuchsection = dict(a=1)",
  "config.train.nosuchkey = 1",
  "config.lock()",
  "config = None",
  "config = dict(config)",
  "del config.mode",
  "return",
  "yield 1",
  "config.mode = 'train,train'",
  "config.mode = 'x' * 5000",
  "config.preset = 'odd'",
  "config.preset = 'x' * 5000",
  "config.seed = 'a'",
  "config.seed = -1",
  "config[1] = 2",
  "config['a.b'] = 2",
  "config.self = config",
  "config.update({'a': object()})",
  "    unexpected indent",
  "print('\x00')",
  "ü = '\udcff'",
  "'''",
  "(" * 300,
)
_LITERAL = re.compile(
  r"(?<==)\s*('[^'\n]*'|\"[^\"\n]*\"|-?\d[\d.e_-]*|True|False|None|\(\))(?=[,)\n])"
)


def config_file(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """A config file with another literal, or another line."""
  text = data.decode("utf-8", "replace")
  lines = text.split("\n")
  inside = [i for i, line in enumerate(lines) if re.match(r"  (config\.|return)", line)] or [0]
  way = rng.choice(("literal",) * 4 + ("line", "line", "drop", "double", "name"))
  at = rng.choice(inside)
  if way == "literal" and (found := list(_LITERAL.finditer(text))):
    match, new = rng.choice(found), rng.choice(LITERALS)
    text = f"{text[: match.start(1)]}{new}{text[match.end(1) :]}"
    return _encoded(text), f"{match[1][:30]} -> {new}"
  if way == "name" and (words := sorted(set(re.findall(r"\b[a-z_]{4,}(?==)", text)))):
    word = rng.choice(words)
    new = rng.choice((word[:-1], word + "_", "x" * 3000, "update", "keys", "items"))
    return _encoded(re.sub(rf"\b{word}(?==)", new, text)), f"{word} -> {new[:30]}"
  line = rng.choice(LINES)
  changed = {"line": [f"  {line}", lines[at]], "double": [lines[at]] * 2}.get(way, [])
  lines[at : at + 1] = changed
  done = f"line {line[:40]!r}" if way == "line" else f"line {at + 1} {way}"
  return _encoded("\n".join(lines)), done


def _encoded(text: str) -> bytes:
  return text.encode("utf-8", "surrogateescape" if "\udcff" in text else "surrogatepass")


# ---- the command line ----

TEXTS = (
  "",
  " ",
  "None",
  "true",
  "nan",
  "inf",
  "-1",
  "0",
  "1e400",
  "1e-400",
  "9" * 5000,
  "10**9",
  "0x10",
  "1_000",
  "١٢",
  "½",
  "(",
  "(" * 5000,
  "[" * 100_000,
  "-" * 100_000 + "1",
  "~" * 3000 + "1",
  "()",
  "(1,)",
  "[1, 'a', None]",
  "[[]]",
  "{}",
  "{'a': 1}",
  "{[]: 1}",
  "{1, 2}",
  "__import__('os')",
  "'",
  "a=b",
  "a,b",
  "a=b,a=c",
  "x" * 100_000,
  "\x00",
  "\n",
  "a\nb",
  "\udcff",
  "😀",
  "%s{}",
  "..",
  "/",
  "/dev/null",
  "~nobody",
  "a" * 300,
  "0.5*a + b",
  "nan*a + 1*b",
  "1e400*a",
  " + ",
  "1 if 2 else 3",
  "f'{1}'",
  "b'x'",
  "1j",
  "...",
  "lambda: 1",
  "tfds:",
  "charts:train:99999999999999999999",
  "easy_vqa:nowhere",
  "hf:a",
)
FLAGS = (
  "--",
  "-",
  "--config",
  "--workdir",
  "--config.",
  "--config.=1",
  "--config..=1",
  "--config.a.b.c.d.e=1",
  "--noconfig.train.steps",
  "--config.train",
  "--config.train=1",
  "--config.train.steps.x=1",
  "--config.mode",
  "--config.mode=sft,train",
  "--config.mode=all",
  "--nohelp",
  "--nodistributed=1",
  "--compilation_cache=maybe",
  "--traceback=",
  "--flagfile=/etc/hostname",
  "--flagfile=/no/such/file",
  "--undefok=x",
  "positional",
  "-v",
  "--v=9",
  "--" + "x" * 100_000,
  "--config." + "x" * 100_000 + "=1",
  "--config." + "a." * 3000 + "b=1",
  "--config.preset=grpo,dapo",
  "--config.preset=",
  "--config.optimizer.__class__=1",
  "--config.train.__dict__.x=1",
  "--config.update.x=1",
  "--config.\x00=1",
  "--config.\udcff=1",
  "--ünï=1",
)


def flags(arguments: tuple[str, ...], rng: random.Random, keys: list[str]) -> tuple[str, ...]:
  """Arguments with one more, one less, or one of another value."""
  out = list(arguments)
  way = rng.choice(("key",) * 5 + ("flag", "flag", "drop", "value", "value"))
  if way == "key" or not out:
    out.append(f"--config.{rng.choice(keys)}={rng.choice(TEXTS)}")
  elif way == "flag":
    out.insert(rng.randrange(len(out) + 1), rng.choice(FLAGS))
  elif way == "drop":
    del out[rng.randrange(len(out))]
  else:
    at = rng.randrange(len(out))
    out[at] = f"{out[at].partition('=')[0]}={rng.choice(TEXTS)}"
  return tuple(out)


# ---- chat templates ----

PIECES = (
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
  "{% for i in range(10**9) %}{% endfor %}",
  "{% for a in 'x' * 99 %}{% for b in 'x' * 99 %}{% for c in 'x' * 99 %}{% for d in 'x' * 99 %}"
  "{% for e in 'x' * 99 %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
  "{{ 'a' * 10**11 }}",
  "{{ ('a' * 5 * 10**9) | length }}",
  "{{ [1] * 10**11 }}",
  "{{ 10 ** (10 ** 10) }}",
  "{{ '%99999999999d' | format(1) }}",
  "{{ 'x' | center(10**11) }}",
  "{{ 'x' | indent(10**11, true) }}",
  "{{ lipsum(n=10**7) }}",
  "{{ strftime_now('%Y' * 10**10) }}",
  "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
  "{% endfor %}{{ ns.s }}",
  "{{ messages.__class__.__mro__ }}",
  "{{ ''.__class__.__base__.__subclasses__() }}",
  "{{ messages | attr('__class__') }}",
  "{{ cycler.__init__.__globals__ }}",
  "{{ self.__init__.__globals__.__builtins__ }}",
  "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
  "{{ messages.append(1) }}",
  "{{ messages.clear() }}",
  "{% set x = messages.pop() %}",
  "{{ raise_exception('no') }}",
  "{{ raise_exception('x' * 10**5) }}",
  "{{ raise_exception() }}",
  "{% include 'x' %}",
  "{% extends 'x' %}",
  "{% import 'x' as y %}",
  "{{ nosuch.name }}",
  "{{ nosuch() }}",
  "{{ messages[99] }}",
  "{{ messages[0].nosuch.more }}",
  "{{ messages | nosuchfilter }}",
  "{% nosuchtag %}",
  "{% break %}",
  "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
  "{{ 1 / 0 }}",
  "{{ messages + 1 }}",
  "{{ messages | tojson }}",
  "{{ '\\ud800' }}",
  "{{ '\x00' }}",
  "<|vision_start|><|image_pad|><|vision_end|>",
  "<|image_pad|>",
  "<|im_end|>",
  "{% generation %}x{% endgeneration %}",
  "{#",
  "{{",
  "{%",
  "}}",
  "{% endfor %}",
  "{% raw %}",
  "{{ 'x' * 300000 }}",
  "{{ messages | map(attribute='content') | list }}",
  "{{ dict(a=1) | dictsort(by='nosuch') }}",
  "(" * 2000,
  "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
  "{{ " + "1+" * 30_000 + "1 }}",
  "{% if 1 %}" * 300 + "{% endif %}" * 300,
)


def template(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """A chat template with a piece more, or one of its tags gone, doubled or moved."""
  text = data.decode("utf-8", "replace")
  parts = re.split(r"(\{[{%#].*?[}%#]\})", text, flags=re.DOTALL)
  way = rng.choice(("piece",) * 4 + ("drop", "double", "swap", "only"))
  at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
  piece = rng.choice(PIECES)
  if way == "piece":
    parts.insert(at, piece)
  elif way == "only":
    parts = [piece]
  elif way == "drop":
    del parts[at]
  elif way == "double":
    parts.insert(at, parts[at])
  else:
    parts[at], parts[other] = parts[other], parts[at]
  what = piece if way in ("piece", "only") else "".join(parts[at : at + 1])
  return "".join(parts).encode("utf-8", "surrogatepass"), f"{way} {what[:60]}"
