"""Phi-3: Llama's block with fused matrices on disk, a window, and LongRoPE.

Source: Abdin et al. 2024. The long contexts' factors, 48 or 64 numbers a list, come
with the checkpoints; the sizes here are those of short contexts.
"""

from typing import Literal

from jaxlm.models.families import llama
from jaxlm.models.families.shape import Shape, published
from jaxlm.models.spec import LM, RoPE

Size = Literal["mini-4k", "medium-4k", "4-14b"]

SHAPES: dict[str, Shape] = {
  "mini-4k": Shape(
    vocab=32_064, dim=3072, layers=32, heads=32, kv_heads=32, hidden=8192,
    context=4096, window=2047, rope=RoPE(),
  ),
  "medium-4k": Shape(
    vocab=32_064, dim=5120, layers=40, heads=40, kv_heads=10, hidden=17_920,
    context=4096, window=2047, rope=RoPE(),
  ),
  "4-14b": Shape(
    vocab=100_352, dim=5120, layers=40, heads=40, kv_heads=10, hidden=17_920,
    context=16_384, rope=RoPE(base=250_000.0),
  ),
}  # fmt: skip


def phi3(size: Size, *, vocab: int | None = None) -> LM:
  """Returns a published size; `vocab` replaces the published one.

  Raises:
    InputError: no such size.
  """
  return llama.build(published(SHAPES, "phi3", size, vocab))
