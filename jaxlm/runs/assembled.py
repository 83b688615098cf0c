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
from jaxlm.peft.base import Base, base_of
from jaxlm.posttrain import objectives
from jaxlm.posttrain.distill import Distill, Teacher
from jaxlm.runs.teacher import open_teacher
from jaxlm.shapes import PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import BASE, Frozen, Task, over_base
from jaxlm.training.state import First, Plan, Trained, TrainState, axes_of, create
from jaxlm.training.step import Step, compile_step, make_step

if TYPE_CHECKING:
  from jaxlm.runs.train import Train


class Assembled(NamedTuple):
  """A model on its layout with its optimizer, and the step that trains it."""

  decoder: Decoder
  optimizer: optimizers.Built
  plan: Plan
  first_state: Callable[[PyTree | None], TrainState]
  """Makes the state of the model's parameters, or draws them."""
  task: Task
  scored: Task
  """The task as it is evaluated: without draws of adapters."""
  step: Step
  batch: dict[str, Any]
  """A ShapeDtypeStruct for each array of a batch."""
  teacher: Teacher | None
  base: Base | None
  """Where adapters train: they, and what stays frozen."""

  def whole(self, params: PyTree, frozen: dict[str, PyTree]) -> PyTree:
    """Returns what the decoder takes of what the state holds and what is frozen."""
    if self.base is None:
      return params
    return self.base.attached(frozen[BASE], params)


def assemble(run: "Train", layout: Layout) -> Assembled:
  """Returns the parts of a run.

  Raises:
    InputError: the layout, the table of remat or the adapters cannot be honoured, or
      the teacher does not fit.
  """
  decoder = Decoder(run.model, run.precision, layout, run.remat, run.attention)
  base, trained, axes = None, None, axes_of(decoder)
  if run.adapters is not None:
    base = base_of(run.adapters, run.also, run.quantized, decoder)
    axes, tuning = base.tuning.axes, base.tuning
    trained = Trained(
      axes, lambda key, params: tuning.init(params, key), (base.shapes, base.frozen)
    )
  _check_kept(decoder, run.data.seq_len, 0 if base is None else base.prefix)
  optimizer = optimizers.build(run.optimizer, run.steps, axes)
  plan, first_state = create(
    decoder,
    optimizer.transform,
    First(run.seed, run.init_scale),
    ema=run.ema is not None,
    moments=run.moments,
    trained=trained,
  )
  teacher = None
  if isinstance(run.objective, Distill):
    teacher = open_teacher(run.objective, decoder, run.data.seq_len)
  task = scored = objectives.build(run.objective, decoder, run.data.per_row, teacher)
  if base is not None:
    part = Frozen(BASE, base.frozen)
    beside = task._replace(frozen=(*task.frozen, part))
    attach = base.tuning.attach
    task, scored = (over_base(beside, attach, draws=draws) for draws in (True, False))
  step = make_step(
    task,
    optimizer,
    micro_batches=run.accumulate,
    ema_decay=run.ema,
  )
  batch = batch_shapes(run.data, task)
  return Assembled(
    decoder, optimizer, plan, first_state, task, scored, step, batch, teacher, base
  )


def _check_kept(decoder: Decoder, seq_len: int, prefix: int) -> None:
  """Raises InputError where a table keeps what an attention kernel does not name."""
  if not isinstance(decoder.remat, Keep) or decoder.remat.attention == "recompute":
    return
  for mixer in dict.fromkeys(block.mixer for block in decoder.spec.blocks):
    work = work_of(mixer, seq_len, decoder.precision.compute, prefix)
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
  frozen = {part.name: part.shapes for part in task.frozen}
  return shapes | ({"frozen": frozen} if frozen else {})
