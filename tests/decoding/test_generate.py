import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.specs import SPECS, VOCAB, decoder, params_of

from jaxlm.decoding.generate import generate
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError
from jaxlm.models.decoder import logits

MODEL = SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"]
LEARNED = SPECS["gpt: MHA, GELU, LayerNorm, learned, tied, biases"]
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling()
NEVER = VOCAB  # no token: no row ends


@functools.cache
def new(sampling, *rows, end=NEVER, tokens=6, seed=0):
  made = decoder(MODEL)
  prompts = [PROMPTS[row] for row in rows]
  return generate(
    made, params_of(made), prompts, sampling, tokens=tokens, end=end, seed=seed
  )


def test_greedy_takes_the_argmax_of_full_forwards():
  made, found = decoder(MODEL), new(GREEDY, 0, 1, 2)
  rows = [[*prompt, *ids] for prompt, ids in zip(PROMPTS, found, strict=True)]
  tokens = np.zeros((3, max(map(len, rows))), np.int32)
  for line, row in zip(tokens, rows, strict=True):
    line[: len(row)] = row

  @jax.jit
  def best(params, tokens):
    x_BTD, _ = made.apply({"params": params}, tokens)
    return jnp.argmax(logits(MODEL, params, x_BTD), axis=-1)

  argmax = np.asarray(best(params_of(made), jnp.asarray(tokens)))
  for row, prompt in enumerate(PROMPTS):
    first = len(prompt) - 1
    assert found[row] == argmax[row, first : first + 6].tolist()
  assert len({tuple(ids) for ids in found}) > 1


def test_a_row_stops_at_the_end_and_leaves_it_out():
  free = new(GREEDY, 0, 1, 2)
  end = free[0][3]
  stopped = new(GREEDY, 0, 1, 2, end=end)
  for row, ids in zip(stopped, free, strict=True):
    assert row == (ids[: ids.index(end)] if end in ids else ids)
  assert len(stopped[0]) <= 3


def test_a_sample_depends_on_neither_neighbours_nor_batch_size():
  alone = new(DRAWN, 1)
  assert new(DRAWN, 1, 0)[:1] == new(DRAWN, 1, 2)[:1] == alone
  assert new(DRAWN, 1, 0, 2)[:1] == alone


def test_a_sample_depends_on_its_seed_and_its_place():
  assert new(DRAWN, 1, seed=1) != new(DRAWN, 1)
  first, second = new(DRAWN, 1, 1)
  assert first != second


def test_one_token():
  one = new(GREEDY, 0, 1, 2, tokens=1)
  assert one == [ids[:1] for ids in new(GREEDY, 0, 1, 2)]


def test_what_cannot_be_generated():
  made = decoder(MODEL)
  with pytest.raises(InputError, match="prompt 1 is empty"):
    generate(made, {}, [[1], []], GREEDY, tokens=3, end=NEVER)
  with pytest.raises(InputError, match="tokens: 0"):
    generate(made, {}, [[1]], GREEDY, tokens=0, end=NEVER)
  learned = decoder(LEARNED)
  # 12 positions: the last new token is not read back.
  prompts = [[1], [1] * 5]
  with pytest.raises(InputError, match=r"length: 12 positions .* 5 \+ 9 - 1"):
    generate(learned, {}, prompts, GREEDY, tokens=9, end=NEVER)
  found = generate(learned, params_of(learned), prompts, GREEDY, tokens=8, end=NEVER)
  assert [len(row) for row in found] == [8, 8]
