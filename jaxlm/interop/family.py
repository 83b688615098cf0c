"""What a family declares so that its checkpoints can be read and written."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlm.errors import InputError
from jaxlm.interop.keys import ABSENT, Fields, Key, fixed, idle, mapped, same
from jaxlm.interop.names import Table
from jaxlm.models.families.shape import Shape
from jaxlm.models.spec import LM


class HuggingFace(NamedTuple):
  """A family in Hugging Face's folders."""

  model_type: str
  """As config.json calls it."""
  architecture: str
  """The class of transformers."""
  keys: tuple[Key, ...]
  """How config.json reads and is written."""
  table: Table
  """Which tensor is which parameter."""
  prefix: str
  """What stands before the names; older files go without."""
  buffers: str = r"rotary_emb\.inv_freq$"
  """Regex of tensors in older files that are no parameters."""


class GGUF(NamedTuple):
  """A family in llama.cpp's files."""

  architecture: str
  """As general.architecture calls it."""
  keys: tuple[Key, ...]
  """How the metadata below the architecture's name reads and is written."""
  table: Table
  """Which tensor is which parameter."""
  caveat: str = ""
  """What llama.cpp does otherwise with what such a file says; told when one is
  written of a model with a window."""


class Family(NamedTuple):
  """One architecture, in both formats."""

  name: str
  """What the commands call it."""
  build: Callable[[Shape], LM]
  """The model of a shape."""
  hf: HuggingFace
  gguf: GGUF


def context(default: Any = ABSENT) -> Key:
  """Returns the key of the longest sequence."""
  key = "max_position_embeddings"

  def write(shape: Shape) -> Fields:
    if shape.context is None:
      raise InputError(f"model.context: {key} needs the longest sequence; give one.")
    return {key: shape.context}

  return Key(lambda config: {"context": config.take(key, default)}, write)


# Keys of config.json that most families have.
IDLE = idle(
  "_attn_implementation_autoset", "_name_or_path", "architectures",
  "attention_dropout", "auto_map", "bos_token_id",
  "dtype", "embd_pdrop", "eos_token_id", "initializer_range", "model_type",
  "pad_token_id", "resid_pdrop", "torch_dtype", "transformers_version", "unk_token_id",
  "unsloth_fixed", "unsloth_version", "use_cache",
)  # fmt: skip
SIZES = (
  same("vocab_size", "vocab"),
  same("hidden_size", "dim"),
  same("num_hidden_layers", "layers"),
  same("num_attention_heads", "heads"),
  same("intermediate_size", "hidden"),
  context(),
  IDLE,
)
BIASES = {False: "none", True: "all"}


def kv_heads(default: int | None = None) -> Key:
  """Returns the key of key-value heads; None where it is absent: as many as heads."""

  def read(config):
    heads = config.take("num_attention_heads")
    given = config.take("num_key_value_heads", default)
    return {"kv_heads": heads if given is None else given}

  return Key(read, lambda shape: {"num_key_value_heads": shape.kv_heads})


def head_dim(default: int | None = None) -> Key:
  """Returns the key of a head's dim; None where it is absent: dim / heads."""

  def read(config):
    whole = config.take("hidden_size") // config.take("num_attention_heads")
    given = config.take("head_dim", default)
    return {"head_dim": whole if given is None else given}

  return Key(read, lambda shape: {"head_dim": shape.head_dim})


def eps(default: float) -> Key:
  """Returns the key of RMSNorm's epsilon."""
  return same("rms_norm_eps", "eps", default)


def tied(default: bool) -> Key:
  """Returns the key of the tied head."""
  return same("tie_word_embeddings", "tied", default)


def attention_bias() -> Key:
  """Returns the key of biases on all four projections of attention."""
  return mapped("attention_bias", "bias", BIASES, False)


def silu() -> Key:
  """Returns the key of the gate's activation where only SiLU occurs."""
  return fixed("hidden_act", "silu", "swish", default="silu")
