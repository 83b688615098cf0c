"""What `checkpoints.py` makes: each case's config, and how to switch its features off.

All are small: dim 32 (48 where the heads want it), 61 tokens. Epsilons are far larger
than any published model's, but for `llama`'s, so that one that is not read shows.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  config: dict
  """Arguments of the config class, with model_type."""
  without: dict[str, dict]
  """Arguments in their place that switch a feature off, by the feature's name."""
  v4: dict | None = None
  """What config.v4.json adds to what both formats hold; None: no such file."""
  v4_lacks: tuple[str, ...] = ()
  """Keys that transformers 4.x did not write, beside those it never did."""
  embedding: float = 0.8
  """Standard deviation of the embedding."""
  shard: str = "1GB"
  """Largest shard."""
  short: int | None = None
  """Length of a second, shorter golden."""
  without_short: dict[str, dict] = dataclasses.field(default_factory=dict)
  """As `without`, of what shows in the shorter golden."""


LENGTH = 24
SHAPE = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 0.05,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA = {**SHAPE, "model_type": "llama", "head_dim": 16}
EPSILON = {"rms_norm_eps": {"rms_norm_eps": 1e-6}}
SILU = {"silu": {"hidden_act": "gelu"}}
WIDE = {"sliding_window": 64}


def rope(theta: float, kind: str = "default", **keys) -> dict:
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


def theta(value: float) -> dict:
  return {"rope_theta": rope(value)}


CASES = {}

CASES["gpt2"] = Case(
  config={
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 0.05,
    "activation_function": "gelu_new",
    "bos_token_id": 0,
    "eos_token_id": 0,
  },
  without={
    "layer_norm_epsilon": {"layer_norm_epsilon": 1e-6},
    "gelu": {"activation_function": "silu"},
    "gelu's tanh form": {"activation_function": "gelu"},
    "attention scale": {"scale_attn_weights": False},
  },
  embedding=0.6,
)

CASES["llama"] = Case(
  config={**LLAMA, **rope(1e4), "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
  without={**theta(1e3), **SILU},
)

LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 3.0,
  "original_max_position_embeddings": 20,
}
CASES["llama-3.1"] = Case(
  config={
    **LLAMA,
    **rope(500.0, "llama3", **LLAMA3),
    "eos_token_id": [2, 3, 4],
    "tie_word_embeddings": False,
  },
  without={
    "rope scaling": rope(500.0),
    "rope factor": rope(500.0, "llama3", **{**LLAMA3, "factor": 4.0}),
    "low_freq_factor": rope(500.0, "llama3", **{**LLAMA3, "low_freq_factor": 2.0}),
    "high_freq_factor": rope(500.0, "llama3", **{**LLAMA3, "high_freq_factor": 4.0}),
    **EPSILON,
    **SILU,
  },
  v4={
    "rope_theta": 500.0,
    "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
    "transformers_version": "4.45.0.dev0",
  },
  shard="30KB",
)

CASES["llama-linear"] = Case(
  config={
    **LLAMA,
    **rope(1e4, "linear", factor=4.0),
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
  },
  without={"rope scaling": rope(1e4), **EPSILON, **SILU},
  v4={
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "transformers_version": "4.46.3",
  },
)

CASES["smollm2"] = Case(
  config={
    **SHAPE,
    **rope(1e5),
    "model_type": "llama",
    "hidden_size": 48,
    "num_attention_heads": 6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
  },
  without={**theta(1e4), **EPSILON, **SILU},
  v4={
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "transformers_version": "4.40.1",
  },
  v4_lacks=("head_dim",),
)

