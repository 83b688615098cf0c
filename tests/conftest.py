"""Eight virtual CPU devices, a compile cache, strict dtypes and ranks, checked shapes.

Optax is not written for strict dtype promotion: a test that traces an optimizer does so
under `jax.numpy_dtype_promotion("standard")`.
"""

import gc
import os
import pathlib

import jaxtyping
import pytest

CACHE = pathlib.Path(__file__).parents[1] / ".cache/jax"
# Small programs spend their time in the compiler; unoptimized code is made in half of
# it. It changes no pass over the program itself, sharding included.
QUICK = "--xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("NPROC", "64")  # jaxlm/launch/threads.py says why
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Python's lines in lowered programs, and a look at all objects every 700 new ones, are
# together a fourteenth of the time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
gc.set_threshold(100_000, 20, 50)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

# Every call in these rooms has its shapes and dtypes checked against the signatures.
jaxtyping.install_import_hook(["jaxlm.ops", "jaxlm.models"], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def forgotten():
  """Lets go of a module's programs: they hold memory maps, and Linux gives 65,530.

  A process that wants one more is aborted in the compiler.
  """
  yield
  # Not at the top: jax reads the settings above when it is imported.
  import jax

  jax.clear_caches()
