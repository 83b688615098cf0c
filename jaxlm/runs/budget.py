"""What a training costs before it is written: size, FLOPs, time, money, memory.

Arithmetic alone, in milliseconds; `--plan` of the training's own config compiles it and
knows activations and collectives too.
"""

import dataclasses
from typing import Literal, NamedTuple

from jaxlm.errors import InputError, nearest
from jaxlm.launch.chips import CHIPS, Chip
from jaxlm.models import count
from jaxlm.models.spec import LM
from jaxlm.scaling import budget
from jaxlm.scaling.budget import BITS, STATES, Beside, Compute, Counting, Size

STAGES: dict[str, budget.Stage] = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
MEANINGS = {
  "all": "6ND, all parameters",
  "non_embedding": "6ND, no embedding, no head",
  "matrices": "6ND, what multiplies a token",
  "causal": "exact, keys that a query sees",
  "full": "exact, every key of a sequence",
}


class Found(NamedTuple):
  """What a budget comes to."""

  rule: Size
  """By the fixed number of tokens a parameter, the budget taken as 6ND."""
  size: Size
  """What the figures below are of: the model's where there is one."""
  compute: Compute | None
  """By every convention; None without a model."""
  took: budget.Duration
  memory: budget.Memory
  """Of one device."""
  cost: float | None
  """None without a price."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """Tells what a budget buys, or what a model and its tokens cost."""

  model: LM | None = None
  """The architecture; None: only a number of parameters, that of the rule."""
  flops: float | None = None
  """The budget, counted as `counting` says; give this or tokens."""
  tokens: float | None = None
  """Tokens that the model trains on; give this or flops."""
  counting: Counting = "all"
  """How the budget, and what the utilisation is of, is counted: all, non_embedding and
  matrices are 6ND by different N, causal and full count attention too. Without a model
  there is only all."""
  seq_len: int = 8192
  """Length of training's sequences, and of a served text, in tokens."""
  tokens_per_parameter: float = 20.0
  """The rule for N and D (Hoffmann et al. 2022: about 20)."""
  chip: str
  """The device, by its name in launch/chips.py: its bfloat16 peak and its memory."""
  devices: int
  """How many of them."""
  utilisation: float
  """Share of the peak that training reaches; measure it, none is assumed."""
  price: float | None = None
  """Of a device-hour, in money of your choice; None: no cost is told."""
  state: Literal["mixed", "float32", "bfloat16"] = "float32"
  """Adam's state: float32 and bfloat16 are this framework's `precision.params`, mixed
  the 2 + 2 + 4 + 8 bytes of others."""
  sharding: Literal["none", "zero1", "zero2", "zero3"] = "zero3"
  """What is split over the devices: moments, gradients too, parameters too."""
  adapters: Beside | None = None
  """Adapters beside a frozen base, which change memory; FLOPs stay those of training
  it whole."""
  rows: int = 1
  """Texts that are served at a time."""
  cache: Literal["float32", "bfloat16"] = "bfloat16"
  """Dtype of their keys and values."""

  def __post_init__(self):
    if (self.flops is None) == (self.tokens is None):
      raise InputError("flops, tokens: give one of them.")
    if self.model is None and self.tokens is not None:
      raise InputError("tokens: needs model, whose cost is told; or give flops.")
    if self.model is None and self.counting != "all":
      raise InputError(f"counting: {self.counting!r} needs model; without it: 'all'.")
    if self.chip not in CHIPS:
      raise InputError(
        f"chip: no {self.chip!r}; the chips are {', '.join(CHIPS)}."
        f"{nearest(self.chip, CHIPS)}"
      )
    for field in ("seq_len", "devices", "rows"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")
    if not 0 < self.utilisation <= 1:
      raise InputError(f"utilisation: {self.utilisation} is not in (0, 1].")
    if self.price is not None and not 0 <= self.price < float("inf"):
      raise InputError(f"price: {self.price} is not a number from 0.")
    for field in ("flops", "tokens", "tokens_per_parameter"):
      value = vars(self)[field]
      if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{field}: {value} is not a finite number above 0.")

  def run(self) -> Found:
    """Prints the table; returns its figures."""
    found, chip = self._found(), CHIPS[self.chip]
    lines = [*self._size(found), *self._time(found, chip), *self._memory(found, chip)]
    print("\n".join([*lines, *self._serving(found, chip)]))
    return found

  def _found(self) -> Found:
    made, flops = None, self.flops
    if self.model is None:
      assert flops is not None
      rule = size = self._rule(flops)
    else:
      tokens = self.tokens
      if flops is not None:
        tokens = budget.tokens_for(
          flops, self.model, seq_len=self.seq_len, counting=self.counting
        )
      assert tokens is not None
      made = budget.compute(self.model, tokens, seq_len=self.seq_len)
      flops = made._asdict()[self.counting]
      size = Size(count.parameters(self.model).total, tokens)
      rule = self._rule(flops)
    took = budget.duration(
      flops,
      devices=self.devices,
      peak=CHIPS[self.chip].flops,
      utilisation=self.utilisation,
    )
    memory = budget.state_memory(
      size.parameters,
      STATES[self.state],
      devices=self.devices,
      stage=STAGES[self.sharding],
      adapters=self.adapters,
    )
    cost = None if self.price is None else took.cost(self.price)
    return Found(rule, size, made, took, memory, cost)

  def _rule(self, flops: float) -> Size:
    return budget.optimal(flops, tokens_per_parameter=self.tokens_per_parameter)

  def _size(self, found: Found) -> list[str]:
    lines = [
      f"rule of {self.tokens_per_parameter:g} tokens a parameter: "
      f"{_number(found.rule.parameters)} parameters, {_number(found.rule.tokens)} "
      "tokens",
    ]
    if found.compute is None:
      return [*lines, f"training: {self.flops:.3e} FLOPs by 6ND (no model, no more)"]
    size = found.size
    lines.append(
      f"this model: {_number(size.parameters)} parameters, {_number(size.tokens)} "
      f"tokens, {size.tokens / size.parameters:.1f} a parameter"
    )
    lines.append(f"training, FLOPs at {self.seq_len} tokens a sequence:")
    for name, flops in found.compute._asdict().items():
      used = "   <- counted by" if name == self.counting else ""
      lines.append(f"  {name:13} {flops:.3e}   {MEANINGS[name]}{used}")
    return lines

  def _time(self, found: Found, chip: Chip) -> list[str]:
    took = found.took
    lines = [
      f"time: {took.days:,.1f} days on {self.devices} x {chip.name} at "
      f"{self.utilisation:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s",
      f"  {took.device_hours:,.0f} device-hours, {took.device_years:,.2f} device-years",
    ]
    if found.cost is not None:
      lines.append(f"  cost: {found.cost:,.0f} at {self.price:g} a device-hour")
    return lines

  def _memory(self, found: Found, chip: Chip) -> list[str]:
    held, hbm = found.memory, chip.hbm
    parts = ", ".join(
      f"{name} {value / 1e9:,.2f}" for name, value in held._asdict().items() if value
    )
    verdict = f"leaves {(hbm - held.total) / 1e9:,.2f}"
    if held.total > hbm:
      verdict = "DOES NOT FIT: more than all"
    return [
      f"state of training on a device, GB ({self.state}, {self.sharding}; no "
      "activations):",
      f"  {held.total / 1e9:,.2f} = {parts}",
      f"  {verdict} of the {hbm / 1e9:,.1f} of one {chip.name}",
    ]

  def _serving(self, found: Found, chip: Chip) -> list[str]:
    what = "weights alone"
    if self.model is not None:
      what = f"{self.rows} x {self.seq_len} tokens in {self.cache}"
    lines = [f"serving, GB over all devices ({what}):"]
    for precision in BITS:
      if precision == "fp32":
        continue
      if self.model is None:
        total = budget.weight_bytes(found.size.parameters, precision)
        told = f"{total / 1e9:10,.2f}"
      else:
        made = budget.serving_memory(
          self.model, precision, rows=self.rows, length=self.seq_len, cache=self.cache
        )
        total = made.total
        told = (
          f"{total / 1e9:10,.2f} = weights {made.weights / 1e9:,.2f}, keys and values "
          f"{made.cache / 1e9:,.2f}"
        )
      needed = budget.devices_for(total, chip.hbm)
      lines.append(f"  {precision:5}{told}; from {needed} x {chip.name}")
    return lines


def _number(value: float) -> str:
  """Returns 8.03B for 8.03e9."""
  for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
    if value >= size:
      return f"{value / size:.2f}{unit}"
  return f"{value:,.0f}"
