"""From text to batches whose order depends on nothing but the seed.

Read in this order, which is the order the data flows:

  sources.py     where documents come from: text, JSON lines, ArrayRecord, token ids
  tokenizers.py  all tokenizers behind one protocol, each of them lossless: bytes,
                 sentencepieces.py (given or trained) and pretrained.py (those of
                 published models); pieces.py has the bytes of their ids, controls.py
                 what the files beside them say of bos, eos and templates
  chat.py        messages to text and ids, and which of them are replies;
                 templates.py has templates by name, and the Jinja of all
  conversations.py  sources of chats, preferences, labels and steps, as token ids;
                 exchanges.py knows the shapes of their rows
  packing.py     documents cut and fitted into rows; rows into training examples
  rows.py        packed rows in files, mapped into memory
  report.py      what a corpus holds, in numbers
  spec.py        `Data`, the spec of it all
  examples.py    documents and conversations one by one, and their tokens' fields
  corpus.py      `prepare` reads, splits, encodes, packs once, into a cache that later
                 runs map into memory
  mixture.py     example i of the global order, for every i
  loader.py      the rows of a batch that one process holds; the held-out set

Nothing here imports JAX; `mixture` and `loader` import Grain.

  data = Data(
    sources=(Weighted(source=Jsonl(path="jaxlm://corpora/shakespeare.jsonl.gz")),),
    tokenizer=SentencePiece(vocab=4096), seq_len=256, batch=16)
  corpus = prepare(data, "runs/x/data")
  print(corpus.report)
  with Loader(corpus, data, rows=range(16), start=0) as batches:
    batch = next(batches)  # tokens, targets, segments, positions, weights: [16, 256]
"""
