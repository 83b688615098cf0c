"""Targets of a plan: named pieces of a pod, on a machine that has none of it.

  v5p:4x4x4                    64 chips as a torus of 4 by 4 by 4
  v6e:16x16@data=2,fsdp=128    with another mesh than the config's
  h100:8                       8 GPUs; only the analytical part

Several are separated by blanks and ranked. Compiling for a TPU needs libtpu, the extra
`plan`, and no TPU.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxlm.errors import InputError, nearest
from jaxlm.launch import hlo
from jaxlm.launch.chips import Chip, chip_named
from jaxlm.sharding.mesh import AXES, Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.training.state import HOST


class Target(NamedTuple):
  """What a plan is for."""

  text: str
  """As it was given."""
  chip: Chip
  dims: tuple[int, ...]
  """Chips along each dimension of the torus, or how many."""
  mesh: Mesh | None
  """In place of the config's, but for its slices."""


def targets(text: str) -> list[Target]:
  """Returns the targets of --plan.

  Raises:
    InputError: what is no target, naming it.
  """
  found = [_target(word) for word in text.split()]
  if not found:
    raise InputError("--plan: empty; give CHIP:TOPOLOGY, for example v5p:4x4x4.")
  return found


def _target(text: str) -> Target:
  place, at, axes = text.partition("@")
  name, _, topology = place.partition(":")
  chip = chip_named(name)
  if not re.fullmatch(r"\d+(x\d+)*", topology) or "0" in topology.split("x"):
    example = {3: "4x4x4", 2: "16x16", 0: "8"}[chip.torus]
    raise InputError(
      f"--plan={text}: {topology!r} is no topology; write {name}:{example}, the chips "
      "along each dimension."
    )
  dims = tuple(int(n) for n in topology.split("x"))
  if len(dims) != (chip.torus or 1):
    raise InputError(
      f"--plan={text}: {name} has {chip.torus or 1} dimension(s) and {topology} "
      f"{len(dims)}."
    )
  sizes = {}
  for entry in axes.split(",") if at else ():
    axis, _, size = entry.partition("=")
    if axis not in AXES or not re.fullmatch(r"-?\d+", size):
      raise InputError(
        f"--plan={text}: {entry!r} is no AXIS=SIZE; the axes are {', '.join(AXES)}."
        f"{'' if axis in AXES else nearest(axis, AXES)}"
      )
    if axis in sizes:
      raise InputError(f"--plan={text}: {axis} is given twice.")
    sizes[axis] = int(size)
  return Target(text, chip, dims, Mesh(**sizes) if sizes else None)


def device_count(target: Target) -> int:
  """Returns how many devices JAX sees on a target."""
  return math.prod(target.dims) * (2 if target.chip.name == "v7x" else 1)


def uncompiled(target: Target) -> str | None:
  """Returns why nothing can be compiled for a target here, or None."""
  if target.chip.platform != "tpu":
    return f"no compiler for {target.chip.name} without one is set up in jaxlm"
  if importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed: pip install 'jaxlm[plan]'"
  return None


def devices(target: Target) -> list[Any]:
  """Returns the devices of a TPU target, to compile for and not to run on.

  Raises:
    InputError: libtpu knows no such topology.
  """
  from jax.experimental import topologies

  # Untold, libtpu asks a server what machine this is, and serves one process alone.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")
  name = f"{target.chip.name}:{'x'.join(map(str, target.dims))}"
  name = name.replace("v7x:", "tpu7x:")
  # Links close to rings along dimensions of whole cubes, and of v5e and v6e along 16;
  # libtpu assumes none, and without rings it makes other collectives, gathers as sums
  # among them.
  rings = [n % 4 == 0 if target.chip.torus == 3 else n == 16 for n in target.dims]
  more: dict[str, Any] = {"wrap": (*rings, False)[:3]}
  if target.chip.name == "v4":
    more["chip_config_name"] = "megacore"  # a chip as one device, not its two cores
  if math.prod(target.dims) == 1:
    more["chips_per_host_bounds"] = (1, 1, 1)
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
  except Exception as error:
    raise InputError(f"--plan={target.text}: libtpu refuses {name}: {error}") from None
  return list(topology.devices)


class _Kind(str):
  """A kind of memory in name alone; JAX asks for the name in either way."""

  @property
  def kind(self) -> str:
    return str(self)


class _Client:
  def process_index(self) -> int:
    return 0


@dataclasses.dataclass(frozen=True)
class _StandIn:
  """A device in name alone, for shapes and shardings that nothing runs on."""

  id: int
  platform: str
  device_kind: str
  process_index: int
  coords: tuple[int, ...]
  """Where it stands in the torus; three numbers, as JAX tells them."""
  core_on_chip: int
  client: _Client = dataclasses.field(default_factory=_Client)

  def default_memory(self) -> _Kind:
    return _Kind("device")

  def addressable_memories(self) -> list[_Kind]:
    return [_Kind("device"), _Kind(HOST)]


def stand_ins(target: Target) -> list[Any]:
  """Returns devices in name alone, where nothing can be compiled."""
  chip = target.chip
  cores = device_count(target) // math.prod(target.dims)
  places = itertools.product(*(range(n) for n in target.dims), range(cores))
  return [
    _StandIn(
      i,
      chip.platform,
      chip.kinds[0],
      i // chip.chips_a_host,
      (*place[:-1], 0, 0)[:3],
      place[-1],
    )
    for i, place in enumerate(places)
  ]


class Program(NamedTuple):
  """What the compiler told of a step; empty where it was not asked."""

  peak: float | None = None
  """Bytes of a device at the fullest."""
  costs: hlo.Costs | None = None
  refusal: str | None = None
  """What it said instead, where the step is too large for the chip."""


def ask(compile_it: Callable[[], Any], devices: int) -> Program:
  """Returns what the compiler tells of a program, or why it refuses to fit it."""
  try:
    with warnings.catch_warnings():
      # A program for devices that are not here is kept by the compile cache and cannot
      # be read back: it is compiled again.
      warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
      program = compile_it()
  except jax.errors.JaxRuntimeError as error:
    _, exhausted, said = str(error).partition("RESOURCE_EXHAUSTED: ")
    if not exhausted:
      raise
    return Program(refusal=said.partition("\n")[0])
  analysis: Any = program.memory_analysis()
  peak = float(analysis.peak_memory_in_bytes)
  return Program(peak, hlo.costs(program.as_text() or "", devices))


def mesh_on(target: Target, mesh: Mesh) -> Mesh:
  """Returns the target's own mesh with a config's slices, or the config's."""
  if target.mesh is None:
    return mesh
  return dataclasses.replace(target.mesh, slices=mesh.slices)


def arrange(
  target: Target, mesh: Mesh, rules: ShardingRules
) -> tuple[Layout, str | None]:
  """Returns the layout on a target's devices, and why nothing can be compiled there.

  Raises:
    InputError: the target cannot hold the mesh.
  """
  why_not = uncompiled(target)
  on = stand_ins(target) if why_not else devices(target)
  return Layout(make_mesh(mesh, on), rules), why_not


@contextlib.contextmanager
def named(target: Target) -> Iterator[None]:
  """Names the target in an InputError."""
  try:
    yield
  except InputError as error:
    flag = f"--plan={target.text}: "
    raise InputError(flag + str(error).removeprefix(flag)) from None
