import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxlm.decoding import choice
from jaxlm.decoding.sampling import Sampling, controls

FILE = pathlib.Path(__file__).parents[1] / "goldens/sampling.npz"
PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.03, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
V = len(LOGITS)
STOP = 3
process, probabilities = jax.jit(choice.process), jax.jit(choice.probabilities)
choose = jax.jit(choice.choose, static_argnames="top")
see = jax.jit(choice.see)
allow_top_k, allow_top_p = jax.jit(choice.allow_top_k), jax.jit(choice.allow_top_p)


@functools.cache
def golden():
  """Returns logits, tokens, and what is said about them; see experiments/goldens."""
  with np.load(FILE) as found:
    arrays = dict(found)
  return arrays, json.loads(str(arrays.pop("about")))


def requested(name: str) -> Sampling:
  fields = golden()[1]["cases"][name]
  pairs = lambda b: (*map(tuple, b),)  # noqa: E731
  tuples = {"allowed": tuple, "banned": tuple, "logit_bias": pairs}
  return Sampling(**{k: tuples.get(k, lambda v: v)(v) for k, v in fields.items()})


def seen_after(made, prompts, outputs, vocab):
  seen = choice.start(made, prompts, vocab)
  for token_B in np.asarray(outputs, np.int32).T:
    seen = see(seen, jnp.asarray(token_B), jnp.ones(len(token_B), bool))
  return seen


def golden_rows(samplings, rows):
  """Returns what `process` makes of golden rows, one sampling for each."""
  arrays, about = golden()
  tokens, logits = arrays["tokens"][rows], arrays["logits"][rows]
  made = controls(samplings, logits.shape[1], stops=about["stops"])
  prompts, outputs = np.split(tokens, [about["prompt"]], axis=1)
  seen = seen_after(made, prompts.tolist(), outputs, logits.shape[1])
  return np.asarray(process(made, seen, jnp.asarray(logits)))


def equal(found, wanted):
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
  np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-6)


CASES = golden()[1]["cases"]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
  arrays, _ = golden()
  rows = np.arange(len(arrays["logits"]))
  equal(golden_rows([requested(name)] * len(rows), rows), arrays[name])


@pytest.mark.parametrize("row", range(4))
def test_rows_of_one_batch_may_differ_in_every_field(row):
  """All cases in one batch: each as alone, and one without a wish as it was."""
  arrays, _ = golden()
  samplings = [*map(requested, CASES), Sampling()]
  found = golden_rows(samplings, [row] * len(samplings))
  for line, name in zip(found, CASES, strict=False):
    equal(line, arrays[name][row])
  assert found[-1].tobytes() == arrays["logits"][row].tobytes()


def test_a_row_without_a_wish_keeps_every_bit():
  penalties = {"presence_penalty": 0.3, "frequency_penalty": 0.2}
  full = dataclasses.replace(requested("all"), **penalties)
  made = controls([full, Sampling()], 101, stops=(5,))
  made = made._replace(mask_BV=jnp.ones((2, 101), bool))
  row = np.linspace(-90, 80, 101, dtype=np.float32)
  row[[3, 4, 50]] = [-0.0, 0.0, -np.inf]
  logits = jnp.asarray(np.stack([row, row]))
  seen = seen_after(made, [[1, 2], [1, 2]], [[3, 3, 4], [3, 3, 4]], 101)
  assert np.asarray(process(made, seen, logits))[1].tobytes() == row.tobytes()


def test_what_no_row_uses_is_not_in_the_program():
  def names(sampling):
    made = controls([sampling], V)
    seen = choice.start(made, [[0]], V)
    jaxpr = jax.make_jaxpr(choice.process)(made, seen, jnp.asarray(LOGITS[None]))
    return {equation.primitive.name for equation in jaxpr.eqns}

  assert names(Sampling()) == set()
  assert "scan" not in names(Sampling(temperature=0.5, presence_penalty=1.0))
  assert "scan" in str(jax.make_jaxpr(choice.allow_top_k)(LOGITS[None], np.array([3])))
  assert controls([Sampling(temperature=0)], V).key_B2 is None


