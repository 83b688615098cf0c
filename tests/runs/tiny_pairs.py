"""DPO on a few short pairs: bytes, one narrow layer."""

from jaxlm.data.conversations import Preferences
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.posttrain.objectives import Preference
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import Constant


def get_config(*, pairs: str, steps: int = 4) -> Train:
  block = Block(mixer=GQA(heads=2, kv_heads=2, head_dim=8), mlp=GLU(hidden=32))
  return Train(
    model=LM(vocab=264, dim=16, pattern=(block,), repeats=1, head="tied"),
    objective=Preference(),
    data=Data(
      sources=(Weighted(source=Preferences(path=pairs)),),
      tokenizer=Bytes(),
      seq_len=128,
      batch=8,
      held_out=0.2,
    ),
    optimizer=AdamW(lr=Constant(peak=3e-3)),
    steps=steps,
    evaluate_every=2,
    log_every=1,
    checkpoints=Checkpoints(every=2, keep=9),
    samples=Samples(prompts=()),
  )