YARN = {
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 1.0,
  "beta_slow": 0.1,
}
CASES["llama-yarn"] = Case(
  config={**LLAMA, **rope(1e3, "yarn", **YARN), "tie_word_embeddings": False},
  without={
    "rope scaling": rope(1e3),
    "rope factor": rope(1e3, "yarn", **{**YARN, "factor": 2.0}),
    "rope magnitude": rope(1e3, "yarn", **YARN, attention_factor=1.0),
    "beta_fast": rope(1e3, "yarn", **{**YARN, "beta_fast": 32.0}),
    "beta_slow": rope(1e3, "yarn", **{**YARN, "beta_slow": 1.0}),
    "truncation": rope(1e3, "yarn", **YARN, truncate=False),
    **EPSILON,
    **SILU,
  },
  v4={
    "rope_theta": 1000.0,
    "rope_scaling": {**YARN, "type": "yarn"},
    "transformers_version": "4.45.2",
  },
)

MISTRAL = {**LLAMA, **rope(1e4), "model_type": "mistral", "tie_word_embeddings": False}
CASES["mistral"] = Case(
  config={**MISTRAL, "sliding_window": 7},
  without={
    "sliding_window": {"sliding_window": None},
    "sliding_window, by one": {"sliding_window": 8},
    **theta(1e3),
    **EPSILON,
    **SILU,
  },
)

CASES["mistral-full"] = Case(
  config={**MISTRAL, "sliding_window": None},
  without={**theta(1e3), **EPSILON, **SILU},
)

QWEN2 = {**SHAPE, **rope(1e4), "model_type": "qwen2"}
QWEN2_V4 = {
  "rope_theta": 10000.0,
  "sliding_window": 7,
  "transformers_version": "4.43.1",
}
CASES["qwen2"] = Case(
  config={
    **QWEN2,
    "sliding_window": 7,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "tie_word_embeddings": False,
  },
  without={
    "no sliding_window": {"use_sliding_window": True},
    **theta(1e3),
    **EPSILON,
    **SILU,
  },
  v4=QWEN2_V4,
)

CASES["qwen2-window"] = Case(
  config={
    **QWEN2,
    "num_hidden_layers": 3,
    "sliding_window": 7,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
  },
  without={
    "sliding_window": {"use_sliding_window": False},
    "sliding_window, by one": {"sliding_window": 8},
    "max_window_layers": {"max_window_layers": 0},
    "max_window_layers, by one": {"max_window_layers": 2},
    **theta(1e3),
    **EPSILON,
    **SILU,
  },
  v4=QWEN2_V4,
)

CASES["qwen3"] = Case(
  config={
    **SHAPE,
    **rope(1e4),
    "model_type": "qwen3",
    "head_dim": 16,
    "tie_word_embeddings": True,
  },
  without={**theta(1e3), **EPSILON, **SILU},
)

GEMMA = {
  **SHAPE,
  "head_dim": 16,
  "pad_token_id": 0,
  "bos_token_id": 2,
  "eos_token_id": 1,
}
TANH = {
  "gelu": {"hidden_activation": "silu"},
  "gelu's tanh form": {"hidden_activation": "gelu"},
}
CASES["gemma"] = Case(
  config={
    **GEMMA,
    **rope(1e4),
    "model_type": "gemma",
    "num_key_value_heads": 1,
    "hidden_act": "gelu_pytorch_tanh",
  },
  without={**theta(1e3), **EPSILON, "gelu": {"hidden_act": "silu"}},
  embedding=0.4,
)

CASES["gemma2"] = Case(
  config={
    **GEMMA,
    **rope(1e4),
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "sliding_window": 7,
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
  },
  without={
    "sliding_window": WIDE,
    "sliding_window, by one": {"sliding_window": 8},
    "layers' order": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 16},
    "attn_logit_softcapping": {"attn_logit_softcapping": None},
    "final_logit_softcapping": {"final_logit_softcapping": None},
    **theta(1e3),
    **EPSILON,
    **TANH,
  },
  v4={
    "cache_implementation": "hybrid",
    "hidden_act": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "transformers_version": "4.42.4",
  },
  v4_lacks=("tie_word_embeddings",),
  embedding=0.4,
)