def distribution(sampling, *, prompt=(), output=(), stops=()):
  made = controls([sampling], V, stops=stops)
  seen = seen_after(made, [list(prompt)], [list(output)], V)
  return np.asarray(probabilities(made, seen, jnp.asarray(LOGITS[None])))[0]


def only(tokens, power=1.0):
  kept = np.zeros(V)
  kept[tokens] = PROBABILITIES[tokens] ** power
  return kept / kept.sum()


def shifted(**by):
  """Returns the probabilities after additions to logits: t2=0.5 adds to token 2."""
  odds = PROBABILITIES.copy()
  for name, shift in by.items():
    odds[int(name[1:])] *= np.exp(shift)
  return odds / odds.sum()


EVERY = list(range(V))
FIELDS = [
  (Sampling(), {}, PROBABILITIES),
  (Sampling(temperature=0.5), {}, only(EVERY, 2.0)),
  (Sampling(temperature=2.0), {}, only(EVERY, 0.5)),
  (Sampling(temperature=0), {}, only([1])),
  (Sampling(top_k=1), {}, only([1])),
  (Sampling(top_k=2), {}, only([1, 3])),
  (Sampling(top_k=99), {}, PROBABILITIES),
  (Sampling(top_p=1e-40), {}, only([1])),
  (Sampling(top_p=0.39), {}, only([1])),
  (Sampling(top_p=0.41), {}, only([1, 3])),
  (Sampling(top_p=0.69), {}, only([1, 3])),
  (Sampling(top_p=0.71), {}, only([1, 3, 5])),
  (Sampling(top_p=0.99), {}, PROBABILITIES),
  (Sampling(top_k=2, top_p=0.6), {}, only([1, 3])),  # 0.4 / 0.7 is under 0.6
  (Sampling(top_k=2, top_p=0.55), {}, only([1])),
  (Sampling(min_p=0.0), {}, PROBABILITIES),
  (Sampling(min_p=0.49), {}, only([1, 3, 5])),
  (Sampling(min_p=0.51), {}, only([1, 3])),
  (Sampling(min_p=1.0), {}, only([1])),
  (Sampling(temperature=0.5, min_p=0.3), {}, only([1, 3], 2.0)),
  # The entropy is 1.38 nats; the surprises are 3.0, 0.92, 3.9, 1.20, 3.5 and 1.61.
  (Sampling(typical_p=0.29), {}, only([3])),
  (Sampling(typical_p=0.31), {}, only([3, 5])),
  (Sampling(typical_p=0.51), {}, only([1, 3, 5])),
  (Sampling(logit_bias=((0, 2.0), (1, -1.5))), {}, shifted(t0=2.0, t1=-1.5)),
  (Sampling(allowed=(0, 2)), {}, only([0, 2])),
  (Sampling(allowed=(0, 2, 3), banned=(3,)), {}, only([0, 2])),
  (Sampling(banned=(1,)), {}, only([0, 2, 3, 4, 5])),
  (Sampling(presence_penalty=0.7), {"output": (1, 4, 1)}, shifted(t1=-0.7, t4=-0.7)),
  (Sampling(presence_penalty=-0.7), {"output": (4,)}, shifted(t4=0.7)),
  (Sampling(frequency_penalty=0.7), {"output": (1, 4, 1)}, shifted(t1=-1.4, t4=-0.7)),
  # Logits are logarithms and so negative: they double.
  (Sampling(repetition_penalty=2.0), {"output": (1, 1)}, shifted(t1=np.log(0.4))),
  (Sampling(repetition_penalty=2.0), {"prompt": (1, 1)}, shifted(t1=np.log(0.4))),
  (Sampling(presence_penalty=0.7), {"prompt": (1,)}, PROBABILITIES),
  (Sampling(frequency_penalty=0.7), {"prompt": (1,)}, PROBABILITIES),
  (Sampling(min_tokens=2), {"stops": (STOP,)}, only([0, 1, 2, 4, 5])),
  (Sampling(min_tokens=2), {"stops": (STOP,), "output": (0,)}, only([0, 1, 2, 4, 5])),
  (Sampling(min_tokens=2), {"stops": (STOP,), "output": (0, 0)}, PROBABILITIES),
  (Sampling(min_tokens=2), {"prompt": (0, 0)}, PROBABILITIES),
  (Sampling(temperature=0, banned=(1,)), {}, only([3])),
  (Sampling(temperature=0, presence_penalty=1.0), {"output": (1,)}, only([3])),
  (Sampling(temperature=0, typical_p=0.29), {}, only([3])),
  (Sampling(temperature=0, top_k=3, top_p=0.9, min_p=0.1), {}, only([1])),
]


