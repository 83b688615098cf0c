"""GGUF metadata keys, without the architecture's name in front, in both directions.

Besides the metadata the reader hands over what only the tensors tell, `told` below, and
the tensors of rotary factors by their names.
"""

from collections.abc import Mapping

import numpy as np

from jaxlm.errors import InputError
from jaxlm.interop.keys import Config, Fields, Key, fixed, idle, same
from jaxlm.interop.rotary import magnitude
from jaxlm.models.families.gemma import local_blocks
from jaxlm.models.families.shape import Shape
from jaxlm.models.positions import rope_frequencies
from jaxlm.models.spec import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  RoPE,
  Scaling,
  YaRNScaling,
)

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQUENCIES, LONG, SHORT)
TOLD = ("vocab", "tied", "bias", "mlp_bias")
WAVELENGTHS = "rope.wavelengths"


def told(shapes: Mapping[str, tuple[int, ...]]) -> Fields:
  """Returns the fields that a file's tensors tell, from their names and shapes."""
  inner = any(f"blk.0.attn_{name}.bias" in shapes for name in ("q", "qkv"))
  outer = "blk.0.attn_output.bias" in shapes
  return {
    "vocab": shapes["token_embd.weight"][0],
    "tied": "output.weight" not in shapes,
    "bias": "all" if outer else "qkv" if inner else "none",
    "mlp_bias": "all" if "blk.0.ffn_down.bias" in shapes else "none",
  }


