"""Llama 1 to 3.2 and SmolLM2; Mistral, which adds a window."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.family import (
  BIASES,
  GGUF,
  SIZES,
  Family,
  HuggingFace,
  attention_bias,
  eps,
  head_dim,
  kv_heads,
  silu,
  tied,
)  # fmt: skip
from jaxlm.interop.keys import fixed, idle, mapped, same
from jaxlm.interop.names import Table, row
from jaxlm.interop.rotary import rope
from jaxlm.models.families import llama

_LAYER = "model.layers.{i}."
TABLE: Table = (
  row("embed/table", "model.embed_tokens.weight", "V D"),
  row("mixer_pre_norm/scale", f"{_LAYER}input_layernorm.weight", "D"),
  row("mixer/q", f"{_LAYER}self_attn.q_proj.weight", "(H K) D -> D H K"),
  row("mixer/k", f"{_LAYER}self_attn.k_proj.weight", "(G K) D -> D G K"),
  row("mixer/v", f"{_LAYER}self_attn.v_proj.weight", "(G K) D -> D G K"),
  row("mixer/o", f"{_LAYER}self_attn.o_proj.weight", "D (H K) -> H K D"),
  row("mixer/q_bias", f"{_LAYER}self_attn.q_proj.bias", "(H K) -> H K"),
  row("mixer/k_bias", f"{_LAYER}self_attn.k_proj.bias", "(G K) -> G K"),
  row("mixer/v_bias", f"{_LAYER}self_attn.v_proj.bias", "(G K) -> G K"),
  row("mixer/o_bias", f"{_LAYER}self_attn.o_proj.bias", "D"),
  row("mlp_pre_norm/scale", f"{_LAYER}post_attention_layernorm.weight", "D"),
  row("mlp/gate", f"{_LAYER}mlp.gate_proj.weight", "F D -> D F"),
  row("mlp/up", f"{_LAYER}mlp.up_proj.weight", "F D -> D F"),
  row("mlp/down", f"{_LAYER}mlp.down_proj.weight", "D F -> F D"),
  row("mlp/gate_bias", f"{_LAYER}mlp.gate_proj.bias", "F"),
  row("mlp/up_bias", f"{_LAYER}mlp.up_proj.bias", "F"),
  row("mlp/down_bias", f"{_LAYER}mlp.down_proj.bias", "D"),
  row("final_norm/scale", "model.norm.weight", "D"),
  row("head", "lm_head.weight", "V D -> D V"),
)
# llama.cpp turns neighbouring pairs: halves and pairs change places in q and k.
_PAIRS_Q, _PAIRS_K = "(H P Z) D -> D H (Z P)", "(G P Z) D -> D G (Z P)"
GGUF_TABLE: Table = (
  row("embed/table", "token_embd.weight", "V D"),
  row("mixer_pre_norm/scale", "blk.{i}.attn_norm.weight", "D"),
  row("mixer/q", "blk.{i}.attn_q.weight", _PAIRS_Q),
  row("mixer/k", "blk.{i}.attn_k.weight", _PAIRS_K),
  row("mixer/v", "blk.{i}.attn_v.weight", "(G K) D -> D G K"),
  row("mixer/o", "blk.{i}.attn_output.weight", "D (H K) -> H K D"),
  row("mixer/q_bias", "blk.{i}.attn_q.bias", "(H P Z) -> H (Z P)"),
  row("mixer/k_bias", "blk.{i}.attn_k.bias", "(G P Z) -> G (Z P)"),
  row("mixer/v_bias", "blk.{i}.attn_v.bias", "(G K) -> G K"),
  row("mixer/o_bias", "blk.{i}.attn_output.bias", "D"),
  row("mlp_pre_norm/scale", "blk.{i}.ffn_norm.weight", "D"),
  row("mlp/gate", "blk.{i}.ffn_gate.weight", "F D -> D F"),
  row("mlp/up", "blk.{i}.ffn_up.weight", "F D -> D F"),
  row("mlp/down", "blk.{i}.ffn_down.weight", "D F -> F D"),
  row("mlp/gate_bias", "blk.{i}.ffn_gate.bias", "F"),
  row("mlp/up_bias", "blk.{i}.ffn_up.bias", "F"),
  row("mlp/down_bias", "blk.{i}.ffn_down.bias", "D"),
  row("final_norm/scale", "output_norm.weight", "D"),
  row("head", "output.weight", "V D -> D V"),
)

LLAMA = Family(
  name="llama",
  build=llama.build,
  hf=HuggingFace(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
      *SIZES, kv_heads(), head_dim(), eps(1e-6), tied(False), rope(), silu(),
      attention_bias(), mapped("mlp_bias", "mlp_bias", BIASES, False),
      # SmolLM2's configs tell how it was trained and which program may read it.
      idle("is_llama_config", "pretraining_tp", "transformers.js_config"),
      idle("max_sequence_length"),
      fixed("rope_interleaved", False, default=False),
    ),
    table=TABLE,
    prefix="model.",
  ),
  gguf=GGUF("llama", (*gg.SIZES, gg.rope(), gg.eps()), GGUF_TABLE),
)  # fmt: skip

MISTRAL = Family(
  name="mistral",
  build=llama.build,
  hf=HuggingFace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(
      *SIZES, kv_heads(8), head_dim(), eps(1e-6), tied(False), rope(), silu(),
      same("sliding_window", "window", 4096),
    ),
    table=TABLE,
    prefix="model.",
  ),
  # llama.cpp has no window in this architecture: a model with one is refused.
  gguf=GGUF("llama", (*gg.SIZES, gg.rope(), gg.eps()), GGUF_TABLE),
)  # fmt: skip
