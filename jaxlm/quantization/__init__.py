"""Weights of few bits.

formats.py  the formats as specs, and a weight in one of them

leaf = quantize(NF4(), weight, inputs=1)   # an ops/quantized.py leaf
y = einsum("BTD,DF->BTF", x, leaf.whole(x.dtype))
"""
