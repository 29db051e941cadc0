"""Every fault of `benchmarks.faults` with two ranks, and two lost of four: no trace is left."""

import signal

import pytest

from benchmarks import faults as bench
from moe_router_cluster.session import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TWO = bench.faults(2)
FOUR = [fault for fault in bench.faults(4) if fault.name == "SIGKILL/two at once/W4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def clean(folder):
    """By number of ranks, what an uninterrupted run learned."""
    learned = {}
    with ray_session(bench.config_of(folder, "first", 2).cluster):
        for ranks in (2, 4):
            config = bench.config_of(folder, f"clean-W{ranks}", ranks)
            bench.train_once(config)
            learned[ranks] = bench.learned(config)
        yield learned


@pytest.mark.parametrize("fault", [*TWO, *FOUR], ids=lambda fault: fault.name)
def test_a_fault_leaves_no_trace(fault, folder, clean):
    ranks = 4 if fault in FOUR else 2
    row = bench.measure(fault, folder, ranks, clean[ranks])
    assert row["correct"], row
    if fault.how == signal.SIGKILL and fault.ranks and fault.point != "in a checkpoint write":
        assert row["detect_s"] < bench.SILENT_S, row  # nobody waited for silence
    if fault.replicate_every:
        assert row["from_step"] > bench.CHECKPOINT_EVERY  # the replica, not the checkpoint
