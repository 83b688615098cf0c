import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import (
  Layout,
  ShardingRules,
  check_divides,
  replicated_share,
)
from jaxlm.training.state import First, create

MIXED = Mesh(data=2, fsdp=2, tensor=2)
BLOCK = Block(mixer=GQA(heads=4, kv_heads=4, head_dim=8), mlp=GLU(hidden=64))
MODEL = LM(vocab=64, dim=32, pattern=(BLOCK,), repeats=2)


def layout(mesh=MIXED, **rules):
  return Layout(make_mesh(mesh), ShardingRules(**rules))


def test_a_spec_by_names():
  rules = ShardingRules()
  assert rules.spec(("batch", "sequence", None)) == PartitionSpec(
    ("data", "fsdp"), "context", None
  )
  assert rules.spec(("embed", "heads", "head_dim")) == PartitionSpec(
    "fsdp", "tensor", None
  )


def test_names_that_are_wrong_or_collide():
  with pytest.raises(InputError, match=r"no logical axis 'head'.*Did you mean 'heads'"):
    ShardingRules().spec(("embed", "head"))
  with pytest.raises(InputError, match=r"sharding\.mlp: 'tensr'.*'tensor'"):
    ShardingRules(mlp=("tensr",))
  with pytest.raises(InputError, match=r"'vocab' and 'heads'.*mesh axis 'tensor'"):
    ShardingRules().spec(("vocab", "heads"))
  with pytest.raises(InputError, match=r"'batch' and 'embed'.*mesh axis 'fsdp'"):
    ShardingRules().spec(("batch", "embed"))


def test_constrain_splits_an_activation():
  here = layout()

  def double(x):
    return here.constrain(2 * x, "batch", "sequence", "mlp")

  x = jnp.ones((8, 4, 8))
  assert "sharding_constraint" in str(jax.make_jaxpr(double)(x))
  out = jax.jit(double)(x)
  assert out.sharding.shard_shape(out.shape) == (2, 4, 4)
  alone = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  assert alone.constrain(x, "batch", "sequence", "mlp") is x
  for each in (here, alone):
    with pytest.raises(InputError, match="no logical axis 'mpl'"):
      each.constrain(x, "batch", "sequence", "mpl")


def test_the_decoder_constrains_its_activations():
  here = layout()
  decoder = Decoder(MODEL, Precision(), here)
  tokens = jnp.zeros((4, 4), jnp.int32)
  params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), tokens))
  jaxpr = str(jax.make_jaxpr(decoder.apply)(params, tokens))
  # The table, the embedding; q, k, v, attention's output, the hidden units and the
  # residual stream twice, in the body of the scan; and each of the nine matrices.
  assert jaxpr.count("sharding_constraint[") == 18


def test_the_first_leaf_that_does_not_divide_is_named():
  here = layout()
  shapes = {"a": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
  shapes["b"] = jax.ShapeDtypeStruct((4, 6), jnp.float32)
  shardings = {
    "a": here.sharding("embed", "mlp"),
    "b": here.sharding(None, "batch"),
  }
  with pytest.raises(InputError, match=r"dimension 6 of b \(4, 6\).*by 4.*'data'"):
    check_divides(here, shapes, shardings)
  shardings["b"] = here.sharding(None, "mlp")
  check_divides(here, shapes, shardings)


def test_the_replicated_share_counts_bytes():
  shapes = {
    "whole": jax.ShapeDtypeStruct((8, 4), jnp.float32),
    "split": jax.ShapeDtypeStruct((8, 24), jnp.bfloat16),
  }

  def share(mesh):
    here = layout(mesh)
    shardings = {"whole": here.sharding("norm"), "split": here.sharding("embed", "mlp")}
    return replicated_share(here, shapes, shardings)

  # Of 128 + 384 bytes a device of 4 parts may hold a quarter.
  assert share(MIXED) == (128 - 128 / 4) / 512
  assert share(Mesh(fsdp=8)) == (128 - 128 / 8) / 512
  assert share(Mesh(data=8, fsdp=1)) == 0.0


def test_a_state_that_would_be_replicated_is_refused():
  optimizer = optax.sgd(0.1)
  for rules in ({"embed": ()}, {"vocab": (), "embed": ()}):
    decoder = Decoder(MODEL, Precision(), layout(Mesh(fsdp=8), **rules))
    with pytest.raises(InputError, match=r"hold 87\.\d% of the parameter bytes"):
      create(decoder, optimizer, First(0), ema=False)
  # Only the embedding and the head are whole: 2 * 64 * 32 of some 24,000 parameters.
  decoder = Decoder(MODEL, Precision(), layout(Mesh(fsdp=1, tensor=2, data=4)))
  create(decoder, optimizer, First(0), ema=False)
  rules = dataclasses.replace(ShardingRules(), vocab=())
  decoder = Decoder(MODEL, Precision(), Layout(decoder.layout.mesh, rules))
  with pytest.raises(InputError, match=r"hold 8\.6% .* at most 2% may"):
    create(decoder, optimizer, First(0), ema=False)


def test_heads_that_the_mesh_does_not_divide_are_refused():
  decoder = Decoder(MODEL, Precision(), layout(Mesh(fsdp=1, tensor=8)))
  with pytest.raises(InputError, match=r"dimension 4 of layers/0/mixer/k .* by 8"):
    create(decoder, optax.sgd(0.1), First(0), ema=False)


def test_layouts_are_equal_and_hashable_by_value():
  assert layout() == layout()
  assert hash(layout()) == hash(layout())
  assert layout() != layout(vocab=())


def test_a_mesh_axis_that_no_rule_uses_is_refused():
  with pytest.raises(InputError, match=r"mesh\.expert: 2, and no sharding rule"):
    layout(Mesh(expert=2))
  layout(Mesh(expert=2), mlp=("expert", "tensor"))


def test_a_parameter_that_one_of_two_axes_splits_is_held_too_often():
  here = layout(Mesh(fsdp=4, tensor=2), embed=())
  shapes = {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
  shardings = {"w": here.sharding("embed", "mlp")}
  assert replicated_share(here, shapes, shardings) == 1 / 2 - 1 / 8


def test_the_vocabulary_is_not_split_with_the_rows():
  with pytest.raises(InputError, match=r"sharding\.vocab: \['fsdp'\] split rows"):
    ShardingRules(vocab=("fsdp",))
