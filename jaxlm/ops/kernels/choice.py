"""Which kernel an attention over whole sequences gets, and why.

The only place that decides. An explicit choice that cannot be honoured raises; "auto"
takes the fastest that can do the work and gives its reason, which the run prints.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.ops.attention import (
  Prefix,
  Scoring,
  attend,
  attend_blocks,
  attend_prefixed,
)
from jaxlm.ops.kernels.cudnn import attend_cudnn
from jaxlm.ops.kernels.splash import attend_splash
from jaxlm.ops.masks import attention_mask
from jaxlm.shapes import Array, Float, Int
from jaxlm.sharding.rules import Layout

Kernel = Literal["auto", "reference", "blocks", "splash", "cudnn"]
"""auto: the fastest that can; reference: scores whole, for tests and short sequences;
blocks: in XLA, a block of scores at a time; splash: TPU; cudnn: GPU."""

NAMING = ("blocks", "splash")
"""The kernels whose remainder for the backward pass has the name `KEPT`; the others
recompute it whatever a remat policy says."""
WHOLE = 8192
"""Longest sequence whose scores or mask may stand whole, T x T."""


class Work(NamedTuple):
  """What an attention has to do; hashable."""

  scoring: Scoring
  heads: int
  kv_heads: int
  head_dim: int
  length: int
  """Positions of a sequence."""
  dtype: str
  """Of queries, keys and values."""
  prefix: int = 0
  """Keys in front that all rows and segments see."""


class Chosen(NamedTuple):
  """The kernel and the reason, a clause."""

  kernel: Literal["reference", "blocks", "splash", "cudnn"]
  reason: str


def choose(kernel: Kernel, work: Work, layout: Layout) -> Chosen:
  """Returns the kernel for this work on this mesh.

  Raises:
    InputError: the kernel that was asked for cannot do it.
  """
  if kernel == "auto":
    fused = {"tpu": "splash", "gpu": "cudnn"}.get(_platform(layout))
    if fused is None:
      return Chosen("blocks", f"no fused kernel for {_platform(layout)}")
    refused = _REFUSALS[fused](work, layout)
    if refused is None:
      return Chosen(fused, f"the devices are {_platform(layout)}")  # type: ignore[arg-type]
    return Chosen("blocks", f"not {fused}: {refused}")
  refused = _REFUSALS[kernel](work, layout)
  if refused is not None:
    raise InputError(
      f"attention: {kernel!r} cannot be used: {refused}. Use 'auto', which takes what "
      "can do the work and prints it."
    )
  return Chosen(kernel, "asked for")


def _platform(layout: Layout) -> str:
  return layout.mesh.devices.flat[0].platform


def _splash(work: Work, layout: Layout) -> str | None:
  if _platform(layout) != "tpu":
    return f"it runs on TPU, and the devices are {_platform(layout)}"
  if work.scoring.slopes is not None:
    return "it has no ALiBi"
  if work.prefix:
    return f"no prefix of {work.prefix} keys can stand before all its segments"
  if work.length % 128:
    return f"a sequence of {work.length} is no multiple of 128"
  if work.head_dim % 64:
    return f"head_dim {work.head_dim} is no multiple of 64"
  return _whole_sequences(layout) or _heads(work, layout)


def _cudnn(work: Work, layout: Layout) -> str | None:
  if _platform(layout) != "gpu":
    return f"it runs on GPU, and the devices are {_platform(layout)}"
  if work.scoring.slopes is not None:
    return "its ALiBi has other slopes"
  if work.scoring.softcap is not None:
    return "it has no softcap on scores"
  if work.prefix:
    return f"no prefix of {work.prefix} keys can stand before all its segments"
  if work.dtype != "bfloat16":
    return f"it computes in bfloat16, and precision.compute is {work.dtype}"
  if work.head_dim % 8 or work.head_dim > 128:
    return f"head_dim {work.head_dim} is not a multiple of 8 up to 128"
  if work.length > WHOLE:
    return (
      f"documents share rows, which it takes as a T x T mask, and {work.length} "
      f"positions are over {WHOLE}"
    )
  return _whole_sequences(layout) or _heads(work, layout)


def _reference(work: Work, layout: Layout) -> str | None:
  del layout
  if work.length > WHOLE:
    return f"it holds T x T scores, and {work.length} positions are over {WHOLE}"
  return None


def _whole_sequences(layout: Layout) -> str | None:
  if layout.size("sequence") > 1:
    return f"the mesh splits sequences over {layout.rules.sequence}"
  return None


def _heads(work: Work, layout: Layout) -> str | None:
  """Says whether each device has whole groups of heads, or a part of one group."""
  rules = layout.rules
  if set(rules.kv_heads) - set(rules.heads):
    return f"sharding.kv_heads {rules.kv_heads} splits what sharding.heads does not"
  queries = work.heads // layout.size("heads")
  apart = layout.size("heads") // layout.size("kv_heads")
  group = work.heads // work.kv_heads
  if apart > 1 and queries % group and group % queries:
    return f"{queries} query heads of a device cut through groups of {group}"
  return None


_REFUSALS: dict[str, Callable[[Work, Layout], str | None]] = {
  "reference": _reference,
  "blocks": lambda work, layout: None,
  "splash": _splash,
  "cudnn": _cudnn,
}


def attend_sequences(
  kernel: Kernel,
  work: Work,
  layout: Layout,
  qkv: tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]],
  places: tuple[Int[Array, "B T"], Int[Array, "B T"]],
  prefix: Prefix | None = None,
) -> Float[Array, "B T H K"]:
  """Causal attention of sequences over themselves by the kernel of `choose`.

  `places` are positions, which grow by one within a segment, and segments, whose
  tokens stand together.
  """
  positions_BT, segments_BT = places
  match choose(kernel, work, layout).kernel:
    case "splash":
      return attend_splash(work.scoring, layout, qkv, segments_BT)
    case "cudnn":
      return attend_cudnn(work.scoring, layout, qkv, segments_BT)
    case "blocks":
      if prefix is None:
        return attend_blocks(work.scoring, *qkv, positions_BT, segments_BT)
      return attend_prefixed(work.scoring, qkv, places, prefix)
    case "reference":
      return _whole(work.scoring, qkv, places, prefix)


def _whole(
  scoring: Scoring,
  qkv: tuple[Array, Array, Array],
  places: tuple[Array, Array],
  prefix: Prefix | None,
) -> Array:
  """Returns attention with all its scores at once."""
  (q_BTHK, k_BSGK, v_BSGK), (positions_BT, segments_BT) = qkv, places
  mask_BTS = attention_mask(
    positions_BT,
    positions_BT,
    window=scoring.window,
    segments_BT=segments_BT,
    key_segments_BS=segments_BT,
  )
  keys_BS = positions_BT
  if prefix is not None:
    ahead_BS = prefix.positions(len(q_BTHK))
    seen_BTS = attention_mask(positions_BT, ahead_BS, window=scoring.window)
    mask_BTS = jnp.concatenate((seen_BTS, mask_BTS), 2)
    keys_BS = jnp.concatenate((ahead_BS, keys_BS), 1)
    k_BSGK, v_BSGK = (
      jnp.concatenate(pair, 1)
      for pair in zip(
        prefix.rows(len(q_BTHK), k_BSGK.dtype), (k_BSGK, v_BSGK), strict=True
      )
    )
  distance_BTS = positions_BT[:, :, None] - keys_BS[:, None]
  return attend(scoring, q_BTHK, k_BSGK, v_BSGK, mask_BTS, distance_BTS)
