"""Several tokens a forward: cheap guesses, and one check of all of them by the model.

In a round a proposer guesses the next tokens of each row, the model reads them in one
forward, and each is taken or replaced such that what comes out is distributed as if the
model had drawn token by token (Leviathan et al. 2023, arXiv:2211.17192; Chen et al.
2023, arXiv:2302.01318). With p the distribution that the row's sampling makes of the
model's logits, penalties and all, and q the one that the guess was drawn from, a guess
x is taken with probability min(1, p(x) / q(x)); at the first that is not, the token is
drawn from max(p - q, 0) instead, and after a round whose guesses were all taken, from
p. A greedy row's p is one token: it gets the tokens of `generate`, up to the rounding
of a forward of several tokens.

The random numbers of a position are those of the row's key, the position and their
use. What is proposed for a position and then thrown away with the round has decided
nothing about earlier tokens, so to use its numbers again is a fresh draw.

In shapes C counts the guesses of a round and T, C + 1, the tokens of its forward.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding import choice
from jaxlm.decoding.generate import Generated, Options, pad_stops
from jaxlm.decoding.prefill import (
  bucket,
  check,
  make_cache,
  placed,
  prefill,
  slots_for,
  whole,
)
from jaxlm.decoding.proposers import Proposal, Proposer, Rows, Use, draw, keys
from jaxlm.decoding.sampling import Controls, Sampling, controls
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits, prefix_of
from jaxlm.shapes import Array, Bool, Float, PyTree


class Acceptance(NamedTuple):
  """How a row's proposals fared."""

  proposed: int
  accepted: int
  """Proposals that became tokens. Those behind a rejected one, or behind a stop, were
  proposed in vain."""
  rounds: int
  """Forwards of the model, the prompt's not counted."""
  tokens: int
  """New tokens, a stop among them."""

  @property
  def rate(self) -> float:
    """Share of the proposals that were accepted; 0 where none was made."""
    return self.accepted / max(self.proposed, 1)

  @property
  def tokens_a_round(self) -> float:
    """What a forward of the model gave on average."""
    return self.tokens / self.rounds


class State(NamedTuple):
  """What the loop carries; its buffers are given away."""

  cache: PyTree
  proposer: PyTree
  """What the proposer keeps: a draft model's cache."""
  rows: Rows
  model_BS: Array
  """Log-probability of each new id under the model, at its position."""
  sampling_BS: Array
  """The same under the distribution that it was drawn from."""
  proposed_B: Array
  accepted_B: Array
  rounds_B: Array


class Block(NamedTuple):
  """A round while its tokens are checked one after another."""

  step: Array
  open_B: Array
  """Rows whose guesses have all been taken so far."""
  state: State


def speculate(
  decoder: Decoder,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling | Sequence[Sampling],
  proposer: Proposer,
  **options: Any,
) -> tuple[list[Generated], list[Acceptance]]:
  """Returns new ids for each prompt, and how the proposals fared.

  A row's ids depend on its prompt, its sampling and the proposer alone. They are
  distributed as those of `generate`; greedy ones are the same, drawn ones are not.

  Args:
    decoder: the model.
    params: its parameters.
    prompts: ids of each row.
    sampling: one for all rows, or one for each; every field holds.
    proposer: `Draft` or `Ngram`.
    options: the fields of `generate.Options`, `tokens` among them, but for `top`.

  Raises:
    InputError: naming the prompt, the field or the bound that is wrong.
  """
  chosen = Options(**options)
  wanted = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
  _check(decoder, prompts, wanted, chosen, prefix_of(params))
  B = whole(bucket(len(prompts)), decoder.layout.size("batch"))
  # Added rows repeat the first, so that no program is compiled for their sake.
  texts = [*prompts, *[prompts[0]] * (B - len(prompts))]
  wanted = [*wanted, *[wanted[0]] * (B - len(wanted))]
  stops = sorted(set(chosen.stops))
  asked = controls(wanted, decoder.spec.vocab, stops=stops, seed=chosen.seed)
  slots = slots_for(max(map(len, texts)) + chosen.tokens)
  kept = chosen.cache or decoder.precision.compute
  cache = make_cache(decoder, B, slots, kept, proposer.ahead)
  cache, _ = prefill(decoder, params, cache, (texts, 0), chosen.chunk)
  carried = proposer.start(decoder, texts, slots, chosen)
  seen = choice.start(asked, texts, decoder.spec.vocab)
  rows = _rows(texts, seen, len(prompts), (slots, chosen.tokens))
  # Each a buffer of its own: they are given away.
  floats = functools.partial(jnp.zeros, (B, slots), jnp.float32)
  counts = functools.partial(jnp.zeros, B, jnp.int32)
  state = State(cache, carried, rows, floats(), floats(), counts(), counts(), counts())
  given = (params, jax.device_get(asked), pad_stops(stops))
  state = _run(decoder, given, proposer, state)
  return _read(state, prompts, frozenset(stops))


