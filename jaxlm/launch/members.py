"""A run as one of the processes of a pod: joined, watched, and ended with a word."""

import os
import pathlib
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.launch import pods, watch
from jaxlm.sharding import processes


def run(start: Callable[..., Any], workdirs: Sequence[str], flag: str) -> None:
  """Joins the other processes, if there are any, and calls `start(*workdirs)`.

  Raises:
    InputError: what `start` raises, in a process that is alone; of several each one
      prints its error and ends at once, for an orderly end would wait for all.
  """
  pod = pods.start(flag)
  if processes.alone():
    start(*workdirs)
    return
  me = jax.process_index()
  if processes.first():
    print(pods.describe(pod), flush=True)
  looks = None
  try:
    if workdirs:
      looks = _watch(workdirs[0])
      looks.start()
    start(*workdirs)
    processes.meet("end")
  except InputError as error:
    _end(f"error: {error}" if processes.first() else f"error: process {me}: {error}", 2)
  except jax.errors.JaxRuntimeError as error:
    # Where a collective has failed, the watch knows soon who is gone.
    lost = looks and looks.wait(watch.LOST_SECONDS + 2 * watch.BEAT_SECONDS)
    if lost:
      watch.give_up(me, lost)
    traceback.print_exception(error)
    _end(f"error: process {me} ends by the exception above", 1)
  except KeyboardInterrupt:
    _end(f"process {me}: interrupted", 130)
  except BaseException:
    traceback.print_exc()
    _end(f"error: process {me} ends by the exception above", 1)
  if looks is not None:
    looks.stop()


def _watch(workdir: str) -> watch.Watch:
  """Returns the watch of this start, in a folder that no other start has.

  Nothing is deleted: the workdir may be refused yet, or be that of a run that lives.
  """
  place = files.absolute(workdir)
  files.require_local(place, "--workdir")
  started = processes.from_first(random.SystemRandom().randrange(2**31))
  folder = pathlib.Path(place) / watch.SIGNS / str(started)
  return watch.Watch(folder, jax.process_index(), jax.process_count())


def _end(message: str, code: int) -> None:
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)
