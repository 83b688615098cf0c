"""FLOPs, memory, time and cost of a model before it is trained; no JAX, no arrays.

    size = optimal(1e22)                                  # parameters and tokens
    made = compute(model, size.tokens, seq_len=8192)      # FLOPs, every convention
    took = duration(made.causal, devices=64, peak=989e12, utilisation=0.4)
    cost = took.cost(price)                               # by the caller's own price

Bytes are bytes, GB are 1e9 of them, a year has 365.25 days.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from jaxlm.errors import InputError, nearest
from jaxlm.models import count, spec

HOUR = 3600.0
DAY = 24 * HOUR
YEAR = 365.25 * DAY
BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 8.0, "int4": 4.0}
"""Bits of a served weight; scales of quantized ones are left out."""
BASE_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "nf4": 4.127}
"""Bits of a frozen weight. NF4 counts its scales, quantized too: 4 + 8/64 + 32/(64 x
256) (Dettmers et al. 2023, QLoRA); int8 leaves out its scales."""
Counting = Literal["all", "non_embedding", "matrices", "causal", "full"]
"""How a training token's FLOPs are counted; see `Compute`."""
Stage = Literal[0, 1, 2, 3]
"""What is split over the devices (Rajbhandari et al. 2020, ZeRO): 0 nothing, 1 moments
and master weights, 2 gradients too, 3 parameters too."""


class Compute(NamedTuple):
  """FLOPs of training, a multiply and an add counted as two, by each convention."""

  all: float
  """6ND, N of all parameters (Kaplan et al. 2020 with Hoffmann et al. 2022's N)."""
  non_embedding: float
  """6ND, N without embedding, positions and head (Kaplan et al. 2020)."""
  matrices: float
  """6ND, N of what multiplies every token: the head counts, tied or not; a table of
  embeddings, norms and biases do not."""
  causal: float
  """`matrices`, and attention to the keys that a query sees."""
  full: float
  """`matrices`, and attention to every key of the sequence or the window."""


class Size(NamedTuple):
  """A model and what it is trained on."""

  parameters: float
  tokens: float


class Memory(NamedTuple):
  """Bytes of a device by kind."""

  parameters: float
  gradients: float
  master: float
  moments: float
  base: float
  """A frozen model that adapters stand beside."""

  @property
  def total(self) -> float:
    """All of them; activations and buffers are not here."""
    return sum(self)


class Serving(NamedTuple):
  """Bytes of a model that writes text, over all devices together."""

  weights: float
  cache: float

  @property
  def total(self) -> float:
    """Both; activations are not here."""
    return sum(self)


class Duration(NamedTuple):
  """How long a training takes."""

  seconds: float
  """From its start to its end."""
  devices: int

  @property
  def days(self) -> float:
    """From its start to its end."""
    return self.seconds / DAY

  @property
  def device_hours(self) -> float:
    """Hours of all devices together."""
    return self.seconds * self.devices / HOUR

  @property
  def device_years(self) -> float:
    """Years of all devices together."""
    return self.seconds * self.devices / YEAR

  def cost(self, price: float) -> float:
    """Returns the cost, in the money that `price`, of a device-hour, is told in.

    Raises:
      InputError: the price is negative or no number.
    """
    if not (math.isfinite(price) and price >= 0):
      raise InputError(f"price: {price} is not a number from 0.")
    return self.device_hours * price


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """Bytes that training keeps of each trained parameter."""

  parameters: float
  """What the forward pass reads."""
  gradients: float
  """The gradient of a step."""
  master: float
  """A second, finer copy of the parameters, where there is one."""
  moments: float
  """What the optimizer keeps."""

  def __post_init__(self):
    for name, value in vars(self).items():
      if not (math.isfinite(value) and value >= 0):
        raise InputError(f"state.{name}: {value} is not a number of bytes from 0.")

  @property
  def total(self) -> float:
    """All of them."""
    return self.parameters + self.gradients + self.master + self.moments


STATES = {
  "mixed": State(parameters=2, gradients=2, master=4, moments=8),
  "float32": State(parameters=4, gradients=4, master=0, moments=8),
  "bfloat16": State(parameters=2, gradients=2, master=0, moments=8),
}
"""Adam's state. mixed: the 16 bytes of Rajbhandari et al. 2020, section 3.1. The others
are what this framework keeps by `precision.params`: gradients in the parameters' dtype,
moments in float32, no second copy (training/optimizers.py); an EMA would add 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
  """Adapters that train beside a frozen base."""

  share: float
  """Trained parameters over the base's."""
  base: Literal["float32", "bfloat16", "int8", "nf4"]
  """Dtype of the base."""

  def __post_init__(self):
    _positive("adapters.share", self.share)
    _known("adapters.base", self.base, BASE_BITS)


def _positive(name: str, value: float) -> None:
  if not (math.isfinite(value) and value > 0):
    raise InputError(f"{name}: {value} is not a finite number above 0.")


def _known(name: str, value: str, accepted: dict[str, float]) -> None:
  if value not in accepted:
    raise InputError(
      f"{name}: {value!r}; it takes {', '.join(accepted)}.{nearest(value, accepted)}"
    )


