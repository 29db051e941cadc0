"""What each rank of a peer memory test runs; importable by the worker processes."""

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

import torch

from moe_router.dispatch import PeerMemory
from moe_router.dispatch.exchange import Splits
from moe_router.dispatch.inbox import SharedInbox
from moe_router.dispatch.peer_memory import PeerMover
from moe_router.dispatch.transports import round_trip
from moe_router.dispatch.where import Where, lay_out
from moe_router.errors import WorkerLostError
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice
from tests.dispatch import work


class Gone(Exception):
    """This rank takes part in nothing any more."""


def trip(by, rank, seed):
    """A round trip of tokens that all ranks serve, and whether it was exact."""
    ranks = by.ranks
    target_TK = torch.arange(ranks, dtype=torch.int32).repeat(5, 1)
    x_TD = work.batch(5, seed=10 * seed + rank)[0].mul(9).round()  # sums of them are exact
    choice = Choice(target_TK, torch.ones(5, ranks))
    out_TD, overflow = round_trip(
        by, x_TD, choice, plan_from_ids(target_TK, ranks), Placement.contiguous(ranks, ranks)
    )
    return torch.equal(out_TD, ranks * x_TD) and not overflow


def fail_at(inbox, stage, leave):
    """Have this rank go in its next exchange: before it puts, when it has put half of its rows,
    when it has put them all, or once the exchange is over."""
    put, meet = inbox.put, inbox.meet

    def fail_in_put(message, told):
        if stage == "during":
            few = [n // 2 for n in message.send]
            put(dataclasses.replace(message, send=few), told)
        leave()

    def fail_in_meet(told):
        if stage == "after":
            meet(told)
        leave()

    if stage in ("before", "during"):
        inbox.put = fail_in_put
    else:
        inbox.meet = fail_in_meet


def faulty(rank, ranks, stage, timeout_s=0.4):
    """Two exact round trips; rank 1 goes in the third. What the others say, and after how long."""
    by = PeerMemory(5, timeout_s=timeout_s)
    exact = [trip(by, rank, 0), trip(by, rank, 1)]

    def leave():
        raise Gone

    if rank == 1:
        fail_at(by._mover.inbox, stage, leave)
    began = time.monotonic()
    try:
        trip(by, rank, 2)
    except Gone:
        return exact, "gone", 0.0
    except WorkerLostError as error:
        return exact, str(error), time.monotonic() - began
    return exact, "nothing", 0.0


def killed(rank, ranks, folder):
    """Rank 1 is killed while it puts; what rank 0 says then, in a file: nobody asks it again."""
    by = PeerMemory(5, timeout_s=1.0)
    trip(by, rank, 0)
    if rank == 1:
        fail_at(by._mover.inbox, "during", lambda: os.kill(os.getpid(), signal.SIGKILL))
    try:
        trip(by, rank, 1)
    except WorkerLostError as error:
        Path(folder, "said.json").write_text(json.dumps(str(error)))


def hurried(rank, ranks, turns, slow_rank):
    """Exchanges in which one rank dawdles at every step; how many brought what was sent."""
    send = [2 + to % 2 for to in range(ranks)]
    rank_TK = torch.arange(ranks, dtype=torch.int32).expand(3, -1)  # every token goes everywhere
    splits = Splits(send, [send[rank]] * ranks, torch.tensor(send), 0)
    mover, told = PeerMover(rank, None, 20.0), torch.zeros((), dtype=torch.int32)
    ready, chance = mover.ready, random.Random(rank)

    def dawdle(method):
        def slowly(*args):
            time.sleep(chance.choice([0, 0, 0.001, 0.003]) if rank == slow_rank else 0)
            return method(*args)

        return slowly

    inbox = ready(4096, torch.device("cpu"))
    for name in ("put", "meet", "view"):
        setattr(inbox, name, dawdle(getattr(inbox, name)))
    good = 0
    for turn in range(turns):
        x_TD = torch.arange(12).view(3, 4) + 100 * turn + 10000 * rank
        mark_TK = torch.full((3, ranks), float(rank * 1000 + turn))
        rows = lay_out(Where(rank_TK, rank_TK), mark_TK, torch.tensor(send), sum(send))
        keep = bool(turn % 2)
        *sent, travel = mover.start_out(x_TD, rows, ranks, splits, told, keep)
        bits = sent[1].view(torch.float32)
        x_ND, mark_ND, id_NK = travel.arrive(sent[0], bits, sent[2])
        came = torch.cat([x_TD[: send[rank]] + 10000 * (s - rank) for s in range(ranks)])
        source_N = torch.arange(ranks).repeat_interleave(send[rank]) * 1000.0 + turn
        mark_NK = mark_ND.clone()
        good += torch.equal(x_ND, came) and torch.equal(mark_NK[:, rank], source_N)
        good += torch.equal(id_NK[:, rank], torch.full_like(id_NK[:, rank], rank))
        time.sleep(chance.choice([0, 0.002]))  # what is not kept is read where it lies
        sent_ND = x_ND.clone()
        home_RD, back_RK = travel.come_home(sent_ND, mark_NK)
        good += torch.equal(home_RD, x_TD[rows.src_R.long()])
        good += torch.equal(back_RK.view(torch.int32), rows.packed_RP[:, :ranks])
    return good


def grown(rank, ranks):
    """Inboxes of ever larger rows, then of the first size again."""
    mover, told = PeerMover(rank, None, 20.0), torch.zeros((), dtype=torch.int32)
    splits = Splits([1] * ranks, [1] * ranks, torch.ones(ranks), 0)
    rank_TK = torch.arange(ranks, dtype=torch.int32)[None]
    rows = lay_out(Where(rank_TK, rank_TK), torch.ones(1, ranks), torch.ones(ranks).long(), ranks)
    found = []
    for width in (4, 4000, 4):
        x_TD = torch.full((1, width), float(rank))
        x_ND = mover.out(x_TD, rows, splits, told)
        found.append((x_ND[:, -1].tolist(), mover.inbox.capacity))
    return found, [path.name for path in Path("/dev/shm").glob(f"moe_router_*_{rank}")]


def two_in_one_process(folder, capacity, make):
    """Inboxes of two ranks in this process, by `make(rank, paths)`."""
    paths = [Path(folder) / str(rank) for rank in range(2)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(SharedInbox.size(capacity))
    return [make(rank, paths) for rank in range(2)]