def _check(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  rows: Sequence[Sampling],
  options: Options,
  before: int,
) -> None:
  tokens, chunk = options.tokens, options.chunk
  check(decoder.spec, prompts, tokens=tokens, chunk=chunk, before=before)
  if len(rows) != len(prompts):
    raise InputError(
      f"sampling: {len(rows)} for {len(prompts)} prompts; give one for all, or as many."
    )
  if options.top:
    raise InputError(f"top: {options.top}; speculative decoding ranks no ids. Give 0.")


def _rows(
  texts: Sequence[Sequence[int]],
  seen: choice.Seen,
  wanted: int,
  size: tuple[int, int],
) -> Rows:
  slots, tokens = size
  ids_BS = np.zeros((len(texts), slots), np.int32)
  for line_S, text in zip(ids_BS, texts, strict=True):
    line_S[: len(text)] = text
  length_B = np.asarray([len(text) for text in texts], np.int32)
  done_B = np.arange(len(texts)) >= wanted
  return Rows(
    ids_BS=jnp.array(ids_BS),
    length_B=jnp.array(length_B),
    end_B=jnp.array(length_B + tokens),
    done_B=jnp.array(done_B),
    seen=seen,
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _run(
  decoder: Decoder,
  given: tuple[PyTree, Controls, Array | np.ndarray],
  proposer: Proposer,
  state: State,
) -> State:
  """Returns the state when every row is done."""
  params, asked, stops_S = given

  def one(state: State) -> State:
    rows = state.rows
    proposal, carried = proposer.propose(asked, rows, state.proposer)
    # The last token is never a guess: the forward that checks it gives one more.
    left_B = rows.end_B - rows.length_B
    count_B = jnp.where(rows.done_B, 0, jnp.minimum(proposal.count_B, left_B - 1))
    proposal = proposal._replace(count_B=count_B)
    cache, logits_BTV = _forward(decoder, params, state, proposal)
    state = state._replace(
      cache=cache,
      proposer=carried,
      proposed_B=state.proposed_B + count_B,
      rounds_B=state.rounds_B + (~rows.done_B).astype(jnp.int32),
    )
    return _verify((asked, stops_S), proposal, logits_BTV, state)

  state = jax.lax.while_loop(lambda s: ~jnp.all(s.rows.done_B), one, state)
  # Whole on every device: the host reads these, of several processes each.
  place = lambda a: decoder.layout.constrain(a, *[None] * a.ndim)  # noqa: E731
  kept = (state.cache, state.proposer)
  state = jax.tree.map(place, state._replace(cache=None, proposer=None))
  return state._replace(cache=kept[0], proposer=kept[1])


def _forward(
  decoder: Decoder, params: PyTree, state: State, proposal: Proposal
) -> tuple[PyTree, Float[Array, "B T V"]]:
  """Reads each row's newest token and its guesses.

  Guesses that turn out wrong are overwritten by the tokens that stand there instead.
  """
  rows, T = state.rows, proposal.token_BC.shape[1] + 1
  newest_B1 = jnp.take_along_axis(rows.ids_BS, rows.length_B[:, None] - 1, axis=1)
  tokens_BT = jnp.concatenate((newest_B1, proposal.token_BC), axis=1)
  place_1T = jnp.arange(T)[None]
  read_BT = (place_1T <= proposal.count_B[:, None]) & ~rows.done_B[:, None]
  positions_BT = jnp.where(read_BT, rows.length_B[:, None] - 1 + place_1T, -1)

  def first(width: int, cache: PyTree) -> tuple[PyTree, Array]:
    x_BTD, cache = decoder.apply(
      {"params": params}, tokens_BT[:, :width], positions_BT[:, :width], cache=cache
    )
    logits_BTV = logits(decoder.spec, params, x_BTD)
    unread = ((0, 0), (0, T - width), (0, 0))
    return placed(decoder, cache), jnp.pad(logits_BTV, unread)

  # Without a guess in the batch one token is enough, in half the time on a CPU.
  guessed, every, newest = (
    jnp.any(proposal.count_B > 0),
    functools.partial(first, T),
    functools.partial(first, 1),
  )
  return jax.lax.cond(guessed, every, newest, state.cache)


def _verify(
  given: tuple[Controls, Array | np.ndarray],
  proposal: Proposal,
  logits_BTV: Float[Array, "B T V"],
  state: State,
) -> State:
  """Returns the state with the tokens of a round, each drawn after the one before.

  Penalties see each accepted token, as in a loop of single tokens.
  """
  asked, stops_S = given
  B, C = proposal.token_BC.shape

  def one(block: Block) -> Block:
    step, open_B, state = block
    rows, guess = state.rows, jnp.minimum(step, C - 1)
    logits_BV = logits_BTV[:, step]
    p_BV = choice.probabilities(asked, rows.seen, logits_BV)
    guess_B = proposal.token_BC[:, guess]
    guessed_B = step < proposal.count_B
    if proposal.probability_BCV is None:
      q_BV = jax.nn.one_hot(guess_B, p_BV.shape[-1], dtype=p_BV.dtype)
    else:
      q_BV = proposal.probability_BCV[:, guess]
    # Where there is no guess the token is drawn from p, which is what is left of it.
    q_BV = jnp.where(guessed_B[:, None], q_BV, 0)
    chance_B = _uniform(asked, rows.length_B)
    accepted_B = guessed_B & accepts(chance_B, _at(p_BV, guess_B), _at(q_BV, guess_B))
    drawn_B = draw(asked, residual(p_BV, q_BV), rows.length_B, Use.REST)
    token_B = jnp.where(accepted_B, guess_B, drawn_B)
    # A place past the end is written nowhere.
    place_B = jnp.where(open_B, rows.length_B, rows.ids_BS.shape[1])
    put = lambda a, new: a.at[jnp.arange(B), place_B].set(new, mode="drop")  # noqa: E731
    model_B = _at(jax.nn.log_softmax(logits_BV), token_B)
    length_B = rows.length_B + open_B.astype(jnp.int32)
    stop_B = (token_B[:, None] == stops_S[None]).any(axis=1)
    done_B = rows.done_B | (open_B & (stop_B | (length_B == rows.end_B)))
    seen = choice.see(rows.seen, token_B, open_B)
    state = state._replace(
      rows=Rows(put(rows.ids_BS, token_B), length_B, rows.end_B, done_B, seen),
      model_BS=put(state.model_BS, model_B),
      sampling_BS=put(state.sampling_BS, jnp.log(_at(p_BV, token_B))),
      accepted_B=state.accepted_B + (open_B & accepted_B).astype(jnp.int32),
    )
    return Block(step + 1, open_B & accepted_B & ~done_B, state)

  first = Block(jnp.zeros((), jnp.int32), ~state.rows.done_B, state)
  return jax.lax.while_loop(lambda block: jnp.any(block.open_B), one, first).state


def accepts(
  chance_B: Float[Array, "B"], p_B: Float[Array, "B"], q_B: Float[Array, "B"]
) -> Bool[Array, "B"]:
  """Says which guesses to take, each with probability min(1, p / q)."""
  return chance_B * q_B < p_B


def residual(p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"]) -> Array:
  """Returns weights of what p has more of than q; of p itself where that is none."""
  more_BV = jnp.maximum(p_BV - q_BV, 0)
  # None is left where p is q, up to rounding: there all but no guess is rejected.
  return jnp.where(jnp.any(more_BV > 0, axis=-1, keepdims=True), more_BV, p_BV)


def _uniform(asked: Controls, position_B: Array) -> Float[Array, "B"]:
  # Greedy rows take what has a probability at all.
  if asked.key_B2 is None:
    return jnp.zeros(len(position_B))
  return jax.vmap(jax.random.uniform)(keys(asked.key_B2, position_B, Use.TEST))


def _at(values_BV: Float[Array, "B V"], token_B: Array) -> Float[Array, "B"]:
  return jnp.take_along_axis(values_BV, token_B[:, None], axis=-1)[:, 0]


def _read(
  state: State, prompts: Sequence[Sequence[int]], stops: frozenset[int]
) -> tuple[list[Generated], list[Acceptance]]:
  state = jax.device_get(state._replace(cache=None, proposer=None))
  found, told = [], []
  for row, prompt in enumerate(prompts):
    first, last = len(prompt), int(state.rows.length_B[row])
    ids = state.rows.ids_BS[row, first:last].tolist()
    stopped = ids[-1] in stops
    end = last - stopped
    model, sampling = (
      a[row, first:end].tolist() for a in (state.model_BS, state.sampling_BS)
    )
    ended = "stop" if stopped else "length"
    found.append(Generated(ids[: end - first], ended, model, sampling, [], []))
    counts = (state.proposed_B, state.accepted_B, state.rounds_B)
    told.append(Acceptance(*(int(a[row]) for a in counts), tokens=len(ids)))
  return found, told
