"""From a model and prompts to text: a cache, a way to choose, one loop.

cache.py        keys and values of every layer, as a pytree shaped by the spec
sampling.py     what a request asks of its tokens, and a batch of requests as arrays
choice.py       logits -> token: penalties, masks, temperature, top-k, top-p and kin
prefill.py      prompts into a cache, in chunks; prefixes that rows share
generate.py     the loop over new tokens
texts.py        the text of rows: stop strings, constraints
session.py      one row whose cache lives from turn to turn, and streams its tokens
constraints.py  regular expressions and JSON schemas as masks of tokens
beam.py         beam search, best of n
proposers.py    guesses of the next tokens: a draft model, the text itself
speculative.py  such guesses, checked many at a time
unrolled.py     the layout of parameters that decodes fastest on a CPU
compiles.py     what was compiled

    decoder, params = unroll(decoder, params)
    rows = generate(decoder, params, prompts, Sampling(top_p=0.9), tokens=64)
    rows[0].tokens, rows[0].ended, rows[0].model
"""
