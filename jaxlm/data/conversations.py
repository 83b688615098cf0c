"""Sources of conversations, and their ids: chats, preferences, labels, steps.

A row is a JSON object: a line, or a record where the file's name ends in .arrayrecord.
exchanges.py says which shapes are known. Plain text takes no template: the prompt
begins with bos where the tokenizer adds one or the prompt is empty, and the completion
ends with eos.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxlm import files
from jaxlm.data import exchanges, templates
from jaxlm.data.chat import Message, Role, encode_turns
from jaxlm.data.exchanges import Exchange
from jaxlm.data.sources import objects
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import InputError

_REPLIES: tuple[Role, ...] = ("assistant",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chats:
  """Chats, or prompts with completions, to learn the replies of."""

  path: str
  """A file or a glob such as gs://bucket/chats/*.jsonl.gz."""
  supervised: tuple[Role, ...] = ("assistant",)
  """The roles whose messages are learnt; of prompt and completion, in the latter."""
  template: str | None = None
  """A name in templates.py or a .jinja file; None: the tokenizer's own."""

  def __post_init__(self):
    if not self.supervised:
      raise InputError(
        "data.sources.source.supervised: empty; give roles, such as assistant."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences:
  """Pairs of a completion that was chosen and one that was rejected.

  Without `prompt`, both are whole chats: the messages that they share are the prompt.
  """

  path: str
  """As in `Chats`."""
  template: str | None = None
  """As in `Chats`."""
  margins: bool = False
  """Whether each row must have a `margin`, for objective.loss.margin of a reward
  model; where it is false, a row's margin is read all the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
  """Completions, each called good (true) or bad (false).

  A row of `Preferences` counts as two: what was chosen is good, the other bad.
  """

  path: str
  """As in `Chats`."""
  template: str | None = None
  """As in `Chats`."""
  kl: bool = False
  """Whether a second sequence stands beside each: its prompt with the completion of the
  row before it in the file; the first row takes the last row's. KTO estimates the KL
  divergence with these (Ethayarajh et al. 2024, section 4.1); TRL rotates the rows of a
  batch instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise:
  """Completions in steps, each step called right (true) or wrong (false)."""

  path: str
  """As in `Chats`."""
  separator: str = "\n"
  """Stands after each step; the step's label is at its last token."""


Source = Chats | Preferences | Labelled | Stepwise


class Tokens(NamedTuple):
  """A sequence of token ids."""

  ids: list[int]
  """The ids, [tokens]."""
  supervised: list[bool]
  """Whether each is learnt, [tokens]."""
  labels: list[int] | None = None
  """Of `Stepwise`: 1 or 0 at the last token of each step, which alone is supervised; 0
  elsewhere, [tokens]."""


class Unit(NamedTuple):
  """What a row of a source comes to."""

  where: str
  """Its file and place, for messages."""
  sequences: tuple[Tokens, ...]
  """As many as `sequences_of` says, each with the prompt: chosen and rejected; or the
  row's own completion and, for KL, another row's."""
  value: float
  """The margin of a pair, 1.0 or 0.0 for a label, else 0.0."""
  prompted: bool = False
  """Whether others may answer the same prompt: a preference or a label."""


def sequences_of(source: Source) -> int:
  """Returns how many sequences each unit of a source has, 1 or 2."""
  pairs = isinstance(source, Preferences) or (
    isinstance(source, Labelled) and source.kl
  )
  return 2 if pairs else 1


def template_text(name: str) -> str:
  """Returns the Jinja that a source's `template` stands for.

  Raises:
    InputError: neither a name in templates.py nor a .jinja file.
  """
  return templates.text_of(name)


def read_units(source: Source, field: str, tokenizer: Tokenizer) -> Iterator[Unit]:
  """Yields the rows of a source in file order, as token ids.

  Of messages what `encode_turns` says is supervised, after the prompt; of plain text
  the completion and eos.

  Args:
    source: what to read; each file is read whole into memory.
    field: where the config says it, for messages ("data.sources.0.source").
    tokenizer: makes the ids; its template is used where the source has none.

  Raises:
    InputError: no file, no row, a row of an unknown shape, a message that is not text,
      a chat that the template refuses or rewrites, a row without a supervised token,
      a pair whose prompts differ in ids; names the file and line.
  """
  found = files.find(source.path, f"{field}.path")
  template, empty = None, True
  if not isinstance(source, Stepwise) and source.template is not None:
    try:
      template = template_text(source.template)
    except InputError as error:
      raise InputError(f"{field}.{error}") from error
  for file in found:
    places = objects(file)
    if isinstance(source, Stepwise):
      units = (_stepwise(source, row, where, tokenizer) for where, row in places)
    else:
      rows = _parsed(source, places)
      if isinstance(source, Labelled) and source.kl:
        rows = _with_mismatched(list(rows))
      supervised = source.supervised if isinstance(source, Chats) else _REPLIES
      units = (_unit(row, supervised, tokenizer, template) for row in rows)
    prompted = isinstance(source, Preferences | Labelled)
    for unit in units:
      empty = False
      yield unit._replace(prompted=prompted)
  if empty:
    raise InputError(
      f"{field}.path: no row in {source.path} ({len(found)} files, all empty)."
    )


def _parsed(
  source: Chats | Preferences | Labelled, places: Iterable[tuple[str, dict[str, Any]]]
) -> Iterator[Exchange]:
  match source:
    case Chats():
      return (exchanges.parse_chat(row, where) for where, row in places)
    case Preferences(margins=margins):
      return (_pair(row, where, margins=margins) for where, row in places)
    case Labelled():
      return _labelled(places)


def _pair(row: dict[str, Any], where: str, *, margins: bool) -> Exchange:
  if margins and row.get("margin") is None:
    raise InputError(f"{where}: no margin, which source.margins=true asks of each row.")
  return exchanges.parse_pair(row, where)


def _labelled(places: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Exchange]:
  """Yields labelled rows; of pairs, the good completions, then the bad ones.

  So no completion of a prompt comes right after another one of it.
  """
  rejected = []
  for where, row in places:
    if {"chosen", "rejected"} <= row.keys():
      pair = exchanges.parse_pair(row, where)
      yield pair._replace(completions=pair.completions[:1], value=1.0)
      rejected.append(pair._replace(completions=pair.completions[1:], value=0.0))
    else:
      yield exchanges.parse_labelled(row, where)
  yield from rejected


def _with_mismatched(rows: Sequence[Exchange]) -> Iterator[Exchange]:
  """Yields rows of a file with the completion of the row before as a second one."""
  for number, row in enumerate(rows):
    before = rows[number - 1]
    if before is row:
      raise InputError(
        f"{row.where}: the only row of its file, so kl=True has no other completion "
        "for its prompt. Put the rows into one file, or give kl=False."
      )
    if isinstance(row.prompt, str) != isinstance(before.prompt, str):
      raise InputError(
        f"{row.where}: with kl=True all rows of a file must be text or all messages; "
        f"this one is not as {before.where}."
      )
    yield row._replace(completions=(*row.completions, *before.completions))


def _unit(
  row: Exchange, supervised: Sequence[Role], tokenizer: Tokenizer, template: str | None
) -> Unit:
  sequences = []
  for completion in row.completions:
    if isinstance(row.prompt, str):
      assert isinstance(completion, str)
      sequences.append(_plain(tokenizer, row.prompt, completion))
      continue
    assert not isinstance(completion, str)
    whole = (*row.prompt, *completion)
    try:
      turns = encode_turns(
        tokenizer,
        whole,
        supervised=supervised,
        start=len(row.prompt),
        template=template,
      )
    except InputError as error:
      raise InputError(f"{row.where}: {error}") from error
    if not any(turns.supervised[1:]):
      raise InputError(
        f"{row.where}: no supervised token. Its roles are {_listed(row.prompt)} in the "
        f"prompt and {_listed(completion)} after it; supervised are, after the prompt, "
        f"{', '.join(supervised)}."
      )
    sequences.append(Tokens(turns.ids, turns.supervised))
  prompts = {tuple(s.ids[: s.supervised.index(True)]) for s in sequences}
  if len(prompts) > 1:
    raise InputError(
      f"{row.where}: the template writes the prompt of the two completions in two "
      "ways. Give completions that begin with the same role, or another template."
    )
  return Unit(row.where, tuple(sequences), row.value)


def _listed(messages: Iterable[Message]) -> str:
  return ", ".join(dict.fromkeys(message.role for message in messages)) or "none"


def _plain(tokenizer: Tokenizer, prompt: str, completion: str) -> Tokens:
  """Returns the ids of plain text; no token reaches from the prompt beyond it."""
  before, after = tokenizer.encode_each([prompt, completion])
  before, after = _begun(tokenizer, before), [*after, tokenizer.eos]
  supervised = [False] * len(before) + [True] * len(after)
  return Tokens([*before, *after], supervised)


def _begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """Returns a prompt's ids as the model gets them when it generates."""
  return [tokenizer.bos, *ids] if tokenizer.add_bos or not ids else ids


def _stepwise(
  source: Stepwise, row: dict[str, Any], where: str, tokenizer: Tokenizer
) -> Unit:
  steps = exchanges.parse_steps(row, where)
  texts = [text + source.separator for text in steps.texts]
  first, *found = tokenizer.encode_each([steps.prompt, *texts])
  ids = _begun(tokenizer, first)
  supervised, labels = [False] * len(ids), [0] * len(ids)
  for number, (some, label) in enumerate(zip(found, steps.labels, strict=True)):
    if not some:
      raise InputError(
        f"{where}: completions.{number} is empty, and so is the separator: no token "
        "can take its label."
      )
    ids += some
    supervised += [False] * (len(some) - 1) + [True]
    labels += [0] * (len(some) - 1) + [int(label)]
  return Unit(where, (Tokens(ids, supervised, labels),), 0.0)
