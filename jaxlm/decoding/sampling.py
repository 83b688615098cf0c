"""What requests ask of the next token, and a batch of them as arrays.

A `Sampling` is one request's choices; `controls` turns those of a batch into arrays by
row, which `choice.py` applies. Each field is applied or refused by name.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.errors import InputError
from jaxlm.shapes import Array, Bool

LEAST, MOST = 1e-6, 1e6
"""Bounds of what logits are multiplied by or moved by: float32 holds the results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How one request's tokens are chosen."""

  temperature: float = 1.0
  """Logits are divided by this; 0 takes the largest (greedy)."""
  top_k: int | None = None
  """Only the so many largest logits can be drawn; None: all."""
  top_p: float | None = None
  """Only the fewest tokens that hold this probability can be drawn; None: all."""
  min_p: float | None = None
  """Only tokens with this share of the likeliest's probability; None: all."""
  typical_p: float | None = None
  """Only the tokens of most typical surprise that hold this probability; None: all."""
  repetition_penalty: float = 1.0
  """Divides positive logits of tokens in prompt or output, multiplies negative ones."""
  presence_penalty: float = 0.0
  """Is taken from the logits of tokens that are in the output."""
  frequency_penalty: float = 0.0
  """Is taken from a token's logit for each time that it is in the output."""
  logit_bias: tuple[tuple[int, float], ...] = ()
  """Token ids, and what is added to their logits."""
  allowed: tuple[int, ...] | None = None
  """The only tokens that can come; None: all."""
  banned: tuple[int, ...] = ()
  """Tokens that cannot come."""
  min_tokens: int = 0
  """Before so many new tokens no stop can come."""
  seed: int | None = None
  """Of the draws; None: one of the row's place in the batch and the batch's seed."""

  def __post_init__(self):
    factor, shift = f"between {LEAST} and {MOST}", f"between -{MOST} and {MOST}"
    ranges = {
      "temperature": (
        self.temperature == 0 or LEAST <= self.temperature <= MOST,
        f"0 (greedy) or {factor}",
      ),
      "top_k": (
        self.top_k is None or _whole(self.top_k, 1),
        "a whole number from 1 on",
      ),
      "top_p": (self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
      "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
      "typical_p": (self.typical_p is None or 0 < self.typical_p <= 1, "in (0, 1]"),
      "repetition_penalty": (LEAST <= self.repetition_penalty <= MOST, factor),
      "presence_penalty": (abs(self.presence_penalty) <= MOST, shift),
      "frequency_penalty": (abs(self.frequency_penalty) <= MOST, shift),
      "logit_bias": (all(abs(bias) <= MOST for _, bias in self.logit_bias), shift),
      "min_tokens": (
        _whole(self.min_tokens, 0) and self.min_tokens < 2**31,
        "a whole number from 0 to 2**31 - 1",
      ),
      "seed": (
        self.seed is None or (_whole(self.seed, 0) and self.seed < 2**64),
        "a whole number from 0 to 2**64 - 1",
      ),
    }
    for field, (fits, accepted) in ranges.items():
      if not fits:
        raise InputError(f"{field}: {getattr(self, field)} is not {accepted}.")
    for field, tokens in self._tokens().items():
      wrong = [token for token in tokens if not _whole(token, 0)]
      if wrong:
        raise InputError(f"{field}: {wrong[0]!r} is not a token id.")
      if len(set(tokens)) < len(tokens):
        raise InputError(f"{field}: a token is there twice: {sorted(tokens)}.")
    if self.allowed is not None and set(self.allowed) <= set(self.banned):
      raise InputError(
        f"allowed: of {list(self.allowed)} none is left that is not banned; "
        "at least one token has to be."
      )

  def _tokens(self) -> dict[str, Sequence[int]]:
    """Returns the token ids by the field that they stand in."""
    return {
      "logit_bias": [token for token, _ in self.logit_bias],
      "allowed": self.allowed or (),
      "banned": self.banned,
    }


def _whole(value: object, least: int) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    return False
  return int(value) >= least


class Controls(NamedTuple):
  """The samplings of a batch, by row; None: no row uses it.

  A pytree whose leaves all lead with rows, so that `jax.tree.map` gathers or repeats
  them. Which fields are None is part of its structure: a compiled program serves all
  values of the fields that it was made for, and holds nothing of the others.
  """

  bias_BV: Array | None
  """[B, V] float32 for the logits; -inf bans a token."""
  repetition_B: Array | None
  frequency_B: Array | None
  presence_B: Array | None
  min_tokens_B: Array | None
  """[B] int32."""
  stops_BV: Array | None
  """[B, V] bool: what min_tokens holds back; None where min_tokens_B is."""
  mask_BV: Array | None
  """[B, V] bool: what may come at this step. `controls` leaves it None: a loop that
  decodes under constraints puts in each step's with `_replace`."""
  temperature_B: Array | None
  """[B] float32; 1 for greedy rows."""
  greedy_B: Array | None
  """[B] bool."""
  top_k_B: Array | None
  """[B] int32."""
  top_p_B: Array | None
  min_p_B: Array | None
  typical_p_B: Array | None
  key_B2: Array | None
  """[B, 2] uint32: each row's threefry key; None: all rows are greedy."""


def controls(
  samplings: Sequence[Sampling],
  vocab: int,
  *,
  stops: Collection[int] = (),
  seed: int = 0,
) -> Controls:
  """Returns the arrays of a batch with one sampling a row.

  Args:
    samplings: one for each row.
    vocab: number of logits, V.
    stops: ids that min_tokens holds back.
    seed: of the rows that name none; each of them draws from a stream of its own.

  Raises:
    InputError: no row, a negative seed, a token that is not in the vocabulary, or a
      row of which no token is left; the message names the row.
  """
  if seed < 0:
    raise InputError(f"seed: {seed} is negative.")
  if not samplings:
    raise InputError("samplings: there is none; give one for each row.")
  for row, one in enumerate(samplings):
    try:
      if not possible(one, vocab, stops=stops if one.min_tokens else ()).any():
        raise InputError("allowed, banned, min_tokens: no token is left.")
    except InputError as error:
      raise InputError(f"row {row}: {error}") from error
  greedy = [one.temperature == 0 for one in samplings]
  # The likeliest token passes these three whatever they are, and a greedy row wants
  # no other.
  rows = [
    dataclasses.replace(one, top_k=None, top_p=None, min_p=None) if zero else one
    for one, zero in zip(samplings, greedy, strict=True)
  ]
  min_tokens_B = _column([one.min_tokens for one in rows], 0)
  return Controls(
    bias_BV=_biases(rows, vocab),
    repetition_B=_column([float(one.repetition_penalty) for one in rows], 1.0),
    frequency_B=_column([float(one.frequency_penalty) for one in rows], 0.0),
    presence_B=_column([float(one.presence_penalty) for one in rows], 0.0),
    min_tokens_B=min_tokens_B,
    stops_BV=None if min_tokens_B is None else _repeated(stops, len(rows), vocab),
    mask_BV=None,
    temperature_B=_column([float(one.temperature or 1.0) for one in rows], 1.0),
    greedy_B=jnp.asarray(greedy) if any(greedy) else None,
    top_k_B=_column([min(one.top_k or vocab, vocab) for one in rows], vocab),
    top_p_B=_column([float(one.top_p or 1.0) for one in rows], 1.0),
    min_p_B=_column([float(one.min_p or 0.0) for one in rows], 0.0),
    typical_p_B=_column([float(one.typical_p or 1.0) for one in rows], 1.0),
    key_B2=None if all(greedy) else _keys(rows, seed),
  )


def possible(
  sampling: Sampling, vocab: int, *, stops: Collection[int] = ()
) -> Bool[np.ndarray, "V"]:
  """Returns which tokens a sampling lets come where `stops` may not, [V] bool.

  Raises:
    InputError: a token that is not in the vocabulary.
  """
  for field, tokens in sampling._tokens().items():
    if tokens and max(tokens) >= vocab:
      raise InputError(
        f"{field}: token {max(tokens)} is not in the vocabulary of {vocab}."
      )
  found = ~members((*sampling.banned, *stops), vocab)
  if sampling.allowed is not None:
    found &= members(sampling.allowed, vocab)
  return found


def members(tokens: Collection[int], vocab: int) -> Bool[np.ndarray, "V"]:
  """Returns which ids are among the tokens; those past the vocabulary never come."""
  found = np.zeros(vocab, bool)
  found[[token for token in tokens if 0 <= token < vocab]] = True
  return found


def _column(values: list[float] | list[int], neutral: float) -> Array | None:
  """Returns the values of the rows, float32 or int32; None where all are neutral."""
  if all(value == neutral for value in values):
    return None
  dtype = np.float32 if isinstance(neutral, float) else np.int32
  return jnp.asarray(np.array(values, dtype))


def _repeated(tokens: Collection[int], rows: int, vocab: int) -> Array:
  return jnp.asarray(np.tile(members(tokens, vocab), (rows, 1)))


def _biases(rows: Sequence[Sampling], vocab: int) -> Array | None:
  if not any(one.logit_bias or one.banned or one.allowed is not None for one in rows):
    return None
  # Adding -0 changes no float; adding 0 would make 0 of -0.
  biases_BV = np.full((len(rows), vocab), -0.0, np.float32)
  for bias_V, one in zip(biases_BV, rows, strict=True):
    for token, bias in one.logit_bias:
      bias_V[token] = bias
    bias_V[~possible(one, vocab)] = -np.inf
  return jnp.asarray(biases_BV)


def _keys(rows: Sequence[Sampling], seed: int) -> Array:
  keys_B2 = np.zeros((len(rows), 2), np.uint32)
  for row, one in enumerate(rows):
    if one.seed is None:
      keys_B2[row] = np.random.SeedSequence((seed, row)).generate_state(2)
    else:
      keys_B2[row] = divmod(one.seed, 2**32)
  return jnp.asarray(keys_B2)
