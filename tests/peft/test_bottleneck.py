"""Bottlenecks against a few lines of numpy, at their start, and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder, logits, unbox
from jaxlm.models.mlp import FeedForward
from jaxlm.models.norms import Norm
from jaxlm.models.spec import GLU, GQA, LM, MLP, Block, Precision
from jaxlm.peft import bottleneck, methods
from jaxlm.peft.bottleneck import Bottleneck
from jaxlm.peft.targets import merge
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.trees import named_leaves

MIXER = GQA(heads=4, kv_heads=2, head_dim=8)
BLOCK = Block(mixer=MIXER, mlp=GLU(hidden=32))
MODEL = LM(
  vocab=40,
  dim=16,
  pattern=(BLOCK, Block(mixer=MIXER, mlp=MLP(hidden=24), placement="sandwich")),
  repeats=2,
  prefix=(Block(mixer=MIXER, mlp=None),),
)
SPECS = {
  "serial": Bottleneck(size=3, scale=1.5),
  "parallel": Bottleneck(size=3, where="parallel", scale=4.0),
}


def decoder(mesh=None, model=MODEL):
  devices = jax.devices() if mesh is not None else jax.devices()[:1]
  return Decoder(model, Precision(), Layout(make_mesh(mesh or Mesh(), devices)))


@functools.cache
def base():
  made = decoder()
  return jax.jit(lambda key: unbox(decoders.init(made, key)))(jax.random.key(0))


def moved(tree):
  """Arrays after some training: none is zero."""
  keys = iter(jax.random.split(jax.random.key(5), 99))
  move = lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape)  # noqa: E731
  return jax.tree.map(move, tree)


def tokens():
  return jax.random.randint(jax.random.key(3), (8, 12), 0, MODEL.vocab)


@functools.cache
def first(spec):
  """What trains, at its start and after some training."""
  init = bottleneck.tuning(spec, decoder()).init

  def both(base):
    trained = init(base, jax.random.key(1))
    return trained, moved(trained)

  return jax.jit(both)(base())


@pytest.mark.parametrize("name", SPECS)
def test_a_new_one_changes_no_bit(name):
  made = decoder()
  tuned = methods.build(SPECS[name], (), made)

  @jax.jit
  def run(params):
    return logits(MODEL, params, made.apply({"params": params}, tokens())[0])

  trained, later = first(SPECS[name])
  params = tuned.attach(base(), trained, None)
  np.testing.assert_array_equal(run(params), run(base()))
  away = tuned.attach(base(), later, None)
  assert float(jnp.abs(run(away) - run(base())).max()) > 0.1
  jax.tree.map(np.testing.assert_array_equal, merge(away), away)


@pytest.mark.parametrize("name", SPECS)
def test_the_formula(name):
  """One block by hand: the mixer silenced, so that the MLP alone is to be followed."""
  spec, made = SPECS[name], decoder()
  tuned = bottleneck.tuning(spec, made)
  later = first(spec)[1]
  given = tuned.attach(base(), later, None)["layers"]["0"]
  params = jax.tree.map(lambda a: a[1], given)
  x_BTD = jax.random.normal(jax.random.key(9), (2, 5, 16))
  positions_BT = jnp.tile(jnp.arange(5)[None], (2, 1))
  module = decoders.Block(BLOCK, Precision(), made.layout, 5)
  block = jax.jit(
    lambda p: module.apply({"params": p}, x_BTD, None, positions_BT, None)
  )
  found, _ = block(params)

  def change(place, x):
    raw = later["layers"]["0"][place]
    w = {n: np.asarray(a[1], np.float64) for n, a in raw.items()}
    h = np.maximum(np.asarray(x, np.float64) @ w["down"] + w["down_bias"], 0)
    return spec.scale * (h @ w["up"] + w["up_bias"])

  def norm(place, x):
    own = {"params": params[f"{place}_pre_norm"]}
    return Norm(BLOCK.norm, Precision()).apply(own, x)

  plain = {n: a for n, a in params.items() if "adapter" not in n and "beside" not in n}
  quiet = plain | {"mlp": jax.tree.map(jnp.zeros_like, plain["mlp"])}
  mixed, _ = block(quiet)
  out = np.asarray(mixed - x_BTD)  # of the mixer
  if name == "serial":
    out = out + change("mixer_adapter", out)
  stream = np.asarray(x_BTD) + out
  read = norm("mlp", jnp.asarray(stream, jnp.float32))
  ff = FeedForward(BLOCK.mlp, Precision(), made.layout, 5)
  y = np.asarray(ff.apply({"params": params["mlp"]}, read))
  y = y + (change("mlp_adapter", y) if name == "serial" else change("mlp_beside", read))
  np.testing.assert_allclose(found, stream + y, rtol=1e-5, atol=2e-5)


def found(made, spec):
  tuned = bottleneck.tuning(spec, made)
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  placed = jax.tree.map(
    lambda axes: made.layout.sharding(*axes), tuned.axes, is_leaf=is_axes
  )
  trained = jax.device_put(first(spec)[1], placed)
  frozen = jax.device_put(base(), made.layout.sharding())
  ids = jax.device_put(tokens(), made.layout.sharding("batch", "sequence"))

  def loss(trained, frozen):
    params = tuned.attach(frozen, trained, None)
    x_BTD, _ = made.apply({"params": params}, ids)
    return jnp.mean(jnp.square(logits(MODEL, params, x_BTD)))

  return jax.device_get(jax.jit(jax.value_and_grad(loss))(trained, frozen))


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("serial", Mesh(fsdp=4, tensor=2)),
    ("parallel", Mesh(fsdp=2, context=2, tensor=2)),
  ],
)
def test_a_mesh_changes_neither_loss_nor_gradient(name, mesh):
  value, grads = found(decoder(mesh), SPECS[name])
  wanted, theirs = found(decoder(), SPECS[name])
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  theirs = named_leaves(theirs)
  for leaf, grad in named_leaves(grads).items():
    scale = float(np.abs(theirs[leaf]).max())
    assert scale > 0, leaf
    np.testing.assert_allclose(
      grad, theirs[leaf], rtol=1e-4, atol=1e-5 * scale, err_msg=leaf
    )


def test_where_they_stand_and_their_axes():
  for name, spec in SPECS.items():
    tuned = bottleneck.tuning(spec, decoder())
    axes = named_leaves(tuned.axes, lambda leaf: isinstance(leaf, tuple))
    leaves = named_leaves(first(spec)[0])
    assert axes.keys() == leaves.keys()
    for leaf, array in leaves.items():
      assert len(axes[leaf]) == array.ndim, leaf
    assert ("prefix_0/mixer_adapter/up" in leaves) == (name == "serial")
    assert not any(leaf.startswith("prefix_0/mlp") for leaf in leaves)
  assert axes["layers/1/mlp_beside/down"] == ("layers", "embed", None)
  assert axes["layers/1/mlp_beside/up"] == ("layers", None, "embed")
  assert leaves["layers/1/mlp_beside/down"].shape == (2, 16, 3)


def test_refusals():
  for fields, told in (
    ({"size": 0}, "adapters.size: 0 is under 1"),
    ({"where": "x"}, "adapters.where: 'x' is not serial or parallel"),
    ({"scale": 0.0}, "adapters.scale: 0.0 is not a positive"),
  ):
    with pytest.raises(InputError, match=told):
      Bottleneck(**fields)
  bare = LM(vocab=40, dim=16, pattern=MODEL.prefix, repeats=1)
  with pytest.raises(InputError, match="beside MLPs, and no block has one"):
    bottleneck.tuning(SPECS["parallel"], decoder(model=bare))
