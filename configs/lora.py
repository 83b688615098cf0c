"""Adapters on a pretrained model: LoRA and its kin, QLoRA, soft prompts, parts of it.

    uv run jaxlm --workdir=runs/lora \
      --config=configs/lora.py:model=SmolLM2-135M-Instruct.Q4_1.gguf
    uv run jaxlm --workdir=runs/qlora-dpo \
      --config=configs/lora.py:model=MODEL,method=qlora,objective=dpo

method= is one of the table below; objective= is sft (conversations), dpo (pairs) or
reward (a reward model of pairs, whose head trains too). The model is a Hugging Face
folder, a .gguf file, a folder of configs/convert.py or a run's workdir; the data
is that of configs/sft.py or configs/dpo.py. Of the model nothing changes and nothing is
written but what trains; references of dpo are its own. The workdir opens as the merged
model, say in configs/chat.py or configs/convert.py.

Measured with SmolLM2-135M-Instruct, steps=40, float32, on two cores of an AMD EPYC, 2
to 5 s a step: held-out replies go from 2.063 bits per byte to 1.701 (lora), 1.700
(rslora, dora), 1.731 (ia3), 1.740 (prefix), 1.763 (prompt), and from 2.148 to 1.747
(qlora); the whole model, by configs/sft.py, to 1.679
(`experiments/adapters/RESULT.md`).
"""

import dataclasses
from typing import Literal

from jaxlm.data.conversations import Chats, Preferences
from jaxlm.data.pretrained import Pretrained
from jaxlm.data.spec import Data, Weighted
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError, nearest
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.spec import Precision, for_length
from jaxlm.peft.bottleneck import Bottleneck
from jaxlm.peft.ia3 import IA3
from jaxlm.peft.lora import LoRA
from jaxlm.peft.methods import Adapters
from jaxlm.peft.part import Part
from jaxlm.peft.products import LoHa, VeRA
from jaxlm.peft.soft_prompt import Prefix, Prompt, PTuning
from jaxlm.posttrain.objectives import Preference, Reward
from jaxlm.quantization.formats import NF4
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.objective import NextToken
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine

METHODS: dict[str, tuple[Adapters, float]] = {
  "lora": (LoRA(), 1e-3),
  "rslora": (LoRA(rslora=True), 5e-4),
  "dora": (LoRA(dora=True), 1e-3),
  "loraplus": (LoRA(), 2e-4),
  "qlora": (LoRA(), 1e-3),
  "pissa": (LoRA(start="pissa"), 2e-4),
  "olora": (LoRA(start="olora"), 2e-4),
  "vera": (VeRA(), 1e-2),
  "loha": (LoHa(), 1e-3),
  "ia3": (IA3(), 1e-2),
  "prefix": (Prefix(), 1e-2),
  "prompt": (Prompt(), 1e-2),
  "ptuning": (PTuning(), 1e-3),
  "serial": (Bottleneck(), 1e-3),
  "parallel": (Bottleneck(where="parallel"), 1e-3),
  "norms": (Part(train=("norms-and-biases",)), 5e-3),
  "last": (Part(train=("",), last=2), 1e-4),
}
"""What trains, and the learning rate where none is given."""


def get_config(
  *,
  model: str,
  method: str = "lora",
  objective: Literal["sft", "dpo", "reward"] = "sft",
  data: str | None = None,
  rank: int | None = None,
  alpha: float | None = None,
  seq_len: int = 256,
  batch: int = 4,
  steps: int = 100,
  lr: float | None = None,
) -> Train:
  """Returns the run; the architecture is read from the model's files."""
  if method not in METHODS:
    raise InputError(
      f"method: {method!r}; it takes {', '.join(METHODS)}.{nearest(method, METHODS)}"
    )
  adapters, peak = METHODS[method]
  if isinstance(adapters, LoRA):
    rank = adapters.rank if rank is None else rank
    alpha = 2.0 * rank if alpha is None else alpha
    adapters = dataclasses.replace(adapters, rank=rank, alpha=alpha)
  elif (rank, alpha) != (None, None):
    raise InputError(f"rank, alpha: {method} has neither; leave both.")
  pairs = objective != "sft"
  default = "preferences" if pairs else "dialogues"
  path = data or f"jaxlm://corpora/{default}.jsonl.gz"
  opened = open_model(model)
  shape = for_length(opened.model, seq_len)
  rate = WarmupCosine(peak=peak if lr is None else lr, warmup=max(1, steps // 10))
  faster = ((r"/b$", 16.0), (r".*", 1.0)) if method == "loraplus" else ((r".*", 1.0),)
  goals = {"sft": NextToken(), "dpo": Preference(), "reward": Reward()}
  return Train(
    model=dataclasses.replace(shape, scores=1) if objective == "reward" else shape,
    initial=model,
    adapters=adapters,
    also=("^score$",) if objective == "reward" else (),
    quantized=NF4() if method == "qlora" else None,
    objective=goals[objective],
    precision=Precision(params=opened.dtype),
    data=Data(
      sources=(Weighted(source=Preferences(path=path) if pairs else Chats(path=path)),),
      tokenizer=Pretrained(path=model, vocab=opened.model.vocab),
      seq_len=seq_len,
      batch=batch,
      held_out=0.1 if pairs else 0.05,
    ),
    optimizer=AdamW(lr=rate, weight_decay=0.0, lr_scale=faster),
    steps=steps,
    checkpoints=Checkpoints(every=50),
    evaluate_every=50,
    samples=Samples(
      prompts=("Who are you?",) if objective != "reward" else (),
      tokens=48,
      sampling=Sampling(temperature=0.0),
      chat=True,
    ),
  )
