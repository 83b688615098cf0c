"""The coordinate check: how far a few steps move each part of models 16 times as wide.

    uv run python experiments/scaling_laws/coordinates.py

Prints, for each optimizer with muP's rules and without, the exponent of width with
which each part's change grows, and writes coordinates.png. On Shakespeare's bytes.
"""

import pathlib

import jax.numpy as jnp
from absl import app

from jaxlm.data.corpus import prepare
from jaxlm.data.loader import Loader
from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.models.spec import GLU, GQA, LM, Block
from jaxlm.scaling import plots
from jaxlm.scaling.transfer import coordinate_check, growth, mup, standard
from jaxlm.training.optimizers import AdamW, Muon
from jaxlm.training.schedules import Constant

HERE = pathlib.Path(__file__).parent
WIDTHS = (64, 128, 256, 512, 1024)
STEPS = 4
DATA = Data(
  sources=(Weighted(source=Jsonl(path="jaxlm://corpora/shakespeare.jsonl.gz")),),
  tokenizer=Bytes(),
  seq_len=64,
  batch=8,
  held_out=0.0,
)
OPTIMIZERS = {
  "AdamW, 4e-3": AdamW(lr=Constant(peak=4e-3)),
  "Muon, 1e-2": Muon(lr=Constant(peak=1e-2)),
}


def model(width: int) -> LM:
  heads = width // 16
  block = Block(
    mixer=GQA(heads=heads, kv_heads=heads, head_dim=16), mlp=GLU(hidden=3 * width)
  )
  return LM(vocab=258, dim=width, pattern=(block,), repeats=2, head="tied")


def main(_) -> None:
  corpus = prepare(DATA, "runs/coordinates")
  with Loader(corpus, DATA, rows=range(DATA.batch), start=0) as loader:
    batches = [
      {name: jnp.asarray(values) for name, values in next(loader).items()}
      for _ in range(STEPS)
    ]
  sets = {}
  for name, spec in OPTIMIZERS.items():
    for rules in ("muP", "standard"):
      shapes = [model(width) for width in WIDTHS]
      models = [
        mup(shape, shapes[0], optimizer=type(spec), depth=None)
        if rules == "muP"
        else standard(shape)
        for shape in shapes
      ]
      found = coordinate_check(models, spec, batches, 0)
      sets[f"{name}: {rules}"] = found
      told = ", ".join(f"{part} {value:+.2f}" for part, value in growth(found).items())
      print(f"{name}, {rules}: {told}", flush=True)
  plots.save(plots.coordinates(sets), HERE / "coordinates.png")


if __name__ == "__main__":
  app.run(main)
