import dataclasses
import json
import re

import pytest

from jaxlm import config
from jaxlm.data.chat import Message, encode_chat
from jaxlm.data.corpus import prepare
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from runs import pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate") / "hf"
  pretrained.write(folder)
  return str(folder)


@pytest.fixture
def call(model, tmp_path):
  """Returns the rows that a config writes for a file of prompts."""

  def run(text, *overrides, name="in.jsonl", out="out.jsonl"):
    (tmp_path / name).write_text(text)
    place = f"prompts={tmp_path / name},out={tmp_path / out}"
    cfg = config.load(f"configs/generate.py:model={model},{place}")
    rows = config.override(cfg, ["tokens=6", "batch=2", *overrides]).run()
    written = (tmp_path / out).read_text().splitlines()
    assert [json.loads(line) for line in written] == json.loads(json.dumps(rows))
    return rows

  return run


LINES = ["Who is king?", "", "Enter the queen and all her men, with drums", "No"]
ROWS = "".join(json.dumps({"prompt": line}) + "\n" for line in LINES)


def test_rows_in_order_whatever_the_batch(call):
  wanted = call(ROWS, "samples=2")
  assert [(row["prompt"], row["sample"]) for row in wanted] == [
    (prompt, sample) for prompt in range(4) for sample in range(2)
  ]
  assert len({row["text"] for row in wanted}) > 4
  for number, batch in enumerate((1, 3, 8)):
    found = call(ROWS, "samples=2", f"batch={batch}", out=f"{number}.jsonl")
    assert [row["text"] for row in found] == [row["text"] for row in wanted]
  lines = "".join(f"{line}\n" for line in LINES)
  assert call(lines, "samples=2", name="in.txt", out="txt.jsonl") == wanted


def test_it_goes_on_where_it_was_killed(call, tmp_path, capsys):
  wanted = call(ROWS)
  whole = (tmp_path / "out.jsonl").read_text()
  cut = whole.index("\n") + 5
  (tmp_path / "out.jsonl").write_text(whole[:cut])
  found = call(ROWS, "batch=3")
  assert [row["tokens"] for row in found] == [row["tokens"] for row in wanted]
  told = capsys.readouterr().out
  assert "has 1 of 4 texts" in told
  assert "4 texts, 3 of them new" in told
  assert (tmp_path / "out.jsonl").read_text()[: cut - 5] == whole[: cut - 5]


def test_messages_go_through_the_template(call, model, monkeypatch):
  from jaxlm.runs import generate as runs

  given = []
  real = runs.Generation

  def begin(decoder, params, prompts, *rest):
    given.extend(prompts)
    return real(decoder, params, prompts, *rest)

  monkeypatch.setattr(runs, "Generation", begin)
  call(json.dumps({"messages": [{"role": "user", "content": "Who?"}]}))
  tokenizer = open_model(model).tokenizer()
  assert given == [encode_chat(tokenizer, [Message(role="user", content="Who?")])]


def test_a_constraint_and_the_likeliest_tokens(call):
  rows = call(ROWS, "constraint=Regex(pattern=(yes|no))", "top=2")
  for row in rows:
    assert re.fullmatch("yes|no", row["text"])
    assert len(row["top"]) == len(row["tokens"]) == len(row["logprobs"])
    assert all(len(place) == 2 for place in row["top"])


@pytest.mark.parametrize(
  ("text", "overrides", "says"),
  [
    ('{"text": "a"}\n', (), r"in.jsonl, line 1: needs either 'prompt' or 'messages'"),
    ('{"prompt": 3}\n', (), "line 1: prompt: 3 is no text"),
    ('{"messages": [{"role": "user"}]}\n', (), "line 1: messages: "),
    ('{"prompt": "a", "seed": 1}\n', (), r"line 1: \['seed'\] would change nothing"),
    ('{"messages": [{"role": "user", "content": 5}]}\n', (), "line 1: messages: "),
    ('{"messages": [{"role": "x", "content": "a"}]}\n', (), "line 1: messages: "),
    (ROWS, ("seed=-1",), "seed: -1 is not from 0"),
    (ROWS, ("length=12",), r"line 3: .* tokens leave room for .* of 12"),
    (ROWS, ("tokens=0",), "tokens: 0 is under 1"),
    (ROWS, ("samples=2", "sampling.temperature=0"), "greedy texts .* are all the same"),
    (ROWS, ("samples=2", "sampling.seed=1"), "all samples would be the same"),
    (ROWS, ("model.tensor=99",), "tensor: 99 of 8 devices"),
    (ROWS, ("constraint=Regex(pattern='(')",), "regex: "),
  ],
)
def test_bad_input(call, text, overrides, says):
  with pytest.raises(InputError, match=says):
    call(text, *overrides)


def test_what_was_refused_leaves_no_file(call, tmp_path):
  with pytest.raises(InputError, match="tokens leave room"):
    call(ROWS, "length=12")
  assert len(call(ROWS)) == 4


def test_an_id_is_copied(call):
  rows = call('{"id": "q7", "prompt": "a"}\n{"prompt": "b"}\n')
  assert [row.get("id") for row in rows] == ["q7", None]


def test_other_prompts_under_the_same_name_are_noticed(call):
  call(ROWS)
  with pytest.raises(InputError, match="by this config from these prompts"):
    call(ROWS.replace("queen", "knave"))


def test_another_config_s_file_stays(call, tmp_path):
  call(ROWS)
  before = (tmp_path / "out.jsonl").read_text()
  with pytest.raises(InputError, match="was not written by this config"):
    call(ROWS, "seed=1")
  assert (tmp_path / "out.jsonl").read_text() == before


def test_rows_are_chats_that_fine_tuning_reads(call, model, tmp_path):
  asked = [{"role": "user", "content": "Who?"}]
  (row,) = call(json.dumps({"messages": asked}), "chats=true")
  assert row["messages"] == [*asked, {"role": "assistant", "content": row["text"]}]
  place = f"model={model},data={tmp_path / 'out.jsonl'}"
  run = config.load(f"configs/sft.py:{place},seq_len=64")
  corpus = prepare(dataclasses.replace(run.data, held_out=0.0), tmp_path / "data")
  assert corpus.report.sources[0].train.documents == 1
  with pytest.raises(InputError, match="line 1: chats is true, and the prompt is no"):
    call(ROWS, "chats=true", out="other.jsonl")
