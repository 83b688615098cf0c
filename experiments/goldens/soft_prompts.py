"""Makes tests/goldens/soft_prompts.npz: what PEFT's soft prompts do to a tiny Llama.

    python experiments/goldens/soft_prompts.py

in an environment with torch, transformers 5.23 and peft 0.21.2. Weights, virtual tokens
and, of each method, logits of the text and gradients of the sum of their squares.
"""

import pathlib

import numpy as np
import torch
from peft import (
  PrefixTuningConfig,
  PromptEncoderConfig,
  PromptTuningConfig,
  TaskType,
  get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM

PLACE = pathlib.Path(__file__).parents[2] / "tests/goldens/soft_prompts.npz"
LAYERS, DIM, HEADS, KV_HEADS, HEAD, VOCAB, LENGTH = 2, 16, 4, 2, 8, 40, 3
CONFIG = LlamaConfig(
  vocab_size=VOCAB,
  hidden_size=DIM,
  intermediate_size=24,
  num_hidden_layers=LAYERS,
  num_attention_heads=HEADS,
  num_key_value_heads=KV_HEADS,
  head_dim=HEAD,
  max_position_embeddings=64,
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  attn_implementation="eager",
  rope_theta=10000.0,
)


def model() -> LlamaForCausalLM:
  torch.manual_seed(0)
  made = LlamaForCausalLM(CONFIG).eval()
  with torch.no_grad():
    for weight in made.parameters():
      matrix = weight.ndim > 1
      noise = torch.randn(weight.shape) * (0.25 if matrix else 0.1)
      weight.copy_(noise + (0 if matrix else 1))
  return made


def ours(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the weights as jaxlm names and turns them."""

  def layers(turn):
    return np.stack([turn(f"model.layers.{i}.") for i in range(LAYERS)])

  found = {
    "embed/table": state["model.embed_tokens.weight"],
    "head": state["lm_head.weight"].T,
    "final_norm/scale": state["model.norm.weight"],
    "layers/0/mixer/o": layers(
      lambda p: state[f"{p}self_attn.o_proj.weight"].T.reshape(HEADS, HEAD, DIM)
    ),
    "layers/0/mixer_pre_norm/scale": layers(
      lambda p: state[f"{p}input_layernorm.weight"]
    ),
    "layers/0/mlp_pre_norm/scale": layers(
      lambda p: state[f"{p}post_attention_layernorm.weight"]
    ),
  }
  for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
    found[f"layers/0/mixer/{name}"] = layers(
      lambda p, n=name, h=heads: state[f"{p}self_attn.{n}_proj.weight"].T.reshape(
        DIM, h, HEAD
      )
    )
  for name in ("gate", "up", "down"):
    found[f"layers/0/mlp/{name}"] = layers(
      lambda p, n=name: state[f"{p}mlp.{n}_proj.weight"].T
    )
  return {f"base/{name}": array for name, array in found.items()}


def main() -> None:
  whole = model()
  out = ours({k: v.detach().numpy() for k, v in whole.state_dict().items()})
  ids, mask = torch.randint(0, VOCAB, (2, 8)), torch.ones(2, 8, dtype=torch.long)
  mask[1, 6:] = 0
  out["ids"] = ids.numpy().astype(np.int32)
  out["lengths"] = np.array([8, 6], np.int32)
  logits = whole(input_ids=ids, attention_mask=mask).logits
  out["base_logits"] = logits.detach().numpy()
  shared = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": LENGTH}
  cases = {
    "prefix": PrefixTuningConfig(**shared),
    "prompt": PromptTuningConfig(**shared),
    "ptuning": PromptEncoderConfig(encoder_hidden_size=12, **shared),
  }
  for name, config in cases.items():
    net = get_peft_model(model(), config).eval()
    torch.manual_seed(5)
    trained = {k: p for k, p in net.named_parameters() if p.requires_grad}
    with torch.no_grad():
      for weight in trained.values():
        weight.copy_(torch.randn(weight.shape) * 0.6)
    logits = net(input_ids=ids, attention_mask=mask).logits[:, -8:]
    (logits * mask[..., None]).square().sum().backward()
    out[f"{name}/logits"] = logits.detach().numpy()
    for key, weight in trained.items():
      last = key.split("default.")[-1]
      out[f"{name}/param/{last}"] = weight.detach().numpy()
      out[f"{name}/grad/{last}"] = weight.grad.numpy()
  np.savez_compressed(PLACE, **out)


main()
