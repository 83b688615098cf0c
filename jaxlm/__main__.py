"""Runs a config: flags -> config -> cfg.run(workdir).

jaxlm --config=configs/llama3.py:size=8b,seq_len=4096 --workdir=/tmp/run
    --config.optimizer.lr.peak=1e-4 --config.mesh.tensor=8
"""

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.launch.threads import room_to_wait

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Config file and the arguments of its get_config: path.py:name=value,... "
  "--config.path.to.field=value changes a field of the result; repeat it at will.",
  required=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run's checkpoints and metrics."
)
_POD = flags.DEFINE_string(
  "pod",
  "auto",
  "How this process finds the others of a pod: auto (Slurm, GKE, Cloud TPU, "
  "jaxlm-local), none, or HOST:PORT,PROCESSES,PROCESS.",
)
_PLAN = flags.DEFINE_string(
  "plan",
  None,
  "Compile the run's step for chips that are not here, tell what it needs, and exit: "
  "v5p:4x4x4, v6e:16x16@data=2,fsdp=128, h100:8; several are ranked.",
)
_EXPLAIN = flags.DEFINE_bool(
  "explain", False, "Print every field of the config with its type and doc, and exit."
)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits "--config.path=value" and "--config.path value" out of the arguments.

  Returns:
    The other arguments, and the overrides as "path=value", both in order.
  """
  rest, overrides = [], []
  words = iter(argv)
  for word in words:
    if word == "--":
      return [*rest, word, *words], overrides
    found = re.fullmatch(r"--?config\.([^=]*)(=.*)?", word, re.DOTALL)
    if not found:
      rest.append(word)
    elif found[2]:
      overrides.append(found[1] + found[2])
    else:
      value = next(words, "--")
      if value.startswith("--"):
        raise InputError(f"{word} has no value: write {word}=value")
      overrides.append(f"{found[1]}={value}")
  return rest, overrides


def _help() -> str:
  options = [_CONFIG, _WORKDIR, _POD, _PLAN, _EXPLAIN]
  lines = [f"  --{option.name}: {flags.FLAGS[option.name].help}" for option in options]
  lines.append("  --helpfull: The flags of absl too.")
  wrapped = [textwrap.fill(line, 88, subsequent_indent="    ") for line in lines]
  return "\n".join([__doc__ or "", *wrapped])


def _start(cfg: Any) -> None:
  """Calls run(workdir), or run() of a config that keeps nothing in a workdir."""
  if not hasattr(cfg, "run"):
    raise InputError(f"{_CONFIG.value}: {type(cfg).__name__} has no run(workdir)")
  takes = list(inspect.signature(cfg.run).parameters)
  if takes and not _WORKDIR.value:
    raise InputError("--workdir=FOLDER is required, or --explain to see the config")
  if _WORKDIR.value and not takes:
    raise InputError(
      f"--workdir: {type(cfg).__name__} keeps nothing there; leave it out"
    )
  from jaxlm.launch import members  # imports jax, which --help can do without

  workdirs = [_WORKDIR.value] if takes and _WORKDIR.value else []
  members.run(cfg.run, workdirs, _POD.value)


def main() -> None:
  """The console command; exits with 2 on bad input and 130 on an interrupt."""
  overrides: list[str] = []

  def parse(argv: Sequence[str]) -> list[str]:
    rest, found = split_overrides(argv)
    if {"--help", "-help", "-h"} & set(rest):
      print(_help())
      sys.exit(0)
    overrides.extend(found)
    return app.parse_flags_with_usage(rest)

  def run(argv: Sequence[str]) -> None:
    if argv[1:]:
      raise InputError(f"not a flag: {' '.join(argv[1:])}; see --help")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # absl's own default tells INFO
    cfg = config.override(config.load(_CONFIG.value), overrides)
    if _EXPLAIN.value:
      print(config.explain(cfg))
    elif _PLAN.value is not None:
      from jaxlm.runs.plan import plan  # imports jax

      plan(cfg, _PLAN.value)
    else:
      _start(cfg)

  os.environ.update(room_to_wait(dict(os.environ)))
  try:
    app.run(run, flags_parser=parse)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == "__main__":
  main()
