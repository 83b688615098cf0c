"""The table of chips: what each can do at best, as its maker tells."""

import dataclasses
from typing import Literal

from jaxlm.errors import InputError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device as JAX counts it, its figures those of the data sheet."""

  name: str
  """As it stands in --plan=NAME:TOPOLOGY."""
  platform: Literal["tpu", "gpu"]
  """JAX's word for its kind."""
  kinds: tuple[str, ...]
  """What JAX calls the device (`device_kind`), for the run that finds itself on one."""
  flops: float
  """Peak bfloat16 floating-point operations a second, without sparsity."""
  hbm: float
  """Bytes of memory."""
  hbm_bandwidth: float
  """Bytes a second between the memory and the chip."""
  ici: float
  """Bytes a second that leave the chip over the links to its neighbours, together."""
  dcn: float
  """Bytes a second of the chip's share of the network between slices or nodes."""
  torus: int = 0
  """Dimensions of the torus of its links; 0 where links go through a switch."""
  chips_a_host: int = 4
  """Devices of one host."""


_GIB = 1024**3
_GB = 1e9

# TPU figures: the system architecture pages of the Cloud TPU documentation (v4, v5e,
# v5p, v6e, tpu7x), for one chip: peak bf16, HBM capacity and bandwidth, inter-chip
# interconnect bandwidth (bits, of all links, both directions counted once); DCN from
# "How to scale your model" (Austin et al. 2025), chapter "TPUs": 6.25 GB/s a chip for
# v5p, v5e 3.125, v6e 12.5.
_TPUS = (
  Chip(
    name="v4",
    platform="tpu",
    kinds=("TPU v4",),
    flops=275e12,
    hbm=32 * _GIB,
    hbm_bandwidth=1228 * _GB,
    ici=6 * 45 * _GB,  # six links of 45 GB/s a direction (Jouppi et al. 2023, table 1)
    dcn=6.25 * _GB,
    torus=3,
  ),
  Chip(
    name="v5e",
    platform="tpu",
    kinds=("TPU v5 lite", "TPU v5e"),
    flops=197e12,
    hbm=16 * _GIB,
    hbm_bandwidth=819 * _GB,
    ici=4 * 45 * _GB,  # four links; the page tells 1,600 Gbit/s, both directions
    dcn=3.125 * _GB,
    torus=2,
    chips_a_host=8,
  ),
  Chip(
    name="v5p",
    platform="tpu",
    kinds=("TPU v5", "TPU v5p"),
    flops=459e12,
    hbm=95 * _GB,
    hbm_bandwidth=2765 * _GB,
    ici=6 * 90 * _GB,  # 4,800 Gbit/s in all: six links of 90 GB/s a direction
    dcn=6.25 * _GB,
    torus=3,
  ),
  Chip(
    name="v6e",
    platform="tpu",
    kinds=("TPU v6 lite", "TPU v6e"),
    flops=918e12,
    hbm=32 * _GB,
    hbm_bandwidth=1640 * _GB,
    ici=4 * 90 * _GB,  # four links; the page tells 3,200 Gbit/s
    dcn=12.5 * _GB,
    torus=2,
    chips_a_host=8,
  ),
  Chip(
    name="v7x",
    platform="tpu",
    kinds=("TPU7x", "TPU v7x"),
    flops=2307e12 / 2,  # 2,307 TFLOP/s a chip, and JAX counts its two halves
    hbm=192 * _GIB / 2,
    hbm_bandwidth=7380 * _GB / 2,
    ici=6 * 100 * _GB / 2,  # 1,200 GB/s a chip, both directions
    dcn=12.5 * _GB / 2,
    torus=3,
    chips_a_host=8,
  ),
)

# GPU figures: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, HGX B200), dense
# bf16 and NVLink a direction; DCN: one 400 Gbit/s (A100: 200) network card a GPU, as in
# the DGX data sheets.
_GPUS = (
  Chip(
    name="a100",
    platform="gpu",
    kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    flops=312e12,
    hbm=80 * _GB,
    hbm_bandwidth=2039 * _GB,
    ici=300 * _GB,
    dcn=25 * _GB,
    chips_a_host=8,
  ),
  Chip(
    name="h100",
    platform="gpu",
    kinds=("NVIDIA H100 80GB HBM3",),
    flops=989e12,
    hbm=80 * _GB,
    hbm_bandwidth=3352 * _GB,
    ici=450 * _GB,
    dcn=50 * _GB,
    chips_a_host=8,
  ),
  Chip(
    name="h200",
    platform="gpu",
    kinds=("NVIDIA H200",),
    flops=989e12,
    hbm=141 * _GB,
    hbm_bandwidth=4800 * _GB,
    ici=450 * _GB,
    dcn=50 * _GB,
    chips_a_host=8,
  ),
  Chip(
    name="b200",
    platform="gpu",
    kinds=("NVIDIA B200",),
    flops=2250e12,
    hbm=180 * _GB,
    hbm_bandwidth=7700 * _GB,
    ici=900 * _GB,
    dcn=50 * _GB,
    chips_a_host=8,
  ),
)

CHIPS = {chip.name: chip for chip in _TPUS + _GPUS}


def chip_named(name: str) -> Chip:
  """Returns a chip by its name.

  Raises:
    InputError: it is not in the table.
  """
  if name not in CHIPS:
    raise InputError(
      f"--plan: no chip {name!r}; the chips are {', '.join(CHIPS)}."
      f"{nearest(name, CHIPS)}"
    )
  return CHIPS[name]


def chip_of(kind: str) -> Chip | None:
  """Returns the chip that JAX calls by this device kind, or None if unknown."""
  return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
