import jax.numpy as jnp
import numpy as np

from jaxlm.ops.weights import einsum, lookup


def test_a_product_is_in_the_activation_s_dtype():
  x, weight = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
  assert einsum("BTD,DF->BTF", x, weight).dtype == jnp.bfloat16


def test_a_lookup_takes_rows_and_casts_them():
  table = jnp.arange(6.0).reshape(3, 2)
  found = lookup(table, jnp.array([[2, 0]]), jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(found, np.float32), [[[4, 5], [0, 1]]])
