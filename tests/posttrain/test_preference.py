import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.posttrain.pairs import Pairs, Sums
from jaxlm.posttrain.preference import DPO, Kind, dpo
from tests.posttrain.goldens import CASES, LOOSE, golden, same

PAIRS = 4
NAN, INF = float("nan"), float("inf")


def kind(name: Kind, **fields) -> DPO:
  return DPO(losses=((name, 1.0),), **fields)


MPO = DPO(losses=(("sigmoid", 0.8), ("bco", 0.2), ("sft", 1.0)))
# Of each case: the spec, and another one that must not agree with it.
SPECS = {
  "sigmoid": (DPO(), DPO(beta=0.11)),
  "sigmoid_beta0.01": (DPO(beta=0.01), DPO(beta=0.02)),
  "sigmoid_beta0.5": (DPO(beta=0.5), DPO(beta=0.55)),
  "hinge": (kind("hinge"), kind("hinge", beta=0.11)),
  "sppo_hard": (kind("sppo"), kind("sppo", beta=0.11)),
  "ipo": (kind("ipo"), kind("ipo_sum")),
  "ipo_beta0.01": (kind("ipo", beta=0.01), kind("ipo", beta=0.011)),
  "ipo_beta0.5": (kind("ipo", beta=0.5), kind("ipo", beta=0.55)),
  "nca_pair": (kind("nca"), kind("nca", beta=0.11)),
  "bco_pair": (kind("bco"), kind("bco", beta=0.11)),
  "aot": (kind("aot"), kind("aot_unpaired")),
  "aot_ls0.1": (kind("aot", smoothing=0.1), kind("aot", smoothing=0.15)),
  "aot_unpaired": (kind("aot_unpaired"), kind("aot")),
  "apo_zero": (kind("apo_zero"), kind("apo_zero", beta=0.11)),
  "apo_down": (kind("apo_down"), kind("apo_down", beta=0.11)),
  "discopop": (kind("discopop"), kind("discopop", discopop_tau=0.06)),
  "sft": (kind("sft"), DPO(losses=(("sft", 1.1),))),
  "sigmoid_norm": (kind("sigmoid_norm"), kind("sigmoid")),
  "robust_ls0.1": (kind("robust", smoothing=0.1), kind("robust", smoothing=0.15)),
  "exo_pair_ls0.001": (kind("exo", smoothing=1e-3), kind("exo", smoothing=2e-3)),
  "sigmoid_forward_kl": (DPO(divergence="forward_kl"), DPO()),
  "sigmoid_js_divergence": (DPO(divergence="js"), DPO()),
  "sigmoid_alpha_divergence": (
    DPO(divergence="alpha"),
    DPO(divergence="alpha", alpha_divergence=0.6),
  ),
  "sigmoid_ld0.5": (DPO(length_tail=0.5), DPO(length_tail=0.4)),
  "sigmoid_wpo": (DPO(wpo=True), DPO()),
  "mpo_sigmoid+bco+sft": (
    MPO,
    dataclasses.replace(MPO, losses=(("sigmoid", 0.7), ("bco", 0.3), ("sft", 1.0))),
  ),
}


def tokens(dtype) -> dict[str, np.ndarray]:
  names = {
    "policy": "token_logps",
    "reference": "ref_token_logps",
    "squares": "log_sum_sq_probs",
  }
  arrays = {name: golden(f"dpo/in/{key}", dtype) for name, key in names.items()}
  # A token's log-probability stands where its input is: one earlier.
  arrays["mask"] = golden("dpo/in/completion_mask")[:, 1:].astype(dtype)
  return arrays


def pairs_of(spec: DPO, policy_UT, arrays, shape=(2, 2)) -> Pairs:
  """Sums of the chosen (the first rows) and the rejected, laid out as [B, U]."""
  mask_UT = arrays["mask"]
  length_U = mask_UT.sum(1)
  counted_UT = mask_UT
  if spec.length_tail is not None:
    shorter_U = np.minimum(length_U[:PAIRS], length_U[PAIRS:])
    place_UT = np.cumsum(mask_UT, axis=1)
    past_UT = place_UT > np.concatenate([shorter_U, shorter_U])[:, None]
    counted_UT = (
      np.where(past_UT, spec.length_tail, 1.0).astype(mask_UT.dtype) * mask_UT
    )
  sure_UT = (policy_UT - arrays["squares"]) * mask_UT
  sums = Sums(
    policy=jnp.sum(policy_UT * counted_UT, axis=1),
    reference=jnp.asarray((arrays["reference"] * counted_UT).sum(1)),
    length=jnp.asarray(length_U),
    confidence=jnp.sum(sure_UT, axis=1) / length_U,
  )
  chosen, rejected = (
    jax.tree.map(lambda a, rows=rows: a[rows].reshape(shape), sums)
    for rows in (slice(PAIRS), slice(PAIRS, None))
  )
  return Pairs(chosen, rejected, jnp.ones(shape, sums.policy.dtype))


