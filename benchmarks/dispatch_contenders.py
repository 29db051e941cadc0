"""What moves tokens in the dispatch benchmark: our transports, and what others would do without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch import PeerMemory
from moe_router.dispatch.exchange import exchange
from moe_router.dispatch.gather_scatter import all_gather, reduce_scatter
from moe_router.dispatch.transports import NAMES, make_transport, round_trip
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice

ROUTINGS = (
    "uniform", "zipf", "hot_expert", "hot_rank", "ragged", "empty_expert", "empty_rank",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A rank's tokens and choices. `most` is the most tokens of a rank."""

    x_TD: Tensor
    choice: Choice
    placement: Placement
    most: int

    @property
    def visits_T(self) -> Tensor:
        """Ranks that serve a token."""
        copies = [of[0][0] for of in self.placement.copies()]
        rank_E = torch.tensor(copies, device=self.x_TD.device)
        rank_TK = rank_E[self.choice.target_TK.long()]
        ranks_W = torch.arange(self.placement.ranks, device=rank_TK.device)
        return (rank_TK[..., None] == ranks_W).any(1).sum(1)


def draw(
    routing: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Case:
    """Args:
    shape: T, D, K, E; T of a full rank.
    """
    T, D, K, E = shape
    rank, ranks = dist.get_rank(), dist.get_world_size()
    placement = Placement.contiguous(E, ranks)
    generator = torch.Generator(device).manual_seed(17 + rank)
    likely_E = torch.ones(E, device=device)
    tokens = T
    match routing:
        case "zipf":
            likely_E = 1 / torch.arange(1.0, E + 1, device=device)
        case "hot_expert":
            likely_E[0] = 1e6
        case "hot_rank":
            likely_E[list(placement.experts_of_rank[-1])] = 1e6
        case "empty_expert":
            likely_E[0] = 0
        case "ragged":
            tokens = T * (rank + 1) // ranks
        case "empty_rank":
            tokens = 0 if rank == 0 else T
    # Gumbel noise on log-probabilities: K draws without replacement
    uniform_TE = torch.rand(tokens, E, generator=generator, device=device).clamp(1e-9, 1 - 1e-7)
    noisy_TE = likely_E.log() - (-uniform_TE.log()).log()
    target_TK = noisy_TE.topk(K).indices.int()
    weight_TK = torch.rand(tokens, K, generator=generator, device=device)
    x_TD = torch.randn(tokens, D, generator=generator, device=device).to(dtype)
    return Case(x_TD, Choice(target_TK, weight_TK), placement, T)


class Ours:
    """One of our transports. The Plan is made by the gate's kernel, so it is not counted."""

    def __init__(self, name: str, case: Case) -> None:
        self.case = case
        self.by = make_transport(name, case.most, 2.0, timeout_s=20)
        self.plan = plan_from_ids(case.choice.target_TK, case.placement.experts)

    def dispatch(self) -> Any:
        case = self.case
        received = self.by.dispatch(case.x_TD, case.choice, self.plan, case.placement)
        self.result(received)  # waits for the rows
        return received

    def result(self, received: Any) -> Tensor:
        """What experts would give back: here the rows that came, for time does not ask."""
        x_ND: Tensor = received.x_ND
        return x_ND

    def combine(self, y_ND: Tensor, received: Any) -> Tensor:
        return self.by.combine(y_ND, received)

    @property
    def inbox_bytes(self) -> int:
        """Memory outside of the caching allocator."""
        return self.by.inbox_bytes if isinstance(self.by, PeerMemory) else 0

    def obstacle(self) -> str:
        """Empty if a round trip is exact, bit by bit."""
        case = self.case
        inputs = (case.x_TD, case.choice, self.plan, case.placement)
        out_TD, overflow = round_trip(self.by, *inputs)
        lost = overflow.int()
        dist.all_reduce(lost)
        if lost:
            return "does not fit the static bounds: the step would run by host splits"
        return _unequal(out_TD, case.x_TD, case.visits_T)


class Plain:
    """Torch alone: a row per (token, expert), host splits, weighed at home."""

    inbox_bytes = 0

    def __init__(self, case: Case) -> None:
        self.case, self.W = case, case.placement.ranks
        self.weight_TK = case.choice.weight_TK

    def dispatch(self) -> Any:
        target_TK, E = self.case.choice.target_TK, self.case.placement.experts
        order_R = target_TK.flatten().argsort(stable=True)
        send_E = torch.bincount(target_TK.flatten(), minlength=E)
        per_rank = [len(held) for held in self.case.placement.experts_of_rank]
        mine = per_rank[dist.get_rank()]
        came_WE = exchange(send_E, per_rank, [mine] * self.W, None).view(self.W, mine)
        send = [int(part.sum()) for part in torch.split(send_E, per_rank)]
        receive = came_WE.sum(1).tolist()
        rows = self.case.x_TD[order_R // max(target_TK.size(1), 1)]
        x_ND = exchange(rows, send, receive, None)
        expert_N = torch.arange(mine, device=rows.device).repeat(self.W)
        by_expert_N = expert_N.repeat_interleave(came_WE.flatten()).argsort(stable=True)
        return x_ND[by_expert_N], by_expert_N, order_R, send, receive

    def result(self, state: Any) -> Tensor:
        x_ND: Tensor = state[0]
        return x_ND

    def combine(self, y_ND: Tensor, state: Any) -> Tensor:
        _, by_expert_N, order_R, send, receive = state
        home = torch.empty_like(y_ND)
        home[by_expert_N] = y_ND
        rows = exchange(home, receive, send, None)
        flat = torch.empty_like(rows)
        flat[order_R] = rows
        flat_TKD = flat.view(*self.weight_TK.shape, flat.size(1))
        weighed = flat_TKD.float() * self.weight_TK[..., None]
        return weighed.sum(1).to(y_ND.dtype)

    def obstacle(self) -> str:
        drawn, self.weight_TK = self.weight_TK, torch.ones_like(self.weight_TK)
        state = self.dispatch()
        out_TD = self.combine(self.result(state), state)
        self.weight_TK = drawn
        K = self.weight_TK.size(1)
        return _unequal(out_TD, self.case.x_TD, torch.full_like(self.case.visits_T, K))


class Bare:
    """The two collectives alone, without any work of routing: a floor, not a contender."""

    inbox_bytes = 0

    def __init__(self, case: Case) -> None:
        self.case, self.W = case, case.placement.ranks
        self.x_TD = case.x_TD.new_ones(case.most, case.x_TD.size(1))

    def dispatch(self) -> Any:
        return all_gather(self.x_TD, self.W, None)

    def result(self, state: Any) -> Tensor:
        x_ND: Tensor = state
        return x_ND

    def combine(self, y_ND: Tensor, state: Any) -> Tensor:
        return reduce_scatter(y_ND, self.W, None)

    def obstacle(self) -> str:
        visits_T = torch.full((len(self.x_TD),), self.W, device=self.x_TD.device)
        return _unequal(self.combine(self.dispatch(), None), self.x_TD, visits_T)


Contender = Ours | Plain | Bare
MAKERS: dict[str, Callable[[Case], Contender]] = {
    **{name: lambda case, name=name: Ours(name, case) for name in NAMES},  # type: ignore[misc]
    "plain all-to-all": Plain,
    "bare all-gather / reduce-scatter": Bare,
}


def _unequal(out_TD: Tensor, x_TD: Tensor, times_T: Tensor) -> str:
    """The same on every rank: whether some rank's rows came back wrong."""
    wanted_TD = (x_TD.float() * times_T[:, None]).to(x_TD.dtype)
    wrong = (out_TD != wanted_TD).any(1).sum()
    dist.all_reduce(wrong)
    return f"{int(wrong)} rows came back wrong" if wrong else ""
