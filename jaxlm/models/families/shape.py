"""What differs between the members of a family: the numbers of one published size.

A family is a function from a `Shape` to an `LM`; `shape_of` goes back.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxlm.errors import InputError, nearest
from jaxlm.models.spec import GQA, LM, Block, Learned, RoPE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """The numbers of one model; a family uses those that it knows."""

  vocab: int
  """Rows of the embedding."""
  dim: int
  """Width of the residual stream."""
  layers: int
  """Blocks."""
  heads: int
  """Query heads."""
  kv_heads: int
  """Key-value heads."""
  hidden: int
  """Hidden units of an MLP."""
  head_dim: int | None = None
  """Dim of a head; None: dim / heads."""
  context: int | None = None
  """Longest sequence, in tokens."""
  eps: float = 1e-5
  """Of every norm."""
  rope: RoPE | None = None
  """Rotary positions."""
  local_rope: RoPE | None = None
  """Those of the blocks with a window, where they differ."""
  window: int | None = None
  """Keys that a query sees in the blocks with a window."""
  local: tuple[bool, ...] | None = None
  """Which blocks have the window; None: all, where there is one."""
  scale: float | None = None
  """Factor on attention scores; None: head_dim^-0.5."""
  softcap: float | None = None
  """Bound on attention scores."""
  final_softcap: float | None = None
  """Bound on logits."""
  bias: Literal["none", "qkv", "all"] = "none"
  """Which projections of attention carry a bias."""
  mlp_bias: Literal["none", "all"] = "none"
  """Which projections of the MLP carry a bias."""
  tied: bool = False
  """Whether the head is the embedding's transpose."""

  def attention(self, local: bool, **fields: Any) -> GQA:
    """Returns the mixer of a block with the window (`local`) or without."""
    rope = self.local_rope if local and self.local_rope else self.rope
    fields = {"positions": rope} | fields
    return GQA(
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_dim=self.dim // self.heads if self.head_dim is None else self.head_dim,
      window=self.window if local else None,
      scale=self.scale,
      softcap=self.softcap,
      bias=self.bias,
      **fields,
    )

  def model(self, block: Callable[[bool], Block], **fields: Any) -> LM:
    """Returns the model whose blocks are `block(whether it has the window)`."""
    local = self.local or (self.window is not None,) * self.layers
    if len(local) != self.layers:
      raise InputError(f"local: {len(local)} entries for {self.layers} layers.")
    prefix, pattern, repeats = arrange(tuple(map(block, local)))
    return LM(
      vocab=self.vocab,
      dim=self.dim,
      prefix=prefix,
      pattern=pattern,
      repeats=repeats,
      head="tied" if self.tied else "untied",
      softcap=self.final_softcap,
      context=self.context,
      **fields,
    )


def arrange(
  blocks: tuple[Block, ...],
) -> tuple[tuple[Block, ...], tuple[Block, ...], int]:
  """Returns (prefix, pattern, repeats) with the fewest blocks to compile."""
  count = len(blocks)
  if not count:
    return (), (), 0
  best = (count + 1, 0, count)
  for first in range(count):
    for period in range(1, count - first + 1):
      if (count - first) % period == 0 and (first + period, first) < best[:2]:
        rest = blocks[first:]
        if rest == rest[:period] * (len(rest) // period):
          best = (first + period, first, period)
  _, first, period = best
  return blocks[:first], blocks[first : first + period], (count - first) // period


def shape_of(model: LM) -> Shape:
  """Returns the numbers that a family would build this model from.

  What a family cannot say is left out, so compare what it builds with the model.
  """
  mixers = [block.mixer for block in model.blocks]
  windows = [mixer.window for mixer in mixers]
  local = tuple(window is not None for window in windows)
  whole = [m.positions for m in mixers if m.window is None] or [mixers[0].positions]
  near = [m.positions for m in mixers if m.window is not None]
  mixer, mlp = mixers[0], model.blocks[0].mlp
  rope = whole[0] if isinstance(whole[0], RoPE) else None
  local_rope = near[0] if near and isinstance(near[0], RoPE) else None
  return Shape(
    vocab=model.vocab,
    dim=model.dim,
    layers=len(mixers),
    heads=mixer.heads,
    kv_heads=mixer.kv_heads,
    hidden=0 if mlp is None else mlp.hidden,
    head_dim=mixer.head_dim,
    context=model.positions.length
    if isinstance(model.positions, Learned)
    else model.context,
    eps=model.final_norm.eps,
    rope=rope,
    local_rope=local_rope if local_rope != rope else None,
    window=max((w for w in windows if w is not None), default=None),
    local=None if all(local) or not any(local) else local,
    scale=mixer.scale,
    softcap=mixer.softcap,
    final_softcap=model.softcap,
    bias=mixer.bias,
    mlp_bias="none" if mlp is None else mlp.bias,
    tied=model.head == "tied",
  )


def published(
  shapes: Mapping[str, Shape], family: str, size: str, vocab: int | None
) -> Shape:
  """Returns a published size, with another vocabulary where one is given.

  Raises:
    InputError: no such size.
  """
  if size not in shapes:
    raise InputError(
      f"size: no {family} {size!r}; the sizes are {', '.join(shapes)}."
      f"{nearest(size, shapes)}"
    )
  shape = shapes[size]
  return shape if vocab is None else dataclasses.replace(shape, vocab=vocab)
