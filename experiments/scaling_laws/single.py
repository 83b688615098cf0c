"""One run of the sweep's kind: 123,328 parameters on Shakespeare's bytes.

uv run jaxlm --config=experiments/scaling_laws/single.py --workdir=runs/single
"""

from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.runs.train import Train
from jaxlm.training.optimizers import Muon
from jaxlm.training.schedules import WarmupCosine


def get_config(*, width: int = 64, blocks: int = 2) -> Train:
  """Returns the run."""
  heads = width // 32
  block = Block(
    mixer=GQA(heads=heads, kv_heads=heads, head_dim=32), mlp=GLU(hidden=3 * width)
  )
  return Train(
    model=LM(vocab=258, dim=width, pattern=(block,), repeats=blocks, head="tied"),
    data=Data(
      sources=(Weighted(source=Jsonl(path="jaxlm://corpora/shakespeare.jsonl.gz")),),
      tokenizer=Bytes(),
      seq_len=256,
      batch=4,
    ),
    optimizer=Muon(lr=WarmupCosine(peak=2e-2, warmup=10)),
    steps=100,
  )
