"""Every fault of `benchmarks.faults` with two ranks, and two lost of four, in one Ray: no trace is
left. Those that take their Ray with them: test_faults_of_nodes.py. Six run in `make test` too:
tests/cluster/test_fault_rows.py."""

import signal

import pytest

from benchmarks import faults as bench
from benchmarks.fault_cases import CHECKPOINT_EVERY, SILENT_S, config_of, faults
from moe_router_cluster.session import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TWO = faults(2)
FOUR = [fault for fault in faults(4) if fault.name == "SIGKILL/two at once/W4"]
SHARED = [fault for fault in (*TWO, *FOUR) if fault.victim not in bench.OWN_RAY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def shared_ray(folder):
    with ray_session(config_of(folder, "first", 2).cluster):
        yield


def measured(fault, folder):
    ranks = 4 if fault in FOUR else 2
    row = bench.measure(fault, folder, ranks, bench.clean_run(fault, folder, ranks))
    assert row["correct"], row
    return row


@pytest.mark.parametrize("fault", SHARED, ids=lambda fault: fault.name)
def test_a_fault_leaves_no_trace(fault, folder, shared_ray):
    row = measured(fault, folder)
    if fault.how == signal.SIGKILL and fault.ranks and fault.point != "in a checkpoint write":
        assert row["detect_s"] < SILENT_S, row  # nobody waited for silence
    if fault.replicate_every:
        assert row["from_step"] > CHECKPOINT_EVERY  # the replica, not the checkpoint
