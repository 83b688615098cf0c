"""Checkpoints: bit-equal, verified byte by byte, never half of one."""

import json
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxlm.errors import InputError
from jaxlm.sharding.mesh import Mesh
from jaxlm.training import checkpoints, optimizers
from jaxlm.training.checkpoints import Checkpoints, Store, steps_in, verify
from jaxlm.training.state import First, TrainState, axes_of, create
from jaxlm.trees import named_leaves
from training import small

FSDP = Mesh()


def plan_of(mesh=FSDP, model=small.MODEL):
  decoder = small.decoder_of(mesh, model=model)
  built = optimizers.build(small.adamw(), 10, axes_of(decoder))
  return create(decoder, built.transform, First(0), ema=True)[0]


def random_state(plan, seed):
  """A state whose every leaf has bits of its own."""
  rng = np.random.default_rng(seed)

  def draw(shape, sharding):
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
      value = jax.random.key(seed)
    elif shape.dtype == jnp.int32:
      value = np.asarray(rng.integers(1, 2**31 - 1, shape.shape), np.int32)
    else:
      value = np.asarray(rng.normal(size=shape.shape), shape.dtype)
    return jax.device_put(value, sharding)

  return jax.tree.map(draw, plan.shapes, plan.shardings)


def bits(state):
  def raw(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return np.array(leaf)

  return {name: raw(leaf) for name, leaf in named_leaves(state).items()}


def assert_bits(got, wanted):
  assert got.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(got[name], leaf, strict=True, err_msg=name)


@pytest.fixture(scope="module")
def plan():
  with jax.numpy_dtype_promotion("standard"):
    return plan_of()


@pytest.fixture(scope="module")
def saved(plan, tmp_path_factory):
  """A folder with steps 1 and 2, and the bits of both."""
  folder = tmp_path_factory.mktemp("saved")
  states = {step: random_state(plan, step) for step in (1, 2)}
  store = Store(epath.Path(folder), Checkpoints(), '{"run": 1}')
  for step, state in states.items():
    store.save(step, state, {"next_batch": step})
  store.close()
  return folder, {step: bits(state) for step, state in states.items()}


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of it to spoil."""
  shutil.copytree(saved[0], tmp_path / "checkpoints")
  return epath.Path(tmp_path / "checkpoints")


@pytest.fixture
def opened(folder):
  """The store of the copy, and what it told."""
  told = []
  store = Store(folder, Checkpoints(), "{}", tell=told.append)
  yield store, told
  store.close()


@pytest.mark.parametrize("mesh", [FSDP, Mesh(data=2, fsdp=1, tensor=4)], ids=str)
def test_a_round_trip_also_to_another_mesh(saved, opened, mesh):
  store, told = opened
  there = plan_of(mesh)
  read = store.restore(there)
  assert (read.step, read.data, told) == (2, {"next_batch": 2}, [])
  assert_bits(bits(read.state), saved[1][2])
  for leaf, sharding in zip(
    jax.tree.leaves(read.state), jax.tree.leaves(there.shardings), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  assert jax.tree.structure(read.state) == jax.tree.structure(there.shapes)


def test_what_stands_in_a_checkpoint(folder):
  step = folder / "00000002"
  names = {place.name for place in step.iterdir()}
  assert names == {"arrays", "config.json", "data.json", "manifest.json"}
  assert json.loads((step / "config.json").read_text()) == {"run": 1}
  manifest = json.loads((step / "manifest.json").read_text())
  assert {"config.json", "data.json"} < manifest.keys()
  assert sum(name.startswith("arrays/params/") for name in manifest) > 3
  for name, (size, _) in manifest.items():
    assert (step / name).stat().length == size


def test_the_buffers_may_go_as_soon_as_save_returns(plan, tmp_path):
  store = Store(epath.Path(tmp_path), Checkpoints(), "{}")
  state = random_state(plan, 7)
  wanted = bits(state)
  spoil = jax.jit(
    lambda s: jax.tree.map(
      lambda x: x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x * 0, s
    ),
    donate_argnums=0,
  )
  store.save(1, state, {})
  for _ in range(3):
    state = spoil(state)
  jax.block_until_ready(state)
  assert_bits(bits(store_restored(store, plan)), wanted)
  store.close()


def store_restored(store, plan):
  store.wait()
  return store.restore(plan).state


@pytest.mark.parametrize(
  ("keep", "keep_every", "left"),
  [(2, None, [5, 6]), (1, None, [6]), (2, 3, [3, 5, 6]), (1, 2, [2, 4, 6])],
)
def test_what_is_kept(tmp_path, keep, keep_every, left):
  spec = Checkpoints(keep=keep, keep_every=keep_every)
  store = Store(epath.Path(tmp_path), spec, "{}")
  w = {"w": jnp.ones((2,))}
  state = TrainState(jnp.asarray(0), w, w, jax.random.key(0), None)
  for step in range(1, 7):
    store.save(step, state, {})
  store.close()
  assert steps_in(epath.Path(tmp_path)) == left
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == left


def all_files(folder):
  return sorted(p for p in Path(folder).rglob("*") if p.is_file())


def test_a_flipped_byte_in_any_file_is_noticed_and_the_step_before_is_used(
  saved, plan, opened, folder
):
  store, told = opened
  newest = folder / "00000002"
  files = all_files(newest)
  assert len(files) > 15
  for file in files:
    data = file.read_bytes()
    if not data:
      continue
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
    file.write_bytes(flipped)
    read = store.restore(plan)
    file.write_bytes(data)
    assert read.step == 1, file
    (line,) = told
    assert line.startswith(f"CHECKPOINT {newest} IS DAMAGED and is not used: ")
    if file.name != "manifest.json":
      assert f"{file.relative_to(newest)} has other bytes than were written" in line
    told.clear()
  assert_bits(bits(read.state), saved[1][1])
  assert store.restore(plan).step == 2


def truncate(file):
  file.write_bytes(file.read_bytes()[:-1])


def empty(file):
  file.write_bytes(b"")


def delete(file):
  file.unlink()


@pytest.mark.parametrize("harm", [truncate, empty, delete])
def test_a_shorter_or_missing_file_is_noticed(plan, opened, folder, harm):
  store, told = opened
  newest = folder / "00000002"
  for file in all_files(newest):
    data = file.read_bytes()
    if file.name == "manifest.json" or (not data and harm is not delete):
      continue
    harm(file)
    assert str(file.relative_to(newest)) in verify(newest)
    file.write_bytes(data)
  assert verify(newest) == ""
  harm(newest / "data.json")
  assert store.restore(plan).step == 1
  assert "data.json" in told[0]


@pytest.mark.parametrize("harm", [truncate, empty])
def test_a_shorter_manifest_is_noticed(plan, opened, folder, harm):
  store, told = opened
  harm(folder / "00000002/manifest.json")
  assert store.restore(plan).step == 1
  assert "manifest.json is not what was written" in told[0]


def test_a_file_too_many_is_noticed(plan, opened, folder):
  store, told = opened
  (folder / "00000002/arrays/params/d/more").write_text("x")
  assert store.restore(plan).step == 1
  assert "arrays/params/d/more is not in the manifest" in told[0]


def test_without_a_manifest_a_step_is_no_checkpoint(plan, opened, folder):
  """A kill before the commit, or inside a deletion, leaves this."""
  store, told = opened
  (folder / "00000002/manifest.json").unlink()
  (folder / "00000003/arrays.orbax-checkpoint-tmp").mkdir(parents=True)
  assert store.steps() == [1]
  assert store.restore(plan).step == 1
  assert told == []
  store.clear(1)
  kept, aside = sorted(place.name for place in folder.iterdir())
  assert kept == "00000001"
  assert aside.startswith("00000002.unused-")
  assert (folder / aside / "arrays").exists()
  assert [line.split(": ")[1][:12] for line in told] == ["not a whole ", "a save that "]
  assert store.steps() == [1]


def test_clearing_leaves_the_steps_up_to_one(folder, opened):
  store, told = opened
  store.clear(2)
  assert store.steps() == [1, 2]
  assert told == []
  store.clear(1)
  assert store.steps() == [1]
  assert len(list(folder.glob("00000002.unused-*/manifest.json"))) == 1


def test_a_disk_that_does_not_read_is_no_damage(plan, opened, folder, monkeypatch):
  def refuse(_):
    raise PermissionError(13, "Permission denied", "00000002/arrays/d")

  monkeypatch.setattr(checkpoints, "_hashes", refuse)
  with pytest.raises(
    InputError, match=r"arrays/d: cannot be read \(Permission denied\)"
  ):
    opened[0].restore(plan)
  assert opened[1] == []


def test_all_damaged(plan, opened, folder):
  store, told = opened
  for step in (1, 2):
    truncate(folder / f"0000000{step}/data.json")
  with pytest.raises(InputError, match=r"no checkpoint of \[1, 2\] is whole"):
    store.restore(plan)
  assert len(told) == 2


def test_no_checkpoint_at_all(plan, tmp_path):
  store = Store(epath.Path(tmp_path / "none"), Checkpoints(), "{}")
  assert store.restore(plan) is None
  store.clear(0)
  store.close()


def test_a_checkpoint_of_another_model(opened, folder):
  store, _ = opened
  wider = small.LM(vocab=264, dim=64, pattern=(small.BLOCK,), repeats=2)
  words = (
    rf"{folder}/00000002: a checkpoint of another model. Parameter 'embed/table' is "
    r"\(264, 32\) there and \(264, 64\) in this config"
  )
  with pytest.raises(InputError, match=words):
    store.restore(plan_of(model=wider))
  tied = small.LM(
    vocab=264, dim=32, pattern=(small.BLOCK,), repeats=2, head="tied"
  )  # fmt: skip
  with pytest.raises(InputError, match=r"'head' is \(32, 264\) there and absent in"):
    store.restore(plan_of(model=tied))


def test_a_disk_with_too_little_space(plan, tmp_path, monkeypatch):
  store = Store(epath.Path(tmp_path / "a"), Checkpoints(), "{}")
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
  words = rf"{tmp_path}/a: a checkpoint needs up to .* MB and 0 MB are free. Free some"
  with pytest.raises(InputError, match=words):
    store.save(1, random_state(plan, 0), {})
  store.close()
  assert not (tmp_path / "a").exists()


def save_and_wait(store, step, state):
  store.save(step, state, {})
  store.wait()


def test_a_write_that_the_system_refuses(plan, opened, folder):
  """Files may not grow past 40 kB, where the arrays have more."""
  store, _ = opened
  state = random_state(plan, 3)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
  try:
    with pytest.raises(InputError) as caught:
      save_and_wait(store, 3, state)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  words = str(caught.value)
  assert words.startswith(f"{folder}/00000003: the checkpoint could not be written: ")
  assert "The checkpoints before it are whole" in words
  assert "\n" not in words
  assert store.restore(plan).step == 2
  store.save(3, state, {})
  store.wait()
  assert store.restore(plan).step == 3


def test_a_failed_commit_is_told_by_the_next_call(plan, opened, folder, monkeypatch):
  store, _ = opened

  def full(folder):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoints, "_hashes", full)
  state = random_state(plan, 3)
  store.save(3, state, {})
  with pytest.raises(InputError, match=r"00000003: .* the disk is full"):
    store.save(4, state, {})
  assert store.steps() == [1, 2]
  store.wait()


def test_a_step_counts_only_after_its_commit(plan, opened, monkeypatch):
  store, _ = opened
  go, hashes = threading.Event(), checkpoints._hashes

  def wait(folder):
    go.wait(30)
    return hashes(folder)

  monkeypatch.setattr(checkpoints, "_hashes", wait)
  store.save(3, random_state(plan, 3), {})
  assert store.steps() == [1, 2]
  go.set()
  store.wait()
  assert store.steps() == [2, 3]


def test_a_step_that_stands_is_not_written_again(plan, opened, folder):
  store, _ = opened
  before = (folder / "00000002/manifest.json").read_bytes()
  with pytest.raises(InputError, match="00000002: a checkpoint stands here already"):
    store.save(2, random_state(plan, 5), {})
  assert (folder / "00000002/manifest.json").read_bytes() == before


@pytest.mark.parametrize("field", ["every", "keep", "keep_every"])
def test_counts_are_positive(field):
  with pytest.raises(InputError, match=f"checkpoints.{field}: 0 is under 1"):
    Checkpoints(**{field: 0})
