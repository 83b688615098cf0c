"""Both forms of attention against loops in float64, and against each other."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlm.ops import attention
from jaxlm.ops.attention import Scoring, attend, attend_blocks
from jaxlm.ops.masks import attention_mask

B, T, H, G, K = 2, 13, 4, 2, 6
SLOPES = (0.5, 0.25, 0.125, 0.0625)
SCORINGS = {
  "plain": Scoring(K**-0.5),
  "softcap": Scoring(0.7, softcap=1.5),
  "slopes": Scoring(K**-0.5, slopes=SLOPES),
  "window": Scoring(K**-0.5, window=4),
  "all": Scoring(0.9, softcap=2.0, slopes=SLOPES, window=3),
}
SEGMENTS = jnp.asarray([[1] * 6 + [2] * 5 + [3] * 2, [1] * 11 + [0] * 2], jnp.int32)
POSITIONS = jnp.asarray(
  [[*range(6), *range(5), *range(2)], [*range(11), *range(2)]], jnp.int32
)


def inputs(dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def by_loops(scoring, q, k, v):
  """One query, one head, one sum at a time."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  segments, positions = np.asarray(SEGMENTS), np.asarray(POSITIONS)
  out = np.zeros((B, T, H, K))
  for b, t, h in np.ndindex(B, T, H):
    scores = {}
    for s in range(T):
      distance = int(positions[b, t] - positions[b, s])
      far = scoring.window is not None and distance >= scoring.window
      if segments[b, s] != segments[b, t] or distance < 0 or far:
        continue
      score = scoring.scale * float(q[b, t, h] @ k[b, s, h // (H // G)])
      if scoring.softcap is not None:
        score = scoring.softcap * np.tanh(score / scoring.softcap)
      if scoring.slopes is not None:
        score -= scoring.slopes[h] * distance
      scores[s] = np.exp(score)
    for s, weight in scores.items():
      out[b, t, h] += weight / sum(scores.values()) * v[b, s, h // (H // G)]
  return out


def by_mask(scoring, q, k, v):
  mask = attention_mask(
    POSITIONS,
    POSITIONS,
    window=scoring.window,
    segments_BT=SEGMENTS,
    key_segments_BS=SEGMENTS,
  )
  distance = POSITIONS[:, :, None] - POSITIONS[:, None, :]
  return attend(scoring, q, k, v, mask, distance)


def by_blocks(scoring, q, k, v):
  return attend_blocks(scoring, q, k, v, POSITIONS, SEGMENTS)


@pytest.fixture(scope="module")
def results():
  """Returns {name: (values of both forms, gradients of both forms)}, in one jit."""
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, K)), np.float32)

  def both(q, k, v):
    found = {}
    for name, scoring in SCORINGS.items():
      pair = []
      for form in (by_mask, by_blocks):
        out, back = jax.vjp(lambda *a, f=form, s=scoring: f(s, *a), q, k, v)
        pair.append((out, back(weights)))
      found[name] = pair
    return found

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, "block_of", lambda length: 5)  # three blocks of 5, 5, 3
    return jax.device_get(jax.jit(both)(*inputs()))


@pytest.mark.parametrize("name", SCORINGS)
def test_both_forms_equal_the_loops(results, name):
  wanted = by_loops(SCORINGS[name], *inputs())
  for out, _ in results[name]:
    np.testing.assert_allclose(out, wanted, atol=2e-6)


@pytest.mark.parametrize("name", SCORINGS)
def test_gradients_of_the_blocks_equal_those_of_the_reference(results, name):
  (_, wanted), (_, found) = results[name]
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


def by_loop(patch: pytest.MonkeyPatch) -> None:
  """Blocks of 8, 4 and 1 queries, of which the first is walked over by fours."""
  patch.setattr(attention, "block_of", lambda length: 8)
  patch.setattr(attention, "QUERIES", 4)


@pytest.mark.parametrize("name", SCORINGS)
def test_a_loop_inside_a_block_changes_nothing(results, name, monkeypatch):
  by_loop(monkeypatch)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, K)), np.float32)
  (wanted_out, wanted), _ = results[name]
  run = lambda *a: by_blocks(SCORINGS[name], *a)  # noqa: E731
  assert "scan" in str(jax.make_jaxpr(run)(*inputs()))
  out, back = jax.vjp(run, *inputs())
  np.testing.assert_allclose(out, wanted_out, atol=2e-6)
  for a, b in zip(back(weights), wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


def sizes(jaxpr):
  """Yields the size of every array of a program, those of its loops too."""
  for equation in jaxpr.eqns:
    yield from (math.prod(v.aval.shape) for v in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from sizes(inner)


@pytest.mark.parametrize("length", [2048, 4096, 5000, 16_384])
def test_no_array_is_larger_than_the_scores_of_128_queries(length):
  heads = 2
  shapes = [(1, length, heads, 4)] * 3
  qkv = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  row = jnp.arange(length)[None]

  def total(*qkv):
    return attend_blocks(Scoring(1.0), *qkv, row, jnp.zeros_like(row)).sum()

  program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*qkv)
  assert 0.99 < max(sizes(program.jaxpr)) / (heads * 128 * length) <= 1


def test_bfloat16_is_near_float32():
  # Products are rounded to 8 bits; scores and softmax are not: 2% of the largest value.
  wanted = by_loops(SCORINGS["all"], *inputs(jnp.bfloat16))
  for form in (by_mask, by_blocks):
    out = form(SCORINGS["all"], *inputs(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float64) - wanted).max()
    assert error < 0.02 * np.abs(wanted).max()


def test_the_backward_pass_keeps_no_scores():
  length = 512

  def kept(form):
    def residuals(q, k, v):
      return jax.vjp(form, q, k, v)[1]

    shapes = [(1, length, heads, 4) for heads in (2, 1, 1)]
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return max(
      leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, q, k, v))
    )

  row = jnp.arange(length)[None]
  distance = row[:, :, None] - row[:, None]
  whole = kept(lambda *a: attend(Scoring(1.0), *a, distance >= 0, distance))
  blocks = kept(lambda *a: attend_blocks(Scoring(1.0), *a, row, jnp.zeros_like(row)))
  assert whole >= length**2
  assert blocks <= length * 2 * 4


def test_shapes_are_checked_in_tests():
  q, k, v = inputs()
  with pytest.raises(jaxtyping.TypeCheckError):
    by_mask(SCORINGS["plain"], q, k[:, :, :, :3], v)
