"""Plans: by prediction alone for GPUs, compiled for TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import re

import jax
import pytest

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.launch import hlo
from jaxlm.models.spec import Keep
from jaxlm.runs import plan
from jaxlm.runs.assembled import assemble, compiled
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.state import Moments

HERE = importlib.util.find_spec("libtpu") is not None
LLAMA = "configs/llama3.py:size=8b,batch=64"


def report_of(cfg, target):
  return plan.report(plan.prepare(cfg, target))


def test_a_plan_that_nothing_compiled_says_so(capsys):
  (report,) = plan.plan(config.load(LLAMA), "h100:16")
  said = capsys.readouterr().out
  assert "compiled: nothing; " in said
  assert "attention: cudnn" in said
  assert "an estimate and no measurement" in said
  assert report.program.peak is None
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
  run = dataclasses.replace(config.load(LLAMA), attention="blocks")
  cfg = dataclasses.replace(run, remat=keep)
  (table,) = plan.plan(cfg, "h100:16")
  said = capsys.readouterr().out
  assert "nearest change" in said
  assert "left out of it: moving activations (input) to the host and back" in said
  full = report_of(run, table.target).predicted.temporaries
  # On the host 32 inputs of 4 rows x 8,192 x 4,096, kept as many attention outputs.
  assert table.predicted.temporaries == pytest.approx(full)
  saved = dataclasses.replace(run, remat=Keep(attention="save"))
  more = report_of(saved, table.target).predicted.temporaries - full
  assert more == pytest.approx(32 * 4 * 8192 * 4096 * 2)


@pytest.mark.parametrize("stay", ["save", "offload"])
def test_a_table_that_the_kernel_cannot_honour_is_refused(stay):
  cfg = dataclasses.replace(config.load(LLAMA), remat=Keep(attention=stay))
  told = rf"--plan=h100:16: remat.attention: '{stay}' .* by cudnn"
  with pytest.raises(InputError, match=told):
    plan.plan(cfg, "h100:16")


def test_a_preset_keeps_nothing_of_a_kernel_without_a_name():
  """With cudnn `dots` is `dots_without_batch`; with blocks it is more."""
  (target,) = plan.launch.targets("h100:16")

  def kept(remat, attention):
    cfg = config.load(LLAMA)
    cfg = dataclasses.replace(cfg, remat=remat, attention=attention)
    return report_of(cfg, target).predicted.temporaries

  assert kept("dots", "cudnn") == kept("dots_without_batch", "cudnn")
  assert kept("dots", "blocks") > kept("dots_without_batch", "blocks")


def test_moments_on_the_host_take_no_memory_of_a_chip():
  cfg = dataclasses.replace(config.load(LLAMA), moments=Moments(memory="host"))
  (target,) = plan.launch.targets("h100:16")
  found = report_of(cfg, target)
  assert found.predicted.optimizer < 1e3
  said = "\n".join(found.lines)
  assert "whole state 2,008.6 MB; optimizer state on the host apart" in said
  assert "left out of it: moving optimizer state to the host and back" in said


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


def test_a_second_target_is_checked_before_the_first_is_compiled(monkeypatch):
  monkeypatch.setattr(plan, "report", lambda ready: pytest.fail("began"))
  cfg = dataclasses.replace(config.load(LLAMA), mesh=Mesh(fsdp=8))
  with pytest.raises(InputError, match=r"--plan=h100:4: mesh .*needs 8 devices"):
    plan.plan(cfg, "h100:8 h100:4")


def test_slices_that_a_target_has_not_are_refused(monkeypatch):
  monkeypatch.setattr(plan.launch.importlib.util, "find_spec", lambda name: None)
  mesh = Mesh(data=2, slices=2)
  cfg = dataclasses.replace(config.load(LLAMA), mesh=mesh)
  for text in ("v5p:2x2x2", "v5p:2x2x2@data=2,fsdp=4"):
    with pytest.raises(InputError, match=r"mesh.slices: 2 .* stand in 1"):
      plan.plan(cfg, text)


SMALL = "configs/quickstart.py:dim=64,layers=1,seq_len=128,vocab=64"


def pretend(monkeypatch, compiled):
  """Lets a target be compiled for where no compiler for it is installed."""
  monkeypatch.setattr(plan.launch, "uncompiled", lambda target: None)
  monkeypatch.setattr(plan.launch, "devices", plan.launch.stand_ins)
  monkeypatch.setattr(plan, "compiled", compiled)


def test_what_the_compiler_finds_too_large_is_a_report(monkeypatch, capsys):
  """Also where the prediction says that it fits."""
  said = "Ran out of memory on HBM, 2.90T exceeds available HBM (15.75G)."

  def refuse(parts, options):
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}\nmore")

  pretend(monkeypatch, refuse)
  first, second = plan.plan(config.load(SMALL), "v5e:1x1 v5e:2x2")
  assert not first.fits
  assert not second.fits
  assert first.predicted.total < first.target.chip.hbm <= first.needs
  out = capsys.readouterr().out
  assert f"the compiler refuses: {said}\n" in out
  assert "DOES NOT FIT" in out
  assert "nearest change" not in out
  assert "no advice: " in out
  assert "does not fit" in out.split("ranking")[1]


def test_another_failure_of_the_compiler_is_not_hidden(monkeypatch):
  def fail(parts, options):
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  pretend(monkeypatch, fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    plan.plan(config.load(SMALL), "v5e:1x1")


def test_the_compiler_s_column_tells_no_predictions():
  (target,) = plan.launch.targets("h100:16")
  found = report_of(config.load(LLAMA), target)
  told = found._replace(program=plan.launch.Program(peak=found.predicted.total + 1e9))
  rows = {
    line.split()[0]: line.split("compiled")[1] for line in plan._memory(told)[1:6]
  }
  assert [rows[name].strip() for name in ("parameters", "optimizer", "gradients")] == (
    ["-"] * 3
  )
  assert rows["temporaries"].endswith("(peak less the rows above)")
  assert rows["peak"].strip() == f"{told.program.peak / 1e9:.3f}"


def test_scores_in_the_products_are_not_counted_again():
  (target,) = plan.launch.targets("h100:16")
  ready = plan.prepare(config.load(LLAMA), target)
  flops = report_of(ready.run, target).flops

  def compute(kernels):
    costs = hlo.Costs(4e15, kernels, None, {})
    chip = target.chip
    return plan._seconds(ready.run, ready.parts, chip, flops, costs).compute

  assert compute(0) == 4e15 / target.chip.flops
  assert compute(64) > compute(0)


def test_advice_to_run_faster_is_faster_by_the_same_roofline():
  """More micro-batches gather the weights more often, which here costs more."""
  (target,) = plan.launch.targets("h100:64")
  cfg = config.load("configs/llama3.py:size=8b,seq_len=2048,batch=512")
  found = report_of(cfg, target)
  assert found.fits
  advice = next(line for line in found.lines if "runs faster" in line)
  changed = re.search(r"remat=(\w+), accumulate=(\d+)", advice)
  if changed is None:
    assert "none in remat and accumulate" in advice
  else:
    remat, accumulate = changed[1], int(changed[2])
    other = dataclasses.replace(cfg, remat=remat, accumulate=accumulate)
    assert report_of(other, target).seconds.step < found.seconds.step


def test_moments_on_the_host_are_proposed_where_they_alone_make_it_fit():
  (target,) = plan.launch.targets("h100:1")
  cfg = config.load("configs/llama3.py:size=8b,batch=1,seq_len=2048")
  found = report_of(cfg, target)
  assert not found.fits
  assert "nearest change that fits: moments.memory=host" in found.lines[-1]
  (target,) = plan.launch.targets("a100:1")
  found = report_of(config.load("configs/llama3.py:size=70b,batch=1"), target)
  assert "by prediction none of remat" in found.lines[-1]


@pytest.mark.skipif(not HERE, reason="libtpu, the extra plan, is not installed")
def test_a_step_compiled_for_a_tpu_that_is_not_here():
  cfg = config.load("configs/llama3.py:size=1b,batch=4,seq_len=1024")
  model = dataclasses.replace(cfg.model, repeats=4, vocab=8192)
  (report,) = plan.plan(dataclasses.replace(cfg, model=model), "v5p:2x2x1")
  assert report.program.peak is not None
  assert report.program.costs is not None
  assert report.program.costs.kernels > 0
  assert "reduce-scatter" in report.program.costs.collectives
  assert report.predicted.total == pytest.approx(report.program.peak, rel=0.25)
