"""From a position spec to the numbers that `ops.rope` takes."""

import math

import numpy as np

from jaxlm.models.spec import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  NTKScaling,
  RoPE,
  YaRNScaling,
)


def rope_frequencies(rope: RoPE, head_dim: int) -> tuple[np.ndarray, float]:
  """Returns radians a position for each rotated pair, and the magnitude.

  Sources: Chen et al. 2023 (linear), bloc97 2023 (NTK-aware), Peng et al. 2023 (YaRN),
  the Llama 3.1 release (its wavelength bands), Ding et al. 2024 (LongRoPE).
  """
  dims = int(head_dim * rope.fraction)
  base = rope.base
  if isinstance(rope.scaling, NTKScaling):
    base *= rope.scaling.factor ** (dims / (dims - 2))
  plain = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
  match rope.scaling:
    case LinearScaling(factor=factor):
      return plain / factor, 1.0
    case YaRNScaling() as yarn:
      return _yarn(plain, yarn, base, dims)
    case Llama3Scaling() as llama:
      return _llama3(plain, llama), 1.0
    case LongScaling() as long:
      extended = long.length > long.original_length
      return plain / np.asarray(long.long if extended else long.short), long.magnitude
    case _:
      return plain, 1.0


def _yarn(
  plain: np.ndarray, yarn: YaRNScaling, base: float, dims: int
) -> tuple[np.ndarray, float]:
  def pair_that_turns(times: float) -> float:
    wavelength = yarn.original_length / (times * 2 * math.pi)
    return dims * math.log(wavelength) / (2 * math.log(base))

  low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
  high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dims - 1)
  width = max(high - low, 0.001)
  interpolated = np.clip((np.arange(dims // 2) - low) / width, 0, 1)
  frequencies = plain * (1 - interpolated) + plain / yarn.factor * interpolated
  magnitude = yarn.magnitude
  if magnitude is None:
    magnitude = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
  return frequencies, magnitude


def _llama3(plain: np.ndarray, llama: Llama3Scaling) -> np.ndarray:
  turns = llama.original_length * plain / (2 * np.pi)
  span = llama.high_frequency - llama.low_frequency
  kept = np.clip((turns - llama.low_frequency) / span, 0, 1)
  return plain * kept + plain / llama.factor * (1 - kept)