def six_nd(parameters: float, tokens: float) -> float:
  """Returns 6ND, the FLOPs of training by the rule of Kaplan et al. 2020.

  Two for the forward pass of each parameter and token and four for the backward pass;
  attention's scores are left out.

  Raises:
    InputError: one of them is not positive.
  """
  _positive("parameters", parameters)
  _positive("tokens", tokens)
  return 6.0 * parameters * tokens


def non_embedding(model: spec.LM) -> int:
  """Returns the parameters without embedding, positions and head (Kaplan et al.)."""
  counts = count.parameters(model)
  return counts.total - counts.embedding - counts.head


def compute(model: spec.LM, tokens: float, *, seq_len: int) -> Compute:
  """Returns the FLOPs of training a model on so many tokens, by every convention.

  Raises:
    InputError: `tokens` or `seq_len` is not positive.
  """
  _positive("tokens", tokens)
  _positive("seq_len", seq_len)
  exact = count.training_flops(model, seq_len)
  return Compute(
    all=six_nd(count.parameters(model).total, tokens),
    non_embedding=six_nd(non_embedding(model), tokens),
    matrices=six_nd(count.matrix_parameters(model), tokens),
    causal=exact.causal * tokens,
    full=exact.full * tokens,
  )


def optimal(flops: float, *, tokens_per_parameter: float = 20.0) -> Size:
  """Returns the size for a budget by 6ND and a fixed number of tokens a parameter.

  20 is the rule of thumb drawn from Hoffmann et al. 2022, table 3. It is no fit to
  your own data: for that see fit.py.

  Raises:
    InputError: one of them is not positive.
  """
  _positive("flops", flops)
  _positive("tokens_per_parameter", tokens_per_parameter)
  parameters = math.sqrt(flops / (6.0 * tokens_per_parameter))
  return Size(parameters, tokens_per_parameter * parameters)


def tokens_for(
  flops: float, model: spec.LM, *, seq_len: int, counting: Counting
) -> float:
  """Returns the tokens that a model can train on for a budget.

  Raises:
    InputError: `flops` or `seq_len` is not positive, or the convention is unknown.
  """
  _positive("flops", flops)
  each = compute(model, 1.0, seq_len=seq_len)._asdict()
  _known("counting", counting, each)
  return flops / each[counting]


def state_memory(
  parameters: float,
  state: State,
  *,
  devices: int,
  stage: Stage,
  adapters: Beside | None = None,
) -> Memory:
  """Returns the bytes of training state on each device.

  `parameters` are the whole model's. With adapters the model is a frozen base, and only
  their share has gradients and moments; stage 3 splits the base too. Parts are taken to
  divide evenly.

  Raises:
    InputError: `parameters` or `devices` is not positive, or there is no such stage.
  """
  _positive("parameters", parameters)
  _positive("devices", devices)
  if stage not in (0, 1, 2, 3):
    raise InputError(f"stage: {stage!r}; it takes 0, 1, 2 or 3.")
  trained, base = parameters, 0.0
  if adapters is not None:
    trained = adapters.share * parameters
    base = parameters * BASE_BITS[adapters.base] / 8

  def held(total: float, since: int) -> float:
    return total / devices if stage >= since else total

  return Memory(
    parameters=held(trained * state.parameters, 3),
    gradients=held(trained * state.gradients, 2),
    master=held(trained * state.master, 1),
    moments=held(trained * state.moments, 1),
    base=held(base, 3),
  )


def weight_bytes(parameters: float, precision: str) -> float:
  """Returns the bytes of weights at a precision: fp32, fp16, int8 or int4.

  Raises:
    InputError: `parameters` is not positive, or the precision is unknown.
  """
  _positive("parameters", parameters)
  _known("precision", precision, BITS)
  return parameters * BITS[precision] / 8


def serving_memory(
  model: spec.LM, precision: str, *, rows: int, length: int, cache: str
) -> Serving:
  """Returns the bytes of weights, and of keys and values of `rows` texts.

  `length` is in tokens, `cache` the dtype of keys and values: float32 or bfloat16.

  Raises:
    InputError: a number is not positive, or a name is unknown.
  """
  _positive("rows", rows)
  _positive("length", length)
  _known("cache", cache, dict.fromkeys(count.BYTES, 0.0))
  return Serving(
    weights=weight_bytes(count.parameters(model).total, precision),
    cache=rows * count.cache_bytes(model, length, cache),
  )


def devices_for(memory: float, device: float) -> int:
  """Returns how many devices of `device` bytes hold `memory` bytes, evenly split.

  Raises:
    InputError: one of them is not positive.
  """
  _positive("memory", memory)
  _positive("device", device)
  return math.ceil(memory / device)


def duration(
  flops: float, *, devices: int, peak: float, utilisation: float
) -> Duration:
  """Returns the time of a training at a share of the devices' best.

  `peak` is in FLOP/s of one device. `utilisation` must go with the convention by which
  `flops` were counted: the same run has a lower one by causal than by full.

  Raises:
    InputError: a number is not positive, or the utilisation is over 1.
  """
  _positive("flops", flops)
  _positive("devices", devices)
  _positive("peak", peak)
  _positive("utilisation", utilisation)
  if utilisation > 1:
    raise InputError(f"utilisation: {utilisation} is over 1, the devices' best.")
  return Duration(flops / (devices * peak * utilisation), devices)
