"""Rows of a batch with adapters of their own, and one adapter made of several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm.errors import InputError
from jaxlm.models.decoder import logits
from jaxlm.models.parameters import _placed
from jaxlm.ops.weights import Lora
from jaxlm.peft import lora, many
from jaxlm.peft.lora import LoRA
from jaxlm.peft.many import Concatenated, Dare, Linear, Ties, Truncated
from jaxlm.peft.targets import get, merge
from jaxlm.sharding.mesh import Mesh
from jaxlm.trees import named_leaves
from peft.test_lora import MODEL, base_of, decoder, golden, outputs, tokens

SPEC = LoRA(rank=4, targets=("mixer/[qo]$", "mlp/down$"))
IDS = jnp.array([2, 0, 0, 3, 2, 2, 0, 3])


@functools.cache
def four(model, spec=SPEC):
  """Adapters after some training, each its own."""
  tuned = lora.tuning(spec, model)

  @jax.jit
  def one(base, key):
    first = tuned.init(base, key)
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(key, a.shape), first)

  return [one(base_of(model), key) for key in jax.random.split(jax.random.key(1), 4)]


def test_each_row_is_as_by_its_own_adapter():
  model = decoder()
  base, adapters = base_of(model), four(model)
  batch = many.rows(SPEC, model)
  params = batch.attach(base, many.stacked(adapters), IDS, None)
  mixed = outputs(model, params)
  tuned = lora.tuning(SPEC, model)
  for number in (0, 2, 3):
    alone = outputs(model, tuned.attach(base, adapters[number], None))
    here, others = number == IDS, number != IDS
    np.testing.assert_allclose(mixed[here], alone[here], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(mixed[others] - alone[others]).max(axis=(1, 2)).min()) > 0.05
  with pytest.raises(InputError, match=r"ids: rows with adapters of their own"):
    merge(params)


def test_axes_are_those_of_a_stack():
  model = decoder()
  axes = named_leaves(many.rows(SPEC, model).axes, lambda leaf: isinstance(leaf, tuple))
  stack = named_leaves(many.stacked(four(model)))
  assert axes.keys() == stack.keys()
  for name, leaf in stack.items():
    place = name.startswith("layers/")
    assert len(axes[name]) == leaf.ndim
    assert leaf.shape[place] == 4
    assert axes[name][: place + 1] == ("layers",) * place + (None,)


def test_gradients_reach_the_adapters_used_alike_on_a_mesh():
  spec = LoRA(rank=4, targets=SPEC.targets, dropout=0.2)

  def found(model):
    layout, base = model.layout, base_of(decoder())
    batch = many.rows(spec, model)
    placed = jax.tree.map(
      lambda axes: layout.sharding(*axes),
      batch.axes,
      is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    stack = jax.device_put(many.stacked(four(decoder(), spec)), placed)
    base = jax.device_put(base, layout.sharding())
    ids, texts = jax.device_put((IDS, tokens()), layout.sharding("batch"))

    def loss(stack):
      params = batch.attach(base, stack, ids, jax.random.key(4))
      x_BTD, _ = model.apply({"params": params}, texts)
      return jnp.mean(jnp.square(logits(MODEL, params, x_BTD)))

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(stack))

  value, grads = found(decoder(Mesh(fsdp=4, tensor=2), jax.devices()))
  wanted, theirs = found(decoder())
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  theirs = named_leaves(theirs)
  for name, grad in named_leaves(grads).items():
    by_adapter = np.moveaxis(grad, int(name.startswith("layers/")), 0)
    largest = np.abs(by_adapter).reshape(4, -1).max(axis=1)
    assert largest[1] == 0
    assert (np.delete(largest, 1) > 0).all()
    atol = 1e-5 * largest.max()
    np.testing.assert_allclose(grad, theirs[name], rtol=1e-4, atol=atol, err_msg=name)


def peft_s():
  """PEFT's two adapters of one matrix, of scale 2 and 1."""
  specs = LoRA(rank=4, alpha=8.0), LoRA(rank=2, alpha=2.0)
  pairs = [
    {"a": golden(f"multi/A_{n}").T, "b": golden(f"multi/B_{n}").T} for n in ("a", "b")
  ]
  return [(spec, {"lin": pair}) for spec, pair in zip(specs, pairs, strict=True)]


