"""A small model, real text in uneven rows, and states made from them."""

import functools
import gzip
import json

import jax
import numpy as np

from jaxlm import files
from jaxlm.data import packing
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import placer
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import NextToken, Task, next_token
from jaxlm.training.schedules import Constant
from jaxlm.training.state import First, axes_of, create
from jaxlm.training.step import compile_step, make_step

BATCH, LENGTH, VOCAB = 8, 32, 264
BLOCK = Block(mixer=GQA(heads=4, kv_heads=4, head_dim=8), mlp=GLU(hidden=64))
MODEL = LM(vocab=VOCAB, dim=32, pattern=(BLOCK,), repeats=2, head="untied")
ONE = Mesh(fsdp=1)
MIXED = Mesh(fsdp=4, tensor=2)


def layout_of(mesh: Mesh) -> Layout:
  return Layout(make_mesh(mesh, jax.devices()[:1] if mesh == ONE else None))


def decoder_of(mesh: Mesh = ONE, *, model: LM = MODEL, params="float32") -> Decoder:
  return Decoder(model, Precision(params=params), layout_of(mesh), "none")


@functools.cache
def batch(step: int = 0) -> dict[str, np.ndarray]:
  """Scenes by bytes; row r holds about (r + 1) / 8 of what fits, in three documents."""
  with gzip.open(files.path("jaxlm://corpora/shakespeare.jsonl.gz"), "rt") as lines:
    text = json.loads(next(lines))["text"]
  ids = np.array(ByteTokenizer().encode(text))
  tokens = np.full((BATCH, LENGTH + 1), packing.PADDING)
  segments = np.full((BATCH, LENGTH + 1), packing.PADDING)
  for row in range(BATCH):
    end = (row + 1) * (LENGTH + 1) // BATCH
    first = 97 * (step * BATCH + row)
    tokens[row, :end] = ids[first : first + end]
    segments[row, :end] = 1 + np.arange(end) * 3 // (LENGTH + 1)
  return packing.examples(tokens, segments)


def on_mesh(layout: Layout, rows: dict[str, np.ndarray]):
  sharding = layout.sharding("batch", "sequence")
  return placer(sharding, (BATCH, LENGTH))(rows)


def setup(spec, mesh=ONE, *, ema=None, micro_batches=1, decoder=None, steps=100):
  """Returns (compiled step, function that makes the first state, plan, decoder)."""
  decoder = decoder or decoder_of(mesh)
  built = optimizers.build(spec, steps, axes_of(decoder))
  plan, first = create(decoder, built.transform, First(0), ema=ema is not None)
  step = make_step(
    Task(next_token(NextToken(chunk=16), decoder)),
    built,
    micro_batches=micro_batches,
    ema_decay=ema,
  )
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch())
  return compile_step(step, plan, decoder.layout, shapes), first, plan, decoder


def run(compiled, first, layout, steps):
  """Returns (state, metrics of every step) after training on the first batches."""
  state, metrics = first(), []
  for i in range(steps):
    state, row = compiled(state, on_mesh(layout, batch(i % 4)))
    metrics.append({name: float(value) for name, value in row.items()})
  return state, metrics


def adamw(**fields):
  return optimizers.AdamW(**{"lr": Constant(peak=1e-2), **fields})
