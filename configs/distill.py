"""Distillation: a small model learns a larger one's distribution of every token.

    uv run jaxlm --config=configs/quickstart.py --workdir=runs/quickstart
    uv run jaxlm --workdir=runs/distilled \
      --config=configs/distill.py:teacher=runs/quickstart

method= is forward, reverse or jsd (the divergence), or nll (no teacher: the same
student on the text alone, to compare with). Without top_k= the teacher runs beside the
student on the same mesh; with top_k=64 (forward alone) its 64 largest log-probabilities
of each token are stored once beside the data, 512 bytes a token; then nll=1 adds the
text's own likelihood, without which the student learns nothing of the other ids. The
student is a new Llama of dim= and layers=, or student=, a pretrained model with the
teacher's ids.

Measured on two cores of an AMD EPYC, held-out nats a token (the teacher: 4.184):
method=nll 4.525 in 39 s, forward 4.313 in 3 min 10 s, top_k=64 4.567, top_k=64,nll=1
4.375 (`experiments/posttraining/RESULT.md`).

On sequences (Kim and Rush 2016) the teacher writes answers, and the student learns them
by configs/sft.py. An answer that was cut at --config.tokens is learnt as if it ended
there: leave out rows whose `ended` is "length".

    uv run jaxlm --config.chats=true \
      --config=configs/generate.py:model=TEACHER,prompts=prompts.jsonl,out=out.jsonl
    uv run jaxlm --workdir=runs/student \
      --config=configs/sft.py:model=STUDENT,data=out.jsonl
"""

from typing import Literal

from jaxlm.data.pretrained import Pretrained
from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision, for_length
from jaxlm.posttrain.distill import Distill
from jaxlm.posttrain.divergence import Divergence
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.objective import NextToken
from jaxlm.training.optimizers import AdamW, Muon
from jaxlm.training.schedules import WarmupCosine


def get_config(
  *,
  teacher: str,
  student: str = "",
  method: Literal["forward", "reverse", "jsd", "nll"] = "forward",
  top_k: int = 0,
  nll: float = 0.0,
  text: str = "jaxlm://corpora/shakespeare.jsonl.gz",
  dim: int | None = None,
  layers: int | None = None,
  seq_len: int = 256,
  batch: int = 8,
  steps: int = 300,
  lr: float | None = None,
) -> Train:
  """Returns the run; the student takes ids and tokenizer of the teacher."""
  if student and (dim, layers) != (None, None):
    raise InputError(f"student: {student} has dim and layers of its own; leave both.")
  dim, layers = (128 if dim is None else dim), (2 if layers is None else layers)
  if dim % 64:
    raise InputError(f"dim: {dim} is no multiple of 64, the dim of a head.")
  vocab = open_model(teacher, "teacher").model.vocab
  mixer = GQA(heads=dim // 64, kv_heads=dim // 64, head_dim=64)
  block = Block(mixer=mixer, mlp=GLU(hidden=3 * dim))
  model = LM(vocab=vocab, dim=dim, pattern=(block,), repeats=layers, head="tied")
  precision = Precision()
  rate = WarmupCosine(peak=6e-3 if lr is None else lr, warmup=20)
  optimizer: Muon | AdamW = Muon(lr=rate)
  if student:
    opened = open_model(student, "student")
    model, precision = for_length(opened.model, seq_len), Precision(params=opened.dtype)
    rate = WarmupCosine(peak=5e-5 if lr is None else lr, warmup=20)
    optimizer = AdamW(lr=rate)
  objective: NextToken | Distill = NextToken()
  if method != "nll":
    objective = Distill(
      teacher=teacher, divergence=Divergence(kind=method), top_k=top_k, nll=nll
    )
  elif top_k or nll:
    raise InputError(f"top_k={top_k},nll={nll}: method=nll has no teacher; leave both.")
  return Train(
    model=model,
    initial=student or None,
    precision=precision,
    objective=objective,
    data=Data(
      sources=(Weighted(source=Jsonl(path=text)),),
      tokenizer=Pretrained(path=teacher, vocab=vocab),
      seq_len=seq_len,
      batch=batch,
    ),
    optimizer=optimizer,
    steps=steps,
    checkpoints=Checkpoints(every=100),
    samples=Samples(prompts=("ROMEO\n",), tokens=96),
  )
