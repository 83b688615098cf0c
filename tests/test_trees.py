from typing import NamedTuple

import pytest

from jaxlm import trees
from jaxlm.errors import InputError


class Pair(NamedTuple):
  left: int
  right: dict


TREE = {"layers": [{"q": 1}, {"q": 2}], "pair": Pair(3, {"x": 4})}
NAMES = ["layers/0/q", "layers/1/q", "pair/left", "pair/right/x"]


def test_leaves_by_name_in_the_tree_s_order():
  assert trees.named_leaves(TREE) == dict(zip(NAMES, (1, 2, 3, 4), strict=True))
  assert trees.named_leaves(5) == {"": 5}
  whole = trees.named_leaves(TREE, is_leaf=lambda leaf: isinstance(leaf, Pair))
  assert list(whole) == [*NAMES[:2], "pair"]


def test_map_named_gives_names_and_leaves_of_all_trees():
  seen = []

  def visit(name, leaf, other):
    seen.append((name, leaf, other))
    return leaf + other

  doubled = trees.map_named(visit, TREE, TREE)
  assert seen == [(name, i, i) for i, name in enumerate(NAMES, 1)]
  assert doubled == {"layers": [{"q": 2}, {"q": 4}], "pair": Pair(6, {"x": 8})}


def test_the_first_rule_that_matches_wins():
  rules = [(r"layers/0", "a"), (r"q$", "b"), (r".*", "c")]
  assert trees.named_leaves(trees.match(rules, TREE)) == dict(
    zip(NAMES, "abcc", strict=True)
  )
  assert trees.first_match([("^q", 1), ("q", 2)], "layers/q") == 2


def test_a_leaf_that_no_rule_matches_is_named():
  with pytest.raises(InputError, match=r"'pair/left'.*\['q\$', 'x'\].*'\.\*'"):
    trees.match([("q$", 1), ("x", 2)], TREE)
