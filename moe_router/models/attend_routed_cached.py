"""Routed attention against a cache. A block of queries chooses when its first token comes, and
keeps its choice: what a token costs from then on does not depend on how long the text is."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moe_router.models.attend_cached import Part, attend_cached
from moe_router.models.attend_routed import Chosen, Count, Executed, RoutedAttention
from moe_router.models.attend_slots import AT_ONCE, attend_slots
from moe_router.models.block_memory import BlockMemory
from moe_router.models.kv_cache import LayerCache
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router_kernels import reference
from moe_router_kernels.paged_op import attend_pages


def attend_chosen_pages(
    q_THC: Tensor,
    pages_2NJSC: Tensor,
    table_BM: Tensor,
    row_T: Tensor,
    slot_T: Tensor,
    target_TJK: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Single queries to blocks of a paged cache, where a block is whole pages: each KV head is a
    sequence of its own, whose pages are those of the chosen blocks.

    Args:
        pages_2NJSC, table_BM: the cache, see `reference_pages`.
        row_T, slot_T: the sequence of each query, and its slot there.
        target_TJK: int32, blocks of its sequence, ascending, its own as the last, then -1.

    Returns:
        (T, H, C), and (T, J), how many keys each has seen.
    """
    (T, J, _), (_, N, _, S, C) = target_TJK.shape, pages_2NJSC.shape
    inside = torch.arange(block // S, device=slot_T.device)
    place = (target_TJK.clamp(min=0)[..., None] * (block // S) + inside).flatten(2)
    page = table_BM[row_T[:, None, None], place.clamp(max=table_BM.size(1) - 1)]
    head_J1 = torch.arange(J, device=slot_T.device, dtype=page.dtype)[:, None]
    seen_TJ = ((target_TJK >= 0).sum(-1) - 1) * block + (slot_T % block)[:, None] + 1
    y_XGC = attend_pages(
        q_THC.reshape(T * J, -1, C),
        pages_2NJSC.view(2, N * J, 1, S, C),
        (page * J + head_J1).flatten(0, 1),
        torch.arange(T * J, device=slot_T.device),
        seen_TJ.flatten(),
    )
    return y_XGC.reshape(q_THC.shape), seen_TJ


class CachedRoutedAttention:
    """Args:
    routed: how whole sequences attend.
    cache: of the layer.
    """

    def __init__(self, routed: RoutedAttention, cache: LayerCache) -> None:
        self.routed, self.config, self.cache = routed, routed.config, cache
        if cache.memory is None:
            cache.memory = BlockMemory(self.config.block)
        assert isinstance(cache.memory, BlockMemory)
        self.memory = cache.memory

    def __call__(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Chosen, Tensor]:
        """Append tokens to their sequences; each attends to what its block has chosen.

        Returns:
            Also the turned keys.
        """
        held = self.cache.lengths
        q_THC, k_TJC, slot_T = self.cache.append(q_THC, k_TJC, v_TJC, turn, packing)
        return self._attend_all(q_THC, k_TJC, v_TJC, slot_T, packing, held), k_TJC

    def _attend_all(
        self,
        q_THC: Tensor,
        k_TJC: Tensor,
        v_TJC: Tensor,
        slot_T: Tensor,
        packing: Packing,
        held: Sequence[int],
    ) -> Chosen:
        if packing.tokens == 0:
            return Chosen(q_THC, Executed(lambda: 0, 0))
        cache = self.cache
        self.memory.write(k_TJC, packing.sequence_T, slot_T, cache.lengths, self.config.top_k)
        rows = [b for b, new in enumerate(packing.lengths) if new]
        fresh, running = ([b for b in rows if (held[b] == 0) is new] for new in (True, False))
        if not running:
            return self._begin(fresh, q_THC, k_TJC, v_TJC, packing)
        if self.routed.sees_all(-(-cache.bound // self.config.block), self.config.top_k):
            self._remember_all(rows, k_TJC)
            where = (cache.pool.kv_2NJSC, cache.table_BM, slot_T, packing, held)
            y_THC = attend_cached(q_THC, k_TJC, v_TJC, *where)
            return Chosen(y_THC, Executed(lambda: (slot_T + 1).sum(), 0))
        y_THC, choosing, counts = torch.empty_like(q_THC), 0, []
        for some in filter(None, (fresh, running)):
            part = Part.of(some, packing)
            q, k, v, slot_R = (x[part.token_R] for x in (q_THC, k_TJC, v_TJC, slot_T))
            if some is fresh:
                chosen = self._begin(some, q, k, v, part.packing)
            else:
                chosen = self._go_on(some, q, slot_R, part.packing, held)
            y_THC[part.token_R] = chosen.y_THC
            counts.append(chosen.executed.pairs)
            choosing += chosen.executed.choosing
        return Chosen(y_THC, Executed(lambda: sum(count() for count in counts), choosing))

    def _begin(
        self, rows: Sequence[int], q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, packing: Packing
    ) -> Chosen:
        """Sequences of which the cache held nothing."""
        chosen, blocks = (
            self.routed(q_THC, k_TJC, v_TJC, packing),
            packing.blocks(self.config.block),
        )
        if chosen.target_NJK is None:
            self._remember_all(rows, k_TJC)
            return chosen
        sizes = [-(-new // self.config.block) for new in packing.lengths if new]
        last_R = torch.tensor(list(accumulate(sizes)), device=q_THC.device) - 1
        target_RJK, low_R11 = chosen.target_NJK[last_R], blocks.low_N[last_R][:, None, None]
        target_RJK = torch.where(target_RJK < 0, -1, target_RJK - low_R11)
        row_R = torch.tensor(rows, device=q_THC.device)
        weight_NJK = chosen.weight_NJK
        weight_RJK = (target_RJK >= 0).float() if weight_NJK is None else weight_NJK[last_R]
        self.memory.remember(row_R, target_RJK, weight_RJK)
        return chosen

    def _remember_all(self, rows: Sequence[int], like_TJC: Tensor) -> None:
        """The last blocks of these sequences see all that is there."""
        J, device = like_TJC.size(1), like_TJC.device
        row_R = torch.tensor(rows, device=device)
        last_R1 = (self.cache.length_B[row_R, None] - 1) // self.config.block
        k = torch.arange(self.config.top_k, dtype=torch.int32, device=device)
        target_RJK = torch.where(k <= last_R1, k, -1)[:, None].expand(-1, J, -1)
        weight_RJK = (target_RJK >= 0).to(self.memory.weight_BJK.dtype)
        self.memory.remember(row_R, target_RJK, weight_RJK)

    def _go_on(
        self,
        rows: Sequence[int],
        q_THC: Tensor,
        slot_T: Tensor,
        packing: Packing,
        held: Sequence[int],
    ) -> Chosen:
        """Sequences that are in the cache already: the blocks that begin choose now."""
        size, memory, device = self.config.block, self.memory, q_THC.device
        J, C = memory.sum_BNJC.shape[2:]
        targets, weights = [], []
        unit_T: list[int] = []  # which query block each token is of
        last: list[int] = []
        start = units = choosing = 0
        for b, new in zip(rows, packing.lengths, strict=True):
            first, end = held[b] // size, (held[b] + new - 1) // size
            if held[b] % size:  # its first new tokens belong to a block that has chosen
                targets.append(memory.target_BJK[b][None])
                weights.append(memory.weight_BJK[b][None])
            begun = range(-(-held[b] // size), end + 1)
            if begun:
                token = [start + n * size - held[b] for n in begun]
                key_NJC = memory.sum_BNJC[b, : end + 1] / size
                target, weight = self._choose(q_THC[token], key_NJC, begun)
                targets.append(target)
                weights.append(weight)
                choosing += self.config.choosing(len(begun), end + 1, J * C, end + 1)
            unit_T += [units + (held[b] + i) // size - first for i in range(new)]
            start, units = start + new, units + end - first + 1
            last.append(units - 1)
        row_R, last_R, at_T = (torch.tensor(x, device=device) for x in (rows, last, unit_T))
        target_UJK, weight_UJK = torch.cat(targets), torch.cat(weights)
        memory.remember(row_R, target_UJK[last_R], weight_UJK[last_R])
        row_T = row_R[packing.sequence_T]
        y_THC, pairs = self._attend(q_THC, row_T, slot_T, target_UJK[at_T], weight_UJK[at_T])
        return Chosen(y_THC, Executed(pairs, choosing))

    def _choose(self, q_MHC: Tensor, key_NJC: Tensor, own: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For blocks of one sequence, by their first queries."""
        J, C = key_NJC.shape[1:]
        own_M = torch.tensor(own, dtype=torch.int32, device=q_MHC.device)
        low_M = torch.zeros_like(own_M)
        with torch.autocast(q_MHC.device.type, enabled=False):
            query_MJC = reference.wide(q_MHC).view(len(own), J, -1, C).mean(2)
            bounds = (own_M, low_M, own_M + 1)
            how = (len(key_NJC), self.config.top_k)
            return self.routed.router.choose(query_MJC, key_NJC, *bounds, *how)

    def _attend(
        self,
        q_THC: Tensor,
        row_T: Tensor,
        slot_T: Tensor,
        target_TJK: Tensor,
        weight_TJK: Tensor,
    ) -> tuple[Tensor, Count]:
        """Each token to its own slots, as many tokens at a time as memory bears; and the pairs."""
        (T, J, K), C, size = target_TJK.shape, q_THC.size(2), self.config.block
        pool, device = self.cache.pool, slot_T.device
        if size % pool.slots == 0 and not self.config.gated:
            where = (pool.kv_2NJSC, self.cache.table_BM, row_T, slot_T, target_TJK, size)
            y_THC, seen_TJ = attend_chosen_pages(q_THC, *where)
            return y_THC, lambda: seen_TJ.sum() // J
        at, outs, pairs = torch.arange(size, device=device), [], slot_T.new_zeros(())
        token_T, few = torch.arange(T, device=device), max(1, AT_ONCE // (J * K * size * C))
        for part in torch.split(token_T, few):
            target = target_TJK[part]
            slot = (target.clamp(min=0)[..., None] * size + at).flatten(2).long()
            seen = (slot <= slot_T[part, None, None]) & (target >= 0).repeat_interleave(size, -1)
            slot = slot.clamp(max=self.cache.bound - 1)  # past the end is not seen
            weight = None
            if self.config.gated:
                weight = weight_TJK[part].repeat_interleave(size, -1)
            cells = (pool.kv_2NJSC, self.cache.table_BM, row_T[part])
            outs.append(attend_slots(q_THC[part], *cells, slot, seen, weight))
            pairs = pairs + seen.sum()
        return torch.cat(outs), lambda: pairs // J
