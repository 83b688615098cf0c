import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.specs import SPECS, VOCAB, decoder, params_of

from jaxlm.decoding.compiles import compiles
from jaxlm.decoding.generate import Generation, Options, generate
from jaxlm.decoding.prefill import Prefix, bucket, slots_for
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, logits
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

MODEL = SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"]
GEMMA = SPECS["gemma: MQA, GeGLU, sandwich, windows, softcaps, qk-norm"]
LEARNED = SPECS["gpt: MHA, GELU, LayerNorm, learned, tied, biases"]
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(seed=3)
PENALIZED = Sampling(seed=5, temperature=0.8, repetition_penalty=1.3, top_p=0.9)
MIXED = (GREEDY, PENALIZED, DRAWN)


@functools.cache
def made(model=MODEL):
  return decoder(model), params_of(decoder(model))


@functools.cache
def rows_of(sampling, *rows, **options):
  prompts = [PROMPTS[row] for row in rows]
  return generate(*made(), prompts, sampling, **{"tokens": 6} | options)


def new(sampling, *rows, **options):
  return [row.tokens for row in rows_of(sampling, *rows, **options)]


@functools.cache
def scores(*rows):
  """Returns log-probabilities [T, V] of full forwards, a program for all lengths."""
  tokens = np.zeros((len(rows), 16), np.int32)
  for line, row in zip(tokens, rows, strict=True):
    line[: len(row)] = row
  made_decoder, params = made()

  @jax.jit
  def run(params, tokens):
    x_BTD, _ = made_decoder.apply({"params": params}, tokens)
    return jax.nn.log_softmax(logits(MODEL, params, x_BTD))

  return np.asarray(run(params, jnp.asarray(tokens)))


def test_greedy_takes_the_argmax_of_full_forwards():
  found = new(GREEDY, 0, 1, 2)
  rows = [(*prompt, *ids) for prompt, ids in zip(PROMPTS, found, strict=True)]
  argmax = scores(*rows).argmax(-1)
  for row, prompt in enumerate(PROMPTS):
    first = len(prompt) - 1
    assert found[row] == argmax[row, first : first + 6].tolist()
  assert len({tuple(ids) for ids in found}) > 1


def test_log_probabilities_are_those_of_full_forwards():
  found = rows_of(MIXED, 0, 1, 2, top=3)
  rows = [(*prompt, *r.tokens) for prompt, r in zip(PROMPTS, found, strict=True)]
  for row, prompt, all_VT in zip(found, PROMPTS, scores(*rows), strict=True):
    places = all_VT[len(prompt) - 1 :][: len(row.tokens)]
    np.testing.assert_allclose(
      row.model, [p[t] for p, t in zip(places, row.tokens, strict=True)], atol=1e-5
    )
    for told, place in zip(row.top, places, strict=True):
      assert list(told) == np.argsort(-place, kind="stable")[:3].tolist()
      likeliest = np.sort(place)[::-1][:3]
      np.testing.assert_allclose(list(told.values()), likeliest, atol=1e-5)
    drawn_from = zip(row.top_sampling, row.sampling, row.tokens, strict=True)
    for told, value, token in drawn_from:
      assert list(told.values()) == sorted(told.values(), reverse=True)
      assert token not in told or told[token] == value
  greedy, penalized, drawn = found
  assert greedy.sampling == [0.0] * 6
  np.testing.assert_allclose(drawn.sampling, drawn.model, atol=1e-5)
  assert not np.allclose(penalized.sampling, penalized.model, atol=1e-2)


def test_a_row_stops_at_a_stop_and_leaves_it_out():
  free = new(GREEDY, 0, 1, 2)
  stops = (free[0][3], free[2][4])
  stopped = rows_of(GREEDY, 0, 1, 2, stops=stops)
  for row, ids in zip(stopped, free, strict=True):
    cut = next((i for i, token in enumerate(ids) if token in stops), None)
    assert row.tokens == ids[:cut]
    assert row.ended == ("length" if cut is None else "stop")
    assert len(row.model) == len(row.sampling) == len(row.tokens)
  assert len(stopped[0].tokens) <= 3


