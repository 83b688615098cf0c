import jax
import pytest

from jaxlm.errors import InputError
from jaxlm.sharding.mesh import AXES, Mesh, _over_slices, make_mesh, resolve


def test_minus_one_takes_the_rest():
  assert resolve(Mesh(), 8)["fsdp"] == 8
  sizes = resolve(Mesh(data=2, fsdp=-1, tensor=2), 8)
  assert (sizes["data"], sizes["fsdp"], sizes["tensor"]) == (2, 2, 2)
  assert resolve(Mesh(data=-1, fsdp=1, tensor=8), 8)["data"] == 1


@pytest.mark.parametrize(
  ("mesh", "parts"),
  [
    (Mesh(fsdp=4), ["fsdp=4", "needs 4 devices and 8 are here", "-1"]),
    (Mesh(fsdp=1), ["all 1", "needs 1 devices and 8 are here"]),
    (Mesh(tensor=16, fsdp=1), ["tensor=16", "needs 16"]),
    (Mesh(tensor=3), ["tensor=3", "8 devices do not divide by 3"]),
  ],
)
def test_a_mesh_that_does_not_fill_the_devices(mesh, parts):
  with pytest.raises(InputError) as raised:
    make_mesh(mesh)
  for part in parts:
    assert part in str(raised.value)


def test_what_a_size_can_be():
  with pytest.raises(InputError, match=r"only one axis can be -1.*'data', 'fsdp'"):
    Mesh(data=-1)
  for size in (0, -2):
    with pytest.raises(InputError, match=rf"mesh\.tensor: {size} is neither"):
      Mesh(tensor=size)


def test_devices_stand_in_the_order_of_the_axes():
  mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
  assert mesh.axis_names == AXES
  assert mesh.devices.ravel().tolist() == jax.devices()
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
  ("mesh", "outer"),
  [
    (Mesh(data=4, fsdp=2, slices=2), {"data": 2}),
    (Mesh(data=4, fsdp=2, slices=4), {"data": 4}),
    (Mesh(pipeline=2, data=2, fsdp=2, slices=4), {"data": 2, "pipeline": 2}),
  ],
)
def test_slices_stand_along_the_slow_axes(mesh, outer):
  sizes = resolve(mesh, 8)
  found = dict(zip(sizes, _over_slices(sizes, mesh.slices), strict=True))
  assert {axis: n for axis, n in found.items() if n > 1} == outer
  assert make_mesh(mesh).devices.ravel().tolist() == jax.devices()


def test_nothing_else_crosses_slices():
  with pytest.raises(InputError, match=r"mesh\.slices: 2 do not divide data=1 times"):
    make_mesh(Mesh(fsdp=8, slices=2))
  with pytest.raises(InputError, match=r"mesh\.slices: 0 is under 1"):
    Mesh(slices=0)