def total(spec: DPO, policy_UT, arrays):
  """The mean over pairs, and the part that is the caller's."""
  found = jnp.mean(dpo(spec, pairs_of(spec, policy_UT, arrays)).loss)
  mask_UT = arrays["mask"][:PAIRS]
  nll = -jnp.sum(policy_UT[:PAIRS] * mask_UT) / mask_UT.sum()
  return found + spec.sft_weight * nll


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_the_goldens(name, dtype, tolerance):
  spec, _ = SPECS[name]
  with jax.enable_x64(dtype is np.float64):
    arrays = tokens(dtype)
    policy_UT = jnp.asarray(arrays["policy"])
    value, grad_UT = jax.value_and_grad(lambda x_UT: total(spec, x_UT, arrays))(
      policy_UT
    )
    assert value.dtype == dtype
  assert same(value, golden(f"dpo/{name}/loss"), tolerance)
  assert same(grad_UT, golden(f"dpo/{name}/grad/token_logps"), tolerance)


@pytest.mark.parametrize("name", SPECS)
def test_another_spec_does_not_agree(name):
  _, other = SPECS[name]
  arrays = tokens(np.float32)
  policy_UT = jnp.asarray(arrays["policy"])
  value, grad_UT = jax.value_and_grad(lambda x_UT: total(other, x_UT, arrays))(
    policy_UT
  )
  grad_agrees = same(grad_UT, golden(f"dpo/{name}/grad/token_logps"), LOOSE)
  assert not (grad_agrees and same(value, golden(f"dpo/{name}/loss"), LOOSE))


def test_every_kind_is_held_against_a_number():
  held = {name for spec, _ in SPECS.values() for name, _ in spec.losses}
  assert set(typing.get_args(Kind)) - held == {"ipo_sum"}


@pytest.mark.parametrize(
  ("spec", "formula"),
  [
    (kind("ipo_sum"), lambda c, r: (c - r - 5.0) ** 2),
    (kind("sppo"), lambda c, r: (c - 5.0) ** 2 + (r + 5.0) ** 2),
    (kind("sppo", beta=0.2), lambda c, r: (c - 2.5) ** 2 + (r + 2.5) ** 2),
    (
      DPO(smoothing=0.1, beta=1.0),
      lambda c, r: 0.9 * np.logaddexp(0, r - c) + 0.1 * np.logaddexp(0, c - r),
    ),
    (
      kind("hinge", divergence="forward_kl", beta=1.0),
      lambda c, r: np.maximum(0, 1 - (np.exp(-r) - np.exp(-c))),
    ),
  ],
)
def test_kinds_without_goldens_are_their_formula(spec, formula):
  with jax.enable_x64(True):
    arrays = tokens(np.float64)
    ratio_U = ((arrays["policy"] - arrays["reference"]) * arrays["mask"]).sum(1)
    wanted_U = formula(ratio_U[:PAIRS], ratio_U[PAIRS:])
    found_BU = dpo(spec, pairs_of(spec, jnp.asarray(arrays["policy"]), arrays)).loss
  np.testing.assert_allclose(found_BU.reshape(-1), wanted_U, rtol=1e-12)


def test_smoothed_sigmoid_is_cdpo():
  c, r = (golden(f"cdpo/in/{name}_logratios")[None] for name in ("chosen", "rejected"))
  present_BU = jnp.ones_like(c)
  pairs = Pairs(*(Sums(x, 0.0 * x, present_BU, 0.0 * x) for x in (c, r)), present_BU)
  wanted_U = golden("cdpo/ls0.1_beta0.1/losses")
  assert same(dpo(DPO(smoothing=0.1), pairs).loss[0], wanted_U, LOOSE)
  assert not same(dpo(DPO(smoothing=0.15), pairs).loss[0], wanted_U, LOOSE)
  assert not same(dpo(DPO(), pairs).loss[0], wanted_U, LOOSE)


def test_metrics_are_the_goldens():
  arrays = tokens(np.float32)
  pairs = pairs_of(DPO(), jnp.asarray(arrays["policy"]), arrays)
  metrics = dpo(DPO(), pairs).metrics
  names = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
  }
  assert set(metrics) == set(names)
  for name, key in names.items():
    assert same(metrics[name].mean(), golden(f"dpo/sigmoid/metric/{key}"), 1e-5), name


