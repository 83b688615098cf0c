"""Files as their makers published them, and values of keys that are not built."""

import dataclasses
import json

import pytest

from interop.goldens import CASES, FOLDER
from jaxlm.errors import InputError
from jaxlm.interop.hf import read_config
from jaxlm.interop.keys import Config, read_shape
from jaxlm.interop.registry import by_name, write_keys
from jaxlm.models.families.bloom import bloom
from jaxlm.models.families.gemma import gemma
from jaxlm.models.families.gpt2 import gpt2
from jaxlm.models.families.llama import llama
from jaxlm.models.families.olmo2 import olmo2
from jaxlm.models.families.phi3 import phi3
from jaxlm.models.families.qwen import qwen

COMMON = {
  "attention_dropout": 0.0,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "initializer_range": 0.02,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1",
  "use_cache": True,
}
LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "attention_bias": False,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 14_336,
  "mlp_bias": False,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "tie_word_embeddings": False,
}
GEMMA = {
  "attention_bias": False,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "pad_token_id": 0,
  "rms_norm_eps": 1e-06,
}
PUBLISHED = {
  "Llama 7B": (
    llama("1-7b"),
    {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "hidden_act": "silu",
      "hidden_size": 4096,
      "intermediate_size": 11_008,
      "max_position_embeddings": 2048,
      "max_sequence_length": 2048,
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "pad_token_id": 0,
      "rms_norm_eps": 1e-06,
      "tie_word_embeddings": False,
      "vocab_size": 32_000,
    },
  ),
  "Llama 3.1 8B": (
    llama("3.1-8b"),
    LLAMA
    | {
      "eos_token_id": [128_001, 128_008, 128_009],
      "max_position_embeddings": 131_072,
      "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
      },
      "rope_theta": 500_000.0,
      "vocab_size": 128_256,
    },
  ),
  "SmolLM2 1.7B Instruct": (
    llama("smollm2-1.7b"),
    LLAMA
    | {
      "hidden_size": 2048,
      "intermediate_size": 8192,
      "max_position_embeddings": 8192,
      "num_hidden_layers": 24,
      "num_key_value_heads": 32,
      "pad_token_id": 2,
      "rope_scaling": None,
      "rope_theta": 130_000,
      "tie_word_embeddings": True,
      "transformers.js_config": {"dtype": "q4"},
      "vocab_size": 49_152,
    },
  ),
  "Mistral 7B v0.1": (
    llama("mistral-7b-v0.1"),
    {
      "architectures": ["MistralForCausalLM"],
      "model_type": "mistral",
      "hidden_act": "silu",
      "hidden_size": 4096,
      "intermediate_size": 14_336,
      "max_position_embeddings": 32_768,
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-05,
      "rope_theta": 10_000.0,
      "sliding_window": 4096,
      "tie_word_embeddings": False,
      "vocab_size": 32_000,
    },
  ),
  "Qwen2.5 0.5B": (
    qwen("2.5-0.5b"),
    {
      "architectures": ["Qwen2ForCausalLM"],
      "model_type": "qwen2",
      "hidden_act": "silu",
      "hidden_size": 896,
      "intermediate_size": 4864,
      "max_position_embeddings": 32_768,
      "max_window_layers": 24,
      "num_attention_heads": 14,
      "num_hidden_layers": 24,
      "num_key_value_heads": 2,
      "rms_norm_eps": 1e-06,
      "rope_theta": 1_000_000.0,
      "sliding_window": 32_768,
      "tie_word_embeddings": True,
      "use_mrope": False,
      "use_sliding_window": False,
      "vocab_size": 151_936,
    },
  ),
  "Qwen3 8B": (
    qwen("3-8b"),
    {
      "architectures": ["Qwen3ForCausalLM"],
      "model_type": "qwen3",
      "attention_bias": False,
      "head_dim": 128,
      "hidden_act": "silu",
      "hidden_size": 4096,
      "intermediate_size": 12_288,
      "max_position_embeddings": 40_960,
      "max_window_layers": 36,
      "num_attention_heads": 32,
      "num_hidden_layers": 36,
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 1_000_000,
      "sliding_window": None,
      "tie_word_embeddings": False,
      "use_sliding_window": False,
      "vocab_size": 151_936,
    },
  ),
  "Gemma 2B": (
    gemma("1-2b"),
    GEMMA
    | {
      "architectures": ["GemmaForCausalLM"],
      "model_type": "gemma",
      "hidden_act": "gelu",
      "hidden_activation": None,
      "hidden_size": 2048,
      "intermediate_size": 16_384,
      "max_position_embeddings": 8192,
      "num_attention_heads": 8,
      "num_hidden_layers": 18,
      "num_key_value_heads": 1,
      "rope_scaling": None,
      "rope_theta": 10_000.0,
      "vocab_size": 256_000,
    },
  ),
  "Gemma 2 27B": (
    gemma("2-27b"),
    GEMMA
    | {
      "architectures": ["Gemma2ForCausalLM"],
      "model_type": "gemma2",
      "attn_logit_softcapping": 50.0,
      "cache_implementation": "hybrid",
      "final_logit_softcapping": 30.0,
      "head_dim": 128,
      "hidden_act": "gelu_pytorch_tanh",
      "hidden_size": 4608,
      "intermediate_size": 36_864,
      "max_position_embeddings": 8192,
      "num_attention_heads": 32,
      "num_hidden_layers": 46,
      "num_key_value_heads": 16,
      "query_pre_attn_scalar": 144,
      "rope_theta": 10_000.0,
      "sliding_window": 4096,
      "vocab_size": 256_000,
    },
  ),
  "Gemma 3 1B": (
    gemma("3-1b"),
    GEMMA
    | {
      "architectures": ["Gemma3ForCausalLM"],
      "model_type": "gemma3_text",
      "attn_logit_softcapping": None,
      "cache_implementation": "hybrid",
      "eos_token_id": [1, 106],
      "final_logit_softcapping": None,
      "hidden_size": 1152,
      "intermediate_size": 6912,
      "max_position_embeddings": 32_768,
      "num_attention_heads": 4,
      "num_hidden_layers": 26,
      "num_key_value_heads": 1,
      "query_pre_attn_scalar": 256,
      "rope_local_base_freq": 10_000,
      "rope_scaling": None,
      "rope_theta": 1_000_000,
      "sliding_window": 512,
      "sliding_window_pattern": 6,
      "vocab_size": 262_144,
    },
  ),
  "Gemma 3 270M": (
    gemma("3-270m"),
    GEMMA
    | {
      "architectures": ["Gemma3ForCausalLM"],
      "model_type": "gemma3_text",
      "_sliding_window_pattern": 6,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "hidden_size": 640,
      "intermediate_size": 2048,
      "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
      "max_position_embeddings": 32_768,
      "num_attention_heads": 4,
      "num_hidden_layers": 18,
      "num_key_value_heads": 1,
      "query_pre_attn_scalar": 256,
      "rope_local_base_freq": 10_000.0,
      "rope_scaling": None,
      "rope_theta": 1_000_000.0,
      "sliding_window": 512,
      "use_bidirectional_attention": False,
      "vocab_size": 262_144,
    },
  ),
  "Phi-3 mini 4k": (
    phi3("mini-4k"),
    {
      "architectures": ["Phi3ForCausalLM"],
      "model_type": "phi3",
      "attention_bias": False,
      "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
      "embd_pdrop": 0.0,
      "hidden_act": "silu",
      "hidden_size": 3072,
      "intermediate_size": 8192,
      "max_position_embeddings": 4096,
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 32,
      "original_max_position_embeddings": 4096,
      "pad_token_id": 32_000,
      "resid_pdrop": 0.0,
      "rms_norm_eps": 1e-05,
      "rope_scaling": None,
      "rope_theta": 10_000.0,
      "sliding_window": 2047,
      "tie_word_embeddings": False,
      "vocab_size": 32_064,
    },
  ),
  "OLMo 2 1B": (
    olmo2("1b"),
    {
      "architectures": ["Olmo2ForCausalLM"],
      "model_type": "olmo2",
      "attention_bias": False,
      "hidden_act": "silu",
      "hidden_size": 2048,
      "intermediate_size": 8192,
      "max_position_embeddings": 4096,
      "num_attention_heads": 16,
      "num_hidden_layers": 16,
      "num_key_value_heads": 16,
      "pad_token_id": 100_277,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 500_000,
      "tie_word_embeddings": False,
      "vocab_size": 100_352,
    },
  ),
  "GPT-2": (
    gpt2("124m"),
    {
      "activation_function": "gelu_new",
      "architectures": ["GPT2LMHeadModel"],
      "attn_pdrop": 0.1,
      "embd_pdrop": 0.1,
      "layer_norm_epsilon": 1e-05,
      "model_type": "gpt2",
      "n_ctx": 1024,
      "n_embd": 768,
      "n_head": 12,
      "n_layer": 12,
      "n_positions": 1024,
      "resid_pdrop": 0.1,
      "summary_activation": None,
      "summary_first_dropout": 0.1,
      "summary_proj_to_labels": True,
      "summary_type": "cls_index",
      "summary_use_proj": True,
      "task_specific_params": {"text-generation": {"do_sample": True}},
      "vocab_size": 50_257,
    },
  ),
  "BLOOM": (
    bloom("176b"),
    {
      "apply_residual_connection_post_layernorm": False,
      "architectures": ["BloomForCausalLM"],
      "attention_softmax_in_fp32": True,
      "bias_dropout_fusion": True,
      "hidden_dropout": 0.0,
      "layer_norm_epsilon": 1e-05,
      "masked_softmax_fusion": True,
      "model_type": "bloom",
      "n_embed": 14_336,
      "n_inner": None,
      "n_layer": 70,
      "num_attention_heads": 112,
      "offset_alibi": 100,
      "pad_token_id": 3,
      "pretraining_tp": 4,
      "seq_length": 2048,
      "skip_bias_add": True,
      "skip_bias_add_qkv": False,
      "slow_but_exact": False,
      "unk_token_id": 0,
      "vocab_size": 250_880,
    },
  ),
}


