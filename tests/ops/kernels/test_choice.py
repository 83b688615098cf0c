"""Every choice, its reason, and every refusal."""

import jax
import pytest

from jaxlm.errors import InputError
from jaxlm.launch import plan
from jaxlm.ops.attention import Scoring
from jaxlm.ops.kernels.choice import Work, attend_sequences, choose
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from ops.kernels.cases import (
  POSITIONS,
  SEGMENTS,
  TOLERANCE,
  H,
  K,
  T,
  difference,
  inputs,
  reference,
)

WORK = Work(Scoring(0.1), 32, 8, 128, 4096, "bfloat16")
CPU = Layout(make_mesh(Mesh(), jax.devices()[:1]))


def layout(target: str, rules=ShardingRules(), **mesh) -> Layout:  # noqa: B008
  (found,) = plan.targets(target)
  return Layout(make_mesh(Mesh(**mesh), plan.stand_ins(found)), rules)


def test_auto_takes_the_fused_kernel_of_the_platform():
  assert choose("auto", WORK, layout("h100:8")).kernel == "cudnn"
  assert choose("auto", WORK, CPU).kernel == "blocks"
  assert "cpu" in choose("auto", WORK, CPU).reason


def test_auto_says_why_not():
  work = WORK._replace(scoring=Scoring(0.1, softcap=50.0))
  chosen = choose("auto", work, layout("h100:8"))
  assert chosen.kernel == "blocks"
  assert "not cudnn: it has no softcap" in chosen.reason


REFUSALS = [
  ("splash", "h100:8", {}, {}, "runs on TPU"),
  ("cudnn", "b200:8", {"scoring": Scoring(1.0, slopes=(0.5,) * 32)}, {}, "ALiBi"),
  ("cudnn", "h100:8", {"scoring": Scoring(1.0, softcap=9.0)}, {}, "softcap"),
  ("cudnn", "h100:8", {"dtype": "float32"}, {}, "bfloat16"),
  ("cudnn", "h100:8", {"head_dim": 256}, {}, "head_dim 256"),
  ("cudnn", "h100:8", {"head_dim": 20}, {}, "head_dim 20"),
  ("cudnn", "h100:8", {"length": 16_384}, {}, "T x T mask"),
  ("cudnn", "h100:8", {}, {"fsdp": 4, "context": 2}, "splits sequences"),
  ("reference", "h100:8", {"length": 16_384}, {}, "T x T scores"),
]


@pytest.mark.parametrize(("kernel", "target", "work", "mesh", "why"), REFUSALS)
def test_what_cannot_be_honoured_is_refused(kernel, target, work, mesh, why):
  with pytest.raises(InputError, match=why):
    choose(kernel, WORK._replace(**work), layout(target, **mesh))


def tpu(monkeypatch, **mesh) -> Layout:
  """A layout whose devices say that they are TPUs."""
  found = layout("h100:8", **mesh)
  for device in found.mesh.devices.flat:
    object.__setattr__(device, "platform", "tpu")
  return found


SPLASH = [
  ({"scoring": Scoring(1.0, slopes=(0.5,) * 32)}, "ALiBi"),
  ({"length": 1000}, "multiple of 128"),
  ({"head_dim": 96}, "head_dim 96"),
]


@pytest.mark.parametrize(("work", "why"), SPLASH)
def test_what_splash_cannot_do_is_refused(monkeypatch, work, why):
  here = tpu(monkeypatch)
  assert choose("auto", WORK, here).kernel == "splash"
  with pytest.raises(InputError, match=why):
    choose("splash", WORK._replace(**work), here)
  assert choose("auto", WORK._replace(**work), here).kernel == "blocks"


def test_groups_that_a_mesh_cuts_through_are_refused():
  rules = ShardingRules(kv_heads=())
  here = layout("h100:8", rules, fsdp=1, tensor=8)
  cut = WORK._replace(heads=24, kv_heads=6)
  assert "cut through" in choose("auto", cut, here).reason
  assert choose("auto", WORK, here).kernel == "cudnn"


@pytest.mark.parametrize("kernel", ["auto", "blocks", "reference"])
def test_each_kernel_of_this_machine_equals_the_reference(kernel):
  scoring, qkv = Scoring(K**-0.5, window=60), inputs()
  work = Work(scoring, H, 2, K, T, "float32")
  found = attend_sequences(kernel, work, CPU, qkv, (POSITIONS, SEGMENTS))
  assert difference([found], [reference(scoring, *qkv)]) < TOLERANCE
