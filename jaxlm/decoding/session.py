"""One row's text while it grows: its keys and values are kept, tokens are streamed.

Compiled are one prefill for each power of two of new tokens, and one step of `CHUNK`
tokens for each `Sampling`.
"""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding import cache as caches
from jaxlm.decoding.sampling import Sampling, sample
from jaxlm.errors import InputError
from jaxlm.models import spec
from jaxlm.models.decoder import Decoder, logits
from jaxlm.shapes import Array, Float, Int, PyTree

CHUNK = 4
"""Tokens made before the caller sees them."""
LEAST = 16
"""Tokens of the smallest prefill."""


class Session:
  """A cache of a fixed length and the ids whose keys it holds."""

  def __init__(self, decoder: Decoder, params: PyTree, *, length: int):
    """Makes an empty cache for `length` positions.

    Raises:
      InputError: the model has fewer learned positions.
    """
    positions = decoder.spec.positions
    if isinstance(positions, spec.Learned) and length > positions.length:
      raise InputError(
        f"length: {length} positions, and the model has learned {positions.length}."
      )
    self._decoder, self._params, self.length = decoder, params, length
    self._cache = caches.empty(decoder.spec, 1, length, decoder.precision.compute)
    self._held: list[int] = []

  def stream(
    self, ids: Sequence[int], sampling: Sampling, *, stops: Collection[int], seed: int
  ) -> Iterator[int]:
    """Yields what follows `ids`, up to a stop, which is not yielded, or a full cache.

    Of `ids` only what the cache does not hold yet is computed.

    Raises:
      InputError: `ids` are empty, or leave no room for a token.
    """
    if not 0 < len(ids) < self.length:
      raise InputError(
        f"length: {len(ids)} tokens do not fit into {self.length} positions with at "
        "least one new one."
      )
    key, ids = jax.random.key(seed), list(ids)
    made = [self._prefill(ids, sampling, key)]
    while True:
      for token in made:
        if token in stops:
          return
        ids.append(token)
        yield token
        if len(ids) == self.length:
          return
      made = self._steps(ids, sampling, key)

  def _prefill(self, ids: list[int], sampling: Sampling, key: Array) -> int:
    common = 0
    for ours, theirs in zip(self._held, ids[:-1], strict=False):
      if ours != theirs:
        break
      common += 1
    new = ids[common:]
    width = max(LEAST, 1 << (len(new) - 1).bit_length())
    row = np.zeros((1, width), np.int32)
    row[0, : len(new)] = new
    self._held = []
    self._cache, token = _extend(
      self._decoder, sampling, self._params, self._cache, row, (common, len(new)), key
    )
    self._held = list(ids)
    return int(token)

  def _steps(self, ids: list[int], sampling: Sampling, key: Array) -> list[int]:
    self._held = []
    start = (ids[-1], len(ids) - 1)
    self._cache, tokens = _decode(
      self._decoder, sampling, self._params, self._cache, start, key
    )
    made = np.asarray(tokens).tolist()
    self._held = [*ids, *made[:-1]][: self.length]
    return made


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _extend(
  decoder: Decoder,
  sampling: Sampling,
  params: PyTree,
  cache: PyTree,
  tokens_1T: Int[Array, "1 T"],
  place: tuple[Array, Array],
  key: Array,
) -> tuple[PyTree, Array]:
  """Returns the cache with the tokens from `place[0]` on, and the one that follows.

  Tokens past the first `place[1]` are padding: the slots that they fall into lie behind
  every query until they are written anew.
  """
  first, count = place
  positions_1T = (first + jnp.arange(tokens_1T.shape[1]))[None]
  x_1TD, cache = decoder.apply({"params": params}, tokens_1T, positions_1T, cache=cache)
  last_11D = jax.lax.dynamic_slice_in_dim(x_1TD, count - 1, 1, axis=1)
  return cache, _choose(decoder, sampling, params, last_11D, first + count, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _decode(
  decoder: Decoder,
  sampling: Sampling,
  params: PyTree,
  cache: PyTree,
  start: tuple[Array, Array],
  key: Array,
) -> tuple[PyTree, Array]:
  """Returns the cache and `CHUNK` tokens after a token at a position."""

  def one(carry, _):
    cache, token, position = carry
    x_11D, cache = decoder.apply(
      {"params": params}, token[None, None], position[None, None], cache=cache
    )
    token = _choose(decoder, sampling, params, x_11D, position + 1, key)
    return (cache, token, position + 1), token

  token, position = (jnp.asarray(value, jnp.int32) for value in start)
  (cache, _, _), tokens = jax.lax.scan(one, (cache, token, position), length=CHUNK)
  return cache, tokens


def _choose(
  decoder: Decoder,
  sampling: Sampling,
  params: PyTree,
  x_11D: Float[Array, "1 1 D"],
  position: Array,
  key: Array,
) -> Array:
  """Returns the token at a position; its draw depends on seed and position alone."""
  keys = jax.random.fold_in(key, position)[None]
  return sample(sampling, logits(decoder.spec, params, x_11D)[:, 0], keys)[0]
