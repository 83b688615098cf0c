"""Converts a checkpoint between Hugging Face, GGUF and jaxlm.

    uv run jaxlm --config=configs/convert.py:source=SmolLM2.gguf,target=models/smollm2
    uv run jaxlm --config=configs/convert.py:source=models/smollm2,target=models/hf
    uv run jaxlm --config=configs/convert.py:source=runs/mine,target=mine.gguf

Without --workdir: the target is the result. It is read back, and the report says the
largest difference. What other programs make of the targets: `experiments/exports/`.
"""

from jaxlm.runs.convert import Convert


def get_config(*, source: str, target: str) -> Convert:
  """Returns the conversion."""
  return Convert(source=source, target=target)
