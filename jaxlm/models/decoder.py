"""The only decoder: embeds, unrolls the prefix, scans the pattern, norms.

Each spec type stands in one table with the module that runs it; a new mixer is one file
and one row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import InputError
from jaxlm.models import spec as specs
from jaxlm.models.attention import Attention
from jaxlm.models.mlp import FeedForward
from jaxlm.models.norms import Norm
from jaxlm.models.parameters import matrix, table
from jaxlm.ops.attention import soft_cap
from jaxlm.ops.kernels.choice import Kernel
from jaxlm.ops.rope import sinusoids
from jaxlm.ops.weights import Placed, einsum, lookup
from jaxlm.shapes import Array, Float, Int, PyTree
from jaxlm.sharding.rules import Layout

MODULES: dict[type, type[nn.Module]] = {
  specs.GQA: Attention,
  specs.GLU: FeedForward,
  specs.MLP: FeedForward,
}


def bottleneck(
  layout: Layout, weights: Mapping[str, Array], x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  """Returns up(relu(down(x))), of what trains beside a frozen block.

  The weights are down [D, units], down_bias [units], up [units, D] and up_bias [D].
  """
  down = layout.constrain(weights["down"], "embed", None)
  up = layout.constrain(weights["up"], None, "embed")
  h_BTF = einsum("BTD,DF->BTF", x_BTD, down)
  h_BTF = jax.nn.relu(h_BTF + weights["down_bias"].astype(x_BTD.dtype)[None, None])
  y_BTD = einsum("BTF,FD->BTD", h_BTF, up)
  return y_BTD + weights["up_bias"].astype(x_BTD.dtype)[None, None]


class Block(nn.Module):
  """A mixer and an MLP with their norms and residual connections.

  Where the parameters have them, bottlenecks change what the mixer and the MLP give:
  `mixer_adapter` and `mlp_adapter` read that, `mlp_beside` what the MLP reads.
  """

  spec: specs.Block
  precision: specs.Precision
  layout: Layout
  depth: int
  attention: Kernel = "auto"

  @nn.compact
  def __call__(
    self, x_BTD: Array, cache: Any, positions_BT: Array, segments_BT: Array | None
  ) -> tuple[Array, Any]:
    """Returns the residual stream and this block's cache."""
    x_BTD = checkpoint_name(x_BTD, "input")
    shared = (self.precision, self.layout, self.depth)
    module = MODULES[type(self.spec.mixer)]
    mixer = module(self.spec.mixer, *shared, self.attention, name="mixer")

    def mix(y_BTD: Array) -> Array:
      nonlocal cache
      out_BTD, cache = mixer(y_BTD, positions_BT, segments_BT, cache)
      return out_BTD

    x_BTD = self._residual("mixer", self._adapted("mixer", mix), x_BTD)
    if self.spec.mlp is not None:
      mlp = MODULES[type(self.spec.mlp)](self.spec.mlp, *shared, name="mlp")
      x_BTD = self._residual("mlp", self._adapted("mlp", mlp), x_BTD)
    return x_BTD, cache

  def _adapted(self, name: str, fn: Callable) -> Callable:
    params = self.variables.get("params", {})
    beside, behind = (params.get(f"{name}_{place}") for place in ("beside", "adapter"))

    def run(x_BTD: Array) -> Array:
      y_BTD = fn(x_BTD)
      if beside is not None:
        y_BTD += bottleneck(self.layout, beside, x_BTD)
      if behind is not None:
        y_BTD += bottleneck(self.layout, behind, y_BTD)
      return y_BTD

    return run

  def _residual(self, name: str, fn: Callable, x_BTD: Array) -> Array:
    def norm(place: str, y_BTD: Array) -> Array:
      return Norm(self.spec.norm, self.precision, name=f"{name}_{place}_norm")(y_BTD)

    factor = self.spec.residual_scale
    match self.spec.placement:
      case "pre":
        x_BTD += factor * fn(norm("pre", x_BTD))
      case "post":
        x_BTD = norm("post", x_BTD + factor * fn(x_BTD))
      case "output":
        x_BTD += factor * norm("post", fn(x_BTD))
      case "sandwich":
        x_BTD += factor * norm("post", fn(norm("pre", x_BTD)))
    return self.layout.constrain(x_BTD, "batch", "stream", "residual")


