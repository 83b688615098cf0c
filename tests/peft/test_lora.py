"""LoRA and its kin against PEFT. What all methods share is in test_methods.py."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits, unbox
from jaxlm.models.decoder import init as init_decoder
from jaxlm.models.parameters import Matrix
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.ops.weights import Lora, einsum
from jaxlm.peft import lora
from jaxlm.peft.lora import LoRA
from jaxlm.peft.targets import Targets, get, merge, targets_of
from jaxlm.quantization.formats import NF4, Int8, quantize
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.trees import map_named, named_leaves

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
LIN = Targets({"lin": Matrix(("embed", "mlp"), 1)}, {"lin": (16, 24)})


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
    scale=CASES[case].scale_of("lin"),
  )


def forward(weight, ff=None, bias=None):
  """PEFT's small model, with other weights in place of its own."""
  ff = golden("in/ff.weight").T if ff is None else ff
  bias = golden("in/lin.bias") if bias is None else bias
  inner = einsum("BD,DF->BF", golden("in/x"), weight) + bias[None]
  y = einsum("BF,FD->BD", jax.nn.relu(inner), ff)
  return y + golden("in/ff.bias")[None]


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


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_matrix_itself_is_peft_s(start):
  spec, case = LoRA(rank=4, alpha=8.0, start=start), f"init_{start}"
  base = {"lin": golden("in/lin.weight").T}
  found = lora._init(spec, LIN, base, jax.random.key(0))["lin"]
  frozen = lora._prepared(spec, LIN, base)["lin"]
  a, b = golden(f"{case}/A").T, golden(f"{case}/B").T
  signs = jnp.sign(jnp.sum(found["a"] * a, axis=0))
  close = {"rtol": 1e-4, "atol": 1e-5}
  np.testing.assert_allclose(found["a"] * signs[None], a, **close)
  np.testing.assert_allclose(found["b"] * signs[:, None], b, **close)
  np.testing.assert_allclose((found["a"] @ found["b"]).T, golden(f"{case}/BA"), **close)
  np.testing.assert_allclose(frozen.T, golden(f"{case}/residual_weight"), **close)
  y = forward(Lora(frozen, found["a"], found["b"], scale=spec.scale_of("lin")))
  np.testing.assert_allclose(y, golden(f"{case}/y"), **close)


def decoder(mesh=ONE, devices=None):
  layout = Layout(make_mesh(mesh, devices or jax.devices()[:1]))
  return Decoder(MODEL, Precision(), layout)


@functools.cache
def base_of(model):
  """First parameters, but for biases, which start at zero."""
  params = jax.jit(lambda key: unbox(init_decoder(model, key)))(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(7), (2, 4, 8))

  def biased(name, leaf):
    shape = leaf.shape if name.startswith("layers") else (1, *leaf.shape)
    if not name.endswith("_bias"):
      return leaf
    return leaf + noise[: shape[0], : shape[1], : shape[2]].reshape(leaf.shape)

  return map_named(biased, params)


def tokens(rows=8):
  return jax.random.randint(jax.random.key(3), (rows, 12), 0, MODEL.vocab)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params):
  x_BTD, _ = model.apply({"params": params}, tokens())
  return logits(MODEL, params, x_BTD)


def moved(adapters):
  """Adapters after some training: no array is zero."""
  keys = iter(jax.random.split(jax.random.key(5), 99))

  def move(a):
    return a + 0.05 * jax.random.normal(next(keys), a.shape)

  return jax.tree.map(move, adapters)


def moved_first(tuned, base):
  return jax.jit(lambda base: moved(tuned.init(base, jax.random.key(1))))(base)


