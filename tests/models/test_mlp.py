import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.mlp import FeedForward
from jaxlm.models.spec import GLU, MLP, Precision
from models.specs import alone


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
  return x / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


CASES = [
  (GLU(hidden=12), silu),
  (GLU(hidden=12, activation="gelu"), gelu),
  (GLU(hidden=12, activation="gelu_tanh", bias="all"), gelu_tanh),
  (GLU(hidden=12, activation="relu"), relu),
  (MLP(hidden=12), gelu),
  (MLP(hidden=12, activation="gelu_tanh"), gelu_tanh),
  (MLP(hidden=12, activation="relu"), relu),
  (MLP(hidden=12, activation="relu2", bias="all"), lambda x: relu(x) ** 2),
  (MLP(hidden=12, activation="silu"), silu),
]


def _named(case) -> str:
  """Names a case alike in every process."""
  return case.__name__ if callable(case) else str(case)[:40]


@pytest.mark.parametrize(("spec", "activation"), CASES, ids=_named)
def test_an_mlp_by_its_formula(spec, activation):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 8))
  names = ["up", "gate"] if isinstance(spec, GLU) else ["up"]
  arrays = {name: rng.normal(size=(8, 12)) for name in names}
  arrays["down"] = rng.normal(size=(12, 8))
  biases = {name: rng.normal(size=a.shape[1]) for name, a in arrays.items()}
  if spec.bias == "none":
    biases = dict.fromkeys(arrays, 0.0)
  hidden = {name: x @ arrays[name] + biases[name] for name in names}
  h = activation(hidden[names[-1]])
  if isinstance(spec, GLU):
    h = h * hidden["up"]
  wanted = h @ arrays["down"] + biases["down"]
  params = dict(arrays)
  if spec.bias == "all":
    params |= {f"{name}_bias": bias for name, bias in biases.items()}
  params = {name: jnp.asarray(a, jnp.float32) for name, a in params.items()}
  module = FeedForward(spec, Precision(), alone(), 1)
  out = module.apply({"params": params}, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())
