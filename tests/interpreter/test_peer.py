"""The kernels of peer memory in Triton's interpreter, two ranks in one process."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from moe_router.dispatch.inbox import HEADER, SharedInbox
from moe_router_kernels import peer
from tests.dispatch.peer_work import two_in_one_process

REGION = 4096


class Rank:
    """The inbox of one rank as the kernels see it."""

    def __init__(self, inboxes, rank):
        self.rank, self.own = rank, inboxes[rank]
        self.peers_W = torch.tensor([inbox.data_ptr() for inbox in inboxes])
        self.flags_W = self.own[:HEADER].view(torch.int64)[:2]
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.told = torch.zeros((), dtype=torch.int32)

    def put(self, x, src_R, send, at, offset):
        starts = torch.tensor([0, send[0]], dtype=torch.int32)
        places = (self.peers_W, starts, torch.tensor(at, dtype=torch.int32), self.epoch)
        how = {"rows": sum(send), "offset": offset, "region": REGION, "programs": 3}
        peer.put(x, src_R, *places, **how)

    def signal(self):
        peer.signal(self.peers_W, self.epoch, self.rank)

    def wait(self, bound=4):
        peer.wait(self.flags_W, self.epoch, self.told, bound)


def ranks():
    inboxes = [torch.zeros(SharedInbox.size(REGION), dtype=torch.uint8) for _ in range(2)]
    return [Rank(inboxes, rank) for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width, send", [(8, [3, 2]), (7, [0, 4]), (13, [5, 0]), (5, [0, 0])])
def test_equals_the_emulation(dtype, width, send, tmp_path):
    """Three exchanges of gathered rows and of plain ones behind them: every byte, both regions."""
    torch.manual_seed(0)
    kernels = ranks()
    emulated = two_in_one_process(
        tmp_path, REGION, lambda rank, paths: SharedInbox(rank, paths, REGION, 1.0)
    )
    for _ in range(3):
        for rank in range(2):
            x_TD = torch.randn(6, width).to(dtype)
            src_R = torch.randint(0, 6, (sum(send),), dtype=torch.int32)
            plain = torch.randint(0, 99, (sum(send), 3), dtype=torch.int32)
            at = [rank * n for n in send]
            for by in (kernels[rank], emulated[rank]):
                by.put(x_TD, src_R, send, at, 0)
                by.put(plain, None, send, at, 2048)
                by.signal()
        for rank in range(2):
            kernels[rank].wait()
            emulated[rank].wait(torch.zeros((), dtype=torch.int32))
            assert int(kernels[rank].told) == 0
            assert torch.equal(kernels[rank].own, emulated[rank]._bytes[rank])


def test_an_empty_slot_keeps_what_it_has():
    one, other = ranks()
    other.own[HEADER:] = 7
    src_R = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    one.epoch.fill_(1)  # the next exchange uses the first region
    one.put(torch.ones(2, 2), src_R, [0, 4], [0, 0], 0)
    rows = other.own[HEADER : HEADER + 32].view(4, 8)
    assert (rows[[0, 2]].view(torch.float32) == 1).all() and (rows[[1, 3]] == 7).all()


def test_a_wait_is_bounded_and_tells():
    one, other = ranks()
    one.signal()
    one.wait()
    assert int(one.told) == 1
    one.told.zero_()
    other.signal()
    one.wait()
    other.wait()
    assert int(one.told) == int(other.told) == 0
    one.signal()
    one.wait()  # the signal of the exchange before does not count
    assert int(one.told) == 1 and int(one.epoch) == 2 and one.flags_W.tolist() == [2, 1]
