"""Load, override, check, save, compare and explain configs."""

import dataclasses
import enum
import math
import pathlib
import re
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from jaxlm import config
from jaxlm.errors import InputError


class Color(enum.Enum):
  RED = 1
  GREEN = 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
  """A learning rate over steps.

  More about it.
  """

  peak: float
  """Highest learning rate."""
  warmup: int = 100
  shape: Literal["cosine", "linear"] = "cosine"

  def __post_init__(self):
    if self.peak < 0:
      raise ValueError(f"peak {self.peak} is negative")


@dataclass(frozen=True, kw_only=True)
class AdamW:
  lr: Schedule = Schedule(peak=1e-3)
  betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Muon:
  lr: Schedule
  momentum: float = 0.95


@dataclass(frozen=True, kw_only=True)
class GQA:
  heads: int = 8
  window: int | None = 128


@dataclass(frozen=True, kw_only=True)
class SSM:
  state: int = 16


@dataclass(frozen=True, kw_only=True)
class Block:
  mixer: GQA | SSM = GQA()
  mlp: SSM | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
  """Not shown."""

  steps: int = 100
  """How many optimizer
  steps to take.

  Not this paragraph."""
  name: str = "run"


@dataclass(frozen=True, kw_only=True)
class Run(Base):
  """A run for the tests."""

  optimizer: AdamW | Muon = AdamW()
  """The update rule."""
  pattern: tuple[Block, ...] = (Block(), Block(mixer=SSM()))
  mesh: tuple[int, int] = (1, 1)
  rules: tuple[tuple[str, float], ...] = ((".*", 0.1),)
  color: Color = Color.RED
  clip: float = math.inf
  note: str | None = None
  every: int | Literal["epoch"] = 10
  flag: bool = False
  total: int = dataclasses.field(init=False)
  level: Literal[0, 1, 2] = 0

  def __post_init__(self):
    object.__setattr__(self, "total", self.steps * 2)
    if self.steps > 10**9:
      raise InputError("too many steps")


FUTURE = "from __future__ import annotations\n"
FILE = """
from typing import Literal
from test_config import *

def get_config(*, size: Literal["a", "b"] = "a", steps: int = 5,
               mesh: tuple[int, int] = (1, 1), name: str = "x",
               lr: Schedule = Schedule(peak=1.0)) -> Run:
  return Run(steps=steps if size == "a" else 2 * steps, mesh=mesh, name=name,
             optimizer=AdamW(lr=lr))
"""


def write(folder: pathlib.Path, text: str, name: str = "x.py") -> str:
  file = folder / name
  file.write_text(textwrap.dedent(text))
  return str(file)


def message(fn, *args, **kwargs) -> str:
  with pytest.raises(InputError) as caught:
    fn(*args, **kwargs)
  return str(caught.value)


def refused(*overrides: str, of: Any = None) -> str:
  return message(config.override, of or Run(), overrides)


def has(text: str, *parts: str) -> None:
  for part in parts:
    assert part in text, f"{part!r} is not in {text!r}"


# load


@pytest.mark.parametrize("head", ["", FUTURE])
def test_load_reads_arguments_by_their_types(tmp_path, head):
  file = write(tmp_path, head + FILE)
  assert config.load(file) == Run(steps=5, name="x", optimizer=AdamW(lr=LR))
  assert config.load(f"{file}:") == config.load(file)
  cfg = config.load(
    f"{file}:size=b,steps=1e3,mesh=(4,2),name=it's, lr=Schedule(peak=2)"
  )
  assert cfg.steps == 2000
  assert cfg.mesh == (4, 2)
  assert cfg.name == "it's"
  assert cfg.optimizer.lr == Schedule(peak=2.0)


LR = Schedule(peak=1.0)


