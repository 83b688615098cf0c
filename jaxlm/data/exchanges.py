"""Rows of conversations in every known shape, as prompts and completions.

These shapes are known; further keys of a row do not matter, but for those that would
change the chat (`tools`, `system`).

  {"messages": [{"role": "user", "content": "..."}, ...]}
  {"conversations": [{"from": "human", "value": "..."}, ...]}
  {"prompt": ..., "completion": ...}
  {"prompt": ..., "chosen": ..., "rejected": ..., "margin": 1.5}
  {"prompt": ..., "completion": ..., "label": true}
  {"prompt": "...", "completions": ["...", ...], "labels": [true, ...]}

Where `...` stands alone it is plain text or a list of messages, alike in the whole row.
Content may be a list of parts {"type": "text", "text": "..."}.

All functions raise InputError, which names the place of the row, for another shape.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm.data.chat import Message, Role
from jaxlm.data.sources import require_text
from jaxlm.errors import InputError

# Who speaks, as ShareGPT and others have it.
_SPEAKERS: dict[str, Role] = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "system": "system",
  "tool": "tool",
}
# What would be lost: keys of a message and of a row that change what is said.
_LOST = ("tool_calls", "function_call", "reasoning_content", "weight")
_LOST_IN_ROWS = ("tools", "system")
_NOTHING = (None, "", [], {})

Said = str | tuple[Message, ...]


class Exchange(NamedTuple):
  """A prompt and its completions, as plain text or as messages."""

  where: str
  """Its file and place, for messages."""
  prompt: Said
  """What comes before each completion."""
  completions: tuple[Said, ...]
  """What the model said, or is to say; of the prompt's kind."""
  value: float = 0.0
  """A margin or a label."""


class Steps(NamedTuple):
  """A prompt, and a completion in steps."""

  prompt: str
  """What comes before."""
  texts: tuple[str, ...]
  """The steps."""
  labels: tuple[bool, ...]
  """Whether each is right."""


def parse_chat(row: dict[str, Any], where: str) -> Exchange:
  """Returns a chat, or a prompt and its completion; a chat has an empty prompt."""
  _refuse_lost(row, where)
  for key in ("messages", "conversations"):
    if key in row:
      return Exchange(where, (), (_messages(row[key], key, where),))
  if {"prompt", "completion"} <= row.keys():
    prompt, completion = _alike(row, ("prompt", "completion"), where)
    return Exchange(where, prompt, (completion,))
  raise _unknown(row, where, "messages; conversations; or prompt and completion")


def parse_pair(row: dict[str, Any], where: str) -> Exchange:
  """Returns a prompt with what was chosen and what was rejected, and their margin."""
  _refuse_lost(row, where)
  margin = row.get("margin")
  number = isinstance(margin, int | float) and not isinstance(margin, bool)
  if not (margin is None or (number and math.isfinite(margin))):
    raise InputError(f"{where}: margin: {margin!r} is not a finite number.")
  if not {"chosen", "rejected"} <= row.keys():
    raise _unknown(row, where, "chosen and rejected, with or without prompt, margin")
  value = 0.0 if margin is None else float(margin)
  prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
  whole = prompt is None or (
    isinstance(prompt, str) and all(isinstance(side, list) for side in sides)
  )
  if not whole:
    names = ("prompt", "chosen", "rejected")
    first, *completions = _alike(row, names, where)
    return Exchange(where, first, tuple(completions), value)
  if not all(isinstance(side, list) for side in sides):
    raise InputError(
      f"{where}: chosen and rejected are text without a prompt; give the field prompt, "
      "or whole chats as lists of messages."
    )
  chosen, rejected = (_messages(row[k], k, where) for k in ("chosen", "rejected"))
  shared = 0
  for one, other in zip(chosen, rejected, strict=False):
    if one != other:
      break
    shared += 1
  if shared in (0, len(chosen), len(rejected)):
    raise InputError(
      f"{where}: chosen and rejected ({len(chosen)} and {len(rejected)} messages) "
      f"share their first {shared}, so there is no prompt that each goes on from. "
      "Give the field prompt."
    )
  if prompt is not None and prompt not in [m.content for m in chosen[:shared]]:
    raise InputError(
      f"{where}: prompt is text that no message shared by chosen and rejected says. "
      "Give it as a list of messages, or leave it out."
    )
  return Exchange(where, chosen[:shared], (chosen[shared:], rejected[shared:]), value)


