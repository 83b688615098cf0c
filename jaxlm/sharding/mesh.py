"""The device mesh: one size per axis, in the order slowest to fastest links."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from jaxlm.errors import InputError

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
  """How many devices stand along each axis; their product is the device count."""

  pipeline: int = 1
  """Stages of layers."""
  data: int = 1
  """Replicas that see other rows of the batch and hold the same parameters."""
  fsdp: int = -1
  """Devices that see other rows and hold a shard of each parameter; -1: the rest."""
  expert: int = 1
  """Devices that hold other experts of a mixture-of-experts layer."""
  context: int = 1
  """Devices that hold other positions of the same rows."""
  tensor: int = 1
  """Devices that hold other heads, hidden units and vocabulary."""
  slices: int = 1
  """Groups of devices joined by the slower network of the data centre; they stand
  along `data`, or along `pipeline` and `data`, and everything else stays inside one."""

  def __post_init__(self):
    sizes = self.sizes()
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise InputError(f"mesh.{axis}: {size} is neither -1 nor at least 1.")
    if self.slices < 1:
      raise InputError(f"mesh.slices: {self.slices} is under 1.")
    if list(sizes.values()).count(-1) > 1:
      rest = [axis for axis, size in sizes.items() if size == -1]
      raise InputError(f"mesh: only one axis can be -1 (the rest), not {rest}.")

  def sizes(self) -> dict[str, int]:
    """Returns {axis: size} in mesh order."""
    return {axis: getattr(self, axis) for axis in AXES}


def resolve(mesh: Mesh, devices: int) -> dict[str, int]:
  """Returns {axis: size} with -1 filled in.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  sizes = mesh.sizes()
  known = math.prod(size for size in sizes.values() if size != -1)
  told = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
  if -1 in sizes.values():
    if devices % known:
      raise InputError(
        f"mesh ({told}): {devices} devices do not divide by {known}, the product of "
        "the other axes."
      )
    rest = devices // known
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}
  if known != devices:
    raise InputError(
      f"mesh ({told or 'all 1'}): needs {known} devices and {devices} are here. Set "
      "one axis to -1 (the rest), for example --config.mesh.fsdp=-1."
    )
  return sizes


def make_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Returns a `jax.sharding.Mesh` over the devices (all of them unless given).

  Raises:
    InputError: the mesh does not fill the devices, or the slices not its data axis, or
      the devices stand in other slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = resolve(mesh, len(devices))
  outer = _over_slices(sizes, mesh.slices)
  inner = [size // over for size, over in zip(sizes.values(), outer, strict=True)]
  if devices[0].platform != "tpu":
    # Devices come process by process: the axes in front are the slow ones already.
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
  elif mesh.slices == 1:
    try:
      grid = mesh_utils.create_device_mesh(inner, devices)
    except NotImplementedError:  # an axis that is a part of a torus's dimension
      grid = mesh_utils.create_device_mesh(
        inner, devices, allow_split_physical_axes=True
      )
  else:
    _check_slices(mesh.slices, devices)
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
  return jax.sharding.Mesh(grid, tuple(sizes))


def _check_slices(slices: int, devices: Sequence[Any]) -> None:
  """Raises InputError where TPUs stand in another number of slices."""
  # Of one slice alone devices may not tell.
  found = len({getattr(device, "slice_index", 0) for device in devices})
  if found != slices:
    raise InputError(
      f"mesh.slices: {slices} slices, and these {len(devices)} devices stand in "
      f"{found}. Set --config.mesh.slices={found}; a plan is for one slice."
    )


def _over_slices(sizes: dict[str, int], slices: int) -> list[int]:
  """Returns how many slices each axis spans."""
  outer = dict.fromkeys(sizes, 1)
  left = slices
  for axis in ("data", "pipeline"):
    outer[axis] = math.gcd(sizes[axis], left)
    left //= outer[axis]
  if left != 1:
    raise InputError(
      f"mesh.slices: {slices} do not divide data={sizes['data']} times "
      f"pipeline={sizes['pipeline']}. Only these axes may cross the slower network."
    )
  return list(outer.values())