def test_load_names_file_and_accepted_arguments(tmp_path):
  file = write(tmp_path, FILE)
  text = message(config.load, f"{file}:sise=a")
  has(text, file, "'sise'", "size: 'a' | 'b'", "steps: int", "Did you mean 'size'?")
  has(
    message(config.load, f"{file}:size=c"), file, "size: cannot read 'c' as 'a' | 'b'"
  )
  has(message(config.load, f"{file}:steps=many"), file, "steps", "'many'", "int")
  has(message(config.load, f"{file}:steps"), file, "steps: has no value")
  has(message(config.load, f"{file}:steps=1,steps=2"), file, "steps: given twice")
  has(message(config.load, f"{file}:mesh=(1,2"), file, "brackets or quotes")
  has(message(config.load, f"{file}:mesh=1,2"), file, "mesh: '1' has 1 elements")


def test_load_refuses_what_is_no_config_file(tmp_path):
  file = write(tmp_path, FILE, "llama3.py")
  missing = str(tmp_path / "lama3.py")
  text = message(config.load, missing)
  has(text, missing, "No such file", "Did you mean 'llama3.py'?")
  has(message(config.load, str(tmp_path)), "give a Python file", "configs/llama3.py:")
  empty = write(tmp_path, "x = 1", "empty.py")
  has(message(config.load, empty), empty, "no function get_config")
  broken = write(tmp_path, "x = 1\ndef (:", "broken.py")
  has(message(config.load, broken), broken, "line 2", "invalid syntax")
  needs = write(tmp_path, "def get_config(*, size: int, b: bool): ...", "needs.py")
  text = message(config.load, f"{needs}:b=yes")
  has(text, f"{needs}: get_config needs size: int. Write {needs}:size=...")
  assert "b: bool" not in text
  untyped = write(tmp_path, "def get_config(size=1): ...", "untyped.py")
  has(message(config.load, untyped), untyped, "'size'", "has no type")
  odd = write(tmp_path, "def get_config(size: dict = {}): ...", "odd.py")
  has(message(config.load, odd), odd, "'size'", "dict", "configs support str")
  nothing = write(tmp_path, "def get_config(): return 3", "nothing.py")
  has(message(config.load, nothing), nothing, "frozen dataclass", "int: 3")
  assert config.load(file).name == "x"


def test_load_checks_the_types_written_in_python(tmp_path):
  text = "from test_config import *\ndef get_config(): return Run(name=7)"
  file = write(tmp_path, text)
  has(message(config.load, file), file, "name: 7 is a int; the field takes str")


@pytest.mark.parametrize("text", ["1 / 0", "def get_config():\n  return 1 / 0"])
def test_a_bug_in_the_file_keeps_its_traceback(tmp_path, text):
  file = write(tmp_path, text)
  with pytest.raises(ZeroDivisionError) as caught:
    config.load(file)
  frames = traceback.extract_tb(caught.value.__traceback__)
  assert frames[-1].filename == file
  assert "1 / 0" in str(frames[-1].line)


