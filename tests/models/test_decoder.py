"""What every model must do, whatever its spec: one program of each shows it all."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding import cache as caches
from jaxlm.errors import InputError
from jaxlm.models import decoder as decoders
from jaxlm.models.attention import Attention
from jaxlm.models.decoder import axes_of, init, logits
from jaxlm.models.mlp import FeedForward
from jaxlm.models.norms import Norm
from jaxlm.models.spec import (
  GLU,
  GQA,
  LM,
  Block,
  Keep,
  Learned,
  Placement,
  Precision,
)
from jaxlm.trees import named_leaves
from models.specs import DIM, SPECS, VOCAB, alone, decoder, model, params_of

GEMMA = "gemma: MQA, GeGLU, sandwich, windows, softcaps, qk-norm"
MIXED = "mixed: half-rotary and no positions, ReGLU, other widths"
ALIBI = "alibi: output norm, squared ReLU, biases of queries, a prefix"
LLAMA = SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"]
T = 9
TOLERANCE = 1e-5
DOCUMENTS = ((4, 5), (3, 2, 4))


def rows() -> np.ndarray:
  """Two rows of tokens, none of which stands twice in a row."""
  rng = np.random.default_rng(0)
  return np.stack([rng.permutation(VOCAB)[:T] for _ in range(2)]).astype(np.int32)


def whole_and_packed():
  """Returns tokens, positions and segments: both rows whole, then as DOCUMENTS."""
  cuts = ((T,), (T,), *DOCUMENTS)
  positions = [[i for n in row for i in range(n)] for row in cuts]
  segments = [[j for j, n in enumerate(row, 1) for _ in range(n)] for row in cuts]
  tokens = np.concatenate((rows(), rows()))
  return [jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments)]


def unpacked() -> np.ndarray:
  """Returns each document on a row of its own, with an empty tail."""
  out = np.zeros((5, 5), np.int32)
  documents = (
    part
    for row, lengths in zip(rows(), DOCUMENTS, strict=True)
    for part in np.split(row, np.cumsum(lengths)[:-1])
  )
  for line, document in zip(out, documents, strict=True):
    line[: len(document)] = document
  return out


CALLS = (
  # First new token of each row, and how many there are; the prompts in chunks of two,
  ((0, 0), (2, 2)),
  ((2, 2), (1, 2)),
  ((3, 4), (0, 1)),
  # token by token, at different places,
  ((3, 5), (1, 1)),
  ((4, 6), (1, 1)),
  # and several at once on top of what is cached, padded in front.
  ((5, 7), (-4, -2)),
)


def decode(made, params, tokens_BT):
  """Feeds the rows in CALLS to a cache; returns the residual stream, [B, T, D]."""
  cache = caches.empty(made.spec, 2, 12, "float32")
  out_BTD = jnp.full((*tokens_BT.shape, made.spec.dim), jnp.nan)
  for firsts, counts in CALLS:
    offsets = np.arange(max(map(abs, counts)))
    begin = np.array(firsts)[:, None]
    positions = np.where(offsets < np.abs(counts)[:, None], begin + offsets, -1)
    if min(counts) < 0:
      positions = np.sort(positions, axis=1)
    positions = jnp.asarray(positions, jnp.int32)
    tokens = jnp.take_along_axis(tokens_BT, jnp.maximum(positions, 0), axis=1)
    x_BTD, cache = made.apply({"params": params}, tokens, positions, cache=cache)
    for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
      some = slice(0, count) if count >= 0 else slice(count, None)
      out_BTD = out_BTD.at[row, first : first + abs(count)].set(x_BTD[row, some])
  return out_BTD


@functools.cache
def observe(name: str):
  """Returns what one jit finds out about a model."""
  spec = SPECS[name]
  made = decoder(spec)
  tokens = jnp.asarray(rows())
  direction = jnp.asarray(np.random.default_rng(1).normal(size=DIM), jnp.float32)

  def run(params):
    def forward(*args, params=params):
      return made.apply({"params": params}, *args)[0]

    def along(table):
      changed = params | {"embed": params["embed"] | {"table": table}}
      return forward(tokens[:1], params=changed)[0] @ direction

    both = forward(*whole_and_packed())
    full = both[:2]
    return {
      "full": full,
      "logits": logits(spec, params, full),
      "packed": both[2:],
      "unpacked": forward(jnp.asarray(unpacked())),
      "decoded": decode(made, params, tokens),
      # [T, T]: how far the output at t hangs on the embedding of the token at s.
      "influence": jnp.max(
        jnp.abs(jax.jacrev(along)(params["embed"]["table"])), axis=-1
      )[:, tokens[0]],
    }

  return jax.device_get(jax.jit(run)(params_of(made)))


@pytest.mark.parametrize("name", SPECS)
def test_the_past_alone_matters_and_all_of_it(name):
  influence = observe(name)["influence"]
  assert (influence[np.triu_indices(T, 1)] == 0).all()
  assert (influence[np.tril_indices(T)] > 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_packed_rows_equal_their_documents(name):
  seen = observe(name)
  documents = iter(seen["unpacked"])
  for row, lengths in zip(seen["packed"], DOCUMENTS, strict=True):
    for part in np.split(row, np.cumsum(lengths)[:-1]):
      np.testing.assert_allclose(part, next(documents)[: len(part)], atol=TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_cached_decoding_equals_the_full_forward(name):
  """Ragged rows, prompts in chunks, rings where there are windows, continuation."""
  seen = observe(name)
  np.testing.assert_allclose(seen["decoded"], seen["full"], atol=TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_the_head_s_product_within_the_softcap(name):
  seen, spec = observe(name), SPECS[name]
  params = params_of(decoder(spec))
  head = params["embed"]["table"].T if spec.head == "tied" else params["head"]
  wanted = seen["full"] @ np.asarray(head)
  if spec.softcap is not None:
    wanted = spec.softcap * np.tanh(wanted / spec.softcap)
  np.testing.assert_allclose(seen["logits"], wanted, atol=TOLERANCE)


def test_where_norms_stand():
  x_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(2, T, DIM)), jnp.float32)
  positions_BT, precision = jnp.tile(jnp.arange(T)[None], (2, 1)), Precision()

  def expected(block, params):
    def residual(name, fn, x):
      def norm(place, y):
        own = {"params": params[f"{name}_{place}_norm"]}
        return Norm(block.norm, precision).apply(own, y)

      return {
        "pre": lambda: x + fn(norm("pre", x)),
        "post": lambda: norm("post", x + fn(x)),
        "output": lambda: x + norm("post", fn(x)),
        "sandwich": lambda: x + norm("post", fn(norm("pre", x))),
      }[block.placement]()

    def mix(x):
      module = Attention(block.mixer, precision, alone(), 1)
      return module.apply({"params": params["mixer"]}, x, positions_BT, None, None)[0]

    def mlp(x):
      module = FeedForward(block.mlp, precision, alone(), 1)
      return module.apply({"params": params["mlp"]}, x)

    return residual("mlp", mlp, residual("mixer", mix, x_BTD))

  def both(key):
    found = {}
    for placement in get_args(Placement):
      block = dataclasses.replace(LLAMA.pattern[0], placement=placement)
      module = decoders.Block(block, precision, alone(), 1)
      boxed = module.init(key, x_BTD, None, positions_BT, None)
      # A scale of one would hide on which side of a sum a norm stands.
      params = jax.tree.map(lambda a: 0.7 * a, decoders.unbox(boxed)["params"])
      out, _ = module.apply({"params": params}, x_BTD, None, positions_BT, None)
      found[placement] = (out, expected(block, params))
    return found

  for found, wanted in jax.jit(both)(jax.random.key(0)).values():
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_one_layer_sees_no_further_than_its_window():
  window = 3
  block = Block(mixer=GQA(heads=2, kv_heads=1, head_dim=8, window=window), mlp=None)
  made = decoder(LM(vocab=VOCAB, dim=DIM, pattern=(block,), repeats=1))
  params, tokens = params_of(made), jnp.asarray(rows()[:1])

  def along(table):
    changed = params | {"embed": {"table": table}}
    return jnp.sum(made.apply({"params": changed}, tokens)[0][0], axis=-1)

  slopes = jax.jit(jax.jacrev(along))(params["embed"]["table"])
  influence = np.asarray(jnp.max(jnp.abs(slopes), axis=-1)[:, tokens[0]])
  back = np.arange(T)[:, None] - np.arange(T)[None]
  np.testing.assert_array_equal(influence > 0, (back >= 0) & (back < window))


WITH_PREFIX = dataclasses.replace(LLAMA, prefix=LLAMA.pattern)
OFFLOAD = Keep(input="offload", query="save", attention="offload", gate="offload")
REMATS = ("none", "full", "dots", "dots_without_batch", OFFLOAD)


def cubes(remat, spec):
  made = decoder(spec, remat)

  def loss(params):
    x_BTD, _ = made.apply({"params": params}, jnp.asarray(rows()))
    return jnp.sum(x_BTD**3)

  return loss


def test_remat_changes_neither_loss_nor_gradients():
  params = params_of(decoder(LLAMA))
  losses = [jax.value_and_grad(cubes(remat, LLAMA)) for remat in REMATS]
  wanted, *others = jax.jit(lambda p: [grad(p) for grad in losses])(params)
  for found in others:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


SANDWICH = tuple(dataclasses.replace(b, placement="sandwich") for b in LLAMA.pattern)
NEEDING_ALL = dataclasses.replace(LLAMA, prefix=SANDWICH, pattern=SANDWICH)


def residuals(remat, spec, params):
  """Returns what the backward pass keeps: (elements, how many arrays on the host)."""
  back = lambda p: jax.vjp(cubes(remat, spec), p)[1]  # noqa: E731
  kept = jax.make_jaxpr(back)(params).out_avals
  on_host = sum(aval.memory_space == jax.memory.Space.Host for aval in kept)
  return sum(aval.size for aval in kept), on_host


def test_remat_keeps_less_for_the_backward_pass():
  params = params_of(decoder(WITH_PREFIX))
  presets = ("full", "dots_without_batch", "dots", "none")
  full, less, dots, none = (
    residuals(remat, WITH_PREFIX, params)[0] for remat in presets
  )
  assert full < less < dots < none


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Keep)])
def test_each_activation_is_saved_or_goes_to_the_host_alone(name):
  params = params_of(decoder(NEEDING_ALL))
  least, none = residuals(Keep(), NEEDING_ALL, params)
  assert none == 0
  size, on_host = residuals(Keep(**{name: "offload"}), NEEDING_ALL, params)
  # One of the prefix, one of the scan's layers; of attention also the log-partitions.
  assert on_host == (4 if name == "attention" else 2)
  if name != "input":
    assert size > least
    assert residuals(Keep(**{name: "save"}), NEEDING_ALL, params) == (size, 0)


def test_recomputation_outside_a_scan_is_kept_apart_from_the_forward_pass():
  # Else the compiler would find the same computation twice and keep its first result.
  made = decoder(WITH_PREFIX, "full")
  jaxpr = jax.make_jaxpr(made.apply)(
    {"params": params_of(made)}, jnp.zeros((1, 4), jnp.int32)
  )
  blocks = [
    eqn
    for eqn in jaxpr.eqns
    if "prevent_cse" in eqn.params and "dot_general" in str(eqn.params["jaxpr"])
  ]
  assert [block.params["prevent_cse"] for block in blocks] == [True]


def test_bfloat16_compute_leaves_parameters_and_logits_in_float32():
  made = decoder(SPECS[GEMMA], compute="bfloat16")
  params = params_of(made)

  @jax.jit
  def run(params):
    x_BTD, _ = made.apply({"params": params}, jnp.asarray(rows()))
    y_BTV = logits(SPECS[GEMMA], params, x_BTD)
    back = jax.grad(lambda p: jnp.sum(logits(SPECS[GEMMA], p, x_BTD)))
    return x_BTD, y_BTV, back(params)

  x_BTD, y_BTV, grads = run(params)
  assert x_BTD.dtype == jnp.bfloat16
  assert y_BTV.dtype == jnp.float32
  for tree in (params, grads):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
  # The product is summed in float32 and not rounded on its way.
  head = np.asarray(params["embed"]["table"].T.astype(jnp.bfloat16), np.float32)
  wanted = 3.0 * np.tanh(np.asarray(x_BTD, np.float32) @ head / 3.0)
  np.testing.assert_allclose(y_BTV, wanted, atol=1e-5)
  # Rounding to 8 bits some twenty times over four blocks: 5% in the root mean square.
  exact = observe(GEMMA)["logits"]
  apart = np.square(y_BTV - exact).mean() / np.square(exact).mean()
  assert apart**0.5 < 0.05


def test_parameters_in_bfloat16():
  made = decoder(SPECS[GEMMA], params="bfloat16", compute="bfloat16")
  shapes = jax.eval_shape(lambda key: init(made, key), jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_names_and_axes_of_parameters():
  made = decoder(SPECS[ALIBI])
  axes = axes_of(jax.eval_shape(lambda key: init(made, key), jax.random.key(0)))
  found = named_leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  heads = ("embed", "heads", "head_dim")
  assert found["embed/table"] == ("vocab", "embed")
  assert found["head"] == ("embed", "vocab")
  assert found["final_norm/scale"] == ("norm",)
  assert found["prefix_0/mixer/q"] == heads
  assert found["layers/0/mixer/q"] == ("layers", *heads)
  assert found["layers/0/mixer/o"] == ("layers", "heads", "head_dim", "embed")
  assert found["layers/0/mixer/k_bias"] == ("layers", None, "norm")
  assert found["layers/0/mlp/down"] == ("layers", "mlp", "embed")
  assert found["prefix_0/mixer_pre_norm/scale"] == ("norm",)


def test_first_values_have_their_deviation():
  block = Block(mixer=GQA(heads=4, kv_heads=2, head_dim=64), mlp=GLU(hidden=512))
  spec = LM(vocab=512, dim=256, pattern=(block,), repeats=2)
  made = decoder(spec)
  params = jax.jit(lambda key: init(made, key))(jax.random.key(0))
  found = {n: np.asarray(a) for n, a in named_leaves(jax.device_get(params)).items()}
  # A normal cut at two deviations; the last product of a residual branch starts
  # smaller, by the root of the number of branches, here 4.
  for name, wanted in {
    "embed/table/value": 0.02,
    "head/value": 256**-0.5,
    "layers/0/mixer/q/value": 256**-0.5,
    "layers/0/mixer/o/value": 256**-0.5 / 2,
    "layers/0/mlp/down/value": 512**-0.5 / 2,
  }.items():
    cut = 1.0 if name.startswith("embed") else 0.8796  # of a normal cut at 2
    assert found[name].std() == pytest.approx(wanted * cut, rel=0.02), name
  layers = found["layers/0/mixer/q/value"]
  assert not np.array_equal(layers[0], layers[1])


def test_more_positions_than_are_learned():
  made = decoder(model(LLAMA.pattern[0], positions=Learned(length=3)))
  with pytest.raises(InputError, match=r"length: 3 positions .* the input has 4"):
    jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
