import dataclasses
import functools
import itertools

import numpy as np
import pytest
from models.specs import SPECS, decoder, params_of

from jaxlm.decoding import prefill as prefills
from jaxlm.decoding import session as sessions
from jaxlm.decoding.generate import generate
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.session import CHUNK, Session
from jaxlm.errors import InputError
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

MODEL = SPECS["gemma: MQA, GeGLU, sandwich, windows, softcaps, qk-norm"]
LEARNED = SPECS["gpt: MHA, GELU, LayerNorm, learned, tied, biases"]
DENSE = SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"]
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling()
PROMPT = [3, 1, 4, 1, 5]
LENGTH = 40


@functools.cache
def made():
  return decoder(MODEL), params_of(decoder(MODEL))


def session(length=LENGTH):
  return Session(*made(), length=length)


def greedy(prompt, tokens):
  """Always makes 19, so that one program serves each length of prompt."""
  (found,) = generate(*made(), [prompt], GREEDY, tokens=19)
  return found.tokens[:tokens]


def take(stream, count):
  return list(itertools.islice(stream, count))


@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1, 19])
def test_the_stream_is_what_generate_makes(count):
  stream = session().stream(PROMPT, GREEDY, stops=(), seed=0)
  assert take(stream, count) == greedy(PROMPT, count)


@pytest.mark.parametrize("read", [2, 3, CHUNK + 1, 11])
@pytest.mark.parametrize("drop", [0, 2])
def test_a_second_turn_is_as_in_a_fresh_session(read, drop):
  """However much of the first was read, and whether its end is taken back."""
  kept = session()
  first = take(kept.stream(PROMPT, GREEDY, stops=(), seed=0), read)
  ids = [*PROMPT, *first[: read - drop], 7, 2]
  again = take(kept.stream(ids, GREEDY, stops=(), seed=0), 9)
  assert again == greedy(ids, 9)


def test_only_new_tokens_are_computed(monkeypatch):
  widths = []
  real = prefills._extend

  def extend(decoder, params, cache, new, x_B1D):
    _, positions_BT, _ = new
    widths.append((positions_BT.shape[1], positions_BT[positions_BT >= 0].tolist()))
    return real(decoder, params, cache, new, x_B1D)

  monkeypatch.setattr(prefills, "_extend", extend)
  kept = session()
  first = take(kept.stream(PROMPT * 4, GREEDY, stops=(), seed=0), 5)
  take(kept.stream([*PROMPT * 4, *first, 6], GREEDY, stops=(), seed=0), 1)
  assert widths[0] == (32, list(range(20)))
  # Of the five tokens read the cache has all but the last, which nothing followed.
  assert widths[1] == (16, [24, 25])


def test_a_ring_that_cannot_be_taken_back_so_far_is_filled_anew(monkeypatch):
  kept = session()
  first = take(kept.stream(PROMPT, GREEDY, stops=(), seed=0), 19)
  begins, real = [], prefills._extend

  def extend(decoder, params, cache, new, x_B1D):
    begins.append(int(new[1].min(initial=99, where=new[1] >= 0)))
    return real(decoder, params, cache, new, x_B1D)

  monkeypatch.setattr(prefills, "_extend", extend)
  whole = [*PROMPT, *first]
  for back in (1, CHUNK, CHUNK + 1, 18):
    take(kept.stream([*whole, 1], GREEDY, stops=(), seed=0), 1)
    ids = [*whole[: len(whole) + 1 - back], 7 if whole[-back] != 7 else 8]
    again = take(kept.stream(ids, GREEDY, stops=(), seed=0), 3)
    assert begins[-1] == (len(ids) - 1 if back <= CHUNK else 0)
    assert again == greedy(ids, 3)


def test_it_ends_at_a_stop_and_leaves_it_out():
  free = greedy(PROMPT, 19)
  for stop in set(free):
    found = list(session().stream(PROMPT, GREEDY, stops={stop}, seed=0))
    assert found == free[: free.index(stop)][: LENGTH - len(PROMPT)]


@pytest.mark.parametrize("length", [6, 5 + CHUNK, 6 + CHUNK])
def test_it_ends_when_the_cache_is_full(length):
  found = list(session(length).stream(PROMPT, GREEDY, stops=(), seed=0))
  assert found == greedy(PROMPT, 19)[: length - len(PROMPT)]
  assert len(found) == length - len(PROMPT)


def test_draws_depend_on_seed_and_position_alone():
  one = take(session().stream(PROMPT, DRAWN, stops=(), seed=1), 12)
  assert one == take(session().stream(PROMPT, DRAWN, stops=(), seed=1), 12)
  assert one != take(session().stream(PROMPT, DRAWN, stops=(), seed=2), 12)
  kept = session()
  kept_one = take(kept.stream(PROMPT, DRAWN, stops=(), seed=1), 6)
  rest = take(kept.stream([*PROMPT, *kept_one], DRAWN, stops=(), seed=1), 6)
  assert kept_one + rest == one


def test_a_reader_who_stops_in_mid_step_finds_the_session_whole(monkeypatch):
  kept, real = session(), sessions.advance

  def interrupted(*args):
    real(*args)
    raise KeyboardInterrupt

  take(kept.stream(PROMPT, GREEDY, stops=(), seed=0), 3)
  monkeypatch.setattr(sessions, "advance", interrupted)
  with pytest.raises(KeyboardInterrupt):
    take(kept.stream(PROMPT, GREEDY, stops=(), seed=0), 3)
  monkeypatch.undo()
  assert take(kept.stream(PROMPT, GREEDY, stops=(), seed=0), 9) == greedy(PROMPT, 9)


def test_rows_split_over_a_mesh_change_nothing():
  decoder, params = made()
  split = decoder.clone(layout=Layout(make_mesh(Mesh(fsdp=4, tensor=2))))
  kept = Session(split.clone(spec=DENSE), params_of(split.clone(spec=DENSE)), length=40)
  first = take(kept.stream(PROMPT, GREEDY, stops=(), seed=0), 6)
  alone = Session(
    decoder.clone(spec=DENSE), params_of(decoder.clone(spec=DENSE)), length=40
  )
  assert first == take(alone.stream(PROMPT, GREEDY, stops=(), seed=0), 6)
  ids = [*PROMPT, *first, 2]
  again = take(kept.stream(ids, GREEDY, stops=(), seed=0), 4)
  assert again == take(alone.stream(ids, GREEDY, stops=(), seed=0), 4)
  assert params is not None


def test_what_cannot_be_streamed():
  with pytest.raises(InputError, match="id 99 is not in the vocabulary of 16"):
    next(session().stream([1, 99], GREEDY, stops=(), seed=0))
  short = decoder(dataclasses.replace(MODEL, context=20))
  with pytest.raises(InputError, match="40 positions, and the model is made for 20"):
    Session(short, made()[1], length=LENGTH)
  with pytest.raises(InputError, match="0 tokens do not fit"):
    next(session().stream([], GREEDY, stops=(), seed=0))
  with pytest.raises(InputError, match="40 tokens do not fit into 40 positions"):
    next(session().stream(np.zeros(LENGTH, int).tolist(), GREEDY, stops=(), seed=0))
  with pytest.raises(InputError, match="13 positions, and the model has learned 12"):
    Session(decoder(LEARNED), params_of(decoder(LEARNED)), length=13)
