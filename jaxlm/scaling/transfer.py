"""Rules by which a narrow model's settings serve a wide and deep one: muP.

Maximal update parametrization (Yang et al. 2022, tables 3 and 8; with depth Dey et al.
2025, CompleteP) makes first values, learning rates and multipliers functions of how
much wider each matrix is than in a base model, so that what every parameter does to the
network's function in a step stays the same size. The learning rate that is best for the
base is then best for all widths. At the base's own size the rules change nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits
from jaxlm.models.spec import GQA, LM, Block, Precision
from jaxlm.shapes import Array, PyTree
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.training import optimizers
from jaxlm.training.objective import Batch, NextToken, Task, next_token
from jaxlm.training.optimizers import ALL, AdamW, Factors, Lion, Muon
from jaxlm.training.optimizers import Optimizer as Spec
from jaxlm.training.state import First, TrainState, axes_of, create
from jaxlm.training.step import make_step
from jaxlm.trees import named_leaves

PARTS = ("embed", "mixer", "mlp", "final_norm")
"""Modules that the coordinate check looks at."""


class Rule(NamedTuple):
  """What one kind of parameter gets, as factors on what it would have."""

  pattern: str
  """A regex over parameter names."""
  init: float
  """On its first values."""
  lr: float
  """On its learning rate."""
  decay: float
  """On its weight decay, which the learning rate multiplies once more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
  """A model with the settings that go with its size."""

  model: LM
  """The model with its multipliers: `logit_scale`, `residual_scale`, `GQA.scale`."""
  rules: tuple[Rule, ...]
  """First match wins; what none matches is as it would be."""

  @property
  def init_scale(self) -> Factors:
    """What `Train.init_scale` takes."""
    return (*((rule.pattern, rule.init) for rule in self.rules), *ALL)

  def optimizer(self, spec: Spec) -> Spec:
    """Returns the optimizer with the rules in front of its own.

    Raises:
      InputError: it has rules for learning rates already.
    """
    if spec.lr_scale != ALL:
      raise InputError(
        f"optimizer.lr_scale: {spec.lr_scale}; muP's rules take its place. Leave it "
        "out."
      )
    decay = tuple((rule.pattern, rule.decay) for rule in self.rules)
    lr_scale = tuple((rule.pattern, rule.lr) for rule in self.rules)
    return dataclasses.replace(
      spec, decay=(*_undecayed(spec), *decay, *spec.decay), lr_scale=(*lr_scale, *ALL)
    )

  def describe(self) -> str:
    """Returns a table of the rules and multipliers."""
    model = self.model
    residual = sorted({block.residual_scale for block in model.blocks})
    lines = [f"{rule.pattern:<34} init x {rule.init:<8.4g} lr x {rule.lr:<8.4g} "
             f"decay x {rule.decay:.4g}" for rule in self.rules]  # fmt: skip
    return "\n".join(
      [*lines, f"logits x {model.logit_scale:g}, residual branches x {residual}"]
    )


def _undecayed(spec: Spec) -> Factors:
  """Returns the optimizer's rules that keep parameters out of decay."""
  return tuple((pattern, factor) for pattern, factor in spec.decay if factor == 0)


class Ratios(NamedTuple):
  """How many times larger a model is than its base."""

  dim: float
  """Width of the stream: what q, k, v, gate, up and the head sum over."""
  heads: float
  """Heads times their dim: what the output of attention sums over."""
  hidden: float
  """Hidden units: what down sums over."""
  head_dim: float
  """What a score sums over."""
  depth: float
  """Blocks."""


