"""Llama: pre-norm RMSNorm, rotary positions, SwiGLU; sizes as published.

Sources: Touvron et al. 2023 (1 and 2), Grattafiori et al. 2024 (3 to 3.2), Zhang et al.
2024 (TinyLlama), and the stories models of llama2.c for the smallest.
"""

from typing import Literal, NamedTuple, get_args

from jaxlm.errors import InputError, nearest
from jaxlm.models.spec import GLU, GQA, LM, Block, Llama3Scaling, RMSNorm, RoPE

Size = Literal[
  "stories-260k", "stories-15m", "stories-42m", "stories-110m", "tiny-1.1b",
  "1-7b", "1-13b", "1-33b", "1-65b", "2-7b", "2-13b", "2-70b",
  "3-8b", "3-70b", "3.1-8b", "3.1-70b", "3.1-405b", "3.2-1b", "3.2-3b",
]  # fmt: skip


class Shape(NamedTuple):
  """One published size."""

  dim: int
  layers: int
  heads: int
  kv_heads: int
  hidden: int
  vocab: int = 32_000
  base: float = 10_000.0
  eps: float = 1e-5
  extended: float | None = None
  """Factor of the Llama 3.1 context extension."""
  tied: bool = False


SHAPES: dict[str, Shape] = {
  "stories-260k": Shape(64, 5, 8, 4, 172, vocab=512, tied=True),
  "stories-15m": Shape(288, 6, 6, 6, 768, tied=True),
  "stories-42m": Shape(512, 8, 8, 8, 1376, tied=True),
  "stories-110m": Shape(768, 12, 12, 12, 2048, tied=True),
  "tiny-1.1b": Shape(2048, 22, 32, 4, 5632),
  "1-7b": Shape(4096, 32, 32, 32, 11_008, eps=1e-6),
  "1-13b": Shape(5120, 40, 40, 40, 13_824, eps=1e-6),
  "1-33b": Shape(6656, 60, 52, 52, 17_920, eps=1e-6),
  "1-65b": Shape(8192, 80, 64, 64, 22_016),
  "2-7b": Shape(4096, 32, 32, 32, 11_008),
  "2-13b": Shape(5120, 40, 40, 40, 13_824),
  "2-70b": Shape(8192, 80, 64, 8, 28_672),
  "3-8b": Shape(4096, 32, 32, 8, 14_336, 128_256, 500_000.0),
  "3-70b": Shape(8192, 80, 64, 8, 28_672, 128_256, 500_000.0),
  "3.1-8b": Shape(4096, 32, 32, 8, 14_336, 128_256, 500_000.0, extended=8.0),
  "3.1-70b": Shape(8192, 80, 64, 8, 28_672, 128_256, 500_000.0, extended=8.0),
  "3.1-405b": Shape(16_384, 126, 128, 8, 53_248, 128_256, 500_000.0, extended=8.0),
  "3.2-1b": Shape(
    2048, 16, 32, 8, 8192, 128_256, 500_000.0, extended=32.0, tied=True
  ),
  "3.2-3b": Shape(
    3072, 28, 24, 8, 8192, 128_256, 500_000.0, extended=32.0, tied=True
  ),
}  # fmt: skip


def llama(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  if size not in SHAPES:
    sizes = get_args(Size)
    raise InputError(
      f"size: no llama {size!r}; the sizes are {', '.join(sizes)}."
      f"{nearest(size, sizes)}"
    )
  shape = SHAPES[size]
  scaling = None if shape.extended is None else Llama3Scaling(factor=shape.extended)
  norm = RMSNorm(eps=shape.eps)
  block = Block(
    mixer=GQA(
      heads=shape.heads,
      kv_heads=shape.kv_heads,
      head_dim=shape.dim // shape.heads,
      positions=RoPE(base=shape.base, scaling=scaling),
    ),
    mlp=GLU(hidden=shape.hidden),
    norm=norm,
  )
  return LM(
    vocab=shape.vocab if vocab is None else vocab,
    dim=shape.dim,
    pattern=(block,),
    repeats=shape.layers,
    final_norm=norm,
    head="tied" if shape.tied else "untied",
  )
