"""Gemma 1, 2 and 3 (text): scaled embeddings, 1 + scale norms, GeGLU, a tied head.

The second alternates windows and bounds scores and logits by tanh; the third norms
queries and keys, with five windowed blocks, of their own rotary base, to one without.
Sources: Gemma Team 2024a, 2024b, 2025; sizes as published.
"""

import math
from typing import Any, Literal

from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import GLU, LM, Block, LinearScaling, RMSNorm, RoPE

Size = Literal[
  "1-2b", "1-7b", "2-2b", "2-9b", "2-27b", "3-270m", "3-1b", "3-4b", "3-12b", "3-27b"
]


def local_blocks(layers: int, every: int) -> tuple[bool, ...]:
  """Says of each block whether it has a window; each `every`-th has none."""
  return tuple((layer + 1) % every != 0 for layer in range(layers))


def _shape(
  dim: int, layers: int, heads: int, kv_heads: int, hidden: int, **other: Any
) -> Shape:
  base: dict[str, Any] = {
    "vocab": 256_000, "head_dim": 256, "context": 8192, "eps": 1e-6,
    "rope": RoPE(), "tied": True,
  }  # fmt: skip
  base |= {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads}
  fields: dict[str, Any] = base | {"hidden": hidden} | other
  return Shape(**fields)


def _second(layers: int, scale: int, **other: Any) -> dict[str, Any]:
  capped = {"softcap": 50.0, "final_softcap": 30.0, "scale": scale**-0.5}
  return {"window": 4096, "local": local_blocks(layers, 2)} | capped | other


def _third(
  layers: int, window: int, scale: int, factor: float | None, **other: Any
) -> dict[str, Any]:
  scaling = None if factor is None else LinearScaling(factor=factor)
  return {
    "vocab": 262_144 if factor is None else 262_208,
    "context": 32_768 if factor is None else 131_072,
    "rope": RoPE(base=1e6, scaling=scaling),
    "local_rope": RoPE(),
    "window": window,
    "local": local_blocks(layers, 6),
    "scale": scale**-0.5,
  } | other


SHAPES: dict[str, Shape] = {
  "1-2b": _shape(2048, 18, 8, 1, 16_384),
  "1-7b": _shape(3072, 28, 16, 16, 24_576),
  "2-2b": _shape(2304, 26, 8, 4, 9216, **_second(26, 256)),
  "2-9b": _shape(3584, 42, 16, 8, 14_336, **_second(42, 256)),
  "2-27b": _shape(4608, 46, 32, 16, 36_864, **_second(46, 144, head_dim=128)),
  "3-270m": _shape(640, 18, 4, 1, 2048, **_third(18, 512, 256, None)),
  "3-1b": _shape(1152, 26, 4, 1, 6912, **_third(26, 512, 256, None)),
  "3-4b": _shape(2560, 34, 8, 4, 10_240, **_third(34, 1024, 256, 8.0)),
  "3-12b": _shape(3840, 48, 16, 8, 15_360, **_third(48, 1024, 256, 8.0)),
  "3-27b": _shape(5376, 62, 32, 16, 21_504, **_third(62, 1024, 168, 8.0, head_dim=128)),
}


def build1(shape: Shape) -> LM:
  """Returns the model of a shape, of the first generation."""
  return _build(shape)


def build2(shape: Shape) -> LM:
  """Returns the model of a shape, of the second generation."""
  return _build(shape, placement="sandwich")


def build3(shape: Shape) -> LM:
  """Returns the model of a shape, of the third generation."""
  norm = RMSNorm(eps=shape.eps, offset=1.0)
  return _build(shape, {"qk_norm": norm}, placement="sandwich")


def _build(shape: Shape, mixer: dict[str, Any] | None = None, **fields: Any) -> LM:
  norm = RMSNorm(eps=shape.eps, offset=1.0)
  mlp = GLU(hidden=shape.hidden, activation="gelu_tanh", bias=shape.mlp_bias)

  def block(local: bool) -> Block:
    attention = shape.attention(local, **mixer or {})
    return Block(mixer=attention, mlp=mlp, norm=norm, **fields)

  return shape.model(block, final_norm=norm, embed_scale=math.sqrt(shape.dim))


def gemma(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  builds = {"1": build1, "2": build2, "3": build3}
  return builds[size[0]](published(SHAPES, "gemma", size, vocab))
