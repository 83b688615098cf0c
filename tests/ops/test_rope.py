import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.rope import alibi_slopes, rotate, sinusoids

FREQUENCIES = np.array([1.0, 0.3, 0.05])


def test_scores_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

  def score(at, other):
    a = rotate(q, jnp.array([[at]]), FREQUENCIES)
    b = rotate(k, jnp.array([[other]]), FREQUENCIES)
    return float(np.asarray(a).ravel() @ np.asarray(b).ravel())

  wanted = score(7, 2)
  for shift in (-2, 1, 20, 300):
    assert score(7 + shift, 2 + shift) == pytest.approx(wanted, abs=2e-5)
  assert score(8, 2) != pytest.approx(wanted, abs=1e-2)


def test_pairs_turn_as_complex_numbers_and_the_rest_stays():
  x = np.random.default_rng(0).normal(size=(2, 4, 3, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3], [5, 6, 0, 1]])
  out = np.asarray(
    rotate(jnp.asarray(x), jnp.asarray(positions), FREQUENCIES, magnitude=1.5)
  )
  turn = np.exp(1j * positions[:, :, None, None] * FREQUENCIES)
  wanted = (x[..., :3] + 1j * x[..., 3:6]) * turn * 1.5
  np.testing.assert_allclose(out[..., :3], wanted.real, atol=2e-6)
  np.testing.assert_allclose(out[..., 3:6], wanted.imag, atol=2e-6)
  np.testing.assert_array_equal(out[..., 6:], x[..., 6:])


def test_alibi_slopes_as_published():
  np.testing.assert_allclose(alibi_slopes(8), [0.5**i for i in range(1, 9)])
  # 12 heads: the eight of 8, then every second of 16 (Press et al., their code).
  between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
  np.testing.assert_allclose(
    alibi_slopes(12), [0.5**i for i in range(1, 9)] + between, rtol=1e-6
  )
  assert alibi_slopes(1).tolist() == [2**-8]


def test_sinusoids_by_their_definition():
  positions = np.array([[0, 1, 2, 40]])
  out = np.asarray(sinusoids(jnp.asarray(positions), 8, 100.0))
  for t, position in enumerate(positions[0]):
    for i in range(4):
      angle = position / 100.0 ** (i / 3)
      assert out[0, t, i] == pytest.approx(np.sin(angle), abs=2e-6)
      assert out[0, t, 4 + i] == pytest.approx(np.cos(angle), abs=2e-6)
