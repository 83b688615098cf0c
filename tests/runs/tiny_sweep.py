"""A sweep of the tiny run: two lengths, two seeds, two learning rates."""

import dataclasses

from jaxlm.runs.sweep import Sweep
from jaxlm.runs.train import Train
from jaxlm.training.schedules import WarmupCosine
from runs import tiny


def one(text: str, cache: str, *, seed: int, peak: float, steps: int) -> Train:
  run = tiny.get_config(text=text, steps=steps)
  return dataclasses.replace(
    run,
    seed=seed,
    data=dataclasses.replace(run.data, cache=cache),
    optimizer=dataclasses.replace(run.optimizer, lr=WarmupCosine(peak=peak, warmup=2)),
  )


def wild(text: str, cache: str) -> Train:
  """A run that diverges."""
  return one(text, cache, seed=0, peak=1e38, steps=6)


def get_config(*, text: str, cache: str, diverging: bool = False) -> Sweep:
  """The eight runs, or a run that diverges and a good one, each alone."""
  if diverging:
    good = one(text, cache, seed=0, peak=1e-2, steps=6)
    return Sweep(runs=(wild(text, cache), good), how="alone")
  return Sweep(
    runs=tuple(
      one(text, cache, seed=seed, peak=peak, steps=steps)
      for steps in (6, 10)
      for seed in (0, 1)
      for peak in (3e-3, 1e-2)
    ),
    dispatch=4,
  )
