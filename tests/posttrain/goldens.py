"""Numbers of TRL 1.16.0 (PRM: 1.13) on small seeded inputs, in float32.

A part of the project's larger set: the inputs of each loss, its value and its gradient
with respect to the log-probabilities of the tokens.
"""

import functools
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parents[1] / "goldens/posttraining.npz"
TIGHT = 2e-5
"""In float64: what is left is the float32 of the goldens."""
LOOSE = 2e-4
"""In float32."""
CASES = [(np.float32, LOOSE), (np.float64, TIGHT)]


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
  with np.load(FILE) as file:
    return dict(file)


def golden(key: str, dtype: type = np.float32) -> np.ndarray:
  array = _arrays()[key]
  return array.astype(dtype) if array.dtype.kind == "f" else array


def same(value, wanted, tolerance: float) -> bool:
  """Says whether values agree, relative to the largest that is wanted."""
  assert np.shape(value) == np.shape(wanted)
  error = np.max(np.abs(np.asarray(value) - wanted))
  return bool(error <= tolerance * np.max(np.abs(wanted)))
