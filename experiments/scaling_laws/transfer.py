r"""Learning rates of models of several widths, with muP's rules and without.

    uv run jaxlm --config=experiments/scaling_laws/transfer.py:scale=real,rules=mup \
      --workdir=runs/mup
    uv run jaxlm --config=experiments/scaling_laws/transfer.py:scale=real,rules=none \
      --workdir=runs/standard

Every width sees the same batches; the learning rates of a width are one program.
RESULT.md has the curves.
"""

from typing import Literal

from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.runs.samples import Samples
from jaxlm.runs.sweep import Sweep
from jaxlm.runs.train import Train
from jaxlm.scaling.transfer import Parametrization, mup, standard
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import WarmupCosine

Scale = Literal["tiny", "real"]
Rules = Literal["mup", "none"]
WIDTHS: dict[Scale, tuple[int, ...]] = {
  "tiny": (16, 32),
  "real": (32, 64, 128, 256),
}
PEAKS: dict[Scale, tuple[float, ...]] = {
  "tiny": tuple(2.0**k for k in (-8, -6, -4)),
  "real": tuple(2.0**k for k in range(-11, -3)),
}
ROWS: dict[Scale, tuple[int, int, int]] = {"tiny": (4, 32, 20), "real": (8, 128, 200)}
"""Rows of a batch, tokens of a row, steps."""
HELD_OUT: dict[Scale, float] = {"tiny": 0.005, "real": 0.03}
"""Share of the scenes that the loss is told of."""


def model(width: int) -> LM:
  """Returns a Llama of two blocks, whose heads have 16 dims at every width."""
  heads = width // 16
  block = Block(
    mixer=GQA(heads=heads, kv_heads=heads, head_dim=16), mlp=GLU(hidden=3 * width)
  )
  return LM(vocab=258, dim=width, pattern=(block,), repeats=2, head="tied")


def parametrized(width: int, scale: Scale, rules: Rules) -> Parametrization:
  """Returns the model of a width; the narrowest is the base."""
  if rules == "none":
    return standard(model(width))
  return mup(model(width), model(WIDTHS[scale][0]), optimizer=AdamW, depth=None)


def run(width: int, scale: Scale, rules: Rules, peak: float) -> Train:
  """Returns the run of a width at a learning rate."""
  batch, seq_len, steps = ROWS[scale]
  shape = parametrized(width, scale, rules)
  return Train(
    model=shape.model,
    data=Data(
      sources=(Weighted(source=Jsonl(path="jaxlm://corpora/shakespeare.jsonl.gz")),),
      tokenizer=Bytes(),
      seq_len=seq_len,
      batch=batch,
      held_out=HELD_OUT[scale],
    ),
    optimizer=shape.optimizer(AdamW(lr=WarmupCosine(peak=peak, warmup=steps // 10))),
    init_scale=shape.init_scale,
    steps=steps,
    samples=Samples(prompts=()),
  )


def get_config(*, scale: Scale = "tiny", rules: Rules = "mup") -> Sweep:
  """Returns the sweep; every argument can be given after the file's name."""
  return Sweep(
    runs=tuple(
      run(width, scale, rules, peak) for width in WIDTHS[scale] for peak in PEAKS[scale]
    )
  )
