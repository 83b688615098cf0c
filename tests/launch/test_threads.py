from jaxlm.launch.threads import room_to_wait


def test_virtual_devices_have_threads_to_wait_for_each_other():
  assert room_to_wait({"JAX_NUM_CPU_DEVICES": "8"})["NPROC"] == "64"
  assert room_to_wait({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "9"})["NPROC"] == "9"
  assert "NPROC" not in room_to_wait({"JAX_NUM_CPU_DEVICES": "1"})
  assert "NPROC" not in room_to_wait({})