@pytest.mark.parametrize("row", range(3))
def test_a_row_depends_on_neither_neighbours_nor_batch_size(row):
  """Of mixed samplings: greedy, penalized and plain draws."""
  (alone,) = new(MIXED[row], row)
  for others in ([0, 1, 2], [2, 1, 0], [1, row] + [0, 1, 2] * 2):
    samplings = tuple(MIXED[other] for other in others)
    assert new(samplings, *others)[others.index(row)] == alone


@pytest.mark.parametrize("mesh", [Mesh(fsdp=4, tensor=2), Mesh(data=8, fsdp=1)])
def test_a_row_depends_not_on_the_mesh(mesh):
  layout = Layout(make_mesh(mesh))
  sharded = Decoder(MODEL, Precision(), layout)
  found = generate(sharded, made()[1], PROMPTS, MIXED, tokens=6)
  assert [row.tokens for row in found] == new(MIXED, 0, 1, 2)


def test_a_sample_depends_on_its_seed_and_its_place():
  free = Sampling()
  assert new(free, 1, seed=1) != new(free, 1)
  first, second = new(free, 1, 1)
  assert first != second
  assert new(DRAWN, 1, 1, seed=1)[0] == new(DRAWN, 1)[0]


# Two divides the prefix and three does not; a ring has three slots.
@pytest.mark.parametrize(
  ("model", "chunk"),
  [(MODEL, 2), (GEMMA, 1), (GEMMA, 3)],
  ids=["dense-2", "rings-1", "rings-3"],
)
def test_prompts_in_chunks_and_after_a_prefix_change_nothing(model, chunk):
  prompts = [[3, 1, 4, 1, *prompt] for prompt in PROMPTS]
  wanted = generate(*made(model), prompts, GREEDY, tokens=6)
  chunked = generate(*made(model), prompts, GREEDY, tokens=6, chunk=chunk)
  prefix = Prefix.read(*made(model), [3, 1, 4, 1], length=20, chunk=chunk)
  found = generate(*made(model), PROMPTS, GREEDY, tokens=6, chunk=chunk, prefix=prefix)
  for rows in (chunked, found):
    for row, one in zip(rows, wanted, strict=True):
      assert row.tokens == one.tokens
      np.testing.assert_allclose(row.model, one.model, atol=1e-5)
  with pytest.raises(InputError, match="cache: int8, and the prefix was read in float"):
    generate(*made(model), PROMPTS, GREEDY, tokens=6, prefix=prefix, cache="int8")
  with pytest.raises(
    InputError, match=r"length: 4 positions leave no room after 4 ids"
  ):
    Prefix.read(*made(model), [3, 1, 4, 1], length=4)
  with pytest.raises(InputError, match=r"read for rows of 20 positions, .* needs 21"):
    generate(*made(model), PROMPTS, GREEDY, tokens=13, prefix=prefix)


def test_steps_give_what_one_call_gives():
  wanted = rows_of(MIXED, 0, 1, 2)
  growing = Generation(*made(), PROMPTS, MIXED, Options(tokens=6))
  assert [row.tokens for row in growing.rows()] == [[], [], []]
  lengths = [len(rows[0].tokens) for rows in growing.stream(every=4)]
  assert lengths == [4, 6]
  assert growing.rows() == wanted


def test_the_caller_ends_a_row_and_the_others_go_on():
  wanted = rows_of(GREEDY, 0, 1, 2)
  growing = Generation(*made(), PROMPTS, GREEDY, Options(tokens=6))
  growing.step(3)
  growing.end(1, tokens=2)
  found = growing.finish()
  assert (found[1].tokens, found[1].ended) == (wanted[1].tokens[:2], "caller")
  assert [found[0], found[2]] == [wanted[0], wanted[2]]


