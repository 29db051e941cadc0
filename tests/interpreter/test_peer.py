"""The kernels of peer memory in Triton's interpreter, two ranks in one process."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from moe_router.dispatch.inbox import HEADER, Message, SharedInbox
from moe_router_kernels import address, peer
from moe_router_kernels import reference_ranks as reference
from tests.dispatch.peer_work import two_in_one_process

REGION = 4096


class Rank:
    """The inbox of one rank as the kernels see it. Programs run one after another here, so the
    others' flags are raised by hand before this rank looks for them."""

    def __init__(self, inboxes, rank):
        self.rank, self.own = rank, inboxes[rank]
        self.peers_W = torch.tensor([inbox.data_ptr() for inbox in inboxes])
        self.flags = self.own[:HEADER].view(torch.int64)
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.told = torch.zeros((), dtype=torch.int32)

    def put(self, x, src_R, also, split, send, at, offsets=(0, 2048, 3072), bound=4):
        starts = torch.tensor([0, send[0], sum(send)], dtype=torch.int32)
        places = (starts, torch.tensor(at, dtype=torch.int32))
        own = (self.peers_W, self.flags, self.epoch, self.told, places)
        how = {"most": max(send), "offsets": offsets, "rank": self.rank, "bound": bound}
        how["programs"] = 3
        peer.put(x, src_R, also, split, *own, **how)

    def meet(self, bound=4):
        own = (self.peers_W, self.flags, self.epoch, self.told)
        peer.meet(*own, rank=self.rank, bound=bound)

    def others_say(self, half, epoch):
        self.flags.view(2, -1)[half, 1 - self.rank] = epoch


def ranks():
    inboxes = [torch.zeros(SharedInbox.size(REGION), dtype=torch.uint8) for _ in range(2)]
    return [Rank(inboxes, rank) for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width, send", [(8, [3, 2]), (7, [0, 4]), (13, [5, 0]), (5, [0, 0])])
def test_equals_the_emulation(dtype, width, send, tmp_path):
    """Three exchanges of gathered rows, and of plain ones, with two parts behind them or none:
    every byte that arrives, and every flag."""
    torch.manual_seed(0)
    kernels = ranks()
    emulated = two_in_one_process(
        tmp_path, REGION, lambda rank, paths: SharedInbox(rank, paths, REGION, 1.0)
    )
    for turn in range(3):
        for rank in range(2):
            x_TD = torch.randn(6, width).to(dtype)
            src_R = torch.randint(0, 6, (sum(send),), dtype=torch.int32)
            also = torch.randint(0, 99, (sum(send), 5), dtype=torch.int32)
            at = [rank * n for n in send]
            message = Message(
                x_TD if turn < 2 else x_TD[: sum(send)], src_R if turn < 2 else None,
                also if turn else None, 3, send, at, (0, 2048, 3072),
            )  # fmt: skip
            kernels[rank].others_say(0, turn + 1)
            kernels[rank].put(message.x, message.src_R, message.also, 3, send, at)
            emulated[rank]._flags[rank][0, 1 - rank] = turn + 1
            emulated[rank].put(message, kernels[rank].told)
        for rank in range(2):
            kernels[rank].others_say(1, turn + 1)
            kernels[rank].meet()
            emulated[rank]._flags[rank][1, 1 - rank] = turn + 1
            emulated[rank].meet(kernels[rank].told)
        for rank in range(2):
            assert int(kernels[rank].told) == 0 and int(kernels[rank].epoch) == turn + 1
            assert torch.equal(kernels[rank].own, emulated[rank]._bytes[rank])


def test_an_empty_slot_keeps_what_it_has():
    one, other = ranks()
    other.own[HEADER:] = 7
    src_R = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    one.others_say(0, 1)
    one.put(torch.ones(2, 2), src_R, None, 0, [0, 4], [0, 0])
    rows = other.own[HEADER : HEADER + 32].view(4, 8)
    assert (rows[[0, 2]].view(torch.float32) == 1).all() and (rows[[1, 3]] == 7).all()


def test_nothing_is_written_to_a_peer_that_may_still_read():
    one, other = ranks()
    other.own[HEADER:] = 7
    one.put(torch.ones(4, 2), None, None, 0, [0, 4], [0, 0])
    assert int(one.told) == 1 and (other.own[HEADER:] == 7).all()
    assert other.flags[0] == 1  # but it has heard that this rank is there


def test_a_wait_is_bounded_and_tells():
    one, other = ranks()
    one.meet()
    assert int(one.told) == 1
    other.meet()
    assert int(other.told) == 0  # rank 0 has said so, before it gave up
    one.told.zero_()
    one.meet()  # the signal of the exchange before does not count
    assert int(one.told) == 1 and int(one.epoch) == 2
    assert one.flags.view(2, -1)[1, :2].tolist() == [2, 1]


def test_a_peer_that_was_lost_is_not_waited_for_again():
    one, other = ranks()
    one.meet()
    lost = HEADER // 8 // 2 - 1
    assert int(one.told) == one.flags[lost] == 1 and other.flags[lost] == 0
    one.told.zero_()
    one.meet(bound=2**30)  # so many looks would take hours
    assert int(one.told) == 1
    one.told.zero_()
    one.put(torch.ones(4, 2), None, None, 0, [0, 4], [0, 0], bound=2**30)
    assert int(one.told) == 1 and not other.own[HEADER:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "T, K, E, W, room, lost",
    [(1, 1, 2, 2, 1, 0), (1300, 3, 7, 3, 1.5, 1), (513, 8, 16, 2, 4, 0), (9, 2, 4, 4, 9, 0)],
)
def test_rows_equal_the_reference(T, K, E, W, room, lost, dtype):
    torch.manual_seed(T)
    target_TK = torch.rand(T, E).topk(K).indices.int()
    planned_TK = torch.where(torch.rand(T, K) < 0.2, -1, target_TK)
    copies_E = 1 + torch.arange(E) % 2
    tables = (copies_E, *torch.randint(0, W, (2, E, 2), dtype=torch.int32))
    inputs = (target_TK, planned_TK, tables, 10**10)
    where = address.find_ranks(*inputs)
    for found, wanted in zip(where, reference.find_ranks(*inputs), strict=True):
        assert torch.equal(found, wanted)
    bound_W = (room * T * (1 + torch.arange(W) % 3) / 3).ceil().long()
    message = (*where, torch.rand(T, K, dtype=dtype), bound_W, int(bound_W.sum()))
    found, wanted = address.lay_out(*message), reference.lay_out(*message)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert int(found[3]) == lost
