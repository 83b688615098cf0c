"""Predicted memory against the compiler's, on a step small enough for the CPU."""

import dataclasses
import functools

import jax
import pytest

from jaxlm.launch import memory
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Keep, Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import NextToken, Task, next_token
from jaxlm.training.schedules import Constant
from jaxlm.training.state import First, axes_of, create
from jaxlm.training.step import compile_step, make_step

ROWS, LENGTH, CHUNK = 8, 256, 64
BLOCK = Block(mixer=GQA(heads=4, kv_heads=4, head_dim=32), mlp=GLU(hidden=512))
MODEL = LM(vocab=1024, dim=128, pattern=(BLOCK,), repeats=1)


@functools.cache
def built(remat: str, fsdp: int, repeats: int = 8):
  layout = Layout(make_mesh(Mesh(fsdp=fsdp), jax.devices()[:fsdp]))
  model = dataclasses.replace(MODEL, repeats=repeats)
  decoder = Decoder(model, Precision(), layout, remat, "auto")
  spec = optimizers.AdamW(lr=Constant(peak=1e-3))
  optimizer = optimizers.build(spec, 10, axes_of(decoder))
  plan, _ = create(decoder, optimizer.transform, First(0), ema=False)
  objective = next_token(NextToken(chunk=CHUNK), decoder)
  ints = ("tokens", "targets", "segments", "positions")
  shape = (ROWS, LENGTH)
  batch = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ints}
  batch["weights"] = jax.ShapeDtypeStruct(shape, "float32")
  with jax.numpy_dtype_promotion("standard"):
    compiled = compile_step(make_step(Task(objective), optimizer), plan, layout, batch)
  work = memory.Work(ROWS / fsdp, LENGTH, CHUNK)
  return memory.predict(decoder, plan, work), compiled.memory_analysis()


@pytest.mark.parametrize("fsdp", [1, 8])
def test_parameters_and_optimizer_are_exact(fsdp):
  told, found = built("full", fsdp)
  batch = 5 * ROWS * LENGTH * 4 / fsdp
  state = found.argument_size_in_bytes - batch
  assert told.parameters + told.optimizer == pytest.approx(state, rel=1e-3)
  assert told.gradients == told.parameters


@pytest.mark.parametrize("remat", ["full", "dots_without_batch", "dots", "none"])
def test_a_block_more_takes_what_was_told(remat):
  """What the CPU's compiler holds of one block it arranges in its own way."""
  (told, found), (more_told, more_found) = (built(remat, 1, n) for n in (8, 16))
  grown = more_found.temp_size_in_bytes - found.temp_size_in_bytes
  predicted = more_told.total - told.total
  predicted -= more_told.parameters - told.parameters
  predicted -= more_told.optimizer - told.optimizer
  assert predicted == pytest.approx(grown, rel=0.1)


def test_less_recomputation_takes_more():
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  work = memory.Work(ROWS, LENGTH, CHUNK)
  kept = [
    memory.kept(Decoder(MODEL, Precision(), layout, remat), work)
    for remat in ("full", "dots", "none")
  ]
  assert kept == sorted(kept)
  assert kept[0] == 128 * ROWS * LENGTH * 4


@pytest.mark.parametrize("placement", ["pre", "post", "output", "sandwich"])
def test_what_a_norm_follows_is_kept(placement):
  """The MLP's update is kept where a norm needs it, and only there."""
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  block = dataclasses.replace(BLOCK, placement=placement)
  model = dataclasses.replace(MODEL, pattern=(block,))
  work = memory.Work(ROWS, LENGTH, CHUNK)
  kept = [
    memory.kept(Decoder(model, Precision(), layout, remat), work)
    for remat in (Keep(), Keep(down="save"))
  ]
  more = 0 if placement == "pre" else 128 * ROWS * LENGTH * 4
  assert kept[1] - kept[0] == more
