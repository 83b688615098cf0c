"""Looks at configs: their fields' types, checks, differences, and the whole listing.

`config.py` makes configs and leans on this file for the types and for its words.
"""

import ast
import dataclasses
import enum
import functools
import importlib
import inspect
import operator
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from jaxlm.errors import InputError, nearest

WIDTH = 100
_VALUE_WIDTH = 44
_SCALARS = (str, int, float, bool, types.NoneType)


def members(hint: Any) -> tuple[Any, ...]:
  """Returns the members of a union, or the type alone."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def is_config(value: Any) -> bool:
  """Whether a value is an instance of a dataclass."""
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def readable(hint: Any) -> str:
  """Returns a type as a reader would write it: "'a' | 'b'", "tuple[int, ...]"."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is types.NoneType:
    return "None"
  if hint is Ellipsis:
    return "..."
  if origin is typing.Literal:
    return " | ".join(map(repr, args))
  if len(members(hint)) > 1:
    return " | ".join(map(readable, args))
  if origin is tuple:
    return f"tuple[{', '.join(map(readable, args)) or '()'}]"
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    return f"{hint.__name__}({' | '.join(hint.__members__)})"
  return hint.__name__ if isinstance(hint, type) and not args else str(hint)


def show(value: Any) -> str:
  """Returns a value in the syntax of overrides: AdamW(lr=0.1), (8, 1), RED."""
  if isinstance(value, enum.Enum):
    return value.name
  if is_config(value):
    fields = [f for f in dataclasses.fields(value) if f.init]
    inside = ", ".join(f"{f.name}={show(getattr(value, f.name))}" for f in fields)
    return f"{type(value).__name__}({inside})"
  if isinstance(value, tuple):
    return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
  return repr(value)


def check(config: Any) -> None:
  """Checks every field of a config, nested ones too, against its annotation.

  An int may stand where a float is annotated.

  Raises:
    InputError: a value of another type, with its path; a dataclass that is not frozen;
      an annotation that configs do not support.
  """
  if not is_config(config):
    raise InputError(
      f"a config is a frozen dataclass, but this is a {type(config).__name__}: "
      f"{_brief(config)}"
    )
  check_value(config, type(config), at="")


def check_value(value: Any, hint: Any, *, at: str) -> None:
  """Checks one value, and what it holds, against a type; `at` is its path."""
  problems = []
  for option in fitting(value, hint):
    try:
      return _check_inside(value, option, at=at)
    except InputError as error:
      problems.append(error)
  if problems:
    raise problems[0]
  raise InputError(
    f"{at}: {_brief(value)} is a {type(value).__name__}; the field takes "
    f"{readable(hint)}"
  )


def _check_inside(value: Any, option: Any, *, at: str) -> None:
  if isinstance(value, tuple):
    inside = elements(option, len(value))
    if inside is None:
      raise InputError(
        f"{at}: {_brief(value)} has {len(value)} elements; the field takes "
        f"{readable(option)}"
      )
    for index, (element, hint) in enumerate(zip(value, inside, strict=True)):
      check_value(element, hint, at=join(at, index))
  elif is_config(value):
    if not type(value).__dataclass_params__.frozen:
      raise InputError(
        f"{at or 'config'}: {type(value).__name__} is not frozen; declare it with "
        "@dataclass(frozen=True, kw_only=True)"
      )
    for name, hint in field_types(type(value)).items():
      check_value(getattr(value, name), hint, at=join(at, name))


def fitting(value: Any, hint: Any) -> list[Any]:
  """Returns the members of a type that a value belongs to, what it holds aside."""

  def fits(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
      return any(
        type(value) is type(word) and value == word for word in typing.get_args(kind)
      )
    if typing.get_origin(kind) is tuple:
      return isinstance(value, tuple)
    if isinstance(value, bool):
      return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)

  return [kind for kind in members(hint) if fits(kind)]


def elements(kind: Any, count: int) -> tuple[Any, ...] | None:
  """Returns the types of a tuple's elements, or None if `count` is not its length."""
  inside = typing.get_args(kind)
  if inside[1:] == (Ellipsis,):
    return inside[:1] * count
  return inside if len(inside) == count else None


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
  """Returns {field: type} of what a dataclass's constructor takes.

  Raises:
    InputError: an annotation that configs do not support.
  """
  hints = typing.get_type_hints(kind)
  fields = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}
  for name, hint in fields.items():
    require_supported(hint, f"the field {kind.__name__}.{name}")
  return fields


