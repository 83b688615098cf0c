"""Leaves by name: "layers/0/mixer/q", and ordered (regex, value) rules over names."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from jaxlm.errors import InputError
from jaxlm.shapes import PyTree

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


def name_of(path: Sequence[Any]) -> str:
  """Joins a JAX key path with slashes."""
  return "/".join(str(_key(entry)) for entry in path)


def _key(entry: Any) -> Any:
  for field in ("key", "name", "idx"):
    if hasattr(entry, field):
      return getattr(entry, field)
  return entry


def named_leaves(tree: PyTree, is_leaf: Callable | None = None) -> dict[str, Any]:
  """Returns {name: leaf} in the tree's own order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {name_of(path): leaf for path, leaf in flat}


def map_named(
  fn: Callable[..., Any],
  tree: PyTree,
  *rest: PyTree,
  is_leaf: Callable | None = None,
) -> PyTree:
  """Maps `fn(name, leaf, *leaves of rest)` over a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(name_of(path), *leaves), tree, *rest, is_leaf=is_leaf
  )


def first_match(rules: Rules[T], name: str) -> T:
  """Returns the value of the first rule whose regex is found in the name.

  Raises:
    InputError: no rule matches; end a list with (".*", value) to catch the rest.
  """
  for pattern, value in rules:
    if re.search(pattern, name):
      return value
  raise InputError(
    f"no rule matches the parameter {name!r}; the patterns are "
    f"{[pattern for pattern, _ in rules]}. Add a last rule ('.*', value)."
  )


def match(rules: Rules[T], tree: PyTree) -> PyTree:
  """Returns a tree of the values that the rules give each leaf."""
  return map_named(lambda name, _: first_match(rules, name), tree)