def _file(config: Config) -> Fields:
  heads, dim = config.take("attention.head_count"), config.take("embedding_length")
  key = config.take("attention.key_length", dim // heads)
  if config.take("attention.value_length", key) != key:
    raise config.refuse("attention.value_length", f"only {key}, as keys, is built.")
  return {
    **{name: config.take(name) for name in TOLD},
    "heads": heads,
    "kv_heads": config.take("attention.head_count_kv", heads),
    "head_dim": key,
  }


def _write_file(shape: Shape) -> Fields:
  if shape.context is None:
    raise InputError("model.context: GGUF needs the longest sequence; give a number.")
  return {
    "vocab_size": shape.vocab,
    "attention.head_count": shape.heads,
    "attention.head_count_kv": shape.kv_heads,
    "attention.key_length": shape.head_dim,
    "attention.value_length": shape.head_dim,
  }


SIZES = (
  Key(_file, _write_file),
  same("embedding_length", "dim"),
  same("block_count", "layers"),
  same("feed_forward_length", "hidden"),
  same("context_length", "context"),
  fixed("attention.causal", True, default=True),
  fixed("expert_count", 0, default=0),
  idle("vocab_size", "tensor_data_layout"),
)
# llama.cpp's own where a file says nothing, as early ones do.
CAPS = (
  same("attn_logit_softcapping", "softcap", 50.0),
  same("final_logit_softcapping", "final_softcap", 30.0),
)


def eps(name: str = "layer_norm_rms_epsilon") -> Key:
  """Returns the key of the norms' epsilon."""
  return same(f"attention.{name}", "eps")


def window(every: int | None = None, size: int = 0) -> Key:
  """Returns the key of the window, `size` where a file says nothing.

  Each `every`-th block has none.
  """

  def read(config: Config) -> Fields:
    window = config.take("attention.sliding_window", size) or None
    layers = config.take("block_count")
    local = None
    if every is not None:
      told = config.take("attention.sliding_window_pattern", every)
      local = tuple(told) if isinstance(told, list) else local_blocks(layers, told)
    mixed = local is not None and any(local) and not all(local)
    return {"window": window, "local": local if window and mixed else None}

  def write(shape: Shape) -> Fields:
    return {} if shape.window is None else {"attention.sliding_window": shape.window}

  return Key(read, write)


def scale_of_27b(*, layers: int) -> Key:
  """llama.cpp divides scores by sqrt(dim / heads) in the model of so many layers."""

  def read(config: Config) -> Fields:
    heads, dim = config.take("attention.head_count"), config.take("embedding_length")
    largest = config.take("block_count") == layers
    return {"scale": (dim // heads if largest else _file(config)["head_dim"]) ** -0.5}

  return Key(read, lambda shape: {})


def rope() -> Key:
  """Returns the keys and tensors of rotary positions."""

  def read(config: Config) -> Fields:
    head_dim = _file(config)["head_dim"]
    turned = config.take("rope.dimension_count", head_dim)
    base = config.take("rope.freq_base", 10_000.0)
    plain = RoPE(base=base, fraction=turned / head_dim)
    scaling = _scaling(config, plain, head_dim)
    return {"rope": RoPE(base=base, fraction=turned / head_dim, scaling=scaling)}

  return Key(read, _write)


def two_ropes(local_base: float) -> Key:
  """Returns the keys where blocks with a window turn with a base of their own."""
  key = rope()

  def read(config: Config) -> Fields:
    base = config.take("rope.freq_base_swa", local_base)
    return key.read(config) | {"local_rope": RoPE(base=base)}

  return Key(read, key.write)


def _scaling(config: Config, plain: RoPE, head_dim: int) -> Scaling | None:
  factors = {name: config.take(name, None) for name in FACTORS}
  original = config.take("rope.scaling.original_context_length", None)
  factor = config.take("rope.scaling.factor", config.take("rope.scale_linear", 1.0))
  attention = config.take("rope.scaling.attn_factor", None)
  config.take("rope.scaling.finetuned", None)
  kind = config.take("rope.scaling.type", None)
  listed = factors[FREQUENCIES] is not None or factors[LONG] is not None
  if listed and (kind not in (None, "none", "longrope") or factor not in (0.0, 1.0)):
    why = "besides the tensors of rotary factors it is not built."
    raise config.refuse("rope.scaling.type", why)
  if factors[LONG] is None and attention not in (None, 1.0):
    raise config.refuse("rope.scaling.attn_factor", "only 1.0 is built.")
  if factors[FREQUENCIES] is not None:
    bands = config.take(WAVELENGTHS, None)
    return _by_wavelength(factors[FREQUENCIES], plain, head_dim, bands)
  context = config.take("context_length")
  if factors[LONG] is not None:
    original = original or context
    exact = magnitude(context, original)
    if attention is None or np.float32(attention) == np.float32(exact):
      attention = exact
    return LongScaling(
      short=_floats(factors[SHORT]),
      long=_floats(factors[LONG]),
      original_length=original,
      length=context,
      magnitude=attention,
    )
  if kind == "none" or factor in (0.0, 1.0):
    return None
  if kind in (None, "linear"):
    return LinearScaling(factor=factor)
  if kind == "yarn":
    return YaRNScaling(factor=factor, original_length=original or context)
  raise config.refuse("rope.scaling.type", "known are none, linear and yarn.")


def _by_wavelength(
  factors: np.ndarray, plain: RoPE, head_dim: int, bands: list[float] | None
) -> Scaling:
  """A file holds what each frequency is divided by, and not how it came to be.

  So the published bands are tried, or those that a file of ours names.
  """
  found = Llama3Scaling(factor=float(factors.max()))
  if bands is not None:
    factor, length, low, high = bands
    found = Llama3Scaling(
      factor=factor, original_length=int(length), low_frequency=low, high_frequency=high
    )
  scaled = RoPE(base=plain.base, fraction=plain.fraction, scaling=found)
  if np.allclose(_divisors(scaled, head_dim), factors, rtol=1e-5):
    return found
  listed = _floats(factors)
  # One list for every length: what is not recognised is taken as it stands.
  return LongScaling(
    short=listed, long=listed, original_length=1, length=1, magnitude=1.0
  )


def _floats(factors: np.ndarray) -> tuple[float, ...]:
  """Returns the shortest floats that are these float32."""
  return tuple(float(str(factor)) for factor in factors)


def _divisors(rope: RoPE, head_dim: int) -> np.ndarray:
  plain, _ = rope_frequencies(RoPE(base=rope.base, fraction=rope.fraction), head_dim)
  return plain / rope_frequencies(rope, head_dim)[0]


def _write(shape: Shape) -> Fields:
  rope, head_dim = shape.rope or RoPE(), shape.head_dim or shape.dim // shape.heads
  keys: Fields = {
    "rope.freq_base": rope.base,
    "rope.dimension_count": int(head_dim * rope.fraction),
  }
  match rope.scaling:
    case LinearScaling(factor=factor):
      keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    case YaRNScaling() as yarn:
      keys |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_length,
      }
    case Llama3Scaling() as bands:
      if bands != Llama3Scaling(factor=bands.factor):
        low, high = bands.low_frequency, bands.high_frequency
        keys[WAVELENGTHS] = [bands.factor, float(bands.original_length), low, high]
      keys[FREQUENCIES] = _divisors(rope, head_dim).astype(np.float32)
    case LongScaling() as long:
      keys |= {
        "rope.scaling.original_context_length": long.original_length,
        "rope.scaling.attn_factor": long.magnitude,
        LONG: np.asarray(long.long, np.float32),
        SHORT: np.asarray(long.short, np.float32),
      }
  return keys
