import math

import jax.numpy as jnp
import numpy as np
import pytest
from models.specs import SPECS, VOCAB, decoder, params_of

from jaxlm.errors import InputError
from jaxlm.evaluation.bits_per_byte import make_evaluate

MODEL = SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"]
BYTES = np.array([0, 1, 1, 2, 3, 1, 1, 4, 1, 1, 2, 1, 1, 1, 5, 1], np.int32)


def batch():
  rng = np.random.default_rng(0)
  shape = (8, 12)
  positions = np.tile(np.arange(12), (8, 1))
  return {
    "tokens": jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
    "targets": jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
    "positions": jnp.asarray(positions, jnp.int32),
    "segments": jnp.ones(shape, jnp.int32),
    "weights": jnp.asarray(rng.choice([0.0, 1.0], shape), jnp.float32),
  }


def parts(whole, size):
  return [
    {name: a[first : first + size] for name, a in whole.items()}
    for first in range(0, 8, size)
  ]


@pytest.fixture(scope="module")
def evaluate():
  return make_evaluate(decoder(MODEL), BYTES, chunk=5)


@pytest.fixture(scope="module")
def params():
  return params_of(decoder(MODEL))


def test_a_uniform_model_spends_the_logarithm_of_the_vocabulary(evaluate, params):
  whole = batch()
  uniform = params | {"head": jnp.zeros_like(params["head"])}
  scores = evaluate(uniform, [whole])
  counted = np.asarray(whole["weights"]) == 1
  tokens = int(counted.sum())
  size = int(BYTES[np.asarray(whole["targets"])][counted].sum())
  assert scores["held_out/bytes"] == size
  bits = math.log2(VOCAB) * tokens / size
  assert scores["held_out/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
  assert scores["held_out/nll"] == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_the_size_of_a_batch_changes_nothing(evaluate, params):
  whole = batch()
  wanted = evaluate(params, [whole])
  assert 0 < wanted["held_out/accuracy"] < 1
  for size in (2, 4):
    found = evaluate(params, iter(parts(whole, size)))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_tokens_of_weight_zero_are_left_out(evaluate, params):
  whole = batch()
  other = jnp.where(whole["weights"] == 0, 3, whole["targets"])
  assert evaluate(params, [whole | {"targets": other}]) == evaluate(params, [whole])


def test_nothing_to_evaluate(evaluate, params):
  with pytest.raises(InputError, match="held-out"):
    evaluate(params, [])
  nothing = batch() | {"weights": jnp.zeros((8, 12))}
  with pytest.raises(InputError, match="held-out"):
    evaluate(params, [nothing])
