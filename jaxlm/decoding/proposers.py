"""Who guesses the next tokens: a smaller model, or the text itself.

A proposer is a pytree, so that a compiled loop takes it as an argument: what shapes the
program is static, a draft model's parameters are not.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlm.decoding import choice
from jaxlm.decoding.choice import Seen
from jaxlm.decoding.generate import Options
from jaxlm.decoding.prefill import check, make_cache, placed, prefill
from jaxlm.decoding.sampling import Controls
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits
from jaxlm.shapes import Array, Float, PyTree


class Rows(NamedTuple):
  """What the rows are so far."""

  ids_BS: Array
  """Prompts and what was made, each from the first place on."""
  length_B: Array
  """How many ids a row has: the position of its next one."""
  end_B: Array
  """How many it may have."""
  done_B: Array
  seen: Seen


class Proposal(NamedTuple):
  """Guesses of the next tokens."""

  token_BC: Array
  probability_BCV: Array | None
  """The distributions that they were drawn from; None: each was certain."""
  count_B: Array
  """How many of them are guesses, from the first on."""


class Proposer(Protocol):
  """Guesses that depend on a row's own ids and its key alone."""

  @property
  def ahead(self) -> int:
    """How many tokens it proposes a round."""
    ...

  def start(
    self,
    target: Decoder,
    prompts: Sequence[Sequence[int]],
    slots: int,
    options: Options,
  ) -> PyTree:
    """Returns what it carries from round to round, after the prompts."""
    ...

  def propose(
    self, asked: Controls, rows: Rows, carried: PyTree
  ) -> tuple[Proposal, PyTree]:
    """Returns the guesses of a round, and what it carries on."""
    ...


class Use(enum.IntEnum):
  """What a position's random numbers are for."""

  GUESS = 1
  TEST = 2
  REST = 3


def keys(key_B2: Array, position_B: Array, use: Use) -> Array:
  """Returns a key for each row, of its own key, its position and the use."""
  row_B = jax.random.wrap_key_data(key_B2, impl="threefry2x32")
  at_B = jax.vmap(jax.random.fold_in)(row_B, position_B)
  return jax.vmap(functools.partial(jax.random.fold_in, data=int(use)))(at_B)


