"""Train language models with JAX and Flax Linen."""
