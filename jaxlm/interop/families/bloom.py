"""BLOOM: q, k and v take turns head by head in one matrix."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.families.gpt2 import GGUF_TABLE, hidden, multi_head
from jaxlm.interop.family import GGUF, IDLE, Family, HuggingFace, tied
from jaxlm.interop.keys import fixed, idle, named, same
from jaxlm.interop.names import Table, fused, layer_norm, row
from jaxlm.models.families import bloom

_H = "transformer.h.{i}."
TABLE: Table = (
  row("embed/table", "transformer.word_embeddings.weight", "V D"),
  *layer_norm("embed/norm", "transformer.word_embeddings_layernorm"),
  *layer_norm("mixer_pre_norm", f"{_H}input_layernorm"),
  fused(
    f"{_H}self_attention.query_key_value.weight",
    {f"mixer/{name}": "H K D -> D H K" for name in "qkv"},
    axis=1,
    view="(H c) D -> H c D",
  ),
  fused(
    f"{_H}self_attention.query_key_value.bias",
    {f"mixer/{name}_bias": "H K" for name in "qkv"},
    axis=1,
    view="(H c) -> H c",
  ),
  row("mixer/o", f"{_H}self_attention.dense.weight", "D (H K) -> H K D"),
  row("mixer/o_bias", f"{_H}self_attention.dense.bias", "D"),
  *layer_norm("mlp_pre_norm", f"{_H}post_attention_layernorm"),
  row("mlp/up", f"{_H}mlp.dense_h_to_4h.weight", "F D -> D F"),
  row("mlp/up_bias", f"{_H}mlp.dense_h_to_4h.bias", "F"),
  row("mlp/down", f"{_H}mlp.dense_4h_to_h.weight", "D F -> F D"),
  row("mlp/down_bias", f"{_H}mlp.dense_4h_to_h.bias", "D"),
  *layer_norm("final_norm", "transformer.ln_f"),
  row("head", "lm_head.weight", "V D -> D V"),
)

BLOOM = Family(
  name="bloom",
  build=bloom.build,
  hf=HuggingFace(
    model_type="bloom",
    architecture="BloomForCausalLM",
    keys=(
      IDLE, same("vocab_size", "vocab"),
      named(("hidden_size", "n_embed", "n_embd"), "dim"),
      named(("n_layer", "num_hidden_layers"), "layers"),
      named(("n_head", "num_attention_heads"), "heads"), multi_head(),
      hidden("n_inner"), same("seq_length", "context", 2048),
      same("layer_norm_epsilon", "eps", 1e-5), tied(True),
      fixed("apply_residual_connection_post_layernorm", False, default=False),
      fixed("skip_bias_add", True, default=True),
      fixed("skip_bias_add_qkv", False, default=False),
      idle(
        "attention_softmax_in_fp32", "bias_dropout_fusion", "hidden_dropout",
        "masked_softmax_fusion", "offset_alibi", "pretraining_tp", "slow_but_exact",
      ),
    ),
    table=TABLE,
    prefix="transformer.",
  ),
  gguf=GGUF(
    "bloom",
    (*gg.SIZES, gg.eps("layer_norm_epsilon")),
    GGUF_TABLE,
  ),
)  # fmt: skip
