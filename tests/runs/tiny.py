"""A config that trains in a second: bytes, two narrow layers, a little text."""

from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine


def get_config(*, text: str, steps: int = 12) -> Train:
  block = Block(mixer=GQA(heads=4, kv_heads=4, head_dim=8), mlp=GLU(hidden=64))
  return Train(
    model=LM(vocab=264, dim=32, pattern=(block,), repeats=2, head="tied"),
    data=Data(
      sources=(Weighted(source=Jsonl(path=text)),),
      tokenizer=Bytes(),
      seq_len=32,
      batch=8,
    ),
    optimizer=AdamW(lr=WarmupCosine(peak=1e-2, warmup=2)),
    steps=steps,
    ema=0.9,
    evaluate_every=6,
    log_every=1,
    checkpoints=Checkpoints(every=4, keep=9),
    samples=Samples(prompts=()),
  )
