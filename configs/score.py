"""Scores by a reward model, written to a .jsonl file.

    uv run jaxlm --config=configs/score.py:model=runs/reward,data=in.jsonl,out=out.jsonl

The model is the workdir of a run of configs/reward_model.py. A row of the data is a
pair (`prompt`, `chosen`, `rejected`); with --config.kind=chats a chat (`messages`);
with --config.kind=steps a completion in steps. No --workdir.
"""

from jaxlm.runs.score import Score


def get_config(*, model: str, data: str, out: str) -> Score:
  """Returns the run."""
  return Score(model=model, data=data, out=out)
