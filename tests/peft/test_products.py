"""VeRA and LoHa against PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.parameters import Matrix
from jaxlm.ops.weights import Lora
from jaxlm.peft import products
from jaxlm.peft.products import LoHa, VeRA
from jaxlm.peft.targets import Targets
from peft.test_lora import base_of, decoder, forward, golden, moved

CLOSE = {"rtol": 2e-4, "atol": 2e-5}
TARGETS = Targets(
  {name: Matrix(("embed", "mlp"), 1) for name in ("lin", "ff")},
  {"lin": (16, 24), "ff": (24, 10)},
)


def test_vera_is_peft_s():
  """Each matrix has the front of the shared pair."""
  shared = golden("vera/shared_A").T, golden("vera/shared_B").T
  weights = {}
  for name in TARGETS.matrices:
    letters = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    found = {k: golden(f"vera/param/{name}.{v}.default") for k, v in letters.items()}
    pair = products._pair(TARGETS, name, found, shared)
    weights[name] = Lora(golden(f"in/{name}.weight").T, *pair)
  lin = weights["lin"]
  np.testing.assert_allclose((lin.a @ lin.b).T, golden("vera/delta_lin"), **CLOSE)
  np.testing.assert_allclose(forward(lin, weights["ff"]), golden("vera/y"), **CLOSE)


def same_gradients(loss, case, names):
  """Of the sum of squares, by experiments/goldens/peft_gradients.py."""
  given = {name: golden(f"{case}/param/{name}.default") for name in names}
  for name, found in jax.grad(loss)(given).items():
    wanted = golden(f"{case}/grad/{name}.default")
    assert float(jnp.abs(wanted).max()) > 0
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-4, err_msg=name)


def test_vera_s_gradients_are_peft_s():
  shared = golden("vera/shared_A").T, golden("vera/shared_B").T

  def loss(found):
    weights = []
    for name in TARGETS.matrices:
      own = {k: found[f"{name}.vera_lambda_{k}"] for k in ("d", "b")}
      pair = products._pair(TARGETS, name, own, shared)
      weights.append(Lora(golden(f"in/{name}.weight").T, *pair))
    return jnp.sum(jnp.square(forward(*weights)))

  names = [f"{n}.vera_lambda_{k}" for n in TARGETS.matrices for k in ("d", "b")]
  same_gradients(loss, "vera", names)


def test_loha_s_gradients_are_peft_s():
  def loss(found):
    a = [found[f"lin.hada_{name}"].T for name in ("w1_b", "w2_b")]
    b = [found[f"lin.hada_{name}"].T for name in ("w1_a", "w2_a")]
    pair = products._of_pairs(*a, 1), products._of_pairs(*b, 0)
    weight = Lora(golden("in/lin.weight").T, *pair, scale=2.0)
    return jnp.sum(jnp.square(forward(weight)))

  names = [f"lin.hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
  same_gradients(loss, "loha", names)


def test_vera_s_pair_is_of_the_seed_alone():
  spec = VeRA(rank=8)
  a, b = products._shared(spec, TARGETS)
  assert a.shape == (24, 8)
  assert b.shape == (8, 24)
  assert 0.9 < float(jnp.abs(a).max()) / (6 / 24) ** 0.5 <= 1
  assert 0.9 < float(jnp.abs(b).max()) / (6 / 8) ** 0.5 <= 1
  again, _ = jax.jit(lambda: products._shared(spec, TARGETS))()
  np.testing.assert_array_equal(a, again)
  other, _ = products._shared(VeRA(rank=8, seed=1), TARGETS)
  assert float(jnp.abs(a - other).max()) > 0.1


def test_loha_is_peft_s():
  """PEFT's first factor of a product has the outputs."""
  param = "loha/param/lin.hada_"
  a = [golden(f"{param}{name}.default").T for name in ("w1_b", "w2_b")]
  b = [golden(f"{param}{name}.default").T for name in ("w1_a", "w2_a")]
  pair = products._of_pairs(*a, 1), products._of_pairs(*b, 0)
  weight = Lora(golden("in/lin.weight").T, *pair, scale=2.0)
  delta = 2 * (pair[0] @ pair[1]).T
  np.testing.assert_allclose(delta, golden("loha/delta_lin"), **CLOSE)
  np.testing.assert_allclose(forward(weight), golden("loha/y"), **CLOSE)


@pytest.mark.parametrize("make", [products._of_pairs])
def test_products_of_stacked_layers_are_those_of_each(make):
  keys = jax.random.split(jax.random.key(0))
  one, other = (jax.random.normal(key, (3, 4, 2, 5)) for key in keys)
  for dim in (1, 2, 3):
    wanted = jnp.stack([make(x, y, dim - 1) for x, y in zip(one, other, strict=True)])
    np.testing.assert_array_equal(make(one, other, dim), wanted)


def test_loha_attaches_pairs_of_the_rank_squared():
  """Their product is that of both changes, in each layer."""
  model = decoder()
  base = base_of(model)
  tuned = products.loha(LoHa(rank=3, alpha=6.0), model)
  factors = moved(tuned.init(base, jax.random.key(0)))
  params = tuned.attach(base, factors, None)
  leaf, found = (tree["layers"]["0"]["mixer"]["o"] for tree in (params, factors))
  assert (leaf.a.shape, leaf.b.shape) == ((2, 4, 8, 9), (2, 9, 16))
  assert leaf.scale == 2.0
  one, other = (
    jnp.einsum("lhkr,lrd->lhkd", found[f"a{n}"], found[f"b{n}"]) for n in "12"
  )
  both = jnp.einsum("lhkr,lrd->lhkd", leaf.a, leaf.b)
  np.testing.assert_allclose(both, one * other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: VeRA(rank=0), "adapters.rank: 0 is under 1"),
    (lambda: VeRA(seed=-1), "adapters.seed: -1 is not from 0"),
    (lambda: VeRA(start=0.0), "adapters.start: at zero"),
    (lambda: LoHa(rank=0), "adapters.rank: 0 is under 1"),
    (lambda: LoHa(alpha=0.0), "adapters.alpha: 0.0 is not a positive"),
  ],
)
def test_refusals(make, told):
  with pytest.raises(InputError, match=told):
    make()
