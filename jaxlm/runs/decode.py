"""How fast an architecture decodes: planned for chips that are not here, or timed.

One step makes a token of each row with a cache that is full, its layers unrolled: a
scan would hold the stack of their caches twice. Parameters are random: the time does
not depend on their values.
"""

import dataclasses
import statistics
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.decoding import cache as caches
from jaxlm.decoding.prefill import placed
from jaxlm.decoding.unrolled import unrolled_spec
from jaxlm.errors import InputError
from jaxlm.launch import hlo, xla
from jaxlm.launch import plan as launch
from jaxlm.launch.chips import Chip, chip_of
from jaxlm.launch.memory import held_bytes
from jaxlm.models import count
from jaxlm.models.decoder import Decoder, init, logits, unbox
from jaxlm.models.spec import LM, Precision
from jaxlm.shapes import Array, Int, PyTree
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules, check_divides
from jaxlm.training.state import axes_of


class Step(NamedTuple):
  """Shapes and shardings of a step's arguments, and the step."""

  shapes: tuple[PyTree, PyTree, Any]
  shardings: tuple[PyTree, PyTree, Any]
  run: Any
  """Parameters, cache, tokens -> cache, tokens; the cache is given away."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
  """Decodes with random weights."""

  model: LM
  """The architecture."""
  rows: int = 32
  """Texts at a time."""
  length: int = 4096
  """Tokens of each text so far: what a step reads of the cache."""
  precision: Precision = dataclasses.field(
    default_factory=lambda: Precision(params="bfloat16", compute="bfloat16")
  )
  """Dtypes of parameters and of the computation."""
  cache: Literal["float32", "bfloat16", "int8"] = "bfloat16"
  """Dtype of keys and values."""
  mesh: Mesh = dataclasses.field(default_factory=lambda: Mesh(fsdp=1, tensor=-1))
  """How the devices are arranged."""
  sharding: ShardingRules = dataclasses.field(default_factory=ShardingRules)
  """Which logical axis is split over which mesh axes."""
  compiler: xla.Options = ()
  """(option, value) for the compiler, over the chip's own."""

  def __post_init__(self):
    for field in ("rows", "length"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")

  def run(self) -> float:
    """Times steps on the devices that are here; returns tokens a second."""
    layout = Layout(make_mesh(self.mesh), self.sharding)
    step = self._step(layout)
    chip = chip_of(layout.mesh.devices.flat[0].device_kind)
    program = self._compiled(step, xla.options(chip, self.compiler))
    params, cache, token_B = self._first(layout, step)
    seconds = []
    for _ in range(12):
      began = time.perf_counter()
      cache, token_B = jax.block_until_ready(program(params, cache, token_B))
      seconds.append(time.perf_counter() - began)
    speed = self.rows / statistics.median(seconds[2:])
    print(f"{self._told(layout)}\n{speed:,.1f} tokens/s, median of 10 steps")
    if chip is not None:
      print(self._roofline(layout, step, chip, None))
    return speed

  def plan(self, text: str) -> None:
    """Prints for each target of --plan what a step needs and could reach."""
    ready = []
    for target in launch.targets(text):
      with launch.named(target):
        mesh = launch.mesh_on(target, self.mesh)
        layout, why_not = launch.arrange(target, mesh, self.sharding)
        ready.append((target, layout, why_not, self._step(layout)))
    for target, layout, why_not, step in ready:
      print(f"=== plan of a decoding step: {target.text} ===\n{self._told(layout)}")
      program, began = launch.Program(), time.perf_counter()
      told = f"compiled: nothing; {why_not}"
      if why_not is None:
        program = self._ask(target, layout, step)
        told = f"compiled: nothing; the compiler refuses: {program.refusal}"
      if program.peak is not None:
        told = (
          f"compiled in {time.perf_counter() - began:.0f} s; peak "
          f"{program.peak / 1e9:.3f} GB of {target.chip.hbm / 1e9:.1f} GB a chip"
        )
      found = self._roofline(layout, step, target.chip, program.costs)
      print(f"{told}\n{found}", flush=True)

  def _ask(self, target: launch.Target, layout: Layout, step: Step) -> launch.Program:
    options = xla.options(target.chip, self.compiler)
    with launch.named(target):
      return launch.ask(lambda: self._compiled(step, options), layout.mesh.size)

  def _told(self, layout: Layout) -> str:
    sizes = {axis: n for axis, n in layout.mesh.shape.items() if n > 1}
    return (
      f"{count.parameters(self.model).total:,} parameters in {self.precision.params}, "
      f"{self.rows} rows of {self.length} positions in {self.cache}, mesh {sizes or 1}"
    )

  def _step(self, layout: Layout) -> Step:
    model = unrolled_spec(self.model)
    decoder = Decoder(model, self.precision, layout)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: unbox(init(decoder, key)))
    made = lambda: caches.empty(model, self.rows, self.length, self.cache)  # noqa: E731
    cache = jax.eval_shape(made)
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    over = jax.tree.map(
      lambda axes: layout.sharding(*axes), axes_of(decoder), is_leaf=is_axes
    )
    split = {
      part: jax.tree.map(
        lambda leaf, front=front: layout.sharding(
          *front, "batch", "kv_heads", *[None] * (leaf.ndim - len(front) - 2)
        ),
        cache[part],
      )
      for part, front in (("prefix", ()), ("layers", ("layers",)))
    }
    check_divides(layout, params, over)
    check_divides(layout, cache, split)
    whole = layout.sharding(None)

    def run(params: PyTree, cache: PyTree, token_B: Int[Array, "B"]):
      position_B1 = jnp.full((self.rows, 1), self.length - 1, jnp.int32)
      x_B1D, cache = decoder.apply(
        {"params": params}, token_B[:, None], position_B1, cache=cache
      )
      best_B = jnp.argmax(logits(model, params, x_B1D)[:, 0], axis=-1)
      return placed(decoder, cache), best_B.astype(jnp.int32)

    jitted = jax.jit(
      run,
      in_shardings=(over, split, whole),
      out_shardings=(split, whole),
      donate_argnums=1,
    )
    tokens = jax.ShapeDtypeStruct((self.rows,), jnp.int32)
    return Step((params, cache, tokens), (over, split, whole), jitted)

  def _compiled(self, step: Step, options: dict[str, str | bool]) -> Any:
    print(xla.describe(options))
    with xla.explained():
      return step.run.lower(*step.shapes).compile(compiler_options=options or None)

  def _first(self, layout: Layout, step: Step) -> tuple[PyTree, PyTree, Array]:
    model = unrolled_spec(self.model)
    decoder = Decoder(model, self.precision, layout)

    def make():
      params = unbox(init(decoder, jax.random.key(0)))
      cache = caches.empty(model, self.rows, self.length, self.cache)
      return params, cache, jnp.zeros(self.rows, jnp.int32)

    return jax.jit(make, out_shardings=step.shardings)()

  def _roofline(
    self, layout: Layout, step: Step, chip: Chip, costs: hlo.Costs | None
  ) -> str:
    """Returns what a step reads, and the tokens a second that this allows."""
    params, over = (dict(trees[0]) for trees in (step.shapes, step.shardings))
    del params["embed"], over["embed"]  # of which a step reads a row for each text
    weights = held_bytes(params, over)
    cache = held_bytes(step.shapes[1], step.shardings[1])
    hbm = (weights + cache) / chip.hbm_bandwidth
    flops = 2.0 * count.matrix_parameters(self.model)
    for block in self.model.blocks:
      seen = min(block.mixer.window or self.length, self.length)
      flops += 4.0 * block.mixer.heads * block.mixer.head_dim * seen
    compute = flops * self.rows / layout.mesh.size / chip.flops
    links = sum(k.sent for k in costs.collectives.values()) / chip.ici if costs else 0.0
    step_seconds = max(hbm, compute) + links
    lines = [
      f"a step reads on a chip {weights / 1e9:.3f} GB of weights and {cache / 1e9:.3f} "
      f"GB of keys and values",
      f"roofline, an estimate and no measurement: memory {hbm * 1e3:.2f} ms, products "
      f"{compute * 1e3:.2f} ms, links {links * 1e3:.2f} ms"
      + ("" if costs else " (not compiled: not known)"),
      f"  a step at best {step_seconds * 1e3:.2f} ms: {self.rows / step_seconds:,.0f} "
      f"tokens/s, {1 / step_seconds:,.0f} a row",
    ]
    for kind in costs.collectives.values() if costs else ():
      lines.append(
        f"  {kind.kind:18} {kind.times:6} of {kind.bytes / 1e6:9.3f} MB in all"
      )
    return "\n".join(lines)
