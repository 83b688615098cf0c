"""Fused kernels, one a file; each equals its reference in values and gradients.

choice.py  which kernel an attention gets, and why
splash.py  TPU attention, of jax.experimental.pallas; equals `ops.attention.attend`
heads.py   which key-value heads a device needs
cudnn.py   GPU attention, of cuDNN; equals `ops.attention.attend`
"""
