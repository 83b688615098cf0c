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
from jaxlm.models.spec import Remat
from jaxlm.runs import summary
from jaxlm.runs.assembled import Assembled, assemble, compiled
from jaxlm.runs.decode import Decode
from jaxlm.runs.train import Train
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.placement import check_batch
from jaxlm.sharding.rules import Layout

LIGHTER: tuple[Remat, ...] = ("full", "dots_without_batch", "dots", "none")
"""Remat presets, from the least memory to the fewest operations."""


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


class Report(NamedTuple):
  """What a plan found for one target."""

  target: launch.Target
  tokens: int
  flops: count.Flops
  """Of a step on one device."""
  predicted: memory.Memory
  peak: float | None
  """Bytes a device needs by the compiler; None: nothing was compiled."""
  costs: hlo.Costs | None
  seconds: Seconds
  lines: tuple[str, ...]

  @property
  def needs(self) -> float:
    """Bytes of a device: the compiler's where it was asked, else the prediction."""
    return self.predicted.total if self.peak is None else self.peak

  @property
  def fits(self) -> bool:
    """Whether the chip has so much memory."""
    return self.needs <= self.target.chip.hbm


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
  for target in launch.targets(text):
    reports.append(report(run, target))
    print("\n".join(reports[-1].lines), end="\n\n", flush=True)
  if len(reports) > 1:
    print(ranking(reports))
  return reports


def report(run: Train, target: launch.Target) -> Report:
  """Returns the report of one target."""
  run = run if target.mesh is None else dataclasses.replace(run, mesh=target.mesh)
  why_not = launch.uncompiled(target)
  devices = launch.stand_ins(target) if why_not else launch.devices(target)
  layout = Layout(make_mesh(run.mesh, devices), run.sharding)
  check_batch(layout, run.data.batch, run.data.seq_len, run.accumulate)
  parts = assemble(run, layout)
  options = xla.options(target.chip, run.compiler)
  peak, costs, lines = None, None, [f"compiled: nothing; {why_not}"]
  if why_not is None:
    began = time.perf_counter()
    with run.products():
      program = compiled(parts, options)
    seconds = time.perf_counter() - began
    costs = hlo.costs(program.as_text() or "", layout.mesh.size)
    analysis: Any = program.memory_analysis()
    peak = float(analysis.peak_memory_in_bytes)
    lines = [f"compiled in {seconds:.0f} s for {target.text}"]
  predicted = memory.predict(parts.decoder, parts.plan, _work(run, layout))
  tokens = run.data.batch * run.data.seq_len
  whole = count.training_flops(run.model, run.data.seq_len)
  flops = count.Flops(*(f * tokens / layout.mesh.size for f in whole))
  found = Report(
    target, tokens, flops, predicted, peak, costs,
    _seconds(run, parts, target.chip, flops, costs), (),
  )  # fmt: skip
  lines = [
    f"=== plan: {target.text} ===",
    summary.describe_model(run.model, run.data.seq_len, run.data.batch),
    summary.describe_layout(layout, parts.plan),
    summary.describe_attention(parts.decoder, run.data.seq_len)
    + f"\nremat: {run.remat}; micro-batches: {run.accumulate}",
    xla.describe(options),
    *lines,
    *_memory(found),
    *_work_lines(found),
    *_advice(run, parts, found),
  ]
  return found._replace(lines=tuple(lines))


def _work(run: Train, layout: Layout) -> memory.Work:
  return memory.Work(
    run.data.batch / run.accumulate / layout.size("batch"),
    run.data.seq_len / layout.size("sequence"),
    run.objective.chunk,
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
  scores = flops.causal - 6.0 * count.matrix_parameters(run.model) * tokens
  # A table of the config's own is taken to recompute as much as "full".
  again = 1.0 if run.remat in LIGHTER[1:] else 4 / 3
  products = costs.matmul_flops if costs else again * (flops.causal - scores)
  # The kernels' own recomputation of scores in the backward pass is in `again` too.
  compute = (products + again * scores) / chip.flops
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
  rows = told._asdict()
  measured = dict(rows)
  if found.peak is not None:
    exact = told.parameters + told.optimizer + told.gradients
    measured["temporaries"] = found.peak - exact
  for name, value in rows.items():
    own = f"{measured[name] / 1e9:9.3f}" if found.peak is not None else "        -"
    lines.append(f"  {name:12} predicted {value / 1e9:9.3f}   compiled {own}")
  own = "        -" if found.peak is None else f"{found.peak / 1e9:9.3f}"
  lines.append(f"  {'peak':12} predicted {told.total / 1e9:9.3f}   compiled {own}")
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
  costs = found.costs
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


def _advice(run: Train, parts: Assembled, found: Report) -> list[str]:
  """Names the nearest change that would fit, or run faster, by prediction."""
  hbm, layout = found.target.chip.hbm, parts.decoder.layout
  off = found.needs / found.predicted.total

  def needs(remat: Remat, accumulate: int) -> float:
    changed = dataclasses.replace(run, remat=remat, accumulate=accumulate)
    decoder = parts.decoder.clone(remat=remat)
    return off * memory.predict(decoder, parts.plan, _work(changed, layout)).total

  at = LIGHTER.index(run.remat) if run.remat in LIGHTER else 1
  rows = run.data.batch // layout.size("batch")
  if not found.fits:
    choices: list[tuple[Remat, int]] = [(r, run.accumulate) for r in LIGHTER[:at][::-1]]
    choices.extend((LIGHTER[0], n) for n in range(2, rows + 1) if rows % n == 0)
    for remat, accumulate in choices:
      if needs(remat, accumulate) <= hbm:
        return [
          f"nearest change that fits: remat={remat}, accumulate={accumulate} "
          f"(predicted {needs(remat, accumulate) / 1e9:.1f} GB)"
        ]
    return [
      "neither remat nor accumulate makes it fit: more chips or more tensor would"
    ]
  parted = [n for n in range(run.accumulate, rows + 1) if rows % n == 0]
  faster: tuple[Remat, ...] = LIGHTER[:at:-1]
  for remat, accumulate in itertools.product(faster, parted):
    if needs(remat, accumulate) <= 0.9 * hbm:
      return [
        f"nearest change that runs faster: remat={remat}, accumulate={accumulate}; it "
        f"recomputes less (predicted {needs(remat, accumulate) / 1e9:.1f} GB)"
      ]
  return ["nearest change that runs faster: none in remat and accumulate"]


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
