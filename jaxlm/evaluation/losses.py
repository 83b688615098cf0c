"""Held-out loss and metrics of any objective."""

import math
from collections.abc import Callable, Iterable

import jax

from jaxlm.errors import InputError
from jaxlm.shapes import Array, PyTree
from jaxlm.training.objective import Task, Terms

Scores = dict[str, float]


def make_evaluate_task(
  task: Task,
) -> Callable[[PyTree, Iterable[dict[str, Array]]], Scores]:
  """Returns a function from parameters and batches to scores over all of the batches.

  Scores are the loss and the objective's metrics, but for those that nothing held out
  counts for; without anything to score it raises
  InputError. What a loss takes of a whole batch, it takes of each of these.
  """

  @jax.jit
  def terms(params: PyTree, batch: dict[str, Array]) -> Terms:
    # No draw: an objective that adds noise while training is not evaluated by this.
    return task.objective(params, batch, jax.random.key(0))

  def evaluate(params: PyTree, batches: Iterable[dict[str, Array]]) -> Scores:
    parts = [jax.device_get(terms(params, batch)) for batch in batches]
    parts = [part for part in parts if part.denominator > 0]
    if not parts:
      raise InputError("data.held_out: the held-out set has nothing to score.")

    def mean(pairs: list[tuple[Array, Array]]) -> float:
      above, below = (math.fsum(map(float, side)) for side in zip(*pairs, strict=True))
      return above / below

    found = {"held_out/loss": mean([(p.numerator, p.denominator) for p in parts])}
    for name in parts[0].metrics:
      sums = [p.metrics[name] for p in parts]
      if any(float(below) for _, below in sums):
        found[f"held_out/{name}"] = mean(sums)
    return found

  return evaluate
