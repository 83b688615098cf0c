import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.ops.weights import Blocked, Lora, Placed, Scaled, einsum, lookup
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules

VOCAB, DIM, SHAPE = 32, 16, (8, 12)
AXES = ("vocab", "embed")
ONE = Layout(make_mesh(Mesh(), jax.devices()[:1]))


def test_a_product_is_in_the_activation_s_dtype():
  x, weight = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
  assert einsum("BTD,DF->BTF", x, weight).dtype == jnp.bfloat16


def test_a_lookup_takes_rows_and_casts_them():
  table = jnp.arange(6.0).reshape(3, 2)
  found = lookup(Placed(ONE, AXES), table, jnp.array([[2, 0]]), "bfloat16")
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(found, np.float32), [[[4, 5], [0, 1]]])


LAYOUTS = {
  "one device": ONE,
  "fsdp": Layout(make_mesh(Mesh(fsdp=8))),
  "data, fsdp, tensor": Layout(make_mesh(Mesh(data=2, fsdp=2, tensor=2))),
  "context, tensor": Layout(make_mesh(Mesh(fsdp=1, context=2, tensor=4))),
  "rows over the axis of the batch": Layout(
    make_mesh(Mesh(fsdp=8)), ShardingRules(positions=("fsdp",), embed=())
  ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_device_s_sums_make_the_whole_gradient(name):
  layout = LAYOUTS[name]
  axes = ("positions", "embed") if name.startswith("rows") else AXES
  keys = jax.random.split(jax.random.key(0), 3)
  table_VD = jax.random.normal(keys[0], (VOCAB, DIM))
  ids_BT = jax.random.randint(keys[1], SHAPE, 0, VOCAB).at[0, :4].set(VOCAB - 1)
  weight_BTD = jax.random.normal(keys[2], (*SHAPE, DIM))

  def total(table_VD, ids_BT):
    x_BTD = lookup(Placed(layout, axes), table_VD, ids_BT, "float32")
    return jnp.sum(x_BTD * weight_BTD)

  placed = jax.device_put(table_VD, layout.sharding(*axes))
  found = jax.jit(jax.grad(total))(placed, ids_BT)
  expected = np.zeros((VOCAB, DIM), np.float32)
  np.add.at(expected, np.asarray(ids_BT), np.asarray(weight_BTD))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert found.dtype == table_VD.dtype


def test_a_narrow_table_s_gradient_is_summed_in_float32():
  table_VD = jnp.zeros((2, 1), jnp.bfloat16)
  ids_BT = jnp.ones((1, 1024), jnp.int32)

  def total(table_VD):
    return jnp.sum(lookup(Placed(ONE, AXES), table_VD, ids_BT, "bfloat16"))

  # A sum in bfloat16 stays at 256, where 1 is less than half a step.
  assert jax.grad(total)(table_VD).tolist() == [[0.0], [1024.0]]


def test_rows_that_the_mesh_does_not_divide_are_looked_up():
  """One token of a few rows, as decoding has them."""
  layout = LAYOUTS["fsdp"]
  table_VD = jnp.arange(float(VOCAB * DIM)).reshape(VOCAB, DIM)
  placed = jax.device_put(table_VD, layout.sharding(*AXES))
  ids_BT = jnp.array([[3], [0], [31]])
  found = jax.jit(lambda t: lookup(Placed(layout, AXES), t, ids_BT, "float32"))(placed)
  np.testing.assert_array_equal(found, table_VD[ids_BT])


@pytest.mark.parametrize(
  ("equation", "x", "weight", "inputs"),
  [
    ("BTD,DHK->BTHK", (1, 1, 24), (24, 8, 16), 1),
    ("BTHK,HKD->BTD", (1, 1, 4, 8), (4, 8, 64), 2),
    ("BTD,DHK->BTHK", (2, 3, 24), (24, 8, 16), 1),
    ("BTD,DV->BTV", (1, 2, 24), (24, 96), 1),
  ],
)
def test_a_matrix_in_blocks_is_the_same_matrix(equation, x, weight, inputs):
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x, weight))
  blocked = Blocked.of(weight, inputs)
  assert isinstance(blocked, Blocked)
  for dtype in (None, jnp.float32):
    found = jax.jit(lambda a, b, d=dtype: einsum(equation, a, b, result=d))(x, blocked)
    np.testing.assert_allclose(found, jnp.einsum(equation, x, weight), atol=1e-5)
  broken = Blocked(weight, blocked.blocks_NIL + 1)
  changed = jnp.abs(einsum(equation, x, broken) - found).max() > 1
  assert changed == (x.shape[:2] == (1, 1))


