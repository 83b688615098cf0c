"""OLMo 2: norms on outputs, and on queries and keys over all heads together.

Source: OLMo et al. 2024; sizes as published.
"""

from typing import Literal

from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import GLU, LM, Block, RMSNorm, RoPE

Size = Literal["1b", "7b", "13b", "32b"]


def _shape(dim: int, layers: int, heads: int, kv_heads: int, hidden: int) -> Shape:
  return Shape(
    vocab=100_352,
    dim=dim,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    hidden=hidden,
    context=4096,
    eps=1e-6,
    rope=RoPE(base=500_000.0),
  )


SHAPES: dict[str, Shape] = {
  "1b": _shape(2048, 16, 16, 16, 8192),
  "7b": _shape(4096, 32, 32, 32, 11_008),
  "13b": _shape(5120, 40, 40, 40, 13_824),
  "32b": _shape(5120, 64, 40, 8, 27_648),
}


def build(shape: Shape) -> LM:
  """Returns the model of a shape."""
  norm = RMSNorm(eps=shape.eps)

  def block(local: bool) -> Block:
    mixer = shape.attention(local, qk_norm=norm, qk_norm_span="heads")
    mlp = GLU(hidden=shape.hidden)
    return Block(mixer=mixer, mlp=mlp, norm=norm, placement="output")

  return shape.model(block, final_norm=norm)


def olmo2(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  return build(published(SHAPES, "olmo2", size, vocab))
