"""The command line: flags, overrides, exit codes, and how little it imports."""

import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm import __main__ as cli
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Silent:
  steps: int = 1


@dataclass(frozen=True, kw_only=True)
class Part:
  rate: float = 0.5
  shape: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Printer:
  """Prints its fields."""

  steps: int = 1
  part: Part = Part()
  ending: str = "none"

  def run(self, workdir: str):
    print(f"{self.steps} {self.part.rate} {self.part.shape} in {workdir}")
    match self.ending:
      case "input":
        raise InputError("the data are missing")
      case "bug":
        raise KeyError("bug")
      case "interrupt":
        raise KeyboardInterrupt
    return {"loss": 1.0}


@dataclass(frozen=True, kw_only=True)
class Bare:
  """Keeps nothing in a workdir."""

  steps: int = 1

  def run(self):
    print(f"bare {self.steps}")


FILE = """
from test_main import Printer, Silent
def get_config(steps: int = 1): return Printer(steps=steps)
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
  """Returns (exit code, stdout, stderr) of the command in this process."""
  file = tmp_path / "x.py"
  file.write_text(FILE)
  monkeypatch.chdir(tmp_path)

  def run(*words: str):
    monkeypatch.setattr(sys, "argv", ["jaxlm", *words])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
      cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err

  return run


def test_a_run_with_arguments_and_overrides_in_order(call):
  code, out, _ = call(
    "--config=x.py:steps=3",
    "--config.part.rate=1",
    "--workdir",
    "/tmp/w",
    "--config.part.rate",
    "-2",
    "-config.part.shape.0=7",
  )
  assert (code, out) == (0, "3 -2.0 (7, 2) in /tmp/w\n")
  code, out, _ = call("--config=x.py", "--workdir=w")
  assert (code, out) == (0, "1 0.5 (1, 2) in w\n")


def test_explain_prints_and_does_not_run(call):
  code, out, _ = call("--config", "x.py", "--explain", "--config.part.rate=2")
  assert code == 0
  assert out.startswith("Printer: Prints its fields.")
  assert "part.rate = 2.0" in out
  assert " in " not in out


@pytest.mark.parametrize(
  ("words", "parts"),
  [
    (["--config=y.py"], ["config file y.py", "Did you mean 'x.py'?"]),
    (["--config=x.py:step=1"], ["x.py", "'step'", "steps: int"]),
    (["--config=x.py", "--config.part.rat=1"], ["part.rat:", "Did you mean 'rate'?"]),
    (["--config=x.py", "--config.part.rate=a"], ["part.rate", "'a'", "float"]),
    (["--config=x.py", "--config.ending=input"], ["the data are missing"]),
    (["--config=x.py", "--config.steps"], ["--config.steps has no value"]),
    (["--config.steps", "--config=x.py"], ["--config.steps has no value"]),
    (["--config=x.py", "word"], ["not a flag: word"]),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, words, parts):
  code, _, err = call("--workdir=w", *words)
  assert code == 2
  assert err.startswith("error: ")
  assert "Traceback" not in err
  for part in parts:
    assert part in err


def test_what_else_is_missing(call, tmp_path):
  code, _, err = call("--config=x.py")
  assert code == 2
  assert "--workdir=FOLDER is required, or --explain" in err
  (tmp_path / "x.py").write_text(FILE.replace("Printer(steps=steps)", "Silent()"))
  code, _, err = call("--config=x.py", "--workdir=w")
  assert (code, err) == (2, "error: x.py: Silent has no run(workdir)\n")


def test_a_run_that_keeps_nothing_takes_no_workdir(call, tmp_path):
  text = FILE.replace("Printer, Silent", "Bare").replace("Printer(", "Bare(")
  (tmp_path / "x.py").write_text(text)
  assert call("--config=x.py:steps=4")[:2] == (0, "bare 4\n")
  code, _, err = call("--config=x.py", "--workdir=w")
  assert (code, err) == (
    2,
    "error: --workdir: Bare keeps nothing there; leave it out\n",
  )
  assert call("--config=x.py", "--explain")[0] == 0


def test_unknown_flags_and_no_config_are_errors_of_absl(call):
  code, _, err = call("--config=x.py", "--workdirr=w")
  assert code == 1
  assert "Unknown command line flag 'workdirr'. Did you mean: workdir" in err
  code, _, err = call("--workdir=w")
  assert code == 1
  assert "Flag --config must have a value" in err


def test_an_interrupt_exits_with_130_and_a_bug_with_its_traceback(call):
  code, _, err = call("--config=x.py", "--workdir=w", "--config.ending=interrupt")
  assert (code, err) == (130, "")
  with pytest.raises(KeyError, match="bug"):
    call("--config=x.py", "--workdir=w", "--config.ending=bug")


def test_split_overrides_stops_at_two_dashes():
  rest, found = cli.split_overrides(["x", "--config.a=1=2", "--", "--config.b=3"])
  assert (rest, found) == (["x", "--", "--config.b=3"], ["a=1=2"])
  rest, found = cli.split_overrides(["--config=f", "--configs.a=1", "--config.a="])
  assert (rest, found) == (["--config=f", "--configs.a=1"], ["a="])


def test_the_flags_are_few():
  defined = flags.FLAGS.flags_by_module_dict()[cli.__name__]
  names = ["config", "explain", "plan", "pod", "workdir"]
  assert sorted(flag.name for flag in defined) == names


def test_help_is_quick_and_leaves_jax_out():
  code = """if True:
    import runpy, sys
    sys.argv = ["jaxlm", "--help"]
    try:
      runpy.run_module("jaxlm", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
      print("code", ended.code, "jax" in sys.modules, "numpy" in sys.modules)
  """
  start = time.perf_counter()
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert time.perf_counter() - start < 2
  for part in ["--config=configs/llama3.py:size=8b", "--workdir:", "--explain:"]:
    assert part in done.stdout
  assert done.stdout.endswith("code 0 False False\n")
