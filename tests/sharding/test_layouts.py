"""Layout changes nothing: every mesh against one device, through the training step.

A difference is relative to its leaf: max |a - b| / max |b|, with b from one device.
Initial parameters are equal to the last bit; loss and every gradient leaf to 1e-5 in
float32; parameters after a step of AdamW to 1e-5 too.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.launch.memory import held_bytes
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Keep, Precision, Remat
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import placer
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.training import optimizers, schedules
from jaxlm.training.objective import NextToken, Task, next_token
from jaxlm.training.state import First, Moments, axes_of, create
from jaxlm.training.step import compile_step, make_step
from jaxlm.trees import named_leaves

TOLERANCE = 1e-5
SHAPE = (16, 12)
MESHES = {
  "data 8": Mesh(data=8, fsdp=1),
  "fsdp 8": Mesh(fsdp=8),
  "tensor 8": Mesh(fsdp=1, tensor=8),
  "data 2 x fsdp 4": Mesh(data=2, fsdp=4),
  "fsdp 4 x tensor 2": Mesh(fsdp=4, tensor=2),
  "data 2 x fsdp 2 x tensor 2": Mesh(data=2, fsdp=2, tensor=2),
  "context 4": Mesh(data=2, fsdp=1, context=4),
  "data 2 x tensor 4": Mesh(data=2, fsdp=1, tensor=4),
  "context 2 x tensor 4": Mesh(fsdp=1, context=2, tensor=4),
  "data 2 x context 2 x fsdp 2": Mesh(data=2, context=2, fsdp=2),
  "fsdp 2 x context 2 x tensor 2": Mesh(fsdp=2, context=2, tensor=2),
  "2 slices x data 2 x fsdp 2": Mesh(data=4, fsdp=2, slices=2),
}
PLAIN, ALIKE = ShardingRules(), Moments()
SEQUENCE_PARALLEL = ShardingRules(stream=("context", "tensor"))
ZERO = ShardingRules(embed=("fsdp", "data"))


class Place(NamedTuple):
  """What must not change a number."""

  mesh: Mesh
  rules: ShardingRules = PLAIN
  moments: Moments = ALIKE
  remat: Remat = "none"


PLACES = {name: Place(mesh) for name, mesh in MESHES.items()} | {
  "fsdp 4 x tensor 2, sequence parallel": Place(
    Mesh(fsdp=4, tensor=2), SEQUENCE_PARALLEL
  ),
  "fsdp 2 x context 2 x tensor 2, sequence parallel": Place(
    Mesh(fsdp=2, context=2, tensor=2), SEQUENCE_PARALLEL
  ),
  "data 8, moments shared": Place(Mesh(data=8, fsdp=1), moments=Moments(sharding=ZERO)),
  "data 2 x fsdp 2 x tensor 2, moments shared, sequence parallel": Place(
    Mesh(data=2, fsdp=2, tensor=2),
    SEQUENCE_PARALLEL,
    Moments(sharding=dataclasses.replace(SEQUENCE_PARALLEL, embed=("fsdp", "data"))),
  ),
  "fsdp 4 x tensor 2, moments and activations on the host": Place(
    Mesh(fsdp=4, tensor=2),
    moments=Moments(memory="host"),
    remat=Keep(input="offload", attention="save", up="offload"),
  ),
}
BLOCK = Block(mixer=GQA(heads=16, kv_heads=8, head_dim=4), mlp=GLU(hidden=128))
MODELS = {
  "untied": LM(vocab=64, dim=64, pattern=(BLOCK,), repeats=2),
  "tied": LM(vocab=64, dim=64, pattern=(BLOCK,), repeats=2, head="tied", softcap=5.0),
}
MICRO_BATCHES = {"untied": 1, "tied": 2}
CASES = [("untied", place) for place in PLACES]
CASES += [("tied", "data 2 x fsdp 2 x tensor 2")]


class Kept(NamedTuple):
  """Gradients as the optimizer got them."""

  grads: optax.Updates


class Seen(NamedTuple):
  """What a layout gave, on the host, by name of leaf."""

  first: dict[str, np.ndarray]
  loss: float
  grads: dict[str, np.ndarray]
  after: dict[str, np.ndarray]


def keep_gradients() -> optax.GradientTransformation:
  """Leaves gradients as they are, and a copy in the state of the optimizer."""
  return optax.GradientTransformation(
    lambda params: Kept(jax.tree.map(jnp.zeros_like, params)),
    lambda grads, state, params=None: (grads, Kept(grads)),
  )


def packed_rows() -> dict[str, np.ndarray]:
  """Rows of two or three documents, some with an empty tail, weights 0 at borders."""
  rng = np.random.default_rng(0)
  segments = np.zeros(SHAPE, np.int32)
  positions = np.zeros(SHAPE, np.int32)
  for row in range(SHAPE[0]):
    first = 0
    for segment, length in enumerate(rng.integers(2, 6, 3), 1):
      last = min(first + length, SHAPE[1])
      segments[row, first:last] = segment
      positions[row, first:last] = range(last - first)
      first = last
    positions[row, first:] = range(SHAPE[1] - first)
  weights = (segments > 0) * rng.choice([0.0, 1.0, 1.0], SHAPE)
  weights[3] = 0.0
  tokens, targets = rng.integers(0, 64, (2, *SHAPE))
  return {
    "tokens": tokens.astype(np.int32),
    "targets": targets.astype(np.int32),
    "segments": segments,
    "positions": positions,
    "weights": weights.astype(np.float32),
  }


@functools.cache
def run(model: str, place: Place, devices: int = 8) -> Seen:
  """Trains one step on a layout."""
  layout = Layout(make_mesh(place.mesh, jax.devices()[:devices]), place.rules)
  decoder = Decoder(MODELS[model], Precision(), layout, place.remat)
  # With eps as large as the gradients, an update says how large its gradient was; the
  # sign of a gradient near zero would hang on rounding.
  spec = optimizers.AdamW(lr=schedules.Constant(peak=0.1), eps=1e-2)
  built = optimizers.build(spec, 10, axes_of(decoder))
  built = built._replace(transform=optax.chain(keep_gradients(), built.transform))
  objective = next_token(NextToken(z_loss=1e-2, chunk=5), decoder)
  plan, make = create(
    decoder, built.transform, First(3), ema=False, moments=place.moments
  )
  rows = packed_rows()
  step = make_step(Task(objective), built, micro_batches=MICRO_BATCHES[model])
  shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in rows.items()}
  with jax.numpy_dtype_promotion("standard"):  # optax needs it
    compiled = compile_step(step, plan, layout, shapes)
  state = make()
  for name, leaf in named_leaves(state.params).items():
    assert leaf.sharding == named_leaves(plan.shardings.params)[name], name
  first = named_leaves(jax.device_get(state.params))
  state, metrics = compiled(
    state, placer(layout.sharding("batch", "sequence"), SHAPE)(rows)
  )
  state, metrics = jax.device_get((state, metrics))
  kept = named_leaves(state.opt_state[0].grads)
  return Seen(first, float(metrics["loss"]), kept, named_leaves(state.params))


def alone(model: str) -> Seen:
  return run(model, Place(Mesh()), 1)


def differences(found: Seen, wanted: Seen) -> dict[str, float]:
  """Returns the relative difference of the loss, each gradient, each new parameter."""
  rows = {"loss": abs(found.loss - wanted.loss) / abs(wanted.loss)}
  for field in ("grads", "after"):
    for name, leaf in getattr(wanted, field).items():
      apart = np.abs(getattr(found, field)[name] - leaf).max() / np.abs(leaf).max()
      rows[f"{field}/{name}"] = float(apart)
  return rows


@pytest.mark.parametrize(("model", "place"), CASES)
def test_a_layout_equals_one_device(model, place, capfd):
  found, wanted = run(model, PLACES[place]), alone(model)
  assert found.first.keys() == wanted.first.keys()
  for name, leaf in wanted.first.items():
    np.testing.assert_array_equal(found.first[name], leaf, err_msg=name)
  rows = differences(found, wanted)
  assert len(rows) == 1 + 2 * len(wanted.first)
  assert {name: apart for name, apart in rows.items() if apart > TOLERANCE} == {}
  # The compiler says so when it must bring an array whole onto every device. (It says
  # nothing when the program comes from the cache.)
  assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_the_step_moves_every_parameter(model):
  seen = alone(model)
  for name, leaf in seen.grads.items():
    assert np.abs(leaf).max() > 1e-4, name
    assert np.abs(seen.after[name] - seen.first[name]).max() > 1e-3, name


def test_a_sharded_loss_without_its_sums_fails(monkeypatch):
  """The negative control: no sum over devices in `ops/losses.py`."""
  monkeypatch.setattr(jax.lax, "psum", lambda x, axes: x)
  wrong = run.__wrapped__("untied", PLACES["data 8"])
  rows = differences(wrong, alone("untied"))
  assert rows["loss"] > 1e-2
  assert rows["grads/head"] > 1e-2


def test_shared_moments_are_split_over_the_replicas():
  layout = Layout(make_mesh(Mesh(data=8, fsdp=1)))
  decoder = Decoder(MODELS["untied"], Precision(), layout)
  built = optimizers.build(
    optimizers.AdamW(lr=schedules.Constant(peak=0.1)), 10, axes_of(decoder)
  )
  plans = [
    create(decoder, built.transform, First(0), ema=True, moments=moments)[0]
    for moments in (Moments(), Moments(sharding=ZERO))
  ]
  whole, split = (
    held_bytes(plan.shapes.opt_state, plan.shardings.opt_state) for plan in plans
  )
  assert split < whole / 7
  held = [held_bytes(p.shapes.params, p.shardings.params) for p in plans]
  assert held[0] == held[1]


def test_moments_in_host_memory_leave_the_rest_on_the_device():
  layout = Layout(make_mesh(Mesh(fsdp=8)))
  decoder = Decoder(MODELS["untied"], Precision(), layout)
  spec = optimizers.AdamW(lr=schedules.Constant(peak=0.1))
  built = optimizers.build(spec, 10, axes_of(decoder))
  moments = Moments(memory="host")
  plan, make = create(decoder, built.transform, First(0), ema=True, moments=moments)
  state = make()
  for leaf in jax.tree.leaves(state.opt_state):
    assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim else "device")
  for leaf in jax.tree.leaves((state.params, state.ema, state.step)):
    assert leaf.sharding.memory_kind == "device"
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == plan.shardings
