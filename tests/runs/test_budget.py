import dataclasses
import re
from pathlib import Path

import pytest

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.models import count
from jaxlm.models.families.llama import llama
from jaxlm.runs.budget import Budget
from jaxlm.scaling.budget import Beside

MODEL = llama("3-8b")
RUN = Budget(model=MODEL, flops=1e22, chip="h100", devices=64, utilisation=0.4)
N = count.parameters(MODEL).total


def test_a_budget_buys_tokens_of_a_model(capsys):
  found = RUN.run()
  assert found.size.parameters == N
  assert found.size.tokens == pytest.approx(1e22 / (6 * N))
  assert found.rule.parameters == pytest.approx((1e22 / 120) ** 0.5)
  hours = 1e22 / (989e12 * 0.4) / 3600
  assert found.took.device_hours == pytest.approx(hours)
  assert found.took.days == pytest.approx(hours / 64 / 24)
  assert found.memory.total == pytest.approx(16 * N / 64)
  assert found.cost is None
  out = capsys.readouterr().out
  assert "9.13B parameters, 182.57B tokens" in out
  assert "8.03B parameters, 207.55B tokens, 25.8 a parameter" in out
  assert f"{hours:,.0f} device-hours" in out
  assert "cost" not in out
  assert "2.01 = parameters 0.50, gradients 0.50, moments 1.00" in out
  # Keys and values: 32 layers, 8 heads of 128, twice, 2 bytes, 8192 tokens.
  cache = 32 * 8 * 128 * 2 * 2 * 8192
  for precision, size in (("fp16", 2), ("int8", 1), ("int4", 0.5)):
    total = (size * N + cache) / 1e9
    assert re.search(rf"{precision} +{total:.2f} = .*from 1 x h100", out)


def test_tokens_cost_what_their_convention_tells(capsys):
  tokens = 15e12
  costs = {}
  for counting in ("all", "non_embedding", "matrices", "causal", "full"):
    run = dataclasses.replace(
      RUN, flops=None, tokens=tokens, counting=counting, price=2.0
    )
    found = run.run()
    flops = getattr(found.compute, counting)
    assert found.size.tokens == tokens
    assert found.took.seconds == pytest.approx(flops / (64 * 989e12 * 0.4))
    assert found.cost == pytest.approx(2 * found.took.device_hours)
    costs[counting] = found.cost
    out = capsys.readouterr().out
    number = re.escape(f"{flops:.3e}")
    assert re.search(rf"{counting} +{number} .*<- counted by", out)
    assert f"cost: {found.cost:,.0f} at 2 a device-hour" in out
  assert costs["full"] > costs["causal"] > costs["all"] > costs["non_embedding"]


def test_without_a_model_the_rule_gives_the_size(capsys):
  found = dataclasses.replace(RUN, model=None, flops=5.76e23).run()
  assert found.size == found.rule
  assert found.compute is None
  out = capsys.readouterr().out
  assert "69.28B parameters, 1.39T tokens" in out
  assert "serving, GB over all devices (weights alone)" in out
  assert re.search(r"fp16 +138.56; from 2 x h100", out)


def test_what_does_not_fit_is_told(capsys):
  whole = dataclasses.replace(RUN, sharding="none")
  assert whole.run().memory.total == 16 * N
  assert "DOES NOT FIT" in capsys.readouterr().out
  adapters = Beside(share=0.01, base="nf4")
  thin = dataclasses.replace(whole, adapters=adapters).run()
  assert thin.memory.total == pytest.approx(N * (4.127 / 8 + 0.16))
  assert "DOES NOT FIT" not in capsys.readouterr().out


def test_the_state_s_dtype_and_the_stage_are_the_run_s():
  run = dataclasses.replace(RUN, state="mixed", sharding="zero1")
  assert run.run().memory.total == pytest.approx(N * (4 + 12 / 64))
  run = dataclasses.replace(RUN, state="bfloat16", sharding="zero2")
  assert run.run().memory.total == pytest.approx(N * (2 + 10 / 64))


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"tokens": 1e12}, "flops, tokens: give one"),
    ({"flops": None}, "flops, tokens: give one"),
    ({"model": None, "flops": None, "tokens": 1e12}, "tokens: needs model"),
    ({"model": None, "counting": "causal"}, "counting: 'causal' needs model"),
    ({"chip": "h10"}, "Did you mean 'h100'"),
    ({"devices": 0}, "devices: 0 is under 1"),
    ({"utilisation": 40.0}, "utilisation: 40.0"),
    ({"price": -1.0}, "price: -1.0"),
    ({"flops": float("nan")}, "flops: nan"),
  ],
)
def test_bad_input_names_the_field(change, told):
  with pytest.raises(InputError, match=told):
    dataclasses.replace(RUN, **change)


def test_the_config_takes_tokens_in_place_of_flops():
  run = config.load("configs/budget.py:size=70b,tokens=1.4e12,price=2")
  assert run.tokens == 1.4e12
  assert run.flops is None
  assert config.load("configs/budget.py:size=none").model is None
  run = config.override(run, ["adapters=Beside(share=0.01,base=nf4)"])
  assert run.adapters == Beside(share=0.01, base="nf4")


def test_the_config_s_docstring_shows_its_output(capsys):
  text = Path("configs/budget.py").read_text()
  command = re.search(r"--config=(configs/budget.py:flops=\S+)", text)
  config.load(command[1]).run()
  for line in capsys.readouterr().out.splitlines():
    assert f"\n    {line}\n" in text
