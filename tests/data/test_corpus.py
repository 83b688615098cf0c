import dataclasses
import errno
import io
import itertools
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sentencepiece

from jaxlm.data import corpus, examples, loader, rows, sources, tokenizers
from jaxlm.data.spec import Weighted
from jaxlm.errors import InputError

TEXTS = [f"document {index}, " + "word " * (index % 17) for index in range(200)]


def documents_of(prepared, half):
  """Returns the texts that are whole in one row, from rows of bytes."""
  found = []
  for part in vars(prepared)[half]:
    for row in (part[i] for i in range(len(part))):
      tokens, segments = row["tokens"], row["segments"]
      for segment in range(1, segments.max() + 1):
        ids = tokens[segments == segment].tolist()
        assert (ids[0], ids[-1]) == (256, 257)
        found.append(prepared.tokenizer.decode(ids))
  return found


def only(folder):
  (place,) = pathlib.Path(folder).iterdir()
  return place


def test_every_document_is_on_one_side(jsonl, spec, tmp_path):
  data = spec(jsonl("x.jsonl", TEXTS), held_out=0.2, seq_len=256)
  prepared = corpus.prepare(data, tmp_path / "cache")
  train, held_out = (documents_of(prepared, half) for half in corpus.HALVES)
  assert sorted(train + held_out) == sorted(TEXTS)
  assert not set(train) & set(held_out)
  assert 20 <= len(held_out) <= 60
  assert [half for _, half, _ in examples.documents(data)].count("train") == len(train)


def test_duplicates_fall_on_one_side(jsonl, spec, tmp_path):
  first = jsonl("x.jsonl", TEXTS)
  again = jsonl("y.jsonl", TEXTS[::-1] + TEXTS[:50])
  data = spec(first, again, held_out=0.3, seq_len=256)
  prepared = corpus.prepare(data, tmp_path / "cache")
  train, held_out = (documents_of(prepared, half) for half in corpus.HALVES)
  assert len(train) + len(held_out) == 450
  assert not set(train) & set(held_out)


def test_the_split_depends_on_content_and_seed_alone(jsonl, spec):
  def held(texts, seed):
    data = spec(jsonl("x.jsonl", texts), seed=seed)
    return {d.content for _, half, d in examples.documents(data) if half == "held_out"}

  assert held(TEXTS, 0) == held(TEXTS[::-1], 0) != held(TEXTS, 1)
  assert held(TEXTS, 0) & set(TEXTS[:90]) == held(TEXTS[:90], 0)


def test_no_held_out(jsonl, spec, tmp_path):
  data = spec(jsonl("x.jsonl", TEXTS), held_out=0.0)
  prepared = corpus.prepare(data, tmp_path / "cache")
  assert [len(part) for part in prepared.held_out] == [0]
  assert list(loader.in_order(prepared.held_out, 4)) == []
  assert prepared.report.total("train").documents == 200


def test_a_second_run_reuses_the_cache(jsonl, spec, tmp_path, monkeypatch):
  data = spec(jsonl("x.jsonl", TEXTS))
  first = corpus.prepare(data, tmp_path / "cache")
  monkeypatch.setattr(corpus, "_write", None)
  again = corpus.prepare(data, tmp_path / "cache")
  other = dataclasses.replace(data, cache=str(tmp_path / "cache"), batch=99)
  third = corpus.prepare(other, tmp_path / "unused")
  assert first.fingerprint == again.fingerprint == third.fingerprint
  assert (first.report.reused, again.report.reused) == (False, True)
  assert "reused" in str(again.report)
  assert isinstance(again.train[0].tokens_NT, np.memmap)
  assert again.train[0].tokens_NT.dtype == np.uint16
  np.testing.assert_array_equal(first.train[0].tokens_NT, again.train[0].tokens_NT)


def test_whatever_matters_makes_another_cache(jsonl, spec, tmp_path):
  def fingerprint(texts=TEXTS, **fields):
    return corpus._fingerprint(spec(jsonl("x.jsonl", texts), **fields))

  trained = tokenizers.SentencePiece(vocab=300)
  prints = [
    fingerprint(),
    fingerprint(TEXTS[1:]),
    fingerprint(seq_len=33),
    fingerprint(held_out=0.06),
    fingerprint(seed=1),
    fingerprint(tokenizer=trained),
    fingerprint(tokenizer=dataclasses.replace(trained, vocab=301)),
    fingerprint(tokenizer=dataclasses.replace(trained, kind="bpe")),
  ]
  assert len(set(prints)) == len(prints)
  assert fingerprint() == prints[0]
  assert fingerprint(batch=77, threads=1, prefetch=9) == prints[0]


