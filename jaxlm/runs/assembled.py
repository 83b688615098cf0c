"""What a training run and its plan share: all that needs no data and no device."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.data.spec import Data
from jaxlm.errors import InputError
from jaxlm.launch import xla
from jaxlm.models.attention import work_of
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Keep
from jaxlm.ops.kernels.choice import NAMING, choose
from jaxlm.posttrain import objectives
from jaxlm.posttrain.distill import Distill, Teacher
from jaxlm.runs.teacher import open_teacher
from jaxlm.shapes import PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import Task
from jaxlm.training.state import Plan, TrainState, axes_of, create
from jaxlm.training.step import Step, compile_step, make_step

if TYPE_CHECKING:
  from jaxlm.runs.train import Train


class Assembled(NamedTuple):
  """A model on its layout with its optimizer, and the step that trains it."""

  decoder: Decoder
  optimizer: optimizers.Built
  plan: Plan
  first_state: Callable[[], TrainState]
  task: Task
  step: Step
  batch: dict[str, Any]
  """A ShapeDtypeStruct for each array of a batch."""
  teacher: Teacher | None = None


def assemble(
  run: "Train", layout: Layout, load: Callable[[Decoder], PyTree] | None = None
) -> Assembled:
  """Returns the parts of a run; `load` gives first parameters for a decoder.

  Raises:
    InputError: the layout or the table of remat cannot be honoured, or the teacher
      does not fit.
  """
  decoder = Decoder(run.model, run.precision, layout, run.remat, run.attention)
  _check_kept(decoder, run.data.seq_len)
  optimizer = optimizers.build(run.optimizer, run.steps, axes_of(decoder))
  plan, first_state = create(
    decoder,
    optimizer.transform,
    run.seed,
    ema=run.ema is not None,
    moments=run.moments,
    load=None if load is None else lambda: load(decoder),
  )
  teacher = None
  if isinstance(run.objective, Distill):
    teacher = open_teacher(run.objective, decoder, run.data.seq_len)
  task = objectives.build(run.objective, decoder, run.data.per_row, teacher)
  step = make_step(
    task,
    optimizer,
    micro_batches=run.accumulate,
    ema_decay=run.ema,
  )
  batch = batch_shapes(run.data, task)
  return Assembled(decoder, optimizer, plan, first_state, task, step, batch, teacher)


def _check_kept(decoder: Decoder, seq_len: int) -> None:
  """Raises InputError where a table keeps what an attention kernel does not name."""
  if not isinstance(decoder.remat, Keep) or decoder.remat.attention == "recompute":
    return
  for mixer in dict.fromkeys(block.mixer for block in decoder.spec.blocks):
    work = work_of(mixer, seq_len, decoder.precision.compute)
    kernel = choose(decoder.attention, work, decoder.layout).kernel
    if kernel not in NAMING:
      raise InputError(
        f"remat.attention: {decoder.remat.attention!r} cannot be honoured: attention "
        f"is by {kernel}, which always recomputes. Use 'recompute', or attention= one "
        f"of {', '.join(NAMING)}."
      )


def compiled(parts: Assembled, options: dict[str, str | bool]) -> Any:
  """Returns the step compiled with options for the compiler.

  Raises:
    InputError: the compiler refuses an option.
  """
  layout = parts.decoder.layout
  with xla.explained():
    return compile_step(parts.step, parts.plan, layout, parts.batch, options)


def batch_shapes(data: Data, task: Task) -> dict[str, Any]:
  """Returns the shapes of a batch: what the loader makes, and the frozen parameters."""
  ints = ("tokens", "targets", "segments", "positions")
  dtypes = dict.fromkeys(ints, jnp.int32) | {"weights": jnp.float32} | data.extras
  rows = (data.batch, data.seq_len)
  shapes: dict[str, Any] = {
    name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in dtypes.items()
  }
  for field in task.fields:
    shapes[field.name] = jax.ShapeDtypeStruct((*rows, *field.inner), field.dtype)
  return shapes | ({} if task.frozen is None else {"frozen": task.frozen.shapes})
