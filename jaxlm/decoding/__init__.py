"""From a model and prompts to text: a cache, a way to choose, one scan.

cache.py     keys and values of every layer, as a pytree shaped by the spec
sampling.py  logits -> token: temperature, top-k, top-p, greedy
generate.py  prefill, then a scan over new tokens
session.py   one row whose cache lives from turn to turn, and streams its tokens
"""
