"""The one legend of dimension letters, and the names of array types.

Arrays of rank two and up carry their dimensions as a suffix: `q_BTHK`.

  B  rows of a batch            T  positions of the input (queries)
  S  positions attended to      D  model dim (the residual stream)
  H  query heads                G  key-value heads
  R  query heads per key-value head, H = G R
  K  dim of a head              F  hidden dim of an MLP
  V  vocabulary                 L  layers that one scan runs over
  N  tokens of a batch, B T; new tokens, or ranks, of a row
  C  tokens of a chunk
  M  micro-batches of a step
  U  examples (pairs, labelled completions) that share a row
"""

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree"]
