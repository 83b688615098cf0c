import jax
import pytest


@pytest.fixture(autouse=True)
def lenient_dtypes():
  """Optax promotes dtypes freely."""
  with jax.numpy_dtype_promotion("standard"):
    yield
