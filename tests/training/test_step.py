"""The step: accumulation, averages, metrics, donation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training import optimizers
from jaxlm.training.objective import NextToken, Ratio, Task, Terms, next_token
from jaxlm.training.state import First, TrainState, axes_of, create
from jaxlm.training.step import accumulate, make_step, ratios
from jaxlm.trees import named_leaves
from training import small

SPEC = small.adamw()


def first_state(decoder, *, ema=False):
  transform = optimizers.build(SPEC, 10, axes_of(decoder)).transform
  return create(decoder, transform, First(0), ema=ema)[1]()


@functools.cache
def summing(micro_batches, mesh, z_loss):
  """Returns (layout, first parameters, compiled sums of terms and gradients)."""
  decoder = small.decoder_of(mesh)
  objective = next_token(NextToken(chunk=16, z_loss=z_loss), decoder)
  run = jax.jit(
    lambda p, b: accumulate(Task(objective), p, b, jax.random.key(0), micro_batches)
  )
  return decoder.layout, first_params(mesh), run


@functools.cache
def first_params(mesh):
  return first_state(small.decoder_of(mesh)).params


def gradients(micro_batches, mesh=small.ONE, rows=None, z_loss=1e-3):
  """Returns (terms, gradients) of the first batch, both summed."""
  layout, params, run = summing(micro_batches, mesh, z_loss)
  if rows is None:
    batch = small.on_mesh(layout, small.batch())
  else:
    batch = {name: jnp.asarray(v[rows]) for name, v in small.batch().items()}
  terms, grads = run(params, batch)
  return terms, {name: np.asarray(g) for name, g in named_leaves(grads).items()}


@pytest.fixture(scope="module")
def at_once():
  with jax.numpy_dtype_promotion("standard"):
    return gradients(1)


def test_the_batch_is_uneven():
  """Else a mean of means would pass the tests below."""
  counts = small.batch()["weights"].sum(axis=1)
  assert counts.max() > 4 * counts.min()
  weights = small.batch()["weights"]
  for micro in (2, 4):
    per = weights.reshape(-1, micro, small.LENGTH).sum(axis=(0, 2))
    assert per.max() > 1.1 * per.min()


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_accumulation_changes_neither_loss_nor_gradient(at_once, micro_batches):
  terms, grads = gradients(micro_batches)
  for name, value in ratios(at_once[0]).items():
    assert float(ratios(terms)[name]) == pytest.approx(float(value), rel=1e-6), name
  for name, grad in at_once[1].items():
    scale = np.abs(grad).max()
    np.testing.assert_allclose(
      grads[name] / scale, grad / scale, atol=2e-6, err_msg=name
    )


def test_a_mean_of_means_would_not_pass(at_once):
  """The control of the test above."""
  parts = [gradients(1, rows=slice(i, None, 4))[0] for i in range(4)]
  mean = sum(float(ratios(terms)["loss"]) for terms in parts) / 4
  assert abs(mean - float(ratios(at_once[0])["loss"])) > 1e-3


def test_accumulation_over_a_mesh_equals_one_device(at_once):
  terms, grads = gradients(2, small.Mesh(fsdp=2, tensor=4))
  assert float(terms.numerator) == pytest.approx(float(at_once[0].numerator), rel=1e-6)
  for name, grad in at_once[1].items():
    error = np.linalg.norm(grads[name] - grad) / np.linalg.norm(grad)
    assert error < 1e-5, (name, error)


def test_bfloat16_gradients_are_summed_in_float32():
  """512 micro-batches of gradient 1, after one of 512: bfloat16 would stay at 512."""

  def objective(params, batch, rng):
    del rng
    total = jnp.sum(params["w"] * batch["x"].astype(params["w"].dtype))
    count = jnp.asarray(1.0)
    total = total.astype(jnp.float32)
    return Terms(total, count, {"x": Ratio(total, count)})

  x = np.ones((513,), np.float32)
  x[0] = 512
  params = {"w": jnp.ones((1,), jnp.bfloat16)}
  terms, grads = accumulate(Task(objective), params, {"x": x}, jax.random.key(0), 513)
  assert grads["w"].dtype == jnp.float32
  assert float(grads["w"][0]) == 1024
  assert float(terms.denominator) == 513


@pytest.fixture(scope="module")
def low():
  """A step of bfloat16 parameters with an average, accumulated, on a mesh."""
  decoder = small.decoder_of(small.MIXED, params="bfloat16")
  with jax.numpy_dtype_promotion("standard"):
    return small.setup(SPEC, decoder=decoder, ema=0.9, micro_batches=2)


def test_bfloat16_parameters_train(low):
  compiled, first, plan, decoder = low
  assert plan.shapes.params["head"].dtype == jnp.bfloat16
  state, rows = small.run(compiled, first, decoder.layout, 8)
  assert rows[-1]["loss"] < rows[0]["loss"] - 1
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype(jnp.float32)}
  # A bfloat16 average would not see changes this small.
  scale = np.asarray(state.ema["final_norm"]["scale"])
  assert (scale != scale.astype(jnp.bfloat16).astype(np.float32)).any()


def test_metrics_average_and_step_by_hand():
  decoder = small.decoder_of()
  built = optimizers.build(SPEC, 10, axes_of(decoder))
  plan, first = create(decoder, built.transform, First(0), ema=True)
  objective = next_token(NextToken(chunk=16), decoder)
  step = jax.jit(make_step(Task(objective), built, ema_decay=0.75))
  before, batch = first(), small.on_mesh(decoder.layout, small.batch())
  after, metrics = step(before, batch)
  assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}
  names = {"loss", "nll", "accuracy", "padding", "grad_norm", "lr"}
  assert set(metrics) == names
  terms, grads = gradients(1, z_loss=0.0)
  grads = [g / float(terms.denominator) for g in grads.values()]
  norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads))
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
  assert float(metrics["loss"]) == pytest.approx(float(metrics["nll"]), rel=1e-6)
  assert float(metrics["lr"]) == pytest.approx(1e-2)
  empty = (small.batch()["segments"] == 0).mean()
  assert float(metrics["padding"]) == pytest.approx(empty)
  assert float(terms.denominator) == small.batch()["weights"].sum()
  assert int(after.step) == 1
  for old, new, average in zip(
    jax.tree.leaves(before.params),
    jax.tree.leaves(after.params),
    jax.tree.leaves(after.ema),
    strict=True,
  ):
    np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)
  key = jax.random.key_data
  np.testing.assert_array_equal(key(after.rng), key(before.rng))
  assert jax.tree.structure(after) == jax.tree.structure(plan.shapes)


def test_the_average_starts_at_the_first_parameters():
  state = first_state(small.decoder_of(), ema=True)
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_the_state_is_given_away_and_keeps_its_layout(low):
  compiled, first, plan, decoder = low
  before = first()
  batch = small.on_mesh(decoder.layout, small.batch())
  after, _ = compiled(before, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state))
  assert not batch["tokens"].is_deleted()
  planned = jax.tree.leaves(plan.shardings)
  for leaf, sharding in zip(jax.tree.leaves(after), planned, strict=True):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_the_draw_depends_on_the_step_and_the_seed():
  def objective(params, batch, rng):
    del batch
    draw = jax.random.normal(rng)
    one = jnp.asarray(1.0)
    total = jnp.sum(params["w"]) * draw
    return Terms(total, one, {"draw": Ratio(draw, one)})

  built = optimizers.build(SPEC, 10, {"w": ("norm",)})
  step = make_step(Task(objective), built)
  params = {"w": jnp.ones((2,))}

  def draw(number, seed):
    state = TrainState(
      jnp.asarray(number), params, built.transform.init(params), jax.random.key(seed),
      None,
    )  # fmt: skip
    return float(step(state, {})[1]["draw"])

  assert draw(3, 0) == draw(3, 0)
  assert len({draw(3, 0), draw(4, 0), draw(3, 1)}) == 3
