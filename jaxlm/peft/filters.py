"""Which parameters a choice names: presets and regexes over slash-joined names."""

import re
from collections.abc import Iterable

from jaxlm.errors import InputError, nearest

PRESETS: dict[str, str] = {
  "all-linear": r"/(mixer|mlp)/[^/_]+$",
  "attention": r"/mixer/[^/_]+$",
  "mlp": r"/mlp/[^/_]+$",
  "norms-and-biases": r"(_norm/|_bias$|/bias$)",
  "embeddings": r"^embed/",
}
"""What each preset stands for. all-linear leaves out the head."""


def chosen(field: str, wanted: tuple[str, ...], names: Iterable[str]) -> list[str]:
  """Returns the names that any of the wanted presets or regexes finds, in their order.

  Args:
    field: where the config says it, for messages.
    wanted: names of `PRESETS`, or regexes that are searched for.
    names: those of the leaves that can be chosen.

  Raises:
    InputError: a regex that is none, or that finds nothing.
  """
  names = list(names)
  found: set[str] = set()
  for word in wanted:
    try:
      pattern = re.compile(PRESETS.get(word, word))
    except re.error as error:
      raise InputError(
        f"{field}: {word!r} is neither a preset ({', '.join(PRESETS)}) nor a regex "
        f"({error})."
      ) from error
    here = {name for name in names if pattern.search(name)}
    if not here:
      raise InputError(
        f"{field}: {word!r} finds nothing among {', '.join(names)}."
        f"{nearest(word, [*PRESETS, *names])}"
      )
    found |= here
  if not found:
    raise InputError(f"{field}: nothing is chosen; give {', '.join(PRESETS)}.")
  return [name for name in names if name in found]
