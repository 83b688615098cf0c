r"""Many small Llamas on Shakespeare's bytes: a few budgets, at each several sizes.

    uv run jaxlm --config=experiments/scaling_laws/sweep.py:scale=real \
      --workdir=runs/laws

The rows are what `scaling_laws.ipynb` fits; RESULT.md has what came out. A size is a
width and a depth; what a budget leaves of tokens follows from the exact operations of a
token, attention's causal half included.
"""

from typing import Literal

from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.runs.samples import Samples
from jaxlm.runs.sweep import Sweep
from jaxlm.runs.train import Train
from jaxlm.scaling import budget
from jaxlm.training.optimizers import Muon
from jaxlm.training.schedules import WarmupCosine

Scale = Literal["tiny", "real"]
Size = tuple[int, int]
"""Width and blocks."""
VOCAB = 258
SIZES: dict[Scale, tuple[Size, ...]] = {
  "tiny": ((16, 1), (16, 2), (32, 1), (32, 2)),
  "real": ((16, 2), (32, 1), (32, 2), (48, 2), (64, 3), (96, 3)),
}
BUDGETS: dict[Scale, tuple[float, ...]] = {
  "tiny": (2.5e8, 5e8, 1e9),
  "real": (1.5e11, 4.5e11, 1.35e12),
}
"""Operations of a training run."""
PEAKS: dict[Scale, tuple[float, ...]] = {
  "tiny": (1e-2, 2e-2, 4e-2),
  "real": (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
}
"""Learning rates; the best of them counts."""
LARGER: dict[Scale, tuple[Size, float]] = {
  "tiny": ((48, 2), 4.4e9),
  "real": ((80, 3), 6e12),
}
"""The run that a fit of the others shall predict: its size, its operations."""
ROWS: dict[Scale, tuple[int, int]] = {"tiny": (4, 32), "real": (4, 256)}
"""Rows of a batch, tokens of a row."""
HELD_OUT: dict[Scale, float] = {"tiny": 0.005, "real": 0.03}
"""Share of the scenes that the loss is told of."""


def model(width: int, blocks: int) -> LM:
  """Returns a Llama of heads of 16 or 32 dims."""
  head_dim = 16 if width < 64 else 32
  heads = width // head_dim
  block = Block(
    mixer=GQA(heads=heads, kv_heads=heads, head_dim=head_dim), mlp=GLU(hidden=3 * width)
  )
  return LM(vocab=VOCAB, dim=width, pattern=(block,), repeats=blocks, head="tied")


def run(scale: Scale, size: Size, flops: float, peak: float) -> Train:
  """Returns the run of a model that takes so many operations."""
  shape, (batch, seq_len) = model(*size), ROWS[scale]
  tokens = budget.tokens_for(flops, shape, seq_len=seq_len, counting="causal")
  steps = max(1, round(tokens / (batch * seq_len)))
  return Train(
    model=shape,
    data=Data(
      sources=(Weighted(source=Jsonl(path="jaxlm://corpora/shakespeare.jsonl.gz")),),
      tokenizer=Bytes(),
      seq_len=seq_len,
      batch=batch,
      held_out=HELD_OUT[scale],
    ),
    optimizer=Muon(lr=WarmupCosine(peak=peak, warmup=min(20, steps // 10))),
    steps=steps,
    samples=Samples(prompts=()),
  )


def get_config(
  *,
  scale: Scale = "tiny",
  part: Literal["grid", "larger"] = "grid",
  peak: float | None = None,
) -> Sweep:
  """Returns the sweep; every argument can be given after the file's name."""
  peaks = PEAKS[scale] if peak is None else (peak,)
  if part == "larger":
    size, flops = LARGER[scale]
    return Sweep(runs=tuple(run(scale, size, flops, peak) for peak in peaks))
  return Sweep(
    runs=tuple(
      run(scale, size, flops, peak)
      for size in SIZES[scale]
      for flops in BUDGETS[scale]
      for peak in peaks
    )
  )
