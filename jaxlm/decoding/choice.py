"""Logits to a token: what the requests of a batch ask, in one order, and the draw.

`process` applies `Controls` in the order of transformers, which has no frequency and
presence penalties (they stand where vLLM has them):

  1. logit_bias is added, then banned tokens and all outside `allowed` become -inf
  2. repetition_penalty, then frequency_penalty, then presence_penalty
  3. stops of a row with fewer than min_tokens new tokens become -inf
  4. what a constraint forbids at this step becomes -inf
  5. division by the temperature
  6. top_k, 7. top_p, 8. min_p, 9. typical_p, each on what the one before it left

At temperature 0 a row takes the largest of these logits, undivided: its distribution
is that token alone. Rows may differ in every field. A field without effect leaves a
row's logits as they are, to the last bit, and one that no row uses leaves no trace in
the compiled program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.sampling import Controls, members
from jaxlm.shapes import Array, Bool, Float, Int


class Seen(NamedTuple):
  """What the rows hold so far, as far as their controls ask for it."""

  made_B: Array
  """[B] int32: new tokens."""
  prompt_BV: Array | None
  """[B, V] bool: tokens in the prompt; None: no repetition penalty."""
  made_BV: Array | None
  """[B, V] int32: how often a token was made; None: no penalty."""


def start(controls: Controls, prompts: Sequence[Sequence[int]], vocab: int) -> Seen:
  """Returns what is seen before the first new token of each prompt."""
  B = len(prompts)
  repetition = controls.repetition_B is not None
  penalties = (controls.repetition_B, controls.frequency_B, controls.presence_B)
  counts = any(penalty is not None for penalty in penalties)
  in_prompt = [members(prompt, vocab) for prompt in prompts] if repetition else []
  return Seen(
    made_B=jnp.zeros(B, jnp.int32),
    prompt_BV=jnp.asarray(np.stack(in_prompt)) if repetition else None,
    made_BV=jnp.zeros((B, vocab), jnp.int32) if counts else None,
  )


def see(seen: Seen, token_B: Int[Array, "B"], active_B: Bool[Array, "B"]) -> Seen:
  """Returns what is seen after one more token of each active row."""
  more_B = active_B.astype(jnp.int32)
  made_BV = seen.made_BV
  if made_BV is not None:
    made_BV = made_BV.at[jnp.arange(len(token_B)), token_B].add(more_B)
  return seen._replace(made_B=seen.made_B + more_B, made_BV=made_BV)


def process(
  controls: Controls, seen: Seen, logits_BV: Float[Array, "B V"]
) -> Float[Array, "B V"]:
  """Returns the logits after the steps that the file's docstring lists."""
  c = controls
  if c.bias_BV is not None:
    logits_BV = logits_BV + c.bias_BV
  logits_BV = _penalize(c, seen, logits_BV)
  if c.min_tokens_B is not None and c.stops_BV is not None:
    early_B = seen.made_B < c.min_tokens_B
    logits_BV = allow(logits_BV, ~(early_B[:, None] & c.stops_BV))
  if c.mask_BV is not None:
    logits_BV = allow(logits_BV, c.mask_BV)
  if c.temperature_B is not None:
    logits_BV = logits_BV / c.temperature_B[:, None]
  if c.top_k_B is not None:
    logits_BV = allow_top_k(logits_BV, c.top_k_B)
  if c.top_p_B is not None:
    logits_BV = allow_top_p(logits_BV, c.top_p_B)
  if c.min_p_B is not None:
    logits_BV = allow_min_p(logits_BV, c.min_p_B)
  if c.typical_p_B is not None:
    logits_BV = allow_typical(logits_BV, c.typical_p_B)
  return logits_BV


def _penalize(
  controls: Controls, seen: Seen, logits_BV: Float[Array, "B V"]
) -> Float[Array, "B V"]:
  c = controls
  if c.repetition_B is c.frequency_B is c.presence_B is None:
    return logits_BV
  if seen.made_BV is None:
    raise ValueError("seen was started under controls without a penalty")
  if c.repetition_B is not None:
    if seen.prompt_BV is None:
      raise ValueError("seen was started under controls without repetition_penalty")
    held_BV = seen.prompt_BV | (seen.made_BV > 0)
    logits_BV = penalize_repetition(logits_BV, c.repetition_B, held_BV)
  if c.frequency_B is not None:
    logits_BV = logits_BV - c.frequency_B[:, None] * seen.made_BV.astype(jnp.float32)
  if c.presence_B is not None:
    made_BV = (seen.made_BV > 0).astype(jnp.float32)
    logits_BV = logits_BV - c.presence_B[:, None] * made_BV
  return logits_BV


