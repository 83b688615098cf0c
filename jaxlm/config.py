"""Configs: load, override, check and save frozen dataclasses.

A config is a run: a file has a typed `get_config(*, size: Literal["1b", "8b"] = "1b")`
that returns one frozen keyword-only dataclass.

  cfg = load("configs/llama3.py:size=8b,seq_len=4096")
  cfg = override(cfg, ["optimizer=Muon(lr=1e-3)", "model.pattern.0.mixer.window=none"])

Values are read by the annotated type: 1_000 or 1e3 for an int, none, true, an enum by
name, a tuple as 8,1 or (8,1), a dataclass as Name or Name(field=value,...). Quotes are
needed only around a string with a comma or a bracket inside a tuple or a Name(...).
A config file reuses another through `load` with the path beside its own `__file__`.
"""

import contextlib
import dataclasses
import decimal
import enum
import inspect
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from jaxlm import explain as kinds
from jaxlm.errors import InputError, nearest

T = TypeVar("T")

check, differences, explain = kinds.check, kinds.differences, kinds.explain

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_loads = itertools.count(1)


def load(spec: str) -> Any:
  """Returns what `get_config` of "path/to/file.py:name=value,..." returns, checked.

  Raises:
    InputError: no such file, a syntax error in it, no `get_config`, a wrong, unknown
      or missing argument, or a result with a field of the wrong type. What the file
      itself raises passes through with its traceback.
  """
  parts = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec, re.DOTALL)
  if not parts:
    example = "configs/llama3.py or configs/llama3.py:size=8b,seq_len=4096"
    raise InputError(f"config {spec!r}: give a Python file, such as {example}")
  file, text = Path(parts[1]), parts[2] or ""
  module = _run_file(file)
  if "get_config" not in vars(module):
    raise InputError(f"{file}: has no function get_config(...) that returns a run")
  config = module.get_config(**_arguments(module.get_config, text, file=file))
  try:
    check(config)
  except InputError as error:
    raise InputError(f"{file}: get_config returned a wrong config: {error}") from error
  return config


def _run_file(file: Path) -> types.ModuleType:
  """Runs a config file as a fresh module, whose name no import statement can write."""
  try:
    code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
  except OSError as error:
    hope = nearest(file.name, [path.name for path in file.parent.glob("*.py")])
    why = f"{error.strerror}, from {Path.cwd()}"
    raise InputError(f"cannot read the config file {file}: {why}.{hope}") from error
  except SyntaxError as error:
    raise InputError(f"{file}, line {error.lineno}: {error.msg}") from error
  name = f"<config {next(_loads)}: {file}>"
  module = types.ModuleType(name)
  module.__file__ = str(file)
  sys.modules[name] = module  # where dataclasses and get_type_hints look
  exec(code, vars(module))
  return module


def _arguments(get_config: Any, text: str, *, file: Path) -> dict[str, Any]:
  hints = typing.get_type_hints(get_config)
  accepted, required = {}, []
  for name, argument in inspect.signature(get_config).parameters.items():
    if argument.kind in (argument.KEYWORD_ONLY, argument.POSITIONAL_OR_KEYWORD):
      if name not in hints:
        raise InputError(f"{file}: the argument {name!r} of get_config has no type")
      kinds.require_supported(
        hints[name], f"{file}: the argument {name!r} of get_config"
      )
      accepted[name] = hints[name]
      if argument.default is argument.empty:
        required.append(name)
  try:
    given = _read_named(text, accepted, owner="get_config", at="")
  except InputError as error:
    raise InputError(f"{file}: {error}") from error
  if missing := [name for name in required if name not in given]:
    needed = kinds.listing(accepted, missing)
    example = ",".join(f"{name}=..." for name in missing)
    raise InputError(f"{file}: get_config needs {needed}. Write {file}:{example}")
  return given


def override(config: T, overrides: Iterable[str]) -> T:
  """Returns the config with "path.to.field=value" applied in order, then checked.

  Each override runs the `__post_init__` of the dataclasses along its path; values that
  `get_config` derived from others are not derived anew.

  Raises:
    InputError: unknown field, index out of range, a value that is not of the field's
      type, a path through None, or a value that a `__post_init__` refuses.
  """
  check(config)
  for item in overrides:
    path, equals, text = item.partition("=")
    if not equals:
      raise InputError(f"override {item!r} has no value: write {item}=value")
    config = _replace(config, path.split("."), hint=type(config), text=text, at="")
  check(config)
  return config


