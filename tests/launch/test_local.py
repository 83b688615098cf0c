"""The supervisor, with programs that need no jax."""

import sys
import time

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
