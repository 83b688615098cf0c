"""A teacher's distribution of each token as an objective.

Logits of student and teacher exist for one chunk of positions at a time, in the forward
and in the backward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, head_weight
from jaxlm.ops.attention import soft_cap
from jaxlm.ops.weights import einsum
from jaxlm.posttrain.divergence import Divergence, divergence, from_top_k
from jaxlm.shapes import Array, PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.training.objective import Batch, Field, Frozen, Ratio, Task, Terms

TEACHER = "teacher"
"""The name of its frozen parameters."""
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"
Rows = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
  """Learns the distributions that a teacher gives to the tokens of the data."""

  teacher: str
  """A pretrained model with the student's ids, in whatever `initial` takes."""
  divergence: Divergence = dataclasses.field(default_factory=Divergence)
  """How far the student is from it."""
  nll: float = 0.0
  """Weight of the cross-entropy with the data itself beside the divergence."""
  top_k: int = 0
  """0: the teacher runs beside the student in every step. Else its so many largest
  log-probabilities are stored beside the data before the first step, 8 bytes each at
  every token, and what is left of them is one more bucket."""
  chunk: int = 128
  """Positions of each row whose logits are held at a time."""

  def __post_init__(self):
    if self.chunk < 1:
      raise InputError(f"objective.chunk: {self.chunk} is not positive.")
    if not self.nll >= 0:
      raise InputError(f"objective.nll: {self.nll} is negative.")
    if self.top_k < 0:
      raise InputError(f"objective.top_k: {self.top_k} is negative.")
    if self.top_k and self.divergence.kind != "forward":
      raise InputError(
        f"objective.top_k: {self.top_k} with divergence.kind={self.divergence.kind}, "
        "which needs the teacher's whole distribution: give 0, or kind=forward."
      )


class Teacher(NamedTuple):
  """A model that gives logits and does not learn."""

  decoder: Decoder
  shapes: PyTree
  """Of its parameters, a ShapeDtypeStruct with its sharding for each."""
  load: Callable[[], PyTree]
  """Gives them."""


def fields(spec: Distill) -> tuple[Field, ...]:
  """Returns what is stored of the teacher beside the data."""
  if not spec.top_k:
    return ()
  inner = (spec.top_k,)
  return Field(IDS, "int32", inner), Field(LOG_PROBS, "float32", inner)


def task(spec: Distill, decoder: Decoder, teacher: Teacher) -> Task:
  """Returns the task.

  Metrics: divergence and nll in nats a token, and agreement, the share of tokens at
  which both hold the same next one likeliest.
  """

  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    del rng
    student = _Head.of(decoder, params)
    rows = {"x": _stream(decoder, params, batch), "targets": batch["targets"]}
    beside: _Head | None = None
    if spec.top_k:
      rows |= {name: batch[name] for name in (IDS, LOG_PROBS)}
    else:
      frozen = jax.lax.stop_gradient(batch["frozen"][TEACHER])
      rows["y"] = _stream(teacher.decoder, frozen, batch)
      beside = _Head.of(teacher.decoder, frozen)
    found = over_chunks(
      decoder.layout, spec.chunk, lambda rows: _chunk(spec, student, beside, rows), rows
    )
    weights_BT = batch["weights"]
    tokens = jnp.sum(weights_BT)
    sums = {name: jnp.sum(values * weights_BT) for name, values in found.items()}
    total = sums["divergence"] + spec.nll * sums["nll"]
    sums = jax.lax.stop_gradient(sums)
    return Terms(total, tokens, {name: Ratio(s, tokens) for name, s in sums.items()})

  frozen = () if spec.top_k else (Frozen(TEACHER, teacher.shapes),)
  return Task(objective, fields=fields(spec), frozen=frozen)


def top_log_probs(
  spec: Distill, decoder: Decoder, params: PyTree, batch: Batch
) -> Rows:
  """Returns the fields that are stored of a teacher for a batch, [B, T, K]."""
  head = _Head.of(decoder, params)

  def chunk(rows: Rows) -> Rows:
    logits = head.logits(rows["x"]) / spec.divergence.temperature
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), spec.top_k)
    return {IDS: ids, LOG_PROBS: values}

  rows = {"x": _stream(decoder, params, batch)}
  return over_chunks(decoder.layout, spec.chunk, chunk, rows)