def draw(
  asked: Controls, weights_BV: Float[Array, "B V"], position_B: Array, use: Use
) -> Array:
  """Returns a token of each row, drawn by weights; the only one of a greedy row."""
  score_BV = jnp.log(weights_BV)
  if asked.key_B2 is not None:
    keys_B = keys(asked.key_B2, position_B, use)
    shape = weights_BV.shape[1:]
    score_BV += jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys_B)
  return jnp.argmax(score_BV, axis=-1).astype(jnp.int32)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[],
  meta_fields=["ahead", "longest", "shortest"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngram:
  """Guesses that a row goes on as it did before (prompt lookup, Saxena 2023).

  Where its last ids have occurred earlier, in prompt or output, what followed there is
  proposed; the longest match counts, of equally long ones the latest. Where the match
  reaches into its own continuation, this repeats.
  """

  ahead: int = 4
  """Tokens that it proposes a round."""
  longest: int = 3
  """Ids that are compared at most."""
  shortest: int = 2
  """Ids that a match needs; without one, nothing is proposed."""

  def __post_init__(self):
    _check_ahead(self.ahead)
    if not 1 <= self.shortest <= self.longest:
      raise InputError(
        f"shortest, longest: {self.shortest} and {self.longest} are not in the order "
        "1 <= shortest <= longest."
      )

  def start(
    self,
    target: Decoder,
    prompts: Sequence[Sequence[int]],
    slots: int,
    options: Options,
  ) -> PyTree:
    """Returns nothing: the rows hold all that it needs."""
    return None

  def propose(
    self, asked: Controls, rows: Rows, carried: PyTree
  ) -> tuple[Proposal, PyTree]:
    """Returns what followed the match."""
    ids_BS, last_B1 = rows.ids_BS, rows.length_B[:, None] - 1
    place_1S = jnp.arange(ids_BS.shape[1])[None]
    equal_BS = place_1S < last_B1
    length_BS = jnp.zeros_like(ids_BS)
    for back in range(self.longest):
      id_B1 = jnp.take_along_axis(ids_BS, jnp.maximum(last_B1 - back, 0), axis=1)
      equal_BS &= (jnp.roll(ids_BS, back, axis=1) == id_B1) & (place_1S >= back)
      length_BS += equal_BS.astype(jnp.int32)
    # Of several largest values argmax takes the first, so the text is turned round.
    best_B1 = jnp.argmax(length_BS[:, ::-1], axis=1, keepdims=True).astype(jnp.int32)
    best_B1 = ids_BS.shape[1] - 1 - best_B1
    found_B1 = jnp.take_along_axis(length_BS, best_B1, axis=1) >= self.shortest
    period_B1 = jnp.maximum(last_B1 - best_B1, 1)
    after_BC = best_B1 + 1 + jnp.arange(self.ahead)[None] % period_B1
    token_BC = jnp.take_along_axis(ids_BS, after_BC, axis=1, mode="clip")
    return Proposal(token_BC, None, jnp.where(found_B1[:, 0], self.ahead, 0)), None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params"],
  meta_fields=["decoder", "ahead"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """Guesses of a smaller model with the same vocabulary, drawn as the row asks.

  The row's temperature, filters and penalties hold for the draft's logits too: any
  distribution is right, and this one is near the target's.
  """

  decoder: Decoder
  """The draft model, on the target's mesh."""
  params: PyTree
  """Its parameters."""
  ahead: int = 4
  """Tokens that it proposes a round."""

  def __post_init__(self):
    _check_ahead(self.ahead)

  def start(
    self,
    target: Decoder,
    prompts: Sequence[Sequence[int]],
    slots: int,
    options: Options,
  ) -> PyTree:
    """Returns the draft's cache with the prompts."""
    ours, theirs = self.decoder.spec.vocab, target.spec.vocab
    if ours != theirs:
      raise InputError(f"draft: its vocabulary has {ours} ids, the model's {theirs}.")
    if self.decoder.layout != target.layout:
      raise InputError("draft: it is laid out on another mesh than the model.")
    try:
      check(self.decoder.spec, prompts, tokens=options.tokens)
    except InputError as error:
      raise InputError(f"draft: {error}") from error
    kept = options.cache or self.decoder.precision.compute
    cache = make_cache(self.decoder, len(prompts), slots, kept, self.ahead)
    return prefill(self.decoder, self.params, cache, (prompts, 0), options.chunk)[0]

  def propose(
    self, asked: Controls, rows: Rows, carried: PyTree
  ) -> tuple[Proposal, PyTree]:
    """Returns draws, one after another; the draft reads all of them but the last."""
    # If all of the last round's were accepted, the cache lacks the last of them; else
    # it is written again.
    places_B2 = rows.length_B[:, None] + jnp.arange(-2, 0)[None]
    pair_B2 = jnp.take_along_axis(rows.ids_BS, jnp.maximum(places_B2, 0), axis=1)
    start = (carried, rows.seen, rows.length_B)
    carry, first = self._step(asked, rows, start, pair_B2)

    def more(carry: PyTree, _: None) -> tuple[PyTree, tuple[Array, Array]]:
      *before, token_B = carry
      after, (token_B, p_BV) = self._step(asked, rows, before, token_B[:, None])
      return (*after, token_B), (token_B, p_BV)

    carry, others = jax.lax.scan(more, (*carry, first[0]), None, length=self.ahead - 1)
    token_BC, p_BCV = (
      jnp.concatenate((one[:, None], jnp.moveaxis(rest, 0, 1)), axis=1)
      for one, rest in zip(first, others, strict=True)
    )
    count_B = jnp.full_like(rows.length_B, self.ahead)
    return Proposal(token_BC, p_BCV, count_B), carry[0]

  def _step(
    self, asked: Controls, rows: Rows, carry: PyTree, ids_BT: Array
  ) -> tuple[PyTree, tuple[Array, Array]]:
    """Reads ids and draws the next: (cache, seen, its position), (token, weights)."""
    cache, seen, position_B = carry
    T = ids_BT.shape[1]
    positions_BT = position_B[:, None] + jnp.arange(-T, 0)[None]
    # No row is longer than it may be: a learned position may not exist there.
    unread_BT = rows.done_B[:, None] | (positions_BT >= rows.end_B[:, None] - 1)
    x_BTD, cache = self.decoder.apply(
      {"params": self.params}, ids_BT, jnp.where(unread_BT, -1, positions_BT),
      cache=cache,
    )  # fmt: skip
    logits_BV = logits(self.decoder.spec, self.params, x_BTD[:, -1:])[:, 0]
    p_BV = choice.probabilities(asked, seen, logits_BV)
    token_B = draw(asked, p_BV, position_B, Use.GUESS)
    seen = choice.see(seen, token_B, ~rows.done_B)
    return (placed(self.decoder, cache), seen, position_B + 1), (token_B, p_BV)


def _check_ahead(ahead: int) -> None:
  if ahead < 1:
    raise InputError(f"ahead: {ahead} is under 1; how many tokens to propose a round.")
