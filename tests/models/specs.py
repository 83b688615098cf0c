"""Small models that have between them every feature of the vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.decoder import Decoder, init, unbox
from jaxlm.models.spec import (
  GLU,
  GQA,
  LM,
  MLP,
  ALiBi,
  Block,
  LayerNorm,
  Learned,
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  NTKScaling,
  Precision,
  RMSNorm,
  RoPE,
  Sinusoidal,
  YaRNScaling,
)
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.trees import map_named

VOCAB, DIM = 16, 16
ROPES = {
  "plain": RoPE(base=100.0),
  "linear": RoPE(base=100.0, scaling=LinearScaling(factor=4.0)),
  "ntk": RoPE(base=100.0, fraction=0.5, scaling=NTKScaling(factor=4.0)),
  "yarn": RoPE(base=100.0, scaling=YaRNScaling(factor=4.0, original_length=8)),
  "long": RoPE(
    base=100.0,
    scaling=LongScaling(
      short=(1.0, 1.5, 2.0, 2.5),
      long=(2.0, 3.0, 4.0, 5.0),
      original_length=4,
      length=16,
      magnitude=1.2,
    ),
  ),
  "llama3": RoPE(base=100.0, scaling=Llama3Scaling(factor=8.0, original_length=16)),
}


def model(*pattern, **fields):
  return LM(vocab=VOCAB, dim=DIM, pattern=pattern, repeats=2, **fields)


def heads(kv_heads, **fields):
  return GQA(heads=4, kv_heads=kv_heads, head_dim=8, **fields)


LAYER = LayerNorm()
OFFSET = RMSNorm(offset=1.0)
SPECS = {
  "llama: GQA, SwiGLU, RMSNorm, scaled rotary": model(
    Block(mixer=heads(2, positions=ROPES["llama3"]), mlp=GLU(hidden=24)),
  ),
  "gpt: MHA, GELU, LayerNorm, learned, tied, biases": model(
    Block(
      mixer=heads(4, positions=None, bias="all"),
      mlp=MLP(hidden=24, bias="all"),
      norm=LAYER,
    ),
    positions=Learned(length=12),
    final_norm=LAYER,
    head="tied",
  ),
  "gemma: MQA, GeGLU, sandwich, windows, softcaps, qk-norm": model(
    Block(
      mixer=heads(
        1, positions=ROPES["linear"], window=3, softcap=2.0, qk_norm=OFFSET, scale=0.5
      ),
      mlp=GLU(hidden=24, activation="gelu_tanh"),
      norm=OFFSET,
      placement="sandwich",
    ),
    Block(
      mixer=heads(1, positions=ROPES["plain"], softcap=2.0, qk_norm=OFFSET),
      mlp=GLU(hidden=24, activation="gelu", bias="all"),
      norm=OFFSET,
      placement="sandwich",
    ),
    final_norm=OFFSET,
    head="tied",
    embed_scale=4.0,
    softcap=3.0,
  ),
  "first: post-norm, ReLU, sinusoids, LayerNorm without bias": model(
    Block(
      mixer=heads(4, positions=None),
      mlp=MLP(hidden=24, activation="relu"),
      norm=LayerNorm(bias=False),
      placement="post",
    ),
    positions=Sinusoidal(base=50.0),
    embed_scale=4.0,
  ),
  "alibi: output norm, squared ReLU, biases of queries, a prefix": model(
    Block(
      mixer=heads(
        2, positions=ALiBi(), bias="qkv", qk_norm=LAYER, qk_norm_span="heads"
      ),
      mlp=MLP(hidden=24, activation="relu2"),
      placement="output",
    ),
    prefix=(
      Block(mixer=heads(4, positions=ALiBi(), window=4), mlp=None),
      Block(mixer=heads(1, positions=ROPES["yarn"]), mlp=GLU(hidden=12)),
      Block(mixer=heads(2, positions=ROPES["long"]), mlp=GLU(hidden=12)),
    ),
    embed_norm=LAYER,
  ),
  "mixed: half-rotary and no positions, ReGLU, other widths": model(
    Block(
      mixer=heads(2, positions=ROPES["ntk"], qk_norm=LAYER),
      mlp=GLU(hidden=20, activation="relu"),
    ),
    Block(
      mixer=GQA(heads=2, kv_heads=1, head_dim=12, positions=None),
      mlp=MLP(hidden=24, activation="silu"),
    ),
  ),
}


@functools.cache
def alone() -> Layout:
  """Returns the layout of one device."""
  return Layout(make_mesh(Mesh(), jax.devices()[:1]))


def decoder(spec: LM, remat="none", **precision) -> Decoder:
  return Decoder(spec, Precision(**precision), alone(), remat)


def params_of(made: Decoder, seed: int = 0):
  """Returns parameters drawn in full: no bias is zero, no scale is one."""
  shapes = jax.eval_shape(lambda key: unbox(init(made, key)), jax.random.key(0))
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    middle = 1.0 if name.endswith("scale") else 0.0
    return jnp.asarray(middle + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

  return map_named(draw, shapes)