def test_another_model_under_the_same_name_makes_another_cache(jsonl, spec, tmp_path):
  model = tmp_path / "x.model"
  given = tokenizers.SentencePiece(model=str(model), vocab=300)
  data = spec(jsonl("x.jsonl", TEXTS), tokenizer=given)
  prints = set()
  for kind in ("bpe", "unigram"):
    trained = tokenizers.SentencePiece(vocab=300, kind=kind)
    made = tokenizers.build(trained, TEXTS)
    model.write_bytes(made.model)
    prepared = corpus.prepare(data, tmp_path / "cache")
    assert prepared.tokenizer.fingerprint() == made.fingerprint()
    prints.add(prepared.fingerprint)
  assert len(prints) == 2


def test_the_tokenizer_is_trained_on_training_documents_only(
  jsonl, spec, tmp_path, monkeypatch
):
  seen = []
  build = tokenizers.build
  monkeypatch.setattr(
    tokenizers, "build", lambda spec, texts: seen.extend(texts) or build(spec, texts)
  )
  trained = tokenizers.SentencePiece(vocab=300)
  data = spec(jsonl("x.jsonl", TEXTS), tokenizer=trained, held_out=0.2)
  prepared = corpus.prepare(data, tmp_path / "cache")
  halves = {d.content: half for _, half, d in examples.documents(data)}
  assert sorted(seen) == sorted(text for text in halves if halves[text] == "train")
  assert (only(tmp_path / "cache") / "tokenizer.model").exists()
  assert prepared.tokenizer.vocab == 300
  again = corpus.prepare(data, tmp_path / "cache")
  assert again.tokenizer.fingerprint() == prepared.tokenizer.fingerprint()


def test_the_training_sample_is_bounded_and_drawn_from_everywhere(jsonl, spec):
  trained = tokenizers.SentencePiece(vocab=300, train_bytes=2000)
  data = spec(jsonl("x.jsonl", TEXTS), tokenizer=trained)
  sample, size = corpus._scan(data, None)
  assert size == sum(map(len, TEXTS))
  assert 2000 <= sum(map(len, sample)) < 2200
  places = [TEXTS.index(text) for text in sample]
  assert min(places) < 50
  assert max(places) > 150
  backwards = spec(jsonl("y.jsonl", TEXTS[::-1]), tokenizer=trained)
  assert corpus._scan(backwards, None)[0] == sample


def test_token_ids_skip_the_tokenizer(jsonl, spec, tmp_path):
  file = tmp_path / "x.bin"
  file.write_bytes(
    b"".join(np.array([*t.encode(), 999], "<u2").tobytes() for t in TEXTS)
  )
  source = sources.TokenIds(path=str(file), dtype="uint16", end=999)
  by_ids = corpus.prepare(spec(source, held_out=0.0), tmp_path / "ids")
  data = spec(jsonl("x.jsonl", TEXTS), held_out=0.0)
  by_text = corpus.prepare(data, tmp_path / "text")
  np.testing.assert_array_equal(by_ids.train[0].tokens_NT, by_text.train[0].tokens_NT)
  assert by_ids.report.total("train") == by_text.report.total("train")


def test_a_wide_vocabulary_takes_four_bytes(jsonl, spec, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizers.ByteTokenizer, "vocab", 2**16 + 1)
  data = spec(jsonl("x.jsonl", TEXTS))
  prepared = corpus.prepare(data, tmp_path / "cache")
  assert prepared.train[0].tokens_NT.dtype == np.uint32


