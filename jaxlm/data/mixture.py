"""Example i of the global order, for any i at once: sources mixed by exact weights."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
import xxhash


class Turns(grain.transforms.DatasetSelectionMap):
  """Whose turn it is: maps i to (source, how often that source came before).

  Each source in order takes its share of the examples that those before it left, as
  evenly as whole numbers allow: of the first k left, `k - floor(k rest / (weight +
  rest))`. So each count stays within the number of sources of its exact share, for
  every i; the arithmetic is in integers, and weights are taken as they are written
  (0.1 is a tenth).
  """

  def __init__(self, weights: Sequence[float]):
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    # (what all later sources weigh, what they and this one weigh), by source
    self._shares = [(sum(whole[i + 1 :]), sum(whole[i:])) for i in range(len(whole))]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    left = index
    for source, (rest, total) in enumerate(self._shares):
      passed = left * rest // total
      if (left + 1) * rest // total == passed:
        return source, left - passed
      left = passed
    raise AssertionError("the last source takes all that is left")


def mix(
  sources: Sequence[Any], weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """Returns an endless dataset whose element i depends on (seed, i) alone.

  Each source ([index] and len) is shuffled with a seed of its own and anew in each of
  its epochs, within which every element occurs once.
  """
  endless = [
    grain.MapDataset.source(source)
    .shuffle(xxhash.xxh32_intdigest(f"{seed}/{i}".encode()))
    .repeat()
    for i, source in enumerate(sources)
  ]
  return grain.MapDataset.select_from_datasets(endless, Turns(weights))
