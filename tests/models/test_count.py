import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm.decoding import cache
from jaxlm.models import count
from jaxlm.models.decoder import init, logits, unbox
from jaxlm.models.spec import GLU, GQA, LM, MLP, Block
from jaxlm.trees import named_leaves
from models.specs import SPECS, decoder


def group_of(name: str) -> str:
  if name == "head":
    return "head"
  if "norm" in name:
    return "norms"
  return {"embed": "embedding", "mixer": "mixers", "mlp": "mlps"}[
    name.split("/")[0] if name.startswith("embed") else name.split("/")[-2]
  ]


@pytest.mark.parametrize("name", SPECS)
def test_parameters_by_group_equal_the_leaves(name):
  made = decoder(SPECS[name])
  shapes = unbox(jax.eval_shape(lambda key: init(made, key), jax.random.key(0)))
  groups = dict.fromkeys(count.Parameters._fields, 0)
  for leaf_name, leaf in named_leaves(shapes).items():
    groups[group_of(leaf_name)] += math.prod(leaf.shape)
  counted = count.parameters(SPECS[name])
  assert groups == counted._asdict()
  assert counted.total == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_cache_bytes_equal_the_empty_cache(name, dtype):
  spec = SPECS[name]
  shapes = jax.eval_shape(lambda: cache.empty(spec, 3, 7, dtype))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  assert held == 3 * count.cache_bytes(spec, 7, dtype)


@pytest.mark.parametrize("window", [None, 1, 3, 11, 40])
@pytest.mark.parametrize("seq_len", [1, 11, 16])
def test_keys_seen_by_brute_force(seq_len, window):
  wide = seq_len if window is None else min(window, seq_len)
  seen = [
    sum(1 for s in range(t + 1) if window is None or t - s < window)
    for t in range(seq_len)
  ]
  keys = count.keys_seen(seq_len, window)
  assert keys.causal == pytest.approx(sum(seen) / seq_len)
  assert keys.full == wide


BLOCK = Block(
  mixer=GQA(heads=8, kv_heads=2, head_dim=24, positions=None), mlp=GLU(hidden=320)
)
OTHER = Block(
  mixer=GQA(heads=4, kv_heads=4, head_dim=32, positions=None), mlp=MLP(hidden=256)
)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_flops_equal_those_that_xla_counts(head):
  # One repeat, for XLA counts the body of a scan once; one block of attention, which
  # multiplies what it then masks, so that `full` is what is done. The rest is norms,
  # softmax and activations: under 4% at these widths.
  spec = LM(vocab=640, dim=128, prefix=(OTHER,), pattern=(BLOCK,), repeats=1, head=head)
  made, (rows, length) = decoder(spec), (2, 96)
  params = unbox(jax.eval_shape(lambda key: init(made, key), jax.random.key(0)))

  def forward(params, tokens):
    return logits(spec, params, made.apply({"params": params}, tokens)[0])

  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  compiled = jax.jit(forward).lower(params, tokens).compile()
  found = compiled.cost_analysis()["flops"] / (rows * length)
  wanted = count.forward_flops(spec, length).full
  assert wanted < found < 1.04 * wanted


def test_training_is_three_forward_passes_and_windows_are_cheaper():
  spec = LM(vocab=64, dim=32, pattern=(BLOCK,), repeats=4)
  forward, training = count.forward_flops(spec, 64), count.training_flops(spec, 64)
  assert training == count.Flops(3 * forward.causal, 3 * forward.full)
  assert forward.causal < forward.full
  near = dataclasses.replace(BLOCK, mixer=dataclasses.replace(BLOCK.mixer, window=16))
  windowed = count.forward_flops(dataclasses.replace(spec, pattern=(near,)), 64)
  saved = 4 * 4 * 8 * 24  # layers, operations a key, heads, dim of a head
  assert forward.full - windowed.full == saved * (64 - 16)
  seen = 16 * 17 / 2 + 48 * 16
  assert forward.causal - windowed.causal == pytest.approx(saved * (65 / 2 - seen / 64))