class Ranked(NamedTuple):
  """The likeliest tokens of each row, the likeliest first."""

  token_BN: Array
  """[B, N] int32."""
  logprob_BN: Array
  """[B, N] float32, in nats; -inf: the token cannot be drawn."""


class Choice(NamedTuple):
  """A token for each row, and log-probabilities in nats.

  What a compiled caller does not return of it is not computed.
  """

  token_B: Array
  """[B] int32."""
  model_B: Array
  """[B] float32: the token's log-probability under the model, from bare logits."""
  sampling_B: Array
  """[B] float32: the same under the distribution that it was drawn from, 0 for greedy
  rows; NaN where the masks leave no token."""
  top_model: Ranked | None
  top_sampling: Ranked | None


def choose(
  controls: Controls,
  seen: Seen,
  logits_BV: Float[Array, "B V"],
  step_B: Int[Array, "B"],
  *,
  top: int = 0,
) -> Choice:
  """Returns the next token of each row.

  Args:
    controls: the requests.
    seen: what the rows hold; see `start`.
    logits_BV: the model's, float32.
    step_B: absolute position of the new token. A row's draw depends on its key, its
      step and its logits alone, wherever in whatever batch it stands.
    top: how many of the likeliest tokens to return; 0: none.
  """
  processed_BV = process(controls, seen, logits_BV)
  drawable_BV = _drawable(controls, processed_BV)
  if controls.key_B2 is None:
    token_B = _largest(processed_BV)
  else:
    token_B = _largest(drawable_BV + _noise(controls.key_B2, step_B, drawable_BV))
  model_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  sampling_BV = jax.nn.log_softmax(drawable_BV, axis=-1)
  return Choice(
    token_B=token_B,
    model_B=_of(model_BV, token_B),
    sampling_B=_of(sampling_BV, token_B),
    top_model=Ranked(*jax.lax.top_k(model_BV, top)[::-1]) if top else None,
    top_sampling=Ranked(*jax.lax.top_k(sampling_BV, top)[::-1]) if top else None,
  )


def probabilities(
  controls: Controls, seen: Seen, logits_BV: Float[Array, "B V"]
) -> Float[Array, "B V"]:
  """Returns the distribution that `choose` draws from; greedy rows are one-hot."""
  processed_BV = process(controls, seen, logits_BV)
  return jax.nn.softmax(_drawable(controls, processed_BV), axis=-1)


def _noise(key_B2: Array, step_B: Array, like_BV: Array) -> Float[Array, "B V"]:
  """Returns Gumbel noise: the largest sum with logits is a draw from their softmax."""
  # The kind is named, so that draws do not follow jax_default_prng_impl.
  row_B = jax.random.wrap_key_data(key_B2, impl="threefry2x32")
  keys_B = jax.vmap(jax.random.fold_in)(row_B, step_B)
  return jax.vmap(lambda key: jax.random.gumbel(key, like_BV.shape[1:]))(keys_B)


