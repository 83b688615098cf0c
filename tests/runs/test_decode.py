import dataclasses
import re

import pytest
from models.specs import SPECS

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.launch import plan as launch
from jaxlm.models.spec import Precision
from jaxlm.runs.decode import Decode
from jaxlm.runs.plan import plan
from jaxlm.sharding.mesh import Mesh

MODEL = SPECS["llama: GQA, SwiGLU, RMSNorm, scaled rotary"]


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_it_is_timed_where_it_runs(capsys, cache):
  run = Decode(
    model=MODEL, rows=4, length=16, precision=Precision(), cache=cache,
    mesh=Mesh(fsdp=1, data=4, tensor=2),
  )  # fmt: skip
  assert run.run() > 0
  assert "tokens/s, median of 10 steps" in capsys.readouterr().out


def test_a_plan_tells_what_a_step_reads(capsys, monkeypatch):
  monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
  cfg = config.override(config.load("configs/decode.py"), ["rows=16", "length=2048"])
  assert plan(cfg, "v5e:2x4") == []
  out = capsys.readouterr().out
  assert "libtpu is not installed" in out
  weights, cache = map(float, re.findall(r"([\d.]+) GB of (?:weights|keys)", out))
  # 8.03e9 parameters of two bytes over 8 chips; 32 layers, 8 heads of 128, twice.
  # Less the table, of which a step reads a row a text.
  assert weights == pytest.approx((8.03026 - 128256 * 4096 / 1e9) * 2 / 8, rel=1e-3)
  assert cache == pytest.approx(16 * 2048 * 32 * 8 * 128 * 2 * 2 / 8 / 1e9, rel=1e-3)
  # Two operations a weight, four a key and head dim: 32 layers, 32 heads of 128.
  flops = 16 * (2 * 7.5049e9 + 4 * 2048 * 32 * 32 * 128) / 8
  told = float(re.search(r"products ([\d.]+) ms", out)[1])
  assert told == pytest.approx(flops / 197e12 * 1e3, abs=0.006)
  assert f"memory {(weights + cache) / 819 * 1e3:.2f} ms" in out


def test_bad_input():
  with pytest.raises(InputError, match="rows: 0 is under 1"):
    Decode(model=MODEL, rows=0)
  run = Decode(model=MODEL, rows=3, mesh=Mesh(fsdp=1, data=8))
  with pytest.raises(InputError, match=r"dimension 3 of .* does not divide by 8"):
    run.run()
  assert dataclasses.replace(run, rows=8).rows == 8
