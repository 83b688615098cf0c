"""What a budget buys: parameters, tokens, FLOPs, time, memory, cost at your price.

    uv run jaxlm --config=configs/budget.py:flops=1e21,size=1b,chip=h100,devices=8
    uv run jaxlm --config=configs/budget.py:size=70b,tokens=1.4e12,price=PRICE
    uv run jaxlm --config=configs/budget.py:size=none,flops=5.76e23

The first prints:

    rule of 20 tokens a parameter: 2.89B parameters, 57.74B tokens
    this model: 1.24B parameters, 134.86B tokens, 109.1 a parameter
    training, FLOPs at 8192 tokens a sequence:
      all           1.000e+21   6ND, all parameters   <- counted by
      non_embedding 7.875e+20   6ND, no embedding, no head
      matrices      9.999e+20   6ND, what multiplies a token
      causal        1.217e+21   exact, keys that a query sees
      full          1.434e+21   exact, every key of a sequence
    time: 3.7 days on 8 x h100 at 40% of 989 TFLOP/s
      702 device-hours, 0.08 device-years
    state of training on a device, GB (float32, zero3; no activations):
      2.47 = parameters 0.62, gradients 0.62, moments 1.24
      leaves 77.53 of the 80.0 of one h100
    serving, GB over all devices (1 x 8192 tokens in bfloat16):
      fp16       2.74 = weights 2.47, keys and values 0.27; from 1 x h100
      int8       1.50 = weights 1.24, keys and values 0.27; from 1 x h100
      int4       0.89 = weights 0.62, keys and values 0.27; from 1 x h100

Arithmetic, nothing measured: 6ND from Kaplan et al. 2020, 20 tokens a parameter from
Hoffmann et al. 2022, state and its sharding from Rajbhandari et al. 2020, the chip's
figures from its data sheet (`jaxlm/launch/chips.py`). utilisation=0.4 is an assumption
to replace by what your own runs reach. No --workdir.
"""

from typing import Literal

from jaxlm.models.families.llama import Size, llama
from jaxlm.runs.budget import Budget

NAMES: dict[str, Size] = {"1b": "3.2-1b", "3b": "3.2-3b", "8b": "3-8b", "70b": "3-70b"}


def get_config(
  *,
  flops: float = 1e22,
  tokens: float | None = None,
  size: Literal["none", "1b", "3b", "8b", "70b"] = "8b",
  seq_len: int = 8192,
  chip: str = "h100",
  devices: int = 64,
  utilisation: float = 0.4,
  price: float | None = None,
) -> Budget:
  """Returns the run; with tokens it tells what they cost, and flops is not used."""
  return Budget(
    model=None if size == "none" else llama(NAMES[size]),
    flops=flops if tokens is None else None,
    tokens=tokens,
    seq_len=seq_len,
    chip=chip,
    devices=devices,
    utilisation=utilisation,
    price=price,
  )
