"""Learning from answers that are labelled good or bad: KTO, or APO without pairs.

    uv run jaxlm --workdir=runs/kto \
      --config=configs/kto.py:model=SmolLM2-135M-Instruct.Q4_1.gguf

method= is kto or apo_zero_unpaired. A row of the data has `prompt`, `completion` and
`label` (true or false). By default these are the answers of configs/dpo.py's data, each
on its own: the play's are good, SmolLM2's are bad.

Measured with SmolLM2-135M-Instruct, float32, on two busy cores of an AMD EPYC, 11
minutes: on held-out pairs the good answers gain 9.9 nats, the bad ones lose 36.7
(`experiments/posttraining/RESULT.md`).
"""

from typing import Literal

from jaxlm.data.conversations import Labelled
from jaxlm.data.pretrained import Pretrained
from jaxlm.data.spec import Data, Weighted
from jaxlm.decoding.sampling import Sampling
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.spec import Precision, for_length
from jaxlm.posttrain.kto import KTO
from jaxlm.posttrain.objectives import Unpaired
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine


def get_config(
  *,
  model: str,
  method: Literal["kto", "apo_zero_unpaired"] = "kto",
  data: str = "jaxlm://corpora/preferences.jsonl.gz",
  seq_len: int = 512,
  batch: int = 2,
  steps: int = 60,
  lr: float = 1e-5,
) -> Train:
  """Returns the run; the architecture is read from the model's files."""
  opened = open_model(model)
  return Train(
    model=for_length(opened.model, seq_len),
    initial=model,
    objective=Unpaired(loss=KTO(method=method)),
    precision=Precision(params=opened.dtype),
    data=Data(
      sources=(Weighted(source=Labelled(path=data, kl=method == "kto")),),
      tokenizer=Pretrained(path=model, vocab=opened.model.vocab),
      seq_len=seq_len,
      batch=batch,
      held_out=0.1,
    ),
    optimizer=AdamW(lr=WarmupCosine(peak=lr, warmup=max(1, steps // 10))),
    steps=steps,
    checkpoints=Checkpoints(every=30),
    evaluate_every=20,
    samples=Samples(
      prompts=("Who are you?", "Good morrow, my lord. What news from the court?"),
      tokens=48,
      sampling=Sampling(temperature=0.0),
      chat=True,
    ),
  )
