"""Prompts to text: stop strings, constraints, and ids as a reader sees them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.constraints import Constraint
from jaxlm.decoding.generate import Generated, Generation
from jaxlm.decoding.sampling import possible
from jaxlm.errors import InputError

EVERY = 8
"""New tokens between two looks for stop strings."""


class Written(NamedTuple):
  """What a row got."""

  text: str
  """What follows the prompt, up to a stop string, which is left out. Of a tokenizer
  that adds a space to each text, a text at a document's start comes without it."""
  ended: str
  """"stop": a stop token; "length": as many tokens as asked for; "string": a stop
  string; "constraint": nothing more could come."""
  row: Generated
  """Ids and log-probabilities, of all that was made up to the end."""


class Ends(NamedTuple):
  """What ends or binds texts, beside stop tokens."""

  strings: tuple[str, ...] = ()
  """A text ends before the first of these."""
  constraint: Constraint | None = None
  """What the whole of each text must be."""


def write(
  growing: Generation,
  tokenizer: Tokenizer,
  ends: Ends = Ends(),  # noqa: B008
  *,
  tell: Callable[[int], object] = lambda made: None,
) -> list[Written]:
  """Finishes a generation; returns the text that follows each prompt.

  Args:
    growing: rows that were begun, their stops being `tokenizer.stops` as a rule.
    tokenizer: of the model.
    ends: stop strings, a constraint.
    tell: called with the number of tokens that a row has, as they grow.

  Raises:
    InputError: an empty stop string, or a constraint that the sampling contradicts.
  """
  if "" in ends.strings:
    raise InputError("stop string: it is empty; give at least one letter.")
  if ends.strings and any(one.min_tokens for one in growing.samplings):
    raise InputError("min_tokens: it cannot hold back stop strings; give 0 or none.")
  bound = None if ends.constraint is None else _Bound(ends.constraint, growing)
  texts = [_Text(tokenizer, prompt, ends.strings) for prompt in growing.prompts]
  over: dict[int, str] = {}
  while growing.running:
    growing.step(1 if bound else EVERY, bound.masks() if bound else None)
    for row, made in enumerate(growing.rows()):
      if row in over:
        continue
      cut = texts[row].cut(made.tokens)
      if cut is not None:
        over[row] = "string"
        growing.end(row, cut)
      elif made.ended == "stop":
        continue
      elif bound and bound.advance(row, made.tokens):
        over[row] = "constraint"
        growing.end(row, len(made.tokens))
    tell(growing.made)
  return [
    Written(text.final(row.tokens), over.get(i, row.ended), row)
    for i, (text, row) in enumerate(zip(texts, growing.rows(), strict=True))
  ]


class _Text:
  """A row's text as its tokens come."""

  def __init__(
    self, tokenizer: Tokenizer, prompt: Sequence[int], strings: tuple[str, ...]
  ):
    self._tokenizer, self._prompt, self._strings = tokenizer, list(prompt), strings
    self._before, self._looked = len(tokenizer.decode(self._prompt)), 0

  def cut(self, tokens: list[int]) -> int | None:
    """Returns how many tokens there are when a stop string is whole, or None."""
    for count in range(self._looked + 1, len(tokens) + 1):
      if self._strings and self._end(self._of(tokens[:count])) is not None:
        return count
    self._looked = len(tokens)
    return None

  def final(self, tokens: list[int]) -> str:
    """Returns the text before the first stop string."""
    text = self._of(tokens)
    return text[: self._end(text)]

  def _end(self, text: str) -> int | None:
    return min((at for s in self._strings if (at := text.find(s)) >= 0), default=None)

  def _of(self, tokens: list[int]) -> str:
    # model.vocab may be rounded up: an id past the tokenizer's stands for no text.
    known = [token for token in tokens if token < self._tokenizer.vocab]
    return self._tokenizer.decode([*self._prompt, *known])[self._before :]


class _Bound:
  """A constraint's places in all rows."""

  def __init__(self, constraint: Constraint, growing: Generation):
    rows, vocab = growing.samplings, growing.vocab
    if any(one.min_tokens for one in rows):
      raise InputError("min_tokens: the constraint says where a text may end; give 0.")
    self._constraint = constraint
    self._allowed = [possible(one, vocab) for one in rows]
    self._states = [constraint.start() for _ in rows]
    self._read = [0] * len(rows)
    self._over = [False] * len(rows)

  def masks(self) -> np.ndarray:
    """Returns what may come next in each row, [B, V]."""
    return np.stack([self._mask(row) for row in range(len(self._states))])

  def _mask(self, row: int) -> np.ndarray:
    allowed = self._allowed[row]
    if self._over[row]:
      return allowed
    mask = np.zeros_like(allowed)
    own = self._constraint.mask(self._states[row])
    mask[: len(own)] = own
    if not (mask & allowed).any():
      raise InputError(
        f"row {row}: what the constraint lets come, `allowed` and `banned` of its "
        "sampling do not."
      )
    return mask

  def advance(self, row: int, tokens: list[int]) -> bool:
    """Takes a row's tokens; returns whether no other can follow."""
    for token in tokens[self._read[row] :]:
      self._states[row] = self._constraint.advance(self._states[row], token)
    self._read[row] = len(tokens)
    self._over[row] = self._constraint.finished(self._states[row])
    return self._over[row]
