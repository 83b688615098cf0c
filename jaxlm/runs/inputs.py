"""What a run reads before it trains: a pretrained model, its text, its tokenizer."""

from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from jaxlm import files
from jaxlm.data.corpus import Corpus, prepare
from jaxlm.data.spec import Data
from jaxlm.data.tokenizers import notes
from jaxlm.data.tokenizers import save as save_tokenizer
from jaxlm.decoding.prefill import check as check_prompts
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import Opened, open_model
from jaxlm.interop.own import FAMILY
from jaxlm.models.decoder import Decoder
from jaxlm.posttrain import distill, objectives
from jaxlm.runs import initial, summary
from jaxlm.runs.teacher import FIELD as TEACHER
from jaxlm.shapes import PyTree
from jaxlm.sharding import processes
from jaxlm.training.checkpoints import Restored

if TYPE_CHECKING:
  from jaxlm.runs.train import Train


class Inputs(NamedTuple):
  """A run's text, and the model that it starts from."""

  corpus: Corpus
  opened: Opened | None

  def weights(self, decoder: Decoder, seed: int) -> PyTree | None:
    """Returns the weights that the run starts from; None: they are drawn.

    Raises:
      InputError: a parameter differs in name or shape.
    """
    return None if self.opened is None else initial.load(self.opened, decoder, seed)


def read_inputs(run: "Train", workdir: epath.Path) -> Inputs:
  """Opens the model, makes or finds the rows, and says what both are.

  Raises:
    InputError: whatever does not exist or does not suit.
  """
  data, opened = run.data, None
  if run.initial is not None:
    opened = open_model(run.initial, "initial")
    print(initial.describe(opened, run.model))
    data = initial.with_tokenizer(data, opened, workdir)
    if opened.family is not None and processes.first():
      files.write_atomic(workdir / FAMILY, opened.family.name)
  if isinstance(run.objective, distill.Distill):
    teacher = open_model(run.objective.teacher, TEACHER)
    print(f"teacher: {teacher.place} ({teacher.kind}, {teacher.stored}), frozen")
    data = initial.with_tokenizer(data, teacher, workdir)
  corpus = _corpus(data, workdir)
  print(corpus.report)
  if isinstance(run.objective, objectives.Unpaired):
    print(summary.describe_labels(corpus, run.data.sequences, run.objective.loss))
  for note in notes(corpus.tokenizer):
    print(note)
  if processes.first():
    save_tokenizer(corpus.tokenizer, workdir)
  if run.model.vocab < corpus.tokenizer.vocab:
    raise InputError(
      f"model.vocab: {run.model.vocab} ids are fewer than the tokenizer's "
      f"{corpus.tokenizer.vocab}. Use at least that."
    )
  if run.samples.prompts:
    prompts = run.samples.ids(corpus.tokenizer)
    check_prompts(run.model, prompts, tokens=run.samples.tokens)
  return Inputs(corpus, opened)


def _corpus(data: Data, workdir: epath.Path) -> Corpus:
  # The first makes the cache; the others find it, or make their own where their disk
  # is not the first's.
  corpus = processes.lead("data", lambda: prepare(data, workdir / "data"))
  corpus = corpus or prepare(data, workdir / "data")
  processes.require_same("data.sources", corpus.fingerprint)
  return corpus


def check_same(restored: Restored, told: dict[str, str], data: Data) -> None:
  """Raises InputError where a checkpoint is of other rows or another frozen base."""
  rows, base = restored.data["corpus"], restored.data.get("base")
  if rows != told["corpus"]:
    sources = ", ".join(weighted.source.path for weighted in data.sources)
    raise InputError(
      f"data.sources: the text ({sources}) or the version of the tokenizer's trainer "
      f"is not what step {restored.step} was trained on: its rows were {rows}, these "
      f"are {told['corpus']}. Bring the files back, or give another --workdir."
    )
  if base != told.get("base"):
    raise InputError(
      f"initial: these weights are {told.get('base')}, and what is in step "
      f"{restored.step} was trained beside {base}. Bring the first weights back, or "
      "give another --workdir."
    )
