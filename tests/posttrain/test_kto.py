import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.posttrain.kto import KTO, kl_baseline, kto
from tests.posttrain.goldens import CASES, LOOSE, golden, same

NAN, INF = float("nan"), float("inf")
# Of each case: the spec, another one that must not agree, and the sign of the estimate.
SPECS = {
  "kto": (KTO(), KTO(beta=0.11), 1.0),
  "kto_swap_kl": (KTO(), KTO(beta=0.11), -1.0),
  "kto_w": (KTO(undesirable=1.33), KTO(undesirable=1.4), 1.0),
  "kto_beta0.5": (KTO(beta=0.5), KTO(beta=0.55), 1.0),
  "apo_zero_unpaired": (KTO(method="apo_zero_unpaired"), KTO(), 1.0),
}


def read(dtype, prefix: str = ""):
  """Log-probabilities of tokens under policy and reference, and which count."""
  mask_UT = golden(f"kto/in/{prefix}completion_mask")[:, 1:].astype(dtype)
  names = ("token_logps", "ref_token_logps")
  return *(golden(f"kto/in/{prefix}{name}", dtype) for name in names), mask_UT


def estimate(dtype, sign: float):
  policy_UT, reference_UT, mask_UT = read(dtype, "KL_")
  total = sign * jnp.sum((policy_UT - reference_UT) * mask_UT)
  return kl_baseline(total, jnp.asarray(len(mask_UT), dtype))


def loss_and_grad(spec: KTO, kl, dtype):
  policy_UT, reference_UT, mask_UT = read(dtype)
  label_BU = golden("kto/in/label").astype(dtype).reshape(2, 3)
  reference_BU = jnp.asarray((reference_UT * mask_UT).sum(1)).reshape(2, 3)

  def loss(policy_UT):
    policy_BU = jnp.sum(policy_UT * mask_UT, axis=1).reshape(2, 3)
    present_BU = jnp.ones_like(policy_BU)
    losses = kto(spec, policy_BU, reference_BU, jnp.asarray(label_BU), present_BU, kl)
    return losses.loss.mean()

  return jax.value_and_grad(loss)(jnp.asarray(policy_UT))


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_the_goldens(name, dtype, tolerance):
  spec, _, sign = SPECS[name]
  with jax.enable_x64(dtype is np.float64):
    kl = estimate(dtype, sign)
    value, grad_UT = loss_and_grad(spec, kl, dtype)
    assert value.dtype == dtype
  if spec.method == "kto":
    assert same(kl, golden(f"kto/{name}/kl"), tolerance)
  assert same(value, golden(f"kto/{name}/loss"), tolerance)
  assert same(grad_UT, golden(f"kto/{name}/grad/token_logps"), tolerance)


@pytest.mark.parametrize("name", SPECS)
def test_another_spec_does_not_agree(name):
  _, other, sign = SPECS[name]
  value, _ = loss_and_grad(other, estimate(np.float32, sign), np.float32)
  assert not same(value, golden(f"kto/{name}/loss"), LOOSE)


def test_another_baseline_does_not_agree():
  value, _ = loss_and_grad(KTO(), estimate(np.float32, 1.1), np.float32)
  assert not same(value, golden("kto/kto/loss"), LOOSE)


def test_the_baseline_has_no_gradient_and_no_examples_give_zero():
  one, two = jnp.float32(1.0), jnp.float32(2.0)
  assert kl_baseline(one, two) == 0.5
  assert kl_baseline(-one, two) == 0.0
  assert kl_baseline(0.0 * one, 0.0 * one) == 0.0
  assert jax.grad(kl_baseline)(one, two) == 0.0


@pytest.mark.parametrize("junk", [0.0, -1e30, 1e30, NAN, INF])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_empty_slots_change_nothing(name, junk):
  spec, _, _ = SPECS[name]
  arrays = [jnp.float32([[-3.0, -4.0], [-5.0, -2.0]]), jnp.float32([[-4.0, -3.0]] * 2)]
  arrays.append(jnp.float32([[1.0, 0.0], [0.0, 1.0]]))

  def run(policy, reference, label, present):
    def loss(policy, reference):
      losses = kto(spec, policy, reference, label, present, jnp.float32(0.3))
      return losses.loss.sum(), losses

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, losses), grads = run(policy, reference)
    return jax.tree.map(np.asarray, (losses, grads))

  def widen(a, value):
    return jnp.pad(a, ((0, 0), (1, 1)), constant_values=value)

  present = jnp.ones((2, 2))
  got = run(*(widen(a, junk) for a in arrays), widen(present, 0.0))
  want = run(*map(jnp.asarray, arrays), present)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a[:, 1:-1], b)
    np.testing.assert_array_equal(a[:, [0, -1]], 0.0)


def test_metrics_stand_where_their_label_is():
  policy_BU, zero_BU = jnp.float32([[3.0, -3.0, 1.0]]), jnp.zeros((1, 3))
  label_BU = jnp.float32([[1.0, 0.0, 0.0]])
  losses = kto(KTO(), policy_BU, zero_BU, label_BU, zero_BU + 1.0, jnp.float32(0.5))
  wanted = {
    "accuracy": [1.0, 1.0, 0.0],
    "desirable": [1.0, 0.0, 0.0],
    "reward_chosen": [0.3, 0.0, 0.0],
    "reward_rejected": [0.0, -0.3, 0.1],
    "logp_chosen": [3.0, 0.0, 0.0],
    "logp_rejected": [0.0, -3.0, 1.0],
  }
  assert set(losses.metrics) == set(wanted)
  for name, values in wanted.items():
    assert same(losses.metrics[name], jnp.float32([values]), 1e-6), name


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"method": "apo"}, "objective.method: 'apo' is not one of kto"),
    ({"beta": 0.0}, "objective.beta: 0.0"),
    ({"desirable": -1.0}, "objective.desirable: -1.0"),
    ({"undesirable": NAN}, "objective.undesirable: nan"),
  ],
)
def test_what_no_spec_can_be(fields, message):
  with pytest.raises(InputError, match=message):
    KTO(**fields)
