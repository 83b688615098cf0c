"""Loads what `export.py` wrote in transformers and in llama.cpp, and compares logits.

    python experiments/exports/check.py OUT

In an environment with torch 2.13, transformers 5.23 and llama-cpp-python 0.3.36. Prints
the table of RESULT.md: the largest difference between a program's last logits and
jaxlm's from the same file, over the largest logit; for llama.cpp also how many of the
ten likeliest tokens are the same.
"""

import pathlib
import sys

import llama_cpp
import numpy as np
import torch
import transformers

DTYPES = ("float32", "float16", "q8_0")


def in_transformers(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits[:, -1].numpy()


def in_llama_cpp(file: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  """Returns each row's last logits, through the plain C calls: no vocabulary needed."""
  settings = llama_cpp.llama_model_default_params()
  settings.use_mmap = False
  model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
  if not model:
    raise SystemExit(f"llama.cpp does not load {file}")
  vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
  rows = []
  for row in tokens:
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_threads = 256, 256, 2
    # The cache in float32 too, so that the weights are what differs.
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, options)
    ids = (llama_cpp.llama_token * len(row))(*map(int, row))
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(row))):
      raise SystemExit(f"llama.cpp does not run {file}")
    found = llama_cpp.llama_get_logits_ith(context, -1)
    rows.append(np.ctypeslib.as_array(found, (vocab,)).copy())
    llama_cpp.llama_free(context)
  llama_cpp.llama_model_free(model)
  return np.stack(rows)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def same_top(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Returns how many of the ten likeliest tokens are the same, on average of rows."""
  tops = [np.argsort(-x, axis=-1)[:, :10] for x in (ours, theirs)]
  return float(np.mean([len({*a} & {*b}) for a, b in zip(*tops, strict=True)]))


def main() -> None:
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
  llama_cpp.llama_log_set(quiet, None)
  print(
    "| case | transformers | " + " | ".join(f"llama.cpp {d}" for d in DTYPES) + " |"
  )
  print("|---|---|" + "---|" * len(DTYPES))
  for case in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    saved = np.load(case / "ours.npz")
    tokens = saved["tokens"]
    cells = [f"{difference(saved['hf'], in_transformers(case / 'hf', tokens)):.1e}"]
    for dtype in DTYPES:
      file = case / f"{dtype}.gguf"
      if not file.exists():
        cells.append("refused")
        continue
      ours, theirs = saved[dtype], in_llama_cpp(file, tokens)
      cells.append(f"{difference(ours, theirs):.1e}, {same_top(ours, theirs):g} of 10")
    print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  main()
