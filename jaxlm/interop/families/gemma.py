"""Gemma 1, 2 and 3 (text). GGUF holds the scales of norms plus one."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.families.llama import TABLE as PRE_NORM
from jaxlm.interop.family import (
  GGUF,
  SIZES,
  Family,
  HuggingFace,
  attention_bias,
  eps,
  head_dim,
  kv_heads,
  tied,
)  # fmt: skip
from jaxlm.interop.keys import (
  Config,
  Fields,
  Key,
  fixed,
  idle,
  inverse_square,
  same,
  windows,
)  # fmt: skip
from jaxlm.interop.names import Table, row
from jaxlm.interop.rotary import rope, two_ropes
from jaxlm.models.families import gemma

_LAYER = "model.layers.{i}."
_NORM_PLACES = {
  "mixer_pre_norm": "input_layernorm",
  "mixer_post_norm": "post_attention_layernorm",
  "mlp_pre_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
SANDWICH: Table = (
  *(row for row in PRE_NORM if "layernorm" not in row.theirs),
  *(
    row(f"{ours}/scale", f"{_LAYER}{theirs}.weight", "D")
    for ours, theirs in _NORM_PLACES.items()
  ),
  row("mixer/q_norm/scale", f"{_LAYER}self_attn.q_norm.weight", "K"),
  row("mixer/k_norm/scale", f"{_LAYER}self_attn.k_norm.weight", "K"),
)
GGUF_TABLE: Table = (
  row("embed/table", "token_embd.weight", "V D"),
  row("mixer_pre_norm/scale", "blk.{i}.attn_norm.weight", "D", shift=1.0),
  row("mixer/q", "blk.{i}.attn_q.weight", "(H K) D -> D H K"),
  row("mixer/k", "blk.{i}.attn_k.weight", "(G K) D -> D G K"),
  row("mixer/v", "blk.{i}.attn_v.weight", "(G K) D -> D G K"),
  row("mixer/o", "blk.{i}.attn_output.weight", "D (H K) -> H K D"),
  row("mixer/q_norm/scale", "blk.{i}.attn_q_norm.weight", "K", shift=1.0),
  row("mixer/k_norm/scale", "blk.{i}.attn_k_norm.weight", "K", shift=1.0),
  row("mixer_post_norm/scale", "blk.{i}.post_attention_norm.weight", "D", shift=1.0),
  row("mlp_pre_norm/scale", "blk.{i}.ffn_norm.weight", "D", shift=1.0),
  row("mlp/gate", "blk.{i}.ffn_gate.weight", "F D -> D F"),
  row("mlp/up", "blk.{i}.ffn_up.weight", "F D -> D F"),
  row("mlp/down", "blk.{i}.ffn_down.weight", "D F -> F D"),
  row("mlp_post_norm/scale", "blk.{i}.post_ffw_norm.weight", "D", shift=1.0),
  row("final_norm/scale", "output_norm.weight", "D", shift=1.0),
)


def _second(config: Config, layers: int) -> tuple[bool, ...]:
  return gemma.local_blocks(layers, 2)


def _third(config: Config, layers: int) -> tuple[bool, ...]:
  every = config.take("_sliding_window_pattern", 6)
  return gemma.local_blocks(layers, config.take("sliding_window_pattern", every))


_TANH = ("gelu_pytorch_tanh", None)


def _activation(written: str) -> Key:
  """Files of the first release say gelu in hidden_act and mean its tanh form."""

  def read(config: Config) -> Fields:
    known = {"hidden_act": ("gelu", *_TANH), "hidden_activation": _TANH}
    for key, values in known.items():
      if config.take(key, None) not in values:
        raise config.refuse(key, "only gelu_pytorch_tanh is built.")
    return {}

  return Key(read, lambda shape: {written: "gelu_pytorch_tanh"})


_COMMON = (
  *SIZES, kv_heads(), head_dim(), eps(1e-6), tied(True), attention_bias(),
  fixed("use_bidirectional_attention", None, False, default=None),
)  # fmt: skip
_LATER = (
  *_COMMON, _activation("hidden_activation"),
  inverse_square("query_pre_attn_scalar", "scale", 256),
)  # fmt: skip


def _same_window() -> Key:
  """The larger models of the second release say the window twice."""

  def read(config: Config) -> Fields:
    window = config.take("sliding_window", 4096)
    if config.take("sliding_window_size", window) != window:
      raise config.refuse("sliding_window_size", f"only sliding_window={window} is.")
    return {}

  return Key(read, lambda shape: {})


GEMMA = Family(
  name="gemma",
  build=gemma.build1,
  hf=HuggingFace(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=(*_COMMON, _activation("hidden_act"), rope()),
    table=PRE_NORM,
    prefix="model.",
  ),
  gguf=GGUF("gemma", (*gg.SIZES, gg.rope(), gg.eps()), GGUF_TABLE),
)

GEMMA2 = Family(
  name="gemma2",
  build=gemma.build2,
  hf=HuggingFace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=(
      *_LATER, rope(), same("attn_logit_softcapping", "softcap", 50.0),
      same("final_logit_softcapping", "final_softcap", 30.0),
      windows(_second, 4096), _same_window(), idle("cache_implementation"),
    ),
    table=SANDWICH,
    prefix="model.",
  ),
  gguf=GGUF(
    "gemma2",
    (
      *gg.SIZES, gg.rope(), gg.eps(), *gg.CAPS, gg.window(every=2, size=4096),
      gg.scale_of_27b(layers=46),
    ),
    GGUF_TABLE,
  ),
)  # fmt: skip

GEMMA3 = Family(
  name="gemma3",
  build=gemma.build3,
  hf=HuggingFace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=(
      *_LATER, two_ropes(1e6, 1e4), windows(_third, 4096),
      same("final_logit_softcapping", "final_softcap", None),
      fixed("attn_logit_softcapping", None, default=None), idle("cache_implementation"),
    ),
    table=SANDWICH,
    prefix="model.",
  ),
  gguf=GGUF(
    "gemma3",
    (
      *gg.SIZES, gg.two_ropes(1e4), gg.eps(), gg.window(every=6),
      gg.scale_of_27b(layers=62),
    ),
    GGUF_TABLE,
  ),
)  # fmt: skip
