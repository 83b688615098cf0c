"""A progress bar over a model's parameters."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import tqdm

from jaxlm.models import count
from jaxlm.models.spec import LM


@contextlib.contextmanager
def bar(what: str, model: LM) -> Iterator[Callable[[int], object]]:
  """Shows a bar on a terminal; gives what is told of each tensor's elements."""
  total = count.parameters(model).total
  with tqdm.tqdm(
    total=total, desc=what, unit_scale=True, unit="", disable=not sys.stderr.isatty()
  ) as shown:
    yield shown.update
