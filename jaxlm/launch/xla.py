"""Compiler options by chip, passed where the step is compiled and printed by the run.

Names and effects were checked by compiling ahead of time with libtpu 0.0.42.1 (see
experiments/plan/RESULT.md); nothing here was timed on a chip.
"""

import contextlib
import re
from collections.abc import Iterator

import jax

from jaxlm.errors import InputError
from jaxlm.launch.chips import Chip

Options = tuple[tuple[str, str], ...]

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
# A weight gradient's sum over a whole slice becomes a reduce-scatter, which runs on the
# SparseCores beside the products. Without it this compiler sums the whole gradient on
# every device and keeps a slice, with nothing overlapped.
_SCATTER: Options = (
  (_OFFLOAD + "reduce_scatter", "true"),
  (_OFFLOAD + "nd_reduce_scatter", "true"),
)
# Collectives run while products do, on GPUs; on TPUs that is the compiler's default.
_OVERLAP: Options = (
  ("xla_gpu_enable_latency_hiding_scheduler", "true"),
  ("xla_gpu_enable_while_loop_double_buffering", "true"),
)
# The vector memory that a fusion may use; the default is a sixth of it. A step of 8B
# parameters came to a fifth fewer cycles by the compiler's estimate.
_VECTOR: Options = (("xla_tpu_scoped_vmem_limit_kib", "98304"),)
BY_CHIP: dict[str, Options] = {
  "v5p": _SCATTER + _VECTOR,
  "v6e": _SCATTER + _VECTOR,
  "a100": _OVERLAP,
  "h100": _OVERLAP,
  "h200": _OVERLAP,
  "b200": _OVERLAP,
}


def options(chip: Chip | None, overrides: Options) -> dict[str, str | bool]:
  """Returns the chip's options with the overrides; an empty value takes one out.

  "true" and "false" become booleans, which every compiler takes; as a string XLA's own
  options want "True", and libtpu's any case. Numbers stay as they are written.
  """
  given = dict(BY_CHIP.get(chip.name, ()) if chip else ()) | dict(overrides)
  truths: dict[str, str | bool] = {"true": True, "false": False}
  taken = {name: value for name, value in given.items() if value}
  return {name: truths.get(value.lower(), value) for name, value in taken.items()}


_REFUSED = (
  r"No such compile option: '(?P<name>[^']+)'",
  r"While setting option (?P<name>\w+), '(?P<value>.*?)' is not a valid (?P<type>\w+)",
  r"Failed to parse '(?P<value>.*?)' into flag (?P<name>\w+)",
)
"""What XLA and libtpu say of an option that they do not take."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Names the option that a compiler refuses.

  Raises:
    InputError: the compiler knows no such option, or not this value of it.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    found = next(filter(None, (re.search(said, str(error)) for said in _REFUSED)), None)
    if found is None:
      raise
    told = found.groupdict()
    name = told["name"]
    wrong = "is no option of this compiler"
    if "value" in told:
      wrong = f"takes no value {told['value']!r}"
      wrong += f"; it is of type {told['type']}" if "type" in told else ""
    raise InputError(
      f"compiler: {name} {wrong}. Mend its entry, or give it an empty value, which "
      "takes one of the chip's own out."
    ) from None


def describe(options: dict[str, str | bool]) -> str:
  """Returns the line that a run prints."""
  if not options:
    return "compiler options: none, the compiler's defaults"
  told = "\n".join(f"  {name}={value}" for name, value in options.items())
  return f"compiler options:\n{told}"
