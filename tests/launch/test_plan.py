"""Targets of --plan, good and bad; libtpu's topologies where it is installed."""

import importlib.util
import re

import pytest

from jaxlm.errors import InputError
from jaxlm.launch import plan
from jaxlm.sharding.mesh import Mesh, make_mesh

HERE = importlib.util.find_spec("libtpu") is not None


def test_targets_with_and_without_a_mesh():
  first, second = plan.targets("v5p:4x4x4  v6e:16x16@data=2,fsdp=128")
  assert (first.chip.name, first.dims, first.mesh) == ("v5p", (4, 4, 4), None)
  assert second.mesh == Mesh(data=2, fsdp=128)
  assert plan.device_count(second) == 256


BAD = {
  "": "empty",
  "v5p": "no topology; write v5p:4x4x4",
  "v5p:4x4": "has 3 dimension(s)",
  "v6e:0x16": "no topology",
  "h100:eight": "write h100:8",
  "tpu:4x4": "no chip 'tpu'",
  "v5p:4x4x4@rows=3": "'rows=3' is no AXIS=SIZE",
  "v5p:4x4x4@fsdp": "'fsdp' is no AXIS=SIZE",
  "v5p:4x4x4@fdsp=2": "expert, context, tensor. Did you mean 'fsdp'?",
  "v5p:4x4x4@": "'' is no AXIS=SIZE",
  "v5p:4x4x4@fsdp=2,fsdp=4": "fsdp is given twice",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_target_is_named(text):
  with pytest.raises(InputError, match=re.escape(BAD[text])):
    plan.targets(text)


def test_what_cannot_be_compiled_says_why(monkeypatch):
  (gpu,) = plan.targets("h100:8")
  assert "h100" in str(plan.uncompiled(gpu))
  monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
  (tpu,) = plan.targets("v5p:2x2x1")
  assert "jaxlm[plan]" in str(plan.uncompiled(tpu))


def test_stand_ins_have_the_number_and_the_platform():
  (gpu,) = plan.targets("b200:16")
  devices = plan.stand_ins(gpu)
  assert len(devices) == 16
  assert {d.platform for d in devices} == {"gpu"}
  assert [d.process_index for d in devices] == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
  "text", ["v4:4x4x4", "v5e:4x8", "v5p:4x4x4", "v6e:16x16", "v7x:2x2x1"]
)
def test_a_torus_of_stand_ins_makes_a_mesh(text):
  (target,) = plan.targets(text)
  mesh = make_mesh(Mesh(fsdp=-1, tensor=4), plan.stand_ins(target))
  assert mesh.size == plan.device_count(target)
  assert len({device.id for device in mesh.devices.flat}) == mesh.size


@pytest.mark.skipif(not HERE, reason="libtpu, the extra plan, is not installed")
def test_libtpu_knows_the_topologies():
  for text in ("v4:2x2x1", "v5e:1x1", "v5p:4x4x4", "v6e:16x16", "v7x:2x2x1"):
    (target,) = plan.targets(text)
    devices, told = plan.devices(target), plan.stand_ins(target)
    assert len(devices) == len(told) == plan.device_count(target)
    assert devices[0].device_kind in target.chip.kinds
    mesh = make_mesh(Mesh(), devices)
    by_name = make_mesh(Mesh(), told)
    assert mesh.shape == by_name.shape