def ratios(model: LM, base: LM) -> Ratios:
  """Returns how much larger a model is.

  Raises:
    InputError: the two differ in more than sizes, or their blocks grow unlike.
  """
  pairs = list(zip((*model.prefix, *model.pattern), (*base.prefix, *base.pattern)))  # noqa: B905
  if len(model.pattern) != len(base.pattern) or len(model.prefix) != len(base.prefix):
    raise InputError("base: has another prefix or pattern of blocks than the model.")
  found = {_ratio(a, b) for a, b in pairs}
  if len(found) != 1:
    raise InputError(
      f"base: the blocks grow unlike, by {sorted(found)}; one is needed."
    )
  ((heads, hidden, head_dim),) = found
  for a, b in ((model, base), (base, model)):
    if a.embed_scale != b.embed_scale or a.head != b.head:
      raise InputError("base: its embed_scale or head is another than the model's.")
  depth = len(model.blocks) / len(base.blocks)
  return Ratios(model.dim / base.dim, heads, hidden, head_dim, depth)


def _ratio(block: Block, base: Block) -> tuple[float, float, float]:
  mixer, other = block.mixer, base.mixer
  hidden = 1.0
  if (block.mlp is None) != (base.mlp is None):
    raise InputError("base: one of the two has blocks without an MLP.")
  if block.mlp is not None and base.mlp is not None:
    hidden = block.mlp.hidden / base.mlp.hidden
  wide = mixer.heads * mixer.head_dim / (other.heads * other.head_dim)
  return wide, hidden, mixer.head_dim / other.head_dim


def standard(model: LM) -> Parametrization:
  """Returns a model as it is, which is what a config has without rules."""
  return Parametrization(model=model, rules=())


def mup(
  model: LM, base: LM, *, optimizer: type[Spec], depth: float | None
) -> Parametrization:
  """Returns a model under muP.

  Args:
    model: as its size says, without multipliers of its own.
    base: the model that the settings were found for.
    optimizer: AdamW and Lion move every entry by the learning rate, so a matrix that
      sums over n times as many inputs gets 1/n of it. Muon's update has the root mean
      square of AdamW's and full rank, so its rate falls with the root of the width.
    depth: the exponent a of 1/depth^a on residual branches: 1 (CompleteP) or 0.5
      (Yang et al. 2023, depth-muP); None leaves depth as it is.

  Raises:
    InputError: the models differ in more than sizes; another optimizer, whose updates
      already follow the size of the parameters.
  """
  if optimizer not in (AdamW, Lion, Muon):
    raise InputError(
      f"optimizer: {optimizer.__name__}; muP's rules are known for AdamW, Lion, Muon."
    )
  if depth is not None and not 0.5 <= depth <= 1:
    raise InputError(f"depth: {depth} is not from 0.5 to 1; None leaves depth alone.")
  r = ratios(model, base)
  deep = r.depth ** (depth - 1) if depth is not None else 1.0
  # The first values of branch outputs shrink with depth already; here branches do.
  first = 1.0 if depth is None else math.sqrt(r.depth)

  def matrix(names: str, init: float, inputs: float, outputs: float) -> Rule:
    if optimizer is Muon:
      lr = math.sqrt(outputs / inputs / max(inputs, outputs))
    else:
      lr = 1 / inputs
    return Rule(names, init, lr * deep, 1 / (lr * deep))

  rules = [
    matrix(r"mixer/(q|k|v)$", 1.0, r.dim, r.heads),
    matrix(r"mixer/o$", first, r.heads, r.dim),
    matrix(r"mlp/(gate|up)$", 1.0, r.dim, r.hidden),
    matrix(r"mlp/down$", first, r.hidden, r.dim),
  ]
  if model.head == "untied":
    # Drawn as wide as the base's; the multiplier on logits does the rest.
    rules.append(Rule(r"^head$", math.sqrt(r.dim), 1.0, 1.0))
  if deep != 1:
    rules.append(Rule(r"^(layers|prefix_\d+)/.*(scale|bias)$", 1.0, deep, 1.0))
  return Parametrization(model=_multiplied(model, base, r, depth), rules=tuple(rules))


