"""The vocabulary of architectures: frozen dataclasses that say what a model is.

Nothing here imports JAX, so that configs load fast and counts need no device.
"""

import dataclasses
from typing import Any, Literal

from jaxlm.errors import InputError


def _require(holds: bool, message: str) -> None:
  if not holds:
    raise InputError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
  """Positions divided by a factor (Chen et al. 2023)."""

  factor: float
  """How many times longer the context becomes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKScaling:
  """A larger base, base * factor^(n / (n - 2)) with n rotated dims (NTK-aware)."""

  factor: float
  """How many times longer the context becomes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRNScaling:
  """Slow dims interpolated, fast ones kept, a ramp between (Peng et al. 2023)."""

  factor: float
  """How many times longer the context becomes."""
  original_length: int
  """Context length before the extension, in tokens."""
  beta_fast: float = 32.0
  """Dims that turn at least this often within the original length are kept."""
  beta_slow: float = 1.0
  """Dims that turn at most this often are interpolated in full."""
  magnitude: float | None = None
  """Factor on sine and cosine; None: 0.1 ln(factor) + 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Long wavelengths divided by a factor, short ones kept, a blend between."""

  factor: float
  """How many times longer the context becomes."""
  original_length: int = 8192
  """Context length before the extension, in tokens."""
  low_frequency: float = 1.0
  """Wavelengths over original_length / this are divided in full."""
  high_frequency: float = 4.0
  """Wavelengths under original_length / this are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling:
  """Each pair's frequency divided by a factor of its own (LongRoPE, Ding et al. 2024).

  Which list is used depends on `length` alone and not on the input, so that a cached
  key stays right while a text grows.
  """

  short: tuple[float, ...]
  """Divisors of each rotated pair where the context fits the original length."""
  long: tuple[float, ...]
  """Divisors of each rotated pair beyond it."""
  original_length: int
  """Context length before the extension, in tokens."""
  length: int
  """Context length that the model is used with, in tokens."""
  magnitude: float
  """Factor on sine and cosine."""


Scaling = LinearScaling | NTKScaling | YaRNScaling | Llama3Scaling | LongScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoPE:
  """Rotary positions on queries and keys."""

  base: float = 10_000.0
  """Longest wavelength is about base * 2 pi tokens."""
  fraction: float = 1.0
  """Share of a head's dims that turn."""
  scaling: Scaling | None = None
  """How the context was extended, if it was."""

  def __post_init__(self):
    _require(0 < self.fraction <= 1, f"fraction: {self.fraction} is not in (0, 1].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALiBi:
  """A penalty on attention scores that grows with distance, by head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """A learned vector per absolute position, added to the embedding."""

  length: int
  """Positions in the table; longer inputs are refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoidal:
  """Fixed sines and cosines of the position, added to the embedding."""

  base: float = 10_000.0
  """Ratio of the longest to the shortest wavelength."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm:
  """x / rms(x) * (offset + scale)."""

  eps: float = 1e-5
  """Added to the mean square."""
  offset: float = 0.0
  """Added to the learned scale, which starts at 1 - offset."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
  """(x - mean) / std * scale + bias."""

  eps: float = 1e-5
  """Added to the variance."""
  bias: bool = True
  """Whether a learned bias is added."""


Norm = RMSNorm | LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQA:
  """Grouped-query attention; kv_heads = heads is MHA, kv_heads = 1 is MQA."""

  heads: int
  """Query heads."""
  kv_heads: int
  """Key-value heads; divides heads."""
  head_dim: int
  """Dim of a head."""
  positions: RoPE | ALiBi | None = dataclasses.field(default_factory=RoPE)
  """How the mixer knows positions; None leaves it to the embedding, if at all."""
  window: int | None = None
  """How many keys a query sees, itself among them; None: all before it."""
  softcap: float | None = None
  """Scores are bounded to this by tanh."""
  qk_norm: Norm | None = None
  """Norm of queries and keys, before positions."""
  qk_norm_span: Literal["head", "heads"] = "head"
  """What qk_norm averages over: each head alone, or all heads together."""
  scale: float | None = None
  """Factor on scores; None: head_dim^-0.5."""
  bias: Literal["none", "qkv", "all"] = "none"
  """Which projections carry a bias; 'all' adds the output."""

  def __post_init__(self):
    _require(
      self.heads >= 1 and self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
      f"kv_heads: {self.kv_heads} does not divide heads, {self.heads}.",
    )
    _require(self.head_dim >= 1, f"head_dim: {self.head_dim} is not positive.")
    _require(
      self.window is None or self.window >= 1, f"window: {self.window} is under 1."
    )
    if isinstance(self.positions, RoPE):
      turned = int(self.head_dim * self.positions.fraction)
      _require(
        turned >= 2 and turned % 2 == 0,
        f"positions.fraction: of head_dim {self.head_dim} it turns {turned} dims, and "
        "that must be an even number from 2.",
      )
      _require(
        turned > 2 or not isinstance(self.positions.scaling, NTKScaling),
        "positions.scaling: NTKScaling needs more than 2 turned dims.",
      )
      if isinstance(self.positions.scaling, LongScaling):
        for name in ("short", "long"):
          factors = getattr(self.positions.scaling, name)
          _require(
            len(factors) == turned // 2,
            f"positions.scaling.{name}: {len(factors)} factors for {turned // 2} "
            "rotated pairs.",
          )


Mixer = GQA


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLU:
  """Gated MLP: down(activation(gate(x)) * up(x)); SwiGLU, GeGLU, ReGLU."""

  hidden: int
  """Hidden units."""
  activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
  """silu gives SwiGLU, gelu GeGLU, relu ReGLU."""
  bias: Literal["none", "all"] = "none"
  """Which projections carry a bias."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
  """Plain MLP: down(activation(up(x)))."""

  hidden: int
  """Hidden units."""
  activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"] = "gelu"
  """relu2 is the square of relu."""
  bias: Literal["none", "all"] = "none"
  """Which projections carry a bias."""


Placement = Literal["pre", "post", "output", "sandwich"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """A mixer and an MLP, each with norms and a residual connection."""

  mixer: Mixer
  """Mixes positions."""
  mlp: GLU | MLP | None
  """Mixes features of each position; None leaves it out."""
  norm: Norm = dataclasses.field(default_factory=RMSNorm)
  """The norms of this block."""
  placement: Placement = "pre"
  """pre: x + f(norm(x)); post: norm(x + f(x)); output: x + norm(f(x)); sandwich: x +
  norm(f(norm(x)))."""
  residual_scale: float = 1.0
  """Factor on what f, or its norm, adds to the stream; with placement post it stands
  before the norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LM:
  """A decoder-only language model: prefix once, then `repeats` times the pattern."""

  vocab: int
  """Rows of the embedding."""
  dim: int
  """Width of the residual stream."""
  pattern: tuple[Block, ...]
  """The blocks that repeat; one scan runs over the repeats."""
  repeats: int
  """How often the pattern stands."""
  prefix: tuple[Block, ...] = ()
  """Blocks before the pattern, each once."""
  positions: Learned | Sinusoidal | None = None
  """Positions added to the embedding; rotary ones belong to the mixer."""
  embed_scale: float = 1.0
  """Factor on the embedding."""
  embed_norm: Norm | None = None
  """A norm of the embedding, before the first block."""
  final_norm: Norm = dataclasses.field(default_factory=RMSNorm)
  """The norm before the head."""
  head: Literal["tied", "untied"] = "untied"
  """Whether the head is the embedding's transpose."""
  scores: int | None = None
  """Outputs of a head for scores, which a reward model has in place of logits."""
  logit_scale: float = 1.0
  """Factor on the stream after the final norm, hence on logits or scores."""
  softcap: float | None = None
  """Logits are bounded to this by tanh."""
  context: int | None = None
  """Longest sequence that the model is made for, in tokens; None: not told."""

  def __post_init__(self):
    _require(
      self.context is None or self.context >= 1,
      f"model.context: {self.context} is not positive.",
    )
    for field in ("vocab", "dim", "repeats"):
      value = getattr(self, field)
      _require(value >= 1, f"model.{field}: {value} is not positive.")
    _require(len(self.pattern) >= 1, "model.pattern: needs at least one block.")
    _require(
      self.dim % 2 == 0 or not isinstance(self.positions, Sinusoidal),
      f"model.dim: {self.dim} is odd; Sinusoidal positions need an even one.",
    )

  @property
  def blocks(self) -> tuple[Block, ...]:
    """Every block in order."""
    return self.prefix + self.pattern * self.repeats


def for_length(model: LM, length: int) -> LM:
  """Returns a model whose LongRoPE factors are those of contexts of a length."""

  def changed(block: Block) -> Block:
    rope = block.mixer.positions
    if not (isinstance(rope, RoPE) and isinstance(rope.scaling, LongScaling)):
      return block
    scaling = dataclasses.replace(rope.scaling, length=length)
    rope = dataclasses.replace(rope, scaling=scaling)
    mixer = dataclasses.replace(block.mixer, positions=rope)
    return dataclasses.replace(block, mixer=mixer)

  prefix, pattern = (tuple(map(changed, b)) for b in (model.prefix, model.pattern))
  return dataclasses.replace(model, prefix=prefix, pattern=pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
  """Dtypes. Logits, softmax and norm statistics are float32 under every choice."""

  params: Literal["float32", "bfloat16"] = "float32"
  """Dtype that parameters and their gradients are kept in."""
  compute: Literal["float32", "bfloat16"] = "float32"
  """Dtype of activations and matrix products."""


Stay = Literal["save", "recompute", "offload"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """What becomes of a block's activations between forward and backward pass.

  Each is saved on the device, offloaded to the host's memory, or recomputed. What is
  not named (norms, activation functions, attention scores) is always recomputed: it
  costs less than it takes.
  """

  input: Literal["save", "offload"] = "save"
  """The residual stream that enters the block; all else comes from it."""
  query: Stay = "recompute"
  """The product with the query weights."""
  key: Stay = "recompute"
  """The product with the key weights."""
  value: Stay = "recompute"
  """The product with the value weights."""
  attention: Stay = "recompute"
  """What the backward pass of the kernels blocks and splash needs; the others have
  no name for it and recompute it."""
  out: Stay = "recompute"
  """The mixer's update to the residual stream."""
  gate: Stay = "recompute"
  """The product with a GLU's gate weights."""
  up: Stay = "recompute"
  """The product with the MLP's up weights."""
  down: Stay = "recompute"
  """The MLP's update to the residual stream; needed only where a norm follows it."""

  def named(self, stay: str) -> tuple[str, ...]:
    """Returns the activations of a kind."""
    return tuple(name for name, value in vars(self).items() if value == stay)


_PRODUCTS: dict[str, Any] = dict.fromkeys(
  ("query", "key", "value", "out", "gate", "up", "down"), "save"
)
PRESETS: dict[str, Keep] = {
  "full": Keep(),
  "dots_without_batch": Keep(**_PRODUCTS),
  "dots": Keep(**_PRODUCTS, attention="save"),
}
Remat = Literal["none", "full", "dots", "dots_without_batch"] | Keep
"""What the backward pass recomputes: none of what a block needs, all of it, all but
products with weights and what attention gives, or attention too; or a table."""


def kept(remat: Remat) -> Keep | None:
  """Returns the table of a preset; None where nothing is recomputed on purpose."""
  return remat if isinstance(remat, Keep) else PRESETS.get(remat)