def with_junk(pairs: Pairs, junk: float) -> Pairs:
  """Adds two slots to each row, the first before those that are there."""

  def widen(a, value):
    return jnp.pad(a, ((0, 0), (1, 1)), constant_values=value)

  chosen, rejected = (
    jax.tree.map(lambda a: widen(a, junk), sums) for sums in pairs[:2]
  )
  return Pairs(chosen, rejected, widen(pairs.present, 0.0))


@pytest.mark.parametrize("junk", [0.0, -1e30, 1e30, NAN, INF])
@pytest.mark.parametrize("name", SPECS)
def test_empty_slots_change_nothing(name, junk):
  spec, _ = SPECS[name]
  arrays = tokens(np.float32)
  pairs = pairs_of(spec, jnp.asarray(arrays["policy"]), arrays)

  def loss(pairs, present):
    losses = dpo(spec, pairs._replace(present=present))
    return losses.loss.sum(), losses

  def run(pairs):
    one = jax.value_and_grad(loss, has_aux=True)
    (_, losses), grads = one(pairs, pairs.present)
    return jax.tree.map(np.asarray, (losses, grads._replace(present=())))

  want = run(pairs)
  got = run(with_junk(pairs, junk))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a[:, 1:-1], b)
    np.testing.assert_array_equal(a[:, [0, -1]], 0.0)


@pytest.mark.parametrize("gap", [-1e4, -300.0, 300.0, 1e4])
@pytest.mark.parametrize("name", [*SPECS, "discopop_tau1"])
def test_no_gap_is_too_wide(name, gap):
  spec = SPECS[name][0] if name in SPECS else kind("discopop", discopop_tau=1.0)

  def loss(policy_BU):
    one_BU = jnp.ones_like(policy_BU)
    chosen = Sums(policy_BU, -1e4 * one_BU, one_BU, 0.0 * one_BU)
    rejected = chosen._replace(policy=-1e4 * one_BU)
    return dpo(spec, Pairs(chosen, rejected, one_BU)).loss.sum()

  value, grad_BU = jax.value_and_grad(loss)(jnp.full((1, 1), gap - 1e4))
  assert np.isfinite(value)
  assert np.isfinite(grad_BU).all()


def test_a_batch_without_pairs_has_no_loss():
  zero_BU = jnp.zeros((2, 3))
  empty = Sums(zero_BU, zero_BU, zero_BU, zero_BU)
  for spec, _ in SPECS.values():
    losses = dpo(spec, Pairs(empty, empty, zero_BU))
    assert not any(np.any(a) for a in jax.tree.leaves(losses))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"losses": (("sigmod", 1.0),)}, "objective.losses: 'sigmod' .* mean 'sigmoid'"),
    ({"losses": ()}, "objective.losses: takes one kind or more"),
    ({"losses": (("nca", 1.0), ("nca", 2.0))}, "at most once"),
    ({"losses": (("nca", 0.0),)}, "objective.losses: the weight 0.0 of nca"),
    ({"losses": (("nca", NAN),)}, "objective.losses: the weight nan of nca"),
    ({"beta": 0.0}, "objective.beta: 0.0"),
    ({"beta": NAN}, "objective.beta: nan"),
    ({"beta": INF}, "objective.beta: inf"),
    ({"smoothing": -0.1}, "objective.smoothing: -0.1"),
    ({"smoothing": 0.5}, "objective.smoothing: 0.5"),
    (
      {"smoothing": 0.1, "losses": (("ipo", 1.0),)},
      "objective.smoothing: ipo has none",
    ),
    ({"losses": (("exo", 1.0),)}, "objective.smoothing: exo needs one over 0"),
    ({"divergence": "kl"}, "objective.divergence: 'kl' is not one of reverse_kl"),
    (
      {"divergence": "js", "losses": (("aot", 1.0),)},
      "objective.divergence: aot has no log-ratios",
    ),
    ({"alpha_divergence": 1.0}, "objective.alpha_divergence: 1.0"),
    ({"alpha_divergence": NAN}, "objective.alpha_divergence: nan"),
    ({"discopop_tau": 0.0}, "objective.discopop_tau: 0.0"),
    ({"discopop_tau": 1.5}, "objective.discopop_tau: 1.5"),
    ({"length_tail": -0.1}, "objective.length_tail: -0.1"),
    ({"length_tail": 1.1}, "objective.length_tail: 1.1"),
    ({"wpo": True, "losses": (("aot", 1.0),)}, "objective.wpo: weighs pairs"),
  ],
)
def test_what_no_spec_can_be(fields, message):
  with pytest.raises(InputError, match=message):
    DPO(**fields)


def test_a_spec_comes_from_the_command_line():
  text = "losses=((sigmoid,0.8),(bco,0.2),(sft,1.0))"
  assert config.override(DPO(), [text]) == MPO
  assert MPO.sft_weight == 1.0
