"""Llama 3 from scratch at its published sizes, on a pod of TPUs.

    uv run jaxlm --config=configs/llama3.py:size=8b --plan=v5p:4x4x4
    uv run jaxlm --config=configs/llama3.py:size=8b,text=gs://bucket/text \
        --workdir=gs://bucket/run

Sizes as published (Grattafiori et al. 2024); the tokenizer must have at most 128,256
ids, one of the published size being the usual choice.
"""

from typing import Literal

from jaxlm.data.corpus import Data, Weighted
from jaxlm.data.sources import Jsonl
from jaxlm.data.tokenizers import SentencePiece
from jaxlm.models.families.llama import Size, llama
from jaxlm.models.spec import Precision
from jaxlm.runs.train import Samples, Train
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
) -> Train:
  """Returns the run; every argument can be given after the file's name."""
  return Train(
    model=llama(NAMES[size]),
    data=Data(
      sources=(Weighted(source=Jsonl(path=text)),),
      tokenizer=SentencePiece(vocab=128_000),
      seq_len=seq_len,
      batch=batch,
      held_out=0.001,
    ),
    optimizer=AdamW(lr=WarmupCosine(peak=PEAKS[size], warmup=2000)),
    steps=steps,
    precision=Precision(compute="bfloat16"),
    remat="full",
    evaluate_every=1000,
    checkpoints=Checkpoints(every=1000),
    samples=Samples(prompts=("",)),
  )
