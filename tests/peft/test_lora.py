"""LoRA, rsLoRA and DoRA against PEFT, and inside a decoder on every mesh."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits, unbox
from jaxlm.models.decoder import init as init_decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.ops.weights import Lora, einsum
from jaxlm.peft import lora
from jaxlm.peft.lora import LoRA
from jaxlm.peft.targets import get, merge, targets_of
from jaxlm.quantization.formats import NF4, Int8, quantize
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.trees import named_leaves

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / "goldens/peft.npz")
CASES = {
  "lora_r4_a8": LoRA(rank=4, alpha=8.0),
  "rslora_r4_a8": LoRA(rank=4, alpha=8.0, rslora=True),
  "dora_r4_a8": LoRA(rank=4, alpha=8.0, dora=True),
}
BLOCK = Block(
  mixer=GQA(heads=4, kv_heads=2, head_dim=8, bias="qkv"), mlp=GLU(hidden=32)
)
MODEL = LM(vocab=40, dim=16, pattern=(BLOCK,), repeats=2, prefix=(BLOCK,))
ONE = Mesh()


def golden(name):
  return jnp.asarray(GOLDENS[f"peft/{name}"])


def leaf(case) -> Lora:
  """PEFT keeps (out, in); here inputs come first."""
  params = f"{case}/param/lin."
  magnitude = None
  if "dora" in case:
    magnitude = golden(f"{params}lora_magnitude_vector.default.weight")
  return Lora(
    golden("in/lin.weight").T,
    golden(f"{params}lora_A.default.weight").T,
    golden(f"{params}lora_B.default.weight").T,
    magnitude,
    scale=CASES[case].scale,
  )


def forward(weight: Lora):
  inner = einsum("BD,DF->BF", golden("in/x"), weight) + golden("in/lin.bias")[None]
  return (
    einsum("BF,FD->BD", jax.nn.relu(inner), golden("in/ff.weight").T)
    + (golden("in/ff.bias")[None])
  )


@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_merged_matrix_are_peft_s(case):
  weight = leaf(case)
  assert weight.scale == pytest.approx(float(GOLDENS[f"peft/{case}/scaling"]))
  close = {"rtol": 2e-4, "atol": 2e-5}
  np.testing.assert_allclose(forward(weight), golden(f"{case}/y"), **close)
  merged = weight.merged()
  np.testing.assert_allclose(merged.T, golden(f"{case}/merged_lin_weight"), **close)
  np.testing.assert_allclose(forward(merged), golden(f"{case}/merged_y"), **close)
  grads = jax.grad(lambda w: jnp.sum(jnp.square(forward(w))))(weight)
  names = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
  if weight.magnitude is not None:
    names["magnitude"] = "lora_magnitude_vector.default.weight"
  for ours, theirs in names.items():
    wanted = golden(f"{case}/grad/lin.{theirs}")
    found = getattr(grads, ours)
    np.testing.assert_allclose(found.T, wanted, rtol=2e-4, atol=1e-4, err_msg=ours)


def decoder(mesh=ONE, devices=None):
  layout = Layout(make_mesh(mesh, devices or jax.devices()[:1]))
  return Decoder(MODEL, Precision(), layout)


def base_of(model):
  return unbox(init_decoder(model, jax.random.key(0)))


def tokens(rows=8):
  return jax.random.randint(jax.random.key(3), (rows, 12), 0, MODEL.vocab)


def outputs(model, params):
  def run(params, ids_BT):
    x_BTD, _ = model.apply({"params": params}, ids_BT)
    return logits(MODEL, params, x_BTD)

  return jax.jit(run)(params, tokens())


def moved(adapters):
  """Adapters after some training: no array is zero."""
  keys = iter(jax.random.split(jax.random.key(5), 99))

  def move(a):
    return a + 0.05 * jax.random.normal(next(keys), a.shape)

  return jax.tree.map(move, adapters)


def test_a_new_adapter_changes_no_bit():
  model = decoder()
  base, tuned = base_of(model), lora.tuning(LoRA(rank=2), model)
  adapters = tuned.init(base, jax.random.key(1))
  params = tuned.attach(base, adapters, None)
  assert len(jax.tree.leaves(adapters)) == 2 * 7 * 2
  np.testing.assert_array_equal(outputs(model, params), outputs(model, base))


@pytest.mark.parametrize("dora", [False, True])
def test_merged_parameters_write_the_same(dora):
  model = decoder()
  spec = LoRA(rank=3, dora=dora, targets=("attention", "mlp/up$"))
  base, tuned = base_of(model), lora.tuning(spec, model)
  adapters = moved(tuned.init(base, jax.random.key(1)))
  params = tuned.attach(base, adapters, None)
  kept = jax.tree.map(np.asarray, base)
  merged = merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  wanted = outputs(model, params)
  assert float(jnp.abs(wanted - outputs(model, base)).max()) > 0.05
  np.testing.assert_allclose(outputs(model, merged), wanted, rtol=2e-4, atol=2e-5)
  jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, base))


@pytest.mark.parametrize(
  ("mesh", "dora"),
  [(Mesh(fsdp=4, tensor=2), False), (Mesh(data=2, fsdp=2, tensor=2), True)],
  ids=("lora", "dora"),
)
def test_a_mesh_changes_neither_loss_nor_gradient(mesh, dora):
  spec = LoRA(rank=4, dora=dora)

  def found(model):
    everywhere = model.layout.sharding()
    base = jax.device_put(base_of(decoder()), everywhere)
    tuned = lora.tuning(spec, model)
    adapters = moved(tuned.init(base, jax.random.key(1)))
    ids = jax.device_put(tokens(), model.layout.sharding("batch", "sequence"))

    def loss(adapters):
      params = tuned.attach(base, adapters, None)
      x_BTD, _ = model.apply({"params": params}, ids)
      return jnp.mean(jnp.square(logits(MODEL, params, x_BTD)))

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(adapters))

  value, grads = found(decoder(mesh, jax.devices()))
  wanted, theirs = found(decoder())
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  theirs = named_leaves(theirs)
  for leaf_name, grad in named_leaves(grads).items():
    scale = float(np.abs(theirs[leaf_name]).max())
    assert scale > 0
    np.testing.assert_allclose(
      grad, theirs[leaf_name], rtol=1e-4, atol=1e-5 * scale, err_msg=leaf_name
    )


@pytest.mark.parametrize("spec", [NF4(block=8), NF4(block=8, double=False), Int8()])
def test_adapters_over_a_quantized_base(spec):
  """The one einsum reads both; gradients are those over the base as it was rounded."""
  model = decoder()
  base, tuned = base_of(model), lora.tuning(LoRA(rank=2), model)
  targets = targets_of(("all-linear",), model)
  adapters = moved(tuned.init(base, jax.random.key(1)))
  rounded, few = dict(base), dict(base)
  for name, matrix in targets.matrices.items():
    leaf = quantize(
      spec, get(base, name), inputs=matrix.inputs, stacked=targets.stacked(name)
    )
    few = replaced(few, name, leaf)
    rounded = replaced(rounded, name, leaf.whole())

  def loss(adapters, base):
    params = tuned.attach(base, adapters, None)
    x_BTD, _ = model.apply({"params": params}, tokens())
    return jnp.mean(jnp.square(logits(MODEL, params, x_BTD)))

  gradient = jax.jit(jax.value_and_grad(loss))
  found, wanted = (gradient(adapters, b) for b in (few, rounded))
  assert float(jnp.abs(gradient(adapters, base)[0] - wanted[0])) > 0
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
  merged = merge(tuned.attach(few, adapters, None))
  plain = merge(tuned.attach(rounded, adapters, None))
  jax.tree.map(np.testing.assert_array_equal, merged, plain)


def replaced(tree, name, value):
  """A copy of nested dicts with another value at a name."""
  first, _, rest = name.partition("/")
  return tree | {first: replaced(tree[first], rest, value) if rest else value}


def test_adapters_are_sharded_as_their_matrices():
  tuned = lora.tuning(LoRA(rank=2, dora=True), decoder())
  base = base_of(decoder())
  adapters = named_leaves(tuned.init(base, jax.random.key(0)))
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  axes = named_leaves(tuned.axes, is_axes)
  assert axes.keys() == adapters.keys()
  for name, leaf in adapters.items():
    assert len(axes[name]) == leaf.ndim, name
  assert axes["layers/0/mixer/o/a"] == ("layers", "heads", "head_dim", None)
  assert axes["layers/0/mixer/o/b"] == ("layers", None, "embed")
  assert axes["prefix_0/mlp/up/magnitude"] == ("mlp",)


def test_refusals():
  with pytest.raises(
    InputError, match=r"adapters.rank: 17 is larger than .* 16 x 16; at most 16"
  ):
    lora.tuning(LoRA(rank=17), decoder())
  with pytest.raises(InputError, match=r"adapters.targets: 'mixer/w' finds nothing"):
    lora.tuning(LoRA(targets=("mixer/w",)), decoder())
  for fields, told in (
    ({"rank": 0}, "adapters.rank: 0 is under 1"),
    ({"alpha": 0.0}, "adapters.alpha: 0.0 is not a positive"),
    ({"first": "x"}, "adapters.first: 'x' is not uniform or normal"),
  ):
    with pytest.raises(InputError, match=told):
      dataclasses.replace(LoRA(), **fields)
