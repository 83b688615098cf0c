"""The one exception for what a user can mend.

The command line prints its message without a traceback. A message names the field or
path, what was wrong, and what is accepted.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """A config, file, checkpoint or machine that the run cannot go on with."""


def nearest(word: str, accepted: Iterable[str]) -> str:
  """Returns ' Did you mean X?' for the closest accepted word, or an empty string."""
  close = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.5)
  return f" Did you mean {close[0]!r}?" if close else ""
