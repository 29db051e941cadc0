"""All-to-all with static shapes: each rank has a fixed number of slots for every other one.

Nothing is counted and the host waits for nothing, so a step can be captured in a CUDA graph. A
token that finds no slot is dropped and the overflow flag says so: see `bounded.py`.
"""

import torch
from torch import Tensor

from moe_router.dispatch.all_to_all import AllToAll
from moe_router.dispatch.base import Group
from moe_router.dispatch.exchange import Splits
from moe_router.dispatch.where import rows_of_experts, slots_of_rank
from moe_router.placement import Placement


class Padded(AllToAll):
    """Args:
    tokens: what the slots are cut for: the most tokens of one rank, equal on all of them.
    factor: slots of a (source, destination), and rows of a rank's experts, as a multiple of what
        even routing fills; at least 1.
    group: the ranks; None is the default process group.
    """

    def __init__(self, tokens: int, factor: float = 2.0, group: Group = None) -> None:
        super().__init__(group)
        self._tokens, self._factor = tokens, factor
        self._cut: dict[tuple[Placement, int, torch.device], Splits] = {}

    def _splits(self, rank_TK: Tensor, placement: Placement) -> Splits:
        K, device = rank_TK.size(1), rank_TK.device
        key = (placement, K, device)
        if key not in self._cut:
            send = slots_of_rank(self._tokens, placement, K, self._factor)
            receive = [send[self.rank]] * self.ranks
            bound = (self._tokens, placement, self.rank, K, sum(receive), self._factor)
            send_W = torch.tensor(send, device=device)
            self._cut[key] = Splits(send, receive, send_W, rows_of_experts(*bound))
        return self._cut[key]
