"""Attention inside clusters against a cache: beside keys and values it holds the cluster of each
token, and a new token gathers the slots of its own, of the window and of the global tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_router.models.attend_cached import Part
from moe_router.models.attend_clustered import ClusteredAttention
from moe_router.models.attend_routed import Chosen, Executed
from moe_router.models.attend_slots import AT_ONCE, attend_slots
from moe_router.models.block_memory import rows_of
from moe_router.models.kv_cache import LayerCache
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.routing.clusters import Clustered
from moe_router.routing.context import PLAIN


@dataclass(slots=True)
class ClusterMemory:
    """Attributes:
    cluster_BNJ: int32, the cluster of each slot; past a sequence's end anything.
    weight_BNJ: fp32, see `Clustered`.
    """

    cluster_BNJ: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int32))
    weight_BNJ: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))

    def write(
        self, clusters: Clustered, sequence_T: Tensor, slot_T: Tensor, lengths: Sequence[int]
    ) -> None:
        """What the tokens in these slots have chosen.

        Args:
            lengths: of the sequences, the new tokens included.
        """
        B, longest = len(lengths), max(lengths, default=0)
        for name, new_TJ in zip(("cluster_BNJ", "weight_BNJ"), clusters[:2], strict=True):
            held = getattr(self, name)
            met = held.size(2) == new_TJ.size(1)  # some step has met tokens
            if not met or held.size(0) != B or held.size(1) < longest:
                wide = held.size(1) if held.size(1) >= longest else max(longest, 2 * held.size(1))
                more = new_TJ.new_zeros(B, wide, new_TJ.size(1))
                if held.numel():
                    more[: held.size(0), : held.size(1)] = held
                held = more
            held[sequence_T, slot_T] = new_TJ.detach()
            setattr(self, name, held)

    def keep(self, row_B: Tensor, rows: Sequence[int]) -> None:
        """Hold only these sequences, in that order."""
        self.cluster_BNJ = rows_of(self.cluster_BNJ, row_B, rows)
        self.weight_BNJ = rows_of(self.weight_BNJ, row_B, rows)


class CachedClusteredAttention:
    """Args:
    routed: how whole sequences attend.
    cache: of the layer.
    """

    def __init__(self, routed: ClusteredAttention, cache: LayerCache) -> None:
        self.routed, self.config, self.cache = routed, routed.config, cache
        if cache.memory is None:
            cache.memory = ClusterMemory()
        assert isinstance(cache.memory, ClusterMemory)
        self.memory = cache.memory

    def __call__(
        self,
        x_TD: Tensor,
        q_THC: Tensor,
        k_TJC: Tensor,
        v_TJC: Tensor,
        turn: Turn,
        packing: Packing,
    ) -> tuple[Chosen, Tensor]:
        """Append tokens to their sequences; each attends to its cluster. Also the turned keys."""
        held, sequence_T = self.cache.lengths, packing.sequence_T
        q_THC, k_TJC, slot_T = self.cache.append(q_THC, k_TJC, v_TJC, turn, packing)
        clusters = self.routed.router(x_TD, slot_T, packing.offsets_B1, PLAIN)
        self.memory.write(clusters, sequence_T, slot_T, self.cache.lengths)
        if not packing.tokens:
            return Chosen(q_THC, Executed(lambda: 0, 0)), k_TJC
        if not any(held):
            return self.routed.attend(q_THC, k_TJC, v_TJC, packing, clusters), k_TJC
        y_THC, counts = torch.empty_like(q_THC), []
        rows = [b for b, new in enumerate(packing.lengths) if new]
        for is_fresh in (True, False):
            some = [b for b in rows if (held[b] == 0) is is_fresh]
            if not some:
                continue
            part = Part.of(some, packing)
            at = part.token_R
            if is_fresh:
                own = Clustered(clusters.cluster_TJ[at], clusters.weight_TJ[at], {})
                qkv = (q_THC[at], k_TJC[at], v_TJC[at])
                chosen = self.routed.attend(*qkv, part.packing, own)
                y_THC[at], pairs = chosen.y_THC, torch.as_tensor(chosen.executed.pairs())
            else:
                y_THC[at], pairs = self._go_on(q_THC[at], sequence_T[at], slot_T[at])
            counts.append(pairs)
        choosing = self.routed.router.flops(packing.tokens)
        return Chosen(y_THC, Executed(lambda: sum(counts), choosing)), k_TJC

    def _go_on(self, q_THC: Tensor, row_T: Tensor, slot_T: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of sequences that are in the cache already; and the pairs."""
        (T, _, C), J = q_THC.shape, self.memory.cluster_BNJ.size(2)
        outs, pairs = [], slot_T.new_zeros(())
        few = max(1, AT_ONCE // (J * self.cache.bound * C))
        where = (self.cache.pool.kv_2NJSC, self.cache.table_BM)
        for part in torch.split(torch.arange(T, device=slot_T.device), few):
            lists = self._slots(row_T[part], slot_T[part])
            outs.append(attend_slots(q_THC[part], *where, row_T[part], *lists))
            pairs = pairs + lists[1].sum()
        return torch.cat(outs), pairs // J

    def _slots(self, row_T: Tensor, slot_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """slot_TJX, seen_TJX and weight_TJX of `attend_slots`: those of the mask, ascending; as
        many columns as the longest list has."""
        config, memory, bound = self.config, self.memory, self.cache.bound
        place_N, slot_T1 = torch.arange(bound, device=slot_T.device), slot_T[:, None]
        cluster_TNJ = memory.cluster_BNJ[row_T, :bound]
        own_TJ, p_TJ = (x[row_T, slot_T] for x in (memory.cluster_BNJ, memory.weight_BNJ))
        alike_TJN = (cluster_TNJ == own_TJ[:, None]).transpose(1, 2)
        near_TN = (slot_T1 - place_N <= config.window) | (place_N < config.global_tokens)
        seen_TJN = (alike_TJN | near_TN[:, None]) & (place_N <= slot_T1)[:, None]
        most = int(seen_TJN.sum(-1).max())
        seen_TJX, slot_TJX = seen_TJN.sort(dim=-1, descending=True, stable=True)
        seen_TJX, slot_TJX = seen_TJX[..., :most], slot_TJX[..., :most]
        weight_TJX = memory.weight_BNJ[row_T, :bound].transpose(1, 2).gather(2, slot_TJX)
        weight_TJX = weight_TJX * p_TJ[..., None]
        weight_TJX = torch.where(alike_TJN.gather(2, slot_TJX), weight_TJX, 1.0)
        return slot_TJX.clamp(max=bound - 1), seen_TJX, weight_TJX
