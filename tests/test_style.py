"""The rules of the house that a program can check."""

import ast
import functools
import pathlib
import re
import subprocess
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlm"
# A room imports only from rows above its own, and from its own room.
ROOMS = [
  {"errors", "shapes"},
  {"trees", "files"},
  {"explain"},
  {"config"},
  {"sharding"},
  {"ops"},
  {"models"},
  {"data"},
  {"quantization"},
  {"peft"},
  {"training"},
  {"decoding"},
  {"posttrain"},
  {"retrieval"},
  {"evaluation"},
  {"scaling"},
  {"interop"},
  {"launch"},
  {"runs"},
  {"__main__"},
]
FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 6
LONG_FUNCTIONS = {"training/loop.py": {"train"}, "runs/train.py": {"run", "_run"}}
MANY_PARAMETERS = {
  "decoding/generate.py": {"generate"},
  "models/parameters.py": {"matrix"},
}
FAMILIES = (
  r"llama|gemma|qwen|mistral|mixtral|deepseek|gpt2|gpt_2|olmo|phi3|jamba|falcon"
)
# A family may lend its name to what it published, in the vocabulary and its readers.
LENT = {"Llama3Scaling", "_llama3", "llama"}
LENDERS = {"models/spec.py", "models/positions.py"}
OWNERS = ("models/families/", "interop/", "data/templates.py")
# Of what is no module of the package.
ROOT_TESTS = {"style.py", "configs.py", "layouts.py", "notebooks.py"}
A_CONFIG = re.compile(r"configs/\w+\.py")


def files():
  return sorted(PACKAGE.rglob("*.py"))


def short(file: pathlib.Path) -> str:
  return str(file.relative_to(PACKAGE))


@functools.cache
def parsed(file: pathlib.Path) -> ast.Module:
  return ast.parse(file.read_text())


def row(room: str) -> int:
  (found,) = [i for i, rooms in enumerate(ROOMS) if room in rooms]
  return found


def rooms_imported(file: pathlib.Path) -> set[str]:
  """Returns the rooms of jaxlm that a file imports, at its top or in a function."""
  names = set()
  for node in ast.walk(parsed(file)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}: a relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name.split(".")[1] for name in names if name.startswith("jaxlm.")}


def test_a_room_imports_only_rooms_above_it():
  wrong = []
  for file in files():
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
      assert not rooms_imported(file)
      continue
    wrong += [
      f"{short(file)} imports {other}"
      for other in rooms_imported(file) - {room}
      if row(other) >= row(room)
    ]
  assert not wrong


def test_the_package_never_imports_experiments_configs_or_tests():
  pattern = re.compile(r"^\s*(from|import) (experiments|configs|tests)\b", re.M)
  assert not [short(file) for file in files() if pattern.search(file.read_text())]


