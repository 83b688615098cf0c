"""Points of runs, and the surfaces that tell a loss from parameters and tokens."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from jaxlm.errors import InputError

Floats = npt.NDArray[np.float64]
FEWEST = 6  # a surface has five coefficients
DISTINCT = 3  # two levels of N fix one difference of losses: not both A and alpha
LARGEST = 690.0  # a coefficient's logarithm: exp(710) is no float64


class Points(NamedTuple):
  """Runs that ended: what `points` has checked. All [n], float64.

  `loss` is in nats a token on held-out text, or of the last steps smoothed.
  """

  parameters: Floats
  tokens: Floats
  loss: Floats

  def take(self, index: npt.ArrayLike) -> "Points":
    """Returns the points at an index: integers, or a mask [n]."""
    picked = np.asarray(index)
    return Points(self.parameters[picked], self.tokens[picked], self.loss[picked])


def points(
  parameters: npt.ArrayLike, tokens: npt.ArrayLike, loss: npt.ArrayLike
) -> Points:
  """Returns checked points of the three columns, each [n].

  Raises:
    InputError: a column is not one-dimensional or not as long as the others, holds what
      is not finite and positive, or the points are too few for a surface.
  """
  columns = {"parameters": parameters, "tokens": tokens, "loss": loss}
  arrays = {name: column(name, values) for name, values in columns.items()}
  lengths = {name: len(values) for name, values in arrays.items()}
  if len(set(lengths.values())) > 1:
    raise InputError(
      f"points: {lengths} differ in length; one entry a run is accepted."
    )
  if lengths["loss"] < FEWEST:
    raise InputError(
      f"points: {lengths['loss']} of them; at least {FEWEST} are accepted, "
      "for a surface has 5 coefficients."
    )
  for name in ("parameters", "tokens"):
    if (found := len(np.unique(arrays[name]))) < DISTINCT:
      raise InputError(
        f"{name}: {found} distinct values; at least {DISTINCT} are accepted, "
        "for fewer fix no exponent."
      )
  return Points(**arrays)


def column(name: str, values: npt.ArrayLike) -> Floats:
  """Returns values as a float64 array [n].

  Raises:
    InputError: they are not one-dimensional, finite and positive.
  """
  try:
    array = np.asarray(values, np.float64)
  except (TypeError, ValueError) as error:
    raise InputError(f"{name}: {error}; numbers are accepted.") from error
  if array.ndim != 1:
    raise InputError(f"{name}: shape {array.shape}; one dimension is accepted.")
  if (bad := np.flatnonzero(~(np.isfinite(array) & (array > 0)))).size:
    raise InputError(
      f"{name}[{bad[0]}]: {array[bad[0]]}; finite positive numbers are accepted."
    )
  return array


class Predictor(Protocol):
  """What tells a loss: `Surface` and `Kaplan`."""

  def loss(self, parameters: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
    """Returns the loss of parameters and tokens that broadcast."""
    ...


@dataclasses.dataclass(frozen=True)
class Surface:
  """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 10).

  N are parameters, D tokens; which parameters (with embeddings or not) is up to the
  points, and changes the exponents (Porian et al. 2024).
  """

  E: float
  A: float
  B: float
  alpha: float
  beta: float

  def loss(self, parameters: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
    """Returns the loss, nats a token, of parameters and tokens that broadcast."""
    n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
    return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

  @property
  def has_frontier(self) -> bool:
    """Whether loss falls with both N and D."""
    return min(self.A, self.B, self.alpha, self.beta) > 0

  @property
  def exponents(self) -> tuple[float, float]:
    """(a, b) of the frontier: N grows as C^a and D as C^b; their sum is 1.

    Raises:
      InputError: the surface has no frontier.
    """
    self._check()
    total = self.alpha + self.beta
    return self.beta / total, self.alpha / total

  def frontier(
    self, flops: npt.ArrayLike, *, per: float = 6.0
  ) -> tuple[Floats, Floats]:
    """Returns the parameters and tokens of least loss where per * N * D = flops.

    Eq. 4 of Hoffmann et al. 2022. `per`: FLOPs a parameter and token; 6 counts a
    forward and a backward pass of matrices alone.

    Raises:
      InputError: the surface has no frontier: A, B or an exponent is not positive.
    """
    a, b = self.exponents
    product = np.asarray(flops, np.float64) / per
    # By logarithms: A and B of a steep fit are large.
    ratio = np.log(self.alpha / self.beta) + np.log(self.A) - np.log(self.B)
    share = np.exp(ratio / (self.alpha + self.beta))
    return share * product**a, product**b / share

  def tokens_per_parameter(self, flops: npt.ArrayLike, *, per: float = 6.0) -> Floats:
    """Returns D / N on the frontier; it is constant only where alpha equals beta."""
    n, d = self.frontier(flops, per=per)
    return d / n

  def _check(self) -> None:
    for name in ("A", "B", "alpha", "beta"):
      if not getattr(self, name) > 0:
        raise InputError(
          f"{name}: {getattr(self, name)}; a frontier needs A, B, alpha and beta above "
          "0. The points do not show that loss falls with both N and D."
        )


@dataclasses.dataclass(frozen=True)
class Kaplan:
  """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D.

  Kaplan et al. 2020, eq. 1.5: no irreducible loss.
  """

  N_c: float
  D_c: float
  alpha_N: float
  alpha_D: float

  def loss(self, parameters: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
    """Returns the loss, nats a token, of parameters and tokens that broadcast."""
    n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
    ratio = self.alpha_N / self.alpha_D
    return ((self.N_c / n) ** ratio + self.D_c / d) ** self.alpha_D


def exponential(name: str, logarithm: float) -> float:
  """Returns a coefficient of its logarithm.

  Raises:
    InputError: it is too large for a float64: nothing in the points bounds it.
  """
  if not logarithm < LARGEST:
    raise InputError(
      f"{name}: its logarithm ran to {logarithm:.0f}; the points do not determine the "
      "surface. Add sizes and lengths further apart."
    )
  return float(np.exp(logarithm))
