"""Adds to tests/goldens/peft.npz the gradients of IA3, VeRA and LoHa.

    python experiments/goldens/peft_gradients.py

in an environment with torch and peft 0.21.2. The two layers, the adapters' values and
what comes out are in the file already, by another version of PEFT: each output is
compared with this one's before the gradients of the sum of its squares are kept.
"""

import pathlib

import numpy as np
import torch
from peft import IA3Config, LoHaConfig, VeraConfig, get_peft_model

PLACE = pathlib.Path(__file__).parents[2] / "tests/goldens/peft.npz"
GOLDEN = dict(np.load(PLACE))


def golden(name: str) -> torch.Tensor:
  return torch.tensor(GOLDEN[f"peft/{name}"])


class Layers(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.lin, self.ff = torch.nn.Linear(16, 24), torch.nn.Linear(24, 10)
    for name, weight in self.named_parameters():
      weight.data = golden(f"in/{name}")

  def forward(self, x):
    return self.ff(torch.relu(self.lin(x)))


CONFIGS = {
  "ia3": IA3Config(target_modules=["lin", "ff"], feedforward_modules=["ff"]),
  "vera": VeraConfig(r=8, target_modules=["lin", "ff"]),
  "loha": LoHaConfig(r=4, alpha=8, target_modules=["lin"]),
}
for method, config in CONFIGS.items():
  net = get_peft_model(Layers(), config)
  if method == "vera":
    net.base_model.vera_A["default"].data = golden("vera/shared_A")
    net.base_model.vera_B["default"].data = golden("vera/shared_B")
  trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
  for name, weight in trained.items():
    weight.data = golden(f"{method}/param/{name.removeprefix('base_model.model.')}")
  y = net(golden("in/x"))
  np.testing.assert_allclose(
    y.detach(), GOLDEN[f"peft/{method}/y"], rtol=1e-5, atol=1e-5
  )
  y.square().sum().backward()
  for name, weight in trained.items():
    assert weight.grad is not None
    key = f"peft/{method}/grad/{name.removeprefix('base_model.model.')}"
    GOLDEN[key] = weight.grad.numpy()
    print(key, tuple(weight.shape))
np.savez_compressed(PLACE, **GOLDEN)
