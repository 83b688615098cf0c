"""What a training run will need, told before a chip is rented.

The run's own step is compiled ahead of time for a named target on a machine that has
none of it; where nothing can be compiled, what is known without a compiler is told.
"""

import dataclasses
import itertools
import time
from typing import Any, NamedTuple

from jaxlm.errors import InputError
from jaxlm.launch import hlo, memory, xla
from jaxlm.launch import plan as launch
from jaxlm.launch.chips import Chip
from jaxlm.models import count
from jaxlm.models.spec import Keep, Remat
from jaxlm.posttrain import objectives
from jaxlm.posttrain.distill import Distill
from jaxlm.runs import summary
from jaxlm.runs.assembled import Assembled, assemble, compiled
from jaxlm.runs.decode import Decode
from jaxlm.runs.train import Train
from jaxlm.sharding.placement import check_batch
from jaxlm.sharding.rules import Layout

LIGHTER: tuple[Remat, ...] = ("full", "dots_without_batch", "dots", "none")
"""Remat presets, from the least memory to the fewest operations."""
Change = tuple[Remat, int]
"""Remat and micro-batches in place of the run's own."""


class Seconds(NamedTuple):
  """A roofline: what each part would take at the chip's best, were it alone."""

  compute: float
  hbm: float
  links: float
  exposed: float
  """Of `links`, the collectives that the program awaits with nothing between."""

  @property
  def step(self) -> float:
    """The estimate of a step: the longest part, and what cannot overlap with it."""
    return max(self.compute, self.hbm, self.links - self.exposed) + self.exposed


class Prepared(NamedTuple):
  """A run on the layout of one target, before anything is compiled."""

  run: Train
  target: launch.Target
  parts: Assembled
  why_not: str | None
  """Why nothing can be compiled."""


class Report(NamedTuple):
  """What a plan found for one target."""

  target: launch.Target
  tokens: int
  flops: count.Flops
  """Of a step on one device."""
  predicted: memory.Memory
  program: launch.Program
  seconds: Seconds
  lines: tuple[str, ...]

  @property
  def needs(self) -> float:
    """Bytes of a device: the compiler's where it told, else the prediction.

    Of what it refuses they are at least the chip's.
    """
    if self.program.refusal is not None:
      return max(self.predicted.total, self.target.chip.hbm)
    return self.predicted.total if self.program.peak is None else self.program.peak

  @property
  def fits(self) -> bool:
    """Whether the chip has so much memory."""
    return self.program.refusal is None and self.needs <= self.target.chip.hbm


def plan(run: Any, text: str) -> list[Report]:
  """Prints a report for each target of --plan, and their ranking where several.

  Of a step of decoding it only prints, see `runs/decode.py`.

  Raises:
    InputError: the config has no step to plan, or a target cannot hold its layout.
  """
  if isinstance(run, Decode):
    run.plan(text)
    return []
  if not isinstance(run, Train):
    raise InputError(f"--plan: {type(run).__name__} has no step to plan.")
  reports = []
  for ready in [prepare(run, target) for target in launch.targets(text)]:
    reports.append(report(ready))
    print("\n".join(reports[-1].lines), end="\n\n", flush=True)
  if len(reports) > 1:
    print(ranking(reports))
  return reports


def prepare(run: Train, target: launch.Target) -> Prepared:
  """Returns the run on a target.

  Raises:
    InputError: the target cannot hold the layout; the message names both.
  """
  with launch.named(target):
    run = dataclasses.replace(run, mesh=launch.mesh_on(target, run.mesh))
    layout, why_not = launch.arrange(target, run.mesh, run.sharding)
    check_batch(layout, run.data.batch, run.data.seq_len, run.accumulate)
    return Prepared(run, target, assemble(run, layout), why_not)


def _compile(ready: Prepared, options: dict[str, str | bool]) -> launch.Program:
  """Returns what the compiler tells of the step; empty where it cannot be asked."""
  if ready.why_not is not None:
    return launch.Program()
  with launch.named(ready.target), ready.run.products():
    return launch.ask(
      lambda: compiled(ready.parts, options), ready.parts.decoder.layout.mesh.size
    )


def report(ready: Prepared) -> Report:
  """Returns the report of one target."""
  run, target, parts, why_not = ready
  layout, options = parts.decoder.layout, xla.options(target.chip, run.compiler)
  began = time.perf_counter()
  program = _compile(ready, options)
  told = f"compiled in {time.perf_counter() - began:.0f} s for {target.text}"
  if program.peak is None:
    told = f"compiled: nothing; {why_not or f'the compiler refuses: {program.refusal}'}"
  predicted = memory.predict(
    parts.decoder, parts.plan, _work(run, layout), parts.task.frozen
  )
  tokens = run.data.batch * run.data.seq_len
  beside = run.adapters is not None
  prefix = 0 if parts.base is None else parts.base.prefix
  whole = count.training_flops(run.model, run.data.seq_len, frozen=beside)
  flops = count.Flops(*(f * tokens / layout.mesh.size for f in whole))
  found = Report(
    target, tokens, flops, predicted, program,
    _seconds(run, parts, target.chip, flops, program.costs), (),
  )  # fmt: skip
  lines = [
    f"=== plan: {target.text} ===",
    summary.describe_model(run.model, run.data.seq_len, run.data.batch, frozen=beside),
    *_tuning(run, parts),
    summary.describe_layout(layout, parts.plan),
    summary.describe_attention(parts.decoder, run.data.seq_len, prefix)
    + f"\nremat: {run.remat}; micro-batches: {run.accumulate}",
    xla.describe(options),
    told,
    *_memory(found),
    *_work_lines(found),
    *_left_out(run),
    *_advice(run, parts, found),
  ]
  return found._replace(lines=tuple(lines))


