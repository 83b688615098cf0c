"""Chats to text and ids by a model's own template, with nobody's words as commands.

Templates are Jinja as Hugging Face's `transformers` runs it: published templates lean
on its options, filters and functions. Control tokens come from the template alone. In
a message their texts are letters, so no user can end a turn or speak as the system.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
# What follows the messages: the beginning of the model's reply, or nothing.
Then = Literal["reply", "end"]

ROLES: tuple[str, ...] = get_args(Role)

# Letters that hardly any text has: candidates for what stands for others.
_PRIVATE = range(0xF0000, 0xFFFFE)
# What a template's own mistakes raise.
_FAILURES = (
  jinja2.TemplateError,
  TypeError,
  ValueError,
  LookupError,
  AttributeError,
  ArithmeticError,
  RecursionError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """One turn of a chat."""

  role: Role
  """Who speaks."""
  content: str
  """What is said."""

  def __post_init__(self):
    if self.role not in ROLES:
      raise InputError(f"message.role: {self.role!r}; it takes {', '.join(ROLES)}.")


def render(
  template: str,
  messages: Sequence[Message],
  *,
  then: Then = "reply",
  bos: str = "",
  eos: str = "",
  variables: Mapping[str, Any] | None = None,
) -> str:
  """Returns the text of a chat.

  Args:
    template: Jinja.
    messages: the turns so far.
    then: "reply" ends with what begins the model's turn (`add_generation_prompt`).
    bos: what the template writes as `bos_token`.
    eos: what the template writes as `eos_token`.
    variables: further names that the template knows, such as `enable_thinking`.

  Raises:
    InputError: the template is not Jinja, or refuses these messages.
  """
  roles = ", ".join(message.role for message in messages) or "none"
  try:
    return _compiled(template).render(
      {"tools": None, "documents": None}
      | {"bos_token": bos, "eos_token": eos, "add_generation_prompt": then == "reply"}
      | {"messages": [dataclasses.asdict(message) for message in messages]}
      | dict(variables or {})
    )
  except jinja2.TemplateSyntaxError as error:
    raise InputError(
      f"chat_template, line {error.lineno}: {error.message}. It must be a Jinja "
      "template."
    ) from error
  except _FAILURES as error:
    raise InputError(
      f"chat_template, line {_line(error)}: {error} (roles given: {roles})."
    ) from error


def encode_chat(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  *,
  then: Then = "reply",
  template: str | None = None,
  variables: Mapping[str, Any] | None = None,
) -> list[int]:
  """Returns the ids of a chat; the control tokens in it are the template's alone.

  Unless a message holds the text of one, the ids are those of the whole rendered text.
  bos is there where the template writes it.

  Args:
    tokenizer: whose control tokens and, unless given, template to use.
    messages: the turns so far.
    then: as in `render`.
    template: Jinja; None: `tokenizer.chat_template`.
    variables: as in `render`.

  Raises:
    InputError: there is no template, or what `render` raises.
  """
  template = tokenizer.chat_template if template is None else template
  if template is None:
    raise InputError(
      "chat_template: the tokenizer has none. Give template=..., or put "
      "chat_template.jinja into the tokenizer's folder."
    )
  given = dict(variables or {})
  said = [message.content for message in messages]
  masks = _Masks(tokenizer.specials, _texts([template, given, said]))
  hidden = [
    dataclasses.replace(message, content=masks.hide_turn(message.content))
    for message in messages
  ]
  text = render(
    template,
    hidden,
    then=then,
    bos=tokenizer.bos_token,
    eos=tokenizer.eos_token,
    variables=masks.hide_in(given),
  )
  return tokenizer.encode_parts(
    [
      part if isinstance(part, int) else masks.show(part)
      for part in split(text, tokenizer.specials)
    ]
  )


def split(text: str, specials: Mapping[str, int]) -> Iterator[str | int]:
  """Yields a text in parts: control tokens by their ids, the words between them."""
  longest_first = sorted(specials, key=len, reverse=True)
  pattern = "|".join(map(re.escape, longest_first))
  for part in re.split(f"({pattern})", text) if pattern else [text]:
    if part:
      yield specials.get(part, part)


class _Masks:
  """Stand-ins for letters of messages that would be, or help to make, a control token.

  A stand-in is a letter that occurs nowhere else; `show` puts the original back.
  """

  def __init__(self, specials: Iterable[str], others: Iterable[str]):
    self._specials = sorted(specials, key=len, reverse=True)
    self._whole = re.compile("|".join(map(re.escape, self._specials)) or "(?!)")
    self._begun = tuple({s[:n] for s in self._specials for n in range(1, len(s))})
    self._ended = tuple({s[n:] for s in self._specials for n in range(1, len(s))})
    used = set().union(*others)
    self._free = (letter for i in _PRIVATE if (letter := chr(i)) not in used)
    self._masks: dict[str, str] = {}

  def _mask(self, original: str) -> str:
    if original not in self._masks:
      self._masks[original] = next(self._free)
    return self._masks[original]

  def hide(self, text: str) -> str:
    """Returns a text that holds no control token."""
    return self._whole.sub(lambda found: self._mask(found[0]), text)

  def hide_in(self, value: Any) -> Any:
    """Returns a value with `hide` done to all texts in it."""
    if isinstance(value, str):
      return self.hide(value)
    if isinstance(value, Mapping):
      return {self.hide_in(key): self.hide_in(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [self.hide_in(item) for item in value]
    return value

  def hide_turn(self, content: str) -> str:
    """Returns a message that makes no control token with what stands beside it.

    The template may trim it, so its ends count without their spaces.
    """
    content = self.hide(content)
    bare = content.strip()
    if not bare:
      return content
    letters = list(content)
    start = content.index(bare)
    end = start + len(bare) - 1
    masked = set()
    if bare.startswith(self._ended) or any(bare in word for word in self._specials):
      masked.add(start)
    if bare.endswith(self._begun):
      masked.add(end)
    for at in masked:
      letters[at] = self._mask(letters[at])
    return "".join(letters)

  def show(self, text: str) -> str:
    """Returns a text with the originals in their places."""
    return text.translate({ord(mask): old for old, mask in self._masks.items()})


def _texts(value: Any) -> Iterator[str]:
  """Yields all texts in a value."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping | list | tuple):
    inside = value.items() if isinstance(value, Mapping) else value
    for item in inside:
      yield from _texts(item)


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
def _compiled(template: str) -> jinja2.Template:
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


def _line(error: BaseException) -> int:
  """Returns the line of the template that an error came from; 0: not known."""
  line, trace = 0, error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == "<template>":
      line = trace.tb_lineno
    trace = trace.tb_next
  return line
