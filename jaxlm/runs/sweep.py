"""Many runs, one row each: a list of configs, done once, whatever interrupts them."""

import collections
import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import math
import platform
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import xxhash
from etils import epath

from jaxlm import config, files
from jaxlm.data.corpus import Corpus, prepare
from jaxlm.data.spec import Data
from jaxlm.data.tokenizers import notes
from jaxlm.errors import InputError
from jaxlm.models import count
from jaxlm.runs import together, train
from jaxlm.runs.workdir import explained
from jaxlm.scaling import budget
from jaxlm.scaling.store import Row, Store
from jaxlm.sharding import processes
from jaxlm.training import metrics
from jaxlm.training.faults import Diverged
from jaxlm.training.objective import NextToken

ROWS = "rows"
POINTS = 32
"""Points of a training curve that a row keeps."""
EVERY = 10.0
"""Seconds between lines of progress."""
PATIENCE = 5.0
"""Seconds between looks at runs that others do."""
DONE, WAIT = -1, -2
"""In place of a group's number."""
PACKAGES = ("jaxlm", "jax", "flax", "optax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """Runs that are done one after the other, each once.

  The workdir keeps a row of each run that ended, under a hash of its config; started
  again, the sweep does the others. The same command on several machines that share
  the workdir spreads the runs over them.
  """

  runs: tuple[train.Train, ...]
  """The runs, in their order."""
  how: Literal["together", "alone"] = "together"
  """together: runs of one shape and length, whose seeds and learning rates differ, are
  one program on one device, without checkpoints. alone: each is a run as any other, in
  a workdir of its own under `runs`, and goes on from its checkpoint."""
  most: int = 8
  """Most runs of one program."""
  dispatch: int = 16
  """Steps that a program takes at a time."""

  def __post_init__(self):
    for field in ("most", "dispatch"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")
    if not self.runs:
      raise InputError("runs: none; a sweep has at least one.")
    twice = [k for k, n in collections.Counter(map(key_of, self.runs)).items() if n > 1]
    if twice:
      places = [i for i, run in enumerate(self.runs) if key_of(run) == twice[0]]
      raise InputError(f"runs: {places} are the same run.")
    for index, run in enumerate(self.runs):
      if not isinstance(run.objective, NextToken) or not run.data.held_out:
        raise InputError(
          f"runs.{index}: objective {type(run.objective).__name__}, data.held_out "
          f"{run.data.held_out}; a row is the loss of the next token on held-out text."
        )
      if self.how == "together":
        try:
          together.check(run)
        except InputError as error:
          raise InputError(f"runs.{index}.{error}") from error

  def run(self, workdir: files.Pathlike) -> list[Row]:
    """Does the runs that have no row yet; returns the rows of all, in their order.

    Raises:
      InputError: a row is of other text, or what a run raises.
    """
    workdir = files.absolute(workdir)
    files.require_local(workdir, "--workdir")
    if self.how == "together" and not processes.alone():
      raise InputError(
        "--pod: several processes; runs of one program have one. Start the sweep with "
        "--pod=none on every host, or give how=alone."
      )
    processes.require_same("config", config.to_json(self))
    with processes.first_speaks(), explained(workdir):
      doing = Doing(self, workdir)
      while doing.next() and not doing.stopped:
        pass
      print(doing.progress())
      if doing.stopped:
        print(f"stopped by {doing.stopped}. The same command goes on from there.")
    rows = [doing.store.row(doing.key(run)) for run in self.runs]
    return [row for row in rows if row is not None]

  def planned(self) -> list[Row]:
    """Returns what is known of the runs before they are done."""
    return [facts(run) for run in self.runs]

  def groups(self) -> list[tuple[train.Train, ...]]:
    """Returns the runs that are done at once, in the order of the first of each."""
    if self.how == "alone":
      return [(run,) for run in self.runs]
    found: dict[tuple[str, int], list[train.Train]] = {}
    for run in self.runs:
      shape = config.to_json(together.alike(run))
      found.setdefault((shape, run.steps), []).append(run)
    return [
      tuple(runs[at : at + self.most])
      for runs in found.values()
      for at in range(0, len(runs), self.most)
    ]


def key_of(run: train.Train) -> str:
  """Returns the hash of all in a run's config that can change its numbers."""
  plain = {
    field.name: field.default
    if field.default is not dataclasses.MISSING
    else field.default_factory()  # type: ignore[misc]
    for field in dataclasses.fields(run)
    if field.name in train.FREE and field.name != "steps"
  }
  data = dataclasses.replace(run.data, cache=None, threads=1, prefetch=1)
  same: Any = dataclasses.replace(run, **plain, data=data)
  if isinstance(run.objective, NextToken):
    chunk = NextToken().chunk
    objective = dataclasses.replace(run.objective, chunk=chunk)
    same = dataclasses.replace(same, objective=objective)
  return xxhash.xxh3_64_hexdigest(config.to_json(same).encode())


class Doing:
  """A sweep at work in its folder."""

  def __init__(self, sweep: Sweep, workdir: epath.Path):
    """Prepares the text of all runs, which they share.

    Raises:
      InputError: the text does not exist, or a model has fewer ids than its tokenizer.
    """
    self.sweep, self.workdir = sweep, workdir
    self.store = Store(workdir / ROWS)
    self.stopped: str | None = None
    # Asked for over and over, and hashing a config takes a millisecond.
    self._keys = {id(run): key_of(run) for run in sweep.runs}
    self._corpora = {}
    for index, run in enumerate(sweep.runs):
      if run.data not in self._corpora:
        self._corpora[run.data] = self._corpus(run)
      found = self._corpora[run.data].tokenizer.vocab
      if run.model.vocab < found:
        raise InputError(
          f"runs.{index}.model.vocab: {run.model.vocab} ids are fewer than the "
          f"tokenizer's {found}. Use at least that."
        )
    self._groups = sweep.groups()
    self._programs: dict[tuple[str, int], together.Program] = {}
    self._seconds = self._done = 0.0
    processes.lead("rows", self.check)

  def _corpus(self, run: train.Train) -> Corpus:
    """Returns the text of a run; the first process makes the cache."""
    data, place = self._data(run), self.workdir / "data"
    corpus = processes.lead("data", lambda: prepare(data, place))
    corpus = corpus or prepare(data, place)
    print(corpus.report)
    for note in notes(corpus.tokenizer):
      print(note)
    return corpus

  def check(self) -> None:
    """Raises InputError where a row is of other text than its run would read now."""
    for index, run in enumerate(self.sweep.runs):
      row, now = self.store.row(self.key(run)), self._corpora[run.data].fingerprint
      if row is not None and row["corpus"] != now:
        raise InputError(
          f"runs.{index}.data.sources: its row in {self.store.folder} was made of the "
          f"rows {row['corpus']}, and the text gives {now} now. Bring the files back, "
          "or give another --workdir."
        )

  def missing(self, runs: Sequence[train.Train]) -> list[train.Train]:
    """Returns the runs that have no row."""
    return [run for run in runs if self.key(run) not in self.store]

  def key(self, run: train.Train) -> str:
    """Returns the key of one of the sweep's runs."""
    return self._keys[id(run)]

  def progress(self) -> str:
    """Returns a line: how many runs have ended, and how long the rest may take."""
    left, total = self.missing(self.sweep.runs), len(self.sweep.runs)
    line = f"sweep: {total - len(left)} of {total} runs have ended"
    if left and self._done:
      rest = sum(map(_work, left)) * self._seconds / self._done
      line += f"; at this speed the others take {rest / 60:.1f} min"
    return line

  def next(self) -> bool:
    """Does the runs of one group; returns whether there may be more to do.

    The first process chooses and claims; those that others have are waited for.
    """
    with contextlib.ExitStack() as claims:
      chosen = processes.lead("sweep", lambda: self._choose(claims)) or (0, ())
      index = processes.from_first(chosen[0])
      if index == DONE:
        return False
      if index == WAIT:
        print("the runs that are left are being done by others; waiting for them")
        time.sleep(PATIENCE)
        return True
      # Alone a group is one run; together there is one process.
      self.do(chosen[1] or self._groups[index])
    return True

  def _choose(
    self, claims: contextlib.ExitStack
  ) -> tuple[int, tuple[train.Train, ...]]:
    """Returns the number of a group, and those of its runs that are ours to do."""
    left = False
    for index, group in enumerate(self._groups):
      missing = self.missing(group)
      left = left or bool(missing)
      mine = [run for run in missing if self._claimed(run, claims)]
      # Another may have ended one between the look and the claim.
      if runs := tuple(self.missing(mine)):
        return index, runs
    return (WAIT if left else DONE), ()

  def do(self, runs: Sequence[train.Train]) -> None:
    """Does runs of one shape and length, and keeps their rows."""
    began, shape = time.perf_counter(), runs[0]
    counts, tokens = count.parameters(shape.model), shape.steps * _tokens(shape)
    print(
      f"{len(runs)} x {counts.total:,} parameters, {shape.steps} steps, {tokens:,} "
      f"tokens: {', '.join(map(self.key, runs))}"
    )
    if self.sweep.how == "together":
      self._together(runs)
    else:
      self._alone(runs[0])
    self._seconds += time.perf_counter() - began
    self._done += sum(map(_work, runs))
    print(self.progress(), flush=True)

  def _together(self, runs: Sequence[train.Train]) -> None:
    shape = (config.to_json(together.alike(runs[0])), len(runs))
    if shape not in self._programs:
      self._programs[shape] = together.Program(runs[0], len(runs), self.sweep.dispatch)
      print(self._programs[shape].describe())
    said = time.monotonic()

    def say(step: int, losses_R: np.ndarray) -> None:
      nonlocal said
      if time.monotonic() > said + EVERY or step == runs[0].steps:
        said = time.monotonic()
        losses = " ".join(f"{loss:.3f}" for loss in losses_R)
        print(f"  step {step}/{runs[0].steps}  loss {losses}", flush=True)

    corpus = self._corpora[runs[0].data]
    outcomes = together.train(self._programs[shape], runs, corpus, say)
    for run, outcome in zip(runs, outcomes, strict=True):
      self._keep(run, outcome, {"together": len(runs)})

  def _alone(self, run: train.Train) -> None:
    place = self.workdir / "runs" / self.key(run)
    own = dataclasses.replace(run, data=self._data(run))
    diverged_at, rows = None, []
    try:
      result = own.run(place)
      rows, self.stopped = result.rows, result.stopped
    except Diverged as error:
      print(f"  {error}")
      diverged_at, rows = error.step, metrics.read(place)
    if self.stopped is not None:
      return
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    scored = [row for row in rows if "held_out/nll" in row]
    scores = scored[-1] if scored and diverged_at is None else None
    seconds = sum(row["seconds"] * run.log_every for row in rows if "seconds" in row)
    found = together.Outcome(losses, scores, diverged_at, seconds)
    self._keep(run, found, {"together": 1})

  def _data(self, run: train.Train) -> Data:
    """Returns the data of a run with the cache that all runs share."""
    cache = run.data.cache or str(self.workdir / "data")
    return dataclasses.replace(run.data, cache=cache)

  def _keep(
    self, run: train.Train, found: together.Outcome, other: dict[str, Any]
  ) -> None:
    row = facts(run) | {
      "loss": None if found.scores is None else found.scores["held_out/nll"],
      "bits_per_byte": None
      if found.scores is None
      else found.scores["held_out/bits_per_byte"],
      "diverged_at": found.diverged_at,
      "curve": curve(found.losses, _tokens(run)),
      "seconds": found.seconds,
      "corpus": self._corpora[run.data].fingerprint,
      "device": jax.devices()[0].device_kind,
      "versions": {"python": platform.python_version()}
      | {name: importlib.metadata.version(name) for name in PACKAGES},
      "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if processes.first():
      self.store.add(self.key(run), row | other)
    processes.meet("row")

  def _claimed(self, run: train.Train, claims: contextlib.ExitStack) -> bool:
    """Takes a run for this program, until the claims are given back, if it is free."""
    place = self.workdir / "claims"
    place.mkdir(parents=True, exist_ok=True)
    file = claims.enter_context((place / self.key(run)).open("a"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    return True


def facts(run: train.Train) -> Row:
  """Returns what a row says of a run before it is done."""
  counts, tokens = count.parameters(run.model), run.steps * _tokens(run)
  return {
    "parameters": counts.total,
    "parameters_without_embedding": counts.mixers + counts.mlps + counts.norms,
    "dim": run.model.dim,
    "layers": len(run.model.blocks),
    "tokens": tokens,
    "steps": run.steps,
    "batch": run.data.batch,
    "seq_len": run.data.seq_len,
    "flops": budget.compute(run.model, tokens, seq_len=run.data.seq_len)._asdict(),
    "optimizer": type(run.optimizer).__name__,
    "peak": run.optimizer.lr.peak,
    "seed": run.seed,
  }


def curve(losses: dict[int, float], tokens: int) -> list[list[float]]:
  """Returns (tokens seen, mean training loss of the last tenth of them) pairs.

  The steps are spread evenly on a logarithmic scale; those past a divergence are left
  out.
  """
  last = max(losses, default=0)
  chosen = sorted({round(last ** (i / POINTS)) for i in range(1, POINTS + 1)})
  points = []
  for step in chosen:
    found = [loss for s, loss in losses.items() if 0.9 * step <= s <= step]
    if found and all(map(math.isfinite, found)):
      points.append([step * tokens, sum(found) / len(found)])
  return points


def _tokens(run: train.Train) -> int:
  return run.data.batch * run.data.seq_len


def _work(run: train.Train) -> float:
  each = count.training_flops(run.model, run.data.seq_len).causal
  return each * run.steps * _tokens(run)
