"""A chat in the terminal, through the model's own template, token by token.

    uv run jaxlm --config=configs/chat.py:model=SmolLM2-135M-Instruct.Q4_1.gguf
    uv run jaxlm --config=configs/chat.py:model=models/mine --config.sampling.top_k=40

The model is a Hugging Face folder, a .gguf file, a folder that configs/convert.py wrote
or a run's workdir. No --workdir: nothing is kept.
"""

from jaxlm.runs.chat import Chat


def get_config(*, model: str) -> Chat:
  """Returns the chat."""
  return Chat(model=model)
