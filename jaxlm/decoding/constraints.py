"""What a text may be, as the tokens that may come next.

A regular expression or a JSON schema is compiled by llguidance (the extra
`constrain`). The text is the join of `pieces`, byte by byte, so that any tokenizer
serves; of a tokenizer with `adds_space` a leading space is a space. Masks are made on
the host, token by token, in some 30 us for 49152 ids:

  constraint = compile_constraint(Regex(r"[a-z]+"), Vocabulary(tokenizer))
  state = constraint.start()
  while not constraint.finished(state):
    token = ...  # one of constraint.mask(state)
    state = constraint.advance(state, token)
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import InputError
from jaxlm.shapes import Bool

if TYPE_CHECKING:
  from llguidance import LLMatcher

# Between JSON's words. A model that may go on with spaces for ever sometimes does.
_SPACE = r"[ \t\n\r]{0,20}"
_STUCK = "no token of the vocabulary can begin or continue the text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regex:
  r"""The whole text matches a regular expression: Rust's syntax, no look-around.

  Classes are of ASCII, so that \d asks for no digit of another script: what is made
  matches in Python with `re.ASCII` and without.
  """

  pattern: str
  """Such as "[0-9]{4}-[0-9]{2}"; a dot is any letter but a line's end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonSchema:
  """The whole text is a JSON value that a schema accepts."""

  schema: str
  """The schema as JSON text; a keyword that cannot be honoured is refused."""


class Vocabulary:
  """A tokenizer's byte strings, prepared once for many constraints."""

  def __init__(self, tokenizer: Tokenizer):
    """Prepares a tokenizer, in some 130 ms for 49152 ids.

    Raises:
      InputError: llguidance is not installed.
    """
    llguidance = _library()
    self.size = tokenizer.vocab
    self.stops = frozenset(tokenizer.stops)
    self.written = np.array([len(piece) > 0 for piece in tokenizer.pieces])
    self._tokenizer = llguidance.LLTokenizer(
      llguidance.TokenizerWrapper(_Source(tokenizer)),
      n_vocab=tokenizer.vocab,
      eos_token=sorted(self.stops),
    )

  def matcher(self, grammar: str) -> "LLMatcher":
    """Returns the library's matcher of a grammar at the start of a text."""
    return _library().LLMatcher(self._tokenizer, grammar, log_level=0)


class _Source:
  """A tokenizer as llguidance asks for it."""

  def __init__(self, tokenizer: Tokenizer):
    specials = {*tokenizer.specials.values(), *tokenizer.stops, tokenizer.bos}
    self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
    self.tokens = list(tokenizer.pieces)
    self.special_token_ids = sorted(specials)
    self._encode = tokenizer.encode

  def __call__(self, text: str | bytes) -> list[int]:
    if isinstance(text, bytes):
      text = text.decode(errors="replace")
    return self._encode(text)


@dataclasses.dataclass(frozen=True)
class State:
  """A place in a text; advancing makes another and leaves this one as it is."""

  matcher: "LLMatcher"


class Constraint:
  """The tokens that may follow each start of a text."""

  def __init__(self, matcher: "LLMatcher", vocabulary: Vocabulary, name: str):
    """Is made by `compile_constraint`."""
    self._first, self._vocabulary, self._name = matcher, vocabulary, name

  def start(self) -> State:
    """Returns the state before the first token."""
    return State(self._first)

  def mask(self, state: State) -> Bool[np.ndarray, "V"]:
    """Returns which tokens may come next; stops may where the text is complete.

    Where bytes can come in one way only, the token is that which the tokenizer itself
    makes of them, as in the texts that a model was trained on.

    Raises:
      InputError: no token can continue the text, or the constraint outgrew the
        library's limits.
    """
    # On a copy, for the library notes in the matcher what it computed.
    matcher = state.matcher.deep_copy()
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    self._refuse_error(matcher)
    found = np.unpackbits(bits, count=self._vocabulary.size, bitorder="little")
    # What is forced is encoded, and may become an unknown token, which writes nothing.
    mask_V = found.astype(bool) & self._vocabulary.written
    mask_V[list(self._vocabulary.stops)] = self.complete(state)
    if not mask_V.any():
      raise InputError(f"{self._name}: {_STUCK}.")
    return mask_V

  def advance(self, state: State, token: int) -> State:
    """Returns the state after a token that `mask` allows.

    Raises:
      InputError: the token is not allowed.
    """
    if token in self._vocabulary.stops:
      if self.complete(state):
        return state
      raise InputError(
        f"{self._name}: token {token} would stop before the text is whole."
      )
    matcher = state.matcher.deep_copy()
    if not matcher.consume_token(token):
      raise InputError(f"{self._name}: token {token} cannot come here.")
    return State(matcher)

  def complete(self, state: State) -> bool:
    """Says whether the text so far satisfies the constraint: a stop may come."""
    return state.matcher.is_accepting()

  def finished(self, state: State) -> bool:
    """Says whether the text is complete and nothing but a stop can come."""
    return state.matcher.is_stopped() and self.complete(state)

  def _refuse_error(self, matcher: "LLMatcher") -> None:
    if not matcher.is_error():
      return
    told = matcher.get_error().partition("<state>")[0].strip()
    if told.startswith("NoExtension"):
      told = _STUCK
    raise InputError(f"{self._name}: {told}.")


def compile_constraint(spec: Regex | JsonSchema, vocabulary: Vocabulary) -> Constraint:
  """Returns the constraint of a spec over a vocabulary.

  Raises:
    InputError: the pattern or schema is broken, asks for what the library cannot do,
      or no text, or none that the vocabulary can begin, satisfies it.
  """
  if isinstance(spec, Regex):
    name, grammar = "regex", _of_regex(spec.pattern)
  else:
    name, grammar = "json schema", _of_schema(spec.schema)
  found = Constraint(vocabulary.matcher(grammar), vocabulary, name)
  found.mask(found.start())  # refuses what is broken
  return found


def _of_regex(pattern: str) -> str:
  # The library drops a backslash that escapes nothing.
  if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
    raise InputError(f"regex: {pattern!r} ends with a backslash that escapes nothing.")
  return f"start: /{_library().regex_to_lark(pattern, 'dws')}/"


def _of_schema(schema: str) -> str:
  options: Any = {"whitespace_pattern": _SPACE}
  try:
    return _library().LLMatcher.grammar_from_json_schema(schema, overrides=options)
  except ValueError as error:
    raise InputError(f"json schema: {error}") from error


def _library() -> Any:
  try:
    import llguidance
  except ImportError as error:
    raise InputError(
      "a constraint needs llguidance: install the extra, jaxlm[constrain]"
    ) from error
  return llguidance
