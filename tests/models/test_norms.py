import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.norms import Norm
from jaxlm.models.spec import LayerNorm, Precision, RMSNorm

NORMS = [
  RMSNorm(eps=1e-2),
  RMSNorm(offset=1.0),
  LayerNorm(eps=1e-2),
  LayerNorm(bias=False),
]


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_norm_by_its_formula(norm):
  rng = np.random.default_rng(0)
  x = rng.normal(1.0, 2.0, (2, 3, 8))
  scale, bias = rng.normal(size=(2, 8))
  module = Norm(norm, Precision())
  first = module.init(jax.random.key(0), jnp.asarray(x, jnp.float32))["params"]
  params = {"scale": jnp.asarray(scale, jnp.float32)}
  offset = 0.0
  centred = x
  if isinstance(norm, LayerNorm):
    centred = x - x.mean(-1, keepdims=True)
    if norm.bias:
      params["bias"] = jnp.asarray(bias, jnp.float32)
  else:
    offset = norm.offset
  assert first.keys() == params.keys()
  unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
  wanted = unit * (offset + scale) + (bias if "bias" in params else 0.0)
  out = module.apply({"params": params}, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(out, wanted, atol=2e-6)
  # The first scale does nothing, whatever the offset.
  plain = module.apply({"params": first}, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(plain, unit, atol=2e-6)


def test_statistics_are_float32():
  # In bfloat16 a mean of 512 equal squares would stop growing at 256.
  x = jnp.full((1, 1, 512), 3.0, jnp.bfloat16)
  module = Norm(RMSNorm(eps=0.0), Precision(compute="bfloat16"))
  out = module.apply(module.init(jax.random.key(0), x), x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)