def require_supported(hint: Any, what: str) -> None:
  """Raises InputError for an annotation that configs do not support."""
  for kind in members(hint):
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
      for element in inside:
        if element is not Ellipsis:
          require_supported(element, what)
    elif origin is not typing.Literal and not (
      kind in _SCALARS
      or dataclasses.is_dataclass(kind)
      or (isinstance(kind, type) and issubclass(kind, enum.Enum))
    ):
      raise InputError(
        f"{what} is annotated {readable(hint)}; configs support str, int, float, bool, "
        "None, Literal, enums, dataclasses, tuples with element types, and unions"
      )


def spellings(hint: Any) -> list[str]:
  """Returns the fixed words that a value of a type may be written as."""
  words = [kind.__name__ for kind in member_dataclasses(hint)]
  for kind in members(hint):
    if typing.get_origin(kind) is typing.Literal:
      words += map(str, typing.get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
      words += kind.__members__
  return words


def member_dataclasses(hint: Any) -> list[type]:
  """Returns the members of a union that are dataclasses."""
  return [
    k for k in members(hint) if isinstance(k, type) and dataclasses.is_dataclass(k)
  ]


def required_fields(kind: type) -> list[str]:
  """Returns the fields of a dataclass that have no default."""
  none = (dataclasses.MISSING, dataclasses.MISSING)
  fields = [field for field in dataclasses.fields(kind) if field.init]
  return [f.name for f in fields if (f.default, f.default_factory) == none]


def unknown_name(
  name: str, hints: dict[str, Any], *, owner: str, at: str
) -> InputError:
  """Returns the error for a field or argument that `owner` does not have."""
  return InputError(
    f"{at}: {owner} has no {name!r}; it takes {listing(hints, hints) or 'nothing'}."
    f"{nearest(name, hints)}"
  )


def find_type(name: str) -> Any:
  """Returns the class that "module:Class" names, or None."""
  if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name):
    return None
  module, _, path = name.partition(":")
  try:
    return operator.attrgetter(path)(importlib.import_module(module))
  except (ImportError, AttributeError):
    return None


def saved_name(kind: type, *, at: str) -> str:
  """Returns "module:Class"; refuses a class that another process cannot import."""
  name = f"{kind.__module__}:{kind.__qualname__}"
  if kind.__module__ == "__main__" or find_type(name) is not kind:
    raise InputError(
      f"{at or 'config'}: {name} cannot be imported by another process, so the config "
      "cannot be saved. Move the class from the config file (or function) to a module"
    )
  return name


def listing(hints: dict[str, Any], names: Iterable[str]) -> str:
  """Returns 'name: type, name: type'."""
  return ", ".join(f"{name}: {readable(hints[name])}" for name in names)