def test_a_syntax_error_in_an_import_is_not_blamed_on_the_file(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  write(tmp_path, "def (:", "broken_import_of_config.py")
  file = write(tmp_path, "import broken_import_of_config")
  with pytest.raises(SyntaxError):
    config.load(file)


def test_a_config_file_loads_its_sibling_by_path(tmp_path):
  write(tmp_path, FILE, "base.py")
  text = """
  from dataclasses import replace
  from pathlib import Path
  from jaxlm import config
  def get_config(steps: int = 3):
    base = config.load(f"{Path(__file__).with_name('base.py')}:steps={steps}")
    return replace(base, name="sibling")
  """
  cfg = config.load(write(tmp_path, text) + ":steps=4")
  assert (cfg.steps, cfg.name) == (4, "sibling")


@pytest.mark.parametrize("head", ["", FUTURE])
def test_a_config_file_with_its_own_dataclasses(tmp_path, head):
  text = """
  from dataclasses import dataclass
  @dataclass(frozen=True, kw_only=True)
  class Part:
    size: int | None = 3
  @dataclass(frozen=True, kw_only=True)
  class Own:
    '''Told here.'''
    part: Part = Part()
  def get_config() -> Own:
    return Own()
  """
  file = write(tmp_path, head + textwrap.dedent(text))
  first = config.load(file)
  other = write(tmp_path, head + textwrap.dedent(text).replace("3", "'wrong'"))
  has(message(config.load, other), "part.size")
  cfg = config.override(first, ["part.size=none"])
  assert cfg.part.size is None
  assert config.override(cfg, ["part=Part"]) == first
  write(tmp_path, head + textwrap.dedent(text))
  has(config.explain(config.load(file)), "Own: Told here.", "part.size = 3")
  text = message(config.to_json, cfg)
  has(
    text,
    "part:",
    "x.py>:Part",
    "cannot be imported",
    "Move the class from the config file",
  )


# override


@pytest.mark.parametrize(
  ("text", "field", "value"),
  [
    ("steps=1_000", "steps", 1000),
    ("steps=1e3", "steps", 1000),
    ("steps=-2.0", "steps", -2),
    ("steps=0e999999999", "steps", 0),
    ("clip=1e-4", "clip", 1e-4),
    ("clip=3", "clip", 3.0),
    ("clip=-inf", "clip", -math.inf),
    ("flag=true", "flag", True),
    ("flag=Yes", "flag", True),
    ("flag=1", "flag", True),
    ("flag=no", "flag", False),
    ("flag=0", "flag", False),
    ("name=a,b=(c", "name", "a,b=(c"),
    ("name=", "name", ""),
    ("name=none", "name", "none"),
    ("name='a'", "name", "a"),
    ("note=none", "note", None),
    ("note='none'", "note", "none"),
    ("note=hello world", "note", "hello world"),
    ("color=GREEN", "color", Color.GREEN),
    ("every=epoch", "every", "epoch"),
    ("every=20", "every", 20),
    ("level=2", "level", 2),
    ("mesh=8,1", "mesh", (8, 1)),
    ("mesh=(8, 1)", "mesh", (8, 1)),
    ("mesh=[8,1,]", "mesh", (8, 1)),
    ("mesh.1=4", "mesh", (1, 4)),
    ("rules=()", "rules", ()),
    ("rules=((.*,0),)", "rules", ((".*", 0.0),)),
    ("rules=(.*norm,0),(.*,1)", "rules", ((".*norm", 0.0), (".*", 1.0))),
    ("rules=(('(a|b),c', 1), (x{1,2}, 2))", "rules", (("(a|b),c", 1), ("x{1,2}", 2))),
    ("rules.0.1=0.5", "rules", ((".*", 0.5),)),
    ("optimizer=AdamW", "optimizer", AdamW()),
    ("optimizer=AdamW()", "optimizer", AdamW()),
    ("optimizer.lr=Schedule(peak=1)", "optimizer", AdamW(lr=LR)),
    ("pattern=Block,Block()", "pattern", (Block(), Block())),
  ],
)
def test_override_reads_values_by_type(text, field, value):
  new = getattr(config.override(Run(), [text]), field)
  assert new == value
  assert type(new) is type(value)


def test_override_builds_nested_calls_of_any_member():
  cfg = config.override(
    Run(),
    [
      "optimizer=Muon(lr=Schedule(peak=1e-2, warmup=7), momentum=0.9)",
      "pattern=(Block(mixer=GQA(heads=4, window=none)), Block(mlp=SSM(state=3)))",
    ],
  )
  assert cfg.optimizer == Muon(lr=Schedule(peak=1e-2, warmup=7), momentum=0.9)
  assert cfg.pattern == (
    Block(mixer=GQA(heads=4, window=None)),
    Block(mlp=SSM(state=3)),
  )


def test_override_reads_back_what_differences_show():
  cfg = Run(optimizer=Muon(lr=LR), mesh=(8, 1), rules=(("(a,b)", 2.0),), note=None)
  shown = config.kinds.show(cfg)
  outer = Outer(run=Run())
  assert config.override(outer, [f"run={shown}"]) == Outer(run=cfg)


@dataclass(frozen=True, kw_only=True)
class Outer:
  run: Run


def test_override_applies_in_order_and_leaves_the_original():
  cfg = Run()
  new = config.override(
    cfg, ["optimizer=Muon(lr=Schedule(peak=1))", "optimizer.lr.peak=2", "steps=7"]
  )
  assert new.optimizer == Muon(lr=Schedule(peak=2.0))
  assert new.total == 14  # computed by __post_init__ of the replaced dataclass
  assert cfg == Run()
  new = config.override(cfg, ["pattern.0.mixer.window=none", "pattern.1.mlp=SSM"])
  assert new.pattern == (
    Block(mixer=GQA(window=None)),
    Block(mixer=SSM(), mlp=SSM()),
  )


def test_override_goes_through_none_only_once_it_is_set():
  text = refused("pattern.0.mlp.state=4")
  has(text, "pattern.0.mlp is None", "pattern.0.mlp=SSM", "SSM | None")
  cfg = config.override(Run(), ["pattern.0.mlp=SSM", "pattern.0.mlp.state=4"])
  assert cfg.pattern[0].mlp == SSM(state=4)


def test_override_names_unknown_fields():
  text = refused("optimizer.lr.pek=1")
  has(text, "optimizer.lr.pek:", "Schedule has no 'pek'", "Did you mean 'peak'?")
  has(text, "peak: float, warmup: int, shape: 'cosine' | 'linear'")
  has(refused("optimizer=AdamW(beta=1)"), "optimizer.beta", "AdamW has no 'beta'")
  has(refused("total=3"), "Run has no 'total'")
  has(refused("steps.x=3"), "steps.x", "steps is 100 (int), without fields")
  has(refused("note.x=3"), "note.x", "note is None (str | None), without fields")
  has(refused("steps"), "override 'steps' has no value: write steps=value")
  has(refused("=3"), "Run has no ''")


@pytest.mark.parametrize("index", ["2", "-1", "first", "²"])
def test_override_names_the_length_of_a_tuple(index):
  text = refused(f"pattern.{index}.mixer.heads=1")
  has(text, f"pattern.{index}:", "pattern has 2 elements")


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("steps=1.5", ["steps: cannot read '1.5' as int"]),
    ("steps=1__0", ["steps: cannot read '1__0' as int"]),
    ("steps=1e999999999", ["steps", "as int"]),
    ("steps=1e-999999999", ["steps", "as int"]),
    ("steps=nan", ["steps: cannot read 'nan' as int"]),
    ("steps=none", ["steps: cannot read 'none' as int"]),
    ("steps=true", ["steps: cannot read 'true' as int"]),
    ("clip=big", ["clip: cannot read 'big' as float"]),
    ("flag=2", ["flag: cannot read '2' as bool"]),
    ("color=GREE", ["color", "'GREE'", "Color(RED | GREEN)", "Did you mean 'GREEN'?"]),
    ("every=epoc", ["every", "int | 'epoch'", "Did you mean 'epoch'?"]),
    ("level=3", ["level: cannot read '3' as 0 | 1 | 2"]),
    ("optimizer=Mun", ["optimizer", "'Mun'", "AdamW | Muon", "Did you mean 'Muon'?"]),
    ("optimizer=1", ["optimizer: cannot read '1' as AdamW | Muon"]),
    ("pattern.0.mixer.window=x", ["pattern.0.mixer.window", "'x'", "int | None"]),
    ("optimizer.lr.shape=cos", ["optimizer.lr.shape", "'cosine' | 'linear'"]),
    ("mesh=1,2,3", ["mesh", "has 3 elements", "tuple[int, int]"]),
    ("mesh=1,x", ["mesh.1: cannot read 'x' as int"]),
    ("mesh=(1,2", ["mesh", "brackets or quotes do not match"]),
    ("mesh=1)2", ["mesh", "brackets or quotes do not match"]),
    ("rules=(a,1)", ["rules.0", "'a' has 1 elements", "tuple[str, float]"]),
    ("rules=(a,1),(b,x)", ["rules.1.1: cannot read 'x' as float"]),
    (
      "optimizer=Muon",
      ["optimizer: Muon needs lr: Schedule", "optimizer=Muon(lr=...)"],
    ),
    ("optimizer=Muon(lr=Schedule)", ["optimizer.lr: Schedule needs peak: float"]),
    ("optimizer=Muon(lr)", ["optimizer.lr: has no value"]),
    ("optimizer.lr=Schedule(peak=1,peak=2)", ["optimizer.lr.peak: given twice"]),
  ],
)
def test_override_names_path_value_and_type(text, parts):
  has(refused(text), *parts)


