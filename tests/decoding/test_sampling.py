import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding.sampling import Sampling, allow_top_k, allow_top_p, sample
from jaxlm.errors import InputError

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.03, 0.2])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)
DRAWS = 2000


@functools.cache
def drawn(sampling: Sampling) -> np.ndarray:
  """Returns the share of each token in DRAWS draws."""
  keys = jax.random.split(jax.random.key(0), DRAWS)
  tokens = jax.jit(lambda k: sample(sampling, jnp.tile(LOGITS[None], (DRAWS, 1)), k))
  return np.bincount(np.asarray(tokens(keys)), minlength=6) / DRAWS


def close(shares, wanted):
  # Three deviations of a share of 0.5 in so many draws.
  np.testing.assert_allclose(shares, wanted, atol=3 * 0.5 / DRAWS**0.5)
  assert ((shares > 0) == (np.asarray(wanted) > 0)).all()


def only(tokens, power=1.0):
  kept = np.zeros(6)
  kept[tokens] = PROBABILITIES[tokens] ** power
  return kept / kept.sum()


def test_draws_follow_the_softmax():
  close(drawn(Sampling()), PROBABILITIES)


def test_a_temperature_sharpens():
  close(drawn(Sampling(temperature=0.5, top_k=3)), only([1, 3, 5], 2.0))


def test_temperature_zero_takes_the_largest():
  assert drawn(Sampling(temperature=0.0)).tolist() == [0, 1, 0, 0, 0, 0]


def test_top_k_and_top_p_draw_what_they_allow():
  close(drawn(Sampling(top_k=2)), only([1, 3]))
  close(drawn(Sampling(top_p=0.85)), only([1, 3, 5]))
  # top-p looks at what top-k left: 0.4 / 0.7 is under 0.6, so both stay.
  close(drawn(Sampling(top_k=2, top_p=0.6)), only([1, 3]))
  close(drawn(Sampling(top_k=2, top_p=0.55)), only([1]))


def kept(masked):
  return np.nonzero(np.isfinite(np.asarray(masked[0])))[0].tolist()


@pytest.mark.parametrize(
  ("p", "tokens"),
  [
    (0.01, [1]),
    (0.39, [1]),
    (0.41, [1, 3]),
    (0.69, [1, 3]),
    (0.71, [1, 3, 5]),
    (0.99, [0, 1, 2, 3, 4, 5]),
    (1.0, [0, 1, 2, 3, 4, 5]),
  ],
)
def test_top_p_keeps_the_least_set_that_holds_p(p, tokens):
  assert kept(allow_top_p(LOGITS[None], p)) == tokens


def test_ties_at_the_edge_stay():
  logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 2.0]])
  assert kept(allow_top_k(logits, 2)) == [1, 2, 3, 4]
  assert kept(allow_top_k(logits, 1)) == [1]
  assert kept(allow_top_k(logits, 9)) == [0, 1, 2, 3, 4]
  assert kept(allow_top_p(logits, 0.6)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"temperature": -0.1}, "temperature: -0.1"),
    ({"top_k": 0}, "top_k: 0"),
    ({"top_p": 0.0}, "top_p: 0.0"),
    ({"top_p": 1.1}, "top_p: 1.1"),
  ],
)
def test_what_no_sampling_can_be(fields, message):
  with pytest.raises(InputError, match=message):
    Sampling(**fields)
