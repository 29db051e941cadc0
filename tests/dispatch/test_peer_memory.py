"""The protocol of peer memory on a CPU: epochs, regions in turn, and peers that go at every step.

That it equals `local` is in test_transports.py, the kernels are in tests/interpreter/test_peer.py.
"""

import json

import pytest
import torch

from moe_router.dispatch.inbox import SharedInbox
from moe_router.errors import WorkerLostError
from tests.dispatch import peer_work
from tests.gloo import run_ranks


@pytest.mark.parametrize(
    "stage, exchange", [("before", 5), ("during", 5), ("put", 5), ("after", 6)]
)
def test_a_peer_that_goes_is_lost_in_time_and_the_group_is_formed_anew(stage, exchange):
    survivor, other = run_ranks(2, peer_work.faulty, stage)
    assert survivor[0] == other[0] == [True, True] and other[1] == "gone"
    assert survivor[1] == (
        f"rank 0, exchange {exchange}: no signal of rank 1 in 0.4 s; form the group anew"
    )
    assert 0.4 <= survivor[2] < 10
    # the same processes, a new group, new inboxes
    assert run_ranks(2, peer_work.hurried, 2, 0) == [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("stage, exchange", [("during", 5), ("after", 6)])
def test_of_eight_ranks_all_hear_of_one_that_goes(stage, exchange):
    said = run_ranks(8, peer_work.faulty, stage, 8.0)
    assert said.pop(1)[1] == "gone"
    for rank, (exact, told, seconds) in zip((0, *range(2, 8)), said, strict=True):
        assert exact == [True, True] and 8 <= seconds < 60
        assert told == (
            f"rank {rank}, exchange {exchange}: no signal of rank 1 in 8 s; form the group anew"
        )
    assert run_ranks(8, peer_work.hurried, 2, 5) == [8] * 8


@pytest.mark.slow
def test_a_peer_that_is_killed_while_it_puts_is_lost(tmp_path):
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(2, peer_work.killed, str(tmp_path))
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == "rank 0, exchange 3: no signal of rank 1 in 1 s; form the group anew"


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_nobody_overwrites_what_a_slower_rank_still_needs(slow_rank):
    assert run_ranks(2, peer_work.hurried, 20, slow_rank) == [80, 80]


@pytest.mark.slow
def test_none_of_eight_ranks_overwrites_what_a_slower_one_needs():
    assert run_ranks(8, peer_work.hurried, 10, 3) == [40] * 8


def test_inboxes_grow_and_leave_no_file():
    for found, files in run_ranks(2, peer_work.grown):
        assert [ends for ends, _ in found] == [[0.0, 1.0]] * 3
        sizes = [capacity for _, capacity in found]
        assert sizes[0] < sizes[1] == sizes[2] and files == []


def test_a_signal_too_early_or_too_late_is_not_mistaken(tmp_path):
    first, second = peer_work.two_in_one_process(
        tmp_path, 4096, lambda rank, paths: SharedInbox(rank, paths, 4096, 0.05)
    )
    told = torch.zeros((), dtype=torch.int32)
    early = r"^rank 0, exchange 1: no signal of rank 1 in 0\.05 s"
    with pytest.raises(WorkerLostError, match=early):
        first.meet(told)
    second.meet(told)
    first.meet(told)
    with pytest.raises(WorkerLostError, match=r"exchange 2: no signal of rank 1"):
        first.meet(told)  # that of exchange 1 does not count