@pytest.mark.parametrize(
  ("sampling", "context", "wanted"), FIELDS, ids=[str(i) for i in range(len(FIELDS))]
)
def test_the_distribution_moves_as_the_field_says(sampling, context, wanted):
  found = distribution(sampling, **context)
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  assert ((found > 0) == (wanted > 0)).all()


def test_every_field_moves_it():
  neutral = Sampling()
  moved = {
    field.name
    for sampling, _, wanted in FIELDS
    for field in dataclasses.fields(Sampling)
    if getattr(sampling, field.name) != getattr(neutral, field.name)
    and not np.allclose(wanted, PROBABILITIES)
  }
  assert moved == {field.name for field in dataclasses.fields(Sampling)} - {"seed"}


def test_a_constraint_s_mask():
  made = controls([Sampling(), Sampling(top_k=1)], V)
  mask = np.ones((2, V), bool)
  mask[:, 1] = False
  made = made._replace(mask_BV=jnp.asarray(mask))
  seen = choice.start(made, [[], []], V)
  found = np.asarray(probabilities(made, seen, jnp.asarray([LOGITS, LOGITS])))
  np.testing.assert_allclose(found[0], only([0, 2, 3, 4, 5]), atol=1e-6)
  np.testing.assert_allclose(found[1], only([3]), atol=1e-6)


def draws(sampling, count, seed=0):
  """Returns how often each token is drawn at so many positions."""
  made = controls([sampling], V, seed=seed)
  seen = choice.start(made, [[]], V)

  @jax.jit
  def tokens(steps):
    def one(step):
      return choice.choose(made, seen, LOGITS[None], step[None]).token_B[0]

    return jax.vmap(one)(steps)

  return np.bincount(np.asarray(tokens(jnp.arange(count))), minlength=V)


def surprising(counts, wanted):
  """Returns the chance of counts as far from what is wanted, or farther."""
  assert counts[wanted == 0].sum() == 0
  here = wanted > 0
  return stats.chisquare(counts[here], wanted[here] * counts.sum()).pvalue


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(),
    Sampling(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02, seed=3),
    Sampling(temperature=1.5, typical_p=0.9, logit_bias=((2, 1.0),)),
  ],
)
def test_draws_follow_the_probabilities(sampling):
  wanted = distribution(sampling).astype(np.float64)
  counts = draws(sampling, 20_000)
  assert surprising(counts, wanted / wanted.sum()) > 1e-3
  # The count is enough to tell another temperature.
  near = dataclasses.replace(sampling, temperature=sampling.temperature * 1.15)
  other = distribution(near).astype(np.float64)
  assert surprising(counts, other / other.sum()) < 1e-6


MIXED = [
  Sampling(seed=1),
  Sampling(seed=2**40 + 5, temperature=0.7, top_p=0.9),
  Sampling(temperature=0, frequency_penalty=0.5),
  Sampling(seed=1, top_k=20, repetition_penalty=1.2),
  Sampling(seed=4, typical_p=0.6, presence_penalty=0.5),
  Sampling(seed=1, min_p=0.1, banned=(0, 1)),
  Sampling(temperature=0),
  Sampling(seed=9, temperature=1.8, min_tokens=9, logit_bias=((5, 2.0),)),
]