def folder(tmp_path, values):
  (tmp_path / "config.json").write_text(json.dumps(values))
  return type(FOLDER)(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_describe_the_published_models(name, tmp_path):
  model, values = PUBLISHED[name]
  assert read_config(folder(tmp_path, COMMON | values))[1] == model


@pytest.mark.parametrize(
  ("name", "key"),
  [
    ("Llama 7B", "max_sequence_length"),
    ("Mistral 7B v0.1", "sliding_window"),
    ("Gemma 2B", "hidden_act"),
    ("Gemma 2 27B", "hidden_activation"),
    ("Gemma 2 27B", "rope_theta"),
    ("Gemma 3 1B", "sliding_window_pattern"),
    ("Gemma 3 1B", "rope_local_base_freq"),
    ("Gemma 3 1B", "rope_theta"),
    ("Gemma 3 1B", "query_pre_attn_scalar"),
    ("BLOOM", "seq_length"),
    ("GPT-2", "layer_norm_epsilon"),
  ],
)
def test_a_key_with_a_usual_value_may_be_absent(name, key, tmp_path):
  model, values = PUBLISHED[name]
  kept = {other: value for other, value in values.items() if other != key}
  assert read_config(folder(tmp_path, COMMON | kept))[1] == model


def golden_config(name, tmp_path, changes):
  values = json.loads((FOLDER / name / "config.json").read_text())
  return folder(tmp_path, values | changes)


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_key_is_refused_by_name_in_every_family(name, tmp_path):
  place = golden_config(name, tmp_path, {"logit_scale": 2.0})
  with pytest.raises(InputError, match=r"config\.json: not known .*: logit_scale\."):
    read_config(place)


REFUSED = [
  ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' or 'swish'"),
  ("llama", {"attention_bias": "qkv"}, "attention_bias='qkv': known are False, True"),
  ("llama", {"rope_interleaved": True}, "rope_interleaved=True: only False is built"),
  ("llama", {"sliding_window": 7}, "not known .*: sliding_window"),
  ("llama", {"num_key_value_heads": 3}, "kv_heads: 3 does not divide heads, 4"),
  ("llama", {"num_attention_heads": 0}, "'num_attention_heads', or one before it"),
  ("llama", {"num_hidden_layers": 0}, r"model\.repeats: 0 is not positive"),
  ("llama", {"vocab_size": "61"}, "vocab: '61' is a str; the field takes int"),
  ("llama", {"rope_parameters": "yarn"}, "rope_parameters='yarn': not an object"),
  (
    "llama",
    {"rope_parameters": {"rope_type": "linear", "factor": None}},
    r"'rope_parameters\.factor', or one before it",
  ),
  ("mistral", {"hidden_act": "relu"}, "hidden_act='relu': only"),
  ("qwen2", {"use_mrope": True}, "use_mrope=True: only False is built"),
  ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu': only"),
  ("gemma", {"hidden_act": "silu"}, "hidden_act='silu': only gelu_pytorch_tanh"),
  ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu': only gelu_py"),
  (
    "gemma2",
    {"use_bidirectional_attention": True},
    "use_bidirectional_attention=True: only None or False",
  ),
  (
    "gemma3",
    {"use_bidirectional_attention": True},
    "use_bidirectional_attention=True: only None or False",
  ),
  (
    "gemma3",
    {"attn_logit_softcapping": 50.0},
    "softcapping=50.0: only None",
  ),
  ("gemma3", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar', or one before"),
  (
    "phi3",
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "only longrope",
  ),
  (
    "phi3-long",
    {"num_attention_heads": 2},
    r"positions\.scaling\.short: 3 factors for 6 rotated pairs",
  ),
  ("olmo2", {"clip_qkv": 8.0}, "not known .*: clip_qkv"),
  ("gpt2", {"activation_function": "relu"}, "activation_function='relu': only"),
  ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False: only True"),
  ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True: only"),
  ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True: only False"),
  (
    "bloom",
    {"apply_residual_connection_post_layernorm": True},
    "apply_residual_connection_post_layernorm=True: only False",
  ),
  ("bloom", {"skip_bias_add": False}, "skip_bias_add=False: only True"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_not_built_is_refused_by_name(name, changes, message, tmp_path):
  with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
    read_config(golden_config(name, tmp_path, changes))


@pytest.mark.parametrize("name", CASES)
def test_a_missing_size_is_named_in_every_family(name, tmp_path):
  values = json.loads((FOLDER / name / "config.json").read_text())
  del values["vocab_size"]
  with pytest.raises(InputError, match=r"config\.json: the key 'vocab_size' is m"):
    read_config(folder(tmp_path, values))


def read(name, values):
  family = by_name(name)
  return family.build(read_shape(family.hf.keys, Config(values, "config.json")))


def written(name, model):
  return write_keys(by_name(name), by_name(name).hf.keys, model, "config.json")


def test_what_a_second_gemma_leaves_out_is_what_its_makers_mean():
  """Caps of 50 and 30 and a window of 4096 are the class's own values."""
  known = written("gemma2", gemma("2-2b"))
  dropped = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
  less = {key: value for key, value in known.items() if key not in dropped}
  assert read("gemma2", less) == gemma("2-2b")
  with pytest.raises(InputError, match="sliding_window_size=7: only sliding_window"):
    read("gemma2", known | {"sliding_window_size": 7})
  assert read("gemma2", known | {"sliding_window_size": 4096}) == gemma("2-2b")


def test_both_forms_of_rotary_keys_must_agree():
  known = written("llama", llama("3-8b"))
  both = known | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
  assert read("llama", both) == llama("3-8b")
  with pytest.raises(InputError, match="rope_parameters stands too; give one of them"):
    read("llama", both | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})


def test_a_model_without_a_context_cannot_be_written():
  model = dataclasses.replace(llama("3-8b"), context=None)
  with pytest.raises(InputError, match=r"model\.context: max_position_embeddings"):
    written("llama", model)
