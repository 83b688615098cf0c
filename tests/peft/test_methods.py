"""What every method that changes matrices keeps to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.decoder import logits
from jaxlm.peft import base as bases
from jaxlm.peft import methods
from jaxlm.peft.bottleneck import Bottleneck
from jaxlm.peft.ia3 import IA3
from jaxlm.peft.lora import LoRA
from jaxlm.peft.part import Part
from jaxlm.peft.products import LoHa, VeRA
from jaxlm.peft.soft_prompt import Prefix, Prompt, PTuning
from jaxlm.peft.targets import merge
from jaxlm.sharding.mesh import Mesh
from jaxlm.trees import named_leaves
from peft.test_lora import MODEL, base_of, decoder, moved, moved_first, outputs, tokens

FEW = ("mixer/[qo]$", "mlp/down$")
SPECS = {
  "lora": LoRA(rank=2, first="normal"),
  "patterns and dropout": LoRA(
    rank=4,
    ranks=((r"\d/mixer/q$", 2),),
    alphas=(("/down$", 3.0),),
    dropout=0.3,
    targets=FEW,
  ),
  "dora": LoRA(rank=3, dora=True, targets=FEW),
  "pissa": LoRA(rank=4, start="pissa", targets=FEW),
  "olora": LoRA(rank=2, start="olora", dora=True, targets=("mlp/down$",)),
  "ia3": IA3(inputs=("mlp/down$", "mixer/[ko]$")),
  "vera": VeRA(rank=32, targets=FEW),
  "loha": LoHa(rank=2, targets=FEW),
  "part": Part(train=("mlp", "norms-and-biases")),
}
ROUNDED = ("dora", "pissa", "olora")
"""They divide by a length, or take away what they add again."""
ELSEWHERE = {Prefix, Prompt, PTuning, Bottleneck}
"""They change no matrix; their own tests say what they keep to."""


def test_every_method_is_tried():
  assert {type(spec) for spec in SPECS.values()} | ELSEWHERE == set(methods.METHODS)


@pytest.mark.parametrize("case", SPECS)
def test_it_starts_unchanged_and_merges_into_what_it_computes(case):
  model, spec = decoder(), SPECS[case]
  base = base_of(model)
  kept = jax.tree.map(np.asarray, base)
  tuned = methods.build(spec, (), model)

  @jax.jit
  def started(base):
    frozen = base if tuned.prepare is None else tuned.prepare(base)
    adapters = tuned.init(base, jax.random.key(1))
    first, later = (
      tuned.attach(frozen, trained, None) for trained in (adapters, moved(adapters))
    )
    return frozen, first, later, merge(later)

  frozen, first, params, merged = started(base)
  plain, found = (outputs(model, params) for params in (base, first))
  if case in ROUNDED:
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
  else:
    np.testing.assert_array_equal(found, plain)
  if tuned.prepare is not None:
    assert float(jnp.abs(outputs(model, frozen) - plain).max()) > 0.05
  wanted = outputs(model, params)
  assert float(jnp.abs(wanted - plain).max()) > 0.01
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  np.testing.assert_allclose(outputs(model, merged), wanted, rtol=2e-4, atol=2e-5)
  jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, base))


@pytest.mark.parametrize("case", SPECS)
def test_every_array_has_axes(case):
  tuned = methods.build(SPECS[case], (), decoder())
  shapes = jax.eval_shape(lambda: tuned.init(base_of(decoder()), jax.random.key(0)))
  axes = named_leaves(tuned.axes, lambda leaf: isinstance(leaf, tuple))
  leaves = named_leaves(shapes)
  assert axes.keys() == leaves.keys()
  for name, leaf in leaves.items():
    assert len(axes[name]) == leaf.ndim, name
    assert (axes[name][:1] == ("layers",)) == name.startswith("layers/")
    assert leaf.dtype == jnp.float32


SAME = ("lora", "olora", "part")
"""They run what another case or no new code runs."""
MESHES = {"dora": Mesh(data=2, fsdp=2, tensor=2)}


@pytest.mark.parametrize("case", [case for case in SPECS if case not in SAME])
def test_a_mesh_changes_neither_loss_nor_gradient(case):
  plain = base_of(decoder())
  drawn = moved_first(methods.build(SPECS[case], (), decoder()), plain)

  def found(model):
    whole = bases.base_of(SPECS[case], (), None, model)
    tuned = whole.tuning
    placed = jax.tree.map(lambda leaf: leaf.sharding, (whole.shapes, whole.trained))
    base, adapters = jax.device_put((plain, drawn), placed)
    ids = jax.device_put(tokens(), model.layout.sharding("batch", "sequence"))

    def loss(adapters):
      frozen = base if tuned.prepare is None else tuned.prepare(base)
      params = tuned.attach(frozen, adapters, jax.random.key(9))
      x_BTD, _ = model.apply({"params": params}, ids)
      return jnp.mean(jnp.square(logits(MODEL, params, x_BTD)))

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(adapters))

  mesh = MESHES.get(case, Mesh(fsdp=4, tensor=2))
  value, grads = found(decoder(mesh, jax.devices()))
  wanted, theirs = found(decoder())
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  theirs = named_leaves(theirs)
  for name, grad in named_leaves(grads).items():
    scale = float(np.abs(theirs[name]).max())
    assert scale > 0
    np.testing.assert_allclose(
      grad, theirs[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name
    )
