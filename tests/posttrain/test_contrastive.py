import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.posttrain.contrastive import (
  Contrastive,
  alphapo,
  contrastive,
  cpo,
  orpo,
  simpo,
)
from jaxlm.posttrain.pairs import Pairs, Sums
from tests.posttrain.goldens import CASES, LOOSE, golden, same

NAN, INF = float("nan"), float("inf")
SIMPO = simpo(beta=2.0, gamma=0.5)
ALPHAPO = alphapo(beta=2.0, gamma=0.5)
# Of each case: the spec, and another one that must not agree with it.
SPECS = {
  "sigmoid": (cpo(), cpo(beta=0.11)),
  "sigmoid_ls0.1": (cpo(smoothing=0.1), cpo(smoothing=0.15)),
  "hinge": (
    Contrastive(method="hinge", beta=0.1, nll=1.0),
    Contrastive(method="hinge", beta=0.11, nll=1.0),
  ),
  "ipo": (
    Contrastive(method="ipo", beta=0.1, nll=1.0),
    Contrastive(method="ipo", beta=0.11, nll=1.0),
  ),
  "simpo_b2_g0.5": (SIMPO, dataclasses.replace(SIMPO, gamma=1.0)),
  "simpo_b2_g0.5_ls0.1": (dataclasses.replace(SIMPO, smoothing=0.1), SIMPO),
  "alphapo_b2_a0.25": (ALPHAPO, dataclasses.replace(ALPHAPO, alpha=0.3)),
}


def pairs_of(chosen_U, rejected_U, *, length: float = 1.0) -> Pairs:
  """One row of pairs whose mean log-probabilities are given."""

  def sums(mean_U) -> Sums:
    mean_BU = jnp.asarray(mean_U)[None]
    zero_BU = jnp.zeros_like(mean_BU)
    return Sums(mean_BU * length, zero_BU, zero_BU + length, zero_BU)

  return Pairs(sums(chosen_U), sums(rejected_U), jnp.ones((1, len(chosen_U))))


def losses_and_grads(spec: Contrastive, chosen_U, rejected_U, *, length: float = 1.0):
  """Returns the loss of each pair, and the gradients of their mean."""

  def loss(chosen_U, rejected_U):
    loss_BU = contrastive(spec, pairs_of(chosen_U, rejected_U, length=length)).loss
    return loss_BU.mean(), loss_BU[0]

  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (_, loss_U), grads = run(jnp.asarray(chosen_U), jnp.asarray(rejected_U))
  return loss_U, grads


def inputs(dtype):
  return (golden(f"cpo/in/{name}_logps", dtype) for name in ("chosen", "rejected"))


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_the_goldens(name, dtype, tolerance):
  with jax.enable_x64(dtype is np.float64):
    loss_U, grads = losses_and_grads(SPECS[name][0], *inputs(dtype))
    assert loss_U.dtype == dtype
    loss_U = np.asarray(loss_U)
  assert same(loss_U, golden(f"cpo/{name}/losses"), tolerance)
  assert same(loss_U.mean(), golden(f"cpo/{name}/loss"), tolerance)
  for grad_U, side in zip(grads, ("chosen", "rejected"), strict=True):
    assert same(grad_U, golden(f"cpo/{name}/grad/{side}_logps"), tolerance)


