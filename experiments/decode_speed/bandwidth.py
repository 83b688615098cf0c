"""How fast this machine reads memory: BLAS's matrix-vector products over 1 GB."""

import time

import numpy as np


def main() -> None:
  matrix, vector = np.ones((2**14, 2**14), np.float32), np.ones(2**14, np.float32)
  best = 1e9
  for _ in range(15):
    began = time.perf_counter()
    matrix @ vector
    best = min(best, time.perf_counter() - began)
  print(f"best of 15: {matrix.nbytes / best / 1e9:.1f} GB/s")


if __name__ == "__main__":
  main()
