import jax.numpy as jnp
import numpy as np

from jaxlm.ops.masks import attention_mask


def test_a_mask_by_its_definition():
  rng = np.random.default_rng(0)
  positions, keys = rng.integers(0, 7, (2, 5)), rng.integers(0, 7, (2, 8))
  segments, key_segments = rng.integers(0, 3, (2, 5)), rng.integers(0, 3, (2, 8))
  for window in (None, 1, 3):
    mask = attention_mask(
      jnp.asarray(positions),
      jnp.asarray(keys),
      window=window,
      segments_BT=jnp.asarray(segments),
      key_segments_BS=jnp.asarray(key_segments),
    )
    for b, t, s in np.ndindex(2, 5, 8):
      back = positions[b, t] - keys[b, s]
      near = back >= 0 and (window is None or back < window)
      assert mask[b, t, s] == (near and segments[b, t] == key_segments[b, s])


def test_a_window_counts_the_query_itself():
  row = jnp.arange(6)[None]
  for window in (1, 2, 4):
    mask = np.asarray(attention_mask(row, row, window=window))
    assert mask.sum(-1).tolist() == [[min(t + 1, window) for t in range(6)]]
    assert mask[0].diagonal().all()