class Pattern(nn.Module):
  """One pass over the pattern: the body of the scan."""

  spec: specs.LM
  precision: specs.Precision
  layout: Layout
  remat: specs.Remat
  attention: Kernel

  @nn.compact
  def __call__(
    self, x_BTD: Array, caches: Any, positions_BT: Array, segments_BT: Array | None
  ) -> tuple[Array, Any]:
    """Returns the residual stream and the caches of the pattern's blocks."""
    new = []
    for i, (block, cache) in enumerate(zip(self.spec.pattern, caches, strict=True)):
      run = remat(Block, self.remat, prevent_cse=False)(
        block,
        self.precision,
        self.layout,
        len(self.spec.blocks),
        self.attention,
        name=str(i),
      )
      x_BTD, cache = run(x_BTD, cache, positions_BT, segments_BT)
      new.append(cache)
    return x_BTD, tuple(new)


def remat(
  module: type[nn.Module], policy: specs.Remat, *, prevent_cse: bool
) -> type[nn.Module]:
  """Returns the module with its activations kept as the policy says.

  Outside a scan `prevent_cse` must hold: else the compiler finds the same computation
  twice, keeps its first result, and saves no memory.
  """
  keep = specs.kept(policy)
  if keep is None:
    return module
  offloaded = keep.named("offload")
  if offloaded:
    # Offloaded, the stream is kept by its name; saved, as the block's argument.
    chosen = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[n for n in keep.named("save") if n != "input"],
      names_which_can_be_offloaded=list(offloaded),
      offload_src="device",
      offload_dst="pinned_host",
    )
  else:
    names = [name for name in keep.named("save") if name != "input"]
    chosen = jax.checkpoint_policies.save_only_these_names(*names)
  return nn.remat(module, policy=chosen, prevent_cse=prevent_cse)


class Embed(nn.Module):
  """Token embedding, scaled, with absolute positions where the spec has them."""

  spec: specs.LM
  precision: specs.Precision
  layout: Layout

  @nn.compact
  def __call__(
    self,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    rows_BTD: Float[Array, "B T D"] | None,
  ) -> Float[Array, "B T D"]:
    """Returns the residual stream's start, of rows of the table or of these."""
    dim, dtypes = self.spec.dim, self.precision
    axes = ("vocab", "embed")
    rows = table(self, "table", (self.spec.vocab, dim), axes, dtypes.params)
    placed = Placed(self.layout, axes)
    if rows_BTD is None:
      x_BTD = lookup(placed, rows, tokens_BT, dtypes.compute)
    else:
      x_BTD = rows_BTD.astype(dtypes.compute)
    x_BTD *= self.spec.embed_scale
    match self.spec.positions:
      case specs.Learned(length=length):
        axes = ("positions", "embed")
        learned = table(self, "positions", (length, dim), axes, dtypes.params)
        placed = Placed(self.layout, axes)
        x_BTD += lookup(placed, learned, positions_BT, dtypes.compute)
      case specs.Sinusoidal(base=base):
        x_BTD += sinusoids(positions_BT, dim, base).astype(x_BTD.dtype)
    if self.spec.embed_norm is not None:
      x_BTD = Norm(self.spec.embed_norm, dtypes, name="norm")(x_BTD)
    return self.layout.constrain(x_BTD, "batch", "stream", "residual")


