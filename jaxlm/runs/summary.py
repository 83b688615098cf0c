"""What a run says at its start: what was chosen, how large it is, what it needs."""

import math

import jax
import numpy as np

from jaxlm.data.corpus import Corpus
from jaxlm.launch.memory import held_bytes
from jaxlm.models import count, spec
from jaxlm.models.attention import work_of
from jaxlm.models.decoder import Decoder
from jaxlm.ops.kernels.choice import choose
from jaxlm.peft.base import Base
from jaxlm.posttrain.kto import KTO
from jaxlm.shapes import PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.training.optimizers import ALL, Factors, Optimizer
from jaxlm.training.state import HOST, Plan
from jaxlm.trees import match, named_leaves


def describe_model(
  model: spec.LM, seq_len: int, batch: int, *, frozen: bool = False
) -> str:
  """Returns the lines about parameters and operations, of a frozen model without those
  of its gradients."""
  counts = count.parameters(model)
  groups = ", ".join(
    f"{name} {_amount(value)}" for name, value in counts._asdict().items() if value
  )
  flops = count.training_flops(model, seq_len, frozen=frozen)
  tokens = batch * seq_len
  return (
    f"model: {counts.total:,} parameters ({groups}); {len(model.blocks)} blocks\n"
    f"  training FLOPs a token: {_amount(flops.causal)} causal half, "
    f"{_amount(flops.full)} full square; a batch of {tokens:,} tokens: "
    f"{_amount(flops.causal * tokens)}"
  )


def describe_labels(corpus: Corpus, sequences: int, loss: KTO) -> str:
  """Returns how many completions are good and bad, and what both weigh.

  Each has `sequences` sequences in its row, of which the first is its own.
  """
  good = bad = 0
  for rows in corpus.train:
    segments_NT = np.asarray(rows.segments_NT, np.int32)
    begins_NT = np.diff(segments_NT, axis=1, prepend=0) != 0
    own_NT = begins_NT & (segments_NT % sequences == 1 % sequences) & (segments_NT > 0)
    labels = rows.extras["values"][own_NT]
    good += int(np.sum(labels > 0))
    bad += int(np.sum(labels <= 0))
  weights = f"weights {loss.desirable} and {loss.undesirable}"
  share = loss.desirable * good / max(loss.undesirable * bad, 1e-9)
  line = f"labels: {good:,} good, {bad:,} bad; {weights}"
  if not (good and bad):
    return f"{line}. ONE KIND ALONE: nothing holds the model back"
  if not 0.99 <= share <= 1.34:
    line += (
      f". Good ones weigh {share:.2f} times the bad ones; its authors advise 1 to 4/3 "
      "(objective.loss.desirable, objective.loss.undesirable)"
    )
  return line


def describe_tuning(params: PyTree, base: Base, method: str) -> str:
  """Returns how much trains beside a frozen model, and what that model takes."""
  found = named_leaves(params)
  count_all = sum(leaf.size for leaf in jax.tree.leaves(base.shapes))
  trained = sum(leaf.size for leaf in found.values())
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base.frozen))
  names = list(found)
  shown = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
  return (
    f"adapters: {method} trains {trained:,} parameters in {len(found)} leaves "
    f"({trained / count_all:.3%} of {count_all:,}), {shown}\n"
    f"  frozen beside them: {held / 1e6:,.1f} MB, {8 * held / count_all:.3f} bits a "
    "parameter"
  )


def describe_layout(layout: Layout, plan: Plan) -> str:
  """Returns the lines about devices, and each device's share of the state."""
  device = layout.mesh.devices.flat[0]
  sizes = ", ".join(f"{a} {n}" for a, n in layout.mesh.shape.items() if n > 1)
  params = held_bytes(plan.shapes.params, plan.shardings.params)
  state = held_bytes(plan.shapes, plan.shardings)
  kinds = {placed.memory_kind for placed in named_leaves(plan.shardings).values()}
  apart = "; optimizer state on the host apart" if HOST in kinds else ""
  return (
    f"mesh: {layout.mesh.size} x {device.device_kind} ({sizes or 'one device'}); "
    f"{jax.process_count()} process(es)\n"
    f"  on a device: parameters {params / 1e6:,.1f} MB, whole state "
    f"{state / 1e6:,.1f} MB{apart}"
  )


def describe_parameters(layout: Layout, plan: Plan) -> str:
  """Returns a table: each parameter, its shape, which mesh axes split it, its share."""
  if layout.mesh.size == 1:
    return "sharding: one device, nothing is split"
  placed = named_leaves(plan.shardings.params)
  rows = []
  for name, leaf in named_leaves(plan.shapes.params).items():
    spec = placed[name].spec
    split = ", ".join(str(axes or "-").replace("'", "") for axes in spec)
    part = math.prod(leaf.shape) // math.prod(placed[name].shard_shape(leaf.shape))
    rows.append((name, "x".join(map(str, leaf.shape)), split, f"1/{part}"))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
  return "\n".join(["sharding: parameter, shape, split over, on each device", *lines])


def describe_rules(
  optimizer: Optimizer, params: PyTree, init_scale: Factors = ALL
) -> str:
  """Returns which parameters each pattern of the rules takes."""
  lines = [f"optimizer: {type(optimizer).__name__}"]
  listed = [("decay", optimizer.decay), ("lr_scale", optimizer.lr_scale)]
  if init_scale != ALL:
    listed.append(("init_scale", init_scale))
  for field, rules in listed:
    numbered = [(pattern, number) for number, (pattern, _) in enumerate(rules)]
    taken = named_leaves(match(numbered, params))
    for number, (pattern, factor) in enumerate(rules):
      names = [name for name, rule in taken.items() if rule == number]
      example = f", such as {names[0]}" if names else ""
      lines.append(f"  {field} x {factor:g}: {pattern!r}, {len(names)} leaves{example}")
  return "\n".join(lines)


def describe_attention(decoder: Decoder, seq_len: int, prefix: int = 0) -> str:
  """Returns which kernel each kind of mixer gets, and why.

  `prefix` counts the virtual tokens that every token sees.
  """
  lines = []
  for mixer in dict.fromkeys(block.mixer for block in decoder.spec.blocks):
    work = work_of(mixer, seq_len, decoder.precision.compute, prefix)
    chosen = choose(decoder.attention, work, decoder.layout)
    kind = "" if mixer.window is None else f" with a window of {mixer.window}"
    lines.append(f"attention{kind}: {chosen.kernel} ({chosen.reason})")
  return "\n".join(lines)


def describe_step(compiled, seconds: float) -> str:
  """Returns the line about the compiled step, with the compiler's own figures."""
  memory = compiled.memory_analysis()
  needs = ""
  if memory is not None:
    needs = (
      f"; it needs {memory.argument_size_in_bytes / 1e6:,.1f} MB of arguments and "
      f"{memory.temp_size_in_bytes / 1e6:,.1f} MB of temporaries a device"
    )
  return f"step: compiled in {seconds:.1f} s{needs}"


def _amount(value: float) -> str:
  for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.3g}{letter}"
  return f"{value:.0f}"
