"""The loss in chunks against a plain log-softmax, in value, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.losses import LossShape, cross_entropy, log_probs
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

LAYOUT = Layout(make_mesh(Mesh(fsdp=1), jax.devices()[:1]))
B, T, D, V = 3, 12, 6, 11
CASES = {
  "plain": LossShape(LAYOUT, 4),
  "chunk larger than the row": LossShape(LAYOUT, 64),
  "chunk that does not divide": LossShape(LAYOUT, 5, 1e-2),
  "softcap": LossShape(LAYOUT, 4, 0.0, 2.0),
  "all": LossShape(LAYOUT, 5, 1e-2, 2.0),
}


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], (B, T)), jnp.float32)
  return x, head, targets, weights


def plain(shape, x, head, targets, weights):
  """Returns the sums from all logits at once, and the logits."""
  logits = jnp.einsum(
    "BTD,DV->BTV", x, head.astype(x.dtype), preferred_element_type=jnp.float32
  )
  if shape.softcap is not None:
    logits = shape.softcap * jnp.tanh(logits / shape.softcap)
  partition = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
  nll = partition - chosen
  total = jnp.sum(weights * (nll + shape.z_loss * partition**2))
  correct = jnp.sum(jnp.where(logits.argmax(-1) == targets, weights, 0.0))
  return total, (nll, correct)


def chunked(shape, x, head, targets, weights):
  terms = cross_entropy(shape, x, head, targets, weights)
  return terms.total, (terms.nll_BT, terms.correct)


@pytest.fixture(scope="module")
def results():
  """Returns {case: (value and gradients in chunks, the same in full)}, in one jit."""

  def both(scale, *args):
    found = {}
    for name, shape in CASES.items():
      pair = []
      for form in (chunked, plain):

        def scaled(x, head, form=form, shape=shape):
          total, rest = form(shape, x, head, *args[2:])
          return total * scale, rest

        pair.append(jax.value_and_grad(scaled, (0, 1), has_aux=True)(*args[:2]))
      found[name] = pair
    return found

  # A scale other than 1 shows whether the outer derivative is carried.
  run = jax.jit(both)
  scale = jnp.float32(-1.5)
  return (
    jax.device_get(run(scale, *inputs())),
    jax.device_get(run(scale, *inputs(jnp.bfloat16))),
  )


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_a_plain_log_softmax(results, name):
  found, wanted = results[0][name]
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near(results, name):
  # The logits are the same float32; the logits' gradient is rounded to 8 bits before
  # the two products: 1% of the largest gradient.
  found, wanted = results[1][name]
  np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-5)
  assert found[1][0].dtype == jnp.bfloat16
  assert found[1][1].dtype == np.float32
  for a, b in zip(found[1], wanted[1], strict=True):
    error = np.abs(a.astype(np.float32) - b.astype(np.float32)).max()
    assert error < 0.01 * np.abs(b.astype(np.float32)).max()


def test_a_token_of_weight_zero_changes_nothing():
  x, head, targets, weights = inputs()
  other = jnp.where(weights == 0, (targets + 1) % V, targets)
  grad = jax.jit(
    jax.value_and_grad(lambda x, t: chunked(CASES["all"], x, head, t, weights)[0])
  )
  (value, dx), (value_other, dx_other) = grad(x, targets), grad(x, other)
  assert value == value_other
  np.testing.assert_array_equal(dx, dx_other)
  assert (np.asarray(dx)[np.asarray(weights) == 0] == 0).all()


def sizes(jaxpr):
  """Yields the size of every array that a program makes, inner programs included."""
  for eqn in jaxpr.eqns:
    for out in eqn.outvars:
      yield getattr(out.aval, "size", 0)
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from sizes(inner)


def test_the_logits_of_a_row_are_never_held():
  rows, length, dim, vocab, chunk = 2, 64, 4, 96, 8
  shape = LossShape(LAYOUT, chunk, 1e-4, 30.0)
  f32 = jnp.float32
  args = [
    jax.ShapeDtypeStruct((rows, length, dim), f32),
    jax.ShapeDtypeStruct((dim, vocab), f32),
    jax.ShapeDtypeStruct((rows, length), jnp.int32),
    jax.ShapeDtypeStruct((rows, length), f32),
  ]

  def largest(form):
    grad = jax.grad(lambda *a: form(shape, *a)[0], (0, 1))
    return max(sizes(jax.make_jaxpr(grad)(*args).jaxpr))

  assert largest(plain) >= rows * length * vocab
  assert largest(chunked) == rows * chunk * vocab


def test_a_split_vocabulary_and_split_rows_give_the_same_numbers():
  sharded = Layout(make_mesh(Mesh(data=2, fsdp=1, tensor=4)))
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 16, (4, 6)), jnp.int32)
  weights = jnp.asarray(rng.choice([0.0, 1.0], (4, 6)), jnp.float32)

  def run(layout):
    def total(x, head):
      return chunked(LossShape(layout, 4, 1e-2, 3.0), x, head, targets, weights)

    return jax.device_get(jax.jit(jax.value_and_grad(total, (0, 1), True))(x, head))

  found, wanted = jax.tree.leaves(run(sharded)), jax.tree.leaves(run(LAYOUT))
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


LOG_PROBS = {
  "plain": LossShape(LAYOUT, 4),
  "softcap and temperature": LossShape(LAYOUT, 5, 0.0, 2.0, 0.7),
  "vocabulary and rows split": LossShape(
    Layout(make_mesh(Mesh(data=1, fsdp=2, tensor=4))), 5, 0.0, 2.0, 1.3
  ),
}


@pytest.mark.parametrize("name", LOG_PROBS)
def test_log_probs_under_any_function_equal_a_plain_log_softmax(name):
  shape = LOG_PROBS[name]
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(4, T, 8)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 12, (4, T)), jnp.int32)

  def whole(x, head):
    logits = jnp.einsum("BTD,DV->BTV", x, head)
    if shape.softcap is not None:
      logits = shape.softcap * jnp.tanh(logits / shape.softcap)
    log_BTV = jax.nn.log_softmax(logits / shape.temperature)
    entropy = -jnp.sum(jnp.exp(log_BTV) * log_BTV, axis=-1)
    squares = jax.nn.logsumexp(2 * log_BTV, axis=-1)
    chosen = jnp.take_along_axis(log_BTV, targets[:, :, None], axis=-1)[:, :, 0]
    return chosen, entropy, squares

  def chunked(x, head):
    out = log_probs(shape, x, head, targets)
    return out.target_BT, out.spread.entropy_BT, out.spread.log_squares_BT

  def squared(form):
    # A function of a row's sum, as preferences are: its gradient differs by token.
    def value(x, head):
      found = form(x, head)
      return jnp.sum(jnp.square(jnp.sum(found[0], axis=1)) * 0.01), found

    return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

  (_, found), found_grads = squared(chunked)(x, head)
  (_, wanted), wanted_grads = squared(whole)(x, head)
  for ours, theirs in zip(found + found_grads, wanted + wanted_grads, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
