"""BLOOM: LayerNorm, also on the embedding, ALiBi, biases everywhere, a tied head.

Source: BigScience 2022; sizes as published.
"""

from typing import Literal

from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import LM, MLP, ALiBi, Block, LayerNorm

Size = Literal["560m", "1.1b", "1.7b", "3b", "7.1b", "176b"]


def _shape(dim: int, layers: int, heads: int) -> Shape:
  return Shape(
    vocab=250_880,
    dim=dim,
    layers=layers,
    heads=heads,
    kv_heads=heads,
    hidden=4 * dim,
    context=2048,
    bias="all",
    mlp_bias="all",
    tied=True,
  )


SHAPES: dict[str, Shape] = {
  "560m": _shape(1024, 24, 16),
  "1.1b": _shape(1536, 24, 16),
  "1.7b": _shape(2048, 24, 16),
  "3b": _shape(2560, 30, 32),
  "7.1b": _shape(4096, 30, 32),
  "176b": _shape(14_336, 70, 112),
}


def build(shape: Shape) -> LM:
  """Returns the model of a shape."""
  norm = LayerNorm(eps=shape.eps)
  mlp = MLP(hidden=shape.hidden, activation="gelu_tanh", bias=shape.mlp_bias)
  return shape.model(
    lambda local: Block(
      mixer=shape.attention(local, positions=ALiBi()), mlp=mlp, norm=norm
    ),
    embed_norm=norm,
    final_norm=norm,
  )


def bloom(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  return build(published(SHAPES, "bloom", size, vocab))
