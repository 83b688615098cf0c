import functools
import json

import numpy as np
import pytest
from interop.goldens import FOLDER, loaded, opened
from models.specs import SPECS, VOCAB, decoder, params_of

from jaxlm.decoding.beam import Beam, beam_search, best_of
from jaxlm.decoding.compiles import compiles
from jaxlm.decoding.generate import generate
from jaxlm.decoding.sampling import Sampling
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

GOLDEN = json.loads((FOLDER.parent / "beam.json").read_text())
GREEDY = Sampling(temperature=0.0)
RINGS = SPECS["gemma: MQA, GeGLU, sandwich, windows, softcaps, qk-norm"]
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])


@functools.cache
def made(model=None):
  if model is None:
    return decoder(opened("llama").model), loaded("llama")
  return decoder(model), params_of(decoder(model))


def search(prompts, beam, model=None, **options):
  return beam_search(*made(model), prompts, beam, **options)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_hypotheses_and_scores_are_those_of_transformers(width, early_stopping):
  """Which searches each prompt alone; here they are the rows of one batch."""
  seen = 0
  for case in GOLDEN["cases"]:
    if (case["width"], case["early_stopping"]) != (width, early_stopping):
      continue
    beam = Beam(
      width=width,
      length_penalty=case["length_penalty"],
      early_stopping=early_stopping,
      returned=width,
    )
    stops = GOLDEN["stops"][case["stops"]]
    found = search(GOLDEN["prompts"], beam, tokens=GOLDEN["tokens"], stops=stops)
    for rows, wanted in zip(found, case["found"], strict=True):
      assert [row.tokens for row in rows] == [one["tokens"] for one in wanted]
      assert [row.ended == "stop" for row in rows] == [one["stop"] for one in wanted]
      if width > 1:
        scores = [one["score"] for one in wanted]
        np.testing.assert_allclose([row.score for row in rows], scores, atol=1e-5)
    seen += 1
  assert seen == 9


def test_one_beam_is_greedy():
  stops = GOLDEN["stops"]["three"]
  prompts = GOLDEN["prompts"]
  found = search(prompts, Beam(width=1, length_penalty=0.0), tokens=10, stops=stops)
  wanted = generate(*made(), prompts, GREEDY, tokens=10, stops=stops)
  for (one,), row in zip(found, wanted, strict=True):
    assert (one.tokens, one.ended) == (row.tokens, row.ended)
    if one.ended == "length":
      np.testing.assert_allclose(one.score, sum(row.model), rtol=1e-5)


def test_enough_beams_find_the_likeliest_of_all():
  """All 14 x 16 x 16 continuations are scored; windows are rings of three slots."""
  beam = Beam(width=VOCAB - 2, length_penalty=0.0, returned=5)
  found = search(PROMPTS, beam, RINGS, tokens=2)
  for rows, prompt in zip(found, PROMPTS, strict=True):
    scores = {}
    options = {"tokens": 1, "top": VOCAB}
    # As many rows as below: they share a program.
    alike = [prompt] * (VOCAB - 2)
    (first,) = generate(*made(RINGS), alike, GREEDY, **options)[0].top
    likeliest = sorted(first, key=first.get, reverse=True)[: VOCAB - 2]
    longer = [[*prompt, token] for token in likeliest]
    for token, row in zip(
      likeliest, generate(*made(RINGS), longer, GREEDY, **options), strict=True
    ):
      scores |= {(token, last): first[token] + s for last, s in row.top[0].items()}
    best = sorted(scores, key=scores.get, reverse=True)[:5]
    assert [tuple(row.tokens) for row in rows] == best
    np.testing.assert_allclose(
      [row.score for row in rows], [scores[one] for one in best], atol=1e-5
    )


def test_a_prompt_depends_on_neither_neighbours_nor_chunks():
  """With the cache whose scales move too; of floats, transformers are the judge."""
  beam = Beam(width=3, returned=2)
  options = {"tokens": 6, "stops": (3,), "cache": "int8"}
  together = search(PROMPTS, beam, RINGS, **options)
  for prompt, wanted in zip(PROMPTS, together, strict=True):
    (found,) = search([prompt], beam, RINGS, **options, chunk=2)
    assert [row.tokens for row in found] == [row.tokens for row in wanted]


def test_a_prompt_depends_not_on_the_mesh():
  beam = Beam(width=3, returned=3)
  sharded = Decoder(RINGS, Precision(), Layout(make_mesh(Mesh(data=2, fsdp=4))))
  found = beam_search(sharded, made(RINGS)[1], PROMPTS, beam, tokens=5)
  wanted = search(PROMPTS, beam, RINGS, tokens=5)
  for rows, others in zip(found, wanted, strict=True):
    assert [row.tokens for row in rows] == [row.tokens for row in others]


def test_terms_compile_nothing():
  search(PROMPTS, Beam(width=3), RINGS, tokens=8)
  with compiles() as told:
    other = Beam(width=3, length_penalty=2.0, early_stopping="never", returned=2)
    search([[7, 2], [1], [4, 4]], other, RINGS, tokens=7, stops=(5,))
  assert told.names == []


def test_the_best_of_samples():
  free = Sampling(seed=3)
  found = best_of(*made(RINGS), PROMPTS, free, 4, tokens=5, stops=(2,))
  means = [[np.mean(row.model) if row.tokens else -np.inf for row in rows]
           for rows in found]  # fmt: skip
  for rows, values in zip(found, means, strict=True):
    assert len(rows) == 4
    assert values == sorted(values, reverse=True)
    assert len({tuple(row.tokens) for row in rows}) > 1
  alone = best_of(*made(RINGS), PROMPTS[1:2], free, 4, tokens=5, stops=(2,))
  assert [row.tokens for row in alone[0]] == [row.tokens for row in found[1]]
  unnamed = best_of(*made(RINGS), [PROMPTS[0]] * 3, Sampling(), 4, tokens=5)
  assert [row.tokens for row in unnamed[0]] != [row.tokens for row in unnamed[1]]


def test_what_cannot_be_searched():
  for beam, options, says in (
    ({"width": 0}, {}, "width: 0 is under 1"),
    ({"width": 2, "returned": 3}, {}, "returned: 3 of a width of 2"),
    ({"width": 2, "returned": 0}, {}, "returned: 0 is under 1"),
    ({"width": VOCAB + 1}, {}, "width: 17 beams"),
    ({"width": VOCAB}, {"stops": (1,)}, "at most 15 beams"),
    ({"width": 2, "early_stopping": "ever"}, {}, "early_stopping: 'ever'"),
    ({"width": 2, "length_penalty": np.nan}, {}, "length_penalty: nan"),
    ({"width": 2}, {"seed": 1}, "seed: 1"),
    ({"width": 2}, {"top": 1}, "top: 1"),
    ({"width": 2}, {"tokens": 0}, "tokens: 0"),
  ):
    with pytest.raises(InputError, match=says):
      search(PROMPTS, Beam(**beam), RINGS, **{"tokens": 3} | options)
  for n, sampling, says in (
    (0, Sampling(), "n: 0 is under 1"),
    (2, GREEDY, "all 2 samples would be the same"),
    (2, [Sampling()], "sampling: 1 for 3 prompts"),
  ):
    with pytest.raises(InputError, match=says):
      best_of(*made(RINGS), PROMPTS, sampling, n, tokens=3)
