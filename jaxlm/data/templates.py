"""Templates of chats: those known by name, and the Jinja that all of them run in.

The Jinja is as Hugging Face's `transformers` has it: published templates lean on its
options, filters and functions. A template by name says how a family of models writes
turns; tools and thoughts it does not know. The tokenizer should have its control
tokens: without them they are letters, which users can write too.
"""

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxlm import files
from jaxlm.errors import InputError, nearest

SUFFIX = ".jinja"

# What a template's own mistakes raise.
FAILURES = (
  jinja2.TemplateError,
  TypeError,
  ValueError,
  LookupError,
  AttributeError,
  ArithmeticError,
  RecursionError,
)

_CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
_HEADERS = """\
{{ bos_token }}
{%- for message in messages %}
{% set role = 'ipython' if message.role == 'tool' else message.role %}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}
{{- message.content | trim }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# These two have no turn of the system: its words begin the user's.
_SYSTEM_FIRST = """\
{{ bos_token }}
{%- set told = namespace(words='') %}
{% for message in messages %}
{% if message.role == 'tool' %}
{{ raise_exception('this template has no role tool') }}
{% elif message.role == 'system' %}
{% if loop.last or loop.nextitem.role != 'user' or not loop.first %}
{{ raise_exception('a system message must be the first, before one of the user') }}
{% endif %}
{% set told.words = message.content | trim ~ '\n\n' %}
{% elif message.role == 'user' %}
@USER@
{%- set told.words = '' %}
{% else %}
@ASSISTANT@
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
@REPLY@
{%- endif %}
"""
_TURNS = {
  "@USER@": (
    "{{ '<start_of_turn>user\n' ~ told.words ~ message.content | trim }}"
    "{{ '<end_of_turn>\n' }}"
  ),
  "@ASSISTANT@": (
    "{{ '<start_of_turn>model\n' ~ message.content | trim ~ '<end_of_turn>\n' }}"
  ),
  "@REPLY@": "{{ '<start_of_turn>model\n' }}",
}
_INSTRUCTIONS = {
  "@USER@": "{{ '[INST] ' ~ told.words ~ message.content | trim ~ ' [/INST]' }}",
  "@ASSISTANT@": "{{ ' ' ~ message.content | trim ~ eos_token }}",
  "@REPLY@": "",
}
# For any tokenizer: words alone, and eos behind a reply.
_PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{{ '\n\n' }}
{%- endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}
"""


def _filled(template: str, parts: dict[str, str]) -> str:
  return functools.reduce(
    lambda text, name: text.replace(name, parts[name]), parts, template
  )


BUILT_IN: dict[str, str] = {
  "chatml": _CHATML,
  "llama3": _HEADERS,
  "gemma": _filled(_SYSTEM_FIRST, _TURNS),
  "mistral": _filled(_SYSTEM_FIRST, _INSTRUCTIONS),
  "plain": _PLAIN,
}


def text_of(name: str) -> str:
  """Returns the template that a name of `BUILT_IN` or the path of a file stands for.

  Raises:
    InputError: neither; the message names the field `template`.
  """
  if name in BUILT_IN:
    return BUILT_IN[name]
  if name.endswith(SUFFIX):
    return files.read_text(files.find(name, "template")[0])
  raise InputError(
    f"template: {name!r} is neither {', '.join(BUILT_IN)} nor the path of a {SUFFIX} "
    f"file.{nearest(name, BUILT_IN)}"
  )


class _Generation(jinja2.ext.Extension):
  """Lets a template say what the model writes; that changes nothing in the text."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    """Returns what stands between the tags."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Returns JSON; Jinja's own filter would escape it for HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
  """Returns a template that can be rendered.

  Raises:
    jinja2.TemplateSyntaxError: it is not Jinja.
  """
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  environment.filters["tojson"] = _json
  environment.globals["raise_exception"] = _refuse
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
    form
  )
  return environment.from_string(template)


def line(error: BaseException) -> int:
  """Returns the line of the template that an error came from; 0: not known."""
  found, trace = 0, error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == "<template>":
      found = trace.tb_lineno
    trace = trace.tb_next
  return found
