"""Architectures as data, and the one decoder that runs them.

spec.py       the vocabulary: LM, Block, GQA, GLU, MLP, norms, positions; no JAX
families/     functions that return a spec at the published sizes
decoder.py    embeds, scans the blocks, norms; the only decoder
attention.py, mlp.py, norms.py, positions.py   what a block is made of
cached.py     the keys and values that attention keeps of earlier tokens
parameters.py   how a module declares a parameter: shape, axes, first values
count.py      parameters, FLOPs and cache bytes from a spec alone

    spec = llama("3.2-1b")
    decoder = Decoder(spec, Precision(), layout)
    x_BTD, _ = decoder.apply({"params": params}, tokens_BT)
"""