def decoded(rows, steps=12, place=None):
  """Returns the tokens that rows of MIXED make of logits by row and position."""
  made = controls([MIXED[row] for row in rows], 52, stops=(7,))
  seen = choice.start(made, [[row, row + 1] for row in rows], 52)
  tokens = []
  for step in range(steps):
    key = jax.random.fold_in(jax.random.key(0), step)
    logits = 2 * jax.random.normal(key, (len(MIXED), 52))[jnp.asarray(rows)]
    logits = jax.device_put(logits, place)
    step_B = jnp.full(len(rows), step, jnp.int32)
    found = choose(made, seen, logits, step_B)
    seen = see(seen, found.token_B, jnp.ones(len(rows), bool))
    tokens.append(np.asarray(found.token_B))
  return np.stack(tokens, axis=1)


def test_a_row_depends_on_neither_neighbours_nor_batch_size():
  together = decoded(range(8))
  for row in (1, 2, 7):
    np.testing.assert_array_equal(decoded([row])[0], together[row])
  np.testing.assert_array_equal(decoded([5, 2, 7])[::-1], together[[7, 2, 5]])


@pytest.mark.parametrize("axes", [("rows", "words"), (None, "words")])
def test_a_row_does_not_depend_on_the_mesh(axes):
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "words"))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  found = decoded(range(8), steps=4, place=place)
  np.testing.assert_array_equal(found, decoded(range(8), steps=4))


def drawn(seeds, step, batch=0):
  made = controls([Sampling(seed=seed) for seed in seeds], 1000, seed=batch)
  logits = jnp.zeros((len(seeds), 1000))
  seen = choice.start(made, [[]] * len(seeds), 1000)
  step_B = jnp.full(len(seeds), step, jnp.int32)
  return np.asarray(choose(made, seen, logits, step_B).token_B).tolist()


def test_draws_are_those_of_the_row_s_seed_and_position():
  key = jax.random.fold_in(jax.random.key(7), 3)
  (wanted,) = [int(jax.random.categorical(key, jnp.zeros(1000)))]
  assert drawn([7], 3) == [wanted]
  assert drawn([5, 7, 7, 7], 3)[1:] == [wanted] * 3
  assert drawn([7], 3, batch=1) == [wanted]
  assert wanted not in drawn([7], 4) + drawn([8], 3) + drawn([7 + 2**32], 3)


def test_rows_without_a_seed_have_streams_of_their_own():
  found = drawn([None] * 4, 3)
  assert len(set(found)) == 4
  assert drawn([None] * 2, 3) == found[:2]
  assert not set(drawn([None] * 4, 3, batch=1)) & set(found)


def test_log_probabilities_of_chosen_and_likeliest_tokens():
  samplings = [Sampling(seed=s, temperature=0.5, top_k=3) for s in range(3)]
  made = controls([*samplings, Sampling(temperature=0)], V)
  seen = choice.start(made, [[]] * 4, V)
  logits = jnp.asarray(np.tile(LOGITS + 5, (4, 1)))
  found = choose(made, seen, logits, jnp.arange(4), top=4)
  token = np.asarray(found.token_B)
  assert token.dtype == np.int32
  sharp = only([1, 3, 5], 2.0)
  np.testing.assert_allclose(found.model_B, np.log(PROBABILITIES)[token], atol=1e-5)
  np.testing.assert_allclose(found.sampling_B[:3], np.log(sharp[token[:3]]), atol=1e-5)
  assert (token[3], found.sampling_B[3]) == (1, 0.0)
  best = [1, 3, 5, 0]
  assert np.asarray(found.top_model.token_BN).tolist() == [best] * 4
  wanted = [np.log(PROBABILITIES)[best]] * 4
  np.testing.assert_allclose(found.top_model.logprob_BN, wanted, atol=1e-5)
  top = np.asarray(found.top_sampling.logprob_BN)
  assert np.asarray(found.top_sampling.token_BN)[:, 0].tolist() == [1] * 4
  sharpest = [*np.log(sharp[best[:3]]), -np.inf]
  np.testing.assert_allclose(top[:3], [sharpest] * 3, atol=1e-5)
  assert top[3].tolist() == [0.0, -np.inf, -np.inf, -np.inf]
  assert choose(made, seen, logits, jnp.arange(4)).top_model is None


