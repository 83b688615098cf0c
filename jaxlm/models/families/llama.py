"""Llama and its kin: pre-norm RMSNorm, rotary positions, SwiGLU; sizes as published.

Sources: Touvron et al. 2023 (1 and 2), Grattafiori et al. 2024 (3 to 3.2), Zhang et al.
2024 (TinyLlama), the stories models of llama2.c for the smallest, Allal et al. 2025
(SmolLM2), Jiang et al. 2023 and the releases after it (Mistral: a window in v0.1).
"""

from typing import Any, Literal

from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import GLU, LM, Block, Llama3Scaling, RMSNorm, RoPE

Size = Literal[
  "stories-260k", "stories-15m", "stories-42m", "stories-110m", "tiny-1.1b",
  "1-7b", "1-13b", "1-33b", "1-65b", "2-7b", "2-13b", "2-70b",
  "3-8b", "3-70b", "3.1-8b", "3.1-70b", "3.1-405b", "3.2-1b", "3.2-3b",
  "smollm2-135m", "smollm2-360m", "smollm2-1.7b",
  "mistral-7b-v0.1", "mistral-7b-v0.2", "mistral-7b-v0.3", "mistral-nemo-12b",
  "mistral-small-24b",
]  # fmt: skip


def _shape(
  dim: int, layers: int, heads: int, kv_heads: int, hidden: int, **other: Any
) -> Shape:
  base: dict[str, Any] = {"vocab": 32_000, "rope": RoPE(), "context": 4096}
  base |= {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads}
  fields: dict[str, Any] = base | {"hidden": hidden} | other
  return Shape(**fields)


def _story(length: int) -> dict[str, Any]:
  return {"tied": True, "context": length}


_ONE = {"context": 2048}
_THREE = {"vocab": 128_256, "rope": RoPE(base=500_000.0), "context": 8192}


def _extended(factor: float, *, tied: bool = False) -> dict[str, Any]:
  rope = RoPE(base=500_000.0, scaling=Llama3Scaling(factor=factor))
  return {"vocab": 128_256, "rope": rope, "context": 131_072, "tied": tied}


def _smol(base: float) -> dict[str, Any]:
  return {"vocab": 49_152, "rope": RoPE(base=base), "context": 8192, "tied": True}


_V3 = {"vocab": 32_768, "rope": RoPE(base=1e6), "context": 32_768}
_NEMO = {"vocab": 131_072, "head_dim": 128}
SHAPES: dict[str, Shape] = {
  "stories-260k": _shape(64, 5, 8, 4, 172, vocab=512, **_story(512)),
  "stories-15m": _shape(288, 6, 6, 6, 768, **_story(256)),
  "stories-42m": _shape(512, 8, 8, 8, 1376, **_story(1024)),
  "stories-110m": _shape(768, 12, 12, 12, 2048, **_story(1024)),
  "tiny-1.1b": _shape(2048, 22, 32, 4, 5632, context=2048),
  "1-7b": _shape(4096, 32, 32, 32, 11_008, eps=1e-6, **_ONE),
  "1-13b": _shape(5120, 40, 40, 40, 13_824, eps=1e-6, **_ONE),
  "1-33b": _shape(6656, 60, 52, 52, 17_920, eps=1e-6, **_ONE),
  "1-65b": _shape(8192, 80, 64, 64, 22_016, **_ONE),
  "2-7b": _shape(4096, 32, 32, 32, 11_008),
  "2-13b": _shape(5120, 40, 40, 40, 13_824),
  "2-70b": _shape(8192, 80, 64, 8, 28_672),
  "3-8b": _shape(4096, 32, 32, 8, 14_336, **_THREE),
  "3-70b": _shape(8192, 80, 64, 8, 28_672, **_THREE),
  "3.1-8b": _shape(4096, 32, 32, 8, 14_336, **_extended(8.0)),
  "3.1-70b": _shape(8192, 80, 64, 8, 28_672, **_extended(8.0)),
  "3.1-405b": _shape(16_384, 126, 128, 8, 53_248, **_extended(8.0)),
  "3.2-1b": _shape(2048, 16, 32, 8, 8192, **_extended(32.0, tied=True)),
  "3.2-3b": _shape(3072, 28, 24, 8, 8192, **_extended(32.0, tied=True)),
  "smollm2-135m": _shape(576, 30, 9, 3, 1536, **_smol(1e5)),
  "smollm2-360m": _shape(960, 32, 15, 5, 2560, **_smol(1e5)),
  "smollm2-1.7b": _shape(2048, 24, 32, 32, 8192, **_smol(1.3e5)),
  "mistral-7b-v0.1": _shape(4096, 32, 32, 8, 14_336, window=4096, context=32_768),
  "mistral-7b-v0.2": _shape(4096, 32, 32, 8, 14_336, **_V3 | {"vocab": 32_000}),
  "mistral-7b-v0.3": _shape(4096, 32, 32, 8, 14_336, **_V3),
  "mistral-nemo-12b": _shape(
    5120, 40, 32, 8, 14_336, **_NEMO, rope=RoPE(base=1e6), context=131_072
  ),
  "mistral-small-24b": _shape(
    5120, 40, 32, 8, 32_768, **_NEMO, rope=RoPE(base=1e8), context=32_768
  ),
}


def build(shape: Shape) -> LM:
  """Returns the model of a shape."""
  norm = RMSNorm(eps=shape.eps)
  mlp = GLU(hidden=shape.hidden, bias=shape.mlp_bias)
  return shape.model(
    lambda local: Block(mixer=shape.attention(local), mlp=mlp, norm=norm),
    final_norm=norm,
  )


def llama(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  return build(published(SHAPES, "llama", size, vocab))
