import pytest

from jaxlm.errors import InputError
from jaxlm.launch.pods import ALONE, Pod, detect

OURS = {
  "JAXLM_COORDINATOR": "10.0.0.2:8476", "JAXLM_PROCESSES": "8", "JAXLM_PROCESS": "3",
}  # fmt: skip
BY_ADDRESS = Pod("addresses", "10.0.0.2:8476", 8, 3)
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "0"}


@pytest.mark.parametrize(
  ("environment", "tpu", "found"),
  [
    ({}, False, ALONE),
    (OURS, False, BY_ADDRESS),
    (OURS | SLURM | GKE, True, BY_ADDRESS),
    (SLURM, False, Pod("slurm")),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False, ALONE),
    ({"SLURM_NTASKS": "4"}, False, ALONE),  # an allocation's shell, outside srun
    (GKE, True, Pod("gke")),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, Pod("cloud tpu")),
    ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, True, Pod("gke")),
    ({}, True, Pod("cloud tpu")),
  ],
)
def test_the_environment_tells(environment, tpu, found):
  assert detect("auto", environment, tpu=tpu) == found


def test_the_flag_goes_before_the_environment():
  assert detect("none", OURS | SLURM, tpu=True) == ALONE
  assert detect("10.0.0.2:8476,8,3", SLURM, tpu=True) == BY_ADDRESS


@pytest.mark.parametrize(
  ("flag", "environment", "message"),
  [
    ("yes", {}, "--pod=yes: give auto, none, or HOST:PORT,PROCESSES,PROCESS"),
    ("10.0.0.2,8,3", {}, "give auto, none, or HOST:PORT"),
    ("10.0.0.2:1,8,8", {}, "process 8 of 8; they count from 0"),
    ("auto", {"JAXLM_COORDINATOR": "a:1"}, "JAXLM_PROCESSES, JAXLM_PROCESS is not"),
  ],
)
def test_what_cannot_be_meant(flag, environment, message):
  with pytest.raises(InputError, match=message):
    detect(flag, environment, tpu=False)
