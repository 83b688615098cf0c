"""OLMo 2: norms behind attention and MLP, and on all heads of q and k together."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.families.llama import TABLE as LLAMA
from jaxlm.interop.families.qwen import GGUF_TABLE as QWEN
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
from jaxlm.interop.names import Table, row
from jaxlm.interop.rotary import rope
from jaxlm.models.families import olmo2

_LAYER = "model.layers.{i}."
TABLE: Table = (
  *(row for row in LLAMA if "layernorm" not in row.theirs),
  row("mixer/q_norm/scale", f"{_LAYER}self_attn.q_norm.weight", "(H K)"),
  row("mixer/k_norm/scale", f"{_LAYER}self_attn.k_norm.weight", "(G K)"),
  row("mixer_post_norm/scale", f"{_LAYER}post_attention_layernorm.weight", "D"),
  row("mlp_post_norm/scale", f"{_LAYER}post_feedforward_layernorm.weight", "D"),
)
GGUF_TABLE: Table = (
  *(row for row in QWEN if "_norm.weight" not in row.theirs),
  row("mixer/q_norm/scale", "blk.{i}.attn_q_norm.weight", "(H K)"),
  row("mixer/k_norm/scale", "blk.{i}.attn_k_norm.weight", "(G K)"),
  row("mixer_post_norm/scale", "blk.{i}.post_attention_norm.weight", "D"),
  row("mlp_post_norm/scale", "blk.{i}.post_ffw_norm.weight", "D"),
  row("final_norm/scale", "output_norm.weight", "D"),
)

OLMO2 = Family(
  name="olmo2",
  build=olmo2.build,
  hf=HuggingFace(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=(
      *SIZES, kv_heads(), eps(1e-5), tied(False), rope(), silu(), attention_bias(),
    ),
    table=TABLE,
    prefix="model.",
  ),
  gguf=GGUF("olmo2", (*gg.SIZES, gg.rope(), gg.eps()), GGUF_TABLE),
)  # fmt: skip
