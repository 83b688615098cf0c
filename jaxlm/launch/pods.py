"""Whether this process is one of many, and how it finds the others.

  --pod=auto              looks at the environment, in the order of `KINDS`
  --pod=none              one process, whatever the environment says
  --pod=HOST:PORT,8,3     process 3 of 8, process 0 of which listens at HOST:PORT

`auto` finds processes of `jaxlm-local` and of whoever sets JAXLM_COORDINATOR,
JAXLM_PROCESSES and JAXLM_PROCESS; Slurm jobs (one task a node or a GPU); GKE jobs with
TPUs; and Cloud TPU virtual machines. For the last three jax itself knows the addresses.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax

from jaxlm.errors import InputError

Kind = Literal["one process", "addresses", "slurm", "gke", "cloud tpu"]
HEARTBEAT_SECONDS = 20
"""After so long without a sign a process counts as lost."""
START_SECONDS = 600
"""How long processes wait for the last one to start."""
ADDRESS, COUNT, INDEX = "JAXLM_COORDINATOR", "JAXLM_PROCESSES", "JAXLM_PROCESS"
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


class Pod(NamedTuple):
  """How the processes of a run find each other."""

  kind: Kind
  address: str | None = None
  """Where process 0 listens; None: jax finds it."""
  processes: int | None = None
  process: int | None = None


ALONE = Pod("one process")


def detect(flag: str, environment: Mapping[str, str], *, tpu: bool) -> Pod:
  """Returns the pod that a flag names or that the environment shows.

  Args:
    flag: the value of --pod.
    environment: variables.
    tpu: whether this machine has a TPU and its library.

  Raises:
    InputError: the flag is not one of those above, or a variable is missing.
  """
  if flag == "none":
    return ALONE
  if flag != "auto":
    return _by_address(flag)
  if ADDRESS in environment:
    missing = [name for name in (COUNT, INDEX) if name not in environment]
    if missing:
      raise InputError(f"{ADDRESS} is set and {', '.join(missing)} is not.")
    numbers = (environment[COUNT], environment[INDEX])
    return _by_address(",".join((environment[ADDRESS], *numbers)))
  if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
    return Pod("slurm")
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
  slices = int(environment.get("MEGASCALE_NUM_SLICES", 1))
  if "," in hosts or slices > 1:
    return Pod("gke")
  return Pod("cloud tpu") if tpu else ALONE


def _by_address(text: str) -> Pod:
  found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", text)
  if not found:
    raise InputError(
      f"--pod={text}: give auto, none, or HOST:PORT,PROCESSES,PROCESS such as "
      "10.0.0.2:8476,8,0."
    )
  address, processes, process = found[1], int(found[2]), int(found[3])
  if process >= processes:
    raise InputError(
      f"--pod={text}: process {process} of {processes}; they count from 0."
    )
  return Pod("addresses", address, processes, process)


def has_tpu() -> bool:
  """Says whether this machine has a TPU and the library that drives it."""
  there = any(map(pathlib.Path.exists, map(pathlib.Path, _TPU_DEVICES)))
  return there and importlib.util.find_spec("libtpu") is not None


def start(flag: str) -> Pod:
  """Joins the other processes, before anything else touches a device.

  Raises:
    InputError: what `detect` raises, or the others are not there in time.
  """
  pod = detect(flag, os.environ, tpu=has_tpu())
  if pod.kind == "one process":
    return pod
  try:
    jax.distributed.initialize(
      pod.address,
      pod.processes,
      pod.process,
      initialization_timeout=START_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"--pod={flag} ({pod.kind}): the processes did not find each other: {error}"
    ) from error
  return pod


def describe(pod: Pod) -> str:
  """Returns the line that a run says about its processes."""
  found = pod.kind if pod.address is None else f"{pod.kind}, {pod.address}"
  return f"processes: {jax.process_count()} ({found}), this is {jax.process_index()}"
