"""Times steps of TRL's DPOTrainer on the CPU; prints a JSON line a step. See `run.py`.

With --make it only writes the tiny Llama and its pairs, which both sides read.
"""

import argparse
import json
import pathlib
import random
import resource
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
  LlamaConfig,
  LlamaForCausalLM,
  PreTrainedTokenizerFast,
  TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

PAIRS, PROMPT, ANSWER, VOCAB = 4, 64, 192, 32_000
"""Of a batch; tokens of a prompt, and of an answer with its end."""
END = 1


def make(folder: pathlib.Path) -> None:
  torch.manual_seed(0)
  config = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=END,
  )
  LlamaForCausalLM(config).save_pretrained(folder)
  words = {f"w{i}": i for i in range(3, VOCAB)} | {"<s>": 0, "</s>": END, "<pad>": 2}
  built = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
  built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  PreTrainedTokenizerFast(
    tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
  ).save_pretrained(folder)
  draw = random.Random(0)

  def ids(count: int) -> list[int]:
    return [draw.randrange(3, VOCAB) for _ in range(count)]

  pairs = [
    {"prompt": ids(PROMPT), "chosen": ids(ANSWER - 1), "rejected": ids(ANSWER - 1)}
    for _ in range(PAIRS)
  ]
  (folder / "pairs.json").write_text(json.dumps(pairs))


class Clock(TrainerCallback):
  """Prints a step's time, from the end of the one before, and its loss."""

  def __init__(self):
    self.at = (time.perf_counter(), time.process_time())
    self.took = (0.0, 0.0)

  def on_step_begin(self, args, state, control, **rest):
    if state.global_step == 0:
      self.at = (time.perf_counter(), time.process_time())

  def on_step_end(self, args, state, control, **rest):
    now = (time.perf_counter(), time.process_time())
    self.took = (now[0] - self.at[0], now[1] - self.at[1])
    self.at = now

  def on_log(self, args, state, control, logs=None, **rest):
    if logs and "loss" in logs:
      wall, cpu = self.took
      print(json.dumps({"wall": wall, "cpu": cpu, "loss": logs["loss"]}), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--make", action="store_true")
  parser.add_argument("--ahead", action="store_true", help="reference ahead of time")
  parser.add_argument("--steps", type=int, default=6)
  args = parser.parse_args()
  if args.make:
    return make(args.folder)
  torch.set_num_threads(2)
  tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
  rows = [
    {name: "".join(f"w{i} " for i in ids) for name, ids in pair.items()}
    for pair in json.loads((args.folder / "pairs.json").read_text())
  ]
  config = DPOConfig(
    output_dir=str(args.folder / "trl"),
    per_device_train_batch_size=PAIRS,
    max_steps=args.steps,
    learning_rate=1e-6,
    lr_scheduler_type="constant",
    adam_beta2=0.95,
    optim="adamw_torch_fused",
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    precompute_ref_log_probs=args.ahead,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  trainer = DPOTrainer(
    model=str(args.folder),
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Clock()],
  )
  batch = next(iter(trainer.get_train_dataloader()))
  shape = tuple(batch["input_ids"].shape)
  assert shape == (2 * PAIRS, PROMPT + ANSWER), shape
  trainer.train()
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps({"peak": peak}))


if __name__ == "__main__":
  main()