def _largest(values_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
  """Returns where the first of each row's largest values is.

  On a CPU argmax takes three times as long, and makes the noise anew as it goes.
  """
  V = values_BV.shape[-1]
  most_B1 = jnp.max(values_BV, axis=-1, keepdims=True)
  places_BV = jnp.where(values_BV == most_B1, jnp.arange(V)[None], V - 1)
  return jnp.min(places_BV, axis=-1)


def _drawable(
  controls: Controls, logits_BV: Float[Array, "B V"]
) -> Float[Array, "B V"]:
  """Leaves greedy rows their largest logit, the first of equal ones."""
  if controls.greedy_B is None:
    return logits_BV
  best_BV = jnp.arange(logits_BV.shape[-1])[None] == _largest(logits_BV)[:, None]
  return allow(logits_BV, best_BV | ~controls.greedy_B[:, None])


def _of(values_BV: Float[Array, "B V"], token_B: Int[Array, "B"]) -> Array:
  return jnp.take_along_axis(values_BV, token_B[:, None], axis=-1)[:, 0]


def penalize_repetition(
  logits_BV: Float[Array, "B V"], penalty_B: Array, held_BV: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
  """Makes tokens that the row holds less likely by a factor (Keskar et al. 2019)."""
  penalty_B1 = penalty_B[:, None]
  less_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
  return jnp.where(held_BV, less_BV, logits_BV)


def allow(
  logits_BV: Float[Array, "B V"], kept_BV: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
  """Sets logits to -inf where nothing is kept."""
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def allow_top_k(logits_BV: Float[Array, "B V"], k_B: Array) -> Float[Array, "B V"]:
  """Keeps the k largest logits of each row; ties at the edge stay."""
  kept_BV = _leading(logits_BV, jnp.ones_like(logits_BV), k_B.astype(jnp.float32))
  return allow(logits_BV, kept_BV)


def allow_top_p(logits_BV: Float[Array, "B V"], p_B: Array) -> Float[Array, "B V"]:
  """Keeps each row's nucleus (Holtzman et al. 2019); p of 1 is all.

  A token stays if those more probable hold less than p; the likeliest always stays,
  and so do ties at the edge.
  """
  kept_BV = _leading(logits_BV, jax.nn.softmax(logits_BV, axis=-1), _limit(p_B))
  return allow(logits_BV, kept_BV)


def allow_min_p(logits_BV: Float[Array, "B V"], p_B: Array) -> Float[Array, "B V"]:
  """Keeps tokens of at least p times the highest probability (Nguyen et al. 2024)."""
  least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(p_B)[:, None]
  return allow(logits_BV, logits_BV >= least_B1)


def allow_typical(logits_BV: Float[Array, "B V"], p_B: Array) -> Float[Array, "B V"]:
  """Keeps each row's typical set (Meister et al. 2022); p of 1 is all.

  A token stays if those whose surprise (-log probability) is nearer to the entropy
  hold less than p.
  """
  surprise_BV = -jax.nn.log_softmax(logits_BV, axis=-1)
  probability_BV = jnp.exp(-surprise_BV)
  finite_BV = jnp.where(probability_BV > 0, surprise_BV, 0.0)
  entropy_B1 = jnp.sum(probability_BV * finite_BV, axis=-1, keepdims=True)
  nearness_BV = -jnp.abs(surprise_BV - entropy_B1)
  return allow(logits_BV, _leading(nearness_BV, probability_BV, _limit(p_B)))


def _limit(p_B: Array) -> Array:
  """Returns p, infinite from 1 on: rounded sums may pass 1 before the last token."""
  return jnp.where(p_B < 1, jnp.maximum(p_B, jnp.finfo(jnp.float32).tiny), jnp.inf)


def _leading(
  values_BV: Float[Array, "B V"], weights_BV: Float[Array, "B V"], limit_B: Array
) -> Bool[Array, "B V"]:
  """Says of each value whether the larger ones of its row weigh less than the limit.

  The least such value is found bit by bit, in 32 sums over the row: on a CPU a
  twentieth of the time that sorting 49152 logits takes, and exact as well.
  """
  values_BV = jnp.where(values_BV == 0, 0.0, values_BV)  # -0 is 0
  bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.int32)
  # Floats in the order of signed integers: of negative ones the magnitude is turned.
  rank_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)

  def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low_B, high_B = bounds
    middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # cannot overflow
    larger_BV = jnp.where(rank_BV > middle_B[:, None], weights_BV, 0.0)
    fits_B = jnp.sum(larger_BV, axis=-1) < limit_B
    return jnp.where(fits_B, low_B, middle_B + 1), jnp.where(fits_B, middle_B, high_B)

  ends = jnp.iinfo(jnp.int32)
  first = tuple(jnp.full(limit_B.shape, end, jnp.int32) for end in (ends.min, ends.max))
  _, least_B = jax.lax.fori_loop(0, 32, halve, first)
  return rank_BV >= least_B[:, None]
