"""Adapters to PEFT and back: the same logits on both sides.

    uv run python experiments/adapters/peft_roundtrip.py write MODEL FOLDER
    PEFT_PYTHON experiments/adapters/peft_roundtrip.py peft MODEL FOLDER
    uv run python experiments/adapters/peft_roundtrip.py read MODEL FOLDER

MODEL is a Hugging Face folder. `write` makes adapters here, far from their first ones,
and writes them as PEFT's folders; `peft`, by a Python that has torch, transformers and
peft, loads each, compares logits, and writes adapters of its own; `read` reads those
and compares. Differences are the largest of any logit, float32.
"""

import pathlib
import sys

import numpy as np

METHODS = ("lora", "rslora", "dora", "ranks", "ia3", "prefix", "prompt")
LENGTH = 5


def ids(vocab: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, vocab, (2, 24))


def told(method: str, ours: np.ndarray, theirs: np.ndarray) -> None:
  largest, apart = np.abs(theirs).max(), np.abs(ours - theirs).max()
  print(f"{method:8} largest logit {largest:8.3f}, largest difference {apart:.2e}")


def jaxlm_side(place: str):
  """Returns the decoder, its family, its parameters, and logits of parameters."""
  import jax
  import jax.numpy as jnp

  from jaxlm.interop.checkpoint import open_model
  from jaxlm.models.decoder import Decoder, logits
  from jaxlm.models.spec import Precision
  from jaxlm.sharding.mesh import Mesh, make_mesh
  from jaxlm.sharding.rules import Layout

  opened = open_model(place)
  layout = Layout(make_mesh(Mesh(fsdp=1), jax.devices()[:1]))
  decoder = Decoder(opened.model, Precision(), layout)

  @jax.jit
  def run(params):
    x_BTD, _ = decoder.apply({"params": params}, jnp.asarray(ids(opened.model.vocab)))
    return logits(opened.model, params, x_BTD)

  return decoder, opened.family, opened.params(decoder), run


def write(model: str, folder: pathlib.Path) -> None:
  import jax
  from etils import epath

  from jaxlm.interop import peft_write
  from jaxlm.interop.peft_modules import Folder
  from jaxlm.peft import methods
  from jaxlm.peft.ia3 import IA3
  from jaxlm.peft.lora import LoRA
  from jaxlm.peft.soft_prompt import Prefix, Prompt

  specs = {
    "lora": LoRA(rank=4, targets=("attention",)),
    "rslora": LoRA(rank=4, rslora=True),
    "dora": LoRA(rank=4, dora=True),
    "ranks": LoRA(rank=4, ranks=(("mlp/", 6),), alphas=(("/q$", 24.0),)),
    "ia3": IA3(),
    "prefix": Prefix(length=LENGTH),
    "prompt": Prompt(length=LENGTH),
  }
  decoder, family, base, run = jaxlm_side(model)
  for number, (method, spec) in enumerate(specs.items()):
    tuning = methods.build(spec, (), decoder)
    key = jax.random.key(number)
    trained = tuning.init(base, key)
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(key, len(leaves))
    scales = [0.02 * float(abs(leaf).max()) + 0.005 for leaf in leaves]
    moved = [
      leaf + scale * jax.random.normal(k, leaf.shape)
      for leaf, scale, k in zip(leaves, scales, keys, strict=True)
    ]
    trained = jax.tree.unflatten(tree, moved)
    place = folder / "ours" / method
    peft_write.write(epath.Path(place), Folder(spec, trained, model), decoder, family)
    found = run(jax.jit(tuning.attach)(base, trained, None))
    np.save(place / "logits.npy", found)
    told(method, np.asarray(run(base)), np.asarray(found))


def in_peft(model: str, folder: pathlib.Path) -> None:
  import peft
  import torch
  import transformers
  from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
  )  # fmt: skip

  def load():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_pretrained(
      model, dtype=torch.float32
    ).eval()

  def run(net) -> np.ndarray:
    with torch.no_grad():
      tokens = torch.tensor(ids(net.config.vocab_size))
      return net(input_ids=tokens).logits[:, -24:].numpy()

  print(f"peft {peft.__version__}, transformers {transformers.__version__}")
  print("ours, loaded by PEFT:")
  for method in METHODS:
    place = folder / "ours" / method
    net = PeftModel.from_pretrained(load(), place).eval()
    told(method, np.load(place / "logits.npy"), run(net))
  task = {"task_type": "CAUSAL_LM"}
  all_linear = {"target_modules": "all-linear"} | task
  configs = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **task),
    "rslora": LoraConfig(r=4, use_rslora=True, **all_linear),
    "dora": LoraConfig(r=4, use_dora=True, **all_linear),
    "ranks": LoraConfig(
      r=4, rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 24}, **all_linear
    ),
    "ia3": IA3Config(**task),
    "prefix": PrefixTuningConfig(num_virtual_tokens=LENGTH, **task),
    "prompt": PromptTuningConfig(num_virtual_tokens=LENGTH, **task),
  }
  for method, config in configs.items():
    net = get_peft_model(load(), config).eval()
    for weight in net.parameters():
      if weight.requires_grad:
        scale = 0.02 * float(weight.abs().max()) + 0.005
        weight.data += scale * torch.randn_like(weight)
    place = folder / "theirs" / method
    net.save_pretrained(place)
    np.save(place / "logits.npy", run(net))


def read(model: str, folder: pathlib.Path) -> None:
  import jax
  from etils import epath

  from jaxlm.interop import peft_read
  from jaxlm.peft import methods

  decoder, family, base, run = jaxlm_side(model)
  print("theirs, read here:")
  for method in METHODS:
    place = folder / "theirs" / method
    found = peft_read.read(epath.Path(place), decoder, family)
    attach = methods.build(found.spec, (), decoder).attach
    params = jax.jit(attach)(base, found.trained, None)
    told(method, np.asarray(run(params)), np.load(place / "logits.npy"))


ACTS = {"write": write, "peft": in_peft, "read": read}
ACTS[sys.argv[1]](sys.argv[2], pathlib.Path(sys.argv[3]))
