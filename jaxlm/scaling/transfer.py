"""Rules by which a narrow model's settings serve a wide and deep one: muP.

Maximal update parametrization (Yang et al. 2022, tables 3 and 8; with depth Dey et al.
2025, CompleteP) makes first values, learning rates and multipliers functions of how
much wider each matrix is than in a base model, so that what every parameter does to the
network's function in a step stays the same size. The learning rate that is best for the
base is then best for all widths. At the base's own size the rules change nothing.

Of these papers' tables AdamW's eps is left out: it stays, which matters only where
gradients are near it. Weight decay is scaled so that its product with the learning rate
is the base's.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
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

OUTPUTS = ("mixer/o$", "mlp/down$")
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
    """Returns the optimizer with the rules; factors of its own decay are multiplied.

    Raises:
      InputError: it has rules for learning rates already.
    """
    if spec.lr_scale != ALL:
      raise InputError(
        f"optimizer.lr_scale: {spec.lr_scale}; muP's rules take its place. Leave it "
        "out."
      )
    lr_scale = tuple((rule.pattern, rule.lr) for rule in self.rules)
    # Of the names that a rule takes, those that each of the user's patterns takes.
    decay = tuple(
      (f"^(?=.*(?:{rule.pattern}))(?=.*(?:{pattern}))", rule.decay * factor)
      for rule in self.rules
      for pattern, factor in spec.decay
    )
    return dataclasses.replace(
      spec, decay=(*decay, *spec.decay), lr_scale=(*lr_scale, *ALL)
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


class Sizes(NamedTuple):
  """What the matrices of a block sum over and give."""

  stream: int
  queries: int
  keys: int
  hidden: int
  head_dim: int


def _sizes(model: LM, block: Block) -> Sizes:
  mixer, hidden = block.mixer, 0 if block.mlp is None else block.mlp.hidden
  queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
  return Sizes(model.dim, queries, keys, hidden, mixer.head_dim)


def _check_alike(model: LM, base: LM) -> None:
  """Raises InputError where two models differ in more than sizes."""
  if model.scores is not None:
    raise InputError(f"scores: {model.scores}; muP's rules here are of logits alone.")

  def sized(block: Block, other: Block) -> Block:
    sizes = {
      name: getattr(other.mixer, name) for name in ("heads", "kv_heads", "head_dim")
    }
    mlp = block.mlp
    if mlp is not None and other.mlp is not None:
      mlp = dataclasses.replace(mlp, hidden=other.mlp.hidden)
    mixer = dataclasses.replace(block.mixer, **sizes)
    return dataclasses.replace(block, mixer=mixer, mlp=mlp)

  if len(model.pattern) != len(base.pattern) or len(model.prefix) != len(base.prefix):
    raise InputError("base: has another prefix or pattern of blocks than the model.")
  like = dataclasses.replace(
    model,
    dim=base.dim,
    repeats=base.repeats,
    prefix=tuple(map(sized, model.prefix, base.prefix)),
    pattern=tuple(map(sized, model.pattern, base.pattern)),
  )
  if found := config.differences(base, like):
    raise InputError(
      "base: differs from the model in more than sizes: " + "; ".join(found)
    )


def standard(model: LM) -> Parametrization:
  """Returns a model as it is, which is what a config has without rules."""
  return Parametrization(model=model, rules=())


def mup(
  model: LM, base: LM, *, optimizer: type[Spec], depth: float | None
) -> Parametrization:
  """Returns a model under muP.

  Args:
    model: as its size says; multipliers are those of the base, and are multiplied.
    base: the model that the settings were found for; it differs in sizes alone.
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
  _check_alike(model, base)
  depth_ratio = len(model.blocks) / len(base.blocks)
  deep = depth_ratio ** (depth - 1) if depth is not None else 1.0
  # The first values of branch outputs shrink with depth already; here branches do.
  first = 1.0 if depth is None else math.sqrt(depth_ratio)

  def rates(block: Block, other: Block) -> tuple[float, ...]:
    new, old = _sizes(model, block), _sizes(base, other)
    shapes = [(0, 1), (0, 2), (1, 0), (0, 3), (3, 0)]
    return tuple(
      _rate(optimizer, (new[i], new[o]), (old[i], old[o])) for i, o in shapes
    )

  pairs = [
    *zip(model.prefix, base.prefix, strict=True),
    *zip(model.pattern, base.pattern, strict=True),
  ]
  found = {rates(*pair) for pair in pairs}
  if len(found) != 1:
    raise InputError(
      f"base: the blocks grow unlike; their matrices' rates would be {sorted(found)}, "
      "and one of each kind is accepted."
    )
  names = ("mixer/q$", "mixer/(k|v)$", "mixer/o$", "mlp/(gate|up)$", "mlp/down$")
  rules = [
    Rule(name, first if name in OUTPUTS else 1.0, rate * deep, 1 / (rate * deep))
    for name, rate in zip(names, found.pop(), strict=True)
  ]
  wide = model.dim / base.dim
  if model.head == "untied":
    # Drawn as wide as the base's; the multiplier on logits does the rest.
    rules.append(Rule(r"^head$", math.sqrt(wide), 1.0, 1.0))
  if deep != 1:
    rules.append(Rule(r"^(layers|prefix_\d+)/.*(scale|bias)$", 1.0, deep, 1.0))
  branch = 1.0 if depth is None else depth_ratio**-depth
  return Parametrization(model=_multiplied(model, base, branch), rules=tuple(rules))


def _rate(optimizer: type[Spec], new: tuple[int, int], old: tuple[int, int]) -> float:
  """Returns the factor on the rate of a matrix (inputs, outputs) against its base's.

  An update of entries like AdamW's, in line with its input, grows with the inputs. Of
  Muon's the largest singular value is the root of the longer side (to_rms), and the
  root of outputs over inputs is wanted.
  """
  if 0 in (*new, *old):  # no MLP
    return 1.0
  if optimizer is not Muon:
    return old[0] / new[0]

  def wanted(inputs: int, outputs: int) -> float:
    return math.sqrt(outputs / inputs / max(inputs, outputs))

  return wanted(*new) / wanted(*old)


def _multiplied(model: LM, base: LM, branch: float) -> LM:
  """Returns the model with its multipliers."""

  def changed(block: Block, other: Block) -> Block:
    mixer: GQA = block.mixer
    if mixer.head_dim != other.mixer.head_dim:
      scale = other.mixer.scale or other.mixer.head_dim**-0.5
      scale *= other.mixer.head_dim / mixer.head_dim
      mixer = dataclasses.replace(mixer, scale=scale)
    factor = block.residual_scale * branch
    return dataclasses.replace(block, mixer=mixer, residual_scale=factor)

  return dataclasses.replace(
    model,
    prefix=tuple(map(changed, model.prefix, base.prefix)),
    pattern=tuple(map(changed, model.pattern, base.pattern)),
    logit_scale=model.logit_scale * base.dim / model.dim,
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