def test_a_killed_preparation_is_never_used(jsonl, spec, tmp_path):
  source = jsonl("x.jsonl", TEXTS)
  program = f"""
    import os, signal
    from jaxlm.data import corpus, rows, sources, tokenizers
    from jaxlm.data.spec import Data, Weighted
    pack, packed = rows.Writer.pack, []
    def pack_one(self, seq_len, **options):
      if packed:
        os.kill(os.getpid(), signal.SIGKILL)
      packed.append(pack(self, seq_len, **options))
      return packed[0]
    rows.Writer.pack = pack_one
    source = sources.Jsonl(path={source.path!r})
    data = Data(sources=(Weighted(source=source),), seq_len=32, batch=4,
                       tokenizer=tokenizers.Bytes())
    corpus.prepare(data, {str(tmp_path / "cache")!r})
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
  assert done.returncode == -signal.SIGKILL
  left = only(tmp_path / "cache")
  assert left.suffix == ".tmp"
  assert (left / "0.train.tokens.npy").exists()
  prepared = corpus.prepare(spec(source), tmp_path / "cache")
  clean = corpus.prepare(spec(source), tmp_path / "clean")
  assert not prepared.report.reused
  assert prepared.fingerprint == clean.fingerprint
  np.testing.assert_array_equal(prepared.train[0].tokens_NT, clean.train[0].tokens_NT)


def test_a_failed_preparation_leaves_nothing(jsonl, spec, tmp_path, monkeypatch):
  monkeypatch.setattr(rows.Writer, "pack", lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    corpus.prepare(spec(jsonl("x.jsonl", TEXTS)), tmp_path / "cache")
  assert not list((tmp_path / "cache").iterdir())


def test_two_preparations_at_once(jsonl, spec, tmp_path, monkeypatch):
  """Another process finishes the same cache while this one works."""
  data, build, inner = spec(jsonl("x.jsonl", TEXTS)), tokenizers.build, []

  def build_late(spec, texts):
    if not inner:
      inner.append(None)
      inner.append(corpus.prepare(data, tmp_path / "cache"))
    return build(spec, texts)

  monkeypatch.setattr(tokenizers, "build", build_late)
  outer = corpus.prepare(data, tmp_path / "cache")
  assert outer.fingerprint == inner[1].fingerprint == only(tmp_path / "cache").name
  np.testing.assert_array_equal(outer.train[0].tokens_NT, inner[1].train[0].tokens_NT)


@pytest.mark.parametrize(
  "file", ["report.json", "0.train.tokens.npy", "0.held_out.segments.npy"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "junk"])
def test_a_damaged_cache(jsonl, spec, tmp_path, file, damage):
  data = spec(jsonl("x.jsonl", TEXTS))
  corpus.prepare(data, tmp_path / "cache")
  place = only(tmp_path / "cache")
  content = (place / file).read_bytes()
  (place / file).unlink()
  if damage != "missing":
    (place / file).write_bytes(content[:-20] if damage == "cut" else b"{}")
  with pytest.raises(InputError, match=rf"cache: .*{place.name} is damaged.*Delete"):
    corpus.prepare(data, tmp_path / "cache")


def test_a_full_disk(jsonl, spec, tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(rows.packing, "rows", lambda *_, **__: map(refuse, [0]))
  with pytest.raises(InputError, match=r"data\.cache: .*cache is full \(No space"):
    corpus.prepare(spec(jsonl("x.jsonl", TEXTS)), tmp_path / "cache")
  assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be(jsonl, spec, tmp_path):
  data = spec(jsonl("x.jsonl", TEXTS))
  with pytest.raises(InputError, match=r"data\.cache: gs://b/x is remote"):
    corpus.prepare(data, "gs://b/x")
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"data\.cache: cannot make .*file/cache"):
    corpus.prepare(data, tmp_path / "file/cache")


def test_nothing_is_held_out(jsonl, spec, tmp_path):
  data = spec(jsonl("x.jsonl", TEXTS[:3]), held_out=0.001)
  with pytest.raises(InputError, match=r"data\.held_out: 0\.001 of 3 documents"):
    corpus.prepare(data, tmp_path / "cache")


def test_everything_is_held_out(jsonl, spec, tmp_path):
  data = spec(jsonl("x.jsonl", TEXTS), jsonl("y.jsonl", TEXTS[:1]), held_out=0.999)
  with pytest.raises(InputError, match=r"sources\.1\.source\.path: all 1 .*y\.jsonl"):
    corpus.prepare(data, tmp_path / "cache")


def test_a_lossy_model_is_refused(jsonl, spec, tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, minloglevel=2
  )
  (tmp_path / "x.model").write_bytes(model.getvalue())
  given = tokenizers.SentencePiece(model=f"{tmp_path}/x.model", vocab=40)
  data = spec(jsonl("x.jsonl", TEXTS), tokenizer=given)
  with pytest.raises(InputError, match=r"data\.tokenizer: .*lossy: .*x\.jsonl, line"):
    corpus.prepare(data, tmp_path / "cache")


def test_bad_sources_say_where(jsonl, spec, tmp_path):
  good = jsonl("x.jsonl", TEXTS)
  for bad, told in (
    (
      sources.Jsonl(path=f"{tmp_path}/none"),
      r"data\.sources\.1\.source\.path: no file",
    ),
    (jsonl("e.jsonl", []), r"data\.sources\.1\.source\.path: no document in .*e\.json"),
    (sources.Jsonl(path=good.path, field="txt"), r"x\.jsonl, line 1: .*mean 'text'"),
  ):
    with pytest.raises(InputError, match=told):
      corpus.prepare(spec(good, bad), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"seq_len": 0}, "data.seq_len: 0"),
    ({"batch": 0}, "data.batch: 0"),
    ({"threads": 0}, "data.threads: 0"),
    ({"prefetch": 1}, "data.prefetch: 1 is below data.threads=2"),
    ({"held_out": 1.0}, "data.held_out: 1.0"),
    ({"held_out": -0.1}, "data.held_out: -0.1"),
    ({"seed": -1}, "data.seed: -1"),
    ({"seed": 2**32}, "data.seed: 4294967296"),
    ({"sources": ()}, "data.sources: empty"),
  ],
)
def test_spec_names_the_field(spec, fields, told):
  data = spec(sources.Jsonl(path="x"))
  with pytest.raises(InputError, match=told):
    dataclasses.replace(data, **fields)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_positive(weight):
  with pytest.raises(InputError, match="weight"):
    Weighted(source=sources.Jsonl(path="x"), weight=weight)


def test_token_ids_need_the_model_that_made_them(spec):
  source = sources.TokenIds(path="x.bin", dtype="uint16", end=0)
  with pytest.raises(InputError, match=r"tokenizer\.model: none, but data\.sources\.0"):
    spec(source, tokenizer=tokenizers.SentencePiece())


def test_mixture_weights_hold_in_batches(prepared):
  """Scenes of the two files share no row, so a row tells its source."""
  data, made = prepared
  of_row = {
    part.tokens_NT[i].tobytes(): source
    for source, part in enumerate(made.train)
    for i in range(len(part))
  }
  one = loader.mixture.mix(made.train, made.weights, data.seed)
  counts = [0, 0]
  for index in range(400):
    counts[of_row[one[index]["tokens"].tobytes()]] += 1
  assert counts == [300, 100]


def test_nothing_here_imports_jax_before_grain_does():
  program = """
    import sys
    from jaxlm.data import corpus, packing, report, rows, sources, tokenizers
    assert not {"jax", "grain", "tensorflow"} & set(sys.modules)
  """
  subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_progress_shows_on_a_terminal_alone(jsonl, spec, tmp_path, capsys, monkeypatch):
  source = jsonl("x.jsonl", TEXTS)
  corpus.prepare(spec(source), tmp_path / "quiet")
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(corpus, "_PROGRESS_BYTES", 0)
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  corpus.prepare(spec(source), tmp_path / "loud")
  assert "tokenize: 100%" in capsys.readouterr().err


def test_the_whole_path_on_real_text(plays, jsonl, spec, tmp_path):
  """Text, trained tokenizer, rows, batches, and the text back from the batches."""
  trained = tokenizers.SentencePiece(vocab=600, train_bytes=50_000)
  data = spec(jsonl("x.jsonl", plays[:12]), tokenizer=trained, seq_len=48, held_out=0.2)
  prepared = corpus.prepare(data, tmp_path / "cache")
  with loader.Loader(prepared, data, rows=range(4), start=0) as batches:
    seen = list(itertools.islice(batches, 20))
  everything = "".join(plays[:12])
  held_out = [
    d.content for _, half, d in examples.documents(data) if half == "held_out"
  ]
  for batch in seen:
    for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
      for segment in range(1, segments.max() + 1):
        text = prepared.tokenizer.decode(tokens[segments == segment].tolist())
        assert text.strip("\ufffd") in everything
        assert len(text) < 40 or not any(text in other for other in held_out)