class _Head(NamedTuple):
  """From the residual stream to logits."""

  layout: Layout
  weight_DV: Array
  softcap: float | None

  @classmethod
  def of(cls, decoder: Decoder, params: PyTree) -> "_Head":
    """Returns the head, gathered once for all chunks.

    In float32, so that its gradient is summed over the chunks in float32.
    """
    weight_DV = head_weight(decoder.spec, params).astype(jnp.float32)
    weight_DV = decoder.layout.constrain(weight_DV, None, "vocab")
    return cls(decoder.layout, weight_DV, decoder.spec.softcap)

  def logits(self, x_BSCD: Array) -> Array:
    """Returns float32 logits of a chunk."""
    raw = einsum("BSCD,DV->BSCV", x_BSCD, self.weight_DV, result=jnp.float32)
    split = self.layout.constrain(raw, "batch", "sequence", None, "vocab")
    return soft_cap(split, self.softcap)


def _stream(decoder: Decoder, params: PyTree, batch: Batch) -> Array:
  x_BTD, _ = decoder.apply(
    {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
  )
  return x_BTD


def _chunk(spec: Distill, student: _Head, teacher: _Head | None, rows: Rows) -> Rows:
  """Returns the divergence, the nll and whether both agree, at each token."""
  student_BSCV = student.logits(rows["x"])
  if teacher is None:
    ids, log_probs = rows[IDS], rows[LOG_PROBS]
    first = ids[..., 0]
    stored = jax.vmap(jax.vmap(lambda *a: from_top_k(spec.divergence, *a)))
    apart = stored(student_BSCV, ids, log_probs)
  else:
    teacher_BSCV = teacher.logits(rows["y"])
    first = jnp.argmax(teacher_BSCV, axis=-1)
    apart = divergence(spec.divergence, student_BSCV, teacher_BSCV)
  # By a mask: to take one logit along a split vocabulary would gather all of it.
  ids_BSCV = jax.lax.broadcasted_iota(jnp.int32, student_BSCV.shape, 3)
  hit = ids_BSCV == rows["targets"][..., None]
  target = jnp.sum(jnp.where(hit, student_BSCV, 0.0), axis=-1)
  agreed = jnp.argmax(student_BSCV, axis=-1) == first
  return {
    "divergence": apart,
    "nll": jax.nn.logsumexp(student_BSCV, axis=-1) - target,
    "agreement": agreed.astype(jnp.float32),
  }


def over_chunks(
  layout: Layout, chunk: int, fn: Callable[[Rows], Rows], rows: Rows
) -> Rows:
  """Returns what a function gives for rows [B, T, ...], a chunk of positions at a time.

  `fn` takes and gives [B, S, C, ...]: every one of the S devices along the sequence has
  C positions of its own in a chunk. What it computes is made again for its gradient.
  """
  B, T = next(iter(rows.values())).shape[:2]
  S = layout.size("sequence")
  C = min(chunk, T // S)
  pad = -(T // S) % C

  def split(a: Array) -> Array:
    a = a.reshape(B, S, T // S, *a.shape[2:])
    a = jnp.pad(a, ((0, 0), (0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 3))
    a = jnp.moveaxis(a.reshape(B, S, -1, C, *a.shape[3:]), 2, 0)
    return layout.constrain(a, None, "batch", "sequence", *(None,) * (a.ndim - 3))

  def join(a: Array) -> Array:
    a = jnp.moveaxis(a, 0, 2).reshape(B, S, -1, *a.shape[4:])[:, :, : T // S]
    joined = a.reshape(B, T, *a.shape[3:])
    return layout.constrain(joined, "batch", "sequence", *(None,) * (joined.ndim - 2))

  made = jax.lax.map(jax.checkpoint(fn), jax.tree.map(split, rows))
  return jax.tree.map(join, made)