def _tuning(run: Train, parts: Assembled) -> list[str]:
  if parts.base is None:
    return []
  name = type(run.adapters).__name__
  return [summary.describe_tuning(parts.plan.shapes.params, parts.base, name)]


def _work(run: Train, layout: Layout) -> memory.Work:
  return memory.Work(
    run.data.batch / run.accumulate / layout.size("batch"),
    run.data.seq_len / layout.size("sequence"),
    objectives.chunk_of(run.objective),
  )


def _seconds(
  run: Train,
  parts: Assembled,
  chip: Chip,
  flops: count.Flops,
  costs: hlo.Costs | None,
) -> Seconds:
  """Returns the roofline; recomputation is counted in, by the compiler or by preset."""
  layout = parts.decoder.layout
  tokens = run.data.batch * run.data.seq_len / layout.mesh.size
  passes = 3 if run.adapters is None else 2
  scores = flops.causal - 2.0 * passes * count.matrix_parameters(run.model) * tokens
  # A table of the config's own is taken to recompute as much as "full".
  again = 1.0 if run.remat in LIGHTER[1:] else 1 + 1 / passes
  products = costs.matmul_flops if costs else again * (flops.causal - scores)
  # The kernels' own recomputation of scores in the backward pass is in `again` too;
  # where no kernel ran the products have the scores in them.
  apart = 0.0 if costs is not None and not costs.kernels else again * scores
  compute = (products + apart) / chip.flops
  state = memory.held_bytes(parts.plan.shapes, parts.plan.shardings)
  weights = count.parameters(run.model).total * count.BYTES[run.precision.compute]
  weights /= layout.size("mlp")
  kept = memory.kept(parts.decoder, _work(run, layout)) * run.accumulate
  hbm = (2 * state + 3 * weights * run.accumulate + 2 * kept) / chip.hbm_bandwidth
  if costs is None:
    around, replicas = layout.size("embed"), layout.mesh.shape["data"]
    sent = 3 * weights * (around - 1) / around * run.accumulate
    sent += 2 * 4 * weights / around * (replicas - 1) / replicas
    inside = chip.torus or layout.mesh.size <= chip.chips_a_host
    return Seconds(compute, hbm, sent / (chip.ici if inside else chip.dcn), 0.0)
  kinds = costs.collectives.values()
  sent, exposed = sum(k.sent for k in kinds), sum(k.exposed for k in kinds)
  return Seconds(compute, hbm, sent / chip.ici, exposed / chip.ici)


def _memory(found: Report) -> list[str]:
  told = found.predicted
  lines = ["memory of a chip, GB:"]
  own = dict.fromkeys(told._fields, "-")
  peak = found.program.peak
  if peak is not None:
    # The compiler tells one number; what is exact leaves the rest of it.
    rest = peak - told.parameters - told.optimizer - told.gradients - told.frozen
    own |= {"temporaries": f"{rest / 1e9:.3f} (peak less the rows above)"}
  own["peak"] = "-" if peak is None else f"{peak / 1e9:.3f}"
  for name, value in (told._asdict() | {"peak": told.total}).items():
    if name == "frozen" and not value:
      continue
    lines.append(f"  {name:12} predicted {value / 1e9:9.3f}   compiled {own[name]:>9}")
  hbm = found.target.chip.hbm
  verdict = "fits" if found.fits else "DOES NOT FIT"
  lines.append(
    f"  {verdict}: {found.needs / hbm:.0%} of the {hbm / 1e9:.1f} GB of a "
    f"{found.target.chip.name}"
  )
  return lines