def test_override_names_the_path_that_a_post_init_refuses():
  text = refused("optimizer.lr.peak=-1")
  has(text, "optimizer.lr.peak=-1:", "Schedule", "peak -1.0 is negative")
  text = refused("optimizer=Muon(lr=Schedule(peak=-1))")
  has(text, "optimizer.lr: Schedule", "peak -1.0 is negative")
  assert refused("steps=2e9") == "steps=2e9: Run refuses it: too many steps"


# check


@dataclass(frozen=True, kw_only=True)
class Either:
  value: str | int | tuple[int, ...] = 1


def test_override_tries_text_last():
  assert config.override(Either(), ["value=2"]).value == 2
  assert config.override(Either(), ["value=2,3"]).value == (2, 3)
  assert config.override(Either(), ["value='2'"]).value == "2"
  assert config.override(Either(), ["value=two"]).value == "two"


@dataclass(frozen=True, kw_only=True)
class Loose:
  value: Any = 1


@dataclass(frozen=True, kw_only=True)
class Wide:
  value: tuple[int, int] | tuple[str, ...] | Schedule | None = None


@dataclass
class Thawed:
  x: int = 1


@dataclass(frozen=True, kw_only=True)
class Holder:
  part: Thawed


@pytest.mark.parametrize(
  ("changes", "parts"),
  [
    ({"name": 7}, ["name: 7 is a int; the field takes str"]),
    ({"every": "step"}, ["every: 'step' is a str; the field takes int | 'epoch'"]),
    ({"steps": True}, ["steps: True is a bool; the field takes int"]),
    ({"steps": 7.0}, ["steps: 7.0 is a float; the field takes int"]),
    ({"flag": 1}, ["flag: 1 is a int; the field takes bool"]),
    ({"clip": True}, ["clip: True is a bool; the field takes float"]),
    ({"level": True}, ["level: True is a bool", "0 | 1 | 2"]),
    ({"note": 3}, ["note: 3 is a int; the field takes str | None"]),
    ({"color": "RED"}, ["color: 'RED' is a str", "Color(RED | GREEN)"]),
    ({"optimizer": None}, ["optimizer: None is a NoneType", "AdamW | Muon"]),
    ({"optimizer": AdamW}, ["optimizer", "is a type", "AdamW | Muon"]),
    ({"mesh": [1, 1]}, ["mesh: [1, 1] is a list", "tuple[int, int]"]),
    ({"mesh": (1,)}, ["mesh: (1,) has 1 elements", "tuple[int, int]"]),
    ({"rules": (("a", "b"),)}, ["rules.0.1: 'b' is a str; the field takes float"]),
    (
      {"pattern": (Block(), Block(mixer=GQA(heads="8")))},
      ["pattern.1.mixer.heads: '8' is a str"],
    ),
  ],
)
def test_check_names_the_path(changes, parts):
  has(message(config.check, Run(**changes)), *parts)
  has(message(config.override, Run(**changes), []), *parts)
  has(message(config.to_json, Run(**changes)), *parts)


