"""Checkpoints of others: families as tables, read and written in both directions.

checkpoint.py  one way to open a model and one to write it, whatever it is kept in
names.py       rename tables: which tensor is which parameter, axis by axis
keys.py        config keys, declared once for both directions; rotary.py and
gguf_keys.py   those of rotary positions, and of GGUF's metadata
family.py      what a family declares; families/ holds them, registry.py lists them
stream.py      tensors to sharded arrays and back, one tensor at a time
hf.py          config.json and safetensors
gguf.py        GGUF files; vocabulary.py the vocabularies inside them,
               pretokenizers.py the ways these cut text into words
adapted.py     a model out of a run that trained adapters
peft_modules.py  what PEFT's folders of adapters have to do with a model
peft_read.py   adapters out of them
peft_write.py  adapters into them
own.py         jaxlm's own folder of a model
progress.py    a bar over parameters

    opened = open_model("path/to/model")
    params = opened.params(Decoder(opened.model, Precision(), layout))
"""
