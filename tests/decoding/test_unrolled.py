import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.specs import SPECS, VOCAB, decoder, params_of

from jaxlm.decoding.unrolled import unroll
from jaxlm.models.decoder import init, logits, unbox
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.trees import named_leaves

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 9)).astype(np.int32)


def run(made, params):
  def forward(params):
    x_BTD, _ = made.apply({"params": params}, jnp.asarray(TOKENS))
    return logits(made.spec, params, x_BTD)

  return np.asarray(jax.jit(forward)(params))


@pytest.mark.parametrize("name", SPECS)
def test_the_other_layout_is_the_same_model(name):
  made = decoder(SPECS[name])
  other, params = unroll(made, params_of(made))
  wanted = jax.eval_shape(lambda key: unbox(init(other, key)), jax.random.key(0))
  shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
  assert shapes == {name: leaf.shape for name, leaf in named_leaves(wanted).items()}
  np.testing.assert_allclose(
    run(other, params), run(made, params_of(made)), atol=1e-5, rtol=0
  )


def test_matrices_are_kept_in_the_dtype_of_the_computation():
  made = decoder(SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"])
  made = made.clone(precision=type(made.precision)(compute="bfloat16"))
  _, params = unroll(made, params_of(made))
  for name, leaf in named_leaves(params).items():
    small = "norm" in name or leaf.ndim == 1
    assert leaf.dtype == (jnp.float32 if small else jnp.bfloat16), name


def test_what_was_split_stays_split():
  layout = Layout(make_mesh(Mesh(fsdp=1, tensor=2), jax.devices()[:2]))
  spec = SPECS["gpt: MHA, GELU, LayerNorm, learned, tied, biases"]
  made = decoder(spec).clone(layout=layout)
  other, params = unroll(made, params_of(decoder(spec)))
  np.testing.assert_allclose(
    run(other, params), run(decoder(spec), params_of(decoder(spec))), atol=1e-5
  )
  split = {n for n, a in named_leaves(params).items() if not a.is_fully_replicated}
  assert {"embed/table", "head", "prefix_0/mixer/q", "layers/0/mlp/down"} <= split
