"""Resume changes nothing: killed twice, once inside a save, and equal in every bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from jaxlm.__main__ import main
from jaxlm.runs import train
from jaxlm.training.metrics import TIMES
from runs import hooks
from runs.conftest import TINY

STEPS, N = 12, 6


class Trace(NamedTuple):
  """All that a run leaves."""

  leaves: dict[str, np.ndarray]
  rows: list[dict[str, Any]]
  order: dict[int, str]


def order_of(record) -> dict[int, str]:
  """{step: hash of its batch}; a step that was made twice had the same batch."""
  order: dict[int, str] = {}
  for line in Path(record).read_text().splitlines():
    step, address = json.loads(line)
    assert order.setdefault(step, address) == address
  return order


def trace(workdir, record, step=STEPS) -> Trace:
  """Reads a checkpoint, and the metrics without times."""
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  rows = [
    {name: value for name, value in json.loads(line).items() if name not in TIMES}
    for line in lines
  ]
  folder = Path(workdir) / "checkpoints" / f"{step:08d}"
  return Trace(hooks.leaves_of(folder), rows, order_of(record))


def require_equal(got: Trace, wanted: Trace, steps=range(STEPS)) -> None:
  """Equal to the last bit, or an AssertionError."""
  assert got.leaves.keys() == wanted.leaves.keys()
  for name, leaf in wanted.leaves.items():
    np.testing.assert_array_equal(got.leaves[name], leaf, strict=True, err_msg=name)
  assert got.rows == wanted.rows
  assert [got.order[s] for s in steps] == [wanted.order[s] for s in steps]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
  """The run without interruption: (workdir, trace)."""
  place = tmp_path_factory.mktemp("whole")
  with (
    jax.numpy_dtype_promotion("standard"),
    hooks.hooked(str(place / "order")),
  ):
    tiny().run(str(place / "run"))
  return place / "run", trace(place / "run", place / "order")


def words(text, cache, workdir):
  """The command line of the tiny run."""
  return [
    f"--config={TINY}:text={text}",
    f"--config.data.cache={cache}",
    f"--workdir={workdir}",
  ]


def child(record, fault, command):
  """Starts the command in a process of its own."""
  return subprocess.Popen(
    [sys.executable, hooks.__file__, f"record={record}", fault, "--", *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "standard"},
  )


def test_the_whole_run_left_all_there_is(whole):
  _, run = whole
  assert len(run.order) == len(set(run.order.values())) == STEPS
  training = [row["step"] for row in run.rows if "loss" in row]
  assert training == list(range(1, STEPS + 1))
  assert [row["step"] for row in run.rows if "held_out/nll" in row] == [6, 12]
  assert {"params", "rest"} == {name.split("/")[0] for name in run.leaves}
  parts = {name.split("/")[1] for name in run.leaves if name.startswith("rest/")}
  assert parts == {"step", "opt_state", "rng", "ema"}
  assert run.leaves["rest/step"] == STEPS


def test_killed_after_a_save_and_inside_one(
  whole, text, cache, tmp_path, monkeypatch, capsys
):
  workdir, record = tmp_path / "run", tmp_path / "order"
  command = words(text, cache, workdir)

  killed = child(record, f"kill={N}", command)
  out, err = killed.communicate(timeout=120)
  assert killed.returncode == -signal.SIGKILL, err
  assert "finished" not in out
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["00000004"]
  assert max(order_of(record)) == N

  held = child(record, "hold=8", command)
  for line in held.stdout:
    if line == "holding\n":
      break
  held.kill()
  out, err = held.communicate(timeout=120)
  assert held.returncode == -signal.SIGKILL, err
  torn = workdir / "checkpoints/00000008"
  assert torn.is_dir()
  assert not (torn / "manifest.json").exists()
  rows = (workdir / "metrics.jsonl").read_text()
  (workdir / "metrics.jsonl").write_text(rows + '{"step": 9, "lo')

  monkeypatch.setattr(sys, "argv", ["jaxlm", *command])
  with (
    hooks.hooked(str(record)),
    flagsaver.flagsaver(),
    pytest.raises(SystemExit) as ended,
  ):
    main()
  assert not ended.value.code
  printed = capsys.readouterr().out
  assert "going on from the checkpoint of step 4" in printed
  assert "DAMAGED" not in printed
  assert f"finished: step {STEPS}" in printed
  require_equal(trace(workdir, record), whole[1])


def resume(tiny, workdir, record, *overrides):
  with hooks.hooked(str(record)):
    tiny(*overrides).run(str(workdir))
  return trace(workdir, record)


def test_resume_without_a_fault_passes_the_comparison(tiny, whole, copy, tmp_path):
  """The controls below differ from this one in their fault alone."""
  place = copy(whole[0], newest=8)
  got = resume(tiny, place, tmp_path / "order")
  assert sorted(got.order) == [8, 9, 10, 11]
  require_equal(got, whole[1], range(8, STEPS))


def wrong_rng(restored):
  return restored._replace(
    state=restored.state._replace(
      rng=jax.device_put(jax.random.key(99), restored.state.rng.sharding)
    )
  )


def new_parameters(restored):
  keys = iter(jax.random.split(jax.random.key(0), 99))

  def draw(x):
    return jax.device_put(0.02 * jax.random.normal(next(keys), x.shape), x.sharding)

  params = jax.tree.map(draw, restored.state.params)
  return restored._replace(state=restored.state._replace(params=params))


def no_moments(restored):
  empty = jax.tree.map(
    lambda x: jax.device_put(jax.numpy.zeros_like(x), x.sharding),
    restored.state.opt_state,
  )
  return restored._replace(state=restored.state._replace(opt_state=empty))


def one_batch_off(restored):
  data = restored.data | {"next_batch": restored.data["next_batch"] + 1}
  return restored._replace(data=data)


@pytest.mark.parametrize(
  "fault",
  [wrong_rng, new_parameters, no_moments, one_batch_off],
  ids=lambda fault: fault.__name__,
)
def test_negative_controls(tiny, whole, copy, tmp_path, monkeypatch, fault):
  place = copy(whole[0], newest=8)
  restore = train.Store.restore
  monkeypatch.setattr(
    train.Store, "restore", lambda self, plan: fault(restore(self, plan))
  )
  got = resume(tiny, place, tmp_path / "order")
  with pytest.raises(AssertionError):
    require_equal(got, whole[1], range(8, STEPS))


def test_negative_control_a_wrong_step(tiny, whole, copy, tmp_path, monkeypatch):
  """The state of step 4 under the number of step 8."""
  place = copy(whole[0], newest=8)
  read = train.Store._read

  def wrong(self, step, plan):
    older = read(self, 4, plan)
    state = older.state._replace(step=older.state.step + 4)
    return older._replace(state=state, step=8, data=older.data | {"next_batch": 8})

  monkeypatch.setattr(train.Store, "_read", wrong)
  got = resume(tiny, place, tmp_path / "order")
  assert got.leaves["rest/step"] == STEPS
  with pytest.raises(AssertionError):
    require_equal(got, whole[1], range(8, STEPS))


def test_on_another_mesh_and_memory_the_order_is_identical_and_losses_agree(
  tiny, whole, copy, tmp_path, capsys
):
  place = copy(whole[0], newest=8)
  mesh = ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=4", "moments.memory=host"]
  got = resume(tiny, place, tmp_path / "order", *mesh)
  assert "mesh.tensor: 1 -> 4" in capsys.readouterr().out
  assert [got.order[s] for s in range(8, 12)] == [
    whole[1].order[s] for s in range(8, 12)
  ]
  assert len(got.rows) == len(whole[1].rows)
  for row, wanted in zip(got.rows, whole[1].rows, strict=True):
    assert row == pytest.approx(wanted, rel=1e-5, abs=1e-7)
  for name, leaf in whole[1].leaves.items():
    np.testing.assert_allclose(got.leaves[name], leaf, rtol=1e-3, atol=1e-5)
