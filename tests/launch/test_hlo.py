"""Small programs compiled for the CPU, whose operations and collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.launch import hlo
from jaxlm.sharding.mesh import Mesh, make_mesh

M, K, N, TURNS = 16, 32, 64, 5


def compiled(fn, *shapes, **options) -> str:
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(fn, **options).lower(*args).compile().as_text()


def test_a_product():
  text = compiled(jnp.dot, (M, K), (K, N))
  assert hlo.costs(text, 1).matmul_flops == 2 * M * K * N


def test_a_loop_counts_as_often_as_it_turns():
  def fn(x, w):
    def inner(x, _):
      return jnp.tanh(x @ w), None

    def outer(x, _):
      return jax.lax.scan(inner, x, None, length=3)[0], None

    return jax.lax.scan(outer, x, None, length=TURNS)[0]

  text = compiled(fn, (M, K), (K, K))
  assert hlo.costs(text, 1).matmul_flops == 3 * TURNS * 2 * M * K * K
  # XLA's own count sees each body once: that is why this file is.
  assert hlo.costs(text.replace("known_trip_count", "x"), 1).matmul_flops > 0


def test_a_loop_without_its_count_is_read_from_its_condition():
  def fn(x, w):
    return jax.lax.fori_loop(0, TURNS, lambda i, x: jnp.tanh(x @ w), x)

  text = compiled(fn, (M, K), (K, K)).replace("known_trip_count", "something")
  assert hlo.costs(text, 1).matmul_flops == TURNS * 2 * M * K * K


@pytest.mark.parametrize(
  ("left", "right", "dims", "flops"),
  [
    ((4, 8, 16), (4, 16, 32), "bmk,bkn->bmn", 2 * 4 * 8 * 16 * 32),
    ((8, 16), (16, 4, 4), "mk,kab->mab", 2 * 8 * 16 * 16),
    ((8, 4, 4), (4, 4, 32), "mab,abn->mn", 2 * 8 * 16 * 32),
  ],
)
def test_batches_and_several_sums(left, right, dims, flops):
  text = compiled(lambda a, b: jnp.einsum(dims, a, b), left, right)
  assert hlo.costs(text, 1).matmul_flops == flops


def sharded(fn, spec_in, spec_out, shape=(64, 32)) -> hlo.Costs:
  mesh = make_mesh(Mesh(fsdp=4, tensor=2))
  place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
  text = compiled(fn, shape, in_shardings=place(spec_in), out_shardings=place(spec_out))
  return hlo.costs(text, 8)


def test_a_gather_by_its_group():
  found = sharded(lambda x: x * 2, ("fsdp",), ()).collectives["all-gather"]
  assert found.times == 1
  assert found.bytes == 64 * 32 * 4
  assert found.sent == 64 * 32 * 4 * 3 / 4


def test_a_sum_counts_twice_on_the_links():
  found = sharded(lambda x: x.sum(0), ("fsdp", "tensor"), ("tensor",))
  found = found.collectives["all-reduce"]
  assert found.bytes == 16 * 4
  assert found.sent == 2 * 16 * 4 * 3 / 4


def test_collectives_in_a_loop():
  mesh = make_mesh(Mesh(fsdp=8))

  def local(x):
    def step(x, _):
      return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), None

    x, _ = jax.lax.scan(step, x, None, length=TURNS)
    return jax.lax.psum_scatter(jnp.tile(x, (8, 1)), "fsdp", tiled=True)

  spec = PartitionSpec("fsdp")
  fn = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  found = hlo.costs(compiled(fn, (64, 32)), 8).collectives
  assert found["collective-permute"].times == TURNS
  assert found["collective-permute"].sent == TURNS * 8 * 32 * 4
  scattered = found.get("reduce-scatter") or found["all-reduce"]
  assert scattered.bytes == 64 * 32 * 4


TPU = """HloModule m

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %k = f32[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a":"1"
}}, metadata={op_name="k"}
  %f = f32[8,16]{1,0} fusion(%k), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"100"}
  %s = ((f32[8,16]{1,0}), f32[4,16]{1,0}, u32[]) call-start(%f), to_apply=%scatter
  %d = f32[4,16]{1,0} call-done(%s)
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %f)
}

%inner (q: f32[8,16]) -> f32[8,16] {
  %q = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} constant({...})
  ROOT %c = f32[8,16]{1,0} convolution(%q, %w), dim_labels=bf_io->bf
}

%scatter (r: f32[8,16]) -> f32[4,16] {
  %r = f32[8,16]{1,0} parameter(0)
  ROOT %rs = f32[4,16]{1,0} reduce-scatter(%r), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}, to_apply=%add
}

%cond (p2: (s32[], f32[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %p2 = (s32[], f32[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p2), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %a = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %w2 = (s32[], /*index=1*/f32[8,16]{1,0}) while(%a), condition=%cond, body=%body
}
"""  # noqa: E501


def test_the_text_of_a_tpu_s_compiler():
  """Counts in conditions, products as convolutions, kernels with their metadata."""
  found = hlo.costs(TPU, 8)
  assert found.matmul_flops == 7 * 2 * 8 * 16 * 16
  assert found.cycles == 700
  assert found.kernels == 7
  scattered = found.collectives["reduce-scatter"]
  assert (scattered.times, scattered.overlapped) == (7, 7)
  assert scattered.sent == 7 * 8 * 16 * 4 / 2


def test_padding_of_a_convolution_is_no_product():
  """TPU compilers make a product over heads of a convolution over them."""
  text = """ENTRY %m (a: bf16[4,1,8], b: bf16[8,32,16]) -> bf16[4,32,16] {
  %a = bf16[4,1,8]{2,1,0} parameter(0)
  %b = bf16[8,32,16]{2,1,0} parameter(1)
  ROOT %c = bf16[4,32,16]{2,1,0} convolution(%a, %b), window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=b0f_i0o->b0f
}
"""  # noqa: E501
  assert hlo.costs(text, 1).matmul_flops == 2 * 4 * 8 * 32 * 16


def test_a_collective_fused_with_products_counts_once():
  """It stands where it starts, in a product that it runs beside, and where it ends."""
  text = """%start (p: f32[4,16]) -> f32[8,16] {
  %p = f32[4,16]{1,0} parameter(0)
  ROOT %g = f32[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}

%async_collective_fusion.7 (q: f32[4,16]) -> f32[8,16] {
  %q = f32[4,16]{1,0} parameter(0)
  ROOT %h = f32[8,16]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}

%done (r: f32[4,16]) -> f32[8,16] {
  %r = f32[4,16]{1,0} parameter(0)
  ROOT %i = f32[8,16]{1,0} all-gather(%r), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %m (a: f32[4,16]) -> f32[8,16] {
  %a = f32[4,16]{1,0} parameter(0)
  %async-collective-start.1 = f32[8,16]{1,0} fusion(%a), kind=kCustom, calls=%start
  %fusion.7 = f32[8,16]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.7
  %b = f32[8,16]{1,0} all-gather(%a), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  ROOT %async-collective-done.1 = f32[8,16]{1,0} fusion(%a), kind=kCustom, calls=%done
}
"""  # noqa: E501
  found = hlo.costs(text, 2).collectives["all-gather"]
  assert (found.times, found.overlapped) == (2, 1)
  assert (found.sent, found.exposed) == (2 * 4 * 16 * 4, 4 * 16 * 4)
  assert found.bytes == 2 * 8 * 16 * 4
