"""The supervisor, with programs that need no jax."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.launch import local

HEAD = (
  "import os, signal, sys, time; me = int(os.environ['JAXLM_PROCESS']); "
  "n = os.environ['JAXLM_PROCESSES']; "
)


def run(code, processes=3):
  return local.run([sys.executable, "-u", "-c", HEAD + code], processes, 2)


def test_lines_carry_the_process_that_wrote_them(capsys):
  code = "print(me, n, os.environ['JAX_NUM_CPU_DEVICES'], os.environ['JAX_PLATFORMS'])"
  assert run(code) == 0
  lines = sorted(capsys.readouterr().out.splitlines())
  assert lines == ["0 3 2 cpu", "[1] 1 3 2 cpu", "[2] 2 3 2 cpu"]


def test_one_address_for_all(capsys):
  assert run("print(os.environ['JAXLM_COORDINATOR'])") == 0
  words = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
  (address,) = words
  assert address.startswith("localhost:")


def test_a_killed_process_is_named_and_the_others_are_stopped(capsys, monkeypatch):
  monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
  began = time.monotonic()
  code = "me == 1 and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
  assert run(code) == 75
  assert time.monotonic() - began < 20
  err = capsys.readouterr().err
  assert "process 1 was lost (killed by SIGKILL); the others were stopped" in err


def test_a_process_that_fails_gives_its_exit_code(capsys):
  assert run("me == 2 and sys.exit(2); time.sleep(0.1)") == 2
  assert capsys.readouterr().err == ""


SUPERVISOR = """
import os
import signal
import subprocess
import sys
import pytest

from jaxlm.launch import local
sys.exit(local.run([sys.executable, "-u", "-c", sys.argv[1]], 2, 1))
"""


@pytest.mark.parametrize("heeds", [True, False])
def test_sigterm_reaches_all_and_none_is_left(heeds):
  """Children that save and end; and ones that would have slept on."""
  heed = "signal.signal(15, lambda *_: (print('saved', me), os._exit(0))); "
  code = HEAD + heed * heeds + "print('up', os.getpid(), flush=True); time.sleep(60)"
  child = subprocess.Popen(
    [sys.executable, "-c", SUPERVISOR, code], stdout=subprocess.PIPE, text=True
  )
  lines = [child.stdout.readline() for _ in range(2)]
  pids = [int(line.split()[-1]) for line in lines]
  child.send_signal(signal.SIGTERM)
  said, _ = child.communicate(timeout=20)
  assert child.returncode == (0 if heeds else 75)
  assert said.count("saved") == 2 * heeds
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


def test_its_own_flags_are_split_from_the_rest():
  words = ["--processes", "3", "--config=x", "--devices=2", "--plan=y"]
  sizes, rest = local.split(words)
  assert sizes == {"processes": 3, "devices": 2}
  assert rest == ["--config=x", "--plan=y"]


@pytest.mark.parametrize(
  "words", [["--processes=0"], ["--processes", "x"], ["--devices"]]
)
def test_a_count_that_is_none_is_refused_by_name(words, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["jaxlm-local", "--config=x", *words])
  with pytest.raises(SystemExit) as ended:
    local.main()
  assert ended.value.code == 2
  name = words[0].partition("=")[0]
  assert f"error: {name}: " in capsys.readouterr().err
