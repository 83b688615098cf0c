"""Rotary positions in a config.json, in both of the forms that are about.

`rope_theta` and `rope_scaling` until transformers 4, `rope_parameters` since. The older
form is written, for both read it.
"""

import dataclasses
import math
from typing import Any

from jaxlm.interop.keys import Config, Fields, Key
from jaxlm.models.families.shape import Shape
from jaxlm.models.spec import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  RoPE,
  Scaling,
  YaRNScaling,
)

ORIGINAL = "original_max_position_embeddings"


def rope(base: float = 10_000.0) -> Key:
  """Returns the keys of rotary positions that all layers share."""

  def read(config: Config) -> Fields:
    found = _either(config, base)
    if found.fraction != 1:
      why = "rope_parameters.partial_rotary_factor: here all of a head turns."
      raise config.refuse("rope_parameters", why)
    return {"rope": found}

  return Key(read, lambda shape: _write(shape.rope or RoPE()))


def _either(config: Config, base: float) -> RoPE:
  inside = config.inside("rope_parameters", None)
  if inside is None:
    return _older(config, base)
  config.take("rope_theta", None)
  older = config.take("rope_scaling", None)
  if older not in (None, config.values["rope_parameters"]):
    raise config.refuse("rope_scaling", "rope_parameters stands too; give one of them.")
  return _read(inside, config, base)


def partial_rope(base: float = 10_000.0) -> Key:
  """Returns the keys where a part of a head may turn, and LongRoPE may be used."""

  def read(config: Config) -> Fields:
    config.take(ORIGINAL, None)
    found = _either(config, base)
    outer = config.take("partial_rotary_factor", None)
    if outer is not None:
      found = dataclasses.replace(found, fraction=float(outer))
    inside = config.values.get("rope_parameters") or config.values.get("rope_scaling")
    kinds = {"default", "longrope", "su"}
    if inside and inside.get("rope_type", inside.get("type", "default")) not in kinds:
      raise config.refuse("rope_scaling", "here only longrope is built.")
    return {"rope": found}

  def write(shape: Shape) -> Fields:
    rope = shape.rope or RoPE()
    keys: Fields = {"partial_rotary_factor": rope.fraction}
    if isinstance(rope.scaling, LongScaling):
      keys[ORIGINAL] = rope.scaling.original_length
    return keys | _write(rope)

  return Key(read, write)


def two_ropes(base: float, local_base: float) -> Key:
  """Returns the keys where layers with a window have a rotary base of their own."""

  def read(config: Config) -> Fields:
    both = config.inside("rope_parameters", None)
    if both is None:
      local = float(config.take("rope_local_base_freq", local_base))
      return {"rope": _older(config, base), "local_rope": RoPE(base=local)}
    ropes = {}
    kinds = (("rope", "full", base), ("local_rope", "sliding", local_base))
    for ours, theirs, usual in kinds:
      one = both.inside(f"{theirs}_attention")
      ropes[ours] = RoPE(base=usual) if one is None else _read(one, config, usual)
    both.finish()
    return ropes

  def write(shape: Shape) -> Fields:
    local = shape.local_rope or shape.rope or RoPE()
    keys = _write(shape.rope or RoPE())
    return keys | {"rope_local_base_freq": local.base}

  return Key(read, write)


def _older(config: Config, base: float) -> RoPE:
  theta = float(config.take("rope_theta", base))
  inside = config.inside("rope_scaling", None)
  scaling = None if inside is None else _scaling(inside, config)
  return RoPE(base=theta, scaling=scaling)


def _read(inside: Config, config: Config, base: float) -> RoPE:
  theta = float(inside.take("rope_theta", base))
  fraction = float(inside.take("partial_rotary_factor", 1.0))
  return RoPE(base=theta, fraction=fraction, scaling=_scaling(inside, config))


def _number(inside: Config, key: str) -> float:
  return float(inside.take(key))


def _given(inside: Config, key: str) -> float | None:
  value = inside.take(key, None)
  return None if value is None else float(value)


def _scaling(inside: Config, config: Config) -> Scaling | None:
  kind = inside.take("rope_type", inside.take("type", "default"))
  inner = inside.take(ORIGINAL, None)
  length: Any = config.values.get(ORIGINAL) or inner
  scaling: Scaling | None = None
  match kind:
    case "default":
      inside.take("factor", None)
    case "linear":
      scaling = LinearScaling(factor=_number(inside, "factor"))
    case "llama3":
      scaling = Llama3Scaling(
        factor=_number(inside, "factor"),
        original_length=length or inside.take(ORIGINAL),
        low_frequency=_number(inside, "low_freq_factor"),
        high_frequency=_number(inside, "high_freq_factor"),
      )
    case "yarn":
      if inside.take("truncate", True) is not True:
        raise inside.refuse("truncate", "only true is built.")
      scaling = YaRNScaling(
        factor=_number(inside, "factor"),
        original_length=length or config.take("max_position_embeddings"),
        beta_fast=_given(inside, "beta_fast") or 32.0,
        beta_slow=_given(inside, "beta_slow") or 1.0,
        magnitude=_given(inside, "attention_factor"),
      )
    case "longrope" | "su":
      scaling = _long(inside, config, length)
    case _:
      known = "default, linear, llama3, yarn and longrope"
      raise inside.refuse("rope_type", f"known are {known}.")
  inside.finish()
  return scaling


def _long(inside: Config, config: Config, original: Any) -> LongScaling:
  context: int = config.take("max_position_embeddings")
  original = original or context
  factor = _given(inside, "factor")
  longer = context if factor is None else factor * original
  return LongScaling(
    short=tuple(map(float, inside.take("short_factor"))),
    long=tuple(map(float, inside.take("long_factor"))),
    original_length=original,
    length=context,
    magnitude=_given(inside, "attention_factor") or magnitude(longer, original),
  )


def magnitude(context: float, original: int) -> float:
  """Returns LongRoPE's factor on sine and cosine: sqrt(1 + ln(s) / ln(original)).

  s is how many times longer the context becomes. Source: Ding et al. 2024.
  """
  longer = context / original
  return math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0


def _write(rope: RoPE) -> Fields:
  keys: Fields = {"rope_theta": rope.base, "rope_scaling": None}
  match rope.scaling:
    case LinearScaling(factor=factor):
      scaling = {"rope_type": "linear", "factor": factor}
    case Llama3Scaling() as llama:
      scaling = {
        "rope_type": "llama3",
        "factor": llama.factor,
        "low_freq_factor": llama.low_frequency,
        "high_freq_factor": llama.high_frequency,
        ORIGINAL: llama.original_length,
      }
    case YaRNScaling() as yarn:
      scaling = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        ORIGINAL: yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "attention_factor": yarn.magnitude,
      }
    case LongScaling() as long:
      scaling = {
        "type": "longrope",
        "short_factor": list(long.short),
        "long_factor": list(long.long),
      }
    case _:
      # NTK-aware scaling is a larger base; the caller's comparison refuses it.
      return keys
  return keys | {"rope_scaling": {k: v for k, v in scaling.items() if v is not None}}