def test_files_and_functions_are_short():
  wrong = []
  for file in files():
    lines = len(file.read_text().splitlines())
    if lines > FILE_LINES:
      wrong.append(f"{short(file)}: {lines} lines")
    for node in ast.walk(parsed(file)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        lines = node.end_lineno - node.lineno + 1
        if lines > FUNCTION_LINES and node.name not in LONG_FUNCTIONS.get(
          short(file), ()
        ):
          wrong.append(f"{short(file)}: {node.name} has {lines} lines")
  assert not wrong


def test_public_functions_have_few_parameters():
  wrong = []
  for file in files():
    for node in ast.walk(parsed(file)):
      if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
        continue
      args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      named = [arg.arg for arg in args if arg.arg not in ("self", "cls")]
      known = MANY_PARAMETERS.get(short(file), ())
      if len(named) > PARAMETERS and node.name not in known:
        wrong.append(f"{short(file)}: {node.name} takes {len(named)}")
  assert not wrong


def test_a_room_s_init_holds_its_docstring_alone():
  for file in files():
    if file.name == "__init__.py":
      assert ast.get_docstring(parsed(file)), f"{short(file)} has no docstring"
      assert len(parsed(file).body) == 1, f"{short(file)} holds more than a docstring"


def test_a_room_s_docstring_names_its_files():
  wrong = []
  for file in PACKAGE.glob("*/__init__.py"):
    text = ast.get_docstring(parsed(file))
    others = [other.name for other in file.parent.glob("*.py") if other != file]
    wrong += [f"{file.parent.name}/{name}" for name in others if name not in text]
  assert not wrong


def test_no_file_is_a_drawer():
  drawers = {"utils", "util", "common", "misc", "helpers", "lib"}
  assert not [short(file) for file in files() if file.stem in drawers]


def test_families_are_named_where_they_are_data():
  """Docstrings and comments may credit a source; names and strings may not."""
  wrong = []
  for file in files():
    if short(file).startswith(OWNERS):
      continue
    docstrings = {
      node.body[0].lineno
      for node in ast.walk(parsed(file))
      if hasattr(node, "body")
      and isinstance(node.body, list)
      and node.body
      and isinstance(node.body[0], ast.Expr)
    }
    lent = LENT if short(file) in LENDERS else set()
    with file.open("rb") as stream:
      for token in tokenize.tokenize(stream.readline):
        if token.type not in (tokenize.NAME, tokenize.STRING):
          continue
        if token.type == tokenize.STRING and token.start[0] in docstrings:
          continue
        named = re.search(FAMILIES, A_CONFIG.sub("", token.string), re.I)
        if named and token.string not in lent:
          wrong.append(f"{short(file)}:{token.start[0]}: {token.string[:60]}")
  assert not wrong


def is_spec(node: ast.AST) -> bool:
  """Says whether a class is a frozen keyword-only dataclass."""
  if not isinstance(node, ast.ClassDef):
    return False
  for decorator in node.decorator_list:
    if isinstance(decorator, ast.Call):
      name = ast.unparse(decorator.func)
      given = {keyword.arg for keyword in decorator.keywords}
      if name.endswith("dataclass") and {"frozen", "kw_only"} <= given:
        return True
  return False


def test_every_field_of_a_spec_says_what_it_is():
  wrong, seen = [], 0
  for file in files():
    for node in filter(is_spec, ast.walk(parsed(file))):
      assert ast.get_docstring(node) or node.name.startswith("_"), node.name
      for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
          continue
        seen += 1
        described = isinstance(after, ast.Expr) and isinstance(
          after.value, ast.Constant
        )
        if not described:
          wrong.append(f"{short(file)}: {node.name}.{field.target.id}")
  assert not wrong
  assert seen > 50


def tracked() -> list[pathlib.Path]:
  try:
    done = subprocess.run(
      ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("not a git checkout")
  names = [ROOT / name for name in done.stdout.split("\0") if name]
  return [file for file in names if file.is_file()]


def test_no_tracked_file_names_a_package_host_or_a_private_folder():
  hosts = ["pypi." + "org", "python" + "hosted", "artifact" + "ory"]
  pattern = re.compile("|".join([*map(re.escape, hosts), "/" + r"work/\w"]))
  wrong = []
  for file in tracked():
    data = file.read_bytes()
    if b"\0" in data[:4096] or file.suffix in (".gz", ".zst", ".png"):
      continue
    wrong += [
      f"{file.relative_to(ROOT)}: {found.group()}"
      for found in pattern.finditer(data.decode("utf-8", "replace"))
    ]
  assert not wrong


def test_tests_mirror_the_package():
  """A file of tests stands where what it tests stands; whole runs are in tests/runs."""
  wrong = []
  for file in (ROOT / "tests").rglob("test_*.py"):
    place = file.relative_to(ROOT / "tests")
    name = place.name.removeprefix("test_")
    sources = [PACKAGE / place.with_name(n) for n in (name, f"__{name[:-3]}__.py")]
    whole = place.parts[0] == "runs" or name in ROOT_TESTS
    if not whole and not any(source.exists() for source in sources):
      wrong.append(str(place))
  assert not wrong
