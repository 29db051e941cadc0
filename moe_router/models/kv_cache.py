"""Keys and values of the tokens so far, in pages. Each layer has its own lengths and its own table
of pages, so that a layer which some tokens skip holds fewer of them; all layers take their pages
from one pool. For inference: nothing here has a gradient.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_router.errors import ConfigError
from moe_router.models.attend import attend_packed
from moe_router.models.attend_cached import attend_cached
from moe_router.models.cached import Memory
from moe_router.models.packing import Packing
from moe_router.models.pages import Pages
from moe_router.models.rope import Turn
from moe_router.models.transfer import upload
from moe_router_kernels import paged_op, reference_pages

PAGE = 64  # slots: half of a page is wasted a sequence and layer, a table entry is read a page


class LayerCache:
    """Args:
    pool: where pages come from.
    sequences: B.

    Attributes:
        lengths: slots in use; known to the host without a wait.
        pages: of each sequence; full ones may be held by others too.
        length_B: int32, the same on the device.
        table_BM: int32, the pages of each sequence; past them anything.
        memory: what routed attention keeps beside them; None: it is dense.
    """

    def __init__(self, pool: Pages, sequences: int) -> None:
        self.pool = pool
        self.memory: Memory | None = None
        self.lengths = [0] * sequences
        self.pages: list[list[int]] = [[] for _ in range(sequences)]
        self._host_BM = np.zeros((sequences, 1), np.int32)
        self._new = True  # the host knows of more than the device
        self.length_B = torch.zeros(sequences, dtype=torch.int32)
        self.table_BM = torch.zeros(sequences, 1, dtype=torch.int32)

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def bound(self) -> int:
        """No sequence has more slots than this in use."""
        return max(self.lengths, default=0)

    def attend(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """See `cached.CachedLayer`.

        Raises:
            ConfigError: `packing` has another number of sequences.
        """
        before = self.lengths
        q_THC, k_TJC, slot_T = self.append(q_THC, k_TJC, v_TJC, turn, packing)
        if not any(before):
            return attend_packed(q_THC, k_TJC, v_TJC, packing), k_TJC
        cached = (self.pool.kv_2NJSC, self.table_BM, slot_T)
        return attend_cached(q_THC, k_TJC, v_TJC, *cached, packing, before), k_TJC

    def append(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn, and write to the cache.

        Returns:
            Turned queries and keys, and (T,) int64, the slot of each token in its sequence.
        """
        if packing.sequences != self.sequences:
            raise ConfigError(
                f"cache holds {self.sequences} sequences, offsets_B1 has {packing.sequences}: "
                f"want one for one; give a sequence without new tokens an empty range"
            )
        self.make_room(packing.lengths)
        self.settle(k_TJC)
        slot_T = self.length_B[packing.sequence_T] + packing.rank_T
        self.lengths = [held + new for held, new in zip(self.lengths, packing.lengths, strict=True)]
        self.length_B = self.length_B + packing.offsets_B1.diff()
        where = (self.pool.kv_2NJSC, self.table_BM, packing.sequence_T, slot_T)
        return *paged_op.store(
            q_THC.detach(), k_TJC.detach(), v_TJC.detach(), *turn, *where
        ), slot_T

    def make_room(self, more: Sequence[int]) -> None:
        """Take the pages for so many more tokens of each sequence."""
        slots = self.pool.slots
        for row, (held, new) in enumerate(zip(self.lengths, more, strict=True)):
            pages = self.pages[row]
            missing = -(-(held + new) // slots) - len(pages)
            if missing <= 0:
                continue
            self._hold(row, self.pool.take(missing))

    def begin(self, row: int, pages: Sequence[int]) -> None:
        """Let an empty sequence hold full pages that somebody else holds too."""
        self.pool.share(pages)
        self._hold(row, pages)
        self.lengths[row] = len(pages) * self.pool.slots
        self.grow(self.lengths)

    def _hold(self, row: int, more: Sequence[int]) -> None:
        pages = self.pages[row]
        first = len(pages)
        pages += more
        if len(pages) > self._host_BM.shape[1]:
            wider = max(len(pages), 2 * self._host_BM.shape[1])
            self._host_BM = _padded(self._host_BM, self.sequences, wider)
        self._host_BM[row, first : len(pages)] = pages[first:]
        self._new = True

    def settle(self, like_TJC: Tensor) -> None:
        """Have storage for all of it, and the table on the device.

        Args:
            like_TJC: any keys.
        """
        self.pool.fit(like_TJC)
        device = like_TJC.device
        if self._new:
            self.table_BM = upload(torch.from_numpy(self._host_BM), device)
            self._new = False
        if self.length_B.device != device:
            self.length_B = self.length_B.to(device)

    def read(self) -> tuple[Tensor, Tensor]:
        """(B, J, slots, C) keys and values; 0 in slots past a sequence's length."""
        pages = -(-self.bound // self.pool.slots)
        return reference_pages.read(self.pool.kv_2NJSC, self.table_BM[:, :pages], self.length_B)

    def grow(self, lengths: Sequence[int]) -> None:
        """So many slots are in use: somebody has written them by `table_BM`."""
        self.lengths = list(lengths)
        self.length_B = upload(torch.tensor(self.lengths, dtype=torch.int32), self.length_B.device)

    def keep(self, row_B: Tensor, rows: Sequence[int]) -> None:
        """Hold only the sequences `rows`, in that order; row_B is the same on the device."""
        going = set(rows)
        for row, pages in enumerate(self.pages):
            if row not in going:
                self.pool.give(pages)
        self.lengths = [self.lengths[row] for row in rows]
        self.pages = [self.pages[row] for row in rows]
        self._host_BM = self._host_BM[list(rows)]
        self.length_B = self.length_B[row_B]
        if not self._new:  # else the next step brings it whole
            self.table_BM = self.table_BM[row_B]
        if self.memory is not None:
            self.memory.keep(row_B, rows)

    def join(self, sequences: int) -> None:
        """Hold so many more sequences, empty ones, after those that are here."""
        self.lengths += [0] * sequences
        self.pages += [[] for _ in range(sequences)]
        self._host_BM = _padded(self._host_BM, self.sequences, self._host_BM.shape[1])
        self.length_B = torch.cat([self.length_B, self.length_B.new_zeros(sequences)])
        self._new = True


def _padded(host_BM: NDArray[np.int32], rows: int, columns: int) -> NDArray[np.int32]:
    wider = np.zeros((rows, columns), np.int32)
    wider[: host_BM.shape[0], : host_BM.shape[1]] = host_BM
    return wider


class KVCache:
    """One `LayerCache` per layer.

    Args:
        layers: of the model.
        sequences: B, fixed but for `keep` and `join`.
        reserve: tokens, of all sequences together, to hold room for from the start.
        page: slots of a page.
    """

    def __init__(self, layers: int, sequences: int, reserve: int = 0, page: int = PAGE) -> None:
        self.pool = Pages(page, layers * (-(-reserve // page) + sequences if reserve else 0))
        self.layers: Sequence[LayerCache] = [
            LayerCache(self.pool, sequences) for _ in range(layers)
        ]

    def keep(self, row_B: Tensor) -> None:
        """Hold only the sequences `row_B` (int64, on the cache's device), in that order."""
        rows: list[int] = row_B.tolist()
        for layer in self.layers:
            layer.keep(row_B, rows)

    def join(self, sequences: int) -> None:
        """Hold so many more sequences, empty ones, after those that are here."""
        for layer in self.layers:
            layer.join(sequences)
