import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.posttrain.reward import BradleyTerry, bradley_terry, stepwise
from tests.posttrain.goldens import CASES, LOOSE, golden, same

NAN, INF = float("nan"), float("inf")
# Of each case: the spec, and another one that must not agree with it.
SPECS = {
  "bt": (BradleyTerry(), BradleyTerry(margin=True)),
  "margin": (BradleyTerry(margin=True), BradleyTerry()),
  "center0.01": (BradleyTerry(center=0.01), BradleyTerry(center=0.02)),
}


def loss_and_grad(spec: BradleyTerry, dtype):
  margin_BU = jnp.asarray(golden("reward/in/margin", dtype).reshape(2, 2))

  def loss(scores):
    chosen_BU, rejected_BU = scores[:4].reshape(2, 2), scores[4:].reshape(2, 2)
    present_BU = jnp.ones_like(chosen_BU)
    return bradley_terry(
      spec, chosen_BU, rejected_BU, margin_BU, present_BU
    ).loss.mean()

  return jax.value_and_grad(loss)(jnp.asarray(golden("reward/in/logits", dtype)))


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_the_goldens(name, dtype, tolerance):
  with jax.enable_x64(dtype is np.float64):
    value, grad = loss_and_grad(SPECS[name][0], dtype)
    assert value.dtype == dtype
  assert same(value, golden(f"reward/{name}/loss"), tolerance)
  assert same(grad, golden(f"reward/{name}/grad/logits"), tolerance)


@pytest.mark.parametrize("name", SPECS)
def test_another_spec_does_not_agree(name):
  value, _ = loss_and_grad(SPECS[name][1], np.float32)
  assert not same(value, golden(f"reward/{name}/loss"), LOOSE)


@pytest.mark.parametrize("junk", [0.0, -1e30, 1e30, NAN, INF])
def test_empty_slots_change_nothing(junk):
  spec = BradleyTerry(margin=True, center=0.01)
  arrays = [
    jnp.float32([[2.0, -1.0]]),
    jnp.float32([[0.5, 3.0]]),
    jnp.float32([[0.1, 0.2]]),
  ]

  def run(chosen, rejected, margin, present):
    def loss(*scores):
      losses = bradley_terry(spec, *scores, present)
      return losses.loss.sum(), losses

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, losses), grads = run(chosen, rejected, margin)
    return jax.tree.map(np.asarray, (losses, grads))

  def widen(a, value):
    return jnp.pad(a, ((0, 0), (1, 1)), constant_values=value)

  got = run(*(widen(a, junk) for a in arrays), widen(jnp.ones((1, 2)), 0.0))
  want = run(*map(jnp.asarray, arrays), jnp.ones((1, 2)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a[:, 1:-1], b)
    np.testing.assert_array_equal(a[:, [0, -1]], 0.0)
  metrics = want[0].metrics
  np.testing.assert_array_equal(metrics["accuracy"], [[1.0, 0.0]])
  np.testing.assert_array_equal(metrics["reward_chosen"], arrays[0])
  np.testing.assert_array_equal(metrics["reward_rejected"], arrays[1])
  np.testing.assert_array_equal(metrics["margin"], [[1.5, -4.0]])


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_steps_are_the_goldens(dtype, tolerance):
  labels_BT = golden("prm/in/labels").astype(np.int32)
  wrong_BT = np.where(labels_BT >= 0, 1 - labels_BT, labels_BT)
  weights_BT = (labels_BT >= 0).astype(dtype)
  with jax.enable_x64(dtype is np.float64):
    logits_BTC = jnp.asarray(golden("prm/in/logits", dtype))
    loss_BT, other_BT = (
      np.asarray(stepwise(logits_BTC, jnp.asarray(labels), jnp.asarray(weights_BT)))
      for labels in (labels_BT, wrong_BT)
    )
  assert loss_BT.dtype == dtype
  np.testing.assert_array_equal(loss_BT == 0.0, weights_BT == 0.0)
  assert same(loss_BT.sum() / weights_BT.sum(), golden("prm/loss"), tolerance)
  assert not same(other_BT.sum() / weights_BT.sum(), golden("prm/loss"), LOOSE)


@pytest.mark.parametrize("junk", [NAN, INF, 1e30])
def test_a_token_without_weight_may_hold_anything(junk):
  logits_BTC = jnp.float32([[[1.0, -1.0], [0.5, 2.0], [junk, -junk]]])
  weights_BT = jnp.float32([[1.0, 0.5, 0.0]])
  for label in (-100, 7):
    labels_BT = jnp.int32([[0, 1, label]])

    def loss(logits_BTC, labels_BT=labels_BT):
      return stepwise(logits_BTC, labels_BT, weights_BT).sum()

    value, grad_BTC = jax.value_and_grad(loss)(jnp.asarray(logits_BTC))
    np.testing.assert_allclose(
      value, np.log1p(np.e**-2) + np.log1p(np.e**-1.5) / 2, 1e-6
    )
    assert np.isfinite(grad_BTC).all()
    np.testing.assert_array_equal(grad_BTC[0, 2], 0.0)


def test_step_losses_are_float32():
  logits_BTC = jnp.ones((1, 1, 2), jnp.bfloat16)
  loss_BT = stepwise(logits_BTC, jnp.int32([[1]]), jnp.ones((1, 1)))
  assert loss_BT.dtype == jnp.float32


@pytest.mark.parametrize("center", [-0.1, NAN, INF])
def test_what_no_spec_can_be(center):
  with pytest.raises(InputError, match=f"objective.center: {center}"):
    BradleyTerry(center=center)
