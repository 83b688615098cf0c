"""GPT-2: matrices lie as [in, out], and q, k, v in one."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.family import GGUF, IDLE, Family, HuggingFace, tied
from jaxlm.interop.keys import Config, Fields, Key, fixed, idle, same
from jaxlm.interop.names import Table, fused, layer_norm, row
from jaxlm.models.families import gpt2
from jaxlm.models.families.shape import Shape

_QKV_BIAS = {f"mixer/{name}_bias": "(H K) -> H K" for name in "qkv"}
_H, _BLK = "transformer.h.{i}.", "blk.{i}."
TABLE: Table = (
  row("embed/table", "transformer.wte.weight", "V D"),
  row("embed/positions", "transformer.wpe.weight", "T D"),
  *layer_norm("mixer_pre_norm", f"{_H}ln_1"),
  fused(
    f"{_H}attn.c_attn.weight",
    {f"mixer/{name}": "D (H K) -> D H K" for name in "qkv"},
    axis=1,
  ),
  fused(f"{_H}attn.c_attn.bias", _QKV_BIAS, axis=0),
  row("mixer/o", f"{_H}attn.c_proj.weight", "(H K) D -> H K D"),
  row("mixer/o_bias", f"{_H}attn.c_proj.bias", "D"),
  *layer_norm("mlp_pre_norm", f"{_H}ln_2"),
  row("mlp/up", f"{_H}mlp.c_fc.weight", "D F"),
  row("mlp/up_bias", f"{_H}mlp.c_fc.bias", "F"),
  row("mlp/down", f"{_H}mlp.c_proj.weight", "F D"),
  row("mlp/down_bias", f"{_H}mlp.c_proj.bias", "D"),
  *layer_norm("final_norm", "transformer.ln_f"),
  row("head", "lm_head.weight", "V D -> D V"),
)
GGUF_TABLE: Table = (
  row("embed/table", "token_embd.weight", "V D"),
  row("embed/positions", "position_embd.weight", "T D"),
  *layer_norm("embed/norm", "token_embd_norm"),
  *layer_norm("mixer_pre_norm", f"{_BLK}attn_norm"),
  fused(
    f"{_BLK}attn_qkv.weight",
    {f"mixer/{name}": "(H K) D -> D H K" for name in "qkv"},
    axis=0,
  ),
  fused(f"{_BLK}attn_qkv.bias", _QKV_BIAS, axis=0),
  row("mixer/o", f"{_BLK}attn_output.weight", "D (H K) -> H K D"),
  row("mixer/o_bias", f"{_BLK}attn_output.bias", "D"),
  *layer_norm("mlp_pre_norm", f"{_BLK}ffn_norm"),
  row("mlp/up", f"{_BLK}ffn_up.weight", "F D -> D F"),
  row("mlp/up_bias", f"{_BLK}ffn_up.bias", "F"),
  row("mlp/down", f"{_BLK}ffn_down.weight", "D F -> F D"),
  row("mlp/down_bias", f"{_BLK}ffn_down.bias", "D"),
  *layer_norm("final_norm", "output_norm"),
  row("head", "output.weight", "V D -> D V"),
)


def hidden(key: str) -> Key:
  """Returns the key of the MLP's hidden units, four times dim where it is null."""

  def read(config: Config) -> Fields:
    dim = config.take("n_embd", None) or config.take("hidden_size", None)
    return {"hidden": config.take(key, None) or 4 * (dim or config.take("n_embed"))}

  def write(shape: Shape) -> Fields:
    return {key: None if shape.hidden == 4 * shape.dim else shape.hidden}

  return Key(read, write)


def multi_head() -> Key:
  """Returns the fields of attention with as many key-value heads as heads."""

  def read(config: Config) -> Fields:
    heads = config.take("n_head", None) or config.take("num_attention_heads")
    return {"kv_heads": heads, "bias": "all", "mlp_bias": "all"}

  return Key(read, lambda shape: {})


GPT2 = Family(
  name="gpt2",
  build=gpt2.build,
  hf=HuggingFace(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys=(
      IDLE, same("vocab_size", "vocab"), same("n_embd", "dim"),
      same("n_layer", "layers"), same("n_head", "heads"), multi_head(),
      hidden("n_inner"), same("n_positions", "context"),
      same("layer_norm_epsilon", "eps", 1e-5), tied(True),
      fixed("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new"),
      fixed("add_cross_attention", False, default=False),
      fixed("scale_attn_weights", True, default=True),
      fixed("scale_attn_by_inverse_layer_idx", False, default=False),
      idle(
        "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type",
        "summary_use_proj", "task_specific_params", "n_special",
        "predict_special_tokens", "output_past", "_num_labels", "id2label", "label2id",
      ),
    ),
    table=TABLE,
    prefix="transformer.",
    buffers=r"\.attn\.(masked_)?bias$",
  ),
  gguf=GGUF(
    "gpt2",
    (*gg.SIZES, gg.eps("layer_norm_epsilon")),
    GGUF_TABLE,
  ),
)  # fmt: skip
