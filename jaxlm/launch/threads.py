"""Threads enough for virtual CPU devices; set before JAX starts."""


def room_to_wait(variables: dict[str, str]) -> dict[str, str]:
  """Returns the variables with threads enough for virtual CPU devices.

  Collectives that do not depend on each other run at once, and each blocks a thread
  until all devices have come. XLA's pool has a thread a device unless NPROC says
  otherwise: with two collectives they can wait for each other for ever, and XLA aborts
  the process after 40 s (seen with jax 0.10.2 and 0.12.0.1).
  """
  devices = variables.get("JAX_NUM_CPU_DEVICES", "1")
  many = devices.isdecimal() and int(devices) > 1
  return {"NPROC": str(8 * int(devices))} | variables if many else variables