def test_what_is_not_put_in_blocks():
  assert not isinstance(Blocked.of(jnp.ones((4, 33)), 1), Blocked)
  assert not isinstance(Blocked.of(jnp.ones((4, 32), jnp.bfloat16), 1), Blocked)


def pairs(adapters=(), inputs=(6,), outputs=(4, 5)):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (*inputs, *outputs), (*adapters, *inputs, 3), (*adapters, 3, *outputs)
  return [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]


def test_rows_have_pairs_of_their_own():
  weight, a, b = pairs(adapters=(3,))
  ids, x_BTD = jnp.array([2, 0, 2, 1]), jax.random.normal(jax.random.key(1), (4, 7, 6))
  rows = Lora(weight, a, b, ids=ids, scale=0.5)
  found = einsum("BTD,DHK->BTHK", x_BTD, rows)
  for row, adapter in enumerate(ids.tolist()):
    own = Lora(weight, a[adapter], b[adapter], scale=0.5)
    wanted = einsum("BTD,DHK->BTHK", x_BTD[row][None], own)[0]
    np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-5)
  with pytest.raises(InputError, match=r"ids: \(4,\) of them for 3 rows"):
    einsum("BTD,DHK->BTHK", x_BTD[:3], rows)
  missing = Lora(weight, a, b, ids=jnp.array([0, 3, 0, 0]))
  wrong = jnp.isnan(einsum("BTD,DHK->BTHK", x_BTD, missing)).all(axis=(1, 2, 3))
  assert wrong.tolist() == [False, True, False, False]


def test_dropout_is_of_what_goes_into_a_alone():
  """With units for A and B and nothing for W, the product is what was let through."""
  unit, x_BD = jnp.eye(50), jax.random.normal(jax.random.key(1), (40, 50)) + 9.0
  key = jax.random.key(2)
  dropping = Lora(jnp.zeros((50, 50)), unit, unit, key=key, rate=0.3)
  found = einsum("BD,DF->BF", x_BD, dropping)
  dropped = found == 0
  assert 0.26 < float(jnp.mean(dropped)) < 0.34
  np.testing.assert_allclose(found[~dropped], x_BD[~dropped] / 0.7, rtol=1e-5)
  beside = Lora(unit, unit, unit, key=key, rate=0.3)
  total = einsum("BD,DF->BF", x_BD, beside)
  np.testing.assert_allclose(total, x_BD + found, rtol=1e-5)
  gradient = jax.grad(lambda x: jnp.sum(einsum("BD,DF->BF", x, dropping)))(x_BD)
  np.testing.assert_allclose(gradient, jnp.where(dropped, 0, 1 / 0.7), rtol=1e-5)


@pytest.mark.parametrize(
  ("equation", "x", "inputs", "outputs"),
  [
    ("BTD,DHK->BTHK", (2, 3, 6), (6,), (4, 5)),
    ("BTHK,HKD->BTD", (2, 3, 4, 5), (4, 5), (6,)),
  ],
)
def test_a_scaled_matrix_is_the_product_of_all(equation, x, inputs, outputs):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = x, (*inputs, *outputs), inputs, outputs
  x, weight, ins, outs = (
    jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)
  )
  expand = tuple(range(len(inputs))), tuple(range(len(inputs), weight.ndim))

  def plain(x, weight, ins, outs):
    both = jnp.expand_dims(ins, expand[1]) * jnp.expand_dims(outs, expand[0])
    return jnp.einsum(equation, x, weight * both)

  def ours(x, weight, ins, outs):
    return einsum(equation, x, Scaled(weight, ins, outs))

  operands = x, weight, ins, outs
  np.testing.assert_allclose(ours(*operands), plain(*operands), rtol=1e-4, atol=1e-5)
  merged = Scaled(weight, ins, outs).merged()
  found = jnp.einsum(equation, x, merged)
  np.testing.assert_allclose(found, plain(*operands), rtol=1e-4, atol=1e-5)
  grads, wanted = (
    jax.grad(lambda *all_of, f=f: jnp.sum(jnp.sin(f(*all_of))), argnums=(0, 1, 2, 3))(
      *operands
    )
    for f in (ours, plain)
  )
  for one, other in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_factor_near_one_counts_in_bfloat16():
  """1.003 is 1 in that dtype; of 200 times that it makes 201, not 200."""
  weight = Scaled(jnp.full((1, 1), 200.0), outputs=jnp.full((1,), 1.003))
  x = jnp.ones((4096, 1), jnp.bfloat16)
  assert float(einsum("BD,DF->BF", x, weight)[0, 0]) == 201.0

  def total(outputs):
    return jnp.sum(einsum("BD,DF->BF", x, Scaled(jnp.ones((1, 1)), outputs=outputs)))

  # A sum in bfloat16 stays at 256.
  assert jax.grad(total)(jnp.ones(1)).tolist() == [4096.0]