def test_a_step_makes_one_token_at_least():
  growing = Generation(*made(), PROMPTS, MIXED, Options(tokens=6))
  with pytest.raises(InputError, match="tokens of a step: 0 is under 1"):
    next(growing.stream(every=0))


def test_a_mask_binds_each_step():
  growing = Generation(*made(), PROMPTS, MIXED, Options(tokens=6))
  for step in range(6):
    mask = np.zeros((3, VOCAB), bool)
    mask[:, [2 * step, 2 * step + 1]] = True
    growing.step(mask_BV=mask)
  for row in growing.rows():
    assert [token // 2 for token in row.tokens] == list(range(6))


def test_after_the_first_call_nothing_is_compiled():
  generate(*made(), PROMPTS, MIXED, tokens=8)
  other = tuple(dataclasses.replace(s, seed=9) for s in MIXED)
  longer = [[*prompt, 2, 3] for prompt in PROMPTS]
  with compiles() as told:
    generate(*made(), longer, other, tokens=7, stops=(3,))
  assert told.names == []


def test_ending_rows_and_masks_compile_nothing_on_a_mesh():
  sharded = Decoder(MODEL, Precision(), Layout(make_mesh(Mesh(fsdp=4, tensor=2))))
  mask = np.ones((3, VOCAB), bool)

  def run(rows):
    growing = Generation(sharded, made()[1], PROMPTS, MIXED, Options(tokens=8))
    growing.step(2)
    for row in rows:
      growing.step(1)
      growing.end(row, 1)
    growing.step(1, mask)
    return growing.finish()

  run([1])
  with compiles() as told:
    run([0, 2])
  assert told.names == []


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 640, 1000])
def test_sizes_are_rounded_up_to_few(n):
  assert n <= bucket(n) < 2 * n
  assert n <= slots_for(n) <= max(128, n * 9 / 8)
  assert len({slots_for(i) for i in range(1, 4097)}) < 50


def test_int8_keys_and_values_change_little():
  prompts = [[3, 1, 4, 1, 5, 9]]
  exact, rough = (
    generate(*made(), prompts, GREEDY, tokens=6, top=VOCAB, cache=cache)[0]
    for cache in (None, "int8")
  )
  assert exact.tokens == rough.tokens
  for a, b in zip(exact.top, rough.top, strict=True):
    assert max(abs(a[token] - b[token]) for token in a) < 0.1
  assert exact.top != rough.top


def test_what_cannot_be_generated():
  one = {"tokens": 3}
  for prompts, sampling, options, says in (
    ([[1], []], GREEDY, one, "prompt 1 is empty"),
    ([], GREEDY, one, "prompts: there is none"),
    ([[1, VOCAB]], GREEDY, one, "prompt 0: id 16 is not in the vocabulary of 16"),
    ([[1]], GREEDY, {"tokens": 0}, "tokens: 0"),
    ([[1]], GREEDY, one | {"chunk": 0}, "chunk: 0"),
    ([[1]], GREEDY, one | {"top": 17}, "top: 17 of 16"),
    ([[1]], (GREEDY, GREEDY), one, "sampling: 2 for 1 prompts"),
    ([[1]], GREEDY, one | {"cache": "int32"}, "cache: 'int32'; it takes float32"),
    ([[1]], Sampling(banned=tuple(range(VOCAB))), one, "no token is left"),
  ):
    with pytest.raises(InputError, match=says):
      generate(*made(), prompts, sampling, **options)
  # 12 positions: the last new token is not read back.
  prompts = [[1], [1] * 5]
  with pytest.raises(InputError, match=r"length: 12 positions .* 5 \+ 9 - 1"):
    generate(*made(LEARNED), prompts, GREEDY, tokens=9)
  found = generate(*made(LEARNED), prompts, GREEDY, tokens=8)
  assert [len(row.tokens) for row in found] == [8, 8]
  short = dataclasses.replace(MODEL, context=9)
  with pytest.raises(InputError, match="is made for 9"):
    generate(decoder(short), made()[1], PROMPTS, GREEDY, tokens=6)
