"""The loop with pretended parts: what happens when, and what never does."""

import itertools
import math
import os
import signal
import threading

import pytest

from jaxlm.errors import InputError
from jaxlm.training import faults, loop


class Run:
  """Parts that note what they are asked; a state is its step."""

  def __init__(self, *, losses=None, during=None):
    self.events = []
    self.failure = None
    self.losses = losses or {}
    self.during = during or {}
    self.writer = self.store = self
    self.batches = map(self.batch, itertools.count())

  def batch(self, number):
    return number

  def note(self, *event):
    self.events.append(event)
    if event in self.during:
      self.during[event]()

  def step(self, state, batch):
    self.note("step", state, batch)
    loss = self.losses.get(state + 1, 1.0)
    return state + 1, {"loss": loss, "grad_norm": 1.0, "lr": 0.1}

  def evaluate(self, state):
    self.note("evaluate", state)
    return {"held_out/nll": 2.0}

  def write(self, step, row):
    self.note("row" if "loss" in row else "scores", step)

  def progress(self, step, shown, log):
    assert set(shown) == {"loss", "tok/s", "left_s"}

  def say(self, text):
    self.note("say", text)

  def save(self, step, state, data):
    assert state == step == data["next_batch"]
    self.note("save", step)

  def check(self):
    if self.failure is not None:
      raise self.failure

  def wait(self):
    self.note("wait")

  def train(self, start=0, **fields):
    cadence = {"steps": 6, "log": 1, "evaluate": 4, "save": 3, "tokens": 8}
    alone = lambda yes: yes  # noqa: E731
    parts = loop.Parts(
      self.step, self.batches, self.evaluate, self, self, {"corpus": "rows"}, alone
    )
    return loop.train(parts, loop.Cadence(**{**cadence, **fields}), start, start)

  def seen(self, *kinds):
    return [event for event in self.events if event[0] in kinds]


def interrupt():
  os.kill(os.getpid(), signal.SIGINT)


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def test_what_happens_when():
  run = Run()
  outcome = run.train()
  assert outcome == loop.Outcome(6, 6, None)
  assert run.seen("step") == [("step", i, i) for i in range(6)]
  assert run.seen("save", "scores", "row") == [
    ("row", 1),
    ("row", 2),
    ("row", 3),
    ("save", 3),
    ("row", 4),
    ("scores", 4),
    ("row", 5),
    ("row", 6),
    ("scores", 6),
    ("save", 6),
  ]
  assert run.events[-1] == ("wait",)


def test_metrics_come_one_step_late():
  run = Run()
  run.train(save=99, evaluate=99)
  assert run.events[:3] == [("step", 0, 0), ("step", 1, 1), ("row", 1)]


def test_rows_by_the_interval_and_at_the_end():
  run = Run()
  run.train(steps=7, log=3)
  assert run.seen("row") == [("row", 3), ("row", 6), ("row", 7)]


def test_it_goes_on_where_it_starts_and_not_past_the_end():
  run = Run()
  run.batches = itertools.count(4)
  assert run.train(start=4) == loop.Outcome(6, 6, None)
  assert run.seen("step") == [("step", 4, 4), ("step", 5, 5)]
  run = Run()
  assert run.train(start=6) == loop.Outcome(6, 6, None)
  assert run.seen("step", "save") == []


@pytest.mark.parametrize(
  ("during", "saved"),
  [
    (("step", 1, 1), 2),
    (("row", 1), 2),
    (("evaluate", 4), 4),
    (("scores", 4), 4),
    (("save", 3), 4),
  ],
  ids=str,
)
@pytest.mark.parametrize(
  ("send", "reason"), [(interrupt, "Ctrl-C"), (terminate, "SIGTERM")]
)
def test_a_signal_stops_after_a_step_that_is_saved(during, saved, send, reason):
  run = Run(during={during: send})
  assert run.train() == loop.Outcome(saved, saved, reason)
  assert run.seen("save")[-1] == ("save", saved)
  assert run.seen("row")[-1] == ("row", saved)
  assert run.events[-1] == ("wait",)


def test_a_signal_at_the_end_changes_nothing():
  run = Run(during={("save", 6): interrupt})
  assert run.train() == loop.Outcome(6, 6, None)


def test_a_second_signal_ends_it_at_once():
  before = signal.getsignal(signal.SIGINT)
  run = Run(during={("step", 1, 1): interrupt, ("save", 2): interrupt})
  with pytest.raises(KeyboardInterrupt):
    run.train()
  assert run.events[-1] == ("save", 2)
  assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_stay_as_they_are():
  before = signal.getsignal(signal.SIGINT)
  outcomes = []
  thread = threading.Thread(target=lambda: outcomes.append(Run().train()))
  thread.start()
  thread.join()
  assert outcomes == [loop.Outcome(6, 6, None)]
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(step, bad):
  run = Run(losses={step: bad})
  with pytest.raises(
    InputError, match=rf"step {step}: loss is {bad}. Nothing was saved"
  ):
    run.train()
  assert all(saved < step for _, saved in run.seen("save"))
  assert all(row < step for _, row in run.seen("row"))


def test_nor_is_it_saved_on_an_interrupt():
  run = Run(losses={2: math.nan}, during={("step", 1, 1): interrupt})
  with pytest.raises(InputError, match="step 2: loss is nan"):
    run.train()
  assert run.seen("save") == []


def test_a_gradient_that_is_not_finite():
  with pytest.raises(InputError, match=r"step 5: grad_norm is inf.*new --workdir"):
    faults.require_finite(5, {"loss": 1.0, "grad_norm": math.inf})
  faults.require_finite(5, {"loss": 1.0, "grad_norm": 1.0})


def test_a_score_that_is_not_finite_is_not_saved():
  run = Run()
  run.evaluate = lambda state: {"held_out/nll": math.nan}
  with pytest.raises(InputError, match="step 4: held_out/nll is nan"):
    run.train()
  assert run.seen("save") == [("save", 3)]


def test_the_clock_counts_between_reports_and_not_what_lies_between(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
  clock = loop.Clock(tokens=100)
  clock.start(10)
  now[0] = 4.0
  assert clock.tick(12) == {"seconds": 2.0, "tokens_per_second": 50.0}
  now[0] = 90.0
  clock.start(12)
  now[0] = 91.0
  assert clock.tick(13)["seconds"] == 1.0
  assert clock.seconds_a_step == pytest.approx(0.9 * 2 + 0.1 * 1)


def test_a_save_that_failed_behind_ends_the_run_at_the_next_step():
  run = Run()
  run.during = {("step", 3, 3): lambda: setattr(run, "failure", InputError("full"))}
  with pytest.raises(InputError, match="full"):
    run.train()
  assert run.seen("step")[-1] == ("step", 3, 3)
