"""Distillation in the one loop: beside the student, and stored beside the data."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.posttrain.distill import Distill
from jaxlm.posttrain.divergence import Divergence
from jaxlm.runs import plan
from jaxlm.runs.assembled import assemble
from jaxlm.runs.fields import Place, Placement, with_fields
from jaxlm.runs.inputs import read_inputs
from jaxlm.runs.teacher import open_teacher
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.metrics import TIMES
from runs import hooks

STEPS = 12
MODES = {"beside": {}, "stored": {"top_k": 8}}
ALL = {"top_k": 264}  # every id of the vocabulary


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
  """The workdir of a run that learned a little."""
  workdir = tmp_path_factory.mktemp("teacher") / "w"
  with jax.numpy_dtype_promotion("standard"):
    tiny("steps=40", "evaluate_every=40", "checkpoints.every=40").run(workdir)
  return str(workdir)


@pytest.fixture(scope="module")
def distil(tiny, teacher, tmp_path_factory):
  """Makes a student's run; rows are shared."""
  cache = str(tmp_path_factory.mktemp("rows"))

  def make(mode, *overrides, **fields):
    rate = "optimizer.lr=Constant(peak=0.01)"  # which does not depend on steps
    run = tiny(f"data.cache={cache}", rate, *overrides)
    narrow = dataclasses.replace(run.model, dim=16)
    objective = Distill(teacher=teacher, **MODES[mode] | fields)
    return dataclasses.replace(run, model=narrow, objective=objective, ema=None)

  return make


@pytest.fixture(scope="module")
def whole_of(distil, tmp_path_factory):
  """Gives a mode's run without interruption."""

  @functools.cache
  def run(mode):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    with jax.numpy_dtype_promotion("standard"):
      return distil(mode).run(workdir)

  return run


@pytest.fixture(params=MODES)
def whole(request, whole_of):
  """(mode, its run without interruption)."""
  return request.param, whole_of(request.param)


def losses(result):
  rows = [row for row in result.rows if "loss" in row]
  return [{n: v for n, v in row.items() if n not in TIMES} for row in rows]


def test_the_student_comes_nearer(whole):
  _, result = whole
  found = [row["divergence"] for row in losses(result)]
  assert found[-1] < 0.75 * found[0]
  scores = [row for row in result.rows if "held_out/divergence" in row]
  assert [row["step"] for row in scores] == [6, 12]
  assert scores[1]["held_out/nll"] < scores[0]["held_out/nll"]
  assert scores[1]["held_out/divergence"] < scores[0]["held_out/divergence"]


def test_what_is_stored_bounds_the_whole_from_below(whole_of):
  """The first loss, of the same weights on the same rows."""
  first = {mode: losses(whole_of(mode))[0]["divergence"] for mode in MODES}
  assert 0.3 * first["beside"] < first["stored"] < first["beside"]


def test_resume_is_exact_to_the_bit(whole, distil, copy, capsys):
  mode, wanted = whole
  capsys.readouterr()
  place = copy(wanted.workdir, newest=4)
  again = distil(mode).run(place)
  told = capsys.readouterr().out
  assert "going on from the checkpoint of step 4" in told
  assert ("teacher: log-probabilities found" in told) == (mode == "stored")
  assert again.step == STEPS
  ours = hooks.leaves_of(place / "checkpoints" / f"{STEPS:08d}")
  theirs = hooks.leaves_of(wanted.workdir / "checkpoints" / f"{STEPS:08d}")
  # What trains, and nothing of the teacher.
  assert ours.keys() == theirs.keys()
  assert not any(leaf.shape[-1:] == (32,) for leaf in ours.values() if leaf.ndim > 1)
  for name, leaf in theirs.items():
    np.testing.assert_array_equal(ours[name], leaf, strict=True, err_msg=name)


@pytest.mark.parametrize(("mode", "fields"), [("beside", {}), ("stored", ALL)])
def test_meshes_micro_batches_and_storing_all_ids_change_nothing(
  mode, fields, distil, whole_of, tmp_path
):
  words = ("steps=3", "mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2", "accumulate=2")
  many = losses(distil(mode, *words, **fields).run(tmp_path / "many"))
  one = losses(whole_of("beside"))[:3]
  assert many[0]["divergence"] == pytest.approx(one[0]["divergence"], rel=1e-5)
  for ours, theirs in zip(many, one, strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)


def test_other_temperatures_are_stored_apart(distil, tmp_path, capsys):
  layout = Layout(make_mesh(Mesh()))

  def told(number, **fields):
    """What is said where rows get the teacher's fields, before any training."""
    run = distil("stored", **fields)
    parts, corpus = assemble(run, layout), read_inputs(run, tmp_path).corpus
    place = Place(tmp_path / number, Placement.of(layout, run.data), False)
    place.workdir.mkdir()
    capsys.readouterr()
    with_fields(run, parts, corpus, place, pytest.fail)
    return capsys.readouterr().out

  told("a")
  assert "teacher: scoring" not in told("b")
  assert "teacher: scoring" in told("c", divergence=Divergence(temperature=2.0))


def test_a_teacher_that_does_not_fit_is_refused(distil, tmp_path):
  run = distil("beside")
  with pytest.raises(InputError, match=r"objective.teacher: .*nowhere does not exist"):
    dataclasses.replace(run, objective=Distill(teacher="nowhere")).run(tmp_path / "w")
  other = dataclasses.replace(run.model, vocab=300)
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  with pytest.raises(InputError, match=r"has 264 ids and the student .* 300"):
    open_teacher(run.objective, Decoder(other, Precision(), layout), 32)
  most = dataclasses.replace(run.objective, top_k=265)
  with pytest.raises(InputError, match=r"objective.top_k: 265 of 264 ids"):
    open_teacher(most, Decoder(run.model, Precision(), layout), 32)


def test_the_plan_counts_the_teacher(distil):
  (target,) = plan.launch.targets("h100:8")
  told = plan.report(plan.prepare(distil("beside"), target))
  decoder = told.predicted.frozen * 8
  table = 264 * 32 * 4
  assert table < decoder < 20 * table
  assert any(line.startswith("  frozen ") for line in told.lines)
  assert "  left out of it: the teacher's forward pass and its activations" in (
    told.lines
  )
  assert plan.report(plan.prepare(distil("stored"), target)).predicted.frozen == 0


def test_another_teacher_on_resuming_is_refused(whole, distil, copy):
  mode, run = whole
  place = copy(run.workdir, newest=4)
  record = place / "teacher.json"
  record.write_text(json.dumps({"weights": "0" * 32}))
  with pytest.raises(InputError, match=r"this run's teacher was the weights 0000"):
    distil(mode).run(place)
  record.unlink()
  with pytest.raises(InputError, match=r"teacher.json is gone"):
    distil(mode).run(place)
