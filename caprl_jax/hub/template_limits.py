"""Chat template -> nothing, or an error where rendering it would take too long or too much memory.

A chat template is a program, from whoever made the checkpoint. Jinja's sandbox keeps it from files
and from Python's inside, but lets it run for ever, and multiply texts until memory is full.
"""

import functools
import json
import subprocess
import sys

from caprl_jax.json_files import cut

CPU_SECS = 3
MEMORY_BYTES = 1 << 30
TEXT_CHARACTERS = 1_000_000
_WALL_SECS = 120  # where the processor is others' most of the time

# Its own process, because what runs in C (10 ** (10 ** 10)) cannot be stopped from within. Only
# time and memory matter here: any other error comes again where the template is used.
_PROGRAM = """
import json, re, resource, sys
import jinja2.sandbox, jinja2.ext
template, cpu_secs, memory_bytes, characters = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (cpu_secs, cpu_secs))
resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

def fail(message):
  raise jinja2.TemplateError(message)

environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
  trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
environment.filters["tojson"] = lambda value, **_: json.dumps(value, default=str)
environment.globals["raise_exception"] = fail
environment.globals["strftime_now"] = lambda format: "now"
parts = [{"type": "image"}, {"type": "text", "text": "Describe."}]
talks = [[{"role": "user", "content": content}] for content in (parts, parts[1:], "Describe.")]
talks.append([{"role": "system", "content": "See."}, {"role": "user", "content": "What?"},
              {"role": "assistant", "content": "Noise."}, {"role": "user", "content": "Sure?"}])
try:
  compiled = environment.from_string(re.sub(r"{%-? *(end)?generation *-?%}", "", template))
  for talk in talks:
    try:
      text = compiled.render(messages=talk, add_generation_prompt=True)
    except MemoryError:
      raise
    except Exception:
      continue
    if len(text) > characters:
      sys.exit(4)
except MemoryError:
  sys.exit(3)
except Exception:
  pass
"""


def check_limits(template: str) -> None:
  """Renders a template once in a process of its own, within limits; the same one is not tried
  twice.

  Raises:
    ValueError: it took more than 3 seconds or 1 GiB, or wrote more than a million characters.
  """
  if what := _fault(template):
    raise ValueError(
      f"the checkpoint's chat template {what} for one question; take chat_template.jinja of the "
      "checkpoint that this one was made from"
    )


@functools.lru_cache(maxsize=64)
def _fault(template: str) -> str | None:
  task = json.dumps([template, CPU_SECS, MEMORY_BYTES, TEXT_CHARACTERS])
  try:
    done = subprocess.run(
      [sys.executable, "-P", "-c", _PROGRAM],
      input=task.encode(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      timeout=_WALL_SECS,
    )
  except subprocess.TimeoutExpired:
    code = -1
  except OSError as error:
    raise ValueError(f"the chat template cannot be tried: {cut(error, 200)}") from error
  else:
    code = done.returncode
  if code < 0:
    return f"does not end: it was stopped after {CPU_SECS} seconds"
  return {3: "needs more than 1 GiB", 4: "writes more than a million characters"}.get(code)