@pytest.mark.parametrize("spec", [NF4(block=8), NF4(block=8, double=False), Int8()])
def test_adapters_over_a_quantized_base(spec):
  """The one einsum reads both; gradients are those over the base as it was rounded."""
  model = decoder()
  few_matrices = ("mixer/[qo]$", "mlp/down$")  # each way to be multiplied once
  base = base_of(model)
  tuned = lora.tuning(LoRA(rank=2, targets=few_matrices), model)
  targets = targets_of(few_matrices, model)
  adapters = moved_first(tuned, base)

  @jax.jit
  def quantized(base):
    rounded, few = dict(base), dict(base)
    for name, matrix in targets.matrices.items():
      leaf = quantize(
        spec, get(base, name), inputs=matrix.inputs, stacked=targets.stacked(name)
      )
      few = replaced(few, name, leaf)
      rounded = replaced(rounded, name, leaf.whole())
    return few, rounded

  few, rounded = quantized(base)

  def loss(adapters, base):
    params = tuned.attach(base, adapters, None)
    x_BTD, _ = model.apply({"params": params}, tokens())
    return jnp.mean(jnp.square(logits(MODEL, params, x_BTD)))

  gradient = jax.jit(jax.value_and_grad(loss))
  found, wanted = (gradient(adapters, b) for b in (few, rounded))
  assert float(jnp.abs(gradient(adapters, base)[0] - wanted[0])) > 0
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
  whole = jax.jit(lambda base: merge(tuned.attach(base, adapters, None)))
  jax.tree.map(np.testing.assert_array_equal, whole(few), whole(rounded))


def replaced(tree, name, value):
  """A copy of nested dicts with another value at a name."""
  first, _, rest = name.partition("/")
  return tree | {first: replaced(tree[first], rest, value) if rest else value}


def test_patterns_choose_rank_and_alpha():
  spec = LoRA(
    rank=2, alpha=4.0, ranks=(("mixer/q$", 3), ("mixer", 5)), alphas=(("/up$", 9.0),)
  )
  model = decoder()
  tuned = lora.tuning(spec, model)
  base = base_of(model)
  adapters = jax.jit(tuned.init)(base, jax.random.key(0))
  ranks = {
    name: get(adapters, f"layers/0/{name}/a").shape[-1]
    for name in ("mixer/q", "mixer/o", "mlp/up")
  }
  assert ranks == {"mixer/q": 3, "mixer/o": 5, "mlp/up": 2}
  params = tuned.attach(base, adapters, None)
  scales = {n: get(params, f"layers/0/{n}").scale for n in ("mixer/q", "mlp/up")}
  assert scales == {"mixer/q": 4 / 3, "mlp/up": 4.5}
  assert dataclasses.replace(spec, rslora=True).scale_of("mixer/q") == 4 / 3**0.5


def test_each_layer_and_matrix_draws_its_own_dropout():
  model = decoder()
  base = base_of(model)
  tuned = lora.tuning(LoRA(rank=2, dropout=0.4), model)
  adapters = moved_first(tuned, base)
  params = tuned.attach(base, adapters, jax.random.key(2))
  names = targets_of(("all-linear",), model).matrices
  keys = [jax.random.key_data(get(params, name).key).reshape(-1, 2) for name in names]
  keys = np.concatenate(keys)
  assert len(keys) == len(np.unique(keys, axis=0)) == 3 * 7
  plain = outputs(model, tuned.attach(base, adapters, None))
  found = outputs(model, params)
  assert float(jnp.abs(found - plain).max()) > 0.05
  none = lora.tuning(LoRA(rank=2), model)
  same = outputs(model, none.attach(base, adapters, jax.random.key(2)))
  np.testing.assert_array_equal(same, plain)


def test_axes_are_those_of_the_matrices():
  axes = named_leaves(
    lora.tuning(LoRA(rank=2, dora=True), decoder()).axes,
    lambda leaf: isinstance(leaf, tuple),
  )
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
    ({"start": "x"}, "adapters.start: 'x' is none of zero, pissa, olora"),
    ({"dropout": 1.0}, "adapters.dropout: 1.0 is not from 0 to under 1"),
    ({"ranks": (("q", 0),)}, "adapters.ranks: 0 is under 1"),
    ({"alphas": (("q", -1.0),)}, "adapters.alphas: -1.0 is not a positive"),
  ):
    with pytest.raises(InputError, match=told):
      dataclasses.replace(LoRA(), **fields)
  for fields, told in (
    ({"ranks": (("mixer/w", 2),)}, "adapters.ranks: 'mixer/w' finds nothing among"),
    ({"alphas": (("(", 2.0),)}, r"adapters.alphas: '\(' is no regex"),
    ({"ranks": (("/up$", 17),)}, r"adapters.rank: 17 is larger than .*/up has"),
  ):
    with pytest.raises(InputError, match=told):
      lora.tuning(LoRA(**fields), decoder())