def test_greedy_takes_the_largest_after_penalties_and_the_first_of_equal_ones():
  made = controls([Sampling(temperature=0), Sampling(temperature=0, banned=(1,))], 4)
  seen = choice.start(made, [[], []], 4)
  logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0]] * 2)
  found = choose(made, seen, logits, jnp.zeros(2, jnp.int32))
  assert np.asarray(found.token_B).tolist() == [1, 2]
  row = np.asarray(probabilities(made, seen, logits))
  assert row.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_only_active_rows_see_a_token():
  made = controls([Sampling(frequency_penalty=1.0, repetition_penalty=2.0)] * 2, V)
  seen = choice.start(made, [[1], [2, 2]], V)
  for token in (4, 4, 0):
    seen = choice.see(seen, jnp.full(2, token), jnp.asarray([True, token == 0]))
  assert np.asarray(seen.made_B).tolist() == [3, 1]
  assert np.asarray(seen.made_BV).tolist() == [[1, 0, 0, 0, 2, 0], [1, 0, 0, 0, 0, 0]]
  assert np.argwhere(np.asarray(seen.prompt_BV)).tolist() == [[0, 1], [1, 2]]


def test_a_penalty_is_never_dropped():
  seen = choice.start(controls([Sampling()], V), [[]], V)
  for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
    made = controls([Sampling(**{field: 0.5})], V)
    with pytest.raises(ValueError, match="without a penalty"):
      choice.process(made, seen, jnp.asarray(LOGITS[None]))
  seen = choice.start(controls([Sampling(presence_penalty=1.0)], V), [[]], V)
  made = controls([Sampling(repetition_penalty=2.0)], V)
  with pytest.raises(ValueError, match="without repetition_penalty"):
    choice.process(made, seen, jnp.asarray(LOGITS[None]))


def left(masked):
  return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(masked)]


def test_ties_at_the_edge_stay():
  logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 2.0]] * 3)
  found = allow_top_k(logits, jnp.asarray([2, 1, 5]))
  assert left(found) == [[1, 2, 3, 4], [1], [0, 1, 2, 3, 4]]
  found = allow_top_p(logits, jnp.asarray([0.6, 0.1, 0.99]))
  assert left(found) == [[1, 2, 3, 4], [1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_edge_is_where_sorting_finds_it(scale):
  random = np.random.default_rng(0)
  logits = (random.normal(size=(20, 300)) * scale).astype(np.float32)
  logits[:, ::7] = np.round(logits[:, ::7])  # ties, zeros of both signs
  logits[:, 5::11] = -np.inf
  k = random.integers(1, 250, size=20)
  least = -np.sort(-logits, axis=1)[np.arange(20), k - 1]
  found = allow_top_k(jnp.asarray(logits), jnp.asarray(k, jnp.int32))
  assert left(found) == left(np.where(logits >= least[:, None], logits, -np.inf))
  p = random.uniform(0.05, 0.95, size=20)
  found = allow_top_p(jnp.asarray(logits), jnp.asarray(p, jnp.float32))
  probability = special.softmax(logits.astype(np.float64), axis=1)
  above = (probability[:, None] * (logits[:, None] > logits[:, :, None])).sum(-1)
  assert np.abs(above - p[:, None]).min() > 1e-6
  assert left(found) == left(np.where(above < p[:, None], logits, -np.inf))
