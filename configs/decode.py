"""How fast Llama 3 decodes: planned for chips that are not here, or timed on these.

    uv run --extra plan jaxlm --config=configs/decode.py:size=8b --plan=v5e:2x4
    uv run jaxlm --config=configs/decode.py:size=1b --config.rows=8

v5e:2x4, as compiled (32 rows of 4096 positions, all in bfloat16): peak 4.29 GB a chip;
a step reads 1.88 GB of weights and 2.15 GB of keys and values, and sends the 65 sums of
tensor parallelism; at best 5.08 ms, 6,300 tokens/s (a roofline, no measurement).

Weights are random; for a model's own texts see configs/generate.py. No --workdir.
"""

from typing import Literal

from jaxlm.models.families.llama import Size, llama
from jaxlm.runs.decode import Decode

NAMES: dict[str, Size] = {"1b": "3.2-1b", "3b": "3.2-3b", "8b": "3-8b", "70b": "3-70b"}


def get_config(*, size: Literal["1b", "3b", "8b", "70b"] = "8b") -> Decode:
  """Returns the run."""
  return Decode(model=llama(NAMES[size]))
