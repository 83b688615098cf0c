"""Chats to text and ids by a template, with nobody's words as commands.

Control tokens come from the template alone. In
a message their texts are letters, so no user can end a turn or speak as the system.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jinja2

from jaxlm.data import templates
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
# What follows the messages: the beginning of the model's reply, or nothing.
Then = Literal["reply", "end"]

ROLES: tuple[str, ...] = get_args(Role)

# Letters that hardly any text has: candidates for what stands for others.
_PRIVATE = range(0xF0000, 0xFFFFE)


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
    return templates.compiled(template).render(
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
  except templates.FAILURES as error:
    raise InputError(
      f"chat_template, line {templates.line(error)}: {error} (roles given: {roles})."
    ) from error


class Turns(NamedTuple):
  """A chat's ids, and which of them a model is to learn to write."""

  ids: list[int]
  """The ids, [tokens]."""
  supervised: list[bool]
  """Whether each is to be written by the model, [tokens]."""


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
  chat = _Masked(tokenizer, messages, template, variables)
  text = chat.render(len(messages), then)
  return tokenizer.encode_parts(
    [
      part if isinstance(part, int) else chat.show(part)
      for part in split(text, tokenizer.specials)
    ]
  )


def encode_turns(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  *,
  supervised: Collection[Role] = ("assistant",),
  start: int = 0,
  template: str | None = None,
  variables: Mapping[str, Any] | None = None,
) -> Turns:
  """Returns the ids of a whole chat, and which of them belong to supervised messages.

  Of an assistant's message that is what the template writes after the beginning of its
  reply, the token that ends the turn included; of another message all that the template
  writes for it, and of the first one what stands before it too. Spaces behind the last
  control token of a message are not supervised. No token reaches over the border of
  what is supervised, as none does in a reply that a model writes; otherwise the ids are
  those of `encode_chat` with `then="end"`.

  Args:
    tokenizer: as in `encode_chat`.
    messages: the turns.
    supervised: the roles whose messages are supervised.
    start: messages before this one are not supervised.
    template: as in `encode_chat`.
    variables: as in `render`.

  Raises:
    InputError: what `encode_chat` raises; or the chat up to a supervised message, as
      the template writes it, is not how the whole chat begins.
  """
  chat = _Masked(tokenizer, messages, template, variables)
  whole = chat.render(len(messages), "end")
  pieces = list(_cut(whole, tokenizer.specials))
  spans = [
    _without_spaces(whole, pieces, chat.span(whole, number))
    for number, message in enumerate(messages)
    if number >= start and message.role in supervised
  ]
  parts: list[str | int] = []
  flags: list[bool] = []
  for first, stop, index in pieces:
    edges = {edge for span in spans for edge in span if first < edge < stop}
    borders = sorted({first, stop, *(edges if index is None else ())})
    for begin, end in itertools.pairwise(borders):
      parts.append(chat.show(whole[begin:end]) if index is None else index)
      flags.append(any(after < end <= until for after, until in spans))
  found = tokenizer.encode_each(parts)
  return Turns(
    list(itertools.chain.from_iterable(found)),
    [flag for ids, flag in zip(found, flags, strict=True) for _ in ids],
  )


def _without_spaces(
  whole: str, pieces: Sequence[tuple[int, int, int | None]], span: tuple[int, int]
) -> tuple[int, int]:
  """Returns a span of a text without the spaces behind its last control token."""
  first, stop = span
  for begin, end, index in reversed(pieces):
    if index is not None and first <= begin and end <= stop:
      return (first, stop if whole[end:stop].strip() else end)
  return span


def split(text: str, specials: Mapping[str, int]) -> Iterator[str | int]:
  """Yields a text in parts: control tokens by their ids, the words between them."""
  for first, stop, index in _cut(text, specials):
    yield text[first:stop] if index is None else index


def _cut(
  text: str, specials: Mapping[str, int]
) -> Iterator[tuple[int, int, int | None]]:
  """Yields first letter, stop and id of a text's parts; words have no id."""
  longest_first = sorted(specials, key=len, reverse=True)
  pattern = "|".join(map(re.escape, longest_first))
  stop = 0
  for part in re.split(f"({pattern})", text) if pattern else [text]:
    if part:
      first, stop = stop, stop + len(part)
      yield first, stop, specials.get(part)


class _Masked:
  """A chat whose messages make no control token, however much of it is rendered."""

  def __init__(
    self,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None,
    variables: Mapping[str, Any] | None,
  ):
    """Raises InputError where there is no template."""
    template = tokenizer.chat_template if template is None else template
    if template is None:
      raise InputError(
        "chat_template: the tokenizer has none. Give template=..., or put "
        "chat_template.jinja into the tokenizer's folder."
      )
    given = dict(variables or {})
    said = [message.content for message in messages]
    self._masks = _Masks(tokenizer.specials, _texts([template, given, said]))
    self._messages = [
      dataclasses.replace(message, content=self._masks.hide_turn(message.content))
      for message in messages
    ]
    self._render = functools.partial(
      render,
      template,
      bos=tokenizer.bos_token,
      eos=tokenizer.eos_token,
      variables=self._masks.hide_in(given),
    )

  def render(self, count: int, then: Then) -> str:
    """Returns the text of the first messages, with letters that stand for others."""
    return self._render(self._messages[:count], then=then)

  def show(self, text: str) -> str:
    """Returns a text with the originals in their places."""
    return self._masks.show(text)

  def span(self, whole: str, number: int) -> tuple[int, int]:
    """Returns the first letter and the stop of what is written for a message."""
    first = 0
    if self._messages[number].role == "assistant":
      first = self._prefix(whole, number, number, "reply")
    elif number:
      first = self._prefix(whole, number, number, "end")
    return first, max(first, self._prefix(whole, number, number + 1, "end"))

  def _prefix(self, whole: str, number: int, count: int, then: Then) -> int:
    """Returns the length of the text of the first messages; `whole` begins with it."""
    try:
      text = self.render(count, then)
    except InputError as error:
      raise InputError(
        f"messages.{number}: the template refuses the first {count} of "
        f"{len(self._messages)} messages: {error}"
      ) from error
    if whole.startswith(text):
      return len(text)
    pairs = enumerate(zip(whole, text, strict=False))
    same = next((at for at, (a, b) in pairs if a != b), min(len(whole), len(text)))
    raise InputError(
      f"messages.{number} ({self._messages[number].role}): the template rewrites "
      f"earlier turns: {self._masks.show(text[same:])[:40]!r} of the first "
      f"{count} messages, alone, is "
      f"{self._masks.show(whole[same:])[:40]!r} in the whole chat of "
      f"{len(self._messages)}. Split the chat so that its last reply alone is "
      "supervised, or give another template."
    )


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
