"""Llama 3 from scratch at its published sizes, on a pod of TPUs.

    uv run --extra plan jaxlm --config=configs/llama3.py:size=8b --plan=v5p:4x4x4

compiles the step for 64 chips that are not there, and

    uv run --extra tpu jaxlm --config=configs/llama3.py:size=8b,text=TEXT --workdir=DIR

on every host trains: TEXT such as gs://bucket/text/*.jsonl.zst (with --extra gcs), DIR
a folder that all hosts see; a workdir on gs:// is refused. Sizes as published
(Grattafiori et al. 2024); the tokenizer, of 128,000 ids, is trained on the text. Not
trained on a pod yet. By the plan (experiments/plan/, libtpu 0.0.42.1):

    size, batch  on         peak GB  of HBM  TFLOP in products  at best, an estimate
    8b     256   v5p:4x4x4     16.3    95.0     1,810 a chip    4.6 s, 455k tokens/s
    8b   1,024   v6e:16x16     14.7    32.0     1,810 a chip    2.4 s, 3.5M tokens/s
    70b  1,024   v5p:4x8x8     60.4    95.0    16,919 a chip   40.4 s, 207k tokens/s

method=lora and method=qlora, with model=FOLDER (published weights), train adapters
beside it: one v5p, batch=1,seq_len=1024, peak 18.5 GB for 8b by lora, 46.2 for 70b by
qlora.
"""

from typing import Literal

from jaxlm.data.pretrained import Pretrained
from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import SentencePiece
from jaxlm.errors import InputError
from jaxlm.models.families.llama import Size, llama
from jaxlm.models.spec import Precision
from jaxlm.peft.lora import LoRA
from jaxlm.quantization.formats import NF4
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine

PEAKS = {"1b": 5e-4, "3b": 4e-4, "8b": 3e-4, "70b": 1.5e-4}
"""Learning rates: 3e-4 and 1.5e-4 are the paper's; the smaller sizes' are ours."""
NAMES: dict[str, Size] = {"1b": "3.2-1b", "3b": "3.2-3b", "8b": "3-8b", "70b": "3-70b"}


def get_config(
  *,
  size: Literal["1b", "3b", "8b", "70b"] = "8b",
  seq_len: int = 8192,
  batch: int = 256,
  steps: int = 100_000,
  text: str = "text/*.jsonl.zst",
  method: Literal["whole", "lora", "qlora"] = "whole",
  model: str | None = None,
  rank: int = 8,
) -> Train:
  """Returns the run; every argument can be given after the file's name."""
  if method != "whole" and model is None:
    raise InputError(f"model: method={method} trains beside a model; name its folder.")
  beside, shape = method != "whole", llama(NAMES[size])
  return Train(
    model=shape,
    initial=model,
    adapters=LoRA(rank=rank, alpha=2.0 * rank) if beside else None,
    quantized=NF4() if method == "qlora" else None,
    data=Data(
      sources=(Weighted(source=Jsonl(path=text)),),
      tokenizer=SentencePiece(vocab=128_000)
      if model is None
      else Pretrained(path=model, vocab=shape.vocab),
      seq_len=seq_len,
      batch=batch,
      held_out=0.001,
    ),
    optimizer=AdamW(lr=WarmupCosine(peak=PEAKS[size], warmup=2000)),
    steps=steps,
    precision=Precision(params="bfloat16" if beside else "float32", compute="bfloat16"),
    remat="full",
    evaluate_every=1000,
    checkpoints=Checkpoints(every=1000),
    samples=Samples(prompts=("",)),
  )