class Decoder(nn.Module):
  """Tokens to the residual stream after the final norm, times `logit_scale`."""

  spec: specs.LM
  precision: specs.Precision
  layout: Layout
  remat: specs.Remat = "none"
  attention: Kernel = "auto"

  @nn.compact
  def __call__(
    self,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    cache: PyTree | None = None,
    *,
    noise_BTD: Float[Array, "B T D"] | None = None,
    rows_BTD: Float[Array, "B T D"] | None = None,
  ) -> tuple[Float[Array, "B T D"], PyTree | None]:
    """Returns the normed residual stream and the cache with these tokens.

    Positions count within a segment (0, 1, ... when not given). With a cache, rows go
    on where it ends; a token of a negative position is padding that leaves no trace.
    Noise is added to the embeddings. With `rows_BTD` these are taken in place of rows
    of the table, and the tokens tell the shape alone. Where attention has a prefix (see
    `Attention`), all tokens stand behind it.

    Raises:
      InputError: without a cache, more tokens than the model has learned positions; or
        a prefix that is not of one length in all blocks.
    """
    T, ahead = tokens_BT.shape[1], prefix_of(self.variables.get("params", {}))
    if cache is None:
      _require_positions(self.spec, T, ahead)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape
      )
    if ahead:
      positions_BT += ahead
    x_BTD = Embed(self.spec, self.precision, self.layout, name="embed")(
      tokens_BT, positions_BT, rows_BTD
    )
    if noise_BTD is not None:
      x_BTD += noise_BTD.astype(x_BTD.dtype)
    none = {"prefix": (None,) * len(self.spec.prefix)}
    caches = cache or none | {"layers": (None,) * len(self.spec.pattern)}
    prefix = []
    for i, block in enumerate(self.spec.prefix):
      run = remat(Block, self.remat, prevent_cse=True)(
        block,
        self.precision,
        self.layout,
        len(self.spec.blocks),
        self.attention,
        name=f"prefix_{i}",
      )
      x_BTD, new = run(x_BTD, caches["prefix"][i], positions_BT, segments_BT)
      prefix.append(new)
    x_BTD, layers = self._scan(x_BTD, caches["layers"], positions_BT, segments_BT)
    x_BTD = Norm(self.spec.final_norm, self.precision, name="final_norm")(x_BTD)
    x_BTD *= self.spec.logit_scale
    if self.spec.scores is not None:
      shape = (self.spec.dim, self.spec.scores)
      matrix(self, "score", shape, ("embed", None), dtype=self.precision.params)
    elif self.spec.head == "untied":
      shape = (self.spec.dim, self.spec.vocab)
      matrix(self, "head", shape, ("embed", "vocab"), dtype=self.precision.params)
    return x_BTD, {"prefix": tuple(prefix), "layers": layers} if cache else None

  def _scan(
    self, x_BTD: Array, caches: Any, positions_BT: Array, segments_BT: Array | None
  ) -> tuple[Array, Any]:
    in_axes: Any = (0, nn.broadcast, nn.broadcast)
    scanned = nn.scan(
      Pattern,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=in_axes,
      length=self.spec.repeats,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    shared = (self.precision, self.layout, self.remat, self.attention)
    layers = scanned(self.spec, *shared, name="layers")
    return layers(x_BTD, caches, positions_BT, segments_BT)


def named_blocks(model: specs.LM) -> dict[str, tuple[specs.Block, tuple[int, ...]]]:
  """Returns the name of each block's parameters, its spec, and their stacked dims."""
  layers = (model.repeats,)
  return {f"prefix_{i}": (block, ()) for i, block in enumerate(model.prefix)} | {
    f"layers/{i}": (block, layers) for i, block in enumerate(model.pattern)
  }


def prefix_of(params: PyTree) -> int:
  """Returns how many keys stand in front of every segment.

  Raises:
    InputError: not as many in all blocks.
  """
  lengths = {}
  for name, part in params.items():
    blocks = part.items() if name == "layers" else [("", part)]
    if name != "layers" and not name.startswith("prefix_"):
      continue
    for place, block in blocks:
      keys = block["mixer"].get("prefix_k")
      lengths[f"{name}/{place}".strip("/")] = 0 if keys is None else keys.shape[-3]
  if len(set(lengths.values())) > 1:
    raise InputError(f"prefix: one length is needed in all blocks, not {lengths}.")
  return max(lengths.values(), default=0)


def _require_positions(model: specs.LM, length: int, ahead: int) -> None:
  """Raises InputError where a table of positions is too short for the input."""
  learned = model.positions
  if isinstance(learned, specs.Learned) and learned.length < length + ahead:
    behind = f" behind a prefix of {ahead}" if ahead else ""
    raise InputError(
      f"model.positions.length: {learned.length} positions are learned and the input "
      f"has {length}{behind}. Shorten data.seq_len or lengthen the table."
    )


def _require_logits(model: specs.LM) -> None:
  """Raises InputError where the model has scores in place of logits."""
  if model.scores is not None:
    raise InputError(
      f"model.scores: {model.scores}; a reward model has no logits and writes no text. "
      "configs/score.py asks it for scores."
    )


def head_weight(model: specs.LM, params: PyTree) -> Float[Array, "D V"]:
  """Returns the matrix from the residual stream to logits.

  Raises:
    InputError: the model has scores in their place.
  """
  _require_logits(model)
  return params["embed"]["table"].T if model.head == "tied" else params["head"]


def logits(
  model: specs.LM, params: PyTree, x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  """Returns float32 logits; the loss never calls this, it works in chunks."""
  _require_logits(model)
  tied = model.head == "tied"
  weight = params["embed"]["table"] if tied else params["head"]
  equation = "BTD,VD->BTV" if tied else "BTD,DV->BTV"
  return soft_cap(einsum(equation, x_BTD, weight, result=jnp.float32), model.softcap)


def init(decoder: Decoder, key: Array) -> PyTree:
  """Returns parameters boxed with their logical axes; `unbox` or `axes_of` them."""
  return decoder.init(key, jnp.zeros((decoder.layout.size("batch"), 1), jnp.int32))[
    "params"
  ]


def unbox(boxed: PyTree) -> PyTree:
  """Returns plain nested dicts of arrays."""
  return nn.meta.unbox(boxed)


def axes_of(boxed: PyTree) -> PyTree:
  """Returns the same tree with each leaf's logical axes as a tuple of names."""
  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
  return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)