@pytest.mark.parametrize("name", SPECS)
def test_another_spec_does_not_agree(name):
  loss_U, _ = losses_and_grads(SPECS[name][1], *inputs(np.float32))
  assert not same(loss_U, golden(f"cpo/{name}/losses"), LOOSE)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_compared_is_a_sum_or_a_mean(name):
  """Three times the tokens, each as likely: sums grow, means stay."""
  spec, _ = SPECS[name]
  short_U, _ = losses_and_grads(spec, *inputs(np.float32))
  long_U, _ = losses_and_grads(spec, *inputs(np.float32), length=3.0)
  summed = spec.method in ("cpo", "hinge")
  assert same(long_U, short_U, 1e-6) is not summed
  if summed:
    spec = dataclasses.replace(spec, beta=3.0 * spec.beta)
    assert same(long_U, losses_and_grads(spec, *inputs(np.float32))[0], 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_odds_ratios_are_the_goldens(dtype, tolerance):
  sides = ("chosen", "rejected")
  means = [golden(f"orpo/in/{side}_avg_logps", dtype) for side in sides]
  with jax.enable_x64(dtype is np.float64):
    for length in (1.0, 7.0):
      loss_U, grads = losses_and_grads(orpo(), *means, length=length)
      assert same(-loss_U, golden("orpo/array/neg_or_term"), tolerance)
      for grad_U, side in zip(grads, sides, strict=True):
        assert same(grad_U, golden(f"orpo/array/grad/{side}"), tolerance)
    other_U, _ = losses_and_grads(orpo(beta=0.11), *means)
  assert not same(-other_U, golden("orpo/array/neg_or_term"), LOOSE)


@pytest.mark.parametrize(
  ("name", "spec"),
  [("cpo/e2e_cpo", cpo()), ("cpo/e2e_simpo", simpo(gamma=0.5)), ("orpo/e2e", orpo())],
)
def test_totals_of_whole_models_are_the_goldens(name, spec):
  mean = "avg_logps" if spec.method == "orpo" else "logps"
  sides = [golden(f"{name}/{side}_{mean}") for side in ("chosen", "rejected")]
  nll = spec.nll * golden(f"{name}/nll_loss")
  wanted = golden(f"{name}/loss")
  assert same(losses_and_grads(spec, *sides)[0].mean() + nll, wanted, LOOSE)
  other = dataclasses.replace(spec, beta=1.1 * spec.beta)
  assert not same(losses_and_grads(other, *sides)[0].mean() + nll, wanted, LOOSE)


ALL = [spec for spec, _ in SPECS.values()] + [orpo()]


@pytest.mark.parametrize("junk", [0.0, -1e30, 1e30, NAN, INF])
@pytest.mark.parametrize("spec", ALL)
def test_empty_slots_change_nothing(spec, junk):
  pairs = pairs_of(*inputs(np.float32), length=3.0)

  def run(pairs: Pairs):
    def loss(chosen: Sums, rejected: Sums):
      losses = contrastive(spec, Pairs(chosen, rejected, pairs.present))
      return losses.loss.sum(), losses

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, losses), grads = run(*pairs[:2])
    return jax.tree.map(np.asarray, (losses, grads))

  def widen(a, value):
    return jnp.pad(a, ((0, 0), (1, 1)), constant_values=value)

  chosen, rejected = (
    jax.tree.map(lambda a: widen(a, junk), sums) for sums in pairs[:2]
  )
  got = run(Pairs(chosen, rejected, widen(pairs.present, 0.0)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(pairs)), strict=True):
    np.testing.assert_array_equal(a[:, 1:-1], b)
    np.testing.assert_array_equal(a[:, [0, -1]], 0.0)


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-4, -0.69314718, -50.0, -1e4])
@pytest.mark.parametrize("spec", ALL)
def test_no_completion_is_too_likely_or_unlikely(spec, mean):
  for sides in ((mean, -1.0), (-1.0, mean), (mean, mean)):
    loss_U, grads = losses_and_grads(spec, *(jnp.float32([side]) for side in sides))
    assert np.isfinite(loss_U).all()
    assert all(np.isfinite(grad_U).all() for grad_U in grads)


@pytest.mark.parametrize("mean", [-1e-5, -1e-3, -0.6, -0.8, -5.0, -80.0])
def test_odds_keep_their_digits(mean):
  """In float32, against float64: log p - log(1 - p) has the slope 1 / (1 - p)."""
  _, (grad_U, _) = losses_and_grads(
    orpo(beta=1.0), jnp.float32([mean]), jnp.float32([mean])
  )
  wanted = -0.5 / -np.expm1(np.float64(np.float32(mean)))
  np.testing.assert_allclose(grad_U, wanted, rtol=1e-5)


def test_rewards_are_what_is_compared():
  pairs = pairs_of([-1.0, -2.0], [-2.0, -1.5], length=2.0)
  metrics = contrastive(simpo(), pairs).metrics
  assert same(metrics["reward_chosen"], jnp.float32([[-2.0, -4.0]]), 1e-6)
  assert same(metrics["margin"], jnp.float32([[2.0, -1.0]]), 1e-6)
  assert same(metrics["accuracy"], jnp.float32([[1.0, 0.0]]), 1e-6)
  assert same(metrics["logp_chosen"], jnp.float32([[-2.0, -4.0]]), 1e-6)
  metrics = contrastive(cpo(), pairs).metrics
  assert same(metrics["reward_rejected"], jnp.float32([[-0.4, -0.3]]), 1e-6)


def test_what_the_cross_entropy_is_over():
  assert [spec.nll for spec in (cpo(), simpo(), alphapo(), orpo())] == [1, 0, 0, 1]
  assert orpo().nll_over == "sequence"
  assert cpo().nll_over == simpo().nll_over == "completion"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"method": "dpo"}, "objective.method: 'dpo' is not one of cpo, hinge"),
    ({"beta": 0.0}, "objective.beta: 0.0"),
    ({"beta": NAN}, "objective.beta: nan"),
    ({"nll": -1.0}, "objective.nll: -1.0"),
    ({"gamma": 0.5}, "objective.gamma: cpo has none"),
    ({"method": "simpo", "gamma": -0.5}, "objective.gamma: -0.5"),
    ({"method": "orpo", "smoothing": 0.1}, "objective.smoothing: orpo has none"),
    ({"smoothing": 0.5}, "objective.smoothing: 0.5"),
    ({"alpha": 0.25}, "objective.alpha: 0.25 does not fit cpo"),
    ({"method": "alphapo"}, "objective.alpha: 0.0 does not fit alphapo"),
    ({"method": "alphapo", "alpha": INF}, "objective.alpha: inf"),
  ],
)
def test_what_no_spec_can_be(fields, message):
  with pytest.raises(InputError, match=message):
    Contrastive(**({"method": "cpo", "beta": 0.1, "nll": 1.0} | fields))


def test_a_spec_comes_from_the_command_line():
  assert config.override(simpo(), ["beta=2.5", "gamma=0.25"]) == simpo(
    beta=2.5, gamma=0.25
  )
