"""Keys that all rows and segments see: one attention by every kernel, and refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlm.errors import InputError
from jaxlm.launch import plan
from jaxlm.models.attention import work_of
from jaxlm.models.decoder import prefix_of
from jaxlm.models.spec import GQA
from jaxlm.ops.attention import Prefix, Scoring, attend_prefixed
from jaxlm.ops.kernels.choice import Work, attend_sequences, choose
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from models.specs import alone

B, T, H, G, K, S = 2, 13, 4, 2, 6, 3
SLOPES = (0.5, 0.25, 0.125, 0.0625)
SCORINGS = {
  "plain": Scoring(K**-0.5),
  "window": Scoring(K**-0.5, window=4),
  "all": Scoring(0.9, softcap=2.0, slopes=SLOPES, window=5),
}
SEGMENTS = jnp.asarray([[1] * 6 + [2] * 5 + [3] * 2, [1] * 11 + [0] * 2], jnp.int32)
POSITIONS = jnp.asarray(
  [[*range(6), *range(5), *range(2)], [*range(11), *range(2)]], jnp.int32
)


def inputs():
  rng = np.random.default_rng(0)
  shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, K), (S, G, K), (S, G, K)]
  q, k, v, *ahead = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  return (q, k, v), Prefix(*ahead)


@pytest.mark.parametrize("name", SCORINGS)
def test_blocks_equal_the_reference_in_values_and_gradients(name):
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, K)), jnp.float32)

  def run(kernel, inputs):
    work = Work(SCORINGS[name], H, G, K, T, "float32", S)
    places = (POSITIONS + S, SEGMENTS)
    out, back = jax.vjp(
      lambda i: attend_sequences(kernel, work, alone(), i[0], places, i[1]), inputs
    )
    return out, back(weights)

  found, wanted = jax.jit(lambda i: [run(k, i) for k in ("blocks", "reference")])(
    inputs()
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert float(jnp.abs(b).max()) > 0
    np.testing.assert_allclose(a, b, atol=5e-6)


def sizes(jaxpr):
  """Yields the size of every array of a program, those of its loops too."""
  for equation in jaxpr.eqns:
    yield from (math.prod(v.aval.shape) for v in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from sizes(inner)


def test_no_array_is_larger_than_the_scores_of_128_queries():
  length, heads = 2048, 2
  shapes = [(1, length, heads, 4)] * 3
  qkv = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  ahead = [jax.ShapeDtypeStruct((16, heads, 4), jnp.float32)] * 2
  row = jnp.arange(length)[None]

  def total(qkv, ahead):
    places = (row + 16, jnp.zeros_like(row))
    return attend_prefixed(Scoring(1.0), tuple(qkv), places, Prefix(*ahead)).sum()

  program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(qkv, ahead)
  assert max(sizes(program.jaxpr)) <= heads * 128 * length


@pytest.mark.parametrize(("kernel", "platform"), [("cudnn", "gpu"), ("splash", "tpu")])
def test_fused_kernels_are_refused_by_name(kernel, platform):
  (target,) = plan.targets("h100:8")
  layout = Layout(make_mesh(Mesh(), plan.stand_ins(target)))
  for device in layout.mesh.devices.flat:
    object.__setattr__(device, "platform", platform)
  mixer = GQA(heads=32, kv_heads=8, head_dim=128)
  assert choose("auto", work_of(mixer, 4096, "bfloat16"), layout).kernel == kernel
  work = work_of(mixer, 4096, "bfloat16", 20)
  with pytest.raises(InputError, match=f"{kernel}.* no prefix of 20 keys"):
    choose(kernel, work, layout)
  chosen = choose("auto", work, layout)
  assert chosen.kernel == "blocks"
  assert f"not {kernel}: no prefix of 20 keys" in chosen.reason


def test_one_length_in_all_blocks():
  keys = lambda n: {"mixer": {"prefix_k": jnp.zeros((n, 2, 4))}}  # noqa: E731
  assert prefix_of({"prefix_0": keys(3), "prefix_1": keys(3), "head": 0}) == 3
  assert prefix_of({"layers": {"0": {"mixer": {}}}}) == 0
  with pytest.raises(InputError, match="one length is needed in all blocks"):
    prefix_of({"prefix_0": keys(3), "layers": {"0": {"mixer": {}}}})
