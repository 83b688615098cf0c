import jax
import jax.numpy as jnp
import pytest
from models.specs import SPECS, decoder, params_of

from jaxlm.decoding import cache
from jaxlm.trees import named_leaves


@pytest.mark.parametrize("name", SPECS)
def test_a_cache_has_the_shapes_that_a_forward_pass_returns(name):
  made = decoder(SPECS[name])
  first = jax.eval_shape(lambda: cache.empty(SPECS[name], 2, 7, "bfloat16"))
  params = jax.eval_shape(lambda: params_of(made))
  tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
  _, after = jax.eval_shape(
    lambda p, t, c: made.apply({"params": p}, t, cache=c), params, tokens, first
  )
  assert named_leaves(first) == named_leaves(after)
  assert jax.tree.structure(first) == jax.tree.structure(after)
