"""Prompts to new tokens: a prefill in chunks, then one compiled loop.

Rows may differ in everything: the length of the prompt, the sampling, when they stop.
None of it, nor the neighbours, nor the mesh changes what a row gets. Compiled are: a
prefill for each power of two up to the chunk, and one loop; for each bucket of rows, of
slots and of new tokens, each set of sampling fields in use, and each `top`.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding import choice
from jaxlm.decoding.choice import Ranked, Seen
from jaxlm.decoding.prefill import (
  Prefix,
  bucket,
  check,
  make_cache,
  placed,
  prefill,
  slots_for,
  whole,
)
from jaxlm.decoding.sampling import Controls, Sampling, controls
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits, prefix_of
from jaxlm.shapes import Array, Int, PyTree


class Out(NamedTuple):
  """What a loop writes, a column for each new token."""

  token_BN: Array
  model_BN: Array
  """Log-probabilities of the tokens under the model, in nats."""
  sampling_BN: Array
  """The same under the distribution that they were drawn from."""
  top: Ranked | None
  """The likeliest tokens under the model, [B, N, top]."""
  top_sampling: Ranked | None
  """The same under the distribution that was drawn from."""


class State(NamedTuple):
  """What the loop carries; its buffers are given away at each call."""

  cache: PyTree
  seen: Seen
  token_B: Array
  """The newest token, whose keys the cache does not hold yet."""
  position_B: Array
  """Its position."""
  done_B: Array
  made: Array
  """Columns written."""
  out: Out


class Generated(NamedTuple):
  """What a row got."""

  tokens: list[int]
  """New ids, the stop left out."""
  ended: Literal["stop", "length", "caller"]
  """A stop token came, or no more were asked for, or the caller ended the row."""
  model: list[float]
  """Log-probability of each token under the model, in nats."""
  sampling: list[float]
  """The same under the distribution that it was drawn from; 0 for greedy."""
  top: list[dict[int, float]]
  """The likeliest ids at each place and their log-probabilities under the model."""
  top_sampling: list[dict[int, float]]
  """The same under the distribution that was drawn from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What holds for all rows of a generation."""

  tokens: int
  """Most new ids of a row."""
  stops: Collection[int] = ()
  """Ids that end a row."""
  seed: int = 0
  """Of the rows whose sampling names none."""
  top: int = 0
  """How many of the likeliest ids to return at each place."""
  chunk: int = 512
  """Prompt tokens read at a time: the memory of a long prompt is bounded by it."""
  cache: str | None = None
  """Dtype of keys and values, int8 among them; None: that of the computation."""


def generate(
  decoder: Decoder,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling | Sequence[Sampling],
  *,
  prefix: Prefix | None = None,
  **options: Any,
) -> list[Generated]:
  """Returns new ids for each prompt.

  Args:
    decoder: the model; `unroll` makes it and its parameters faster on a CPU.
    params: its parameters.
    prompts: ids of each row.
    sampling: one for all rows, or one for each.
    prefix: what every row begins with, already read.
    options: the fields of `Options`; `tokens` has to be given.

  Raises:
    InputError: naming the prompt, the field or the bound that is wrong.
  """
  chosen = Options(**options)
  return Generation(decoder, params, prompts, sampling, chosen, prefix).finish()


class Generation:
  """Rows that are being written, for callers who want to see them grow."""

  def __init__(
    self,
    decoder: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    options: Options,
    prefix: Prefix | None = None,
  ):
    """Reads the prompts; arguments and errors are those of `generate`."""
    rows = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    shared = () if prefix is None else prefix.ids
    _check(decoder, prompts, rows, options, len(shared) + prefix_of(params))
    self._decoder, self._options, self._rows = decoder, options, len(prompts)
    self.prompts, self.samplings = prompts, rows
    """As they were given; of samplings one for each row."""
    B = whole(bucket(len(prompts)), decoder.layout.size("batch"))
    # Added rows repeat the first, so that no program is compiled for their sake.
    prompts = [*prompts, *[prompts[0]] * (B - len(prompts))]
    rows = [*rows, *[rows[0]] * (B - len(rows))]
    vocab, stops = decoder.spec.vocab, sorted(set(options.stops))
    asked = controls(rows, vocab, stops=stops, seed=options.seed)
    seen = choice.start(asked, [[*shared, *row] for row in prompts], vocab)
    # On the host: with several processes an array of one of them is no argument.
    self._given = (params, jax.device_get(asked), pad_stops(stops))
    longest = len(shared) + max(map(len, prompts)) + options.tokens - 1
    if prefix is None:
      kept = options.cache or decoder.precision.compute
      cache = make_cache(decoder, B, slots_for(longest), kept)
    else:
      cache = prefix.repeated(decoder, B, longest, options.cache)
    rows_read = (prompts, len(shared))
    self._cache, x_B1D = prefill(decoder, params, cache, rows_read, options.chunk)
    places_B = np.asarray([len(shared) + len(row) for row in prompts], np.int32)
    unwanted_B = np.arange(B) >= self._rows
    self._read = (x_B1D, jax.device_get(seen), places_B, unwanted_B)
    self._state: State | None = None
    self._ended: dict[int, int] = {}
    self._stops = frozenset(stops)

  @property
  def vocab(self) -> int:
    """The model's number of ids."""
    return self._decoder.spec.vocab

  @property
  def made(self) -> int:
    """New tokens so far, of the rows that have not stopped."""
    return 0 if self._state is None else int(self._state.made)

  @property
  def running(self) -> bool:
    """Whether a row wants more tokens."""
    if self._state is None:
      return True
    return self.made < self._options.tokens and not np.all(self._state.done_B)

  def step(self, tokens: int = 1, mask_BV: np.ndarray | None = None) -> None:
    """Makes up to so many more tokens of every row that has not stopped.

    With a mask, [rows, V], only tokens that it has can come.

    Raises:
      InputError: under one token is asked for.
    """
    if tokens < 1:
      raise InputError(f"tokens of a step: {tokens} is under 1.")
    params, controls, stops_S = self._given
    if mask_BV is not None:
      extra = len(self._read[-1]) - len(mask_BV)
      mask_BV = np.concatenate((mask_BV, np.ones((extra, mask_BV.shape[1]), bool)))
      controls = controls._replace(mask_BV=mask_BV)
    given, most = (params, controls, stops_S), self._options.tokens
    upto = np.int32(min(self.made + tokens, most))
    if self._state is None:
      top, width = self._options.top, bucket(most)
      self._state = begin(self._decoder, top, width, given, self._cache, self._read)
      del self._cache
    if self.made < upto:
      self._state = advance(self._decoder, self._options.top, given, self._state, upto)

  def end(self, row: int, tokens: int) -> None:
    """Ends a row after so many of its tokens: a stop string, a constraint's end."""
    if self._state is None:
      raise ValueError(f"row {row}: it has no token yet")
    self._ended.setdefault(row, tokens)
    done_B = np.asarray(self._state.done_B).copy()
    done_B[row] = True
    # As it was placed before: else the loop would be compiled once more.
    placed_B = jax.device_put(done_B, self._state.done_B.sharding)
    self._state = self._state._replace(done_B=placed_B)

  def rows(self) -> list[Generated]:
    """Returns what every row has so far."""
    if self._state is None:
      return [Generated([], "length", [], [], [], []) for _ in range(self._rows)]
    made, out = self.made, jax.device_get(self._state.out)
    return [self._row(out, row, made) for row in range(self._rows)]

  def stream(self, every: int) -> Iterator[list[Generated]]:
    """Yields all rows after each so many new tokens, until all have ended."""
    while self.running:
      self.step(every)
      yield self.rows()

  def finish(self) -> list[Generated]:
    """Makes all that is left."""
    if self.running:
      self.step(self._options.tokens)
    return self.rows()

  def _row(self, out: Out, row: int, made: int) -> Generated:
    ids = out.token_BN[row, :made].tolist()
    stop = next((i for i, token in enumerate(ids) if token in self._stops), None)
    cut = self._ended.get(row)
    ended: Any = "length" if stop is None else "stop"
    if cut is not None and (stop is None or cut <= stop):
      stop, ended = cut, "caller"
    end = len(ids) if stop is None else stop
    model, sampling = (a[row, :end].tolist() for a in (out.model_BN, out.sampling_BN))
    tops = (_listed(ranked, row, end) for ranked in (out.top, out.top_sampling))
    return Generated(ids[:end], ended, model, sampling, *tops)