def _replace(node: Any, keys: list[str], *, hint: Any, text: str, at: str) -> Any:
  """Returns `node` with the value at `keys` below it read anew from `text`."""
  if not keys:
    return _read(text, hint, at=at)
  key, *rest = keys
  here = kinds.join(at, key)
  if kinds.is_config(node):
    hints = kinds.field_types(type(node))
    if key not in hints:
      raise kinds.unknown_name(key, hints, owner=type(node).__name__, at=here)
    value = getattr(node, key)
    value = _replace(value, rest, hint=hints[key], text=text, at=here)
    try:
      return dataclasses.replace(node, **{key: value})
    except ValueError as error:
      path = ".".join([here, *rest])
      raise InputError(
        f"{path}={text}: {type(node).__name__} refuses it: {error}"
      ) from error
  if isinstance(node, tuple):
    if not (key.isdecimal() and int(key) < len(node)):
      raise InputError(
        f"{here}: no such element; {at} has {len(node)} elements, numbered from 0"
      )
    options = (
      kinds.elements(option, len(node)) for option in kinds.fitting(node, hint)
    )
    inside = next(option for option in options if option is not None)[int(key)]
    value = _replace(node[int(key)], rest, hint=inside, text=text, at=here)
    return (*node[: int(key)], value, *node[int(key) + 1 :])
  if node is None and (choices := kinds.member_dataclasses(hint)):
    raise InputError(
      f"{here}: {at} is None. Set it first, for example {at}={choices[0].__name__}; "
      f"it takes {kinds.readable(hint)}"
    )
  raise InputError(
    f"{here}: {at} is {kinds.show(node)} ({kinds.readable(hint)}), without fields"
  )


def _read(text: str, hint: Any, *, at: str) -> Any:
  """Reads a value by its type."""
  options = kinds.members(hint)
  if types.NoneType in options and text.strip().lower() == "none":
    return None
  call = re.fullmatch(r"\s*([^\W\d]\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
  for kind in kinds.member_dataclasses(hint):
    if call and call[1] == kind.__name__:
      return _read_dataclass(call[2] or "", kind, at=at)
  some = [kind for kind in options if kind is not types.NoneType]
  if len(some) == 1 and typing.get_origin(some[0]) is tuple:
    return _read_tuple(text, some[0], at=at)
  for kind in sorted(some, key=lambda kind: kind is str):  # str last: it takes all
    with contextlib.suppress(ValueError):
      return _read_option(text, kind, at=at)
  hope = nearest(text, kinds.spellings(hint))
  raise InputError(f"{at}: cannot read {text!r} as {kinds.readable(hint)}.{hope}")


def _read_option(text: str, kind: Any, *, at: str) -> Any:
  """Reads one member of a union; a ValueError says that the text is not of it."""
  bare = text.strip()
  if typing.get_origin(kind) is tuple:
    return _read_tuple(text, kind, at=at)
  if typing.get_origin(kind) is typing.Literal:
    words = {str(value): value for value in typing.get_args(kind)}
  elif kind is bool:
    bare = bare.lower()
    words = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)
  elif isinstance(kind, type) and issubclass(kind, enum.Enum):
    words = dict(kind.__members__)
  elif kind is str:
    return _unquote(text)
  elif kind is float:
    return float(bare)
  elif kind is int:
    number = decimal.Decimal(bare) if math.isfinite(float(bare)) else None
    if number is None or number != int(number):
      raise ValueError
    return int(number)
  else:
    words = {}
  if _unquote(bare) not in words:
    raise ValueError
  return words[_unquote(bare)]


def _read_tuple(text: str, kind: Any, *, at: str) -> tuple[Any, ...]:
  items = _split(text, at=at)
  inside = kinds.elements(kind, len(items))
  if inside is None:
    takes = kinds.readable(kind)
    raise InputError(f"{at}: {text!r} has {len(items)} elements; it takes {takes}")
  pairs = zip(items, inside, strict=True)
  return tuple(
    _read(item, k, at=kinds.join(at, i)) for i, (item, k) in enumerate(pairs)
  )


def _read_dataclass(text: str, kind: type, *, at: str) -> Any:
  hints = kinds.field_types(kind)
  values = _read_named(text, hints, owner=kind.__name__, at=at)
  if missing := [name for name in kinds.required_fields(kind) if name not in values]:
    word, needed = kind.__name__, kinds.listing(hints, missing)
    example = ",".join(f"{name}=..." for name in missing)
    raise InputError(f"{at}: {word} needs {needed}. Write {at}={word}({example})")
  return _construct(kind, values, at=at)


def _read_named(
  text: str, hints: dict[str, Any], *, owner: str, at: str
) -> dict[str, Any]:
  """Reads "name=value,..." by the types of the names."""
  values = {}
  for item in _split(text, at=at or "arguments", bare=True):
    name, equals, value = (part.strip() for part in item.partition("="))
    here = kinds.join(at, name)
    if not equals:
      raise InputError(f"{here}: has no value: write {name}=value")
    if name not in hints:
      raise kinds.unknown_name(name, hints, owner=owner, at=here)
    if name in values:
      raise InputError(f"{here}: given twice")
    values[name] = _read(value, hints[name], at=here)
  return values


