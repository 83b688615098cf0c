"""Prints the GFLOP/s of a 2048 x 2048 matrix product, best of 20: `peak.py jax`."""

import sys
import time

SIZE = 2048


def best(multiply) -> float:
  multiply()
  seconds = []
  for _ in range(20):
    began = time.perf_counter()
    multiply()
    seconds.append(time.perf_counter() - began)
  return 2 * SIZE**3 / min(seconds) / 1e9


if sys.argv[1] == "jax":
  import jax
  import jax.numpy as jnp

  product = jax.jit(jnp.matmul)
  for dtype in ("float32", "bfloat16"):
    x = jnp.ones((SIZE, SIZE), dtype)
    speed = best(lambda x=x: product(x, x).block_until_ready())
    print(f"jax {jax.__version__} {dtype}: {speed:.0f} GFLOP/s")
else:
  import torch

  torch.set_num_threads(2)
  for dtype in (torch.float32, torch.bfloat16):
    x = torch.ones(SIZE, SIZE, dtype=dtype)
    speed = best(lambda x=x: torch.mm(x, x))
    print(f"torch {torch.__version__} {dtype}: {speed:.0f} GFLOP/s")