def test_override_checks_before_it_goes_inside():
  text = refused("mesh.0=2", of=Run(mesh=[1, 1]))
  has(text, "mesh: [1, 1] is a list")


def test_check_accepts_ints_for_floats_and_any_member():
  config.check(Run(clip=1, rules=(("a", 2),)))
  for value in [(1, 2), ("a", "b", "c"), Schedule(peak=1), None]:
    config.check(Wide(value=value))
  assert config.override(Wide(), ["value=1,2"]).value == (1, 2)
  assert config.override(Wide(), ["value=a,b,c"]).value == ("a", "b", "c")
  three = Wide(value=("a", "b", "c"))
  assert config.override(three, ["value.2=d"]).value == ("a", "b", "d")
  has(message(config.check, Wide(value=(1, "a"))), "value.1: 'a' is a str")


def test_check_refuses_what_configs_cannot_hold():
  has(message(config.check, Loose()), "Loose.value", "Any", "configs support str")
  has(message(config.check, Holder(part=Thawed())), "part: Thawed is not frozen")
  has(message(config.check, {"a": 1}), "frozen dataclass", "dict")
  has(message(config.check, Run), "frozen dataclass", "type")


# JSON

FULL = Run(
  optimizer=Muon(lr=Schedule(peak=1)),
  pattern=(Block(mlp=SSM()),),
  color=Color.GREEN,
  clip=-math.inf,
  note='"quoted" ü',
  every="epoch",
  rules=(),
)