def _work_lines(found: Report) -> list[str]:
  lines = [
    f"a step on a chip: {found.flops.causal / 1e12:,.1f} TFLOP of the model by causal "
    f"half, {found.flops.full / 1e12:,.1f} by full square"
  ]
  costs = found.program.costs
  if costs is not None:
    lines.append(
      f"  executed in products: {costs.matmul_flops / 1e12:,.1f} TFLOP (recomputation "
      f"included, the {costs.kernels} runs of kernels not)"
    )
    if costs.cycles is not None:
      lines.append(
        f"  the compiler's own estimate of fused loops: {costs.cycles / 1e9:.3f}e9 "
        "cycles (no kernels, no collectives)"
      )
    lines.append("collectives of a step on a chip:")
    for kind in costs.collectives.values():
      lines.append(
        f"  {kind.kind:18} {kind.times:6} of {kind.bytes / 1e9:9.3f} GB in all, "
        f"{kind.sent / 1e9:9.3f} GB sent, {kind.overlapped} overlapped"
      )
  s = found.seconds
  utilization = found.flops.causal / found.target.chip.flops / s.step
  lines.append(
    f"roofline, an estimate and no measurement: compute {s.compute:.3f} s, memory "
    f"{s.hbm:.3f} s, links {s.links:.3f} s ({s.exposed:.3f} s exposed); a step at best "
    f"{s.step:.3f} s, {found.tokens / s.step:,.0f} tokens/s, MFU {utilization:.0%} by "
    "causal half"
  )
  return lines


def _left_out(run: Train) -> list[str]:
  """Says what the roofline leaves out."""
  left = ["optimizer state"] if run.moments.memory == "host" else []
  if isinstance(run.remat, Keep) and run.remat.named("offload"):
    left.append(f"activations ({', '.join(run.remat.named('offload'))})")
  lines = []
  if left:
    lines.append(f"  left out of it: moving {' and '.join(left)} to the host and back")
  if isinstance(run.objective, Distill) and not run.objective.top_k:
    lines.append("  left out of it: the teacher's forward pass and its activations")
  return lines


def _advice(run: Train, parts: Assembled, found: Report) -> list[str]:
  """Names the nearest change that would fit, or run faster, by prediction."""
  hbm, rows = found.target.chip.hbm, run.data.batch
  rows //= parts.decoder.layout.size("batch")
  off = found.needs / found.predicted.total
  if found.program.refusal is not None and found.predicted.total <= hbm:
    return ["no advice: what the compiler refuses would fit by prediction"]

  def needs(change: Change) -> float:
    changed, altered = _changed(run, parts, change)
    work = _work(changed, parts.decoder.layout)
    frozen = parts.task.frozen
    return off * memory.predict(altered.decoder, parts.plan, work, frozen).total

  def seconds(change: Change) -> float:
    changed, altered = _changed(run, parts, change)
    return _seconds(changed, altered, found.target.chip, found.flops, None).step

  def told(change: Change) -> str:
    return f"remat={change[0]}, accumulate={change[1]} "

  at = LIGHTER.index(run.remat) if run.remat in LIGHTER else 1
  if found.fits:
    parted = [n for n in range(run.accumulate, rows + 1) if rows % n == 0]
    now = seconds((run.remat, run.accumulate))
    for change in itertools.product(LIGHTER[:at:-1], parted):
      if needs(change) <= 0.9 * hbm and seconds(change) < now:
        return [
          f"nearest change that runs faster: {told(change)}(predicted "
          f"{needs(change) / 1e9:.1f} GB; by this roofline, nothing compiled, "
          f"{seconds(change):.3f} s for {now:.3f} s)"
        ]
    return ["nearest change that runs faster: none in remat and accumulate"]
  choices: list[Change] = [(r, run.accumulate) for r in LIGHTER[:at][::-1]]
  choices.extend((LIGHTER[0], n) for n in range(2, rows + 1) if rows % n == 0)
  fitting = (change for change in choices if needs(change) <= hbm)
  lines = [
    f"nearest change that fits: {told(change)}(predicted {needs(change) / 1e9:.1f} GB)"
    for change in itertools.islice(fitting, 1)
  ]
  state, placed = parts.plan
  left = found.needs - memory.held_bytes(state.opt_state, placed.opt_state)
  if run.moments.memory == "device" and left <= hbm:
    lines.append(
      f"moments.memory=host alone fits as well (predicted {left / 1e9:.1f} GB)"
      if lines
      else f"nearest change that fits: moments.memory=host (predicted {left / 1e9:.1f} "
      "GB)"
    )
  return lines or [
    "by prediction none of remat, accumulate and moments.memory makes it fit; more "
    "chips and other meshes were not tried"
  ]


def _changed(run: Train, parts: Assembled, change: Change) -> tuple[Train, Assembled]:
  remat, accumulate = change
  changed = dataclasses.replace(run, remat=remat, accumulate=accumulate)
  return changed, parts._replace(decoder=parts.decoder.clone(remat=remat))


def ranking(reports: list[Report]) -> str:
  """Returns the targets in order of estimated tokens a second and chip."""

  def speed(found: Report) -> float:
    return found.tokens / found.seconds.step / launch.device_count(found.target)

  ordered = sorted(reports, key=lambda r: (r.fits, speed(r)), reverse=True)
  lines = ["ranking, those that fit first, by estimated tokens a second and chip:"]
  for place, found in enumerate(ordered, 1):
    note = "" if found.fits else "  does not fit"
    lines.append(
      f"  {place}. {found.target.text:28} {speed(found):9,.0f}  step "
      f"{found.seconds.step:.3f} s  {found.needs / 1e9:6.1f} GB{note}"
    )
  return "\n".join(lines)
