"""Pure functions on arrays; none owns a parameter.

weights.py    the one einsum and the one lookup that read parameters
quantized.py  weights of 4 and 8 bits, and how they become whole again
attention.py  scores, softmax, values: grouped heads, softcap, bias, mask
masks.py      who may attend to whom: causal, segments, windows
rope.py       rotary positions and their scalings, sinusoids, ALiBi slopes
fusion.py     where XLA's CPU compiler must not fuse
collectives.py  sums over devices of which each keeps a shard
kernels/      fused attention kernels and the choice between them
losses.py     next-token cross-entropy in chunks that never holds all logits
"""
