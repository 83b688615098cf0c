"""Config keys, declared once and used in both directions.

A family lists `Key`s: each reads some keys of a file's config into fields of a `Shape`,
and writes them back. A key that no `Key` reads is refused by name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxlm.errors import InputError, nearest
from jaxlm.explain import check_value, field_types, members
from jaxlm.models.families.shape import Shape

Fields = dict[str, Any]
ABSENT: Any = object()


class Config:
  """A file's config while it is read; it knows what was not."""

  def __init__(
    self,
    values: Mapping[str, Any],
    file: str,
    prefix: str = "",
    above: "Config | None" = None,
  ):
    """`prefix` stands before the names in error messages; `above` holds this one."""
    self.values = values
    self.file = file
    self.last = ""
    self._prefix = prefix
    self._read: set[str] = set()
    self._above = above

  def take(self, key: str, default: Any = ABSENT) -> Any:
    """Returns a value and counts it as read.

    Raises:
      InputError: it is absent and has no default.
    """
    self._read.add(key)
    for config in (self, self._above):
      if config is not None:
        config.last = self._prefix + key
    value = self.values.get(key, default)
    if value is ABSENT:
      raise InputError(f"{self.file}: the key {self._prefix + key!r} is missing.")
    return value

  def refuse(self, key: str, why: str) -> InputError:
    """Returns the error about a key's value."""
    value = self.values.get(key)
    return InputError(f"{self.file}: {self._prefix}{key}={value!r}: {why}")

  def inside(self, key: str, default: Any = ABSENT) -> "Config | None":
    """Returns the config below a key, or None where it is null or empty."""
    value = self.take(key, default)
    if value and not isinstance(value, Mapping):
      raise self.refuse(key, "not an object with keys of its own.")
    return Config(value, self.file, f"{self._prefix}{key}.", self) if value else None

  def finish(self) -> None:
    """Raises InputError naming the keys that nothing has read."""
    unread = self.values.keys() - self._read
    if unread:
      listed = ", ".join(f"{self._prefix}{key}" for key in sorted(unread))
      hope = nearest(sorted(unread)[0], self._read)
      raise InputError(
        f"{self.file}: not known for this architecture, so the model may differ: "
        f"{listed}.{hope}"
      )


class Key(NamedTuple):
  """One or several keys of a config."""

  read: Callable[[Config], Fields]
  """Returns fields of the `Shape`."""
  write: Callable[[Shape], Fields]
  """Returns the config's keys."""


def same(theirs: str, ours: str, default: Any = ABSENT) -> Key:
  """Returns a key that holds a field as it is."""
  return Key(
    lambda config: {ours: config.take(theirs, default)},
    lambda shape: {theirs: getattr(shape, ours)},
  )


def named(names: tuple[str, ...], ours: str) -> Key:
  """Returns a key that goes by several names; the first is written."""

  def read(config: Config) -> Fields:
    given = [name for name in names if name in config.values] or [names[0]]
    return {ours: config.take(given[0])}

  return Key(read, lambda shape: {names[0]: getattr(shape, ours)})


def mapped(theirs: str, ours: str, values: Mapping[Any, Any], default: Any) -> Key:
  """Returns a key whose values {theirs: ours} are the only ones that are known."""

  def read(config: Config) -> Fields:
    value = config.take(theirs, default)
    if value not in values:
      raise config.refuse(theirs, f"known are {', '.join(map(repr, values))}.")
    return {ours: values[value]}

  def write(shape: Shape) -> Fields:
    field = getattr(shape, ours)
    for value, known in values.items():
      if known == field:
        return {theirs: value}
    raise InputError(f"{ours}: {theirs} has no word for {field!r}.")

  return Key(read, write)


def fixed(theirs: str, *accepted: Any, default: Any = ABSENT) -> Key:
  """Returns a key that must hold one of some values; the first is written."""

  def read(config: Config) -> Fields:
    if config.take(theirs, default) not in accepted:
      raise config.refuse(theirs, f"only {' or '.join(map(repr, accepted))} is built.")
    return {}

  return Key(read, lambda shape: {theirs: accepted[0]})


def idle(*names: str) -> Key:
  """Returns keys that change nothing in what a model computes; they are not written."""

  def read(config: Config) -> Fields:
    for name in names:
      config.take(name, None)
    return {}

  return Key(read, lambda shape: {})


def always(**fields: Any) -> Key:
  """Returns fields that an architecture always has, without a key."""
  return Key(lambda config: fields, lambda shape: {})


def inverse_square(theirs: str, ours: str, default: Any = ABSENT) -> Key:
  """Returns a key that holds the field to the power of -2, as whole as it was."""

  def write(shape: Shape) -> Fields:
    if getattr(shape, ours) is None:
      raise InputError(f"{ours}: {theirs} needs a number.")
    value = getattr(shape, ours) ** -2
    near = round(value)
    return {theirs: near if near**-0.5 == getattr(shape, ours) else value}

  return Key(lambda config: {ours: config.take(theirs, default) ** -0.5}, write)


def read_shape(keys: Iterable[Key], config: Config) -> Shape:
  """Returns the shape that a config describes.

  Raises:
    InputError: a key is missing, unknown, or has a value that is not built.
  """
  fields: Fields = {}
  try:
    for key in keys:
      fields |= key.read(config)
  except InputError:
    raise
  except (TypeError, ValueError, ArithmeticError) as error:
    raise InputError(
      f"{config.file}: the value of {config.last!r}, or one before it, is of another "
      f"kind than it should be ({str(error).strip().splitlines()[0]})."
    ) from error
  config.finish()
  try:
    for name, hint in field_types(Shape).items():
      if name in fields:
        check_value(fields[name], hint, at=name)
        if type(fields[name]) is int and int not in members(hint):
          fields[name] = float(fields[name])
  except InputError as error:
    raise InputError(f"{config.file}: {error}.") from error
  return Shape(**fields)


def write_shape(keys: Iterable[Key], shape: Shape) -> Fields:
  """Returns the config that `read_shape` reads."""
  values: Fields = {}
  for key in keys:
    values |= key.write(shape)
  return values


def windows(
  known: Callable[[Config, int], tuple[bool, ...]], default: int | None = None
) -> Key:
  """Returns the keys that say which layers have a window, by type or by rule.

  `known(config, layers)` gives the rule where `layer_types` does not stand, `default`
  the window where it is not told.
  """

  def read(config: Config) -> Fields:
    layers = config.take("num_hidden_layers")
    local = known(config, layers)
    types = config.take("layer_types", None)
    if types is not None:
      local = tuple(kind == "sliding_attention" for kind in types)
      wrong = set(types) - {"sliding_attention", "full_attention"}
      if wrong or len(types) != layers:
        raise config.refuse(
          "layer_types",
          f"give one of sliding_attention and full_attention for each of {layers} "
          "layers.",
        )
    window = config.take("sliding_window", default)
    window = window if any(local) else None
    mixed = any(local) and not all(local)
    return {"window": window, "local": local if mixed and window else None}

  def write(shape: Shape) -> Fields:
    local = shape.local or (shape.window is not None,) * shape.layers
    names = ("full_attention", "sliding_attention")
    return {
      "sliding_window": shape.window,
      "layer_types": [names[windowed] for windowed in local],
    }

  return Key(read, write)
