"""Counts what is compiled, for loops that must not compile after their first calls."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
  """The programs that were compiled while this was watching."""

  def __init__(self) -> None:
    """Starts with none."""
    self.names: list[str] = []
    self.seconds = 0.0

  def _note(self, event: str, duration_secs: float, **more: Any) -> None:
    if event == EVENT:
      self.names.append(more["fun_name"])
      self.seconds += duration_secs


@contextlib.contextmanager
def compiles() -> Iterator[Compiles]:
  """Watches what is compiled, or taken from a compile cache, inside the block."""
  seen = Compiles()
  jax.monitoring.register_event_duration_secs_listener(seen._note)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(seen._note)