def parse_labelled(row: dict[str, Any], where: str) -> Exchange:
  """Returns a prompt and its completion; the value is 1.0 for true, 0.0 for false."""
  _refuse_lost(row, where)
  _require(row, ("prompt", "completion", "label"), where)
  prompt, completion = _alike(row, ("prompt", "completion"), where)
  return Exchange(
    where, prompt, (completion,), float(_bool(row["label"], "label", where))
  )


def parse_steps(row: dict[str, Any], where: str) -> Steps:
  """Returns a prompt and the steps of its completion."""
  _require(row, ("prompt", "completions", "labels"), where)
  for key in ("completions", "labels"):
    if not isinstance(row[key], list):
      raise InputError(f"{where}: {key}: a {type(row[key]).__name__}, not a list.")
  texts, labels = row["completions"], row["labels"]
  if not texts or len(texts) != len(labels):
    raise InputError(
      f"{where}: {len(texts)} completions and {len(labels)} labels; give one label a "
      "completion, and at least one."
    )
  return Steps(
    require_text(row["prompt"], "prompt", where),
    tuple(require_text(x, f"completions.{i}", where) for i, x in enumerate(texts)),
    tuple(_bool(x, f"labels.{i}", where) for i, x in enumerate(labels)),
  )


def _refuse_lost(row: dict[str, Any], where: str) -> None:
  for key in _LOST_IN_ROWS:
    if row.get(key) not in _NOTHING:
      raise InputError(
        f"{where}: the field {key!r} is not read. Make it a message of the role system."
      )


def _require(row: dict, keys: Sequence[str], where: str) -> None:
  if not set(keys) <= row.keys():
    raise _unknown(row, where, ", ".join(keys))


def _unknown(row: dict, where: str, accepted: str) -> InputError:
  keys = ", ".join(map(repr, row)) or "none"
  return InputError(f"{where}: the row has the fields {keys}; it takes {accepted}.")


def _bool(value: Any, key: str, where: str) -> bool:
  if not isinstance(value, bool):
    raise InputError(f"{where}: {key}: {value!r} is not true or false.")
  return value


def _alike(row: dict, keys: Sequence[str], where: str) -> list[Said]:
  """Returns fields of a row that must be all text or all messages."""
  if all(isinstance(row[key], str) for key in keys):
    return [require_text(row[key], key, where) for key in keys]
  if all(isinstance(row[key], list) for key in keys):
    return [_messages(row[key], key, where) for key in keys]
  kinds = ", ".join(f"{key} a {type(row[key]).__name__}" for key in keys)
  raise InputError(f"{where}: {kinds}; all must be text, or all lists of messages.")


def _messages(value: Any, key: str, where: str) -> tuple[Message, ...]:
  if not isinstance(value, list):
    raise InputError(
      f"{where}: {key}: a {type(value).__name__}, not a list of messages."
    )
  return tuple(
    _message(one, f"{where}: {key}.{number}") for number, one in enumerate(value)
  )


def _message(value: Any, where: str) -> Message:
  """Returns a message of {role, content} or {from, value}."""
  if not isinstance(value, dict):
    raise InputError(f"{where}: a {type(value).__name__}, not a message.")
  for key in _LOST:
    if value.get(key) not in _NOTHING:
      raise InputError(f"{where}: {key!r} is not read. Write it into the content.")
  if {"role", "content"} <= value.keys():
    speaker, content = value["role"], _content(value["content"], where)
    known: dict[str, Role] = {role: role for role in _SPEAKERS.values()}
  elif {"from", "value"} <= value.keys():
    speaker = value["from"]
    content, known = require_text(value["value"], "value", where), _SPEAKERS
  else:
    raise _unknown(value, where, "role and content, or from and value")
  if not isinstance(speaker, str) or speaker not in known:
    raise InputError(
      f"{where}: {speaker!r} does not speak here; accepted are {', '.join(known)}."
    )
  return Message(role=known[speaker], content=content)


def _content(value: Any, where: str) -> str:
  """Returns the text of a message, which may come in parts."""
  if not isinstance(value, list):
    return require_text(value, "content", where)
  texts = []
  for number, part in enumerate(value):
    if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
      kind = part.get("type") if isinstance(part, dict) else type(part).__name__
      raise InputError(
        f"{where}: content.{number} is of the type {kind!r}; parts must be "
        '{"type": "text", "text": "..."}.'
      )
    texts.append(require_text(part["text"], f"content.{number}.text", where))
  return "".join(texts)
