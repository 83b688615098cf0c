"""Phi-3: q, k, v in one matrix, gate and up in another."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.family import (
  GGUF,
  SIZES,
  Family,
  HuggingFace,
  attention_bias,
  eps,
  kv_heads,
  silu,
  tied,
)  # fmt: skip
from jaxlm.interop.keys import fixed, same
from jaxlm.interop.names import Table, fused, row
from jaxlm.interop.rotary import partial_rope
from jaxlm.models.families import llama

_QKV = {
  "mixer/q": "(H K) D -> D H K",
  "mixer/k": "(G K) D -> D G K",
  "mixer/v": "(G K) D -> D G K",
}
_GLU = {"mlp/gate": "F D -> D F", "mlp/up": "F D -> D F"}
_LAYER = "model.layers.{i}."
TABLE: Table = (
  row("embed/table", "model.embed_tokens.weight", "V D"),
  row("mixer_pre_norm/scale", f"{_LAYER}input_layernorm.weight", "D"),
  fused(f"{_LAYER}self_attn.qkv_proj.weight", _QKV, axis=0),
  row("mixer/o", f"{_LAYER}self_attn.o_proj.weight", "D (H K) -> H K D"),
  row("mlp_pre_norm/scale", f"{_LAYER}post_attention_layernorm.weight", "D"),
  fused(f"{_LAYER}mlp.gate_up_proj.weight", _GLU, axis=0),
  row("mlp/down", f"{_LAYER}mlp.down_proj.weight", "D F -> F D"),
  row("final_norm/scale", "model.norm.weight", "D"),
  row("head", "lm_head.weight", "V D -> D V"),
)
GGUF_TABLE: Table = (
  row("embed/table", "token_embd.weight", "V D"),
  row("mixer_pre_norm/scale", "blk.{i}.attn_norm.weight", "D"),
  fused("blk.{i}.attn_qkv.weight", _QKV, axis=0),
  row("mixer/o", "blk.{i}.attn_output.weight", "D (H K) -> H K D"),
  row("mlp_pre_norm/scale", "blk.{i}.ffn_norm.weight", "D"),
  fused("blk.{i}.ffn_up.weight", _GLU, axis=0),
  row("mlp/down", "blk.{i}.ffn_down.weight", "D F -> F D"),
  row("final_norm/scale", "output_norm.weight", "D"),
  row("head", "output.weight", "V D -> D V"),
)

PHI3 = Family(
  name="phi3",
  build=llama.build,
  hf=HuggingFace(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys=(
      *SIZES, kv_heads(), eps(1e-5), tied(False), partial_rope(), silu(),
      attention_bias(), same("sliding_window", "window", None),
      fixed("mlp_bias", False, default=False),
      fixed("lm_head_bias", False, default=False),
      fixed("full_attn_mod", 1, default=1), fixed("interpolate_factor", 1, default=1),
    ),
    table=TABLE,
    prefix="model.",
  ),
  gguf=GGUF(
    "phi3",
    (*gg.SIZES, gg.rope(), gg.eps(), gg.window()),
    GGUF_TABLE,
    caveat="llama.cpp sees all keys and not the window, past which it will differ",
  ),
)  # fmt: skip