@pytest.mark.parametrize("cfg", [Run(), FULL, Wide(value=("a",))])
def test_json_gives_an_equal_object(cfg):
  text = config.to_json(cfg)
  assert config.from_json(text) == cfg
  assert config.to_json(config.from_json(text)) == text
  assert config.differences(cfg, config.from_json(text)) == []


def test_json_is_strict_and_readable():
  text = config.to_json(Run())
  has(text, '{\n  "type": "test_config:Run",\n  "steps": 100,', '"value": "inf"')
  has(text, '"type": "test_config:Color",\n    "name": "RED"')
  assert not re.search(r"\b(Infinity|NaN)\b", text)
  nan = config.from_json(config.to_json(Run(clip=math.nan)))
  assert math.isnan(nan.clip)
  assert "total" not in text


@pytest.mark.parametrize(
  ("old", "new", "parts"),
  [
    ("test_config:Schedule", "test_config:Gone", ["optimizer.lr", "test_config:Gone"]),
    ("test_config:Schedule", "no_such_module:X", ["optimizer.lr", "no_such_module:X"]),
    ("test_config:Schedule", "os:getcwd", ["optimizer.lr", "os:getcwd", "dataclass"]),
    ("test_config:Schedule", "os system", ["optimizer.lr", "os system"]),
    ("test_config:Schedule", "test_config:SSM", ["optimizer.lr.peak", "SSM has no"]),
    ('"peak"', '"pek"', ["optimizer.lr.pek", "Schedule", "Did you mean 'peak'?"]),
    ('"peak": 0.001', '"peak": "x"', ["optimizer.lr.peak: 'x' is a str", "float"]),
    ('"peak": 0.001', '"peak": -1', ["optimizer.lr: Schedule", "is negative"]),
    ('"peak": 0.001', '"peak": NaN', ["NaN is not JSON"]),
    ('"peak": 0.001', '"peak": {"a": 1}', ["optimizer.lr.peak", "without a"]),
    ('"peak": 0.001,', "", ["optimizer.lr: Schedule", "lacks: peak: float"]),
    ('"warmup": 100,', "", ["optimizer.lr", "lacks: warmup: int", "defaults=True"]),
    ('"name": "RED"', '"name": "BLUE"', ["color: 'BLUE'", "Color(RED | GREEN)"]),
    ('"heads": 8', '"heads": 8.5', ["pattern.0.mixer.heads: 8.5 is a float"]),
    ("{", "(", ["config: not JSON"]),
  ],
)
def test_from_json_names_the_path(old, new, parts):
  text = config.to_json(Run())
  assert old in text
  has(message(config.from_json, text.replace(old, new, 1)), *parts)


def test_from_json_takes_defaults_only_when_told():
  text = config.to_json(Run(optimizer=AdamW(lr=Schedule(peak=1, warmup=3))))
  text = re.sub(r'"warmup": 3,', "", text)
  cfg = config.from_json(text, defaults=True)
  assert cfg.optimizer.lr == Schedule(peak=1, warmup=100)
  text = re.sub(r'"peak": 1,', "", text)
  has(message(config.from_json, text, defaults=True), "optimizer.lr", "peak: float")


def test_from_json_wants_a_dataclass():
  has(message(config.from_json, "[1]"), "frozen dataclass", "tuple")
  text = config.to_json(Run()).replace("test_config:Run", "test_config:Color")
  has(message(config.from_json, text), "'run' is not one of", "Color(RED | GREEN)")


