"""A training run: from a config to a model, in the order things happen."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm import config, files
from jaxlm.data.corpus import Corpus, Data, prepare
from jaxlm.data.loader import Loader, in_order
from jaxlm.data.tokenizers import Tokenizer, notes
from jaxlm.data.tokenizers import save as save_tokenizer
from jaxlm.decoding.prefill import check as check_prompts
from jaxlm.errors import InputError
from jaxlm.evaluation.bits_per_byte import make_evaluate
from jaxlm.evaluation.losses import make_evaluate_task
from jaxlm.interop.checkpoint import open_model
from jaxlm.interop.own import FAMILY
from jaxlm.launch import xla
from jaxlm.launch.chips import chip_of
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import LM, Precision, Remat
from jaxlm.ops.kernels.choice import Kernel
from jaxlm.posttrain import distill, objectives
from jaxlm.runs import initial, reference, summary
from jaxlm.runs.assembled import Assembled, assemble, compiled
from jaxlm.runs.samples import Samples, write_samples
from jaxlm.runs.teacher import FIELD as TEACHER
from jaxlm.runs.workdir import CHECKPOINTS, claim, explained, held
from jaxlm.shapes import PyTree
from jaxlm.sharding import processes
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import check_batch, placer, rows_here
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.training import loop, metrics, optimizers
from jaxlm.training.checkpoints import Checkpoints, Restored, Store
from jaxlm.training.objective import Batch, NextToken
from jaxlm.training.state import Moments, TrainState

FREE = (
  "steps", "mesh", "sharding", "moments", "remat", "attention",
  "compiler", "checkpoints", "evaluate_every", "log_every", "samples", "data.cache",
  "data.threads", "data.prefetch", "objective.chunk",
)  # fmt: skip


class Result(NamedTuple):
  """What a run leaves, for a notebook; the same stands in the workdir."""

  workdir: epath.Path
  step: int
  stopped: str | None
  """The signal that ended the run early, if one did."""
  params: PyTree
  """Averaged ones where the run keeps an average."""
  decoder: Decoder
  tokenizer: Tokenizer
  rows: list[dict[str, Any]]
  """metrics.jsonl."""


class Placement(NamedTuple):
  """Which rows of a batch this process makes, and what puts them on the mesh."""

  rows: list[int]
  put: Callable[[dict[str, np.ndarray]], Batch]

  @classmethod
  def of(cls, layout: Layout, data: Data) -> "Placement":
    """Returns the placement of batches by the layout's rules."""
    sharding = layout.sharding("batch", "sequence")
    shape = (data.batch, data.seq_len)
    return cls(rows_here(sharding, shape), placer(sharding, shape))

  def beside(self, frozen: PyTree) -> "Placement":
    """Returns a placement whose batches hold these parameters too."""
    return self._replace(put=lambda rows: self.put(rows) | {"frozen": frozen})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """Trains a language model on text."""

  model: LM
  """The architecture."""
  data: Data
  """The text, and how it becomes batches."""
  optimizer: optimizers.Optimizer
  """How gradients change parameters, learning rate included."""
  steps: int
  """Batches to train on."""
  initial: str | None = None
  """A pretrained model to start from: a Hugging Face folder, a .gguf file, a folder of
  configs/convert.py or a run's workdir; None: first parameters are drawn."""
  objective: objectives.Spec = dataclasses.field(default_factory=NextToken)
  """What is minimised."""
  precision: Precision = dataclasses.field(default_factory=Precision)
  """Dtypes of parameters and of the computation."""
  remat: Remat = "none"
  """Which activations the backward pass recomputes instead of keeping them."""
  attention: Kernel = "auto"
  """How attention is computed: auto takes the fastest that can, and the run prints
  which and why; another is taken or refused."""
  compiler: xla.Options = ()
  """(option, value) for the compiler, over the chip's own in jaxlm/launch/xla.py; an
  empty value takes one out."""
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  """How the devices are arranged."""
  sharding: ShardingRules = dataclasses.field(default_factory=ShardingRules)
  """Which logical axis is split over which mesh axes."""
  moments: Moments = dataclasses.field(default_factory=Moments)
  """How the optimizer's state is split, and in which memory it is kept."""
  accumulate: int = 1
  """Micro-batches of a step; the loss does not depend on it."""
  ema: float | None = None
  """Decay of an average of the parameters, which is then evaluated and sampled."""
  seed: int = 0
  """Of the first parameters and of the objective's draws."""
  evaluate_every: int = 100
  """Steps between evaluations on the held-out text; the last step has one."""
  log_every: int = 10
  """Steps between rows of metrics.jsonl."""
  checkpoints: Checkpoints = dataclasses.field(default_factory=Checkpoints)
  """When checkpoints are written and which are kept."""
  samples: Samples = dataclasses.field(default_factory=Samples)
  """Text written at the end."""

  def __post_init__(self):
    for field in ("steps", "accumulate", "evaluate_every", "log_every"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")
    if self.ema is not None and not 0 < self.ema < 1:
      raise InputError(f"ema: {self.ema} is not between 0 and 1; none turns it off.")
    objectives.check(self.objective, self.data, self.model, self.accumulate)
    if self.model.scores is not None and self.samples.prompts:
      raise InputError("samples.prompts: a reward model writes no text; give ().")

  def run(self, workdir: files.Pathlike) -> Result:
    """Trains in a folder, from its newest whole checkpoint where it has one.

    Raises:
      InputError: whatever the user can mend; the message says how.
    """
    layout = Layout(make_mesh(self.mesh), self.sharding)
    check_batch(layout, self.data.batch, self.data.seq_len, self.accumulate)
    workdir = files.absolute(workdir)
    processes.require_same("config", config.to_json(self))
    with processes.first_speaks(), explained(workdir), held(workdir), self.products():
      return self._run(workdir, layout)

  def products(self) -> contextlib.AbstractContextManager:
    """float32 means float32: accelerators would round the factors of products."""
    exact = self.precision.compute == "float32"
    return jax.default_matmul_precision("highest" if exact else "default")

  def _run(self, workdir: epath.Path, layout: Layout) -> Result:
    claimed = processes.lead("--workdir", lambda: claim(workdir, self, FREE))
    changes = claimed or []
    for change in changes:
      print(f"changed since this workdir was last run: {change}")

    data, opened = self.data, None
    if self.initial is not None:
      opened = open_model(self.initial, "initial")
      print(initial.describe(opened, self.model))
      data = initial.with_tokenizer(data, opened, workdir)
      if opened.family is not None and processes.first():
        files.write_atomic(workdir / FAMILY, opened.family.name)
    if isinstance(self.objective, distill.Distill):
      teacher = open_model(self.objective.teacher, TEACHER)
      print(f"teacher: {teacher.place} ({teacher.kind}, {teacher.stored}), frozen")
      data = initial.with_tokenizer(data, teacher, workdir)
    # The first makes the cache; the others find it, or make their own where their disk
    # is not the first's.
    corpus = processes.lead("data", lambda: prepare(data, workdir / "data"))
    corpus = corpus or prepare(data, workdir / "data")
    processes.require_same("data.sources", corpus.fingerprint)
    print(corpus.report)
    if isinstance(self.objective, objectives.Unpaired):
      print(summary.describe_labels(corpus, self.data.sequences, self.objective.loss))
    for note in notes(corpus.tokenizer):
      print(note)
    if processes.first():
      save_tokenizer(corpus.tokenizer, workdir)
    if self.model.vocab < corpus.tokenizer.vocab:
      raise InputError(
        f"model.vocab: {self.model.vocab} ids are fewer than the tokenizer's "
        f"{corpus.tokenizer.vocab}. Use at least that."
      )
    if self.samples.prompts:
      prompts = self.samples.ids(corpus.tokenizer)
      check_prompts(self.model, prompts, tokens=self.samples.tokens)
    print(summary.describe_model(self.model, self.data.seq_len, self.data.batch))

    parts = assemble(
      self,
      layout,
      None if opened is None else lambda d: initial.load(opened, d, self.seed),
    )
    decoder, optimizer, plan = parts.decoder, parts.optimizer, parts.plan
    options = xla.options(
      chip_of(layout.mesh.devices.flat[0].device_kind), self.compiler
    )
    print(summary.describe_layout(layout, plan))
    print(summary.describe_parameters(layout, plan))
    print(summary.describe_rules(self.optimizer, plan.shapes.params))
    print(summary.describe_attention(decoder, self.data.seq_len))
    print(
      f"remat: {self.remat}; parameters {self.precision.params}, computation "
      f"{self.precision.compute}; optimizer state on the {self.moments.memory}"
    )
    print(xla.describe(options))

    store = Store(workdir / CHECKPOINTS, self.checkpoints, config.to_json(self))
    try:
      restored = store.restore(plan)
      start = restored.step if restored else 0
      if restored and start >= self.steps:
        return self._finished(workdir, restored, decoder, corpus)
      if restored:
        check_same_text(restored, corpus, self.data)
      elif metrics.read(workdir):
        print("no checkpoint was finished here: the run begins again at step 0")
      store.clear(start)
      if restored:
        rate = float(optimizer.schedule(start))
        print(f"going on from the checkpoint of step {start}; learning rate {rate:.3g}")
        if any(change.startswith("steps:") for change in changes):
          print(f"  the learning rate's schedule now ends at step {self.steps}")
      began = time.perf_counter()
      program = compiled(parts, options)
      print(summary.describe_step(program, time.perf_counter() - began))
      processes.meet("compiled")
      state = restored.state if restored else parts.first_state()
      first = restored.data["next_batch"] if restored else 0
      place = Placement.of(layout, self.data)
      corpus = self._with_fields(parts, corpus, place, workdir, state, start)
      if parts.task.frozen is not None and parts.teacher is not None:
        frozen = parts.task.frozen.load()
        weights = reference.fingerprint(parts.teacher.decoder, frozen)
        reference.record("teacher", workdir, weights, resumed=start > 0)
        place = place.beside(frozen)
      evaluate = self._evaluator(parts, corpus, place)
      with (
        Loader(corpus, self.data, rows=place.rows, start=first) as loader,
        metrics.open_writer(workdir, start=start, total=self.steps) as writer,
      ):
        batches = map(place.put, loader)
        looped = loop.Parts(
          program, batches, evaluate, store, writer, corpus.fingerprint,
          processes.Vote(layout.mesh),
        )  # fmt: skip
        if opened is not None and start == 0:
          begin(looped, state)
        outcome = loop.train(looped, self._cadence(), state, start)
    finally:
      store.close()
    if processes.first():
      metrics.plot(workdir)
    params = averaged(outcome.state)
    result = Result(
      workdir, outcome.step, outcome.stopped, params, decoder, corpus.tokenizer,
      metrics.read(workdir),
    )  # fmt: skip
    if outcome.stopped:
      print(
        f"\nstopped by {outcome.stopped}: step {outcome.step} of {self.steps} is saved "
        f"in {workdir}. The same command goes on from there."
      )
      return result
    if self.samples.prompts:
      tokenizer = result.tokenizer
      sampled = write_samples(self.samples, decoder, params, tokenizer, self.seed)
      if processes.first():
        files.write_atomic(workdir / "samples.txt", sampled)
    print(f"\nfinished: step {outcome.step} in {workdir}. {_last_score(result.rows)}")
    return result

  def _cadence(self) -> loop.Cadence:
    return loop.Cadence(
      steps=self.steps,
      log=self.log_every,
      evaluate=self.evaluate_every,
      save=self.checkpoints.every,
      tokens=self.data.batch * self.data.seq_len,
    )

  def _with_fields(
    self,
    parts: Assembled,
    corpus: Corpus,
    place: "Placement",
    workdir: epath.Path,
    state: TrainState,
    start: int,
  ) -> Corpus:
    """Returns the corpus with what the objective wants to know of a frozen model."""
    fields, spec, decoder = parts.task.fields, self.objective, parts.decoder
    if not fields:
      return corpus
    pass_over = partial(
      reference.Reference,
      fields=fields,
      batch=self.data.batch,
      here=place.rows,
      put=place.put,
    )
    if isinstance(spec, distill.Distill):
      assert parts.teacher is not None
      teacher = parts.teacher.decoder
      asked = pass_over(
        what="teacher",
        decoder=teacher,
        score=partial(distill.top_log_probs, spec, teacher),
        options=f"top {spec.top_k} at {spec.divergence.temperature}",
      )
      first = parts.teacher.frozen.load
    else:
      asked = pass_over(
        what="reference",
        decoder=decoder,
        score=partial(objectives.reference, decoder, objectives.chunk_of(spec)),
        options="",
      )
      first = lambda: (parts.first_state() if start else state).params  # noqa: E731
    return reference.attach(asked, corpus, workdir, first, resumed=start > 0)

  def _evaluator(
    self, parts: Assembled, corpus: Corpus, place: "Placement"
  ) -> Callable[[TrainState], dict[str, float]]:
    if not any(len(rows) for rows in corpus.held_out):
      print(f"no row is held out (data.held_out={self.data.held_out}): no evaluation")
      return lambda state: {}
    if isinstance(self.objective, NextToken):
      lengths = np.zeros(self.model.vocab, np.int32)
      lengths[: corpus.tokenizer.vocab] = corpus.tokenizer.byte_lengths()
      scores = make_evaluate(parts.decoder, lengths, chunk=self.objective.chunk)
    else:
      scores = make_evaluate_task(parts.task)

    def evaluate(state: TrainState) -> dict[str, float]:
      held_out = in_order(corpus.held_out, self.data.batch, rows=place.rows)
      return scores(averaged(state), map(place.put, held_out))

    return evaluate

  def _finished(
    self, workdir: epath.Path, restored: Restored, decoder: Decoder, corpus: Corpus
  ) -> Result:
    rows = metrics.read(workdir)
    done = f"{restored.step} of {self.steps}"
    if restored.step > self.steps:
      done = f"{restored.step}, past the {self.steps} steps asked for"
    print(
      f"\nthis run is finished: {workdir} is at step {done}. {_last_score(rows)} To go "
      "on, give --config.steps= a larger number; for a new run, another --workdir."
    )
    params = averaged(restored.state)
    return Result(workdir, restored.step, None, params, decoder, corpus.tokenizer, rows)


def check_same_text(restored: Restored, corpus: Corpus, data: Data) -> None:
  """Raises InputError where a checkpoint was trained on other rows."""
  if restored.data["corpus"] != corpus.fingerprint:
    sources = ", ".join(weighted.source.path for weighted in data.sources)
    raise InputError(
      f"data.sources: the text ({sources}) or the version of the tokenizer's trainer "
      f"is not what step {restored.step} was trained on: its rows were "
      f"{restored.data['corpus']}, these are {corpus.fingerprint}. Bring the files "
      "back, or give another --workdir."
    )


def begin(parts: loop.Parts, state: TrainState) -> None:
  """Scores a pretrained model before the first step, so that gains can be seen."""
  scores = parts.evaluate(state)
  if scores:
    parts.writer.write(0, scores)
    parts.writer.say("before the first step  " + loop.words(scores))


def averaged(state: TrainState) -> PyTree:
  """Returns the average of the parameters where the run keeps one."""
  return state.params if state.ema is None else state.ema


def _last_score(rows: list[dict[str, Any]]) -> str:
  scores = [row for row in rows if any(name.startswith("held_out/") for name in row)]
  for name in ("bits per byte", "loss"):
    value = scores[-1].get(f"held_out/{name.replace(' ', '_')}") if scores else None
    if value is not None:
      return f"Held-out {name}: {value:.4f}."
  return ""