def dual_rope(whole: float, near: float, factor: float) -> dict:
  both = {
    "full_attention": rope(whole, "linear", factor=factor)["rope_parameters"],
    "sliding_attention": rope(near)["rope_parameters"],
  }
  return {"rope_parameters": both}


CASES["gemma3"] = Case(
  config={
    **GEMMA,
    **dual_rope(1000.0, 100.0, 8.0),
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "sliding_window": 7,
    "query_pre_attn_scalar": 9,
  },
  without={
    "sliding_window": WIDE,
    "sliding_window, by one": {"sliding_window": 8},
    "the full layer": {"layer_types": ["sliding_attention"] * 8},
    "rope_theta": dual_rope(100.0, 100.0, 8.0),
    "rope_local_base_freq": dual_rope(1000.0, 1000.0, 8.0),
    "rope scaling": dual_rope(1000.0, 100.0, 1.0),
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 16},
    **EPSILON,
    **TANH,
  },
  v4={
    "cache_implementation": "hybrid",
    "rope_local_base_freq": 100,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000,
    "sliding_window_pattern": 6,
    "transformers_version": "4.50.0.dev0",
  },
  v4_lacks=("tie_word_embeddings",),
  embedding=0.4,
)

PHI3 = {
  **SHAPE,
  "model_type": "phi3",
  "pad_token_id": 0,
  "original_max_position_embeddings": 64,
  "tie_word_embeddings": False,
}
CASES["phi3"] = Case(
  config={**PHI3, **rope(1e4, partial_rotary_factor=1.0), "sliding_window": 7},
  without={
    "sliding_window": {"sliding_window": None},
    "sliding_window, by one": {"sliding_window": 8},
    "rope_theta": rope(1e3, partial_rotary_factor=1.0),
    **EPSILON,
    **SILU,
  },
)

SHORT, LONG = [1.1, 1.3, 1.6], [1.5, 2.5, 4.0]


def long_rope(short: list, long: list, base: float = 100.0, **keys) -> dict:
  factors = {"short_factor": short, "long_factor": long}
  return rope(base, "longrope", **{"partial_rotary_factor": 0.75, **factors, **keys})


CASES["phi3-long"] = Case(
  config={
    **PHI3,
    **long_rope(SHORT, LONG),
    "original_max_position_embeddings": 16,
    "sliding_window": None,
  },
  without={
    "long_factor": long_rope(SHORT, SHORT),
    "original_max_position_embeddings": {"original_max_position_embeddings": 32},
    "rope magnitude": long_rope(SHORT, LONG, attention_factor=1.0),
    "rope_theta": long_rope(SHORT, LONG, base=1e4),
    "partial_rotary_factor": long_rope(
      [*SHORT, 2.0], [*LONG, 6.0], partial_rotary_factor=1.0
    ),
    **EPSILON,
    **SILU,
  },
  v4={
    "attention_bias": False,
    "auto_map": {
      "AutoConfig": "configuration_phi3.Phi3Config",
      "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
    "rope_theta": 100.0,
    "transformers_version": "4.45.0",
  },
  short=12,
  without_short={
    "short_factor": long_rope(LONG, LONG),
    "rope magnitude": long_rope(SHORT, LONG, attention_factor=1.0),
    "rope_theta": long_rope(SHORT, LONG, base=1e4),
  },
)

CASES["olmo2"] = Case(
  config={
    **SHAPE,
    **rope(1e4),
    "model_type": "olmo2",
    "pad_token_id": 0,
    "tie_word_embeddings": False,
  },
  without={**theta(1e3), **EPSILON, **SILU},
)

CASES["bloom"] = Case(
  config={
    "model_type": "bloom",
    "vocab_size": 61,
    "hidden_size": 48,
    "n_layer": 2,
    "n_head": 6,
    "layer_norm_epsilon": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
  },
  without={"layer_norm_epsilon": {"layer_norm_epsilon": 1e-6}},
  embedding=0.6,
)
