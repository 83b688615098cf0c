"""The likeliest continuations of a prompt: beam search, and the best of many samples.

The beams of a prompt are rows of one cache. A step extends each of them by one token,
and every row then takes over the cache of the beam that it goes on from. In shapes B
counts prompts here, W the beams of each, P its candidates and N new tokens; rows of the
model are B W.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.generate import Generated, Options, generate, pad_stops
from jaxlm.decoding.prefill import (
  bucket,
  check,
  make_cache,
  placed,
  prefill,
  slots_for,
  whole,
)
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits, prefix_of
from jaxlm.shapes import Array, Float, Int, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
  """How wide to search, and which hypotheses are best."""

  width: int
  """Beams that are kept of each prompt; 1 is greedy, whatever `early_stopping` says."""
  length_penalty: float = 1.0
  """A score is a sum of log-probabilities over length ** this: 0 is the sum itself,
  from which longer ones suffer; 1 the mean."""
  early_stopping: bool | Literal["never"] = False
  """When a prompt with `width` ended hypotheses is done: True, at once; False, when its
  best beam, if it ended now, would not be among them; "never", when it would not
  be at the greatest length either, which under a penalty over 0 is kindest to it."""
  returned: int = 1
  """Hypotheses to return of each prompt, up to `width`."""

  def __post_init__(self):
    for field, most in (("width", None), ("returned", self.width)):
      value = getattr(self, field)
      if value < 1:
        raise InputError(f"{field}: {value} is under 1.")
      if most is not None and value > most:
        raise InputError(f"{field}: {value} of a width of {most}.")
    if not np.isfinite(self.length_penalty):
      raise InputError(f"length_penalty: {self.length_penalty} is not finite.")
    if self.early_stopping not in (True, False, "never"):
      raise InputError(
        f'early_stopping: {self.early_stopping!r} is not True, False or "never".'
      )


class Hypothesis(NamedTuple):
  """One continuation of a prompt."""

  tokens: list[int]
  """New ids, the stop left out."""
  ended: Literal["stop", "length"]
  score: float
  """Sum of the log-probabilities over length ** length_penalty, in nats; the stop
  counts in both."""


class Terms(NamedTuple):
  """What a search ends by; arrays, so that no program is compiled for their sake."""

  penalty: Array | np.ndarray
  stops_S: Array | np.ndarray
  tokens: Array | np.ndarray
  """Most new ids."""
  first_full: Array | np.ndarray
  """Whether a prompt is done when its ended hypotheses are as many as its beams."""
  at_most: Array | np.ndarray
  """Whether a beam is compared as if it went on to the greatest length."""


class State(NamedTuple):
  """What the loop carries; its buffers are given away at each call."""

  cache: PyTree
  beam_BWN: Array
  """New ids of the beams that go on."""
  sum_BW: Array
  """Their log-probabilities; falling."""
  ended_BWN: Array
  """New ids of the best that have ended, the stop among them."""
  score_BW: Array
  """Their scores; falling, -inf where there is none yet."""
  length_BW: Array
  open_B: Array
  """Prompts whose ended hypotheses can still change."""
  made: Array
  """Tokens of each beam."""


def beam_search(
  decoder: Decoder,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  beam: Beam,
  **options: Any,
) -> list[list[Hypothesis]]:
  """Returns the best hypotheses found for each prompt, the best first.

  Of a step's best candidates, as many as there are beams, those that end become
  hypotheses; the best that do not end go on. Scores and ends are those of transformers
  5.23; width 1 is greedy decoding.

  Args:
    decoder: the model.
    params: its parameters.
    prompts: ids of each; what one gets does not depend on the others.
    beam: the search.
    options: the fields of `generate.Options`, `tokens` among them, but for `seed` and
      `top`.

  Raises:
    InputError: naming the prompt, the field or the bound that is wrong.
  """
  chosen = Options(**options)
  _check(decoder, prompts, beam, chosen, prefix_of(params))
  B = whole(bucket(len(prompts)), decoder.layout.size("batch"))
  rows = [*prompts, *[prompts[0]] * (B - len(prompts))]
  longest = max(map(len, rows)) + chosen.tokens - 1
  kept = chosen.cache or decoder.precision.compute
  cache = make_cache(decoder, B, slots_for(longest), kept)
  cache, x_B1D = prefill(decoder, params, cache, (rows, 0), chosen.chunk)
  terms = Terms(
    penalty=np.asarray(beam.length_penalty, np.float32),
    stops_S=pad_stops(chosen.stops),
    tokens=np.asarray(chosen.tokens, np.int32),
    # Of one beam that ended the rest is no longer the likeliest at each step.
    first_full=np.asarray(beam.early_stopping is True or beam.width == 1),
    at_most=np.asarray(beam.early_stopping == "never" and beam.length_penalty > 0),
  )
  wanted_B = np.arange(B) < len(prompts)
  lengths_B = np.asarray([len(row) for row in rows], np.int32)
  size = (beam.width, bucket(chosen.tokens))
  state = _begin(decoder, size, (params, terms), cache, (x_B1D, wanted_B))
  state = _advance(decoder, (params, terms), state, lengths_B)
  return _read(state, len(prompts), beam.returned, frozenset(chosen.stops))


def _check(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  beam: Beam,
  options: Options,
  before: int,
) -> None:
  tokens, chunk = options.tokens, options.chunk
  check(decoder.spec, prompts, tokens=tokens, chunk=chunk, before=before)
  vocab, stops = decoder.spec.vocab, len(set(options.stops))
  # Each beam needs a token of its own to begin with, and none that ends it.
  if beam.width > vocab - stops:
    raise InputError(
      f"width: {beam.width} beams, and of {vocab} tokens {stops} are stops; at most "
      f"{vocab - stops} beams can begin."
    )
  for field, value in (("seed", options.seed), ("top", options.top)):
    if value:
      raise InputError(f"{field}: {value}; a beam search has no use for it.")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
  decoder: Decoder,
  size: tuple[int, int],
  given: tuple[PyTree, Terms],
  cache: PyTree,
  read: tuple[Float[Array, "B 1 D"], Array],
) -> State:
  """Returns the state after the first token: all beams come from the one prompt."""
  (params, terms), (x_B1D, wanted_B), (W, N) = given, read, size
  B = len(x_B1D)
  cache = _take(decoder, cache, jnp.repeat(jnp.arange(B), W))
  sum_BW = jnp.full((B, W), -jnp.inf).at[:, 0].set(0.0)
  score_BW, length_BW = jnp.full((B, W), -jnp.inf), jnp.zeros((B, W), jnp.int32)
  ids_BWN = jnp.zeros((B, W, N), jnp.int32)
  made = jnp.zeros((), jnp.int32)
  state = State(
    cache, ids_BWN, sum_BW, ids_BWN, score_BW, length_BW, jnp.asarray(wanted_B), made
  )
  logits_B1V = logits(decoder.spec, params, x_B1D)
  logprob_BWV = jnp.repeat(jax.nn.log_softmax(logits_B1V), W, axis=1)
  return _select(decoder, terms, state, logprob_BWV)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
  decoder: Decoder,
  given: tuple[PyTree, Terms],
  state: State,
  lengths_B: Int[Array, "B"],
) -> State:
  """Returns the state when every prompt is done."""
  params, terms = given
  B, W, _ = state.beam_BWN.shape

  def one(state: State) -> State:
    token_BW = state.beam_BWN[:, :, state.made - 1]
    # A prompt that is done leaves no trace in its rows of the cache.
    position_B = jnp.where(state.open_B, lengths_B + state.made - 1, -1)
    position_BW = jnp.broadcast_to(position_B[:, None], (B, W))
    x_R1D, cache = decoder.apply(
      {"params": params}, token_BW.reshape(-1, 1), position_BW.reshape(-1, 1),
      cache=state.cache,
    )  # fmt: skip
    logprob_R1V = jax.nn.log_softmax(logits(decoder.spec, params, x_R1D))
    state = state._replace(cache=cache)
    return _select(decoder, terms, state, logprob_R1V.reshape(B, W, -1))

  def wanted(state: State) -> Array:
    return (state.made < terms.tokens) & jnp.any(state.open_B)

  return jax.lax.while_loop(wanted, one, state)


def _select(
  decoder: Decoder, terms: Terms, state: State, logprob_BWV: Float[Array, "B W V"]
) -> State:
  """Returns the state after one more token of every beam."""
  B, W, V = logprob_BWV.shape
  # So many that W of them go on, whatever ends.
  P = min(W * (1 + len(terms.stops_S)), W * V)
  total_BC = (state.sum_BW[:, :, None] + logprob_BWV).reshape(B, -1)
  total_BP, place_BP = jax.lax.top_k(total_BC, P)
  parent_BP, token_BP = place_BP // V, place_BP % V
  made = state.made + 1
  stops_BP = (token_BP[:, :, None] == terms.stops_S[None, None]).any(axis=-1)
  ends_BP = stops_BP | (made == terms.tokens)
  ids_BPN = _of(state.beam_BWN, parent_BP).at[:, :, made - 1].set(token_BP)

  sum_BW, on_BW = jax.lax.top_k(jnp.where(ends_BP, -jnp.inf, total_BP), W)
  parent_BW = _of(parent_BP, on_BW) + W * jnp.arange(B)[:, None]

  counts_BP = ends_BP & (jnp.arange(P) < W)[None] & state.open_B[:, None]
  of_P = total_BP / made.astype(jnp.float32) ** terms.penalty
  scores_BC = jnp.concatenate(
    (state.score_BW, jnp.where(counts_BP, of_P, -jnp.inf)), axis=1
  )
  score_BW, best_BW = jax.lax.top_k(scores_BC, W)
  ended_BCN = jnp.concatenate((state.ended_BWN, ids_BPN), axis=1)
  lengths_BC = jnp.concatenate((state.length_BW, jnp.full((B, P), made)), axis=1)

  length = jnp.where(terms.at_most, terms.tokens, made).astype(jnp.float32)
  full_B = score_BW[:, -1] > -jnp.inf
  better_B = sum_BW[:, 0] / length**terms.penalty > score_BW[:, -1]
  return State(
    cache=_take(decoder, state.cache, parent_BW.reshape(-1)),
    beam_BWN=_of(ids_BPN, on_BW),
    sum_BW=sum_BW,
    ended_BWN=_of(ended_BCN, best_BW),
    score_BW=score_BW,
    length_BW=_of(lengths_BC, best_BW),
    open_B=state.open_B & better_B & ~(full_B & terms.first_full),
    made=made,
  )


def _of(values: Array, place_BW: Int[Array, "B W"]) -> Array:
  """Returns, for each prompt, its values at these places of the second dimension."""
  return jax.vmap(lambda values, places: values[places])(values, place_BW)


def _take(decoder: Decoder, cache: PyTree, rows_R: Int[Array, "R"]) -> PyTree:
  """Returns a cache whose row r is that of row `rows_R[r]`."""
  prefix = jax.tree.map(lambda a: jnp.take(a, rows_R, axis=0), cache["prefix"])
  layers = jax.tree.map(lambda a: jnp.take(a, rows_R, axis=1), cache["layers"])
  return placed(decoder, {"prefix": prefix, "layers": layers})


def _read(
  state: State, prompts: int, returned: int, stops: frozenset[int]
) -> list[list[Hypothesis]]:
  arrays = (state.ended_BWN, state.length_BW, state.score_BW)
  ended_BWN, length_BW, score_BW = jax.device_get(arrays)

  def of(row: int, place: int) -> Hypothesis:
    ids = ended_BWN[row, place, : length_BW[row, place]].tolist()
    stopped = ids[-1] in stops
    score = float(score_BW[row, place])
    return Hypothesis(
      ids[:-1] if stopped else ids, "stop" if stopped else "length", score
    )

  return [[of(row, place) for place in range(returned)] for row in range(prompts)]


def best_of(
  decoder: Decoder,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling | Sequence[Sampling],
  n: int,
  **options: Any,
) -> list[list[Generated]]:
  """Returns n samples of each prompt, ranked by their mean log-probability.

  That is under the model, whatever they were drawn from, over the tokens without the
  stop; a sample without tokens comes last. Each has a seed of its own, which follows
  from its number and the sampling's seed, or where that names none, from `seed` and the
  prompt's place.

  Raises:
    InputError: n under 1, greedy rows of which all samples would be the same, and what
      `generate` refuses.
  """
  rows = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
  if n < 1:
    raise InputError(f"n: {n} is under 1.")
  if len(rows) != len(prompts):
    raise InputError(
      f"sampling: {len(rows)} for {len(prompts)} prompts; give one for all, or as many."
    )
  if n > 1 and any(row.temperature == 0 for row in rows):
    raise InputError(f"n: at temperature 0 all {n} samples would be the same.")

  if options.get("seed", 0) < 0:
    raise InputError(f"seed: {options['seed']} is negative.")

  def seeded(place: int, row: Sampling, number: int) -> Sampling:
    root = (options.get("seed", 0), place) if row.seed is None else (row.seed,)
    high, low = np.random.SeedSequence((*root, number)).generate_state(2).tolist()
    return dataclasses.replace(row, seed=high << 32 | low)

  many = [seeded(*pair, number) for pair in enumerate(rows) for number in range(n)]
  repeated = [prompt for prompt in prompts for _ in range(n)]
  found = generate(decoder, params, repeated, many, **options)

  def mean(row: Generated) -> float:
    return float(np.mean(row.model)) if row.model else -np.inf

  groups = [found[first : first + n] for first in range(0, len(found), n)]
  return [sorted(group, key=mean, reverse=True) for group in groups]
