import jax
import jax.numpy as jnp
import pytest
from models.specs import SPECS, decoder, params_of

from jaxlm.decoding import cache
from jaxlm.models import cached
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


GEMMA = "gemma: MQA, GeGLU, sandwich, windows, softcaps, qk-norm"


def bytes_of(dtype, length, slack=0):
  shapes = jax.eval_shape(
    lambda: cache.empty(SPECS[GEMMA], 2, length, dtype, slack=slack)
  )
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def test_a_window_s_memory_does_not_grow_with_the_sequence():
  windows = {block.mixer.window for block in SPECS[GEMMA].blocks}
  assert None in windows
  (window,) = windows - {None}
  heads = {block.mixer.window: 0 for block in SPECS[GEMMA].blocks}
  for block in SPECS[GEMMA].blocks:
    heads[block.mixer.window] += 2 * block.mixer.kv_heads * block.mixer.head_dim
  for length, slack in ((100, 0), (1000, 0), (1000, 7)):
    wanted = 2 * 4 * (heads[None] * length + heads[window] * (window + slack))
    assert bytes_of("float32", length, slack) == wanted


def test_int8_takes_a_quarter_and_a_scale_a_vector():
  K = SPECS[GEMMA].pattern[0].mixer.head_dim
  assert bytes_of("int8", 100) / bytes_of("float32", 100) == (K + 4) / (4 * K)


def test_quantized_vectors_are_half_a_step_off_at_most():
  x = jax.random.normal(jax.random.key(0), (3, 5, 8)).at[0, 0].set(0.0)
  small, scale = cached.quantize(x)
  off = jnp.abs(small.astype(jnp.float32) * scale[..., None] - x)
  assert small.dtype == jnp.int8
  assert (off <= scale[..., None] * 0.5001).all()
  assert jnp.abs(small).max() == 127


def test_what_is_in_a_slot_follows_from_the_newest_position():
  held = cached.held(jnp.array([-1, 2, 4, 9]), 4)
  away = cached.NOWHERE
  assert held.tolist() == [
    [away] * 4, [0, 1, 2, away], [4, 1, 2, 3], [8, 9, 6, 7],
  ]  # fmt: skip