def _listed(ranked: Ranked | None, row: int, end: int) -> list[dict[int, float]]:
  """Returns a row's likeliest ids of each place, where they were asked for."""
  if ranked is None:
    return []
  pairs = zip(*(a[row, :end].tolist() for a in ranked), strict=True)
  return [dict(zip(*pair, strict=True)) for pair in pairs]


def _check(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  rows: Sequence[Sampling],
  options: Options,
  before: int,
) -> None:
  model, tokens, chunk = decoder.spec, options.tokens, options.chunk
  check(model, prompts, tokens=tokens, chunk=chunk, before=before)
  if len(rows) != len(prompts):
    raise InputError(
      f"sampling: {len(rows)} for {len(prompts)} prompts; give one for all, or as many."
    )
  if not 0 <= options.top <= model.vocab:
    raise InputError(f"top: {options.top} of {model.vocab} ids.")


def pad_stops(stops: Collection[int]) -> Int[np.ndarray, "S"]:
  """Returns stops as an array of one of few sizes; -1 is no id."""
  stops_S = np.full(bucket(max(len(set(stops)), 1)), -1, np.int32)
  stops_S[: len(set(stops))] = sorted(set(stops))
  return stops_S


Given = tuple[PyTree, Controls, Int[Array | np.ndarray, "S"]]
"""Parameters, what the rows ask, and the ids that end one."""
Read = tuple[Array, Seen, Array, Array]
"""The residual stream [B, 1, D] and what is seen after the prompts, the position of the
first new token, and which rows are not wanted."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def begin(
  decoder: Decoder, top: int, width: int, given: Given, cache: PyTree, read: Read
) -> State:
  """Returns the state after the first of up to `width` new tokens of each row."""
  x_B1D, seen, position_B, done_B = read
  B = len(position_B)

  def column(dtype: Any, *more: int) -> Array:
    return jnp.zeros((B, width, *more), dtype)

  ranked = Ranked(column(jnp.int32, top), column(jnp.float32, top)) if top else None
  values = (column(jnp.int32), column(jnp.float32), column(jnp.float32))
  out = Out(*values, ranked, jax.tree.map(jnp.copy, ranked))
  token_B, made = jnp.zeros(B, jnp.int32), jnp.zeros((), jnp.int32)
  state = State(cache, seen, token_B, position_B - 1, done_B, made, out)
  return _told(decoder, _choose(decoder, top, given, state, x_B1D))


def _choose(
  decoder: Decoder, top: int, given: Given, state: State, x_B1D: Array
) -> State:
  """Returns the state with the token after `x_B1D`, and its column written."""
  params, controls, stops_S = given
  logits_BV = logits(decoder.spec, params, x_B1D)[:, 0]
  position_B = state.position_B + 1
  found = choice.choose(controls, state.seen, logits_BV, position_B, top=top)
  active_B = ~state.done_B
  seen = choice.see(state.seen, found.token_B, active_B)
  done_B = state.done_B | (found.token_B[:, None] == stops_S[None]).any(axis=1)
  new = Out(
    found.token_B, found.model_B, found.sampling_B, found.top_model, found.top_sampling
  )
  out = jax.tree.map(lambda a, b: a.at[:, state.made].set(b), state.out, new)
  made = state.made + 1
  return State(state.cache, seen, found.token_B, position_B, done_B, made, out)


def _told(decoder: Decoder, state: State) -> State:
  """Returns the state with what the host reads whole on every device: with several
  processes each of them reads it."""
  whole = lambda a: decoder.layout.constrain(a, *[None] * a.ndim)  # noqa: E731
  told = jax.tree.map(whole, (state.done_B, state.made, state.out))
  return state._replace(done_B=told[0], made=told[1], out=told[2])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def advance(
  decoder: Decoder, top: int, given: Given, state: State, upto: Int[Array, ""]
) -> State:
  """Returns the state after `upto` new tokens, or when every row is done."""

  def one(state: State) -> State:
    # A row that is done leaves no trace in its cache.
    position_B = jnp.where(state.done_B, -1, state.position_B)
    x_B1D, cache = decoder.apply(
      {"params": given[0]}, state.token_B[:, None], position_B[:, None],
      cache=state.cache,
    )  # fmt: skip
    state = state._replace(cache=placed(decoder, cache))
    return _choose(decoder, top, given, state, x_B1D)

  def wanted(state: State) -> Array:
    return (state.made < upto) & ~jnp.all(state.done_B)

  return _told(decoder, jax.lax.while_loop(wanted, one, state))