@pytest.mark.parametrize(
  ("how", "rank", "key"), [(Concatenated(), 6, "cat"), (Truncated(), 4, "svd")]
)
def test_sums_of_changes_are_peft_s(how, rank, key):
  spec, found = many.combined(peft_s(), (0.7, 0.3), how)
  pair = found["lin"]
  assert (spec.rank_of("lin"), spec.scale_of("lin")) == (rank, 1.0)
  assert pair["a"].shape == (16, rank)
  wanted = golden(f"multi/delta_{key}").T
  np.testing.assert_allclose(pair["a"] @ pair["b"], wanted, rtol=1e-4, atol=1e-5)


def alike():
  """Three adapters of one rank, whose scales differ."""
  keys = iter(jax.random.split(jax.random.key(2), 6))
  specs = [LoRA(rank=4, alpha=alpha) for alpha in (8.0, 2.0, 4.0)]
  return [
    (
      spec,
      {
        "lin": {
          "a": jax.random.normal(next(keys), (16, 4)),
          "b": jax.random.normal(next(keys), (4, 24)),
        }
      },
    )
    for spec in specs
  ]


@pytest.mark.parametrize("how", [Linear(), Ties(density=0.3)])
def test_sums_of_factors_are_the_formula_s(how):
  """The papers' steps, number by number."""
  weights = (0.7, -0.4, 0.5)
  _, found = many.combined(alike(), weights, how)
  for side in ("a", "b"):
    factors = [np.asarray(tree["lin"][side]) for _, tree in alike()]
    roots = [
      abs(w * spec.scale_of("lin")) ** 0.5 * (-1 if side == "a" and w < 0 else 1)
      for w, (spec, _) in zip(weights, alike(), strict=True)
    ]
    wanted = np.zeros_like(factors[0])
    if isinstance(how, Ties):
      kept = int(0.3 * wanted.size)
      factors = [
        np.where(np.abs(f) >= np.sort(np.abs(f).ravel())[-kept], f, 0) for f in factors
      ]
    for place in np.ndindex(wanted.shape):
      values = [factor[place] for factor in factors]
      told = list(zip(values, roots, strict=True))
      if isinstance(how, Ties):
        sign = 1 if sum(values) >= 0 else -1
        told = [(value, root) for value, root in told if value * sign > 0]
      total = sum(value * root for value, root in told)
      wanted[place] = total / (max(len(told), 1) if isinstance(how, Ties) else 1)
    np.testing.assert_allclose(found["lin"][side], wanted, rtol=1e-5, atol=1e-6)


def test_dare_drops_by_chance_and_keeps_the_mean():
  def made(density, key):
    how, weights = Dare(density=density), (0.5, 0.3, 0.2)
    return many.combined(alike(), weights, how, key=jax.random.key(key))[1]["lin"]

  linear = many.combined(alike(), (0.5, 0.3, 0.2), Linear())[1]["lin"]
  close = {"rtol": 1e-5, "atol": 1e-6}
  draws = [made(0.8, key) for key in range(60)]
  jax.tree.map(np.testing.assert_array_equal, draws[0], made(0.8, 0))
  for side, wanted in linear.items():
    each = jnp.stack([draw[side] for draw in draws])
    assert float(jnp.std(each, axis=0).min()) > 0
    # Of 60 draws the mean has a deviation of about 0.06 of a factor.
    assert float(jnp.abs(each.mean(axis=0) - wanted).mean()) < 0.1
    np.testing.assert_allclose(made(1.0, 0)[side], wanted, **close)
  alone, whole = (
    many.combined(alike()[:1], (0.5,), how, key=jax.random.key(0))[1]["lin"]["a"]
    for how in (Dare(density=0.8), Linear())
  )
  kept = alone != 0
  assert 0 < int(jnp.sum(~kept)) < alone.size / 2
  np.testing.assert_allclose(alone[kept], whole[kept] / 0.8, **close)


