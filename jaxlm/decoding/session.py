"""One row's text while it grows: its keys and values are kept, tokens are streamed.

Compiled are one prefill for each power of two of new tokens, and one loop for each set
of fields that a `Sampling` uses.
"""

from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from jaxlm.decoding import choice
from jaxlm.decoding.generate import Given, State, advance, begin, pad_stops
from jaxlm.decoding.prefill import bucket, check, make_cache, prefill
from jaxlm.decoding.sampling import Sampling, controls
from jaxlm.errors import InputError
from jaxlm.models import spec
from jaxlm.models.decoder import Decoder, prefix_of
from jaxlm.shapes import PyTree

CHUNK = 4
"""Tokens made before the caller sees them."""
READ = 512
"""Prompt tokens read at a time."""


class Session:
  """A cache of a fixed length and the ids whose keys it holds."""

  def __init__(self, decoder: Decoder, params: PyTree, *, length: int):
    """Makes an empty cache for `length` positions.

    Raises:
      InputError: the model is made for fewer positions, or has learned fewer.
    """
    positions, context = decoder.spec.positions, decoder.spec.context
    needed = length + prefix_of(params)
    if context is not None and needed > context:
      raise InputError(
        f"length: {needed} positions, and the model is made for {context}."
      )
    if isinstance(positions, spec.Learned) and needed > positions.length:
      raise InputError(
        f"length: {needed} positions, and the model has learned {positions.length}."
      )
    self._decoder, self._params, self.length = decoder, params, length
    self._rows = decoder.layout.size("batch")
    windows = [b.mixer.window for b in decoder.spec.blocks if b.mixer.window]
    self._rings = bool(windows) and min(windows) + CHUNK < length
    self._cache: PyTree | None = None
    self._held: list[int] = []

  def _empty(self) -> PyTree:
    """Returns a cache that can be taken back by what is made ahead of the reader."""
    compute = self._decoder.precision.compute
    return make_cache(self._decoder, self._rows, self.length, compute, CHUNK)

  def stream(
    self, ids: Sequence[int], sampling: Sampling, *, stops: Collection[int], seed: int
  ) -> Iterator[int]:
    """Yields what follows `ids`, up to a stop, which is not yielded, or a full cache.

    Of `ids` only what the cache does not hold yet is computed. A draw depends on the
    seed and the position alone.

    Raises:
      InputError: `ids` are empty, not the model's, or leave no room for a token.
    """
    if not 0 < len(ids) < self.length:
      raise InputError(
        f"length: {len(ids)} tokens do not fit into {self.length} positions with at "
        "least one new one."
      )
    check(self._decoder.spec, [ids], tokens=1)
    ids, vocab = list(ids), self._decoder.spec.vocab
    asked = controls([sampling] * self._rows, vocab, stops=stops, seed=seed)
    # All rows draw as the first: those behind it are there for the mesh alone.
    given = (self._params, jax.device_get(asked), pad_stops(stops))
    state, told = self._begin(ids, given), 0
    while True:
      made = np.asarray(state.out.token_BN)[0, : int(state.made)].tolist()
      self._cache, self._held = state.cache, [*ids, *made[:-1]]
      for token in made[told:]:
        if token in stops:
          return
        yield token
      told = len(made)
      if len(ids) + told == self.length:
        return
      upto = np.int32(min(told + CHUNK, self.length - len(ids)))
      # Given away: who stops the reader meanwhile finds no cache, and begins anew.
      self._cache, self._held = None, []
      state = advance(self._decoder, 0, given, state, upto)

  def _begin(self, ids: list[int], given: Given) -> State:
    """Reads what the cache does not hold; returns the state with one new token."""
    common = 0
    for ours, theirs in zip(self._held, ids[:-1], strict=False):
      if ours != theirs:
        break
      common += 1
    cache, self._cache = self._cache, None
    if cache is None or (self._rings and len(self._held) - common > CHUNK):
      cache, common = self._empty(), 0
    rows, self._held = ([ids[common:]] * self._rows, common), []
    cache, x_B1D = prefill(self._decoder, self._params, cache, rows, READ)
    seen = choice.start(given[1], [ids] * self._rows, self._decoder.spec.vocab)
    places_B = np.full(self._rows, len(ids), np.int32)
    read = (x_B1D, jax.device_get(seen), places_B, np.zeros(self._rows, bool))
    return begin(self._decoder, 0, bucket(self.length), given, cache, read)
