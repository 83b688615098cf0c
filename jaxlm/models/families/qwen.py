"""Qwen 2 and 2.5 (biases on queries, keys and values) and 3 (norms on them instead).

Sources: Yang et al. 2024 and 2025; sizes as published, without the mixtures of experts.
"""

from typing import Any, Literal

from jaxlm.models.families import llama
from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import GLU, LM, Block, RMSNorm, RoPE

Size = Literal[
  "2-0.5b", "2-1.5b", "2-7b", "2-72b", "2.5-0.5b", "2.5-1.5b", "2.5-3b", "2.5-7b",
  "2.5-14b", "2.5-32b", "2.5-72b", "3-0.6b", "3-1.7b", "3-4b", "3-8b", "3-14b", "3-32b",
]  # fmt: skip


def _shape(
  dim: int, layers: int, heads: int, kv_heads: int, hidden: int, **other: Any
) -> Shape:
  base: dict[str, Any] = {
    "vocab": 151_936,
    "rope": RoPE(base=1e6),
    "eps": 1e-6,
    "context": 32_768,
  }
  base |= {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads}
  fields: dict[str, Any] = base | {"hidden": hidden} | other
  return Shape(**fields)


_TIED = {"bias": "qkv", "tied": True}
_LARGE = {"bias": "qkv", "vocab": 152_064}
_THIRD = {"head_dim": 128, "context": 40_960}
SHAPES: dict[str, Shape] = {
  "2-0.5b": _shape(896, 24, 14, 2, 4864, **_TIED, context=131_072),
  "2-1.5b": _shape(1536, 28, 12, 2, 8960, **_TIED, context=131_072),
  "2-7b": _shape(3584, 28, 28, 4, 18_944, **_LARGE, context=131_072),
  "2-72b": _shape(8192, 80, 64, 8, 29_568, **_LARGE, eps=1e-5, context=131_072),
  "2.5-0.5b": _shape(896, 24, 14, 2, 4864, **_TIED),
  "2.5-1.5b": _shape(1536, 28, 12, 2, 8960, **_TIED, context=131_072),
  "2.5-3b": _shape(2048, 36, 16, 2, 11_008, **_TIED),
  "2.5-7b": _shape(3584, 28, 28, 4, 18_944, **_LARGE, context=131_072),
  "2.5-14b": _shape(5120, 48, 40, 8, 13_824, **_LARGE, eps=1e-5, context=131_072),
  "2.5-32b": _shape(5120, 64, 40, 8, 27_648, **_LARGE, eps=1e-5, context=131_072),
  "2.5-72b": _shape(8192, 80, 64, 8, 29_568, **_LARGE, eps=1e-5, context=131_072),
  "3-0.6b": _shape(1024, 28, 16, 8, 3072, **_THIRD, tied=True),
  "3-1.7b": _shape(2048, 28, 16, 8, 6144, **_THIRD, tied=True),
  "3-4b": _shape(2560, 36, 32, 8, 9728, **_THIRD, tied=True),
  "3-8b": _shape(4096, 36, 32, 8, 12_288, **_THIRD),
  "3-14b": _shape(5120, 40, 40, 8, 17_408, **_THIRD),
  "3-32b": _shape(5120, 64, 64, 8, 25_600, **_THIRD),
}


def build2(shape: Shape) -> LM:
  """Returns the model of a shape, of the second generation."""
  return llama.build(shape)


def build3(shape: Shape) -> LM:
  """Returns the model of a shape, of the third generation."""
  norm = RMSNorm(eps=shape.eps)

  def block(local: bool) -> Block:
    mixer = shape.attention(local, qk_norm=norm)
    return Block(mixer=mixer, mlp=GLU(hidden=shape.hidden), norm=norm)

  return shape.model(block, final_norm=norm)


def qwen(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  shape = published(SHAPES, "qwen", size, vocab)
  return build3(shape) if size.startswith("3-") else build2(shape)
