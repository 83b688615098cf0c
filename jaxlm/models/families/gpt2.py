"""GPT-2: LayerNorm, learned positions, biases everywhere, a tied head.

Source: Radford et al. 2019; sizes as published.
"""

from typing import Literal

from jaxlm.errors import InputError
from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import LM, MLP, Block, LayerNorm, Learned

Size = Literal["124m", "355m", "774m", "1.5b"]


def _shape(dim: int, layers: int, heads: int) -> Shape:
  return Shape(
    vocab=50_257,
    dim=dim,
    layers=layers,
    heads=heads,
    kv_heads=heads,
    hidden=4 * dim,
    context=1024,
    bias="all",
    mlp_bias="all",
    tied=True,
  )


SHAPES: dict[str, Shape] = {
  "124m": _shape(768, 12, 12),
  "355m": _shape(1024, 24, 16),
  "774m": _shape(1280, 36, 20),
  "1.5b": _shape(1600, 48, 25),
}


def build(shape: Shape) -> LM:
  """Returns the model of a shape; its context is the length of the position table.

  Raises:
    InputError: the shape has no context.
  """
  if shape.context is None:
    raise InputError("context: learned positions need a length.")
  norm = LayerNorm(eps=shape.eps)
  mlp = MLP(hidden=shape.hidden, activation="gelu_tanh", bias=shape.mlp_bias)
  return shape.model(
    lambda local: Block(mixer=shape.attention(local), mlp=mlp, norm=norm),
    positions=Learned(length=shape.context),
    final_norm=norm,
  )


def gpt2(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  return build(published(SHAPES, "gpt2", size, vocab))
