"""Several runs as one program are the runs alone."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.data.corpus import prepare
from jaxlm.errors import InputError
from jaxlm.runs import together
from jaxlm.sharding.mesh import Mesh
from jaxlm.training.schedules import WarmupStableDecay
from runs.tiny_sweep import one

SETTINGS = ((0, 1e-2), (1, 1e-2), (0, 3e-3))
WILD = (0, 1e38)
OTHER = WarmupStableDecay(peak=1e-2, warmup=3, decay=0.5)


@pytest.fixture(scope="module")
def program(text, cache):
  """The program of four runs."""
  with jax.numpy_dtype_promotion("standard"):
    return together.Program(one(text, cache, seed=0, peak=1.0, steps=4), 4, 4)


@pytest.fixture(scope="module")
def found(program, text, cache):
  """What the runs leave, one that diverges among them, and what was said."""
  runs = [one(text, cache, seed=s, peak=p, steps=10) for s, p in (*SETTINGS, WILD)]
  corpus, said = prepare(runs[0].data, cache), []
  with jax.numpy_dtype_promotion("standard"):
    outcomes = together.train(program, runs, corpus, lambda *told: said.append(told))
  return outcomes, said


def rows_alone(run, tmp_path):
  return dataclasses.replace(run, mesh=Mesh(fsdp=1, data=-1)).run(tmp_path).rows


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_each_has_the_losses_and_scores_of_the_run_alone(
  index, found, text, cache, tmp_path
):
  seed, peak = SETTINGS[index]
  rows = rows_alone(one(text, cache, seed=seed, peak=peak, steps=10), tmp_path)
  outcome = found[0][index]
  losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
  assert outcome.losses == pytest.approx(losses, rel=1e-5)
  scores = [row for row in rows if "held_out/nll" in row][-1]
  assert outcome.scores == pytest.approx(
    {name: scores[name] for name in outcome.scores}, rel=1e-5
  )
  assert outcome.diverged_at is None


def test_float32_means_float32_on_any_machine(program):
  """Accelerators would round the factors of products."""
  products = [
    line for line in program.lowered.as_text().splitlines() if "dot_general" in line
  ]
  assert products
  assert [
    line for line in products if "precision = [HIGHEST, HIGHEST]" not in line
  ] == []


def test_seeds_and_rates_make_a_difference(found):
  a, b, c, _ = found[0]
  assert a.losses[1] != b.losses[1]  # other first parameters
  assert a.losses[1] == c.losses[1]
  assert a.losses[10] != c.losses[10]


def test_one_that_diverges_says_so(found):
  wild = found[0][3]
  assert 1 < wild.diverged_at <= 10
  assert wild.scores is None


def test_what_is_said_on_the_way(found):
  outcomes, said = found
  assert [step for step, _ in said] == [4, 8, 10]
  np.testing.assert_array_equal(said[-1][1], [f.losses[10] for f in outcomes])


def test_a_program_serves_any_schedule_and_length(program, text, cache, tmp_path):
  runs = []
  for seed in range(4):
    run = one(text, cache, seed=seed, peak=1e-2, steps=5)
    optimizer = dataclasses.replace(run.optimizer, lr=OTHER)
    runs.append(dataclasses.replace(run, optimizer=optimizer))
  alike = together.alike(one(text, cache, seed=7, peak=1.0, steps=4))
  assert {config.to_json(together.alike(r)) for r in runs} == {config.to_json(alike)}
  corpus = prepare(runs[0].data, cache)
  shared = together.train(program, runs, corpus, lambda *_: None)[2]
  rows = rows_alone(runs[2], tmp_path)
  losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
  assert shared.losses == pytest.approx(losses, rel=1e-5)
  assert len(shared.losses) == 5


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"initial": "model"}, "initial: model; runs of one program cannot"),
    ({"mesh": Mesh(tensor=2)}, "mesh: .*share one device"),
    ({"seed": 2**31}, "seed: 2147483648"),
  ],
)
def test_what_one_program_cannot_do_is_refused(change, words, text, cache):
  run = dataclasses.replace(one(text, cache, seed=0, peak=1e-2, steps=6), **change)
  with pytest.raises(InputError, match=words):
    together.check(run)
