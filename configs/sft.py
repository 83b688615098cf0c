"""Supervised fine-tuning of a pretrained model on conversations.

    uv run jaxlm --workdir=runs/sft \
      --config=configs/sft.py:model=SmolLM2-135M-Instruct.Q4_1.gguf
    uv run jaxlm --workdir=runs/mine \
      --config=configs/sft.py:model=models/mine,data=chats/*.jsonl.gz,seq_len=2048

The model is a Hugging Face folder, a .gguf file, a folder that configs/convert.py wrote
or a run's workdir. A row of the data has `messages` (or ShareGPT's `conversations`, or
`prompt` and `completion`); the loss is on what the assistant says. By default the data
is 3,181 exchanges out of the plays that ship with jaxlm.

Measured with SmolLM2-135M-Instruct, steps=50,lr=1e-4, float32, on two cores of an AMD
EPYC, 4 min 6 s in all: the held-out answers go from 2.063 to 1.671 bits per byte, and
"Who are you?" is answered by "I am a man of the world, and I am a man of the world."
"""

from jaxlm.data.conversations import Chats
from jaxlm.data.pretrained import Pretrained
from jaxlm.data.spec import Data, Weighted
from jaxlm.decoding.sampling import Sampling
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.spec import Precision, for_length
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.objective import NextToken
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine


def get_config(
  *,
  model: str,
  data: str = "jaxlm://corpora/dialogues.jsonl.gz",
  seq_len: int = 256,
  batch: int = 4,
  steps: int = 150,
  lr: float = 5e-5,
  neftune: float = 0.0,
) -> Train:
  """Returns the run; the architecture is read from the model's files."""
  opened = open_model(model)
  return Train(
    model=for_length(opened.model, seq_len),
    initial=model,
    objective=NextToken(neftune=neftune),
    precision=Precision(params=opened.dtype),
    data=Data(
      sources=(Weighted(source=Chats(path=data)),),
      tokenizer=Pretrained(path=model, vocab=opened.model.vocab),
      seq_len=seq_len,
      batch=batch,
    ),
    optimizer=AdamW(lr=WarmupCosine(peak=lr, warmup=max(1, steps // 10))),
    steps=steps,
    checkpoints=Checkpoints(every=50),
    evaluate_every=50,
    samples=Samples(
      prompts=("Who are you?", "Good morrow, my lord. What news from the court?"),
      tokens=48,
      sampling=Sampling(temperature=0.0),
      chat=True,
    ),
  )