def _split(text: str, *, at: str, bare: bool = False) -> list[str]:
  """Splits at the commas outside brackets and quotes; drops an outer pair unless bare.

  Quotes count only where an item starts, so an apostrophe in a word is a letter.
  """
  text = text.strip()
  if not bare and text[:1] + text[-1:] in ("()", "[]"):
    with contextlib.suppress(InputError):
      return _split(text[1:-1], at=at, bare=True)
  items, start, closing, quote, before = [], 0, [], "", ""
  for index, letter in enumerate(text):
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"" and before in ("", ",", "=", *_CLOSING):
      quote = letter
    elif letter in _CLOSING:
      closing.append(_CLOSING[letter])
    elif closing and letter == closing[-1]:
      closing.pop()
    elif letter in _CLOSING.values():
      closing.append("")  # never closed
    elif letter == "," and not closing:
      items.append(text[start:index].strip())
      start = index + 1
    before = letter if letter.strip() else before
  if closing or quote:
    raise InputError(
      f"{at}: brackets or quotes do not match in {text!r}; put quotes around a string "
      "that holds them"
    )
  last = text[start:].strip()
  return [*items, last] if last else items


def _unquote(text: str) -> str:
  return text[1:-1] if re.fullmatch(r"""'[^']*'|"[^"]*\"""", text) else text


def _construct(kind: type, values: dict[str, Any], *, at: str) -> Any:
  try:
    return kind(**values)
  except ValueError as error:
    raise InputError(
      f"{at or 'config'}: {kind.__name__} refuses it: {error}"
    ) from error


def to_json(config: Any) -> str:
  """Returns a config as JSON that `from_json` turns into an equal object.

  A dataclass is {"type": "module:Class", its fields}, an enum {"type": "module:Class",
  "name": ...}, a float without a JSON number {"type": "float", "value": "inf"}.

  Raises:
    InputError: what `check` refuses, or a class that another process cannot import,
      such as one defined in a config file.
  """
  check(config)
  return json.dumps(_encode(config, at=""), indent=2, allow_nan=False)


def _encode(value: Any, *, at: str) -> Any:
  if isinstance(value, enum.Enum):
    return {"type": kinds.saved_name(type(value), at=at), "name": value.name}
  if kinds.is_config(value):
    names = kinds.field_types(type(value))
    if "type" in names:
      raise InputError(
        f"{kinds.join(at, 'type')}: a field of this name cannot be saved"
      )
    fields = {
      name: _encode(getattr(value, name), at=kinds.join(at, name)) for name in names
    }
    return {"type": kinds.saved_name(type(value), at=at), **fields}
  if isinstance(value, tuple):
    return [_encode(element, at=kinds.join(at, i)) for i, element in enumerate(value)]
  if isinstance(value, float) and not math.isfinite(value):
    return {"type": "float", "value": repr(float(value))}
  return value


def from_json(text: str, *, defaults: bool = False) -> Any:
  """Returns the config that `to_json` wrote.

  A field that the JSON lacks is an error, also where the class has a default for it (a
  field added since); `defaults=True` takes the default.

  Raises:
    InputError: not JSON, an unknown class, an unknown or missing field, a value of the
      wrong type, or one that a `__post_init__` refuses; with the path.
  """
  try:
    data = json.loads(text, parse_constant=_refuse_constant)
  except json.JSONDecodeError as error:
    raise InputError(f"config: not JSON ({error})") from error
  config = _decode(data, at="", defaults=defaults)
  check(config)
  return config


def _refuse_constant(word: str) -> None:
  raise InputError(f"config: {word} is not JSON; write {{'type': 'float', ...}}")


def _decode(data: Any, *, at: str, defaults: bool) -> Any:
  if isinstance(data, list):
    return tuple(
      _decode(element, at=kinds.join(at, i), defaults=defaults)
      for i, element in enumerate(data)
    )
  if not isinstance(data, dict):
    return data
  match data:
    case {"type": "float", "value": "inf" | "-inf" | "nan" as word}:
      return float(word)
    case {"type": str(name), **fields}:
      kind = kinds.find_type(name)
    case _:
      raise InputError(f'{at or "config"}: an object without a "type": {data}')
  if isinstance(kind, enum.EnumType) and "name" in fields:
    if fields["name"] not in kind.__members__:
      raise InputError(f"{at}: {fields['name']!r} is not one of {kinds.readable(kind)}")
    return kind[fields["name"]]
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    raise InputError(f"{at or 'config'}: {name!r} is no dataclass that can be imported")
  hints = kinds.field_types(kind)
  for field in fields:
    if field not in hints:
      raise kinds.unknown_name(
        field, hints, owner=kind.__name__, at=kinds.join(at, field)
      )
  lacking = [f for f in hints if f not in fields]
  if missing := [
    f for f in lacking if not defaults or f in kinds.required_fields(kind)
  ]:
    raise InputError(
      f"{at or 'config'}: {kind.__name__} has fields that the JSON lacks: "
      f"{kinds.listing(hints, missing)}. from_json(text, defaults=True) takes defaults"
    )
  for field, value in fields.items():
    here = kinds.join(at, field)
    fields[field] = _decode(value, at=here, defaults=defaults)
    kinds.check_value(fields[field], hints[field], at=here)
  return _construct(kind, fields, at=at)
