"""IA3 against PEFT, and what it does to biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.ops.quantized import Quantized
from jaxlm.ops.weights import Scaled
from jaxlm.peft import ia3
from jaxlm.peft.ia3 import IA3
from jaxlm.peft.targets import merge
from jaxlm.quantization.formats import Int8, quantize
from jaxlm.trees import named_leaves
from peft.test_lora import base_of, decoder, forward, golden, moved


def test_value_and_merged_matrices_are_peft_s():
  outputs = golden("ia3/param/lin.ia3_l.default").reshape(-1)
  inputs = golden("ia3/param/ff.ia3_l.default").reshape(-1)
  base = {name: golden(f"in/{name}.weight").T for name in ("lin", "ff")}
  base["lin_bias"] = golden("in/lin.bias")
  factors = {"lin": {"outputs": outputs}, "ff": {"inputs": inputs}}
  params = ia3._attached(("lin", "ff"), base, factors)
  lin, ff, bias = (params[name] for name in ("lin", "ff", "lin_bias"))
  for found, wanted in (
    (forward(lin, ff, bias), "y"),
    (lin.merged().T, "merged_lin_weight"),
    (ff.merged().T, "merged_ff_weight"),
    (bias, "merged_lin_bias"),
  ):
    np.testing.assert_allclose(
      found, golden(f"ia3/{wanted}"), rtol=1e-5, atol=1e-6, err_msg=wanted
    )


def test_gradients_are_peft_s():
  """By experiments/goldens/peft_gradients.py."""
  base = {name: golden(f"in/{name}.weight").T for name in ("lin", "ff")}
  base["lin_bias"] = golden("in/lin.bias")

  def loss(outputs, inputs):
    factors = {"lin": {"outputs": outputs}, "ff": {"inputs": inputs}}
    params = ia3._attached(("lin", "ff"), base, factors)
    y = forward(params["lin"], params["ff"], params["lin_bias"])
    return jnp.sum(jnp.square(y))

  names = ("lin.ia3_l.default", "ff.ia3_l.default")
  given = [golden(f"ia3/param/{name}").reshape(-1) for name in names]
  for name, found in zip(names, jax.grad(loss, (0, 1))(*given), strict=True):
    wanted = golden(f"ia3/grad/{name}").reshape(-1)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-4, err_msg=name)


def test_defaults_are_keys_values_and_what_comes_down():
  """A bias is multiplied as the outputs are; that of queries is not."""
  model = decoder()
  base = base_of(model)
  tuned = ia3.tuning(IA3(), model)
  factors = moved(tuned.init(base, jax.random.key(0)))
  names = {"mixer/k/outputs", "mixer/v/outputs", "mlp/down/inputs"}
  rooms = ("prefix_0/", "layers/0/")
  assert named_leaves(factors).keys() == {
    room + name for room in rooms for name in names
  }
  found = named_leaves(merge(tuned.attach(base, factors, None)))
  plain, factors = named_leaves(base), named_leaves(factors)
  for room in rooms:
    factor = factors[f"{room}mixer/v/outputs"]
    for name, times in (
      ("mixer/v_bias", factor), ("mixer/q_bias", jnp.ones(())),
      ("mixer/v", jnp.expand_dims(factor, -3)),
      ("mlp/down", factors[f"{room}mlp/down/inputs"][..., None]),
    ):  # fmt: skip
      wanted = np.asarray(plain[room + name]) * np.asarray(times)
      np.testing.assert_allclose(found[room + name], wanted, rtol=1e-6, err_msg=name)


def test_over_a_quantized_base():
  weight = golden("in/lin.weight").T
  base = quantize(Int8(), weight, inputs=1, stacked=0)
  assert isinstance(base, Quantized)
  outputs, inputs = jnp.linspace(0.5, 1.5, 24), jnp.linspace(2.0, 1.0, 16)
  found = forward(Scaled(base, inputs, outputs))
  wanted = forward(inputs[:, None] * base.whole() * outputs[None])
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    forward(merged_of(base, inputs, outputs)), wanted, rtol=1e-5
  )


def merged_of(base, inputs, outputs):
  return merge({"lin": Scaled(base, inputs, outputs)})["lin"]


def test_refusals():
  with pytest.raises(InputError, match=r"adapters.targets: nothing is chosen"):
    IA3(targets=(), inputs=())
  with pytest.raises(InputError, match=r"adapters.inputs: 'zz' finds nothing"):
    ia3.tuning(IA3(inputs=("zz",)), decoder())
  assert len(jax.tree.leaves(ia3.tuning(IA3(inputs=()), decoder()).init({}, None))) == 4
  assert (
    len(jax.tree.leaves(ia3.tuning(IA3(targets=()), decoder()).init({}, None))) == 2
  )