def _multiplied(model: LM, base: LM, r: Ratios, depth: float | None) -> LM:
  """Returns the model with its multipliers."""

  def changed(block: Block, other: Block) -> Block:
    mixer: GQA = block.mixer
    if r.head_dim != 1:
      scale = other.mixer.scale or other.mixer.head_dim**-0.5
      mixer = dataclasses.replace(mixer, scale=scale / r.head_dim)
    factor = other.residual_scale * (1.0 if depth is None else r.depth**-depth)
    return dataclasses.replace(block, mixer=mixer, residual_scale=factor)

  return dataclasses.replace(
    model,
    prefix=tuple(map(changed, model.prefix, base.prefix)),
    pattern=tuple(map(changed, model.pattern, base.pattern)),
    logit_scale=base.logit_scale / r.dim,
  )


def activations(decoder: Decoder, params: PyTree, batch: Batch) -> dict[str, Array]:
  """Returns what each part of a model gives for a batch, by name, in float32.

  The parts are the embedding [B, T, D], each block's mixer and MLP (those of the
  pattern stacked, [L, B, T, D]), the final norm, and the logits [B, T, V].
  """
  (x_BTD, _), kept = decoder.apply(
    {"params": params},
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    capture_intermediates=lambda module, method: (
      module.name in PARTS and method == "__call__"
    ),
    mutable=["intermediates"],
  )
  found = {"logits": logits(decoder.spec, params, x_BTD)}
  for name, leaf in named_leaves(kept["intermediates"]).items():
    found[name.split("/__call__")[0]] = leaf
  return {name: leaf.astype(jnp.float32) for name, leaf in found.items()}


class Coordinate(NamedTuple):
  """How large a part of a model is, and how far training has moved it."""

  width: int
  step: int
  part: str
  size: float
  """Root mean square of what it gives."""
  change: float
  """Root mean square of the difference to what it gave before the first step."""


def coordinate_check(
  models: Sequence[Parametrization],
  optimizer: Spec,
  batches: Sequence[Batch],
  seed: int,
) -> list[Coordinate]:
  """Trains models of several widths for a few steps; returns how their parts move.

  Under muP the change of each part does not depend on the width (Yang et al. 2022,
  appendix D). Parts are measured on the first batch after each step.

  Raises:
    InputError: there are not two widths.
  """
  if len({each.model.dim for each in models}) < 2:
    raise InputError("models: of one width alone; a check compares at least two.")
  return [row for each in models for row in _moved(each, optimizer, batches, seed)]


def _moved(
  each: Parametrization, optimizer: Spec, batches: Sequence[Batch], seed: int
) -> Iterator[Coordinate]:
  layout = Layout(make_mesh(Mesh(fsdp=1), jax.devices()[:1]), ShardingRules())
  decoder = Decoder(each.model, Precision(), layout)
  built = optimizers.build(each.optimizer(optimizer), len(batches), axes_of(decoder))
  first = First(seed, each.init_scale)
  _, make = create(decoder, built.transform, first, ema=False)
  step = jax.jit(make_step(Task(next_token(NextToken(), decoder)), built))
  parts = jax.jit(functools.partial(activations, decoder))
  state: TrainState = make()
  before = parts(state.params, batches[0])
  for number, batch in enumerate(batches, 1):
    state, _ = step(state, batch)
    for name, now in parts(state.params, batches[0]).items():
      size, change = _rms(now), _rms(now - before[name])
      yield Coordinate(each.model.dim, number, name, size, change)


def _rms(x: Array) -> float:
  return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def growth(rows: Sequence[Coordinate]) -> dict[str, float]:
  """Returns the exponent of width with which each part's change after the last step
  grows: near 0 where it is flat."""
  last = max(row.step for row in rows)
  found = {}
  for part in dict.fromkeys(row.part for row in rows):
    points = [
      (math.log(row.width), math.log(row.change))
      for row in rows
      if row.part == part and row.step == last and row.change > 0
    ]
    x, y = np.array(points).T
    found[part] = float(np.polyfit(x, y, 1)[0])
  return found
