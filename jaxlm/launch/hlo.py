"""What a compiled program does: products, collectives, cycles, loops counted in full.

XLA's own `cost_analysis` counts the body of a loop once. Here the text of the compiled
HLO is read: computations, which of them call which, and how often each loop turns.
"""

import math
import re
from typing import NamedTuple

BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
  "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
  "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128,
}  # fmt: skip
COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)\s.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations|called_computations"
  r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")


class Instruction(NamedTuple):
  """One line of HLO."""

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  inside: str
  """What stands between the parentheses; a constant's value."""
  rest: str
  """Attributes, after the operands."""


class Collective(NamedTuple):
  """Collectives of a kind in one execution of the program, on one device."""

  kind: str
  times: int
  bytes: float
  """Of what each works on at its largest: gathered, or before it is scattered."""
  sent: float
  """Bytes that a device sends in the ring algorithm, groups considered."""
  overlapped: int
  """How many are started and awaited apart, so that products can run between."""
  exposed: float
  """Of `sent`, the bytes of the others."""


class Costs(NamedTuple):
  """What one execution of the program does on one device."""

  matmul_flops: float
  """Of products and convolutions; fused kernels are not seen."""
  kernels: int
  """Executions of custom kernels (Pallas), whose operations are not counted."""
  cycles: float | None
  """Sum of the compiler's own estimates where the text has them; no kernels, no
  collectives."""
  collectives: dict[str, Collective]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns {computation: instructions} and the name of the entry."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
      found = _COMPUTATION.match(line.rstrip())
      assert found, line[:80]
      current = computations.setdefault(found[1], [])
      entry = found[1] if line.startswith("ENTRY") else entry
    elif line.rstrip() == "}":
      current = None
    elif current is not None:
      instruction = _instruction(line)
      if instruction is not None:
        current.append(instruction)
      elif current:  # a kernel's metadata goes over several lines
        current[-1] = current[-1]._replace(rest=current[-1].rest + line)
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  name, right = found.groups()
  shape, right = _split_shape(right)
  op, _, right = right.partition("(")
  end = _closing(right)
  operands = tuple(re.findall(r"%([\w.\-]+)", right[:end]))
  inside, rest = right[:end], right[end + 1 :]
  return Instruction(name, shape, op.strip(), operands, inside, rest)


def _closing(text: str) -> int:
  """Returns where the parenthesis closes that was opened before the text."""
  depth = 1
  for place, letter in enumerate(text):
    depth += (letter in "({[") - (letter in ")}]")
    if depth == 0:
      return place
  return len(text)


def _split_shape(right: str) -> tuple[str, str]:
  """Splits "(f32[2], f32[]) tuple(...)" into its shape and the rest."""
  if not right.startswith("("):
    shape, _, rest = right.partition(" ")
    return shape, rest
  depth = 0
  for end, letter in enumerate(right):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return right[: end + 1], right[end + 1 :].lstrip()
  raise ValueError(f"an unfinished shape: {right[:80]}")


