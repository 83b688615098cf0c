"""Every notebook: stripped, without logic of its own, and run from top to bottom."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments").rglob("*.ipynb"))
EACH = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
LOGIC = (
  ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.With,
  ast.Try, ast.ListComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


def cells(file):
  return json.loads(file.read_text())["cells"]


def test_there_are_notebooks():
  assert {file.stem for file in NOTEBOOKS} >= {"quickstart", "scaling_laws"}


@EACH
def test_outputs_are_stripped(file):
  for cell in cells(file):
    assert cell.get("outputs", []) == []
    assert cell.get("execution_count") is None


@EACH
def test_no_logic_lives_in_a_cell(file):
  for cell in cells(file):
    if cell["cell_type"] == "code":
      text = "".join(line for line in cell["source"] if not line.startswith("%"))
      for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, LOGIC), text


@EACH
def test_it_runs_from_top_to_bottom(file, tmp_path):
  """In a copy of the folders that it reads, by the README's command."""
  shutil.copytree(ROOT / "configs", tmp_path / "configs")
  place = tmp_path / file.parent.relative_to(ROOT)
  shutil.copytree(file.parent, place)
  command = [sys.executable, "-m", "jupyter", "execute", "--inplace", file.name]
  # One device, as on a laptop; paths are kept out of the way of other tests' kernels.
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "IPYTHONDIR": str(tmp_path / "ipy")}
  env["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"
  env["JAX_NUMPY_RANK_PROMOTION"] = "allow"
  done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  outputs = [cell["outputs"] for cell in cells(place / file.name) if "outputs" in cell]
  kinds = {kind for out in outputs for each in out for kind in each.get("data", {})}
  assert "image/png" in kinds
  assert not [each for out in outputs for each in out if each["output_type"] == "error"]