def test_to_json_refuses_what_cannot_come_back():
  @dataclass(frozen=True, kw_only=True)
  class Local:
    x: int = 1

  has(message(config.to_json, Local()), "Local", "cannot be imported")
  has(message(config.to_json, Typed()), "type: a field of this name cannot be saved")


@dataclass(frozen=True, kw_only=True)
class Typed:
  type: str = "a"


# differences


def test_differences_leaf_by_leaf():
  a = Run()
  assert config.differences(a, Run()) == []
  b = config.override(
    a, ["steps=7", "optimizer.lr.peak=1e-4", "pattern.1.mixer.state=2", "color=GREEN"]
  )
  assert config.differences(a, b) == [
    "steps: 100 -> 7",
    "optimizer.lr.peak: 0.001 -> 0.0001",
    "pattern.1.mixer.state: 16 -> 2",
    "color: RED -> GREEN",
  ]
  b = config.override(a, ["optimizer=Muon(lr=Schedule(peak=1))", "mesh=1,2", "note=x"])
  assert config.differences(a, b) == [
    "optimizer: AdamW -> Muon",
    "mesh: (1, 1) -> (1, 2)",
    "note: None -> 'x'",
  ]
  b = config.override(a, ["pattern=Block(mlp=SSM)", "rules=()"])
  assert config.differences(a, b) == [
    "pattern: 2 elements -> 1 elements",
    "pattern.0.mlp: None -> SSM(state=16)",
    "rules: (('.*', 0.1),) -> ()",
  ]
  assert config.differences(AdamW(), SSM()) == ["config: AdamW -> SSM"]


def test_differences_of_numbers():
  assert config.differences(Run(clip=1), Run(clip=1.0)) == []
  assert config.differences(Run(clip=math.nan), Run(clip=math.nan)) == []
  assert config.differences(Run(flag=1), Run(flag=True)) == ["flag: 1 -> True"]
  assert config.differences(Run(rules=(("a", 1),)), Run(rules=(("a", 1.0),))) == []


# explain


def test_explain_lists_every_field_with_type_and_doc():
  lines = config.explain(Run()).split("\n")
  assert lines[0] == "Run: A run for the tests."
  squeezed = [re.sub(r"(\S)  +", r"\1  ", line) for line in lines]
  for line in [
    "  steps = 100  (int)  How many optimizer steps to take.",
    "  optimizer = AdamW  (AdamW | Muon)  The update rule.",
    "    optimizer.lr = Schedule  (Schedule)",
    "      A learning rate over steps.",
    "      optimizer.lr.peak = 0.001  (float)  Highest learning rate.",
    "      optimizer.lr.warmup = 100  (int)",
    "  pattern = 2 elements  (tuple[Block, ...])",
    "    pattern.0 = Block",
    "      pattern.0.mixer = GQA  (GQA | SSM)",
    "        pattern.0.mixer.window = 128  (int | None)",
    "      pattern.0.mlp = None  (SSM | None)",
    "  rules = (('.*', 0.1),)  (tuple[tuple[str, float], ...])",
    "  color = RED  (Color(RED | GREEN))",
  ]:
    assert line in squeezed
  text = "\n".join(lines)
  for absent in ["Not", "AdamW(", "total", "\x1b"]:
    assert absent not in text
  assert max(map(len, lines)) <= 100


def test_explain_wraps_long_lines_and_lives_without_source():
  words = " ".join(["word"] * 40)
  text = config.explain(Long(name=words))
  assert max(map(len, text.split("\n"))) <= 100
  has(re.sub(r"\s+", " ", text), words, "(str)", "A long " + "doc " * 40)
  made = dataclasses.make_dataclass("Made", [("x", int, 3)], frozen=True)
  assert re.fullmatch(r"Made\n  x = 3 +\(int\)", config.explain(made()))


@dataclass(frozen=True, kw_only=True)
class Long:
  name: str = ""
  """A long doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc
  doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc doc
  doc """


def test_config_imports_no_heavy_package():
  code = "import sys, jaxlm.config; print(*sorted(sys.modules))"
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert not {"jax", "flax", "numpy", "etils", "absl"} & set(done.stdout.split())
