"""Continues training from a pretrained model, on your text.

    uv run jaxlm --workdir=runs/finetune \
      --config=configs/finetune.py:model=SmolLM2-135M-Instruct.Q4_1.gguf
    uv run jaxlm --workdir=runs/mine \
      --config=configs/finetune.py:model=models/mine,text=texts/*.jsonl.gz

The model is a Hugging Face folder, a .gguf file, a folder that configs/convert.py wrote
or a run's workdir; its tokenizer comes with it. The text is jsonl with a field `text`;
by default the plays that ship with jaxlm. What the model scores on held-out text is
shown before the first step and after.
"""

from jaxlm.data.pretrained import Pretrained
from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.spec import Precision, for_length
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine


def get_config(
  *,
  model: str,
  text: str = "jaxlm://corpora/shakespeare.jsonl.gz",
  seq_len: int = 256,
  batch: int = 4,
  steps: int = 100,
) -> Train:
  """Returns the run; the architecture is read from the model's files."""
  opened = open_model(model)
  return Train(
    model=for_length(opened.model, seq_len),
    initial=model,
    precision=Precision(params=opened.dtype),
    data=Data(
      sources=(Weighted(source=Jsonl(path=text)),),
      tokenizer=Pretrained(path=model, vocab=opened.model.vocab),
      seq_len=seq_len,
      batch=batch,
    ),
    optimizer=AdamW(lr=WarmupCosine(peak=5e-5, warmup=max(1, steps // 10))),
    steps=steps,
    checkpoints=Checkpoints(every=50),
    evaluate_every=50,
    samples=Samples(prompts=("",), tokens=96),
  )
