"""Several runs of one shape as one program: they differ in seed and learning rate.

The step is mapped over the runs, and several steps are one dispatch. The learning rates
of each step are data, so a program serves every schedule and every length, and is
compiled once for a shape. Every run sees the same batches.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.corpus import Corpus
from jaxlm.data.loader import Loader, in_order
from jaxlm.errors import InputError
from jaxlm.evaluation.bits_per_byte import Scores, make_evaluate
from jaxlm.launch import xla
from jaxlm.launch.chips import chip_of
from jaxlm.runs import summary
from jaxlm.runs.assembled import Assembled, assemble
from jaxlm.runs.samples import Samples
from jaxlm.shapes import Array, Float
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import check_batch
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers, schedules
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.objective import NextToken
from jaxlm.training.state import Moments, TrainState, axes_of, drawn, started
from jaxlm.training.step import make_step

if TYPE_CHECKING:
  from jaxlm.runs.train import Train

PADDED = 4096
"""Steps whose learning rates are computed at once."""


class Outcome(NamedTuple):
  """What a run of a group leaves."""

  losses: dict[int, float]
  """Training loss by step, in nats a token; past a divergence not finite."""
  scores: Scores | None
  """On the held-out text; None: the run diverged, or nothing is held out."""
  diverged_at: int | None
  """The first step whose loss, gradient or score was not finite."""
  seconds: float
  """Its share of the training of the group."""


def alike(run: "Train") -> "Train":
  """Returns a run without what a program takes as data; equal ones share it."""
  lr = schedules.Constant(peak=1.0)
  return dataclasses.replace(
    run,
    seed=0,
    steps=1,
    optimizer=dataclasses.replace(run.optimizer, lr=lr),
    evaluate_every=1,
    log_every=1,
    checkpoints=Checkpoints(),
    samples=Samples(prompts=()),
  )


def check(run: "Train") -> None:
  """Raises InputError where a run cannot be one of several in a program."""
  for field, must in (("initial", None), ("adapters", None), ("moments", Moments())):
    if getattr(run, field) != must:
      raise InputError(
        f"{field}: {getattr(run, field)}; runs of one program cannot have it. Give "
        "how=alone to the sweep."
      )
  if not 0 <= run.seed < 2**31:
    raise InputError(f"seed: {run.seed} is not in 0 <= seed < 2^31.")
  if run.mesh not in (Mesh(), Mesh(fsdp=1)):
    raise InputError(
      f"mesh: {run.mesh}; runs of one program share one device. Leave it out, or give "
      "how=alone to the sweep."
    )


class Program:
  """The compiled steps of so many runs of a shape."""

  def __init__(self, run: "Train", runs: int, dispatch: int):
    """`run` is any of them; at most `dispatch` steps are taken at a time.

    Raises:
      InputError: what `assemble` raises.
    """
    began = time.perf_counter()
    layout = Layout(make_mesh(Mesh(fsdp=1), jax.devices()[:1]), run.sharding)
    check_batch(layout, run.data.batch, run.data.seq_len, run.accumulate)
    self.parts: Assembled = assemble(run, layout)
    self._options = xla.options(
      chip_of(layout.mesh.devices.flat[0].device_kind), run.compiler
    )
    self.dispatch = dispatch
    self._run, self._axes = run, axes_of(self.parts.decoder)
    self.first = jax.jit(jax.vmap(self._draw))
    states = jax.eval_shape(self.first, jax.ShapeDtypeStruct((runs,), jnp.int32))
    batches = {
      name: jax.ShapeDtypeStruct((dispatch, *leaf.shape), leaf.dtype)
      for name, leaf in self.parts.batch.items()
    }
    rates_KR = jax.ShapeDtypeStruct((dispatch, runs), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    steps = jax.jit(self._steps, donate_argnums=0)
    with run.products(), xla.explained():
      self.lowered = steps.lower(states, rates_KR, batches, count)
      self.steps = self.lowered.compile(compiler_options=self._options or None)
    self.compile_seconds = time.perf_counter() - began
    self._scores: Any = None

  def describe(self) -> str:
    """Returns what was chosen, as a run says it at its start."""
    parts, run = self.parts, self._run
    return "\n".join(
      [
        summary.describe_rules(run.optimizer, parts.plan.shapes.params, run.init_scale),
        summary.describe_attention(parts.decoder, run.data.seq_len),
        f"remat: {run.remat}; parameters {run.precision.params}, computation "
        f"{run.precision.compute}",
        xla.describe(self._options),
        f"compiled in {self.compile_seconds:.1f} s",
      ]
    )

  def _draw(self, seed: Array) -> TrainState:
    key, rng = jax.random.split(jax.random.key(seed))
    params = drawn(self.parts.decoder, key, self._run.init_scale)
    average = self._run.ema is not None
    return started(params, self.parts.optimizer.transform, rng, ema=average)

  def _one(self, state: TrainState, rate: Array, batch: Any) -> Any:
    """Returns the state after a step, and its loss: NaN where the gradient is none."""
    run = self._run
    optimizer = optimizers.at_rate(run.optimizer, lambda _: rate, self._axes)
    step = make_step(
      self.parts.task, optimizer, micro_batches=run.accumulate, ema_decay=run.ema
    )
    state, metrics = step(state, batch)
    finite = jnp.isfinite(metrics["grad_norm"])
    return state, jnp.where(finite, metrics["loss"], jnp.nan)

  def _steps(
    self, states: TrainState, rates_KR: Array, batches: Any, count: Array
  ) -> tuple[TrainState, Float[Array, "K R"]]:
    """Takes `count` steps, at most K; losses past them are 0."""

    def take(i: Any, carry: Any) -> Any:
      states, losses_KR = carry
      batch = jax.tree.map(lambda leaf: leaf[i], batches)
      states, loss_R = jax.vmap(self._one, (0, 0, None))(states, rates_KR[i], batch)
      return states, losses_KR.at[i].set(loss_R)

    return jax.lax.fori_loop(0, count, take, (states, jnp.zeros_like(rates_KR)))

  def scores(self, state: TrainState, corpus: Corpus) -> Scores | None:
    """Returns the scores of a run on the held-out text, if there is any."""
    data = self._run.data
    if not any(len(rows) for rows in corpus.held_out):
      return None
    if self._scores is None:
      lengths = np.zeros(self._run.model.vocab, np.int32)
      lengths[: corpus.tokenizer.vocab] = corpus.tokenizer.byte_lengths()
      objective = self._run.objective
      assert isinstance(objective, NextToken)
      self._scores = make_evaluate(self.parts.decoder, lengths, chunk=objective.chunk)
    params = state.params if state.ema is None else state.ema
    with self._run.products():
      return self._scores(params, in_order(corpus.held_out, data.batch))


def train(
  program: Program,
  runs: Sequence["Train"],
  corpus: Corpus,
  say: Callable[[int, np.ndarray], None],
) -> list[Outcome]:
  """Trains runs of one shape and one length from their first step to their last.

  `say(step, losses [R])` is called after each dispatch.

  Raises:
    InputError: a schedule does not fit its run.
  """
  began, data, steps = time.perf_counter(), runs[0].data, runs[0].steps
  rates_SR = np.stack([_rates(run) for run in runs], axis=1)
  states = program.first(jnp.asarray([run.seed for run in runs], jnp.int32))
  found: list[np.ndarray] = []
  late: tuple[int, int, Array] | None = None

  def report() -> None:
    if late is not None:
      first, count, losses_KR = late
      found.append(np.asarray(losses_KR)[:count])
      say(first + count, found[-1][-1])

  with Loader(corpus, data, rows=range(data.batch), start=0) as loader:
    for first in range(0, steps, program.dispatch):
      count = min(program.dispatch, steps - first)
      rows = [next(loader) for _ in range(count)]
      rows += rows[-1:] * (program.dispatch - count)
      batches = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
      rates_KR = np.zeros((program.dispatch, len(runs)), np.float32)
      rates_KR[:count] = rates_SR[first : first + count]
      states, losses_KR = program.steps(states, rates_KR, batches, np.int32(count))
      report()
      late = (first, count, losses_KR)
    report()
  losses_SR = np.concatenate(found)
  seconds = (time.perf_counter() - began) / len(runs)
  outcomes = []
  for r in range(len(runs)):
    bad = np.flatnonzero(~np.isfinite(losses_SR[:, r]))
    diverged_at = int(bad[0]) + 1 if len(bad) else None
    scores = None
    if diverged_at is None:
      state = jax.tree.map(lambda leaf, at=r: leaf[at], states)
      scores = program.scores(state, corpus)
      if scores is not None and not all(map(math.isfinite, scores.values())):
        diverged_at, scores = steps, None
    losses = dict(enumerate(map(float, losses_SR[:, r]), 1))
    outcomes.append(Outcome(losses, scores, diverged_at, seconds))
  return outcomes


def _rates(run: "Train") -> np.ndarray:
  """Returns the learning rate of every step, float32 as a step alone would have it."""
  schedule = schedules.build(run.optimizer.lr, run.steps)
  # Of one length for most runs: jax compiles each operation for each length.
  padded = -(-run.steps // PADDED) * PADDED
  return np.asarray(jax.vmap(schedule)(jnp.arange(padded)), np.float32)[: run.steps]