def _brief(value: Any) -> str:
  text = show(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def differences(a: Any, b: Any) -> list[str]:
  """Returns a line for each leaf that differs: "optimizer.lr.peak: 0.001 -> 0.0001".

  Where the dataclass itself differs the line names both types, and where a tuple's
  length differs, both lengths; what the two have in common is compared further.
  """
  return list(_differences(a, b, at=""))


def _differences(a: Any, b: Any, *, at: str) -> Iterator[str]:
  if is_config(a) and is_config(b):
    if type(a) is not type(b):
      yield f"{at or 'config'}: {' -> '.join(_class_names(type(a), type(b)))}"
      return
    for field in dataclasses.fields(a):
      if field.init:
        x, y = getattr(a, field.name), getattr(b, field.name)
        yield from _differences(x, y, at=join(at, field.name))
  elif isinstance(a, tuple) and isinstance(b, tuple) and _nested(a + b):
    if len(a) != len(b):
      yield f"{at}: {len(a)} elements -> {len(b)} elements"
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
      yield from _differences(x, y, at=join(at, index))
  elif not _same(a, b):
    yield f"{at or 'config'}: {show(a)} -> {show(b)}"


def _class_names(a: type, b: type) -> tuple[str, str]:
  if a.__name__ != b.__name__:
    return a.__name__, b.__name__
  return f"{a.__module__}:{a.__qualname__}", f"{b.__module__}:{b.__qualname__}"


def _same(a: Any, b: Any) -> bool:
  """Whether two leaves are equal: 1 is 1.0 but not True, and nan is nan."""
  if isinstance(a, tuple) and isinstance(b, tuple):
    return len(a) == len(b) and all(map(_same, a, b))
  equal = a == b and isinstance(a, bool) == isinstance(b, bool)
  return equal or show(a) == show(b)


def _nested(value: Any) -> bool:
  """Whether a value is or holds a dataclass."""
  return is_config(value) or (isinstance(value, tuple) and any(map(_nested, value)))


def join(at: str, key: str | int) -> str:
  """Returns the path of what is under `at`."""
  return f"{at}.{key}" if at else str(key)


def explain(config: Any) -> str:
  """Returns the resolved config, a field a line: path = value  (type)  doc.

  The doc is the string literal under the field in its class (the first paragraph); a
  nested dataclass shows the first line of its docstring below its path.
  """
  summary = _class_docs(type(config))[0]
  head = f"{type(config).__name__}{': ' * bool(summary)}{summary}"
  return "\n".join([*_wrap(head, depth=0), *_fields(config, at="", depth=1)])


def _fields(config: Any, *, at: str, depth: int) -> Iterator[str]:
  kind = type(config)
  docs = dict.fromkeys(field_types(kind), "")
  for base in reversed(kind.__mro__):
    docs |= _class_docs(base)[1]
  for name, hint in field_types(kind).items():
    value, note, path = getattr(config, name), f"({readable(hint)})", join(at, name)
    yield from _entry(value, note, doc=docs[name], at=path, depth=depth)


def _entry(value: Any, note: str, *, doc: str, at: str, depth: int) -> Iterator[str]:
  if is_config(value):
    summary = _class_docs(type(value))[0]
    yield from _row(f"{at} = {type(value).__name__}", note, doc=doc, depth=depth)
    yield from _wrap(summary, depth=depth + 1)
    yield from _fields(value, at=at, depth=depth + 1)
  elif _nested(value):
    count = f"{len(value)} element{'s' * (len(value) > 1)}"
    yield from _row(f"{at} = {count}", note, doc=doc, depth=depth)
    for index, element in enumerate(value):
      yield from _entry(element, "", doc="", at=join(at, index), depth=depth + 1)
  else:
    yield from _row(f"{at} = {show(value)}", note, doc=doc, depth=depth)


def _row(text: str, note: str, *, doc: str, depth: int) -> list[str]:
  line = f"{'  ' * depth + text:<{_VALUE_WIDTH}}  {note}".rstrip()
  if doc and len(line) + 2 + len(doc) <= WIDTH:
    return [f"{line}  {doc}"]
  hang = "  " * depth + "      "
  lines = [line]
  if len(line) > WIDTH:
    first = "  " * depth
    lines = textwrap.wrap(
      f"{text}  {note}", WIDTH, initial_indent=first, subsequent_indent=hang
    )
  return lines + textwrap.wrap(doc, WIDTH, initial_indent=hang, subsequent_indent=hang)


def _wrap(text: str, *, depth: int) -> list[str]:
  indent = "  " * depth
  return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


@functools.cache
def _class_docs(kind: type) -> tuple[str, dict[str, str]]:
  """Returns the first docstring line of a class, and {field: doc} of its own body."""
  try:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
  except (OSError, TypeError, SyntaxError):
    return "", {}
  [node] = tree.body
  if not isinstance(node, ast.ClassDef):
    return "", {}
  summary = (ast.get_docstring(node) or "").partition("\n")[0]
  docs = {}
  for field, after in zip(node.body, node.body[1:], strict=False):
    if (
      isinstance(field, ast.AnnAssign)
      and isinstance(field.target, ast.Name)
      and isinstance(after, ast.Expr)
      and isinstance(after.value, ast.Constant)
      and isinstance(after.value.value, str)
    ):
      paragraph = inspect.cleandoc(after.value.value).partition("\n\n")[0]
      docs[field.target.id] = " ".join(paragraph.split())
  return summary, docs
