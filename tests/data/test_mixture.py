import collections

import numpy as np
import pytest

from jaxlm.data import mixture


class Named:
  """A source whose element i is (name, i)."""

  def __init__(self, name, size):
    self.name, self.size = name, size

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    return self.name, index


def take(dataset, start, stop):
  return [dataset[index] for index in range(start, stop)]


@pytest.mark.parametrize(
  "weights", [[1.0], [3.0, 7.0], [0.1, 0.2, 0.7], [1e-3, 1, 1 / 3]]
)
def test_counts_stay_beside_the_exact_share_at_every_index(weights):
  turns = mixture.Turns(weights)
  counts = collections.Counter()
  for index in range(3000):
    source, before = turns[index]
    assert before == counts[source]
    counts[source] += 1
    for other, weight in enumerate(weights):
      share = (index + 1) * weight / sum(weights)
      assert abs(counts[other] - share) < len(weights)


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.7], [0.3, 0.7], [0.0625, 0.9375]])
def test_shares_are_exact_far_out(weights):
  turns = mixture.Turns(weights)
  far = 10**15
  seen = {}
  for index in range(far, far + 40):
    source, before = turns[index]
    seen.setdefault(source, before)
  for source, before in seen.items():
    assert abs(before - round(far * weights[source])) < 3


def test_each_epoch_holds_everything_once_in_another_order():
  dataset = mixture.mix([Named("a", 50)], [1.0], seed=3)
  epochs = [take(dataset, 50 * epoch, 50 * epoch + 50) for epoch in range(4)]
  everything = [("a", index) for index in range(50)]
  assert all(sorted(epoch) == everything for epoch in epochs)
  orders = {tuple(epoch) for epoch in [everything, *epochs]}
  assert len(orders) == 5


def test_the_order_depends_on_the_seed_and_differs_between_sources():
  def order(seed, source):
    dataset = mixture.mix([Named("a", 40), Named("b", 40)], [1.0, 1.0], seed)
    return [index for name, index in take(dataset, 0, 80) if name == source]

  orders = {tuple(order(seed, source)) for seed in range(5) for source in "ab"}
  assert len(orders) == 10
  assert order(0, "a") == order(0, "a")
  # Epoch 1 of seed 0 is not epoch 0 of seed 1.
  one = mixture.mix([Named("a", 40)], [1.0], 0)
  two = mixture.mix([Named("a", 40)], [1.0], 1)
  assert take(one, 40, 80) != take(two, 0, 40)


def test_any_index_at_any_time():
  dataset = mixture.mix([Named("a", 7), Named("b", 30)], [0.3, 0.7], seed=1)
  forward = take(dataset, 0, 200)
  indices = np.random.default_rng(0).permutation(200)
  assert [dataset[int(index)] for index in indices] == [forward[i] for i in indices]


def test_a_small_source_repeats_as_its_weight_says():
  dataset = mixture.mix([Named("a", 5), Named("b", 1000)], [1.0, 1.0], seed=0)
  seen = collections.Counter(take(dataset, 0, 400))
  assert {seen["a", index] for index in range(5)} == {40}
  assert max(seen["b", index] for index in range(1000)) == 1
