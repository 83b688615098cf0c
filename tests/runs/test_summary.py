import dataclasses
import json

import pytest

from jaxlm.data.conversations import Labelled
from jaxlm.data.corpus import prepare
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.posttrain.kto import KTO
from jaxlm.runs.summary import describe_labels


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize(
  ("good", "bad", "undesirable", "told"),
  [
    (6, 5, 1.0, "labels: 6 good, 5 bad; weights 1.0 and 1.0"),
    (2, 6, 0.3, "labels: 2 good, 6 bad; weights 1.0 and 0.3"),
    (2, 6, 1.0, ". Good ones weigh 0.33 times the bad ones; its authors advise 1 to"),
    (3, 0, 1.0, "labels: 3 good, 0 bad; weights 1.0 and 1.0. ONE KIND ALONE"),
  ],
)
def test_labels_are_counted(kl, good, bad, undesirable, told, tmp_path):
  file = tmp_path / "x.jsonl"
  rows = [
    {"prompt": f"{i}", "completion": "a" * (1 + i % 4), "label": i < good}
    for i in range(good + bad)
  ]
  file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  data = Data(
    sources=(Weighted(source=Labelled(path=str(file), kl=kl)),),
    tokenizer=Bytes(),
    seq_len=32,
    batch=1,
    held_out=0.0,
  )
  loss = dataclasses.replace(KTO(), undesirable=undesirable)
  line = describe_labels(prepare(data, tmp_path / "rows"), data.sequences, loss)
  assert told in line
  assert ("advise" in line) == ("advise" in told)