def test_what_is_combined_attaches():
  """Each layer on its own, ranks as the adapters' patterns have them."""
  model = decoder()
  base = base_of(model)
  one = LoRA(rank=2, targets=("mixer/q$", "mlp/up$"), ranks=(("/up$", 3),))
  two = LoRA(rank=3, targets=("mixer/q$", "mlp/up$"), alpha=5.0)
  adapters = [(spec, four(model, spec)[n]) for n, spec in enumerate((one, two))]
  spec, found = many.combined(adapters, (0.6, -0.8), Concatenated())
  assert spec.rank_of("layers/0/mixer/q") == 5
  assert spec.rank_of("prefix_0/mlp/up") == 6
  tuned = lora.tuning(spec, model)

  def whole(tuned, tree):
    return jax.jit(lambda base: merge(tuned.attach(base, tree, None)))(base)

  merged = whole(tuned, found)
  changed = [whole(lora.tuning(spec, model), tree) for spec, tree in adapters]
  for name, leaf in named_leaves(base).items():
    wanted = leaf + sum(
      w * (get(c, name) - leaf) for w, c in zip((0.6, -0.8), changed, strict=True)
    )
    np.testing.assert_allclose(get(merged, name), wanted, rtol=1e-4, atol=1e-5)
  for how in (Truncated(rank=5), Truncated()):
    spec, found = many.combined(adapters, (0.6, -0.8), how)
    axes = named_leaves(lora.tuning(spec, model).axes, lambda x: isinstance(x, tuple))
    assert axes.keys() == named_leaves(found).keys()
    for name in ("layers/0/mixer/q", "prefix_0/mlp/up"):
      assert get(found, f"{name}/a").shape[-1] == (how.rank or 3) == spec.rank_of(name)


def test_each_layer_draws_what_it_drops():
  model = decoder()
  adapters = [(SPEC, tree) for tree in four(model)[:2]]
  how, key = Dare(density=0.5), jax.random.key(0)
  _, found = many.combined(adapters, (1.0, 0.0), how, key=key)
  dropped = get(found, "layers/0/mixer/q/a") == 0
  assert float(jnp.mean(dropped[0] != dropped[1])) > 0.3


def test_a_stack_s_dims_are_split_as_the_matrix_s():
  layout = decoder(Mesh(fsdp=4, tensor=2), jax.devices()).layout
  leaf = Lora(
    jnp.zeros((16, 32)), jnp.zeros((4, 16, 2)), jnp.zeros((4, 2, 32)), ids=IDS
  )
  placed = _placed(layout, leaf, ("embed", "mlp"), 1)
  assert placed.a.sharding.spec == PartitionSpec(None, "fsdp", None)
  assert placed.b.sharding.spec == PartitionSpec(None, None, "tensor")


def refused(how, weights=(1.0, 1.0), adapters=None):
  return lambda: many.combined(adapters or peft_s(), weights, how)


def renamed():
  (one, tree), (two, other) = peft_s()
  return [(one, tree), (two, {"ff": other["lin"]})]


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: many.rows(LoRA(dora=True), decoder()), "adapters.dora: rows of a batch"),
    (lambda: many.rows(LoRA(start="pissa"), decoder()), "adapters.start: 'pissa'"),
    (lambda: many.stacked([]), "adapters: none to stack"),
    (
      lambda: many.stacked([{"x": jnp.ones(2)}, {"x": jnp.ones(3)}]),
      r"adapters\[1\]: x has the shape \(3,\), and of the first \(2,\)",
    ),
    (refused(Linear()), r"ranks of lin are \[4, 2\]; Linear takes adapters of one"),
    (refused(Ties(density=0.5)), "Ties takes adapters of one rank"),
    (refused(Dare(density=0.5)), "key: Dare draws"),
    (refused(Linear(), (1.0,)), "weights: 1 of them for 2 adapters"),
    (refused(Linear(), adapters=renamed()), r"adapters\[1\]: ff, lin is not in all"),
    (refused(Truncated(rank=17)), "how.rank: 17 is more than lin has, which is 16"),
    (refused(Concatenated(), (1.0,) * 10, peft_s() * 5), "more together than the 16"),
    (lambda: Ties(density=0.0), "how.density: 0.0 is not over 0"),
    (lambda: Dare(density=1.5), "how.density: 1.5 is not over 0"),
    (lambda: Truncated(rank=0), "how.rank: 0 is under 1"),
  ],
)
def test_refusals(make, told):
  with pytest.raises(InputError, match=told):
    make()
