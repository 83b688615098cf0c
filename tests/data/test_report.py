import dataclasses

import pytest

from jaxlm.data import corpus, loader, report


def test_the_numbers_are_those_of_the_text(prepared):
  data, made = prepared
  told = made.report
  train, held_out = told.total("train"), told.total("held_out")
  kept = dict.fromkeys(corpus.HALVES, 0)
  for _, half, document in corpus.documents(data):
    kept[half] += len(document.content.encode())
  assert (train.bytes, held_out.bytes) == (kept["train"], kept["held_out"])
  assert train.documents + held_out.documents == 60
  assert train.tokens == train.bytes + train.documents  # bytes, and an end each
  weights = [
    loader.packing.examples(part.tokens_NT, part.segments_NT)["weights"].mean()
    for part in made.train[:1]
  ]
  assert told.idle(told.sources[0].train) == pytest.approx(1 - weights[0], abs=1e-6)
  text = str(told)
  assert "packed rows written in" in text
  assert f"{told.sources[1].train.documents:,} documents" in text
  assert "% of the places predict nothing" in text


def test_json_comes_back(prepared):
  _, made = prepared
  assert report.from_json(made.report.to_json()) == made.report


def test_an_empty_half_says_so(prepared):
  _, made = prepared
  empty = report.Counts(documents=0, bytes=0, tokens=0, rows=0)
  source = dataclasses.replace(made.report.sources[0], held_out=empty)
  told = dataclasses.replace(made.report, sources=(source,), reused=True)
  assert "held out  nothing" in str(told)
  assert "rows reused in" in str(told)