def dims(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns (dtype, dimensions) of each array of a shape."""
  return [
    (dtype, tuple(int(n) for n in sizes.split(",") if n))
    for dtype, sizes in _ARRAY.findall(shape)
    if dtype in BITS
  ]


def array_bytes(shape: str) -> list[float]:
  """Returns the bytes of each array of a shape, layouts and padding apart."""
  return [math.prod(sizes) * BITS[dtype] / 8 for dtype, sizes in dims(shape)]


def trips(instruction: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """Returns how often a loop turns; 1 where the text does not tell."""
  told = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if told:
    return int(told[1])
  # TPU text tells it only in the condition: a counter from 0 below a constant.
  found = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
  lines = computations.get(found[1], []) if found else []
  constants = {one.name: int(one.inside) for one in lines if one.inside.isdigit()}
  for line in lines:
    if line.op == "compare" and "direction=LT" in line.rest:
      limits = [constants[name] for name in line.operands if name in constants]
      if limits:
        return limits[0]
  return max(constants.values(), default=1)


def called(instruction: Instruction) -> list[str]:
  """Returns the computations that an instruction calls."""
  names: list[str] = []
  for found in _CALLED.findall(instruction.rest):
    names += re.findall(r"[\w.\-]+", found.replace("%", ""))
  return names


def executions(computations: dict[str, list[Instruction]], entry: str) -> dict:
  """Returns how often each computation runs in one execution of the entry."""
  runs: dict[str, float] = {}

  def visit(name: str, times: float) -> None:
    runs[name] = runs.get(name, 0.0) + times
    for line in computations[name]:
      turns = trips(line, computations) if line.op == "while" else 1
      for other in called(line):
        if other in computations:
          visit(other, times * turns)

  visit(entry, 1.0)
  return runs


def costs(text: str, devices: int) -> Costs:
  """Returns what one execution of a compiled program does on one device."""
  computations, entry = parse(text)
  shapes = {line.name: line.shape for c in computations.values() for line in c}
  flops = cycles = 0.0
  kernels, timed = 0, False
  found: dict[str, Collective] = {}
  callers = _callers(computations)
  for name, times in executions(computations, entry).items():
    local = {line.name: line.shape for line in computations[name]}
    for line in computations[name]:
      known = {**shapes, **local} if line.op in ("dot", "convolution") else local
      flops += times * _matmul_flops(line, known)
      if line.op == "custom-call" and '"tpu_custom_call"' in line.rest:
        kernels += int(times)
      estimate = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
      if estimate and line.op == "fusion":
        cycles, timed = cycles + times * int(estimate[1]), True
      one = _collective(line, local, devices)
      if one is not None and not _continues(name, callers):
        asynchronous = line.op.endswith("-start") or _starts(callers.get(name))
        before = found.get(one.kind, Collective(one.kind, 0, 0, 0, 0, 0))
        found[one.kind] = Collective(
          one.kind,
          before.times + int(times),
          before.bytes + times * one.bytes,
          before.sent + times * one.sent,
          before.overlapped + (int(times) if asynchronous else 0),
          before.exposed + (0 if asynchronous else times * one.sent),
        )
  return Costs(flops, kernels, cycles if timed else None, found)


def _callers(computations: dict[str, list[Instruction]]) -> dict[str, Instruction]:
  """Returns for each computation an instruction that calls it."""
  return {
    name: line
    for lines in computations.values()
    for line in lines
    for name in called(line)
  }


def _starts(caller: Instruction | None) -> bool:
  """Says whether an instruction starts a collective that is awaited later."""
  if caller is None:
    return False
  started = caller.op in ("call-start", "async-start")
  return started or caller.name.startswith("async-collective-start")


def _continues(name: str, callers: dict[str, Instruction]) -> bool:
  """Says whether a computation carries on a collective that another one started.

  Fused with products, a collective stands in the text once where it starts, once in
  each product that it runs beside, and once where it is awaited.
  """
  caller = callers.get(name)
  awaited = caller is not None and caller.name.startswith("async-collective-done")
  return awaited or name.startswith("async_collective_fusion")


def _matmul_flops(line: Instruction, shapes: dict[str, str]) -> float:
  if line.op not in ("dot", "convolution") or len(line.operands) < 2:
    return 0.0
  result = math.prod(dims(line.shape)[0][1])
  left, right = (dims(shapes[name])[0][1] for name in line.operands[:2])
  if line.op == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    over = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2.0 * result * math.prod(left[i] for i in over)
  return _convolution_flops(line, left, right)


def _convolution_flops(line: Instruction, left, right) -> float:
  """Counts multiplications with what is there, not with padding."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
  assert labels, line.rest[:120]
  lhs, rhs, out = labels.groups()
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(line.rest)))
  (_, result), *_ = dims(line.shape)
  features = right[rhs.index("i")] * result[out.index("f")] * result[out.index("b")]
  total = 2.0 * features
  for number in sorted(label for label in rhs if label.isdigit()):
    at = int(number)
    taps = _taps(
      left[lhs.index(number)],
      right[rhs.index(number)],
      result[out.index(number)],
      {name: value.split("x")[at] for name, value in window.items()},
    )
    total *= taps
  return total


def _window(rest: str) -> str:
  found = re.search(r"window=\{([^}]*)\}", rest)
  return found[1] if found else ""


def _taps(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
  """Returns pairs of an output and a kernel position that meet an input."""
  stride = int(window.get("stride", 1))
  low = int(window.get("pad", "0_0").split("_")[0])
  base, spread = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
  if kernel == 1 and stride == 1 and low == 0 and base == 1:
    return out
  met = 0
  for place in range(out):
    for tap in range(kernel):
      at = place * stride - low + tap * spread
      met += at % base == 0 and 0 <= at // base < size
  return met


def _collective(line: Instruction, shapes: dict[str, str], devices: int):
  kind = line.op.removesuffix("-start")
  if kind not in COLLECTIVES:
    return None
  given = sum(sum(array_bytes(shapes.get(name, ""))) for name in line.operands)
  group = _group(line.rest, devices)
  # What is gathered is the larger side, what is scattered too.
  size = given * group if kind == "all-gather" else given
  share = (group - 1) / group
  sent = size * share * (2 if kind == "all-reduce" else 1)
  if kind == "collective-permute":
    sent = given
  return Collective(kind, 1, size, sent, 0, sent)


def _group(rest: str, devices: int) -> int:
  """Returns the number of devices of one group."""
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  if listed:
    return len(listed[1].split(","))
  tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
  if tiled:
    return int(tiled[2])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  return devices
