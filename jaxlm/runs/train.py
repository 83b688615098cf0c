"""A training run: from a config to a model, in the order things happen."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm import config, files
from jaxlm.data.corpus import Corpus, Data
from jaxlm.data.loader import Loader, in_order
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import InputError
from jaxlm.evaluation.bits_per_byte import make_evaluate
from jaxlm.evaluation.losses import make_evaluate_task
from jaxlm.launch import xla
from jaxlm.launch.chips import chip_of
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import LM, Precision, Remat
from jaxlm.ops.kernels.choice import Kernel
from jaxlm.peft import methods
from jaxlm.posttrain import objectives
from jaxlm.quantization.formats import Format
from jaxlm.runs import summary
from jaxlm.runs.assembled import Assembled, assemble, compiled
from jaxlm.runs.begun import Begun, begin
from jaxlm.runs.fields import Place, Placement, with_fields
from jaxlm.runs.inputs import Inputs, read_inputs
from jaxlm.runs.samples import Samples, write_samples
from jaxlm.runs.workdir import CHECKPOINTS, claim, explained, held
from jaxlm.shapes import PyTree
from jaxlm.sharding import processes
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import check_batch
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.training import loop, metrics, optimizers
from jaxlm.training.checkpoints import Checkpoints, Store
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
  """What the decoder takes; averaged where the run keeps an average. With adapters some
  are no arrays: jaxlm.peft.targets.merge makes them so."""
  decoder: Decoder
  tokenizer: Tokenizer
  rows: list[dict[str, Any]]
  """metrics.jsonl."""


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
  adapters: methods.Adapters | None = None
  """What trains beside the model that `initial` names, which stays as it is; None: the
  whole model trains."""
  also: tuple[str, ...] = ()
  """Parameters of that model that train whole beside adapters, say the new head of a
  reward model: names of presets in jaxlm/peft/filters.py, or regexes over names."""
  quantized: Format | None = None
  """How the matrices of such a frozen model's layers are kept; None: as they are.
  What adapters take of them at the start, such as DoRA's lengths, is of whole ones."""
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
  init_scale: optimizers.Factors = optimizers.ALL
  """(regex, factor) on drawn first values by parameter name, first match wins."""
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
    if self.initial is not None and self.init_scale != optimizers.ALL:
      raise InputError(
        f"init_scale: {self.init_scale}; the model that `initial` names is not drawn. "
        "Leave one of them out."
      )
    if self.adapters is not None and self.initial is None:
      raise InputError("adapters: they train beside a model; name it in initial.")
    if self.also and self.adapters is None:
      raise InputError(f"also: {self.also}; without adapters the whole model trains.")
    if self.quantized is not None and self.adapters is None:
      raise InputError(
        "quantized: only a frozen model is quantized; give adapters, or leave it."
      )
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
    # Of a frozen model the weights' own hash says whether it is the same.
    free = FREE if self.adapters is None else (*FREE, "initial")
    claimed = processes.lead("--workdir", lambda: claim(workdir, self, free))
    changes = claimed or []
    for change in changes:
      print(f"changed since this workdir was last run: {change}")

    inputs = read_inputs(self, workdir)
    beside = self.adapters is not None
    print(
      summary.describe_model(
        self.model, self.data.seq_len, self.data.batch, frozen=beside
      )
    )
    parts = assemble(self, layout)
    options = xla.options(
      chip_of(layout.mesh.devices.flat[0].device_kind), self.compiler
    )
    print(self._described(parts))
    print(xla.describe(options))
    store = Store(workdir / CHECKPOINTS, self.checkpoints, config.to_json(self))
    try:
      restored = store.restore(parts.plan)
      start = restored.step if restored else 0
      begun = begin(self, parts, inputs, restored, workdir)
      if restored and start >= self.steps:
        return self._finished(workdir, restored.step, parts, inputs, begun)
      if restored is None and metrics.read(workdir):
        print("no checkpoint was finished here: the run begins again at step 0")
      store.clear(start)
      if restored:
        rate = float(parts.optimizer.schedule(start))
        print(f"going on from the checkpoint of step {start}; learning rate {rate:.3g}")
        if any(change.startswith("steps:") for change in changes):
          print(f"  the learning rate's schedule now ends at step {self.steps}")
      began = time.perf_counter()
      program = compiled(parts, options)
      print(summary.describe_step(program, time.perf_counter() - began))
      processes.meet("compiled")
      batches = Placement.of(layout, self.data)
      place = Place(workdir, batches, restored is not None)
      corpus = with_fields(self, parts, inputs.corpus, place, begun.first)
      batches = batches.beside(begun.frozen)
      evaluate = self._evaluator(parts, corpus, batches, begun)
      first = restored.data["next_batch"] if restored else 0
      with (
        Loader(corpus, self.data, rows=batches.rows, start=first) as loader,
        metrics.open_writer(workdir, start=start, total=self.steps) as writer,
      ):
        looped = loop.Parts(
          program, map(batches.put, loader), evaluate, store, writer, begun.told,
          processes.Vote(layout.mesh),
        )  # fmt: skip
        if inputs.opened is not None and start == 0:
          score_first(looped, begun.state)
        outcome = loop.train(looped, self._cadence(), begun.state, start)
    finally:
      store.close()
    if processes.first():
      metrics.plot(workdir)
    begun = begun._replace(state=outcome.state)
    result = self._result(workdir, outcome.step, outcome.stopped, parts, inputs, begun)
    if outcome.stopped:
      print(
        f"\nstopped by {outcome.stopped}: step {outcome.step} of {self.steps} is saved "
        f"in {workdir}. The same command goes on from there."
      )
      return result
    if self.samples.prompts:
      sampled = write_samples(
        self.samples, parts.decoder, result.params, result.tokenizer, self.seed
      )
      if processes.first():
        files.write_atomic(workdir / "samples.txt", sampled)
    print(f"\nfinished: step {outcome.step} in {workdir}. {_last_score(result.rows)}")
    return result

  def _described(self, parts: Assembled) -> str:
    """Returns what was chosen, before anything is computed."""
    decoder, plan, layout = parts.decoder, parts.plan, parts.decoder.layout
    prefix = 0 if parts.base is None else parts.base.prefix
    lines = [
      summary.describe_layout(layout, plan),
      summary.describe_parameters(layout, plan),
      summary.describe_rules(self.optimizer, plan.shapes.params, self.init_scale),
      summary.describe_attention(decoder, self.data.seq_len, prefix),
      f"remat: {self.remat}; parameters {self.precision.params}, computation "
      f"{self.precision.compute}; optimizer state on the {self.moments.memory}",
    ]
    if parts.base is not None:
      adapters = type(self.adapters).__name__
      told = summary.describe_tuning(plan.shapes.params, parts.base, adapters)
      lines.insert(0, told)
    return "\n".join(lines)

  def _result(
    self,
    workdir: epath.Path,
    step: int,
    stopped: str | None,
    parts: Assembled,
    inputs: Inputs,
    begun: Begun,
  ) -> Result:
    params = parts.whole(averaged(begun.state), begun.frozen)
    return Result(
      workdir, step, stopped, params, parts.decoder, inputs.corpus.tokenizer,
      metrics.read(workdir),
    )  # fmt: skip

  def _cadence(self) -> loop.Cadence:
    return loop.Cadence(
      steps=self.steps,
      log=self.log_every,
      evaluate=self.evaluate_every,
      save=self.checkpoints.every,
      tokens=self.data.batch * self.data.seq_len,
    )

  def _evaluator(
    self, parts: Assembled, corpus: Corpus, batches: Placement, begun: Begun
  ) -> Callable[[TrainState], dict[str, float]]:
    if not any(len(rows) for rows in corpus.held_out):
      print(f"no row is held out (data.held_out={self.data.held_out}): no evaluation")
      return lambda state: {}

    def held_out() -> Iterator[Batch]:
      rows = in_order(corpus.held_out, self.data.batch, rows=batches.rows)
      return map(batches.put, rows)

    if not isinstance(self.objective, NextToken):
      task_scores = make_evaluate_task(parts.scored)
      return lambda state: task_scores(averaged(state), held_out())
    lengths = np.zeros(self.model.vocab, np.int32)
    lengths[: corpus.tokenizer.vocab] = corpus.tokenizer.byte_lengths()
    scores = make_evaluate(parts.decoder, lengths, chunk=self.objective.chunk)
    return lambda state: scores(parts.whole(averaged(state), begun.frozen), held_out())

  def _finished(
    self,
    workdir: epath.Path,
    step: int,
    parts: Assembled,
    inputs: Inputs,
    begun: Begun,
  ) -> Result:
    result = self._result(workdir, step, None, parts, inputs, begun)
    done = f"{step} of {self.steps}"
    if step > self.steps:
      done = f"{step}, past the {self.steps} steps asked for"
    print(
      f"\nthis run is finished: {workdir} is at step {done}. "
      f"{_last_score(result.rows)} To go on, give --config.steps= a larger number; for "
      "a new run, another --workdir."
    )
    return result


def score_first(parts: loop.Parts, state: TrainState) -> None:
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
