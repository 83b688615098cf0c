"""Texts for the prompts of a file, written to a .jsonl file.

    uv run jaxlm --config=configs/generate.py:model=M,prompts=in.jsonl,out=out.jsonl \
      --config.tokens=64 --config.sampling.temperature=0.8 --config.samples=4
    uv run --extra constrain jaxlm \
      --config=configs/generate.py:model=M,prompts=in.txt,out=out.jsonl \
      '--config.constraint=Regex(pattern=(yes|no))'

M is a Hugging Face folder, a .gguf file, a folder that configs/convert.py wrote or a
run's workdir. A prompt is a line of a .txt file, or "prompt" or "messages" of a row of
a .jsonl file. The same command goes on where it was killed. No --workdir.
"""

from jaxlm.runs.generate import Generate
from jaxlm.runs.loaded import Pretrained


def get_config(*, model: str, prompts: str, out: str) -> Generate:
  """Returns the run."""
  return Generate(model=Pretrained(path=model), prompts=prompts, out=out)
