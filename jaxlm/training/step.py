"""The training step: state, batch -> state, metrics; one jit for every objective."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxlm.shapes import Array, PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import Batch, Ratio, Sums, Task, Terms
from jaxlm.training.state import Plan, TrainState, on_device

T = TypeVar("T")
Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
  task: Task,
  optimizer: optimizers.Built,
  *,
  micro_batches: int = 1,
  ema_decay: float | None = None,
) -> Step:
  """Returns the pure step.

  Numerators, denominators and gradients are summed over micro-batches and devices
  before anything is divided, so neither accumulation nor packing changes the loss.
  Metrics: loss, grad_norm, lr and the objective's own, all float32 scalars.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    rng = jax.random.fold_in(state.rng, state.step)
    terms, grads = accumulate(task, state.params, batch, rng, micro_batches)
    grads = jax.tree.map(lambda g: g / terms.denominator, grads)
    updates, opt_state = optimizer.transform.update(
      grads, state.opt_state, state.params
    )
    params = optimizers.moved(state.params, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
      ema = optimizers.decayed(params, ema, ema_decay)
    metrics = ratios(terms) | {
      "grad_norm": optimizers.norm(grads),
      "lr": jnp.asarray(optimizer.schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, state.rng, ema), metrics

  return step


def accumulate(
  task: Task, params: PyTree, batch: Batch, rng: Array, micro_batches: int
) -> tuple[Terms, PyTree]:
  """Returns the summed terms and the gradient of the summed numerator, in float32.

  Row r of the batch belongs to micro-batch r mod `micro_batches`, so each device keeps
  its own rows.
  """

  def numerator(params: PyTree, batch: Batch, rng: Array) -> tuple[Array, Terms]:
    terms = task.objective(params, batch, rng)
    return terms.numerator, terms

  def gradient(batch: Batch, rng: Array) -> tuple[Terms, PyTree]:
    grads, terms = jax.grad(numerator, has_aux=True)(params, batch, rng)
    return terms, optimizers.in_float32(grads)

  if micro_batches == 1:
    return gradient(batch, rng)

  def split(a: Array) -> Array:
    return jnp.moveaxis(a.reshape(-1, micro_batches, *a.shape[1:]), 1, 0)

  frozen = {"frozen": batch["frozen"]} if "frozen" in batch else {}
  rows = jax.tree.map(split, {n: a for n, a in batch.items() if n not in frozen})
  shared: Sums = {}
  if task.shared is not None:
    sums = partial(task.shared, params)
    shared = _summed(lambda rows: sums(rows | frozen), rows)

  def with_shared(rows: Batch, rng: Array) -> tuple[Terms, PyTree]:
    rows |= frozen
    return gradient(rows | {"shared": shared} if shared else rows, rng)

  return _summed(
    lambda micro: with_shared(*micro), (rows, jax.random.split(rng, micro_batches))
  )


def _summed(fn: Callable[[Any], T], batches: Any) -> T:
  """Returns the sum of a function over the leading axis, one call at a time."""

  def add(sums: T, batch: Any) -> tuple[T, None]:
    return jax.tree.map(jnp.add, sums, fn(batch)), None

  first = jax.tree.map(lambda a: a[0], batches)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, first))
  return jax.lax.scan(add, zeros, batches)[0]


def ratios(terms: Terms) -> Metrics:
  """Returns the loss and the metrics, each sum divided by its own count."""

  def divide(ratio: Ratio) -> Array:
    # A metric may have nothing to count in this batch.
    return ratio.numerator / jnp.maximum(ratio.denominator, 1e-9)

  loss = terms.numerator / terms.denominator
  return {"loss": loss} | {name: divide(r) for name, r in terms.metrics.items()}


def compile_step(
  step: Step,
  plan: Plan,
  layout: Layout,
  batch: Any,
  options: dict[str, Any] | None = None,
):
  """Returns the step compiled for a plan; the state's buffers are given away.

  `batch` holds a ShapeDtypeStruct for each array: rows, or with a sharding of its own;
  `options` go to the compiler.
  """
  rows = layout.sharding("batch", "sequence")
  shardings = jax.tree.map(lambda leaf: leaf.sharding or rows, batch)

  def from_plan(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    return step(on_device(state, plan.shardings), batch)

  jitted = jax.jit(
    from_plan,
    in_shardings=(plan.shardings, shardings),
    out_shardings=(plan.shardings, None),
    donate_argnums=0,
  )
  return jitted.lower(plan.shapes, batch).compile(compiler_options=options or None)
