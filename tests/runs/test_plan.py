"""Plans: by prediction alone for GPUs, compiled for TPUs where libtpu is installed."""

import dataclasses
import importlib.util

import pytest

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.models.spec import Keep
from jaxlm.runs import plan
from jaxlm.runs.assembled import assemble, compiled
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.state import Moments

HERE = importlib.util.find_spec("libtpu") is not None
LLAMA = "configs/llama3.py:size=8b,batch=64"


def test_a_plan_that_nothing_compiled_says_so(capsys):
  (report,) = plan.plan(config.load(LLAMA), "h100:16")
  said = capsys.readouterr().out
  assert "compiled: nothing; " in said
  assert "attention: cudnn" in said
  assert "an estimate and no measurement" in said
  assert report.peak is None
  assert report.fits
  # 8.03e9 parameters in float32 and two moments, over 16.
  assert report.predicted.parameters == pytest.approx(8.03e9 * 4 / 16, rel=0.01)
  assert report.predicted.optimizer == pytest.approx(2 * 8.03e9 * 4 / 16, rel=0.01)
  # Six operations a parameter and token, and attention: 1,686.6 TFLOP at 4 rows a chip.
  assert report.flops.causal == pytest.approx(1686.6e12, rel=1e-4)


COMPILED = {
  ("configs/llama3.py:size=8b,batch=256", "v5p:4x4x4"): 16.329e9,
  ("configs/llama3.py:size=8b,batch=1024", "v6e:16x16"): 14.685e9,
  ("configs/llama3.py:size=70b,batch=1024", "v5p:4x8x8"): 60.441e9,
  ("configs/quickstart.py", "v5e:2x2"): 0.082e9,
}
"""Bytes that a chip needs at its fullest by libtpu 0.0.42.1: experiments/plan/*.txt."""


@pytest.mark.parametrize(("spec", "target"), COMPILED)
def test_the_prediction_is_within_a_tenth_of_the_compiler_s(
  spec, target, monkeypatch, capsys
):
  monkeypatch.setattr(plan.launch.importlib.util, "find_spec", lambda name: None)
  (report,) = plan.plan(config.load(spec), target)
  assert "libtpu is not installed" in capsys.readouterr().out
  assert report.predicted.total == pytest.approx(COMPILED[spec, target], rel=0.1)


def test_a_table_of_remat_has_a_plan(capsys):
  keep = Keep(input="offload", attention="save")
  cfg = dataclasses.replace(config.load(LLAMA), remat=keep)
  (table,) = plan.plan(cfg, "h100:16")
  assert "nearest change" in capsys.readouterr().out
  full = plan.report(config.load(LLAMA), table.target).predicted.temporaries
  # On the host 32 inputs of 4 rows x 8,192 x 4,096, kept as many attention outputs.
  assert table.predicted.temporaries == pytest.approx(full)
  saved = dataclasses.replace(cfg, remat=Keep(attention="save"))
  more = plan.report(saved, table.target).predicted.temporaries - full
  assert more == pytest.approx(32 * 4 * 8192 * 4096 * 2)


def test_moments_on_the_host_take_no_memory_of_a_chip():
  cfg = dataclasses.replace(config.load(LLAMA), moments=Moments(memory="host"))
  (target,) = plan.launch.targets("h100:16")
  assert plan.report(cfg, target).predicted.optimizer < 1e3


def test_an_option_that_the_compiler_does_not_know_is_named():
  cfg = config.load("configs/quickstart.py:dim=64,layers=1,seq_len=16,vocab=64")
  parts = assemble(cfg, Layout(make_mesh(cfg.mesh)))
  with pytest.raises(InputError, match="compiler: xla_wonder is no option"):
    compiled(parts, {"xla_wonder": "1"})


def test_what_does_not_fit_is_told_with_the_nearest_that_does(capsys):
  cfg = dataclasses.replace(config.load(LLAMA), remat="none")
  (report,) = plan.plan(cfg, "h100:16")
  said = capsys.readouterr().out
  assert not report.fits
  assert "DOES NOT FIT" in said
  assert "nearest change that fits: remat=" in said


def test_several_targets_are_ranked_and_those_that_fit_come_first(capsys):
  cfg = config.load(LLAMA)
  reports = plan.plan(cfg, "a100:1 h100:64 h100:64@fsdp=32,data=2")
  assert [r.fits for r in reports] == [False, True, True]
  ranked = capsys.readouterr().out.split("ranking")[1].splitlines()[1:]
  assert "a100:1" in ranked[-1]
  assert "does not fit" in ranked[-1]
  halves = (reports[1].predicted.parameters, reports[2].predicted.parameters / 2)
  assert halves[0] == pytest.approx(halves[1], rel=1e-2)  # norms are whole everywhere


def test_a_layout_that_the_target_does_not_hold_is_refused():
  cfg = dataclasses.replace(config.load(LLAMA), mesh=Mesh(fsdp=5))
  with pytest.raises(InputError, match="5 devices"):
    plan.plan(cfg, "h100:8")


def test_what_has_no_training_step_is_refused():
  with pytest.raises(InputError, match="no step to plan"):
    plan.plan(config.load("configs/chat.py:model=x"), "h100:8")


@pytest.mark.skipif(not HERE, reason="libtpu, the extra plan, is not installed")
def test_a_step_compiled_for_a_tpu_that_is_not_here():
  cfg = config.load("configs/llama3.py:size=1b,batch=4,seq_len=1024")
  model = dataclasses.replace(cfg.model, repeats=4, vocab=8192)
  (report,) = plan.plan(dataclasses.replace(cfg, model=model), "v5p:2x2x1")
  assert report.peak is not None
  assert report.costs is not None
  assert report.costs.kernels > 0
  assert "reduce-scatter" in report.costs.collectives
  assert report.predicted.total == pytest.approx(report.peak, rel=0.25)
