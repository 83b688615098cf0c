"""Learning rate as a function of the step, as specs; `build` makes optax schedules."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxlm.errors import InputError
from jaxlm.shapes import Array

Rate = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
  """Linear warmup, then the peak."""

  peak: float
  """Learning rate after warmup."""
  warmup: int = 0
  """Steps from zero to the peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
  """Linear warmup, then half a cosine to the end of the run."""

  peak: float
  """Learning rate after warmup."""
  warmup: int = 0
  """Steps from zero to the peak."""
  final: float = 0.1
  """Share of the peak at the last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupLinear:
  """Linear warmup, then a line to the end of the run."""

  peak: float
  """Learning rate after warmup."""
  warmup: int = 0
  """Steps from zero to the peak."""
  final: float = 0.0
  """Share of the peak at the last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
  """Linear warmup, the peak, and a decay over the last share of the run (WSD)."""

  peak: float
  """Learning rate after warmup."""
  warmup: int = 0
  """Steps from zero to the peak."""
  decay: float = 0.2
  """Share of the run that decays."""
  shape: Literal["linear", "sqrt", "cosine"] = "linear"
  """How it decays; sqrt is 1 - sqrt(progress)."""
  final: float = 0.0
  """Share of the peak at the last step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt:
  """Linear warmup, then peak * sqrt(warmup / step); needs no end."""

  peak: float
  """Learning rate after warmup."""
  warmup: int
  """Steps from zero to the peak."""


Schedule = Constant | WarmupCosine | WarmupLinear | WarmupStableDecay | InverseSqrt


def build(schedule: Schedule, steps: int) -> Rate:
  """Returns step -> learning rate for a run of so many steps.

  Step s of the run (from 0) uses the value at s; warmup reaches the peak at step
  `warmup`, the decay its end at step `steps`.

  Raises:
    InputError: the warmup does not fit into the run, or a share is not one.
  """
  if schedule.warmup < 0 or schedule.warmup > steps:
    raise InputError(
      f"optimizer.lr.warmup: {schedule.warmup} is not within the run's {steps} steps."
    )
  for field, share in vars(schedule).items():
    if field in ("decay", "final") and not 0 <= share <= 1:
      raise InputError(f"optimizer.lr.{field}: {share} is not a share, from 0 to 1.")
  if schedule.peak <= 0:
    raise InputError(f"optimizer.lr.peak: {schedule.peak} is not positive.")
  match schedule:
    case Constant():
      after = optax.constant_schedule(1.0)
    case WarmupCosine(final=final):
      after = _to_end(steps - schedule.warmup, final, "cosine")
    case WarmupLinear(final=final):
      after = _to_end(steps - schedule.warmup, final, "linear")
    case WarmupStableDecay(decay=share, shape=shape, final=final):
      length = max(1, round(steps * share))
      start = max(steps - schedule.warmup - length, 0)
      tail = _to_end(min(length, steps - schedule.warmup), final, shape)
      after = optax.join_schedules([optax.constant_schedule(1.0), tail], [start])
    case InverseSqrt(warmup=warmup):
      first = max(warmup, 1)
      after = lambda step: jnp.sqrt(first / (jnp.maximum(step, 0) + first))  # noqa: E731
  parts = [optax.linear_schedule(0.0, 1.0, max(schedule.warmup, 1)), after]
  joined = optax.join_schedules(parts, [schedule.warmup])
  return lambda step: jnp.asarray(schedule.peak * joined(step), jnp.float32)


def _to_end(steps: int, final: float, shape: str) -> optax.Schedule:
  def value(step):
    progress = jnp.clip(step / max(steps, 1), 0.0, 1.0)
    match shape:
      case "cosine":
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
      case "sqrt":
        left = 1.0 - jnp.sqrt(progress)
      case _:
        left = 1.0 - progress
    return final + (1.0 - final) * left

  return value
