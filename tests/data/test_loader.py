import itertools
import threading
import time

import numpy as np
import pytest

from jaxlm.data import loader
from jaxlm.errors import InputError


def take(prepared, *, rows, start, count):
  data, corpus = prepared
  with loader.Loader(corpus, data, rows=rows, start=start) as batches:
    return list(itertools.islice(batches, count))


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name], strict=True)


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("layout", ["blocks", "strided"])
def test_the_order_does_not_depend_on_the_process_count(prepared, processes, layout):
  whole = take(prepared, rows=range(8), start=5, count=6)
  size = 8 // processes
  held = [
    range(p * size, (p + 1) * size) if layout == "blocks" else range(p, 8, processes)
    for p in range(processes)
  ]
  parts = [take(prepared, rows=rows, start=5, count=6) for rows in held]
  back = np.argsort(np.concatenate([list(rows) for rows in held]))
  joined = [
    {name: np.concatenate([part[name] for part in step])[back] for name in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole)


def test_batches_are_the_examples_of_the_global_order(prepared):
  """Another batch size cuts the same order elsewhere."""
  data, corpus = prepared
  batches = take(prepared, rows=range(8), start=0, count=3)
  one = loader.mixture.mix(corpus.train, corpus.weights, data.seed)
  for step, row in ((0, 0), (1, 3), (2, 7)):
    tokens = one[step * 8 + row]["tokens"]
    np.testing.assert_array_equal(batches[step]["tokens"][row], tokens[:-1])


@pytest.mark.parametrize("start", [1, 37, 200])
def test_starting_equals_skipping(prepared, start):
  """200 batches of 8 are several epochs of the smaller source."""
  skipped = take(prepared, rows=range(8), start=0, count=start + 3)[start:]
  started = take(prepared, rows=range(8), start=start, count=3)
  assert_equal(started, skipped)
  earlier = take(prepared, rows=range(8), start=start - 1, count=3)
  assert (earlier[0]["tokens"] != started[0]["tokens"]).any()


def test_starting_far_out_takes_no_time(prepared):
  begin = time.perf_counter()
  take(prepared, rows=range(8), start=10**9, count=1)
  assert time.perf_counter() - begin < 2


def test_step_is_the_state(prepared):
  data, corpus = prepared
  with loader.Loader(corpus, data, rows=[0, 1], start=4) as batches:
    assert batches.step == 4
    next(batches)
    next(batches)
    assert batches.step == 6
    ahead = next(batches)
  assert_equal(take(prepared, rows=[0, 1], start=6, count=1), [ahead])


def test_shapes(prepared):
  (batch,) = take(prepared, rows=[2, 5, 6], start=0, count=1)
  assert {array.shape for array in batch.values()} == {(3, 64)}
  assert list(batch) == ["tokens", "targets", "segments", "positions", "weights"]


def test_closing_ends_the_threads(prepared):
  data, corpus = prepared
  before = set(threading.enumerate())
  with loader.Loader(corpus, data, rows=range(8), start=0) as batches:
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
  for thread in started:
    thread.join(timeout=5)
  assert not any(thread.is_alive() for thread in started)
  del batches  # held until here, so that it was not garbage collection


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_every_held_out_byte_counts_once(prepared, batch):
  _, corpus = prepared
  lengths = corpus.tokenizer.byte_lengths()
  total = corpus.report.total("held_out")
  batches = list(loader.in_order(corpus.held_out, batch))
  assert {array.shape for b in batches for array in b.values()} == {(batch, 64)}
  weights = [b["weights"].astype(np.int64) for b in batches]
  assert sum(w.sum() for w in weights) == total.tokens
  assert total.bytes == sum(
    (lengths[b["targets"]] * w).sum() for b, w in zip(batches, weights, strict=True)
  )
  assert len(batches) == -(-total.rows // batch)


def test_held_out_rows_of_a_process(prepared):
  _, corpus = prepared
  whole = list(loader.in_order(corpus.held_out, 6))
  for rows in ([0, 1, 2], [5, 3]):
    part = list(loader.in_order(corpus.held_out, 6, rows=rows))
    assert_equal(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])


@pytest.mark.parametrize("rows", [[], [8], [-1, 0]])
def test_rows_out_of_range(prepared, rows):
  data, corpus = prepared
  with pytest.raises(InputError, match="not rows of a batch of 8"):
    loader.Loader(corpus, data, rows=rows, start=0)
  with pytest.raises(InputError, match="not rows of a batch of 8"):
    next(loader.in_order(corpus.held_out, 8, rows=rows))


def test_a_start_before_the_first_step(prepared):
  data, corpus = prepared
  with pytest.raises(InputError, match="start: -1"):
    loader.Loader(corpus, data, rows=[0], start=-1)
