"""Qwen 2 and 2.5 (biases on q, k, v) and Qwen 3 (norms on q and k)."""

from jaxlm.interop import gguf_keys as gg
from jaxlm.interop.families.llama import TABLE
from jaxlm.interop.family import (
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
from jaxlm.interop.keys import Config, Fields, Key, always, fixed, windows
from jaxlm.interop.names import Table, row
from jaxlm.interop.rotary import rope
from jaxlm.models.families import qwen
from jaxlm.models.families.shape import Shape

_NORMS: Table = (
  row("mixer/q_norm/scale", "model.layers.{i}.self_attn.q_norm.weight", "K"),
  row("mixer/k_norm/scale", "model.layers.{i}.self_attn.k_norm.weight", "K"),
)
# llama.cpp turns the halves of a head here, as Hugging Face does.
GGUF_TABLE: Table = (
  row("embed/table", "token_embd.weight", "V D"),
  row("mixer_pre_norm/scale", "blk.{i}.attn_norm.weight", "D"),
  row("mixer/q", "blk.{i}.attn_q.weight", "(H K) D -> D H K"),
  row("mixer/k", "blk.{i}.attn_k.weight", "(G K) D -> D G K"),
  row("mixer/v", "blk.{i}.attn_v.weight", "(G K) D -> D G K"),
  row("mixer/o", "blk.{i}.attn_output.weight", "D (H K) -> H K D"),
  row("mixer/q_bias", "blk.{i}.attn_q.bias", "(H K) -> H K"),
  row("mixer/k_bias", "blk.{i}.attn_k.bias", "(G K) -> G K"),
  row("mixer/v_bias", "blk.{i}.attn_v.bias", "(G K) -> G K"),
  row("mixer/q_norm/scale", "blk.{i}.attn_q_norm.weight", "K"),
  row("mixer/k_norm/scale", "blk.{i}.attn_k_norm.weight", "K"),
  row("mlp_pre_norm/scale", "blk.{i}.ffn_norm.weight", "D"),
  row("mlp/gate", "blk.{i}.ffn_gate.weight", "F D -> D F"),
  row("mlp/up", "blk.{i}.ffn_up.weight", "F D -> D F"),
  row("mlp/down", "blk.{i}.ffn_down.weight", "D F -> F D"),
  row("final_norm/scale", "output_norm.weight", "D"),
  row("head", "output.weight", "V D -> D V"),
)


def _known(config: Config, layers: int) -> tuple[bool, ...]:
  used = config.take("use_sliding_window", False)
  first = config.take("max_window_layers", 28)
  return tuple(used and layer >= first for layer in range(layers))


def _windows() -> Key:
  key = windows(_known)

  def write(shape: Shape) -> Fields:
    local = shape.local or (shape.window is not None,) * shape.layers
    first = local.index(True) if any(local) else shape.layers
    used = {"use_sliding_window": any(local), "max_window_layers": first}
    return key.write(shape) | used

  return Key(key.read, write)


_COMMON = (*SIZES, kv_heads(), eps(1e-6), tied(False), rope(), silu(), _windows())

QWEN2 = Family(
  name="qwen2",
  build=qwen.build2,
  hf=HuggingFace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=(*_COMMON, always(bias="qkv"), fixed("use_mrope", False, default=False)),
    table=TABLE,
    prefix="model.",
  ),
  gguf=GGUF("qwen2", (*gg.SIZES, gg.rope(), gg.eps()), GGUF_TABLE),
)

QWEN3 = Family(
  name="qwen3",
  build=qwen.build3,
  hf=HuggingFace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(*_COMMON, head_dim(128), attention_bias()),
    table=TABLE + _NORMS,
    prefix="model.",
  ),
  gguf=GGUF("qwen3", (*gg.SIZES, gg.rope(), gg.eps()), GGUF_TABLE),
)
