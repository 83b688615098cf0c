"""Prefill the cache with the prompts, then one scan over the new tokens."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding import cache as caches
from jaxlm.decoding.sampling import Sampling, sample
from jaxlm.errors import InputError
from jaxlm.models import spec
from jaxlm.models.decoder import Decoder, logits
from jaxlm.shapes import Array, Int, PyTree


def generate(
  decoder: Decoder,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling,
  *,
  tokens: int,
  end: int,
  seed: int = 0,
) -> list[list[int]]:
  """Returns up to `tokens` new ids for each prompt, without the end id.

  A row stops at `end`. Each row draws from its own stream of the seed, so its sample
  does not depend on its neighbours.

  Raises:
    InputError: a prompt is empty, `tokens` is under 1, or the model has fewer learned
      positions than the longest row needs.
  """
  _check(decoder.spec, prompts, tokens)
  lengths_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
  prompts_BT = np.zeros((len(prompts), lengths_B.max()), np.int32)
  for row, prompt in zip(prompts_BT, prompts, strict=True):
    row[: len(prompt)] = prompt
  new_BT = _run(
    decoder, sampling, tokens, end, params, prompts_BT, lengths_B, np.uint32(seed)
  )
  rows = np.asarray(new_BT).tolist()
  return [row[: row.index(end)] if end in row else row for row in rows]


def _check(model: spec.LM, prompts: Sequence[Sequence[int]], tokens: int) -> None:
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise InputError(f"prompt {i} is empty; give it at least the begin token.")
  if tokens < 1:
    raise InputError(f"tokens: {tokens} is under 1.")
  longest = max(map(len, prompts))
  positions = model.positions
  if isinstance(positions, spec.Learned) and longest + tokens - 1 > positions.length:
    raise InputError(
      f"model.positions.length: {positions.length} positions are learned and the "
      f"longest row needs {longest} + {tokens} - 1. Ask for fewer tokens."
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
  decoder: Decoder,
  sampling: Sampling,
  tokens: int,
  end: int,
  params: PyTree,
  prompts_BT: Int[Array, "B T"],
  lengths_B: Int[Array, "B"],
  seed: Array,
) -> Int[Array, "B T"]:
  B, T = prompts_BT.shape
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
    jnp.arange(B)
  )
  cache = caches.empty(decoder.spec, B, T + tokens, decoder.precision.compute)
  x_BTD, cache = decoder.apply({"params": params}, prompts_BT, cache=cache)
  last_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)

  def choose(x_B1D: Array, step: Array) -> Array:
    logits_BV = logits(decoder.spec, params, x_B1D)[:, 0]
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
    return sample(sampling, logits_BV, keys)

  def one(carry, step: Array):
    cache, token_B, done_B = carry
    position_B1 = (lengths_B + step)[:, None]
    x_B1D, cache = decoder.apply(
      {"params": params}, token_B[:, None], position_B1, cache=cache
    )
    next_B = jnp.where(done_B, end, choose(x_B1D, step + 1))
    return (cache, next_B, done_B | (next_B == end)), next_B

  first_B = choose(last_B1D, jnp.zeros((), jnp.int32))
  carry = (cache, first_B, first_B == end)
  _, rest_TB = jax.lax.scan(one, carry, jnp.arange(tokens - 1))
  new_BT = jnp.concatenate((first_B[:, None], rest_TB.T), axis=1)
  return decoder.layout.constrain(new_BT, None, None)
