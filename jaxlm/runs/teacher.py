"""Opens the teacher of a distillation on the student's mesh."""

import jax

from jaxlm.errors import InputError
from jaxlm.interop import stream
from jaxlm.interop.checkpoint import open_model
from jaxlm.interop.progress import bar
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision, for_length
from jaxlm.posttrain.distill import Distill, Teacher
from jaxlm.shapes import PyTree

FIELD = "objective.teacher"


def open_teacher(spec: Distill, student: Decoder, seq_len: int) -> Teacher:
  """Returns the teacher; its parameters are read when they are asked for.

  Raises:
    InputError: there is no model, or it has no logits over the student's ids.
  """
  opened = open_model(spec.teacher, FIELD)
  told = opened.model
  if told.scores is not None:
    raise InputError(f"{FIELD}: {opened.place} is a reward model; it has no logits.")
  if told.vocab != student.spec.vocab:
    raise InputError(
      f"{FIELD}: {opened.place} has {told.vocab} ids and the student (model.vocab) "
      f"{student.spec.vocab}. Both must have the same, from the same tokenizer."
    )
  if spec.top_k > told.vocab:
    raise InputError(f"objective.top_k: {spec.top_k} of {told.vocab} ids.")
  decoder = Decoder(
    for_length(told, seq_len),
    Precision(params=opened.dtype, compute=student.precision.compute),
    student.layout,
    attention=student.attention,
  )
  plan = stream.Plan.of(decoder)
  shapes = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    plan.shapes,
    plan.shardings,
  )

  def load() -> PyTree:
    with bar("teacher", decoder.spec) as tell:
      return opened.params(decoder, tell)

  return Teacher(decoder, shapes, load)
