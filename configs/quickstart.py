"""A small Llama on Shakespeare, on a laptop's CPU.

    uv run jaxlm --config=configs/quickstart.py --workdir=runs/quickstart

Text: 38 plays that ship with jaxlm (`jaxlm/corpora/SOURCES.md`). On the same held-out
scenes `xz -9` reaches 2.397 bits per byte and a Kneser-Ney 5-gram model of bytes 2.048
(`experiments/quickstart_baselines/`). Measured on two cores of an
AMD EPYC: 1.903 in 3 min 7 s, the making of the Python environment included.
"""

from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import SentencePiece
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.runs.samples import Samples
from jaxlm.runs.train import Train
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.optimizers import Muon
from jaxlm.training.schedules import WarmupCosine


def get_config(
  *, dim: int = 256, layers: int = 4, seq_len: int = 256, vocab: int = 4096
) -> Train:
  """Returns the run; every argument can be given after the file's name."""
  if dim % 64:
    raise InputError(f"dim: {dim} is no multiple of 64, the dim of a head.")
  heads = dim // 64
  block = Block(
    mixer=GQA(heads=heads, kv_heads=heads, head_dim=64), mlp=GLU(hidden=3 * dim)
  )
  return Train(
    model=LM(vocab=vocab, dim=dim, pattern=(block,), repeats=layers, head="tied"),
    data=Data(
      sources=(Weighted(source=Jsonl(path="jaxlm://corpora/shakespeare.jsonl.gz")),),
      tokenizer=SentencePiece(vocab=vocab),
      seq_len=seq_len,
      batch=8,
    ),
    optimizer=Muon(lr=WarmupCosine(peak=6e-3, warmup=20)),
    steps=450,
    checkpoints=Checkpoints(every=100),
    samples=Samples(
      prompts=("Hamlet\n\nACT I", "ROMEO\n", ""),
      tokens=160,
      sampling=Sampling(temperature=0.8, top_p=0.95),
    ),
  )
